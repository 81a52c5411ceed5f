"""The similarity_loss ops in Triton. Imported on first use: the package works without Triton.

forward   _statistics: a block of rows and a chunk of keys a program, products by tl.dot →
          distillation_loss's states
          _sums (class B): a second sweep → Σφ and ΣG
          distillation_loss's _finish: one program a row combines the chunks in order
gradient  _rows: a block of rows a program, all keys → their gradient, and the parameters' by row
          _keys: a block of keys a program, all rows → theirs

Each gradient forms the products again: 2·N·M·(D + Dt) operations and no score in memory. Features
wider than WIDTH columns are that much repeated: a program adds up WIDTH columns of a gradient.
Nothing is added by atomics, and the cut into chunks depends on the number of keys alone.

Products are of float32 in three tf32 instructions, which keep float32's digits; one tf32
instruction keeps 10 bits, and a distance is a difference of products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...divergences_triton import LOG2_E, TERMS, probabilities, times
from .. import _triton
from .._triton import anchored
from ..distillation_loss import triton_kernels as rows_triton
from ..distillation_loss.triton_kernels import (
    DIVERGENCE,
    FIRST,
    KD_SCALE,
    SECOND,
    STATES,
    STUDENT_LOG_Z,
    STUDENT_MAX,
    SUM_G,
    TEACHER_LOG_Z,
    TEACHER_MAX,
    extended,
    row_state,
)

# Columns of features multiplied at a time, keys of a chunk, columns of a gradient that a program
# adds up.
STEP, CHUNK, WIDTH = 32, 1024, 64
_SIZES = ("n", "m", "chunks")


def _tiles() -> dict[str, int]:
    """Two tiles of scores and one of the gradient are in registers at once. Where tensor cores take
    a product from shared memory (sm_90, sm_100) 64 × 64 of 8 warps fit without spills; elsewhere
    (sm_80) they spill up to 3.6 KB a thread, and 32 × 32 of 4 warps at most 40 bytes.
    """
    backend, arch = _triton.target()
    large = backend == "cuda" and arch is not None and 90 <= arch < 120
    return dict(TILE=64, num_warps=8) if large else dict(TILE=32, num_warps=4)


@triton.jit
def products(a, b, i, j, n, m, width, PRECISION: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """a·b of rows i and keys j, 0 where there are none."""
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, STEP):
        d = start + tl.arange(0, STEP)
        x = features(a, i, n, d, width)
        y = features(b, j, m, d, width)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def features(x, i, n, d, width):
    here = (i < n)[:, None] & (d < width)[None, :]
    return tl.load(x + i.to(tl.int64)[:, None] * width + d[None, :], mask=here, other=0.0)


@triton.jit
def distance(x, a2, b2):
    return tl.maximum((a2[:, None] + b2[None, :]) - 2.0 * x, 0.0)


@triton.jit
def half(x):
    """(1 + cos)/2, not below rounding, so that its logarithm stays finite."""
    return tl.maximum((1.0 + x) * 0.5, 1.1920929e-07)


@triton.jit
def score(x, a2, b2, gamma, temperature, KERNEL: tl.constexpr):
    rate = gamma / temperature
    if KERNEL == "dot":
        return rate * x
    elif KERNEL == "rbf":  # ‖a‖² is the same for all keys of a row
        return rate * (2.0 * x - b2[None, :])
    elif KERNEL == "pkt":
        return rate * tl.log(half(x))
    elif KERNEL == "student_t":
        return -tl.log(1.0 + gamma * distance(x, a2, b2)) / temperature
    else:
        tl.static_assert(KERNEL == "rbf_softmax")
        return gamma * tl.exp(-distance(x, a2, b2) / temperature)


@triton.jit
def slope(x, a2, b2, gamma, temperature, KERNEL: tl.constexpr):
    """∂φ/∂x."""
    rate = gamma / temperature
    if KERNEL == "dot":
        return rate + tl.zeros_like(x)
    elif KERNEL == "rbf":
        return 2.0 * rate + tl.zeros_like(x)
    elif KERNEL == "pkt":
        return tl.where((1.0 + x) * 0.5 < 1.1920929e-07, 0.0, rate / (2.0 * half(x)))
    elif KERNEL == "student_t":
        return 2.0 * rate / (1.0 + gamma * distance(x, a2, b2))
    else:
        return 2.0 * gamma * tl.exp(-distance(x, a2, b2) / temperature) / temperature


@triton.jit
def by_parameters(x, a2, b2, gamma, temperature, KERNEL: tl.constexpr):
    """∂φ/∂γ and ∂φ/∂T."""
    if KERNEL == "dot" or KERNEL == "pkt":
        k = x if KERNEL == "dot" else tl.log(half(x))
        return k / temperature, -(gamma / temperature) * k / temperature
    else:
        d = distance(x, a2, b2)
        if KERNEL == "rbf":
            return -d / temperature, (gamma / temperature) * d / temperature
        elif KERNEL == "student_t":
            t2 = temperature * temperature
            one = 1.0 + gamma * d
            return -d / (temperature * one), tl.log(one) / t2
        else:
            e = tl.exp(-d / temperature)
            return e, gamma * e * d / (temperature * temperature)


@triton.jit
def squared(squares, i, n, KERNEL: tl.constexpr):
    """‖·‖² of rows or keys i; nothing where the kernel has no distance."""
    if KERNEL == "dot" or KERNEL == "pkt":
        return 0.0
    else:
        return tl.load(squares + i, mask=i < n, other=0.0)


@triton.jit
def scores(
    student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
    teacher_squares, teacher_key_squares, parameters, key_mask, i, j, n, m, width, teacher_width,
    KERNEL: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Products x and scores φ of a tile, student's and teacher's, −inf where a key is left out."""
    x = products(student, student_keys, i, j, n, m, width, PRECISION, TILE, STEP)
    y = products(teacher, teacher_keys, i, j, n, m, teacher_width, PRECISION, TILE, STEP)
    s = score(
        x, squared(student_squares, i, n, KERNEL), squared(student_key_squares, j, m, KERNEL),
        tl.load(parameters), tl.load(parameters + 1), KERNEL,
    )  # fmt: skip
    t = score(
        y, squared(teacher_squares, i, n, KERNEL), squared(teacher_key_squares, j, m, KERNEL),
        tl.load(parameters + 2), tl.load(parameters + 3), KERNEL,
    )  # fmt: skip
    counts = (j < m)[None, :] & (i < n)[:, None]
    if key_mask is not None:
        counts = counts & (tl.load(key_mask + j, mask=j < m, other=0) != 0)[None, :]
    if EXCLUDE:
        counts = counts & (i[:, None] != j[None, :])
    s = tl.where(counts, s, float("-inf"))
    t = tl.where(counts, t, float("-inf"))
    return x, y, s, t, counts


