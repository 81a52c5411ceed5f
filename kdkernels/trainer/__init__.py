"""Distil a teacher into a student: a plain training loop on Hugging Face Accelerate.

    from kdkernels.trainer import TrainConfig, train

    config = TrainConfig(run_dir="runs/mine", epochs=10, temperature=4.0)
    result = train(config, student, train_loader, teacher=teacher, eval_loader=test_loader)
    print(result.history[-1])

A loader gives `(inputs, labels)` batches, a model gives logits of shape (*labels.shape, vocab).
Other terms (features of named layers, similarities, relations, real targets, a regulariser) are an
`Objective`, given as `objective=`. Run it again with the same `run_dir` after a crash and it goes
on from the last checkpoint. Several devices or machines: `accelerate launch your_script.py`.
"""

from kdkernels.trainer._extras import require

require("safetensors", "tensorboard", "tqdm", "accelerate")

from kdkernels.trainer.checkpoint import CheckpointError  # noqa: E402
from kdkernels.trainer.config import TrainConfig  # noqa: E402
from kdkernels.trainer.loop import TrainResult, evaluate, train  # noqa: E402
from kdkernels.trainer.objective import (  # noqa: E402
    Features,
    Labels,
    Logits,
    Objective,
    Regression,
    Regularizer,
    Relation,
    Schedule,
    Similarity,
)

__all__ = [
    "CheckpointError",
    "Features",
    "Labels",
    "Logits",
    "Objective",
    "Regression",
    "Regularizer",
    "Relation",
    "Schedule",
    "Similarity",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "train",
]
