"""What makes a run resume exactly: weights, optimiser, random states and the place in the data.

Only the main process writes and every process reads, so `run_dir` must be one folder for all.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kdkernels.trainer.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from kdkernels.trainer.config import FREE_TO_CHANGE, TrainConfig


@dataclasses.dataclass
class Progress:
    """Where a run is; `batch` counts the batches already used of epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


def _random_state() -> dict[str, Any]:
    """This process's random states, as JSON can hold them."""
    numpy_state: Any = np.random.get_state()
    name, keys, *position = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *position],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in _cuda_states()],
    }


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    for device, cuda_state in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(_bytes(cuda_state), device)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


@contextmanager
def kept_random_state() -> Iterator[None]:
    state = _random_state()
    try:
        yield
    finally:
        set_random_state(state)


def save(
    config: TrainConfig,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: Any,
    folder: Path,
    batches_per_epoch: int,
    progress: Progress,
    objective: str | None,
) -> None:
    """Every process takes part: shards are gathered, the main process writes.

    `student` is all that is trained, projectors too.
    """
    model = accelerator.unwrap_model(student)
    names = _trained(model)
    moments = {
        f"{names[index]}/{key}": _full(value)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)  # SGD without momentum keeps a None
    }
    tensors = {"student": full_state_dict(model), "optimizer": moments}
    state = {
        "config": dataclasses.asdict(config),
        "batches_per_epoch": batches_per_epoch,
        "objective": objective,
        "progress": dataclasses.asdict(progress),
        "random": gather_object([_random_state()]),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    if accelerator.is_main_process:
        save_checkpoint(folder, progress.step, tensors, state, config.keep_checkpoints)
    accelerator.wait_for_everyone()


def restore(
    config: TrainConfig,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: Any,
    folder: Path,
    batches_per_epoch: int,
    objective: str | None,
) -> tuple[Progress, dict[str, Any]] | None:
    """Load the newest checkpoint, if any, into model and optimiser; every process reads it."""
    loaded = load_checkpoint(folder)
    if loaded is None:
        return None
    tensors, state = loaded
    _check_same_run(folder, config, accelerator, batches_per_epoch, objective, state)

    model = accelerator.unwrap_model(student)
    own = model.state_dict()
    _check_weights(folder, {name: value.shape for name, value in own.items()}, tensors["student"])
    model.load_state_dict({name: _like(own[name], v) for name, v in tensors["student"].items()})

    parameters = dict(model.named_parameters())
    indices = {name: index for index, name in enumerate(_trained(model))}
    moments: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors["optimizer"].items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        value = _like(parameter, value) if value.shape == parameter.shape else value
        moments.setdefault(indices[name], {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"]), state["random"][accelerator.process_index]


def _check_same_run(
    folder: Path,
    config: TrainConfig,
    accelerator: Accelerator,
    batches_per_epoch: int,
    objective: str | None,
    state: dict[str, Any],
) -> None:
    then = {**state["config"], "batches_per_epoch": state["batches_per_epoch"]}
    now = {**dataclasses.asdict(config), "batches_per_epoch": batches_per_epoch}
    then["objective"], now["objective"] = state.get("objective"), objective
    then["processes"], now["processes"] = len(state["random"]), accelerator.num_processes
    changed = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if name not in FREE_TO_CHANGE and then.get(name) != now.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{folder} holds another run: {'; '.join(changed)}. Give another run_dir, or the "
            "options it was started with to go on"
        )


def _check_weights(folder: Path, own: dict[str, Any], saved: dict[str, Tensor]) -> None:
    for name in sorted(own.keys() | saved.keys()):
        here = tuple(own[name]) if name in own else "absent"
        there = tuple(saved[name].shape) if name in saved else "absent"
        if here != there:
            raise CheckpointError(
                f"{folder} holds another student: {name} is {there} there and {here} here"
            )


def _trained(model: nn.Module) -> list[str]:
    """Names of the parameters the optimiser holds, in its order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    return {name: _full(value) for name, value in model.state_dict().items()}


def _full(value: Tensor) -> Tensor:
    """The whole of a tensor that FSDP shards; a collective call there."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(own: Tensor, full: Tensor) -> Tensor:
    """`full` sharded as `own` is."""
    if isinstance(own, DTensor):
        return distribute_tensor(full.to(own.device), own.device_mesh, own.placements)
    return full
