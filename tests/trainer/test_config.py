"""Every mistake in a config names the field, what was given and what is accepted."""

import math
from pathlib import Path

import pytest

from kdkernels.trainer import TrainConfig
from kdkernels.trainer.config import FREE_TO_CHANGE, learning_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence is 'kl'; accepted is one of forward_kl, reverse_kl"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; accepted is one of adamw, sgd"),
        ({"schedule": "step"}, "schedule is 'step'; accepted is one of constant, linear, cosine"),
        ({"mixed_precision": "int8"}, "accepted is one of no, bf16, fp16"),
        ({"epochs": 0}, "epochs is 0; accepted is an integer of at least 1"),
        ({"epochs": 1.5}, "epochs is 1.5; accepted is an integer"),
        ({"seed": -1}, "seed is -1; accepted is an integer of at least 0"),
        ({"eval_every": 0}, "eval_every is 0; accepted is an integer of at least 1 or None"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"keep_checkpoints": 1}, "keep_checkpoints is 1; accepted is an integer of at least 2"),
        ({"keep_checkpoints": None}, "keep_checkpoints is None"),
        ({"accumulation_steps": True}, "accumulation_steps is True"),
        ({"kd_weight": -0.1}, "kd_weight is -0.1; accepted is a finite number of at least 0"),
        ({"ce_weight": math.nan}, "ce_weight is nan"),
        ({"label_smoothing": 1.1}, r"label_smoothing is 1.1; accepted is a number in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0; accepted is a finite number above 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0; accepted is a finite number above 0 or None"),
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "kd_weight and ce_weight are both 0"),
        ({"divergence": "jsd", "divergence_args": {"beta": 2.0}}, r"jsd says: .*beta=2.0"),
        ({"divergence_args": {"beta": 0.5}}, "forward_kl says: .*unexpected keyword.*beta"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_run_dir_may_be_a_path():
    assert TrainConfig(run_dir=Path("runs") / "mine").run_dir == "runs/mine"


def test_divergence_with_arguments():
    config = TrainConfig(divergence="skew_reverse_kl", divergence_args={"lam": 0.3})
    assert config.make_divergence().name == "skew_reverse_kl"


def test_free_fields_exist():
    assert set(FREE_TO_CHANGE) <= set(TrainConfig.__dataclass_fields__)


def test_every_field_is_described():
    for name, field in TrainConfig.__dataclass_fields__.items():
        assert field.metadata["help"], name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + 0.5 / math.sqrt(2), 0.5, 0.5 - 0.5 / math.sqrt(2)]),
    ],
)
def test_learning_rates(schedule, expected):
    config = TrainConfig(schedule=schedule, warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate(config, step, 6) for step in range(6)]
    assert rates == pytest.approx(expected)
    assert learning_rate(TrainConfig(warmup_steps=9), 0, 1) == pytest.approx(1e-4)
