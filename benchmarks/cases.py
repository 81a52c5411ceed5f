"""What is measured: the cases, their inputs, byte counts, float64 truth, and contestants.

A contestant is one way to get the loss and the student's gradient from two sets of logits: ours (a
backend and an allocation mode) or a baseline (the lines people write today). Every one of them gets
the same thing: student logits that are the fresh output of an operation, as a model's are, and a
teacher without gradient; and returns the loss and the gradient at the student's logits, as the
layer below would receive it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Case:
    """One divergence at one shape (N rows, V columns) and dtype, and who takes part."""

    divergence: str
    dtype: str
    rows: int
    vocab: int
    contestants: tuple[str, ...]
    large: bool = False  # in a process of its own, peak memory too
    profile: bool = False
    survey: bool = False  # one of every divergence at one shape: shown side by side

    @property
    def name(self) -> str:
        return f"{self.divergence}/{self.dtype}/{self.rows}x{self.vocab}"

    @property
    def elements(self) -> int:
        """Logits of one tensor."""
        return self.rows * self.vocab

    @property
    def gradient_bytes(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """What has to move: student and teacher read once, the student's gradient written once.

        GB/s is this over the time, the same count for every contestant; temporaries and second
        reads (the default mode reads the logits again in its backward) only lower the figure.
        """
        student_read = teacher_read = gradient_written = self.gradient_bytes
        return student_read + teacher_read + gradient_written


class Inputs(NamedTuple):
    student: Tensor  # (N, V), a leaf that requires grad; contestants get clones of it
    teacher: Tensor  # (N, V)
    labels: Tensor  # (N,), used by DKD only
    buffer: Tensor  # (N, V), already touched: where torch.add writes


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Normal logits of standard deviation 3: at T = 2 their softmax is neither flat nor one-hot."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def logits() -> Tensor:
        normal = torch.randn(case.rows, case.vocab, generator=generator, device=device)
        return normal.mul_(3).to(dtype)

    return Inputs(
        logits().requires_grad_(),
        logits(),
        torch.randint(case.vocab, (case.rows,), generator=generator, device=device),
        torch.zeros(case.rows, case.vocab, dtype=dtype, device=device),
    )


# ---- the lines people write today: (student, teacher, labels) -> batchmean loss times T² ----


def _log_probs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return (
        F.log_softmax(student / TEMPERATURE, dim=-1),
        F.log_softmax(teacher / TEMPERATURE, dim=-1),
    )


def _kl(log_target: Tensor, log_input: Tensor) -> Tensor:
    """KL(target‖input) averaged over rows."""
    return F.kl_div(log_input, log_target, log_target=True, reduction="batchmean")


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    return _kl(log_q, log_p) * TEMPERATURE**2


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    return _kl(log_p, log_q) * TEMPERATURE**2


def jeffreys(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    return (_kl(log_q, log_p) + _kl(log_p, log_q)) / 2 * TEMPERATURE**2


def _mix(log_p: Tensor, log_q: Tensor, q_weight: float) -> Tensor:
    """log(q_weight·q + (1 − q_weight)·p)."""
    weights = torch.tensor([q_weight, 1 - q_weight], dtype=log_p.dtype).log()
    return torch.logsumexp(torch.stack([log_q + weights[0], log_p + weights[1]]), dim=0)


def jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """In log space, where no probability underflows: the form LLM trainers use."""
    log_p, log_q = _log_probs(student, teacher)
    log_m = _mix(log_p, log_q, 0.5)
    return (_kl(log_q, log_m) + _kl(log_p, log_m)) / 2 * TEMPERATURE**2


def jsd_probabilities(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """With probabilities: fewer operations, and log 0 where both underflow."""
    p = F.softmax(student / TEMPERATURE, dim=-1)
    q = F.softmax(teacher / TEMPERATURE, dim=-1)
    log_m = ((p + q) / 2).log()
    kl = [F.kl_div(log_m, target, reduction="batchmean") for target in (p, q)]
    return (kl[0] + kl[1]) / 2 * TEMPERATURE**2


def skew_forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    return _kl(log_q, _mix(log_p, log_q, 0.1)) * TEMPERATURE**2


def skew_reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    return _kl(log_p, _mix(log_p, log_q, 0.9)) * TEMPERATURE**2


def alpha(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    affinity = ((log_p + log_q) / 2).exp().sum(-1)
    return 4 * (1 - affinity).mean() * TEMPERATURE**2


def tvd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    p, q = F.softmax(student / TEMPERATURE, dim=-1), F.softmax(teacher / TEMPERATURE, dim=-1)
    return (p - q).abs().sum(-1).mean() / 2 * TEMPERATURE**2


def renyi(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = _log_probs(student, teacher)
    return -2 * torch.logsumexp((log_p + log_q) / 2, dim=-1).mean() * TEMPERATURE**2


def ab(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    a, b = 0.2, 0.7
    log_p, log_q = _log_probs(student, teacher)
    columns = (
        ((a + b) * log_q).exp() / (b * (a + b))
        + ((a + b) * log_p).exp() / (a * (a + b))
        - (a * log_q + b * log_p).exp() / (a * b)
    )
    return columns.sum(-1).mean() * TEMPERATURE**2


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    label = F.one_hot(labels, student.shape[-1]).to(student.dtype)
    log_p, log_q = _log_probs(student, teacher)
    binary = []
    for log_probs in (log_p, log_q):
        of_label = log_probs.gather(1, labels[:, None])
        binary.append(torch.cat([of_label, torch.log1p(-of_label.exp())], dim=1))
    # exp(-1000) is 0 in every dtype: the label's column leaves the softmax.
    rest = _log_probs(student - 1000 * TEMPERATURE * label, teacher - 1000 * TEMPERATURE * label)
    return (_kl(binary[1], binary[0]) + 8 * _kl(rest[1], rest[0])) * TEMPERATURE**2


Lines = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER: dict[str, Lines] = {
    lines.__name__: lines
    for lines in (
        forward_kl,
        reverse_kl,
        jeffreys,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        alpha,
        tvd,
        renyi,
        ab,
        dkd,
    )
}


def row_blocks(case: Case) -> list[slice]:
    """All rows, about 2^17 logits at a time.

    Small, because the heap remembers: temporaries of 32 MiB, freed, leave holes that later
    gradients are carved from without a page fault. With 32 MiB blocks here no fresh gradient of the
    timed calls was ever touched first.
    """
    step = max(1, 2**17 // case.vocab)
    return [slice(start, start + step) for start in range(0, case.rows, step)]


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and student gradient in float64, by the eager lines, a few rows at a time."""
    double: dict[str, Any] = {"dtype": torch.float64, "device": inputs.student.device}
    loss = torch.zeros((), **double)
    gradient = torch.empty(case.rows, case.vocab, **double)
    for rows in row_blocks(case):
        student = inputs.student.detach()[rows].double().requires_grad_()
        labels = inputs.labels[rows]
        mean = EAGER[case.divergence](student, inputs.teacher[rows].double(), labels)
        part = mean * (len(labels) / case.rows)
        gradient[rows] = torch.autograd.grad(part, student)[0]
        loss += part.detach()
    return loss, gradient


