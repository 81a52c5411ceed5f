"""feature_loss: distances between intermediate features of student and teacher, a whole list of
layers in one op.

Every feature is read as (samples, positions, channels): samples are dimension 0, channels the
feature dimension (1 of (B, C, H, W), the last of (B, T, D)), positions all others. With s and t the
vectors of one position, d = s − t, w its mask weight, ‖·‖ over the channels:

    l2              φ = Σ d²                                     (FitNets, Romero et al. 2015)
    smooth_l1       φ = Σ ½d²/β where |d| < β, |d| − ½β elsewhere       (Girshick 2015; β = 0: L1)
    cosine          φ = 1 − s·t/(‖s‖‖t‖)                         (DistilBERT, Sanh et al. 2019)
    attention       A(x) = Σ x² at each position, Â = A/‖A‖ over the sample's positions,
                    φ = (Â(s) − Â(t))²                    (Zagoruyko & Komodakis 2017, their code)
    gaussian_nll    φ = Σ ½(d²·e^(−ℓ) + ℓ), ℓ = log σ² a channel         (VID, Ahn et al. 2019)

    loss = Σ over layers of weight/divisor · Σ w·φ

The gradient is written where the features are read: one read of each, one write. ``reference.py``
is the same in plain torch, csrc/feature_loss in C++.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _backend
from .._common import check_floats, no_double_backward
from . import reference

# What the ops take of features. One entry a layer in every list; no list is longer or shorter.
FEATURES = (
    "Tensor[] student_features, Tensor[] teacher_features, Tensor?[] masks, "
    "Tensor?[] log_variances, int[] feature_dims, str metric, bool normalize, float beta, "
    "float[] feature_weights, Tensor? feature_weights_tensor, str feature_reduction"
)
SCHEMAS = {
    # wanted: the gradients to compute, of the students and then of the log-variances.
    "feature_loss": f"({FEATURES}, Tensor? upstream, bool[] wanted) -> "
    "(Tensor loss, Tensor parts, Tensor[] grads)",
    "scale_features_": "(Tensor(a!)[] grads, Tensor factor) -> ()",
}
_backend.define(SCHEMAS, reference)

METRICS = reference.METRICS
REDUCTIONS = ("batchmean", "mean", "sum", "none")
ON_DEVICES = False  # whether there are CUDA and Triton kernels

Features = Tensor | Sequence[Tensor]


def feature_loss(
    student: Features,
    teacher: Features,
    *,
    metric: str = "l2",
    mask: Tensor | Sequence[Tensor | None] | None = None,
    weights: float | Sequence[float] | Tensor | None = None,
    normalize: str | None = None,
    beta: float = 1.0,
    log_variance: Tensor | Sequence[Tensor] | None = None,
    projector: Any = None,
    feature_dim: int | Sequence[int] | None = None,
    reduction: str = "batchmean",
    return_parts: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Distance between a student's intermediate features and its teacher's; the teacher is
    detached.

    Args:
        student: one feature, or a list of one a layer: float64, float32, bfloat16 or float16, two
            dimensions or more, any strides (channels_last, slices, expanded) without a copy.
            Dimension 0 is the sample.
        teacher: as many, of the students' shapes; dtypes may differ, and for ``"attention"`` the
            number of channels.
        metric: ``"l2"``, ``"smooth_l1"``, ``"cosine"``, ``"attention"`` or ``"gaussian_nll"``; see
            the formulas above.
        mask: weight of each position, 0 (or False) masks it: NaN and inf there go nowhere. The
            feature's shape without its feature dimension (``(B, T)`` for ``(B, T, D)``,
            ``(B, H, W)`` for ``(B, C, H, W)``), where a size of 1 stands for every position, or
            ``(B,)``: one weight a sample. One tensor for all layers, or a list with one or None a
            layer. For ``"attention"`` a masked position is left out of the map's norm too.
        weights: of the layers: a number for all, one a layer, or a tensor ``(layers,)`` or ``()``
            that is not read on the host. 0 leaves a layer out.
        normalize: ``"l2"`` divides the vectors of both by their norms first, for ``"l2"`` (PKD, Sun
            et al. 2019) and ``"smooth_l1"`` (with β = 0 factor transfer's distance). A vector
            shorter than 1e-12 counts as 0 and gets gradient 0, here and in ``"cosine"``, whose
            value is then 1.
        beta: β ≥ 0 of ``"smooth_l1"``.
        log_variance: ℓ of ``"gaussian_nll"``, ``(C,)`` a layer, which gets its gradient. (In
            the paper σ² = softplus(α) + ε; an exponential needs no ε.)
        projector: maps the student to the teacher's width: an ``nn.Module``, or a weight
            ``(student width, teacher width)`` for ``student @ weight`` over the feature dimension
            (the transpose of ``nn.Linear.weight``), whose product is formed a few samples at a time
            and never stored as a whole. One for a single feature; a list, with None where the
            widths agree, for a list.
        feature_dim: the dimension of the channels, for all layers or one a layer. Default: 1 for
            features of four and five dimensions (images, volumes), the last for two and three
            (vectors, tokens). ``(B, C, L)`` needs ``feature_dim=1``, ``(B, H, W, C)`` -1.
        reduction: "batchmean": each layer over the sum of its positions' weights (for
            ``"attention"`` over its samples); "mean": over elements, as torch means it: for
            ``"l2"`` and ``"smooth_l1"`` that is ``F.mse_loss`` and ``F.smooth_l1_loss``, for
            ``"cosine"`` over positions, for ``"attention"`` over the map's positions (the published
            code); "sum"; "none": one loss a sample.
        return_parts: also return each layer's part of the loss, ``(layers,)``, detached.
        backend: None chooses; "cpp" or "reference" serves the call or raises.

    Returns:
        The loss, 0-d; under "none" ``(B,)`` for one feature and ``(layers, B)`` for a list.
        float32, float64 where any feature is float64. Everything masked: 0, with a graph and
        gradient 0.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, range or combination, named.
        RuntimeError: a backend that cannot serve the call.
        NotImplementedError: double backward.

    A scalar loss computes its gradient in the forward and keeps it until the first backward, which
    hands it on (rounded to the feature's dtype before the upstream factor, if that is not 1); later
    backwards, ``reduction="none"`` and compiled graphs read the features again. Every sample is
    computed alone and in a fixed order, on any number of threads.
    """
    features = list_of("student", student), list_of("teacher", teacher)
    call = prepare(
        project(features[0], projector),
        features[1],
        metric=metric,
        mask=mask,
        weights=weights,
        normalize=normalize,
        beta=beta,
        log_variance=log_variance,
        feature_dim=feature_dim,
        reduction=reduction,
        backend=backend,
    )
    if torch.is_grad_enabled() and call.needs_grad():
        loss, parts = _FeatureLoss.apply(call.backend, call.config, *call.tensors)
    else:
        loss, parts, _ = run(call, None, [False] * (2 * call.layers))
    if reduction == "none" and isinstance(student, Tensor):
        loss = loss[0]
    return (loss, parts.detach()) if return_parts else loss


