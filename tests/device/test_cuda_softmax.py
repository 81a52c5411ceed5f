"""softmax's and log_softmax's CUDA kernels, executed as PTX on the CPU."""

import emulate
import pytest
import torch
from cases import logits

import kdkernels

REASON = emulate.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


# 1: nothing to normalise; 131: a warp a row, rows that start anywhere in a chunk; 2056: a block
# a row;
# 50257 (odd): a cluster on sm_90.
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize(
    "vocab, dtype, arch",
    [
        (1, torch.float32, "sm_90"),
        (131, torch.float32, "sm_90"),
        (2056, torch.bfloat16, "sm_90"),
        (50257, torch.float16, "sm_90"),
        (131, torch.bfloat16, "sm_80"),
    ],
)
def test_values_and_gradient(log, vocab, dtype, arch):
    x, upstream = logits(3, vocab, dtype=dtype), logits(3, vocab, dtype=dtype, seed=1)
    op = kdkernels.log_softmax if log else kdkernels.softmax

    def run(y):
        y = y.clone().requires_grad_()
        out = op(y, temperature=1.5)
        return out.detach(), torch.autograd.grad(out, y, upstream.to(y.dtype))[0]

    (out, grad), record = emulate.cuda(run, x, arch=arch)
    record.assert_clean()
    assert record.launches == 2
    wide = (torch.log_softmax if log else torch.softmax)(x.double() / 1.5, -1)
    g = upstream.double()
    y = out.double()  # the gradient is a function of the rounded output
    if log:
        expected = (g - y.exp() * g.sum(1, keepdim=True)) / 1.5
    else:
        expected = y * (g - (y * g).sum(1, keepdim=True) / y.sum(1, keepdim=True)) / 1.5
    unit = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(out.double(), wide, rtol=unit / 2 + 5e-7, atol=tiny)
    scale = expected.abs().amax().item() + 1e-30
    torch.testing.assert_close(grad.double(), expected, rtol=unit / 2 + 2e-6, atol=scale * 2e-6)
    elements = x.numel() * x.element_size()
    assert record.arguments["x"].read <= 1.02 * elements
    assert record.arguments["output"].read <= 1.02 * elements
    assert record.arguments["gradient"].written <= 1.02 * elements


def test_infinities():
    """−inf has probability 0; a row of nothing else, or with +inf or NaN, is NaN."""
    x = torch.zeros(4, 40)
    x[0, 3], x[1], x[2, 5], x[3, 7] = -torch.inf, -torch.inf, torch.inf, torch.nan
    for op in (kdkernels.softmax, kdkernels.log_softmax):
        out, _ = emulate.cuda(op, x)
        torch.testing.assert_close(out, op(x, backend="reference"), equal_nan=True)
