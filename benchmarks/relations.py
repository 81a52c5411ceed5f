"""Relation losses against eager PyTorch and torch.compile: time, memory, operations.

    python -m benchmarks.relations                 # all cases
    python -m benchmarks.relations --case 'rkd*'

One call is loss and student gradient in float32. First every contestant is checked against the
definition in float64 on a few rows of the case's width (losses over pairs and triplets of all rows
do not fit memory in float64), torch.compile, which compiles for one shape, against eager at the
whole one; a wrong one is not timed. Then contestants are timed alternately, in one process: CPU
time of its one thread, which other jobs on the machine change less than the wall's. Peak memory is
the resident memory one call adds after a warm-up, the gradient included; operations are those
PyTorch's dispatcher sees, none that another called. Where ours does not win, the table says so.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

from . import memory, report, run
from .run import CheckFailed

MIB = 2**20
TOLERANCE = 2e-4  # of the gradient's norm; eager's Gram-matrix distances come to 3e-6 here
OURS, EAGER, COMPILED = "kdkernels", "eager", "torch.compile"
Loss = Callable[[Tensor, Tensor], Tensor]


# ---- what people write today ----


def eager_sp(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x @ x.T, dim=1) for x in (student, teacher))
    return F.mse_loss(s, t)


def eager_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    return F.mse_loss(s @ s.mT, t @ t.mT)


def eager_distances(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        squares = x.square().sum(1)
        d = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x), dtype=x.dtype))
        return d / (d.sum() / (len(x) * (len(x) - 1)))

    return F.smooth_l1_loss(relative(student), relative(teacher))


def eager_angles(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(x: Tensor) -> Tensor:
        e = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(e, e.mT)

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def eager_nst(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).square().mean()

    return kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t)


def eager_dist(student: Tensor, teacher: Tensor) -> Tensor:
    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        # The authors' 1e-8 makes small columns uncorrelated; without it the losses agree.
        return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()

    p, q = student.softmax(1), teacher.softmax(1)
    return (1 - correlation(p, q)) + (1 - correlation(p.T, q.T))


def tokens(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.gram_loss(student, teacher, normalize="features")


@dataclass(frozen=True)
class Case:
    loss: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.loss} {'x'.join(map(str, self.shape))}"

    @property
    def few(self) -> "Case":
        """A case of the same width that is small in float64."""
        first, *rest = self.shape
        if len(rest) == 1:
            return Case(self.loss, (min(first, 24), *rest))
        return Case(self.loss, (2, min(rest[0], 64), *rest[1:]))


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "sp": (kdkernels.gram_loss, eager_sp),
    "token gram": (tokens, eager_tokens),
    "rkd distance": (kdkernels.rkd_distance_loss, eager_distances),
    "rkd angle": (kdkernels.rkd_angle_loss, eager_angles),
    "nst": (kdkernels.nst_loss, eager_nst),
    "dist": (kdkernels.dist_loss, eager_dist),
}
SHAPES = ((64, 100), (4096, 1000), (64, 65536))
CASES = [
    *(Case(loss, shape) for loss in ("sp", "rkd distance", "dist") for shape in SHAPES),
    Case("sp", (4096, 128)),  # N > 3·D: through D×D products
    *(Case("token gram", shape) for shape in ((8, 196, 768), (8, 1024, 384))),
    # At 4096 rows there are 7e10 angles, and eager's would take 256 GiB; at 64x65536 its unit
    # vectors alone take a GiB a copy.
    *(Case("rkd angle", shape) for shape in ((64, 100), (64, 1024), (256, 512))),
    *(Case("nst", shape) for shape in ((64, 16, 64), (8, 128, 64))),
]


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.to(dtype).requires_grad_(), (student.detach() + teacher).to(dtype)


def loss_of(case: Case, name: str) -> Loss:
    ours, eager = LOSSES[case.loss]
    if name == COMPILED:
        torch._dynamo.reset()
        return torch.compile(eager, dynamic=False)
    return ours if name == OURS else eager


def differentiated(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(student, teacher)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


def check(case: Case, name: str, contestant: Loss) -> float:
    """Error of the gradient, relative to its norm."""
    of = case if name == COMPILED else case.few
    truth = torch.float32 if name == COMPILED else torch.float64
    want_loss, want = differentiated(LOSSES[case.loss][1], *inputs(of, truth))
    loss, grad = differentiated(contestant, *inputs(of))
    error = float((grad.double() - want).norm() / want.norm())
    loss_error = float((loss.double() - want_loss).abs() / want_loss)
    if not max(error, loss_error) <= TOLERANCE:  # NaN fails too
        raise CheckFailed(
            f"{case.name}: {name}: relative errors {loss_error:.1e} (loss), {error:.1e} (gradient)"
        )
    return error


def measure(case: Case, names: list[str], seconds: float) -> dict[str, Any]:
    losses = {name: loss_of(case, name) for name in names}
    errors = {name: check(case, name, loss) for name, loss in losses.items()}
    student, teacher = inputs(case)
    times: dict[str, list[float]] = {name: [] for name in names}
    for loss in losses.values():
        differentiated(loss, student, teacher)
    end = time.perf_counter() + seconds
    while len(times[names[0]]) < 3 or (time.perf_counter() < end and len(times[names[0]]) < 300):
        for name, loss in losses.items():
            start = time.process_time()
            differentiated(loss, student, teacher)
            times[name].append(time.process_time() - start)
    contestants = {}
    for name, loss in losses.items():

        def step(loss: Loss = loss) -> None:
            differentiated(loss, student, teacher)

        ratios = [b / a for a, b in zip(times[OURS], times[name], strict=True)]
        contestants[name] = {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "fastest": 1e3 * min(times[name]),
            "of_ours": statistics.median(ratios),
            "peak_bytes": memory.added_by(step),
            "operations": sum(run.ops_of(step).values()),
            "error": errors[name],
        }
        gc.collect()
    beaten = [name for name in names if contestants[name]["of_ours"] < 1]
    return {
        "case": case.name,
        "input_bytes": student.nbytes + teacher.nbytes,
        "rounds": len(times[names[0]]),
        "faster_than_ours": beaten,
        "contestants": contestants,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = ["", "CPU ms", "fastest", "× ours", "peak MiB", "operations", "error", ""]
    rows = [head]
    for result in results:
        rows.append([f"{result['case']} ({result['input_bytes'] / MIB:.2f} MiB in)"] + [""] * 7)
        for name, x in result["contestants"].items():
            faster = "faster than ours" if name in result["faster_than_ours"] else ""
            rows.append(
                [
                    f"  {name}",
                    report.number(x["milliseconds"]),
                    report.number(x["fastest"]),
                    report.number(x["of_ours"]),
                    report.number(x["peak_bytes"] / MIB),
                    str(x["operations"]),
                    f"{x['error']:.0e}",
                    faster,
                ]
            )
    return report.aligned(rows)


parser = argparse.ArgumentParser(
    prog="python -m benchmarks.relations",
    description="Gram, RKD, NST and DIST losses against eager PyTorch and torch.compile.",
)
parser.add_argument("--case", action="append", metavar="PATTERN", help="as 'rkd*'; repeatable")
parser.add_argument("--seconds", type=float, default=4.0, help="for timing each case")
parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/relations.json"))


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [OURS, EAGER, *([] if options.no_compile else [COMPILED])]
    results = run.environment(1) | {"cases": [], "failed": []}
    print(report.machine_line(results))
    print(f"load average before the start: {results['machine']['load_average']:.1f}", flush=True)
    for case in CASES:
        if options.case and not any(fnmatch(case.name, pattern) for pattern in options.case):
            continue
        try:
            result = measure(case, names, options.seconds)
        except CheckFailed as failure:
            results["failed"].append(str(failure))
            print(f"CHECK FAILED, not timed: {failure}")
            continue
        results["cases"].append(result)
        print("\n" + table([result]), flush=True)
        run.save(results, options.out)
    run.save(results, options.out)
    print(f"\nwritten: {options.out}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