class FeatureCall(NamedTuple):
    """What the ops take of features, checked."""

    # students, teachers, masks, log-variances of all layers, and the weights' tensor; None where
    # there is none.
    tensors: tuple[Tensor | None, ...]
    config: tuple  # dims, metric, normalize, beta, weights, reduction
    backend: str

    @property
    def layers(self) -> int:
        return len(self.tensors) // 4

    def compute_dtype(self) -> torch.dtype:
        return reference.compute_dtype(
            [x for x in self.tensors[: 2 * self.layers] if x is not None], []
        )

    def needs_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.tensors)

    def arguments(self) -> tuple:
        """FEATURES, in the order of the schema."""
        n = self.layers
        lists = [list(self.tensors[k * n : (k + 1) * n]) for k in range(4)]
        dims, metric, normalize, beta, weights, reduction = self.config
        options = (list(dims), metric, normalize, beta, list(weights), self.tensors[-1], reduction)
        return *lists, *options


def run(call: FeatureCall, upstream: Tensor | None, wanted: list[bool]) -> Any:
    op = _backend.implementation(call.backend, "feature_loss", reference)
    return op(*call.arguments(), upstream, wanted)


class _FeatureLoss(torch.autograd.Function):
    """Hands on the gradient that a scalar loss's forward wrote; computes it anew for all else."""

    @staticmethod
    def forward(ctx, backend, config, *tensors):
        call = FeatureCall(tensors, config, backend)
        n = call.layers
        needed = ctx.needs_input_grad[2:]
        ctx.wanted = [*needed[:n], *needed[3 * n : 4 * n]]
        # A compiled graph may be walked twice without this function knowing.
        early = config[-1] != "none" and not torch.compiler.is_compiling()
        loss, parts, grads = run(call, None, ctx.wanted if early else [False] * (2 * n))
        ctx.grads = grads if early else None
        ctx.backend, ctx.config = backend, config
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        call = FeatureCall(ctx.saved_tensors, ctx.config, ctx.backend)
        with torch.no_grad():
            grads = late_gradients(ctx, call, grad_loss)
        return *no_double_backward(
            ctx, [None, None, *grads], *differentiable(call, grad_loss)
        ), None


