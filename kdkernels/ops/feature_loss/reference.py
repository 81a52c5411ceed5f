"""Plain torch implementation of the feature_loss ops: any device, any dtype, exact in float64.

The same signatures and outputs as the compiled ops; oracle for them, fallback where nothing is
compiled, and their fake kernels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._common import compute_dtype, zero_wins

METRICS = ("l2", "smooth_l1", "cosine", "attention", "gaussian_nll")

# A vector shorter than this has no direction: it counts as 0 and its gradient is 0. (torch divides
# by max(norm, 1e-12): a position that a ReLU switched off then gets a gradient of 1e12.)
SMALLEST_NORM = 1e-12


def feature_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    log_variances: Sequence[Tensor | None],
    feature_dims: Sequence[int],
    metric: str,
    normalize: bool,
    beta: float,
    weights: Sequence[float],
    weights_tensor: Tensor | None,
    reduction: str,
    upstream: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, parts, grads) for the schema in this folder's __init__.py."""
    dtype = compute_dtype(*students, *teachers)
    n = len(students)
    units, grads, variance_grads = [], [], []
    for i, dim in enumerate(feature_dims):
        rows = _Rows(students[i], teachers[i], masks[i], dim, dtype)
        term = _term(rows, metric, normalize, beta, log_variances[i])
        if weights_tensor is None:
            weight = torch.full((), weights[i], dtype=dtype, device=students[i].device)
        else:
            weight = weights_tensor[i].to(dtype)
        samples, positions, channels = rows.s.shape
        mask = None if masks[i] is None else rows.weight
        scale = weight / divisor(mask, samples, positions, channels, metric, reduction)
        unit = zero_wins(scale, term.value)
        units.append(unit)
        factor = scale.expand(samples)
        if upstream is not None:
            up = upstream.reshape(-1)[i * samples :][:samples] if reduction == "none" else upstream
            factor = zero_wins(factor, up.to(dtype).expand(samples))
        grads.append(_student_grad(students[i], rows, term.grad, factor, dim, wanted[i]))
        variance_grad = students[i].new_empty(0)
        variance = log_variances[i]
        if variance is not None and wanted[n + i]:
            variance_grad = zero_wins(factor[:, None], term.variance_grad).sum(0).to(variance.dtype)
        variance_grads.append(variance_grad)
    parts = torch.stack([unit.sum() for unit in units])
    loss = torch.stack(units) if reduction == "none" else parts.sum()
    return loss, parts, grads + variance_grads


