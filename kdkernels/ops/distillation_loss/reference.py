"""Plain torch implementation of the distillation_loss ops: any device, any dtype, exact in float64.

The same signatures and outputs as the compiled ops; oracle for them, fallback where nothing is
compiled, and their fake kernels. It stores a dozen N×V temporaries and is meant to be read.

``rows`` is what a forward leaves for its backward: one line of N numbers for each name below,
float32 (float64 where a row is float64). A row whose three scales are 0 is masked: its logits are
never looked at again.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from ...divergences import TERMS, allowed, geometric
from .._common import compute_dtype, zero_wins

# One line of `rows` each; csrc/distillation_loss/problem.h has the same list.
ROWS = (
    "student_max",  # largest logit
    # log Σ exp((s − max)/τs): the log-sum-exp, less max/τs, so that large offsets cost no digits
    "student_log_z",
    "teacher_max",
    "teacher_log_z",
    "divergence",  # D, before T²
    "sum_g",  # ΣG; for Rényi log B
    "unit_log_z",  # log Σ exp(s − max) at temperature 1, over every column
    "kd_scale",  # what multiplies D in the loss: kd_weight·T²·weight/normaliser, 0 where masked
    "ce_scale",
    "z_scale",
    "temperature",
    "teacher_temperature",
    "first",
    "second",
)
STATS = (
    "kd",
    "ce",
    "student_entropy",
    "teacher_entropy",
    "label_log_prob",
    "top1_agreement",
)


def distillation_loss(*args) -> tuple[Tensor, Tensor]:
    """(loss, rows) for the schema in this folder's __init__.py."""
    student, teacher, *options = args
    options, center = options[:OPTIONS], options[OPTIONS:]
    loss, rows, _ = _forward(student, centered(student, teacher, *center), *options)
    return loss, rows


def distillation_loss_and_grad(
    student: Tensor, teacher: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rows, student_grad, teacher_grad), teacher_grad empty unless asked for
    (the last argument).
    """
    *options, teacher_grad = args[: OPTIONS + 1]
    center = args[OPTIONS + 1 :]
    loss, rows, (labels, divergence, label_smoothing, vocab_size) = _forward(
        student, centered(student, teacher, *center), *options
    )
    one = torch.ones((), dtype=rows.dtype, device=rows.device)
    grads = distillation_loss_backward(
        one,
        student,
        teacher,
        rows,
        labels,
        divergence,
        label_smoothing,
        vocab_size,
        True,
        teacher_grad,
        *center,
    )
    return loss, rows, *grads


def distillation_loss_and_grad_(
    student: Tensor, teacher: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows, teacher_grad); the student's gradient is written over its logits."""
    loss, rows, student_grad, teacher_grad = distillation_loss_and_grad(student, teacher, *args)
    student.copy_(student_grad)
    return loss, rows, teacher_grad


def scale_rows_(grad: Tensor, factor: Tensor) -> None:
    """Multiply each row of grad (N, V) in place by factor, () or (N,)."""
    scaled = grad * factor.reshape(-1, 1).to(torch.promote_types(grad.dtype, torch.float32))
    grad.copy_(torch.where(grad == 0, grad, scaled))  # a masked row stays 0 whatever the factor


