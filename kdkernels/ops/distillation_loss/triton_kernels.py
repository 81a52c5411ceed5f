"""The distillation_loss ops in Triton. Imported on first use: the package works without Triton.

forward   _statistics: one sweep over both rows → per chunk maxima, sums of exponentials and what
          gives D and ΣG of a class A divergence
          _sums (class B: JSD, skew, TVD): a second sweep → Σφ and ΣG per chunk
          _finish: one program a row combines the chunks in order → rows, loss, statistics
gradient  _gradient: one sweep, from the rows that any implementation's forward left

bfloat16: 4 + 6 bytes a logit pair for class A, 4 + 4 + 6 for class B, one pass (`_and_grad`) too.

Exponentials are base 2 of (x − maximum)·log2(e)/τ. A thread keeps a running maximum per group of
neighbouring columns (``_triton``), so that a change of maximum costs one more exponential a group.
Sums of weights times log-ratios are kept relative to the running maxima and move with them: a fixed
anchor a row would cost digits wherever it is far from the maximum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import divergences_triton
from ...divergences_triton import LN_2, LOG2_E, TERMS, probabilities, times
from .. import _triton
from .._triton import anchored, inside, masked_tile, positions, row_pointer, row_shift, span
from . import reference

# Lines of `rows` by name, for the kernels.
_LINE = {name: place for place, name in enumerate(reference.ROWS + reference.STATS)}
STUDENT_MAX = tl.constexpr(_LINE["student_max"])
STUDENT_LOG_Z = tl.constexpr(_LINE["student_log_z"])
TEACHER_MAX = tl.constexpr(_LINE["teacher_max"])
TEACHER_LOG_Z = tl.constexpr(_LINE["teacher_log_z"])
DIVERGENCE = tl.constexpr(_LINE["divergence"])
SUM_G = tl.constexpr(_LINE["sum_g"])
UNIT_LOG_Z = tl.constexpr(_LINE["unit_log_z"])
KD_SCALE = tl.constexpr(_LINE["kd_scale"])
CE_SCALE = tl.constexpr(_LINE["ce_scale"])
Z_SCALE = tl.constexpr(_LINE["z_scale"])
TEMPERATURE = tl.constexpr(_LINE["temperature"])
TEACHER_TEMPERATURE = tl.constexpr(_LINE["teacher_temperature"])
FIRST = tl.constexpr(_LINE["first"])
SECOND = tl.constexpr(_LINE["second"])
KD = tl.constexpr(_LINE["kd"])
CE = tl.constexpr(_LINE["ce"])
STUDENT_ENTROPY = tl.constexpr(_LINE["student_entropy"])
TEACHER_ENTROPY = tl.constexpr(_LINE["teacher_entropy"])
LABEL_LOG_PROB = tl.constexpr(_LINE["label_log_prob"])
AGREEMENT = tl.constexpr(_LINE["top1_agreement"])

# Bits of a row's mask.
_COUNTS_KD, _COUNTS_CE, _READ_STUDENT, _READ_TEACHER = 1, 2, 4, 8
COUNTS_KD = tl.constexpr(_COUNTS_KD)
COUNTS_CE = tl.constexpr(_COUNTS_CE)
READ_STUDENT = tl.constexpr(_READ_STUDENT)
READ_TEACHER = tl.constexpr(_READ_TEACHER)

# What a chunk leaves, in this order. X, Y: the logits less the maximum, in units of log2(e)/τ.
_STATE = (
    "student_max",
    "student_sum",  # Σ 2^X
    "teacher_max",
    "teacher_sum",
    "forward",  # Σ 2^Y (Y − X)
    "reverse",  # Σ 2^X (X − Y)
    "tilted_max",  # of order·Y + (1 − order)·X
    "tilted_sum",
    "student_power",  # Σ 2^(kX)
    "teacher_power",
    "mixed_power",  # Σ 2^(first·Y + second·X)
    "unit_sum",  # Σ e^(s − maximum)
    "logits",  # Σ (s − maximum)
    "count",  # of columns in it
    "student_entropy",  # Σ 2^X X
    "teacher_entropy",
    "student_argmax",
    "teacher_argmax",
)
STATES = tl.constexpr(len(_STATE))

# Bits of KIND: what a first sweep has to sum besides the log-sum-exps.
FORWARD, REVERSE, TILTED, POWERS = (tl.constexpr(1 << bit) for bit in range(4))
UNIT, SMOOTHING, STATS, EXCLUDE = (tl.constexpr(1 << bit) for bit in range(4, 8))


@triton.jit
def empty(LANES: tl.constexpr):
    lowest = tl.full((LANES,), float("-inf"), tl.float32)
    zero = tl.zeros((LANES,), tl.float32)
    nowhere = tl.full((LANES,), 2147483647, tl.int32)
    return (
        lowest, zero, lowest, zero, zero, zero, lowest, zero, zero, zero, zero, zero, zero, zero,
        zero, zero, nowhere, nowhere,
    )  # fmt: skip


@triton.jit
def moved(total, weights, factor, delta):
    """Σ w·v after every v has grown by delta and every w by `factor`."""
    return times(factor, total + weights * delta)


@triton.jit
def rescaled(state, student_max, teacher_max, cs, ct, first, second, KIND: tl.constexpr):
    """A state relative to other maxima, which are not below its own."""
    (
        ms, zs, mt, zt, forward, reverse, mz, zz, pk, qk, mixed, unit, logits, count, hs, ht,
        s_at, t_at,
    ) = state  # fmt: skip
    new_s = anchored(student_max)
    new_t = anchored(teacher_max)
    # Of an empty state the sums are 0: any finite move will do.
    ds = (new_s - anchored(ms)) * cs
    dt = (new_t - anchored(mt)) * ct
    down_s = (ms - new_s) * cs
    down_t = (mt - new_t) * ct
    rs = tl.exp2(down_s)
    rt = tl.exp2(down_t)
    if FORWARD & KIND:
        forward = moved(forward, zt, rt, ds - dt)
    if REVERSE & KIND:
        reverse = moved(reverse, zs, rs, dt - ds)
    if TILTED & KIND:
        mz -= first * dt + (1.0 - first) * ds
    if POWERS & KIND:
        pk *= tl.exp2(down_s * (first + second))
        qk *= tl.exp2(down_t * (first + second))
        mixed *= tl.exp2(first * down_t + second * down_s)
    if UNIT & KIND:
        unit *= tl.exp2((ms - new_s) * LOG2_E)
    if SMOOTHING & KIND:
        logits -= count * (new_s - anchored(ms))
    if STATS & KIND:
        hs = moved(hs, zs, rs, -ds)
        ht = moved(ht, zt, rt, -dt)
    return (
        student_max, rs * zs, teacher_max, rt * zt, forward, reverse, mz, zz, pk, qk,
        mixed, unit, logits, count, hs, ht, s_at, t_at,
    )  # fmt: skip


@triton.jit
def finite(m):
    """m where it is finite, else 0: what exponentials are relative to where +inf is one."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def merged(state, cs, ct, first, second, KIND: tl.constexpr):
    """One state of a vector of them."""
    student_max = tl.max(state[0], 0)
    teacher_max = tl.max(state[2], 0)
    s_first = tl.min(tl.where(state[0] == student_max, state[16], 2147483647), 0)
    t_first = tl.min(tl.where(state[2] == teacher_max, state[17], 2147483647), 0)
    state = rescaled(state, student_max, teacher_max, cs, ct, first, second, KIND)
    tilted_max = tl.max(state[6], 0)
    tilted = tl.sum(times(tl.exp2(state[6] - finite(tilted_max)), state[7]), 0)
    return (
        student_max, tl.sum(state[1], 0), teacher_max, tl.sum(state[3], 0), tl.sum(state[4], 0),
        tl.sum(state[5], 0), tilted_max, tilted, tl.sum(state[8], 0), tl.sum(state[9], 0),
        tl.sum(state[10], 0), tl.sum(state[11], 0), tl.sum(state[12], 0), tl.sum(state[13], 0),
        tl.sum(state[14], 0), tl.sum(state[15], 0), s_first, t_first,
    )  # fmt: skip


