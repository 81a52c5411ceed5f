"""The dist_loss ops in Triton. Imported on first use: the package works without Triton.

Three kernels: by rows (statistics, then the moments of deviations from 1/V), by columns (a strip of
them over a chunk of rows, combined in order), and the gradient by rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...divergences_triton import LOG2_E
from .. import _triton
from .._triton import anchored
from .reference import correlation

# Rows of a chunk of the column kernel: 16 chunks where N = 4096, V = 100 has a single strip.
_CHUNK = 256

_NUMBERS = ("n", "vocab", "number")


@triton.jit
def scale_of(temperature, number, GIVEN: tl.constexpr):
    """1/τ, NaN where τ is not positive."""
    t = number
    if GIVEN:
        t = tl.load(temperature).to(tl.float32)
    return tl.where(t > 0, 1.0 / t, float("nan"))


@triton.jit
def row_start(matrix, i, stride):
    return matrix + i.to(tl.int64) * stride


@triton.jit
def extended(largest, total, x, c):
    """Lanes' maximum and Σ 2^((x − maximum)·c) with a tile more."""
    new = tl.maximum(largest, x)
    return new, total * tl.exp2((largest - anchored(new)) * c) + tl.exp2((x - anchored(new)) * c)


@triton.jit
def merged(largest, total, c):
    new = anchored(tl.max(largest, 0))
    return new, tl.sum(total * tl.exp2((largest - new) * c), 0)


@triton.jit
def probabilities(x, largest, inverse, c):
    return tl.exp2((x.to(tl.float32) - largest) * c) * inverse


@triton.jit(do_not_specialize=_NUMBERS)
def _rows(
    student, teacher, temperature, rows, moments, number, n, vocab, student_stride, teacher_stride,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's statistics (4 of reference.ROWS), and Σp̃², Σq̃², Σp̃·q̃ (3, n)."""
    i = tl.program_id(0)
    c = scale_of(temperature, number, GIVEN) * LOG2_E
    s_row, t_row = row_start(student, i, student_stride), row_start(teacher, i, teacher_stride)
    lowest = float("-inf")
    s_largest = tl.full((BLOCK,), lowest, tl.float32)
    t_largest = tl.full((BLOCK,), lowest, tl.float32)
    s_total, t_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(s_row + at, mask=at < vocab, other=lowest).to(tl.float32)
        t = tl.load(t_row + at, mask=at < vocab, other=lowest).to(tl.float32)
        s_largest, s_total = extended(s_largest, s_total, s, c)
        t_largest, t_total = extended(t_largest, t_total, t, c)
    s_max, s_sum = merged(s_largest, s_total, c)
    t_max, t_sum = merged(t_largest, t_total, c)
    mean = 1.0 / vocab
    pp, qq = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    pq = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = at < vocab
        s = tl.load(s_row + at, mask=here, other=lowest)
        t = tl.load(t_row + at, mask=here, other=lowest)
        p = tl.where(here, probabilities(s, s_max, 1.0 / s_sum, c) - mean, 0.0)
        q = tl.where(here, probabilities(t, t_max, 1.0 / t_sum, c) - mean, 0.0)
        pp += p * p
        qq += q * q
        pq += p * q
    tl.store(rows + i, s_max)
    tl.store(rows + n + i, tl.log(s_sum))
    tl.store(rows + 2 * n + i, t_max)
    tl.store(rows + 3 * n + i, tl.log(t_sum))
    tl.store(moments + i, tl.sum(pp, 0))
    tl.store(moments + n + i, tl.sum(qq, 0))
    tl.store(moments + 2 * n + i, tl.sum(pq, 0))


@triton.jit
def tile(matrix, statistics, i, at, stride, here, c, n, vocab):
    """Probabilities (rows, columns) from the rows' statistics; 0 outside."""
    largest = tl.load(statistics + i, mask=i < n, other=0.0)
    log_sum = tl.load(statistics + n + i, mask=i < n, other=0.0)
    x = tl.load(matrix + i.to(tl.int64)[:, None] * stride + at[None, :], mask=here, other=0.0)
    p = probabilities(x, largest[:, None], tl.exp2(-log_sum * LOG2_E)[:, None], c)
    return tl.where(here, p, 0.0)


@triton.jit(do_not_specialize=_NUMBERS)
def _columns(
    student, teacher, temperature, rows, sums, number, n, vocab, student_stride, teacher_stride,
    GIVEN: tl.constexpr, CHUNK: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of p and q, Σp̃², Σq̃² and Σp̃·q̃ of a strip of columns over a chunk of rows, into sums
    (chunks, 5, vocab). Tiles join by Chan's formula: deviations are from means, not from 0.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    c = scale_of(temperature, number, GIVEN) * LOG2_E
    p_mean, q_mean = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    pp, qq = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    pq = tl.zeros((BLOCK,), tl.float32)
    count = 0.0
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), HEIGHT):
        i = start + tl.arange(0, HEIGHT)
        here = (i < n)[:, None] & (at < vocab)[None, :]
        p = tile(student, rows, i, at, student_stride, here, c, n, vocab)
        q = tile(teacher, rows + 2 * n, i, at, teacher_stride, here, c, n, vocab)
        more = tl.minimum(HEIGHT, n - start).to(tl.float32)
        p_here, q_here = tl.sum(p, 0) / more, tl.sum(q, 0) / more
        p = tl.where(here, p - p_here[None, :], 0.0)
        q = tl.where(here, q - q_here[None, :], 0.0)
        p_apart, q_apart = p_here - p_mean, q_here - q_mean
        both = count + more
        weight = count * more / both
        pp += tl.sum(p * p, 0) + p_apart * p_apart * weight
        qq += tl.sum(q * q, 0) + q_apart * q_apart * weight
        pq += tl.sum(p * q, 0) + p_apart * q_apart * weight
        p_mean += p_apart * (more / both)
        q_mean += q_apart * (more / both)
        count = both
    out = sums + chunk.to(tl.int64) * 5 * vocab + at
    tl.store(out, p_mean, mask=at < vocab)
    tl.store(out + vocab, q_mean, mask=at < vocab)
    tl.store(out + 2 * vocab, pp, mask=at < vocab)
    tl.store(out + 3 * vocab, qq, mask=at < vocab)
    tl.store(out + 4 * vocab, pq, mask=at < vocab)


