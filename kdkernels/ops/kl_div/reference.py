"""Plain torch implementation of the kl_div ops: any device and dtype; also their fake kernels.

Both tensors have the broadcast shape; computed in float32, or float64 where either is.
"""

import torch
from torch import Tensor


def kl_div(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    """Every element's term, in the wider of the two dtypes."""
    return _terms(input, target, log_target).to(torch.promote_types(input.dtype, target.dtype))


def kl_div_sum(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    """The sum of the terms, (), in the dtype computed in."""
    return _terms(input, target, log_target).sum()


def kl_div_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    log_target: bool,
    input_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and target in their dtypes, empty where not asked for."""
    x, t = _computed(input, target)
    g = grad.to(x.dtype)
    weight = torch.exp(t) if log_target else t
    log_t = t if log_target else torch.log(t)
    slope = g * (log_t - x + 1)
    # At zero probability 0, so that a softmax below sees the limit 0·log 0 = 0 and not 0·∞.
    input_slope = torch.where(weight == 0, 0.0, -g * weight)
    target_slope = torch.where(weight == 0, 0.0, weight * slope if log_target else slope)
    return (
        input_slope.to(input.dtype).contiguous() if input_grad else input.new_empty(0),
        target_slope.to(target.dtype).contiguous() if target_grad else target.new_empty(0),
    )


def _terms(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    x, t = _computed(input, target)
    weight = torch.exp(t) if log_target else t
    log_t = t if log_target else torch.log(t)
    return torch.where(weight == 0, 0.0, weight * (log_t - x)).contiguous()


def _computed(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.promote_types(input.dtype, target.dtype)
    dtype = torch.promote_types(both, torch.float32)
    return input.to(dtype), target.to(dtype)