def late_gradients(
    ctx: Any, call: FeatureCall, upstream: Tensor, other: Tensor | None = None
) -> list[Tensor | None]:
    """Of call.tensors but the last: the forward's on the first backward, computed anew later.

    other: one more gradient of that forward, scaled with them.
    """
    if ctx.grads is None:
        upstream = upstream.to(call.compute_dtype())
        _, _, grads = run(call, upstream, ctx.wanted)
    else:
        grads, ctx.grads = ctx.grads, None
        op = _backend.implementation(call.backend, "scale_features_", reference)
        op([x for x in (*grads, other) if x is not None and x.numel()], upstream)
    n = call.layers
    return [*grads[:n], *[None] * (2 * n), *grads[n:]]


def differentiable(call: FeatureCall, *others: Tensor) -> list[Tensor]:
    return [*others, *(x for x in call.tensors if x is not None and x.requires_grad)]


def list_of(name: str, features: Any) -> list[Tensor]:
    if isinstance(features, Tensor):
        features = [features]
    elif not isinstance(features, (list, tuple)):
        raise TypeError(
            f"{name} is a {type(features).__name__}; accepted: a Tensor, or a list of one a layer"
        )
    if not features:
        raise ValueError(f"{name} is an empty list; accepted: one feature or more")
    for i, feature in enumerate(features):
        check_floats(f"{name}[{i}]", feature)
    return list(features)


