"""What every loss should be, from its definition, in NumPy extended precision.

Nothing here is imported from kdkernels and nothing uses its formulas. A divergence is given only as
a function of the two log-probabilities; its derivatives come from a complex step (Squire and Trapp
1998: d/dx f(x) = Im f(x + ih)/h, exact to rounding because nothing is subtracted), and the logits'
gradient from the Jacobian of softmax. Elements where one probability is exactly 0 (a logit of -inf)
are written down case by case.

`np.longdouble` (80 bits on x86-64) rather than float64, so that the truth is better than what the
float64 implementation is compared with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

REAL = np.longdouble
STEP = REAL(1e-30)
# The worst row of some 32 is an estimate of an error; another 32 easily give a quarter more.
SAMPLING = 1.25

DEFAULTS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {"weight": 0.5},
    "jsd": {"beta": 0.5, "normalized": False},
    "skew_forward_kl": {"lam": 0.1},
    "skew_reverse_kl": {"lam": 0.1},
    "alpha": {"alpha": 0.5},
    "tvd": {},
    "renyi": {"order": 0.5},
    "ab": {"alpha": 0.2, "beta": 0.7},
    "dkd": {"target_weight": 1.0, "non_target_weight": 8.0},
}


def to_numpy(x) -> np.ndarray:
    """Any tensor, float16 and bfloat16 included, without rounding."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        x = (x.double() if x.is_floating_point() else x).cpu().numpy()
    x = np.asarray(x)
    return x.astype(REAL) if x.dtype.kind == "f" else x


def log_softmax(x):
    """x - log sum exp x; -inf stays -inf. A row of nothing but -inf has no softmax: NaN."""
    x = np.asarray(x, REAL)
    largest = x.max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x - largest - np.log(np.exp(x - largest).sum(-1, keepdims=True))


def log_sum_exp(x):
    largest = x.max()
    return largest + np.log(np.exp(x - largest).sum()) if np.isfinite(largest) else largest


def times(weight, value):
    """weight * value, and 0 where the weight is 0, whatever the value."""
    zero = np.asarray(weight) == 0
    return np.where(zero, 0, weight * np.where(zero, 0, value))


# Divergences as sums over the vocabulary ---------------------------------------------------------
#
# _INSIDE[name](log_p, log_q, parameters): the summand where both probabilities are positive; p is
# the student, q the teacher. Analytic, so that it may be evaluated at a complex log_p or log_q.
#
# _boundary(name, mass, parameters) -> (the summand where only the student's probability is 0 and
# the teacher's is `mass`, the summand where only the teacher's is 0 and the student's is `mass`).


def _forward_kl(log_p, log_q, _):
    return times(np.exp(log_q), log_q - log_p)


def _reverse_kl(log_p, log_q, _):
    return times(np.exp(log_p), log_p - log_q)


def _jeffreys(log_p, log_q, k):
    w = k["weight"]
    return w * _forward_kl(log_p, log_q, k) + (1 - w) * _reverse_kl(log_p, log_q, k)


def _log_mixture(log_p, log_q, beta):
    """log(beta q + (1 - beta) p)"""
    with np.errstate(divide="ignore"):
        return np.log(beta * np.exp(log_q) + (1 - beta) * np.exp(log_p))


def _jsd(log_p, log_q, k):
    beta = k["beta"]
    log_m = _log_mixture(log_p, log_q, beta)
    value = times(beta * np.exp(log_q), log_q - log_m)
    value = value + times((1 - beta) * np.exp(log_p), log_p - log_m)
    return value / (beta * (1 - beta)) if k["normalized"] else value


def _skew_forward_kl(log_p, log_q, k):
    return times(np.exp(log_q), log_q - _log_mixture(log_p, log_q, k["lam"]))


def _skew_reverse_kl(log_p, log_q, k):
    return times(np.exp(log_p), log_p - _log_mixture(log_p, log_q, 1 - k["lam"]))


