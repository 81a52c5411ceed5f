"""Plain torch implementation of the RKD losses: any device and dtype; also their fake kernels.

Both take points of one dtype, student (N, Ds) and teacher (N, Dt), and return the loss () and the
student's gradient (N, Ds), empty where it is not asked for. (N, N) matrices are kept.
"""

import torch
from torch import Tensor

from .._common import inverse_or_zero

# Cosines that are there at a time: anchors × N².
_CHUNK = 1 << 22


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, student_grad: bool
) -> tuple[Tensor, Tensor]:
    n = student.shape[0]
    s, t = _squares(student).sqrt(), _squares(teacher).sqrt()
    s_inverse, t_inverse = (inverse_or_zero(d.sum() / max(n * (n - 1), 1)) for d in (s, t))
    e = s * s_inverse - t * t_inverse
    slope = e.clamp(-1, 1)
    loss = (slope * (e - slope / 2)).sum() / max(n * n, 1)
    if not student_grad:
        return loss, student.new_empty((0, student.shape[1]))
    common = (slope * s).sum() * s_inverse.square() / max(n * (n - 1), 1)
    weights = (slope * s_inverse - common) * inverse_or_zero(s) * (2 / max(n * n, 1))
    return loss, _pull(student, weights)


def rkd_angle_loss(student: Tensor, teacher: Tensor, student_grad: bool) -> tuple[Tensor, Tensor]:
    n = student.shape[0]
    # In float64: the squares' differences cancel where one arm is much shorter than the other.
    s, t = _squares(student.double()), _squares(teacher.double())
    s_inverse = inverse_or_zero(s.sqrt()).to(student.dtype)
    t_inverse = inverse_or_zero(t.sqrt()).to(student.dtype)
    loss = student.new_zeros(())
    arms, across = torch.zeros_like(s_inverse), torch.zeros_like(s_inverse)
    step = max(1, _CHUNK // max(n * n, 1))
    for start in range(0, n, step):
        anchors = slice(start, start + step)
        a = _cosines(s, s_inverse, anchors)
        e = a - _cosines(t, t_inverse, anchors)
        slope = e.clamp(-1, 1)
        loss = loss + (slope * (e - slope / 2)).sum()
        if student_grad:
            inverse = s_inverse[anchors]  # (anchors, N)
            pulled = slope * inverse[:, None, :]
            across += (pulled * inverse[:, :, None]).sum(0)
            arms[:, anchors] = (inverse * (pulled.sum(2) - inverse * (slope * a).sum(2)) / 2).t()
    loss = loss / max(n**3, 1)
    if not student_grad:
        return loss, student.new_empty((0, student.shape[1]))
    weights = (arms + arms.t() - across / 2) * (4 / max(n**3, 1))
    return loss, _pull(student, weights)


def _squares(x: Tensor) -> Tensor:
    """|x_i − x_j|², from differences: equal points are exactly 0 apart."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def _cosines(squares: Tensor, inverses: Tensor, anchors: slice) -> Tensor:
    """cos∠(i, j, k) for anchors j, as (j, i, k)."""
    arms = squares[anchors]
    twice = arms[:, :, None] + (arms[:, None, :] - squares)
    lengths = inverses[anchors]
    return twice.to(inverses.dtype) * (lengths[:, :, None] / 2 * lengths[:, None, :])


def _pull(x: Tensor, weights: Tensor) -> Tensor:
    """Σ_j w_ij·(x_i − x_j). In float64: between near points large weights leave a small sum."""
    wide, w = x.double(), weights.double()
    wide = wide - wide.mean(0)  # an offset common to all points costs no digits
    return (w.sum(1, keepdim=True) * wide - w @ wide).to(x.dtype)
