"""distillation_loss: any divergence between teacher and student logits, hard labels and z-loss, in
one sweep.

Per row (one token), with p = softmax(student/τs), q = softmax(teacher/τt), L = log Σ exp(student):

    KD = D(p, q)·(τs² if t_squared)      CE = L − (1 − ε)·s_label − ε·mean(s)      Z = L²

    loss = kd_weight·KD + ce_weight·CE + z_loss_weight·Z
           (weighted, masked and reduced: see the function)

    ∂D/∂s = (G − p·ΣG)/τs      ∂D/∂t = (H − q·ΣH)/τt            (G, H: kdkernels.divergences)

The forward reads both rows once and keeps fourteen numbers a row (``reference.ROWS``); the backward
reads them once more and writes the gradient with the upstream factor in it. ``reference.py`` is the
same in plain torch, ``triton_kernels.py`` in Triton, csrc/distillation_loss in C++.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...divergences import DIVERGENCES, MADE_OF_OTHERS, Divergence, Parameter, resolve
from .. import _backend
from .._common import (
    check_floats,
    check_names,
    check_shape,
    compute_dtype,
    no_double_backward,
    option_pair,
    two_dimensional,
)
from . import ops, reference
from .center import TeacherCenter as TeacherCenter
from .ops import OPTION_NAMES as OPTION_NAMES
from .ops import OPTIONS as OPTIONS
from .ops import call_rows as call_rows

_PLACE = ops.PLACE
REDUCTIONS = ("batchmean", "sum", "none", "mean")


class DistillationStats(NamedTuple):
    """What the sweep saw of every token: leading shape, float32 (float64 for float64 logits),
    without gradient, 0 where masked.
    """

    kd: Tensor  # divergence, with T² where t_squared
    # cross-entropy of the label at temperature 1, label smoothing included; 0 without labels
    ce: Tensor
    student_entropy: Tensor  # nats, at the temperature used
    teacher_entropy: Tensor
    label_log_prob: Tensor  # the student's, at temperature 1
    top1_agreement: Tensor  # 1 where both rows have their (first) maximum in the same column


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Parameter = 1.0,
    teacher_temperature: Parameter | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    teacher_center: Tensor | None = None,
    kd_weight: Parameter = 1.0,
    ce_weight: Parameter = 0.0,
    z_loss_weight: Parameter = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask_kd: bool = True,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    teacher_grad: bool = False,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Distillation loss between two sets of logits, with hard-label cross-entropy and z-loss in the
    same sweep.

    Args:
        student_logits: (..., V) float64, float32, bfloat16 or float16; any leading shape (N tokens
            in all) and row stride. Leading dimensions that do not flatten to one stride, as in
            ``logits[:, :-1]``, cost a copy: shift labels instead.
        teacher_logits: (..., V) of the same shape; its dtype may differ, and with ``vocab_size``
            its padding.
        labels: (...) integer column numbers, or ``ignore_index``; not shifted. Needed for
            ``ce_weight`` and DKD.
        divergence: a name in ``kdkernels.divergences.DIVERGENCES`` or an object made by one of
            those functions; "adaptive_kl" (AKL); or "cross_entropy" (DINO: forward KL plus the
            teacher's entropy; none of its gradients but the student's and its temperature's).
        temperature: τs > 0 divides the student's logits. A float, a 0-d tensor, or one value a
            token (leading shape). A tensor that requires grad gets it, T² included (CTKD, Li et
            al. 2022, arXiv 2211.16231, which reverses its sign). Masked tokens add nothing.
        teacher_temperature: τt > 0 for the teacher's; default τs. As for the gradient.
        t_squared: multiply the KD term, value and gradient, by τs² (Hinton et al. 2015, section 2).
        standardize: divide (s − mean)/(std + 1e-7) of each row instead of its logits by its
            temperature, and the teacher's likewise (LSKD, Sun et al. 2024, arXiv 2403.01427, and
            its code: the unbiased deviation, 0 where V = 1). The gradient goes through mean and
            deviation; CE and z-loss see the logits. A row with −inf is NaN.
        teacher_center: (V,), subtracted from each row of the teacher's logits first
            (``TeacherCenter``). Its columns are the teacher's.
        kd_weight, ce_weight, z_loss_weight: weights of the three terms: float, 0-d tensor or one
            value a token.
        label_smoothing: ε in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: label of a token without a label.
        mask_kd: True: such a token counts in no term (prompt tokens). False: it loses the label
            term only (unlabelled data).
        token_weights: (...) non-negative weight of each token in every term; 0 masks it.
        vocab_size: true number of columns where the logits are padded; padding is not read and gets
            gradient 0.
        reduction: "batchmean": KD and z-loss over the sum of their tokens' weights, CE over its
            own; "sum"; "none": one loss a token, undivided; "mean": as batchmean with KD divided by
            V too, as torch means "mean".
        normalizer: replaces both denominators of batchmean and mean (``num_items_in_batch``): a
            number > 0 or a 0-d tensor, where 0 counts as 1.
        teacher_grad: also give the teacher its gradient (mutual and online distillation); else it
            is detached.
        inplace: not with ``standardize``; with a temperature that requires grad the rows are read
            twice. Write the gradient over ``student_logits``, which must not be read afterwards
            (PyTorch's version counter catches whoever saved them). Not for leaf tensors, rows that
            overlap, or a teacher in the same memory; one backward only. Untouched where no gradient
            is needed. The gradient is rounded to the logits' dtype before the upstream factor
            reaches it: with float16 and a GradScaler use the default, or put the scale into the
            weights.
        return_stats: also return ``DistillationStats`` of the same sweep.
        backend: None chooses (``kdkernels.explain``); "cpp", "triton" or "reference" serves the
            call or raises. On CUDA tensors None is the CUDA library, else Triton, else plain torch
            with a warning; float64 is plain torch there.

    Returns:
        The loss, 0-d or of the leading shape under "none": float32, float64 where an input is. With
        ``return_stats`` (loss, DistillationStats). All tokens masked: 0, with a graph and gradient
        0.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, range or combination, named.
        IndexError: a label that is neither a column nor ``ignore_index``; on the CPU, before
            anything is written. The check reads the N labels once in the op itself. (RuntimeError
            with the same text inside a compiled graph.)
        RuntimeError: a backend that cannot serve the call; a second backward after ``inplace``.
        NotImplementedError: double backward.

    Options cost more looks at the rows, where they are used only. A temperature's gradient: one at
    both, in the backward. ``standardize``: one or two at both in the forward; in the backward one
    at both, and one at the student's logits and gradient. "adaptive_kl": a selection by bisection,
    up to 36 looks at a row in cache (about the time of the loss itself; a sort takes many times as
    long). "cross_entropy": that of ``return_stats``. ``teacher_center``: on the CPU with the C++
    library a row at a time; elsewhere the centred logits are made, N·V numbers in float32.

    A divergence may be +inf where the mathematics is: forward KL where only the student is −inf
    (its gradient stays finite), reverse KL and Jeffreys where only the teacher is (gradient NaN in
    that row alone). JSD, skew, TVD and alpha in (0, 1) never. Temperatures, parameters and weights
    given as tensors are not read on the host: one out of range makes its row NaN. Every row is
    computed alone and in a fixed order: bitwise the same whatever rows are beside it and on any
    number of threads.
    """
    call = _prepare(
        student_logits,
        teacher_logits,
        labels,
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        t_squared=t_squared,
        standardize=standardize,
        teacher_center=teacher_center,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        z_loss_weight=z_loss_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mask_kd=mask_kd,
        token_weights=token_weights,
        vocab_size=vocab_size,
        reduction=reduction,
        normalizer=normalizer,
        teacher_grad=teacher_grad,
        inplace=inplace,
        return_stats=return_stats,
        backend=backend,
    )
    inputs = (call.student, call.teacher, *call.temperatures)
    if torch.is_grad_enabled() and inplace and call.student.requires_grad:
        loss, rows = _InPlace.apply(*inputs, call.backend, call.options, call.extras)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        loss, rows = _Default.apply(*inputs, call.backend, call.options, call.extras)
    else:
        loss, rows = ops.forward(ops.prepare(call.backend, *inputs[:2], call.options, call.extras))
    loss = loss.reshape(call.leading) if reduction == "none" else loss
    return (loss, _stats(rows, call.leading)) if return_stats else loss