def _tvd(log_p, log_q, _):
    difference = np.exp(log_p) - np.exp(log_q)
    # |x| is not analytic; x sign(x) is on each side, and 0 at ties.
    return difference * np.sign(np.real(log_p) - np.real(log_q)) / 2


def _geometric(log_p, log_q, k):
    """q^exponent p^(1 - exponent), whose sum alpha and Renyi are functions of"""
    return np.exp(k["exponent"] * log_q + (1 - k["exponent"]) * log_p)


def _ab(log_p, log_q, k):
    a, b = k["alpha"], k["beta"]
    return (
        -np.exp(a * log_q + b * log_p) / (a * b)
        + np.exp((a + b) * log_q) / (b * (a + b))
        + np.exp((a + b) * log_p) / (a * (a + b))
    )


def _boundary(name, mass, k):
    with np.errstate(divide="ignore"):
        if name == "forward_kl":
            return np.inf, 0
        if name == "reverse_kl":
            return 0, np.inf
        if name == "jeffreys":
            return times(k["weight"], np.inf), times(1 - k["weight"], np.inf)
        if name == "jsd":
            beta = k["beta"]
            scale = beta * (1 - beta) if k["normalized"] else 1
            return (
                -beta * mass * np.log(beta) / scale,
                -(1 - beta) * mass * np.log(1 - beta) / scale,
            )
        if name == "skew_forward_kl":
            return -mass * np.log(REAL(k["lam"])), 0
        if name == "skew_reverse_kl":
            return 0, -mass * np.log(REAL(k["lam"]))
        if name == "tvd":
            return mass / 2, mass / 2
        if name == "ab":
            a, b = k["alpha"], k["beta"]
            return mass ** (a + b) / (b * (a + b)), mass ** (a + b) / (a * (a + b))
    if name == "geometric":
        e = k["exponent"]
        return (np.inf if e > 1 else 0), (np.inf if e < 0 else 0)
    raise AssertionError(name)


_INSIDE = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "ab": _ab,
    "geometric": _geometric,
}


def _summands(name, log_p, log_q, k):
    """Per column: the summand, and its derivatives by log p and by log q."""
    value, by_p, by_q = (np.zeros(log_p.shape, REAL) for _ in range(3))
    no_p, no_q = np.isneginf(log_p), np.isneginf(log_q)
    # Both underflow even in extended precision: the limit of every summand is 0, as at -inf.
    nothing = (np.exp(log_p) == 0) & (np.exp(log_q) == 0)

    both = ~no_p & ~no_q & ~nothing
    inside, a, b = _INSIDE[name], log_p[both], log_q[both]
    value[both] = inside(a, b, k)
    by_p[both] = inside(a + 1j * STEP, b, k).imag / STEP
    by_q[both] = inside(a, b + 1j * STEP, k).imag / STEP

    # One probability is 0: what is left is a constant times mass^degree.
    degree = k["alpha"] + k["beta"] if name == "ab" else 1
    only_q, only_p = no_p & ~no_q, no_q & ~no_p
    value[only_q] = _boundary(name, np.exp(log_q[only_q]), k)[0]
    by_q[only_q] = degree * value[only_q]
    value[only_p] = _boundary(name, np.exp(log_p[only_p]), k)[1]
    by_p[only_p] = degree * value[only_p]
    # The two summands whose derivative does not vanish with the probability it is taken by:
    # d/dlog p (-q log p) = -q and d/dlog q (-p log q) = -p.
    forward = {"forward_kl": 1, "jeffreys": k.get("weight")}.get(name, 0)
    reverse = {"reverse_kl": 1, "jeffreys": 1 - k.get("weight", 1)}.get(name, 0)
    by_p[only_q] = -forward * np.exp(log_q[only_q])
    by_q[only_p] = -reverse * np.exp(log_p[only_p])
    if name == "geometric":  # p^(1 - exponent) = inf has no finite derivative by anything
        by_p[np.isinf(value)] = by_q[np.isinf(value)] = np.inf
    return value, by_p, by_q


