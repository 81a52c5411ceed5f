"""The loss of two heads, from hidden states to the gradients of the student's: linear_distillation_
loss against the lines people write today, and against its own matrix products alone.

    python -m benchmarks.linear --help

A contestant takes (student hidden, student weight, teacher hidden, teacher weight, labels) and
returns the loss and the gradients of the first two. Each is checked against float64 on 32 rows of
the case before anything of it is timed, at most TOLERANCE away, and its error there is part of the
result: in bfloat16 the peers round the logits. They are timed alternately, on inputs that exist;
what a contestant allocates is inside. A ratio is the median of the rounds' ratios.
"""

import argparse
import importlib
import importlib.util
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
from torch.utils.checkpoint import checkpoint

import kdkernels

from . import memory, report, run
from .run import CheckFailed

MIB = 2**20
VOCAB, TEACHER_HIDDEN = 49152, 576  # SmolLM2-135M
CHECKED_ROWS = 32
# Relative error of a gradient (Euclidean norm). Baselines in bfloat16 have one only so that it is
# known to be the same function.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
OURS_IN_BFLOAT16 = 0.003


@dataclass(frozen=True)
class Case:
    loss: str  # "jsd": the whole loss is JSD(0.5); "ce": cross-entropy, no teacher
    dtype: str
    rows: int
    hidden: int
    vocab: int = VOCAB

    @property
    def name(self) -> str:
        return f"{self.loss}/{self.dtype}/{self.rows}x{self.hidden}"

    @property
    def flops(self) -> int:
        """Of the matrix products alone, none done twice."""
        teacher = TEACHER_HIDDEN if self.loss == "jsd" else 0
        return 2 * self.rows * self.vocab * (3 * self.hidden + teacher)


class Inputs(NamedTuple):
    hidden: Tensor  # (N, Hs), requires grad
    weight: Tensor  # (V, Hs), requires grad
    teacher_hidden: Tensor  # (N, Ht)
    teacher_weight: Tensor  # (V, Ht)
    labels: Tensor  # (N,)