def distillation_loss_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    labels: Tensor | None,
    divergence: str,
    label_smoothing: float,
    vocab_size: int,
    student_grad: bool,
    teacher_grad: bool,
    teacher_center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(student_grad, teacher_grad), each (N, columns given) in its input's dtype,
    or empty where not asked for.
    """
    n, v = student.shape[0], vocab_size
    line = dict(zip(ROWS, rows, strict=False))
    upstream = grad_loss.to(rows.dtype).expand(n)

    def coefficient(name: str) -> Tensor:
        return torch.where(line[name] == 0, 0.0, line[name] * upstream)[:, None]

    kd, ce, z = coefficient("kd_scale"), coefficient("ce_scale"), coefficient("z_scale")
    use_kd = line["kd_scale"][:, None] != 0
    use_unit = (line["ce_scale"][:, None] != 0) | (line["z_scale"][:, None] != 0)
    s = torch.where(use_kd | use_unit, student[:, :v].to(rows.dtype), 0.0)
    t = centered(student, teacher, teacher_center)
    t = torch.where(use_kd, t[:, :v].to(rows.dtype), 0.0)
    ts, tt = line["temperature"][:, None], line["teacher_temperature"][:, None]
    by_s, by_t = by_scaled_logits(
        Row(s, t, line["temperature"], line["teacher_temperature"], labels, divergence == "dkd"),
        line,
        divergence,
    )

    unit = torch.zeros_like(s)
    if v:
        unit_max = s.amax(1, keepdim=True)
        p1 = torch.exp(s - unit_max - line["unit_log_z"][:, None])
        unit_lse = unit_max + line["unit_log_z"][:, None]
        unit = torch.where(use_unit, ce * p1 + 2 * z * unit_lse * p1, 0.0)
        if labels is not None:
            target = (1 - label_smoothing) * _one_hot(labels, s) + label_smoothing / v
            unit = unit - torch.where(ce == 0, 0.0, ce * target)

    def finish(gradient: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.pad(gradient.to(like.dtype), (0, like.shape[1] - v))

    gs, gt = student.new_empty(0), teacher.new_empty(0)
    if student_grad:
        gs = finish(torch.where(use_kd, kd / ts * by_s, 0.0) + unit, student)
    if teacher_grad:
        gt = finish(torch.where(use_kd, kd / tt * by_t, 0.0), teacher)
    return gs, gt


def by_scaled_logits(row: "Row", line: dict[str, Tensor], divergence: str) -> tuple[Tensor, Tensor]:
    """∂KD/∂(s/τs) and ∂KD/∂(t/τt) before T²: G − p·ΣG and H − q·ΣH."""
    first, second = line["first"][:, None], line["second"][:, None]
    _, g, h = TERMS[divergence](row.a, row.b, row.p, row.q, first, second)
    sum_g, d = line["sum_g"][:, None], line["divergence"][:, None]
    degree = first + second if divergence == "ab" else 1.0
    sum_h = torch.zeros_like(d) if divergence == "reverse_kl" else degree * d - sum_g
    if divergence == "renyi":
        tilted = torch.exp(geometric(row.a, row.b, first) - sum_g)
        limit = first == 1
        factor = first / (first - 1)
        g, sum_g = torch.where(limit, g, -tilted), torch.where(limit, 0.0, -1.0)
        h, sum_h = torch.where(limit, h, factor * tilted), torch.where(limit, d, factor)
    if divergence == "dkd":
        g, h, sum_h = second * g, second * h, second * d
        both = row.teacher_label_prob * row.teacher_rest_prob
        binary_h = first * zero_wins(both, row.teacher_odds - row.student_odds)
        g = torch.where(row.at_label, sum_g, g)  # p and q are 0 there
        h, sum_h = torch.where(row.at_label, binary_h, h), sum_h + binary_h
    return g - row.p * sum_g, h - row.q * sum_h


class Row:
    """Log-probabilities of both rows and what is derived from them;
    without the label's column for DKD.
    """

    def __init__(
        self, s: Tensor, t: Tensor, ts: Tensor, tt: Tensor, labels: Tensor | None, exclude: bool
    ):
        self.student_max_all, _ = _log_z(s, 1.0)
        if exclude:
            assert labels is not None
            self.at_label = _one_hot(labels, s) > 0
            label_s, label_t = take(s, labels), take(t, labels)
            s, t = (
                s.masked_fill(self.at_label, -torch.inf),
                t.masked_fill(self.at_label, -torch.inf),
            )
        self.student_max, self.student_log_z = _log_z(s, ts[:, None])
        self.teacher_max, self.teacher_log_z = _log_z(t, tt[:, None])
        self.a = (s - self.student_max[:, None]) / ts[:, None] - self.student_log_z[:, None]
        self.b = (t - self.teacher_max[:, None]) / tt[:, None] - self.teacher_log_z[:, None]
        if exclude:
            self.a, self.b = (x.masked_fill(self.at_label, -torch.inf) for x in (self.a, self.b))
            self.student_odds = ((label_s - self.student_max) / ts - self.student_log_z)[:, None]
            self.teacher_odds = ((label_t - self.teacher_max) / tt - self.teacher_log_z)[:, None]
            self.student_label_prob = torch.sigmoid(self.student_odds)
            self.teacher_label_prob = torch.sigmoid(self.teacher_odds)
            self.teacher_rest_prob = torch.sigmoid(-self.teacher_odds)
        self.p, self.q = torch.exp(self.a), torch.exp(self.b)


class Plan(NamedTuple):
    """What is known of the rows before their logits are read."""

    lines: tuple[Tensor, ...]  # kd_scale … second of ROWS
    kd_rows: Tensor  # rows that count in KD and z-loss
    ce_rows: Tensor
    read_student: Tensor  # rows whose logits are looked at
    read_teacher: Tensor
    t2: Tensor
    has_unit: bool  # whether any row may need the student at temperature 1


def plan(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weights: Tensor | None,
    divergence: str,
    first: float,
    first_tensor: Tensor | None,
    second: float,
    second_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    teacher_temperature: float,
    teacher_temperature_tensor: Tensor | None,
    kd_weight: float,
    kd_weight_tensor: Tensor | None,
    ce_weight: float,
    ce_weight_tensor: Tensor | None,
    z_loss_weight: float,
    z_loss_weight_tensor: Tensor | None,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    t_squared: bool,
    label_smoothing: float,
    ignore_index: int,
    mask_kd: bool,
    vocab_size: int,
    reduction: str,
    return_stats: bool,
) -> Plan:
    """Masks, normalisers and scales of the rows, and their parameters, NaN where out of range."""
    n, v = student.shape[0], vocab_size
    dtype = compute_dtype(student, teacher)

    def per_row(value: float, tensor: Tensor | None) -> Tensor:
        if tensor is not None:
            return tensor.to(dtype).expand(n)
        return torch.full((n,), value, dtype=dtype, device=student.device)

    ts = per_row(temperature, temperature_tensor)
    tt = per_row(teacher_temperature, teacher_temperature_tensor)
    ts, tt = torch.where(ts > 0, ts, torch.nan), torch.where(tt > 0, tt, torch.nan)
    first_row, second_row = allowed(
        divergence, per_row(first, first_tensor), per_row(second, second_tensor)
    )

    weights = per_row(1.0, token_weights)
    kd_rows, ce_rows = counted_rows(weights, labels, ignore_index, mask_kd)
    kd_divisor, ce_divisor = divisors(
        weights, kd_rows, ce_rows, normalizer, normalizer_tensor, reduction
    )

    def scale(value, tensor, rows_, divisor):
        x = per_row(value, tensor)
        return torch.where(rows_ & (x != 0), x * weights / divisor, 0.0)

    per_element = v if reduction == "mean" else 1
    t2 = ts * ts if t_squared else torch.ones_like(ts)
    kd_scale = scale(kd_weight, kd_weight_tensor, kd_rows, kd_divisor * per_element)
    kd_scale = torch.where(kd_scale == 0, 0.0, kd_scale * t2)
    ce_scale = scale(ce_weight, ce_weight_tensor, ce_rows, ce_divisor)
    z_scale = scale(z_loss_weight, z_loss_weight_tensor, kd_rows, kd_divisor)

    stats = torch.full_like(kd_rows, return_stats)
    read_teacher = (kd_scale != 0) | (kd_rows & stats)
    read_student = read_teacher | (ce_scale != 0) | (z_scale != 0) | (ce_rows & stats)
    return Plan(
        (kd_scale, ce_scale, z_scale, ts, tt, first_row, second_row),
        kd_rows,
        ce_rows,
        read_student,
        read_teacher,
        t2,
        (labels is not None and (return_stats or ce_weight_tensor is not None or ce_weight != 0))
        or z_loss_weight_tensor is not None
        or z_loss_weight != 0,
    )


# From labels to return_stats.
OPTIONS = len(inspect.signature(plan).parameters) - 2


def _forward(student: Tensor, teacher: Tensor, labels: Tensor | None, *options):
    dtype = compute_dtype(student, teacher)
    divergence = options[1]
    _, label_smoothing, _, _, vocab_size, reduction, return_stats = options[-7:]
    v = vocab_size
    rows_plan = plan(student, teacher, labels, *options)
    kd_scale, ce_scale, z_scale, ts, tt, first_row, second_row = rows_plan.lines
    kd_rows, ce_rows, t2 = rows_plan.kd_rows, rows_plan.ce_rows, rows_plan.t2
    # Only rows that count are read; the others are replaced so that no NaN or inf of theirs
    # goes anywhere.
    s = torch.where(rows_plan.read_student[:, None], student[:, :v].to(dtype), 0.0)
    t = torch.where(rows_plan.read_teacher[:, None], teacher[:, :v].to(dtype), 0.0)

    exclude = divergence == "dkd"
    row = Row(s, t, ts, tt, labels, exclude)
    d, sum_g = _divergence_sums(divergence, row, first_row, second_row)
    kd = d
    if exclude:
        # Where nothing but the label has mass there is nothing to distil.
        empty = torch.isneginf(row.student_log_z) & torch.isneginf(row.teacher_log_z)
        d, kd_scale = torch.where(empty, 0.0, d), torch.where(empty, 0.0, kd_scale)
        kd = second_row * d + first_row * binary_kl(row)
        sum_g = first_row * (row.student_label_prob - row.teacher_label_prob)[:, 0]
    unit_log_z = _log_z(s, 1.0)[1]
    unit_lse = row.student_max_all + unit_log_z
    ce = torch.zeros_like(unit_lse)
    label_log_prob = ce
    if labels is not None:
        label_logit = take(s, labels)
        label_log_prob = label_logit - row.student_max_all - unit_log_z
        mean_logit = (s - row.student_max_all[:, None]).sum(1) / v
        smooth = unit_log_z - mean_logit if label_smoothing else 0.0
        ce = (1 - label_smoothing) * -label_log_prob + label_smoothing * smooth

    total = (
        zero_wins(kd_scale, kd) + zero_wins(ce_scale, ce) + zero_wins(z_scale, unit_lse * unit_lse)
    )
    loss = total if reduction == "none" else total.sum()
    lines = [
        row.student_max,
        row.student_log_z,
        row.teacher_max,
        row.teacher_log_z,
        d,
        sum_g,
        unit_log_z,
        kd_scale,
        ce_scale,
        z_scale,
        ts,
        tt,
        first_row,
        second_row,
    ]
    if return_stats:
        student_entropy, teacher_entropy = _entropies(row, exclude)
        agree = (s.argmax(1) == t.argmax(1)).to(dtype) if v else torch.zeros_like(ce)
        lines += [
            torch.where(kd_rows, kd * t2, 0.0),
            torch.where(ce_rows, ce, 0.0),
            torch.where(kd_rows, student_entropy, 0.0),
            torch.where(kd_rows, teacher_entropy, 0.0),
            torch.where(ce_rows, label_log_prob, 0.0),
            torch.where(kd_rows, agree, 0.0),
        ]
    rows = torch.stack([line.to(dtype) for line in lines])
    return loss, rows, (labels, divergence, label_smoothing, vocab_size)


# ---- what options need of the rows beside their loss ----


def row_moments(x: Tensor, vocab_size: int) -> Tensor:
    """(2, N): mean and unbiased standard deviation of each row, which is 0 where V = 1."""
    x = x[:, :vocab_size].to(torch.promote_types(x.dtype, torch.float32))
    # From a column of the row, so that equal columns have deviation 0 in every dtype.
    origin = x[:, :1]
    mean = origin[:, 0] + (x - origin).mean(1)
    squares = (x - mean[:, None]).square().sum(1)
    return torch.stack([mean, torch.sqrt(squares / max(vocab_size - 1, 1))])


def add_centered_(grad: Tensor, x: Tensor, mean: Tensor, factor: Tensor, vocab_size: int) -> None:
    """grad (N, columns) += factor·(x − mean) in the first V columns of rows whose factor is not 0;
    mean and factor (N,).
    """
    compute = torch.promote_types(grad.dtype, torch.float32)
    into = grad[:, :vocab_size]
    term = factor[:, None] * (x[:, :vocab_size].to(compute) - mean[:, None])
    into.copy_(torch.where(factor[:, None] == 0, into, into.to(compute) + term))


def temperature_sums(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    labels: Tensor | None,
    divergence: str,
    vocab_size: int,
) -> Tensor:
    """(3, N): Σ s·∂KD/∂(s/τs), Σ t·∂KD/∂(t/τt) and KD itself, before T²; 0 where KD is masked.

    KD depends on τs through s/τs alone: ∂KD/∂τs is minus the first over τs². The derivatives of a
    row add up to 0, so the sums are the same with any number subtracted from its logits: their mean
    under its softmax, which also cancels what a rounded log-sum-exp does to every probability.
    """
    line = dict(zip(ROWS, rows, strict=False))
    counts = line["kd_scale"][:, None] != 0
    s = torch.where(counts, student[:, :vocab_size].to(rows.dtype), 0.0)
    t = torch.where(counts, teacher[:, :vocab_size].to(rows.dtype), 0.0)
    row = Row(s, t, line["temperature"], line["teacher_temperature"], labels, divergence == "dkd")
    by_s, by_t = by_scaled_logits(row, line, divergence)
    kd = line["divergence"]
    if divergence == "dkd":
        kd = line["second"] * kd + line["first"] * binary_kl(row)

    def products(x: Tensor, largest: Tensor, prob: Tensor, by: Tensor) -> Tensor:
        x = x - largest[:, None]
        return zero_wins(by, x - zero_wins(prob, x).sum(1, keepdim=True)).sum(1)

    sums = torch.stack(
        [
            products(s, row.student_max, row.p, by_s),
            products(t, row.teacher_max, row.q, by_t),
            kd,
        ]
    )
    return torch.where(counts[:, 0], sums, 0.0)


def adaptive_weights(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    vocab_size: int,
) -> Tensor:
    """(N,): the share of Σ|p − q| that lies in the head of the teacher's distribution, ½ where both
    rows agree. Head: its most probable column, and then all down to where the cumulative
    probability would pass ½, equal ones in the order of their columns.
    """
    dtype = compute_dtype(student, teacher)
    s, t = student[:, :vocab_size].to(dtype), teacher[:, :vocab_size].to(dtype)
    p = torch.softmax((s - _log_z(s, 1.0)[0][:, None]) / temperature.reshape(-1, 1), 1)
    q = torch.softmax((t - _log_z(t, 1.0)[0][:, None]) / teacher_temperature.reshape(-1, 1), 1)
    order = t.sort(dim=1, descending=True, stable=True).indices
    gaps = (p - q).abs().gather(1, order)
    head = q.gather(1, order).cumsum(1) <= 0.5
    head[:, :1] = True
    of_head, of_tail = (torch.where(part, gaps, 0.0).sum(1) for part in (head, ~head))
    all_gaps = of_head + of_tail
    return torch.where(all_gaps == 0, 0.5, of_head / all_gaps)


def centered(student: Tensor, teacher: Tensor, center: Tensor | None = None) -> Tensor:
    """The teacher's logits less the center (columns,), in the dtype that is computed in."""
    return teacher if center is None else teacher.to(compute_dtype(student, teacher)) - center