def prepare(
    student: list[Tensor],
    teacher: list[Tensor],
    *,
    metric: str = "l2",
    mask: Any = None,
    weights: Any = None,
    normalize: str | None = None,
    beta: float = 1.0,
    log_variance: Any = None,
    feature_dim: Any = None,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> FeatureCall:
    """Checks every argument and turns it into what the ops take."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}; accepted: {', '.join(METRICS)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; accepted: {', '.join(REDUCTIONS)}")
    if normalize not in (None, "l2"):
        raise ValueError(f"normalize={normalize!r}; accepted: None, 'l2'")
    if normalize is not None and metric not in ("l2", "smooth_l1"):
        raise ValueError(
            f"normalize={normalize!r} with metric={metric!r}; accepted: metric='l2' or 'smooth_l1'"
        )
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta is a {type(beta).__name__}; accepted: float")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta={beta}; accepted: a finite float >= 0")
    n = len(student)
    if len(teacher) != n:
        raise ValueError(f"teacher has {len(teacher)} layers; accepted: as many as student, {n}")
    dims = [
        _dim(f"feature_dim[{i}]", dim, feature)
        for i, (dim, feature) in enumerate(
            zip(_per_layer("feature_dim", feature_dim, n), student, strict=True)
        )
    ]
    device = student[0].device
    for i in range(n):
        _check_layer(i, student[i], teacher[i], dims[i], metric, device)
    if reduction == "none" and len({feature.shape[0] for feature in student}) > 1:
        sizes = [feature.shape[0] for feature in student]
        raise ValueError(
            f"reduction='none' with layers of {sizes} samples; accepted: the same number in all"
        )
    compute = reference.compute_dtype(student, teacher)
    masks = [
        _mask(f"mask[{i}]", value, student[i], dims[i], compute)
        for i, value in enumerate(_per_layer("mask", mask, n))
    ]
    variances = _per_layer("log_variance", log_variance, n)
    for i, variance in enumerate(variances):
        _check_log_variance(
            f"log_variance[{i}]", variance, metric, student[i].shape[dims[i]], device
        )
    numbers, weights_tensor = _weights(weights, n, device, compute)
    dtypes = tuple({x.dtype for x in (*student, *teacher)})
    chosen, why = _backend.choose(backend, device, dtypes, ON_DEVICES)
    _backend.warn_of_reference(chosen, why, device)
    teachers = [x.detach() for x in teacher]
    return FeatureCall(
        (*student, *teachers, *masks, *variances, weights_tensor),
        (tuple(dims), metric, normalize is not None, float(beta), numbers, reduction),
        chosen,
    )


def _per_layer(name: str, value: Any, n: int) -> list:
    """One entry a layer, of a list or of one for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries; accepted: one, or one a layer ({n})")
    return list(value)


def _dim(name: str, dim: Any, feature: Tensor) -> int:
    rank = feature.dim()
    if rank < 2:
        raise ValueError(
            f"a feature has shape {tuple(feature.shape)}; accepted: two dimensions or more, "
            "samples first"
        )
    if dim is None:
        if rank > 5:
            raise ValueError(f"{name} is None with {rank} dimensions; accepted: an int")
        return 1 if rank > 3 else rank - 1
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name} is a {type(dim).__name__}; accepted: int or None")
    if not (1 <= dim < rank or 1 - rank <= dim < 0):
        raise ValueError(
            f"{name}={dim} with {rank} dimensions; accepted: 1 to {rank - 1}, or negative from the "
            "end, dimension 0 being the sample"
        )
    return dim % rank


def _check_layer(
    i: int, student: Tensor, teacher: Tensor, dim: int, metric: str, device: torch.device
) -> None:
    for name, feature in (("student", student), ("teacher", teacher)):
        if feature.device != device:
            raise ValueError(
                f"{name}[{i}] is on {feature.device}; accepted: student[0]'s device {device}"
            )
    if student.shape == teacher.shape and student.shape[dim] > 0:
        return
    mine, theirs = tuple(student.shape), tuple(teacher.shape)
    told = f"student[{i}] has shape {mine} and teacher[{i}] {theirs}"
    if len(mine) != len(theirs):
        raise ValueError(f"{told}; accepted: the same number of dimensions")
    if mine[dim] == 0 or theirs[dim] == 0:
        raise ValueError(f"{told}; accepted: one channel or more in dimension {dim}")
    if mine[0] != theirs[0]:
        raise ValueError(f"{told}; accepted: the same samples in dimension 0")
    positions = [k for k in range(1, len(mine)) if k != dim]
    if any(mine[k] != theirs[k] for k in positions):
        size = tuple(theirs[k] for k in positions)
        if len(mine) > 3 and dim == 1:
            larger = math.prod(mine[k] for k in positions) > math.prod(size)
            resize = (
                f"torch.nn.functional.adaptive_avg_pool{len(size)}d(student, {size})"
                if larger
                else f"torch.nn.functional.interpolate(student, size={size}, mode="
                f"{'bilinear' if len(size) == 2 else 'trilinear'!r})"
            )
            hint = f"resize one of them first, e.g. {resize}"
        else:
            hint = (
                "the same positions: drop extra tokens (a class token), or resize with "
                "torch.nn.functional.interpolate over the position dimensions moved last"
            )
        raise ValueError(f"{told}, whose positions differ; accepted: {hint}")
    if mine[dim] != theirs[dim] and metric != "attention":
        raise ValueError(
            f"{told}, whose channels (dimension {dim}) differ; accepted: the same number, "
            f"projector= a module or a weight ({mine[dim]}, {theirs[dim]}), or metric='attention'"
        )


