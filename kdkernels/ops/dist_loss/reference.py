"""Plain torch implementation of the dist_loss ops: any device and dtype; their fake kernels."""

import torch
from torch import Tensor

from .._common import compute_dtype

# Numbers that the forward keeps, a row and a column: see dist_loss/__init__.py.
ROWS = ("student_maximum", "student_log_sum", "teacher_maximum", "teacher_log_sum",
        "by_teacher", "by_student")  # fmt: skip
COLUMNS = ("student_mean", "teacher_mean", "by_teacher", "by_student")


def dist_loss(
    student: Tensor, teacher: Tensor, temperature: float, temperature_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 − mean correlation of rows, of columns) of the softmax of both (N, V), and what the
    backward needs.
    """
    n, vocab = student.shape
    compute = compute_dtype(student, teacher)
    inverse = 1 / _temperature(temperature, temperature_tensor, student, compute)
    statistics = [*_statistics(student, inverse), *_statistics(teacher, inverse)]
    p = _softmax(student, statistics[0], statistics[1], inverse)
    q = _softmax(teacher, statistics[2], statistics[3], inverse)
    mean = p.new_tensor(1 / vocab)
    of_rows, *row_factors = correlation(_moments(p - mean, q - mean, 1), mean, mean, vocab)
    p_mean, q_mean = _column_mean(p), _column_mean(q)
    moments = _moments(p - p_mean, q - q_mean, 0)
    of_columns, *column_factors = correlation(moments, p_mean, q_mean, n)
    losses = torch.stack([1 - of_rows.mean(), 1 - of_columns.mean()])
    rows = torch.stack([*statistics, *row_factors])
    columns = torch.stack([p_mean, q_mean, *column_factors])
    if n == 0:
        losses, columns = torch.zeros_like(losses), torch.zeros_like(columns)
    return losses, rows, columns


def dist_loss_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Gradient of the student's logits, in their dtype, from that of the two losses."""
    n, vocab = student.shape
    inverse = 1 / _temperature(temperature, temperature_tensor, student, rows.dtype)
    p = _softmax(student, rows[0], rows[1], inverse)
    q = _softmax(teacher, rows[2], rows[3], inverse)
    by_teacher, by_student = rows[4:, :, None]
    by_row = by_student * (p - 1 / vocab) - by_teacher * (q - 1 / vocab)
    by_column = columns[3] * (p - columns[0]) - columns[2] * (q - columns[1])
    slope = by_row * (grad[0] / max(n, 1)) + by_column * (grad[1] / vocab)
    student_grad = p * (slope - (p * slope).sum(1, keepdim=True)) * inverse
    return student_grad.to(student.dtype).contiguous()


def _temperature(
    number: float, tensor: Tensor | None, like: Tensor, compute: torch.dtype
) -> Tensor:
    """(), NaN where it is not positive."""
    if tensor is None:
        return torch.full((), number, dtype=compute, device=like.device)
    return torch.where(tensor > 0, tensor, torch.nan).reshape(())


def _statistics(x: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows' maxima, 0 where everything is −inf, and log Σ exp((x − maximum)/τ)."""
    x = x.to(inverse.dtype)
    largest = x.amax(1)
    largest = torch.where(torch.isneginf(largest), 0.0, largest)
    return largest, ((x - largest[:, None]) * inverse).logsumexp(1)


def _softmax(x: Tensor, largest: Tensor, log_sum: Tensor, inverse: Tensor) -> Tensor:
    return torch.exp((x.to(inverse.dtype) - largest[:, None]) * inverse - log_sum[:, None])


def _column_mean(p: Tensor) -> Tensor:
    """Through deviations from the first row: exact where a column is constant."""
    return p[:1].sum(0) + (p - p[:1]).mean(0)


def _moments(p: Tensor, q: Tensor, dim: int) -> Tensor:
    return torch.stack([p.square().sum(dim), q.square().sum(dim), (p * q).sum(dim)])


def correlation(
    moments: Tensor, p_mean: Tensor, q_mean: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From Σp̃², Σq̃² and Σp̃·q̃ of `count` deviations: 0 where either side is constant within the
    rounding of exponentials; and the factors of its derivative by p, by_teacher·q̃ − by_student·p̃.
    """
    pp, qq, pq = moments.unbind()
    rounding = 16 * torch.finfo(pp.dtype).eps
    constant = (pp <= (rounding * p_mean).square() * count) | (
        qq <= (rounding * q_mean).square() * count
    )
    both = pp.sqrt() * qq.sqrt()
    value = torch.where(constant, 0.0, pq / both)
    return value, torch.where(constant, 0.0, 1 / both), torch.where(constant, 0.0, value / pp)
