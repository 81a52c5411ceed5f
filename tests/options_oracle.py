"""The float64 truth of distillation_loss's composite options: textbook formulas, differentiated by
PyTorch's autograd. Nothing of the package is used.
"""

import torch


def _kl(a, b):
    """Σ exp(a)·(a − b), of logarithms."""
    return torch.where(a.exp() == 0, 0.0, a.exp() * (a - b)).sum(-1)


def _mixture(x, y, weight):
    return weight * x + (1 - weight) * y


def adaptive_weight(p, q):
    """Share of Σ|p − q| in the head of q: column by column, as the paper's code sorts and sums."""
    weights = []
    for own, other in zip(q.tolist(), p.tolist(), strict=True):
        order = sorted(range(len(own)), key=lambda j: -own[j])
        total, head, everything = 0.0, 0.0, 0.0
        for place, j in enumerate(order):
            total += own[j]
            gap = abs(own[j] - other[j])
            everything += gap
            head += gap if place == 0 or total <= 0.5 else 0.0
        weights.append(head / everything if everything else 0.5)
    return q.new_tensor(weights)


def _dkd(a, b, labels, first, second):
    at = torch.nn.functional.one_hot(labels, a.shape[-1]).bool()
    binary, rest = [], []
    for x in (b, a):
        others = x[~at].reshape(len(x), -1)
        binary.append(torch.stack([x[at], others.logsumexp(-1)], -1))
        rest.append(others.log_softmax(-1))
    return first * _kl(*binary) + second * _kl(*rest)


def divergence(name, a, b, labels=None, first=0.5, second=0.0):
    """(N,) of log-probabilities: a the student's, b the teacher's."""
    p, q = a.exp(), b.exp()
    if name == "forward_kl":
        return _kl(b, a)
    if name == "cross_entropy":
        return -torch.where(q == 0, 0.0, q * a).sum(-1)
    if name == "reverse_kl":
        return _kl(a, b)
    if name in ("jeffreys", "adaptive_kl"):
        if name == "adaptive_kl":
            first = adaptive_weight(p.detach(), q.detach())
        return first * _kl(b, a) + (1 - first) * _kl(a, b)
    if name == "jsd":
        m = _mixture(q, p, first).log()
        return first * _kl(b, m) + (1 - first) * _kl(a, m)
    if name == "skew_forward_kl":
        return _kl(b, _mixture(q, p, first).log())
    if name == "skew_reverse_kl":
        return _kl(a, _mixture(p, q, first).log())
    if name == "alpha":
        return ((q**first * p ** (1 - first)).sum(-1) - 1) / (first * (first - 1))
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "renyi":
        return torch.log((q**first * p ** (1 - first)).sum(-1)) / (first - 1)
    if name == "ab":
        k = first + second
        mixed = q**first * p**second - first / k * q**k - second / k * p**k
        return -mixed.sum(-1) / (first * second)
    assert name == "dkd"
    return _dkd(a, b, labels, first, second)


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))


def loss(
    student,
    teacher,
    labels=None,
    *,
    name="forward_kl",
    first=0.5,
    second=0.0,
    temperature=1.0,
    teacher_temperature=None,
    t_squared=True,
    standardize=False,
    center=None,
    ce_weight=0.0,
    z_loss_weight=0.0,
):
    """(N,) losses in the dtype of the rows, temperatures numbers or tensors that broadcast over
    rows.
    """
    tau = torch.as_tensor(temperature, dtype=student.dtype)
    other = (
        tau
        if teacher_temperature is None
        else torch.as_tensor(teacher_temperature, dtype=student.dtype)
    )
    s, t = student, teacher if center is None else teacher - center
    if standardize:
        s, t = standardized(s), standardized(t)
    a = torch.log_softmax(s / tau.reshape(-1, 1), -1)
    b = torch.log_softmax(t / other.reshape(-1, 1), -1)
    value = divergence(name, a, b, labels, first, second)
    value = value * tau.reshape(-1) ** 2 if t_squared else value
    if ce_weight:
        value = value + ce_weight * torch.nn.functional.cross_entropy(
            student, labels, reduction="none"
        )
    return value + z_loss_weight * torch.logsumexp(student, -1) ** 2
