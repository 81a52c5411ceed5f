"""similarity_loss against the lines people write today: time, peak memory, operation count.

    python -m benchmarks.similarity --help

A contestant takes features (and keys) and returns the loss and the gradients of the student's. Each
is checked against float64 on a small case before anything of it is timed. They are timed
alternately; what a contestant allocates is inside. A ratio is the median of the rounds' ratios.
Peak memory is measured in a process of its own, beyond inputs and gradients. Eager contestants are
left out where their matrices of pairs exceed --most MiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

from . import memory, report, run
from .run import CheckFailed

MIB = 2**20
OURS, EAGER, COMPILED = "kdkernels", "eager", "torch.compile"
# Relative error (Euclidean norm) of a gradient against float64 on the checked case.
TOLERANCE = {OURS: 1e-5, EAGER: 1e-3, COMPILED: 1e-3}


@dataclass(frozen=True)
class Case:
    kernel: str
    rows: int
    keys: int  # 0: the rows are the keys, without the diagonal
    width: int = 128

    @property
    def name(self) -> str:
        keys = f"{self.keys} keys" if self.keys else "own keys"
        return f"{self.kernel}/{self.rows} rows/{keys}/{self.width}"

    @property
    def pairs(self) -> int:
        return self.rows * (self.keys or self.rows)


class Inputs(NamedTuple):
    student: Tensor  # (N, D), requires grad
    teacher: Tensor  # (N, D)
    student_keys: Tensor | None  # (M, D): a queue, without gradient
    teacher_keys: Tensor | None


def make_inputs(case: Case) -> Inputs:
    """Squared distances of about 2: a softmax neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, case.width, generator=generator) * case.width**-0.5

    student, teacher = normal(case.rows).requires_grad_(), normal(case.rows)
    if not case.keys:
        return Inputs(student, teacher, None, None)
    return Inputs(student, teacher, normal(case.keys), normal(case.keys))


# ---- what people write ----


def log_similarities(a: Tensor, keys: Tensor | None, kernel: str) -> Tensor:
    """log p of rows over keys."""
    b = a if keys is None else keys
    mean = b.mean(0)
    a, b = a - mean, b - mean
    if kernel == "pkt":
        a, b = F.normalize(a), F.normalize(b)
        scores = ((a @ b.t() + 1) / 2).log()
    else:
        squares = a.square().sum(1)[:, None] + b.square().sum(1)
        scores = -(squares - 2 * a @ b.t()).clamp(min=0)
    if keys is None:
        diagonal = torch.eye(len(a), dtype=torch.bool, device=a.device)
        scores = scores.masked_fill(diagonal, -1e9)  # −inf is NaN in kl_div
    return F.log_softmax(scores, 1)


def eager(x: Inputs, kernel: str) -> Tensor:
    student = log_similarities(x.student, x.student_keys, kernel)
    with torch.no_grad():
        teacher = log_similarities(x.teacher, x.teacher_keys, kernel)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


Step = Callable[[Inputs], tuple[Tensor, Tensor]]


def make_step(case: Case, name: str) -> Step:
    if name == OURS:

        def loss(x: Inputs) -> Tensor:
            return kdkernels.similarity_loss(*x, kernel=case.kernel)
    else:

        def loss(x: Inputs) -> Tensor:
            return eager(x, case.kernel)

        if name == COMPILED:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)

    def step(x: Inputs) -> tuple[Tensor, Tensor]:
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x.student)
        return value.detach(), gradient

    return step


def check(case: Case, name: str) -> dict[str, float]:
    """Relative errors against float64 on at most 200 rows and 300 keys of the case's kind."""
    few = Case(case.kernel, min(case.rows, 200), min(case.keys, 300), case.width)
    inputs = make_inputs(few)
    keys = [None if x is None else x.double() for x in inputs[2:]]
    student = inputs.student.detach().double().requires_grad_()
    exact = Inputs(student, inputs.teacher.double(), *keys)
    want = eager(exact, case.kernel)
    (want_gradient,) = torch.autograd.grad(want, exact.student)
    loss, gradient = make_step(few, name)(inputs)
    errors = {
        "loss": float((loss.double() - want.detach()).abs() / want.detach().abs()),
        "gradient": float((gradient.double() - want_gradient).norm() / want_gradient.norm()),
    }
    if not max(errors.values()) <= TOLERANCE[name]:  # NaN fails too
        raise CheckFailed(f"{case.name}: {name}: {errors}; allowed: {TOLERANCE[name]}")
    return errors


