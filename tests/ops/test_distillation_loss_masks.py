"""distillation_loss where rows or columns do not count: masks, infinities, padding, strides."""

import math
import mmap

import numpy as np
import oracle
import pytest
import torch
from cases import ALL, DEFAULT, PARAMETERS, differentiated, divergence, labels_for, pair
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels
from kdkernels._ext import cpp_error

INF = math.inf


# Masked rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("by", ["label", "weight"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none", "mean"])
@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_nothing_leaks_out_of_a_masked_row(name, parameters, reduction, by, garbage, backend):
    """Bitwise the same as without the garbage, and exactly 0 in the masked row."""
    student, teacher = pair(5, 67)
    labels = labels_for(student)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5])
    if by == "label":
        labels[1] = -100
    else:
        weights[1] = 0.0
    options = dict(
        divergence=name,
        ce_weight=0.5,
        z_loss_weight=0.1,
        label_smoothing=0.1,
        token_weights=weights,
        reduction=reduction,
        backend=backend,
    )
    clean = differentiated(student, teacher, labels, **options)
    student[1], teacher[1] = garbage, garbage
    dirty = differentiated(student, teacher, labels, **options)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert (dirty[1][1] == 0).all() and (dirty[2][1] == 0).all()
    if reduction == "none":
        assert dirty[0][1] == 0
    at_once = kdkernels.distillation_loss_and_grad(
        student, teacher, labels, teacher_grad=True, return_stats=True, **options
    )
    assert all(x.isfinite().all() for x in at_once[:3])
    assert all((x[1] == 0).all() for x in at_once[3])