@triton.jit
def first_column(x, largest, best, at, column):
    """Where the first maximum is, of a lane that had `best` at `at`."""
    here = tl.min(tl.where(x == largest[:, None], column, 2147483647), 1)
    at = tl.where(largest > best, here, at)
    return tl.where(largest == best, tl.minimum(at, here), at)


@triton.jit
def beside(x):
    """A value of a row beside its tile: one scalar of all lanes, or one each."""
    if len(x.shape) == 1:
        return x[:, None]
    else:
        return x


@triton.jit
def extended(state, s, t, column, counted_here, cs, ct, first, second, KIND: tl.constexpr):
    """A state with a tile of columns more, whose lanes are parts of one row, or rows."""
    group_s = tl.max(s, 1)
    group_t = tl.max(t, 1)
    s_at = state[16]
    t_at = state[17]
    if STATS & KIND:
        s_at = first_column(s, group_s, state[0], s_at, column)
        t_at = first_column(t, group_t, state[2], t_at, column)
    student_max = tl.maximum(state[0], group_s)
    teacher_max = tl.maximum(state[2], group_t)
    (
        ms, zs, mt, zt, forward, reverse, mz, zz, pk, qk, mixed, unit, logits, counted, hs, ht,
        _, _,
    ) = rescaled(state, student_max, teacher_max, cs, ct, first, second, KIND)  # fmt: skip
    below_s = s - anchored(ms)[:, None]
    x = below_s * beside(cs)
    y = (t - anchored(mt)[:, None]) * beside(ct)
    es = tl.exp2(x)
    et = tl.exp2(y)
    zs += tl.sum(es, 1)
    zt += tl.sum(et, 1)
    if FORWARD & KIND:
        forward += tl.sum(times(et, y - x), 1)
    if REVERSE & KIND:
        reverse += tl.sum(times(es, x - y), 1)
    if TILTED & KIND:
        z = divergences_triton.geometric(x, y, beside(first))
        tilted_max = tl.maximum(mz, tl.max(z, 1))
        zz = times(tl.exp2(mz - finite(tilted_max)), zz)
        zz += tl.sum(tl.exp2(z - finite(tilted_max)[:, None]), 1)
        mz = tilted_max
    if POWERS & KIND:
        pk += tl.sum(tl.exp2(x * beside(first + second)), 1)
        qk += tl.sum(tl.exp2(y * beside(first + second)), 1)
        mixed += tl.sum(tl.exp2(tl.fma(y, beside(first), beside(second) * x)), 1)
    if UNIT & KIND:
        unit += tl.sum(tl.exp2(below_s * LOG2_E), 1)
    if SMOOTHING & KIND:
        logits += tl.sum(tl.where(counted_here, below_s, 0.0), 1)
        counted += tl.sum(counted_here.to(tl.float32), 1)
    if STATS & KIND:
        hs += tl.sum(times(es, x), 1)
        ht += tl.sum(times(et, y), 1)
    return (
        ms, zs, mt, zt, forward, reverse, mz, zz, pk, qk, mixed, unit, logits, counted, hs, ht,
        s_at, t_at,
    )  # fmt: skip


