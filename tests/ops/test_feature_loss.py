"""feature_loss: values, gradients, masks, autograd, compilation, errors."""

import features
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels import FeatureLoss, feature_loss
from kdkernels.ops import feature_loss as module

# A map of which a line is no multiple of a vector; one whose channels are more than two blocks of a
# line; tokens with a piece of several positions; a plain vector; one element.
SHAPES = [(2, 5, 7, 9), (1, 4100, 1, 3), (2, 300, 40), (3, 33), (1, 1, 1, 1)]


def make(shape, dtype, metric, layout="contiguous", seed=0):
    """(student, teacher, log-variance or None), leaves where they get gradients."""
    torch.manual_seed(seed)
    s, t = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    s = features.lie_as(s, layout).requires_grad_()
    variance = None
    if metric == "gaussian_nll":
        variance = torch.randn(shape[features.channel(s)], dtype=torch.float64).to(dtype)
        variance.requires_grad_()
    return s, t, variance


def gradients(loss, *inputs, upstream=None):
    wanted = [x for x in inputs if x is not None]
    return torch.autograd.grad(loss, wanted, upstream)


def truth(s, t, variance, metric, dtype=torch.float64, **options):
    """Loss and gradients by torch's functions in `dtype`."""
    s, t, variance = (None if x is None else x.detach().to(dtype) for x in (s, t, variance))
    leaves = [x.requires_grad_() for x in (s, variance) if x is not None]
    loss = features.layer(s, t, metric, log_variance=variance, **options)
    return loss, torch.autograd.grad(loss.sum(), leaves, allow_unused=True)


def close(got, true, eager):
    """No worse than twice PyTorch's own error at that dtype, or 4 units in the last place. (float64
    has no truth with more digits here: 256 units.)
    """
    got, true, eager = got.detach(), true.detach().double(), eager.detach().double()
    info = torch.finfo(got.dtype)
    units = (256 if got.dtype == torch.float64 else 4) * info.eps
    bound = max(2 * float((eager - true).abs().max()), units * float(true.abs().max()))
    bound += info.tiny * info.eps / 2  # subnormal float16
    assert float((got.double() - true).abs().max()) <= bound, (got, true)


@pytest.mark.parametrize("metric", features.METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend, metric, dtype):
    for number, shape in enumerate(SHAPES):
        reduction = module.REDUCTIONS[number % 3]
        s, t, variance = make(shape, dtype, metric, features.LAYOUTS[number % 4])
        loss = feature_loss(
            s,
            t,
            reduction=reduction,
            log_variance=variance,
            backend=backend,
            **features.options(metric),
        )
        grads = gradients(loss, s, variance)
        true_loss, true = truth(s, t, variance, metric, reduction=reduction)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        eager_loss, eager = truth(s, t, variance, metric, dtype=wide, reduction=reduction)
        assert loss.dtype == wide and grads[0].dtype == dtype
        one_position = shape in ((3, 33), (1, 1, 1, 1)) and metric == "attention"
        one_channel = shape == (1, 1, 1, 1) and metric not in ("l2", "smooth_l1", "gaussian_nll")
        if one_position or one_channel:  # normalised, it is ±1 whatever it holds
            assert float(grads[0].abs().max()) < 1e-6
            continue
        close(loss, true_loss, eager_loss)
        for got, want, rough in zip(grads, true, eager, strict=True):
            close(got, want, rough)


@pytest.mark.parametrize("student", features.LAYOUTS)
@pytest.mark.parametrize("teacher", features.LAYOUTS)
def test_layouts(student, teacher):
    """Any strides, each metric: what the C++ kernels make of a copy that is contiguous."""
    for metric in features.METRICS:
        for shape in ((3, 6, 5, 4), (3, 4, 6)):
            s, t, variance = make(shape, torch.float32, metric)
            mask = torch.rand([n for k, n in enumerate(shape) if k != features.channel(s)]) > 0.3
            results = []
            for a, b in ((s, t), (features.lie_as(s, student), features.lie_as(t, teacher))):
                a = a.detach().requires_grad_()
                options = features.options(metric) | {"log_variance": variance, "mask": mask}
                loss = feature_loss(a, b, backend="cpp", **options)
                results.append((loss, *gradients(loss, a, variance)))
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_gradient_lies_as_the_student():
    s = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = gradients(feature_loss(s, torch.randn(2, 3, 4, 5)), s)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=40, deadline=None)
