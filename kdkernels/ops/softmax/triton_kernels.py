"""The softmax ops in Triton. Imported on first use: the package works without Triton.

A row that fits one tile is read once; a longer one is read by _statistics, whose chunks are
combined in order, and again by the kernel that writes (6 bytes a bfloat16 element instead of 4).
The backward is the same with Σg or Σp·g.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...divergences_triton import LN_2, LOG2_E, times
from .. import _triton
from .._triton import anchored, inside, masked_tile, positions, row_pointer, row_shift, span


@triton.jit
def row_scale(temperature, number, i, PER_ROW: tl.constexpr, GIVEN: tl.constexpr):
    """1/τ of a row, NaN where τ is not positive."""
    t = number
    if GIVEN:
        t = tl.load(temperature + (i if PER_ROW else 0)).to(tl.float32)
    return tl.where(t > 0, 1.0 / t, float("nan"))


@triton.jit
def load(row, start, shift, vocab, neutral,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    position = positions(start, BLOCK, GROUP)
    if MASKED:
        here = inside(start, shift, vocab, BLOCK, GROUP, RAGGED)
        return tl.load(row + position, mask=here, other=neutral).to(tl.float32)
    else:
        return tl.load(row + position).to(tl.float32)


@triton.jit
def store(row, start, shift, vocab, x,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    position = positions(start, BLOCK, GROUP)
    if MASKED:
        here = inside(start, shift, vocab, BLOCK, GROUP, RAGGED)
        tl.store(row + position, x.to(row.dtype.element_ty), mask=here)
    else:
        tl.store(row + position, x.to(row.dtype.element_ty))


# ---- forward ----


@triton.jit
def extended(largest, total, x, c):
    """Lanes' maximum and Σ 2^((x − maximum)·c) with a tile more."""
    new = tl.maximum(largest, tl.max(x, 1))
    total *= tl.exp2((largest - anchored(new)) * c)
    return new, total + tl.sum(tl.exp2((x - anchored(new)[:, None]) * c), 1)


