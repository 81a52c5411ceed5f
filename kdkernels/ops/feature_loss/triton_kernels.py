"""Triton kernels of feature_loss; the mathematics is in this folder's __init__.py.

One launch over all layers: a program has a tile of positions × channels of one sample, writes its
gradient and leaves what it adds to the loss, which one program adds up in order. Vectors that are
normalised stay in registers up to LONGEST channels and are read again beyond. Before that launch
comes one for the divisors, where masks have to be added up; Metric "attention" has three (maps,
norms, gradient), a log-variance's gradient one more, reduction="none" one more.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from . import reference
from .layout import Strides, layout

ELEMENTS = 4096  # of a tile; 8 or 16 a thread
LONGEST = 4096
LAYERS_A_LAUNCH = 8  # each is compiled into the kernel
SMALLEST_NORM = tl.constexpr(reference.SMALLEST_NORM)


class Layer(NamedTuple):
    """One layer as the kernels take it: (samples, outer, inner, channels)."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor | None
    mask: Tensor | None
    log_variance: Tensor | None
    student_strides: Strides
    teacher_strides: Strides
    gradient_strides: Strides
    mask_strides: Strides
    log_variance_stride: int
    samples: int
    outer: tuple[int, ...]
    inner: int
    channels: int
    teacher_channels: int
    weight: float
    divisor: float  # as far as known without the mask
    first_unit: int
    first_piece: int
    pieces_a_line: int
    pieces: int


class Shape(NamedTuple):
    """A tile."""

    positions: int
    channels: int
    teacher_channels: int  # "attention" only
    whole: bool  # a vector lies in one tile


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
    n, like = len(students), students[0]
    grads = [
        torch.empty_like(x) if want else x.new_empty(0)
        for x, want in zip(students, wanted, strict=False)
    ]
    vectors = normalize or metric == "cosine"
    layers: list[Layer] = []
    shapes: list[Shape] = []
    pieces = units = 0
    for i, dim in enumerate(feature_dims):
        student, gradient, mask = students[i], grads[i] if wanted[i] else None, masks[i]
        elementwise = metric in ("l2", "smooth_l1") and not normalize
        sizes, strides = layout(student, teachers[i], gradient, mask, dim, elementwise)
        samples, *outer, inner, channels = sizes
        all_channels = student.shape[dim]
        teacher_channels = teachers[i].shape[dim] if channels == all_channels else channels
        variance = log_variances[i]
        along = strides[0].channel == 1 and channels > 1
        shape = _shape(inner, channels, teacher_channels, along, metric, vectors)
        pieces_a_line = triton.cdiv(inner, shape.positions)
        layer = Layer(
            student,
            teachers[i],
            gradient,
            mask,
            variance,
            strides[0],
            strides[1],
            strides[2],
            strides[3],
            0 if variance is None else variance.stride(0),
            samples,
            tuple(outer),
            inner,
            channels,
            teacher_channels,
            float(weights[i]),
            _divisor(metric, reduction, samples, math.prod(outer) * inner * channels, all_channels),
            units,
            pieces,
            pieces_a_line,
            samples * math.prod(outer) * pieces_a_line,
        )
        layers.append(layer)
        shapes.append(shape)
        units += samples
        pieces += layer.pieces
    real: dict[str, Any] = dict(dtype=torch.float32, device=like.device)
    loss = torch.empty((n, like.shape[0]) if reduction == "none" else (), **real)
    parts, values = torch.empty(n, **real), torch.empty(pieces, **real)
    variance_grads = [
        torch.empty(v.shape, dtype=v.dtype, device=v.device)
        if v is not None and wanted[n + i]
        else like.new_empty(0)
        for i, v in enumerate(log_variances)
    ]
    divides = reduction in ("batchmean", "mean") and any(mask is not None for mask in masks)
    divisors = torch.empty(n, **real) if divides else None
    stride = int(upstream is not None and upstream.numel() > 1)
    upstream = None if upstream is None else upstream.contiguous()
    options: dict[str, Any] = dict(num_warps=4, **_triton.EXACT)
    with _triton.on_device(like):
        for first in range(0, n, LAYERS_A_LAUNCH):
            group = slice(first, first + LAYERS_A_LAUNCH)
            some, tiles = tuple(layers[group]), tuple(shapes[group])
            count = sum(layer.pieces for layer in some)
            scales = (
                None if weights_tensor is None else weights_tensor[group],
                None if divisors is None else divisors[group],
                upstream,
                stride,
            )
            if divisors is not None:
                of_elements = _of_elements(metric, reduction)
                factors = tuple(
                    float(x.shape[dim]) if of_elements else 1.0
                    for x, dim in zip(students[group], feature_dims[group], strict=True)
                )
                _divisors[(len(some),)](
                    some,
                    divisors[group],
                    factors,
                    OF_SAMPLES=_of_samples(metric, reduction),
                    **options,
                )
            if metric == "attention":
                _attention(some, tiles, scales, values, count, options)
            elif count:
                _run_one_pass(
                    some,
                    tiles,
                    scales,
                    values,
                    count,
                    (float(beta), 1 / beta if beta else 0.0),
                    variance_grads[group],
                    options,
                    METRIC=metric,
                    VECTORS=vectors,
                )
            _add_up[(1,)](
                some,
                scales,
                values,
                parts[group],
                None if reduction == "none" else loss,
                ADDS=first > 0,
                **options,
            )
            if reduction == "none" and like.shape[0]:
                _units[(like.shape[0], len(some))](some, scales, values, loss, **options)
    for grad in variance_grads if pieces == 0 else ():
        grad.zero_()
    return loss, parts, grads + variance_grads