@given(
    metric=st.sampled_from(features.METRICS),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    layouts=st.tuples(st.sampled_from(features.LAYOUTS), st.sampled_from(features.LAYOUTS)),
    reduction=st.sampled_from(module.REDUCTIONS),
    kind=st.sampled_from(["bool", "weights", "samples", "broadcast"]),
    poison=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    seed=st.integers(0, 1000),
)
def test_masks(metric, shape, layouts, reduction, kind, poison, seed):
    """NaN and inf under a mask stay there, in values and gradients, in every layout."""
    dim = 1 if len(shape) > 3 else len(shape) - 1
    if len(shape) == 3 and "channels_last" in layouts:
        layouts = ("contiguous", "reversed")
    s, t, variance = make(shape, torch.float64, metric, seed=seed)
    positions = [n for k, n in enumerate(shape) if k != dim]
    if kind == "samples":
        mask = torch.rand(positions[0]).round(decimals=1) * (torch.rand(positions[0]) > 0.4)
    elif kind == "broadcast":
        mask = torch.rand([positions[0], *([1] * (len(positions) - 1))]) > 0.4
    else:
        mask = torch.rand(positions) > 0.4
        mask = mask if kind == "bool" else mask * torch.rand(positions)
    true_loss, true = truth(s, t, variance, metric, mask=mask, reduction=reduction)
    full = mask.reshape(mask.shape + (1,) * (len(positions) - mask.dim())).expand(positions)
    hidden = (full == 0).unsqueeze(dim).expand(shape)
    with torch.no_grad():
        s = features.lie_as(s.masked_fill(hidden, poison), layouts[0])
        t = features.lie_as(t.masked_fill(hidden, poison), layouts[1])
    s.requires_grad_()
    for backend in ("reference", "cpp"):
        loss = feature_loss(
            s,
            t,
            mask=mask,
            reduction=reduction,
            log_variance=variance,
            feature_dim=dim,
            backend=backend,
            **features.options(metric),
        )
        grads = gradients(loss.sum(), s, variance)
        torch.testing.assert_close(loss, true_loss, rtol=1e-9, atol=1e-12)
        assert (grads[0][hidden] == 0).all()
        for got, want in zip(grads, true, strict=True):
            # One position's map, one channel's direction: rounding beside an exact 0.
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("metric", module.METRICS)
def test_everything_masked_and_no_samples(backend, metric):
    for shape, mask in (((2, 3, 4), torch.zeros(2, 3)), ((0, 3, 4), None), ((2, 0, 4), None)):
        s = torch.full(shape, torch.nan, requires_grad=True)
        variance = torch.zeros(4, requires_grad=True) if metric == "gaussian_nll" else None
        options = {"metric": metric, "mask": mask, "log_variance": variance, "backend": backend}
        for reduction in module.REDUCTIONS:
            loss = feature_loss(s, torch.full(shape, torch.nan), reduction=reduction, **options)
            assert loss.shape == (shape[:1] if reduction == "none" else ()) and (loss == 0).all()
            for grad in gradients(loss.sum(), s, variance):
                assert (grad == 0).all()


def test_a_vector_that_a_relu_switched_off(backend):
    """torch divides by max(norm, 1e-12): the gradient there is 1e12."""
    s = torch.zeros(2, 4, requires_grad=True)
    for metric, value in (("cosine", 1.0), ("l2 of units", 1.0), ("attention", 0.5)):
        loss = feature_loss(s, torch.ones(2, 4), backend=backend, **features.options(metric))
        assert loss.item() == pytest.approx(value if metric != "attention" else 1.0)
        assert (gradients(loss, s)[0] == 0).all()


