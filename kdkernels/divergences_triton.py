"""The divergences as Triton functions: the formulas of kdkernels/divergences.py, one each.

A term takes a = log p and b = log q of a tile, p and q, e = expm1(−|a − b|), the row's parameters
and, for Rényi, log B; it returns φ, G and H. Kernels get it as a ``tl.constexpr``, and what they do
not use of it costs nothing: a new divergence is one function and one line of TERMS.

Parameters are values of a row, so that the ends of their ranges (jsd β = 0, alpha = 1, …), where a
family is one of the KLs, are chosen per row by ``tl.where``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2(x, HARDWARE: tl.constexpr):
    """log2(x); HARDWARE: by NVIDIA's instruction, where tl.log2 would be a software routine."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def difference(a, b):
    """a − b, and 0 where both are −inf."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def times(weight, x):
    """weight·x where weight is not 0, else 0: zero weight wins over inf and NaN."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def expm1(x, power):
    """expm1(x) for x ≤ 0, from power = e^x, with a few roundings of relative error near 0 too."""
    y = tl.fma(x, 0.00019996821, 0.00139977836)
    y = tl.fma(x, tl.fma(x, y, 0.00833305216), 0.0416653039)
    y = tl.fma(x, tl.fma(x, tl.fma(x, y, 0.166666684), 0.500000043), 1.0)
    return tl.where(x > -0.5, x * y, power - 1.0)


@triton.jit
def log1p(x, HARDWARE: tl.constexpr):
    """log(1 + x) for −1 < x ≤ 1, a few roundings of relative error near 0 too."""
    y = tl.fma(x, -0.0762102624, 0.129046209)
    y = tl.fma(x, tl.fma(x, y, -0.132434795), 0.141818431)
    y = tl.fma(x, tl.fma(x, y, -0.166090116), 0.20001968)
    y = tl.fma(x, tl.fma(x, y, -0.250015866), 0.33333326)
    y = tl.fma(x, tl.fma(x, y, -0.499999883), 1.0)
    return tl.where(tl.abs(x) < 0.29, x * y, log2(1.0 + x, HARDWARE) * LN_2)


@triton.jit
def kl(weight, other, d):
    """Bregman form of KL(weight‖other) for d = log(other/weight): weight·(expm1(d) − d) ≥ 0."""
    product = times(weight, d)
    y = tl.fma(d, tl.fma(d, 0.00139160386, 0.0083488485), 0.0416665879)
    near = product * (d * tl.fma(d, tl.fma(d, y, 0.166666424), 0.5))
    return tl.where(tl.abs(d) < 0.25, near, (other - weight) - product)


@triton.jit
def geometric(a, b, order):
    """order·b + (1 − order)·a, −inf where both are."""
    return tl.where(a == b, a, order * b + (1.0 - order) * a)


@triton.jit
def mixture(d, e, beta, HARDWARE: tl.constexpr):
    """log(p/m), log(q/m), p/m − 1, q/m − 1 for m = βq + (1 − β)p, from d = log(p/q) and
    e = expm1(−|d|).
    """
    y = tl.where(d >= 0, beta, 1.0 - beta) * e  # m/larger − 1
    log_larger = -log1p(y, HARDWARE)
    log_smaller = log_larger - tl.abs(d)
    inverse = 1.0 / (1.0 + y)
    larger = -y * inverse
    smaller = (e - y) * inverse
    log_p_m = tl.where(d >= 0, log_larger, log_smaller)
    log_q_m = tl.where(d >= 0, log_smaller, log_larger)
    return log_p_m, log_q_m, tl.where(d >= 0, larger, smaller), tl.where(d >= 0, smaller, larger)