class Gradient(NamedTuple):
    by_logits: np.ndarray
    terms: np.floating  # what its rounding errors are relative to: assert_no_worse_than_torch


def _through_softmax(by_log_probability, log_probability, *multiples):
    """Jacobian of log-softmax: d log p_v / d x_u = (u == v) - p_u."""
    if not np.isfinite(by_log_probability).all():
        return Gradient(np.full_like(log_probability, np.nan), REAL(np.nan))
    probability, total = np.exp(log_probability), by_log_probability.sum()
    multiple = max(1, abs(total), *(abs(x) for x in multiples))
    terms = max(np.abs(by_log_probability).max(), probability.max() * multiple)
    return Gradient(by_log_probability - probability * total, terms)


def divergence(name, k, x, y, label=None):
    """D, dD/dx and dD/dy (Gradients) of one row; x, y: logits already over their temperatures."""
    limits = {  # parameters at which a family is defined by its limit
        ("jsd", "beta", 0): "forward_kl",
        ("jsd", "beta", 1): "reverse_kl",
        ("skew_forward_kl", "lam", 0): "forward_kl",
        ("skew_reverse_kl", "lam", 0): "reverse_kl",
        ("alpha", "alpha", 1): "forward_kl",
        ("alpha", "alpha", 0): "reverse_kl",
        ("renyi", "order", 1): "forward_kl",
    }
    for (family, parameter, end), limit in limits.items():
        if name == family and k[parameter] == end:
            name = limit

    if name == "dkd":
        return _dkd(k, x, y, label)
    if name in ("skew_forward_kl", "skew_reverse_kl") and k["lam"] == 1:
        nothing = Gradient(np.zeros_like(x), REAL(0))
        return REAL(0), nothing, nothing  # a distribution against itself
    log_p, log_q = log_softmax(x), log_softmax(y)
    if name in ("alpha", "renyi"):
        e = REAL(k["alpha" if name == "alpha" else "order"])
        summand, k_of_summand = "geometric", {"exponent": e}
    else:
        summand, k_of_summand = name, k
    summands, by_p, by_q = _summands(summand, log_p, log_q, k_of_summand)
    _, equal_p, equal_q = _summands(summand, np.zeros(1), np.zeros(1), k_of_summand)
    value, scale = summands.sum(), REAL(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "alpha":
            value, scale = (value - 1) / (e * (e - 1)), 1 / (e * (e - 1))
        elif name == "renyi":
            value, scale = np.log(value) / (e - 1), 1 / (value * (e - 1))
        return (
            value,
            _through_softmax(by_p * scale, log_p, equal_p[0] * scale),
            _through_softmax(by_q * scale, log_q, equal_q[0] * scale, value),
        )


def _dkd(k, x, y, label):
    """Decoupled KD (Zhao et al. 2022): binary KL of {label, rest}, and KL within the rest."""
    rest = np.arange(len(x)) != label
    if np.isneginf(x[rest]).all() and np.isneginf(y[rest]).all():  # no rest in either; V = 1 too
        nothing = Gradient(np.zeros_like(x), REAL(0))
        return REAL(0), nothing, nothing
    binary_x = np.array([x[label], log_sum_exp(x[rest])])
    binary_y = np.array([y[label], log_sum_exp(y[rest])])
    target, *of_target = divergence("forward_kl", {}, binary_x, binary_y)
    non_target, *of_rest = divergence("forward_kl", {}, x[rest], y[rest])
    w_t, w_n = k["target_weight"], k["non_target_weight"]
    gradients = []
    for logits, t, n in zip((x, y), of_target, of_rest, strict=True):
        out = np.empty_like(logits)
        out[label] = w_t * t.by_logits[0]
        out[rest] = w_t * t.by_logits[1] * np.exp(log_softmax(logits[rest])) + w_n * n.by_logits
        gradients.append(Gradient(out, w_t * t.terms + w_n * n.terms))
    return w_t * target + w_n * non_target, *gradients


# The whole loss ----------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Float64 arrays. Gradients are those of the loss, or of its sum where reduction is "none"."""

    loss: np.ndarray
    student_grad: np.ndarray
    teacher_grad: np.ndarray
    kd: np.ndarray
    ce: np.ndarray
    student_entropy: np.ndarray
    teacher_entropy: np.ndarray
    label_log_prob: np.ndarray
    top1_agreement: np.ndarray
    # Per row, what rounding errors of the gradients are relative to: assert_no_worse_than_torch.
    student_terms: np.ndarray
    teacher_terms: np.ndarray


def _entropy(log_p):
    return -times(np.exp(log_p), log_p).sum()


def distillation(
    student,
    teacher,
    labels=None,
    *,
    divergence_name="forward_kl",
    parameters=None,
    temperature=1.0,
    teacher_temperature=None,
    t_squared=True,
    kd_weight=1.0,
    ce_weight=0.0,
    z_loss_weight=0.0,
    label_smoothing=0.0,
    ignore_index=-100,
    mask_kd=True,
    token_weights=None,
    vocab_size=None,
    reduction="batchmean",
    normalizer=None,
    upstream=1.0,
) -> Truth:
    """distillation_loss by its definition, one row at a time."""
    student, teacher = to_numpy(student), to_numpy(teacher)
    leading = student.shape[:-1]
    V = vocab_size or student.shape[-1]
    s = student.reshape(-1, student.shape[-1])
    t = teacher.reshape(-1, teacher.shape[-1])
    N = len(s)

    def per_row(x, dtype=REAL):
        return np.broadcast_to(to_numpy(x).astype(dtype), leading).reshape(-1)

    parameters = {**DEFAULTS[divergence_name], **(parameters or {})}
    k = {name: v if isinstance(v, bool) else per_row(v) for name, v in parameters.items()}
    ts = per_row(temperature)
    tt = ts if teacher_temperature is None else per_row(teacher_temperature)
    wk, wc, wz, eps = map(per_row, (kd_weight, ce_weight, z_loss_weight, label_smoothing))
    upstream = per_row(upstream)
    w = per_row(1.0 if token_weights is None else token_weights)
    y = None if labels is None else to_numpy(labels).reshape(-1)

    ignored = np.zeros(N, bool) if y is None else y == ignore_index
    in_kd = (w != 0) & ~(ignored & mask_kd)
    in_ce = (w != 0) & ~ignored & (y is not None)

    def share(rows):
        """What each row of a term is multiplied by in the loss."""
        if reduction in ("none", "sum"):
            return np.where(rows, w, 0)
        total = w[rows].sum() if normalizer is None else to_numpy(normalizer).astype(REAL)
        return np.where(rows, w, 0) / total if total != 0 else np.zeros(N, REAL)

    kd_share = share(in_kd) * wk / (V if reduction == "mean" else 1)
    z_share, ce_share = share(in_kd) * wz, share(in_ce) * wc

    total = np.zeros(N, REAL)
    ds, dt = np.zeros_like(s), np.zeros_like(t)
    kd, ce, student_h, teacher_h, label_lp, top1 = (np.zeros(N, REAL) for _ in range(6))
    student_terms, teacher_terms = np.zeros(N, REAL), np.zeros(N, REAL)
    for i in range(N):
        if in_kd[i]:
            x, z = s[i, :V] / ts[i], t[i, :V] / tt[i]
            label = None if y is None else y[i]
            ki = {name: v if isinstance(v, bool) else v[i] for name, v in k.items()}
            value, dx, dz = divergence(divergence_name, ki, x, z, label)
            scale = ts[i] ** 2 if t_squared else REAL(1)
            kd[i] = value * scale
            student_h[i], teacher_h[i] = _entropy(log_softmax(x)), _entropy(log_softmax(z))
            top1[i] = x.argmax() == z.argmax()
            total[i] += times(kd_share[i], kd[i])
            by_x, by_z = kd_share[i] * upstream[i] * scale / np.array([ts[i], tt[i]])
            ds[i, :V] += times(by_x, dx.by_logits)
            dt[i, :V] += times(by_z, dz.by_logits)
            student_terms[i] += abs(times(by_x, dx.terms))
            teacher_terms[i] += abs(times(by_z, dz.terms))
            lse = log_sum_exp(s[i, :V])
            total[i] += times(z_share[i], lse**2)
            by_lse = times(z_share[i] * upstream[i], 2 * lse)
            ds[i, :V] += times(by_lse, np.exp(log_softmax(s[i, :V])))
            student_terms[i] += abs(by_lse)
        if in_ce[i]:
            log_p = log_softmax(s[i, :V])
            label_lp[i] = log_p[y[i]]
            target = np.full(V, eps[i] / V)
            target[y[i]] += 1 - eps[i]
            ce[i] = -times(target, log_p).sum()
            total[i] += times(ce_share[i], ce[i])
            ds[i, :V] += times(ce_share[i] * upstream[i], np.exp(log_p) - target)
            student_terms[i] += abs(ce_share[i] * upstream[i])

    rows = (kd, ce, student_h, teacher_h, label_lp, top1, student_terms, teacher_terms)
    loss = total.reshape(leading) if reduction == "none" else total.sum()
    return Truth(
        np.float64(loss),
        ds.reshape(student.shape).astype(np.float64),
        dt.reshape(teacher.shape).astype(np.float64),
        *(x.reshape(leading).astype(np.float64) for x in rows),
    )


# PyTorch's own error, and the tolerance ----------------------------------------------------------


def _eager_rows(name, k, a, b, labels):
    """The usual eager lines for each divergence, from two tensors of log-probabilities."""

    def kl(of, against):
        return F.kl_div(against, of, log_target=True, reduction="none").sum(-1)

    def log_mixture(beta):
        beta = torch.as_tensor(beta, dtype=a.dtype)
        return torch.logaddexp(b + beta.log(), a + torch.log1p(-beta))

    if name == "forward_kl":
        return kl(b, a)
    if name == "reverse_kl":
        return kl(a, b)
    if name == "jeffreys":
        return k["weight"][..., 0] * kl(b, a) + (1 - k["weight"][..., 0]) * kl(a, b)
    if name == "jsd":
        beta, m = k["beta"][..., 0], log_mixture(k["beta"])
        value = beta * kl(b, m) + (1 - beta) * kl(a, m)
        value = torch.where(beta == 0, kl(b, a), torch.where(beta == 1, kl(a, b), value))
        inner = torch.where((beta == 0) | (beta == 1), torch.ones_like(beta), beta * (1 - beta))
        return value / inner if k["normalized"] else value
    if name == "skew_forward_kl":
        return kl(b, log_mixture(k["lam"]))
    if name == "skew_reverse_kl":
        return kl(a, log_mixture(1 - k["lam"]))
    if name == "tvd":
        return (a.exp() - b.exp()).abs().sum(-1) / 2
    if name in ("alpha", "renyi"):
        e = k["alpha" if name == "alpha" else "order"]
        total, e = (e * b + (1 - e) * a).exp().sum(-1), e[..., 0]
        safe = torch.where((e == 0) | (e == 1), 2, e)  # 0/0 would reach the gradient through where
        value = (total - 1) / (safe * (safe - 1)) if name == "alpha" else total.log() / (safe - 1)
        value = torch.where(e == 1, kl(b, a), value)
        return torch.where(e == 0, kl(a, b), value) if name == "alpha" else value
    if name == "ab":
        p, q, e, f = a.exp(), b.exp(), k["alpha"], k["beta"]
        g = e + f
        return (-(q**e) * p**f / (e * f) + q**g / (f * g) + p**g / (e * g)).sum(-1)
    if name == "dkd":
        hit = F.one_hot(labels.clamp(min=0), a.shape[-1]).bool()
        rest_a, rest_b = a.masked_fill(hit, -torch.inf), b.masked_fill(hit, -torch.inf)
        binary_a, binary_b = (
            torch.stack([x[hit].reshape(labels.shape), rest.logsumexp(-1)], -1)
            for x, rest in ((a, rest_a), (b, rest_b))
        )
        rest_a, rest_b = (x[~hit].reshape(*labels.shape, -1).log_softmax(-1) for x in (a, b))
        weights = (k["target_weight"][..., 0], k["non_target_weight"][..., 0])
        return weights[0] * kl(binary_b, binary_a) + weights[1] * kl(rest_b, rest_a)
    raise AssertionError(name)


def _eager_terms(
    s,
    t,
    labels,
    *,
    divergence_name="forward_kl",
    parameters=None,
    temperature=1.0,
    teacher_temperature=None,
    t_squared=True,
    label_smoothing=0.0,
    ignore_index=-100,
    mask_kd=True,
    token_weights=None,
    vocab_size=None,
    **_,
):
    """Per-row terms and masks, as a user of PyTorch writes them."""
    leading, V = s.shape[:-1], vocab_size or s.shape[-1]

    def column(x):
        return torch.as_tensor(x, dtype=s.dtype).expand(leading)[..., None]

    parameters = {**DEFAULTS[divergence_name], **(parameters or {})}
    k = {name: v if isinstance(v, bool) else column(v) for name, v in parameters.items()}
    ts = column(temperature)
    tt = ts if teacher_temperature is None else column(teacher_temperature)
    a, b = (s[..., :V] / ts).log_softmax(-1), (t[..., :V] / tt).log_softmax(-1)
    log_p = s[..., :V].log_softmax(-1)
    w = column(1.0 if token_weights is None else token_weights)[..., 0]
    ignored = torch.zeros(leading, dtype=torch.bool) if labels is None else labels == ignore_index
    label_log_prob = ce = torch.zeros(leading, dtype=s.dtype)
    if labels is not None:
        label_log_prob = log_p.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
        ce = -(1 - label_smoothing) * label_log_prob - label_smoothing * log_p.mean(-1)
    kd = _eager_rows(divergence_name, k, a, b, labels)
    return {
        "V": V,
        "w": w,
        "in_kd": (w != 0) & ~(ignored & mask_kd),
        "in_ce": (w != 0) & ~ignored & (labels is not None),
        "kd": kd * ts[..., 0] ** 2 if t_squared else kd,
        "ce": ce,
        "z": s[..., :V].logsumexp(-1) ** 2,
        "student_entropy": -(a.exp() * a).sum(-1),
        "teacher_entropy": -(b.exp() * b).sum(-1),
        "label_log_prob": label_log_prob,
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).to(s.dtype),
    }


