"""The divergences: their names, parameters, formulas, and torch terms (the reference).

With student p = softmax(s/τs) and teacher q = softmax(t/τt), a = log p, b = log q, d = a − b, a
divergence is D = Σ φ(p, q). A *term* returns φ, G = p·∂φ/∂p and H = q·∂φ/∂q for every column; the
gradients are (G − p·ΣG)/τs and (H − q·ΣH)/τt. By Euler's theorem ΣH = kD − ΣG for φ homogeneous of
degree k.

Where the textbook φ is of first order in d (q·(b − a) for forward KL) the terms use the Bregman
form of it, φ + (p − q) or its like: the sum is the same because Σp = Σq = 1, every term is ≥ 0 and
of second order, so that a divergence of 1e-7 keeps its digits in float32 and rounding cannot make
it negative.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Parameter = float | Tensor


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence with its parameters; made by the functions below, accepted as ``divergence=``.

    ``first`` and ``second`` are its parameters in the order of the function that made it (unused
    ones are 0): floats, 0-d tensors, or per-token tensors of the logits' leading shape.
    """

    name: str
    first: Parameter = 0.0
    second: Parameter = 0.0

    @property
    def parameters(self) -> tuple[str, str]:
        """The names of ``first`` and ``second``, for messages."""
        return _PARAMETERS[self.name]


