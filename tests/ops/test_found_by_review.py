"""Bugs that a reviewer found, each a test before it was mended."""

import pytest
import torch
from torch import nn

import kdkernels
from kdkernels.ops import _backend
from kdkernels.ops.linear_distillation_loss import low_memory


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_similarity_loss_with_the_student_as_keys_of_another_teacher_reads_the_teacher(backend):
    """Only where both key sets are the batch itself may they be left out."""
    s, t, keys = randn(6, 4), randn(6, 5, seed=1), randn(6, 5, seed=2)
    options = dict(exclude_diagonal=True, backend=backend)
    got = kdkernels.similarity_loss(s, t, s, keys, **options)
    torch.testing.assert_close(got, kdkernels.similarity_loss(s, t, s.clone(), keys, **options))
    assert got != kdkernels.similarity_loss(s, randn(6, 5, seed=3), s, keys, **options)


@pytest.mark.parametrize("own", [True, False], ids=["own keys", "student_keys is student"])
def test_similarity_loss_compiles_with_one_tensor_in_two_roles(own):
    t = randn(6, 5, seed=1)
    keys = t if own else randn(6, 5, seed=2)

    def loss(s):
        return kdkernels.similarity_loss(s, t, s, keys)

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        s = randn(6, 4).requires_grad_()
        grads += torch.autograd.grad(run(s), s)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["gram_loss", "nst_loss", "rkd_distance_loss", "rkd_angle_loss"])
def test_double_backward_of_relations_raises(name):
    shape = (4, 3, 5) if name == "nst_loss" else (4, 3)
    s = randn(*shape).requires_grad_()
    (grad,) = torch.autograd.grad(
        getattr(kdkernels, name)(s, randn(*shape, seed=1)), s, create_graph=True
    )
    with pytest.raises(NotImplementedError):
        (grad**2).sum().backward()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_projector_weight_gradient_does_not_see_under_the_mask(reduction, backend):
    s, weight, t = randn(2, 5, 3), randn(3, 4, seed=1).requires_grad_(), randn(2, 5, 4, seed=2)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    grads = []
    for hidden in (torch.nan, 0.0):
        x = s.masked_fill(~mask[..., None], hidden)
        loss = kdkernels.feature_loss(
            x, t, mask=mask, projector=weight, reduction=reduction, backend=backend
        )
        grads += torch.autograd.grad(loss.sum(), weight)
    torch.testing.assert_close(*grads)


def test_projector_weight_gradient_of_a_layer_of_weight_0(backend):
    s, weight = torch.full((2, 3), torch.nan), randn(3, 4, seed=1).requires_grad_()
    loss = kdkernels.feature_loss(
        [s], [randn(2, 4)], projector=[weight], weights=torch.zeros(1), backend=backend
    )
    (grad,) = torch.autograd.grad(loss, weight)
    assert loss == 0 and not grad.any()


def test_features_compile_with_one_student_layer_for_two_of_the_teacher():
    teachers = [randn(4, 3, seed=1), randn(4, 3, seed=2)]

    def loss(s):
        return kdkernels.feature_loss([s, s], teachers)

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        s = randn(4, 3).requires_grad_()
        grads += torch.autograd.grad(run(s), s)
    torch.testing.assert_close(*grads)


def test_posterior_and_reference_are_exact_under_autocast():
    features, prototypes = randn(5, 4) + 3, randn(3, 4, seed=1)
    options = dict(kernel="dot", center=False)
    for run in (
        lambda: kdkernels.prototype_posterior(features, prototypes, **options),
        lambda: kdkernels.similarity_loss(
            features, features * 2, prototypes, prototypes, backend="reference", **options
        ),
    ):
        want = run()
        with torch.autocast("cpu", torch.bfloat16):
            got = run()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_dist_loss_is_float32_whatever_its_options_are():
    two = torch.tensor(2.0, dtype=torch.float64)
    loss = kdkernels.dist_loss(
        randn(4, 5), randn(4, 5, seed=1), temperature=two, inter_weight=two, intra_weight=two
    )
    assert loss.dtype == torch.float32


def test_dist_loss_names_the_one_shape_it_takes():
    with pytest.raises(ValueError, match=r"accepted: a float, \(\)$"):
        kdkernels.dist_loss(randn(4, 5), randn(4, 5), temperature=torch.ones(1))


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_teacher_center_in_another_dtype(cast):
    center = cast(kdkernels.TeacherCenter(3, momentum=0.5))
    center.update(torch.tensor([[1.0, 2.0, 4.0]]))
    torch.testing.assert_close(center.value.float(), torch.tensor([0.5, 1.0, 2.0]))


def test_a_float_option_that_torch_compile_made_dynamic():
    """The second value of a Python float becomes symbolic, which math.isfinite could not take."""

    def loss(s, temperature):
        return kdkernels.distillation_loss(s, s * 2, temperature=temperature)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    dynamic = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for temperature in (1.5, 2.5, 3.5):
        s = randn(3, 7)
        for run in (compiled, dynamic):
            torch.testing.assert_close(run(s, temperature), loss(s, temperature))


def test_low_memory_refuses_teacher_logits_that_do_not_flatten(monkeypatch):
    """``logits[:, :-1]`` has no single row stride, which the Triton kernels need."""
    monkeypatch.setattr(low_memory, "refusal", lambda *asked: None)  # as on a GPU
    monkeypatch.setattr(_backend, "choose", lambda *asked: ("triton", ""))
    hidden, weight = randn(2, 3, 4), randn(8, 4, seed=1)
    with pytest.raises(ValueError, match="teacher_logits has shape .* flatten to one stride"):
        kdkernels.linear_distillation_loss(
            hidden, weight, teacher_logits=randn(2, 4, 8)[:, :-1], low_memory=True
        )