def scale_features_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every tensor in place by the 0-d factor."""
    for grad in grads:
        scaled = grad * factor.to(torch.promote_types(grad.dtype, torch.float32))
        grad.copy_(torch.where(grad == 0, grad, scaled))  # what is masked stays 0


class _Rows:
    """Both features as (samples, positions, channels), 0 where masked."""

    def __init__(self, student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int, dtype):
        s, t = student.movedim(dim, -1), teacher.movedim(dim, -1)
        self.shape = s.shape
        samples, positions = s.shape[0], math.prod(s.shape[1:-1])
        shape = (samples, positions)
        if mask is None:
            self.weight = torch.ones(shape, dtype=dtype, device=s.device)
        else:
            self.weight = mask.to(dtype).reshape(shape)
        self.counted = self.weight != 0
        read = self.counted[..., None]
        self.s = torch.where(read, s.reshape(*shape, s.shape[-1]).to(dtype), 0.0)
        self.t = torch.where(read, t.reshape(*shape, t.shape[-1]).to(dtype), 0.0)


class _Term(NamedTuple):
    value: Tensor  # (samples,)
    grad: Tensor  # (samples, positions, channels)
    variance_grad: Tensor  # (samples, channels); empty but for gaussian_nll


def _term(
    rows: _Rows,
    metric: str,
    normalize: bool,
    beta: float,
    log_variance: Tensor | None,
) -> _Term:
    s, t, weight = rows.s, rows.t, rows.weight
    if metric == "attention":
        return _attention(rows)
    weight = weight[..., None]
    if log_variance is not None:
        log_variance = log_variance.to(s.dtype)
        difference, precision = s - t, torch.exp(-log_variance)
        square = difference * difference * precision
        value = zero_wins(weight, 0.5 * (square + log_variance))
        variance_grad = zero_wins(weight, 0.5 * (1 - square)).sum(1)
        return _Term(value.sum((1, 2)), zero_wins(weight, difference * precision), variance_grad)
    cosine = metric == "cosine"
    if not (normalize or cosine):
        value, slope = _elementwise(s - t, metric, beta)
        return _Term(zero_wins(weight, value).sum((1, 2)), zero_wins(weight, slope), s.new_empty(0))
    s_unit, inverse = _unit(s, -1)
    t_unit, teacher_inverse = _unit(t, -1)
    value, slope = _elementwise(s_unit - t_unit, "l2" if cosine else metric, beta)
    value = value.sum(-1, keepdim=True)
    if cosine:  # 1 − cos = ½·‖ŝ − t̂‖², without its cancellation where the two are close
        value, slope = 0.5 * value, 0.5 * slope
        value = torch.where((inverse == 0) | (teacher_inverse == 0), 1.0, value)
    grad = (slope - s_unit * (s_unit * slope).sum(-1, keepdim=True)) * inverse
    return _Term(zero_wins(weight, value).sum((1, 2)), zero_wins(weight, grad), s.new_empty(0))


def _attention(rows: _Rows) -> _Term:
    s_map, inverse = _unit(rows.s.square().sum(-1), -1)
    t_map, _ = _unit(rows.t.square().sum(-1), -1)
    difference = s_map - t_map
    slope = zero_wins(rows.weight, 2 * difference)
    map_grad = (slope - s_map * (s_map * slope).sum(-1, keepdim=True)) * inverse
    value = zero_wins(rows.weight, difference * difference).sum(-1)
    return _Term(value, 2 * rows.s * map_grad[..., None], value.new_empty(0))


def _elementwise(difference: Tensor, metric: str, beta: float) -> tuple[Tensor, Tensor]:
    """(φ, φ′) of l2 and smooth_l1."""
    if metric == "l2":
        return difference * difference, 2 * difference
    size = difference.abs()
    linear = size >= beta
    # The quotient is not used where β = 0.
    square = 0.5 * difference * difference / (beta or 1.0)
    return (
        torch.where(linear, size - 0.5 * beta, square),
        torch.where(linear, torch.sign(difference), difference / (beta or 1.0)),
    )


def _unit(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(x/‖x‖, 1/‖x‖), both 0 where the norm is below SMALLEST_NORM."""
    norm = x.square().sum(dim, keepdim=True).sqrt()
    inverse = torch.where(norm < SMALLEST_NORM, 0.0, 1 / norm)
    return x * inverse, inverse


def divisor(
    mask: Tensor | None, samples: int, positions: int, channels: int, metric: str, reduction: str
) -> Tensor | float:
    """What a layer's sum is divided by."""
    if reduction in ("sum", "none"):
        return 1.0
    of_samples = metric == "attention" and reduction == "batchmean"
    of_elements = reduction == "mean" and metric not in ("cosine", "attention")
    per_position = channels if of_elements else 1
    if mask is None:
        count = samples * (min(positions, 1) if of_samples else positions) * per_position
        return float(max(count, 1))
    if of_samples:  # each counts with the mean weight of its positions that count
        weight = mask.reshape(samples, positions)
        total = (weight.sum(1) / (weight != 0).sum(1).clamp(min=1)).sum()
    else:
        total = mask.sum() * per_position
    return torch.where(total == 0, 1.0, total)


def _student_grad(
    student: Tensor, rows: _Rows, grad: Tensor, factor: Tensor, dim: int, wanted: bool
) -> Tensor:
    if not wanted:
        return student.new_empty(0)
    grad = zero_wins(factor[:, None, None], grad)
    grad = torch.where(rows.counted[..., None], grad, 0.0)
    # The student's strides, as the compiled op has them.
    return torch.empty_like(student).copy_(grad.reshape(rows.shape).movedim(-1, dim))
