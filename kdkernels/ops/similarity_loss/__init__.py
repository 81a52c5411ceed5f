"""similarity_loss: how alike every row is to every key, a distribution of the teacher's that the
student learns, without the matrix of all pairs.

For rows a_i and keys b_j of the student, and likewise of the teacher,

    p_ij = softmax_j φ(a_i, b_j)      loss = mean_i D(teacher's p_i ‖ student's p_i)

with φ one of (T the temperature):

    rbf            −γ‖a − b‖²/T
    dot            γ a·b/T
    cosine         γ cos(a, b)/T
    pkt            γ log((1 + cos(a, b))/2)/T          Passalis and Tefas 2018, arXiv 1803.10837
    student_t      −log(1 + γ‖a − b‖²)/T               van der Maaten and Hinton 2008: (1 + d²)⁻¹
    rbf_softmax    γ exp(−‖a − b‖²/T)                  Zhang et al. 2020, RBF-Softmax

All are functions of the products x = a·b and of squared lengths, so that a block of rows goes
through one matrix product, the row kernel of distillation_loss (any divergence, one sweep or two),
and with V = ∂L/∂x through two more:

    ∂L/∂a_i = Σ_j V_ij b_j − a_i Σ_j V_ij        ∂L/∂b_j = Σ_i V_ij a_i − b_j Σ_i V_ij

the second terms where φ is one of ‖a − b‖² = ‖a‖² + ‖b‖² − 2x. Σ_j ∂L/∂φ_ij = 0 for a softmax, so
for rbf the row's second term vanishes and ‖a‖² is never needed.

**Centring.** The mean μ of the keys is subtracted from rows and keys first, in float32: products of
features far from 0 lose the distances between them (bfloat16 features at mean 30, σ 0.1: off by
0.7). Kernels of a distance do not change when everything moves, so the loss does not depend on μ,
its gradient Σ_i ∂L/∂a_i + Σ_j ∂L/∂b_j is 0, and nothing is propagated through it. For the others μ
matters: (a − μ)·(b − μ) = (a − μ)·b − (a − μ)·μ, whose second part is the same for all keys, so
that ``dot`` sees μ through a alone, ∂L/∂μ = −Σ_i ∂L/∂a_i, and ``cosine`` and ``pkt`` through both.
There autograd carries the gradient on to the keys. Of the keys, because then a row's loss does not
depend on the rows beside it.

``reference.py`` is the same in plain torch, ``triton_kernels.py`` in Triton, csrc/similarity_loss
in C++.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...divergences import DIVERGENCES, Divergence, Parameter, resolve
from .. import _backend
from .._common import (
    check_floats,
    check_names,
    check_shape,
    compute_dtype,
    distinct,
    no_autocast,
    no_double_backward,
    option_pair,
)
from ..distillation_loss import REDUCTIONS, check_flags
from ..softmax import log_softmax, softmax
from . import reference

_OPTIONS = (
    "Tensor? row_weights, Tensor? key_mask, Tensor? parameters, float gamma, float temperature, "
    "float teacher_gamma, float teacher_temperature, str kernel, str divergence, "
    "float first, Tensor? first_tensor, float second, Tensor? second_tensor, "
    "bool exclude_diagonal, str reduction"
)
_FEATURES = "Tensor student, Tensor student_keys, Tensor teacher, Tensor teacher_keys"
SCHEMAS = {
    # key_mask: False where a key counts for no row. parameters: γ, T and the teacher's, in place of
    # the numbers.
    "similarity_loss": f"({_FEATURES}, {_OPTIONS}) -> Tensor",
    "similarity_loss_and_grad": f"({_FEATURES}, {_OPTIONS}, bool student_grad, bool keys_grad, "
    "bool parameter_grads, bool teacher_parameter_grads) -> (Tensor, Tensor, Tensor, Tensor)",
}
_backend.define(SCHEMAS, reference, f"{__name__}.triton_kernels")

KERNELS = ("rbf", "dot", "cosine", "pkt", "student_t", "rbf_softmax")
_OF_DISTANCE = ("rbf", "student_t", "rbf_softmax")
_DIVERGENCES = [name for name in DIVERGENCES if name != "dkd"]


def similarity_loss(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    *,
    kernel: str = "rbf",
    gamma: Parameter = 1.0,
    temperature: Parameter = 1.0,
    teacher_gamma: Parameter | None = None,
    teacher_temperature: Parameter | None = None,
    divergence: str | Divergence = "forward_kl",
    exclude_diagonal: bool | None = None,
    center: bool = True,
    row_weights: Tensor | None = None,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """Divergence between the teacher's and the student's similarities of rows to keys.

    Args:
        student: (..., D) float64, float32, bfloat16 or float16 features; N rows in all.
        teacher: (..., Dt) with the same leading shape; its width and dtype may differ.
        student_keys: (..., D), M keys in all: class prototypes (``prototypes``), a queue or memory
            bank. None: the rows themselves, which then get the gradients of both parts.
        teacher_keys: (..., Dt), the same M keys as the teacher sees them; None with student_keys.
        kernel: "rbf", "dot", "cosine", "pkt", "student_t" or "rbf_softmax": φ in the table above.
        gamma, temperature: γ > 0 and T > 0. Floats or 0-d tensors; a tensor may require grad, and
            has it through both distributions unless the teacher is given its own. An adaptive
            bandwidth such as 1/(mean ‖a − b‖²) must keep its graph: detached, it lets the student
            shrink to a point, which the distances then call an improvement.
        teacher_gamma, teacher_temperature: the teacher's; default: the student's. A teacher of
            another width usually wants a γ of its own.
        divergence: a name in ``kdkernels.divergences.DIVERGENCES`` or an object made there, DKD
            excepted (it needs labels). Its parameters: floats or 0-d tensors.
        exclude_diagonal: leave key i out of row i, whose similarity to itself says nothing.
            Default: True where the keys are the rows themselves. Needs as many keys as rows.
        center: subtract the keys' mean from rows and keys first. It changes nothing but rounding
            for kernels of a distance; for dot, cosine and pkt it makes the similarities those of
            centred features (False: those of the features as they are, as in the paper of PKT).
        row_weights: (...) non-negative weight of each row; 0 masks it: loss and gradient 0, NaN or
            inf inside stay there. Where the keys are the rows themselves it is no key either.
        reduction: "batchmean": over the sum of the row weights; "sum"; "none": one loss a row;
            "mean": batchmean divided by M too.
        backend: None chooses; "cpp", "triton" or "reference" serves the call or raises.

    Returns:
        The loss, 0-d or of the leading shape under "none": float32, float64 where a feature is. A
        row that has no key (a batch of one) counts as masked.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, range or combination, named.
        RuntimeError: a backend that cannot serve the call.
        NotImplementedError: double backward.

    The teacher's features get no gradient. Gradients in the student's features grow with 2γ/T
    (rbf): nothing is multiplied by T². Distances are squared throughout (no square root, whose
    gradient is infinite at 0). Cosines are of vectors not shorter than 1e-12; ``pkt`` is constant
    where (1 + cos)/2 is below rounding.

    ``rbf_softmax`` is the posterior π(c | ẑ) over class prototypes c of the classic formulation,
    with its sign mended. The literal form is exp(−γ e^(‖c − ẑ‖²/T)) / Σ_c̃ exp(−γ e^(‖c̃ − ẑ‖²/T)),
    where e^(‖·‖²/T) grows with the distance although it is called a similarity. In float32 it
    overflows at ‖·‖²/T > 88.7, where all classes get exp(−inf) and the posterior is 0/0; with both
    signs turned, exp(+γ e^(−‖·‖²/T)), nothing can. Both are monotone in the distance and agree to
    first order in ‖·‖²/T.

    Memory: nothing of size N×M in forward or backward, but 8 MiB or 64 rows of it (CPU) or one tile
    (Triton). A scalar loss computes its gradients in the forward, with one product each, and keeps
    them in float32; ``reduction="none"`` repeats the forward's products in the backward. A row's
    loss is bitwise the same whatever rows are beside it (given the keys) and on any number of
    threads; so are all gradients on any number of threads.
    """
    call = _prepare(
        student,
        teacher,
        student_keys,
        teacher_keys,
        kernel=kernel,
        gamma=gamma,
        temperature=temperature,
        teacher_gamma=teacher_gamma,
        teacher_temperature=teacher_temperature,
        divergence=divergence,
        exclude_diagonal=exclude_diagonal,
        center=center,
        row_weights=row_weights,
        reduction=reduction,
        backend=backend,
    )
    features = (call.student, call.student_keys, call.teacher, call.teacher_keys)
    differentiable = (call.student, call.student_keys, call.parameters)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        own = call.student_keys is call.student and call.teacher_keys is call.teacher
        keys = (None, None) if own else features[1::2]
        tensors = distinct((call.student, keys[0], call.teacher, keys[1], call.parameters))
        loss = _Similarity.apply(*tensors, call)
    else:
        op = _backend.implementation(call.backend, "similarity_loss", reference)
        loss = op(*features, call.row_weights, call.key_mask, call.parameters, *call.options)
    return loss.reshape(call.leading) if reduction == "none" else loss


_KEYWORDS = [*inspect.signature(similarity_loss).parameters][4:]


class SimilarityLoss(nn.Module):
    """``similarity_loss`` with its options stored; see there for every one of them.

    ``SimilarityLoss(kernel="pkt")(student, teacher)``. Options given to the call (an adaptive
    gamma, the row_weights of one batch) take the place of stored ones.
    """

    def __init__(self, **options: Any):
        super().__init__()
        check_names("SimilarityLoss", options, _KEYWORDS)
        _check_kernel(options.get("kernel", "rbf"))
        _check_divergence(options.get("divergence", "forward_kl"))
        self.options = options

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_keys: Tensor | None = None,
        teacher_keys: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        return similarity_loss(
            student, teacher, student_keys, teacher_keys, **{**self.options, **options}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def prototypes(features: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """Class means: row c is the mean of the features whose label is c. (Snell et al. 2017, arXiv
    1703.05175.)

    Args:
        features: (..., D) floating point; the gradient goes back through the means.
        labels: (...) integers; a negative one belongs to no class.
        num_classes: C; default: the largest label + 1, which waits for the device and does not
            compile. Give it in a training loop.

    Returns:
        (C, D) in the features' dtype, added up in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range, named; on the CPU also a
            class without features, by number. (On a device the host must not wait: such a row is
            NaN. So it is in a compiled graph.)
        IndexError: a label that is not below num_classes; on a device torch's own assertion.
    """
    check_floats("features", features)
    if features.dim() < 1:
        raise ValueError("features has shape (); accepted: (..., D)")
    check_shape("labels", labels, features.shape[:-1], features.device, "the features")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels has dtype {labels.dtype}; accepted: integer dtypes")
    labels = labels.reshape(-1).to(torch.int64)
    if num_classes is None:
        if labels.numel() == 0 or int(labels.max()) < 0:
            raise ValueError("labels has no class; accepted: a label >= 0, or num_classes=")
        num_classes = int(labels.max()) + 1
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, torch.SymInt)):
        raise TypeError(f"num_classes is a {type(num_classes).__name__}; accepted: None or int")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}; accepted: None or int >= 1")
    compute = compute_dtype(features)
    rows = features.reshape(-1, features.shape[-1]).to(compute)
    on_host = features.device.type == "cpu" and not torch.compiler.is_compiling()
    on_host = on_host and not isinstance(labels, FakeTensor)
    if on_host and bool((labels >= num_classes).any()):
        place = int((labels >= num_classes).nonzero()[0])
        raise IndexError(
            f"labels[{place}] is {int(labels[place])}; accepted: below num_classes={num_classes}, "
            "or a negative number for no class"
        )
    # One class more, of the rows that belong to none, and dropped.
    classes = torch.where(labels < 0, num_classes, labels)
    sums = rows.new_zeros(num_classes + 1, rows.shape[1]).index_add(0, classes, rows)
    counts = rows.new_zeros(num_classes + 1).index_add(0, classes, rows.new_ones(len(rows)))
    counts = counts[:num_classes]
    if on_host and bool((counts == 0).any()):
        empty = (counts == 0).nonzero().reshape(-1)
        named = ", ".join(str(int(c)) for c in empty[:8]) + (", ..." if len(empty) > 8 else "")
        raise ValueError(
            f"{len(empty)} of {num_classes} classes have no features: {named}; accepted: labels "
            "with at least one row of each class"
        )
    return (sums[:num_classes] / counts[:, None]).to(features.dtype)


def prototype_posterior(
    features: Tensor,
    prototypes: Tensor,
    *,
    kernel: str = "rbf",
    gamma: Parameter = 1.0,
    temperature: Parameter = 1.0,
    center: bool = True,
    log: bool = True,
    backend: str | None = None,
) -> Tensor:
    """log π(c | z) of features z over class prototypes c, softmax_c φ(z, c): what
    ``similarity_loss`` compares where the keys are prototypes.

    ``F.nll_loss(prototype_posterior(z, prototypes(support, support_labels)), labels)`` is the loss
    of prototypical networks.

    Args:
        features: (..., D) floating point.
        prototypes: (C, D).
        kernel, gamma, temperature, center: as in ``similarity_loss``.
        log: log-probabilities; False: probabilities.
        backend: of the softmax.

    Returns:
        (..., C) in float32, float64 where an input is. Gradients reach all tensors given.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or range, named.
    """
    _check_kernel(kernel)
    check_flags(center=center, log=log)
    _check_features("features", features)
    _check_keys("prototypes", prototypes, "features", features)
    compute = compute_dtype(features, prototypes)
    rest = (features.device, compute)
    numbers = [_scalar("gamma", gamma, *rest), _scalar("temperature", temperature, *rest)]
    rows, keys = _prepared(
        features.reshape(-1, features.shape[-1]), prototypes, None, kernel, center, compute
    )
    values = [rows.new_full((), x) if tensor is None else tensor for x, tensor in numbers]
    with no_autocast(features.device):
        scores = reference.Scores(_core_name(kernel), *values)(rows, keys, rows @ keys.t())
    posterior = (log_softmax if log else softmax)(scores, backend=backend)
    return posterior.reshape(*features.shape[:-1], prototypes.shape[0])


class _Call(NamedTuple):
    student: Tensor  # (N, D), centred and for cosines of unit length; so are the others
    student_keys: Tensor  # (M, D)
    teacher: Tensor
    teacher_keys: Tensor
    row_weights: Tensor | None
    key_mask: Tensor | None
    parameters: Tensor | None
    options: tuple  # the rest of the ops' arguments, in the order of the schema
    backend: str
    teacher_parameter_grads: bool
    leading: torch.Size


def _prepare(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    *,
    kernel: str,
    gamma: Parameter,
    temperature: Parameter,
    teacher_gamma: Parameter | None,
    teacher_temperature: Parameter | None,
    divergence: str | Divergence,
    exclude_diagonal: bool | None,
    center: bool,
    row_weights: Tensor | None,
    reduction: str,
    backend: str | None,
) -> _Call:
    """Checks every argument and turns it into what the ops take."""
    _check_kernel(kernel)
    member = _check_divergence(divergence)
    check_flags(center=center)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; accepted: {', '.join(REDUCTIONS)}")
    _check_features("student", student)
    _check_features("teacher", teacher)
    leading, device = student.shape[:-1], student.device
    if teacher.shape[:-1] != leading:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)}; accepted: student's rows, "
            f"{tuple(leading)} + (Dt,)"
        )
    own_keys = student_keys is None or (student_keys is student and teacher_keys is teacher)
    if (student_keys is None) != (teacher_keys is None):
        given, absent = ("teacher_keys", "student_keys")
        if student_keys is not None:
            given, absent = absent, given
        raise ValueError(f"{given} without {absent}; accepted: both, or neither")
    if student_keys is None or teacher_keys is None:
        student_keys, teacher_keys = student, teacher
    else:
        _check_keys("student_keys", student_keys, "student", student)
        _check_keys("teacher_keys", teacher_keys, "teacher", teacher)
        if student_keys.shape[:-1] != teacher_keys.shape[:-1]:
            raise ValueError(
                f"teacher_keys has shape {tuple(teacher_keys.shape)}; accepted: as many keys as "
                f"student_keys, {tuple(student_keys.shape[:-1])} + (Dt,)"
            )
    for name, x in (("teacher", teacher), ("student_keys", student_keys)):
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; accepted: student's device {device}")
    rows, keys = leading.numel(), student_keys.shape[:-1].numel()
    if exclude_diagonal is None:
        exclude_diagonal = own_keys
    check_flags(exclude_diagonal=exclude_diagonal)
    if exclude_diagonal and rows != keys:
        raise ValueError(
            f"exclude_diagonal=True with {rows} rows and {keys} keys; accepted: as many of each"
        )
    compute = compute_dtype(student, teacher, student_keys, teacher_keys)
    rest = (device, compute)
    chosen, why = _backend.choose(backend, device, (compute,), on_devices=("triton",))
    _backend.warn_of_reference(chosen, why, device)

    if row_weights is not None:
        check_shape("row_weights", row_weights, leading, device, "the features")
        if row_weights.is_complex() or row_weights.requires_grad:
            what = "requires grad" if row_weights.requires_grad else f"has {row_weights.dtype}"
            raise ValueError(f"row_weights {what}; accepted: real tensors without gradient")
        row_weights = row_weights.reshape(-1).to(compute)
    key_mask = None
    if own_keys and row_weights is not None:
        key_mask = row_weights != 0
        if exclude_diagonal:  # a row that is alone has no key
            row_weights = torch.where(key_mask.sum() > 1, row_weights, 0.0)
    elif exclude_diagonal and keys == 1:
        row_weights = student.new_zeros(1, dtype=compute)

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def prepared(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        rows, keys = flat(rows), flat(keys)
        if row_weights is not None and key_mask is None:
            rows = torch.where(row_weights[:, None] != 0, rows, 0.0)
        a, b = _prepared(rows, keys, key_mask, kernel, center, compute, own_keys)
        return a.contiguous(), b.contiguous()

    a, b = prepared(student, student_keys)
    with torch.no_grad():
        ta, tb = prepared(teacher.detach(), teacher_keys.detach())
    numbers = [_scalar("gamma", gamma, *rest), _scalar("temperature", temperature, *rest)]
    numbers += [
        ours if theirs is None else _scalar(f"teacher_{name}", theirs, *rest)
        for name, ours, theirs in zip(
            ("gamma", "temperature"), numbers, (teacher_gamma, teacher_temperature), strict=True
        )
    ]
    parameters = None
    if any(tensor is not None for _, tensor in numbers):
        parameters = torch.stack(
            [a.new_full((), x) if tensor is None else tensor for x, tensor in numbers]
        )
    scalar = torch.Size(())
    first, second = (
        option_pair(f"divergence {member.name}({name})", value, scalar, *rest)
        for name, value in zip(member.parameters, (member.first, member.second), strict=True)
    )
    options = (
        *(x for x, _ in numbers),
        _core_name(kernel),
        member.name,
        *first,
        *second,
        exclude_diagonal,
        reduction,
    )
    teacher_parameter_grads = any(
        tensor is not None and tensor.requires_grad for _, tensor in numbers[2:]
    )
    return _Call(
        a, b, ta, tb, row_weights, key_mask, parameters, options, chosen, teacher_parameter_grads,
        leading,
    )  # fmt: skip


def _prepared(
    rows: Tensor,
    keys: Tensor,
    key_mask: Tensor | None,
    kernel: str,
    center: bool,
    compute: torch.dtype,
    own_keys: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows and keys as the ops take them: in the dtype computed in, centred, of unit length where
    the kernel is one of the cosine. Keys that are the rows stay the same tensor.
    """
    b = keys.to(compute)
    if key_mask is not None:
        b = torch.where(key_mask[:, None], b, 0.0)
    a = b if own_keys else rows.to(compute)
    if center:
        if key_mask is None:
            mean = b.sum(0) / max(b.shape[0], 1)
        else:
            mean = b.sum(0) / key_mask.sum().clamp(min=1)
        if kernel in _OF_DISTANCE:
            mean = mean.detach()
        b = b - mean
        if key_mask is not None:
            b = torch.where(key_mask[:, None], b, 0.0)
        a = b if own_keys else a - mean
    if kernel in ("cosine", "pkt"):
        b = F.normalize(b, dim=1)
        a = b if own_keys else F.normalize(a, dim=1)
    return a, b


