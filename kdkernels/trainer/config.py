"""Every option of a training run, in one dataclass; `kdkernels train` makes its flags from it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from kdkernels.divergences import DIVERGENCES

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
MIXED_PRECISIONS = ("no", "bf16", "fp16")

# Fields that change what is kept or shown, never the weights: they may differ when a run resumes.
FREE_TO_CHANGE = ("run_dir", "checkpoint_every", "keep_checkpoints", "log_every", "progress")


def option(default: Any, text: str) -> Any:
    """A dataclass field with its one description, which is also the command line's help."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train`; `TrainConfig.__dataclass_fields__[name].metadata["help"]` describes each.

    A step is one optimiser step. Raises ValueError, naming the field and what it accepts.
    """

    run_dir: str | os.PathLike[str] | None = option(
        None,
        "folder for checkpoints, TensorBoard scalars and the final weights; none: write nothing",
    )
    epochs: int = option(10, "passes over the training loader")
    seed: int = option(0, "seeds Python, NumPy, torch and the order of the data")

    kd_weight: float = option(0.9, "weight of the distillation term; 0 trains without a teacher")
    ce_weight: float = option(0.1, "weight of the cross-entropy with the labels")
    z_loss_weight: float = option(0.0, "weight of the squared log-sum-exp of the student's logits")
    divergence: str = option("forward_kl", f"distillation term: {', '.join(DIVERGENCES)}")
    divergence_args: dict[str, float] = option({}, 'its parameters, such as {"beta": 0.3}')
    temperature: float = option(4.0, "softmax temperature of student and teacher in that term")
    label_smoothing: float = option(0.0, "probability the cross-entropy spreads over all classes")
    ignore_index: int = option(-100, "the label of a row that has none")
    mask_kd: bool = option(
        True, "rows without a label take no part in the distillation term either"
    )

    optimizer: str = option("adamw", f"one of {', '.join(OPTIMIZERS)}")
    learning_rate: float = option(1e-3, "its highest value")
    weight_decay: float = option(0.0, "decoupled for adamw, L2 for sgd; on every parameter")
    momentum: float = option(0.9, "of sgd")
    schedule: str = option("cosine", f"learning rate after the warm-up: {', '.join(SCHEDULES)}")
    warmup_steps: int = option(0, "steps over which the learning rate rises linearly from 0")
    accumulation_steps: int = option(1, "batches whose gradients add up to one step")
    max_grad_norm: float | None = option(
        1.0, "largest gradient norm (L2, all parameters); none: any"
    )
    mixed_precision: str = option("no", f"autocast: {', '.join(MIXED_PRECISIONS)}")

    eval_every: int | None = option(None, "steps between evaluations; none: once an epoch")
    checkpoint_every: int | None = option(None, "steps between checkpoints; none: once an epoch")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints stay on disk")
    log_every: int = option(10, "steps between TensorBoard scalars")
    progress: bool = option(True, "show a progress bar (on a terminal)")

    def __post_init__(self) -> None:
        if self.run_dir is not None:
            object.__setattr__(self, "run_dir", os.fspath(self.run_dir))  # JSON holds no Path
        for name, accepted in (
            ("divergence", tuple(DIVERGENCES)),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("mixed_precision", MIXED_PRECISIONS),
        ):
            self._require(name, f"one of {', '.join(accepted)}", getattr(self, name) in accepted)
        for name, least in (
            ("epochs", 1),
            ("seed", 0),
            ("warmup_steps", 0),
            ("accumulation_steps", 1),
            ("eval_every", 1),
            ("checkpoint_every", 1),
            ("keep_checkpoints", 2),  # the one before a damaged checkpoint must still be there
            ("log_every", 1),
        ):
            value = getattr(self, name)
            optional = name in ("eval_every", "checkpoint_every")
            fits = type(value) is int and value >= least
            accepted_text = f"an integer of at least {least}{' or None' if optional else ''}"
            self._require(name, accepted_text, fits or (optional and value is None))
        for name in ("kd_weight", "ce_weight", "z_loss_weight", "weight_decay"):
            self._require(name, "a finite number of at least 0", _finite(self, name, 0.0))
        for name in ("label_smoothing", "momentum"):
            fits = _finite(self, name, 0.0) and getattr(self, name) <= 1.0
            self._require(name, "a number in [0, 1]", fits)
        for name in ("learning_rate", "temperature"):
            fits = _finite(self, name, 0.0) and getattr(self, name) > 0.0
            self._require(name, "a finite number above 0", fits)
        fits = self.max_grad_norm is None or (
            _finite(self, "max_grad_norm", 0.0) and self.max_grad_norm > 0.0
        )
        self._require("max_grad_norm", "a finite number above 0 or None", fits)
        if self.kd_weight == 0.0 and self.ce_weight == 0.0:
            raise ValueError("kd_weight and ce_weight are both 0: one of them must be above 0")
        self.make_divergence()

    def _require(self, name: str, accepted: str, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is {accepted}")

    def make_divergence(self) -> Any:
        """The divergence object `divergence` and `divergence_args` describe.

        Raises ValueError if the divergence does not take those parameters.
        """
        try:
            return DIVERGENCES[self.divergence](**self.divergence_args)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"divergence_args is {self.divergence_args!r}; {self.divergence} says: {error}"
            ) from error


def _finite(config: TrainConfig, name: str, least: float) -> bool:
    value = getattr(config, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= least


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of `total_steps`; a function of nothing else.

    A schedule without a state is one thing less to restore when a run resumes.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - done)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate
