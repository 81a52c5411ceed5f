"""What options of distillation_loss need of a row beside its loss, in Triton. Imported on first
use.

One program a row, which walks it in tiles of BLOCK columns, so that a row's sums are in the same
order whatever is beside it. These run only where an option asks for them; every walk after the
first finds the row in the second-level cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...divergences_triton import LOG2_E, TERMS, kl, probabilities, times
from .. import _triton
from .._triton import anchored
from .triton_kernels import (
    DIVERGENCE,
    FIRST,
    KD_SCALE,
    SECOND,
    STUDENT_LOG_Z,
    STUDENT_MAX,
    SUM_G,
    TEACHER_LOG_Z,
    TEACHER_MAX,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    log_sigmoid,
)

# Columns a tile, at most.
_BLOCK = 2048


@triton.jit
def load_tile(row, start, vocab, other, BLOCK: tl.constexpr):
    """(columns, which of them are the row's, their values in float32)."""
    column = start + tl.arange(0, BLOCK)
    here = column < vocab
    return column, here, tl.load(row + column, mask=here, other=other).to(tl.float32)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _moments(x, out, n, vocab, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = x + i * stride
    # From a column of the row, so that equal columns have deviation 0 in every dtype.
    origin = tl.load(row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, here, v = load_tile(row, start, vocab, 0.0, BLOCK)
        total += tl.where(here, v - origin, 0.0)
    mean = origin + tl.sum(total, 0) / vocab
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, here, v = load_tile(row, start, vocab, 0.0, BLOCK)
        squares += tl.where(here, (v - mean) * (v - mean), 0.0)
    tl.store(out + i, mean)
    tl.store(out + n + i, tl.sqrt(tl.sum(squares, 0) / tl.maximum(vocab - 1, 1)))


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _add_centered(
    grad, x, mean, factor, vocab, grad_stride, stride, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + i)
    if by == 0:
        return
    into = grad + i * grad_stride
    start = tl.program_id(1) * BLOCK
    column, here, v = load_tile(x + i * stride, start, vocab, 0.0, BLOCK)
    g = tl.load(into + column, mask=here, other=0.0).to(tl.float32)
    g += by * (v - tl.load(mean + i))
    tl.store(into + column, g.to(grad.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _temperature_sums(
    student, teacher, rows, labels, out,
    n, vocab, student_stride, teacher_stride,
    NAME: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr, EXCLUDES: tl.constexpr,
    HARDWARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    if tl.load(rows + KD_SCALE * n + i) == 0:
        for k in tl.static_range(3):
            tl.store(out + k * n + i, 0.0)
        return
    s_row = student + i * student_stride
    t_row = teacher + i * teacher_stride
    student_max = tl.load(rows + STUDENT_MAX * n + i)
    teacher_max = tl.load(rows + TEACHER_MAX * n + i)
    student_log_z = tl.load(rows + STUDENT_LOG_Z * n + i)
    teacher_log_z = tl.load(rows + TEACHER_LOG_Z * n + i)
    temperature = tl.load(rows + TEMPERATURE * n + i)
    teacher_temperature = tl.load(rows + TEACHER_TEMPERATURE * n + i)
    first = tl.load(rows + FIRST * n + i)
    second = tl.load(rows + SECOND * n + i)
    kd = tl.load(rows + DIVERGENCE * n + i)
    sum_g = tl.load(rows + SUM_G * n + i)
    cs = LOG2_E / temperature
    ct = LOG2_E / teacher_temperature
    log_b = sum_g * LOG2_E
    sum_h = kd - sum_g
    if NAME == "reverse_kl":
        sum_h = tl.zeros((), tl.float32)  # Σq − Σp
    elif NAME == "ab":
        sum_h = (first + second) * kd - sum_g
    elif NAME == "renyi":
        sum_g = tl.where(first == 1, 0.0, -1.0)
        sum_h = tl.where(first == 1, kd, first / (first - 1.0))
    factor = 1.0
    label = tl.full((), -1, tl.int64)
    of_student = tl.zeros((BLOCK,), tl.float32)
    of_teacher = tl.zeros((BLOCK,), tl.float32)
    all_student = tl.zeros((BLOCK,), tl.float32)  # Σ of the derivatives, exactly 0
    all_teacher = tl.zeros((BLOCK,), tl.float32)
    mean_student = tl.zeros((BLOCK,), tl.float32)
    mean_teacher = tl.zeros((BLOCK,), tl.float32)
    if EXCLUDES:
        label = tl.load(labels + i)
        is_column = (label >= 0) & (label < vocab)
        at_s = (
            tl.load(s_row + label, mask=is_column, other=float("nan")).to(tl.float32) - student_max
        )
        at_t = (
            tl.load(t_row + label, mask=is_column, other=float("nan")).to(tl.float32) - teacher_max
        )
        s_odds = at_s / temperature - student_log_z
        t_odds = at_t / teacher_temperature - teacher_log_z
        a0, a1 = log_sigmoid(s_odds, HARDWARE), log_sigmoid(-s_odds, HARDWARE)
        b0, b1 = log_sigmoid(t_odds, HARDWARE), log_sigmoid(-t_odds, HARDWARE)
        binary = kl(tl.exp(b0), tl.exp(a0), a0 - b0) + kl(tl.exp(b1), tl.exp(a1), a1 - b1)
        by_label = first * times(tl.exp(b0 + b1), t_odds - s_odds)
        sum_h = second * kd + by_label
        kd = first * binary + second * kd
        factor = second
        at_first = tl.arange(0, BLOCK) == 0
        of_student += tl.where(at_first, times(sum_g, at_s), 0.0)
        of_teacher += tl.where(at_first, times(by_label, at_t), 0.0)
        all_student += tl.where(at_first, sum_g, 0.0)
        all_teacher += tl.where(at_first, by_label, 0.0)
    for start in range(0, vocab, BLOCK):
        column, here, s = load_tile(s_row, start, vocab, float("-inf"), BLOCK)
        _, _, t = load_tile(t_row, start, vocab, float("-inf"), BLOCK)
        if EXCLUDES:
            here = here & (column != label)
            s = tl.where(here, s, float("-inf"))
            t = tl.where(here, t, float("-inf"))
        x = s - student_max
        y = t - teacher_max
        a = tl.fma(x, cs, -student_log_z * LOG2_E)
        b = tl.fma(y, ct, -teacher_log_z * LOG2_E)
        p, q, e = probabilities(a, b, MIXES)
        _, g, h = TERM(a, b, p, q, e, first, second, log_b, HARDWARE)
        by_s = tl.where(here, factor * g - p * sum_g, 0.0)
        by_t = tl.where(here, factor * h - q * sum_h, 0.0)
        of_student += times(by_s, x)
        of_teacher += times(by_t, y)
        all_student += by_s
        all_teacher += by_t
        mean_student += times(p, x)
        mean_teacher += times(q, y)
    # Less the mean of the logits, which changes nothing but what a rounded log-sum-exp does to all
    # probabilities.
    by_mean_s = times(tl.sum(all_student, 0), tl.sum(mean_student, 0))
    by_mean_t = times(tl.sum(all_teacher, 0), tl.sum(mean_teacher, 0))
    tl.store(out + i, tl.sum(of_student, 0) - by_mean_s)
    tl.store(out + n + i, tl.sum(of_teacher, 0) - by_mean_t)
    tl.store(out + 2 * n + i, kd)


@triton.jit
def ordered(x, DROP: tl.constexpr):
    """Floats as integers in the same order, without the low bits that a 16-bit number lacks."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # −0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> DROP


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _adaptive(
    student, teacher, temperature, teacher_temperature, out,
    vocab, student_stride, teacher_stride, temperature_stride, teacher_temperature_stride,
    DROP: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two bits of the threshold a walk: from which of the next three on there is more than ½."""
    i = tl.program_id(0).to(tl.int64)
    s_row = student + i * student_stride
    t_row = teacher + i * teacher_stride
    tau_s = tl.load(temperature + i * temperature_stride)
    tau_t = tl.load(teacher_temperature + i * teacher_temperature_stride)
    cs = LOG2_E / tl.where(tau_s > 0, tau_s, float("nan"))
    ct = LOG2_E / tl.where(tau_t > 0, tau_t, float("nan"))
    s_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    t_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, _, s = load_tile(s_row, start, vocab, float("-inf"), BLOCK)
        _, _, t = load_tile(t_row, start, vocab, float("-inf"), BLOCK)
        s_max = tl.maximum(s_max, s)
        t_max = tl.maximum(t_max, t)
    largest_s = anchored(tl.max(s_max, 0))
    largest_t = anchored(tl.max(t_max, 0))
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, _, s = load_tile(s_row, start, vocab, float("-inf"), BLOCK)
        _, _, t = load_tile(t_row, start, vocab, float("-inf"), BLOCK)
        s_sum += tl.exp2((s - largest_s) * cs)
        t_sum += tl.exp2((t - largest_t) * ct)
    inverse_s = 1.0 / tl.sum(s_sum, 0)
    z = tl.sum(t_sum, 0)
    half = 0.5 * z
    threshold = tl.full((), -(1 << (2 * ROUNDS - 1)), tl.int32)
    for turn in range(0, ROUNDS):
        step = (1 << (2 * (ROUNDS - 1 - turn))).to(tl.int32)
        one = tl.zeros((BLOCK,), tl.float32)
        two = tl.zeros((BLOCK,), tl.float32)
        three = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            _, _, t = load_tile(t_row, start, vocab, float("-inf"), BLOCK)
            key = ordered(t, DROP)
            e = tl.exp2((t - largest_t) * ct)
            one += tl.where(key >= threshold + step, e, 0.0)
            two += tl.where(key >= threshold + 2 * step, e, 0.0)
            three += tl.where(key >= threshold + 3 * step, e, 0.0)
        more = (tl.sum(one, 0) > half).to(tl.int32)
        more += (tl.sum(two, 0) > half).to(tl.int32)
        more += (tl.sum(three, 0) > half).to(tl.int32)
        threshold += more * step
    mass = tl.zeros((BLOCK,), tl.float32)
    head = tl.zeros((BLOCK,), tl.float32)
    every = tl.zeros((BLOCK,), tl.float32)
    equal = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, here, s = load_tile(s_row, start, vocab, float("-inf"), BLOCK)
        _, _, t = load_tile(t_row, start, vocab, float("-inf"), BLOCK)
        key = ordered(t, DROP)
        e = tl.exp2((t - largest_t) * ct)
        gap = tl.abs(tl.exp2((s - largest_s) * cs) * inverse_s - e / z)
        mass += tl.where(key > threshold, e, 0.0)
        head += tl.where(key > threshold, gap, 0.0)
        every += tl.where(here, gap, 0.0)
        equal = tl.maximum(equal, tl.where((key == threshold) & here, e, 0.0))
    of_head = tl.sum(head, 0)
    above = tl.sum(mass, 0)
    # Of equal columns at the threshold those that still fit, in order; the first in any case.
    fit = tl.floor((half - above) / tl.max(equal, 0))
    fit = tl.where(above == 0, tl.maximum(fit, 1.0), fit)
    if fit >= 1:
        seen = 0
        for start in range(0, vocab, BLOCK):
            _, here, s = load_tile(s_row, start, vocab, float("-inf"), BLOCK)
            _, _, t = load_tile(t_row, start, vocab, float("-inf"), BLOCK)
            at = ((ordered(t, DROP) == threshold) & here).to(tl.int32)
            place = seen + tl.cumsum(at, 0)
            e = tl.exp2((t - largest_t) * ct)
            gap = tl.abs(tl.exp2((s - largest_s) * cs) * inverse_s - e / z)
            of_head += tl.sum(tl.where((at == 1) & (place <= fit), gap, 0.0), 0)
            seen += tl.sum(at, 0)
    of_every = tl.sum(every, 0)
    # Added up in another order, the head may exceed the whole by a rounding.
    share = tl.minimum(of_head / of_every, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + i, tl.where(of_every == 0, 0.5, share))


# ---- the ops ----


def row_moments(x: Tensor, vocab_size: int) -> Tensor:
    """As ``reference.row_moments``."""
    n = x.shape[0]
    out = torch.empty((2, n), dtype=torch.float32, device=x.device)
    if n:
        with _triton.on_device(x):
            _moments[(n,)](x, out, n, vocab_size, x.stride(0), **_tiles(vocab_size))
    return out


def add_centered_(grad: Tensor, x: Tensor, mean: Tensor, factor: Tensor, vocab_size: int) -> None:
    """As ``reference.add_centered_``."""
    n, tiles = x.shape[0], _tiles(vocab_size)
    if n:
        with _triton.on_device(x):
            _add_centered[(n, triton.cdiv(vocab_size, tiles["BLOCK"]))](
                grad, x, mean, factor, vocab_size, grad.stride(0), x.stride(0), **tiles
            )


def temperature_sums(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    labels: Tensor | None,
    divergence: str,
    vocab_size: int,
) -> Tensor:
    """As ``reference.temperature_sums``."""
    n, term = student.shape[0], TERMS[divergence]
    out = torch.empty((3, n), dtype=torch.float32, device=student.device)
    if n:
        with _triton.on_device(student):
            _temperature_sums[(n,)](
                student, teacher, rows, labels, out,
                n, vocab_size, student.stride(0), teacher.stride(0),
                NAME=divergence, TERM=term.function, MIXES=term.mixes,
                EXCLUDES=divergence == "dkd", HARDWARE=_triton.hardware_log(),
                **_tiles(vocab_size, most=1024),
            )  # fmt: skip
    return out


def adaptive_weights(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    vocab_size: int,
) -> Tensor:
    """As ``reference.adaptive_weights``."""
    n = student.shape[0]
    out = torch.empty((n,), dtype=torch.float32, device=student.device)
    drop = {torch.bfloat16: 16, torch.float16: 13}.get(teacher.dtype, 0)
    if n:
        with _triton.on_device(student):
            _adaptive[(n,)](
                student, teacher, temperature, teacher_temperature, out,
                vocab_size, student.stride(0), teacher.stride(0),
                *(0 if tau.numel() == 1 else 1 for tau in (temperature, teacher_temperature)),
                DROP=drop, ROUNDS=(33 - drop) // 2, **_tiles(vocab_size),
            )  # fmt: skip
    return out


def _tiles(vocab_size: int, most: int = _BLOCK) -> dict:
    block = min(max(triton.next_power_of_2(vocab_size), 128), most)
    return dict(BLOCK=block, num_warps=max(1, block // 256), **_triton.EXACT)
