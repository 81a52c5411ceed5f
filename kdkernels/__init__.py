"""kdkernels: fused knowledge-distillation losses as drop-in PyTorch ops."""

from . import divergences
from .ops.distillation_loss import (
    DistillationLoss,
    DistillationStats,
    distillation_loss,
    distillation_loss_and_grad,
    explain,
)
from .ops.feature_loss import FeatureLoss, feature_loss
from .ops.joint_distillation_loss import JointStats, joint_distillation_loss
from .ops.kl_div import KLDivLoss, kl_div
from .ops.linear_distillation_loss import LinearDistillationLoss, linear_distillation_loss
from .ops.softmax import LogSoftmax, Softmax, log_softmax, softmax

__version__ = "0.1.0"

__all__ = [
    "DistillationLoss",
    "DistillationStats",
    "FeatureLoss",
    "JointStats",
    "KLDivLoss",
    "LinearDistillationLoss",
    "LogSoftmax",
    "Softmax",
    "distillation_loss",
    "distillation_loss_and_grad",
    "divergences",
    "explain",
    "feature_loss",
    "joint_distillation_loss",
    "kl_div",
    "linear_distillation_loss",
    "log_softmax",
    "softmax",
]
