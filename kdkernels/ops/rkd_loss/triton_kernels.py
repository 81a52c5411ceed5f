"""The RKD losses in Triton. Imported on first use: the package works without Triton.

As csrc/rkd_loss: distances from differences of columns, cosines from squared distances. Those are
kept as a float32 and what it lacks of the float64 sum, so that the loop over triplets is float32
and still keeps its digits where one arm is much shorter than the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

# Columns of points whose squares are added up before they join the rest: 65,536 in one float32 sum
# would cost two digits.
_PART = 128
# Distances that are kept between the sweeps, per model: 64 MiB. Above, each sweep computes them
# again, this many at a time.
_KEPT = 1 << 24

_NUMBERS = ("n", "columns", "first", "rows", "scale")


@triton.jit(do_not_specialize=_NUMBERS)
def _pairs(
    x, out, low, inverses, n, columns, first, rows,
    DOUBLE: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Between points first ≤ i < first + rows and all, x (columns, n): their distances, or their
    squares as high and low part with 1/distance (0 where it is).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kind = tl.float64 if DOUBLE else tl.float32
    total = tl.zeros((BLOCK, BLOCK), kind)
    for start in range(0, columns, PART):
        part = tl.zeros((BLOCK, BLOCK), kind)
        for c in range(start, tl.minimum(start + PART, columns)):
            column = x + tl.cast(c, tl.int64) * n
            a = tl.load(column + first + i, mask=i < rows, other=0.0).to(kind)
            b = tl.load(column + j, mask=j < n, other=0.0).to(kind)
            apart = a[:, None] - b[None, :]
            part += apart * apart
        total += part
    at = i.to(tl.int64)[:, None] * n + j[None, :]
    here = (i < rows)[:, None] & (j < n)[None, :]
    if DOUBLE:
        high = total.to(tl.float32)
        tl.store(out + at, high, mask=here)
        tl.store(low + at, (total - high.to(tl.float64)).to(tl.float32), mask=here)
        inverse = (1.0 / tl.sqrt(total)).to(tl.float32)
        tl.store(inverses + at, tl.where(total == 0.0, 0.0, inverse), mask=here)
    else:
        tl.store(out + at, tl.sqrt_rn(total), mask=here)


@triton.jit
def clipped(e):
    """ψ′: e within [−1, 1]; NaN stays."""
    return tl.where(e > 1.0, 1.0, tl.where(e < -1.0, -1.0, e))


@triton.jit(do_not_specialize=_NUMBERS)
def _distance_losses(student, teacher, inverses, sums, n, first, rows, BLOCK: tl.constexpr):
    """Σψ and Σψ′·distance of a row, into sums (2, n)."""
    row = tl.program_id(0).to(tl.int64)
    s_inverse, t_inverse = tl.load(inverses), tl.load(inverses + 1)
    loss = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = tl.load(student + row * n + j, mask=j < n, other=0.0)
        t = tl.load(teacher + row * n + j, mask=j < n, other=0.0)
        e = s * s_inverse - t * t_inverse
        slope = clipped(e)
        loss += slope * (e - 0.5 * slope)
        moment += slope * s
    tl.store(sums + first + row, tl.sum(loss, 0))
    tl.store(sums + n + first + row, tl.sum(moment, 0))


@triton.jit(do_not_specialize=_NUMBERS)
def _distance_weights(
    student, teacher, inverses, common, weights, scale, n, first, rows, BLOCK: tl.constexpr
):
    """The derivative by a distance over the distance, 0 where points coincide. `weights` may be
    `student`.
    """
    row = tl.program_id(0).to(tl.int64)
    s_inverse, t_inverse, shared = tl.load(inverses), tl.load(inverses + 1), tl.load(common)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = tl.load(student + row * n + j, mask=j < n, other=0.0)
        t = tl.load(teacher + row * n + j, mask=j < n, other=0.0)
        slope = clipped(s * s_inverse - t * t_inverse)
        w = tl.where(s == 0.0, 0.0, scale * (slope * s_inverse - shared) / s)
        tl.debug_barrier()  # several threads may hold one element: all of them have read it
        tl.store(weights + row * n + j, w, mask=j < n)


@triton.jit(do_not_specialize=_NUMBERS)
def _angles(
    s_high, s_low, s_inverses, t_high, t_low, t_inverses, arms, across, losses, n,
    ARMS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The angles with one end i and the other in a block k, at all anchors j: Σψ, the derivatives
    by the side across (n, n), and by the arm (i, j) (blocks, n, n).
    """
    i, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = block * OTHERS + tl.arange(0, OTHERS)
    s_own = tl.load(s_high + i * n + k, mask=k < n, other=0.0)
    s_own_low = tl.load(s_low + i * n + k, mask=k < n, other=0.0)
    t_own = tl.load(t_high + i * n + k, mask=k < n, other=0.0)
    t_own_low = tl.load(t_low + i * n + k, mask=k < n, other=0.0)
    loss = tl.zeros((OTHERS,), tl.float32)
    pull = tl.zeros((OTHERS,), tl.float32)
    for start in range(0, n, ARMS):
        j = start + tl.arange(0, ARMS)
        arm = i * n + j
        inverse = tl.load(s_inverses + arm, mask=j < n, other=0.0)
        t_inverse = tl.load(t_inverses + arm, mask=j < n, other=0.0)
        here = (j < n)[:, None] & (k < n)[None, :]
        at = j.to(tl.int64)[:, None] * n + k[None, :]
        other = tl.load(s_inverses + at, mask=here, other=0.0)
        a = twice(s_high, s_low, arm, at, s_own, s_own_low, j < n, here)
        a *= (0.5 * inverse)[:, None] * other
        b = twice(t_high, t_low, arm, at, t_own, t_own_low, j < n, here)
        b *= (0.5 * t_inverse)[:, None] * tl.load(t_inverses + at, mask=here, other=0.0)
        e = a - b
        slope = clipped(e)
        loss += tl.sum(slope * (e - 0.5 * slope), 0)
        pulled = slope * other
        pull += tl.sum(pulled * inverse[:, None], 0)
        by_arm = 0.5 * inverse * (tl.sum(pulled, 1) - inverse * tl.sum(slope * a, 1))
        tl.store(arms + block * n.to(tl.int64) * n + arm, by_arm, mask=j < n)
    tl.store(across + i * n + k, pull, mask=k < n)
    tl.store(losses + i * tl.num_programs(1) + block, tl.sum(loss, 0))


