"""Distil a causal language model into a smaller one that shares its tokenizer.

    accelerate launch --num_processes 8 examples/distill_llm.py \\
        --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B --text corpus.txt --output-dir out

One process a GPU, under DDP; `accelerate launch --use_fsdp --fsdp_version 2` shards the student.
Each process holds a teacher. Killed, it goes on with --resume. A step's tokens are
processes x batch x accumulation x length: 8 x 4 x 2 x 2048 = 131072 here. pip install
"kdkernels[llm]".
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    default_data_collator,
)

from kdkernels.integrations.transformers import DistillationTrainer

# Options of kdkernels.linear_distillation_loss. jsd, reverse_kl, ... are other divergences. A chunk
# of 4096 rows keeps a GPU's products efficient, and is all the memory that the logits take.
LOSS = {"divergence": "forward_kl", "kd_weight": 0.9, "ce_weight": 0.1, "chunk_rows": 4096}


def blocks(tokenizer, text, length):
    """Paragraphs one after the other, cut into sequences of `length`; your own dataset goes here.

    A label of -100 keeps its token out of the loss: prompts, padding.
    """
    ids = []
    for paragraph in text.split("\n\n"):
        ids += [*tokenizer(paragraph)["input_ids"], tokenizer.eos_token_id]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in starts]


def distil(student, teacher, tokenizer, data, args, held_out=64, loss_options=LOSS, resume=False):
    """Train `student` in place and save it to `args.output_dir`; returns the held-out figures."""
    trainer = DistillationTrainer(
        student,
        args,
        teacher=teacher,
        loss_options=loss_options,
        processing_class=tokenizer,
        train_dataset=data[held_out:],
        eval_dataset=data[:held_out],
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    figures = trainer.evaluate()  # eval_loss, eval_kd, eval_ce, eval_top1_agreement
    trainer.save_model()
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "student", "text", "output-dir"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("length", 2048), ("batch", 4), ("accumulate", 2), ("held-out", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    options = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=cuda,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        bf16=cuda,
        use_cpu=not cuda,
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 5),
        save_steps=max(1, options.steps // 5),
        logging_steps=10,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    dtype = torch.bfloat16 if cuda else torch.float32  # the teacher needs no gradients
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=dtype)
    with open(options.text, encoding="utf-8") as file:
        data = blocks(tokenizer, file.read(), options.length)
    print(distil(student, teacher, tokenizer, data, args, options.held_out, resume=options.resume))


if __name__ == "__main__":
    main()
