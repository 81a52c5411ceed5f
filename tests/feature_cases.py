"""Features, their float64 truth and what PyTorch itself makes of them, for the device tests."""

import torch
import torch.nn.functional as F

B = 3


def layers(dtype, seed):
    """One of each layout: (B, C, H, W) whose rows start anywhere, and at multiples of 16 bytes;
    channels_last; tokens of whole slots, of every second token, and of a width that fills none;
    vectors.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        random(B, 24, 5, 7),
        random(B, 16, 8, 8),
        random(B, 8, 6, 6).contiguous(memory_format=torch.channels_last),
        random(B, 5, 40),
        random(B, 8, 40)[:, ::2],
        random(B, 3, 37),
        random(B, 64),
    ]


def masks():
    """0 leaves a position out; other weights count; a size of 1 and one weight a sample, too."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.rand(B, 5, 7, generator=generator).round(),
        torch.rand(B, 8, 8, generator=generator).round(),
        torch.rand(B, 6, 6, generator=generator),
        torch.tensor([[1, 1, 0, 0, 1.0]]).expand(B, 5),
        None,
        torch.tensor([[1.0], [0.0], [2.0]]),
        torch.tensor([1, 0, 2.0]),
    ]


def loss_of(
    students,
    teachers,
    *,
    metric,
    mask=None,
    weights=None,
    normalize=None,
    beta=1.0,
    log_variance=None,
    reduction="batchmean",
):
    """The loss in plain torch operations, in the dtype given; autograd does the rest."""
    units = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        dim = 1 if s.dim() > 3 else -1
        s, t = s.movedim(dim, -1), t.to(s.dtype).movedim(dim, -1)
        s, t = (x.reshape(B, -1, x.shape[-1]) for x in (s, t))
        weight = torch.ones(s.shape[:2], dtype=s.dtype)
        if mask is not None and mask[i] is not None:
            weight = mask[i].to(s.dtype)
            weight = weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight[:, None]
            weight = weight.expand(s.shape[:2])
        counted = weight != 0
        s = torch.where(counted[..., None], s, 1.0)
        t = torch.where(counted[..., None], t, 1.0)
        maps = metric == "attention"
        if maps:
            s, t = (
                F.normalize(torch.where(counted, x.square().sum(-1), 0.0), dim=-1) for x in (s, t)
            )
            values = (s - t).square()
        elif metric == "cosine":
            values = 1 - F.cosine_similarity(s, t, dim=-1)
        elif metric == "gaussian_nll":
            variance = log_variance[i].to(s.dtype)
            values = (0.5 * ((s - t).square() * torch.exp(-variance) + variance)).sum(-1)
        else:
            if normalize:
                s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
            if metric == "l2":
                values = F.mse_loss(s, t, reduction="none").sum(-1)
            elif beta == 0:
                values = F.l1_loss(s, t, reduction="none").sum(-1)
            else:
                values = F.smooth_l1_loss(s, t, reduction="none", beta=beta).sum(-1)
        divisor = 1.0
        if reduction in ("batchmean", "mean"):
            divisor = weight.sum()
            if maps and reduction == "batchmean":
                divisor = (weight.sum(1) / counted.sum(1).clamp(min=1)).sum()
            if reduction == "mean" and not maps and metric != "cosine":
                divisor = divisor * s.shape[-1]
        factor = 1.0 if weights is None else weights[i]
        units.append(factor / divisor * (weight * values).sum(1))
    return torch.stack(units) if reduction == "none" else torch.stack(units).sum()


def differentiated(op, students, teachers, log_variance=None, upstream=None, **options):
    """(loss, gradients) with respect to the students and log-variances."""
    leaves = [x.detach().requires_grad_() for x in students]
    if log_variance is not None:
        log_variance = [x.detach().requires_grad_() for x in log_variance]
        options["log_variance"] = log_variance
    loss = op(leaves, teachers, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    grads = torch.autograd.grad(loss, [*leaves, *(log_variance or [])], upstream)
    return loss.detach(), list(grads)


def assert_true(got, students, teachers, log_variance=None, upstream=None, **options):
    """Value and gradients: no worse than twice PyTorch's own, or 4 units in the last place of the
    largest.
    """
    wide = [[x.double() for x in xs] for xs in (students, teachers)]
    variance = None if log_variance is None else [x.double() for x in log_variance]
    truth = differentiated(loss_of, *wide, variance, upstream, **options)
    own = differentiated(
        loss_of, students, [x.float() for x in teachers], log_variance, upstream, **options
    )
    pairs = [("loss", got[0], truth[0], own[0])]
    names = [f"gradient {i}" for i in range(len(truth[1]))]
    pairs += zip(names, got[1], truth[1], own[1], strict=True)
    for name, mine, exact, torchs in pairs:
        unit = 4 * torch.finfo(mine.dtype).eps * exact.abs().max().clamp(min=1e-6)
        bound = 2 * (torchs.double() - exact).abs().nan_to_num(nan=0).max() + unit
        error = (mine.double() - exact).abs().max()
        assert error <= bound, f"{name}: {error:.2e}, accepted {bound:.2e}"


# (metric, options): the smallest set that reaches every line of the kernels.
CASES = [
    ("l2", {}),
    ("smooth_l1", dict(beta=0.5)),
    ("gaussian_nll", {}),
    ("cosine", {}),
    ("smooth_l1", dict(normalize="l2", beta=0.0)),
    ("l2", dict(normalize="l2")),
    ("attention", {}),
]
# (dtype, masked, reduction)
KINDS = [
    (torch.float32, False, "batchmean"),
    (torch.bfloat16, True, "mean"),
    (torch.float16, True, "batchmean"),
    (torch.float32, True, "none"),
]


def case(metric, options, dtype, masked, reduction, only=range(7)):
    """(students, teachers, options) of some layers, with NaN where a mask covers it."""
    students, teachers = layers(dtype, 1), layers(dtype, 2)
    options = dict(options, metric=metric, reduction=reduction, weights=[1, 2, 0.5, 3, 1, 1, 1.5])
    if masked:
        options["mask"] = masks()
        students[0].movedim(1, -1)[options["mask"][0] == 0] = torch.nan
        teachers[6][1] = torch.inf
    if metric == "gaussian_nll":
        channels = [x.shape[1 if x.dim() > 3 else -1] for x in students]
        options["log_variance"] = [torch.linspace(-0.5, 0.5, n) for n in channels]
    if reduction == "none":
        options["upstream"] = torch.linspace(-1, 1, len(students) * B).reshape(-1, B)
    for name in ("weights", "mask", "log_variance", "upstream"):
        if name in options:
            chosen = [options[name][i] for i in only]
            options[name] = torch.stack(chosen) if name == "upstream" else chosen
    return [students[i] for i in only], [teachers[i] for i in only], options