@triton.jit(do_not_specialize=_SIZES)
def _statistics(
    student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
    teacher_squares, teacher_key_squares, parameters, key_mask, rows, states,
    n, m, width, teacher_width, chunks,
    KERNEL: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The first sweep: each row's state of a chunk of keys, (STATES, n, chunks)."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    chunk = tl.program_id(1)
    first = tl.load(rows + FIRST * n)  # of all rows
    second = tl.load(rows + SECOND * n)
    log2_e = tl.full((), LOG2_E, tl.float32)
    state = rows_triton.empty(TILE)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, m), TILE):
        j = start + tl.arange(0, TILE)
        _, _, s, t, counts = scores(
            student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
            teacher_squares, teacher_key_squares, parameters, key_mask, i, j, n, m,
            width, teacher_width, KERNEL, EXCLUDE, PRECISION, TILE, STEP,
        )  # fmt: skip
        state = extended(state, s, t, j[None, :], counts, log2_e, log2_e, first, second, KIND)
    for k in tl.static_range(STATES):
        place = (k * n + i.to(tl.int64)) * chunks + chunk
        tl.store(states + place, state[k].to(tl.float32, bitcast=True), mask=i < n)


@triton.jit
def log_probabilities(s, t, rows, i, n):
    """log2 p and log2 q from the rows' lines."""
    here = i < n
    student_max = tl.load(rows + STUDENT_MAX * n + i, mask=here, other=0.0)[:, None]
    student_log_z = tl.load(rows + STUDENT_LOG_Z * n + i, mask=here, other=0.0)[:, None]
    teacher_max = tl.load(rows + TEACHER_MAX * n + i, mask=here, other=0.0)[:, None]
    teacher_log_z = tl.load(rows + TEACHER_LOG_Z * n + i, mask=here, other=0.0)[:, None]
    a = ((s - student_max) - student_log_z) * LOG2_E
    b = ((t - teacher_max) - teacher_log_z) * LOG2_E
    return a, b


