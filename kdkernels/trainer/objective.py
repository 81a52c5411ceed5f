"""What a run minimises: terms over outputs, labels and named layers, each one of the package's ops.

    Objective(
        logits=Logits(temperature=Schedule(8.0, 2.0, steps=1000)),
        labels=Labels(),
        features=[Features("layer3.*", "layer4.*", metric="cosine")],
        regularizer=Regularizer("group"),
        weights={"logits": 0.9, "labels": 0.1, "regularizer": 1e-4},
    )

Denominators are those of the whole step: batches and processes may hold any share of its rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import (
    dist_loss,
    distillation_loss,
    feature_loss,
    gram_loss,
    nst_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_loss,
)
from kdkernels.divergences import DIVERGENCES
from kdkernels.trainer.config import TrainConfig
from kdkernels.trainer.layers import Captured, find_layers, named_layers


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` in `steps` steps after step `begin`, and stays.

    `shape`: "linear", or "cosine" (half a wave). Step 0 is the first. A function of the step alone:
    nothing to restore when a run resumes.
    """

    start: float
    end: float
    steps: int
    begin: int = 0
    shape: str = "linear"

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, ("linear", "cosine"))
        if self.steps < 1 or self.begin < 0:
            raise ValueError(
                f"steps is {self.steps} and begin {self.begin}; accepted: at least 1 and at least 0"
            )

    def at(self, step: int) -> float:
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return self.start + (self.end - self.start) * done


Number = float | Schedule


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Divergence from the teacher's logits (`distillation_loss`); a mean over rows.

    `z_loss_weight` weighs the squared log-sum-exp of the student's logits; `mask_kd`: rows without
    a label take no part.
    """

    divergence: str = "forward_kl"
    divergence_args: dict[str, Number] = field(default_factory=dict)
    temperature: Number = 4.0
    teacher_temperature: Number | None = None
    t_squared: bool = True
    mask_kd: bool = True
    z_loss_weight: Number = 0.0

    def __post_init__(self) -> None:
        _one_of("divergence", self.divergence, tuple(DIVERGENCES))
        DIVERGENCES[self.divergence](**_at_step(self.divergence_args, 0))


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Cross-entropy with the labels; a mean over the rows that have one."""

    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Features:
    """Distance between layers of student and teacher (`feature_loss`, "batchmean").

    `student` and `teacher` are module paths or patterns that name as many layers on both sides
    (`teacher` None: the same paths). `projector`: "auto" puts a linear map over the channels where
    the widths differ (and `metric` compares channels); None never does; a module maps one layer.
    Projectors are trained and saved with the student and are no part of what is exported.
    """

    student: str
    teacher: str | None = None
    metric: str = "l2"
    normalize: str | None = None
    beta: float = 1.0
    feature_dim: int | None = None
    projector: str | nn.Module | None = "auto"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _one_of("metric", self.metric, ("l2", "smooth_l1", "cosine", "attention"))
        if isinstance(self.projector, str):
            _one_of("projector", self.projector, ("auto",))


@dataclass(frozen=True)
class Similarity:
    """`similarity_loss` of one layer (None: the models' outputs), rows of a batch among themselves;
    options as there. Maps and sequences are flattened, one row a sample.
    """

    student: str | None = None
    teacher: str | None = None
    kernel: str = "rbf"
    gamma: Number = 1.0
    temperature: Number = 1.0
    teacher_gamma: Number | None = None
    teacher_temperature: Number | None = None
    divergence: str = "forward_kl"
    weight: float = 1.0


RELATIONS = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "gram": gram_loss,
    "nst": nst_loss,
    "dist": dist_loss,
}


