"""The options of distillation_loss that are made of several ops: temperatures with their gradient,
standardize, adaptive_kl, cross_entropy, teacher_center; truth in options_oracle.py.
"""

import math
from unittest import mock

import options_oracle
import pytest
import torch
from cases import labels_for, logits, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import divergences
from kdkernels.divergences import DIVERGENCES, MADE_OF_OTHERS
from kdkernels.ops.distillation_loss import reference

OPS = torch.ops.kdkernels

# Parameters away from the ends of their ranges.
PARAMETERS = {
    "jeffreys": (0.3, 0.0),
    "jsd": (0.3, 0.0),
    "skew_forward_kl": (0.3, 0.0),
    "skew_reverse_kl": (0.3, 0.0),
    "alpha": (0.3, 0.0),
    "renyi": (0.7, 0.0),
    "ab": (0.4, 0.7),
    "dkd": (1.5, 2.0),
}


def made(name):
    make = {**DIVERGENCES, **MADE_OF_OTHERS}[name]
    count = {"ab": 2, "dkd": 2}.get(name, 1 if name in PARAMETERS else 0)
    return make(*PARAMETERS.get(name, ())[:count])


def parameters(name):
    first, second = PARAMETERS.get(name, (0.5, 0.0))
    return dict(name=name, first=first, second=second)


def of_cross_entropy(name):
    return name == "cross_entropy"


def compare(name, student, teacher, backend, *, atol=0.0, **options):
    """Loss and gradients of logits and temperatures of every row against float64 and, for the
    bound, against the same formulas in eager float32.
    """
    labels = labels_for(student)
    upstream = torch.linspace(0.5, 2, len(student))
    with_teacher = not of_cross_entropy(name)

    def differentiate(function, dtype=None, **given):
        taus = (torch.tensor(1.7), torch.linspace(1, 2, len(student)))
        s, t, tau, other = (
            x.detach().to(dtype or x.dtype).clone().requires_grad_()
            for x in (student, teacher, *taus)
        )
        inputs = [s, tau]
        if with_teacher:
            inputs += [t, other]
        else:
            t, other = t.detach(), other.detach()
        value = function(s, t, labels, temperature=tau, teacher_temperature=other, **given)
        grads = torch.autograd.grad(value, inputs, upstream.to(value.dtype))
        return [value.detach(), *grads]

    terms = dict(ce_weight=0.3, z_loss_weight=0.01, **options)
    got = differentiate(
        kdkernels.distillation_loss, divergence=made(name), teacher_grad=with_teacher,
        reduction="none", backend=backend, **terms,
    )  # fmt: skip
    truth, eager = (
        differentiate(options_oracle.loss, dtype, **parameters(name), **terms)
        for dtype in (torch.float64, torch.float32)
    )
    what = ("loss", "student", "temperature", "teacher", "teacher_temperature")
    for of, ours, exact, theirs in zip(what, got, truth, eager, strict=False):
        # Of the largest numbers whose difference a gradient is: T²'s part of a temperature's and
        # q·D in the teacher's are of the loss's size. 16 units: the fused op alone is held to 4 in
        # its own tests.
        size = exact.abs().max()
        if of not in ("loss", "student"):
            size = torch.maximum(size, (upstream * truth[0]).abs().max())
        unit = torch.finfo(torch.float32).eps
        bound = torch.maximum(2 * (theirs - exact).abs().max(), 16 * unit * size) + atol
        # One rounding at the store, and where a deviation's part is added, one more.
        bound = bound + (torch.finfo(ours.dtype).eps * size if ours.dtype == torch.bfloat16 else 0)
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"{of}: {error:.2e} above {bound:.2e} of {size:.2e}"


# 37: odd, less than a block of the C++ kernels (2048); 2500: a whole block and one of odd size.
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardize"])
@pytest.mark.parametrize("name", [*DIVERGENCES, *MADE_OF_OTHERS])
def test_values_and_gradients(name, standardize, backend):
    columns = 37 if backend == "reference" else 2500
    compare(name, *pair(4, columns), backend, standardize=standardize)