def scale_features_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Gradients are dense: whatever their strides, their memory is one block."""
    block = 4096
    with _triton.on_device(factor):
        for first in range(0, len(grads), LAYERS_A_LAUNCH):
            some = tuple(grads[first : first + LAYERS_A_LAUNCH])
            sizes = tuple(x.numel() for x in some)
            if max(sizes):
                _scale[(triton.cdiv(max(sizes), block),)](
                    some, sizes, factor, BLOCK=block, **_triton.EXACT
                )


def _run_one_pass(
    some, tiles, scales, values, count, betas, variance_grads, options, **compiled
) -> None:
    sums, stride = None, 0
    if any(grad.numel() for grad in variance_grads):
        stride = max(layer.channels for layer in some)
        sums = torch.empty((count, stride), dtype=torch.float32, device=values.device)
    _one_pass[(count,)](
        some, scales, values, sums, stride, *betas, TILES=tiles, **compiled, **options
    )
    if sums is not None:
        grads = tuple(grad if grad.numel() else None for grad in variance_grads)
        _variance_gradients[(triton.cdiv(stride, 64), len(some))](
            some, scales, sums, stride, grads, **options
        )


def _attention(some, tiles, scales, values, count, options) -> None:
    if count == 0:
        return
    firsts, floats = [], 0
    for layer in some:
        firsts.append(floats)
        floats += layer.samples * math.prod(layer.outer) * layer.inner
    maps = torch.empty((2, floats), dtype=torch.float32, device=values.device)
    samples = max(layer.samples for layer in some)
    stats = torch.empty((len(some), samples, 3), dtype=torch.float32, device=values.device)
    where = (tuple(firsts), floats)
    _maps[(count,)](some, maps, *where, TILES=tiles, **options)
    _norms[(samples, len(some))](some, scales, maps, stats, values, *where, samples, **options)
    if any(layer.gradient is not None for layer in some):
        _map_gradients[(count,)](some, scales, maps, stats, *where, samples, TILES=tiles, **options)


def _of_samples(metric: str, reduction: str) -> bool:
    return metric == "attention" and reduction == "batchmean"


def _of_elements(metric: str, reduction: str) -> bool:
    return reduction == "mean" and metric not in ("cosine", "attention")


def _divisor(metric: str, reduction: str, samples: int, elements: int, channels: int) -> float:
    """Without a mask; elements: of a sample."""
    if reduction in ("sum", "none"):
        return 1.0
    if _of_samples(metric, reduction):
        return float(samples * min(elements, 1)) or 1.0
    divided = elements if _of_elements(metric, reduction) else elements // channels
    return float(samples * divided) or 1.0


def _shape(
    inner: int, channels: int, teacher_channels: int, along: bool, metric: str, vectors: bool
) -> Shape:
    def width(n: int, most: int) -> int:
        return min(triton.next_power_of_2(max(n, 1)), most)

    if vectors:
        wide = width(channels, LONGEST)
        positions = width(inner, ELEMENTS // wide)
    elif along:
        # A tile of a Gaussian leaves a sum for each channel: few, of many positions.
        wide = width(channels, 128 if metric == "gaussian_nll" else 1024)
        positions = width(inner, ELEMENTS // wide)
        wide = width(channels, ELEMENTS // positions)
    else:
        positions = width(inner, ELEMENTS if channels == 1 else 256)
        wide = width(channels, ELEMENTS // positions)
    return Shape(positions, wide, width(teacher_channels, ELEMENTS // positions), wide >= channels)


# ---- on the device ----


@triton.jit
def _outer_size(layer):
    return layer.outer[0] * layer.outer[1] * layer.outer[2]


@triton.jit
def _offset(layer, strides, sample, o):
    """Where a line of positions begins."""
    last = layer.outer[2]
    middle = layer.outer[1]
    return (
        sample * strides.sample
        + o // (middle * last) * strides.outer[0]
        + o // last % middle * strides.outer[1]
        + o % last * strides.outer[2]
    )


@triton.jit
def _at(layer, piece, POSITIONS: tl.constexpr):
    """(sample, outer index, positions) of a piece."""
    line = (piece // layer.pieces_a_line).to(tl.int64)
    first = (piece % layer.pieces_a_line).to(tl.int64) * POSITIONS
    size = _outer_size(layer)
    return line // size, line % size, first + tl.arange(0, POSITIONS)


@triton.jit
def _weights(layer, sample, o, position):
    """The positions' weights; 0 where there is no position."""
    inside = position < layer.inner
    if layer.mask is None:
        return tl.where(inside, 1.0, 0.0)
    else:
        start = layer.mask + _offset(layer, layer.mask_strides, sample, o)
        return tl.load(start + position * layer.mask_strides.inner, inside, 0.0)