@triton.jit
def twice(high, low, arm, at, own, own_low, in_arms, here):
    """d²(i, j) + d²(j, k) − d²(i, k). Where one arm is short, the long one is near the side across
    and cancels against it exactly; then the short one joins with all its digits.
    """
    square = tl.load(high + arm, mask=in_arms, other=0.0)
    square_low = tl.load(low + arm, mask=in_arms, other=0.0)
    anchor = tl.load(high + at, mask=here, other=0.0)
    anchor_low = tl.load(low + at, mask=here, other=0.0)
    rest = square_low[:, None] + (anchor_low - own_low[None, :])
    short, long = tl.minimum(square[:, None], anchor), tl.maximum(square[:, None], anchor)
    return ((long - own[None, :]) + short) + rest


@triton.jit(do_not_specialize=_NUMBERS)
def _pull(
    x, weights, grad, n, columns, first, rows,
    FIRST: tl.constexpr, POINTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_i = (FIRST) or += Σ_j w_ij·(x_i − x_j) over points first ≤ j < first + rows, whose rows
    of the symmetric weights these are. Differences first: between near points large weights leave
    a small sum.
    """
    i = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = i.to(tl.int64)[:, None] * columns + c[None, :]
    here = (i < n)[:, None] & (c < columns)[None, :]
    own = tl.load(x + at, mask=here, other=0.0)
    total = tl.zeros((POINTS, COLUMNS), tl.float32)
    if not FIRST:
        total = tl.load(grad + at, mask=here, other=0.0)
    for j in range(rows):
        w = tl.load(weights + tl.cast(j, tl.int64) * n + i, mask=i < n, other=0.0)
        point = x + tl.cast(first + j, tl.int64) * columns
        other = tl.load(point + c, mask=c < columns, other=0.0)
        total += w[:, None] * (own - other[None, :])
    tl.store(grad + at, total, mask=here)


# ---- the ops ----


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, student_grad: bool
) -> tuple[Tensor, Tensor]:
    n = student.shape[0]
    if n == 0:
        return student.new_zeros(()), student.new_empty((0, student.shape[1]))
    points = [x.t().contiguous() for x in (student, teacher)]
    rows = max(1, min(n, _KEPT // n))
    options = dict(BLOCK=min(1024, max(32, triton.next_power_of_2(n))), **_triton.EXACT)
    kept: list[Tensor] = []

    def distances(first: int) -> list[Tensor]:
        if not kept or rows < n:
            kept[:] = [_distances(x, first, min(rows, n - first)) for x in points]
        return kept

    with _triton.on_device(student):
        sums = [x.new_zeros((), dtype=torch.float64) for x in points]
        for first in range(0, n, rows):
            sums = [
                a + d.sum(dtype=torch.float64) for a, d in zip(sums, distances(first), strict=True)
            ]
        pairs = max(n * (n - 1), 1)
        total = torch.stack(sums)
        inverses = torch.where(total == 0, 0.0, pairs / total).float()
        losses = student.new_empty((2, n))
        for first in range(0, n, rows):
            s, t = distances(first)
            _distance_losses[(len(s),)](s, t, inverses, losses, n, first, len(s), **options)
        loss, moment = losses.sum(1, dtype=torch.float64)
        loss = (loss / n**2).float()
        if not student_grad:
            return loss, student.new_empty((0, student.shape[1]))
        common = (moment * inverses[0].double().square() / pairs).float()
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        dense = student.contiguous()
        for first in range(0, n, rows):
            s, t = distances(first)
            _distance_weights[(len(s),)](
                s, t, inverses, common, s, 2 / n**2, n, first, len(s), **options
            )
            _pulled(dense, s, grad, first)
    return loss, grad


def rkd_angle_loss(student: Tensor, teacher: Tensor, student_grad: bool) -> tuple[Tensor, Tensor]:
    n = student.shape[0]
    if n == 0:
        return student.new_zeros(()), student.new_empty((0, student.shape[1]))
    with _triton.on_device(student):
        squares = [part for x in (student, teacher) for part in _squares(x.t().contiguous())]
        others = min(64, max(16, triton.next_power_of_2(n)))
        blocks = triton.cdiv(n, others)
        arms, across = student.new_empty((blocks, n, n)), student.new_empty((n, n))
        losses = student.new_empty((n, blocks))
        _angles[(n, blocks)](
            *squares, arms, across, losses, n, ARMS=32, OTHERS=others, **_triton.EXACT
        )
        loss = (losses.sum(dtype=torch.float64) / n**3).float()
        if not student_grad:
            return loss, student.new_empty((0, student.shape[1]))
        by_arm = arms.sum(0)
        weights = (by_arm + by_arm.t() - across / 2) * (4 / n**3)
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        _pulled(student.contiguous(), weights, grad, 0)
    return loss, grad


def _distances(points: Tensor, first: int, rows: int) -> Tensor:
    columns, n = points.shape
    out = points.new_empty((rows, n))
    _pairs[(triton.cdiv(rows, 32), triton.cdiv(n, 32))](
        points, out, None, None, n, columns, first, rows,
        DOUBLE=False, PART=_PART, BLOCK=32, **_triton.EXACT,
    )  # fmt: skip
    return out


def _squares(points: Tensor) -> list[Tensor]:
    columns, n = points.shape
    out = [points.new_empty((n, n)) for _ in range(3)]
    _pairs[(triton.cdiv(n, 32), triton.cdiv(n, 32))](
        points, *out, n, columns, 0, n, DOUBLE=True, PART=_PART, BLOCK=32, **_triton.EXACT
    )
    return out


def _pulled(points: Tensor, weights: Tensor, grad: Tensor, first: int) -> None:
    n, columns = points.shape
    width = min(64, max(16, triton.next_power_of_2(columns)))
    _pull[(triton.cdiv(n, 16), triton.cdiv(columns, width))](
        points, weights, grad, n, columns, first, len(weights),
        FIRST=first == 0, POINTS=16, COLUMNS=width, **_triton.EXACT,
    )  # fmt: skip