@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl"])
def test_bfloat16(name, backend):
    student, teacher = pair(3, 131, dtypes=(torch.bfloat16, torch.bfloat16))
    compare(name, student, teacher, backend, standardize=True)


def test_a_center(backend):
    student, teacher = pair(4, 2500)
    center = logits(2500, seed=5)
    for name in ("cross_entropy", "jsd"):
        got, want = [], []
        for to, function, options in (
            (got, kdkernels.distillation_loss, dict(teacher_center=center, backend=backend)),
            (want, kdkernels.distillation_loss, dict(backend=backend)),
        ):
            s, tau = student.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
            t = teacher.clone() - (center if to is want else 0)
            value = function(s, t, divergence=name, temperature=tau,
                             teacher_temperature=0.3, reduction="none", **options)  # fmt: skip
            to += [value, *torch.autograd.grad(value.sum(), (s, tau))]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_the_centred_logits_never_exist():
    """Forward and backward on the C++ library: nothing of the teacher's size but the gradient."""
    if kdkernels.ops._backend._ext.cpp_error():
        pytest.skip("the C++ library is not built")
    student, teacher = pair(64, 257)
    made_by = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.numel() >= student.numel():
                    if x.untyped_storage().data_ptr() not in known:
                        made_by.append(str(function))
            return out

    student.requires_grad_()
    known = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    with Watch():
        loss = kdkernels.distillation_loss(
            student, teacher, teacher_center=torch.ones(257), backend="cpp"
        )
        loss.backward()
    assert {name.split(".")[1] for name in made_by} <= {"distillation_loss_backward", "detach"}


# gradcheck ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one temperature", "two a row"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardize"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "renyi", "ab", "dkd"])
def test_gradcheck(name, standardize, shared, backend):
    student, teacher = (x.double().requires_grad_() for x in pair(3, 5, scale=1.0))
    labels = labels_for(student)
    one = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    taus = (
        [one]
        if shared
        else [(one.detach() * x).requires_grad_() for x in torch.rand(2, 3).double() + 1]
    )

    def loss(s, t, *taus):
        return kdkernels.distillation_loss(
            s, t, labels, divergence=made(name), temperature=taus[0], teacher_grad=True,
            teacher_temperature=None if shared else taus[1], standardize=standardize,
            token_weights=torch.tensor([1.0, 0.0, 2.0]), ce_weight=0.2, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, teacher, *taus))


def test_gradcheck_of_cross_entropy(backend):
    student, teacher = (x.double() for x in pair(3, 5, scale=1.0))
    center = logits(5, dtype=torch.float64, seed=3)
    tau = torch.rand(3, dtype=torch.float64) + 1

    def loss(s, tau):
        return kdkernels.distillation_loss(
            s, teacher, divergence="cross_entropy", temperature=tau, teacher_temperature=0.5,
            teacher_center=center, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), tau.requires_grad_()))


def test_a_temperature_alone(backend):
    """Neither model requires grad; the gradient is what a small step of the temperature does."""
    student, teacher = (x.double() for x in pair(4, 19))
    tau = torch.tensor(2.0, requires_grad=True)  # float32 beside float64 logits
    loss = kdkernels.distillation_loss(student, teacher, temperature=tau, backend=backend)
    (grad,) = torch.autograd.grad(loss, tau)
    assert grad.dtype == tau.dtype and grad.shape == tau.shape
    above, below = (
        kdkernels.distillation_loss(student, teacher, temperature=x) for x in (2 + 1e-5, 2 - 1e-5)
    )
    torch.testing.assert_close(grad.double(), (above - below) / 2e-5, rtol=1e-5, atol=0)


