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

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _backend
from .._common import check_floats, check_names, compute_dtype, distinct, no_double_backward
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
_backend.define(SCHEMAS, reference, kernels=f"{__name__}.triton_kernels")

METRICS = reference.METRICS
REDUCTIONS = ("batchmean", "mean", "sum", "none")

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
            to six dimensions, any strides (channels_last, slices, expanded) without a copy.
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
        backend: None chooses; "cpp", "triton" or "reference" serves the call or raises.

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
    students, teachers = list_of("student", student), list_of("teacher", teacher)
    projectors = per_layer_projectors(projector, len(students))
    weighted = [i for i, entry in enumerate(projectors) if isinstance(entry, Tensor)]
    inputs = project(students, projectors)
    for i in weighted:
        inputs[i] = _stand_in(
            i, students[i], projectors[i], _per_layer("feature_dim", feature_dim, len(students))[i]
        )
    call = prepare(
        inputs,
        teachers,
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
    if weighted:
        loss, parts = _with_projections(call, students, projectors, weighted)
    else:
        loss, parts = _loss(call)
    if reduction == "none" and isinstance(student, Tensor):
        loss = loss[0]
    return (loss, parts.detach()) if return_parts else loss


_KEYWORDS = [*inspect.signature(feature_loss).parameters][2:]


class FeatureLoss(nn.Module):
    """``feature_loss`` with its options stored, and what it learns: the log-variances of
    ``"gaussian_nll"`` and the projectors are the module's, so that they are in ``parameters()``
    (give these to the optimizer too) and in ``state_dict()``.

    Args:
        metric: as in ``feature_loss``.
        channels: number of channels of the teacher's feature, one a layer for a list; needed by
            ``"gaussian_nll"``, which gets a log-variance for each.
        initial_variance: σ² > 0 that they start from.
        projector: a module or an ``nn.Parameter`` (student width, teacher width); a list with one
            or None a layer, for a list.
        options: the others of ``feature_loss``.

    ``FeatureLoss("gaussian_nll", channels=[64, 128])(student_features, teacher_features)``. Options
    given to the call (the masks of one batch) take the place of stored ones.
    """

    def __init__(
        self,
        metric: str = "l2",
        *,
        channels: int | Sequence[int] | None = None,
        initial_variance: float = 5.0,
        projector: Any = None,
        **options: Any,
    ):
        super().__init__()
        check_names("FeatureLoss", options, [x for x in _KEYWORDS if x != "log_variance"])
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}; accepted: {', '.join(METRICS)}")
        if (metric == "gaussian_nll") != (channels is not None):
            raise ValueError(
                f"channels={channels} with metric={metric!r}; accepted: the teacher's channels "
                "with metric='gaussian_nll', else None"
            )
        if not 0 < initial_variance < math.inf:
            raise ValueError(f"initial_variance={initial_variance}; accepted: a finite float > 0")
        self.metric, self.options = metric, options
        self.one_projector = not isinstance(projector, _LISTS)
        entries = [projector] if self.one_projector else list(projector)
        self.projectors = nn.ModuleList(entry for entry in entries if isinstance(entry, nn.Module))
        self.projector_weights = nn.ParameterList(
            entry for entry in entries if isinstance(entry, Tensor)
        )
        for i, entry in enumerate(entries):
            if entry is not None and not isinstance(entry, (nn.Module, nn.Parameter)):
                raise TypeError(
                    f"projector[{i}] is a {type(entry).__name__}; accepted: nn.Module, "
                    "nn.Parameter or None"
                )
        self._kinds = [
            None if entry is None else "module" if isinstance(entry, nn.Module) else "weight"
            for entry in entries
        ]
        self.log_variances = nn.ParameterList()
        for size in [channels] if isinstance(channels, int) else channels or ():
            start = torch.full((size,), math.log(initial_variance))
            self.log_variances.append(nn.Parameter(start))

    def forward(
        self, student: Features, teacher: Features, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        modules, weights = iter(self.projectors), iter(self.projector_weights)
        projector: Any = [
            None if kind is None else next(modules if kind == "module" else weights)
            for kind in self._kinds
        ]
        owned: dict[str, Any] = {}
        if any(kind is not None for kind in self._kinds):
            owned["projector"] = projector[0] if self.one_projector else projector
        if len(self.log_variances):
            owned["log_variance"] = list(self.log_variances)
        return feature_loss(
            student, teacher, metric=self.metric, **{**self.options, **options, **owned}
        )

    def extra_repr(self) -> str:
        options = (f"{name}={value!r}" for name, value in self.options.items())
        return ", ".join([repr(self.metric), *options])


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
        return compute_dtype(*(x for x in self.tensors[: 2 * self.layers] if x is not None))

    def needs_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.tensors)

    def select(self, layers: list[int]) -> "FeatureCall":
        n = self.layers
        tensors = [self.tensors[k * n + i] for k in range(4) for i in layers]
        weights_tensor = self.tensors[-1]
        if weights_tensor is not None:
            weights_tensor = torch.stack([weights_tensor[i] for i in layers])
        dims, metric, normalize, beta, weights, reduction = self.config
        dims, weights = (tuple(x[i] for i in layers) for x in (dims, weights))
        config = (dims, metric, normalize, beta, weights, reduction)
        return FeatureCall((*tensors, weights_tensor), config, self.backend)

    def arguments(self) -> tuple:
        """FEATURES, in the order of the schema."""
        n = self.layers
        lists = [list(self.tensors[k * n : (k + 1) * n]) for k in range(4)]
        dims, metric, normalize, beta, weights, reduction = self.config
        options = (list(dims), metric, normalize, beta, list(weights), self.tensors[-1], reduction)
        return *lists, *options