# ---- contestants ----

Step = Callable[[Tensor, Inputs], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Contestant:
    """``make(case)`` gives the step to time: (student logits, inputs) -> (loss, gradient)."""

    backend: str | None  # None: a baseline
    allocation: str  # where the gradient goes
    make: Callable[[Case], Step]
    package: str | None = None  # what a baseline needs besides torch


FRESH, IN_PLACE, BUFFER = "fresh gradient", "in place", "given buffer"


def _ours(backend: str, inplace: bool) -> Callable[[Case], Step]:
    def make(case: Case) -> Step:
        def step(student: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
            loss = kdkernels.distillation_loss(
                student,
                inputs.teacher,
                inputs.labels if case.divergence == "dkd" else None,
                divergence=case.divergence,
                temperature=TEMPERATURE,
                inplace=inplace,
                backend=backend,
            )
            assert isinstance(loss, Tensor)  # no statistics were asked for
            return loss, torch.autograd.grad(loss, student)[0]

        return step

    return make


def _one_pass(backend: str) -> Callable[[Case], Step]:
    def make(case: Case) -> Step:
        def step(student: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
            return kdkernels.distillation_loss_and_grad(
                student,
                inputs.teacher,
                inputs.labels if case.divergence == "dkd" else None,
                divergence=case.divergence,
                temperature=TEMPERATURE,
                backend=backend,
            )

        return step

    return make


def _baseline(lines: Lines) -> Step:
    def step(student: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        loss = lines(student, inputs.teacher, inputs.labels)
        return loss, torch.autograd.grad(loss, student)[0]

    return step


def _eager(case: Case) -> Step:
    return _baseline(EAGER[case.divergence])


def _eager_float32(case: Case) -> Step:
    lines = EAGER[case.divergence]
    return _baseline(
        lambda student, teacher, labels: lines(student.float(), teacher.float(), labels)
    )


def _eager_probabilities(case: Case) -> Step:
    return _baseline(jsd_probabilities)


def _compiled(case: Case) -> Step:
    torch._dynamo.reset()  # else the second shape of a function is compiled for any shape
    return _baseline(torch.compile(EAGER[case.divergence], dynamic=False))


def _liger(case: Case) -> Step:
    """What a user of Liger-Kernel writes: its losses take log-probabilities, or probabilities."""
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    from liger_kernel.transformers.tvd import LigerTVDLoss

    losses = {
        "forward_kl": (F.log_softmax, LigerKLDIVLoss(reduction="batchmean", log_target=True)),
        "jsd": (F.log_softmax, LigerJSD()),
        "tvd": (F.softmax, LigerTVDLoss(reduction="batchmean")),
    }
    softmax, loss = losses[case.divergence]

    def lines(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        both = [softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher)]
        return loss(*both) * TEMPERATURE**2

    return _baseline(lines)


def _add(case: Case) -> Step:
    """The memory floor: two tensors of logits read, one written, no loss."""

    def step(student: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        total = torch.add(student.detach(), inputs.teacher, out=inputs.buffer)
        return total, total

    return step


CONTESTANTS = {
    "cpp, fresh": Contestant("cpp", FRESH, _ours("cpp", inplace=False)),
    "cpp, in place": Contestant("cpp", IN_PLACE, _ours("cpp", inplace=True)),
    "cpp, one pass": Contestant("cpp", FRESH, _one_pass("cpp")),
    "triton, fresh": Contestant("triton", FRESH, _ours("triton", inplace=False)),
    "triton, in place": Contestant("triton", IN_PLACE, _ours("triton", inplace=True)),
    "triton, one pass": Contestant("triton", FRESH, _one_pass("triton")),
    "reference, fresh": Contestant("reference", FRESH, _ours("reference", inplace=False)),
    "eager": Contestant(None, FRESH, _eager),
    "eager, float32": Contestant(None, FRESH, _eager_float32),
    "eager, probabilities": Contestant(None, FRESH, _eager_probabilities),
    "torch.compile": Contestant(None, FRESH, _compiled),
    "liger": Contestant(None, FRESH, _liger, package="liger_kernel"),
    "torch.add": Contestant(None, BUFFER, _add),
}


# ---- the cases ----

OURS = ("cpp, fresh", "cpp, in place", "cpp, one pass")
SHAPES = ((512, 32000), (256, 128256))  # the vocabularies of Llama 2 and Llama 3


def _large(divergence: str, dtype: str, rows: int, vocab: int) -> Case:
    others: tuple[str, ...] = ("eager", "torch.compile", "torch.add")
    if dtype != "float32":
        others = ("eager, float32", *others)
    if divergence == "jsd":
        others = ("eager, probabilities", *others)
    return Case(divergence, dtype, rows, vocab, OURS + others, large=True)


# Vision size, where a call costs more than its columns.
SMALL = [
    Case(divergence, "float32", 128, 100, (*OURS, "eager", "torch.compile"), profile=True)
    for divergence in ("forward_kl", "jsd")
]

FULL = [
    *(
        _large(divergence, dtype, rows, vocab)
        for divergence in ("forward_kl", "jsd")
        for dtype in ("float32", "bfloat16")
        for rows, vocab in SHAPES
    ),
    *SMALL,
    *(
        Case(name, "float32", 256, 8192, (*OURS, "reference, fresh", "eager"), survey=True)
        for name in EAGER
    ),
]

# On a GPU: bfloat16 logits of LLM size, where every contestant takes part; then rows of an odd
# stride, float32, fewer rows than multiprocessors, many short rows; then every divergence.
TRITON = tuple(name.replace("cpp", "triton") for name in OURS)
GPU_OURS = OURS + TRITON
GPU_BASELINES = ("eager", "eager, float32", "torch.compile", "liger", "torch.add")
GPU_SURVEY = ("cpp, fresh", "cpp, in place", "triton, fresh", "triton, in place", "eager")


def _gpu(divergence: str, dtype: str, rows: int, vocab: int, *baselines: str) -> Case:
    return Case(divergence, dtype, rows, vocab, GPU_OURS + (baselines or GPU_BASELINES))


GPU = [
    *(
        _gpu(divergence, "bfloat16", rows, vocab)
        for divergence in ("forward_kl", "jsd")
        for rows, vocab in ((2048, 32000), (1024, 128256))
    ),
    _gpu("forward_kl", "bfloat16", 1024, 50257, "eager", "torch.add"),
    _gpu("forward_kl", "float32", 1024, 128256, "eager", "torch.add"),
    _gpu("tvd", "bfloat16", 2048, 32000, "eager", "liger", "torch.add"),
    *(
        _gpu(divergence, "bfloat16", 8, 128256, "eager", "torch.add")
        for divergence in ("forward_kl", "jsd")
    ),
    *(
        _gpu(divergence, "float32", 4096, 100, "eager", "torch.add")
        for divergence in ("forward_kl", "jsd")
    ),
    Case("softmax", "bfloat16", 2048, 32000, ("cpp, fresh", "triton, fresh", "eager")),
    *(Case(name, "bfloat16", 1024, 32000, GPU_SURVEY, survey=True) for name in EAGER),
]

GPU_QUICK = [
    _gpu("forward_kl", "bfloat16", 256, 32000),
    _gpu("jsd", "bfloat16", 256, 50257, "eager", "torch.add"),
    _gpu("forward_kl", "float32", 512, 100, "eager"),
]

QUICK = [
    _large("forward_kl", "float32", 64, 32000),
    Case("jsd", "bfloat16", 64, 32000, (*OURS, "eager", "torch.add")),
    *(replace(case, contestants=("cpp, fresh", "cpp, in place", "eager")) for case in SMALL),
    *(
        Case(name, "float32", 32, 4096, ("cpp, fresh", "reference, fresh", "eager"), survey=True)
        for name in EAGER
    ),
]
