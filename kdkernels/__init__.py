"""kdkernels: fused knowledge-distillation losses as drop-in PyTorch ops."""

from . import divergences
from .ops.distillation_loss import (
    DistillationLoss,
    DistillationStats,
    distillation_loss,
    distillation_loss_and_grad,
    explain,
)

__version__ = "0.1.0"

__all__ = [
    "DistillationLoss",
    "DistillationStats",
    "distillation_loss",
    "distillation_loss_and_grad",
    "divergences",
    "explain",
]