def test_an_unlabelled_row_keeps_its_kd(backend):
    """mask_kd=False: an unlabelled row keeps its KD and its teacher."""
    student, teacher = pair(3, 67)
    labels = torch.tensor([1, -100, 2])
    loss, student_grad, _ = differentiated(
        student, teacher, labels, ce_weight=1.0, mask_kd=False, reduction="none", backend=backend
    )
    truth = oracle.distillation(
        student, teacher, labels, ce_weight=1.0, mask_kd=False, reduction="none"
    )
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-6)
    np.testing.assert_allclose(student_grad, truth.student_grad, atol=1e-6)
    assert loss[1] == pytest.approx(truth.kd[1], rel=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none", "mean"])
@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_all_rows_masked(name, parameters, reduction, backend):
    """Loss 0 with a graph (DDP waits for every gradient), gradient exactly 0."""
    student, teacher = pair(3, 31)
    student[1] = math.nan
    labels = torch.full((3,), -100)
    student = (student * 1).requires_grad_()
    loss = kdkernels.distillation_loss(
        student,
        teacher,
        labels,
        divergence=name,
        ce_weight=0.5,
        z_loss_weight=0.1,
        reduction=reduction,
        backend=backend,
    )
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert (student.grad == 0).all()


def test_a_normalizer_of_zero_gives_zero(backend):
    """num_items_in_batch of a batch without items, not read on the host."""
    student, teacher = pair(3, 31)
    labels = torch.full((3,), -100)
    loss, student_grad, _ = differentiated(
        student, teacher, labels, ce_weight=1.0, normalizer=torch.tensor(0.0), backend=backend
    )
    assert loss == 0 and (student_grad == 0).all()


def test_kd_and_ce_are_averaged_over_their_own_rows(backend):
    student, teacher = pair(4, 31)
    labels = torch.tensor([3, -100, -100, 7])
    both = kdkernels.distillation_loss(
        student, teacher, labels, ce_weight=1.0, mask_kd=False, backend=backend
    )
    kd = kdkernels.distillation_loss(student, teacher, backend=backend)
    ce = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(both, kd + ce)


def test_no_weight_beats_infinity(backend):
    """A term of weight 0 does not count, even where it is infinite."""
    student, teacher = pair(3, 31)
    labels = labels_for(student)
    student[0, (labels[0] + 1) % 31] = -INF  # forward KL is inf
    for weight in (0.0, torch.tensor(0.0), torch.tensor([0.0, 1.0, 1.0])):
        loss, student_grad, _ = differentiated(
            student, teacher, labels, kd_weight=weight, ce_weight=1.0, backend=backend
        )
        assert loss.isfinite() and student_grad.isfinite().all()


# -inf logits: DESIGN section 2, item 2 -----------------------------------------------------------

WHERE = {
    "both": ([3, 40], [3, 40]),
    "teacher": ([], [3, 40]),
    "student": ([3, 40], []),
    "each": ([3], [40]),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name, parameters", ALL)
def test_infinite_logits(name, parameters, where, backend):
    student, teacher = pair(32, 67)
    in_student, in_teacher = WHERE[where]
    for row in (1, 2):  # the other rows show that nothing spreads
        student[row, in_student], teacher[row, in_teacher] = -INF, -INF
    labels = torch.full((32,), 20)
    told = dict(divergence_name=name, parameters=parameters, reduction="none", temperature=2.0)
    truth = oracle.distillation(student, teacher, labels, **told)
    own = oracle.eager(student, teacher, labels, **told)
    loss, student_grad, teacher_grad = differentiated(
        student,
        teacher,
        labels,
        divergence=divergence(name, parameters),
        temperature=2.0,
        reduction="none",
        backend=backend,
    )
    oracle.assert_no_worse_than_torch(loss, truth.loss, own[0], "loss")
    # The student's gradient is finite wherever the mathematics is (forward KL of an infinite loss
    # included); the teacher's is promised only beside a finite loss.
    for who, got, theirs, promised in (
        ("student", student_grad, own[1], np.ones(32, bool)),
        ("teacher", teacher_grad, own[2], np.isfinite(truth.loss)),
    ):
        want, terms = getattr(truth, f"{who}_grad"), getattr(truth, f"{who}_terms")
        promised &= ~np.isnan(want).any(-1)
        assert promised[0] and promised[3:].all()
        oracle.assert_no_worse_than_torch(
            got[promised], want[promised], theirs[promised], who, terms=terms[promised]
        )
        assert got[np.isnan(want).any(-1)].isnan().any(-1).all()


def test_the_promises_about_infinity(backend):
    """DESIGN's sentence on -inf, word by word."""
    student, teacher = pair(1, 31)

    def result(name, in_student=(), in_teacher=(), parameters=None):
        s, t = student.clone(), teacher.clone()
        s[0, list(in_student)], t[0, list(in_teacher)] = -INF, -INF
        return differentiated(s, t, divergence=divergence(name, parameters or {}), backend=backend)

    finite = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha")
    for name in ("forward_kl", "reverse_kl", "jeffreys", *finite):
        loss, student_grad, teacher_grad = result(name, [5], [5])
        assert loss.isfinite() and student_grad.isfinite().all() and teacher_grad.isfinite().all()
        assert student_grad[0, 5] == 0 and teacher_grad[0, 5] == 0
    loss, student_grad, _ = result("forward_kl", in_teacher=[5])
    assert loss.isfinite() and student_grad.isfinite().all()
    loss, student_grad, _ = result("forward_kl", in_student=[5])
    assert loss == INF and student_grad.isfinite().all()
    for name in ("reverse_kl", "jeffreys"):
        loss, student_grad, _ = result(name, in_teacher=[5])
        assert loss == INF and student_grad.isnan().any()
    for name in finite:
        loss, student_grad, teacher_grad = result(name, [5, 6], [7, 8])
        assert loss.isfinite() and student_grad.isfinite().all() and teacher_grad.isfinite().all()


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_the_lowest_finite_logit_is_not_minus_infinity(name, parameters, backend):
    """torch.finfo.min, which masks are filled with, in both rows: as -inf, and no overflow."""
    student, teacher = pair(2, 67)
    labels = torch.tensor([20, 21])
    student[:, 5], teacher[:, 5] = -INF, -INF
    infinite = differentiated(student, teacher, labels, divergence=name, backend=backend)
    lowest = torch.finfo(torch.float32).min
    student[:, 5], teacher[:, 5] = lowest, lowest
    finite = differentiated(student, teacher, labels, divergence=name, backend=backend)
    for a, b in zip(infinite, finite, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disjoint_supports(dtype, backend):
    """No column in common: JSD(1/2) is log 2, TVD 1, alpha(1/2) 4, Renyi inf."""
    student = torch.tensor([[0.0, 1.0, -INF, -INF]], dtype=dtype)
    teacher = torch.tensor([[-INF, -INF, 2.0, 0.0]], dtype=dtype)
    for name, value in (("jsd", math.log(2)), ("tvd", 1.0), ("alpha", 4.0), ("renyi", INF)):
        loss = kdkernels.distillation_loss(student, teacher, divergence=name, backend=backend)
        assert loss.item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_a_row_of_nothing_but_infinities_stays_alone(name, parameters, backend):
    """softmax of all -inf is undefined: NaN there, the other rows bitwise what they are without."""
    student, teacher = pair(3, 67)
    labels = labels_for(student)
    clean = differentiated(
        student, teacher, labels, divergence=name, reduction="none", backend=backend
    )
    student[1] = -INF
    dirty = differentiated(
        student, teacher, labels, divergence=name, reduction="none", backend=backend
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert dirty[0][1].isnan()


# Shapes, strides, padding ------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", DEFAULT)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none", "mean"])
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)], ids=str)
def test_no_rows(shape, reduction, name, parameters, backend):
    student, teacher = torch.zeros(shape), torch.zeros(shape)
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    loss, student_grad, teacher_grad = differentiated(
        student,
        teacher,
        labels,
        divergence=name,
        ce_weight=0.5,
        reduction=reduction,
        backend=backend,
    )
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert loss.sum() == 0 and student_grad.shape == shape and teacher_grad.shape == shape


@pytest.mark.parametrize("shape", [(31,), (1, 31), (2, 1, 3, 31)], ids=str)
def test_leading_shapes(shape, backend):
    student, teacher = pair(*shape)
    labels = labels_for(student)
    loss, stats = kdkernels.distillation_loss(
        student,
        teacher,
        labels,
        ce_weight=0.5,
        reduction="none",
        return_stats=True,
        backend=backend,
    )
    truth = oracle.distillation(student, teacher, labels, ce_weight=0.5, reduction="none")
    np.testing.assert_allclose(loss, truth.loss, rtol=1e-6)
    assert all(x.shape == shape[:-1] for x in stats)


def layouts():
    """name -> a tensor of shape (6, 67) holding x, laid out otherwise."""

    def into(buffer, view):
        def lay(x):
            out = view(torch.full(buffer, math.nan, dtype=x.dtype))
            return out.copy_(x)

        return lay

    return {
        "sliced rows": into((6, 80), lambda b: b[:, 5:72]),
        "every other row": into((12, 67), lambda b: b[::2]),
        "transposed": into((67, 6), lambda b: b.T),
        "every third column": into((6, 201), lambda b: b[:, ::3]),
        "odd offset": into((6 * 67 + 1,), lambda b: b[1:].view(6, 67)),
        "row stride 68": into((6 * 68,), lambda b: b.as_strided((6, 67), (68, 1))),
        "row stride 0": lambda x: x[:1].expand(6, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("layout", layouts())
def test_strides(layout, who, dtype, backend):
    """Any layout gives bitwise what a contiguous copy gives; the gaps between are not read."""
    student, teacher = pair(6, 67, dtypes=(dtype, dtype))
    lay = layouts()[layout]
    strided_student = lay(student) if who != "teacher" else student
    strided_teacher = lay(teacher) if who != "student" else teacher
    for name in ("forward_kl", "jsd"):
        got = kdkernels.distillation_loss_and_grad(
            strided_student, strided_teacher, divergence=name, teacher_grad=True, backend=backend
        )
        want = kdkernels.distillation_loss_and_grad(
            strided_student.contiguous(),
            strided_teacher.contiguous(),
            divergence=name,
            teacher_grad=True,
            backend=backend,
        )
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        leaf = strided_student.detach().requires_grad_()
        loss = kdkernels.distillation_loss(leaf, strided_teacher, divergence=name, backend=backend)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(loss, got[0]) and grad.shape == student.shape
        torch.testing.assert_close(
            grad, got[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-9
        )


def test_shifted_logits_of_a_sequence(backend):
    """logits[:, :-1], what causal training passes: leading dimensions that do not flatten."""
    student, teacher = pair(3, 5, 67)
    labels = labels_for(student)
    leaf = student.clone().requires_grad_()
    loss = kdkernels.distillation_loss(
        leaf[:, :-1], teacher[:, :-1], labels[:, 1:], ce_weight=0.5, backend=backend
    )
    loss.backward()
    truth = oracle.distillation(student[:, :-1], teacher[:, :-1], labels[:, 1:], ce_weight=0.5)
    assert loss.item() == pytest.approx(float(truth.loss), rel=1e-6)
    np.testing.assert_allclose(leaf.grad[:, :-1], truth.student_grad, atol=1e-7)
    assert (leaf.grad[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_offsets_past_2_31_elements(dtype, backend, tmp_path):
    """Three rows 2^31 elements apart in a sparse file: 16 GiB of addresses, a few pages read."""
    apart, vocab = 2**31 + 3, 1000
    student, teacher = pair(3, vocab, dtypes=(dtype, dtype))
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate((2 * apart + vocab) * student.element_size())
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    far = torch.frombuffer(memory, dtype=dtype).as_strided((3, vocab), (apart, 1))
    far.copy_(student)
    want = kdkernels.distillation_loss_and_grad(student, teacher, backend=backend)
    swapped = kdkernels.distillation_loss_and_grad(teacher, student, backend=backend)
    got = kdkernels.distillation_loss_and_grad(far, teacher, backend=backend)
    assert all(map(torch.equal, got, want))
    got = kdkernels.distillation_loss_and_grad(teacher, far, backend=backend)
    assert all(map(torch.equal, got, swapped))
    loss, grad = kdkernels.distillation_loss_and_grad(far, teacher, inplace=True, backend=backend)
    assert torch.equal(loss, want[0]) and torch.equal(far, want[1])


def test_vocab_size(backend):
    """Columns past the vocabulary are not read and get gradient 0; either row may be padded."""
    student, teacher = pair(5, 67)
    labels = labels_for(student)
    clean = differentiated(student, teacher, labels, ce_weight=0.5, backend=backend)
    for extra_student, extra_teacher in ((13, 13), (13, 0), (0, 13), (1, 30)):
        padded = [
            torch.cat([x, torch.full((5, extra), math.nan)], -1)
            for x, extra in ((student, extra_student), (teacher, extra_teacher))
        ]
        loss, student_grad, teacher_grad = differentiated(
            *padded, labels, ce_weight=0.5, vocab_size=67, backend=backend
        )
        assert torch.equal(loss, clean[0])
        assert torch.equal(student_grad[:, :67], clean[1]) and (student_grad[:, 67:] == 0).all()
        assert torch.equal(teacher_grad[:, :67], clean[2]) and (teacher_grad[:, 67:] == 0).all()


def test_mean_divides_by_the_true_vocabulary(backend):
    student, teacher = pair(5, 80)
    told = dict(vocab_size=67, backend=backend)
    mean = kdkernels.distillation_loss(student, teacher, reduction="mean", **told)
    batchmean = kdkernels.distillation_loss(student, teacher, reduction="batchmean", **told)
    torch.testing.assert_close(mean, batchmean / 67)


# Anything at all ---------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """A whole call: shapes, strides, masks, infinities, options."""
    leading = draw(st.sampled_from([(), (1,), (4,), (2, 3), (0,), (3, 1, 2)]))
    vocab = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 100]))
    padding = draw(st.integers(0, 5))
    name, parameters = draw(st.sampled_from(PARAMETERS))
    dtypes = draw(
        st.sampled_from(
            [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]
        )
    )
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    rows = math.prod(leading)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    def draw_logits(dtype):
        row_gap = draw(st.integers(0, 3))
        x = torch.randn(rows, vocab + padding + row_gap, generator=generator) * 3
        x = x.to(dtype)[:, : vocab + padding]
        return x.unflatten(0, leading) if leading else x[0]

    student, teacher = draw_logits(dtypes[0]), draw_logits(dtypes[1])
    if draw(st.booleans()) and vocab > 2:  # the same columns -inf in both, one never
        hidden = (rand(*leading, vocab + padding) < 0.3).index_fill(-1, torch.tensor([0]), False)
        student = student.masked_fill(hidden, -INF)
        teacher = teacher.masked_fill(hidden, -INF)
    labels = None
    mask_kd = True
    if name == "dkd" or draw(st.booleans()):
        labels = torch.zeros(leading, dtype=torch.long)  # column 0 is never -inf
        mask_kd = name == "dkd" or draw(st.booleans())
        labels[rand(*leading) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    weights = None
    if draw(st.booleans()):
        weights = rand(*leading) + 0.1
        weights[rand(*leading) < 0.3] = 0.0
    options = dict(
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
        teacher_temperature=draw(st.sampled_from([None, 2.0])),
        t_squared=draw(st.booleans()),
        kd_weight=draw(st.sampled_from([1.0, 0.5])),
        ce_weight=draw(st.sampled_from([0.0, 1.0])) if labels is not None else 0.0,
        z_loss_weight=draw(st.sampled_from([0.0, 0.01])),
        mask_kd=mask_kd,
        token_weights=weights,
        vocab_size=vocab,
        reduction=draw(st.sampled_from(["batchmean", "sum", "none", "mean"])),
    )
    return name, parameters, student, teacher, labels, options


backends = ["reference"] + (["cpp"] if cpp_error() is None else [])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(problems(), st.sampled_from(backends))
def test_any_call(problem, backend):
    """Within a tolerance that no rounding passes and no mistake survives."""
    name, parameters, student, teacher, labels, options = problem
    truth = oracle.distillation(
        student, teacher, labels, divergence_name=name, parameters=parameters, **options
    )
    got = differentiated(
        student,
        teacher,
        labels,
        divergence=divergence(name, parameters),
        backend=backend,
        **options,
    )
    single = torch.float64 not in (student.dtype, teacher.dtype)
    unit = 2e-5 if single else 1e-12
    np.testing.assert_allclose(got[0].double(), truth.loss, rtol=unit, atol=unit)
    for grad, want, terms in (
        (got[1], truth.student_grad, truth.student_terms),
        (got[2], truth.teacher_grad, truth.teacher_terms),
    ):
        store = 0.0 if grad.dtype == torch.float64 else torch.finfo(grad.dtype).eps
        allowed = terms[..., None] * unit + np.abs(want) * store
        assert (np.abs(grad.double().numpy() - want) <= allowed).all()
