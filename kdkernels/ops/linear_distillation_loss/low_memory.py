"""linear_distillation_loss whose logits are never in memory: the ops, and their autograd Function.

The forward keeps a row's log-sum-exps and sums, 56 bytes a token; the backward forms the logits
once more, for any upstream factors. Triton has the kernels (triton_kernels.py, where the floating-
point operations are counted); other devices and backends have none.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._common import no_double_backward
from ..distillation_loss import OPTION_NAMES, OPTIONS
from ..distillation_loss.reference import ROWS, STATS

HEADS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits, "
    "float? student_softcap, float student_logit_scale, ScalarType student_operands, "
    "float? teacher_softcap, float teacher_logit_scale, ScalarType teacher_operands"
)
SCHEMAS = {
    "low_memory": f"({HEADS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "low_memory_backward": "(Tensor grad_loss, Tensor rows, Tensor at_labels, SymInt panel_bytes, "
    f"bool[] wanted, {HEADS}, Tensor? labels, str divergence, float label_smoothing, "
    "SymInt vocab_size) -> Tensor[]",
}
_OP = "kdkernels::linear_distillation_loss_{}_triton"
_KERNELS = f"{__package__}.triton_kernels"

# Bytes of the panels of the logits' gradient where nobody says, at least; the student's hidden
# states' own size where that is more. The hidden states' float32 gradient is read and written once
# a panel: with this, 2.5 ms of an H100's memory time at N = 8192, H = 4096, V = 128256, where the
# products take 50 at their peak.
PANEL_BYTES = 64 * 2**20


def refusal(device: torch.device, dtypes: tuple[torch.dtype, ...], backend: str | None) -> None:
    """Raise unless the kernels can serve tensors on this device."""
    if backend not in (None, "triton"):
        raise RuntimeError(
            f"backend={backend!r} cannot serve low_memory=True: its kernels are Triton's; "
            "accepted: None, 'triton'"
        )
    try:
        _backend.choose("triton", device, dtypes)
    except RuntimeError as error:
        raise RuntimeError(f"low_memory=True: {error}") from error


def serves(device: torch.device, dtypes: tuple[torch.dtype, ...], backend: str | None) -> bool:
    """Whether to take these kernels where memory leaves no useful chunk of rows."""
    if device.type != "cuda" or backend not in (None, "triton"):
        return False
    return _backend._refusal("triton", device, dtypes, ("triton",)) is None


def _low_memory_fake(student_hidden, *args):
    option = dict(zip(OPTION_NAMES, args[12:], strict=True))
    n = student_hidden.shape[0]
    lines = len(ROWS) + (len(STATS) if option["return_stats"] else 0)
    shape = (n,) if option["reduction"] == "none" else ()
    return tuple(
        student_hidden.new_empty(size, dtype=torch.float32) for size in (shape, (lines, n), (2, n))
    )


def _low_memory_backward_fake(grad_loss, rows, at_labels, panel_bytes, wanted, *args):
    return [
        grad_loss.new_empty(0) if x is None or not wants else x.new_empty(x.shape)
        for x, wants in zip(args[:7], wanted, strict=True)
    ]


for _name, _fake in (
    ("low_memory", _low_memory_fake),
    ("low_memory_backward", _low_memory_backward_fake),
):
    torch.library.define(_OP.format(_name), SCHEMAS[_name])
    torch.library.impl(
        _OP.format(_name), ("CPU", "CUDA"), functools.partial(_backend._launch, _KERNELS, _name)
    )
    torch.library.register_fake(_OP.format(_name), _fake)


def apply(
    tensors: list[Tensor | None], transforms: tuple, panel_bytes: int | None, row: tuple
) -> tuple[Tensor, Tensor]:
    """(loss, statistics) of the seven tensors."""
    if panel_bytes is None:
        hidden = tensors[0]
        assert hidden is not None
        panel_bytes = max(PANEL_BYTES, hidden.shape[0] * hidden.shape[1] * hidden.element_size())
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _LowMemory.apply(*tensors, transforms, panel_bytes, row)
    loss, rows, _ = _forward(*tensors, *transforms, *row)
    return loss, rows[len(ROWS) :]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.kdkernels.linear_distillation_loss_low_memory_triton(*args)


class _LowMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, transforms, panel_bytes, row = args
        loss, rows, at_labels = _forward(*tensors, *transforms, *row)
        option = dict(zip(OPTION_NAMES, row, strict=True))
        names = ("divergence", "label_smoothing", "vocab_size")
        ctx.rest = tuple(option[name] for name in names)
        ctx.transforms, ctx.panel_bytes = transforms, panel_bytes
        ctx.needed = list(ctx.needs_input_grad[: len(tensors)])
        ctx.save_for_backward(*tensors, rows, at_labels, option["labels"])
        stats = rows[len(ROWS) :].clone()
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * (len(ctx.needed) + 3)
        *tensors, rows, at_labels, labels = ctx.saved_tensors
        with torch.no_grad():
            grads = torch.ops.kdkernels.linear_distillation_loss_low_memory_backward_triton(
                grad_loss, rows, at_labels, ctx.panel_bytes, ctx.needed, *tensors, *ctx.transforms,
                labels, *ctx.rest,
            )  # fmt: skip
        differentiable = [x for x in (grad_loss, *tensors) if x is not None]
        return *no_double_backward(ctx, grads, *differentiable), None, None, None