def test_cosine_of_close_vectors():
    """1 − cos in float32 has no digits below 1e-7."""
    t = torch.randn(4, 64)
    s = (t + 1e-5 * torch.randn(4, 64)).requires_grad_()
    loss = feature_loss(s, t, metric="cosine")
    true, _ = truth(s, t, None, "cosine")
    assert loss.item() == pytest.approx(true.item(), rel=1e-3)


def test_a_list_is_the_sum_of_its_layers(backend):
    shapes = ((3, 4, 5, 6), (3, 7, 8), (3, 9))
    for metric in module.METRICS:
        layers = [make(shape, torch.float32, metric, seed=i) for i, shape in enumerate(shapes)]
        students, teachers, variances = zip(*layers, strict=True)
        mask = [None, torch.tensor([1.0, 0.0, 2.0]), None]
        own = {"log_variance": list(variances)} if metric == "gaussian_nll" else {}
        for reduction in ("batchmean", "none"):
            loss, parts = feature_loss(
                students,
                teachers,
                metric=metric,
                mask=mask,
                weights=[0.5, 0.0, 2.0],
                reduction=reduction,
                return_parts=True,
                backend=backend,
                **own,
            )
            alone = [
                weight
                * feature_loss(
                    s,
                    t,
                    metric=metric,
                    mask=m,
                    log_variance=v,
                    reduction=reduction,
                    backend="reference",
                )
                for s, t, v, m, weight in zip(
                    students, teachers, variances, mask, (0.5, 0.0, 2.0), strict=True
                )
            ]
            expected = torch.stack(alone)
            whole = expected if reduction == "none" else expected.sum()
            torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
            of_layers = expected.sum(-1) if reduction == "none" else expected
            torch.testing.assert_close(parts, of_layers.detach(), rtol=1e-5, atol=1e-6)
            inputs = [*students, *(v for v in variances if v is not None)]
            for got, want in zip(
                gradients(loss.sum(), *inputs), gradients(whole.sum(), *inputs), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_weights_as_a_tensor(backend):
    s, t, _ = make((3, 4), torch.float32, "l2")
    given = torch.tensor([0.25, 3.0])
    loss = feature_loss([s, s], [t, 2 * t], weights=given, backend=backend)
    want = 0.25 * feature_loss(s, t) + 3 * feature_loss(s, 2 * t)
    torch.testing.assert_close(loss, want)
    # A layer of weight 0 is not read.
    bad = torch.full((3, 4), torch.nan, requires_grad=True)
    loss = feature_loss([s, bad], [t, t], weights=torch.tensor([1.0, 0.0]), backend=backend)
    torch.testing.assert_close(loss, feature_loss(s, t))
    assert (gradients(loss, bad)[0] == 0).all()


def test_attention_of_other_widths(backend):
    s = torch.randn(2, 3, 4, 4, requires_grad=True)
    t = torch.randn(2, 8, 4, 4)
    loss = feature_loss(s, t, metric="attention", reduction="mean", backend=backend)
    want = features.layer(s.double(), t.double(), "attention", reduction="mean")
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-8)


# ---- autograd ----


