"""distillation_loss's composite options against the eager lines people write for them: loss and
the gradients of the student and, where it is learned, the temperature.

    python -m benchmarks.options

Each is checked against the eager lines in float64 on four rows of the case before it is timed. They
are timed alternately, on inputs that exist; what a contestant allocates is inside. A ratio is the
median of the rounds' ratios. "plain" is forward KL without an option: what the option adds to it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

from . import report, run
from .run import CheckFailed

CHECKED_ROWS = 4
TOLERANCE = 1e-4  # of a gradient, in the Euclidean norm

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # student, teacher, temperature, center


def _kl(student: Tensor, teacher: Tensor, tau: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * tau * tau


def eager_plain(s: Tensor, t: Tensor, tau: Tensor, c: Tensor) -> Tensor:
    return _kl(s, t, tau)


def eager_standardize(s: Tensor, t: Tensor, tau: Tensor, c: Tensor) -> Tensor:
    s, t = ((x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) for x in (s, t))
    return _kl(s, t, tau)


def eager_adaptive(s: Tensor, t: Tensor, tau: Tensor, c: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1)
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        ordered, order = q.sort(dim=-1, descending=True)
        gaps = (ordered - p.gather(-1, order)).abs()
        tail = ordered.cumsum(-1) > 0.5
        tail[:, 0] = False
        weight = gaps.masked_fill(tail, 0).sum(-1) / gaps.sum(-1)
    forward, reverse = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
    return (weight * forward + (1 - weight) * reverse).mean() * tau * tau


def eager_dino(s: Tensor, t: Tensor, tau: Tensor, c: Tensor) -> Tensor:
    q = torch.softmax((t - c) / 0.04, -1)
    return -(q * F.log_softmax(s / 0.1, -1)).sum(-1).mean()


def _ours(**options: Any) -> Loss:
    def loss(s: Tensor, t: Tensor, tau: Tensor, c: Tensor) -> Tensor:
        value = kdkernels.distillation_loss(s, t, temperature=tau, **options)
        assert isinstance(value, Tensor)  # no statistics were asked for
        return value

    return loss


def ours_dino(s: Tensor, t: Tensor, tau: Tensor, c: Tensor) -> Tensor:
    value = kdkernels.distillation_loss(
        s, t, divergence="cross_entropy", temperature=0.1, teacher_temperature=0.04,
        t_squared=False, teacher_center=c,
    )  # fmt: skip
    assert isinstance(value, Tensor)
    return value


# option: (eager, ours, whether the temperature is learned)
OPTIONS: dict[str, tuple[Loss, Loss, bool]] = {
    "plain": (eager_plain, _ours(), False),
    "temperature": (eager_plain, _ours(), True),
    "standardize": (eager_standardize, _ours(standardize=True), False),
    "adaptive_kl": (eager_adaptive, _ours(divergence="adaptive_kl"), False),
    "dino": (eager_dino, ours_dino, False),
}


def inputs_of(rows: int, columns: int, learned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of standard deviation 2 for all but DINO's temperatures, which need cosines."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, columns, generator=generator) * 2 for _ in range(2))
    center = torch.randn(columns, generator=generator)
    return (
        student.requires_grad_(),
        teacher,
        torch.tensor(2.0).requires_grad_(learned),
        center,
    )


def scaled(option: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if option != "dino":
        return inputs
    student, teacher, tau, center = inputs
    return (student.detach() / 16).requires_grad_(), teacher / 16, tau, center / 16


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])


def check(option: str, columns: int) -> float:
    """The largest relative error of ours against the eager lines in float64."""
    eager, ours, learned = OPTIONS[option]
    inputs = scaled(option, inputs_of(CHECKED_ROWS, columns, learned))
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    pairs = zip(step(ours, inputs), step(eager, exact), strict=True)
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
    if not error <= TOLERANCE:  # NaN fails too
        raise CheckFailed(f"{option}/{columns}: relative error {error:.1e} > {TOLERANCE}")
    return error


def measure(option: str, rows: int, columns: int, rounds: int) -> dict[str, Any]:
    error = check(option, columns)
    eager, ours, learned = OPTIONS[option]
    inputs = scaled(option, inputs_of(rows, columns, learned))
    seconds: dict[str, list[float]] = {"ours": [], "eager": []}
    for number in range(-1, rounds):  # one to warm up
        for name, loss in (("ours", ours), ("eager", eager)):
            start = time.perf_counter()
            step(loss, inputs)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["eager"], strict=True)]
    return {
        "case": f"{option}/float32/{rows}x{columns}",
        "error": error,
        "ours": statistics.median(seconds["ours"]),
        "eager": statistics.median(seconds["eager"]),
        "ratio": statistics.median(ratios),
    }


parser = argparse.ArgumentParser(
    prog="python -m benchmarks.options",
    description="distillation_loss's composite options against eager PyTorch, float32, on the CPU: "
    "learned temperature, standardised logits, adaptive KL, DINO's centred cross-entropy.",
)
parser.add_argument("--option", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
parser.add_argument("--shape", nargs="+", metavar="ROWSxCOLUMNS", default=["64x65536", "4096x1000"])
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/options.json"))


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = run.environment(options.threads) | {"cases": [], "failed": []}
    print(report.machine_line(results))
    print(f"load average before the start: {results['machine']['load_average']:.1f}", flush=True)
    for shape in options.shape:
        rows, columns = map(int, shape.split("x"))
        for option in options.option:
            try:
                results["cases"].append(measure(option, rows, columns, options.rounds))
            except CheckFailed as failure:
                results["failed"].append(str(failure))
                print(f"CHECK FAILED, not timed: {failure}", flush=True)
    lines = [["case", "ours, ms", "eager, ms", "eager / ours", "error"]]
    for x in results["cases"]:
        numbers = (
            report.number(value) for value in (1e3 * x["ours"], 1e3 * x["eager"], x["ratio"])
        )
        lines.append([x["case"], *numbers, f"{x['error']:.1e}"])
    print(report.aligned(lines))
    run.save(results, options.out)
    print(f"\nwritten: {options.out}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