_KEYWORDS = [*inspect.signature(distillation_loss).parameters][3:]


def distillation_loss_and_grad(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **options: Any
) -> tuple:
    """Loss and gradient together, each logit read once, for people who run their own backward.

    Takes what ``distillation_loss`` takes and raises what it raises. No autograd: the inputs need
    not require grad and the results do not. Under ``reduction="none"`` the gradient is that of the
    sum. With ``inplace=True`` the student's gradient is written over ``student_logits``, which is
    returned. Gradients are rounded to their logits' dtype as they are: scale the weights, not the
    result, where float16 would underflow.

    Returns:
        (loss, student_grad), then the teacher's gradient with ``teacher_grad=True``, then
        DistillationStats with ``return_stats=True``. Gradients have their logits' shape and dtype.
    """
    check_names("distillation_loss_and_grad", options, _KEYWORDS)
    call = _prepare(student_logits, teacher_logits, labels, **options)
    for name, tau in zip(ops.TEMPERATURES, call.temperatures, strict=True):
        if tau is not None:
            raise ValueError(
                f"{name} requires grad in distillation_loss_and_grad, which gives none for it; "
                "accepted: distillation_loss, or a tensor without gradient"
            )
    inplace = options.get("inplace", False)
    with torch.no_grad():
        prepared = ops.prepare(call.backend, call.student, call.teacher, call.options, call.extras)
        loss, rows, student_grad, teacher_grad = ops.loss_and_grad(
            prepared, call.teacher_grad, inplace
        )
        if inplace:
            torch.autograd.graph.increment_version(student_logits)
            student_grad = student_logits.detach()
        results: list[Any] = [
            loss.reshape(call.leading) if options.get("reduction") == "none" else loss,
            student_grad.reshape(student_logits.shape),
        ]
        if call.teacher_grad:
            results.append(teacher_grad.reshape(teacher_logits.shape))
        if options.get("return_stats", False):
            results.append(_stats(rows, call.leading))
        return tuple(results)


