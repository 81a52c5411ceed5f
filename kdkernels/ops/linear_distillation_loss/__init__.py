"""linear_distillation_loss: distillation_loss of two language models' last layers, without their
logits.

    s = cap(scale·(h·Wᵀ + b))      cap(x) = softcap·tanh(x/softcap)      t likewise, the teacher's

    loss = distillation_loss(s, t)      ∂L/∂h = g·W      ∂L/∂W = gᵀ·h      ∂L/∂b = Σ g
    g = ∂L/∂s·scale·(1 − (s/softcap)²)

Rows (tokens) are independent given the normaliser, so N×V logits never need to exist: a chunk of
rows at a time goes through the student's and the teacher's head, the row kernel writes ∂L/∂s over
the student's logits, and the products with it are added up in float32. That is
2·N·V·(3·Hs + Ht) floating-point operations, no product done twice, all of them in the forward; the
backward multiplies by the upstream factor. A loss a token (``reduction="none"``) does not know its
upstream factors in the forward: its backward goes through the chunks again.

Logits are float32 from bfloat16 hidden states and weights. Rounded to bfloat16 first, p − q loses
its digits where the student is near its teacher (14 to 27 % of the gradient where the two differ by
3 %); gradients of logits may be bfloat16 (0.22 %).
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from .. import _backend
from .._common import check_floats, check_names, no_double_backward
from ..distillation_loss import (
    OPTION_NAMES,
    OPTIONS,
    DistillationStats,
    check_flags,
    check_vocab_size,
    distillation_loss,
    row_options,
)
from . import low_memory as logit_free
from . import reference

SCHEMAS = {
    "linear_distillation_loss": "(Tensor student_hidden, Tensor student_weight, "
    "Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_logits, float? student_softcap, float student_logit_scale, "
    "ScalarType student_operands, float? teacher_softcap, float teacher_logit_scale, "
    "ScalarType teacher_operands, SymInt chunk_rows, str backend, bool[] wanted, Tensor? upstream, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor[])",
    "distillation_loss_and_grad_into": f"(Tensor student, Tensor teacher, {OPTIONS}, "
    "bool teacher_grad, Tensor(a!) grad) -> (Tensor loss, Tensor rows, Tensor teacher_grad)",
    "mm_float32_": "(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()",
    "scaled": "(Tensor grad, Tensor factor, ScalarType dtype) -> Tensor",
}
_backend.define(SCHEMAS, reference)

# Bytes of the buffers that the chunks go through, where nobody says. At V = 49152 this is 426 rows
# of two float32 heads and 853 of two bfloat16 ones on the CPU (214 rows of logits at a time), and
# leaves the whole call under 256 MiB beside its gradients (192 MiB took 255.6 in bfloat16). More
# rows are faster: time over the matrix products alone, bfloat16, Hs = Ht = 576, N = 4096, was 1.96
# with 128 MiB and 1.69 with 192 (processor time of one thread on a loaded machine).
DEFAULT_MEMORY_BUDGET = 160 * 2**20
# On a GPU the float32 sum of the weight's gradient is read and written once a chunk: 8 bytes for
# 2·rows floating-point operations, which an H100 (295 a byte of memory at bfloat16's peak) needs
# 1200 rows for. A chunk with fewer rows than the second number spends most of its time there.
DEVICE_ROWS, FEWEST_ROWS = 2048, 128


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    low_memory: bool = False,
    teacher_grad: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """``distillation_loss`` of the logits ``hidden @ weight.T`` of two models, which never exist as
    a whole: nothing of size N×V is allocated, in no dtype, whatever the options.

    The teacher is given by its hidden states and weight, or by its logits, or, with
    ``kd_weight=0``, not at all: then this is a fused linear cross-entropy with z-loss and label
    smoothing.

    Args:
        student_hidden: (..., Hs) float64, float32, bfloat16 or float16, what the student's head is
            applied to; any leading shape (N tokens in all).
        student_weight: (V, Hs), as ``nn.Linear.weight``; any strides.
        teacher_hidden: (..., Ht) of the same leading shape; its width may differ.
        teacher_weight: (V, Ht). May be ``student_weight`` itself, or have another V, with
            ``vocab_size`` the true one.
        labels, and every option not below: those of ``distillation_loss``, with the same meaning
            and defaults; ``inplace`` is not one of them.
        student_bias, teacher_bias: (V,).
        teacher_logits: (..., V) instead of the teacher's hidden states and weight; any strides
            (with ``low_memory`` only such that the leading dimensions flatten to one).
        student_softcap, teacher_softcap: c > 0 makes the logits c·tanh(z/c) (Gemma 2).
        student_logit_scale, teacher_logit_scale: z = scale·(hidden @ weight.T + bias), before the
            softcap (Cohere).
        chunk_rows: tokens whose logits exist at a time, at most; default from ``memory_budget``.
        memory_budget: bytes of the chunks' buffers, at least one row; default 160 MiB on the CPU,
            2048 rows on a GPU. The float32 sum of the weight's gradient comes on top. With
            ``low_memory`` bytes of the panels of the logits' gradient, at least 128 columns;
            default as many as ``student_hidden`` has, or 64 MiB where that is more.
        low_memory: form tiles of logits in registers only (Triton, CUDA tensors; float64 and other
            backends raise RuntimeError). See below. On CUDA tensors it is also chosen where
            ``memory_budget`` holds fewer than 128 rows.
        teacher_grad: also give the teacher's tensors their gradients; else they are detached.
        backend: None chooses (``kdkernels.explain``); it serves the rows, matrix products are
            PyTorch's.

    Returns:
        As ``distillation_loss``. Without a teacher, what the statistics say of one is 0.

    Raises:
        As ``distillation_loss``.

    Precision: products of hidden states and weight are summed and kept in float32 (float64 where
    one of the two is float64). Under autocast both are rounded to its dtype first, as
    ``nn.Linear`` does; two different dtypes without it are promoted. Gradients of bfloat16 logits
    are rounded to bfloat16 before their products, everything else once, at the end, after the
    upstream factor (the hidden states' gradient before it, except in float16).

    Cost: where a gradient is needed a scalar loss computes it in the forward, 3·Hs + Ht
    multiplications and additions for each logit, and keeps it, the weight's in float32, until the
    graph is freed. ``reduction="none"`` forms both models' logits once more in its backward, for
    gradients with any upstream factors: 4·Hs + 2·Ht. A frozen weight saves Hs, so do frozen hidden
    states; without any gradient Hs + Ht remain. On the CPU masked tokens cost nothing.
    Bitwise the same for the same chunk shapes; another ``chunk_rows`` changes the rounding.

    ``low_memory``: the forward keeps 56 bytes a token and, while it runs, 72 for each 4096 columns;
    the backward adds the panels, a float32 sum of the hidden states' gradient and one panel's of
    the weight's, which needs no V×Hs float32 sum. Multiplications and additions for each logit:
    Hs + Ht in the forward, 3·Hs + Ht in the backward (1.5 times those above for Hs = Ht); JSD, skew
    and total variation Hs + Ht more. Every upstream factor, ``reduction="none"`` included, costs
    the same. A token's loss has the same bits whatever tokens are beside it.
    """
    heads = _Heads(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
    )
    check_names("linear_distillation_loss", options, _OPTIONS)
    vocab = _check_heads(heads, options.get("vocab_size"))
    check_flags(teacher_grad=teacher_grad, low_memory=low_memory)
    transforms = (
        _checked_softcap("student_softcap", student_softcap),
        _checked_scale("student_logit_scale", student_logit_scale),
        _operands(student_hidden, student_weight),
        _checked_softcap("teacher_softcap", teacher_softcap),
        _checked_scale("teacher_logit_scale", teacher_logit_scale),
        _operands(teacher_hidden, teacher_weight),
    )
    if teacher_hidden is None and not (teacher_softcap is None and teacher_logit_scale == 1):
        raise ValueError(
            "teacher_softcap or teacher_logit_scale without teacher_hidden; accepted: both "
            "apply to hidden states' logits, teacher_logits are used as they are"
        )
    kd_weight = options.get("kd_weight", 1.0)
    without_kd = not isinstance(kd_weight, Tensor) and kd_weight == 0
    if teacher_hidden is None and teacher_logits is None and not without_kd:
        raise ValueError(
            "neither teacher_hidden nor teacher_logits is given; accepted: one of them, or "
            "kd_weight=0 for a loss without a teacher"
        )
    if without_kd and not teacher_grad and not options.get("return_stats", False):
        # Its logits would be computed for nothing.
        heads = heads._replace(
            teacher_hidden=None, teacher_weight=None, teacher_bias=None, teacher_logits=None
        )
    compute = reference.compute_dtype(transforms[2], transforms[5], heads.teacher_logits)
    if low_memory:
        logit_free.refusal(student_hidden.device, (compute,), backend)
        backend = "triton"
    chosen, why = _backend.choose(backend, student_hidden.device, (compute,))
    _backend.warn_of_reference(chosen, why, student_hidden.device)
    leading = student_hidden.shape[:-1]
    row = row_options(labels, leading, vocab, student_hidden.device, compute, **options)
    tensors = _flattened(heads)
    if not teacher_grad:
        tensors = [*tensors[:3], *(x if x is None else x.detach() for x in tensors[3:])]
    parts = reference.parts_of(transforms[2], student_hidden.device)
    logit_bytes = reference.logit_bytes(transforms[2], transforms[0], True, parts)
    if heads.teacher_hidden is not None:
        logit_bytes += reference.logit_bytes(transforms[5], transforms[3], teacher_grad, parts)
    if low_memory and chunk_rows is not None:
        raise ValueError(
            f"chunk_rows={chunk_rows} with low_memory=True, which has no chunks of rows; accepted: "
            "memory_budget"
        )
    given = tensors[_Heads._fields.index("teacher_logits")]
    flat = given is None or given.dim() == 2
    if low_memory and given is not None and not flat:
        raise ValueError(
            f"teacher_logits has shape {tuple(given.shape)} with strides {given.stride()}; "
            "accepted with low_memory=True: leading dimensions that flatten to one stride"
        )
    row_bytes = math.ceil(vocab * logit_bytes)
    rows = _chunk_rows(chunk_rows, memory_budget, row_bytes, student_hidden.device)
    if flat and chunk_rows is None and memory_budget is not None and rows < FEWEST_ROWS:
        low_memory = low_memory or logit_free.serves(student_hidden.device, (compute,), backend)
    config = (*transforms, rows, chosen)
    if low_memory:
        loss, stats = logit_free.apply(tensors, transforms, memory_budget, row)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        loss, stats = _Linear.apply(*tensors, config, row)
    else:
        loss, stats, _ = _op(*tensors, *config, [False] * len(tensors), None, *row)
    if row[OPTION_NAMES.index("reduction")] == "none":
        loss = loss.reshape(leading)
    if not options.get("return_stats", False):
        return loss
    return loss, DistillationStats(*(line.reshape(leading) for line in stats.detach()))


class LinearDistillationLoss(nn.Module):
    """``linear_distillation_loss`` of two ``nn.Linear`` heads, with its options stored.

    ``LinearDistillationLoss(student.lm_head, teacher.lm_head, temperature=2.0)(student_hidden,
    teacher_hidden, labels)``. Options given to the call take the place of stored ones. Without a
    teacher's head give the call ``teacher_logits=``, or ``kd_weight=0``.

    The heads stay their models': they are not submodules of the loss, whose ``parameters()`` and
    ``state_dict()`` are empty. A head is used through its weight and bias, so one that does
    something else (a LoRA adapter, a quantised weight, a hook) raises TypeError; a parametrised
    ``nn.Linear`` is used through its effective weight. One that FSDP2's ``fully_shard`` was given
    is gathered (``head.unshard()``), and stays so until FSDP2 frees it: after the backward, where
    that gives it a gradient.
    """

    def __init__(
        self, student_head: nn.Linear, teacher_head: nn.Linear | None = None, **options: Any
    ):
        super().__init__()
        check_names("LinearDistillationLoss", options, [*_KEYWORDS, *_OPTIONS])
        self._heads = (student_head, teacher_head)  # a tuple's modules are not registered
        self.options = options
        for name, head in zip(("student_head", "teacher_head"), self._heads, strict=True):
            if head is not None:
                _check_head(name, head)

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, DistillationStats]:
        return linear_distillation_loss(
            student_hidden,
            teacher_hidden=teacher_hidden,
            labels=labels,
            **self._head_tensors(teacher=teacher_hidden is not None),
            **{**self.options, **options},
        )

    def _head_tensors(self, teacher: bool = True) -> dict[str, Any]:
        """Read at each call: adapters are attached, and parameters replaced, at any time."""
        result: dict[str, Any] = {}
        for name, head in zip(("student", "teacher"), self._heads, strict=True):
            if head is None or (name == "teacher" and not teacher):
                continue
            gather: Any = getattr(head, "unshard", None)
            if gather is not None:  # its forward, before which FSDP2 would gather it, never runs
                gather()
            _check_head(f"{name}_head", head)
            result |= {f"{name}_weight": head.weight, f"{name}_bias": head.bias}
        return result

    def extra_repr(self) -> str:
        heads = (
            f"{name}={head!r}"
            for name, head in zip(("student_head", "teacher_head"), self._heads, strict=True)
        )
        return ", ".join([*heads, *(f"{name}={value!r}" for name, value in self.options.items())])


def bfloat16_product() -> str:
    """Which product of bfloat16 matrices with a float32 result the CPU has here."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels::mm_float32_", "CPU"):
        return "MKL's, with a float32 result"
    return "plain torch, converted to float32 a tile at a time: slow"


