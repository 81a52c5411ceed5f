"""A layer's dimensions as device kernels take them; csrc/feature_loss/ops.h is the same in C++."""

from typing import NamedTuple

from torch import Tensor


class Strides(NamedTuple):
    """Of one tensor, in elements: samples, outer and inner positions, channels."""

    sample: int
    outer: tuple[int, ...]
    inner: int
    channel: int


def merged(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """(size, strides…) outermost first, neighbours merged, none of size 1."""
    result: list[tuple[int, ...]] = []
    for size, *strides in sorted(dims, key=lambda d: -d[1] if d[1] else -(2**62)):
        if size == 1:
            continue
        if result and all(a == b * size for a, b in zip(result[-1][1:], strides, strict=True)):
            size *= result.pop()[0]
        result.append((size, *strides))
    return result


def layout(
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor | None,
    mask: Tensor | None,
    dim: int,
    elementwise: bool,
) -> tuple[list[int], list[Strides]]:
    """Sizes (samples, outer…, inner, channels), and the strides of student, teacher, gradient and
    mask. elementwise: channels need no distinction from positions.
    """
    tensors = [
        student,
        teacher,
        student if gradient is None else gradient,
        student if mask is None else mask.unsqueeze(dim),
    ]
    dims = [
        (student.shape[k], *(x.stride(k) for x in tensors))
        for k in range(1, student.dim())
        if k != dim
    ]
    channel = (student.shape[dim], *(x.stride(dim) for x in tensors))
    if elementwise and mask is None and len(merged([*dims, channel])) <= 1:
        dims, channel = [*dims, channel], (1, 0, 0, 0, 0)
    dims = merged(dims)
    dims = [(1, 0, 0, 0, 0)] * (4 - len(dims)) + dims
    sizes = [student.shape[0], *(d[0] for d in dims), channel[0]]
    strides = [
        Strides(x.stride(0), tuple(d[1 + k] for d in dims[:3]), dims[3][1 + k], channel[1 + k])
        for k, x in enumerate(tensors)
    ]
    return sizes, strides