@triton.jit
def merged(largest, total, c):
    new = tl.max(largest, 0)
    return new, tl.sum(total * tl.exp2((largest - anchored(new)) * c), 0)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _statistics(
    x, temperature, states, number, n, vocab, stride, offset, chunks,
    PER_ROW: tl.constexpr, GIVEN: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Each chunk's maximum and sum of exponentials, (2, n, chunks)."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    c = row_scale(temperature, number, i, PER_ROW, GIVEN) * LOG2_E
    shift = row_shift(offset, i, stride, GROUP, SHIFTED)
    row = row_pointer(x, i, stride, shift, WIDE)
    begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
    largest = tl.full((BLOCK // GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK // GROUP,), tl.float32)
    lowest = float("-inf")
    for start in range(begin, full, BLOCK):
        values = load(row, start, shift, vocab, lowest, BLOCK, GROUP, RAGGED, False)
        largest, total = extended(largest, total, values, c)
    for which in range(low, high):
        start = masked_tile(which, chunk, full, CHUNK)
        values = load(row, start, shift, vocab, lowest, BLOCK, GROUP, RAGGED, True)
        largest, total = extended(largest, total, values, c)
    largest, total = merged(largest, total, c)
    tl.store(states + i * chunks + chunk, largest)
    tl.store(states + (n + i) * chunks + chunk, total)


@triton.jit
def result(x, largest, total, c, LOG: tl.constexpr):
    below = (x - anchored(largest)) * c
    if LOG:
        return below * LN_2 - tl.log(total)
    else:
        return tl.exp2(below) * (1.0 / total)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _write(
    x, temperature, states, y, number, n, vocab, stride, y_stride, offset, chunks,
    LOG: tl.constexpr, PER_ROW: tl.constexpr, GIVEN: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr, Y_WIDE: tl.constexpr,
):  # fmt: skip
    """The second sweep; the only one where states is None: the row then fits one tile."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    c = row_scale(temperature, number, i, PER_ROW, GIVEN) * LOG2_E
    shift = row_shift(offset, i, stride, GROUP, SHIFTED)
    row = row_pointer(x, i, stride, shift, WIDE)
    y_row = row_pointer(y, i, y_stride, shift, Y_WIDE)
    lowest = float("-inf")
    if states is None:
        values = load(row, chunk * CHUNK, shift, vocab, lowest, BLOCK, GROUP, RAGGED, True)
        lanes = tl.full((BLOCK // GROUP,), float("-inf"), tl.float32)
        largest, total = extended(lanes, tl.zeros((BLOCK // GROUP,), tl.float32), values, c)
        largest, total = merged(largest, total, c)
        values = result(values, largest, total, c, LOG)
        store(y_row, chunk * CHUNK, shift, vocab, values, BLOCK, GROUP, RAGGED, True)
    else:
        each = tl.arange(0, CHUNKS)
        here = each < chunks
        largest = tl.load(states + i * chunks + each, mask=here, other=float("-inf"))
        total = tl.load(states + (n + i) * chunks + each, mask=here, other=0.0)
        largest, total = merged(largest, total, c)
        begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
        for start in range(begin, full, BLOCK):
            values = load(row, start, shift, vocab, lowest, BLOCK, GROUP, RAGGED, False)
            values = result(values, largest, total, c, LOG)
            store(y_row, start, shift, vocab, values, BLOCK, GROUP, RAGGED, False)
        for which in range(low, high):
            start = masked_tile(which, chunk, full, CHUNK)
            values = load(row, start, shift, vocab, lowest, BLOCK, GROUP, RAGGED, True)
            values = result(values, largest, total, c, LOG)
            store(y_row, start, shift, vocab, values, BLOCK, GROUP, RAGGED, True)


# ---- backward ----
#
# log_softmax needs Σg. softmax needs Σp and Σp·(g − g0), with g0 that of the most probable column:
# shifted, g keeps its digits where that column has nearly all probability. Lanes are shifted by
# that of their own most probable column so far.


@triton.jit
def first_of(best, anchor, column, AXIS: tl.constexpr):
    """The largest of `best`, the anchor beside it, and its column; the first where there are
    several.
    """
    largest = tl.max(best, AXIS)
    wide = largest[:, None] if AXIS == 1 else largest
    at = tl.min(tl.where(best == wide, column, 2147483647), AXIS)
    wide = at[:, None] if AXIS == 1 else at
    return largest, tl.sum(tl.where(column == wide, anchor, 0.0), AXIS), at


@triton.jit
def gathered(state, g, y, column, LOG: tl.constexpr):
    """Lanes' (most probable, its g, its column, Σp, Σp·(g − its g)) with a tile more; in
    log_softmax Σg is the fourth.
    """
    best, anchor, at, mass, moment = state
    if LOG:
        return best, anchor, at, mass + tl.sum(g, 1), moment
    else:
        group, group_anchor, group_at = first_of(y, g, column, 1)
        later = group > best
        new_anchor = tl.where(later, group_anchor, anchor)
        moment = tl.where(mass == 0, 0.0, moment + mass * (anchor - new_anchor))
        moment += tl.sum(times(y, g - new_anchor[:, None]), 1)
        return (
            tl.where(later, group, best), new_anchor, tl.where(later, group_at, at),
            mass + tl.sum(y, 1), moment,
        )  # fmt: skip


@triton.jit
def combined(state, LOG: tl.constexpr):
    """One state of a vector of them."""
    best, anchor, at, mass, moment = state
    if LOG:
        zero = tl.sum(moment, 0)
        return zero, zero, 0, tl.sum(mass, 0), zero
    else:
        largest, new_anchor, first = first_of(best, anchor, at, 0)
        moment = tl.where(mass == 0, 0.0, moment + mass * (anchor - new_anchor))
        return largest, new_anchor, first, tl.sum(mass, 0), tl.sum(moment, 0)


@triton.jit
def no_columns(LANES: tl.constexpr):
    zero = tl.zeros((LANES,), tl.float32)
    # Apart from each other, so that each is the first of itself.
    return zero - 1.0, zero, 2147483646 - tl.arange(0, LANES), zero, zero


@triton.jit
def gradient(g, y, state, scale, LOG: tl.constexpr):
    _, anchor, _, mass, moment = state
    if LOG:
        return (g - tl.exp2(y * LOG2_E) * mass) * scale
    else:
        return times(y, (g - anchor) - moment / mass) * scale


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _moments(
    grad, output, states, n, vocab, grad_stride, stride, offset, chunks,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr, GRAD_WIDE: tl.constexpr,
):  # fmt: skip
    """Each chunk's state without its column, (4, n, chunks)."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    shift = row_shift(offset, i, stride, GROUP, SHIFTED)
    y_row = row_pointer(output, i, stride, shift, WIDE)
    g_row = row_pointer(grad, i, grad_stride, shift, GRAD_WIDE)
    begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
    state = no_columns(BLOCK // GROUP)
    for start in range(begin, full, BLOCK):
        g = load(g_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, False)
        y = load(y_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, False) if not LOG else g
        state = gathered(state, g, y, positions(start, BLOCK, GROUP), LOG)
    for which in range(low, high):
        start = masked_tile(which, chunk, full, CHUNK)
        g = load(g_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, True)
        y = load(y_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, True) if not LOG else g
        state = gathered(state, g, y, positions(start, BLOCK, GROUP), LOG)
    best, anchor, _, mass, moment = combined(state, LOG)
    tl.store(states + i * chunks + chunk, best)
    tl.store(states + (n + i) * chunks + chunk, anchor)
    tl.store(states + (2 * n + i) * chunks + chunk, mass)
    tl.store(states + (3 * n + i) * chunks + chunk, moment)


@triton.jit(do_not_specialize=_triton.NUMBERS)
def _gradient(
    grad, output, temperature, states, x_grad,
    number, n, vocab, grad_stride, stride, x_grad_stride, offset, chunks,
    LOG: tl.constexpr, PER_ROW: tl.constexpr, GIVEN: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr, GRAD_WIDE: tl.constexpr,
    X_GRAD_WIDE: tl.constexpr,
):  # fmt: skip
    """The second sweep; the only one where states is None: the row then fits one tile."""
    chunk = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64)
    scale = row_scale(temperature, number, i, PER_ROW, GIVEN)
    shift = row_shift(offset, i, stride, GROUP, SHIFTED)
    y_row = row_pointer(output, i, stride, shift, WIDE)
    g_row = row_pointer(grad, i, grad_stride, shift, GRAD_WIDE)
    x_row = row_pointer(x_grad, i, x_grad_stride, shift, X_GRAD_WIDE)
    if states is None:
        g = load(g_row, chunk * CHUNK, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, True)
        y = load(y_row, chunk * CHUNK, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, True)
        state = gathered(
            no_columns(BLOCK // GROUP), g, y, positions(chunk * CHUNK, BLOCK, GROUP), LOG
        )
        values = gradient(g, y, combined(state, LOG), scale, LOG)
        store(x_row, chunk * CHUNK, shift, vocab, values, BLOCK, GROUP, RAGGED, True)
    else:
        each = tl.arange(0, CHUNKS)
        here = each < chunks
        row = states + i * chunks + each
        state = (
            tl.load(row, mask=here, other=-1.0),
            tl.load(row + n * chunks, mask=here, other=0.0),
            each,  # chunks in the order of their columns
            tl.load(row + 2 * n * chunks, mask=here, other=0.0),
            tl.load(row + 3 * n * chunks, mask=here, other=0.0),
        )
        state = combined(state, LOG)
        begin, full, low, high = span(chunk, shift, vocab, BLOCK, CHUNK, SHIFTED)
        for start in range(begin, full, BLOCK):
            g = load(g_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, False)
            y = load(y_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, False)
            values = gradient(g, y, state, scale, LOG)
            store(x_row, start, shift, vocab, values, BLOCK, GROUP, RAGGED, False)
        for which in range(low, high):
            start = masked_tile(which, chunk, full, CHUNK)
            g = load(g_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, True)
            y = load(y_row, start, shift, vocab, 0.0, BLOCK, GROUP, RAGGED, True)
            values = gradient(g, y, state, scale, LOG)
            store(x_row, start, shift, vocab, values, BLOCK, GROUP, RAGGED, True)


# ---- the ops ----


def _temperature(tensor: Tensor | None) -> dict[str, bool]:
    return dict(GIVEN=tensor is not None, PER_ROW=tensor is not None and tensor.numel() > 1)


def _fits_a_tile(cut: _triton.Cut, vocab: int) -> bool:
    options = cut.options
    return vocab + (options["GROUP"] - 1 if options["SHIFTED"] else 0) <= options["BLOCK"]


def softmax(x: Tensor, temperature: float, temperature_tensor: Tensor | None, log: bool) -> Tensor:
    """softmax or log-softmax of x (N, V)/temperature over V, in x's dtype."""
    n, vocab = x.shape
    y = x.new_empty(x.shape)
    if n == 0:
        return y
    cut = _triton.cut(vocab, x, y)
    options = _temperature(temperature_tensor) | cut.options
    states = None
    with _triton.on_device(x):
        if not _fits_a_tile(cut, vocab):
            states = torch.empty((2, n, cut.chunks), dtype=torch.float32, device=x.device)
            _statistics[(n, cut.chunks)](
                x, temperature_tensor, states, temperature, n, vocab, x.stride(0),
                _triton.first_offset(x), cut.chunks, WIDE=cut.wide[0], **options,
            )  # fmt: skip
        _write[(n, 1 if states is None else cut.chunks)](
            x, temperature_tensor, states, y, temperature, n, vocab, x.stride(0), y.stride(0),
            _triton.first_offset(x), cut.chunks, LOG=log,
            CHUNKS=triton.next_power_of_2(cut.chunks),
            WIDE=cut.wide[0], Y_WIDE=cut.wide[1], **options,
        )  # fmt: skip
    return y


def softmax_backward(
    grad: Tensor, output: Tensor, temperature: float, temperature_tensor: Tensor | None, log: bool
) -> Tensor:
    """Gradient of x from the output's, both (N, V), in the output's dtype."""
    n, vocab = output.shape
    x_grad = output.new_empty(output.shape)
    if n == 0:
        return x_grad
    cut = _triton.cut(vocab, output, grad, x_grad)
    options = _temperature(temperature_tensor) | cut.options
    states = None
    with _triton.on_device(output):
        if not _fits_a_tile(cut, vocab):
            states = torch.empty((4, n, cut.chunks), dtype=torch.float32, device=output.device)
            _moments[(n, cut.chunks)](
                grad, output, states, n, vocab, grad.stride(0), output.stride(0),
                _triton.first_offset(output), cut.chunks, LOG=log,
                WIDE=cut.wide[0], GRAD_WIDE=cut.wide[1], **cut.options,
            )  # fmt: skip
        _gradient[(n, 1 if states is None else cut.chunks)](
            grad, output, temperature_tensor, states, x_grad, temperature, n, vocab,
            grad.stride(0), output.stride(0), x_grad.stride(0), _triton.first_offset(output),
            cut.chunks, LOG=log, CHUNKS=triton.next_power_of_2(cut.chunks),
            WIDE=cut.wide[0], GRAD_WIDE=cut.wide[1], X_GRAD_WIDE=cut.wide[2], **options,
        )  # fmt: skip
    return x_grad