@triton.jit
def _scale_of(layer, scales, WHICH: tl.constexpr):
    weight = layer.weight
    if scales[0] is not None:
        weight = tl.load(scales[0] + WHICH)
    divisor = layer.divisor
    if scales[1] is not None and layer.mask is not None:
        divisor = tl.load(scales[1] + WHICH)
    return weight / divisor


@triton.jit
def _factor_of(layer, scales, sample, WHICH: tl.constexpr):
    scale = _scale_of(layer, scales, WHICH)
    if scales[2] is not None:
        up = tl.load(scales[2] + (layer.first_unit + sample) * scales[3])
        scale = tl.where(scale == 0, 0.0, scale * up)
    return scale


@triton.jit
def _times(weight, x):
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def _distance(d, beta, inverse_beta, METRIC: tl.constexpr):
    """(φ, φ′) of l2 and smooth_l1; cosine is half of l2."""
    if METRIC == "l2":
        return d * d, 2 * d
    elif METRIC == "cosine":
        return 0.5 * d * d, d
    else:
        size = tl.abs(d)
        linear = size >= beta
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        quotient = d * inverse_beta
        return tl.where(linear, size - 0.5 * beta, 0.5 * d * quotient), tl.where(
            linear, sign, quotient
        )


@triton.jit
def _inverse(square):
    norm = tl.sqrt_rn(square)
    return tl.where(norm < SMALLEST_NORM, 0.0, 1 / norm)


@triton.jit
def _pointers(tensor, strides, start, position, channel):
    at = position[:, None] * strides.inner + channel[None, :] * strides.channel
    return tensor + start + at


@triton.jit
def _load(tensor, strides, start, position, channel, mask):
    pointers = _pointers(tensor, strides, start, position, channel)
    return tl.load(pointers, mask, 0.0).to(tl.float32)


@triton.jit
def _tile(layer, sample, o, position, reads_position, start, CHANNELS: tl.constexpr):
    """(channels, which of them there are, what is read, student, teacher) of a tile."""
    channel = start + tl.arange(0, CHANNELS).to(tl.int64)
    inside = channel < layer.channels
    reads = reads_position[:, None] & inside[None, :]
    s_start = _offset(layer, layer.student_strides, sample, o)
    t_start = _offset(layer, layer.teacher_strides, sample, o)
    s = _load(layer.student, layer.student_strides, s_start, position, channel, reads)
    t = _load(layer.teacher, layer.teacher_strides, t_start, position, channel, reads)
    return channel, inside, reads, s, t