def _mask(name: str, mask: Any, feature: Tensor, dim: int, compute: torch.dtype) -> Tensor | None:
    """The mask in the shape of the feature's positions."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}; accepted: Tensor or None")
    if mask.is_complex():
        raise TypeError(f"{name} has dtype {mask.dtype}; accepted: bool, integer and real dtypes")
    if mask.requires_grad:
        raise ValueError(f"{name} requires grad; accepted: tensors without gradient")
    if mask.device != feature.device:
        raise ValueError(f"{name} is on {mask.device}; accepted: the features' {feature.device}")
    shape = tuple(size for k, size in enumerate(feature.shape) if k != dim)
    given = tuple(mask.shape)
    if given == shape[:1]:
        mask = mask.reshape(given + (1,) * (len(shape) - 1))
    elif len(given) != len(shape) or any(
        a not in (1, b) for a, b in zip(given, shape, strict=True)
    ):
        raise ValueError(
            f"{name} has shape {given}; accepted: the positions' {shape}, where a size may be 1, "
            f"or ({shape[0]},), one weight a sample"
        )
    return mask.to(compute).expand(shape)


def _check_log_variance(
    name: str, variance: Any, metric: str, channels: int, device: torch.device
) -> None:
    if metric != "gaussian_nll":
        if variance is not None:
            raise ValueError(f"{name} with metric={metric!r}; accepted: metric='gaussian_nll'")
        return
    check_floats(name, variance)
    if variance.shape != (channels,):
        raise ValueError(
            f"{name} has shape {tuple(variance.shape)}; accepted: ({channels},), one a channel"
        )
    if variance.device != device:
        raise ValueError(f"{name} is on {variance.device}; accepted: the features' {device}")


def _weights(
    weights: Any, n: int, device: torch.device, compute: torch.dtype
) -> tuple[tuple[float, ...], Tensor | None]:
    if isinstance(weights, Tensor):
        if weights.is_complex() or weights.dtype == torch.bool:
            raise TypeError(f"weights has dtype {weights.dtype}; accepted: real dtypes")
        if weights.dim() > 1 or (weights.dim() == 1 and len(weights) != n):
            raise ValueError(f"weights has shape {tuple(weights.shape)}; accepted: () or ({n},)")
        if weights.device != device:
            raise ValueError(f"weights is on {weights.device}; accepted: the features' {device}")
        if weights.requires_grad:
            raise ValueError("weights requires grad; accepted: a tensor without gradient")
        return (1.0,) * n, weights.to(compute).expand(n).contiguous()
    numbers = _per_layer("weights", 1.0 if weights is None else weights, n)
    for i, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"weights[{i}] is a {type(number).__name__}; accepted: float, or one Tensor for "
                "all layers"
            )
        if not math.isfinite(number):
            raise ValueError(f"weights[{i}]={number}; accepted: a finite float")
    return tuple(float(x) for x in numbers), None


def project(student: list[Tensor], projector: Any) -> list[Tensor]:
    """The students through their projectors, where these are modules."""
    entries = per_layer_projectors(projector, len(student))
    return [x if p is None else p(x) for p, x in zip(entries, student, strict=True)]


def per_layer_projectors(projector: Any, n: int) -> list:
    if projector is None:
        return [None] * n
    entries = list(projector) if isinstance(projector, _LISTS) else [projector]
    if len(entries) != n:
        raise ValueError(
            f"projector has {len(entries)} entries; accepted: one a layer ({n}), None for no "
            "projection"
        )
    for i, entry in enumerate(entries):
        if entry is not None and not isinstance(entry, (nn.Module, Tensor)):
            raise TypeError(
                f"projector[{i}] is a {type(entry).__name__}; accepted: nn.Module, weight or None"
            )
    return entries


_LISTS = (list, tuple, nn.ModuleList, nn.ParameterList)
