"""Gram, NST, RKD and DIST losses against their definitions (relations.py), and their contract."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from relations import (
    COMPILED,
    LOSSES,
    assert_no_worse_than_torch,
    differentiated,
    dist,
    features,
    gram,
    nst,
    rkd_angle,
    rkd_distance,
)
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels._ext import cpp_error

# Every loss with every backend that it has.
ALL = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in LOSSES
    for backend in (("reference", "cpp") if name in COMPILED else ("torch",))
]
each = pytest.mark.parametrize("name, backend_of", ALL)
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16-float32": (torch.float16, torch.float32),
}


def bound(name, backend_of):
    """(ours with its backend, definition, shapes); skips where the library is not built."""
    ours, definition, shapes = LOSSES[name]
    if backend_of == "cpp" and cpp_error():
        if not os.environ.get("KDKERNELS_REQUIRE_BUILD"):
            pytest.skip("the C++ library is not built")
    chosen = None if backend_of == "torch" else backend_of
    return lambda s, t: ours(s, t, backend=chosen), definition, shapes


@pytest.mark.parametrize("dtype", DTYPES)
@each
def test_values(name, backend_of, dtype):
    ours, definition, shapes = bound(name, backend_of)
    for shape, teacher_shape in shapes:
        student = features(shape, 1, DTYPES[dtype][0])
        teacher = features(teacher_shape, 2, DTYPES[dtype][1])
        got = differentiated(ours, student, teacher)
        truth = differentiated(definition, student.double(), teacher.double())
        wide = torch.promote_types(student.dtype, torch.float32)
        own = differentiated(definition, student.to(wide), teacher.to(wide))
        assert got[0].dtype == wide and got[0].shape == () and got[1].dtype == student.dtype
        half = student.dtype if student.dtype != wide else None
        # A cosine of squares takes five roundings, and its derivatives by three sides, which are
        # each larger than their sum, as many again.
        assert_no_worse_than_torch(got, truth, own, half, units=8 if name == "rkd angle" else 4)


@each
def test_gradcheck(name, backend_of):
    ours, _, shapes = bound(name, backend_of)
    shape, teacher_shape = min(shapes, key=lambda s: torch.Size(s[0]).numel())
    student = features(shape, 1)[..., :7].contiguous().requires_grad_()
    teacher = features(teacher_shape, 2)[..., :7]
    assert torch.autograd.gradcheck(lambda s: ours(s, teacher), (student,))


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(0, 12),
    width=st.integers(1, 9),
    teacher_width=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    offset=st.sampled_from([0.0, 100.0]),
    same=st.integers(1, 4),
    layout=st.sampled_from(["dense", "every other row", "transposed"]),
)
@each
def test_any_shape_layout_and_coinciding_points(
    name, backend_of, n, width, teacher_width, seed, offset, same, layout
):
    """float64: near 1e-9 of the definition. `same`: that many points are one; 0 rows in a Gram."""
    ours, definition, shapes = bound(name, backend_of)
    rank = len(shapes[0][0])
    widths = (width, width if name == "dist" else teacher_width)
    pair = []
    for number, columns in enumerate(widths):
        shape = (n, columns) if rank == 2 else (2, n, columns) if rank == 3 else (2, columns, n, 1)
        if name in ("nst", "dist") and 0 in shape:
            return  # no rows: test_few_rows; NST has no positions then
        x = features(shape, seed + number)
        if name not in ("sp", "sp of images", "token gram", "plain gram", "clipped"):
            x = x + offset
        if rank == 2 and n > same:
            x[:same] = x[0].clone() if name != "plain gram" else 0
        if layout == "every other row":
            x = x.repeat_interleave(2, 0)[::2]
        elif layout == "transposed":
            x = x.mT.contiguous().mT
        pair.append(x)
    got, want = differentiated(ours, *pair), differentiated(definition, *pair)
    torch.testing.assert_close(got[0], want[0], rtol=1e-8, atol=1e-10)
    # With an offset of 100 the definition's own differences are off by 1e-14·100.
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-9)


# ---- degenerate inputs: the values that the docstrings define ----


@pytest.mark.parametrize("n", [0, 1, 2])
@each
def test_few_rows(name, backend_of, n):
    """Never NaN: RepDistiller's RKD is NaN for one sample, the mean of no distance."""
    ours, _, shapes = bound(name, backend_of)
    shape, teacher_shape = shapes[0]
    cut = (slice(None),) * (len(shape) - 2) + (slice(0, n),) if name != "nst" else (slice(0, n),)
    loss, grad = differentiated(ours, features(shape, 1)[cut], features(teacher_shape, 2)[cut])
    assert loss.isfinite() and grad.isfinite().all()
    if n == 0 or name.startswith("rkd") and (n == 1 or name == "rkd angle"):
        assert loss < 1e-30 and (grad.abs() < 1e-15).all()
    if name.startswith("sp") and n == 1:
        assert loss < 1e-30