class _Heads(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None


_signature = inspect.signature(linear_distillation_loss)
_KEYWORDS = [name for name, p in _signature.parameters.items() if p.kind == p.KEYWORD_ONLY]
_OPTIONS = {
    name: parameter
    for name, parameter in inspect.signature(distillation_loss).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY
    and name not in (*_KEYWORDS, "inplace", "standardize", "teacher_center")
}
linear_distillation_loss.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        *(p for p in _signature.parameters.values() if p.kind != p.VAR_KEYWORD),
        *_OPTIONS.values(),
    ]
)


def _check_heads(heads: _Heads, vocab_size: Any) -> int:
    """The columns of the logits: vocab_size where given, else both heads'."""
    student, columns = heads.student_hidden, {}
    for whose in ("student", "teacher"):
        hidden, weight, bias = (
            getattr(heads, f"{whose}_{part}") for part in ("hidden", "weight", "bias")
        )
        if whose == "teacher" and hidden is None:
            for part, value in (("weight", weight), ("bias", bias)):
                if value is not None:
                    raise ValueError(f"teacher_{part} without teacher_hidden; accepted: both")
            continue
        check_floats(f"{whose}_hidden", hidden)
        check_floats(f"{whose}_weight", weight)
        if hidden.dim() < 1 or hidden.shape[:-1] != student.shape[:-1]:
            accepted = "(..., H)" if whose == "student" else f"{tuple(student.shape[:-1])} + (H,)"
            raise ValueError(
                f"{whose}_hidden has shape {tuple(hidden.shape)}; accepted: {accepted}"
            )
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
            raise ValueError(
                f"{whose}_weight has shape {tuple(weight.shape)}; accepted: (V, "
                f"{hidden.shape[-1]}) with V >= 1, the hidden states having {hidden.shape[-1]} "
                "columns"
            )
        columns[f"{whose}_weight"] = weight.shape[0]
        if bias is not None:
            check_floats(f"{whose}_bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"{whose}_bias has shape {tuple(bias.shape)}; accepted: ({weight.shape[0]},)"
                )
    if heads.teacher_logits is not None:
        if heads.teacher_hidden is not None:
            raise ValueError("teacher_hidden and teacher_logits are given; accepted: one of them")
        check_floats("teacher_logits", heads.teacher_logits)
        shape = heads.teacher_logits.shape
        if len(shape) < 1 or shape[:-1] != student.shape[:-1] or shape[-1] == 0:
            raise ValueError(
                f"teacher_logits has shape {tuple(shape)}; accepted: "
                f"{tuple(student.shape[:-1])} + (V,)"
            )
        columns["teacher_logits"] = shape[-1]
    for name, value in heads._asdict().items():
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{name} is a {type(value).__name__}; accepted: an ordinary tensor. Under FSDP2 "
                "call the loss inside the forward of the module that fully_shard was given, whose "
                "weights are gathered there, or call that module's unshard() first"
            )
        if value is not None and value.device != student.device:
            raise ValueError(
                f"{name} is on {value.device}; accepted: student_hidden's device {student.device}"
            )
    widest = min(columns.values())
    check_vocab_size(vocab_size, widest)
    if vocab_size is None and len(set(columns.values())) > 1:
        (first, one), (second, other) = columns.items()
        raise ValueError(
            f"{first} has {one} columns of logits and {second} {other}; accepted: as many, or "
            "vocab_size= the true number"
        )
    return widest if vocab_size is None else vocab_size


