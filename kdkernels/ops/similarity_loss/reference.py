"""The similarity_loss ops in plain torch, a few rows at a time: any device, exact in float64.

The same signatures and outputs as the compiled ops; oracle for them and fallback where nothing is
compiled. Features come centred and, for the kernels of a cosine, of unit length.
"""

import torch
from torch import Tensor

from .._common import no_autocast, zero_wins
from ..distillation_loss import reference as row_reference

# Scores of one block of rows, for each of student and teacher.
BLOCK_BYTES = 16 * 2**20


def similarity_loss(
    student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor, *options
) -> Tensor:
    """The loss for the schema in this folder's __init__.py."""
    with no_autocast(student.device):
        return _run(None, student, student_keys, teacher, teacher_keys, *options)[0]


def similarity_loss_and_grad(
    student: Tensor, student_keys: Tensor, teacher: Tensor, teacher_keys: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradient of the rows, of the keys, of γ, T and the teacher's γ, T), each empty where
    not asked for by the last four arguments.
    """
    *options, student_grad, keys_grad, parameter_grads, teacher_parameter_grads = args
    wanted = (student_grad, keys_grad, parameter_grads, teacher_parameter_grads)
    with no_autocast(student.device):
        return _run(wanted, student, student_keys, teacher, teacher_keys, *options)


def similarity_loss_fake(student: Tensor, student_keys: Tensor, *args) -> Tensor:
    reduction = args[-1]
    return student.new_empty(student.shape[0] if reduction == "none" else ())


def similarity_loss_and_grad_fake(student: Tensor, student_keys: Tensor, *args):
    *options, student_grad, keys_grad, parameter_grads, teacher_parameter_grads = args
    return (
        similarity_loss_fake(student, student_keys, *options),
        student.new_empty(student.shape if student_grad else 0),
        student.new_empty(student_keys.shape if keys_grad else 0),
        student.new_empty(4 if parameter_grads or teacher_parameter_grads else 0),
    )


class Scores:
    """A kernel φ of the products x of rows and keys: its values and derivatives."""

    def __init__(self, kernel: str, gamma: Tensor, temperature: Tensor):
        valid = (gamma > 0) & (temperature > 0)
        self.kernel, self.temperature = kernel, temperature
        self.gamma = torch.where(valid, gamma, torch.nan)
        self.rate = self.gamma / temperature

    @property
    def is_distance(self) -> bool:
        return self.kernel in ("rbf", "student_t", "rbf_softmax")

    def distances(self, rows: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        """‖a − b‖², not below 0."""
        squares = rows.square().sum(1)[:, None] + keys.square().sum(1)
        return (squares - 2 * x).clamp(min=0)

    def half(self, x: Tensor) -> Tensor:
        """(1 + cos)/2, not below rounding, so that its logarithm stays finite."""
        return ((1 + x) / 2).clamp(min=torch.finfo(x.dtype).eps)

    def __call__(self, rows: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        if self.kernel == "dot":
            return self.rate * x
        if self.kernel == "rbf":  # ‖a‖² is the same for all keys of a row
            return self.rate * (2 * x - keys.square().sum(1))
        if self.kernel == "pkt":
            return self.rate * self.half(x).log()
        d = self.distances(rows, keys, x)
        if self.kernel == "student_t":
            return -torch.log1p(self.gamma * d) / self.temperature
        return self.gamma * torch.exp(-d / self.temperature)

    def slope(self, rows: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        """∂φ/∂x."""
        if self.kernel in ("dot", "rbf"):
            return self.rate * (2 if self.kernel == "rbf" else 1)
        if self.kernel == "pkt":
            half = (1 + x) / 2
            return torch.where(half < torch.finfo(x.dtype).eps, 0, self.rate / (2 * self.half(x)))
        d = self.distances(rows, keys, x)
        if self.kernel == "student_t":
            return 2 * self.rate / (1 + self.gamma * d)
        return 2 * self.gamma * torch.exp(-d / self.temperature) / self.temperature

    def by_parameters(self, rows: Tensor, keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """∂φ/∂γ and ∂φ/∂T."""
        if self.kernel in ("dot", "pkt"):
            k = x if self.kernel == "dot" else self.half(x).log()
            return k / self.temperature, -self.rate * k / self.temperature
        d = self.distances(rows, keys, x)
        if self.kernel == "rbf":
            return -d / self.temperature, self.rate * d / self.temperature
        if self.kernel == "student_t":
            by_gamma = -d / (self.temperature * (1 + self.gamma * d))
            return by_gamma, torch.log1p(self.gamma * d) / self.temperature**2
        e = torch.exp(-d / self.temperature)
        return e, self.gamma * e * d / self.temperature**2


def _run(
    wanted: tuple[bool, bool, bool, bool] | None,
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    row_weights: Tensor | None,
    key_mask: Tensor | None,
    parameters: Tensor | None,
    gamma: float,
    temperature: float,
    teacher_gamma: float,
    teacher_temperature: float,
    kernel: str,
    divergence: str,
    first: float,
    first_tensor: Tensor | None,
    second: float,
    second_tensor: Tensor | None,
    exclude_diagonal: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m = student.shape[0], student_keys.shape[0]
    wants_rows, wants_keys, wants_parameters, wants_teacher = wanted or (False,) * 4
    if parameters is None:
        given = (gamma, temperature, teacher_gamma, teacher_temperature)
        parameters = torch.stack([student.new_full((), value) for value in given])
    of_student = Scores(kernel, parameters[0], parameters[1])
    of_teacher = Scores(kernel, parameters[2], parameters[3])
    normalizer = None
    if reduction in ("batchmean", "mean"):
        normalizer = student.new_full((), n) if row_weights is None else row_weights.sum()

    losses = []
    by_rows = torch.empty_like(student) if wants_rows else student.new_empty(0)
    by_keys = torch.zeros_like(student_keys) if wants_keys else student.new_empty(0)
    by_parameters = student.new_zeros(4 if wants_parameters or wants_teacher else 0)
    step = max(1, BLOCK_BYTES // (max(m, 1) * student.element_size()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        a, b = student[rows], student_keys
        products, teacher_products = a @ b.t(), teacher[rows] @ teacher_keys.t()
        s = of_student(a, b, products)
        t = of_teacher(teacher[rows], teacher_keys, teacher_products)
        left_out = torch.zeros_like(s, dtype=torch.bool) if key_mask is None else ~key_mask[None]
        if exclude_diagonal:
            places = torch.arange(start, start + len(a), device=s.device)
            left_out = left_out | (places[:, None] == torch.arange(m, device=s.device))
        s, t = s.masked_fill(left_out, -torch.inf), t.masked_fill(left_out, -torch.inf)
        weights = None if row_weights is None else row_weights[rows]
        parameters_of_rows = (divergence, first, first_tensor, second, second_tensor)
        rest = (1.0, None, 1.0, None, 1.0, None, 0.0, None, 0.0, None, None, normalizer)
        of_rows = (
            *(None, weights, *parameters_of_rows, *rest),
            *(False, 0.0, -100, True, m, reduction, False),
        )
        if wanted is None:
            losses.append(row_reference.distillation_loss(s, t, *of_rows)[0])
            continue
        loss, _, w, teacher_w = row_reference.distillation_loss_and_grad(
            s, t, *of_rows, wants_teacher
        )
        losses.append(loss)
        v = zero_wins(w, of_student.slope(a, b, products))
        if wants_rows:
            by_rows[rows] = v @ b
            # Where the score depends on x alone, so that Σ ∂L/∂x is 0 (dot, rbf), there is no term.
            if kernel in ("student_t", "rbf_softmax"):
                by_rows[rows] -= a * v.sum(1, keepdim=True)
        if wants_keys:
            by_keys += v.t() @ a
            if of_student.is_distance:
                by_keys -= b * v.sum(0)[:, None]
        if wants_parameters:
            of_pairs = of_student.by_parameters(a, b, products)
            by_parameters[:2] += torch.stack([zero_wins(w, x).sum() for x in of_pairs])
        if wants_teacher:
            of_pairs = of_teacher.by_parameters(teacher[rows], teacher_keys, teacher_products)
            by_parameters[2:] += torch.stack([zero_wins(teacher_w, x).sum() for x in of_pairs])
    if reduction == "none":
        loss = torch.cat(losses) if losses else student.new_empty(0)
    else:
        loss = torch.stack(losses).sum() if losses else student.new_zeros(())
    return loss, by_rows, by_keys, by_parameters
