"""distillation_loss under torch.compile, and torch.library.opcheck of the ops beneath it."""

import pytest
import torch
from cases import differentiated, labels_for, pair
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels._ext import cpp_error
from kdkernels.divergences import DIVERGENCES
from kdkernels.ops.distillation_loss import reference

OPS = torch.ops.kdkernels


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, compiler="aot_eager"):
    """aot_eager: the graph, its autograd and functionalisation without a C++ compiler's minutes."""
    return torch.compile(function, fullgraph=True, backend=compiler)


@pytest.mark.parametrize(
    "backend, name",
    [("cpp", name) for name in DIVERGENCES]
    + [("reference", name) for name in ("forward_kl", "jsd", "dkd")],  # seconds each to trace
    indirect=["backend"],
)
def test_full_graph(name, backend):
    student, teacher = pair(4, 67)
    labels = labels_for(student)
    options = dict(
        divergence=name,
        ce_weight=0.5,
        z_loss_weight=0.01,
        label_smoothing=0.1,
        temperature=1.7,
        reduction="none",
        backend=backend,
    )
    want = differentiated(student, teacher, labels, **options)
    s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()

    @compiled
    def loss(s, t):
        return kdkernels.distillation_loss(s, t, labels, teacher_grad=True, **options)

    value = loss(s, t)
    grads = torch.autograd.grad(value, (s, t), torch.ones_like(value))
    for a, b in zip((value, *grads), want, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor(backend):
    """The default compiler, with work of its own on both sides of the op."""
    student, teacher = pair(4, 67)
    labels = labels_for(student)
    leaf = student.clone().requires_grad_()

    def step(x, t):
        loss, stats = kdkernels.distillation_loss(
            torch.tanh(x) * 3, t, labels, ce_weight=0.5, return_stats=True, backend=backend
        )
        return loss * 2, stats.kd + 1

    want, want_kd = step(leaf, teacher)
    (want_grad,) = torch.autograd.grad(want, leaf)
    got, got_kd = compiled(step, "inductor")(leaf, teacher)
    (got_grad,) = torch.autograd.grad(got, leaf)
    torch.testing.assert_close((got, got_kd, got_grad), (want, want_kd, want_grad))


@pytest.mark.parametrize("where", ["inside", "input"])
def test_in_place(where, backend):
    """Logits made inside the graph, and the graph's input (mark_dirty loses their gradient)."""
    student, teacher = pair(4, 67)
    leaf = student.clone().requires_grad_()

    @compiled
    def loss(x, t):
        logits = x * 1 if where == "inside" else x
        return kdkernels.distillation_loss(
            logits, t, divergence="jsd", inplace=True, backend=backend
        )

    value = loss(leaf if where == "inside" else leaf * 1, teacher)
    (value * 0.5).backward()
    want, want_grad, _ = differentiated(student, teacher, divergence="jsd", backend=backend)
    torch.testing.assert_close(value.detach(), want)
    torch.testing.assert_close(leaf.grad, want_grad * 0.5)


def test_and_grad(backend):
    student, teacher = pair(4, 67)
    want = kdkernels.distillation_loss_and_grad(
        student, teacher, teacher_grad=True, backend=backend
    )

    @compiled
    def both(s, t):
        return kdkernels.distillation_loss_and_grad(s, t, teacher_grad=True, backend=backend)

    torch.testing.assert_close(both(student, teacher), want)


def test_the_module(backend):
    student, teacher = pair(4, 67)
    module = kdkernels.DistillationLoss(divergence="jsd", temperature=2.0, backend=backend)
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True, backend="aot_eager")(student, teacher),
        module(student, teacher),
    )