@each
def test_student_is_teacher(name, backend_of):
    """0, with gradient 0, to rounding: no difference of large numbers is left."""
    ours, _, shapes = bound(name, backend_of)
    for dtype in (torch.float32, torch.float64):
        for shape, _ in shapes:
            x = features(shape, 1, dtype)
            loss, grad = differentiated(ours, x, x)
            unit = torch.finfo(dtype).eps
            assert loss.abs() <= (4 * unit if name == "dist" else 4 * unit**2)
            assert grad.abs().max() <= 16 * unit


@pytest.mark.parametrize("name", ["sp", "sp of images", "token gram", "plain gram", "nst"])
def test_near_the_teacher_the_loss_keeps_its_digits(name):
    """‖SSᵀ‖² + ‖TTᵀ‖² − 2·‖SᵀT‖² would keep none of them in float32 at a distance of 1e-4."""
    ours, definition, shapes = bound(name, "torch")
    for shape, _ in shapes:
        teacher = features(shape, 1, torch.float32)
        student = teacher + 1e-4 * features(shape, 2, torch.float32)
        got = differentiated(ours, student, teacher)
        want = differentiated(definition, student.double(), teacher.double())
        assert (got[0] - want[0]).abs() < 2e-3 * want[0]
        assert (got[1] - want[1]).norm() < 5e-3 * want[1].norm()