@triton.jit
def tile(
    student, teacher, start, shift, vocab, label, reads_teacher,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    EXCLUDES: tl.constexpr,
):  # fmt: skip
    """Both rows' logits in float32 where `counted`, elsewhere −inf; the student's as they are;
    positions, and which are columns. What the row does not need of the teacher is not read, and 0.
    """
    position = positions(start, BLOCK, GROUP)
    if MASKED:
        here = inside(start, shift, vocab, BLOCK, GROUP, RAGGED)
        raw = tl.load(student + position, mask=here, other=0.0).to(tl.float32)
        reads = tl.where(reads_teacher, here, False)
        t = tl.load(teacher + position, mask=reads, other=0.0).to(tl.float32)
    else:
        here = tl.full((BLOCK // GROUP, GROUP), True, tl.int1)
        raw = tl.load(student + position).to(tl.float32)
        t = tl.load(teacher + position, mask=reads_teacher, other=0.0).to(tl.float32)
    counted = here
    s = raw
    if EXCLUDES:
        counted = here & (position - shift != label)
    if MASKED or EXCLUDES:
        s = tl.where(counted, raw, float("-inf"))
        t = tl.where(counted, t, float("-inf"))
    return s, t, raw, position, here, counted


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _statistics(
    student, teacher, rows, masks, labels, states,
    n, vocab, student_stride, teacher_stride, student_offset, chunks,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, STUDENT_WIDE: tl.constexpr, TEACHER_WIDE: tl.constexpr,
):  # fmt: skip
    """The first sweep: each chunk's state, (STATES, n, chunks)."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    mask = tl.load(masks + i).to(tl.int32)
    if mask & READ_STUDENT == 0:
        return
    reads_teacher = mask & READ_TEACHER != 0
    cs = LOG2_E / tl.load(rows + TEMPERATURE * n + i)
    ct = LOG2_E / tl.load(rows + TEACHER_TEMPERATURE * n + i)
    first = tl.load(rows + FIRST * n + i)
    second = tl.load(rows + SECOND * n + i)
    label = tl.full((), -1, tl.int64)
    if EXCLUDE & KIND:
        label = tl.load(labels + i)
    shift = row_shift(student_offset, i, student_stride, GROUP, SHIFTED)
    s_row = row_pointer(student, i, student_stride, shift, STUDENT_WIDE)
    t_row = row_pointer(teacher, i, teacher_stride, shift, TEACHER_WIDE)
    begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
    state = empty(BLOCK // GROUP)
    for start in range(begin, full, BLOCK):
        s, t, _, position, _, counted = tile(
            s_row, t_row, start, shift, vocab, label, reads_teacher,
            BLOCK, GROUP, RAGGED, False, EXCLUDE & KIND != 0,
        )  # fmt: skip
        state = extended(state, s, t, position - shift, counted, cs, ct, first, second, KIND)
    for which in range(low, high):
        start = masked_tile(which, chunk, full, CHUNK)
        s, t, _, position, _, counted = tile(
            s_row, t_row, start, shift, vocab, label, reads_teacher,
            BLOCK, GROUP, RAGGED, True, EXCLUDE & KIND != 0,
        )  # fmt: skip
        state = extended(state, s, t, position - shift, counted, cs, ct, first, second, KIND)
    state = merged(state, cs, ct, first, second, KIND)
    for k in tl.static_range(STATES):
        tl.store(states + (k * n + i) * chunks + chunk, state[k].to(tl.float32, bitcast=True))


@triton.jit
def one(states, k: tl.constexpr, n, i, chunks, neutral, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.load(states + (k * n + i) * chunks + chunk, mask=chunk < chunks, other=neutral)


@triton.jit
def row_state(
    states, n, i, chunks, cs, ct, first, second, KIND: tl.constexpr, CHUNKS: tl.constexpr
):
    """The whole row's state, of its chunks'."""
    lowest = float("-inf")
    s_at = one(states, 16, n, i, chunks, 0.0, CHUNKS).to(tl.int32, bitcast=True)
    t_at = one(states, 17, n, i, chunks, 0.0, CHUNKS).to(tl.int32, bitcast=True)
    state = (
        one(states, 0, n, i, chunks, lowest, CHUNKS),
        one(states, 1, n, i, chunks, 0.0, CHUNKS),
        one(states, 2, n, i, chunks, lowest, CHUNKS),
        one(states, 3, n, i, chunks, 0.0, CHUNKS),
        one(states, 4, n, i, chunks, 0.0, CHUNKS),
        one(states, 5, n, i, chunks, 0.0, CHUNKS),
        one(states, 6, n, i, chunks, lowest, CHUNKS),
        one(states, 7, n, i, chunks, 0.0, CHUNKS),
        one(states, 8, n, i, chunks, 0.0, CHUNKS),
        one(states, 9, n, i, chunks, 0.0, CHUNKS),
        one(states, 10, n, i, chunks, 0.0, CHUNKS),
        one(states, 11, n, i, chunks, 0.0, CHUNKS),
        one(states, 12, n, i, chunks, 0.0, CHUNKS),
        one(states, 13, n, i, chunks, 0.0, CHUNKS),
        one(states, 14, n, i, chunks, 0.0, CHUNKS),
        one(states, 15, n, i, chunks, 0.0, CHUNKS),
        s_at,
        t_at,
    )
    return merged(state, cs, ct, first, second, KIND)


@triton.jit
def summed(
    phi_sum, g_sum, s, t, student_max, student_log_z, teacher_max, teacher_log_z,
    cs, ct, first, second, HARDWARE: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr,
):  # fmt: skip
    a = tl.fma(s - student_max, cs, -student_log_z)
    b = tl.fma(t - teacher_max, ct, -teacher_log_z)
    p, q, e = probabilities(a, b, MIXES)
    phi, g, _ = TERM(a, b, p, q, e, first, second, 0.0, HARDWARE)
    return phi_sum + tl.sum(phi, 1), g_sum + tl.sum(g, 1)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _sums(
    student, teacher, rows, masks, states, sums,
    n, vocab, student_stride, teacher_stride, student_offset, chunks,
    TERM: tl.constexpr, MIXES: tl.constexpr, HARDWARE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, STUDENT_WIDE: tl.constexpr, TEACHER_WIDE: tl.constexpr,
):  # fmt: skip
    """The second sweep of class B: each chunk's Σφ and ΣG, (2, n, chunks)."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    mask = tl.load(masks + i).to(tl.int32)
    if mask & READ_TEACHER == 0:
        return
    cs = LOG2_E / tl.load(rows + TEMPERATURE * n + i)
    ct = LOG2_E / tl.load(rows + TEACHER_TEMPERATURE * n + i)
    first = tl.load(rows + FIRST * n + i)
    second = tl.load(rows + SECOND * n + i)
    state = row_state(states, n, i, chunks, cs, ct, first, second, 0, CHUNKS)
    student_max = anchored(state[0])
    teacher_max = anchored(state[2])
    student_log_z = tl.log2(state[1])
    teacher_log_z = tl.log2(state[3])
    shift = row_shift(student_offset, i, student_stride, GROUP, SHIFTED)
    s_row = row_pointer(student, i, student_stride, shift, STUDENT_WIDE)
    t_row = row_pointer(teacher, i, teacher_stride, shift, TEACHER_WIDE)
    begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
    phi = tl.zeros((BLOCK // GROUP,), tl.float32)
    g = tl.zeros((BLOCK // GROUP,), tl.float32)
    for start in range(begin, full, BLOCK):
        s, t, _, _, _, _ = tile(
            s_row, t_row, start, shift, vocab, -1, True, BLOCK, GROUP, RAGGED, False, False
        )
        phi, g = summed(
            phi, g, s, t, student_max, student_log_z, teacher_max, teacher_log_z,
            cs, ct, first, second, HARDWARE, TERM, MIXES,
        )  # fmt: skip
    for which in range(low, high):
        start = masked_tile(which, chunk, full, CHUNK)
        s, t, _, _, _, _ = tile(
            s_row, t_row, start, shift, vocab, -1, True, BLOCK, GROUP, RAGGED, True, False
        )
        phi, g = summed(
            phi, g, s, t, student_max, student_log_z, teacher_max, teacher_log_z,
            cs, ct, first, second, HARDWARE, TERM, MIXES,
        )  # fmt: skip
    tl.store(sums + i * chunks + chunk, tl.sum(phi, 0))
    tl.store(sums + (n + i) * chunks + chunk, tl.sum(g, 0))


@triton.jit
def not_negative(d):
    """Rounding can make a divergence of nearly 0 negative."""
    return tl.where(d < 0, 0.0, d)


@triton.jit
def sums_of(forward, reverse, log_b, p_k, q_k, mixed, first, second, NAME: tl.constexpr):
    """D and the line sum_g of a class A divergence; log B and the powers are float64."""
    if NAME == "forward_kl" or NAME == "dkd":
        return not_negative(forward), 0.0
    elif NAME == "reverse_kl":
        return not_negative(reverse), reverse
    elif NAME == "jeffreys":
        rest = times(1.0 - first, reverse)
        return not_negative(times(first, forward) + rest), rest
    elif NAME == "alpha":
        excess = tl.exp(log_b) - 1.0
        d = (excess / (first * (first - 1.0))).to(tl.float32)
        d = tl.where(first == 1, forward, tl.where(first == 0, reverse, d))
        sum_g = tl.where(
            first == 1, 0.0, tl.where(first == 0, reverse, (-excess / first).to(tl.float32))
        )
        return not_negative(d), sum_g
    elif NAME == "renyi":
        d = tl.where(first == 1, forward, (log_b / (first - 1.0)).to(tl.float32))
        return not_negative(d), tl.where(first == 1, 0.0, log_b.to(tl.float32))
    else:
        tl.static_assert(NAME == "ab")
        k = first + second
        d = (second * p_k + first * q_k - k * mixed) / (k * first * second)
        return not_negative(d.to(tl.float32)), ((p_k - mixed) / first).to(tl.float32)


@triton.jit
def log_sigmoid(x, HARDWARE: tl.constexpr):
    return tl.minimum(x, 0.0) - divergences_triton.log1p(tl.exp(-tl.abs(x)), HARDWARE)


@triton.jit
def whole_entropy(odds, rest_entropy, HARDWARE: tl.constexpr):
    """Entropy of a row from the log-odds of its label and the entropy of the rest."""
    log_label = log_sigmoid(odds, HARDWARE)
    log_rest = log_sigmoid(-odds, HARDWARE)
    rest = tl.exp(log_rest)
    own = -times(tl.exp(log_label), log_label) - times(rest, log_rest)
    return own + times(rest, rest_entropy)


@triton.jit
def with_label(maximum, at, logit, label):
    """The first maximum's column of a row whose label was left out."""
    at = tl.where(logit == maximum, tl.minimum(at, label.to(tl.int32)), at)
    return tl.where(logit > maximum, label.to(tl.int32), at)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _finish(
    rows, masks, labels, student_label, teacher_label, states, sums, totals,
    n, vocab, chunks, smoothing, t_squared,
    NAME: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr, CHUNKS: tl.constexpr,
    CLASS_B: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    """A row's lines, its part of the loss and its statistics, from its chunks."""
    i = tl.program_id(0).to(tl.int64)
    mask = tl.load(masks + i).to(tl.int32)
    reads_student = mask & READ_STUDENT != 0
    reads_teacher = mask & READ_TEACHER != 0
    kd_scale = tl.load(rows + KD_SCALE * n + i)
    ce_scale = tl.load(rows + CE_SCALE * n + i)
    z_scale = tl.load(rows + Z_SCALE * n + i)
    temperature = tl.load(rows + TEMPERATURE * n + i)
    first = tl.load(rows + FIRST * n + i)
    second = tl.load(rows + SECOND * n + i)
    cs = LOG2_E / temperature
    ct = LOG2_E / tl.load(rows + TEACHER_TEMPERATURE * n + i)
    student_max, zs, teacher_max, zt, forward, reverse, tilted_max, tilted, p_k, q_k, mixed, \
        unit_sum, logits, count, hs, ht, s_at, t_at = row_state(
            states, n, i, chunks, cs, ct, first, second, KIND, CHUNKS
        )  # fmt: skip
    student_log_z = tl.log(zs)
    teacher_log_z = tl.log(zt)
    apart = student_log_z - teacher_log_z
    if CLASS_B:
        d = not_negative(tl.sum(one(sums, 0, n, i, chunks, 0.0, CHUNKS), 0))
        sum_g = tl.sum(one(sums, 1, n, i, chunks, 0.0, CHUNKS), 0)
    else:
        # B and the powers are near 1 where D is small, and D is divided by products of parameters:
        # float64, once a row.
        k = first + second
        log_b = 0.0
        if (TILTED | POWERS) & KIND:
            log_zs = tl.log(zs.to(tl.float64))
            log_zt = tl.log(zt.to(tl.float64))
            if TILTED & KIND:
                log_b = tilted_max.to(tl.float64) * LN_2 + tl.log(tilted.to(tl.float64))
                log_b -= first * log_zt + (1.0 - first) * log_zs
            else:
                p_k *= tl.exp(-k * log_zs)
                q_k *= tl.exp(-k * log_zt)
                mixed *= tl.exp(-(first * log_zt + second * log_zs))
        d, sum_g = sums_of(
            forward / zt * LN_2 + apart, reverse / zs * LN_2 - apart, log_b, p_k, q_k, mixed,
            first, second, NAME,
        )  # fmt: skip
    kd = d
    student_entropy = student_log_z - LN_2 * (hs / zs)
    teacher_entropy = teacher_log_z - LN_2 * (ht / zt)
    label = tl.full((), -1, tl.int64)
    label_logit = float("nan")
    if LABELLED:
        label = tl.load(labels + i)
        label_logit = tl.load(student_label + i)
    unit_max = student_max
    if EXCLUDE & KIND:
        # Where nothing but the label has mass there is nothing to distil.
        rest_is_empty = (zs == 0) & (zt == 0)
        kd_scale = tl.where(rest_is_empty, 0.0, kd_scale)
        tl.debug_barrier()  # every thread has read the old one
        tl.store(rows + KD_SCALE * n + i, kd_scale)
        d = tl.where(rest_is_empty, 0.0, d)
        teacher_logit = tl.load(teacher_label + i)
        s_odds = (label_logit - anchored(student_max)) / LOG2_E * cs - student_log_z
        t_odds = (teacher_logit - anchored(teacher_max)) / LOG2_E * ct - teacher_log_z
        a0, a1 = log_sigmoid(s_odds, HARDWARE), log_sigmoid(-s_odds, HARDWARE)
        b0, b1 = log_sigmoid(t_odds, HARDWARE), log_sigmoid(-t_odds, HARDWARE)
        binary = divergences_triton.kl(tl.exp(b0), tl.exp(a0), a0 - b0)
        binary += divergences_triton.kl(tl.exp(b1), tl.exp(a1), a1 - b1)
        kd = second * d + first * binary
        sum_g = first * (tl.exp(a0) - tl.exp(b0))
        student_entropy = whole_entropy(s_odds, student_entropy, HARDWARE)
        teacher_entropy = whole_entropy(t_odds, teacher_entropy, HARDWARE)
        s_at = with_label(student_max, s_at, label_logit, label)
        t_at = with_label(teacher_max, t_at, teacher_logit, label)
        # The terms at temperature 1 are of the whole row.
        is_column = (label >= 0) & (label < vocab)
        unit_max = tl.maximum(student_max, tl.where(is_column, label_logit, float("-inf")))
        own = tl.where(is_column, label_logit - anchored(unit_max), 0.0)
        unit_sum = unit_sum * tl.exp(student_max - anchored(unit_max))
        unit_sum += tl.where(is_column, tl.exp(own), 0.0)
        logits += count * (anchored(student_max) - anchored(unit_max)) + own
    unit_log_z = tl.log(unit_sum)
    unit_lse = anchored(unit_max) + unit_log_z
    label_log_prob = label_logit - anchored(unit_max) - unit_log_z
    ce = -label_log_prob
    if SMOOTHING & KIND:
        ce = (1.0 - smoothing) * ce + smoothing * (unit_log_z - logits / vocab)
    if not LABELLED:
        ce = 0.0
    total = times(kd_scale, kd) + times(ce_scale, ce) + times(z_scale, unit_lse * unit_lse)
    tl.store(totals + i, tl.where(reads_student, total, 0.0))
    has_unit = reads_student & (UNIT & KIND != 0)
    tl.store(rows + STUDENT_MAX * n + i, tl.where(reads_student, anchored(student_max), 0.0))
    tl.store(rows + STUDENT_LOG_Z * n + i, tl.where(reads_student, student_log_z, 0.0))
    tl.store(rows + TEACHER_MAX * n + i, tl.where(reads_teacher, anchored(teacher_max), 0.0))
    tl.store(rows + TEACHER_LOG_Z * n + i, tl.where(reads_teacher, teacher_log_z, 0.0))
    tl.store(rows + DIVERGENCE * n + i, tl.where(reads_teacher, d, 0.0))
    tl.store(rows + SUM_G * n + i, tl.where(reads_teacher, sum_g, 0.0))
    tl.store(rows + UNIT_LOG_Z * n + i, tl.where(has_unit, unit_log_z, 0.0))
    if STATS & KIND:
        of_kd = mask & COUNTS_KD != 0
        of_ce = mask & COUNTS_CE != 0
        t2 = tl.where(t_squared != 0, temperature * temperature, 1.0)
        tl.store(rows + KD * n + i, tl.where(of_kd, kd * t2, 0.0))
        tl.store(rows + CE * n + i, tl.where(of_ce, ce, 0.0))
        tl.store(rows + STUDENT_ENTROPY * n + i, tl.where(of_kd, student_entropy, 0.0))
        tl.store(rows + TEACHER_ENTROPY * n + i, tl.where(of_kd, teacher_entropy, 0.0))
        tl.store(rows + LABEL_LOG_PROB * n + i, tl.where(of_ce, label_log_prob, 0.0))
        agrees = (s_at == t_at).to(tl.float32)
        tl.store(rows + AGREEMENT * n + i, tl.where(of_kd, agrees, 0.0))


@triton.jit
def coefficient(rows, line: tl.constexpr, n, i, upstream):
    return times(tl.load(rows + line * n + i), upstream)


@triton.jit
def gradient_row(
    rows, n, i, up, reads_unit, label, student_label, teacher_label, vocab, smoothing,
    NAME: tl.constexpr, HARDWARE: tl.constexpr, EXCLUDES: tl.constexpr,
):  # fmt: skip
    """What gradient_tile needs of row i: scalars, or a column of them where i is one."""
    kd = coefficient(rows, KD_SCALE, n, i, up)
    ce = coefficient(rows, CE_SCALE, n, i, up)
    z = coefficient(rows, Z_SCALE, n, i, up)
    temperature = tl.load(rows + TEMPERATURE * n + i)
    teacher_temperature = tl.load(rows + TEACHER_TEMPERATURE * n + i)
    student_max = tl.load(rows + STUDENT_MAX * n + i)
    student_log_z = tl.load(rows + STUDENT_LOG_Z * n + i)
    teacher_max = tl.load(rows + TEACHER_MAX * n + i)
    teacher_log_z = tl.load(rows + TEACHER_LOG_Z * n + i)
    first = tl.load(rows + FIRST * n + i)
    second = tl.load(rows + SECOND * n + i)
    d = tl.load(rows + DIVERGENCE * n + i)
    sum_g = tl.load(rows + SUM_G * n + i)
    cs = LOG2_E / temperature
    ct = LOG2_E / teacher_temperature
    log_b = sum_g * LOG2_E
    sum_h = d - sum_g
    if NAME == "reverse_kl":
        sum_h = tl.zeros((), tl.float32)  # Σq − Σp
    elif NAME == "ab":
        sum_h = (first + second) * d - sum_g
    elif NAME == "renyi":
        sum_g = tl.where(first == 1, 0.0, -1.0)
        sum_h = tl.where(first == 1, d, first / (first - 1.0))
    factor = 1.0
    label_g = sum_g
    label_h = 0.0
    unit_max = student_max
    if EXCLUDES:
        factor = second
        s_logit = tl.load(student_label + i)
        t_logit = tl.load(teacher_label + i)
        s_odds = (s_logit - student_max) / temperature - student_log_z
        t_odds = (t_logit - teacher_max) / teacher_temperature - teacher_log_z
        both = tl.exp(log_sigmoid(t_odds, HARDWARE) + log_sigmoid(-t_odds, HARDWARE))
        label_h = first * times(both, t_odds - s_odds)
        sum_h = factor * d + label_h
        # Only here does the maximum leave a column out; that of an empty rest is a mere 0.
        is_column = (label >= 0) & (label < vocab)
        alone = student_log_z == float("-inf")
        larger = tl.where((s_logit > unit_max) | alone, s_logit, unit_max)
        unit_max = tl.where(is_column, larger, unit_max)
    unit_log_z = tl.load(rows + UNIT_LOG_Z * n + i)
    return (
        student_max, student_log_z * LOG2_E, teacher_max, teacher_log_z * LOG2_E, cs, ct, first,
        second, log_b, kd / temperature, kd / teacher_temperature, factor, sum_g, sum_h, label_g,
        label_h, reads_unit, unit_max, unit_log_z * LOG2_E,
        ce + times(2.0 * z, unit_max + unit_log_z), ce * (1.0 - smoothing),
        ce * (smoothing / vocab),
    )  # fmt: skip


@triton.jit
def gradient_tile(
    s, t, raw, column, label, row, HARDWARE: tl.constexpr,
    TERM: tl.constexpr, MIXES: tl.constexpr, EXCLUDES: tl.constexpr,
):  # fmt: skip
    """Both gradients of a tile."""
    (
        student_max, student_log_z, teacher_max, teacher_log_z, cs, ct, first, second, log_b,
        kd_s, kd_t, factor, sum_g, sum_h, label_g, label_h, reads_unit, unit_max, unit_log_z, unit,
        ce_label, ce_all,
    ) = row  # fmt: skip
    a = tl.fma(s - student_max, cs, -student_log_z)
    b = tl.fma(t - teacher_max, ct, -teacher_log_z)
    p, q, e = probabilities(a, b, MIXES)
    _, g, h = TERM(a, b, p, q, e, first, second, log_b, HARDWARE)
    if EXCLUDES:
        g = tl.where(column == label, label_g, factor * g)
        h = tl.where(column == label, label_h, factor * h)
    student_grad = times(kd_s, g - p * sum_g)
    teacher_grad = times(kd_t, h - q * sum_h)
    if reads_unit:
        p1 = tl.exp2((raw - unit_max) * LOG2_E - unit_log_z)
        student_grad += times(unit, p1) - tl.where(column == label, ce_label + ce_all, ce_all)
    return student_grad, teacher_grad


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _gradient(
    upstream, student, teacher, rows, labels, student_label, teacher_label,
    student_grad, teacher_grad,
    n, vocab, student_columns, teacher_columns, upstream_stride,
    student_stride, teacher_stride, student_grad_stride, teacher_grad_stride, student_offset,
    smoothing,
    NAME: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr, EXCLUDES: tl.constexpr,
    HARDWARE: tl.constexpr, LABELLED: tl.constexpr,
    STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, STUDENT_WIDE: tl.constexpr, TEACHER_WIDE: tl.constexpr,
    STUDENT_GRAD_WIDE: tl.constexpr, TEACHER_GRAD_WIDE: tl.constexpr,
):  # fmt: skip
    """A chunk of a row's gradients, from the row's lines."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    shift = row_shift(student_offset, i, student_stride, GROUP, SHIFTED)
    s_row = row_pointer(student, i, student_stride, shift, STUDENT_WIDE)
    t_row = row_pointer(teacher, i, teacher_stride, shift, TEACHER_WIDE)
    ds_row = row_pointer(student_grad, i, student_grad_stride, shift, STUDENT_GRAD_WIDE)
    dt_row = row_pointer(teacher_grad, i, teacher_grad_stride, shift, TEACHER_GRAD_WIDE)
    begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
    if chunk == tl.num_programs(1) - 1:
        if STUDENT_GRAD:
            clear_padding(ds_row + shift, vocab, student_columns, BLOCK)
        if TEACHER_GRAD:
            clear_padding(dt_row + shift, vocab, teacher_columns, BLOCK)
    up = tl.load(upstream + i * upstream_stride)
    reads_teacher = tl.load(rows + KD_SCALE * n + i) != 0
    reads_unit = tl.load(rows + CE_SCALE * n + i) != 0
    reads_unit = reads_unit | (tl.load(rows + Z_SCALE * n + i) != 0)
    if (reads_teacher | reads_unit) == 0:
        zero = tl.zeros((BLOCK // GROUP, GROUP), tl.float32)
        for start in range(begin, full, BLOCK):
            position = positions(start, BLOCK, GROUP)
            if STUDENT_GRAD:
                tl.store(ds_row + position, zero.to(student_grad.dtype.element_ty))
            if TEACHER_GRAD:
                tl.store(dt_row + position, zero.to(teacher_grad.dtype.element_ty))
        for which in range(low, high):
            start = masked_tile(which, chunk, full, CHUNK)
            position = positions(start, BLOCK, GROUP)
            here = inside(start, shift, vocab, BLOCK, GROUP, RAGGED)
            if STUDENT_GRAD:
                tl.store(ds_row + position, zero.to(student_grad.dtype.element_ty), mask=here)
            if TEACHER_GRAD:
                tl.store(dt_row + position, zero.to(teacher_grad.dtype.element_ty), mask=here)
        return
    label = tl.full((), -1, tl.int64)
    if LABELLED:
        label = tl.load(labels + i)
    row = gradient_row(
        rows, n, i, up, reads_unit, label, student_label, teacher_label, vocab, smoothing,
        NAME, HARDWARE, EXCLUDES,
    )  # fmt: skip
    for start in range(begin, full, BLOCK):
        s, t, raw, position, here, _ = tile(
            s_row, t_row, start, shift, vocab, label, reads_teacher,
            BLOCK, GROUP, RAGGED, False, EXCLUDES,
        )  # fmt: skip
        ds, dt = gradient_tile(
            s, t, raw, position - shift, label, row, HARDWARE, TERM, MIXES, EXCLUDES
        )
        if STUDENT_GRAD:
            tl.store(ds_row + position, ds.to(student_grad.dtype.element_ty))
        if TEACHER_GRAD:
            tl.store(dt_row + position, dt.to(teacher_grad.dtype.element_ty))
    for which in range(low, high):
        start = masked_tile(which, chunk, full, CHUNK)
        s, t, raw, position, here, _ = tile(
            s_row, t_row, start, shift, vocab, label, reads_teacher,
            BLOCK, GROUP, RAGGED, True, EXCLUDES,
        )  # fmt: skip
        ds, dt = gradient_tile(
            s, t, raw, position - shift, label, row, HARDWARE, TERM, MIXES, EXCLUDES
        )
        if STUDENT_GRAD:
            tl.store(ds_row + position, ds.to(student_grad.dtype.element_ty), mask=here)
        if TEACHER_GRAD:
            tl.store(dt_row + position, dt.to(teacher_grad.dtype.element_ty), mask=here)


@triton.jit
def clear_padding(row, vocab, columns, BLOCK: tl.constexpr):
    for start in range(vocab, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row + column, tl.zeros((BLOCK,), row.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _scale(grad, factor, columns, stride, factor_stride, offset,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + i * factor_stride).to(tl.float32)
    if by == 1.0:
        return
    shift = row_shift(offset, i, stride, GROUP, SHIFTED)
    row = row_pointer(grad, i, stride, shift, WIDE)
    begin, full, low, high = span(chunk, shift, columns, BLOCK, CHUNK, SHIFTED)
    for start in range(begin, full, BLOCK):
        position = positions(start, BLOCK, GROUP)
        x = tl.load(row + position).to(tl.float32)
        # A zero stays the zero it was: a masked row has no gradient whatever the factor is.
        tl.store(row + position, tl.where(x == 0, x, x * by).to(grad.dtype.element_ty))
    for which in range(low, high):
        start = masked_tile(which, chunk, full, CHUNK)
        position = positions(start, BLOCK, GROUP)
        here = inside(start, shift, columns, BLOCK, GROUP, RAGGED)
        x = tl.load(row + position, mask=here, other=0.0).to(tl.float32)
        scaled = tl.where(x == 0, x, x * by).to(grad.dtype.element_ty)
        tl.store(row + position, scaled, mask=here)


# ---- the ops ----


def distillation_loss(*args) -> tuple[Tensor, Tensor]:
    """(loss, rows) for the schema in this folder's __init__.py."""
    loss, rows, _ = _forward(*args)
    return loss, rows


def distillation_loss_and_grad(
    student: Tensor, teacher: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rows, student_grad, teacher_grad), teacher_grad empty unless asked for."""
    *options, teacher_grad = args
    loss, rows, rest = _forward(student, teacher, *options)
    one = torch.ones((), dtype=torch.float32, device=student.device)
    grads = _backward(one, student, teacher, rows, rest, True, teacher_grad)
    return loss, rows, *grads


def distillation_loss_and_grad_(
    student: Tensor, teacher: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows, teacher_grad); the student's gradient is written over its logits."""
    *options, teacher_grad = args
    loss, rows, rest = _forward(student, teacher, *options)
    one = torch.ones((), dtype=torch.float32, device=student.device)
    grads = _backward(one, student, teacher, rows, rest, True, teacher_grad, into=student)
    return loss, rows, grads[1]


def distillation_loss_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    labels: Tensor | None,
    divergence: str,
    label_smoothing: float,
    vocab_size: int,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(student_grad, teacher_grad), each (N, columns given) in its input's dtype,
    or empty where not asked for.
    """
    label_logits = _label_logits(student, teacher, labels, divergence, vocab_size)
    rest = (labels, divergence, label_smoothing, vocab_size, label_logits)
    return _backward(grad_loss, student, teacher, rows, rest, student_grad, teacher_grad)


def scale_rows_(grad: Tensor, factor: Tensor) -> None:
    """Multiply each row of grad (N, V) in place by factor, () or (N,)."""
    n, columns = grad.shape
    if grad.numel() == 0:
        return
    cut = _triton.cut(columns, grad)
    with _triton.on_device(grad):
        _scale[(n, cut.chunks)](
            grad,
            factor,
            columns,
            grad.stride(0),
            factor.stride(0) if factor.dim() else 0,
            _triton.first_offset(grad),
            WIDE=cut.wide[0],
            **cut.options,
        )


def _label_logits(student, teacher, labels, divergence, vocab):
    """Each row's logits at its label, NaN where that is no column; read before the gradient is
    written over them. The teacher's for DKD only.
    """
    if labels is None:
        return None, None
    exclude = divergence == "dkd"
    taken = (student, teacher) if exclude else (student,)
    s, *t = (reference.take(x[:, :vocab], labels).to(torch.float32) for x in taken)
    return s, t[0] if exclude else None


class Started(NamedTuple):
    """What the kernels of a forward are told of its rows."""

    rows: Tensor  # with the lines that are known before any logit
    masks: Tensor
    kind: int
    class_b: bool


def started(
    student: Tensor, teacher: Tensor, labels: Tensor | None, token_weights, divergence, *options
) -> Started:
    """Of the two tensors only their rows, dtypes and device are looked at."""
    plan = reference.plan(student, teacher, labels, token_weights, divergence, *options)
    label_smoothing, return_stats = options[-6], options[-1]
    n, device = student.shape[0], student.device
    lines = len(reference.ROWS) + (len(reference.STATS) if return_stats else 0)
    rows = torch.empty((lines, n), dtype=torch.float32, device=device)
    given = reference.ROWS.index("kd_scale")
    torch.stack(plan.lines, out=rows[given : len(reference.ROWS)])
    masks = (
        plan.kd_rows * _COUNTS_KD
        + plan.ce_rows * _COUNTS_CE
        + plan.read_student * _READ_STUDENT
        + plan.read_teacher * _READ_TEACHER
    ).to(torch.uint8)
    term = TERMS[divergence]
    kind = 0
    for present, bit in (
        (term.forward, FORWARD),
        (term.reverse, REVERSE),
        (term.tilted, TILTED),
        (term.powers, POWERS),
        (plan.has_unit, UNIT),
        (labels is not None and label_smoothing != 0, SMOOTHING),
        (return_stats, STATS),
        (divergence == "dkd", EXCLUDE),
    ):
        kind |= bit.value if present else 0
    class_b = not (term.forward or term.reverse or term.tilted or term.powers)
    return Started(rows, masks, kind, class_b)


def finish(
    given: Started, labels, label_logits, states, sums, totals, vocab, chunks, divergence,
    label_smoothing, t_squared, class_b: bool,
) -> None:  # fmt: skip
    """Launch _finish: the rows' lines and totals from their chunks' states and sums."""
    n = given.rows.shape[1]
    _finish[(n,)](
        given.rows, given.masks, labels, *label_logits, states, sums, totals,
        n, vocab, chunks, label_smoothing, int(t_squared),
        NAME=divergence, KIND=given.kind, HARDWARE=_triton.hardware_log(),
        CHUNKS=triton.next_power_of_2(chunks), CLASS_B=class_b, LABELLED=labels is not None,
        num_warps=1, **_triton.EXACT,
    )  # fmt: skip


def _forward(
    student: Tensor, teacher: Tensor, labels: Tensor | None, token_weights, divergence, *options
):
    t_squared, label_smoothing, _, _, vocab, reduction, _ = options[-7:]
    n, device = student.shape[0], student.device
    given = started(student, teacher, labels, token_weights, divergence, *options)
    rows, masks, kind, class_b = given
    label_logits = _label_logits(student, teacher, labels, divergence, vocab)
    totals = torch.empty((n,), dtype=torch.float32, device=device)
    term = TERMS[divergence]
    if n:
        cut = _triton.cut(vocab, student, teacher)
        states = torch.empty((STATES.value, n, cut.chunks), dtype=torch.float32, device=device)
        sums = torch.empty((2, n, cut.chunks), dtype=torch.float32, device=device)
        sizes = (
            n,
            vocab,
            student.stride(0),
            teacher.stride(0),
            _triton.first_offset(student),
            cut.chunks,
        )
        wide = dict(STUDENT_WIDE=cut.wide[0], TEACHER_WIDE=cut.wide[1])
        with _triton.on_device(student):
            _statistics[(n, cut.chunks)](
                student, teacher, rows, masks, labels, states, *sizes,
                KIND=kind, **wide, **cut.options,
            )  # fmt: skip
            if class_b:
                _sums[(n, cut.chunks)](
                    student, teacher, rows, masks, states, sums, *sizes, TERM=term.function,
                    MIXES=term.mixes, HARDWARE=_triton.hardware_log(),
                    CHUNKS=triton.next_power_of_2(cut.chunks), **wide, **cut.options,
                )  # fmt: skip
            finish(
                given, labels, label_logits, states, sums, totals, vocab, cut.chunks, divergence,
                label_smoothing, t_squared, class_b,
            )  # fmt: skip
    loss = totals if reduction == "none" else totals.sum(dtype=torch.float64).to(torch.float32)
    return loss, rows, (labels, divergence, label_smoothing, vocab, label_logits)


def _backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    rest: tuple,
    student_grad: bool,
    teacher_grad: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    labels, divergence, label_smoothing, vocab, label_logits = rest
    n = student.shape[0]
    nothing = (0,)
    if into is None:
        into = student.new_empty(student.shape if student_grad else nothing)
    dt = teacher.new_empty(teacher.shape if teacher_grad else nothing)
    if n == 0 or not (student_grad or teacher_grad):
        return into, dt
    term = TERMS[divergence]
    cut = _triton.cut(
        vocab, student, teacher, into if student_grad else student, dt if teacher_grad else teacher
    )
    with _triton.on_device(student):
        _gradient[(n, cut.chunks)](
            grad_loss, student, teacher, rows, labels, *label_logits, into, dt,
            n, vocab, student.shape[1], teacher.shape[1],
            grad_loss.stride(0) if grad_loss.dim() else 0,
            student.stride(0), teacher.stride(0),
            into.stride(0), dt.stride(0), _triton.first_offset(student), label_smoothing,
            NAME=divergence, TERM=term.function, MIXES=term.mixes,
            EXCLUDES=divergence == "dkd",
            HARDWARE=_triton.hardware_log(), LABELLED=labels is not None,
            STUDENT_GRAD=student_grad, TEACHER_GRAD=teacher_grad,
            STUDENT_WIDE=cut.wide[0], TEACHER_WIDE=cut.wide[1],
            STUDENT_GRAD_WIDE=cut.wide[2], TEACHER_GRAD_WIDE=cut.wide[3], **cut.options,
        )  # fmt: skip
    return into, dt