def _loss(call: FeatureCall) -> tuple[Tensor, Tensor]:
    """(loss, parts) of layers that need no product."""
    if torch.is_grad_enabled() and call.needs_grad():
        return _FeatureLoss.apply(call.backend, call.config, *distinct(call.tensors))
    loss, parts, _ = run(call, None, [False] * (2 * call.layers))
    return loss, parts


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
    """What a second derivative would be taken of; asked for in a backward with a graph alone."""
    if not torch.is_grad_enabled():
        return []
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
    compute = compute_dtype(*student, *teacher)
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
    chosen, why = _backend.choose(backend, device, dtypes)
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
    if rank > 6:
        raise ValueError(f"a feature has {rank} dimensions; accepted: two to six")
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


def project(student: list[Tensor], projectors: list) -> list[Tensor]:
    """The students through those projectors that are modules."""
    return [
        entry(x) if isinstance(entry, nn.Module) else x
        for entry, x in zip(projectors, student, strict=True)
    ]


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


# ---- student @ weight, a few samples at a time ----

# Bytes of one chunk's product and of its gradient, each; at least one sample. Both are then read
# back from the last-level cache.
PROJECTION_BYTES = 8 * 2**20


def _stand_in(i: int, student: Tensor, weight: Tensor, dim: Any) -> Tensor:
    """A tensor without memory, of what student @ weight would be: for the checks."""
    check_floats(f"projector[{i}]", weight)
    dim = _dim(f"feature_dim[{i}]", dim, student)
    if weight.dim() != 2 or weight.shape[0] != student.shape[dim]:
        raise ValueError(
            f"projector[{i}] has shape {tuple(weight.shape)}; accepted: ({student.shape[dim]}, "
            "teacher's channels) (the transpose of nn.Linear.weight)"
        )
    if weight.device != student.device:
        raise ValueError(
            f"projector[{i}] is on {weight.device}; accepted: its student's {student.device}"
        )
    shape = [weight.shape[1] if k == dim else size for k, size in enumerate(student.shape)]
    dtype = torch.promote_types(student.dtype, weight.dtype)
    return torch.empty((), dtype=dtype, device=student.device).expand(shape)


def _with_projections(
    call: FeatureCall, students: list[Tensor], projectors: list, weighted: list[int]
) -> tuple[Tensor, Tensor]:
    """(loss, parts) where some layers are projected by a weight."""
    others = [i for i in range(call.layers) if i not in weighted]
    losses: dict[int, Tensor] = {}
    parts: dict[int, Tensor] = {}
    none = call.config[-1] == "none"
    if others:
        loss, of_layers = _loss(call.select(others))
        for k, i in enumerate(others):
            parts[i] = of_layers[k]
            losses[i] = loss[k] if none else loss if k == 0 else loss.new_zeros(())
    for i in weighted:
        one = call.select([i])
        loss = _Projected.apply(
            one.backend, one.config, students[i], projectors[i], *one.tensors[1:]
        )
        losses[i] = loss
        parts[i] = loss.detach().sum()
    ordered = torch.stack([losses[i] for i in range(call.layers)])
    return ordered if none else ordered.sum(), torch.stack([parts[i] for i in range(call.layers)])