def _upcast(student, teacher):
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    return tuple(x.detach().to(dtype).requires_grad_() for x in (student, teacher))


def eager(
    student,
    teacher,
    labels=None,
    *,
    kd_weight=1.0,
    ce_weight=0.0,
    z_loss_weight=0.0,
    reduction="batchmean",
    normalizer=None,
    upstream=1.0,
    **options,
):
    """The same loss as a user of PyTorch writes it: (loss, student grad, teacher grad) in float32.

    Half precision logits are converted to float32 first, as careful users do, and the gradients are
    returned before they are rounded back: one tolerance for the arithmetic of every dtype.
    """
    s, t = _upcast(student, teacher)
    terms = _eager_terms(s, t, labels, **options)

    def share(rows):
        w = torch.where(rows, terms["w"], 0)
        if reduction in ("none", "sum"):
            return w
        return w / (w.sum() if normalizer is None else torch.as_tensor(normalizer).to(s.dtype))

    kd = terms["kd"] / terms["V"] if reduction == "mean" else terms["kd"]
    loss = share(terms["in_kd"]) * (kd_weight * kd + z_loss_weight * terms["z"])
    loss = loss + share(terms["in_ce"]) * ce_weight * terms["ce"]
    loss = loss if reduction == "none" else loss.sum()
    upstream = torch.as_tensor(upstream).to(s.dtype).expand(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, (s, t), upstream)


