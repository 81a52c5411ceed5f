"""kl_div: torch.nn.functional.kl_div, right where that gives NaN, in one sweep.

Per element, with x the input (log-probabilities) and t the target:

    log_target=False   t·(log t − x)      ∂/∂x = −t         ∂/∂t = log t + 1 − x
    log_target=True    exp(t)·(t − x)     ∂/∂x = −exp(t)    ∂/∂t = exp(t)·(t + 1 − x)

and all of it 0 where the target's probability is 0, whatever the input. Where t = 0 the slope in t
has no finite limit, but its product with a probability of 0 has: 0 is what lets a softmax that made
the target pass on the right gradient.
``reference.py`` is the same in plain torch, csrc/kl_div in C++.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import _reduction

from .. import _backend
from .._common import check_floats, no_double_backward
from . import reference

SCHEMAS = {
    "kl_div": "(Tensor input, Tensor target, bool log_target) -> Tensor",
    "kl_div_sum": "(Tensor input, Tensor target, bool log_target) -> Tensor",
    "kl_div_backward": "(Tensor grad, Tensor input, Tensor target, bool log_target, "
    "bool input_grad, bool target_grad) -> (Tensor, Tensor)",
}
_backend.define(SCHEMAS, reference)

REDUCTIONS = ("mean", "batchmean", "sum", "none")


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.kl_div``: same signature, broadcasting, result dtype and warnings.

    Args:
        input: log-probabilities of the student, float64, float32, bfloat16 or float16; any shape
            and strides.
        target: probabilities of the teacher, or their logarithms with ``log_target``; broadcast
            against input. Both get a gradient where they require one.
        size_average, reduce: PyTorch's deprecated way to say ``reduction``, which they override.
        reduction: "none": every element's term; "sum"; "mean": over the number of elements (warns,
            as PyTorch does: it is no divergence); "batchmean": the sum over ``input.shape[0]``.
        log_target: the target is in logarithms.
        backend: None chooses; "cpp" or "reference" serves the call or raises.

    Returns:
        The loss in ``torch.result_type(input, target)``, () or of the broadcast shape under "none".
        Computed in float32 (float64 where either is float64) and rounded at the end; float32 for
        half types under autocast. The C++ library sums over fixed blocks: bitwise the same on any
        number of threads.

    Where PyTorch gives NaN: a target of probability 0 contributes 0 to loss and gradients whatever
    the input, −inf included (also where exp(target) is below the smallest normal number). +inf
    stays where only the input's probability is 0. A negative target is NaN, as in PyTorch.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        RuntimeError: shapes that do not broadcast, or different devices, as in PyTorch; a backend
            that cannot serve the call.
        ValueError: an unknown reduction or backend.
        NotImplementedError: double backward.
    """
    check_floats("input", input)
    check_floats("target", target)
    shapes = zip(input.shape[::-1], target.shape[::-1], strict=False)
    if any(a != b and 1 not in (a, b) for a, b in shapes):
        raise RuntimeError(
            f"target has shape {tuple(target.shape)}; accepted: one that broadcasts with input's "
            f"{tuple(input.shape)}"
        )
    if target.device != input.device:
        raise RuntimeError(f"target is on {target.device}; accepted: input's device {input.device}")
    warns = not torch.compiler.is_compiling()  # a warning would break the graph
    if size_average is not None or reduce is not None:
        over_elements = _reduction.legacy_get_string(size_average, reduce, emit_warning=warns)
    elif reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; accepted: {', '.join(REDUCTIONS)}")
    else:
        over_elements = "sum" if reduction == "batchmean" else reduction
        if reduction == "mean" and warns:
            warnings.warn(
                "kl_div(reduction='mean') divides by the number of elements; the divergence of the "
                "batch is reduction='batchmean'",
                stacklevel=2,
            )
    chosen, why = _backend.choose(backend, input.device, (input.dtype, target.dtype), on_devices=())
    _backend.warn_of_reference(chosen, why, input.device)

    # As in PyTorch: a () operand does not decide the dtype; autocast runs kl_div in float32.
    dtype = torch.promote_types(input.dtype, target.dtype)
    if bool(input.dim()) != bool(target.dim()):
        dtype = (input if input.dim() else target).dtype
    if _autocasts(input.device.type) and dtype != torch.float64:
        dtype = torch.float32
    batch = input.shape[0] if input.dim() else 1
    if over_elements == "none" and torch.promote_types(input.dtype, target.dtype) != dtype:
        input, target = input.to(dtype), target.to(dtype)
    input, target = torch.broadcast_tensors(input, target)

    op = "kl_div" if over_elements == "none" else "kl_div_sum"
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss = _KLDiv.apply(input, target, chosen, op, log_target)
    else:
        loss = _backend.implementation(chosen, op, reference)(input, target, log_target)
    if over_elements == "mean":
        loss = loss / input.numel()
    if reduction == "batchmean":
        loss = loss / batch
    return loss.to(dtype)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class KLDivLoss(nn.KLDivLoss):
    """``kl_div`` with ``torch.nn.KLDivLoss``'s constructor and attributes, and a ``backend``."""

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
        backend: str | None = None,
    ):
        super().__init__(size_average, reduce, reduction, log_target)
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(
            input,
            target,
            reduction=self.reduction,
            log_target=self.log_target,
            backend=self.backend,
        )


class _KLDiv(torch.autograd.Function):
    """Of two tensors of one shape: broadcasting is outside, and autograd sums it back."""

    @staticmethod
    def forward(ctx, input, target, backend, op, log_target):
        ctx.save_for_backward(input, target)
        ctx.backend, ctx.log_target = backend, log_target
        return _backend.implementation(backend, op, reference)(input, target, log_target)

    @staticmethod
    def backward(ctx, grad):
        input, target = ctx.saved_tensors
        with torch.no_grad():
            grads = _backend.implementation(ctx.backend, "kl_div_backward", reference)(
                grad.expand(input.shape), input, target, ctx.log_target, *ctx.needs_input_grad[:2]
            )
        return *no_double_backward(ctx, grads, grad, input, target), None, None, None
