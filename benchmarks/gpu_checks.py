"""Every kernel against float64 on one device: the first half of ``python -m benchmarks.gpu``.

The truth is ``backend="reference"`` in float64 on the same device (the tests hold it to an oracle
that knows only definitions). A group is one divergence, or softmax, at one dtype: every backend
and shape. Run as a program, this module checks one group and prints JSON: an error of a CUDA kernel
ends all further work of its process, so every group has a process of its own.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels
from kdkernels.divergences import DIVERGENCES

from . import run

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32": (torch.bfloat16, torch.float32),
}
Shapes = tuple[tuple[int, int], ...]
SHAPES: Shapes = (
    (1024, 100),  # vision: many short rows
    (300, 32000),  # more rows than a chip has multiprocessors
    (5, 50257),  # the rows begin at odd addresses
    (3, 128256),  # fewer rows than multiprocessors, and no shared memory holds one
)
SOFTMAX = "softmax"
# linear_distillation_loss: a class A divergence, one of class B, one that reads the label's logits.
LINEAR = {f"linear {name}": name for name in ("forward_kl", "jsd", "dkd")}
DEVICE = "cuda"

# float32 arithmetic with the hardware's approximate exponential; what is compared are norms of rows
# and the largest numbers, so that this is far above rounding and far below any mistake.
ARITHMETIC = 2e-5
# Total variation: where log p and log q are as near as this, the sign of p - q is anybody's.
TIE = 1e-5
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Group(NamedTuple):
    op: str  # a divergence, SOFTMAX or one of LINEAR
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op}/{self.dtype}"


def groups() -> list[Group]:
    softmax = [Group(SOFTMAX, dtype) for dtype in DTYPES if "," not in dtype]
    linear = [Group(op, group.dtype) for op in LINEAR for group in softmax]
    ours = [Group(divergence, dtype) for divergence in DIVERGENCES for dtype in DTYPES]
    return ours + softmax + linear


@dataclass
class Check:
    """One comparison; `problem` where it did not come to one, or where bits differ."""

    group: str
    backend: str
    shape: str
    what: str
    error: float = 0.0
    limit: float = 0.0
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.error <= self.limit  # NaN fails too

    @property
    def text(self) -> str:
        found = self.problem or f"relative error {self.error:.2g}; allowed: {self.limit:.2g}"
        return f"{self.group} {self.shape} {self.backend}: {self.what}: {found}"


class Comparisons:
    """The checks of one backend at one shape."""

    def __init__(self, group: Group, backend: str, rows: int, vocab: int):
        self.place = (group.name, backend, f"{rows}x{vocab}")
        self.found: list[Check] = []

    def add(self, what: str, **found: Any) -> None:
        self.found.append(Check(*self.place, what, **found))

    def values(self, what: str, got: Tensor, truth: Tensor) -> None:
        """Numbers of one kind: relative to the largest."""
        error = (got.double() - truth).abs().max() / truth.abs().max()
        self.add(what, error=float(error), limit=ARITHMETIC)

    def gradient(
        self,
        what: str,
        got: Tensor,
        truth: Tensor,
        *,
        slack: Tensor | float = 0.0,
        roundings: int = 1,
    ) -> None:
        """Rows of a gradient, or of softmax: the worst one's error, by Euclidean norm and less
        `slack`; exact where a row is 0.

        Of a float16 result only what exceeds its smallest normal number counts: below it there are
        fewer digits, or none.
        """
        tiny = torch.finfo(got.dtype).smallest_normal
        off = ((got.double() - truth).abs() - tiny).clamp(min=0).norm(dim=1)
        norm = truth.norm(dim=1)
        zero = torch.where((got == 0).all(1), 0.0, torch.inf)
        relative = torch.where(norm > 0, (off - slack).clamp(min=0) / norm, zero)
        limit = ARITHMETIC + roundings * ROUNDING[got.dtype]
        self.add(what, error=float(relative.max()), limit=limit)

    def same(self, what: str, got: Tensor, expected: Tensor) -> None:
        different = int((got != expected).sum()) + int((got.isnan() != expected.isnan()).sum())
        self.add(what, problem=f"{different} of {got.numel()} differ" if different else "")


def logits(rows: int, vocab: int, dtypes: tuple[torch.dtype, ...], device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    normal = (torch.randn(rows, vocab, generator=generator, device=device) for _ in dtypes)
    return [(x * 3).to(dtype) for x, dtype in zip(normal, dtypes, strict=True)]


def check_group(
    group: Group, backends: list[str], device: str = DEVICE, shapes: Shapes = SHAPES
) -> list[Check]:
    checks = []
    for rows, vocab in shapes:
        inputs = logits(rows, vocab, DTYPES[group.dtype], device)
        check: Any
        if group.op in LINEAR:
            check = _Linear(LINEAR[group.op], rows, vocab, DTYPES[group.dtype][0], device)
        else:
            check = _softmax if group.op == SOFTMAX else _Distillation(group.op, *inputs)
        for backend in backends:
            comparisons = Comparisons(group, backend, rows, vocab)
            try:
                check(comparisons, backend, *inputs)
            except Exception as error:  # whatever a kernel or a compiler raises is the finding
                comparisons.add("raised", problem=f"{type(error).__name__}: {error}"[:1000])
            checks += comparisons.found
    return checks


WEIGHT = 16.0


class _Distillation:
    """Truth of both sets of options, once for all backends."""

    def __init__(self, divergence: str, student: Tensor, teacher: Tensor):
        n, v = student.shape
        generator = torch.Generator(student.device).manual_seed(1)
        where: dict[str, Any] = {"generator": generator, "device": student.device}
        labels = torch.randint(v, (n,), **where)
        self.some_labels = labels.clone()
        self.some_labels[::3] = -100
        weights = torch.rand(n, **where)
        weights[1] = 0
        # Of a size that keeps float16 from under- and overflowing, as WEIGHT below.
        self.upstream = WEIGHT * (torch.rand(n, **where) + 0.5)
        self.plain: dict[str, Any] = {"divergence": divergence, "temperature": 2.0}
        if divergence == "dkd":
            self.plain["labels"] = labels
        self.full: dict[str, Any] = {
            "divergence": divergence,
            "labels": self.some_labels,
            "temperature": 2.0,
            "teacher_temperature": 1.5,
            "ce_weight": 0.5,
            "z_loss_weight": 1e-3,
            "label_smoothing": 0.1,
            "token_weights": weights,
            "reduction": "none",
            "teacher_grad": True,
            "return_stats": True,
        }
        logits = (student.double(), teacher.double())
        self.plain_truth = kdkernels.distillation_loss_and_grad(
            *logits, **self.plain, reduction="none", backend="reference"
        )
        *self.full_truth, self.stats = kdkernels.distillation_loss_and_grad(
            *logits, **self.full, backend="reference"
        )
        self.slack = self.full_slack = torch.zeros(n, device=student.device)
        if divergence == "tvd":
            self.slack = _ties(student, teacher, 2.0, 2.0)
            self.full_slack = weights * _ties(student, teacher, 2.0, 1.5)
        # torch.argmax promises no order between equal maxima; the op promises the first.
        first = [_first_maximum(x) for x in (student, teacher)]
        counts = (weights != 0) & (self.some_labels != -100)
        self.agreement = ((first[0] == first[1]) & counts).double()

    def __call__(self, c: Comparisons, backend: str, student: Tensor, teacher: Tensor) -> None:
        got: Any
        loss, gradient = self.plain_truth
        options = {**self.plain, "reduction": "none", "backend": backend}
        upstream, slack = self.upstream, self.slack

        leaf = student.clone().requires_grad_()
        got = kdkernels.distillation_loss(leaf, teacher, **options)
        c.values("loss", got.detach(), loss)
        (got_gradient,) = torch.autograd.grad(got, leaf, upstream)
        truth = gradient * upstream[:, None]
        c.gradient("gradient", got_gradient, truth, slack=slack * upstream)

        options["kd_weight"] = WEIGHT
        loss, gradient, slack = WEIGHT * loss, WEIGHT * gradient, WEIGHT * slack
        got, got_gradient = kdkernels.distillation_loss_and_grad(student, teacher, **options)
        c.values("loss, one pass", got, loss)
        c.gradient("gradient, one pass", got_gradient, gradient, slack=slack)
        again = kdkernels.distillation_loss_and_grad(student, teacher, **options)
        c.same("loss, one pass, a second time", again[0], got)
        c.same("gradient, one pass, a second time", again[1], got_gradient)
        last = {**options}
        if "labels" in last:
            last["labels"] = last["labels"][-1:]
        one = kdkernels.distillation_loss_and_grad(student[-1:], teacher[-1:], **last)
        c.same("loss of the last row alone", one[0], got[-1:])
        c.same("gradient of the last row alone", one[1], got_gradient[-1:])

        leaf = student.clone().requires_grad_()
        got = kdkernels.distillation_loss(leaf.clone(), teacher, inplace=True, **options)
        c.values("loss, in place", got.detach(), loss)
        (got_gradient,) = torch.autograd.grad(got, leaf, upstream)
        truth, slack = gradient * upstream[:, None], slack * upstream
        c.gradient("gradient, in place", got_gradient, truth, slack=slack, roundings=2)

        both = [x.clone().requires_grad_() for x in (student, teacher)]
        stats: Any
        got, stats = kdkernels.distillation_loss(*both, **self.full, backend=backend)
        c.values("loss, every option", got.detach(), self.full_truth[0])
        gradients = torch.autograd.grad(got, both, upstream)
        for i, name in enumerate(("student's", "teacher's")):
            truth = self.full_truth[1 + i] * upstream[:, None]
            what = f"{name} gradient, every option"
            c.gradient(what, gradients[i], truth, slack=self.full_slack * upstream)
        for name, value, truth in zip(stats._fields[:-1], stats[:-1], self.stats[:-1], strict=True):
            c.values(f"statistic {name}", value, truth)
        c.same("statistic top1_agreement", stats.top1_agreement.double(), self.agreement)

        if student.device.type == "cpu":  # there the op raises
            return
        beyond: Any
        outside = self.some_labels.clone()
        outside[0] = student.shape[1]
        beyond, _ = kdkernels.distillation_loss(
            student, teacher, **{**self.full, "labels": outside, "backend": backend}
        )
        nan = beyond[:1].isnan()
        c.same("a label out of range makes its row NaN", nan, torch.ones_like(nan))
        c.same("and no other", beyond[1:], got.detach()[1:])


def _ties(student: Tensor, teacher: Tensor, ts: float, tt: float) -> Tensor:
    """How far a row's gradient of total variation may be off: a column whose sign is open moves G
    by no more than its p, and the sum of G, which multiplies every p, as much; times T²/τ."""
    a, b = (torch.log_softmax(x.double() / t, 1) for x, t in ((student, ts), (teacher, tt)))
    return 2 * ts * ts / min(ts, tt) * torch.where((a - b).abs() < TIE, a.exp(), 0.0).sum(1)


def _first_maximum(x: Tensor) -> Tensor:
    columns = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(1, keepdim=True), columns, x.shape[1]).amin(1)


def _softmax(c: Comparisons, backend: str, x: Tensor, upstream: Tensor) -> None:
    for op in (kdkernels.softmax, kdkernels.log_softmax):
        log = op is kdkernels.log_softmax
        name = op.__name__
        truth = (torch.log_softmax if log else torch.softmax)(x.double() / 2, 1)
        leaf = x.clone().requires_grad_()
        y = op(leaf, temperature=2.0, backend=backend)
        c.gradient(name, y.detach(), truth)
        (gradient,) = torch.autograd.grad(y, leaf, upstream)
        # Like PyTorch's, the backward starts from the output as it was rounded.
        y, g = y.detach().double(), upstream.double()
        if log:
            truth = (g - y.exp() * g.sum(1, keepdim=True)) / 2
        else:
            truth = y * (g - (y * g).sum(1, keepdim=True)) / 2
        c.gradient(f"gradient of {name}", gradient, truth)


class _Linear:
    """linear_distillation_loss in chunks of rows; in Triton without logits too."""

    # Hidden sizes that fill no step of a product; the student's models' rows end in one.
    WIDTHS = (200, 72)
    # Of gradients whose logits' gradient was rounded: bfloat16 to 2^-9 at random.
    ROUNDED = 3e-3

    def __init__(self, divergence: str, rows: int, vocab: int, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(0)
        where: dict[str, Any] = {"generator": generator, "device": device}
        self.tensors = {}
        for whose, width in zip(("student", "teacher"), self.WIDTHS, strict=True):
            hidden = torch.randn(rows, width, **where)
            weight = torch.randn(vocab, width, **where) * 2 * width**-0.5
            self.tensors[f"{whose}_hidden"] = hidden.to(dtype)
            self.tensors[f"{whose}_weight"] = weight.to(dtype)
            self.tensors[f"{whose}_bias"] = torch.randn(vocab, **where).to(dtype)
        labels = torch.randint(vocab, (rows,), **where)
        labels[1] = -100
        self.options: dict[str, Any] = {
            "labels": labels,
            "divergence": divergence,
            "ce_weight": 0.5,
            "temperature": 2.0,
            "student_softcap": 30.0,
            "teacher_grad": True,
            "reduction": "none",
        }
        # Of a size that keeps float16 from underflow.
        self.upstream = WEIGHT * (torch.rand(rows, **where) + 0.5)
        double = {name: x.double() for name, x in self.tensors.items()}
        self.truth = self._run(double, backend="reference")
        for name in ("student_hidden", "teacher_hidden"):
            self.tensors[name][1] = torch.nan  # of the masked row

    def _run(self, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        loss: Any = kdkernels.linear_distillation_loss(**leaves, **self.options, **options)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), self.upstream)]

    def __call__(self, c: Comparisons, backend: str, *_: Tensor) -> None:
        ways: dict[str, dict[str, Any]] = {"chunks": {"backend": backend, "chunk_rows": 128}}
        if backend == "triton":
            ways["low_memory"] = {"low_memory": True}
        for way, options in ways.items():
            got = self._run(self.tensors, **options)
            c.values(f"loss, {way}", got[0], self.truth[0])
            for name, x, truth in zip(self.tensors, got[1:], self.truth[1:], strict=True):
                error = (x.double() - truth).norm() / truth.norm()
                limit = ARITHMETIC + (0 if x.dtype == torch.float32 else self.ROUNDED)
                c.add(f"gradient of {name}, {way}", error=float(error), limit=limit)
            again = self._run(self.tensors, **options)
            for name, x, y in zip(("loss", *self.tensors), got, again, strict=True):
                c.same(f"{name}, {way}, a second time", x, y)


# ---- all groups, each in a process of its own ----


def run_all(
    some: list[Group], backends: list[str], seconds: float, device: str, shapes: Shapes
) -> dict[str, list[Check]]:
    """Group name to its checks; what is not there by the end of the time is a failed check."""
    deadline = run.Deadline(seconds)
    workers = max(1, min(12, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda g: _in_child(g, backends, deadline, device, shapes), some)
        return {group.name: checks for group, checks in zip(some, found, strict=True)}


def _in_child(
    group: Group, backends: list[str], deadline: run.Deadline, device: str, shapes: Shapes
) -> list[Check]:
    def failed(problem: str) -> list[Check]:
        return [Check(group.name, ", ".join(backends), "", "process", problem=problem)]

    left = deadline.left()
    if left < 1:
        return failed("not checked: no time was left")
    request = json.dumps([group, backends, device, shapes])
    command = [sys.executable, "-m", "benchmarks.gpu_checks", request]
    try:
        done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return failed(f"not checked: not done after {left:.0f} s")
    if done.returncode:
        return failed(f"ended with status {done.returncode}: {done.stderr[-1000:]}")
    return [Check(**check) for check in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    group, *request = json.loads(sys.argv[1])
    print(json.dumps([asdict(check) for check in check_group(Group(*group), *request)]))