def test_a_schedule_compiles_once(backend):
    """20 values of every schedulable option, as 0-d tensors: one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    student, teacher = pair(4, 67)
    labels = labels_for(student)
    student.requires_grad_()

    @torch.compile(fullgraph=True, backend=counter)
    def loss(s, t, value):
        return kdkernels.distillation_loss(
            s,
            t,
            labels,
            divergence=kdkernels.divergences.jsd(value / 10),
            temperature=value,
            teacher_temperature=value + 1,
            kd_weight=value / 8,
            ce_weight=value / 9,
            z_loss_weight=value / 100,
            normalizer=value * 4,
            backend=backend,
        )

    seen = set()
    for value in torch.linspace(0.5, 5.0, 20):
        result = loss(student, teacher, value)
        (grad,) = torch.autograd.grad(result, student)
        assert grad.isfinite().all()
        seen.add(result.item())
    assert counter.frame_count == 1
    assert len(seen) == 20


def test_dynamic_shapes(backend):
    """Another number of tokens a step: no graph a length."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(s, t, y):
        return kdkernels.distillation_loss(s, t, y, ce_weight=0.5, backend=backend)

    for tokens in (4, 5, 7, 9, 12):
        student, teacher = pair(tokens, 67)
        labels = labels_for(student)
        student.requires_grad_()
        value = loss(student, teacher, labels)
        value.backward()
        want = kdkernels.distillation_loss(student, teacher, labels, ce_weight=0.5, backend=backend)
        torch.testing.assert_close(value, want)
    assert counter.frame_count <= 2  # the first length, and every other


# opcheck -----------------------------------------------------------------------------------------

needs_cpp = pytest.mark.skipif(
    cpp_error() is not None, reason="without the C++ library the ops are the reference"
)


def arguments(op, student, teacher, **given):
    """Every argument of an op's schema, by name, with the values of a plain call."""
    n, v = student.shape
    values = {
        "student": student,
        "teacher": teacher,
        "labels": None,
        "divergence": "forward_kl",
        "temperature": 2.0,
        "teacher_temperature": 2.0,
        "kd_weight": 1.0,
        "normalizer": None,
        "t_squared": True,
        "ignore_index": -100,
        "mask_kd": True,
        "vocab_size": v,
        "reduction": "batchmean",
        "return_stats": False,
        "student_grad": True,
        "teacher_grad": True,
        **given,
    }
    out = []
    for argument in op._schema.arguments:
        empty = None if "Optional" in str(argument.type) else 0.0
        out.append(values.get(argument.name, empty))
    return tuple(out)


VARIANTS = {
    "plain": lambda n: {"teacher_grad": False},
    "everything": lambda n: dict(
        labels=torch.arange(n),
        token_weights=torch.rand(n),
        divergence="jsd",
        first_tensor=torch.rand(n),
        temperature_tensor=torch.rand(n) + 0.5,
        teacher_temperature_tensor=torch.rand(1) + 0.5,
        kd_weight_tensor=torch.rand(1),
        ce_weight=0.5,
        z_loss_weight=0.1,
        normalizer_tensor=torch.tensor([3.0]),
        label_smoothing=0.1,
        vocab_size=60,
        return_stats=True,
    ),
    "none": lambda n: dict(reduction="none", divergence="alpha", first=0.5, labels=torch.arange(n)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "op", ["distillation_loss", "distillation_loss_and_grad", "distillation_loss_and_grad_"]
)
def test_opcheck(op, variant):
    student, teacher = pair(4, 67, dtypes=(torch.bfloat16, torch.float32))
    op = getattr(OPS, op).default
    torch.library.opcheck(op, arguments(op, student, teacher, **VARIANTS[variant](4)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_of_the_backward(wanted, variant):
    student, teacher = pair(4, 67, dtypes=(torch.float32, torch.bfloat16))
    given = VARIANTS[variant](4)
    forward = OPS.distillation_loss.default
    loss, rows = forward(*arguments(forward, student, teacher, **given))
    op = OPS.distillation_loss_backward.default
    backward = dict(grad_loss=torch.rand_like(loss), rows=rows)
    backward |= dict(student_grad=wanted[0], teacher_grad=wanted[1])
    torch.library.opcheck(op, arguments(op, student, teacher, **{**given, **backward}))


@pytest.mark.parametrize("factor", [torch.tensor(0.5), torch.rand(4)], ids=["scalar", "per row"])
def test_opcheck_of_scale_rows(factor):
    torch.library.opcheck(OPS.scale_rows_.default, (torch.rand(4, 67), factor))


@needs_cpp
def test_the_reference_is_the_fake_kernel():
    """Strides and dtypes of what the compiled ops return are what the fake ones promise."""
    student, teacher = pair(4, 67, dtypes=(torch.bfloat16, torch.float32))
    strided = student.new_empty(4, 90)[:, :67].copy_(student)
    op = OPS.distillation_loss_and_grad.default
    for s in (student, strided):
        args = arguments(op, s, teacher, return_stats=True)
        for a, b in zip(op(*args), reference.distillation_loss_and_grad(*args), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