distillation_loss_and_grad.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    distillation_loss
).replace(return_annotation=tuple)


class DistillationLoss(nn.Module):
    """``distillation_loss`` with its options stored; see there for every one of them.

    ``DistillationLoss(temperature=2.0)(student_logits, teacher_logits, labels)``. Options given to
    the call (the tensors of one batch: token_weights, normalizer, a scheduled temperature) take the
    place of stored ones.
    """

    def __init__(self, **options: Any):
        super().__init__()
        check_names("DistillationLoss", options, _KEYWORDS)
        if "divergence" in options:
            resolve(options["divergence"])
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, DistillationStats]:
        return distillation_loss(
            student_logits, teacher_logits, labels, **{**self.options, **options}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def explain(
    student_logits: Tensor, teacher_logits: Tensor | None = None, *, backend: str | None = None
) -> str:
    """The backend that a call with these logits would use, and why, without running anything.

    Args:
        student_logits: its device and dtype decide.
        teacher_logits: its dtype decides too; default: like the student's.
        backend: as in the call.
    """
    given = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    for argument, logits in given.items():
        if logits is not None:
            check_floats(argument, logits)
    dtypes = [logits.dtype for logits in given.values() if logits is not None]
    name, why = _backend.choose(backend, student_logits.device, tuple(dtypes))
    return f"{name}: {why}"


class _Call(NamedTuple):
    student: Tensor  # (N, columns), a view of the caller's where inplace
    teacher: Tensor  # (N, columns), detached unless teacher_grad
    backend: str
    # those that require grad, (1,) or (N,)
    temperatures: tuple[Tensor | None, Tensor | None]
    options: tuple  # ops.OPTIONS
    extras: ops.Extras
    leading: torch.Size
    teacher_grad: bool


def _prepare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    teacher_grad: bool = False,
    inplace: bool = False,
    standardize: bool = False,
    teacher_center: Tensor | None = None,
    backend: str | None = None,
    fused_only: bool = False,
    **options: Any,
) -> _Call:
    """Checks every argument and turns it into what the ops take. ``fused_only``: refuse what is
    made of several ops, a temperature's gradient included.
    """
    _check_logits(student_logits, teacher_logits, options.get("vocab_size"))
    chosen, why = _backend.choose(
        backend, student_logits.device, (student_logits.dtype, teacher_logits.dtype)
    )
    _backend.warn_of_reference(chosen, why, student_logits.device)
    leading, columns = student_logits.shape[:-1], student_logits.shape[-1]
    check_flags(teacher_grad=teacher_grad, inplace=inplace)
    compute = compute_dtype(student_logits, teacher_logits)
    temperatures = (None, None) if fused_only else _take_temperatures(options, compute)
    row = row_options(
        labels, leading, columns, student_logits.device, compute, **options, fused_only=fused_only
    )
    divergence = row[_PLACE["divergence"]]
    extras = _extras(standardize, teacher_center, divergence, teacher_logits, compute)
    if inplace and standardize:
        raise ValueError(
            "inplace=True with standardize=True, whose gradient needs the logits once more; "
            "accepted: inplace=False"
        )
    if divergence == "cross_entropy" and (teacher_grad or temperatures[1] is not None):
        needs = "teacher_grad=True" if teacher_grad else "a teacher_temperature that requires grad"
        raise ValueError(
            f"{needs} with divergence='cross_entropy', which gives the teacher's side no "
            "gradient; accepted: divergence='forward_kl'"
        )
    if not teacher_grad:
        teacher_logits = teacher_logits.detach()
    student = two_dimensional(student_logits, columns)
    teacher = two_dimensional(teacher_logits, teacher_logits.shape[-1])
    if inplace:
        _check_inplace(student_logits, student, teacher)
    if chosen == "reference":
        check_labels(*(row[_PLACE[name]] for name in ("labels", "ignore_index", "vocab_size")))
    return _Call(student, teacher, chosen, temperatures, row, extras, leading, teacher_grad)


