"""Plain torch implementation of joint_distillation_loss, from those of its two parts."""

from typing import Any

import torch
from torch import Tensor

from ..distillation_loss import OPTION_NAMES
from ..distillation_loss import reference as logits_reference
from ..feature_loss import reference as feature_reference


def joint_distillation_loss(
    student: Tensor, teacher: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, rows, parts, student_grad, grads) for the schema in this folder's __init__.py."""
    *arguments, wants_student, wanted = args
    options: list[Any] = arguments[: len(OPTION_NAMES)]
    features: Any = arguments[len(OPTION_NAMES) :]
    if wants_student:
        logits_loss, rows, student_grad, _ = logits_reference.distillation_loss_and_grad(
            student, teacher, *options, False
        )
    else:
        logits_loss, rows = logits_reference.distillation_loss(student, teacher, *options)
        student_grad = student.new_empty(0)
    _, feature_parts, grads = feature_reference.feature_loss(*[*features, None, wanted])
    dtype = torch.promote_types(logits_loss.dtype, feature_parts.dtype)
    parts = torch.cat([logits_loss.reshape(1).to(dtype), feature_parts.to(dtype)])
    return parts.sum(), rows, parts, student_grad, grads