@triton.jit(do_not_specialize=_SIZES)
def _sums(
    student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
    teacher_squares, teacher_key_squares, parameters, key_mask, rows, sums,
    n, m, width, teacher_width, chunks,
    KERNEL: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr, TERM: tl.constexpr,
    MIXES: tl.constexpr, HARDWARE: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The second sweep of class B: Σφ and ΣG of a chunk of keys, (2, n, chunks)."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    chunk = tl.program_id(1)
    first = tl.load(rows + FIRST * n)
    second = tl.load(rows + SECOND * n)
    phi_sum = tl.zeros((TILE,), tl.float32)
    g_sum = tl.zeros((TILE,), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, m), TILE):
        j = start + tl.arange(0, TILE)
        _, _, s, t, _ = scores(
            student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
            teacher_squares, teacher_key_squares, parameters, key_mask, i, j, n, m,
            width, teacher_width, KERNEL, EXCLUDE, PRECISION, TILE, STEP,
        )  # fmt: skip
        a, b = log_probabilities(s, t, rows, i, n)
        p, q, e = probabilities(a, b, MIXES)
        phi, g, _ = TERM(a, b, p, q, e, first, second, 0.0, HARDWARE)
        phi_sum += tl.sum(phi, 1)
        g_sum += tl.sum(g, 1)
    place = i.to(tl.int64) * chunks + chunk
    tl.store(sums + place, phi_sum, mask=i < n)
    tl.store(sums + n.to(tl.int64) * chunks + place, g_sum, mask=i < n)


@triton.jit(do_not_specialize=_SIZES)
def _log_z(states, rows, n, chunks, CHUNKS: tl.constexpr):
    """The lines that class B's second sweep needs, from the chunks of the first."""
    i = tl.program_id(0).to(tl.int64)
    state = row_state(states, n, i, chunks, LOG2_E + 0.0, LOG2_E + 0.0, 1.0, 1.0, 0, CHUNKS)
    tl.store(rows + STUDENT_MAX * n + i, anchored(state[0]))
    tl.store(rows + STUDENT_LOG_Z * n + i, tl.log(state[1]))
    tl.store(rows + TEACHER_MAX * n + i, anchored(state[2]))
    tl.store(rows + TEACHER_LOG_Z * n + i, tl.log(state[3]))