def _take_temperatures(
    options: dict[str, Any], compute: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The temperatures that require grad, which the options then hold without."""
    options.setdefault("teacher_temperature", None)
    if options["teacher_temperature"] is None:
        options["teacher_temperature"] = options.get("temperature", 1.0)
    taken: list[Tensor | None] = []
    for name in ops.TEMPERATURES:
        tau = options.get(name, 1.0)
        if isinstance(tau, Tensor) and tau.requires_grad:
            options[name] = tau.detach()
            # A complex one is refused with its name later.
            taken.append(tau.reshape(-1).to(compute) if tau.is_floating_point() else None)
        else:
            taken.append(None)
    return taken[0], taken[1]


def row_options(
    labels: Tensor | None,
    leading: torch.Size,
    columns: int,
    device: torch.device,
    compute: torch.dtype,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Parameter = 1.0,
    teacher_temperature: Parameter | None = None,
    t_squared: bool = True,
    kd_weight: Parameter = 1.0,
    ce_weight: Parameter = 0.0,
    z_loss_weight: Parameter = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask_kd: bool = True,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    fused_only: bool = True,
) -> tuple:
    """Checks every option that is about rows, for logits of shape (*leading, columns), and turns
    them into OPTIONS, in that order. ``fused_only``: refuse what is made of several ops.
    """
    if vocab_size is None:
        vocab_size = columns
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; accepted: {', '.join(REDUCTIONS)}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(
            f"label_smoothing is a {type(label_smoothing).__name__}; accepted: float in [0, 1]"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}; accepted: [0, 1]")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is a {type(ignore_index).__name__}; accepted: int")
    check_flags(t_squared=t_squared, mask_kd=mask_kd, return_stats=return_stats)
    if normalizer is not None and reduction not in ("batchmean", "mean"):
        raise ValueError(
            f"normalizer with reduction={reduction!r}; accepted: reduction='batchmean' or 'mean'"
        )
    member = resolve(divergence)
    if fused_only and member.name in MADE_OF_OTHERS:
        raise ValueError(
            f"divergence={member.name!r}; accepted here: {', '.join(DIVERGENCES)}. Others are "
            "distillation_loss's alone"
        )
    if labels is None:
        if not isinstance(ce_weight, Tensor) and ce_weight == 0 and member.name != "dkd":
            pass_labels = None
        else:
            needs = "divergence='dkd'" if member.name == "dkd" else f"ce_weight={ce_weight}"
            raise ValueError(
                f"labels is None with {needs}; accepted: labels of shape {tuple(leading)}"
            )
    else:
        check_shape("labels", labels, leading, device)
        if labels.dtype not in _INTEGERS:
            raise TypeError(f"labels has dtype {labels.dtype}; accepted: integer dtypes")
        pass_labels = labels.reshape(-1).to(torch.int64)
    if member.name == "dkd" and not mask_kd:
        raise ValueError("mask_kd=False with divergence='dkd', which needs a label in every row")

    rest = (leading, device, compute)
    if token_weights is not None:
        check_shape("token_weights", token_weights, leading, device)
        if token_weights.is_complex():
            raise TypeError(f"token_weights has dtype {token_weights.dtype}; accepted: real dtypes")
        if token_weights.requires_grad:
            raise ValueError("token_weights requires grad; accepted: tensors without gradient")
        token_weights = token_weights.reshape(-1).to(compute)
    if teacher_temperature is None:
        teacher_temperature = temperature
    normalizer_pair: tuple[float | None, Tensor | None] = (None, None)
    if normalizer is not None:
        normalizer_pair = option_pair(
            "normalizer", normalizer, torch.Size(()), *rest[1:], positive=True
        )
    return (
        pass_labels,
        token_weights,
        member.name,
        *option_pair(f"divergence {member.name}({member.parameters[0]})", member.first, *rest),
        *option_pair(f"divergence {member.name}({member.parameters[1]})", member.second, *rest),
        *option_pair("temperature", temperature, *rest, positive=True),
        *option_pair("teacher_temperature", teacher_temperature, *rest, positive=True),
        *option_pair("kd_weight", kd_weight, *rest),
        *option_pair("ce_weight", ce_weight, *rest),
        *option_pair("z_loss_weight", z_loss_weight, *rest),
        *normalizer_pair,
        t_squared,
        float(label_smoothing),
        ignore_index,
        mask_kd,
        vocab_size,
        reduction,
        return_stats,
    )


def _extras(
    standardize: bool, center: Tensor | None, divergence: str, teacher: Tensor, compute: torch.dtype
) -> ops.Extras:
    check_flags(standardize=standardize)
    if center is None:
        return ops.Extras(standardize)
    if standardize or divergence == "adaptive_kl":
        given = "standardize=True" if standardize else "divergence='adaptive_kl'"
        raise ValueError(f"teacher_center with {given}; accepted: one of the two")
    check_floats("teacher_center", center)
    if center.shape != teacher.shape[-1:]:
        raise ValueError(
            f"teacher_center has shape {tuple(center.shape)}; accepted: "
            f"{tuple(teacher.shape[-1:])}, a number for each of the teacher's columns"
        )
    if center.device != teacher.device:
        raise ValueError(
            f"teacher_center is on {center.device}; accepted: the logits' device {teacher.device}"
        )
    if center.requires_grad:
        raise ValueError("teacher_center requires grad; accepted: a tensor without gradient")
    return ops.Extras(False, center.to(compute).contiguous())


def check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is a {type(flag).__name__}; accepted: bool")


def _check_inplace(student_logits: Tensor, student: Tensor, teacher: Tensor) -> None:
    """Refuses logits that cannot be written over: leaves, rows that overlap,
    a teacher in the same memory.
    """
    base = student_logits if student_logits._base is None else student_logits._base
    if student_logits.requires_grad and base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace=True would overwrite student_logits, a leaf tensor that requires grad or a "
            "view of one; accepted: the output of a model, or inplace=False"
        )
    rows, columns = student.shape
    sizes = [
        (size, stride)
        for size, stride in zip(student_logits.shape[:-1], student_logits.stride(), strict=False)
        if size > 1
    ]
    flattens = (columns == 1 or student_logits.stride(-1) == 1) and all(
        outer == size * stride for (_, outer), (size, stride) in zip(sizes, sizes[1:], strict=False)
    )
    if not flattens or (rows > 1 and student.stride(0) < columns):
        raise ValueError(
            f"inplace=True with student_logits of strides {student_logits.stride()}, whose rows "
            "cannot be written as they lie; accepted: columns of stride 1, leading dimensions that "
            "flatten, no overlap"
        )
    if torch.compiler.is_compiling() or rows == 0:
        return
    same = (student.data_ptr(), student.stride(), student.dtype) == (
        teacher.data_ptr(),
        teacher.stride(),
        teacher.dtype,
    )
    if (
        not same
        and _byte_range(student)[0] < _byte_range(teacher)[1]
        and (_byte_range(teacher)[0] < _byte_range(student)[1])
    ):
        raise ValueError(
            "inplace=True with teacher_logits in the memory of student_logits at another offset, "
            "stride or dtype; accepted: memory of its own, or exactly the same logits"
        )


def _byte_range(rows: Tensor) -> tuple[int, int]:
    begin = rows.data_ptr()
    last = (rows.shape[0] - 1) * rows.stride(0) + rows.shape[1]
    return begin, begin + last * rows.element_size()


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_logits(student: Tensor, teacher: Tensor, vocab_size: int | None) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_floats(name, logits)
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)}; accepted: (..., V) with V >= 1"
            )
    if teacher.shape[:-1] != student.shape[:-1] or (
        vocab_size is None and teacher.shape != student.shape
    ):
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}; accepted: student_logits' "
            f"{tuple(student.shape)}, or another number of columns with vocab_size= the true one"
        )
    check_vocab_size(vocab_size, min(student.shape[-1], teacher.shape[-1]))
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_logits is on {teacher.device}; accepted: student_logits' device "
            f"{student.device}"
        )


def check_vocab_size(vocab_size: Any, widest: int) -> None:
    if not isinstance(vocab_size, (int, torch.SymInt, type(None))):
        raise TypeError(f"vocab_size is a {type(vocab_size).__name__}; accepted: int or None")
    if vocab_size is not None and not 1 <= vocab_size <= widest:
        raise ValueError(f"vocab_size={vocab_size}; accepted: 1 to the {widest} columns given")


def check_labels(labels: Tensor | None, ignore_index: int, vocab_size: int) -> None:
    """IndexError for the reference on the CPU; elsewhere such a row is NaN where a term that counts
    reads the label, since the host must not wait.
    """
    if (
        labels is None
        or labels.device.type != "cpu"
        or torch.compiler.is_compiling()
        or isinstance(labels, FakeTensor)
    ):
        return
    wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(label_error(row, int(labels[row]), ignore_index, vocab_size))


def label_error(row: int, label: int, ignore_index: int, vocab_size: int) -> str:
    return (
        f"labels[{row}] is {label}; accepted: 0 to {vocab_size - 1}, or ignore_index {ignore_index}"
    )


def _stats(rows: Tensor, leading: torch.Size) -> DistillationStats:
    lines = rows.detach()[len(reference.ROWS) :]
    return DistillationStats(*(line.reshape(leading) for line in lines))


class _Default(torch.autograd.Function):
    """Keeps the logits and their row statistics; the backward reads the logits once more."""

    @staticmethod
    def forward(ctx, student, teacher, temperature, teacher_temperature, backend, options, extras):
        call = ops.prepare(backend, student, teacher, options, extras)
        loss, rows = ops.forward(call)
        ctx.save_for_backward(temperature, teacher_temperature, rows, *call.kept.tensors)
        ctx.rest = call.kept.rest
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return loss, rows

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 7
        *temperatures, rows = ctx.saved_tensors[:3]
        tensors = ctx.saved_tensors[3:]
        kept = ops.Kept(*tensors, *ctx.rest)
        upstream = grad_loss.to(rows.dtype)
        by_temperature: tuple[Tensor | None, ...] = (None, None)
        with torch.no_grad():
            grads = ops.backward(kept, upstream, rows, *ctx.needs_input_grad[:2])
            if kept.student_moments is not None or any(ctx.needs_input_grad[2:4]):
                terms = ops.temperature_terms(kept, rows)
                ops.add_deviations_(kept, terms, upstream, *grads)
                by_temperature = _by_temperature(terms, upstream, temperatures)
        return _hand_over(ctx, (*grads, *by_temperature), grad_loss, *tensors[:2], *temperatures)


class _InPlace(torch.autograd.Function):
    """Writes the gradient over the student's logits in the forward; the backward hands it on."""

    @staticmethod
    def forward(ctx, student, teacher, temperature, teacher_temperature, backend, options, extras):
        call = ops.prepare(backend, student, teacher, options, extras)
        terms = None
        if any(ctx.needs_input_grad[2:4]):  # while the logits are there
            terms = ops.temperature_terms(call.kept, ops.forward(call)[1])
        loss, rows, _, teacher_grad = ops.loss_and_grad(call, ctx.needs_input_grad[1], True)
        # Whoever else saved these logits must get PyTorch's own error. Not mark_dirty: it loses the
        # gradient where the logits are a compiled graph's input.
        torch.autograd.graph.increment_version(student)
        temperatures = (temperature, teacher_temperature)
        of_rows = terms[:2] if terms else ()
        ctx.save_for_backward(student, teacher_grad, teacher, *temperatures, *of_rows)
        ctx.backend, ctx.spent = backend, False
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return loss, rows

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 7
        if ctx.spent:
            raise RuntimeError(
                "second backward through distillation_loss(inplace=True): its gradient was handed "
                "on by the first; accepted: inplace=False where a graph is walked twice"
            )
        ctx.spent = True
        student, teacher_grad, teacher, *temperatures = ctx.saved_tensors[:5]
        terms = ctx.saved_tensors[5:]
        student_grad = student.detach()
        with torch.no_grad():
            for grad, needed in zip(
                (student_grad, teacher_grad), ctx.needs_input_grad, strict=False
            ):
                if needed:
                    ops.run(ctx.backend, "scale_rows_", grad, grad_loss)
            by_temperature = _by_temperature(terms, grad_loss, temperatures)
        grads = (student_grad, teacher_grad, *by_temperature)
        return _hand_over(ctx, grads, grad_loss, student, teacher, *temperatures)


def _by_temperature(
    terms: Sequence[Tensor | None], upstream: Tensor, temperatures: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of the temperatures, (1,) or (N,), from each row's derivatives."""
    grads: list[Tensor | None] = []
    for place, tau in enumerate(temperatures):
        if tau is None:
            grads.append(None)
            continue
        term = terms[place]
        assert term is not None
        by_row = torch.where(term == 0, 0.0, term * upstream)
        summed = tau.shape[0] == 1 and term.shape[0] != 1
        grads.append(
            by_row.sum(dtype=torch.float64).to(term.dtype).reshape(1) if summed else by_row
        )
    return tuple(grads)


def _hand_over(ctx, grads, *differentiable):
    """The gradients of a backward, guarded where somebody wants to differentiate them again."""
    given = [x for x in differentiable if x is not None]
    wanted = no_double_backward(ctx, grads, *given)
    return *wanted, None, None, None
