"""The linear_distillation_loss ops in plain torch: a few rows of logits at a time.

Each chunk of rows goes head → logits → distillation_loss's row op, which writes the gradient over
the student's logits → the gradients of hidden states, weight and bias. Only the row op differs
between backends; the matrix products are torch's own, and mm_float32_ where torch has none.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..distillation_loss import OPTION_NAMES, check_labels
from ..distillation_loss import reference as row_reference

STATS = row_reference.STATS
OF_THE_TEACHER = [STATS.index(name) for name in ("kd", "teacher_entropy", "top1_agreement")]


def mm_float32_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out (m, n) float32 = a (m, k) @ b (k, n), or += that: products and sums in float32 whatever
    the operands are, converted a tile at a time.
    """
    if not accumulate:
        out.zero_()
    for i in _tiles(a.shape[0]):
        for p in _tiles(a.shape[1]):
            left = a[i, p].float()
            for j in _tiles(b.shape[1]):
                out[i, j].addmm_(left, b[p, j].float())


def into_float32(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out (m, n) float32 = a (m, k) @ b (k, n), or += that, a and b of one dtype.

    On CUDA by cuBLAS, which adds up in float32 anyway: a result that is not rounded costs no more
    than its bytes. torch.mm with ``out_dtype`` has no CPU kernel.
    """
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif _has_cublas(out):
        if accumulate:
            torch.addmm(out, a, b, torch.float32, out=out)
        else:
            torch.mm(a, b, torch.float32, out=out)
    else:
        op = torch.ops.kdkernels.mm_float32_ if a.dtype == torch.bfloat16 else mm_float32_
        op(out, a, b, accumulate)


def _has_cublas(x: Tensor) -> bool:
    return x.device.type in ("cuda", "meta")  # meta: what CUDA tensors go through, without a GPU


def distillation_loss_and_grad_into(
    student: Tensor, teacher: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor]:
    """distillation_loss_and_grad of kdkernels.ops.distillation_loss, with the student's gradient
    written into ``grad``, the last argument, rounded to its dtype.
    """
    *options, grad = args
    loss, rows, student_grad, teacher_grad = row_reference.distillation_loss_and_grad(
        student, teacher, *options
    )
    grad.copy_(student_grad)
    return loss, rows, teacher_grad


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (rows, columns) or (rows,) times a 0-d factor in another dtype, rounded once. What is 0,
    as in masked rows, stays 0 whatever the factor is.

    An eighth at a time: all at once makes several whole temporaries.
    """
    factor = factor.to(torch.promote_types(grad.dtype, factor.dtype))
    result = scaled_fake(grad, factor, dtype)
    step = max(1, -(-len(grad) // 8))
    for start in range(0, len(grad), step):
        tile = grad[start : start + step]
        result[start : start + step] = torch.where(tile == 0, 0.0, tile * factor)
    return result


def scaled_fake(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)


def _tiles(size: int) -> list[slice]:
    step = 2048
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def head_dtype(operands: torch.dtype) -> torch.dtype:
    """Of a head's logits and of what its gradients are summed in."""
    return torch.float64 if operands == torch.float64 else torch.float32


def gradient_dtype(operands: torch.dtype) -> torch.dtype:
    """Of a head's gradient by its logits, in the products with it. bfloat16 costs a relative error
    of 0.2 % in the end; in float16 what is small would be lost.
    """
    return operands if operands == torch.bfloat16 else head_dtype(operands)


def parts_of(operands: torch.dtype, device: torch.device) -> int:
    """In how many parts the logits of a chunk are made, whose gradient is then multiplied at once.

    A bfloat16 gradient takes a fourth of two float32 logits: many rows of it and few of those make
    the most of the memory, where the product that gives logits is as fast with few rows (CPU). A
    float32 one is written over the logits: nothing is to be had.
    """
    return 4 if operands == torch.bfloat16 and device.type == "cpu" else 1


def logit_bytes(operands: torch.dtype, softcap: float | None, gradient: bool, parts: int) -> float:
    """What one logit of a head takes in the buffers of a chunk."""
    size = head_dtype(operands).itemsize
    whole = gradient_dtype(operands).itemsize if gradient else 0
    of_a_part = (whole != size) + (softcap is not None)
    return whole + of_a_part * size / parts


def gradients_like(
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    operands: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    """Uninitialised gradients of a head's hidden states, weight and bias, empty where not wanted.

    The last two are sums over chunks and not rounded yet; neither is what would be float16, which
    the upstream factor may save from underflow.
    """
    result = []
    for tensor, wants, is_sum in zip(tensors, wanted, (False, True, True), strict=True):
        if tensor is None or not wants:
            result.append(tensors[0].new_empty(0))
            continue
        dtype = head_dtype(operands) if is_sum else tensor.dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype
        result.append(tensor.new_empty(tensor.shape, dtype=dtype))
    return result


class _Head:
    """One model's last layer: logits of some rows, and its gradients from theirs.

    Rows are a slice or row numbers. A gradient that is not wanted costs no product.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        operands: torch.dtype,
        vocab: int,
        wanted: list[bool],
        mm: Callable[[Tensor, Tensor, Tensor, bool], None],
    ):
        self.dtype, self.operands = head_dtype(operands), operands
        self.softcap, self.scale, self.mm_float32_ = softcap, scale, mm
        self.hidden, self.weight = hidden, _strided(weight[:vocab].to(operands))
        self.bias = None if bias is None else bias[:vocab].to(self.dtype) * scale
        self.wants_hidden, self.wants_weight, self.wants_bias = wanted
        self.grads = gradients_like((hidden, weight, bias), operands, wanted)
        self.by_hidden, self.by_weight, self.by_bias = self.grads
        self.by_hidden.zero_()
        self.by_bias.zero_()
        self.wants_products = self.wants_hidden or self.wants_weight
        self.product_dtype = gradient_dtype(operands) if self.wants_products else self.dtype
        self.differentiated = False
        self.buffers: dict[str, Tensor] = {}

    def start(self, size: int) -> None:
        """A chunk of that many rows begins, of which the logits then come part by part."""
        if self.wants_products:
            self.by_logits = self._buffer("by_logits", size, self.product_dtype)

    def logits(self, rows: Any, part: slice) -> Tensor:
        """Of the chunk's rows at ``part``; where their gradient is not rounded they lie where it
        is wanted.
        """
        if self.wants_products and self.product_dtype == self.dtype:
            out = self.by_logits[part]
        else:
            out = self._buffer("logits", part.stop - part.start, self.dtype)
        self._product(out, self._hidden(rows), self.weight.t(), accumulate=False)
        if self.scale != 1:
            out.mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()
            # For the chain rule: the gradient is going to be written over the logits.
            slope = self._buffer("slope", len(out), self.dtype)
            torch.addcmul(out.new_ones(()), out, out, value=-1, out=slope)
            out.mul_(self.softcap)
        return out

    def row_gradient(self, part: slice) -> Tensor | None:
        """Where a row kernel may write the rounded gradient itself, which saves a pass over it;
        None where something is left to do with the unrounded one.
        """
        plain = self.softcap is None and self.scale == 1 and not self.wants_bias
        narrow = self.wants_products and self.product_dtype != self.dtype
        return self.by_logits[part] if plain and narrow else None

    def take(self, part: slice, by_logits: Tensor) -> None:
        """The gradient of the logits of the chunk's rows at ``part``, which is written over."""
        if self.softcap is not None:
            by_logits.mul_(self.buffers["slope"][: len(by_logits)])
        if self.scale != 1:
            by_logits.mul_(self.scale)
        if self.wants_bias:
            self.by_bias[: by_logits.shape[1]] += by_logits.sum(0)
        if self.wants_products and by_logits.data_ptr() != self.by_logits[part].data_ptr():
            self.by_logits[part] = by_logits

    def differentiate(self, rows: Any) -> None:
        """The products with the chunk's gradient, once it is whole."""
        if self.wants_hidden:
            # bfloat16 to bfloat16 is one rounding too, and torch.mm's is the faster product.
            dtype = self.operands if self.operands == self.by_hidden.dtype else self.dtype
            chunk = self.weight.new_empty(len(self.by_logits), self.weight.shape[1], dtype=dtype)
            self._product(chunk, self.by_logits, self.weight, accumulate=False)
            self.by_hidden[rows] = chunk.to(self.by_hidden.dtype)
        if self.wants_weight:
            total, by_logits = self.by_weight[: len(self.weight)], self.by_logits.t()
            self._product(total, by_logits, self._hidden(rows), self.differentiated)
        self.differentiated = True

    def finish(self) -> list[Tensor]:
        """The gradients, once every chunk has been taken in."""
        if self.wants_weight:
            self.by_weight[len(self.weight) if self.differentiated else 0 :].zero_()
        return self.grads

    def _hidden(self, rows: Any) -> Tensor:
        return _strided(self.hidden[rows].to(self.operands))

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """The first chunk is the largest; the later ones reuse its memory."""
        if name not in self.buffers:
            self.buffers[name] = self.weight.new_empty(size, len(self.weight), dtype=dtype)
        return self.buffers[name][:size]

    def _product(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        if _has_cublas(out) and a.dtype == b.dtype and out.dtype == torch.float32:
            into_float32(out, a, b, accumulate)
        elif not a.dtype == b.dtype == out.dtype:
            same = a.dtype == b.dtype == torch.bfloat16
            (self.mm_float32_ if same else mm_float32_)(out, a, b, accumulate)
        elif accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)


def _strided(matrix: Tensor) -> Tensor:
    """With rows or columns of stride 1 that do not overlap, as matrix products read them."""
    rows, columns = matrix.shape
    by_rows = matrix.stride(1) == 1 and matrix.stride(0) >= columns
    by_columns = matrix.stride(0) == 1 and matrix.stride(1) >= rows
    return matrix if by_rows or by_columns else matrix.contiguous()


class _Logits:
    """A teacher whose logits exist already, with _Head's methods."""

    def __init__(self, logits: Tensor, vocab: int, wanted: bool):
        self.given, self.vocab, self.dtype = logits, vocab, logits.dtype
        self.grad = torch.zeros_like(logits) if wanted else logits.new_empty(0)

    def start(self, size: int) -> None:
        pass

    def logits(self, rows: Any, part: slice) -> Tensor:
        self.rows = self._place(rows)
        chunk = self.given[self.rows][:, : self.vocab]
        return chunk if chunk.stride(1) == 1 else chunk.contiguous()

    def take(self, part: slice, by_logits: Tensor) -> None:
        self.grad[..., : self.vocab][self.rows] = by_logits

    def differentiate(self, rows: Any) -> None:
        pass

    def _place(self, rows: Any) -> Any:
        """Where leading dimensions flatten to no single stride, rows are found one by one: a copy
        of a chunk, never of all logits.
        """
        if self.given.dim() == 2:
            return rows
        leading = self.given.shape[:-1]
        numbers = torch.arange(leading.numel(), device=self.given.device)
        return torch.unravel_index(numbers[rows], leading)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    student_softcap: float | None,
    student_logit_scale: float,
    student_operands: torch.dtype,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    teacher_operands: torch.dtype,
    chunk_rows: int,
    backend: str,
    wanted: list[bool],
    upstream: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, statistics, gradients of the seven tensors) for the schema in this folder's
    __init__.py: gradients of the loss, of Σ upstream·loss where upstream (N,) is given; empty where
    not wanted.
    """
    option = dict(zip(OPTION_NAMES, options, strict=True))
    check_labels(option["labels"], option["ignore_index"], option["vocab_size"])
    n, vocab, device = len(student_hidden), option["vocab_size"], student_hidden.device
    run = functools.partial(_backend.implementation, backend, reference=row_reference)
    mm = mm_float32_ if backend == "reference" else torch.ops.kdkernels.mm_float32_
    compute = compute_dtype(student_operands, teacher_operands, teacher_logits)
    per_token, with_stats = option["reduction"] == "none", option["return_stats"]
    # Autocast would round the float32 products of the chunks.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        student = _Head(
            student_hidden,
            student_weight,
            student_bias,
            student_softcap,
            student_logit_scale,
            student_operands,
            vocab,
            wanted[:3],
            mm,
        )
        teacher: _Head | _Logits | None = None
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = _Head(
                teacher_hidden,
                teacher_weight,
                teacher_bias,
                teacher_softcap,
                teacher_logit_scale,
                teacher_operands,
                vocab,
                wanted[3:6],
                mm,
            )
        elif teacher_logits is not None:
            teacher = _Logits(teacher_logits, vocab, wanted[6])

        counts = _divide(option, n, device, compute, upstream)
        if not _leaves_out(device):
            # Rows that do not count have a gradient of 0; what they hold may be NaN, and 0·NaN is.
            for head in (student, teacher):
                if isinstance(head, _Head):
                    head.hidden = torch.where(counts[:, None], head.hidden, 0.0)
        loss = torch.zeros(n if per_token else (), dtype=compute, device=device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        stats = torch.zeros(len(STATS) if with_stats else 0, n, dtype=compute, device=device)
        rounds_in_rows = backend == "cpp" and device.type == "cpu"
        part_rows = -(-chunk_rows // parts_of(student_operands, device))
        for chunk, size in _chunks(n, chunk_rows, counts):
            student.start(size)
            if teacher is not None:
                teacher.start(size)
            for part, rows in _parts(chunk, size, part_rows):
                s = student.logits(rows, part)
                t = s if teacher is None else teacher.logits(rows, part)
                of_part = [_at(value, rows, n) for value in option.values()]
                narrow = student.row_gradient(part) if rounds_in_rows else None
                if not any(wanted):
                    loss_of_part, lines = run("distillation_loss")(s, t, *of_part)
                elif narrow is not None:
                    loss_of_part, lines, by_teacher = run("distillation_loss_and_grad_into")(
                        s, t, *of_part, any(wanted[3:]), narrow
                    )
                else:
                    loss_of_part, lines, by_teacher = run("distillation_loss_and_grad_")(
                        s, t, *of_part, any(wanted[3:])
                    )
                    if any(wanted[:3]):
                        student.take(part, s)
                if teacher is not None and any(wanted[3:]):
                    teacher.take(part, by_teacher)
                if per_token:
                    loss[rows] = loss_of_part
                else:
                    total += loss_of_part
                if with_stats:
                    stats[:, rows] = lines[len(row_reference.ROWS) :]
            if any(wanted[:3]):
                student.differentiate(chunk)
            if teacher is not None and any(wanted[3:]):
                teacher.differentiate(chunk)
        if teacher is None and with_stats:
            stats[OF_THE_TEACHER] = 0
        grads = student.finish()
        grads += teacher.finish() if isinstance(teacher, _Head) else _nothing(student_hidden, 3)
        grads += [teacher.grad] if isinstance(teacher, _Logits) else _nothing(student_hidden, 1)
        return (loss if per_token else total.to(compute)), stats, grads


def linear_distillation_loss_fake(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    teacher_logits,
    student_softcap,
    student_logit_scale,
    student_operands,
    teacher_softcap,
    teacher_logit_scale,
    teacher_operands,
    chunk_rows,
    backend,
    wanted,
    upstream,
    *options,
):
    option = dict(zip(OPTION_NAMES, options, strict=True))
    n = student_hidden.shape[0]
    compute = compute_dtype(student_operands, teacher_operands, teacher_logits)
    shape = (n,) if option["reduction"] == "none" else ()
    stats = student_hidden.new_empty(
        (len(STATS) if option["return_stats"] else 0, n), dtype=compute
    )
    grads = gradients_like(
        (student_hidden, student_weight, student_bias), student_operands, wanted[:3]
    )
    if teacher_hidden is None:
        grads += _nothing(student_hidden, 3)
    else:
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
        grads += gradients_like(teacher, teacher_operands, wanted[3:6])
    grads += [torch.empty_like(teacher_logits)] if wanted[6] else _nothing(student_hidden, 1)
    return student_hidden.new_empty(shape, dtype=compute), stats, grads


def compute_dtype(
    student_operands: torch.dtype, teacher_operands: torch.dtype, teacher_logits: Tensor | None
) -> torch.dtype:
    """Of the loss: float64 where a head or the teacher's logits are float64, else float32."""
    given = torch.float32 if teacher_logits is None else teacher_logits.dtype
    any_double = torch.float64 in (student_operands, teacher_operands, given)
    return torch.float64 if any_double else torch.float32


def _divide(
    option: dict[str, Any],
    n: int,
    device: torch.device,
    compute: torch.dtype,
    upstream: Tensor | None,
) -> Tensor:
    """Put the normaliser, which is about all rows, and the upstream factors into the weights of the
    terms, so that chunks need only be summed. Returns which rows count at all.
    """
    weights = option["token_weights"]
    if weights is None:
        weights = torch.ones(n, dtype=compute, device=device)
    kd_rows, ce_rows = row_reference.counted_rows(
        weights, option["labels"], option["ignore_index"], option["mask_kd"]
    )
    reduction, vocab = option["reduction"], option["vocab_size"]
    kd, ce = row_reference.divisors(
        weights, kd_rows, ce_rows, option["normalizer"], option["normalizer_tensor"], reduction
    )
    counts = kd_rows | ce_rows if option["return_stats"] else torch.zeros_like(kd_rows)
    for name, rows, divisor in (
        ("kd_weight", kd_rows, kd * vocab if reduction == "mean" else kd),
        ("ce_weight", ce_rows, ce),
        ("z_loss_weight", kd_rows, kd),
    ):
        weight = option[name + "_tensor"]
        if weight is None:
            weight = torch.full((1,), option[name], dtype=compute, device=device)
        share = weight if upstream is None else weight * upstream.to(compute)
        share = torch.where(weight == 0, 0.0, share / divisor)
        option[name], option[name + "_tensor"] = 0.0, share
        counts = counts | (rows & (share != 0))
    option.update(normalizer=None, normalizer_tensor=None)
    if reduction != "none":
        option["reduction"] = "sum"
    return counts


def _chunks(n: int, chunk_rows: int, counts: Tensor) -> Iterator[tuple[Any, int]]:
    """(rows, how many) of each chunk, all of about one size. On the CPU rows that do not count are
    left out; elsewhere that would take a host synchronisation.
    """
    numbers = None
    if _leaves_out(counts.device) and not bool(counts.all()):
        numbers = counts.nonzero()[:, 0]
        n = len(numbers)
    chunks = -(-n // chunk_rows)
    size = -(-n // chunks) if chunks else 1
    for start in range(0, n, size):
        stop = min(start + size, n)
        rows = slice(start, stop) if numbers is None else numbers[start:stop]
        yield rows, stop - start


def _leaves_out(device: torch.device) -> bool:
    """Whether rows that do not count go through no product."""
    return device.type == "cpu"


def _parts(chunk: Any, size: int, part_rows: int) -> Iterator[tuple[slice, Any]]:
    """(place in the chunk, rows) of each part of it, all of about one size."""
    step = -(-size // -(-size // part_rows))
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        if isinstance(chunk, slice):
            yield part, slice(chunk.start + part.start, chunk.start + part.stop)
        else:
            yield part, chunk[part]


def _at(value: Any, rows: Any, n: int) -> Any:
    """An option's values for some rows: those of a tensor with one a row."""
    return value[rows] if isinstance(value, Tensor) and value.numel() == n != 1 else value


def _nothing(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty(0) for _ in range(count)]