def operations(step: Step, inputs: Inputs) -> int:
    """Operators that the dispatcher runs in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(inputs)
    return sum(event.count for event in profile.key_averages() if "::" in event.key)


def measure(case: Case, names: list[str], rounds: int, with_memory: bool) -> dict[str, Any]:
    errors = {name: check(case, name) for name in names}
    inputs = make_inputs(case)
    steps = {name: make_step(case, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    repeats = max(1, min(200, 2_000_000 // case.pairs))
    for number in range(-1, rounds):  # one to warm up
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats):
                step(inputs)
            if number >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    result: dict[str, Any] = {"case": case.name, **asdict(case), "contestants": {}}
    for name, times in seconds.items():
        ratios = [b / a for a, b in zip(seconds[OURS], times, strict=True)]
        result["contestants"][name] = {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "of_ours": statistics.median(ratios),
            "errors": errors[name],
            "operations": operations(steps[name], inputs),
        }
        if with_memory:
            result["contestants"][name]["peak_bytes"] = peak_memory(case, name)
    return result


def peak_memory(case: Case, name: str) -> int:
    """Bytes beyond inputs and gradients, at the peak of one call in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.similarity", "--peak", json.dumps(asdict(case))]
    done = subprocess.run([*command, name], cwd=run.ROOT, stdout=subprocess.PIPE, check=True)
    return int(done.stdout) - case.rows * case.width * 4


def _peak(case: Case, name: str) -> int:
    step, inputs = make_step(case, name), make_inputs(case)
    # Libraries and threads; what is compiled for one shape is compiled for this one.
    few = Case(case.kernel, 64, 64 if case.keys else 0, case.width)
    step(inputs if name == COMPILED else make_inputs(few))
    return memory.added_by(lambda: step(inputs))


def table(result: dict[str, Any]) -> str:
    rows = [[result["case"], "ms", "× ours", "error: gradient", "operations", "peak MiB"]]
    for name, x in result["contestants"].items():
        rows.append(
            [
                name,
                report.number(x["seconds"] * 1e3),
                report.number(x["of_ours"]),
                f"{x['errors']['gradient']:.1e}",
                str(x["operations"]),
                f"{x['peak_bytes'] / MIB:.0f}" if "peak_bytes" in x else "-",
            ]
        )
    return report.aligned(rows)


# The sizes of issue 5's table, the target's 4096 × 4096, and a queue up to 65536 × 65536.
CASES = [
    *(Case(kernel, 64, 100) for kernel in ("rbf", "pkt")),
    *(Case(kernel, 4096, 1000) for kernel in ("rbf", "pkt")),
    *(Case(kernel, 4096, 0) for kernel in ("rbf", "pkt")),
    Case("rbf", 64, 65536),
]
SCALING = [Case("rbf", 4096, keys) for keys in (4096, 16384, 65536)] + [Case("rbf", 65536, 65536)]

parser = argparse.ArgumentParser(
    prog="python -m benchmarks.similarity",
    description="similarity_loss against eager torch and torch.compile: errors against float64, "
    "time, operators dispatched, peak memory beyond inputs and gradients.",
)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--memory", action="store_true", help="peak memory too: a process each")
parser.add_argument("--scaling", action="store_true", help="queues of up to 65536 keys instead")
parser.add_argument("--most", type=int, default=256, help="MiB of one matrix of pairs in eager")
parser.add_argument("--pairs", nargs=2, type=int, metavar="N", help="cases of N to N pairs only")
parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants beside ours")
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/similarity.json"))
parser.add_argument("--peak", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(_peak(Case(**json.loads(options.peak[0])), options.peak[1]))
        return 0
    results = run.environment(options.threads) | {"cases": [], "failed": []}
    print(report.machine_line(results))
    print(f"load average before the start: {results['machine']['load_average']:.1f}", flush=True)
    for case in SCALING if options.scaling else CASES:
        if options.pairs and not options.pairs[0] <= case.pairs <= options.pairs[1]:
            continue
        fits = case.pairs * 4 <= options.most * MIB
        names = [OURS, *(options.only or (EAGER, COMPILED))] if fits else [OURS]
        rounds = options.rounds if fits else min(options.rounds, 3)
        try:
            result = measure(case, names, rounds, options.memory)
        except CheckFailed as failure:
            results["failed"].append(str(failure))
            print(f"CHECK FAILED, not timed: {failure}")
            continue
        results["cases"].append(result)
        print("\n" + table(result), flush=True)
    run.save(results, options.out)
    print(f"\nwritten: {options.out}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