@triton.jit
def slopes(
    s_row, t_row, at, rows, columns, by_teacher, by_student, s_largest, t_largest, s_inverse,
    t_inverse, by_column, c, vocab,
):  # fmt: skip
    """(p, ∂loss/∂p) of a tile of a row; 0 outside."""
    here = at < vocab
    p = probabilities(tl.load(s_row + at, mask=here, other=0.0), s_largest, s_inverse, c)
    q = probabilities(tl.load(t_row + at, mask=here, other=0.0), t_largest, t_inverse, c)
    p_mean = tl.load(columns + at, mask=here, other=0.0)
    q_mean = tl.load(columns + vocab + at, mask=here, other=0.0)
    of_teacher = tl.load(columns + 2 * vocab + at, mask=here, other=0.0)
    of_student = tl.load(columns + 3 * vocab + at, mask=here, other=0.0)
    mean = 1.0 / vocab
    slope = by_student * (p - mean) - by_teacher * (q - mean)
    slope += by_column * (of_student * (p - p_mean) - of_teacher * (q - q_mean))
    return tl.where(here, p, 0.0), slope


@triton.jit(do_not_specialize=_NUMBERS)
def _gradient(
    grad, student, teacher, temperature, rows, columns, student_grad,
    number, n, vocab, student_stride, teacher_stride,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    scale = scale_of(temperature, number, GIVEN)
    c = scale * LOG2_E
    s_row, t_row = row_start(student, i, student_stride), row_start(teacher, i, teacher_stride)
    s_largest, t_largest = tl.load(rows + i), tl.load(rows + 2 * n + i)
    s_inverse = tl.exp2(-tl.load(rows + n + i) * LOG2_E)
    t_inverse = tl.exp2(-tl.load(rows + 3 * n + i) * LOG2_E)
    by_row, by_column = tl.load(grad) / n, tl.load(grad + 1) / vocab
    by_teacher = by_row * tl.load(rows + 4 * n + i)
    by_student = by_row * tl.load(rows + 5 * n + i)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        p, slope = slopes(
            s_row, t_row, start + tl.arange(0, BLOCK), rows, columns, by_teacher, by_student,
            s_largest, t_largest, s_inverse, t_inverse, by_column, c, vocab,
        )  # fmt: skip
        total += p * slope
    mean = tl.sum(total, 0)
    out = row_start(student_grad, i, vocab)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        p, slope = slopes(
            s_row, t_row, at, rows, columns, by_teacher, by_student,
            s_largest, t_largest, s_inverse, t_inverse, by_column, c, vocab,
        )  # fmt: skip
        value = p * (slope - mean) * scale
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < vocab)