@each
def test_collapsed_features(name, backend_of):
    """All rows equal, or 0: finite, and a gradient of 0 where nothing can be said."""
    ours, definition, shapes = bound(name, backend_of)
    shape, teacher_shape = shapes[0]
    teacher = features(teacher_shape, 2)
    for student in (torch.zeros(shape).double(), features(shape, 1)[..., :1, :].expand(shape)):
        loss, grad = differentiated(ours, student, teacher)
        if name == "dist":  # the definition correlates the rounding of columns that are constant
            assert loss >= 1 and grad.abs().max() < 1
            continue
        want = differentiated(definition, student, teacher)
        torch.testing.assert_close((loss, grad), want, rtol=1e-9, atol=1e-12)
        loss, grad = differentiated(ours, teacher, student)
        want = differentiated(definition, teacher, student)
        torch.testing.assert_close((loss, grad), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend_of", ["reference", "cpp"])
def test_angles_keep_their_digits_beside_a_very_short_arm(backend_of):
    """Pairs 1e-4 apart among points at 1: from float32 squares cosines would be off by 1e-3."""
    student = features((24, 16), 1, torch.float32)
    student[1::2] = student[::2] + 1e-4 * features((12, 16), 3, torch.float32)
    teacher = features((24, 16), 2, torch.float32)
    ours, definition, _ = bound("rkd angle", backend_of)
    got = differentiated(ours, student, teacher)
    truth = differentiated(definition, student.double(), teacher.double())
    assert_no_worse_than_torch(got, truth, differentiated(definition, student, teacher))


@pytest.mark.parametrize("backend_of", ["reference", "cpp"])
def test_dist_with_constant_columns_and_hopeless_classes(backend_of):
    """A column of −∞ (probability 0 in every row), one that only the student has constant, and
    rows whose logits differ by an offset only, which leave rounding noise and no correlation.
    """
    ours, definition, _ = bound("dist", backend_of)
    student, teacher = features((9, 6), 1), features((9, 6), 2)
    student[:, 2] = teacher[:, 2] = -torch.inf
    got = differentiated(ours, student, teacher)
    assert got[0].isfinite() and got[1].isfinite().all() and (got[1][:, 2] == 0).all()
    finite = [x[:, [0, 1, 3, 4, 5]] for x in (student, teacher)]
    # Five columns of six; rows have another mean.
    want = dist(*finite, inter_weight=0) * 5 / 6 + 1 / 6
    at = kdkernels.dist_loss(student, teacher, inter_weight=0, backend=backend_of)
    torch.testing.assert_close(at, want)
    rows = student[:1] + torch.arange(9)[:, None] * 0.1  # all columns constant up to rounding
    loss = kdkernels.dist_loss(rows.float(), teacher.float(), inter_weight=0, backend=backend_of)
    assert loss == 1


def test_dist_sees_columns_of_small_probabilities():
    """With 1e-8 in the denominator, as the authors' code has it, they would all count as
    uncorrelated although the student is the teacher.
    """
    x = features((8, 20000), 1, torch.float32)
    assert kdkernels.dist_loss(x, x, inter_weight=0) < 1e-5
    p = x.softmax(-1).T
    p = p - p.mean(1, keepdim=True)
    theirs = 1 - (p.square().sum(1) / (p.square().sum(1) + 1e-8)).mean()
    assert theirs > 0.3


# ---- what the zoos get wrong (field/vision-peers.md, section 4) ----


def test_sp_rows_have_l2_norm():
    """(a) torchdistill's normalize(G, 1) is an L1 norm: another loss, many times smaller."""
    student, teacher = features((64, 32), 1), features((64, 32), 2)
    s, t = (F.normalize(x @ x.T, p=2, dim=1) for x in (student, teacher))
    got = kdkernels.gram_loss(student, teacher)
    torch.testing.assert_close(got, (s - t).square().sum() / 64**2)
    s, t = (F.normalize(x @ x.T, p=1, dim=1) for x in (student, teacher))
    assert got > 20 * (s - t).square().sum() / 64**2


@pytest.mark.parametrize("backend_of", ["reference", "cpp"])
def test_dist_is_zero_at_the_teacher_and_two_at_its_opposite(backend_of):
    """(b) torchdistill's DISTPlusLoss.channel_relation has the sign of ρ reversed."""
    x = features((30, 2), 1)  # two classes: −x has the reversed probabilities
    for weights in ((1, 0), (0, 1)):
        options = dict(inter_weight=weights[0], intra_weight=weights[1], backend=backend_of)
        assert kdkernels.dist_loss(x, x, **options).abs() < 1e-12
        torch.testing.assert_close(
            kdkernels.dist_loss(-x, x, **options), torch.tensor(2.0, dtype=torch.float64)
        )


def test_negatives_of_the_teacher_take_the_students_along():
    """(h) dinov3 first looked for negative entries of the teacher after it had removed them."""
    student = torch.tensor([[1.0, 0], [-1, 0.1], [-1, -0.1]]).double()
    teacher = torch.tensor([[1.0, 0], [-1, 0.2], [1, 0.3]]).double()
    options = dict(normalize="features", clip="teacher")
    got = differentiated(lambda s, t: kdkernels.gram_loss(s, t, **options), student, teacher)
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    s, t = s @ s.T, t @ t.T
    kept = ~((s < 0) & (t < 0))
    assert (~kept).any() and ((s < 0) & kept).any()
    torch.testing.assert_close(got[0], (s * kept - t.clamp(min=0)).square().mean())
    buggy = (s - t.clamp(min=0)).square().mean()
    assert (got[0] - buggy).abs() > 0.1


def test_zoos_losses_where_they_are_right():
    """RepDistiller's RKD and NST as it is called."""
    student, teacher = features((12, 8), 1), features((12, 8), 2)

    def distances(x):
        d = torch.cdist(x, x)
        return d / d[d > 0].mean()

    want = F.smooth_l1_loss(distances(student), distances(teacher))
    torch.testing.assert_close(kdkernels.rkd_distance_loss(student, teacher), want)

    def angles(x):
        e = F.normalize(x[None] - x[:, None], dim=2)
        return e @ e.mT

    want = F.smooth_l1_loss(angles(student), angles(teacher))
    torch.testing.assert_close(kdkernels.rkd_angle_loss(student, teacher), want)


# ---- the contract ----


@each
def test_autograd_contract(name, backend_of):
    """No mutation, any upstream factor, several backwards, no double backward, no teacher graph."""
    ours, _, shapes = bound(name, backend_of)
    student, teacher = (features(shape, seed) for seed, shape in enumerate(shapes[0]))
    kept = student.clone(), teacher.clone()
    want = differentiated(ours, student, teacher)[1]
    student.requires_grad_()
    teacher.requires_grad_()
    loss = ours(student, teacher)
    for factor in (1.0, -3.0, 0.0):
        (grad,) = torch.autograd.grad(factor * loss, student, retain_graph=True)
        torch.testing.assert_close(grad, factor * want)
    assert torch.equal(student, kept[0]) and torch.equal(teacher, kept[1])
    assert student._version == teacher._version == 0
    (nothing,) = torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True)
    assert nothing is None
    (grad,) = torch.autograd.grad(loss.square(), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


@each
def test_modes(name, backend_of):
    ours, _, shapes = bound(name, backend_of)
    student, teacher = (features(s, seed, torch.float32) for seed, s in enumerate(shapes[0]))
    student.requires_grad_()
    want = ours(student, teacher).detach()
    with torch.no_grad():
        quiet = ours(student, teacher)
    assert torch.equal(quiet, want) and not quiet.requires_grad
    with torch.inference_mode():
        assert torch.equal(ours(student, teacher), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(student, teacher), want)


def test_half_precision_gradients_do_not_underflow():
    """The gradient waits in float32 for the factor of a GradScaler."""
    student, teacher = features((64, 64), 1, torch.float16), features((64, 64), 2, torch.float16)
    student.requires_grad_()
    loss = kdkernels.rkd_angle_loss(student, teacher)
    (small,) = torch.autograd.grad(loss * 2.0**-6, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 2.0**10, student)
    want = differentiated(rkd_angle, student.double(), teacher.double())[1] * 2.0**10
    assert (small == 0).any() and (scaled - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", COMPILED)
def test_threads(name):
    ours, _, _ = bound(name, "cpp")
    # 15 blocks of points, 3 strips of columns.
    student, teacher = (features((235, 1300), seed, torch.float32) for seed in (1, 2))
    one = differentiated(ours, student, teacher)
    torch.set_num_threads(2)
    assert all(map(torch.equal, one, differentiated(ours, student, teacher)))


def test_distances_above_what_is_kept():
    """N = 4100 > 4096: rows are computed again in every sweep, to the same bits."""
    student, teacher = (features((4100, 3), seed, torch.float32) for seed in (1, 2))
    got = differentiated(kdkernels.rkd_distance_loss, student, teacher, backend="cpp")
    want = differentiated(kdkernels.rkd_distance_loss, student, teacher, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-9)


@each
def test_compiled(name, backend_of):
    ours, _, shapes = bound(name, backend_of)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    student, teacher = (features(s, seed, torch.float32) for seed, s in enumerate(shapes[0]))
    got, want = differentiated(compiled, student, teacher), differentiated(ours, student, teacher)
    torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_a_schedule_of_temperatures_is_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t, tau: kdkernels.dist_loss(s, t, temperature=tau), fullgraph=True,
        backend=counter,
    )  # fmt: skip
    student, teacher = features((5, 9), 1).requires_grad_(), features((5, 9), 2)
    graphs = None
    for tau in torch.linspace(0.5, 4, 8).double():
        torch.testing.assert_close(
            compiled(student, teacher, tau), dist(student, teacher, float(tau))
        )
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_opcheck():
    dtype = torch.float32
    ops = torch.ops.kdkernels
    student, teacher = features((7, 5), 1, dtype), features((7, 5), 2, dtype)
    for op in (ops.rkd_distance_loss, ops.rkd_angle_loss):
        for grad in (True, False):
            torch.library.opcheck(op.default, (student, teacher, grad))
    for tau in (None, torch.tensor([2.0], dtype=dtype)):
        torch.library.opcheck(ops.dist_loss.default, (student, teacher, 2.0, tau))
        _, rows, columns = ops.dist_loss(student, teacher, 2.0, tau)
        grad = torch.ones(2, dtype=dtype)
        torch.library.opcheck(
            ops.dist_loss_backward.default, (grad, student, teacher, 2.0, tau, rows, columns)
        )


@each
def test_meta(name, backend_of):
    ours, _, shapes = LOSSES[name]
    student, teacher = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in shapes[0])
    student.requires_grad_()
    loss = ours(student, teacher)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.shape == () and loss.dtype == torch.float32
    assert grad.shape == student.shape and grad.dtype == torch.bfloat16