def test_a_temperature_keeps_its_digits(backend):
    """Over many columns T²'s part and the divergence's cancel, and a log-sum-exp rounded by 6e-7
    shifts every probability: eager float32 is wrong by 2.7e-4 here, this by 2.4e-5.
    """
    student, teacher = pair(2, 65536, scale=2.0)

    def gradient(function, dtype, **options):
        tau = torch.tensor(2.0, dtype=dtype, requires_grad=True)
        value = function(student.to(dtype), teacher.to(dtype), temperature=tau, **options).sum()
        return torch.autograd.grad(value, tau)[0].double()

    exact = gradient(options_oracle.loss, torch.float64)
    eager = gradient(options_oracle.loss, torch.float32)
    got = gradient(kdkernels.distillation_loss, torch.float32, reduction="sum", backend=backend)
    error = (got - exact).abs()
    assert error < 4e-5 * exact.abs() and error < (eager - exact).abs() / 4


# masks -------------------------------------------------------------------------------------------

OPTIONS = {
    "temperatures": {},
    "standardize": dict(standardize=True),
    "adaptive_kl": dict(divergence="adaptive_kl"),
    "cross_entropy": dict(divergence="cross_entropy"),
    "center": dict(teacher_center=torch.linspace(-1, 1, 19)),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_masked_row_adds_nothing(option, bad, backend):
    student, teacher = pair(4, 19)
    labels = labels_for(student)
    labels[2] = -100
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5])

    def run(rows):
        s, t = student[rows].clone(), teacher[rows].clone()
        tau = torch.linspace(1, 2, 4)[rows].clone()
        if len(rows) == 4:
            s[1], t[1], tau[1] = bad, bad, math.nan
            s[2, 3], t[2, 5] = bad, bad
        s.requires_grad_()
        tau.requires_grad_()
        loss = kdkernels.distillation_loss(
            s, t, labels[rows], temperature=tau, teacher_temperature=1.5, ce_weight=0.1,
            token_weights=weights[rows], backend=backend, **OPTIONS[option],
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss, (s, tau), torch.tensor(3.0))]

    loss, by_student, by_tau = run([0, 1, 2, 3])
    want_loss, want_student, want_tau = run([0, 3])
    assert torch.equal(by_student[1:3], torch.zeros(2, 19)) and by_tau[1:3].tolist() == [0, 0]
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(by_student[[0, 3]], want_student)
    torch.testing.assert_close(by_tau[[0, 3]], want_tau)


@pytest.mark.parametrize("option", OPTIONS)
def test_all_masked(option, backend):
    student, teacher = pair(2, 19)
    student.requires_grad_()
    tau = torch.tensor(2.0, requires_grad=True)
    loss = kdkernels.distillation_loss(
        student, teacher, torch.full((2,), -100), temperature=tau, teacher_temperature=1.0,
        backend=backend, **OPTIONS[option],
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (student, tau), torch.tensor(math.nan))
    assert loss == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("option", OPTIONS)
def test_padding_is_not_read(option, backend):
    student, teacher = pair(3, 19)
    options = dict(OPTIONS[option])
    options |= dict(temperature=2.0, reduction="none", backend=backend)
    wide_s, wide_t = (torch.cat([x, torch.full((3, 5), math.nan)], 1) for x in (student, teacher))
    want = kdkernels.distillation_loss_and_grad(student, teacher, **options)
    if option == "center":  # as wide as the teacher
        options["teacher_center"] = torch.cat([options["teacher_center"], torch.ones(5)])
    got = kdkernels.distillation_loss_and_grad(wide_s, wide_t, vocab_size=19, **options)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][:, :19], want[1])
    assert not got[1][:, 19:].any()


