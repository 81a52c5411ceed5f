"""dist_loss: DIST, distillation from a stronger teacher by correlations (Huang et al. 2022).

With p = softmax(student/τ), q = softmax(teacher/τ), and ρ Pearson's correlation:

    inter = 1 − mean over rows i of ρ(p_i, q_i)          (between the classes of a sample)
    intra = 1 − mean over columns c of ρ(p_·c, q_·c)     (between the samples of a class)
    loss = τ²·(inter_weight·inter + intra_weight·intra)

    ∂ρ/∂p = (q − mean q)/(|p̃|·|q̃|) − ρ·(p − mean p)/|p̃|²,  through the softmax of its row

The forward reads both logits twice, by rows and by columns, and keeps six numbers a row and four a
column (``reference.ROWS``, ``COLUMNS``); the backward reads them once more. ``reference.py`` is the
same in plain torch, ``triton_kernels.py`` in Triton, csrc/dist_loss in C++.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...divergences import Parameter
from .. import _backend
from .._common import check_floats, compute_dtype, no_double_backward, option_pair, two_dimensional
from . import reference

_INPUTS = "Tensor student, Tensor teacher, float temperature, Tensor? temperature_tensor"
SCHEMAS = {
    "dist_loss": f"({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    "dist_loss_backward": f"(Tensor grad, {_INPUTS}, Tensor rows, Tensor columns) -> Tensor",
}
_backend.define(SCHEMAS, reference, f"{__name__}.triton_kernels")


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Parameter = 1.0,
    inter_weight: Parameter = 1.0,
    intra_weight: Parameter = 1.0,
    t_squared: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Correlation loss of the probabilities of student and teacher, by rows and by columns.

    Huang, You, Wang, Qian and Xu, Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
    equations 8 to 10.

    Args:
        student_logits: (..., V) float64, float32, bfloat16 or float16; leading dimensions are
            flattened to the N rows that a column has. Any row stride.
        teacher_logits: of the same shape, any of these dtypes; detached.
        temperature: τ > 0, a float or a 0-d tensor (a schedule).
        inter_weight, intra_weight: β and γ of the paper; floats or 0-d tensors.
        t_squared: multiply by τ², as the authors' code does.
        backend: None chooses; "cpp", "triton" or "reference" serves the call or raises.

    Returns:
        () float32, float64 where an input is. N = 0 gives 0.

    The correlation of a constant row or column (N = 1: every column; a standard deviation within 16
    units of rounding of the mean) is defined as 0, with gradient 0: it contributes 1, as in the
    authors' code. Theirs adds 1e-8 to the product of the norms, which makes columns of small
    probabilities (most of them where V is thousands) count as uncorrelated; here a correlation does
    not depend on scale. torchdistill's DISTPlusLoss adds +ρ between channels where 1 − ρ is meant.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range, named. A temperature
            tensor is not read on the host: one out of range makes the loss NaN.
        RuntimeError: a backend that cannot serve the call.
        NotImplementedError: double backward.

    With the C++ library bitwise the same on any number of threads.
    """
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_floats(name, x)
    if student_logits.dim() < 2 or student_logits.shape[-1] == 0:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)}; accepted: (..., V) with "
            "V >= 1 and at least two dimensions"
        )
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)}; accepted: student_logits' "
            f"{tuple(student_logits.shape)}"
        )
    if teacher_logits.device != student_logits.device:
        raise ValueError(
            f"teacher_logits is on {teacher_logits.device}; accepted: student_logits' device "
            f"{student_logits.device}"
        )
    dtypes = (student_logits.dtype, teacher_logits.dtype)
    chosen, why = _backend.choose(backend, student_logits.device, dtypes)
    _backend.warn_of_reference(chosen, why, student_logits.device)
    compute = compute_dtype(student_logits, teacher_logits)
    nowhere, device = torch.Size(), student_logits.device
    pair = option_pair("temperature", temperature, nowhere, device, compute, positive=True)
    for name, weight in (("inter_weight", inter_weight), ("intra_weight", intra_weight)):
        option_pair(name, weight, nowhere, device, compute)
    student, teacher = (
        two_dimensional(x, x.shape[-1]) for x in (student_logits, teacher_logits.detach())
    )
    if torch.is_grad_enabled() and student.requires_grad:
        losses = _Dist.apply(student, teacher, chosen, *pair)
    else:
        losses, _, _ = _backend.implementation(chosen, "dist_loss", reference)(
            student, teacher, *pair
        )
    loss = inter_weight * losses[0] + intra_weight * losses[1]
    return (loss * temperature**2 if t_squared else loss).to(losses.dtype)


class DISTLoss(nn.Module):
    """``dist_loss`` with its options stored; those given to the call take their place."""

    def __init__(
        self,
        *,
        temperature: Parameter = 1.0,
        inter_weight: Parameter = 1.0,
        intra_weight: Parameter = 1.0,
        t_squared: bool = True,
        backend: str | None = None,
    ):
        super().__init__()
        self.options = {
            "temperature": temperature,
            "inter_weight": inter_weight,
            "intra_weight": intra_weight,
            "t_squared": t_squared,
            "backend": backend,
        }

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
        return dist_loss(student_logits, teacher_logits, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Dist(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, backend, temperature, temperature_tensor):
        losses, rows, columns = _backend.implementation(backend, "dist_loss", reference)(
            student, teacher, temperature, temperature_tensor
        )
        ctx.save_for_backward(student, teacher, temperature_tensor, rows, columns)
        ctx.backend, ctx.temperature = backend, temperature
        return losses

    @staticmethod
    def backward(ctx, grad):
        student, teacher, temperature_tensor, rows, columns = ctx.saved_tensors
        with torch.no_grad():
            student_grad = _backend.implementation(ctx.backend, "dist_loss_backward", reference)(
                grad.contiguous(), student, teacher, ctx.temperature, temperature_tensor, rows,
                columns,
            )  # fmt: skip
        return *no_double_backward(ctx, [student_grad], grad, student), None, None, None, None
