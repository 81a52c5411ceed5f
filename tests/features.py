"""float64 truth of feature distances, by torch's own functions sample by sample and autograd, and
the ways a feature can lie in memory.
"""

import torch
import torch.nn.functional as F

METRICS = ("l2", "smooth_l1", "cosine", "attention", "gaussian_nll", "l2 of units", "L1 of units")


def options(metric):
    """What feature_loss is told for one of METRICS."""
    if metric == "l2 of units":
        return {"metric": "l2", "normalize": "l2"}
    if metric == "L1 of units":
        return {"metric": "smooth_l1", "normalize": "l2", "beta": 0.0}
    return {"metric": metric, "beta": 0.75} if metric == "smooth_l1" else {"metric": metric}


def channel(x):
    return 1 if x.dim() > 3 else x.dim() - 1


def distance(s, t, metric, log_variance):
    """Per position (positions, channels) -> (positions,)."""
    if metric == "l2":
        return F.mse_loss(s, t, reduction="none").sum(-1)
    if metric == "smooth_l1":
        return F.smooth_l1_loss(s, t, beta=0.75, reduction="none").sum(-1)
    if metric == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=-1)
    if metric == "l2 of units":
        return F.mse_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1), reduction="none").sum(-1)
    if metric == "L1 of units":
        return F.l1_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1), reduction="none").sum(-1)
    if metric == "attention":
        s, t = (F.normalize(x.pow(2).mean(-1), dim=0) for x in (s, t))
        return (s - t).pow(2)
    variance = log_variance.exp().expand(s.shape)
    return F.gaussian_nll_loss(s, t, variance, eps=0.0, reduction="none").sum(-1)


def layer(s, t, metric, mask=None, log_variance=None, reduction="batchmean"):
    """One layer's loss, (samples,) under "none"."""
    dim, dtype = channel(s), s.dtype
    s, t = s.movedim(dim, -1), t.movedim(dim, -1)
    if mask is None:
        mask = torch.ones(s.shape[:-1])
    elif mask.shape == s.shape[:1]:
        mask = mask.reshape([-1] + [1] * (s.dim() - 2))
    mask = mask.to(dtype).expand(s.shape[:-1])
    losses, weights, samples = [], [], []
    for one_s, one_t, one_mask in zip(s, t, mask, strict=True):
        one_mask = one_mask.reshape(-1)
        counted = one_mask.nonzero()[:, 0]
        one_s, one_t = (x.reshape(len(one_mask), -1)[counted] for x in (one_s, one_t))
        weight = one_mask[counted]
        values = distance(one_s, one_t.to(dtype), metric, log_variance)
        losses.append((values * weight).sum())
        weights.append(weight.sum())
        samples.append(weight.mean() if len(weight) else weight.sum())
    loss = torch.stack(losses) if losses else s.sum()[None][:0]
    if reduction in ("none", "sum"):
        return loss if reduction == "none" else loss.sum()
    of_samples = metric == "attention" and reduction == "batchmean"
    divisor = sum(samples if of_samples else weights, torch.zeros((), dtype=dtype))
    if reduction == "mean" and metric not in ("cosine", "attention"):
        divisor = divisor * s.shape[-1]
    return loss.sum() / (divisor if divisor != 0 else 1)


def lie_as(x, layout):
    """The same numbers, elsewhere in memory."""
    if layout == "channels_last":
        order = [0, *range(2, x.dim()), 1]
        return x.permute(order).contiguous().permute([0, x.dim() - 1, *range(1, x.dim() - 1)])
    if layout == "slice":  # rows and positions that do not merge
        around = torch.full([n + 2 for n in x.shape], torch.nan, dtype=x.dtype)
        inside = around[tuple(slice(1, -1) for _ in x.shape)]
        return inside.copy_(x)
    if layout == "reversed":  # the sample is the fastest
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    assert layout == "contiguous"
    return x.contiguous()


LAYOUTS = ("contiguous", "channels_last", "slice", "reversed")
