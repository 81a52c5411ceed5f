"""What the Triton kernels of several ops share: tiles of a row, and how a row is cut.

A row is cut into chunks of CHUNK columns, one program each, and a chunk into tiles of BLOCK: full
ones without a mask, then a masked one. The cut depends on the number of columns, the dtype and the
chip, never on the number of rows, and the chunks' results are combined in a fixed order: a row gets
the same bits alone and among thousands, and a single row of 128k columns still runs on 16
multiprocessors.

A tile is (BLOCK/GROUP, GROUP): GROUP neighbouring columns, 16 bytes of the narrower dtype, belong
to one thread. Rows that do not start at a multiple of 16 bytes (V = 50257) are read from the
multiple below, ``shift`` columns early, so that all but the first and last tile are read 16 bytes
at a time. Positions count from there: position = column + shift. Which columns a thread adds up
then depends on the row's alignment, so such a row keeps its bits wherever it is as long as its
address mod 16 bytes is the same; other rows never matter.
"""

import contextlib
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns a tile, and tiles a chunk, by the number of columns up to which a line is used:
# (columns, BLOCK, tiles). A thread has 8 columns of a tile: 16 or 32 bytes from each row in flight,
# few registers, and few lanes to combine at a chunk's end. Chosen on paper, so nothing yet speaks
# for another line on another chip or for another dtype.
_TABLE = ((256, 256, 1), (1024, 1024, 1), (None, 2048, 4))
_COLUMNS_A_THREAD = 8

# No product is fused into a sum unless a kernel says so (tl.fma): a fused product at the head of a
# sum over lanes, fma(a, b, shuffled c·d), gives each lane of a warp another last bit, and which one
# the row gets is then undefined.
EXACT = dict(enable_fp_fusion=False)

# Arguments whose value compiles nothing new.
NUMBERS = (
    "n",
    "vocab",
    "columns",
    "student_columns",
    "teacher_columns",
    "chunks",
    "offset",
    "student_offset",
    "stride",
    "student_stride",
    "teacher_stride",
    "student_grad_stride",
    "teacher_grad_stride",
    "upstream_stride",
    "factor_stride",
    "grad_stride",
    "x_grad_stride",
    "y_stride",
    "smoothing",
    "number",
    "t_squared",
)


class Cut(NamedTuple):
    """How rows are cut: the compile-time arguments of a kernel, and its number of warps."""

    chunks: int
    wide: tuple[bool, ...]  # per matrix: 16-byte accesses are aligned
    options: dict[str, Any]


def cut(vocab: int, *matrices: Tensor) -> Cut:
    """The cut of rows of `vocab` columns of these matrices, the first of which sets the alignment.

    Options: BLOCK, GROUP, CHUNK, SHIFTED (rows do not all start at a multiple of 16 bytes), RAGGED
    (groups at a row's ends may not be full).
    """
    group = 16 // min(m.element_size() for m in matrices)
    backend, _ = target()
    block, tiles = next((b, t) for columns, b, t in _TABLE if columns is None or vocab <= columns)
    first = matrices[0]
    shifted = bool(first_offset(first) % group or first.stride(0) % group and first.shape[0] > 1)
    wide = tuple(_same_alignment(first, m, group) for m in matrices)
    chunk = tiles * block
    chunks = -(-(vocab + (group - 1 if shifted else 0)) // chunk)
    lanes = 64 if backend == "hip" else 32
    options = dict(
        BLOCK=block,
        GROUP=group,
        CHUNK=chunk,
        SHIFTED=shifted,
        RAGGED=shifted or vocab % group != 0,
        num_warps=max(1, block // _COLUMNS_A_THREAD // lanes),
        **EXACT,
    )
    return Cut(chunks, wide, options)


def first_offset(matrix: Tensor) -> int:
    """Elements from a multiple of 16 bytes to the matrix, mod 16."""
    return matrix.data_ptr() // matrix.element_size() % 16


def _same_alignment(first: Tensor, other: Tensor, group: int) -> bool:
    """Whether a row of `other` is at a multiple of 16 bytes where that of `first` is at a group."""
    width = 16 // other.element_size()
    apart = first_offset(first) - first_offset(other)
    return apart % width == 0 and (
        first.shape[0] == 1 or (first.stride(0) - other.stride(0)) % width == 0
    )


def target() -> tuple[str, Any]:
    """("cuda" or "hip", architecture) that Triton compiles for; the interpreter counts as cuda."""
    if interpreted():
        return "cuda", None
    current = triton.runtime.driver.active.get_current_target()
    return current.backend, current.arch


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def hardware_log() -> bool:
    """Whether log2 may be NVIDIA's instruction."""
    return not interpreted() and target()[0] == "cuda"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def anchored(maximum):
    """What is subtracted from a row: its maximum, 0 where that is −inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def row_shift(offset, row, stride, GROUP: tl.constexpr, SHIFTED: tl.constexpr):
    """Columns from the multiple of a group's size below a row to the row."""
    if SHIFTED:
        return ((offset + row * stride) % GROUP).to(tl.int32)
    else:
        return 0


@triton.jit
def row_pointer(matrix, row, stride, shift, WIDE: tl.constexpr):
    """Position 0 of a row; 64-bit, as rows·stride may not fit 32."""
    pointer = matrix + (row * stride - shift)
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def span(chunk, shift, vocab, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr):
    """A chunk's tiles: full ones at positions range(first, full, BLOCK), masked ones at
    masked_tile(which) for which in range(low, high).
    """
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, vocab + shift)
    first = begin
    low = 1
    if SHIFTED:
        if chunk == 0:
            first += BLOCK
            low = 0
    full = first + tl.maximum(end - first, 0) // BLOCK * BLOCK
    high = 1
    if full < end:
        high = 2
    return first, full, low, high


@triton.jit
def masked_tile(which, chunk, full, CHUNK: tl.constexpr):
    position = full
    if which == 0:
        position = chunk * CHUNK
    return position


@triton.jit
def positions(start, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    groups = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
    return tl.multiple_of(start, GROUP) + (groups + tl.arange(0, GROUP)[None, :])


@triton.jit
def inside(start, shift, vocab, BLOCK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr):
    """Which positions of a masked tile are columns: whole groups of them where rows allow it, so
    that accesses stay 16 bytes wide.
    """
    if RAGGED:
        position = positions(start, BLOCK, GROUP)
        return (position >= shift) & (position < vocab + shift)
    else:
        group = start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
        return tl.broadcast_to(group < vocab, (BLOCK // GROUP, GROUP))
