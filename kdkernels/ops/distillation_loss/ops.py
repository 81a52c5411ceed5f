"""distillation_loss's ops, and the options of the public function that are made of several of them.

The fused ops know a temperature a row, one divergence and its parameters. On top of them:

standardize     z-scored logits (s − mean)/(std + ε) at τ: a shift cancels in a softmax, so this is
                the temperature τ·(std + ε) of each row, whose gradient goes on through the
                deviation: ∂std/∂s = (s − mean)/((V − 1)·std)
adaptive_kl     jeffreys with a weight a row, from one look at where the rows differ
cross_entropy   forward KL plus the teacher's entropy, which the statistics hold
teacher_center  t − c; the C++ library subtracts it from a row at a time as it reads it
temperatures    ∂KD/∂τs = −Σ s·∂KD/∂(s/τs)/τs², from one more look at the rows

Each costs what it says in ``distillation_loss``'s docstring, and nothing where it is not used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from .._common import compute_dtype, zero_wins
from . import reference

# What the fused ops take after the logits, and linear_distillation_loss's after its heads.
OPTIONS = (
    "Tensor? labels, Tensor? token_weights, str divergence, "
    "float first, Tensor? first_tensor, float second, Tensor? second_tensor, "
    "float temperature, Tensor? temperature_tensor, "
    "float teacher_temperature, Tensor? teacher_temperature_tensor, "
    "float kd_weight, Tensor? kd_weight_tensor, float ce_weight, Tensor? ce_weight_tensor, "
    "float z_loss_weight, Tensor? z_loss_weight_tensor, "
    "float? normalizer, Tensor? normalizer_tensor, bool t_squared, float label_smoothing, "
    "int ignore_index, bool mask_kd, int vocab_size, str reduction, bool return_stats"
)
_CENTER = "Tensor? teacher_center=None"
FUSED = {
    "distillation_loss": f"(Tensor student, Tensor teacher, {OPTIONS}, {_CENTER}) "
    "-> (Tensor, Tensor)",
    "distillation_loss_backward": "(Tensor grad_loss, Tensor student, Tensor teacher, "
    "Tensor rows, Tensor? labels, str divergence, float label_smoothing, int vocab_size, "
    f"bool student_grad, bool teacher_grad, {_CENTER}) -> (Tensor, Tensor)",
    "distillation_loss_and_grad": f"(Tensor student, Tensor teacher, {OPTIONS}, "
    f"bool teacher_grad, {_CENTER}) -> (Tensor, Tensor, Tensor, Tensor)",
    "distillation_loss_and_grad_": f"(Tensor(a!) student, Tensor teacher, {OPTIONS}, "
    f"bool teacher_grad, {_CENTER}) -> (Tensor, Tensor, Tensor)",
    "scale_rows_": "(Tensor(a!) grad, Tensor factor) -> ()",
}
OF_ROWS = {
    "row_moments": "(Tensor x, int vocab_size) -> Tensor",
    "add_centered_": "(Tensor(a!) grad, Tensor x, Tensor mean, Tensor factor, int vocab_size) "
    "-> ()",
    "temperature_sums": "(Tensor student, Tensor teacher, Tensor rows, Tensor? labels, "
    "str divergence, int vocab_size) -> Tensor",
    "adaptive_weights": "(Tensor student, Tensor teacher, Tensor temperature, "
    "Tensor teacher_temperature, int vocab_size) -> Tensor",
}
_backend.define(FUSED, reference, f"{__package__}.triton_kernels")
_backend.define(OF_ROWS, reference, f"{__package__}.triton_rows")

OPTION_NAMES = [argument.split()[-1] for argument in OPTIONS.split(", ")]
PLACE = {name: place for place, name in enumerate(OPTION_NAMES)}

TEMPERATURES = ("temperature", "teacher_temperature")
# Divergences made of a fused one.
MADE_OF = {"adaptive_kl": "jeffreys", "cross_entropy": "forward_kl"}
# What the standardised logits are divided by is their deviation plus this (Sun et al. 2024).
EPSILON = 1e-7

_LINE = {name: place for place, name in enumerate(reference.ROWS + reference.STATS)}


class Extras(NamedTuple):
    """Options that the fused ops do not take."""

    standardize: bool = False
    teacher_center: Tensor | None = None  # (columns of the teacher,)


class Kept(NamedTuple):
    """What a backward needs of a call: tensors, then the rest."""

    student: Tensor
    teacher: Tensor
    center: Tensor | None
    labels: Tensor | None
    student_moments: Tensor | None  # (2, N), where standardised
    teacher_moments: Tensor | None
    backend: str
    divergence: str  # of the fused ops
    label_smoothing: float
    vocab_size: int
    t_squared: bool  # whether a temperature that requires grad is in τ² too
    adds_entropy: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:6]

    @property
    def rest(self) -> tuple:
        return self[6:]


class Call(NamedTuple):
    """What the fused ops are called with for a call of the functions below."""

    kept: Kept
    options: tuple  # of the fused ops
    t2: float | Tensor  # τ² that the fused op does not know of, where standardised
    with_stats: bool  # whether the caller asked for them


def prepare(backend: str, student: Tensor, teacher: Tensor, options: tuple, extras: Extras) -> Call:
    """``options`` are OPTIONS, their divergence any."""
    divergence, with_stats = options[PLACE["divergence"]], options[PLACE["return_stats"]]
    kept = Kept(
        student,
        teacher,
        extras.teacher_center,
        options[PLACE["labels"]],
        None,
        None,
        backend,
        MADE_OF.get(divergence, divergence),
        options[PLACE["label_smoothing"]],
        options[PLACE["vocab_size"]],
        options[PLACE["t_squared"]],
        divergence == "cross_entropy",
    )
    if not extras.standardize and divergence not in MADE_OF:
        return Call(kept, options, 1.0, with_stats)
    option = dict(zip(OPTION_NAMES, options, strict=True))
    t2: float | Tensor = 1.0
    if extras.standardize:
        moments = [
            run(backend, "row_moments", x, kept.vocab_size).to(compute_dtype(student, teacher))
            for x in (student, teacher)
        ]
        kept = kept._replace(student_moments=moments[0], teacher_moments=moments[1])
        if kept.t_squared:
            tau, number = option["temperature_tensor"], option["temperature"]
            t2 = tau * tau if tau is not None else number * number
            _multiply(option, "kd_weight", t2)
            option["t_squared"] = False
        for name, of in zip(TEMPERATURES, moments, strict=True):
            _multiply(option, name, of[1] + EPSILON)
    if divergence == "adaptive_kl":
        temperatures = (_as_tensor(option, name, student, teacher) for name in TEMPERATURES)
        option["first_tensor"] = run(
            backend, "adaptive_weights", student, teacher, *temperatures, kept.vocab_size
        )
    option["divergence"] = kept.divergence
    option["return_stats"] = with_stats or kept.adds_entropy
    return Call(kept, tuple(option.values()), t2, with_stats)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """(loss, rows)."""
    teacher, *center = _seen(call.kept)
    loss, rows = run(
        call.kept.backend,
        "distillation_loss",
        call.kept.student,
        teacher,
        *call.options,
        *center,
    )
    return _finish(call, loss, rows)


def backward(
    kept: Kept, grad_loss: Tensor, rows: Tensor, student_grad: bool, teacher_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits of Σ grad_loss·loss, but for what goes through the deviations
    (``add_deviations_``).
    """
    teacher, *center = _seen(kept)
    return run(
        kept.backend,
        "distillation_loss_backward",
        grad_loss,
        kept.student,
        teacher,
        rows,
        kept.labels,
        kept.divergence,
        kept.label_smoothing,
        kept.vocab_size,
        student_grad,
        teacher_grad,
        *center,
    )


