"""joint_distillation_loss: everything that a classifier student is trained with, in one op.

    loss = distillation_loss(student_logits, teacher_logits, labels, …)
         + feature_loss(student_features, teacher_features, …)

Both as they define themselves; one parallel region on the CPU, every gradient written where its
input is read. A classifier's logits and feature maps are small: what costs there is not arithmetic
but the number of calls, some 60 in eager torch with four feature maps.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from .._common import check_names, distinct, no_double_backward
from ..distillation_loss import (
    _PLACE,
    OPTIONS,
    DistillationStats,
    _prepare,
    _stats,
    call_rows,
    distillation_loss,
)
from ..distillation_loss import reference as logits_reference
from ..feature_loss import (
    FEATURES,
    FeatureCall,
    Features,
    differentiable,
    late_gradients,
    list_of,
    per_layer_projectors,
    prepare,
    project,
)
from . import reference

SCHEMAS = {
    # wanted: as feature_loss's. parts: of the logits, then of each layer.
    "joint_distillation_loss": f"(Tensor student, Tensor teacher, {OPTIONS}, {FEATURES}, "
    "bool student_grad, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
}
_backend.define(SCHEMAS, reference, kernels=f"{__name__}.triton_kernels")


class JointStats(NamedTuple):
    """What the loss is made of, detached: its parts add up to it."""

    logits: Tensor  # 0-d: KD, cross-entropy and z-loss, weighted and reduced
    features: Tensor  # (layers,), weights and divisors included
    tokens: DistillationStats  # of every row of logits


def joint_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_features: Features,
    teacher_features: Features,
    *,
    metric: str = "l2",
    feature_mask: Tensor | Sequence[Tensor | None] | None = None,
    feature_weights: float | Sequence[float] | Tensor | None = None,
    normalize: str | None = None,
    beta: float = 1.0,
    log_variance: Tensor | Sequence[Tensor] | None = None,
    projector: Any = None,
    feature_dim: int | Sequence[int] | None = None,
    feature_reduction: str = "batchmean",
    return_stats: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, JointStats]:
    """The sum of ``distillation_loss`` of the logits and ``feature_loss`` of the features, and all
    their gradients, in one op. The teacher is detached.

    Args:
        student_logits, teacher_logits, labels: as ``distillation_loss`` takes them.
        student_features, teacher_features: as ``feature_loss`` takes them.
        metric, normalize, beta, log_variance, feature_dim: as ``feature_loss`` takes them.
        feature_mask, feature_weights, feature_reduction: its ``mask``, ``weights`` and
            ``reduction``; the latter not "none".
        projector: its ``projector``, modules only.
        return_stats: also return ``JointStats``.
        backend: None chooses; "cpp", "triton" or "reference" serves the call or raises.
        options: those of ``distillation_loss`` (``temperature``, ``ce_weight``, ``divergence``, …),
            with their defaults, but for ``inplace`` and ``teacher_grad``; ``reduction`` is that of
            the logits, not "none".

    Returns:
        The loss, 0-d: float32, float64 where any input is. With ``return_stats``
        (loss, JointStats).

    Raises:
        As ``distillation_loss`` and ``feature_loss``.

    The gradients are computed in the forward and handed on by the first backward (multiplied by
    the upstream factor if that is not 1); later backwards and compiled graphs compute them anew.
    """
    check_names("joint_distillation_loss", options, _OPTIONS)
    for name, value in (
        ("reduction", options.get("reduction")),
        ("feature_reduction", feature_reduction),
    ):
        if value == "none":
            raise ValueError(f"{name}='none'; accepted: 'batchmean', 'mean', 'sum': one loss")
    students = list_of("student_features", student_features)
    teachers = list_of("teacher_features", teacher_features)
    projectors = per_layer_projectors(projector, len(students))
    for entry in projectors:
        if isinstance(entry, Tensor):
            raise TypeError("projector is a Tensor; accepted: modules (feature_loss takes weights)")
    features = prepare(
        project(students, projectors),
        teachers,
        metric=metric,
        mask=feature_mask,
        weights=feature_weights,
        normalize=normalize,
        beta=beta,
        log_variance=log_variance,
        feature_dim=feature_dim,
        reduction=feature_reduction,
        backend=backend,
    )
    logits = _prepare(
        student_logits,
        teacher_logits,
        labels,
        fused_only=True,
        return_stats=return_stats,
        backend=backend,
        **options,
    )
    if students[0].device != student_logits.device:
        raise ValueError(
            f"student_features[0] is on {students[0].device}; accepted: student_logits' device "
            f"{student_logits.device}"
        )
    # One of the two may have to be plain torch (float64 on a device).
    chosen = "reference" if logits.backend == "reference" else features.backend
    pair = (logits.student, logits.teacher)
    needs_grad = logits.student.requires_grad or features.needs_grad()
    if torch.is_grad_enabled() and needs_grad:
        loss, rows, parts = _Joint.apply(
            chosen, logits.options, features.config, *distinct((*pair, *features.tensors))
        )
    else:
        loss, rows, parts, _, _ = _joint(chosen, logits.options, features, *pair)
    if not return_stats:
        return loss
    parts = parts.detach()
    return loss, JointStats(parts[0], parts[1:], _stats(rows, logits.leading))


_OPTIONS = [
    name
    for name, parameter in inspect.signature(distillation_loss).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY
    and name not in ("inplace", "teacher_grad", "return_stats", "backend")
    and name not in ("standardize", "teacher_center")  # of several ops, one of them after the loss
]
_signature = inspect.signature(joint_distillation_loss)
joint_distillation_loss.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        *(p for p in _signature.parameters.values() if p.kind != p.VAR_KEYWORD),
        *(inspect.signature(distillation_loss).parameters[name] for name in _OPTIONS),
    ]
)


def _joint(
    backend: str,
    options: tuple,
    features: FeatureCall,
    student: Tensor,
    teacher: Tensor,
    student_grad: bool = False,
    wanted: list[bool] | None = None,
) -> Any:
    op = _backend.implementation(backend, "joint_distillation_loss", reference)
    wanted = [False] * (2 * features.layers) if wanted is None else wanted
    return call_rows(op, student, teacher, *options, *features.arguments(), student_grad, wanted)


class _Joint(torch.autograd.Function):
    """Hands on the gradients that the forward wrote; computes them anew for all else."""

    @staticmethod
    def forward(ctx, backend, options, config, student, teacher, *tensors):
        features = FeatureCall(tensors, config, backend)
        n = features.layers
        needed = ctx.needs_input_grad[5:]
        ctx.wanted = [*needed[:n], *needed[3 * n : 4 * n]]
        # A compiled graph may be walked twice without this function knowing.
        early = not torch.compiler.is_compiling()
        wanted = (ctx.needs_input_grad[3], ctx.wanted) if early else (False, None)
        loss, rows, parts, student_grad, grads = _joint(
            backend, options, features, student, teacher, *wanted
        )
        ctx.student_grad, ctx.grads = (student_grad, grads) if early else (None, None)
        ctx.backend, ctx.config = backend, config
        ctx.arguments = [
            options[_PLACE[name]] for name in ("divergence", "label_smoothing", "vocab_size")
        ]
        ctx.save_for_backward(student, teacher, rows, options[_PLACE["labels"]], *tensors)
        ctx.mark_non_differentiable(rows, parts)
        ctx.set_materialize_grads(False)
        return loss, rows, parts

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        student, teacher, rows, labels, *tensors = ctx.saved_tensors
        features = FeatureCall(tuple(tensors), ctx.config, ctx.backend)
        with torch.no_grad():
            student_grad = ctx.student_grad
            if student_grad is not None:
                ctx.student_grad = None
            elif ctx.needs_input_grad[3]:
                backward = _backend.implementation(
                    ctx.backend, "distillation_loss_backward", logits_reference
                )
                upstream = grad_loss.to(rows.dtype)
                student_grad, _ = backward(
                    upstream, student, teacher, rows, labels, *ctx.arguments, True, False
                )
            grads = late_gradients(ctx, features, grad_loss, student_grad)
        guarded = [grad_loss, student] if student.requires_grad else [grad_loss]
        return tuple(
            no_double_backward(
                ctx,
                [None, None, None, student_grad, None, *grads, None],
                *differentiable(features, *guarded),
            )
        )
