"""softmax and log_softmax with a temperature."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, logits
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels

FLOATS = {name: dtypes[0] for name, dtypes in DTYPES.items() if "-" not in name}
INF = math.inf

both = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])


def ours(x, log, **options):
    return (kdkernels.log_softmax if log else kdkernels.softmax)(x, **options)


def theirs(x, log, temperature=1.0):
    scaled = x / torch.as_tensor(temperature, dtype=x.dtype)[..., None]
    return scaled.log_softmax(-1) if log else scaled.softmax(-1)


def truth(x, log, temperature=1.0, upstream=None):
    """(output, gradient) by definition."""
    temperature = oracle.to_numpy(torch.as_tensor(temperature).double())[..., None]
    log_p = oracle.log_softmax(oracle.to_numpy(x) / temperature)
    p = np.exp(log_p)
    y = log_p if log else p
    if upstream is None:
        return y.astype(np.float64), None
    g = oracle.to_numpy(upstream)
    if not log:  # through d softmax / d x_u = p_v ((v == u) - p_u)
        g = g * p
    grad = (g - p * g.sum(-1, keepdims=True)) / temperature
    return y.astype(np.float64), grad.astype(np.float64)


def check(x, log, backend, temperature=1.0):
    upstream = logits(*x.shape, dtype=x.dtype, seed=9)
    want, want_grad = truth(x, log, temperature, upstream)
    leaf = x.detach().clone().requires_grad_()
    got = ours(leaf, log, temperature=temperature, backend=backend)
    (grad,) = torch.autograd.grad(got, leaf, upstream)
    assert got.dtype == grad.dtype == x.dtype
    wide = x.detach().double() if x.dtype == torch.float64 else x.detach().float()
    wide.requires_grad_()
    own = theirs(wide, log, temperature)
    (own_grad,) = torch.autograd.grad(own, wide, upstream.to(wide.dtype))
    # log-probabilities near 0 carry the rounding of the row's sum: errors are relative to 1 there.
    oracle.assert_no_worse_than_torch(
        got.detach(), want, own.detach(), "y", terms=np.ones(x.shape[:-1]) if log else None
    )
    # The gradient is a difference of terms of the size of g; p times the sum of g in log_softmax.
    g = np.abs(oracle.to_numpy(upstream)).astype(np.float64)
    terms = (g.sum(-1) if log else g.max(-1)) / np.asarray(torch.as_tensor(temperature).double())
    if x.dtype in (torch.float64, torch.float32):
        oracle.assert_no_worse_than_torch(grad, want_grad, own_grad, "grad", terms=terms)
    else:  # what is saved, here as in PyTorch, is the rounded output
        error = np.abs(grad.double().numpy() - want_grad)
        assert (error <= torch.finfo(x.dtype).eps * terms[..., None]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.05])
@both
def test_values(log, temperature, dtype, backend):
    check(logits(4, 8, 131, dtype=FLOATS[dtype]), log, backend, temperature)


@pytest.mark.parametrize("vocab", [1, 2, 31, 1000, 32000, 50257, 128256])
@both
def test_vocab_sizes(log, vocab, backend):
    check(logits(16 if vocab <= 1000 else 2, vocab), log, backend)


@both
def test_temperature_per_row(log, backend):
    temperature = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 0.1]])
    check(logits(2, 3, 67), log, backend, temperature)
    x = logits(4, 67)
    for same in (torch.tensor(2.0), torch.full((4,), 2.0)):
        assert torch.equal(
            ours(x, log, temperature=2.0, backend=backend),
            ours(x, log, temperature=same, backend=backend),
        )


@both
def test_gradcheck(log, backend):
    x = logits(3, 5, dtype=torch.float64, scale=1.0).requires_grad_()
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ours(x, log, temperature=temperature, backend=backend), (x,)
    )


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1, 1)], ids=str)
@both
def test_shapes(log, shape, backend):
    x = logits(*shape).requires_grad_()
    y = ours(x, log, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    torch.testing.assert_close(y, theirs(x, log))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:64],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(5, -1),
    ],
    ids=["columns", "rows", "transposed", "every other column", "expanded"],
)
@both
def test_strides(log, view, backend):
    x = view(logits(6, 67))
    assert torch.equal(ours(x, log, backend=backend), ours(x.contiguous(), log, backend=backend))
    leaf = x.detach().requires_grad_()
    upstream = view(logits(6, 67, seed=3))  # a strided upstream gradient
    (grad,) = torch.autograd.grad(ours(leaf, log, backend=backend), leaf, upstream)
    dense = x.contiguous().requires_grad_()
    (want,) = torch.autograd.grad(ours(dense, log, backend=backend), dense, upstream.contiguous())
    torch.testing.assert_close(grad, want)


@both
def test_infinities(log, backend):
    x = logits(4, 31)
    x[1, [2, 30]] = -INF
    x[2] = -INF
    x[3, 4] = math.nan
    clean = logits(4, 31)
    y = ours(x.requires_grad_(), log, backend=backend)
    assert (y[1, [2, 30]] == (-INF if log else 0)).all()
    assert y[1, [0, 1, 3]].isfinite().all()
    assert y[2].isnan().all() and y[3].isnan().all()
    assert torch.equal(y[0], ours(clean, log, backend=backend)[0])
    (grad,) = torch.autograd.grad(y, x, logits(4, 31, seed=4))
    assert grad[:2].isfinite().all()
    if not log:
        assert (grad[1, [2, 30]] == 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
@both
def test_large_offsets(log, offset, backend):
    x = logits(3, 257) + offset
    check(x, log, backend, 1.7)


@pytest.mark.parametrize("dtype", FLOATS)
@both
def test_rows_alone_and_threads(log, dtype, backend):
    """Bitwise: the same call twice; in C++ also a row alone, and with 1 and 2 threads."""
    x, upstream = (logits(13, 131, dtype=FLOATS[dtype], seed=seed) for seed in (1, 2))

    def call(rows=slice(None)):
        leaf = x[rows].clone().requires_grad_()
        y = ours(leaf, log, temperature=1.7, backend=backend)
        return y.detach(), *torch.autograd.grad(y, leaf, upstream[rows].clone())

    whole = call()
    assert all(map(torch.equal, whole, call()))
    if backend == "reference":
        return
    for row in (0, 5, 12):
        for a, b in zip(whole, call(slice(row, row + 1)), strict=True):
            assert torch.equal(a[row : row + 1], b)
    torch.set_num_threads(2)
    assert all(map(torch.equal, whole, call()))


@both
def test_autograd_contract(log, backend):
    """No mutation; two backwards with different upstreams; double backward refused."""
    x = logits(4, 67)
    before = x.clone()
    x.requires_grad_()
    y = ours(x, log, temperature=2.0, backend=backend)
    for seed in (1, 2, 1):
        upstream = logits(4, 67, seed=seed)
        kept = upstream.clone()
        (grad,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        np.testing.assert_allclose(grad, truth(before, log, 2.0, upstream)[1], atol=3e-6)
        assert torch.equal(upstream, kept)
    assert torch.equal(x, before) and x._version == 0
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


@both
def test_modes(log, backend):
    x = logits(4, 67).requires_grad_()
    want = ours(x, log, backend=backend).detach()
    with torch.no_grad():
        assert torch.equal(ours(x, log, backend=backend), want)
    with torch.inference_mode():
        assert torch.equal(ours(x, log, backend=backend), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x, log, backend=backend), want)


@both
def test_modules(log, backend):
    x = logits(4, 67)
    make = kdkernels.LogSoftmax if log else kdkernels.Softmax
    module = make(temperature=2.0, backend=backend)
    assert torch.equal(module(x), ours(x, log, temperature=2.0, backend=backend))
    assert torch.equal(module(x, temperature=3.0), ours(x, log, temperature=3.0, backend=backend))
    assert "temperature=2.0" in repr(module)


@both
def test_compiled(log, backend):
    """Full graph; 20 temperatures, one graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = logits(4, 67).requires_grad_()
    function = torch.compile(
        lambda x, t: ours(x, log, temperature=t, backend=backend), fullgraph=True, backend=counter
    )
    for temperature in torch.linspace(0.5, 5, 20):
        y = function(x, temperature)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        want = ours(x, log, temperature=temperature, backend=backend)
        (want_grad,) = torch.autograd.grad(want.square().sum(), x)
        torch.testing.assert_close((y, grad), (want, want_grad))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("tensor", [None, torch.tensor([2.0]), torch.rand(4) + 0.5])
