"""kdkernels: fused knowledge-distillation losses as drop-in PyTorch ops."""

from . import divergences
from .ops.dist_loss import DISTLoss, dist_loss
from .ops.distillation_loss import (
    DistillationLoss,
    DistillationStats,
    TeacherCenter,
    distillation_loss,
    distillation_loss_and_grad,
    explain,
)
from .ops.feature_loss import FeatureLoss, feature_loss
from .ops.gram_loss import GramLoss, NSTLoss, gram_loss, nst_loss
from .ops.joint_distillation_loss import JointStats, joint_distillation_loss
from .ops.kl_div import KLDivLoss, kl_div
from .ops.linear_distillation_loss import LinearDistillationLoss, linear_distillation_loss
from .ops.rkd_loss import RKDAngleLoss, RKDDistanceLoss, rkd_angle_loss, rkd_distance_loss
from .ops.similarity_loss import (
    SimilarityLoss,
    prototype_posterior,
    prototypes,
    similarity_loss,
)
from .ops.softmax import LogSoftmax, Softmax, log_softmax, softmax

__version__ = "0.1.0"

__all__ = [
    "DISTLoss",
    "DistillationLoss",
    "DistillationStats",
    "FeatureLoss",
    "GramLoss",
    "JointStats",
    "KLDivLoss",
    "LinearDistillationLoss",
    "LogSoftmax",
    "NSTLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "SimilarityLoss",
    "Softmax",
    "dist_loss",
    "TeacherCenter",
    "distillation_loss",
    "distillation_loss_and_grad",
    "divergences",
    "explain",
    "feature_loss",
    "gram_loss",
    "joint_distillation_loss",
    "kl_div",
    "linear_distillation_loss",
    "log_softmax",
    "nst_loss",
    "prototype_posterior",
    "prototypes",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "similarity_loss",
    "softmax",
]
