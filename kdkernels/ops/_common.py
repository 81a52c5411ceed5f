"""What several ops share: checks of their arguments, and the guard of their backwards."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..divergences import Parameter

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floats(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: Tensor")
    if value.dtype not in FLOATS:
        accepted = ", ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: {accepted}")


def check_names(function: str, options: Iterable[str], accepted: Iterable[str]) -> None:
    names = list(accepted)
    for name in options:
        if name not in names:
            raise TypeError(f"{function} got {name!r}; accepted: {', '.join(names)}")


def option_pair(
    name: str,
    value: Parameter,
    leading: torch.Size,
    device: torch.device,
    compute: torch.dtype,
    positive: bool = False,
) -> tuple[float, Tensor | None]:
    """(number, None) or (0, tensor of 1 or N values), as the schemas take an option."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; accepted: float or Tensor")
        # Not math.isfinite, which torch.compile cannot trace on a number that it made dynamic.
        if not abs(value) < math.inf or (positive and value <= 0):
            accepted = "a finite float" + (" > 0" if positive else "")
            raise ValueError(f"{name}={value}; accepted: {accepted}, or a Tensor")
        return float(value), None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: real dtypes")
    if value.dim() and value.shape != leading:
        shapes = "()" if leading == () else f"(), or {tuple(leading)}"
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: a float, {shapes}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; accepted: the logits' device {device}")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad; accepted: a float, or a tensor without gradient")
    return 0.0, value.reshape(-1).to(compute)


def two_dimensional(x: Tensor, columns: int) -> Tensor:
    """(N, columns) with columns of stride 1: a view wherever the strides allow one."""
    rows = x if x.dim() == 2 else x.reshape(-1, columns)
    return rows if columns == 1 or rows.stride(1) == 1 else rows.contiguous()


def no_double_backward(
    ctx: Any, grads: Sequence[Tensor | None], *differentiable: Tensor
) -> list[Tensor | None]:
    """The gradients that are needed, guarded where somebody would differentiate them again."""
    wanted = [
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)
    ]
    if torch.is_grad_enabled():
        wanted = [
            _NoDoubleBackward.apply(g, *differentiable) if g is not None else g for g in wanted
        ]
    return wanted


class _NoDoubleBackward(torch.autograd.Function):
    """Identity whose backward raises: a gradient penalty fails by name, not in silence."""

    @staticmethod
    def forward(ctx, grad, *differentiable):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "double backward through a kdkernels op is not implemented; accepted: first derivatives"
        )


def check_pair(student: Any, teacher: Any, dims: tuple[int, ...], shape: str) -> None:
    """Features whose rows correspond: (..., N, D) of the same number of rows; widths may differ."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_floats(name, x)
        if x.dim() not in dims or x.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: {shape}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)}; accepted: "
            f"({', '.join(map(str, student.shape[:-1]))}, any width) for student "
            f"{tuple(student.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher is on {teacher.device}; accepted: student's device {student.device}"
        )


def check_shape(
    name: str, value: Any, leading: torch.Size, device: torch.device, of: str = "the logits"
) -> None:
    """A tensor with one value for each row of `of`, and where they are."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: Tensor")
    if value.shape != leading:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: {tuple(leading)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; accepted: {of}' device {device}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float64 where one of them is float64, else float32."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def computed(*tensors: Tensor) -> list[Tensor]:
    """Detached, in the dtype that is computed in."""
    dtype = compute_dtype(*tensors)
    return [x.detach().to(dtype) for x in tensors]


def zero_wins(weight: Tensor, x: Tensor) -> Tensor:
    """weight·x, and 0 where the weight is 0, whatever x is."""
    return torch.where(weight == 0, 0.0, weight * x)


def inverse_or_zero(x: Tensor) -> Tensor:
    """1/x, 0 where x is."""
    return torch.where(x == 0, 0.0, 1 / x)


def distinct(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The same tensors, repeats as views of themselves: a compiled graph takes none twice."""
    result: list[Tensor | None] = []
    for x in tensors:
        again = x is not None and any(x is y for y in result)
        result.append(x.view_as(x) if x is not None and again else x)
    return result


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Products of what is in float32 stay in float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class GradientInForward(torch.autograd.Function):
    """A 0-d loss of the student whose gradient is made together with the loss, in the dtype
    computed in, and multiplied by the upstream factor before its one rounding.

    For losses over pairs and triplets: computing them again in the backward costs as much as the
    loss, keeping the gradient (N, D) a fraction of what they need anyway.
    """

    @staticmethod
    def forward(ctx, student, teacher, loss_and_grad: Callable, *options):
        with no_autocast(student.device):
            loss, grad = loss_and_grad(*computed(student, teacher), *options, True)
        ctx.save_for_backward(grad, student)  # student: what a second derivative would be of
        ctx.options = len(options)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grad, student = ctx.saved_tensors
        with torch.no_grad():
            student_grad = (grad * upstream).to(student.dtype)
        grads = no_double_backward(ctx, [student_grad], upstream, student)
        return *grads, None, None, *[None] * ctx.options


def loss_of_pairs(student: Tensor, teacher: Tensor, loss_and_grad: Callable, *options) -> Tensor:
    """loss_and_grad(student, teacher, *options, with_grad) -> (loss, gradient) under autograd."""
    if torch.is_grad_enabled() and student.requires_grad:
        return GradientInForward.apply(student, teacher.detach(), loss_and_grad, *options)
    with no_autocast(student.device):
        return loss_and_grad(*computed(student, teacher), *options, False)[0]