@triton.jit
def _write(layer, sample, o, position, channel, inside, x):
    start = _offset(layer, layer.gradient_strides, sample, o)
    to = _pointers(layer.gradient, layer.gradient_strides, start, position, channel)
    here = (position < layer.inner)[:, None] & inside[None, :]
    tl.store(to, x.to(layer.gradient.dtype.element_ty), here)


@triton.jit
def _stream(
    layer,
    scales,
    values,
    sums,
    sums_stride,
    beta,
    inverse_beta,
    program,
    piece,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
    METRIC: tl.constexpr,
):
    """l2, smooth_l1, gaussian_nll."""
    POSITIONS: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[1]
    sample, o, position = _at(layer, piece - layer.first_piece, POSITIONS)
    weight = _weights(layer, sample, o, position)
    factor = _factor_of(layer, scales, sample, WHICH)
    w = weight[:, None]
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, layer.channels, CHANNELS):
        channel, inside, reads, s, t = _tile(
            layer, sample, o, position, weight != 0, start, CHANNELS
        )
        d = s - t
        if METRIC == "gaussian_nll":
            at = layer.log_variance + channel * layer.log_variance_stride
            variance = tl.load(at, inside, 0.0).to(tl.float32)[None, :]
            slope = d * tl.exp(-variance)
            square = d * slope
            phi = 0.5 * (square + variance)
            if sums is not None:
                part = tl.sum(tl.where(reads, w * (0.5 * (1 - square)), 0.0), 0)
                tl.store(sums + program.to(tl.int64) * sums_stride + channel, part, inside)
        else:
            phi, slope = _distance(d, beta, inverse_beta, METRIC)
        total += tl.where(reads, w * phi, 0.0)
        if layer.gradient is not None:
            out = tl.where(reads & (factor != 0), factor * (w * slope), 0.0)
            _write(layer, sample, o, position, channel, inside, out)
    tl.store(values + piece, tl.sum(total))


@triton.jit
def _unit_terms(s, t, inverse, teacher_inverse, beta, inverse_beta, METRIC: tl.constexpr):
    """(ŝ, φ, φ′)."""
    unit = s * inverse[:, None]
    phi, slope = _distance(unit - t * teacher_inverse[:, None], beta, inverse_beta, METRIC)
    return unit, phi, slope


@triton.jit
def _vectors(
    layer,
    scales,
    values,
    beta,
    inverse_beta,
    piece,
    WHICH: tl.constexpr,
    TILE: tl.constexpr,
    METRIC: tl.constexpr,
):
    """cosine, normalised l2 and smooth_l1."""
    POSITIONS: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[1]
    WHOLE: tl.constexpr = TILE[3]
    sample, o, position = _at(layer, piece - layer.first_piece, POSITIONS)
    weight = _weights(layer, sample, o, position)
    factor = _factor_of(layer, scales, sample, WHICH)
    counts = weight != 0
    if WHOLE:
        channel, inside, reads, s, t = _tile(layer, sample, o, position, counts, 0, CHANNELS)
        inverse = _inverse(tl.sum(s * s, 1))
        teacher_inverse = _inverse(tl.sum(t * t, 1))
        unit, phi, slope = _unit_terms(s, t, inverse, teacher_inverse, beta, inverse_beta, METRIC)
        phi = tl.sum(tl.where(reads, phi, 0.0), 1)
        dot = tl.sum(tl.where(reads, unit * slope, 0.0), 1)
    else:
        squares = tl.zeros((POSITIONS, CHANNELS), tl.float32)
        teacher_squares = squares
        for start in range(0, layer.channels, CHANNELS):
            channel, inside, reads, s, t = _tile(
                layer, sample, o, position, counts, start, CHANNELS
            )
            squares += s * s
            teacher_squares += t * t
        inverse = _inverse(tl.sum(squares, 1))
        teacher_inverse = _inverse(tl.sum(teacher_squares, 1))
        phis = tl.zeros((POSITIONS, CHANNELS), tl.float32)
        dots = phis
        for start in range(0, layer.channels, CHANNELS):
            channel, inside, reads, s, t = _tile(
                layer, sample, o, position, counts, start, CHANNELS
            )
            unit, phi, slope = _unit_terms(
                s, t, inverse, teacher_inverse, beta, inverse_beta, METRIC
            )
            phis += tl.where(reads, phi, 0.0)
            dots += tl.where(reads, unit * slope, 0.0)
        phi = tl.sum(phis, 1)
        dot = tl.sum(dots, 1)
    if METRIC == "cosine":
        phi = tl.where((inverse == 0) | (teacher_inverse == 0), 1.0, phi)
    tl.store(values + piece, tl.sum(_times(weight, phi)))
    if layer.gradient is not None:
        by = (weight * inverse)[:, None] * factor
        if WHOLE:
            out = _times(by, slope - unit * dot[:, None])
            _write(layer, sample, o, position, channel, inside, tl.where(reads, out, 0.0))
        else:
            for start in range(0, layer.channels, CHANNELS):
                channel, inside, reads, s, t = _tile(
                    layer, sample, o, position, counts, start, CHANNELS
                )
                unit, phi, slope = _unit_terms(
                    s, t, inverse, teacher_inverse, beta, inverse_beta, METRIC
                )
                out = _times(by, slope - unit * dot[:, None])
                _write(layer, sample, o, position, channel, inside, tl.where(reads, out, 0.0))