@both
def test_opcheck(log, tensor):
    x = logits(4, 67, dtype=torch.bfloat16)
    ops = torch.ops.kdkernels
    torch.library.opcheck(ops.softmax.default, (x, 2.0, tensor, log))
    y = ops.softmax(x, 2.0, tensor, log)
    torch.library.opcheck(ops.softmax_backward.default, (x, y, 2.0, tensor, log))


def test_meta():
    x = torch.empty(4, 67, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = kdkernels.softmax(x)
    y.sum().backward()
    assert y.shape == (4, 67) and y.dtype == torch.bfloat16 and x.grad.shape == (4, 67)


X = logits(4, 67)
REFUSED = [
    (TypeError, dict(x=[1.0]), "x | list | Tensor"),
    (TypeError, dict(x=X.long()), "x | torch.int64 | float32"),
    (ValueError, dict(x=torch.tensor(1.0)), "x | () | V"),
    (ValueError, dict(x=X[:, :0]), "x | (4, 0)"),
    (ValueError, dict(temperature=0.0), "temperature=0.0 | > 0"),
    (ValueError, dict(temperature=-1.0), "temperature=-1.0 | > 0"),
    (ValueError, dict(temperature=math.nan), "temperature=nan"),
    (ValueError, dict(temperature=torch.ones(3)), "temperature | (3,) | (4,)"),
    (ValueError, dict(temperature=torch.ones((), device="meta")), "temperature | meta | cpu"),
    (ValueError, dict(temperature=torch.ones((), requires_grad=True)), "temperature | requires"),
    (TypeError, dict(temperature="2"), "temperature | str"),
    (ValueError, dict(backend="tpu"), "backend='tpu' | reference"),
]


@pytest.mark.parametrize("error, changed, words", REFUSED, ids=[words for *_, words in REFUSED])
@both
def test_refused(log, error, changed, words):
    call = {"x": X, **changed}
    with pytest.raises(error) as raised:
        ours(call.pop("x"), log, **call)
    for word in words.split(" | "):
        assert word in str(raised.value)


@both
def test_a_temperature_tensor_out_of_range_gives_nan_in_its_row(log, backend):
    y = ours(X, log, temperature=torch.tensor([1.0, 0.0, -1.0, math.nan]), backend=backend)
    assert y.isnan().any(-1).tolist() == [False, True, True, True]


def test_cpp_refuses_another_device():
    with pytest.raises(RuntimeError, match="backend='cpp'"):
        kdkernels.softmax(torch.empty(4, 67, device="meta"), backend="cpp")