def test_no_rows(backend):
    for option, options in OPTIONS.items():
        student, tau = torch.zeros(0, 19, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        loss = kdkernels.distillation_loss(
            student, torch.zeros(0, 19), temperature=tau, teacher_temperature=1.0, backend=backend,
            **options,
        )  # fmt: skip
        grads = torch.autograd.grad(loss, (student, tau))
        assert loss == 0 and grads[0].shape == (0, 19) and grads[1] == 0, option


# the ways to call --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_every_way_agrees(option, backend):
    """In place, loss and gradient together, statistics, any upstream factor, a second backward."""
    student, teacher = pair(3, 19)
    tau = torch.tensor([1.5, 2.0, 0.7], requires_grad=True)
    options = dict(teacher_temperature=1.3, reduction="none", backend=backend, **OPTIONS[option])
    leaf = student.clone().requires_grad_()
    loss, stats = kdkernels.distillation_loss(
        leaf, teacher, temperature=tau, return_stats=True, **options
    )
    torch.testing.assert_close(stats.kd, loss.detach())
    upstream = torch.tensor([1.0, -2.0, 0.0])
    first = torch.autograd.grad(loss, (leaf, tau), torch.ones(3), retain_graph=True)
    second = torch.autograd.grad(loss, (leaf, tau), upstream)
    torch.testing.assert_close(second[0], first[0] * upstream[:, None])
    torch.testing.assert_close(second[1], first[1] * upstream)

    together = kdkernels.distillation_loss_and_grad(
        student, teacher, temperature=tau.detach(), **options
    )
    torch.testing.assert_close(together, (loss.detach(), first[0]))
    if option == "standardize":
        return
    given = student.clone()
    loss = kdkernels.distillation_loss(leaf * 1, teacher, temperature=tau, inplace=True, **options)
    grads = torch.autograd.grad(loss, (leaf, tau), upstream)
    torch.testing.assert_close(grads, second)
    kdkernels.distillation_loss_and_grad(
        given, teacher, temperature=tau.detach(), inplace=True, **options
    )
    torch.testing.assert_close(given, first[0])


def test_reductions_divide_the_temperatures_gradient(backend):
    student, teacher = pair(3, 4, 19)
    weights = torch.rand(3, 4)
    grads = {}
    for reduction, normalizer in (("sum", None), ("batchmean", None), ("mean", None),
                                  ("batchmean", torch.tensor(5.0))):  # fmt: skip
        tau = torch.tensor(2.0, requires_grad=True)
        loss = kdkernels.distillation_loss(
            student, teacher, temperature=tau, token_weights=weights, reduction=reduction,
            normalizer=normalizer, backend=backend,
        )  # fmt: skip
        (grads[reduction, normalizer is None],) = torch.autograd.grad(loss, tau)
    total = grads.pop(("sum", True))
    want = {
        ("batchmean", True): total / weights.sum(),
        ("mean", True): total / weights.sum() / 19,
        ("batchmean", False): total / 5,
    }
    torch.testing.assert_close(grads, want)


def test_double_backward_is_refused(backend):
    student, teacher = pair(2, 7)
    tau = torch.tensor(2.0, requires_grad=True)
    loss = kdkernels.distillation_loss(student, teacher, temperature=tau, backend=backend)
    (grad,) = torch.autograd.grad(loss, tau, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.backward()


def test_rows_are_alone():
    """Bitwise the same alone and among others, on one thread and on two."""
    student, teacher = pair(40, 700)

    def run(rows, option):
        s, tau = student[rows].clone().requires_grad_(), torch.full((len(rows),), 1.5)
        loss = kdkernels.distillation_loss(
            s, teacher[rows], temperature=tau.requires_grad_(), teacher_temperature=1.0,
            reduction="none", **option,
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss.sum(), (s, tau))]

    for option in ({}, dict(standardize=True), dict(divergence="adaptive_kl")):
        torch.set_num_threads(2)
        every = run(range(40), option)
        torch.set_num_threads(1)
        for x, y in zip(run([17], option), every, strict=True):
            assert torch.equal(x[0], y[17])


# standardize -------------------------------------------------------------------------------------


def test_only_the_shape_of_a_standardised_row_matters(backend):
    student, teacher = pair(3, 50)
    want = kdkernels.distillation_loss(student, teacher, standardize=True, backend=backend)
    got = kdkernels.distillation_loss(
        student * 30 + 500, teacher * 0.1 - 7, standardize=True, backend=backend
    )
    torch.testing.assert_close(got, want, rtol=2e-4, atol=0)  # the offset costs digits of its own


@pytest.mark.parametrize("columns", [1, 50])
def test_a_constant_row(columns, backend):
    """Deviation 0: the uniform distribution, and no gradient through the deviation."""
    student = torch.full((2, columns), 3.3).requires_grad_()
    _, teacher = pair(2, columns)
    loss = kdkernels.distillation_loss(
        student, teacher, standardize=True, reduction="none", backend=backend
    )
    q = torch.softmax(options_oracle.standardized(teacher), -1) if columns > 1 else torch.ones(2, 1)
    want = (q * (q * columns).log()).sum(-1)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.isfinite().all()
    if columns == 1:
        assert not grad.any()


def test_a_standardised_row_with_an_infinity_is_nan(backend):
    student, teacher = pair(2, 9)
    student[0, 3] = -math.inf
    loss = kdkernels.distillation_loss(
        student, teacher, standardize=True, reduction="none", backend=backend
    )
    assert loss.isnan().tolist() == [True, False]


# adaptive_kl -------------------------------------------------------------------------------------


def weights_of(backend, student, teacher, tau=1.0):
    function = reference.adaptive_weights if backend == "reference" else OPS.adaptive_weights
    tau = torch.full((1,), tau, dtype=torch.promote_types(student.dtype, torch.float32))
    return function(student, teacher, tau, tau, student.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_head_and_tail(columns, levels, seed, dtype):
    """Few different logits: equal columns, signs of zero and heads that end among them."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randint(-levels, levels + 1, (3, columns), generator=generator) / 4.0
    teacher = torch.where(teacher == 0, -0.0, teacher).to(dtype)
    student = torch.randn(3, columns, generator=generator).to(dtype)
    p, q = (torch.softmax(x.double(), -1) for x in (student, teacher))
    want = options_oracle.adaptive_weight(p, q)
    # Where the cumulative probability comes within a rounding of ½ either side is right.
    clear = (q.sort(1, descending=True).values.cumsum(1) - 0.5).abs().amin(1) > 1e-5
    for backend in ("reference", "cpp"):
        got = weights_of(backend, student, teacher).double()
        torch.testing.assert_close(got[clear], want[clear], rtol=1e-5, atol=1e-6)


# From the definition, by hand: (0.4, 0.3, 0.2, 0.1) has head {0}, as 0.7 > ½, and (0.8, 0.2) too;
# of four equal ones the first two fit exactly.
@pytest.mark.parametrize(
    "q, p, share",
    [
        ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], 0.3 / 0.8),
        ([0.2, 0.8], [0.5, 0.5], 0.5),
        ([0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1], 0.5),
        ([0.25, 0.25, 0.25, 0.25], [0.55, 0.25, 0.1, 0.1], 0.5),
        ([0.3, 0.2, 0.3, 0.2], [0.3, 0.2, 0.3, 0.2], 0.5),  # no gap at all
        ([0.1, 0.45, 0.45], [0.3, 0.15, 0.55], 0.3 / 0.6),
    ],
)
def test_head_by_hand(q, p, share, backend):
    got = weights_of(backend, torch.tensor([p]).log(), torch.tensor([q]).log())
    torch.testing.assert_close(got, torch.tensor([share]), rtol=1e-5, atol=1e-6)


def test_adaptive_kl_is_jeffreys_with_those_weights(backend):
    student, teacher = pair(4, 300)
    teacher[1, :200] = -math.inf  # a truncated teacher: reverse KL is infinite there
    teacher[3] = student[3]
    got = kdkernels.distillation_loss(
        student, teacher, divergence="adaptive_kl", reduction="none", backend=backend
    )
    weight = weights_of(backend, student, teacher)
    want = kdkernels.distillation_loss(
        student, teacher, divergence=divergences.jeffreys(weight), reduction="none",
        backend=backend,
    )  # fmt: skip
    assert torch.equal(got, want) and got[1] == math.inf and got[3] < 1e-6


# bugs of others (vision-peers.md, section 4) -----------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_c_a_confidence_mask_is_no_no_op(option, backend):
    """MLKD's and LSKD's code reduces to a scalar before it multiplies by the mask."""
    student, teacher = pair(4, 19)
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    options = dict(backend=backend, **OPTIONS[option])
    each = kdkernels.distillation_loss(student, teacher, reduction="none", **options)
    got = kdkernels.distillation_loss(student, teacher, token_weights=mask, **options)
    torch.testing.assert_close(got, (each[0] + each[3]) / 2)
    assert (got - each.mean() / 2).abs() > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_d_reductions_are_not_ignored(option, backend):
    """mmrazor's DKD sums whatever the reduction."""
    student, teacher = pair(4, 19)
    options = dict(backend=backend, **OPTIONS[option])
    none, total, mean = (
        kdkernels.distillation_loss(student, teacher, reduction=reduction, **options)
        for reduction in ("none", "sum", "batchmean")
    )
    assert none.shape == (4,)
    torch.testing.assert_close((none.sum(), none.mean()), (total, mean))


@pytest.mark.parametrize("name", ["dkd", "forward_kl", "adaptive_kl", "cross_entropy"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardize"])
def test_e_confident_logits(name, standardize, backend):
    """mdistiller's DKD takes the logarithm of a softmax, which is 0 in float32 at 500."""
    student, teacher = pair(4, 19)
    student[:, 0], teacher[:, 1], teacher[1, 5] = 500, 500, -500
    compare(name, student, teacher, backend, standardize=standardize, atol=1e-6)


# torch.compile and the dispatcher ----------------------------------------------------------------


@pytest.mark.parametrize("option", ["temperatures", "standardize", "adaptive_kl", "cross_entropy"])
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)  # the reference takes 10 s to trace
def test_one_graph_for_every_temperature(option, backend):
    student, teacher = pair(4, 19)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(s, t, tau):
        return kdkernels.distillation_loss(
            s, t, temperature=tau, teacher_temperature=1.3, backend=backend, **OPTIONS[option]
        )

    for value in torch.linspace(0.5, 3, 20 if option == "temperatures" else 3):
        results = []
        for function in (loss, loss._torchdynamo_orig_callable):
            s, tau = student.clone().requires_grad_(), value.clone().requires_grad_()
            results.append(torch.autograd.grad(function(s, teacher, tau), (s, tau)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_opcheck():
    student, teacher = pair(3, 19, dtypes=(torch.bfloat16, torch.float32))
    grad = torch.rand(3, 19, dtype=torch.bfloat16)
    tau, each = torch.ones(1), torch.rand(3)
    torch.library.opcheck(OPS.row_moments.default, (student, 17))
    torch.library.opcheck(OPS.add_centered_.default, (grad, student, each, each, 17))
    torch.library.opcheck(OPS.adaptive_weights.default, (student, teacher, tau, each, 17))
    rows = torch.ones(len(reference.ROWS), 3)
    arguments = (student, teacher, rows, torch.tensor([1, 2, 3]), "dkd", 17)
    torch.library.opcheck(OPS.temperature_sums.default, arguments)


# errors ------------------------------------------------------------------------------------------

GRAD = torch.tensor(2.0, requires_grad=True)
REFUSED = [
    (TypeError, dict(standardize=1), "standardize | int | bool"),
    (TypeError, dict(teacher_center=[0.0] * 9), "teacher_center | list | Tensor"),
    (ValueError, dict(teacher_center=torch.zeros(8)), "teacher_center | (8,) | (9,)"),
    (ValueError, dict(teacher_center=torch.zeros(9, device="meta")), "teacher_center | meta | cpu"),
    (ValueError, dict(teacher_center=torch.zeros(9, requires_grad=True)), "teacher_center | grad"),
    (ValueError, dict(teacher_center=torch.zeros(9), standardize=True), "teacher_center"),
    (ValueError, dict(teacher_center=torch.zeros(9), divergence="adaptive_kl"), "teacher_center"),
    (ValueError, dict(inplace=True, standardize=True), "inplace=True | standardize"),
    (ValueError, dict(divergence="cross_entropy", teacher_grad=True), "teacher_grad | forward_kl"),
    (ValueError, dict(divergence="cross_entropy", teacher_temperature=GRAD), "teacher_temperature"),
    (ValueError, dict(divergence="cross_entropy", temperature=GRAD), "teacher_temperature"),
    (ValueError, dict(divergence="akl"), "akl | adaptive_kl | cross_entropy"),
]  # fmt: skip


@pytest.mark.parametrize("error, options, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_refused(error, options, words):
    student, teacher = pair(2, 9)
    with pytest.raises(error) as raised:
        kdkernels.distillation_loss(student, teacher, **options)
    for word in words.split(" | "):
        assert word in str(raised.value)


def test_what_cannot_give_a_temperature_its_gradient_says_so():
    student, teacher = pair(2, 9)
    with pytest.raises(ValueError, match="temperature requires grad.*distillation_loss"):
        kdkernels.distillation_loss_and_grad(student, teacher, temperature=GRAD)
    with torch.no_grad():
        assert not kdkernels.distillation_loss(student, teacher, temperature=GRAD).requires_grad


def test_fused_heads_and_features_refuse_by_name():
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    for options, words in (
        (dict(standardize=True), "standardize"),
        (dict(teacher_center=torch.zeros(5)), "teacher_center"),
        (dict(divergence="adaptive_kl"), "adaptive_kl"),
        (dict(divergence="cross_entropy"), "cross_entropy"),
        (dict(temperature=GRAD), "temperature requires grad"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            kdkernels.linear_distillation_loss(hidden, weight, hidden, weight, **options)
        with pytest.raises((TypeError, ValueError), match=words):
            kdkernels.joint_distillation_loss(weight, weight, None, weight, weight, **options)


# TeacherCenter -----------------------------------------------------------------------------------


def test_center_is_a_moving_average():
    center = kdkernels.TeacherCenter(5, momentum=0.75)
    batches = [logits(2, 3, 5, seed=k, dtype=torch.bfloat16) for k in range(3)]
    want = torch.zeros(5)
    for batch in batches:
        center.update(batch)
        want = 0.75 * want + 0.25 * batch.float().mean((0, 1))
    torch.testing.assert_close(center.value, want)
    center.update(torch.zeros(0, 5))
    torch.testing.assert_close(center.value, want)
    again = kdkernels.TeacherCenter(5)
    again.load_state_dict(center.state_dict())
    assert torch.equal(again.value, center.value) and not [*center.parameters()]
    with pytest.raises(ValueError, match="teacher_logits has shape"):
        center.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="momentum=1.0"):
        kdkernels.TeacherCenter(5, momentum=1.0)


def test_a_loss_outlives_the_update_of_its_center():
    student, teacher = pair(3, 5)
    center = kdkernels.TeacherCenter(5)
    center.update(teacher)
    student.requires_grad_()
    loss = kdkernels.distillation_loss(student, teacher, teacher_center=center.value)
    want = torch.autograd.grad(loss, student, retain_graph=True)
    center.update(teacher + 3)
    torch.testing.assert_close(torch.autograd.grad(loss, student), want)


def test_center_of_all_ranks():
    """The other rank has twice as many rows: the mean is of rows, not of ranks."""
    mine, others = logits(2, 5, seed=1), logits(4, 5, seed=2)
    center = kdkernels.TeacherCenter(5, momentum=0.0)

    def all_reduce(sums):
        sums += torch.cat([others.sum(0), torch.tensor([4.0])])

    with (
        mock.patch("torch.distributed.is_initialized", lambda: True),
        mock.patch("torch.distributed.all_reduce", all_reduce),
    ):
        center.update(mine)
    torch.testing.assert_close(center.value, torch.cat([mine, others]).mean(0))
