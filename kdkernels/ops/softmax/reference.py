"""Plain torch implementation of the softmax ops: any device and dtype; also their fake kernels."""

import torch
from torch import Tensor


def softmax(x: Tensor, temperature: float, temperature_tensor: Tensor | None, log: bool) -> Tensor:
    """softmax or log-softmax of x (N, V)/temperature over V, in x's dtype."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = y.amax(1, keepdim=True)
    anchor = torch.where(torch.isneginf(largest), 0.0, largest)
    y = (y - anchor) / _column(temperature, temperature_tensor, y)
    y = torch.log_softmax(y, 1) if log else torch.softmax(y, 1)
    return y.to(x.dtype).contiguous()


def softmax_backward(
    grad: Tensor, output: Tensor, temperature: float, temperature_tensor: Tensor | None, log: bool
) -> Tensor:
    """Gradient of x from the output's, both (N, V), in the output's dtype."""
    compute = torch.promote_types(output.dtype, torch.float32)
    g, y = grad.to(compute), output.to(compute)
    if log:
        x_grad = g - torch.exp(y) * g.sum(1, keepdim=True)
    else:
        # Shifted by one column's, g keeps its digits where that column has nearly all probability.
        g = g - g.gather(1, y.argmax(1, keepdim=True))
        # A zero probability wins over an infinite g. Rounded, y does not add up to 1.
        mean = torch.where(y == 0, 0.0, y * g).sum(1, keepdim=True) / y.sum(1, keepdim=True)
        x_grad = torch.where(y == 0, 0.0, y * (g - mean))
    x_grad = x_grad / _column(temperature, temperature_tensor, y)
    return x_grad.to(output.dtype).contiguous()


def _column(temperature: float, tensor: Tensor | None, like: Tensor) -> Tensor:
    """The temperature as (1, 1) or (N, 1), NaN where it is not positive."""
    if tensor is None:
        return like.new_full((1, 1), temperature)
    return torch.where(tensor > 0, tensor, torch.nan)[:, None]