@triton.jit
def gradients(
    s, t, rows, i, n, NAME: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """∂L/∂φ of a tile, the student's and the teacher's, from the rows' lines."""
    here = i < n
    first = tl.load(rows + FIRST * n)
    second = tl.load(rows + SECOND * n)
    kd = tl.load(rows + KD_SCALE * n + i, mask=here, other=0.0)[:, None]
    d = tl.load(rows + DIVERGENCE * n + i, mask=here, other=0.0)[:, None]
    sum_g = tl.load(rows + SUM_G * n + i, mask=here, other=0.0)[:, None]
    log_b = sum_g * LOG2_E
    sum_h = d - sum_g
    if NAME == "reverse_kl":
        sum_h = tl.zeros_like(d)  # Σq − Σp
    elif NAME == "ab":
        sum_h = (first + second) * d - sum_g
    elif NAME == "renyi":
        sum_g = tl.where(first == 1, 0.0, -1.0) + tl.zeros_like(d)
        sum_h = tl.where(first == 1, d, first / (first - 1.0))
    a, b = log_probabilities(s, t, rows, i, n)
    p, q, e = probabilities(a, b, MIXES)
    _, g, h = TERM(a, b, p, q, e, first, second, log_b, HARDWARE)
    # Where a key is left out of both distributions G and H may be whatever a term makes of −inf.
    g = tl.where((p == 0) & (q == 0), 0.0, g)
    h = tl.where((p == 0) & (q == 0), 0.0, h)
    return times(kd, g - p * sum_g), times(kd, h - q * sum_h)


@triton.jit(do_not_specialize=_SIZES)
def _rows(
    student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
    teacher_squares, teacher_key_squares, parameters, key_mask, rows, grad, parameter_sums,
    n, m, width, teacher_width,
    KERNEL: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr,
    NAME: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr, HARDWARE: tl.constexpr,
    GRAD: tl.constexpr, PARAMETERS: tl.constexpr, TEACHER_PARAMETERS: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of the gradient of a block of rows, and each row's part of the parameters'."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    v_sum = tl.zeros((TILE,), tl.float32)
    by_gamma = tl.zeros((TILE,), tl.float32)
    by_temperature = tl.zeros((TILE,), tl.float32)
    by_teacher_gamma = tl.zeros((TILE,), tl.float32)
    by_teacher_temperature = tl.zeros((TILE,), tl.float32)
    for start in range(0, m, TILE):
        j = start + tl.arange(0, TILE)
        x, y, s, t, _ = scores(
            student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
            teacher_squares, teacher_key_squares, parameters, key_mask, i, j, n, m,
            width, teacher_width, KERNEL, EXCLUDE, PRECISION, TILE, STEP,
        )  # fmt: skip
        w, teacher_w = gradients(s, t, rows, i, n, NAME, TERM, MIXES, HARDWARE)
        a2 = squared(student_squares, i, n, KERNEL)
        b2 = squared(student_key_squares, j, m, KERNEL)
        gamma = tl.load(parameters)
        temperature = tl.load(parameters + 1)
        if GRAD:
            v = times(w, slope(x, a2, b2, gamma, temperature, KERNEL))
            keys = features(student_keys, j, m, column, width)
            total = tl.dot(v, keys, total, input_precision=PRECISION)
            v_sum += tl.sum(v, 1)
        if PARAMETERS:
            g, h = by_parameters(x, a2, b2, gamma, temperature, KERNEL)
            by_gamma += tl.sum(times(w, g), 1)
            by_temperature += tl.sum(times(w, h), 1)
        if TEACHER_PARAMETERS:
            g, h = by_parameters(
                y, squared(teacher_squares, i, n, KERNEL),
                squared(teacher_key_squares, j, m, KERNEL), tl.load(parameters + 2),
                tl.load(parameters + 3), KERNEL,
            )  # fmt: skip
            by_teacher_gamma += tl.sum(times(teacher_w, g), 1)
            by_teacher_temperature += tl.sum(times(teacher_w, h), 1)
    if GRAD:
        if KERNEL == "student_t" or KERNEL == "rbf_softmax":  # else Σ ∂L/∂x is 0, or no part of it
            total -= features(student, i, n, column, width) * v_sum[:, None]
        here = (i < n)[:, None] & (column < width)[None, :]
        place = i.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(grad + place, total, mask=here)
    if PARAMETERS or TEACHER_PARAMETERS:
        here = i < n
        size = n.to(tl.int64)
        tl.store(parameter_sums + i, by_gamma, mask=here)
        tl.store(parameter_sums + size + i, by_temperature, mask=here)
        tl.store(parameter_sums + 2 * size + i, by_teacher_gamma, mask=here)
        tl.store(parameter_sums + 3 * size + i, by_teacher_temperature, mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _keys(
    student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
    teacher_squares, teacher_key_squares, parameters, key_mask, rows, grad,
    n, m, width, teacher_width,
    KERNEL: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr,
    NAME: tl.constexpr, TERM: tl.constexpr, MIXES: tl.constexpr, HARDWARE: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of the gradient of a block of keys."""
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    v_sum = tl.zeros((TILE,), tl.float32)
    for start in range(0, n, TILE):
        i = start + tl.arange(0, TILE)
        x, _, s, t, _ = scores(
            student, student_keys, teacher, teacher_keys, student_squares, student_key_squares,
            teacher_squares, teacher_key_squares, parameters, key_mask, i, j, n, m,
            width, teacher_width, KERNEL, EXCLUDE, PRECISION, TILE, STEP,
        )  # fmt: skip
        w, _ = gradients(s, t, rows, i, n, NAME, TERM, MIXES, HARDWARE)
        v = times(
            w,
            slope(
                x, squared(student_squares, i, n, KERNEL),
                squared(student_key_squares, j, m, KERNEL), tl.load(parameters),
                tl.load(parameters + 1), KERNEL,
            ),
        )  # fmt: skip
        v_sum += tl.sum(v, 0)
        total = tl.dot(
            tl.trans(v), features(student, i, n, column, width), total, input_precision=PRECISION
        )
    if KERNEL != "dot" and KERNEL != "pkt":
        total -= features(student_keys, j, m, column, width) * v_sum[:, None]
    here = (j < m)[:, None] & (column < width)[None, :]
    tl.store(grad + j.to(tl.int64)[:, None] * width + column[None, :], total, mask=here)


# ---- the ops ----


def similarity_loss(
    student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor, *options
) -> Tensor:
    """The loss for the schema in this folder's __init__.py."""
    return _run(None, student, student_keys, teacher, teacher_keys, *options)[0]


def similarity_loss_and_grad(
    student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradient of the rows, of the keys, of γ, T and the teacher's γ, T), each empty where
    not asked for by the last four arguments.
    """
    *options, student_grad, keys_grad, parameter_grads, teacher_parameter_grads = args
    wanted = (student_grad, keys_grad, parameter_grads, teacher_parameter_grads)
    return _run(wanted, student, student_keys, teacher, teacher_keys, *options)


def _run(
    wanted: tuple[bool, bool, bool, bool] | None,
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    row_weights: Tensor | None,
    key_mask: Tensor | None,
    parameters: Tensor | None,
    gamma: float,
    temperature: float,
    teacher_gamma: float,
    teacher_temperature: float,
    kernel: str,
    divergence: str,
    first: float,
    first_tensor: Tensor | None,
    second: float,
    second_tensor: Tensor | None,
    exclude_diagonal: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, width = student.shape
    m, teacher_width = teacher_keys.shape
    if parameters is None:
        numbers = (gamma, temperature, teacher_gamma, teacher_temperature)
        parameters = torch.stack([student.new_full((), value) for value in numbers])
    else:
        parameters = torch.where((parameters > 0).all(), parameters, torch.nan)
    wants_rows, wants_keys, wants_parameters, wants_teacher = wanted or (False,) * 4
    by_rows = student.new_empty(student.shape if wants_rows else 0)
    by_keys = student.new_empty(student_keys.shape if wants_keys else 0)
    by_parameters = student.new_zeros(4 if wants_parameters or wants_teacher else 0)
    if n == 0:
        loss = student.new_zeros(0 if reduction == "none" else ())
        return loss, by_rows, by_keys.zero_(), by_parameters
    given = rows_triton.started(
        student, teacher, None, row_weights, divergence, first, first_tensor, second,
        second_tensor, 1.0, None, 1.0, None, 1.0, None, 0.0, None, 0.0, None, None, None,
        False, 0.0, -100, True, m, reduction, False,
    )  # fmt: skip
    rows = given.rows
    squares: tuple[Tensor | None, ...] = (None,) * 4
    if kernel in ("rbf", "student_t", "rbf_softmax"):
        both = (student, student_keys, teacher, teacher_keys)
        squares = tuple(x.square().sum(1) for x in both)
    term = TERMS[divergence]
    chunks = -(-m // CHUNK)
    states = student.new_empty((STATES.value, n, chunks))
    sums = student.new_empty((2, n, chunks))
    totals = student.new_empty((n,))
    mask = None if key_mask is None else key_mask.to(torch.uint8)
    pairs = (student, student_keys, teacher, teacher_keys, *squares, parameters, mask, rows)
    sizes = (n, m, width, teacher_width)
    cuda = _triton.target()[0] == "cuda"
    options = dict(
        KERNEL=kernel, EXCLUDE=exclude_diagonal, PRECISION="tf32x3" if cuda else "ieee", STEP=STEP,
        **_tiles(), **_triton.EXACT,
    )  # fmt: skip
    of_term = dict(TERM=term.function, MIXES=term.mixes, HARDWARE=_triton.hardware_log())
    tile = options["TILE"]
    blocks, all_chunks = triton.cdiv(n, tile), triton.next_power_of_2(chunks)
    with _triton.on_device(student):
        _statistics[(blocks, chunks)](
            *pairs, states, *sizes, chunks, KIND=given.kind, CHUNK=CHUNK, **options
        )
        if given.class_b:
            _log_z[(n,)](states, rows, n, chunks, CHUNKS=all_chunks, num_warps=1, **_triton.EXACT)
            _sums[(blocks, chunks)](*pairs, sums, *sizes, chunks, CHUNK=CHUNK, **of_term, **options)
        rows_triton.finish(
            given, None, (None, None), states, sums, totals, m, chunks, divergence, 0.0, False,
            given.class_b,
        )  # fmt: skip
        columns = triton.cdiv(width, WIDTH)
        gradient = dict(NAME=divergence, WIDTH=WIDTH, **of_term, **options)
        nothing = dict(GRAD=False, PARAMETERS=False, TEACHER_PARAMETERS=False)
        # Two launches: both at once spill.
        if wants_rows:
            _rows[(blocks, columns)](
                *pairs, by_rows, None, *sizes, **gradient | nothing | dict(GRAD=True)
            )
        if wants_parameters or wants_teacher:
            parameter_sums = student.new_empty((4, n))
            which = dict(PARAMETERS=wants_parameters, TEACHER_PARAMETERS=wants_teacher)
            _rows[(blocks, 1)](*pairs, None, parameter_sums, *sizes, **gradient | nothing | which)
            by_parameters = parameter_sums.sum(1, dtype=torch.float64).to(torch.float32)
        if wants_keys:
            _keys[(triton.cdiv(m, tile), columns)](*pairs, by_keys, *sizes, **gradient)
    loss = totals if reduction == "none" else totals.sum(dtype=torch.float64).to(torch.float32)
    return loss, by_rows, by_keys, by_parameters
