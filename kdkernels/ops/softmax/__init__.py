"""softmax and log_softmax over the last dimension, with a temperature.

Per row, with L = log Σ exp(x/τ):

    softmax       p = exp(x/τ − L)      ∂/∂x = p·(g − Σ p·g)/τ
    log_softmax   a = x/τ − L           ∂/∂x = (g − exp(a)·Σ g)/τ

where g is the upstream gradient. The backward needs the output alone, which is what is saved, as
PyTorch does.
``reference.py`` is the same in plain torch, ``triton_kernels.py`` in Triton, csrc/softmax in C++.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...divergences import Parameter
from .. import _backend
from .._common import check_floats, no_double_backward, option_pair, two_dimensional
from . import reference

SCHEMAS = {
    "softmax": "(Tensor x, float temperature, Tensor? temperature_tensor, bool log) -> Tensor",
    "softmax_backward": "(Tensor grad, Tensor output, float temperature, "
    "Tensor? temperature_tensor, bool log) -> Tensor",
}
_backend.define(SCHEMAS, reference, f"{__name__}.triton_kernels")


def softmax(x: Tensor, *, temperature: Parameter = 1.0, backend: str | None = None) -> Tensor:
    """exp(x/τ)/Σ exp(x/τ) over the last dimension.

    Args:
        x: (..., V) float64, float32, bfloat16 or float16; any leading shape (N rows in
            all) and row stride.
        temperature: τ > 0: a float, a 0-d tensor, or one value a row (leading shape),
            without gradient.
        backend: None chooses; "cpp", "triton" or "reference" serves the call or raises.

    Returns:
        The shape and dtype of x, with one rounding from float32 (float64 for float64);
        probabilities below the smallest normal number are 0. A row of nothing but −inf, or with a
        NaN or +inf, is NaN.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range, named. A temperature
            tensor is not read on the host: one out of range makes its row NaN.
        RuntimeError: a backend that cannot serve the call.
        NotImplementedError: double backward.

    Every row is computed alone and in a fixed order: with the C++ library bitwise the same whatever
    rows are beside it and on any number of threads.
    """
    return _call(x, temperature, backend, log=False)


def log_softmax(x: Tensor, *, temperature: Parameter = 1.0, backend: str | None = None) -> Tensor:
    """x/τ − log Σ exp(x/τ) over the last dimension, −inf where x is; the rest as in ``softmax``."""
    return _call(x, temperature, backend, log=True)


class Softmax(nn.Module):
    """``softmax`` with its options stored; those given to the call take their place."""

    def __init__(self, *, temperature: Parameter = 1.0, backend: str | None = None):
        super().__init__()
        self.options = {"temperature": temperature, "backend": backend}

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return softmax(x, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LogSoftmax(nn.Module):
    """``log_softmax`` with its options stored; those given to the call take their place."""

    def __init__(self, *, temperature: Parameter = 1.0, backend: str | None = None):
        super().__init__()
        self.options = {"temperature": temperature, "backend": backend}

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return log_softmax(x, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _call(x: Tensor, temperature: Parameter, backend: str | None, log: bool) -> Tensor:
    check_floats("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., V) with V >= 1")
    chosen, why = _backend.choose(backend, x.device, (x.dtype,))
    _backend.warn_of_reference(chosen, why, x.device)
    compute = torch.promote_types(x.dtype, torch.float32)
    pair = option_pair("temperature", temperature, x.shape[:-1], x.device, compute, positive=True)
    rows = two_dimensional(x, x.shape[-1])
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Softmax.apply(rows, chosen, *pair, log)
    else:
        y = _backend.implementation(chosen, "softmax", reference)(rows, *pair, log)
    return y.reshape(x.shape)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend, temperature, temperature_tensor, log):
        y = _backend.implementation(backend, "softmax", reference)(
            x, temperature, temperature_tensor, log
        )
        ctx.save_for_backward(y, temperature_tensor)
        ctx.backend, ctx.temperature, ctx.log = backend, temperature, log
        return y

    @staticmethod
    def backward(ctx, grad):
        y, temperature_tensor = ctx.saved_tensors
        with torch.no_grad():
            x_grad = _backend.implementation(ctx.backend, "softmax_backward", reference)(
                two_dimensional(grad, grad.shape[1]),
                y,
                ctx.temperature,
                temperature_tensor,
                ctx.log,
            )
        return *no_double_backward(ctx, [x_grad], grad, y), None, None, None, None
