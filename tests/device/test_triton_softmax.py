"""softmax and log_softmax in Triton, executed as PTX on the CPU."""

import math

import numpy as np
import oracle
import pytest
import torch
from broken import broken_copy
from cases import logits

import kdkernels

pytest.importorskip("triton", reason="Triton is not installed")

both = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])


def ours(x, log, **options):
    return (kdkernels.log_softmax if log else kdkernels.softmax)(x, backend="triton", **options)


# 1: the smallest; 1000: one tile, read once; 1001: odd, so shifted; 2049: two tiles; 9000: chunks.
@both
@pytest.mark.parametrize(
    "columns, dtype",
    [(1, "float32"), (1000, "bfloat16"), (1001, "float32"), (2049, "float16"), (9000, "bfloat16")],
)
def test_values(columns, dtype, log, triton_runs):
    x = logits(4, columns, dtype=getattr(torch, dtype))
    x[1, : columns // 2] = -math.inf
    upstream = logits(4, columns, dtype=x.dtype, seed=9)
    temperature = torch.linspace(0.7, 2, 4)
    leaf = x.clone().requires_grad_()
    with triton_runs() as record:
        got = ours(leaf, log, temperature=temperature)
        (grad,) = torch.autograd.grad(got, leaf, upstream)
    assert got.dtype == grad.dtype == x.dtype
    log_p = oracle.log_softmax(oracle.to_numpy(x) / oracle.to_numpy(temperature)[:, None])
    want = (log_p if log else np.exp(log_p)).astype(np.float64)
    wide = x.float().requires_grad_()
    own = wide / temperature[:, None]
    own = own.log_softmax(-1) if log else own.softmax(-1)
    ones = np.ones(4)
    oracle.assert_no_worse_than_torch(
        got.detach(), want, own.detach(), "y", terms=ones if log else None
    )
    # From the output as it was rounded, which is what is kept.
    y, g = got.detach().double(), upstream.double()
    if log:
        exact = g - y.exp() * g.sum(1, keepdim=True)
        size = g.abs().amax(1) + y.exp().amax(1) * g.sum(1).abs()
    else:
        exact = torch.where(y == 0, 0, y * (g - (y * g).sum(1, keepdim=True) / y.sum(1)[:, None]))
        size = (y * g.abs()).amax(1)
    exact = exact / temperature.double()[:, None]
    unit = 8 * 2**-23 + (torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0)
    error = (grad.double() - exact).abs() / (size / temperature)[:, None].clamp(min=1e-30)
    assert error.max() < unit
    assert record.launches == (2 if columns <= 1001 else 4)


@both
def test_bad_rows_and_temperatures_are_nan(log, triton_runs):
    x = logits(5, 40)
    x[0] = -math.inf
    x[1, 3] = math.inf
    x[2, 30] = math.nan
    temperature = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0])
    with triton_runs():
        got = ours(x, log, temperature=temperature)
    assert got.isnan().all(1).tolist() == [True, True, True, True, False]


def test_the_gradient_keeps_its_digits_near_certainty(triton_runs):
    """g far from 0, p nearly 1 in one column of the second chunk."""
    x = logits(2, 9000)
    x[:, 8500] = 40
    upstream = logits(2, 9000, seed=3) + 1e4
    leaf = x.clone().requires_grad_()
    with triton_runs():
        (got,) = torch.autograd.grad(ours(leaf, False), leaf, upstream)
    leaf_64 = x.double().requires_grad_()
    # Only differences of the upstream gradient matter, and even float64 loses some at 1e4.
    from_there = upstream.double() - upstream[:, 8500:8501].double()
    (want,) = torch.autograd.grad(leaf_64.softmax(-1), leaf_64, from_there)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-18)


def test_traffic(triton_runs):
    """Rows of one tile: 4 bytes an element of bfloat16 forward; longer ones 6, and 10 backward."""
    for columns, forward, backward in ((1024, 4, 6), (16384, 6, 10)):
        x = logits(2, columns, dtype=torch.bfloat16)
        leaf = x.clone().requires_grad_()
        with triton_runs(check="traffic") as record:
            y = ours(leaf, False)
        big = sum(record.arguments[key].read + record.arguments[key].written for key in ("x", "y"))
        assert big == forward * x.numel()
        upstream = torch.ones_like(x)
        with triton_runs(check="traffic") as record:
            torch.autograd.grad(y, leaf, upstream)
        keys = ("grad", "output", "x_grad")
        big = sum(record.arguments[key].read + record.arguments[key].written for key in keys)
        assert big == backward * x.numel()


# The function a mistake is in, the text and instead of it.
BROKEN = {
    "bound": ("load", "inside(start, shift, vocab,", "inside(start, shift, vocab + 4,"),
    "chunk": ("_write", "here = each < chunks", "here = each < chunks - 1"),
    "moments' tail": ("_moments", "range(low, high)", "range(low, 1)"),
    "gradient's chunk": ("_gradient", "here = each < chunks", "here = each < chunks - 1"),
}


def judge(kernels, runs):
    """Rows of two chunks, the last of a masked tile, through a module of kernels."""
    x, upstream = logits(2, 9000), logits(2, 9000, seed=3)
    exact = x.double().requires_grad_()
    want = exact.softmax(-1)
    y = want.detach().float()
    with runs():
        got = kernels.softmax(x, 1.0, None, False)
        grad = kernels.softmax_backward(upstream, y, 1.0, None, False)
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-4, atol=1e-9)
    (want,) = torch.autograd.grad(want, exact, upstream.double())
    torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("mistake", BROKEN)
def test_mistakes_are_caught(mistake, tmp_path, triton_runs):
    from kdkernels.ops.softmax import triton_kernels

    judge(triton_kernels, triton_runs)
    broken = broken_copy(tmp_path, triton_kernels, *BROKEN[mistake])
    with pytest.raises(AssertionError):
        judge(broken, triton_runs)
