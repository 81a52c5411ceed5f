"""Distil a teacher into a student: a plain training loop on Hugging Face Accelerate.

    from kdkernels.trainer import TrainConfig, train

    config = TrainConfig(run_dir="runs/mine", epochs=10, temperature=4.0)
    result = train(config, student, train_loader, teacher=teacher, eval_loader=test_loader)
    print(result.history[-1])

A loader gives `(inputs, labels)` batches, a model gives logits of shape (*labels.shape, vocab). Run
it again with the same `run_dir` after a crash and it goes on from the last checkpoint. Several
devices or machines: `accelerate launch your_script.py`.
"""

from kdkernels.trainer._extras import require

require("safetensors", "tensorboard", "tqdm", "accelerate")

from kdkernels.trainer.checkpoint import CheckpointError  # noqa: E402
from kdkernels.trainer.config import TrainConfig  # noqa: E402
from kdkernels.trainer.loop import TrainResult, evaluate, train  # noqa: E402

__all__ = ["CheckpointError", "TrainConfig", "TrainResult", "evaluate", "train"]