def test_modules():
    student, teacher = features((6, 5), 1), features((6, 5), 2)
    for module, want in (
        (kdkernels.GramLoss(), gram(student, teacher)),
        (kdkernels.GramLoss(normalize="features", clip="both"),
         gram(student, teacher, "features", "both")),
        (kdkernels.RKDDistanceLoss(), rkd_distance(student, teacher)),
        (kdkernels.RKDAngleLoss(backend="reference"), rkd_angle(student, teacher)),
        (kdkernels.DISTLoss(temperature=2.0, intra_weight=3.0),
         dist(student, teacher, 2.0, 1.0, 3.0)),
    ):  # fmt: skip
        torch.testing.assert_close(module(student, teacher), want)
    maps = features((2, 3, 4, 4), 1), features((2, 5, 4, 4), 2)
    torch.testing.assert_close(kdkernels.NSTLoss()(*maps), nst(*maps))
    assert "clip='both'" in repr(kdkernels.GramLoss(normalize="features", clip="both"))
    assert "temperature=2.0" in repr(kdkernels.DISTLoss(temperature=2.0))


X, MAPS = torch.randn(4, 6), torch.randn(2, 3, 4, 4)
REFUSED = [
    ("gram_loss", TypeError, (X.tolist(), X), {}, "student | list | Tensor"),
    ("gram_loss", TypeError, (X, X.long()), {}, "teacher | int64 | float32"),
    ("gram_loss", ValueError, (MAPS, MAPS), {}, "student | (2, 3, 4, 4) | flatten(2).mT"),
    ("gram_loss", ValueError, (X, X[:3]), {}, "teacher | (3, 6) | (4, any width)"),
    ("gram_loss", ValueError, (X, X.to("meta")), {}, "teacher | meta | cpu"),
    ("gram_loss", ValueError, (X, X), dict(normalize="l1"), "normalize='l1' | 'features'"),
    ("gram_loss", ValueError, (X, X), dict(clip="student", normalize=None), "clip='student'"),
    ("gram_loss", ValueError, (X, X), dict(clip="both"), "clip='both' | normalize='gram'"),
    ("nst_loss", ValueError, (X, X), {}, "student | (4, 6) | (B, C, positions"),
    ("nst_loss", ValueError, (MAPS, MAPS[..., :2]), {}, "teacher | adaptive_avg_pool2d"),
    ("rkd_distance_loss", ValueError, (MAPS, MAPS), {}, "student | flatten(1)"),
    ("rkd_distance_loss", ValueError, (X, X), dict(backend="tpu"), "backend='tpu'"),
    ("rkd_angle_loss", ValueError, (X[:, :0], X), {}, "student | (4, 0)"),
    ("rkd_angle_loss", TypeError, (X, None), {}, "teacher | NoneType"),
    ("dist_loss", ValueError, (X, X[:, :5]), {}, "teacher_logits | (4, 5) | (4, 6)"),
    ("dist_loss", ValueError, (X[0], X[0]), {}, "student_logits | (6,) | two dimensions"),
    ("dist_loss", ValueError, (X, X.to("meta")), {}, "teacher_logits | meta | cpu"),
    ("dist_loss", ValueError, (X, X), dict(temperature=0.0), "temperature=0.0 | > 0"),
    ("dist_loss", ValueError, (X, X), dict(temperature=torch.ones(4)), "temperature | (4,)"),
    ("dist_loss", TypeError, (X, X), dict(inter_weight="1"), "inter_weight | str"),
]


@pytest.mark.parametrize("name, error, given, options, words", REFUSED)
def test_refused(name, error, given, options, words):
    with pytest.raises(error) as raised:
        getattr(kdkernels, name)(*given, **options)
    for word in words.split(" | "):
        assert word in str(raised.value), raised.value


def test_cpp_ops_refuse_what_python_never_sends():
    ops = torch.ops.kdkernels
    with pytest.raises(RuntimeError, match="student and teacher"):
        ops.rkd_distance_loss(X, X.double(), True)
    with pytest.raises(RuntimeError, match="same shape"):
        ops.dist_loss(X, X[:, :5].contiguous(), 1.0, None)