def _checked_softcap(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: None or float > 0")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}; accepted: None or a finite float > 0")
    return float(value)


def _checked_scale(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: float")
    if not abs(value) < float("inf"):
        raise ValueError(f"{name}={value}; accepted: a finite float")
    return float(value)


def _operands(hidden: Tensor | None, weight: Tensor | None) -> torch.dtype:
    """What a head's hidden states and weight are multiplied in."""
    if hidden is None or weight is None:
        return torch.float32
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return promoted


def _chunk_rows(chunk_rows: Any, memory_budget: Any, row_bytes: int, device: torch.device) -> int:
    for name, value in (("chunk_rows", chunk_rows), ("memory_budget", memory_budget)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, type(None))):
            raise TypeError(f"{name} is a {type(value).__name__}; accepted: None or int")
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; accepted: None or int >= 1")
    if chunk_rows is None and memory_budget is None and device.type != "cpu":
        return DEVICE_ROWS
    if chunk_rows is None:
        return max(1, (memory_budget or DEFAULT_MEMORY_BUDGET) // row_bytes)
    if memory_budget is not None:
        raise ValueError("chunk_rows and memory_budget are given; accepted: one of them")
    return chunk_rows


def _flattened(heads: _Heads) -> list[Tensor | None]:
    """Hidden states with two dimensions; logits too where that takes no copy."""
    result = list(heads)
    for place, name in enumerate(heads._fields):
        x = result[place]
        if x is None or x.dim() == 2 or not name.endswith(("hidden", "logits")):
            continue
        if name.endswith("hidden") or _flattens(x):
            result[place] = x.reshape(-1, x.shape[-1])
    return result


def _flattens(x: Tensor) -> bool:
    """Whether the leading dimensions are rows of one stride."""
    sizes = [
        (size, stride) for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size != 1
    ]
    return all(
        outer == size * stride for (_, outer), (size, stride) in zip(sizes, sizes[1:], strict=False)
    )


def _check_head(name: str, head: Any) -> None:
    kind = type(head)
    if parametrize.is_parametrized(head):
        kind = kind.__mro__[1]
    if hasattr(head, "unshard"):  # fully_shard made its class from FSDPModule and this one
        kind = kind.__mro__[2]
    if kind is not nn.Linear:
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}; accepted: nn.Linear, whose output "
            "is hidden @ weight.T + bias (merge an adapter, dequantise a weight, or call "
            "linear_distillation_loss with the effective weight)"
        )
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    of_fsdp = "torch.distributed.fsdp"  # they only gather and free the weight
    hooked = any(not getattr(hook, "__module__", "").startswith(of_fsdp) for hook in hooks)
    if hooked or "forward" in vars(head):
        raise TypeError(
            f"{name} has forward hooks or a replaced forward, which a loss that reads its weight "
            "would pass by; accepted: nn.Linear without them"
        )
    for part in ("weight", "bias"):
        value = getattr(head, part)
        # A DTensor may be gathered by the time of the call, which refuses one that is not.
        ordinary = type(value) in (Tensor, nn.Parameter, FakeTensor) or hasattr(
            value, "full_tensor"
        )
        if value is not None and not ordinary:
            raise TypeError(
                f"{name}.{part} is a {type(value).__name__}; accepted: an ordinary tensor "
                "(dequantise it)"
            )