def _checked(
    divergence: str,
    parameter: str,
    value: Parameter,
    accepts: Callable[[float], bool],
    accepted: str,
) -> Parameter:
    """The value, refused where it is a number out of range; a tensor's entries become NaN there."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(
                f"{divergence}({parameter}=...) has dtype {value.dtype}; accepted: floating point"
            )
        if value.requires_grad:
            raise ValueError(
                f"{divergence}({parameter}=...) requires grad; accepted: tensors without gradient"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{divergence}({parameter}=...) is a {type(value).__name__}; accepted: float or Tensor"
        )
    if not math.isfinite(value) or not accepts(value):
        raise ValueError(f"{divergence}({parameter}={value}); accepted: {accepted}")
    return float(value)


def _unit(value: float) -> bool:
    return 0 <= value <= 1


def _positive(value: float) -> bool:
    return value > 0


def _non_negative(value: float) -> bool:
    return value >= 0


def forward_kl() -> Divergence:
    """Forward KL, KL(q‖p) = Σ q (b − a): Hinton et al. 2015, arXiv 1503.02531."""
    return Divergence("forward_kl")


def reverse_kl() -> Divergence:
    """Reverse KL, KL(p‖q) = Σ p (a − b): MiniLLM, arXiv 2306.08543."""
    return Divergence("reverse_kl")


def jeffreys(weight: Parameter = 0.5) -> Divergence:
    """A mix of both KLs, weight·KL(q‖p) + (1 − weight)·KL(p‖q); weight in [0, 1],
    ½ is half of Jeffreys.
    """
    return Divergence("jeffreys", _checked("jeffreys", "weight", weight, _unit, "[0, 1]"))


def jsd(beta: Parameter = 0.5, normalized: bool = False) -> Divergence:
    """Generalised Jensen–Shannon, β·KL(q‖m) + (1 − β)·KL(p‖m), m = βq + (1 − β)p:
    GKD, arXiv 2306.13649.

    β in [0, 1]. β = 0 selects forward KL and β = 1 reverse KL, the convention of TRL and Liger; the
    value jumps there, since JSD(β) → 0 as β → 0. ``normalized=True`` divides by β(1 − β), which is
    continuous at both ends.
    """
    return Divergence(
        "jsd", _checked("jsd", "beta", beta, _unit, "[0, 1]"), 1.0 if normalized else 0.0
    )


def skew_forward_kl(lam: Parameter = 0.1) -> Divergence:
    """Skew forward KL, KL(q ‖ λq + (1 − λ)p); λ in [0, 1]: DistiLLM, arXiv 2402.03898."""
    return Divergence("skew_forward_kl", _checked("skew_forward_kl", "lam", lam, _unit, "[0, 1]"))


def skew_reverse_kl(lam: Parameter = 0.1) -> Divergence:
    """Skew reverse KL, KL(p ‖ (1 − λ)q + λp); λ in [0, 1]: DistiLLM, arXiv 2402.03898."""
    return Divergence("skew_reverse_kl", _checked("skew_reverse_kl", "lam", lam, _unit, "[0, 1]"))


def alpha(alpha: Parameter = 0.5) -> Divergence:
    """Amari's alpha, (Σ q^α p^(1−α) − 1)/(α(α − 1)); any finite α, ½ is 4 × squared Hellinger.

    α = 1 is forward KL and α = 0 reverse KL (the limits): Amari, Differential-Geometrical Methods
    in Statistics, 1985.
    """
    return Divergence("alpha", _checked("alpha", "alpha", alpha, math.isfinite, "a finite float"))


def tvd() -> Divergence:
    """Total variation, ½ Σ |p − q|, with gradient 0 where p = q: f-distill, arXiv 2307.15190."""
    return Divergence("tvd")


def renyi(order: Parameter = 0.5) -> Divergence:
    """Rényi of order r, log(Σ q^r p^(1−r))/(r − 1); r > 0, r = 1 is forward KL (the limit):
    Rényi 1961.
    """
    return Divergence("renyi", _checked("renyi", "order", order, _positive, "order > 0"))


def ab(alpha: Parameter = 0.2, beta: Parameter = 0.7) -> Divergence:
    """Alpha-beta, −Σ [q^α p^β − α/(α+β)·q^(α+β) − β/(α+β)·p^(α+β)]/(αβ): ABKD, arXiv 2505.04560.

    α > 0 and β > 0; the limits (1, 0) and (0, 1) are ``forward_kl`` and ``reverse_kl``. Not
    homogeneous of degree 1 but α + β.
    """
    hint = "> 0 (the limits are forward_kl and reverse_kl)"
    return Divergence(
        "ab",
        _checked("ab", "alpha", alpha, _positive, f"alpha {hint}"),
        _checked("ab", "beta", beta, _positive, f"beta {hint}"),
    )


def dkd(target_weight: Parameter = 1.0, non_target_weight: Parameter = 8.0) -> Divergence:
    """Decoupled KD, arXiv 2203.08679; needs a label in every row that counts.

    target_weight·KL of the binary (label, rest) distributions + non_target_weight·KL(q̂‖p̂) of the
    rows renormalised without the label. Weights ≥ 0; the defaults are the paper's α = 1, β = 8.
    """
    return Divergence(
        "dkd",
        _checked("dkd", "target_weight", target_weight, _non_negative, "target_weight >= 0"),
        _checked(
            "dkd", "non_target_weight", non_target_weight, _non_negative, "non_target_weight >= 0"
        ),
    )


def adaptive_kl() -> Divergence:
    """Adaptive KL: ``jeffreys`` with, in each row, the share of Σ|p − q| in the head of the
    teacher's distribution as its weight, without gradient: Wu et al. 2024, arXiv 2404.02657.

    Head: its most probable column, and all down to where the cumulative probability would pass ½
    (equal ones in the order of their columns); both distributions at the temperatures used. A row
    in which they agree has weight ½.
    """
    return Divergence("adaptive_kl")


def cross_entropy() -> Divergence:
    """Cross-entropy of the student under the teacher, −Σ q a: forward KL plus the teacher's
    entropy, so with the same gradient for the student; it gives the teacher none. The value that
    DINO reports: Caron et al. 2021, arXiv 2104.14294.
    """
    return Divergence("cross_entropy")


def resolve(divergence: str | Divergence) -> Divergence:
    """The divergence that a name (with default parameters) or an object stands for."""
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str) or divergence not in _MAKERS:
        raise ValueError(
            f"divergence={divergence!r} is unknown; accepted: {', '.join(_MAKERS)}, "
            "or an object made by kdkernels.divergences"
        )
    return _DEFAULTS[divergence]


def allowed(name: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Parameter tensors with NaN in place of entries out of range,
    decided without reading them on the host.
    """
    if name in ("jeffreys", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        first = torch.where((first >= 0) & (first <= 1), first, torch.nan)
    elif name == "renyi":
        first = torch.where((first > 0) & torch.isfinite(first), first, torch.nan)
    elif name == "alpha":
        first = torch.where(torch.isfinite(first), first, torch.nan)
    elif name == "ab":
        first = torch.where((first > 0) & torch.isfinite(first), first, torch.nan)
        second = torch.where((second > 0) & torch.isfinite(second), second, torch.nan)
    elif name == "dkd":
        first = torch.where((first >= 0) & torch.isfinite(first), first, torch.nan)
        second = torch.where((second >= 0) & torch.isfinite(second), second, torch.nan)
    return first, second


# ---- terms: (a, b, p, q, first, second) -> (φ, G, H), all broadcasting over (rows, vocab) ----
#
# H is written out although it is kφ − G: that difference cancels where p ≈ q (60 units in the last
# place in float32).

Term = tuple[Tensor, Tensor, Tensor]

# Below this |x| the series of expm1(x) − x is used; above it the subtraction loses at most
# two bits.
_SMALL = 0.5


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a − b, and 0 where both are −inf."""
    return torch.where(a == b, 0.0, a - b)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight·x where weight > 0, else 0: zero weight wins over inf and NaN."""
    return torch.where(weight == 0, 0.0, weight * x)


def _expm1_minus(x: Tensor) -> Tensor:
    """expm1(x) − x ≥ 0 for |x| ≤ ½ (elsewhere meaningless), relative error of a few roundings."""
    x = x.clamp(-_SMALL, _SMALL)
    series = torch.zeros_like(x)
    for k in range(15, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return x * x * series


def _kl(weight: Tensor, other: Tensor, d: Tensor) -> Tensor:
    """Bregman form of KL(weight‖other) for d = log(other/weight): weight·(expm1(d) − d)."""
    far = other - weight - _times(weight, d)
    return torch.where(d.abs() < _SMALL, weight * _expm1_minus(d), far)


def _forward_kl(a, b, p, q, first, second) -> Term:
    d = _difference(a, b)
    return _kl(q, p, d), p - q, -_times(q, d)


def _reverse_kl(a, b, p, q, first, second) -> Term:
    d = _difference(a, b)
    return _kl(p, q, -d), _times(p, d), q - p


def _jeffreys(a, b, p, q, weight, second) -> Term:
    forward = _forward_kl(a, b, p, q, weight, second)
    reverse = _reverse_kl(a, b, p, q, weight, second)
    phi, g, h = (
        _times(weight, f) + _times(1 - weight, r) for f, r in zip(forward, reverse, strict=True)
    )
    return phi, g, h


def _mixture(d: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m) for m = βq + (1 − β)p, from d = log(p/q) alone."""
    e = torch.expm1(-d.abs())
    log_larger = -torch.log1p(torch.where(d >= 0, beta, 1 - beta) * e)
    return (
        torch.where(d >= 0, log_larger, log_larger + d),
        torch.where(d >= 0, log_larger - d, log_larger),
    )


def _select(condition: Tensor, if_true: Term, if_false: Term) -> Term:
    phi, g, h = (torch.where(condition, x, y) for x, y in zip(if_true, if_false, strict=True))
    return phi, g, h


def _jsd(a, b, p, q, beta, normalized) -> Term:
    log_p_m, log_q_m = _mixture(_difference(a, b), beta)
    scale = torch.where(normalized > 0, 1 / (beta * (1 - beta)), 1.0)
    g = _times(p, log_p_m) * ((1 - beta) * scale)
    h = _times(q, log_q_m) * (beta * scale)
    forward = _forward_kl(a, b, p, q, beta, normalized)
    reverse = _reverse_kl(a, b, p, q, beta, normalized)
    return _select(beta == 0, forward, _select(beta == 1, reverse, (g + h, g, h)))


def _skew_forward_kl(a, b, p, q, lam, second) -> Term:
    _, log_q_m = _mixture(_difference(a, b), lam)
    log_q_m = torch.where(q == 0, -torch.inf, torch.where(lam == 1, 0.0, log_q_m))
    ratio = torch.expm1(log_q_m)  # q/m − 1
    phi = _kl(q, lam * q + (1 - lam) * p, -log_q_m)
    g = -(1 - lam) * _times(p, ratio)
    h = _times(q, log_q_m) - lam * _times(q, ratio)
    return _select(lam == 0, _forward_kl(a, b, p, q, lam, second), (phi, g, h))


def _skew_reverse_kl(a, b, p, q, lam, second) -> Term:
    log_p_m, _ = _mixture(_difference(a, b), 1 - lam)
    log_p_m = torch.where(p == 0, -torch.inf, torch.where(lam == 1, 0.0, log_p_m))
    ratio = torch.expm1(log_p_m)  # p/m − 1
    phi = _kl(p, (1 - lam) * q + lam * p, -log_p_m)
    g = _times(p, log_p_m) - lam * _times(p, ratio)
    h = -(1 - lam) * _times(q, ratio)
    return _select(lam == 0, _reverse_kl(a, b, p, q, lam, second), (phi, g, h))


def geometric(a: Tensor, b: Tensor, order: Tensor) -> Tensor:
    """order·b + (1 − order)·a, −inf where both are."""
    both = torch.isneginf(a) & torch.isneginf(b)
    return torch.where(both, -torch.inf, order * b + (1 - order) * a)


def _alpha(a, b, p, q, alpha, second) -> Term:
    d = _difference(a, b)
    pi = torch.exp(geometric(a, b, alpha))
    # The same φ written around q (κ = 1 − α, x = d) or around p (κ = α, x = −d): the nearer limit
    # is the stable one.
    around_q = alpha > 0.5
    weight, other = torch.where(around_q, q, p), torch.where(around_q, p, q)
    x, kappa = torch.where(around_q, d, -d), torch.where(around_q, 1 - alpha, alpha)
    near = weight * (_expm1_minus(kappa * x) - kappa * _expm1_minus(x))
    far = pi - (1 - kappa) * weight - kappa * other
    small = (d.abs() < _SMALL) & ((kappa * d).abs() < _SMALL)
    phi = torch.where(small, near, far) / (alpha * (alpha - 1))
    g = torch.where(small, -p * torch.expm1(-alpha * d), p - pi) / alpha
    h = torch.where(small, q * torch.expm1((1 - alpha) * d), pi - q) / (alpha - 1)
    forward = _forward_kl(a, b, p, q, alpha, second)
    reverse = _reverse_kl(a, b, p, q, alpha, second)
    return _select(alpha == 1, forward, _select(alpha == 0, reverse, (phi, g, h)))


def _tvd(a, b, p, q, first, second) -> Term:
    sign = torch.sign(p - q)
    return 0.5 * (p - q).abs(), 0.5 * p * sign, -0.5 * q * sign


def _ab(a, b, p, q, alpha, beta) -> Term:
    k = alpha + beta
    d = _difference(a, b)
    q_k, p_k = torch.exp(k * b), torch.exp(k * a)
    mixed = torch.exp(alpha * b + beta * a)
    near = q_k / alpha * (_expm1_minus(k * d) / k - _expm1_minus(beta * d) / beta)
    far = (beta * p_k + alpha * q_k - k * mixed) / (k * alpha * beta)
    small = (k * d).abs() < _SMALL
    g = torch.where(small, -p_k * torch.expm1(-alpha * d), p_k - mixed) / alpha
    h = torch.where(small, -q_k * torch.expm1(beta * d), q_k - mixed) / beta
    return torch.where(small, near, far), g, h


TERMS: dict[str, Callable[..., Term]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "alpha": _alpha,
    "tvd": _tvd,
    "ab": _ab,
    # Rényi is a function of alpha's sum, DKD of forward KL's on rows without the label: the op
    # wraps these terms.
    "renyi": _alpha,
    "dkd": _forward_kl,
}

DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "alpha": alpha,
    "tvd": tvd,
    "renyi": renyi,
    "ab": ab,
    "dkd": dkd,
}
# Of distillation_loss and what is made of it: more than one function of a row's columns.
MADE_OF_OTHERS: dict[str, Callable[..., Divergence]] = {
    "adaptive_kl": adaptive_kl,
    "cross_entropy": cross_entropy,
}
_MAKERS = {**DIVERGENCES, **MADE_OF_OTHERS}

_DEFAULTS = {name: make() for name, make in _MAKERS.items()}
_PARAMETERS: dict[str, tuple[str, str]] = {}
for _name, _make in _MAKERS.items():
    _given = [*inspect.signature(_make).parameters, "", ""]
    _PARAMETERS[_name] = (_given[0], _given[1])