def eager_statistics(student, teacher, labels=None, **options):
    terms = _eager_terms(*_upcast(student, teacher), labels, **options)
    masks = {"ce": "in_ce", "label_log_prob": "in_ce"}
    return {
        field: torch.where(terms[masks.get(field, "in_kd")], terms[field], 0).detach()
        for field in Truth._fields[3:-2]
    }


def assert_no_worse_than_torch(got, truth, torch_result, what, *, terms=None):
    """`got` is within max(2 x PyTorch's own error, 4 units in the last place) of `truth`.

    Losses and statistics (terms=None): errors are relative to the value itself.
    Gradients: relative to `terms`, the largest of the numbers in the row whose difference the
    gradient is: G and p sum(G) in the words of DESIGN; the multiple of p that makes G vanish where
    the rows agree (adding it changes nothing and keeps digits near there); for the teacher also
    q D, since sum(H) = D - sum(G) saves a sweep. A float32 probability near 1 is off by 6e-8, so
    that p - q cannot be right to 1e-7 of itself where both are 1 - 1e-6, unless by luck. Rows that
    nearly agree have a test that holds them to their own size.

    Why these two bounds: twice PyTorch's own error (the worst row of this very input, so that a row
    where PyTorch is lucky is no verdict) is the promise to someone who replaces his eager lines; 4
    units keeps that from demanding the impossible where PyTorch happens to be exact.

    float16 and bfloat16 results are held to the float32 bound, plus the one rounding at the store
    (half a unit of each element), which is stricter than 4 units of their own.
    """
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {truth.shape}"
    value = to_numpy(got).astype(np.float64)
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(value[~finite], truth[~finite])  # inf and NaN where they belong
    truth, value = np.where(finite, truth, 0), np.where(finite, value, 0)
    scale = size = np.abs(truth)
    if terms is not None:
        terms = np.where(np.isfinite(terms), terms, 0)[..., None]
        scale = np.maximum(terms, size.max(-1, keepdims=True, initial=0))

    theirs = to_numpy(torch_result).astype(np.float64)
    error = np.abs(np.where(np.isfinite(theirs), theirs, truth) - truth)
    own = (error / np.where(scale == 0, np.inf, scale)).max(initial=0)
    half = got.dtype in (torch.float16, torch.bfloat16)
    unit = torch.finfo(torch.float32 if half else got.dtype).eps
    bound = SAMPLING * max(2 * own, 4 * unit) * np.broadcast_to(scale, truth.shape)
    if half:
        info = torch.finfo(got.dtype)
        bound = bound + np.maximum(size, info.smallest_normal) * info.eps / 2
    excess = np.abs(value - truth) - bound
    if not (excess <= 0).all():
        at = np.unravel_index(np.where(excess <= 0, 0, excess).argmax(), excess.shape)
        raise AssertionError(
            f"{what}: {(excess > 0).sum()} of {excess.size} wrong; at {tuple(map(int, at))} got "
            f"{value[at]!r}, expected {truth[at]!r}, "
            f"error {abs(value[at] - truth[at]):.3g} > {bound[at]:.3g} "
            f"(PyTorch's own relative error {own:.3g}, unit {unit:.3g})"
        )