@triton.jit
def _one_pass(
    layers,
    scales,
    values,
    sums,
    sums_stride,
    beta,
    inverse_beta,
    TILES: tl.constexpr,
    METRIC: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Everything but attention: values of the pieces, gradients of the students."""
    program = tl.program_id(0)
    piece = layers[0].first_piece + program
    for i in tl.static_range(len(layers)):
        layer = layers[i]
        begins = piece >= layer.first_piece
        if begins & (piece < layer.first_piece + layer.pieces):
            if VECTORS:
                _vectors(layer, scales, values, beta, inverse_beta, piece, i, TILES[i], METRIC)
            else:
                _stream(
                    layer,
                    scales,
                    values,
                    sums,
                    sums_stride,
                    beta,
                    inverse_beta,
                    program,
                    piece,
                    i,
                    TILES[i],
                    METRIC,
                )


@triton.jit
def _variance_gradients(layers, scales, sums, sums_stride, grads):
    """The pieces' sums, 64 channels a program."""
    for i in tl.static_range(len(layers)):
        if tl.program_id(1) == i:
            layer = layers[i]
            if grads[i] is not None:
                channel = tl.program_id(0) * 64 + tl.arange(0, 64)
                inside = channel < layer.channels
                total = tl.zeros((64,), tl.float64)
                first = layer.first_piece - layers[0].first_piece
                pieces_a_sample = _outer_size(layer) * layer.pieces_a_line
                for k in range(0, layer.pieces):
                    factor = _factor_of(layer, scales, k // pieces_a_sample, i)
                    row = sums + (first + k).to(tl.int64) * sums_stride
                    total += _times(factor, tl.load(row + channel, inside, 0.0)).to(tl.float64)
                tl.store(grads[i] + channel, total.to(grads[i].dtype.element_ty), inside)


@triton.jit
def _divisors(layers, divisors, factors, OF_SAMPLES: tl.constexpr):
    """What a layer is divided by: sums of its mask's weights, a layer a program."""
    BLOCK: tl.constexpr = 1024
    for i in tl.static_range(len(layers)):
        if tl.program_id(0) == i:
            layer = layers[i]
            if layer.mask is not None:
                size = _outer_size(layer)
                total = tl.zeros((BLOCK,), tl.float64)
                mean = total.sum() * 0
                for sample in range(0, layer.samples):
                    weights = tl.zeros((BLOCK,), tl.float64)
                    counted = tl.zeros((BLOCK,), tl.float64)
                    for start in range(0, size * layer.inner, BLOCK):
                        position = start + tl.arange(0, BLOCK).to(tl.int64)
                        at = (
                            _offset(layer, layer.mask_strides, sample, position // layer.inner)
                            + position % layer.inner * layer.mask_strides.inner
                        )
                        inside = position < size * layer.inner
                        weight = tl.load(layer.mask + at, inside, 0.0)
                        weights += weight.to(tl.float64)
                        counted += tl.where(weight != 0, 1.0, 0.0).to(tl.float64)
                    if OF_SAMPLES:
                        mean += weights.sum() / tl.maximum(counted.sum(), 1.0)
                    else:
                        total += weights
                divisor = (mean + total.sum()).to(tl.float32) * factors[i]
                tl.store(divisors + i, tl.where(divisor == 0, 1.0, divisor))


@triton.jit
def _add_up(layers, scales, values, parts, loss, ADDS: tl.constexpr):
    """Parts, and the loss where there is one of all samples."""
    BLOCK: tl.constexpr = 1024
    everything = tl.zeros((), tl.float64)
    for i in tl.static_range(len(layers)):
        layer = layers[i]
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, layer.pieces, BLOCK):
            k = start + tl.arange(0, BLOCK)
            total += tl.load(values + layer.first_piece + k, k < layer.pieces, 0.0).to(tl.float64)
        part = _times(_scale_of(layer, scales, i), total.sum())
        tl.store(parts + i, part.to(tl.float32))
        everything += part
    if loss is not None:
        if ADDS:
            everything += tl.load(loss)
        tl.store(loss, everything.to(tl.float32))


@triton.jit
def _units(layers, scales, values, loss):
    """reduction="none": (layers, samples), a sample a program."""
    BLOCK: tl.constexpr = 128
    sample = tl.program_id(0)
    for i in tl.static_range(len(layers)):
        if tl.program_id(1) == i:
            layer = layers[i]
            pieces = _outer_size(layer) * layer.pieces_a_line
            total = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, pieces, BLOCK):
                k = start + tl.arange(0, BLOCK)
                at = values + layer.first_piece + sample * pieces + k
                total += tl.load(at, k < pieces, 0.0).to(tl.float64)
            unit = _times(_scale_of(layer, scales, i), total.sum())
            tl.store(loss + layer.first_unit + sample, unit.to(tl.float32))


# ---- attention ----


@triton.jit
def _map(layer, tensor, strides, channels, sample, o, position, counts, CHANNELS: tl.constexpr):
    """Σ x² over the channels."""
    start = _offset(layer, strides, sample, o)
    squares = tl.zeros((position.shape[0], CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS).to(tl.int64)
        reads = counts[:, None] & (channel < channels)[None, :]
        x = _load(tensor, strides, start, position, channel, reads)
        squares += x * x
    return tl.sum(squares, 1)


@triton.jit
def _maps(layers, maps, firsts, half, TILES: tl.constexpr):
    piece = layers[0].first_piece + tl.program_id(0)
    for i in tl.static_range(len(layers)):
        layer = layers[i]
        begins = piece >= layer.first_piece
        if begins & (piece < layer.first_piece + layer.pieces):
            sample, o, position = _at(layer, piece - layer.first_piece, TILES[i][0])
            counts = _weights(layer, sample, o, position) != 0
            student = _map(
                layer,
                layer.student,
                layer.student_strides,
                layer.channels,
                sample,
                o,
                position,
                counts,
                TILES[i][1],
            )
            teacher = _map(
                layer,
                layer.teacher,
                layer.teacher_strides,
                layer.teacher_channels,
                sample,
                o,
                position,
                counts,
                TILES[i][2],
            )
            to = maps + firsts[i] + (sample * _outer_size(layer) + o) * layer.inner + position
            tl.store(to, student, position < layer.inner)
            tl.store(to + half, teacher, position < layer.inner)


@triton.jit
def _norms(layers, scales, maps, stats, values, firsts, half, samples):
    """A sample's norms, Σ Â·slope and value, which its first piece gets and the others do not."""
    BLOCK: tl.constexpr = 1024
    sample = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(layers)):
        if tl.program_id(1) == i:
            layer = layers[i]
            if sample < layer.samples:
                positions = _outer_size(layer) * layer.inner
                map = maps + firsts[i] + sample * positions
                squares = tl.zeros((BLOCK,), tl.float64)
                teacher_squares = squares
                for start in range(0, positions, BLOCK):
                    k = start + tl.arange(0, BLOCK).to(tl.int64)
                    x = tl.load(map + k, k < positions, 0.0).to(tl.float64)
                    y = tl.load(map + half + k, k < positions, 0.0).to(tl.float64)
                    squares += x * x
                    teacher_squares += y * y
                norm = tl.sqrt(squares.sum())
                teacher_norm = tl.sqrt(teacher_squares.sum())
                inverse = tl.where(norm < SMALLEST_NORM, 0.0, 1 / norm).to(tl.float32)
                teacher_inverse = tl.where(teacher_norm < SMALLEST_NORM, 0.0, 1 / teacher_norm)
                teacher_inverse = teacher_inverse.to(tl.float32)
                value = tl.zeros((BLOCK,), tl.float64)
                dots = value
                for start in range(0, positions, BLOCK):
                    k = start + tl.arange(0, BLOCK).to(tl.int64)
                    inside = k < positions
                    unit = tl.load(map + k, inside, 0.0) * inverse
                    d = unit - tl.load(map + half + k, inside, 0.0) * teacher_inverse
                    weight = tl.where(inside, 1.0, 0.0)
                    if layer.mask is not None:
                        line = _offset(layer, layer.mask_strides, sample, k // layer.inner)
                        line += k % layer.inner * layer.mask_strides.inner
                        weight = tl.load(layer.mask + line, inside, 0.0)
                    value += _times(weight, d * d).to(tl.float64)
                    dots += (unit * _times(weight, 2 * d)).to(tl.float64)
                to = stats + (i * samples + sample) * 3
                tl.store(to, inverse)
                tl.store(to + 1, teacher_inverse)
                tl.store(to + 2, dots.sum().to(tl.float32))
                pieces = _outer_size(layer) * layer.pieces_a_line
                total = value.sum().to(tl.float32)
                for start in range(0, pieces, BLOCK):
                    k = start + tl.arange(0, BLOCK)
                    at = values + layer.first_piece + sample * pieces + k
                    tl.store(at, tl.where(k == 0, total, 0.0), k < pieces)


@triton.jit
def _map_gradients(layers, scales, maps, stats, firsts, half, samples, TILES: tl.constexpr):
    piece = layers[0].first_piece + tl.program_id(0)
    for i in tl.static_range(len(layers)):
        layer = layers[i]
        begins = piece >= layer.first_piece
        if begins & (piece < layer.first_piece + layer.pieces):
            if layer.gradient is not None:
                CHANNELS: tl.constexpr = TILES[i][1]
                sample, o, position = _at(layer, piece - layer.first_piece, TILES[i][0])
                weight = _weights(layer, sample, o, position)
                factor = _factor_of(layer, scales, sample, i)
                of_sample = stats + (i * samples + sample) * 3
                inverse = tl.load(of_sample)
                teacher_inverse = tl.load(of_sample + 1)
                dot = tl.load(of_sample + 2)
                inside = position < layer.inner
                at = maps + firsts[i] + (sample * _outer_size(layer) + o) * layer.inner + position
                unit = tl.load(at, inside, 0.0) * inverse
                d = unit - tl.load(at + half, inside, 0.0) * teacher_inverse
                slope = weight * (2 * d)
                by = tl.where(
                    weight != 0, _times(factor, 2 * ((slope - unit * dot) * inverse)), 0.0
                )
                counts = (weight != 0) & (factor != 0)
                start = _offset(layer, layer.student_strides, sample, o)
                for first in range(0, layer.channels, CHANNELS):
                    channel = first + tl.arange(0, CHANNELS).to(tl.int64)
                    there = channel < layer.channels
                    reads = counts[:, None] & there[None, :]
                    x = _load(layer.student, layer.student_strides, start, position, channel, reads)
                    out = tl.where(reads, x * by[:, None], 0.0)
                    _write(layer, sample, o, position, channel, there, out)


@triton.jit
def _scale(grads, sizes, factor, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1:
        k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for i in tl.static_range(len(grads)):
            x = tl.load(grads[i] + k, k < sizes[i], 0.0).to(tl.float32)
            x = tl.where(x == 0, x, x * by)  # what is masked stays 0
            tl.store(grads[i] + k, x.to(grads[i].dtype.element_ty), k < sizes[i])