def _op(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.ops.kdkernels.linear_distillation_loss(*args)


class _Linear(torch.autograd.Function):
    """Keeps the gradients that the forward computed; per token, the inputs."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, config, row = args
        needed = list(ctx.needs_input_grad[: len(tensors)])
        ctx.per_token = row[OPTION_NAMES.index("reduction")] == "none"
        wanted = [False] * len(tensors) if ctx.per_token else needed
        loss, stats, grads = _op(*tensors, *config, wanted, None, *row)
        ctx.config, ctx.row, ctx.needed = config, row, needed
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        ctx.kept = len(grads)
        ctx.save_for_backward(*tensors, *([] if ctx.per_token else grads))
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * (len(ctx.needed) + 2)
        saved = ctx.saved_tensors
        tensors, grads = saved[: len(ctx.needed)], saved[len(ctx.needed) :]
        with torch.no_grad():
            factor = grad_loss
            if ctx.per_token:
                _, _, grads = _op(*tensors, *ctx.config, ctx.needed, grad_loss, *ctx.row)
                factor = grad_loss.new_ones(())
            grads = [
                torch.ops.kdkernels.scaled(grad, factor, dtype) if needed else None
                for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needed, strict=True)
            ]
        differentiable = [x for x in (grad_loss, *tensors) if x is not None]
        return *no_double_backward(ctx, grads, *differentiable), None, None
