"""joint_distillation_loss is the sum of its two parts, in one op."""

import pytest
import torch

from kdkernels import (
    distillation_loss,
    feature_loss,
    joint_distillation_loss,
)
from kdkernels.ops import feature_loss as features
from kdkernels.ops.distillation_loss import _prepare

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LOGITS = {
    "divergence": "jsd",
    "temperature": 2.0,
    "ce_weight": 0.5,
    "label_smoothing": 0.125,
    "z_loss_weight": 0.01,
}


def make(dtype=torch.float32, rows=6):
    """Odd sizes, a feature that is no contiguous tensor, one label that is ignored."""
    logits = torch.randn(rows, 11).to(dtype).requires_grad_()
    labels = torch.randint(11, (rows,))
    labels[1:2] = -100
    maps = torch.randn(rows, 3, 5, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    vectors = torch.randn(rows, 7, 9).to(dtype)[:, 1:]
    students = [x.requires_grad_() for x in (maps, vectors.clone())]
    teachers = [torch.randn(x.shape).to(dtype) for x in students]
    return logits, torch.randn(rows, 11).to(dtype), labels, students, teachers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", features.METRICS)
def test_sum_of_its_parts(backend, dtype, metric):
    logits, teacher_logits, labels, students, teachers = make(dtype)
    variances = [torch.randn(3).requires_grad_(), torch.randn(9).requires_grad_()]
    own = {"log_variance": variances} if metric == "gaussian_nll" else {}
    mask = [torch.rand(6, 5, 4) > 0.3, torch.rand(6, 6)]
    got, stats = joint_distillation_loss(
        logits,
        teacher_logits,
        labels,
        students,
        teachers,
        metric=metric,
        feature_mask=mask,
        feature_weights=[0.5, 2.0],
        feature_reduction="mean",
        return_stats=True,
        backend=backend,
        **LOGITS,
        **own,
    )
    of_logits, tokens = distillation_loss(
        logits, teacher_logits, labels, return_stats=True, backend=backend, **LOGITS
    )
    of_features, parts = feature_loss(
        students,
        teachers,
        metric=metric,
        mask=mask,
        weights=[0.5, 2.0],
        reduction="mean",
        return_parts=True,
        backend=backend,
        **own,
    )
    torch.testing.assert_close(got, of_logits + of_features)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(stats.logits, of_logits.detach())
    torch.testing.assert_close(stats.features, parts)
    for a, b in zip(stats.tokens, tokens, strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    inputs = [logits, *students, *(variances if own else [])]
    want = torch.autograd.grad(of_logits + of_features, inputs, retain_graph=True)
    for factor in (1.0, 3.0):  # from the forward, and computed anew
        grads = torch.autograd.grad(got, inputs, torch.tensor(factor), retain_graph=True)
        for a, b in zip(grads, want, strict=True):
            assert a.dtype == b.dtype
            rounding = 2 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, (factor * b).to(a.dtype), rtol=rounding, atol=1e-7)


def test_dtypes_of_logits_and_features_differ(backend):
    """float64 logits with float32 features and the other way round: float64, each exact."""
    for first, second in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        logits, teacher_logits, labels, _, _ = make(first)
        _, _, _, students, teachers = make(second)
        got = joint_distillation_loss(
            logits, teacher_logits, labels, students, teachers, ce_weight=1.0, backend=backend
        )
        of_logits = distillation_loss(logits, teacher_logits, labels, ce_weight=1.0)
        assert got.dtype == torch.float64
        torch.testing.assert_close(
            got, of_logits.double() + feature_loss(students, teachers).double()
        )
        for x in torch.autograd.grad(got, [logits, *students]):
            assert x.isfinite().all()


def test_gradcheck(backend):
    logits, teacher_logits, labels, students, teachers = make(torch.float64, rows=2)

    def loss(logits, *students):
        return joint_distillation_loss(
            logits,
            teacher_logits,
            labels,
            list(students),
            teachers,
            metric="attention",
            backend=backend,
            **LOGITS,
        )

    assert torch.autograd.gradcheck(loss, (logits, *students))


def test_frozen_parts(backend):
    """Only the features, only the logits, or nothing need a gradient."""
    logits, teacher_logits, labels, students, teachers = make()
    frozen = [x.detach() for x in students]
    options = {"ce_weight": 1.0, "backend": backend}
    one = joint_distillation_loss(logits, teacher_logits, labels, frozen, teachers, **options)
    two = joint_distillation_loss(
        logits.detach(), teacher_logits, labels, students, teachers, **options
    )
    three = joint_distillation_loss(
        logits.detach(), teacher_logits, labels, frozen, teachers, **options
    )
    assert torch.equal(one, two) and torch.equal(one, three) and not three.requires_grad
    (grad,) = torch.autograd.grad(one, logits)
    (want,) = torch.autograd.grad(
        distillation_loss(logits, teacher_logits, labels, **options), logits
    )
    torch.testing.assert_close(grad, want)
    for a, b in zip(
        torch.autograd.grad(two, students),
        torch.autograd.grad(feature_loss(students, teachers), students),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_masks_and_no_rows(backend):
    logits, teacher_logits, labels, students, teachers = make()
    with torch.no_grad():
        logits[1], students[0][1], students[1][1] = torch.nan, torch.nan, torch.nan
    mask = torch.ones(6)
    mask[1] = 0
    loss = joint_distillation_loss(
        logits, teacher_logits, labels, students, teachers, feature_mask=mask, backend=backend
    )
    for grad in torch.autograd.grad(loss, [logits, *students]):
        assert grad.isfinite().all() and (grad[1] == 0).all()
    logits, teacher_logits, labels, students, teachers = make(rows=0)
    loss = joint_distillation_loss(
        logits, teacher_logits, labels, students, teachers, backend=backend
    )
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 11)


def test_threads():
    """Bitwise the same on any number, with logits and features in one region."""
    logits = torch.randn(400, 300, requires_grad=True)
    student = torch.randn(400, 16, 8, 8, requires_grad=True)
    given = torch.randn(400, 300), torch.randint(300, (400,)), [student], torch.randn(400, 16, 8, 8)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = joint_distillation_loss(logits, *given, metric="cosine", ce_weight=1.0)
        results.append([loss, *torch.autograd.grad(loss, [logits, student])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    logits, teacher_logits, labels, students, teachers = make()
    call = _prepare(logits.detach(), teacher_logits, labels, ce_weight=1.0)
    given = features.prepare([x.detach() for x in students], teachers)
    torch.library.opcheck(
        torch.ops.kdkernels.joint_distillation_loss.default,
        (
            call.student,
            call.teacher,
            *call.options,
            *given.arguments(),
            True,
            [True, True, False, False],
        ),
    )


def test_compiled(backend):
    """One graph; a schedule of temperature and weights in tensors does not compile it again."""
    torch._dynamo.reset()
    logits, teacher_logits, labels, students, teachers = make()

    def loss(logits, a, b, temperature, weights):
        return joint_distillation_loss(
            logits,
            teacher_logits,
            labels,
            [a, b],
            teachers,
            temperature=temperature,
            feature_weights=weights,
            ce_weight=0.5,
            backend=backend,
        )

    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in torch.linspace(1, 2, 4):
        given = (logits, *students, step, step * torch.tensor([1.0, 0.5]))
        got = torch.autograd.grad(2 * compiled(*given), [logits, *students])
        want = torch.autograd.grad(2 * loss(*given), [logits, *students])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


def test_projector_modules():
    logits, teacher_logits, labels, students, _ = make()
    linear = torch.nn.Linear(9, 5)
    teachers = [torch.randn(6, 3, 5, 4), torch.randn(6, 6, 5)]
    got = joint_distillation_loss(
        logits, teacher_logits, labels, students, teachers, projector=[None, linear]
    )
    want = distillation_loss(logits, teacher_logits, labels) + feature_loss(
        [students[0], linear(students[1])], teachers
    )
    torch.testing.assert_close(got, want)


def test_double_backward_is_refused(backend):
    logits, teacher_logits, labels, students, teachers = make()
    loss = joint_distillation_loss(
        logits, teacher_logits, labels, students, teachers, backend=backend
    )
    grads = torch.autograd.grad(loss, [logits, *students], create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="double backward"):
            grad.sum().backward(retain_graph=True)


def test_errors(backend):
    logits, teacher_logits, labels, students, teachers = make()
    given = logits, teacher_logits, labels, students, teachers

    def call(*arguments, **options):
        return joint_distillation_loss(*arguments, backend=backend, **options)

    with pytest.raises(TypeError, match="got 'inplace'; accepted"):
        call(*given, inplace=True)
    with pytest.raises(ValueError, match="reduction='none'; accepted"):
        call(*given, reduction="none")
    with pytest.raises(ValueError, match="feature_reduction='none'; accepted"):
        call(*given, feature_reduction="none")
    with pytest.raises(TypeError, match="projector is a Tensor; accepted: modules"):
        call(*given, projector=[torch.ones(3, 3), None])
    with pytest.raises(TypeError, match="student_features is a int"):
        call(logits, teacher_logits, labels, 3, teachers)
    with pytest.raises(ValueError, match="temperature=0"):
        call(*given, temperature=0.0)
    with pytest.raises(IndexError, match="labels\\[2\\] is 11; accepted: 0 to 10"):
        bad = labels.clone()
        bad[2] = 11
        call(logits, teacher_logits, bad, students, teachers)
