"""joint_distillation_loss by the Triton kernels of its two parts.

Not one launch: a Triton kernel is compiled for one number of threads and one way to cut a row, and
that of the logits (chunks of rows, combined in a second launch) is not that of the features. One
sum puts the two losses together.
"""

from typing import Any

import torch
from torch import Tensor

from ..distillation_loss import OPTION_NAMES
from ..distillation_loss import triton_kernels as logits_kernels
from ..feature_loss import triton_kernels as feature_kernels


def joint_distillation_loss(
    student: Tensor, teacher: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *arguments, wants_student, wanted = args
    options = arguments[: len(OPTION_NAMES)]
    features: Any = arguments[len(OPTION_NAMES) :]
    if wants_student:
        logits_loss, rows, student_grad, _ = logits_kernels.distillation_loss_and_grad(
            student, teacher, *options, False
        )
    else:
        logits_loss, rows = logits_kernels.distillation_loss(student, teacher, *options)
        student_grad = student.new_empty(0)
    _, feature_parts, grads = feature_kernels.feature_loss(*[*features, None, wanted])
    parts = torch.cat([logits_loss.reshape(1), feature_parts])
    return parts.sum(), rows, parts, student_grad, grads
