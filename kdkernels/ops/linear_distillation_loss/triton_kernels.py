"""linear_distillation_loss without logits in memory, in Triton. Imported on first use.

forward   _statistics: one sweep over both vocabularies; tiles of both models' logits, products of
          hidden states and weights, live in registers → per row and chunk of columns, the state
          that distillation_loss's kernels keep
          _sums (class B: JSD, skew, TVD): a second sweep → Σφ and ΣG per row and chunk
          distillation_loss's _finish: rows, loss, statistics
gradient  _gradient, a panel of columns at a time: tiles of logits once more → the logits' gradient
          of the panel, rounded to the operands' dtype. Two products with the panel follow, by
          torch: ∂L/∂hidden += g·W in float32, ∂L/∂W of the panel's rows = gᵀ·hidden.

Multiplications and additions for each logit: Hs + Ht in the forward (twice for class B), as many
again in the backward, and 2·Hs for the gradients' products: 1.5 times those of chunks of rows where
Hs = Ht, 2 times for class B. One kernel for each gradient (no panel in memory) would form the
logits three times, 2 and 2.5 times those of chunks; both in one kernel would need either atomic
additions of floats, whose order is not fixed, or V×Hs float32 sums read and written once for each
block of rows. The panel has a fixed size, and the weight's gradient needs no float32 sum: each
panel's rows are complete after one product.

No option skips tiles whose gradients are all small, as cut-cross-entropy's filter_eps. On real
logits (SmolLM2-135M, 512 tokens of Python's reference, V = 49152; student: the same with noise in
its weights, KL 0.014, 0.14, 0.44) tiles of 128×128 with every |gradient| < 2^-12 are 22, 7 and 2 %
for forward KL (with the columns sorted by mean logit 55, 36, 27 %), which would save that share of
two of six products, and the hidden states' gradient is then off by 1.3, 0.34, 0.12 % (1.6, 0.66,
0.47 %), JSD's by 1.8 to 6 %: rounding costs 0.2. At 2^-16 under 5 % (4 to 34 % sorted) go.

A tile is BLOCK_M rows by BLOCK_N columns. A row's numbers are sums over columns in an order that
depends on the vocabulary alone, so statistics and loss have the same bits whatever rows are beside.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...divergences_triton import LOG2_E, TERMS, expm1
from .. import _triton
from ..distillation_loss import check_labels
from ..distillation_loss import triton_kernels as of_logits
from ..distillation_loss.reference import ROWS
from ..distillation_loss.triton_kernels import (
    CE_SCALE,
    EXCLUDE,
    FIRST,
    KD_SCALE,
    READ_STUDENT,
    READ_TEACHER,
    SECOND,
    STATES,
    STUDENT_LOG_Z,
    STUDENT_MAX,
    TEACHER_LOG_Z,
    TEACHER_MAX,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    Z_SCALE,
    empty,
    extended,
    gradient_row,
    gradient_tile,
)
from .reference import OF_THE_TEACHER, into_float32

# Rows and columns a tile. 64 FLOPs for each byte from L2; 128×64, whose kernels hardly spill, has
# 43: 235 TFLOPS at an H100's 5.5 TB/s. Two accumulators of a tile are 128 registers of each of 256
# threads, and what follows a product spills 0.3 to 1.9 KB a thread and tile (ptxas, sm_80, sm_90):
# none of it within the loops of the products: up to 0.5 MB, 3 us of a multiprocessor where a
# tile's products take 40 or more (H = 4096). Terms
# that mix p and q need twice the threads: 0.9 instead of 33 KB in _sums for JSD on sm_80.
BLOCK_M, BLOCK_N, WARPS = 128, 128, 8
# Columns a chunk: one program's share of a row, after which it leaves 72 bytes.
CHUNK = 4096
# Row blocks that go through the chunks together: their hidden states (1 MiB a block and model at
# H = 4096) stay in L2, and the weights come from memory once for each group.
GROUP_M = 8

# Arguments whose value compiles nothing new.
NUMBERS = (
    "n", "vocab", "chunks", "panel", "stop", "smoothing", "upstream_stride",
    "student_scale", "student_softcap", "teacher_scale", "teacher_softcap",
)  # fmt: skip


@triton.jit
def tanh(x):
    y = -2.0 * tl.abs(x)
    below = expm1(y, tl.exp(y))
    size = -below / (2.0 + below)
    return tl.where(x < 0, -size, size)


@triton.jit
def head(
    hidden, weight, bias, row, column, vocab, width, hidden_stride, weight_stride, weight_step,
    scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, EVEN: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of logits in float32; columns that are none have those of a weight of 0."""
    inside = column < vocab
    k = tl.arange(0, BLOCK_K)
    hidden_at = hidden + row[:, None] * hidden_stride + k[None, :]
    weight_at = weight + column[None, :].to(tl.int64) * weight_stride + k[:, None] * weight_step
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            x = tl.load(hidden_at)
            w = tl.load(weight_at, mask=inside[None, :], other=0.0)
        else:
            here = k < width - start
            x = tl.load(hidden_at, mask=here[None, :], other=0.0)
            w = tl.load(weight_at, mask=here[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x.to(OPERANDS), w.to(OPERANDS), total, input_precision=PRECISION)
        hidden_at += BLOCK_K
        weight_at += BLOCK_K * weight_step
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total *= scale
    if CAPPED:
        total = softcap * tanh(total / softcap)
    return total


@triton.jit
def both(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
    row, column, vocab, student_width, student_stride, student_weight_stride, student_weight_step,
    student_scale, student_softcap, teacher_width, teacher_stride, teacher_weight_stride,
    teacher_weight_step, teacher_scale, teacher_softcap,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_EVEN: tl.constexpr,
    STUDENT_OPERANDS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, TEACHER_EVEN: tl.constexpr, TEACHER_OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of both models' logits. TEACHER: "hidden", "logits" (in teacher_hidden), or "none",
    where the student's stand for them.
    """
    s = head(
        student_hidden, student_weight, student_bias, row, column, vocab, student_width,
        student_stride, student_weight_stride, student_weight_step, student_scale,
        student_softcap, STUDENT_BIAS, STUDENT_CAPPED, STUDENT_EVEN, STUDENT_OPERANDS,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = s
    if TEACHER == "hidden":
        t = head(
            teacher_hidden, teacher_weight, teacher_bias, row, column, vocab, teacher_width,
            teacher_stride, teacher_weight_stride, teacher_weight_step, teacher_scale,
            teacher_softcap, TEACHER_BIAS, TEACHER_CAPPED, TEACHER_EVEN, TEACHER_OPERANDS,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if TEACHER == "logits":
        at = teacher_hidden + row[:, None] * teacher_stride
        at += column[None, :].to(tl.int64) * teacher_weight_step
        t = tl.load(at, mask=(column < vocab)[None, :], other=0.0).to(tl.float32)
    return s, t


@triton.jit
def place(n, chunks, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(row block, chunk of columns) of this program: GROUP_M blocks go through all chunks."""
    program = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_M)
    first = program // (GROUP_M * chunks) * GROUP_M
    size = tl.minimum(blocks - first, GROUP_M)
    within = program % (GROUP_M * chunks)
    return first + within % size, within // size


@triton.jit
def rows_of(block, n, BLOCK_M: tl.constexpr):
    """Row numbers of a block, the last one repeated past the end; and which are rows."""
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.minimum(row, n - 1), row < n


@triton.jit(do_not_specialize=NUMBERS)
def _statistics(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
    rows, masks, labels, student_label, teacher_label, states, n, vocab, chunks,
    student_width, student_stride, student_weight_stride, student_weight_step,
    student_scale, student_softcap, teacher_width, teacher_stride, teacher_weight_stride,
    teacher_weight_step, teacher_scale, teacher_softcap,
    KIND: tl.constexpr, LABELLED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_EVEN: tl.constexpr,
    STUDENT_OPERANDS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, TEACHER_EVEN: tl.constexpr, TEACHER_OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The first sweep: the state of each row's chunk, (STATES, n, chunks), and the logits at the
    labels.
    """
    block, chunk = place(n, chunks, BLOCK_M, GROUP_M)
    row, exists = rows_of(block, n, BLOCK_M)
    mask = tl.load(masks + row).to(tl.int32)
    if tl.max(mask & READ_STUDENT, 0) == 0:
        return
    reads_teacher = mask & READ_TEACHER != 0
    cs = LOG2_E / tl.load(rows + TEMPERATURE * n + row)
    ct = LOG2_E / tl.load(rows + TEACHER_TEMPERATURE * n + row)
    first = tl.load(rows + FIRST * n + row)
    second = tl.load(rows + SECOND * n + row)
    label = tl.full((BLOCK_M,), -1, tl.int64)
    if LABELLED:
        label = tl.load(labels + row)
    at_label = tl.zeros((BLOCK_M,), tl.float32)
    teacher_at_label = tl.zeros((BLOCK_M,), tl.float32)
    state = empty(BLOCK_M)
    end = tl.minimum(chunk * CHUNK + CHUNK, vocab)
    for start in range(chunk * CHUNK, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s, t = both(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
            teacher_bias, row, column, vocab, student_width, student_stride,
            student_weight_stride, student_weight_step, student_scale, student_softcap,
            teacher_width, teacher_stride, teacher_weight_stride, teacher_weight_step,
            teacher_scale, teacher_softcap, STUDENT_BIAS, STUDENT_CAPPED, STUDENT_EVEN,
            STUDENT_OPERANDS, TEACHER, TEACHER_BIAS, TEACHER_CAPPED, TEACHER_EVEN,
            TEACHER_OPERANDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        t = tl.where(reads_teacher[:, None], t, 0.0)
        counted = tl.broadcast_to((column < vocab)[None, :], (BLOCK_M, BLOCK_N))
        if LABELLED:
            here = column[None, :] == label[:, None]
            at_label += tl.sum(tl.where(here, s, 0.0), 1)
            if EXCLUDE & KIND:
                teacher_at_label += tl.sum(tl.where(here, t, 0.0), 1)
                counted = counted & (here == 0)
        s = tl.where(counted, s, float("-inf"))
        t = tl.where(counted, t, float("-inf"))
        state = extended(state, s, t, column[None, :], counted, cs, ct, first, second, KIND)
    for k in tl.static_range(STATES):
        at = states + (k * n + row) * chunks + chunk
        tl.store(at, state[k].to(tl.float32, bitcast=True), mask=exists)
    if LABELLED:
        mine = exists & (label >= chunk * CHUNK) & (label < end)
        tl.store(student_label + row, at_label, mask=mine)
        if EXCLUDE & KIND:
            tl.store(teacher_label + row, teacher_at_label, mask=mine)


@triton.jit(do_not_specialize=NUMBERS)
def _sums(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
    rows, masks, sums, n, vocab, chunks,
    student_width, student_stride, student_weight_stride, student_weight_step,
    student_scale, student_softcap, teacher_width, teacher_stride, teacher_weight_stride,
    teacher_weight_step, teacher_scale, teacher_softcap,
    TERM: tl.constexpr, MIXES: tl.constexpr, HARDWARE: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_EVEN: tl.constexpr,
    STUDENT_OPERANDS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, TEACHER_EVEN: tl.constexpr, TEACHER_OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The second sweep of class B, from the log-sum-exps in rows: Σφ and ΣG, (2, n, chunks)."""
    block, chunk = place(n, chunks, BLOCK_M, GROUP_M)
    row, exists = rows_of(block, n, BLOCK_M)
    mask = tl.load(masks + row).to(tl.int32)
    if tl.max(mask & READ_TEACHER, 0) == 0:
        return
    i = row[:, None]
    cs = LOG2_E / tl.load(rows + TEMPERATURE * n + i)
    ct = LOG2_E / tl.load(rows + TEACHER_TEMPERATURE * n + i)
    first = tl.load(rows + FIRST * n + i)
    second = tl.load(rows + SECOND * n + i)
    student_max = tl.load(rows + STUDENT_MAX * n + i)
    student_log_z = tl.load(rows + STUDENT_LOG_Z * n + i) * LOG2_E
    teacher_max = tl.load(rows + TEACHER_MAX * n + i)
    teacher_log_z = tl.load(rows + TEACHER_LOG_Z * n + i) * LOG2_E
    phi = tl.zeros((BLOCK_M,), tl.float32)
    g = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, vocab), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s, t = both(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
            teacher_bias, row, column, vocab, student_width, student_stride,
            student_weight_stride, student_weight_step, student_scale, student_softcap,
            teacher_width, teacher_stride, teacher_weight_stride, teacher_weight_step,
            teacher_scale, teacher_softcap, STUDENT_BIAS, STUDENT_CAPPED, STUDENT_EVEN,
            STUDENT_OPERANDS, TEACHER, TEACHER_BIAS, TEACHER_CAPPED, TEACHER_EVEN,
            TEACHER_OPERANDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        inside = (column < vocab)[None, :]
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(inside, t, float("-inf"))
        phi, g = of_logits.summed(
            phi, g, s, t, student_max, student_log_z, teacher_max, teacher_log_z,
            cs, ct, first, second, HARDWARE, TERM, MIXES,
        )  # fmt: skip
    tl.store(sums + row * chunks + chunk, phi, mask=exists)
    tl.store(sums + (n + row) * chunks + chunk, g, mask=exists)


@triton.jit
def capped_slope(logit, scale, softcap, CAPPED: tl.constexpr):
    """∂logit/∂(hidden·weight + bias)."""
    if CAPPED:
        ratio = logit / softcap
        return scale * (1.0 - ratio * ratio)
    else:
        return scale


@triton.jit(do_not_specialize=NUMBERS)
def _gradient(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
    upstream, rows, labels, student_label, teacher_label, student_panel, teacher_panel,
    n, vocab, panel, stop, chunks, smoothing, upstream_stride,
    student_panel_stride, teacher_panel_stride,
    student_width, student_stride, student_weight_stride, student_weight_step,
    student_scale, student_softcap, teacher_width, teacher_stride, teacher_weight_stride,
    teacher_weight_step, teacher_scale, teacher_softcap,
    NAME: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr, EXCLUDES: tl.constexpr,
    HARDWARE: tl.constexpr, LABELLED: tl.constexpr, STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAPPED: tl.constexpr, STUDENT_EVEN: tl.constexpr,
    STUDENT_OPERANDS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, TEACHER_EVEN: tl.constexpr, TEACHER_OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits, for columns `panel` to `stop` into (n, stop − panel)."""
    block, tile = place(n, chunks, BLOCK_M, GROUP_M)
    row, exists = rows_of(block, n, BLOCK_M)
    i = row[:, None]
    place_in_panel = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = panel + place_in_panel
    # A panel has whole tiles of columns, and is read as far as they are columns: no mask, so that
    # 16 bytes are stored at a time. The gradient of given logits ends with them.
    within = exists[:, None]
    teacher_within = within
    if TEACHER == "logits":
        teacher_within = within & (column < stop)[None, :]
    if STUDENT_GRAD:
        student_at = student_panel + i * student_panel_stride + place_in_panel[None, :]
    if TEACHER_GRAD:
        teacher_at = teacher_panel + i * teacher_panel_stride + place_in_panel[None, :]
    reads_teacher = tl.load(rows + KD_SCALE * n + row) != 0
    reads_unit = tl.load(rows + CE_SCALE * n + row) != 0
    reads_unit = reads_unit | (tl.load(rows + Z_SCALE * n + row) != 0)
    any_unit = tl.max(reads_unit.to(tl.int32), 0)
    if tl.max(reads_teacher.to(tl.int32), 0) + any_unit == 0:
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if STUDENT_GRAD:
            tl.store(student_at, zero.to(student_panel.dtype.element_ty), mask=within)
        if TEACHER_GRAD:
            tl.store(teacher_at, zero.to(teacher_panel.dtype.element_ty), mask=teacher_within)
        return
    label = tl.full((BLOCK_M, 1), -1, tl.int64)
    if LABELLED:
        label = tl.load(labels + i)
    constants = gradient_row(
        rows, n, i, tl.load(upstream + i * upstream_stride).to(tl.float32), any_unit != 0, label,
        student_label, teacher_label, vocab, smoothing, NAME, HARDWARE, EXCLUDES,
    )  # fmt: skip
    raw, t = both(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
        teacher_bias, row, column, vocab, student_width, student_stride, student_weight_stride,
        student_weight_step, student_scale, student_softcap, teacher_width, teacher_stride,
        teacher_weight_stride, teacher_weight_step, teacher_scale, teacher_softcap,
        STUDENT_BIAS, STUDENT_CAPPED, STUDENT_EVEN, STUDENT_OPERANDS, TEACHER, TEACHER_BIAS,
        TEACHER_CAPPED, TEACHER_EVEN, TEACHER_OPERANDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    student_slope = capped_slope(raw, student_scale, student_softcap, STUDENT_CAPPED)
    teacher_slope = capped_slope(t, teacher_scale, teacher_softcap, TEACHER_CAPPED)
    column = column[None, :]
    s = raw
    t = tl.where(reads_teacher[:, None], t, 0.0)
    if EXCLUDES:
        s = tl.where(column == label, float("-inf"), s)
        t = tl.where(column == label, float("-inf"), t)
    ds, dt = gradient_tile(s, t, raw, column, label, constants, HARDWARE, TERM, MIXES, EXCLUDES)
    # A row that is not counted has a gradient of 0, whatever its logits are.
    counts = (reads_teacher | reads_unit)[:, None]
    if STUDENT_GRAD:
        ds = tl.where(counts, ds * student_slope, 0.0)
        tl.store(student_at, ds.to(student_panel.dtype.element_ty), mask=within)
    if TEACHER_GRAD:
        dt = tl.where(reads_teacher[:, None], dt * teacher_slope, 0.0)
        tl.store(teacher_at, dt.to(teacher_panel.dtype.element_ty), mask=teacher_within)


# ---- the ops ----


def low_memory(*args) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows, logits at the labels) for the schema in low_memory.py."""
    heads, (labels, token_weights, divergence, *options) = Heads.split(args)
    t_squared, label_smoothing, ignore_index, _, vocab, reduction, return_stats = options[-7:]
    check_labels(labels, ignore_index, vocab)
    hidden = heads.student_hidden
    n, device = len(hidden), hidden.device
    with torch.autocast(device.type, enabled=False):
        given = of_logits.started(hidden, hidden, labels, token_weights, divergence, *options)
        at_labels = hidden.new_full((2, n), float("nan"), dtype=torch.float32)
        totals = torch.empty((n,), dtype=torch.float32, device=device)
        if n:
            _forward(heads, given, labels, at_labels, totals, divergence, options)
        loss = totals if reduction == "none" else totals.sum(dtype=torch.float64).float()
        if return_stats and heads.teacher == "none":
            given.rows[[len(ROWS) + place for place in OF_THE_TEACHER]] = 0
    return loss, given.rows, at_labels


def _forward(heads, given, labels, at_labels, totals, divergence, options) -> None:
    t_squared, label_smoothing, _, _, vocab, _, _ = options[-7:]
    rows, masks, kind, class_b = given
    n = rows.shape[1]
    class_b = class_b and heads.teacher != "none"
    term = TERMS[divergence]
    chunks = -(-vocab // CHUNK)
    grid = (-(-n // BLOCK_M) * chunks,)
    states = rows.new_empty((STATES.value, n, chunks))
    sums = rows.new_zeros((2, n, chunks))
    label_logits = (None, None) if labels is None else at_labels.unbind()
    rest = (label_logits, states, sums, totals, vocab, chunks, divergence, label_smoothing)
    with _triton.on_device(rows):
        _statistics[grid](
            *heads.tensors(), rows, masks, labels, *at_labels, states, n, vocab, chunks,
            *heads.numbers(), KIND=kind, LABELLED=labels is not None, **heads.options(),
            CHUNK=CHUNK, GROUP_M=GROUP_M,
        )  # fmt: skip
        if class_b:
            # For the log-sum-exps.
            of_logits.finish(given, labels, *rest, t_squared, class_b)
            _sums[grid](
                *heads.tensors(), rows, masks, sums, n, vocab, chunks, *heads.numbers(),
                TERM=term.function, MIXES=term.mixes, HARDWARE=_triton.hardware_log(),
                **heads.options(term.mixes), CHUNK=CHUNK, GROUP_M=GROUP_M,
            )  # fmt: skip
        of_logits.finish(given, labels, *rest, t_squared, given.class_b)


def low_memory_backward(
    grad_loss: Tensor, rows: Tensor, at_labels: Tensor, panel_bytes: int, wanted: list[bool], *args
) -> list[Tensor]:
    """Gradients of the seven tensors, empty where not wanted."""
    heads, (labels, divergence, label_smoothing, vocab) = Heads.split(args)
    with torch.autocast(rows.device.type, enabled=False):
        backward = _Backward(heads, rows, grad_loss, panel_bytes, wanted, vocab)
        for start, stop in backward.panels():
            backward.gradient(start, stop, at_labels, labels, divergence, label_smoothing)
            backward.take_in(start, stop)
        return backward.finish()


class Heads(NamedTuple):
    """Both models' last layers: the arguments that the ops have in common."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    student_softcap: float | None
    student_logit_scale: float
    student_operands: torch.dtype
    teacher_softcap: float | None
    teacher_logit_scale: float
    teacher_operands: torch.dtype

    @classmethod
    def split(cls, args) -> tuple["Heads", tuple]:
        """(heads, what follows them in an op's arguments)."""
        heads = cls(*args[: len(cls._fields)])

        def rows(x):
            return x if x is None or x.stride(1) == 1 else x.contiguous()

        heads = heads._replace(
            student_hidden=rows(heads.student_hidden), teacher_hidden=rows(heads.teacher_hidden)
        )
        return heads, args[len(cls._fields) :]

    @property
    def teacher(self) -> str:
        if self.teacher_hidden is not None:
            return "hidden"
        return "none" if self.teacher_logits is None else "logits"

    def tensors(self) -> tuple[Tensor | None, ...]:
        source = self.teacher_logits if self.teacher == "logits" else self.teacher_hidden
        return (*self[:3], source, *self[4:6])

    def numbers(self) -> tuple[Any, ...]:
        """A head's sizes, strides, scale and softcap, as the kernels take them."""
        found: list[Any] = []
        for hidden, weight, softcap, scale in (
            (*self[:2], self.student_softcap, self.student_logit_scale),
            (*self[3:5], self.teacher_softcap, self.teacher_logit_scale),
        ):
            if hidden is None or weight is None:
                found += [0, 0, 0, 0]
            else:
                found += [hidden.shape[1], hidden.stride(0), *weight.stride()]
            found += [scale, 1.0 if softcap is None else softcap]
        if self.teacher_logits is not None:
            found[7], found[9] = self.teacher_logits.stride()
        return tuple(found)

    def options(self, mixes: bool = False) -> dict[str, Any]:
        stored = [x for x in (*self[:2], *self[3:5]) if x is not None]
        step = 64 if max(x.element_size() for x in stored) == 2 else 32
        found: dict[str, Any] = {}
        for name, hidden, bias, softcap, operands in (
            ("STUDENT", *self[0:3:2], self.student_softcap, self.student_operands),
            ("TEACHER", *self[3:6:2], self.teacher_softcap, self.teacher_operands),
        ):
            found[f"{name}_BIAS"] = bias is not None
            found[f"{name}_CAPPED"] = softcap is not None
            found[f"{name}_EVEN"] = hidden is not None and hidden.shape[1] % step == 0
            found[f"{name}_OPERANDS"] = _TYPES[operands]
        tf32 = torch.backends.cuda.matmul.allow_tf32
        return found | dict(
            TEACHER=self.teacher,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=step,
            num_warps=2 * WARPS if mixes else WARPS,
            num_stages=3,
            **_triton.EXACT,
        )


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Side:
    """A model's gradients: the panel of its logits' gradient, and what it goes into."""

    def __init__(self, tensors, operands: torch.dtype, wanted: list[bool], width: int, vocab: int):
        self.wants_hidden, self.wants_weight, self.wants_bias = wanted
        self.any = any(wanted)
        self.hidden, self.weight, self.bias = tensors
        self.operands, self.vocab = operands, vocab
        if not self.any:
            return
        n, size = self.hidden.shape
        self.panel = self.hidden.new_empty((n, width), dtype=operands)
        if self.wants_hidden:
            self.by_hidden = self.hidden.new_empty((n, size), dtype=torch.float32)
        if self.wants_weight:
            self.by_weight = torch.empty_like(self.weight)
            self.by_weight[vocab:].zero_()
            self.product = self.weight.new_empty((width, size), dtype=torch.float32)
        if self.wants_bias:
            self.by_bias = torch.empty_like(self.bias)
            self.by_bias[vocab:].zero_()

    def take_in(self, start: int, stop: int, counted: Tensor, unscale: Tensor) -> None:
        if not self.any:
            return
        panel = self.panel[:, : stop - start]
        if self.wants_hidden:
            into_float32(self.by_hidden, panel, self._operand(self.weight[start:stop]), start > 0)
        if self.wants_weight:
            if start == 0:
                # A row that is not counted may hold NaN, which times 0 is NaN.
                clean = torch.where(counted, self.hidden.to(self.operands), 0.0)
                self.counted_hidden = clean
            product = self.product[: stop - start]
            into_float32(product, panel.t(), self.counted_hidden, False)
            self.by_weight[start:stop] = product.mul_(unscale)
        if self.wants_bias:
            self.by_bias[start:stop] = panel.sum(0, dtype=torch.float32) * unscale

    def finish(self, unscale: Tensor) -> list[Tensor]:
        nothing = self.hidden if self.hidden is not None else unscale
        found = [nothing.new_empty(0) for _ in range(3)]
        if self.wants_hidden:
            found[0] = self.by_hidden.mul_(unscale).to(self.hidden.dtype)
        if self.wants_weight:
            found[1] = self.by_weight
        if self.wants_bias:
            found[2] = self.by_bias
        return found

    def _operand(self, x: Tensor) -> Tensor:
        x = x.to(self.operands)
        return x if 1 in x.stride() else x.contiguous()


class _Backward:
    def __init__(self, heads: Heads, rows, grad_loss, panel_bytes: int, wanted, vocab: int):
        self.heads, self.rows, self.vocab = heads, rows, vocab
        n = rows.shape[1]
        scales = rows[ROWS.index("kd_scale") : ROWS.index("z_scale") + 1]
        self.counted = (scales != 0).any(0)[:, None]
        of_teacher = wanted[3:6] if heads.teacher == "hidden" else [False] * 3
        self.wants_logits = wanted[6]
        each = (heads.student_operands.itemsize if any(wanted[:3]) else 0) + (
            heads.teacher_operands.itemsize if any(of_teacher) else 0
        )
        width = -(-vocab // BLOCK_N) * BLOCK_N
        if each:
            tiles = panel_bytes // (max(1, n) * each * BLOCK_N)
            width = min(-(-vocab // BLOCK_N), max(1, tiles)) * BLOCK_N
        self.width = width
        self.student = _Side(heads[:3], heads.student_operands, wanted[:3], width, vocab)
        self.teacher = _Side(heads[3:6], heads.teacher_operands, of_teacher, width, vocab)
        self.by_logits = rows.new_empty(0)
        given = heads.teacher_logits
        if given is not None and self.wants_logits:
            self.by_logits = given.new_zeros(given.shape)  # columns of stride 1, as panels
        self.upstream = grad_loss.float().expand(n)
        self.unscale = rows.new_ones(())
        if n and torch.float16 in (heads.student_operands, heads.teacher_operands):
            # What is small would be lost in float16. A power of two brings the largest coefficient
            # of a row to 8 … 16: 2^-28 of that is the smallest number, 2^12 the largest.
            largest = (torch.where(scales == 0, 0.0, scales * self.upstream)).abs().amax()
            exponent = torch.floor(torch.log2(16 / largest))
            exponent = torch.where(exponent.isfinite(), exponent.clamp(-100, 100), 0.0)
            self.upstream = self.upstream * torch.exp2(exponent)
            self.unscale = torch.exp2(-exponent)

    def panels(self):
        for start in range(0, self.vocab, self.width):
            yield start, min(start + self.width, self.vocab)

    def gradient(self, start: int, stop: int, at_labels, labels, divergence, smoothing) -> None:
        n = self.rows.shape[1]
        if n == 0:
            return
        term = TERMS[divergence]
        # Gradients of given logits go where they belong at once.
        dt = self.by_logits[:, start:] if self.wants_logits else None
        if self.teacher.any:
            dt = self.teacher.panel
        ds = self.student.panel if self.student.any else None
        tiles = -(-(stop - start) // BLOCK_N)
        with _triton.on_device(self.rows):
            _gradient[(-(-n // BLOCK_M) * tiles,)](
                *self.heads.tensors(), self.upstream, self.rows, labels, *at_labels, ds, dt,
                n, self.vocab, start, stop, tiles, smoothing, self.upstream.stride(0),
                0 if ds is None else ds.stride(0), 0 if dt is None else dt.stride(0),
                *self.heads.numbers(),
                NAME=divergence, TERM=term.function, MIXES=term.mixes,
                EXCLUDES=divergence == "dkd", HARDWARE=_triton.hardware_log(),
                LABELLED=labels is not None, STUDENT_GRAD=ds is not None,
                TEACHER_GRAD=dt is not None, **self.heads.options(term.mixes), GROUP_M=GROUP_M,
            )  # fmt: skip

    def take_in(self, start: int, stop: int) -> None:
        for side in (self.student, self.teacher):
            side.take_in(start, stop, self.counted, self.unscale)

    def finish(self) -> list[Tensor]:
        if self.wants_logits:
            self.by_logits.mul_(self.unscale)
        found = self.student.finish(self.unscale) + self.teacher.finish(self.unscale)
        return [*found, self.by_logits]
