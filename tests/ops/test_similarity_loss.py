"""similarity_loss, prototypes and prototype_posterior against every pair written out in float64."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import similarity_oracle as truth
import torch
import torch.nn.functional as F
from cases import DEFAULT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels.ops.similarity_loss import reference

INF, NAN = math.inf, math.nan
kernels = pytest.mark.parametrize("kernel", truth.KERNELS)
SIZES = dict(n=40, m=35, width=13, teacher_width=29)


def ours(x, upstream=None, **options):
    """Loss and gradients of what is differentiable in x."""
    leaves = {k: x[k].clone().requires_grad_() for k in truth.GRADIENTS if k in x}
    loss = kdkernels.similarity_loss(**{**x, **leaves}, **options)
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), upstream)


def check(x, options, backend, upstream=None):
    got = ours(x, upstream, backend=backend, **options)
    want, own = (f(x, upstream, **options) for f in (truth.similarity, truth.eager))
    truth.assert_no_worse(got, want, own, options)
    return got


# 35 keys of their own: no multiple of a vector or panel; and the 40 rows, without the diagonal.
@pytest.mark.parametrize("own", [False, True], ids=["keys", "own"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@kernels
def test_kernels(kernel, dtype, own, backend):
    x, options = truth.inputs(kernel, own=own, parameters=True, dtype=dtype, **SIZES)
    loss, *grads = check(x, options, backend)
    assert loss.dtype == dtype and all(grad.dtype == dtype for grad in grads)


@pytest.mark.parametrize("name, parameters", [p for p in DEFAULT if p.values[0] != "dkd"])
def test_divergences(name, parameters, backend):
    """Each through a kernel that is linear in the product, and one that is not."""
    for kernel in ("rbf", "student_t"):
        x, options = truth.inputs(kernel, parameters=True, dtype=torch.float64, **SIZES)
        check(x, {**options, "divergence": name}, backend)


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float16", "float32")], ids=str)
def test_narrow_features_far_from_zero(dtypes, backend):
    """bfloat16 features at 30 ± 0.1: distances of products of what was not centred are off by 0.7.
    The truth is that of the rounded features.
    """
    for kernel in ("rbf", "cosine"):
        x, options = truth.inputs(kernel, own=True, shift=3.0, **SIZES)
        x["student"] = x["student"].to(getattr(torch, dtypes[0]))
        x["teacher"] = (x["teacher"] * 10).to(getattr(torch, dtypes[1]))
        loss, grad = check(x, options, backend)
        assert loss.dtype == torch.float32 and grad.dtype == x["student"].dtype


# 1 key; 48 and 49: a panel of AVX-512, and a key more; 300: more than the terms that a product adds
# up in registers; 16 columns: whole vectors, not copied; 700 rows: more than one block of them.
@pytest.mark.parametrize(
    "n, m, width", [(1, 1, 1), (3, 48, 16), (33, 49, 17), (5, 300, 300), (64, 8193, 16)]
)
def test_sizes(n, m, width, backend):
    for kernel in ("rbf", "rbf_softmax"):
        x, options = truth.inputs(kernel, n=n, m=m, width=width, teacher_width=3)
        check(x, options, backend)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from(truth.KERNELS),
    divergence=st.sampled_from(["forward_kl", "reverse_kl", "jsd", "alpha"]),
    n=st.integers(2, 70),
    m=st.integers(1, 70),
    width=st.integers(2, 20),
    own=st.booleans(),
    exclude=st.sampled_from([None, False]),
    center=st.booleans(),
    reduction=st.sampled_from(["batchmean", "sum", "mean", "none"]),
    masked=st.sets(st.integers(0, 69), max_size=5),
    strided=st.booleans(),
)
def test_any_shape_mask_and_stride(
    kernel, divergence, n, m, width, own, exclude, center, reduction, masked, strided
):
    """The C++ library against the oracle; masked rows hold NaN, and are no keys where rows are."""
    x, options = truth.inputs(
        kernel, n=n, m=m, width=width, teacher_width=5, own=own, dtype=torch.float64, shift=0.1
    )
    weights = torch.linspace(0.5, 2, n, dtype=torch.float64)
    weights[[i for i in masked if i < n]] = 0
    rows = int((weights != 0).sum())
    # Two rows about their own mean are opposite: their pkt score is log 0, which has its own test.
    if rows < 2 or (rows == 2 and own and center and kernel == "pkt"):
        return
    options |= dict(
        divergence=divergence, exclude_diagonal=exclude, center=center, reduction=reduction,
        row_weights=weights,
    )  # fmt: skip
    upstream = torch.linspace(-1, 1, n, dtype=torch.float64) if reduction == "none" else None
    want = truth.similarity(x, upstream, **options)
    hidden = {k: v.clone() for k, v in x.items()}
    hidden["student"][weights == 0] = NAN
    hidden["teacher"][weights == 0] = INF
    if strided:
        hidden = {k: torch.stack([v, v + 1], 1)[:, 0] for k, v in hidden.items()}
    got = ours(hidden, upstream, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert (got[1][weights == 0] == 0).all()


def test_leading_dimensions(backend):
    x, options = truth.inputs("rbf", n=12, m=5, width=4, teacher_width=3)
    flat = kdkernels.similarity_loss(**x, reduction="none", backend=backend, **options)
    x["student"], x["teacher"] = (x[k].reshape(3, 4, -1) for k in ("student", "teacher"))
    loss = kdkernels.similarity_loss(**x, reduction="none", backend=backend, **options)
    assert torch.equal(loss, flat.reshape(3, 4))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@kernels
def test_gradcheck(kernel, reduction, backend):
    """Rows, keys, γ and T, the teacher's own too; then rows as their own keys, whose mean is
    propagated through where the kernel sees it, with γ and T in both distributions.
    """
    x, _ = truth.inputs(kernel, n=4, m=3, width=3, teacher_width=2, dtype=torch.float64)
    numbers = [torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (0.8, 1.3, 0.5, 0.9)]
    rest = dict(kernel=kernel, reduction=reduction, backend=backend)

    def with_keys(s, k, gamma, temperature, teacher_gamma, teacher_temperature):
        return kdkernels.similarity_loss(
            s, x["teacher"], k, x["teacher_keys"], gamma=gamma, temperature=temperature,
            teacher_gamma=teacher_gamma, teacher_temperature=teacher_temperature, **rest,
        )  # fmt: skip

    def own(s, gamma, temperature):
        return kdkernels.similarity_loss(
            s, x["teacher"], gamma=gamma, temperature=temperature, **rest
        )

    s, k = x["student"].requires_grad_(), x["student_keys"].requires_grad_()
    assert torch.autograd.gradcheck(with_keys, (s, k, *numbers))
    assert torch.autograd.gradcheck(own, (s, *numbers[:2]))


def test_pkt_is_the_published_one(backend):
    """K/ΣK with K = (1 + cos)/2 without the diagonal, features as they are."""
    x, _ = truth.inputs("pkt", own=True, dtype=torch.float64, **SIZES)

    def conditional(z):
        z = F.normalize(z)
        k = ((z @ z.t() + 1) / 2).fill_diagonal_(0)
        return k / k.sum(1, keepdim=True)

    p, q = (conditional(x[k]) for k in ("student", "teacher"))
    want = torch.special.xlogy(q, q / p.clone().fill_diagonal_(1)).sum(1).mean()
    got = kdkernels.similarity_loss(**x, kernel="pkt", center=False, backend=backend)
    torch.testing.assert_close(got, want)


def test_opposite_and_zero_vectors(backend):
    """cos = −1 has log 0 and a cosine of 0 no direction: finite both."""
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    for kernel in ("pkt", "cosine"):
        leaf = a.clone().requires_grad_()
        loss = kdkernels.similarity_loss(
            leaf, torch.randn(3, 2), kernel=kernel, center=False, backend=backend
        )
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


def test_coinciding_rows(backend):
    """d = 0, whose square root has no derivative."""
    for kernel in ("rbf", "student_t", "rbf_softmax"):
        leaf = torch.ones(4, 3).requires_grad_()
        loss = kdkernels.similarity_loss(leaf, torch.randn(4, 3), kernel=kernel, backend=backend)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


def test_an_adaptive_bandwidth_trains(backend):
    """γ = 1/mean ‖a − b‖² with its graph: a student that starts at a tenth of the teacher's scale
    learns its similarities (detached, this γ let a student collapse).
    """
    torch.manual_seed(3)
    teacher = torch.randn(24, 5)
    student = (torch.randn(24, 3) * 0.1).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.02)

    def bandwidth(z):
        return 1 / (2 * (z - z.mean(0)).square().sum(1).mean())

    losses = []
    for _ in range(60):
        loss = kdkernels.similarity_loss(
            student, teacher, gamma=bandwidth(student), teacher_gamma=bandwidth(teacher),
            backend=backend,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and student.std() > 0.05


def test_rows_alone_have_no_key(backend):
    """A last batch of one row, and one of which all but one are masked: 0 with a graph."""
    one = torch.randn(1, 3).requires_grad_()
    loss = kdkernels.similarity_loss(one, torch.randn(1, 2), backend=backend)
    loss.backward()
    assert loss == 0 and (one.grad == 0).all()
    three = torch.randn(3, 3).requires_grad_()
    weights = torch.tensor([0.0, 2.0, 0.0])
    loss = kdkernels.similarity_loss(three, torch.randn(3, 2), row_weights=weights, backend=backend)
    loss.backward()
    assert loss == 0 and (three.grad == 0).all()
    none = torch.randn(0, 3).requires_grad_()
    loss = kdkernels.similarity_loss(none, torch.randn(0, 2), backend=backend)
    loss.backward()
    assert loss == 0 and none.grad.shape == (0, 3)


def test_a_row_keeps_its_bits_beside_others():
    """Given the keys, loss and gradient of a row are those of the row alone."""
    x, options = truth.inputs("student_t", n=70, m=301, width=19, teacher_width=5)
    options |= dict(reduction="none")
    upstream = torch.ones(70)
    loss, grad, _ = ours(x, upstream, **options)
    for few in (slice(0, 1), slice(41, 50)):
        part = {**x, "student": x["student"][few], "teacher": x["teacher"][few]}
        some, some_grad, _ = ours(part, upstream[few], **options)
        assert torch.equal(some, loss[few]) and torch.equal(some_grad, grad[few])


def test_threads_change_nothing():
    x, options = truth.inputs(
        "rbf_softmax", n=300, m=9000, width=24, teacher_width=5, parameters=True
    )
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ours(x, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_upstream_factors_and_two_backwards(backend):
    x, options = truth.inputs("rbf", own=True, **SIZES)
    leaf = x["student"].clone().requires_grad_()
    loss = kdkernels.similarity_loss(leaf, x["teacher"], backend=backend, **options)
    grads = [
        torch.autograd.grad(loss, leaf, torch.tensor(u), retain_graph=True)[0] for u in (1.0, -2.0)
    ]
    assert torch.equal(grads[1], -2 * grads[0])


def test_the_teacher_and_frozen_inputs_get_nothing(backend):
    x, options = truth.inputs("dot", **SIZES)
    leaves = {k: v.requires_grad_() for k, v in x.items() if k != "student"}
    loss = kdkernels.similarity_loss(x["student"], **leaves, backend=backend, **options)
    loss.backward()
    assert x["student_keys"].grad is not None and x["teacher_keys"].grad is None
    assert x["teacher"].grad is None and x["student"].grad is None


def test_inputs_are_not_changed(backend):
    x, options = truth.inputs("pkt", parameters=True, **SIZES)
    before = copy.deepcopy(x)
    ours(x, backend=backend, **options)
    assert all(torch.equal(x[k], before[k]) for k in x)


def test_double_backward_raises(backend):
    leaf = torch.randn(5, 3).requires_grad_()
    loss = kdkernels.similarity_loss(leaf, torch.randn(5, 2), backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_parameters_out_of_range_as_tensors(backend):
    """Not read on the host: NaN."""
    for name in ("gamma", "temperature"):
        loss = kdkernels.similarity_loss(
            torch.randn(5, 3), torch.randn(5, 2), backend=backend, **{name: torch.tensor(-1.0)}
        )
        assert loss.isnan()


def test_opcheck():
    x, _ = truth.inputs("rbf", **SIZES)
    args = [*(x[k] for k in ("student", "student_keys", "teacher", "teacher_keys"))]
    rest = (None, None, torch.tensor([1.0, 2.0, 1.0, 2.0]), 1.0, 1.0, 1.0, 1.0, "student_t", "jsd",
            0.5, None, 0.0, None, False, "batchmean")  # fmt: skip
    torch.library.opcheck(torch.ops.kdkernels.similarity_loss, (*args, *rest))
    op = torch.ops.kdkernels.similarity_loss_and_grad
    for wanted in ((True, True, True, True), (False, True, False, False)):
        torch.library.opcheck(op, (*args, *rest, *wanted))


def test_compile_without_breaks_or_recompiles():
    """20 values of a learned γ and of the batch size's rows: one graph, the same numbers."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(s, t, gamma):
        return kdkernels.similarity_loss(s, t, gamma=gamma, kernel="cosine")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(20):
        s, t = torch.randn(10 + k, 3).requires_grad_(), torch.randn(10 + k, 2)
        gamma = torch.tensor(0.5 + k).requires_grad_()
        torch._dynamo.mark_dynamic(s, 0), torch._dynamo.mark_dynamic(t, 0)
        grads = [torch.autograd.grad(f(s, t, gamma), (s, gamma)) for f in (compiled, step)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_memory_grows_with_rows_and_keys_not_their_product():
    """8192 × 8192 scores are 256 MiB each for student and teacher; in a process of its own."""
    program = """
import torch, kdkernels
from benchmarks import memory
torch.set_num_threads(2)
s, t = torch.randn(8192, 16).requires_grad_(), torch.randn(8192, 16)
def step(s, t):
    torch.autograd.grad(kdkernels.similarity_loss(s, t), s)
step(torch.randn(64, 16).requires_grad_(), torch.randn(64, 16))
print(memory.added_by(lambda: step(s, t)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 * 2**20


def test_module():
    loss = kdkernels.SimilarityLoss(kernel="pkt", divergence="jsd")
    s, t = torch.randn(5, 3), torch.randn(5, 2)
    want = kdkernels.similarity_loss(s, t, kernel="pkt", divergence="jsd", gamma=2.0)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(s, t, gamma=2.0), want)
    assert "kernel='pkt'" in repr(loss)


A, B, K = torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(5, 3)


@pytest.mark.parametrize(
    "args, options, error, said",
    [
        ((A, B), dict(kernel="laplace"), ValueError, "kernel='laplace'; accepted: rbf, dot"),
        ((A, B), dict(divergence="dkd"), ValueError, "needs labels"),
        ((A, B), dict(gamma=0.0), ValueError, "gamma=0.0; accepted: a finite float > 0"),
        ((A, B), dict(temperature=NAN), ValueError, "temperature=nan"),
        ((A, B), dict(gamma=torch.ones(2)), ValueError, "gamma has shape"),
        ((A, B), dict(gamma="1"), TypeError, "gamma is a str"),
        ((A, B), dict(temperature=torch.tensor(1)), TypeError, "temperature has dtype torch.int64"),
        ((A.long(), B), {}, TypeError, "student has dtype torch.int64"),
        ((A, B[:3]), {}, ValueError, r"teacher has shape \(3, 2\)"),
        ((A, B, K), {}, ValueError, "student_keys without teacher_keys"),
        ((A, B, None, K), {}, ValueError, "teacher_keys without student_keys"),
        ((A, B, B, K), {}, ValueError, r"student_keys has shape \(4, 2\); accepted: \(M, 3\)"),
        ((A, B, K, B), {}, ValueError, "teacher_keys has shape"),
        ((A, B, K[:0], B[:0]), {}, ValueError, "M >= 1"),
        ((A, B, K, torch.zeros(5, 2)), dict(exclude_diagonal=True), ValueError, "4 rows and 5"),
        ((A, B), dict(reduction="avg"), ValueError, "reduction='avg'"),
        ((A, B), dict(center=1), TypeError, "center is a int"),
        ((A, B), dict(row_weights=torch.ones(3)), ValueError, "row_weights has shape"),
        ((A, B), dict(backend="cuda"), ValueError, "backend='cuda'"),
    ],
)  # fmt: skip
def test_errors(args, options, error, said):
    with pytest.raises(error, match=said):
        kdkernels.similarity_loss(*args, **options)


def test_module_errors():
    with pytest.raises(TypeError, match="SimilarityLoss got 'sigma'"):
        kdkernels.SimilarityLoss(sigma=1)
    with pytest.raises(ValueError, match="kernel="):
        kdkernels.SimilarityLoss(kernel="x")


# Prototypes --------------------------------------------------------------------------------------


def test_prototypes():
    features = torch.randn(9, 4, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 2, 1, -100, 2, 2, 0, 1, -1])
    got = kdkernels.prototypes(features, labels)
    want = torch.stack([features[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda x: kdkernels.prototypes(x, labels), (features,))
    half = features.detach().to(torch.bfloat16)
    assert kdkernels.prototypes(half, labels, 3).dtype == torch.bfloat16
    compiled = torch.compile(kdkernels.prototypes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, labels, 3), want)


@pytest.mark.parametrize(
    "labels, classes, error, said",
    [
        ([0, 3, 3, 0], None, ValueError, "2 of 4 classes have no features: 1, 2"),
        ([0, 1, 0, 1], 3, ValueError, "1 of 3 classes have no features: 2"),
        ([0, 1, 5, 1], 3, IndexError, r"labels\[2\] is 5; accepted: below num_classes=3"),
        ([-1, -1, -1, -1], None, ValueError, "labels has no class"),
        ([0, 1, 0], 2, ValueError, "labels has shape"),
        ([0.0, 1.0, 0.0, 1.0], 2, TypeError, "labels has dtype"),
        ([0, 1, 0, 1], 0, ValueError, "num_classes=0"),
    ],
)
def test_prototype_errors(labels, classes, error, said):
    with pytest.raises(error, match=said):
        kdkernels.prototypes(torch.randn(4, 2), torch.tensor(labels), classes)


@kernels
def test_posterior(kernel, backend):
    x, options = truth.inputs(kernel, n=6, m=4, width=3, teacher_width=2, dtype=torch.float64)
    z, c = x["student"].requires_grad_(), x["student_keys"].requires_grad_()
    mean = c.mean(0)
    want = truth.scores(z - mean, c - mean, expanded=False, **options).log_softmax(1)
    got = kdkernels.prototype_posterior(z, c, backend=backend, **options)
    torch.testing.assert_close(got, want)
    probabilities = kdkernels.prototype_posterior(z, c, log=False, backend=backend, **options)
    torch.testing.assert_close(probabilities, want.exp())
    upstream = torch.randn(6, 4, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, (z, c), upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_literal_posterior_overflows_and_ours_does_not():
    """exp(−γ e^(d²/T)) is 0/0 in float32 once the nearest prototype is beyond d²/T = 88.7."""
    z, c = torch.tensor([[0.0, 0.0]]), torch.tensor([[10.0, 0.0], [0.0, 11.0]])
    d = torch.cdist(z, c).square()
    assert torch.exp(-torch.exp(d)).sum() == 0
    got = kdkernels.prototype_posterior(z, c, kernel="rbf_softmax", temperature=100.0, log=False)
    assert got.isfinite().all() and got[0, 0] > got[0, 1]


def test_few_labels_on_digits():
    """Real handwritten digits, five labels a class, the posterior of a student of 8 features that
    saw only the teacher's similarities of unlabelled images to the class prototypes: nearly as
    right as the teacher, and far better than one trained on the 50 labels alone.
    """
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32) / 16
    labels = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order], labels[order]
    test, train = slice(0, 500), slice(500, None)
    support = torch.cat([(labels[train] == c).nonzero()[:5, 0] for c in range(10)])
    x, y = images[train], labels[train]

    def network(width, seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, width)
        )

    def accuracy(model):
        means = kdkernels.prototypes(model(x[support]), y[support])
        posterior = kdkernels.prototype_posterior(model(images[test]), means)
        return (posterior.argmax(1) == labels[test]).float().mean().item()

    def trained(model, loss, steps):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        for _ in range(steps):
            batch = torch.randint(len(x), (128,), generator=generator)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        return model.eval()

    def episode(model, batch):  # prototypical network on all labels
        means = kdkernels.prototypes(model(x), y, 10)
        return F.nll_loss(kdkernels.prototype_posterior(model(x[batch]), means), y[batch])

    def few(model, batch):
        means = kdkernels.prototypes(model(x[support]), y[support], 10)
        return F.nll_loss(kdkernels.prototype_posterior(model(x[support]), means), y[support])

    teacher = trained(network(32, 1), episode, 60)
    with torch.no_grad():
        teacher_means = kdkernels.prototypes(teacher(x[support]), y[support], 10)

    def distilled(model, batch):
        means = kdkernels.prototypes(model(x[support]), y[support], 10)
        with torch.no_grad():
            target = teacher(x[batch])
        return kdkernels.similarity_loss(model(x[batch]), target, means, teacher_means)

    of_teacher = accuracy(teacher)
    of_labels = accuracy(trained(network(8, 2), few, 150))
    of_student = accuracy(trained(network(8, 2), distilled, 150))
    assert of_teacher > 0.9
    assert of_student > of_labels + 0.05 and of_student > of_teacher - 0.05


def test_the_reference_goes_block_by_block(monkeypatch):
    """Several blocks of rows, the last a short one, are one."""
    x, options = truth.inputs("rbf_softmax", parameters=True, own=True, **SIZES)
    whole = ours(x, backend="reference", **options)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 40 * 4 * 7)
    for a, b in zip(ours(x, backend="reference", **options), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