def loss_and_grad(
    call: Call, teacher_grad: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rows, student_grad, teacher_grad); in place the student's is its logits."""
    kept = call.kept
    teacher, *center = _seen(kept)
    arguments = (kept.student, teacher, *call.options, teacher_grad, *center)
    if inplace:
        assert kept.student_moments is None, "the deviations' gradient needs the logits"
        loss, rows, gt = run(kept.backend, "distillation_loss_and_grad_", *arguments)
        gs = kept.student
    else:
        loss, rows, gs, gt = run(kept.backend, "distillation_loss_and_grad", *arguments)
    if kept.student_moments is not None:
        add_deviations_(kept, temperature_terms(kept, rows), None, gs, gt)
    return *_finish(call, loss, rows), gs, gt.to(kept.teacher.dtype)


class TemperatureTerms(NamedTuple):
    """Derivatives of each row's part of the loss, 0 where KD is masked."""

    student: Tensor  # by the temperature that the user gave for the student
    teacher: Tensor
    student_deviation: Tensor | None  # by the deviation, over (V − 1)·std; where standardised
    teacher_deviation: Tensor | None


def temperature_terms(kept: Kept, rows: Tensor) -> TemperatureTerms:
    sums = run(
        kept.backend,
        "temperature_sums",
        kept.student,
        # Nothing but differences of a row's logits matters: the center does.
        reference.centered(kept.student, kept.teacher, kept.center),
        rows,
        kept.labels,
        kept.divergence,
        kept.vocab_size,
    )
    kd_scale, ts, tt = (rows[_LINE[name]] for name in ("kd_scale", *TEMPERATURES))
    of_kd = kd_scale != 0

    def counted(x: Tensor) -> Tensor:
        return torch.where(of_kd, x, 0.0)

    by_s, by_t = (
        counted(-kd_scale * of_row / (tau * tau))
        for of_row, tau in zip(sums[:2], (ts, tt), strict=True)
    )
    of_student: Tensor | None = None
    of_teacher: Tensor | None = None
    if kept.student_moments is not None and kept.teacher_moments is not None:
        s_std, t_std = kept.student_moments[1], kept.teacher_moments[1]
        ts, tt = ts / (s_std + EPSILON), tt / (t_std + EPSILON)
        of_student, of_teacher = (
            torch.where(of_kd & (std > 0), by * tau / (max(kept.vocab_size - 1, 1) * std), 0.0)
            for by, tau, std in ((by_s, ts, s_std), (by_t, tt, t_std))
        )
        by_s, by_t = (counted(by * (std + EPSILON)) for by, std in ((by_s, s_std), (by_t, t_std)))
    if kept.t_squared:
        kd = sums[2] + rows[_LINE["teacher_entropy"]] if kept.adds_entropy else sums[2]
        by_s = by_s + counted(2 * kd_scale * kd / ts)
    return TemperatureTerms(by_s, by_t, of_student, of_teacher)