class _Projected(torch.autograd.Function):
    """One layer. A scalar loss's gradients come with the forward; per sample, from the chunks once
    more.
    """

    @staticmethod
    def forward(ctx, backend, config, student, weight, *rest):
        needed = ctx.needs_input_grad
        ctx.wanted = needed[2], needed[3], needed[6]
        ctx.backend, ctx.config = backend, config
        ctx.early = config[-1] != "none"
        wanted = ctx.wanted if ctx.early else (False,) * 3
        loss, grads = _projected(backend, config, student, weight, rest, None, wanted)
        ctx.save_for_backward(student, weight, *rest, *(grads if ctx.early else ()))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, weight, teacher, mask, log_variance, weights_tensor, *grads = ctx.saved_tensors
        with torch.no_grad():
            if ctx.early:
                grads = [
                    g if g is None else torch.where(g == 0, g, g * grad_loss.to(g.dtype))
                    for g in grads
                ]
            else:
                rest = teacher, mask, log_variance, weights_tensor
                _, grads = _projected(
                    ctx.backend, ctx.config, student, weight, rest, grad_loss, ctx.wanted
                )
            grads = [
                None if g is None else g.to(x.dtype)
                for g, x in zip(grads, (student, weight, log_variance), strict=True)
            ]
        inputs = [x for x in (grad_loss, student, weight, log_variance) if x is not None]
        results = [None, None, grads[0], grads[1], None, None, grads[2], None]
        return tuple(no_double_backward(ctx, results, *inputs))


def _projected(
    backend: str,
    config: tuple,
    student: Tensor,
    weight: Tensor,
    rest: tuple,
    upstream: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss of one layer, 0-d or (samples,), and the gradients of student, weight, log-variance."""
    teacher, mask, log_variance, weights_tensor = rest
    (dim,), metric, normalize, beta, weights, reduction = config
    dtype = torch.promote_types(student.dtype, weight.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rows, matrix = student.movedim(dim, -1), weight.to(dtype)
    targets = teacher.movedim(dim, -1)
    samples, channels = rows.shape[0], weight.shape[1]
    positions = math.prod(rows.shape[1:-1])
    step = max(1, PROJECTION_BYTES // max(1, positions * channels * dtype.itemsize))
    divisor = reference.divisor(mask, samples, positions, channels, metric, reduction)
    compute = compute_dtype(matrix, teacher)
    factor = weights[0] if weights_tensor is None else weights_tensor
    factor = torch.as_tensor(factor / divisor, dtype=compute, device=student.device).reshape(1)
    wants_student, wants_weight, wants_variance = wanted
    student_grad = torch.empty_like(student) if wants_student else None
    weight_grad = torch.zeros_like(weight, dtype=wide) if wants_weight else None
    variance_grad = torch.zeros_like(log_variance, dtype=wide) if wants_variance else None
    losses = []
    inner = (
        (rows.dim() - 1,),
        metric,
        normalize,
        beta,
        (1.0,),
        "none" if reduction == "none" else "sum",
    )
    for start in range(0, max(samples, 1), step):
        part = slice(start, start + step)
        x = rows[part].to(dtype)
        product = torch.matmul(x, matrix)
        piece = None if mask is None else mask[part]
        call = FeatureCall((product, targets[part], piece, log_variance, factor), inner, backend)
        up = None if upstream is None else upstream[part].to(compute)
        loss, _, (grad, variance) = run(call, up, [wants_student or wants_weight, wants_variance])
        losses.append(loss.reshape(-1))
        if student_grad is not None:
            student_grad[part] = torch.matmul(grad, matrix.T).movedim(-1, dim)
        if weight_grad is not None:
            if piece is not None:  # what a mask hides may be NaN, and NaN·0 is NaN
                x = torch.where((piece != 0).unsqueeze(-1), x, 0)
            x = torch.where(factor == 0, 0, x)
            weight_grad += x.reshape(-1, x.shape[-1]).T @ grad.reshape(-1, channels)
        if variance_grad is not None:
            variance_grad += variance
    total = torch.cat(losses)
    return total if reduction == "none" else total.sum(), [student_grad, weight_grad, variance_grad]
