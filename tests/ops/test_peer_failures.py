"""Failures seen in other distillation kernels, each reproduced there and held out of ours."""

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import DEFAULT, differentiated, labels_for, logits, pair

import kdkernels


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha"])
def test_low_temperature_with_probabilities_that_underflow(name, backend):
    """Liger-Kernel #1453: JSD's 0/0 where both underflow; every gradient row NaN at T = 0.1."""
    student, teacher = pair(8, 1000)
    loss, *grads = differentiated(
        student, teacher, divergence=name, temperature=0.1, reduction="none", backend=backend
    )
    assert loss.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_total_variation_of_a_student_equal_to_its_teacher(backend):
    """Liger-Kernel #1373: gradient -1/2 instead of 0 at ties, all of them in self-distillation."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for vocab in (7, 1000, 32000):
            student = logits(2, vocab, dtype=dtype)
            for temperature in (1.0, 1.7):
                loss, *grads = differentiated(
                    student, student, divergence="tvd", temperature=temperature, backend=backend
                )
                assert loss == 0 and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_all_tokens_ignored(name, parameters, backend):
    """Liger-Kernel's TVD divides by zero; torchtune's constant without a graph stops DDP."""
    student, teacher = pair(4, 31)
    student.requires_grad_()
    labels = torch.full((4,), -100)
    loss = kdkernels.distillation_loss(student, teacher, labels, divergence=name, backend=backend)
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()


def test_forward_kl_is_a_divergence(backend):
    """torchtune and MiniLLM leave the teacher's entropy in: their value at equality is H, not 0."""
    student = logits(4, 131)
    loss, stats = kdkernels.distillation_loss(student, student, return_stats=True, backend=backend)
    assert loss == 0 and (stats.teacher_entropy > 0.5).all()


def test_t_squared_scales_value_and_gradient_alike(backend):
    """axolotl: T^2 in the reported loss only, gradients a quarter of it at T = 2."""
    student, teacher = pair(2, 9, dtypes=(torch.float64, torch.float64))
    for t_squared in (True, False):
        options = dict(temperature=2.0, t_squared=t_squared, backend=backend)
        _, grad, _ = differentiated(student, teacher, **options)
        step = torch.zeros_like(student)
        step[1, 4] = 1e-6
        up, down = (
            kdkernels.distillation_loss(student + sign * step, teacher, **options)
            for sign in (1, -1)
        )
        assert grad[1, 4].item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6)


def test_a_graph_walked_twice(backend):
    """Liger-Kernel, flash-linear-attention: the saved gradient is scaled in place, doubling it."""
    student, teacher = pair(4, 67)
    student.requires_grad_()
    loss = kdkernels.distillation_loss(student, teacher, backend=backend)
    first = torch.autograd.grad(loss, student, torch.tensor(2.0), retain_graph=True)[0]
    second = torch.autograd.grad(loss, student, torch.tensor(2.0))[0]
    assert torch.equal(first, second)


def test_logits_survive_the_backward(backend):
    """Automodel overwrites the saved logits: whoever reads them for metrics gets gradients."""
    leaf, teacher = pair(4, 67)
    student = leaf.requires_grad_() * 1
    before = student.detach().clone()
    kdkernels.distillation_loss(student, teacher, backend=backend).backward()
    assert torch.equal(student, before)


@pytest.mark.parametrize("noise, tolerance", [(0.5, 1e-5), (0.15, 1e-4), (0.03, 1e-3)])
def test_bfloat16_near_the_teacher(noise, tolerance, backend):
    """Chunked JSDs take bfloat16 log-softmaxes: gradients off by 1.9 % to 27 %, a negative loss.

    Against the truth for the same bfloat16 logits; the one rounding at the store costs 0.17 %.
    """
    student = logits(8, 8192, scale=1.0).bfloat16()
    teacher = (student + noise * logits(8, 8192, seed=7, scale=1.0)).bfloat16()
    loss, grad, _ = differentiated(student, teacher, divergence="jsd", backend=backend)
    truth = oracle.distillation(student, teacher, divergence_name="jsd")
    assert loss.item() == pytest.approx(float(truth.loss), rel=tolerance)
    error = np.linalg.norm(grad.double().numpy() - truth.student_grad)
    assert error < 0.0025 * np.linalg.norm(truth.student_grad)


def test_vocabularies_padded_unequally(backend):
    """Qwen: 151936 columns against 152064. Others raise, truncate by hand, or pad with zeros."""
    student, teacher = pair(2, 152064, dtypes=(torch.bfloat16, torch.bfloat16))
    student = student[:, :151936]
    with pytest.raises(ValueError, match="vocab_size"):
        kdkernels.distillation_loss(student, teacher, backend=backend)
    loss = kdkernels.distillation_loss(student, teacher, vocab_size=151936, backend=backend)
    want = F.kl_div(
        student.double().log_softmax(-1),
        teacher[:, :151936].double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_suppressed_tokens(backend):
    """TRL #5594, heretic #348: a finite loss, NaN gradients where both models suppress tokens."""
    student, teacher = pair(4, 131)
    student[:, 100:], teacher[:, 100:] = -torch.inf, -torch.inf
    for name in ("forward_kl", "reverse_kl", "jsd"):
        loss, *grads = differentiated(student, teacher, divergence=name, backend=backend)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
        cut, *cut_grads = differentiated(
            student[:, :100], teacher[:, :100], divergence=name, backend=backend
        )
        torch.testing.assert_close(loss, cut)
        torch.testing.assert_close(grads[0][:, :100], cut_grads[0])


def test_a_padded_row_of_nan(backend):
    """TRL multiplies by the mask: 0 * NaN poisons the sum."""
    student, teacher = pair(4, 67)
    labels = labels_for(student)
    labels[2] = -100
    student[2] = torch.nan
    loss, grad, _ = differentiated(student, teacher, labels, ce_weight=1.0, backend=backend)
    assert loss.isfinite() and grad.isfinite().all()


def test_kl_div_of_two_zeros(backend):
    """Liger-Kernel and PyTorch: 0 * inf where the target is 0 and the input -inf."""
    x = torch.tensor([[0.0, -torch.inf]])
    q = torch.tensor([[1.0, 0.0]])
    assert kdkernels.kl_div(x, q, reduction="batchmean", backend=backend) == 0
    assert F.kl_div(x, q, reduction="batchmean").isnan()
