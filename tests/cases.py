"""Inputs shared by the tests of the logit ops."""

import oracle
import pytest
import torch

import kdkernels
from kdkernels.divergences import DIVERGENCES

# Every divergence with its defaults and with others, the ends of each range included.
PARAMETERS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jeffreys", {}),
    ("jeffreys", {"weight": 0.9}),
    ("jeffreys", {"weight": 0.0}),
    ("jeffreys", {"weight": 1.0}),
    ("jsd", {}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9, "normalized": True}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0, "normalized": True}),
    ("skew_forward_kl", {}),
    ("skew_forward_kl", {"lam": 0.0}),
    ("skew_forward_kl", {"lam": 0.7}),
    ("skew_forward_kl", {"lam": 1.0}),
    ("skew_reverse_kl", {}),
    ("skew_reverse_kl", {"lam": 0.0}),
    ("skew_reverse_kl", {"lam": 0.7}),
    ("skew_reverse_kl", {"lam": 1.0}),
    ("alpha", {}),
    ("alpha", {"alpha": -0.5}),
    ("alpha", {"alpha": 0.0}),
    ("alpha", {"alpha": 0.9}),
    ("alpha", {"alpha": 1.0}),
    ("alpha", {"alpha": 1.5}),
    ("tvd", {}),
    ("renyi", {}),
    ("renyi", {"order": 1.0}),
    ("renyi", {"order": 2.0}),
    ("ab", {}),
    ("ab", {"alpha": 1.0, "beta": 0.5}),
    ("dkd", {}),
    ("dkd", {"target_weight": 2.0, "non_target_weight": 0.5}),
]


def named(name, parameters):
    return "-".join([name, *(f"{key}={value}" for key, value in parameters.items())])


ALL = [pytest.param(name, k, id=named(name, k)) for name, k in PARAMETERS]
DEFAULT = [pytest.param(name, k, id=name) for name, k in PARAMETERS if not k]

DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float32-float64": (torch.float32, torch.float64),
    "float16-bfloat16": (torch.float16, torch.bfloat16),
}


def logits(*shape, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def labels_for(student, seed=0, vocab_size=None):
    generator = torch.Generator().manual_seed(seed)
    high = vocab_size or student.shape[-1]
    return torch.randint(high, student.shape[:-1], generator=generator)


def pair(*shape, dtypes=(torch.float32, torch.float32), scale=3.0):
    """Student and teacher logits, unrelated."""
    return (
        logits(*shape, dtype=dtypes[0], seed=1, scale=scale),
        logits(*shape, dtype=dtypes[1], seed=2, scale=scale),
    )


def differentiated(student, teacher, labels=None, *, upstream=None, **options):
    """(loss, student gradient, teacher gradient) through autograd, of copies of the logits."""
    student = student.detach().clone().requires_grad_()
    teacher = teacher.detach().clone().requires_grad_()
    loss = kdkernels.distillation_loss(student, teacher, labels, teacher_grad=True, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (student, teacher), upstream)


def divergence(name, parameters):
    return DIVERGENCES[name](**parameters)


def assert_no_worse_than_torch(got, truth, own):
    """Loss, student's and teacher's gradient; see oracle.assert_no_worse_than_torch."""
    names = ("loss", "student_grad", "teacher_grad")
    terms = (None, truth.student_terms, truth.teacher_terms)
    for name, x, theirs, t in zip(names, got, own, terms, strict=True):
        oracle.assert_no_worse_than_torch(x, getattr(truth, name), theirs, name, terms=t)