def counted_rows(
    weights: Tensor, labels: Tensor | None, ignore_index: int, mask_kd: bool
) -> tuple[Tensor, Tensor]:
    """Which rows count in the KD and z-loss terms, and which in the cross-entropy."""
    counted = weights != 0
    if labels is None:
        return counted, torch.zeros_like(counted)
    labelled = counted & (labels != ignore_index)
    return (labelled if mask_kd else counted), labelled


def divisors(
    weights: Tensor,
    kd_rows: Tensor,
    ce_rows: Tensor,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """What the KD and z-loss terms are divided by, and what the cross-entropy is: 0-d tensors."""
    one = torch.ones((), dtype=weights.dtype, device=weights.device)
    if reduction not in ("batchmean", "mean"):
        return one, one
    if normalizer_tensor is not None:
        kd = ce = normalizer_tensor.reshape(())
    elif normalizer is not None:
        kd = ce = torch.full_like(one, normalizer)
    else:
        kd, ce = (torch.where(rows, weights, 0.0).sum() for rows in (kd_rows, ce_rows))
    return torch.where(kd == 0, 1.0, kd), torch.where(ce == 0, 1.0, ce)


def _log_z(x: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """(anchor, log Σ exp((x − anchor)/temperature)) of each row; the anchor is the maximum,
    0 where that is −inf.
    """
    largest = x.amax(1)
    anchor = torch.where(torch.isneginf(largest), 0.0, largest)
    return anchor, torch.log(torch.exp((x - anchor[:, None]) / temperature).sum(1))


def _divergence_sums(
    divergence: str, row: Row, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """(D, ΣG) of each row; for Rényi (D, log B)."""
    phi, g, _ = TERMS[divergence](row.a, row.b, row.p, row.q, first[:, None], second[:, None])
    d, sum_g = phi.sum(1).clamp(min=0), g.sum(1)
    if divergence in ("forward_kl", "dkd"):
        sum_g = torch.zeros_like(sum_g)  # Σp − Σq
    if divergence == "renyi":
        log_b = torch.logsumexp(geometric(row.a, row.b, first[:, None]), 1)
        # Near B = 1 the digits are in alpha's Bregman sum, far from it in the log-sum-exp.
        near = torch.log1p(first * (first - 1) * d) / (first - 1)
        tilted = torch.where(log_b.abs() < 0.5, near, log_b / (first - 1))
        d = torch.where(first == 1, d, tilted)
        sum_g = torch.where(first == 1, 0.0, log_b)
    return d, sum_g


def binary_kl(row: Row) -> Tensor:
    """Forward KL of the (label, rest) distributions of both rows."""

    def log_probs(odds: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(torch.cat([odds, -odds], 1))

    a, b = log_probs(row.student_odds), log_probs(row.teacher_odds)
    zero = a.new_zeros(())
    return TERMS["forward_kl"](a, b, torch.exp(a), torch.exp(b), zero, zero)[0].sum(1)


def _entropies(row: Row, exclude: bool) -> tuple[Tensor, Tensor]:
    """Entropies of both whole rows in nats."""
    student = -zero_wins(row.p, row.a).sum(1)
    teacher = -zero_wins(row.q, row.b).sum(1)
    if not exclude:
        return student, teacher

    def whole(odds: Tensor, rest_entropy: Tensor) -> Tensor:
        odds = odds[:, 0]
        label, rest = torch.sigmoid(odds), torch.sigmoid(-odds)
        log_label = torch.nn.functional.logsigmoid(odds)
        log_rest = torch.nn.functional.logsigmoid(-odds)
        own = -zero_wins(label, log_label) - zero_wins(rest, log_rest)
        return own + zero_wins(rest, rest_entropy)

    return whole(row.student_odds, student), whole(row.teacher_odds, teacher)


def take(x: Tensor, labels: Tensor) -> Tensor:
    """x at each row's label, NaN where the label is no column
    (a masked row, or one out of range).
    """
    inside = (labels >= 0) & (labels < x.shape[1])
    taken = x.gather(1, labels.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, taken, torch.nan)


def _one_hot(labels: Tensor, x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1], device=x.device) == labels[:, None]).to(x.dtype)