@dataclass(frozen=True)
class Relation:
    """A loss between the relations of a batch's samples: a name in RELATIONS, of one layer (None:
    the models' outputs). "nst" takes maps; for the others a sample is flattened to one row.
    """

    kind: str
    student: str | None = None
    teacher: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, tuple(RELATIONS))


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Real targets, of the shape of the outputs or without their last dimension of size 1; NaN is a
    target that is missing. Means over elements.

    `loss`: "mse" or "huber" (threshold `delta`) between outputs and targets. `teacher_loss`: the
    same with the teacher's outputs, on all rows; or "bounded" (Chen et al. 2017, equation 8): the
    squared error to the *target* of rows where it exceeds the teacher's by more than `margin`, 0
    elsewhere. Weighted as "regression" and "regression_teacher".
    """

    loss: str = "mse"
    teacher_loss: str = "mse"
    delta: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, ("mse", "huber"))
        _one_of("teacher_loss", self.teacher_loss, ("mse", "huber", "bounded"))


@dataclass(frozen=True)
class Regularizer:
    """R on the student's weights of two dimensions and more, once a step.

    "l1": Σ|w|. "l2": Σw². "group": Σ over layers of √size·Σ‖w_c‖ over output channels c of `size`
    weights (Wen et al. 2016), which empties whole channels. A channel is removable if its norm is
    at most `removable_below` times the largest of its layer. `layers`: a path or pattern; None:
    every layer.
    """

    kind: str = "l2"
    layers: str | None = None
    removable_below: float = 1e-2

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, ("l1", "l2", "group"))

    def weights_of(self, student: nn.Module) -> list[Tensor]:
        layers = named_layers(student)
        if self.layers is not None:
            layers = {
                name: layers[name] for name in find_layers(student, self.layers, what="student")
            }
        elif not layers:
            layers = {"": student}
        found = [
            weight
            for layer in layers.values()
            if isinstance(weight := getattr(layer, "weight", None), nn.Parameter)
            and weight.dim() >= 2
            and weight.requires_grad
        ]
        if not found:
            raise ValueError(
                f"regularizer.layers is {self.layers!r}, which has no trained weight of two "
                "dimensions or more"
            )
        return list({id(weight): weight for weight in found}.values())

    def value(self, student: nn.Module) -> Tensor:
        parts = []
        for weight in self.weights_of(student):
            if self.kind == "l1":
                parts.append(weight.abs().sum())
            elif self.kind == "l2":
                parts.append(weight.square().sum())
            else:
                rows = weight.flatten(1)
                parts.append(math.sqrt(rows.shape[1]) * torch.linalg.vector_norm(rows, dim=1).sum())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def removable_channels(self, student: nn.Module) -> float:
        """Share of the output channels that could be removed."""
        norms = [
            torch.linalg.vector_norm(weight.flatten(1), dim=1)
            for weight in self.weights_of(student)
        ]
        small = sum(int((norm <= self.removable_below * norm.max()).sum()) for norm in norms)
        return small / sum(len(norm) for norm in norms)


WEIGHTS = (
    "logits",
    "labels",
    "features",
    "similarity",
    "relations",
    "regression",
    "regression_teacher",
    "regularizer",
)


class Outputs(NamedTuple):
    """Of one model on one batch."""

    output: Tensor
    layers: dict[str, Tensor]
    projected: dict[str, Tensor]  # the student's, where a projector maps a layer; by adapter


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The sum of weight · term over the terms given; see the classes of the terms.

    `weights`: a number or `Schedule` for any of WEIGHTS, 1 for those left out; those of features,
    similarity and relations multiply the `weight` of each entry.

    Raises ValueError, naming what does not fit and the nearest that does.
    """

    logits: Logits | None = None
    labels: Labels | None = None
    features: Sequence[Features] = ()
    similarity: Sequence[Similarity] = ()
    relations: Sequence[Relation] = ()
    regression: Regression | None = None
    regularizer: Regularizer | None = None
    weights: dict[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("features", "similarity", "relations"):
            entries = getattr(self, name)
            single = isinstance(entries, (Features, Similarity, Relation))
            object.__setattr__(self, name, (entries,) if single else tuple(entries or ()))
        for name in self.weights:
            _one_of("weights' key", name, WEIGHTS)
            base = "regression" if name == "regression_teacher" else name
            if not getattr(self, base):
                raise ValueError(f"weights has {name!r}, but the objective has no {base}")
        if self.regression is not None and (self.logits or self.labels):
            raise ValueError(
                "regression is given with logits or labels; accepted: one kind of target a task"
            )
        if not self.terms():
            raise ValueError("no term has a weight other than 0")

    @classmethod
    def from_config(cls, config: TrainConfig) -> Objective:
        """Logits and labels, as the options of a TrainConfig describe them."""
        return cls(
            logits=Logits(
                divergence=config.divergence,
                divergence_args=dict(config.divergence_args),
                temperature=config.temperature,
                mask_kd=config.mask_kd,
                z_loss_weight=config.z_loss_weight,
            ),
            labels=Labels(label_smoothing=config.label_smoothing),
            weights={"logits": config.kd_weight, "labels": config.ce_weight},
        )

    def terms(self) -> list[str]:
        """Names of the terms that ever have a weight, one for each entry of a list."""
        names = []
        for name in WEIGHTS:
            if self.weights.get(name, 1.0) == 0.0:
                continue
            part = getattr(self, "regression" if name == "regression_teacher" else name)
            if isinstance(part, tuple):
                names += [f"{name}[{i}]" for i, entry in enumerate(part) if entry.weight != 0]
            elif part is not None:
                names.append(name)
        return names

    def teacher_terms(self) -> list[str]:
        return [x for x in self.terms() if x not in ("labels", "regression", "regularizer")]

    def layer_entries(self) -> list[tuple[str, Features | Similarity | Relation]]:
        """The entries of lists that name a layer, with their terms' names."""
        return [
            (f"{name}[{i}]", entry)
            for name in ("features", "similarity", "relations")
            for i, entry in enumerate(getattr(self, name))
            if entry.student is not None
        ]

    def weights_at(self, step: int) -> dict[str, float]:
        """The weight of each of `terms()` at a step."""
        weights = {}
        for name in self.terms():
            group, _, index = name.rstrip("]").partition("[")
            weight = _at(self.weights.get(group, 1.0), step)
            weights[name] = weight * getattr(self, group)[int(index)].weight if index else weight
        return weights

    def counts(self, labels: Tensor, ignore_index: int) -> Tensor:
        """(3,) int64: what a batch adds to the denominators of `loss`: rows the teacher counts in,
        rows with a label or target (elements, for regression), and samples.
        """
        if self.regression is not None:
            labelled = (~labels.isnan()).sum()
            mask = self.regression.teacher_loss == "bounded"
        else:
            labelled = (labels != ignore_index).sum()
            mask = self.logits is not None and self.logits.mask_kd
        every = torch.full_like(labelled, labels.numel())
        samples = torch.full_like(labelled, len(labels))
        return torch.stack([labelled if mask else every, labelled, samples])

    def loss(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: Tensor,
        pairs: dict[str, list[tuple[str, str]]],
        *,
        scales: Sequence[float],
        weights: dict[str, float],
        step: int,
        ignore_index: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch's part of a step's loss, and of each term before its weight (detached).

        `scales` are one over `counts` of the step (times the processes, where they average).
        Everything over samples (features, similarity, relations) is the batch's mean, weighted by
        its share of the step's samples.
        """
        kd_scale, label_scale, sample_scale = scales
        sums: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        if self.logits is not None or self.labels is not None:
            logits, soft = student.output, self.logits or Logits()
            loss, stats = distillation_loss(
                logits,
                logits.detach() if teacher is None else teacher.output,
                labels,
                divergence=DIVERGENCES[soft.divergence](**_at_step(soft.divergence_args, step)),
                temperature=_at(soft.temperature, step),
                teacher_temperature=_at(soft.teacher_temperature, step),
                t_squared=soft.t_squared,
                kd_weight=weights.get("logits", 0.0) * kd_scale,
                ce_weight=weights.get("labels", 0.0) * label_scale,
                z_loss_weight=_at(soft.z_loss_weight, step) * kd_scale,
                label_smoothing=self.labels.label_smoothing if self.labels else 0.0,
                ignore_index=ignore_index,
                mask_kd=soft.mask_kd,
                reduction="sum",
                return_stats=True,
            )
            sums.append(loss)
            terms["cross_entropy"] = stats.ce.sum() * label_scale
            if teacher is not None and self.logits is not None:
                terms["kd"] = stats.kd.sum() * kd_scale
        if self.regression is not None:
            values = self.regression_terms(student.output, teacher, labels)
            for name, scale in (("regression", label_scale), ("regression_teacher", kd_scale)):
                if weights.get(name):
                    value = values[name] * scale
                    sums.append(weights[name] * value)
                    terms[name] = value.detach()
        share = len(labels) * sample_scale
        for name in weights:
            group, _, index = name.rstrip("]").partition("[")
            if not index:
                continue
            assert teacher is not None
            entry = getattr(self, group)[int(index)]
            if group == "features":
                value, parts = _features(entry, name, pairs[name], student, teacher)
                for (layer, _), part in zip(pairs[name], parts, strict=True):
                    terms[f"{name}/{layer}"] = part * share
            else:
                mine, theirs = student.output, teacher.output
                if entry.student is not None:
                    ((own, other),) = pairs[name]
                    mine, theirs = student.layers[own], teacher.layers[other]
                value = _relation(entry, mine, theirs, step)
                terms[name] = value.detach() * share
            sums.append(weights[name] * share * value)
        total = sums[0]
        for summand in sums[1:]:
            total = total + summand
        return total, terms

    def regression_terms(
        self, output: Tensor, teacher: Outputs | None, targets: Tensor
    ) -> dict[str, Tensor]:
        """Sums over elements."""
        assert self.regression is not None
        kind, bound = self.regression.loss, self.regression.teacher_loss
        delta = self.regression.delta
        output = as_targets("student", output, targets)
        known = ~targets.isnan()
        filled = torch.where(known, targets, output.detach()).to(output.dtype)
        result = {"regression": _errors(kind, output, filled, delta).sum()}
        if teacher is None:
            return result
        theirs = as_targets("teacher", teacher.output, targets).to(output.dtype)
        if bound != "bounded":
            result["regression_teacher"] = _errors(bound, output, theirs, delta).sum()
            return result
        rows = (len(targets), -1)
        mine = torch.where(known, (output - filled).square(), 0.0).reshape(rows)
        best = torch.where(known, (theirs - filled).square(), 0.0).reshape(rows)
        worse = mine.sum(1) > best.sum(1) + self.regression.margin
        result["regression_teacher"] = torch.where(worse, mine.sum(1), 0.0).sum()
        return result


def _features(
    entry: Features,
    name: str,
    pairs: list[tuple[str, str]],
    student: Outputs,
    teacher: Outputs,
) -> tuple[Tensor, Tensor]:
    mine = [student.projected.get(_key(name, own), student.layers[own]) for own, _ in pairs]
    theirs = [teacher.layers[other] for _, other in pairs]
    loss: Any = feature_loss(
        mine,
        theirs,
        metric=entry.metric,
        normalize=entry.normalize,
        beta=entry.beta,
        feature_dim=entry.feature_dim,
        return_parts=True,
    )
    return loss


def _relation(entry: Similarity | Relation, student: Tensor, teacher: Tensor, step: int) -> Tensor:
    if isinstance(entry, Relation):
        loss: Any = RELATIONS[entry.kind]
        if entry.kind != "nst":
            student, teacher = student.flatten(1), teacher.flatten(1)
        return loss(student, teacher)
    return similarity_loss(
        student.flatten(1),
        teacher.flatten(1),
        kernel=entry.kernel,
        gamma=_at(entry.gamma, step),
        temperature=_at(entry.temperature, step),
        teacher_gamma=_at(entry.teacher_gamma, step),
        teacher_temperature=_at(entry.teacher_temperature, step),
        divergence=entry.divergence,
    )


def as_targets(who: str, output: Tensor, targets: Tensor) -> Tensor:
    if output.shape == targets.shape:
        return output
    if output.shape == (*targets.shape, 1):  # would broadcast to (N, N) in silence
        return output.squeeze(-1)
    raise ValueError(
        f"{who}'s output has shape {tuple(output.shape)} and the targets {tuple(targets.shape)}; "
        "accepted: the same, or one more dimension of size 1 at the output's end"
    )


def _errors(kind: str, output: Tensor, target: Tensor, delta: float) -> Tensor:
    if kind == "huber":
        return F.huber_loss(output, target, reduction="none", delta=delta)
    return (output - target).square()


# ---- what is trained beside the student ----


class Projector(nn.Linear):
    """A linear map of dimension `dim` of a feature."""

    def __init__(self, inputs: int, outputs: int, dim: int):
        super().__init__(inputs, outputs)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(self.dim, -1)).movedim(-1, self.dim)


class Learner(nn.Module):
    """The student with its projectors, so that one optimiser, one checkpoint and one
    DistributedDataParallel have them all. It returns what the student returns; in training it
    leaves the layers' outputs in `layers` and `projected`.
    """

    def __init__(self, student: nn.Module, projectors: nn.ModuleDict, captured: Captured):
        super().__init__()
        self.student = student
        self.projectors = projectors
        self._captured = captured
        self.layers: dict[str, Tensor] = {}
        self.projected: dict[str, Tensor] = {}

    def forward(self, inputs: Any) -> Any:
        self._captured.clear()
        output = self.student(inputs)
        if not self.training:
            self._captured.clear()
            return output
        self.layers = self._captured.take()
        self.projected = {
            key: module(self.layers[_layer(key)]) for key, module in self.projectors.items()
        }
        return output


def pair_layers(
    objective: Objective, student: nn.Module, teacher: nn.Module
) -> dict[str, list[tuple[str, str]]]:
    """The layers (student's, teacher's) of every term that names some.

    Raises ValueError where the two patterns name different numbers of layers.
    """
    pairs = {}
    for name, entry in objective.layer_entries():
        assert entry.student is not None
        mine = find_layers(student, entry.student, what="student")
        theirs = find_layers(teacher, entry.teacher or entry.student, what="teacher")
        if len(mine) != len(theirs) or (len(mine) != 1 and not isinstance(entry, Features)):
            raise ValueError(
                f"{name} names {len(mine)} layers of the student ({', '.join(mine)}) and "
                f"{len(theirs)} of the teacher ({', '.join(theirs)}); accepted: "
                + ("as many" if isinstance(entry, Features) else "one of each")
            )
        pairs[name] = list(zip(mine, theirs, strict=True))
    return pairs


def make_projectors(
    objective: Objective,
    pairs: dict[str, list[tuple[str, str]]],
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
) -> nn.ModuleDict:
    """Projectors for the layers whose outputs on a first batch differ in width."""
    result = nn.ModuleDict()
    for name, entry in objective.layer_entries():
        if not isinstance(entry, Features) or entry.projector is None:
            continue
        if isinstance(entry.projector, nn.Module) and len(pairs[name]) != 1:
            raise ValueError(
                f"{name} has one projector for {len(pairs[name])} layers; accepted: one entry a "
                "layer, or projector='auto'"
            )
        for own, other in pairs[name]:
            mine, theirs = student[own], teacher[other]
            if isinstance(entry.projector, nn.Module):
                result[_key(name, own)] = entry.projector
            elif entry.metric != "attention" and mine.dim() == theirs.dim() >= 2:
                dim = entry.feature_dim
                dim = (1 if mine.dim() > 3 else mine.dim() - 1) if dim is None else dim
                if mine.shape[dim] != theirs.shape[dim]:
                    projector = Projector(mine.shape[dim], theirs.shape[dim], dim)
                    result[_key(name, own)] = projector.to(mine.device, mine.dtype)
    return result


def _key(name: str, layer: str) -> str:
    """Name of the projector of a term's layer; a module's name has no dots."""
    return f"{name}:{layer.replace('.', '/')}"


def _layer(key: str) -> str:
    return key.split(":", 1)[1].replace("/", ".")


# ---- failures that would show in no number ----


class FirstSteps:
    """Watches a run's first steps and reports, by name, what does nothing."""

    STEPS = 3

    def __init__(self, objective: Objective):
        self.objective = objective
        self.steps = 0
        self.gradients: dict[str, float] = {}
        self.spreads: dict[str, float] = {}

    def watch(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, pairs: Any, **options: Any
    ) -> None:
        """The gradient every term alone has in what the student gave, on copies without its graph:
        no backward of the model, and none of its hooks, runs.
        """
        weights = self.objective.weights_at(options["step"])
        for name in self.objective.terms():
            if name == "regularizer":
                continue
            used = [(name, student.output)]
            if name in pairs:
                used = [(f"{name}/{own}", student.layers[own]) for own, _ in pairs[name]]
            for label, raw in used:
                if not raw.requires_grad:
                    raise ValueError(
                        f"{label}: this output of the student has no gradient (it is detached, or "
                        "nothing before it is trained), so the term cannot train it"
                    )
            copies = Outputs(*(_leaves(part) for part in student))
            own_weights = {name: weights[name] or 1.0}
            loss, _ = self.objective.loss(
                copies, teacher, labels, pairs, **{**options, "weights": own_weights}
            )
            leaves = [copies.output]
            if name in pairs:
                leaves = [
                    copies.projected.get(_key(name, own), copies.layers[own])
                    for own, _ in pairs[name]
                ]
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for (label, _), gradient in zip(used, gradients, strict=True):
                size = 0.0 if gradient is None else float(gradient.abs().max())
                self.gradients[label] = max(self.gradients.get(label, 0.0), size)
        if teacher is not None:
            for label, value in (("output", teacher.output), *teacher.layers.items()):
                rows = value.detach().float().flatten(1)
                spread = float((rows - rows[:1]).abs().max()) if len(rows) > 1 else math.inf
                scale = float(rows.abs().max())
                spread = spread if spread > 1e-6 * scale else 0.0
                self.spreads[label] = max(self.spreads.get(label, 0.0), spread)

    def report(self, accelerator: Any) -> None:
        """Warn, on the main process, of what no process saw doing anything."""
        for seen, text in (
            (
                self.gradients,
                "{}: this term has had gradient 0 in all of the first {} steps: it trains nothing",
            ),
            (
                self.spreads,
                "teacher's {}: the same for every sample of the first {} steps: it teaches nothing",
            ),
        ):
            if not seen:
                continue
            sizes = torch.tensor(list(seen.values()), device=accelerator.device)
            sizes = accelerator.reduce(sizes, reduction="sum").tolist()
            for label, size in zip(seen, sizes, strict=True):
                if size == 0.0 and accelerator.is_main_process:
                    warnings.warn(text.format(label, self.steps), stacklevel=2)


def check_same_inputs(before: list[Tensor], inputs: Any) -> None:
    """Raise ValueError if the student's forward changed what the teacher reads next."""
    for index, (then, now) in enumerate(zip(before, tensors_of(inputs), strict=True)):
        if not bool(((then == now) | ((then != then) & (now != now))).all()):  # NaN stays NaN
            raise ValueError(
                f"student and teacher see different inputs: the student's forward changed its "
                f"input {index} of shape {tuple(now.shape)} in place. Copy it there first"
            )


def tensors_of(inputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _leaves(part: Tensor | dict[str, Tensor]) -> Any:
    if isinstance(part, Tensor):
        return part.detach().requires_grad_(part.is_floating_point())
    return {name: _leaves(value) for name, value in part.items()}


# ---- numbers and names ----


def _at(value: Any, step: int) -> Any:
    return value.at(step) if isinstance(value, Schedule) else value


def _at_step(values: dict[str, Number], step: int) -> dict[str, float]:
    return {name: _at(value, step) for name, value in values.items()}


def _one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        near = difflib.get_close_matches(str(value), accepted, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}{hint}")


def describe(objective: Objective) -> str:
    """What a checkpoint remembers of an objective: another one is another run."""
    parts = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    return ", ".join(f"{name}={value!r}" for name, value in parts.items() if value)