@triton.jit
def forward_kl(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    return kl(q, p, d), p - q, -times(q, d)


@triton.jit
def reverse_kl(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    return kl(p, q, -d), times(p, d), q - p


@triton.jit
def jeffreys(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    rest = 1.0 - first
    phi = times(first, kl(q, p, d)) + times(rest, kl(p, q, -d))
    g = times(first, p - q) + times(rest, times(p, d))
    h = times(rest, q - p) - times(first, times(q, d))
    return phi, g, h


@triton.jit
def jsd(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    rest = 1.0 - first
    log_p_m, log_q_m, _, _ = mixture(d, e, first, HARDWARE)
    scale = tl.where(second > 0, 1.0 / (first * rest), 1.0)
    g = times(p, log_p_m) * (rest * scale)
    h = times(q, log_q_m) * (first * scale)
    phi = g + h
    # β = 0: forward KL, β = 1: reverse KL.
    forward = first == 0
    end = forward | (rest == 0)
    limit = kl(tl.where(forward, q, p), tl.where(forward, p, q), tl.where(forward, d, -d))
    g = tl.where(end, tl.where(forward, p - q, times(p, d)), g)
    h = tl.where(end, tl.where(forward, -times(q, d), q - p), h)
    return tl.where(end, limit, phi), g, h


@triton.jit
def skew_forward_kl(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    rest = 1.0 - first
    _, log_q_m, _, excess = mixture(d, e, first, HARDWARE)
    # λ = 0: forward KL. λ = 1 leaves log(q/q) = 0, which the mixture could only round to.
    log_q_m = tl.where(first == 0, -d, tl.where(rest == 0, 0.0, log_q_m))
    excess = tl.where(rest == 0, 0.0, excess)
    phi = kl(q, first * q + rest * p, -log_q_m)
    g = tl.where(first == 0, p - q, -rest * times(p, excess))
    return phi, g, times(q, log_q_m) - times(first, times(q, excess))


@triton.jit
def skew_reverse_kl(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    rest = 1.0 - first
    log_p_m, _, excess, _ = mixture(d, e, rest, HARDWARE)
    log_p_m = tl.where(first == 0, d, tl.where(rest == 0, 0.0, log_p_m))
    excess = tl.where(rest == 0, 0.0, excess)
    phi = kl(p, rest * q + first * p, -log_p_m)
    h = tl.where(first == 0, q - p, -rest * times(q, excess))
    return phi, times(p, log_p_m) - times(first, times(p, excess)), h


@triton.jit
def tvd(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    half = tl.where(a > b, 0.5, tl.where(a < b, -0.5, times(difference(a, b), 0.5)))  # NaN stays
    return half * (p - q), half * p, -half * q


@triton.jit
def alpha(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    d = difference(a, b)
    rest = 1.0 - first
    pi = tl.exp2(geometric(a, b, first) * LOG2_E)
    by_first = 1.0 / first
    by_rest = 1.0 / rest
    phi = (first * q + rest * p - pi) * (by_first * by_rest)
    g = (p - pi) * by_first
    h = (q - pi) * by_rest
    # α = 1: forward KL, α = 0: reverse KL.
    forward = rest == 0
    end = forward | (first == 0)
    limit = kl(tl.where(forward, q, p), tl.where(forward, p, q), tl.where(forward, d, -d))
    g = tl.where(end, tl.where(forward, p - q, times(p, d)), g)
    h = tl.where(end, tl.where(forward, -times(q, d), q - p), h)
    return tl.where(end, limit, phi), g, h


@triton.jit
def renyi(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    # φ is alpha's, of whose sum Rényi is a function; G and H already have 1/B in them.
    phi, g, h = alpha(a, b, p, q, e, first, second, log_b, HARDWARE)
    tilted = tl.exp2((geometric(a, b, first) - log_b) * LOG2_E)
    g = tl.where(first == 1, g, -tilted)
    return phi, g, tl.where(first == 1, h, tilted * (first / (first - 1.0)))


@triton.jit
def ab(a, b, p, q, e, first, second, log_b, HARDWARE: tl.constexpr):
    k = first + second
    q_k = tl.exp2(k * b * LOG2_E)
    p_k = tl.exp2(k * a * LOG2_E)
    mixed = tl.exp2((first * b + second * a) * LOG2_E)
    phi = (second * p_k + first * q_k - k * mixed) * (1.0 / (k * first * second))
    return phi, (p_k - mixed) * (1.0 / first), (q_k - mixed) * (1.0 / second)


@triton.jit
def probabilities(a, b, MIXES: tl.constexpr):
    """(p, q, e) from the logarithms a and b to base 2; two exponentials."""
    if MIXES:
        d = difference(a, b)
        ratio = tl.exp2(-tl.abs(d))
        larger = tl.exp2(tl.maximum(a, b))
        smaller = larger * ratio
        e = expm1(-tl.abs(d) * LN_2, ratio)
        return tl.where(d >= 0, larger, smaller), tl.where(d >= 0, smaller, larger), e
    else:
        return tl.exp2(a), tl.exp2(b), 0.0


class Term(NamedTuple):
    """A divergence's function, whether it takes e, and which statistics of the first sweep give
    its D and ΣG.

    With any of them the divergence is of class A: one sweep for the statistics. With none it is of
    class B: a second sweep sums φ and G. ``sums_of`` in
    ops/distillation_loss/triton_kernels.py turns the statistics into D and ΣG.
    """

    function: Any
    mixes: bool = False
    forward: bool = False  # KL(q‖p)
    reverse: bool = False  # KL(p‖q)
    tilted: bool = False  # log B = log Σ q^first p^(1 − first)
    powers: bool = False  # Σ p^k, Σ q^k and Σ q^first p^second for k = first + second


TERMS = {
    "forward_kl": Term(forward_kl, forward=True),
    "reverse_kl": Term(reverse_kl, reverse=True),
    "jeffreys": Term(jeffreys, forward=True, reverse=True),
    "jsd": Term(jsd, mixes=True),
    "skew_forward_kl": Term(skew_forward_kl, mixes=True),
    "skew_reverse_kl": Term(skew_reverse_kl, mixes=True),
    "alpha": Term(alpha, forward=True, reverse=True, tilted=True),
    "tvd": Term(tvd),
    "renyi": Term(renyi, forward=True, tilted=True),
    "ab": Term(ab, powers=True),
    "dkd": Term(forward_kl, forward=True),  # on rows without the label's column
}