def make_inputs(case: Case) -> Inputs:
    """Logits of standard deviation 2: a softmax neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(scale).to(dtype)

    return Inputs(
        normal(case.rows, case.hidden, 1.0).requires_grad_(),
        normal(case.vocab, case.hidden, 2 * case.hidden**-0.5).requires_grad_(),
        normal(case.rows, TEACHER_HIDDEN, 1.0),
        normal(case.vocab, TEACHER_HIDDEN, 2 * TEACHER_HIDDEN**-0.5),
        torch.randint(case.vocab, (case.rows,), generator=generator),
    )


# ---- what people write ----


def jsd_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """JSD(0.5), summed over rows, in log space: the form LLM trainers use."""
    log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]) - torch.tensor(2.0).log(), 0)
    both = [F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q)]
    return (both[0] + both[1]) / 2


def eager(x: Inputs) -> Tensor:
    student, teacher = F.linear(x.hidden, x.weight), F.linear(x.teacher_hidden, x.teacher_weight)
    return jsd_of_logits(student.float(), teacher.float()) / len(x.hidden)


def checkpointed(x: Inputs) -> Tensor:
    """256 rows at a time, their logits made again in the backward: TRL's way."""

    def chunk(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor) -> Tensor:
        teacher = F.linear(teacher_hidden, x.teacher_weight).float()
        return jsd_of_logits(F.linear(hidden, weight).float(), teacher)

    parts = [
        checkpoint(chunk, hidden, x.weight, teacher, use_reentrant=False)
        for hidden, teacher in zip(x.hidden.split(256), x.teacher_hidden.split(256), strict=True)
    ]
    return torch.stack(parts).sum() / len(x.hidden)


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients in float64."""
    x = Inputs(*(t.detach().double() if t.is_floating_point() else t for t in inputs))
    leaves = x.hidden.requires_grad_(), x.weight.requires_grad_()
    student = F.linear(x.hidden, x.weight)
    if case.loss == "ce":
        loss = F.cross_entropy(student, x.labels)
    else:
        loss = jsd_of_logits(student, F.linear(x.teacher_hidden, x.teacher_weight)) / case.rows
    return loss.detach(), torch.autograd.grad(loss, leaves)


# ---- contestants: make(case) gives the step to time ----

Step = Callable[[Inputs], tuple[Tensor, tuple[Tensor, Tensor]]]


def _differentiated(loss: Callable[[Inputs], Tensor]) -> Step:
    def step(x: Inputs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value = loss(x)
        by_hidden, by_weight = torch.autograd.grad(value, (x.hidden, x.weight))
        return value.detach(), (by_hidden, by_weight)

    return step


def _ours(case: Case) -> Step:
    def loss(x: Inputs) -> Tensor:
        if case.loss == "ce":
            value = kdkernels.linear_distillation_loss(
                x.hidden, x.weight, labels=x.labels, kd_weight=0, ce_weight=1.0
            )
        else:
            value = kdkernels.linear_distillation_loss(*x[:4], divergence="jsd")
        assert isinstance(value, Tensor)  # no statistics were asked for
        return value

    return _differentiated(loss)


def _eager(case: Case) -> Step:
    if case.loss == "ce":
        return _differentiated(
            lambda x: F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.labels)
        )
    return _differentiated(eager)


def _compiled(case: Case) -> Step:
    torch._dynamo.reset()
    return _differentiated(torch.compile(eager, dynamic=False))


def _checkpointed(case: Case) -> Step:
    return _differentiated(checkpointed)


def _liger(case: Case) -> Step:
    liger = importlib.import_module("liger_kernel.chunked_loss")
    torch._dynamo.reset()
    loss = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return _differentiated(lambda x: loss(*x))


def _torch_ce(case: Case) -> Step:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()  # without them it is the materialised path
    return _differentiated(
        lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)
    )


def _products(case: Case) -> Step:
    """The floor: the same matrix products in the dtype, 1024 rows at a time, into memory that is
    there already. A sum of their times, no loss.
    """
    dtype, rows = getattr(torch, case.dtype), min(1024, case.rows)
    logits = torch.zeros(rows, case.vocab, dtype=dtype)
    by_hidden = torch.zeros(rows, case.hidden, dtype=dtype)
    by_weight = torch.zeros(case.vocab, case.hidden, dtype=dtype)

    def step(x: Inputs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        for start in range(0, case.rows, rows):
            hidden = x.hidden.detach()[start : start + rows]
            n = len(hidden)
            if case.loss == "jsd":
                teacher = x.teacher_hidden[start : start + rows]
                torch.mm(teacher, x.teacher_weight.t(), out=logits[:n])
            torch.mm(hidden, x.weight.detach().t(), out=logits[:n])
            torch.mm(logits[:n], x.weight.detach(), out=by_hidden[:n])
            torch.mm(logits[:n].t(), hidden, out=by_weight)
        return logits[0, 0], (by_hidden, by_weight)

    return step


PRODUCTS, OURS = "products alone", "kdkernels"
CONTESTANTS: dict[str, dict[str, Callable[[Case], Step]]] = {
    "jsd": {
        PRODUCTS: _products,
        OURS: _ours,
        "eager": _eager,
        "checkpointed": _checkpointed,
        "Liger": _liger,
        "torch.compile": _compiled,
    },
    "ce": {PRODUCTS: _products, OURS: _ours, "eager": _eager, "torch chunked": _torch_ce},
}


def check(case: Case, name: str) -> dict[str, float]:
    """Relative errors of the gradients against float64 on a few rows of the case."""
    few = Case(case.loss, case.dtype, CHECKED_ROWS, case.hidden, case.vocab)
    inputs = make_inputs(few)
    true_loss, true = truth(few, inputs)
    loss, grads = CONTESTANTS[case.loss][name](few)(inputs)
    errors = {"loss": float((loss.double() - true_loss).abs() / true_loss)}
    for what, grad, want in zip(("hidden", "weight"), grads, true, strict=True):
        errors[what] = float((grad.double() - want).norm() / want.norm())
    strict = name == OURS and case.dtype == "bfloat16"
    allowed = OURS_IN_BFLOAT16 if strict else TOLERANCE[case.dtype]
    if not max(errors["hidden"], errors["weight"]) <= allowed:  # NaN fails too
        raise CheckFailed(f"{case.name}: {name}: relative errors {errors}; allowed: {allowed}")
    return errors


def measure(case: Case, names: list[str], rounds: int, with_memory: bool) -> dict[str, Any]:
    errors = {name: check(case, name) for name in names if name != PRODUCTS}
    inputs = make_inputs(case)
    steps = {name: CONTESTANTS[case.loss][name](case) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):  # one to warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step(inputs)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {"case": case.name, "flops": case.flops, "contestants": {}}
    for name, times in seconds.items():
        ours = [b / a for a, b in zip(seconds[OURS], times, strict=True)]
        floor = [b / a for a, b in zip(seconds[PRODUCTS], times, strict=True)]
        result["contestants"][name] = {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "of_products": statistics.median(floor),
            "of_ours": statistics.median(ours),
            "errors": errors.get(name),
        }
        if with_memory and name != PRODUCTS:
            result["contestants"][name]["peak_bytes"] = peak_memory(case, name)
    return result


def peak_memory(case: Case, name: str) -> int:
    """Bytes beyond inputs and gradients, at the peak of one call in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.linear", "--peak", json.dumps(asdict(case)), name]
    done = subprocess.run(command, cwd=run.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    inputs = make_inputs(case)
    return int(done.stdout) - sum(x.nbytes for x in (inputs.hidden, inputs.weight))


def _peak(case: Case, name: str) -> int:
    make = CONTESTANTS[case.loss][name]
    inputs = make_inputs(case)
    # Libraries and threads; what is compiled for one shape is compiled for this one.
    warm = case if name in ("torch.compile", "Liger") else Case(case.loss, case.dtype, 8, 16, 64)
    step = make(case)
    (step if warm is case else make(warm))(inputs if warm is case else make_inputs(warm))
    return memory.added_by(lambda: step(inputs))


def table(result: dict[str, Any]) -> str:
    rows = [[result["case"], "s", "× products", "× ours", "error: hidden", "weight", "peak MiB"]]
    for name, x in result["contestants"].items():
        errors = x["errors"] or {}
        rows.append(
            [
                name,
                report.number(x["seconds"]),
                report.number(x["of_products"]),
                report.number(x["of_ours"]),
                *(f"{errors[k]:.1e}" if errors else "-" for k in ("hidden", "weight")),
                f"{x['peak_bytes'] / MIB:.0f}" if "peak_bytes" in x else "-",
            ]
        )
    return report.aligned(rows)


def missing() -> dict[str, str]:
    """Contestants that cannot run here, and why."""
    absent = {}
    if importlib.util.find_spec("liger_kernel") is None:
        absent["Liger"] = "liger-kernel is not installed (pip install --no-deps liger-kernel)"
    if not hasattr(F, "linear_cross_entropy"):
        absent["torch chunked"] = f"torch {torch.__version__} has no linear_cross_entropy"
    return absent


parser = argparse.ArgumentParser(
    prog="python -m benchmarks.linear",
    description="linear_distillation_loss on SmolLM2's vocabulary against what people write today, "
    "and against its matrix products alone; errors against float64, seconds, peak memory.",
)
parser.add_argument("--loss", nargs="+", choices=["jsd", "ce"], default=["jsd", "ce"])
parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
parser.add_argument("--rows", nargs="+", type=int, default=[512, 4096])
parser.add_argument("--hidden", nargs="+", type=int, default=[576, 256])
parser.add_argument("--vocab", type=int, default=VOCAB)
parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants beside the first two")
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--memory", action="store_true", help="peak memory too: a process each")
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/linear.json"))
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
    absent = missing()
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    for loss in options.loss:
        names = [
            name
            for name in CONTESTANTS[loss]
            if name not in absent
            and (not options.only or name in (PRODUCTS, OURS) or name in options.only)
        ]
        for dtype in options.dtype:
            for hidden in options.hidden:
                for rows in options.rows:
                    case = Case(loss, dtype, rows, hidden, options.vocab)
                    try:
                        result = measure(case, names, options.rounds, options.memory)
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