@pytest.mark.parametrize("metric", module.METRICS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradcheck(backend, metric, reduction):
    s, t, variance = make((2, 3, 2, 2), torch.float64, metric)
    mask = torch.tensor([1.0, 0.5])

    def loss(s, variance=None):
        return feature_loss(
            s,
            t,
            metric=metric,
            mask=mask,
            reduction=reduction,
            log_variance=variance,
            backend=backend,
        )

    assert torch.autograd.gradcheck(loss, (s, variance) if variance is not None else (s,))


def test_backwards(backend):
    """The first hands on the forward's gradient, the second computes it: the same, whatever the
    upstream factor, and whatever became of the first's.
    """
    s, t, variance = make((4, 3, 5), torch.float32, "gaussian_nll")
    loss = feature_loss(s, t, metric="gaussian_nll", log_variance=variance, backend=backend)
    first = gradients_kept(loss, 1.0, s, variance)
    second = gradients_kept(loss, 3.0, s, variance)
    third = gradients_kept(loss, 0.0, s, variance)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert (c == 0).all()
    loss = feature_loss(s, t, metric="gaussian_nll", log_variance=variance, backend=backend)
    for a, b in zip(gradients_kept(loss, 3.0, s, variance), second, strict=True):
        torch.testing.assert_close(a, b)


def gradients_kept(loss, factor, *inputs):
    return torch.autograd.grad(loss, inputs, torch.tensor(factor), retain_graph=True)


def test_nobody_else_sees_the_kept_gradient():
    s, t, _ = make((4, 3), torch.float32, "l2")
    loss = feature_loss(s, t)
    (first,) = gradients_kept(loss, 1.0, s)
    first.fill_(7)
    (second,) = gradients_kept(loss, 1.0, s)
    torch.testing.assert_close(second, 2 * (s - t).detach() / 4)


def test_only_what_needs_a_gradient_gets_one():
    s, t, variance = make((4, 3), torch.float32, "gaussian_nll")
    t.requires_grad_()
    loss = feature_loss(
        [s.detach(), s], [t, t], metric="gaussian_nll", log_variance=[variance, variance.detach()]
    )
    loss.backward()
    assert t.grad is None and s.grad is not None and variance.grad is not None
    torch.testing.assert_close(
        variance.grad, gradients(feature_loss_of(s.detach(), t, variance), variance)[0]
    )
    assert not feature_loss(s.detach(), t).requires_grad
    with torch.no_grad():
        assert not feature_loss(s, t).requires_grad


def feature_loss_of(s, t, variance):
    return feature_loss(s, t, metric="gaussian_nll", log_variance=variance)


def test_double_backward_is_refused(backend):
    s, t, _ = make((4, 3), torch.float32, "l2")
    loss = feature_loss(s, t, backend=backend)
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_changed_features_are_noticed():
    s, t, _ = make((4, 3), torch.float32, "l2")
    middle = s * 1
    loss = feature_loss(middle, t)
    middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("metric", module.METRICS)
def test_opcheck(metric):
    s, t, variance = make((2, 3, 2, 2), torch.float32, metric)
    s = s.detach().contiguous(memory_format=torch.channels_last)
    variance = None if variance is None else variance.detach()
    call = module.prepare([s, s], [t, t], metric=metric, log_variance=variance, reduction="none")
    wanted = [True, False, False, metric == "gaussian_nll"]
    arguments = (*call.arguments(), torch.ones(2, 2), wanted)
    torch.library.opcheck(torch.ops.kdkernels.feature_loss.default, arguments)
    torch.library.opcheck(
        torch.ops.kdkernels.scale_features_.default, ([s.clone(), t.clone()], torch.tensor(2.0))
    )


def test_compiled_once_for_any_weight(backend):
    """One graph without a break; weights in a tensor do not compile it again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    s, t, variance = make((2, 3, 4), torch.float32, "gaussian_nll")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(s, t, variance, weights):
        return 2 * feature_loss(
            [s],
            [t],
            metric="gaussian_nll",
            log_variance=[variance],
            weights=weights,
            backend=backend,
        )

    for weight in torch.linspace(0.5, 2, 4):
        got = gradients(loss(s, t, variance, weight), s, variance)
        want = gradients(2 * weight * feature_loss_of(s, t, variance), s, variance)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


# ---- the same on any number of threads, whoever is beside ----


@pytest.mark.parametrize("metric", module.METRICS)
def test_deterministic(metric):
    """Big enough for several threads; every sample's loss and gradient are its own."""
    s, t, variance = make((6, 64, 40, 40), torch.float32, metric)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = feature_loss(s, t, metric=metric, log_variance=variance, reduction="none")
        results.append((loss, *gradients(loss.sum(), s, variance)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    alone = feature_loss(s[2:3], t[2:3], metric=metric, log_variance=variance, reduction="none")
    assert torch.equal(alone, results[0][0][2:3])
    assert torch.equal(gradients(alone.sum(), s)[0][2], results[0][1][2])


# ---- projectors and what is learned ----


@pytest.mark.parametrize("reduction", module.REDUCTIONS)
@pytest.mark.parametrize("metric", module.METRICS)
def test_projection_in_chunks(backend, metric, reduction, monkeypatch):
    monkeypatch.setattr(module, "PROJECTION_BYTES", 2 * 4 * 3 * 8 * 8)  # two of five samples
    s, _, _ = make((5, 6, 4, 3), torch.float64, "l2")
    _, t, variance = make((5, 8, 4, 3), torch.float64, metric)
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 4, 3) * (torch.rand(5, 4, 3) > 0.3)
    options = {
        "metric": metric,
        "mask": mask,
        "log_variance": variance,
        "reduction": reduction,
        "weights": 0.5,
        "backend": backend,
    }
    got = feature_loss(s, t, projector=weight, **options)
    want = feature_loss(torch.einsum("bchw,cd->bdhw", s, weight), t, **options)
    torch.testing.assert_close(got, want)
    upstream = torch.rand(got.shape, dtype=got.dtype)
    for _ in range(2):
        grads = torch.autograd.grad(
            got, [x for x in (s, weight, variance) if x is not None], upstream, retain_graph=True
        )
        for a, b in zip(
            grads,
            torch.autograd.grad(
                want,
                [x for x in (s, weight, variance) if x is not None],
                upstream,
                retain_graph=True,
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_projectors_of_a_list():
    s = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    t = [torch.randn(3, n) for n in (6, 4, 5)]
    weight, linear = torch.randn(4, 6, requires_grad=True), nn.Linear(4, 5)
    loss, parts = feature_loss(s, t, projector=[weight, None, linear], return_parts=True)
    want = [
        feature_loss(s[0] @ weight, t[0]),
        feature_loss(s[1], t[1]),
        feature_loss(linear(s[2]), t[2]),
    ]
    torch.testing.assert_close(loss, sum(want))
    torch.testing.assert_close(parts, torch.stack(want).detach())
    inputs = [*s, weight, linear.weight]
    for a, b in zip(gradients(loss, *inputs), gradients(sum(want), *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_variance_is_learned():
    """In a public zoo it is a plain list that no optimizer sees, and stays at 5."""
    torch.manual_seed(0)
    loss = FeatureLoss("gaussian_nll", channels=[3, 2], projector=[nn.Linear(4, 3), None])
    assert [tuple(p.shape) for p in loss.parameters()] == [(3, 4), (3,), (3,), (2,)]
    students = [torch.randn(512, 4), torch.zeros(512, 2)]
    teachers = [torch.randn(512, 3), 0.5 * torch.randn(512, 2)]
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(students, teachers).backward()
        optimizer.step()
    variance = loss.log_variances[1].detach().exp()
    torch.testing.assert_close(variance, teachers[1].pow(2).mean(0), rtol=0.02, atol=0.0)
    other = FeatureLoss("gaussian_nll", channels=[3, 2], projector=[nn.Linear(4, 3), None])
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(students, teachers), loss(students, teachers))


def test_module_options():
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    loss = FeatureLoss("cosine", reduction="sum")
    assert torch.equal(loss(s, t), feature_loss(s, t, metric="cosine", reduction="sum"))
    mask = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(
        loss(s, t, mask=mask), feature_loss(s, t, metric="cosine", reduction="sum", mask=mask)
    )
    weight = nn.Parameter(torch.randn(4, 4))
    projected = FeatureLoss(projector=weight)
    assert [*projected.parameters()][0] is weight
    assert torch.equal(projected(s, t), feature_loss(s, t, projector=weight))
    assert "reduction='sum'" in repr(loss)


# ---- errors ----

X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X.int(), X), {}, TypeError, "student\\[0\\] has dtype torch.int32; accepted"),
        ((X, "x"), {}, TypeError, "teacher is a str; accepted: a Tensor, or a list"),
        (([], []), {}, ValueError, "student is an empty list"),
        (([X], [X, X]), {}, ValueError, "teacher has 2 layers; accepted: as many as student, 1"),
        ((X, X[0]), {}, ValueError, "accepted: the same number of dimensions"),
        ((X, X[:1]), {}, ValueError, "accepted: the same samples"),
        ((X, X[:, :2]), {}, ValueError, "channels \\(dimension 1\\) differ.*weight \\(3, 2\\)"),
        ((X, X[..., :2]), {}, ValueError, "adaptive_avg_pool2d\\(student, \\(4, 2\\)\\)"),
        ((X[..., :2], X), {}, ValueError, "interpolate\\(student, size=\\(4, 4\\), mode='bilinear"),
        ((X[0], X[0, :, :3]), {}, ValueError, "drop extra tokens"),
        ((X[0, 0, 0], X[0, 0, 0]), {}, ValueError, "accepted: two dimensions or more"),
        ((X, X), {"metric": "l3"}, ValueError, "metric='l3'; accepted: l2, smooth_l1"),
        ((X, X), {"reduction": "average"}, ValueError, "reduction='average'; accepted"),
        ((X, X), {"normalize": "layer"}, ValueError, "normalize='layer'; accepted: None, 'l2'"),
        ((X, X), {"normalize": "l2", "metric": "cosine"}, ValueError, "accepted: metric='l2'"),
        ((X, X), {"beta": -1.0}, ValueError, "beta=-1.0; accepted: a finite float >= 0"),
        ((X, X), {"beta": "1"}, TypeError, "beta is a str"),
        ((X, X), {"feature_dim": 0}, ValueError, "feature_dim\\[0\\]=0 with 4 dimensions"),
        ((X, X), {"feature_dim": 1.0}, TypeError, "feature_dim\\[0\\] is a float"),
        ((X, X), {"feature_dim": [1, 1]}, ValueError, "feature_dim has 2 entries"),
        ((X, X), {"mask": X[0]}, ValueError, "mask\\[0\\] has shape \\(3, 4, 4\\)"),
        ((X, X), {"mask": [1]}, TypeError, "mask\\[0\\] is a int"),
        ((X, X), {"mask": torch.ones(2, requires_grad=True)}, ValueError, "mask\\[0\\] requires"),
        ((X, X), {"weights": [1, 2]}, ValueError, "weights has 2 entries"),
        ((X, X), {"weights": "a"}, TypeError, "weights\\[0\\] is a str"),
        ((X, X), {"weights": float("inf")}, ValueError, "weights\\[0\\]=inf"),
        ((X, X), {"weights": torch.ones(3)}, ValueError, "weights has shape \\(3,\\)"),
        ((X, X), {"log_variance": torch.ones(3)}, ValueError, "accepted: metric='gaussian_nll'"),
        ((X, X), {"metric": "gaussian_nll"}, TypeError, "log_variance\\[0\\] is a NoneType"),
        (
            (X, X),
            {"metric": "gaussian_nll", "log_variance": torch.ones(4)},
            ValueError,
            "log_variance\\[0\\] has shape \\(4,\\); accepted: \\(3,\\)",
        ),
        (([X, X[:1]],) * 2, {"reduction": "none"}, ValueError, "layers of \\[2, 1\\] samples"),
        ((X, X), {"projector": "linear"}, TypeError, "projector\\[0\\] is a str"),
        ((X, X), {"projector": torch.ones(2, 3)}, ValueError, "projector\\[0\\] has shape"),
        ((X, X), {"projector": [None, None]}, ValueError, "projector has 2 entries"),
        ((X, X.to("meta")), {}, ValueError, "teacher\\[0\\] is on meta"),
        ((X, X), {"backend": "numpy"}, ValueError, "backend='numpy' is unknown"),
        ((torch.randn([2] * 7),) * 2, {"feature_dim": 1}, ValueError, "a feature has 7 dimensions"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        feature_loss(*arguments, **options)


def test_module_errors():
    with pytest.raises(TypeError, match="FeatureLoss got 'temperature'"):
        FeatureLoss(temperature=2.0)
    with pytest.raises(ValueError, match="metric='l3'"):
        FeatureLoss("l3")
    with pytest.raises(ValueError, match="channels=None with metric='gaussian_nll'"):
        FeatureLoss("gaussian_nll")
    with pytest.raises(ValueError, match="initial_variance=0"):
        FeatureLoss("gaussian_nll", channels=3, initial_variance=0)
    with pytest.raises(TypeError, match="nn.Parameter or None"):
        FeatureLoss(projector=torch.ones(2, 2))
    assert "feature_loss" in kdkernels.__all__