def _core_name(kernel: str) -> str:
    """What the ops call a kernel: the cosine is the product of vectors of unit length."""
    return "dot" if kernel == "cosine" else kernel


def _scalar(
    name: str, value: Parameter, device: torch.device, compute: torch.dtype
) -> tuple[float, Tensor | None]:
    """(number, None) or (1, 0-d tensor, which may require grad)."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; accepted: float or 0-d Tensor")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}; accepted: a finite float > 0, or a 0-d Tensor")
        return float(value), None
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; accepted: floating point")
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: a float, or shape ()")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; accepted: student's device {device}")
    return 1.0, value.to(compute)


def _check_kernel(kernel: Any) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}; accepted: {', '.join(KERNELS)}")


def _check_divergence(divergence: str | Divergence) -> Divergence:
    member = resolve(divergence)
    if member.name == "dkd":
        raise ValueError(
            f"divergence='dkd', which needs labels; accepted: {', '.join(_DIVERGENCES)}"
        )
    return member


def _check_features(name: str, x: Any) -> None:
    check_floats(name, x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: (..., D) with D >= 1")


def _check_keys(name: str, keys: Any, of: str, rows: Tensor) -> None:
    check_floats(name, keys)
    if keys.dim() < 2 or keys.shape[-1] != rows.shape[-1] or keys.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(keys.shape)}; accepted: (M, {rows.shape[-1]}) with M >= 1, "
            f"{of} having {rows.shape[-1]} columns"
        )
    if keys.device != rows.device:
        raise ValueError(f"{name} is on {keys.device}; accepted: {of}'s device {rows.device}")


class _Similarity(torch.autograd.Function):
    """Keeps the gradients that the forward computed; of a loss a row, what the backward needs to
    compute them with its upstream factors as weights. Keys that are None are the rows.
    """

    @staticmethod
    def forward(ctx, student, student_keys, teacher, teacher_keys, parameters, call):
        ctx.per_row = call.options[-1] == "none"
        by_rows, by_keys, _, _, by_parameters, _ = ctx.needs_input_grad
        own = student_keys is None
        ctx.wanted = (
            *(by_rows, by_rows if own else by_keys),
            *(by_parameters, by_parameters and call.teacher_parameter_grads),
        )
        ctx.options, ctx.backend = call.options, call.backend
        rest = (call.row_weights, call.key_mask, parameters)
        inputs = (student, student_keys, teacher, teacher_keys)
        if ctx.per_row:
            op = _backend.implementation(call.backend, "similarity_loss", reference)
            loss = op(*_features(inputs), *rest, *call.options)
            ctx.save_for_backward(*inputs, *rest)
        else:
            loss, *grads = _with_grads(
                call.backend, inputs, *rest, *call.options, wanted=ctx.wanted
            )
            ctx.save_for_backward(student, student_keys, *grads)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 6
        student, student_keys, *saved = ctx.saved_tensors
        with torch.no_grad():
            if ctx.per_row:
                teacher, teacher_keys, row_weights, key_mask, parameters = saved
                weights = grad_loss.to(student.dtype).contiguous()
                if row_weights is not None:  # zero wins
                    weights = torch.where(row_weights == 0, 0.0, row_weights * weights)
                _, *grads = _with_grads(
                    ctx.backend, (student, student_keys, teacher, teacher_keys), weights,
                    key_mask, parameters, *ctx.options[:-1], "sum", wanted=ctx.wanted,
                )  # fmt: skip
            else:
                wanted = (*ctx.wanted[:2], ctx.wanted[2] or ctx.wanted[3])
                grads = [
                    grad * grad_loss if needed else grad
                    for grad, needed in zip(saved, wanted, strict=True)
                ]
        by_student, by_keys, by_parameters = grads
        places = (by_student, by_keys, by_student, by_student, by_parameters)  # two: not wanted
        differentiable = [x for x in (grad_loss, student, student_keys) if x is not None]
        return *no_double_backward(ctx, places, *differentiable), None


def _features(inputs: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, student_keys, teacher, teacher_keys = inputs
    if student_keys is None:
        return student, student, teacher, teacher
    return student, student_keys, teacher, teacher_keys


def _with_grads(backend: str, inputs: tuple, *options: Any, wanted: tuple) -> list[Tensor]:
    """The loss and gradients; keys that are the rows add theirs to the rows'."""
    op = _backend.implementation(backend, "similarity_loss_and_grad", reference)
    loss, by_student, by_keys, by_parameters = op(*_features(inputs), *options, *wanted)
    if inputs[1] is None and wanted[0]:
        by_student = by_student + by_keys
        by_keys = by_keys.new_empty(0)
    return [loss, by_student, by_keys, by_parameters]
