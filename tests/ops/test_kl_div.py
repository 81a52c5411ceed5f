"""kl_div: PyTorch's function, and right where PyTorch's gives NaN."""

import inspect
import itertools
import math
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import logits

import kdkernels

INF = math.inf
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "sum", "batchmean", "mean"]

log_or_not = pytest.mark.parametrize("log_target", [False, True], ids=["probs", "logs"])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as PyTorch: "mean" is no KL


def rows(*shape, dtype=torch.float32, log_target=False, target_dtype=None):
    """Log-probabilities and a target."""
    x = logits(*shape, dtype=torch.float64, seed=1).log_softmax(-1)
    t = logits(*shape, dtype=torch.float64, seed=2).log_softmax(-1)
    return x.to(dtype), (t if log_target else t.exp()).to(target_dtype or dtype)


def truth(x, t, reduction, log_target, upstream=1.0):
    """(loss, gradient of x, gradient of t) by definition, 0 log 0 = 0, extended precision."""
    x, t = oracle.to_numpy(x), oracle.to_numpy(t)
    shape = np.broadcast_shapes(x.shape, t.shape)
    xs, ts = np.broadcast_to(x, shape), np.broadcast_to(t, shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        q, log_q = (np.exp(ts), ts) if log_target else (ts, np.log(ts))
        terms = np.where(q == 0, 0, q * (log_q - xs))
        by_t = np.where(q == 0, 0, (log_q - xs + 1) * (q if log_target else 1))
    share = {"mean": 1 / terms.size, "batchmean": 1 / (x.shape[0] if x.ndim else 1)}
    share = oracle.REAL(share.get(reduction, 1.0))
    upstream = np.broadcast_to(oracle.to_numpy(torch.as_tensor(upstream).double()), shape) * share

    def back(grad, to):
        for _ in range(grad.ndim - to.ndim):
            grad = grad.sum(0)
        axes = tuple(i for i in range(to.ndim) if to.shape[i] == 1)
        return grad.sum(axes, keepdims=True).reshape(to.shape).astype(np.float64)

    loss = terms if reduction == "none" else terms.sum() * share
    return np.float64(loss), back(-q * upstream, x), back(by_t * upstream, t)


def run(function, x, t, upstream=1.0, **options):
    x, t = (v.detach().clone().requires_grad_() for v in (x, t))
    loss = function(x, t, **options)
    up = torch.as_tensor(upstream).to(loss.dtype).expand(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, (x, t), up)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@log_or_not
def test_no_worse_than_torch(log_target, reduction, dtype, backend):
    x, t = rows(13, 131, dtype=dtype, log_target=log_target)
    options = dict(reduction=reduction, log_target=log_target)
    got = run(kdkernels.kl_div, x, t, backend=backend, **options)
    theirs = run(F.kl_div, x, t, **options)
    for ours, want, own in zip(got, truth(x, t, reduction, log_target), theirs, strict=True):
        assert ours.dtype == own.dtype == dtype
        # an element's term and slopes are differences of log-probabilities of up to about 20
        unit = torch.finfo(dtype).eps
        size = np.abs(want).max()
        error = np.abs(ours.double().numpy() - want).max()
        # where a float16 target underflows to 0, PyTorch's slope is NaN
        own_error = np.nanmax(np.abs(own.double().numpy() - want))
        assert error <= max(2 * own_error, 4 * unit * size)


@log_or_not
def test_half_types_are_computed_in_float32(log_target, backend):
    """One rounding, at the end; PyTorch rounds at every step (its sum here is off by percents)."""
    for dtype in (torch.bfloat16, torch.float16):
        x, t = rows(64, 1000, dtype=dtype, log_target=log_target)
        for reduction in ("sum", "batchmean"):
            got = kdkernels.kl_div(
                x, t, reduction=reduction, log_target=log_target, backend=backend
            )
            want = truth(x, t, reduction, log_target)[0]
            assert abs(got.item() - want) <= torch.finfo(dtype).eps / 2 * want * 1.01


EDGES = [  # log-probability, probability of the target, the term, its slopes
    (-INF, 0.0, 0.0, 0.0, 0.0),
    (-1.0, 0.0, 0.0, 0.0, 0.0),
    (-INF, 0.25, INF, -0.25, INF),
    (-1.0, 0.25, 0.25 * (math.log(0.25) + 1), -0.25, math.log(0.25) + 2),
    (0.0, 1.0, 0.0, -1.0, 1.0),
    (INF, 0.0, 0.0, 0.0, 0.0),
    (math.nan, 0.0, 0.0, 0.0, 0.0),
    (-1.0, math.nan, math.nan, math.nan, math.nan),
    (math.nan, 0.5, math.nan, -0.5, math.nan),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@log_or_not
def test_edges(log_target, dtype, backend):
    """Each by hand. PyTorch: NaN in the first, and in the target's slope of every 0."""
    x, q, term, by_x, by_q = (
        torch.tensor(column, dtype=dtype) for column in zip(*EDGES, strict=True)
    )
    t = q.log() if log_target else q
    loss, x_grad, t_grad = run(
        kdkernels.kl_div, x, t, reduction="none", log_target=log_target, backend=backend
    )
    by_t = torch.where(q == 0, 0.0, by_q * q) if log_target else by_q
    torch.testing.assert_close(loss, term, equal_nan=True)
    torch.testing.assert_close(x_grad, by_x, equal_nan=True)
    torch.testing.assert_close(t_grad, by_t, equal_nan=True)
    assert F.kl_div(x[:1], t[:1], reduction="none", log_target=log_target).isnan()


@log_or_not
def test_softmax_below_a_target_of_zero(log_target, backend):
    """A padded vocabulary end to end: -inf logits on both sides, gradients finite through both."""
    x, t = (logits(3, 31, seed=seed) for seed in (1, 2))
    x[:, 20:], t[:, 20:] = -INF, -INF
    x.requires_grad_(), t.requires_grad_()
    target = t.log_softmax(-1) if log_target else t.softmax(-1)
    loss = kdkernels.kl_div(
        x.log_softmax(-1), target, reduction="batchmean", log_target=log_target, backend=backend
    )
    loss.backward()
    want = oracle.distillation(x, t)
    assert loss.item() == pytest.approx(float(want.loss), rel=1e-6)
    np.testing.assert_allclose(x.grad, want.student_grad, atol=1e-7)
    np.testing.assert_allclose(t.grad, want.teacher_grad, atol=1e-6)


SHAPES = [
    ((4, 7), (4, 7)),
    ((4, 7), (7,)),
    ((7,), (4, 7)),
    ((4, 1), (1, 7)),
    ((2, 3, 7), (3, 1)),
    ((4, 7), ()),
    ((), (4, 7)),
    ((), ()),
    ((0, 7), (7,)),
    ((3, 0), (3, 1)),
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_broadcasting(shapes, reduction, backend):
    """Shapes, values and gradients as PyTorch's, and its NaN for a mean of nothing."""
    x, t = -torch.rand(shapes[0]), torch.rand(shapes[1])
    got = run(kdkernels.kl_div, x, t, reduction=reduction, backend=backend)
    want = run(F.kl_div, x, t, reduction=reduction)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dims", [(1, 1), (0, 1), (1, 0)], ids=["rows", "() input", "() target"])
@pytest.mark.parametrize("dtypes", itertools.product(FLOATS, FLOATS), ids=str)
def test_result_dtype(dtypes, dims, reduction, backend):
    x = -torch.ones((3,) * dims[0], dtype=dtypes[0])
    t = torch.ones((3,) * dims[1], dtype=dtypes[1])
    got = run(kdkernels.kl_div, x, t, reduction=reduction, backend=backend)
    want = run(F.kl_div, x, t, reduction=reduction)
    assert [v.dtype for v in got] == [v.dtype for v in want]


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_deprecated_arguments(reduction, reduce, size_average, backend):
    """Values and warnings of PyTorch's own, by position as old code passes them."""
    x, t = rows(4, 7)
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        want = F.kl_div(x, t, size_average, reduce, reduction)
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        got = kdkernels.kl_div(x, t, size_average, reduce, reduction, backend=backend)
    torch.testing.assert_close(got, want)
    assert [w.category for w in ours] == [w.category for w in theirs]


def test_signatures_are_pytorchs():
    """The same parameters in the same order with the same defaults; ours come after."""
    for ours, theirs in (
        (kdkernels.kl_div, F.kl_div),
        (kdkernels.KLDivLoss.__init__, torch.nn.KLDivLoss.__init__),
    ):
        mine = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
        want = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        assert mine[: len(want)] == want and mine[len(want) :] == [("backend", None)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@log_or_not
def test_the_module(log_target, reduction, backend):
    x, t = rows(4, 7, log_target=log_target)
    module = kdkernels.KLDivLoss(reduction=reduction, log_target=log_target, backend=backend)
    assert isinstance(module, torch.nn.KLDivLoss)
    torch.testing.assert_close(
        module(x, t), torch.nn.KLDivLoss(reduction=reduction, log_target=log_target)(x, t)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@log_or_not
def test_gradcheck(log_target, reduction, backend):
    """Both gradients, broadcast."""
    x, t = rows(3, 5, dtype=torch.float64, log_target=log_target)
    t = t[:1]

    def loss(x, t):
        return kdkernels.kl_div(x, t, reduction=reduction, log_target=log_target, backend=backend)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), t.clone().requires_grad_()))


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@log_or_not
def test_autograd_contract(log_target, reduction, backend):
    """No mutation; two backwards with different upstreams; double backward refused."""
    x, t = rows(4, 67, log_target=log_target)
    before = x.clone(), t.clone()
    x.requires_grad_(), t.requires_grad_()
    options = dict(reduction=reduction, log_target=log_target)
    loss = kdkernels.kl_div(x, t, backend=backend, **options)
    for seed in (1, 2, 1):
        upstream = logits(*loss.shape, seed=seed)
        got = torch.autograd.grad(loss, (x, t), upstream, retain_graph=True)
        _, *want = truth(*before, reduction, log_target, upstream)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-6)
    assert torch.equal(x, before[0]) and torch.equal(t, before[1])
    assert x._version == t._version == 0
    grads = torch.autograd.grad(loss.sum(), (x, t), create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(grad.square().sum(), (x, t), retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("who", ["input", "target"])
def test_one_gradient_alone(who, backend):
    x, t = rows(4, 67)
    leaf = (x if who == "input" else t).requires_grad_()
    kdkernels.kl_div(x, t, reduction="sum", backend=backend).backward()
    want = truth(x, t, "sum", False)[1 if who == "input" else 2]
    np.testing.assert_allclose(leaf.grad, want, rtol=1e-5, atol=1e-6)
    assert (t if who == "input" else x).grad is None


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:64],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x[:, ::3],
        lambda x: x[:1].expand(5, -1),
        lambda x: x.unflatten(0, (2, 3))[:, :2],
    ],
    ids=["columns", "rows", "transposed", "every third", "expanded", "no 2-d view"],
)
def test_strides(view, backend):
    x, t = rows(6, 67)
    for a, b in ((view(x), view(t)), (view(x).contiguous(), view(t)), (view(x), view(t).clone())):
        got = run(kdkernels.kl_div, a, b, reduction="none", backend=backend)
        want = run(kdkernels.kl_div, a.clone(), b.clone(), reduction="none", backend=backend)
        assert all(map(torch.equal, got, want))
        torch.testing.assert_close(
            kdkernels.kl_div(a, b, reduction="sum", backend=backend),
            F.kl_div(a, b, reduction="sum"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@log_or_not
def test_threads(log_target, dtype, backend):
    """Bitwise the same twice and, in C++, with 1 and 2 threads; blocks with odd ends."""
    x, t = rows(3, 100003, dtype=dtype, log_target=log_target)

    def call():
        return [
            *run(kdkernels.kl_div, x, t, reduction="sum", log_target=log_target, backend=backend),
            kdkernels.kl_div(x, t, reduction="none", log_target=log_target, backend=backend),
        ]

    one = call()
    assert all(map(torch.equal, one, call()))
    if backend == "cpp":
        torch.set_num_threads(2)
        assert all(map(torch.equal, one, call()))


def test_autocast(backend):
    """As PyTorch: kl_div runs in float32."""
    x, t = rows(4, 67, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for reduction in REDUCTIONS:
            got = kdkernels.kl_div(x, t, reduction=reduction, backend=backend)
            want = F.kl_div(x, t, reduction=reduction)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled(reduction, backend):
    torch._dynamo.reset()
    x, t = rows(4, 67)
    want = run(kdkernels.kl_div, x, t, reduction=reduction, backend=backend)
    x.requires_grad_(), t.requires_grad_()
    loss = torch.compile(kdkernels.kl_div, fullgraph=True, backend="aot_eager")(
        x, t, reduction=reduction, backend=backend
    )
    grads = torch.autograd.grad(loss, (x, t), torch.ones_like(loss))
    torch.testing.assert_close((loss, *grads), want)
    torch._dynamo.reset()


@log_or_not
def test_opcheck(log_target):
    x, t = rows(4, 67, dtype=torch.bfloat16, target_dtype=torch.float32, log_target=log_target)
    ops = torch.ops.kdkernels
    torch.library.opcheck(ops.kl_div.default, (x, t, log_target))
    torch.library.opcheck(ops.kl_div_sum.default, (x, t, log_target))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.kl_div_backward.default, (torch.rand(4, 67), x, t, log_target, *wanted)
        )


def test_meta():
    x = torch.empty(4, 67, device="meta", requires_grad=True)
    loss = kdkernels.kl_div(x, torch.empty(4, 67, device="meta"), reduction="batchmean")
    loss.backward()
    assert loss.shape == () and x.grad.shape == (4, 67)


X, T = rows(4, 67)
REFUSED = [
    (TypeError, dict(input=[1.0]), "input | list | Tensor"),
    (TypeError, dict(target=T.long()), "target | torch.int64 | float32"),
    (RuntimeError, dict(target=T[:3]), "target | (3, 67) | (4, 67)"),
    (RuntimeError, dict(target=T.to("meta")), "target | meta | cpu"),
    (ValueError, dict(reduction="average"), "reduction='average' | batchmean"),
    (ValueError, dict(backend="tpu"), "backend='tpu' | reference"),
]


@pytest.mark.parametrize("error, changed, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_refused(error, changed, words):
    with pytest.raises(error) as raised:
        kdkernels.kl_div(**{"input": X, "target": T, "reduction": "sum", **changed})
    for word in words.split(" | "):
        assert word in str(raised.value)


def test_cpp_refuses_another_device():
    with pytest.raises(RuntimeError, match="backend='cpp'"):
        kdkernels.kl_div(X.to("meta"), T.to("meta"), reduction="sum", backend="cpp")