# ---- the ops ----


def _options(vocab: int, temperature_tensor: Tensor | None) -> dict:
    block = min(2048, max(128, triton.next_power_of_2(vocab)))
    return dict(
        BLOCK=block,
        GIVEN=temperature_tensor is not None,
        num_warps=max(1, block // 256),
        **_triton.EXACT,
    )


def dist_loss(
    student: Tensor, teacher: Tensor, temperature: float, temperature_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, vocab = student.shape
    fresh: dict[str, Any] = dict(dtype=torch.float32, device=student.device)
    if n == 0:
        return (
            torch.zeros(2, **fresh),
            torch.empty((6, 0), **fresh),
            torch.zeros((4, vocab), **fresh),
        )
    statistics, moments = torch.empty((4, n), **fresh), torch.empty((3, n), **fresh)
    chunks = triton.cdiv(n, _CHUNK)
    sums = torch.empty((chunks, 5, vocab), **fresh)
    strides = student.stride(0), teacher.stride(0)
    options = _options(vocab, temperature_tensor)
    with _triton.on_device(student):
        _rows[(n,)](
            student, teacher, temperature_tensor, statistics, moments, temperature, n, vocab,
            *strides, **options,
        )  # fmt: skip
        block = min(128, options["BLOCK"])
        _columns[(triton.cdiv(vocab, block), chunks)](
            student, teacher, temperature_tensor, statistics, sums, temperature, n, vocab,
            *strides, CHUNK=_CHUNK, HEIGHT=16, **options | dict(BLOCK=block, num_warps=4),
        )  # fmt: skip
        mean = torch.full((), 1 / vocab, **fresh)
        of_rows, *row_factors = correlation(moments, mean, mean, vocab)
        means, products = _joined(sums, n)
        of_columns, *column_factors = correlation(products, means[0], means[1], n)
        losses = 1 - torch.stack([of_rows.mean(), of_columns.mean()])
        rows = torch.cat([statistics, torch.stack(row_factors)])
        return losses, rows, torch.stack([*means, *column_factors])


def _joined(sums: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Means (2, V) and sums of products of deviations (3, V) of all chunks together."""
    chunks = sums.shape[0]
    if chunks == 1:
        return sums[0, :2], sums[0, 2:]
    # Filled on the device: a copy from the host would wait for it.
    counts = torch.full((chunks, 1), float(_CHUNK), dtype=sums.dtype, device=sums.device)
    counts[-1] = n - _CHUNK * (chunks - 1)
    p, q = sums[:, 0], sums[:, 1]
    means = torch.stack([(x[0] + ((x - x[0]) * counts).sum(0) / n) for x in (p, q)])
    p, q = p - means[0], q - means[1]
    between = torch.stack([p * p, q * q, p * q], 1) * counts[:, None]
    return means, (sums[:, 2:] + between).sum(0)


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
    student_grad = student.new_empty((n, vocab))
    if n > 0:
        with _triton.on_device(student):
            _gradient[(n,)](
                grad, student, teacher, temperature_tensor, rows, columns, student_grad,
                temperature, n, vocab, student.stride(0), teacher.stride(0),
                **_options(vocab, temperature_tensor),
            )  # fmt: skip
    return student_grad
