"""What an independent review found in the first version: each a case that went wrong in silence."""

import pytest
import torch

from kdkernels import distillation_loss, distillation_loss_and_grad, divergences


def test_in_place_refuses_a_view_of_a_leaf(backend):
    weight = torch.nn.Parameter(torch.randn(4, 6))
    teacher = torch.randn(2, 2, 6)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="student_logits, a leaf"):
        distillation_loss(weight.view(2, 2, 6), teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="student_logits, a leaf"):
        distillation_loss_and_grad(weight, teacher.view(4, 6), inplace=True, backend=backend)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "student",
    [
        torch.arange(20.0).unfold(0, 8, 1),  # 13 rows, each one column after the other
        torch.zeros(1, 8).expand(13, 8),
        torch.randn(13, 2, 9)[:, :1, :8].squeeze(1).t().contiguous().t(),  # columns apart
    ],
)
def test_in_place_refuses_rows_it_cannot_write(backend, student):
    with pytest.raises(ValueError, match="student_logits of strides"):
        distillation_loss_and_grad(student, torch.randn(13, 8), inplace=True, backend=backend)


def test_in_place_refuses_a_teacher_in_the_same_memory(backend):
    hidden = torch.randn(5, 6)
    with pytest.raises(ValueError, match="teacher_logits in the memory of student_logits"):
        distillation_loss_and_grad(hidden[1:], hidden[:-1], inplace=True, backend=backend)
    loss, grad = distillation_loss_and_grad(hidden, hidden, inplace=True, backend=backend)
    assert loss == 0 and (grad == 0).all()


def test_in_place_masked_row_stays_zero_under_a_nan_upstream(backend):
    logits = torch.randn(4, 6, requires_grad=True) * 1
    labels = torch.tensor([1, -100, 2, 3])
    loss = distillation_loss(
        logits, torch.randn(4, 6), labels, reduction="none", inplace=True, backend=backend
    )
    upstream = torch.tensor([1.0, float("nan"), 2.0, 3.0])
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    assert (grad[1] == 0).all() and grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    "error, text, options",
    [
        (ValueError, "normalizer=0.0", {"normalizer": 0.0}),
        (TypeError, "label_smoothing is a str", {"label_smoothing": "a"}),
        (ValueError, r"divergence=\['jsd'\]", {"divergence": ["jsd"]}),
        (TypeError, "vocab_size is a float", {"vocab_size": 2.5}),
        (TypeError, "ignore_index is a float", {"ignore_index": 1.5}),
        (TypeError, "return_stats is a str", {"return_stats": "yes"}),
        (ValueError, r"jsd\(beta\) has shape", {"divergence": divergences.jsd(torch.ones(3))}),
        (TypeError, "temperature has dtype", {"temperature": torch.ones((), dtype=torch.cfloat)}),
    ],
)
def test_messages_name_the_argument(backend, error, text, options):
    with pytest.raises(error, match=text):
        distillation_loss(torch.randn(4, 6), torch.randn(4, 6), backend=backend, **options)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="distillation_loss_and_grad got 'temprature'; accepted: "):
        distillation_loss_and_grad(torch.randn(4, 6), torch.randn(4, 6), temprature=2.0)