def add_deviations_(
    kept: Kept,
    terms: TemperatureTerms,
    upstream: Tensor | None,
    student_grad: Tensor,
    teacher_grad: Tensor,
) -> None:
    """Adds to the gradients that are not empty what goes through the rows' deviations."""
    for grad, logits, moments, factor in (
        (student_grad, kept.student, kept.student_moments, terms.student_deviation),
        (teacher_grad, kept.teacher, kept.teacher_moments, terms.teacher_deviation),
    ):
        if grad.dim() == 1 or moments is None or factor is None:
            continue
        if upstream is not None:
            factor = zero_wins(factor, upstream)
        run(kept.backend, "add_centered_", grad, logits, moments[0], factor, kept.vocab_size)


def run(backend: str, op: str, *args: Any) -> Any:
    return call_rows(_backend.implementation(backend, op, reference), *args)


def call_rows(op: Callable, *args: Any) -> Any:
    """An op that checks labels, with the exception that a label out of range deserves."""
    try:
        return op(*args)
    except RuntimeError as error:
        if "labels[" in str(error):  # the stable C++ interface knows no other exception
            raise IndexError(str(error)) from None
        raise


def _seen(kept: Kept) -> tuple[Tensor, ...]:
    """The teacher's logits and its center as the fused ops take them: where they do not subtract
    it, the centred logits exist as a whole.
    """
    if kept.center is None:
        return (kept.teacher,)
    on_cpu = kept.student.device.type == "cpu"
    if kept.backend == "reference" or (kept.backend == "cpp" and on_cpu):
        return kept.teacher, kept.center
    return (reference.centered(kept.student, kept.teacher, kept.center),)


def _multiply(option: dict[str, Any], name: str, factor: float | Tensor) -> None:
    """An option, a number or a tensor, times a factor."""
    tensor = option[f"{name}_tensor"]
    if tensor is None and not isinstance(factor, Tensor):
        option[name] *= factor
    else:
        option[f"{name}_tensor"] = (option[name] if tensor is None else tensor) * factor
        option[name] = 0.0


def _as_tensor(option: dict[str, Any], name: str, student: Tensor, teacher: Tensor) -> Tensor:
    tensor = option[f"{name}_tensor"]
    if tensor is not None:
        return tensor
    compute = compute_dtype(student, teacher)
    return torch.full((1,), option[name], dtype=compute, device=student.device)


def _finish(call: Call, loss: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the fused op did not know of the value and the statistics."""
    if call.kept.adds_entropy:
        kd_scale = rows[_LINE["kd_scale"]]
        entropy = rows[_LINE["teacher_entropy"]]
        term = zero_wins(kd_scale, entropy)
        none = call.options[PLACE["reduction"]] == "none"
        loss = loss + (term if none else term.sum(dtype=torch.float64).to(loss.dtype))
    if not call.with_stats:
        return loss, rows
    kd = rows[_LINE["kd"]]
    if call.kept.adds_entropy:
        tau = rows[_LINE["temperature"]]
        t2 = tau * tau if call.options[PLACE["t_squared"]] else 1.0
        kd.add_(torch.where(entropy == 0, 0.0, t2 * entropy))
    if call.kept.student_moments is not None:
        kd.copy_(torch.where(kd == 0, 0.0, kd * call.t2))
    return loss, rows
