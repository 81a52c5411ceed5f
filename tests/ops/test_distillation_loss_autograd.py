"""distillation_loss and autograd: what is differentiated, kept, written and refused."""

import copy
import math
import pickle

import oracle
import pytest
import torch
from cases import ALL, DEFAULT, PARAMETERS, differentiated, divergence, labels_for, logits, pair
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels

FULL = dict(ce_weight=0.5, z_loss_weight=0.01, label_smoothing=0.1, temperature=1.7)


@pytest.mark.parametrize("name, parameters", ALL)
def test_gradcheck(name, parameters, backend):
    """Both gradients of every term against finite differences, with an upstream per row."""
    student, teacher = pair(2, 7, dtypes=(torch.float64, torch.float64), scale=1.0)
    labels = torch.tensor([3, 0])

    def loss(s, t):
        return kdkernels.distillation_loss(
            s,
            t,
            labels,
            divergence=divergence(name, parameters),
            teacher_temperature=0.8,
            reduction="none",
            teacher_grad=True,
            backend=backend,
            **FULL,
        )

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), teacher.requires_grad_()))


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_gradcheck_of_reductions(reduction, backend):
    student, teacher = pair(3, 5, dtypes=(torch.float64, torch.float64), scale=1.0)
    labels = torch.tensor([3, -100, 0])
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def loss(s):
        return kdkernels.distillation_loss(
            s,
            teacher,
            labels,
            divergence="jsd",
            mask_kd=False,
            token_weights=weights,
            reduction=reduction,
            backend=backend,
            **FULL,
        )

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_two_backwards_with_different_upstreams(name, parameters, backend):
    """Per row, through one graph: nothing saved was scaled in place by the first."""
    student, teacher = pair(5, 67)
    labels = labels_for(student)
    student.requires_grad_()
    loss = kdkernels.distillation_loss(
        student, teacher, labels, divergence=name, reduction="none", backend=backend, **FULL
    )
    told = dict(divergence_name=name, reduction="none", **FULL)
    for seed in (1, 2, 1):
        upstream = logits(5, seed=seed)
        (grad,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        truth = oracle.distillation(student, teacher, labels, upstream=upstream, **told)
        own = oracle.eager(student, teacher, labels, upstream=upstream, **told)
        oracle.assert_no_worse_than_torch(
            grad, truth.student_grad, own[1], "grad", terms=truth.student_terms
        )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_upstream_of_a_scalar(reduction, backend):
    """loss * c: exactly representable factors give exactly scaled gradients."""
    student, teacher = pair(5, 67)
    one = differentiated(student, teacher, reduction=reduction, backend=backend)[1:]
    for factor in (2.0, -0.5, 0.0):
        scaled = differentiated(
            student, teacher, reduction=reduction, upstream=torch.tensor(factor), backend=backend
        )[1:]
        for a, b in zip(one, scaled, strict=True):
            assert torch.equal(a * factor, b)


def test_gradient_accumulates_over_two_losses(backend):
    """One tensor of logits in two losses, each with a graph of its own."""
    student, teacher = pair(4, 67)
    a = differentiated(student, teacher, divergence="jsd", backend=backend)[1]
    b = differentiated(student, teacher, divergence="reverse_kl", backend=backend)[1]
    leaf = student.clone().requires_grad_()
    options = dict(backend=backend)
    loss = kdkernels.distillation_loss(leaf, teacher, divergence="jsd", **options)
    loss = loss + kdkernels.distillation_loss(leaf, teacher, divergence="reverse_kl", **options)
    loss.backward()
    torch.testing.assert_close(leaf.grad, a + b)


def test_the_teacher_is_detached_unless_asked_for(backend):
    student, teacher = (x.requires_grad_() for x in pair(4, 67))
    kdkernels.distillation_loss(student, teacher, backend=backend).backward()
    assert student.grad is not None and teacher.grad is None
    loss = kdkernels.distillation_loss(
        student.detach(), teacher, teacher_grad=True, backend=backend
    )
    loss.backward()
    assert teacher.grad is not None
    assert not kdkernels.distillation_loss(student.detach(), teacher, backend=backend).requires_grad


def test_mutual_distillation(backend):
    """Two networks that teach each other: swapping the rows swaps a symmetric loss's gradients."""
    student, teacher = pair(4, 67)
    one = differentiated(student, teacher, divergence="jsd", backend=backend)
    two = differentiated(teacher, student, divergence="jsd", backend=backend)
    torch.testing.assert_close(one[1], two[2])
    torch.testing.assert_close(one[2], two[1])


def every_tensor_option(leading):
    return dict(
        divergence=kdkernels.divergences.jsd(torch.full(leading, 0.3)),
        temperature=torch.full(leading, 2.0),
        teacher_temperature=torch.tensor(1.5),
        kd_weight=torch.full(leading, 0.5),
        ce_weight=torch.tensor(0.5),
        z_loss_weight=torch.tensor(0.01),
        token_weights=torch.ones(leading),
        normalizer=torch.tensor(3.0),
    )


def tensors_of(options):
    values = [*options.values(), options["divergence"].first]
    return [x for x in values if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_input_is_mutated(dtype, backend):
    student, teacher = pair(4, 67, dtypes=(dtype, dtype))
    labels = labels_for(student)
    options = every_tensor_option((4,))
    inputs = [student, teacher, labels, *tensors_of(options)]
    before = [x.clone() for x in inputs]
    student.requires_grad_(), teacher.requires_grad_()
    loss, _ = kdkernels.distillation_loss(
        student, teacher, labels, teacher_grad=True, return_stats=True, backend=backend, **options
    )
    torch.autograd.grad(loss, (student, teacher), torch.tensor(0.3), retain_graph=True)
    loss.backward()
    kdkernels.distillation_loss_and_grad(
        student, teacher, labels, teacher_grad=True, backend=backend, **options
    )
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x, old) and x._version == 0


def test_what_lives_between_forward_and_backward(backend):
    """The logits themselves and some numbers a row: no buffer of the logits' size."""
    student, teacher = (x.requires_grad_() for x in pair(8, 1000))
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kdkernels.distillation_loss(student, teacher, teacher_grad=True, backend=backend)
    addresses = {student.data_ptr(), teacher.data_ptr()}
    own = [x for x in saved if x.data_ptr() not in addresses]
    assert len(saved) > len(own) and sum(x.numel() for x in own) <= 8 * 32


def test_logits_changed_after_the_forward(backend):
    """PyTorch's own error: the backward reads the logits again."""
    leaf, teacher = pair(4, 67)
    student = leaf.requires_grad_() * 1
    loss = kdkernels.distillation_loss(student, teacher, backend=backend)
    with torch.no_grad():
        student.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# In place ----------------------------------------------------------------------------------------


def in_place(student, teacher, labels=None, upstream=None, **options):
    """(loss, gradient of the model's output, whether it lay over the logits)."""
    leaf = student.clone().requires_grad_()
    output = leaf * 1
    address = output.data_ptr()
    seen = []
    output.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = kdkernels.distillation_loss(output, teacher, labels, inplace=True, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), leaf.grad, seen == [address]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_in_place(name, parameters, reduction, dtype, backend):
    """The loss and gradient of the default path, in the memory of the logits."""
    student, teacher = pair(2, 3, 67, dtypes=(dtype, dtype))
    labels = labels_for(student)
    options = dict(divergence=name, reduction=reduction, backend=backend, **FULL)
    loss, grad, over_logits = in_place(student, teacher, labels, **options)
    want_loss, want_grad, _ = differentiated(student, teacher, labels, **options)
    assert over_logits
    assert torch.equal(loss, want_loss)
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_in_place_with_an_upstream_factor(reduction, backend):
    student, teacher = pair(5, 67)
    upstream = logits(5, seed=3) if reduction == "none" else torch.tensor(0.37)
    options = dict(divergence="jsd", reduction=reduction, backend=backend)
    _, grad, over_logits = in_place(student, teacher, upstream=upstream, **options)
    want = differentiated(student, teacher, upstream=upstream, **options)[1]
    assert over_logits
    torch.testing.assert_close(grad, want)


def test_in_place_with_an_upstream_of_zero(backend):
    """0 * inf: a row whose loss is not used must not spoil the step."""
    student, teacher = pair(3, 67)
    student[1, 5] = -math.inf
    _, grad, _ = in_place(
        student, teacher, reduction="none", upstream=torch.tensor([1.0, 0.0, 1.0]), backend=backend
    )
    assert grad.isfinite().all() and (grad[1] == 0).all()


def test_in_place_raises_the_version_for_whoever_saved_the_logits(backend):
    """PyTorch's own error, not a wrong gradient."""
    leaf, teacher = pair(4, 67)
    student = leaf.requires_grad_() * 1
    other = (student**2).sum()  # saves the logits
    loss = kdkernels.distillation_loss(student, teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_a_second_backward_in_place_is_refused(backend):
    leaf, teacher = pair(4, 67)
    student = leaf.requires_grad_() * 1
    loss = kdkernels.distillation_loss(student, teacher, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_leaf_is_refused_in_place(backend):
    student, teacher = pair(4, 67)
    student.requires_grad_()
    before = student.detach().clone()
    for leaf in (student, student[1:], student.view(4, 1, 67)):
        with pytest.raises(RuntimeError, match="inplace.*leaf"):
            kdkernels.distillation_loss(
                leaf, teacher[: len(leaf)].reshape(leaf.shape), inplace=True, backend=backend
            )
    assert torch.equal(student, before)


@pytest.mark.parametrize("why", ["no_grad", "detached", "only the teacher's"])
def test_in_place_leaves_logits_alone_that_need_no_gradient(why, backend):
    leaf, teacher = pair(4, 67)
    before = leaf.clone()
    student = leaf.requires_grad_() * 1 if why == "no_grad" else leaf
    teacher.requires_grad_(why == "only the teacher's")
    with torch.set_grad_enabled(why != "no_grad"):
        loss = kdkernels.distillation_loss(
            student, teacher, teacher_grad=True, inplace=True, backend=backend
        )
    assert torch.equal(student, before) and student._version == 0
    torch.testing.assert_close(
        loss, kdkernels.distillation_loss(before, teacher, teacher_grad=True, backend=backend)
    )


def test_in_place_gives_the_teacher_its_gradient_too(backend):
    student, teacher = pair(4, 67)
    want = differentiated(student, teacher, divergence="jsd", backend=backend)
    leaf, other = student.requires_grad_(), teacher.requires_grad_()
    before = teacher.detach().clone()
    loss = kdkernels.distillation_loss(
        leaf * 1, other, divergence="jsd", teacher_grad=True, inplace=True, backend=backend
    )
    (loss * 0.5).backward()
    assert torch.equal(other, before)
    torch.testing.assert_close(leaf.grad, want[1] * 0.5)
    torch.testing.assert_close(other.grad, want[2] * 0.5)


def test_in_place_and_grad(backend):
    """distillation_loss_and_grad: the gradient over the logits, their version raised."""
    student, teacher = pair(2, 3, 67)
    loss, grad = kdkernels.distillation_loss_and_grad(student, teacher, backend=backend)
    buffer = student.clone()
    loss_in_place, grad_in_place = kdkernels.distillation_loss_and_grad(
        buffer, teacher, inplace=True, backend=backend
    )
    assert grad_in_place.data_ptr() == buffer.data_ptr() and buffer._version > 0
    assert torch.equal(loss, loss_in_place) and torch.equal(grad, grad_in_place)
    assert torch.equal(buffer, grad)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tvd", "dkd"])
def test_in_place_of_rows_within_a_larger_buffer(name, backend):
    """Only the rows' own columns are written: not the gaps, and 0 in the padding."""
    student, teacher = pair(4, 80)
    labels = labels_for(student, vocab_size=67)
    buffer = torch.full((4, 100), 7.0)
    view = buffer[:, 5:85]
    view.copy_(student)
    options = dict(divergence=name, vocab_size=67, backend=backend)
    _, grad = kdkernels.distillation_loss_and_grad(student, teacher, labels, **options)
    kdkernels.distillation_loss_and_grad(view, teacher, labels, inplace=True, **options)
    assert torch.equal(view, grad) and (view[:, 67:] == 0).all()
    assert (buffer[:, :5] == 7).all() and (buffer[:, 85:] == 7).all()


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tvd", "renyi"])
def test_in_place_over_the_teacher_itself(name, backend):
    """Self-distillation at two temperatures: the teacher's logits are the memory
    that is written.
    """
    student = logits(3, 10007)  # longer than any block of columns
    options = dict(divergence=name, teacher_temperature=2.0, teacher_grad=True, backend=backend)
    want = kdkernels.distillation_loss_and_grad(student, student.clone(), **options)
    got = kdkernels.distillation_loss_and_grad(student, student, inplace=True, **options)
    assert all(map(torch.equal, got, want))


# Double backward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_double_backward_raises(reduction, inplace, backend):
    """A gradient penalty must fail by name; dropping it in silence trains another model."""
    leaf, teacher = pair(4, 67)
    leaf.requires_grad_()
    student = leaf * 1
    loss = kdkernels.distillation_loss(
        student, teacher, reduction=reduction, inplace=inplace, backend=backend
    ).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_double_backward_by_the_upstream_factor_raises(inplace, backend):
    """A learned loss weight in a bilevel problem: its path through the gradient is not dropped."""
    leaf, teacher = pair(4, 67)
    leaf.requires_grad_()
    weight = torch.tensor(2.0, requires_grad=True)
    loss = kdkernels.distillation_loss(leaf * 1, teacher, inplace=inplace, backend=backend)
    (grad,) = torch.autograd.grad(loss * weight, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), weight)


def test_double_backward_by_the_teacher_raises(backend):
    student, teacher = (x.requires_grad_() for x in pair(4, 67))
    loss = kdkernels.distillation_loss(student, teacher, teacher_grad=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), teacher)


def test_a_graph_of_the_gradient_that_nobody_uses_is_fine(backend):
    student, teacher = pair(4, 67)
    student.requires_grad_()
    loss = kdkernels.distillation_loss(student, teacher, backend=backend)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    want = differentiated(student, teacher, backend=backend)[1]
    assert torch.equal(grad.detach(), want)


# Modes -------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    """A group of this process alone: hooks and all, no network."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_data_parallel(wrap, inplace, process_group, backend):
    """The gradients of the bare model; a rank whose tokens are all ignored takes part too."""
    teacher, labels = logits(6, 67), torch.tensor([3, -100, 5, 6, -100, 1])
    x = torch.randn(6, 16)
    bare = torch.nn.Linear(16, 67)
    wrapped = copy.deepcopy(bare)
    if wrap == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(wrapped, mesh=mesh)
    for y in (labels, torch.full_like(labels, -100)):
        for model in (bare, wrapped):
            model.zero_grad()
            kdkernels.distillation_loss(
                model(x), teacher, y, ce_weight=0.5, inplace=inplace, backend=backend
            ).backward()
        for a, b in zip(bare.parameters(), wrapped.parameters(), strict=True):
            grad = b.grad.full_tensor() if wrap == "FSDP2" else b.grad
            torch.testing.assert_close(grad, a.grad)


def test_autocast_changes_nothing(backend):
    student, teacher = pair(4, 67)
    want = differentiated(student, teacher, divergence="jsd", backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiated(student, teacher, divergence="jsd", backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_autocast_of_a_model(backend):
    """Half precision logits out of an autocast head: a float32 loss, finite gradients."""
    head = torch.nn.Linear(16, 67)
    teacher = logits(5, 67)
    with torch.autocast("cpu", torch.bfloat16):
        student = head(torch.randn(5, 16))
        loss = kdkernels.distillation_loss(student, teacher, backend=backend)
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, backend):
    student, teacher = pair(4, 67)
    want = kdkernels.distillation_loss(student, teacher, backend=backend)
    student.requires_grad_()
    with mode():
        loss, stats = kdkernels.distillation_loss(
            student, teacher, return_stats=True, backend=backend
        )
        at_once = kdkernels.distillation_loss_and_grad(student, teacher, backend=backend)
        own = (student * 1).detach()
        kdkernels.distillation_loss_and_grad(own, teacher, inplace=True, backend=backend)
    assert torch.equal(loss, want) and not loss.requires_grad
    assert torch.equal(at_once[0], want) and torch.equal(at_once[1], own)
    assert all(not x.requires_grad for x in stats)


def test_and_grad_needs_no_grad_mode(backend):
    student, teacher = pair(4, 67)
    student.requires_grad_()
    loss, grad = kdkernels.distillation_loss_and_grad(student, teacher, backend=backend)
    assert not loss.requires_grad and not grad.requires_grad and student.grad is None


def test_and_grad_returns_what_is_asked_for(backend):
    student, teacher = pair(2, 3, 67)
    f = kdkernels.distillation_loss_and_grad
    assert len(f(student, teacher, backend=backend)) == 2
    loss, student_grad, teacher_grad = f(student, teacher, teacher_grad=True, backend=backend)
    assert student_grad.shape == teacher_grad.shape == (2, 3, 67)
    loss, student_grad, stats = f(
        student, teacher, reduction="none", return_stats=True, backend=backend
    )
    assert loss.shape == (2, 3) and isinstance(stats, kdkernels.DistillationStats)
    assert len(f(student, teacher, teacher_grad=True, return_stats=True, backend=backend)) == 4


def test_fake_tensors(backend):
    """Shapes and dtypes without data, labels included, which nobody can look at."""
    with FakeTensorMode():
        student = torch.randn(4, 67, dtype=torch.bfloat16, requires_grad=True)
        teacher = torch.randn(4, 67)
        labels = torch.zeros(4, dtype=torch.long)
        loss = kdkernels.distillation_loss(
            student, teacher, labels, ce_weight=1.0, reduction="none", backend=backend
        )
        loss.sum().backward()
        at_once = kdkernels.distillation_loss_and_grad(student, teacher, labels, backend=backend)
    assert loss.shape == (4,) and loss.dtype == torch.float32
    for grad in (student.grad, at_once[1]):
        assert grad.shape == (4, 67) and grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name, parameters", ALL)
def test_nothing_waits_for_the_device(name, parameters):
    """On the meta device whatever reads a value on the host raises: so does nothing here."""
    leaf = torch.empty(4, 67, device="meta", requires_grad=True)
    teacher = torch.empty(4, 67, device="meta", requires_grad=True)
    labels = torch.empty(4, device="meta", dtype=torch.long)
    weights = torch.empty(4, device="meta")
    options = dict(
        divergence=divergence(name, parameters),
        temperature=weights,
        ce_weight=weights,
        token_weights=weights,
        normalizer=torch.empty((), device="meta"),
        teacher_grad=True,
        return_stats=True,
    )
    for inplace in (False, True):
        loss, stats = kdkernels.distillation_loss(
            leaf * 1, teacher, labels, inplace=inplace, **options
        )
        (loss * 2).backward()
        assert loss.device.type == "meta" and loss.shape == () and stats.kd.shape == (4,)
    assert leaf.grad.shape == teacher.grad.shape == (4, 67)


# The module --------------------------------------------------------------------------------------


def test_the_module_is_the_function(backend):
    student, teacher = pair(4, 67)
    labels = labels_for(student)
    weights = torch.rand(4)
    options = dict(divergence=kdkernels.divergences.jsd(0.3), backend=backend, **FULL)
    module = kdkernels.DistillationLoss(**options)
    want = kdkernels.distillation_loss(student, teacher, labels, token_weights=weights, **options)
    assert torch.equal(module(student, teacher, labels, token_weights=weights), want)
    assert torch.equal(
        module(student, teacher, labels, temperature=3.0),
        kdkernels.distillation_loss(student, teacher, labels, **{**options, "temperature": 3.0}),
    )
    assert not list(module.parameters()) and not module.state_dict()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(student, teacher, labels, token_weights=weights), want)
    assert "ce_weight=0.5" in repr(module) and "jsd" in repr(module)


# Determinism -------------------------------------------------------------------------------------

ROWS = 13  # more than two threads share evenly


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_threads_and_neighbours(name, parameters, dtype, backend):
    """Bitwise: the same call twice; with 1 and 2 threads; a row alone and among others.

    Rows of 131 columns, so that a row's place decides its alignment; the reference, whose sums are
    PyTorch's, promises the first only.
    """
    student, teacher = pair(ROWS, 131, dtypes=(dtype, dtype))
    labels = labels_for(student)
    options = dict(divergence=divergence(name, parameters), backend=backend, **FULL)

    def call(rows=slice(None), reduction="none"):
        s, t, y = student[rows].clone(), teacher[rows].clone(), labels[rows].clone()
        through_autograd = differentiated(s, t, y, reduction=reduction, **options)
        loss, *rest, stats = kdkernels.distillation_loss_and_grad(
            s, t, y, reduction=reduction, teacher_grad=True, return_stats=True, **options
        )
        return (*through_autograd, loss, *rest, *stats)

    whole = call()
    for a, b in zip(whole, call(), strict=True):
        assert torch.equal(a, b)
    if backend == "reference":
        return
    for row in (0, 1, 7, ROWS - 1):
        for a, b in zip(whole, call(slice(row, row + 1)), strict=True):
            assert torch.equal(a[row : row + 1], b)
    scalars = call(reduction="batchmean")
    torch.set_num_threads(2)
    for a, b in zip((*whole, *scalars), (*call(), *call(reduction="batchmean")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_threads_share_a_large_batch(name):
    """Enough work (64 x 32000) that torch's pool splits it; several times, as races are rare."""
    backends = [name for name, available, _ in kdkernels.ops._backend.backends() if available]
    if "cpp (CPU)" not in backends:
        pytest.skip("the C++ library is not built; the reference promises nothing here")
    student, teacher = pair(64, 32000)
    one = kdkernels.distillation_loss_and_grad(student, teacher, divergence=name, backend="cpp")
    torch.set_num_threads(2)
    for _ in range(3):
        two = kdkernels.distillation_loss_and_grad(student, teacher, divergence=name, backend="cpp")
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        in_place = student.clone()
        kdkernels.distillation_loss_and_grad(
            in_place, teacher, divergence=name, inplace=True, backend="cpp"
        )
        assert torch.equal(in_place, one[1])


def test_every_divergence_is_exercised():
    """A divergence without a case in cases.PARAMETERS would go untested."""
    assert {name for name, _ in PARAMETERS} == set(kdkernels.divergences.DIVERGENCES)
