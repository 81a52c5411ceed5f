"""The loss of two heads, from hidden states to the gradients of the student's: linear_distillation_
loss against the lines people write today, and against its own matrix products alone.

    python -m benchmarks.linear --help

A contestant takes (student hidden, student weight, teacher hidden, teacher weight, labels) and
returns the loss and the gradients of the first two. Each is checked against float64 on 32 rows of
the case before anything of it is timed, at most TOLERANCE away, and its error there is part of the
result. They are timed alternately, on inputs that exist; what a contestant allocates is inside. A
ratio is the median of the rounds' ratios.

In bfloat16 the peers round the logits. Equal accuracy means: a gradient error at most twice ours.
Peers that have it must be slower in every case; those that have not are shown with their error, and
beside each is the same code on float32 copies of its inputs, made inside what is timed.

A case that the file of --out holds is not measured again (--again does), so that a run can be made
in pieces; each case says when it ran and at what load. All of it:

    python -m benchmarks.linear --memory --scaling --out benchmarks/results/linear.json
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels.ops.linear_distillation_loss import bfloat16_product

from . import memory, report, run
from .run import CheckFailed

MIB = 2**20
VOCAB, TEACHER_HIDDEN = 49152, 576  # SmolLM2-135M
CHECKED_ROWS = 32
# Relative error of a gradient (Euclidean norm). Baselines in bfloat16 have one only so that it is
# known to be the same function.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
OURS_IN_BFLOAT16 = 0.003
EQUAL_ACCURACY = 2.0  # times our error
# Of the products alone, at JUDGED_ROWS. bfloat16: with a float32 product of the CPU's, and without.
OF_PRODUCTS = {"float32": 1.12, "bfloat16": 1.5}
OF_PRODUCTS_PLAIN = 2.2
JUDGED_ROWS = 4096
PEAK = 256 * MIB  # beyond inputs and gradients
SCALING_ROWS = [2**i for i in range(8, 17)]
SCALING_SPREAD = 1.15  # slowest over fastest time a token


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


def _in_float32(make: Callable[[Case], Step]) -> Callable[[Case], Step]:
    """The same on float32 copies of the inputs, gradients rounded by autograd: float32 logits."""

    def made(case: Case) -> Step:
        step = make(case)

        def on_copies(x: Inputs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            copies = Inputs(*(t.detach().float() if t.is_floating_point() else t for t in x))
            copies.hidden.requires_grad_()
            copies.weight.requires_grad_()
            loss, (by_hidden, by_weight) = step(copies)
            return loss, (by_hidden.to(x.hidden.dtype), by_weight.to(x.weight.dtype))

        return on_copies

    return made


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
IN_FLOAT32 = ", float32"
for contestants in CONTESTANTS.values():
    peers = [name for name in contestants if name not in (PRODUCTS, OURS)]
    contestants |= {name + IN_FLOAT32: _in_float32(contestants[name]) for name in peers}


def names_of(case: Case, only: list[str] | None = None) -> list[str]:
    """Contestants of a case that can run here, ours first."""
    absent = missing()
    return [
        name
        for name in CONTESTANTS[case.loss]
        if name.removesuffix(IN_FLOAT32) not in absent
        and not (name.endswith(IN_FLOAT32) and case.dtype == "float32")
        and (not only or name in (PRODUCTS, OURS) or name.removesuffix(IN_FLOAT32) in only)
    ]


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
    result: dict[str, Any] = _when() | {"case": case.name, "flops": case.flops, "contestants": {}}
    inputs = make_inputs(case)
    steps = {name: CONTESTANTS[case.loss][name](case) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):  # one to warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step(inputs)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    result["load_average"].append(os.getloadavg()[0])
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


def scale(case: Case, rounds: int, with_memory: bool) -> dict[str, Any]:
    """Our time a token at one number of rows, and the peak."""
    inputs, step = make_inputs(case), _ours(case)
    result: dict[str, Any] = _when() | {"case": case.name, "rows": case.rows, "dtype": case.dtype}
    times: list[float] = []
    for number in range(-1, rounds):
        start = time.perf_counter()
        step(inputs)
        if number >= 0:
            times.append(time.perf_counter() - start)
    result |= {"seconds": statistics.median(times), "fastest": min(times)}
    result["us_per_token"] = result["seconds"] / case.rows * 1e6
    result["load_average"].append(os.getloadavg()[0])
    if with_memory:
        result["peak_bytes"] = peak_memory(case, OURS)
    return result


def _when() -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "date": now,
        "commit": run._git("rev-parse", "HEAD"),
        "load_average": [os.getloadavg()[0]],
    }


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
    compiles = name.removesuffix(IN_FLOAT32) in ("torch.compile", "Liger")
    warm = case if compiles else Case(case.loss, case.dtype, 8, 16, 64)
    step = make(case)
    (step if warm is case else make(warm))(inputs if warm is case else make_inputs(warm))
    return memory.added_by(lambda: step(inputs))


COLUMNS = ["s", "× products", "× ours", "error: hidden", "weight", "peak MiB"]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """A line for each contestant of a case."""
    rows = []
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
    return rows


def table(result: dict[str, Any]) -> str:
    return report.aligned([[result["case"], *COLUMNS], *rows_of(result)])


def _worst(contestant: dict[str, Any]) -> float:
    return max(contestant["errors"]["hidden"], contestant["errors"]["weight"])


def thresholds(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the results must keep, one entry each: met or not, or None where it is not asked."""
    entries: list[dict[str, Any]] = []

    def entry(case: str, what: str, measured: float, relation: str, limit: float, asked=True):
        met = measured <= limit if relation == "<=" else measured > limit
        entries.append(
            {
                "case": case,
                "what": what,
                "measured": measured,
                "relation": relation,
                "limit": limit,
                "met": met if asked else None,
            }
        )

    for result in results["cases"].values():
        found, case = result["contestants"], result["case"]
        loss, dtype, shape = case.split("/")
        ours = found[OURS]
        if loss == "jsd" and shape.startswith(f"{JUDGED_ROWS}x"):
            plain = dtype == "bfloat16" and "slow" in results["bfloat16_product"]
            limit = OF_PRODUCTS_PLAIN if plain else OF_PRODUCTS[dtype]
            entry(case, f"{OURS} / {PRODUCTS}", ours["of_products"], "<=", limit)
        for name, x in found.items():
            if name in (PRODUCTS, OURS):
                continue
            times = _worst(x) / _worst(ours)
            what = f"{name} / {OURS}"
            if times > EQUAL_ACCURACY:
                what += f" (not asked: its error is {times:.0f} times ours)"
            entry(case, what, x["of_ours"], ">", 1.0, times <= EQUAL_ACCURACY)
        if "peak_bytes" in ours:
            entry(case, "peak MiB", ours["peak_bytes"] / MIB, "<=", PEAK / MIB)
    by_dtype: dict[str, list[dict[str, Any]]] = {}
    for point in results["scaling"].values():
        by_dtype.setdefault(point["dtype"], []).append(point)
    for dtype, points in by_dtype.items():
        per_token = [point["us_per_token"] for point in points]
        rows = f"{min(p['rows'] for p in points)} to {max(p['rows'] for p in points)} rows"
        slowest = max(per_token) / min(per_token)
        entry(f"scaling, {dtype}, {rows}", "slowest / fastest", slowest, "<=", SCALING_SPREAD)
        peaks = [point["peak_bytes"] for point in points if "peak_bytes" in point]
        if peaks:
            entry(f"scaling, {dtype}, {rows}", "peak MiB", max(peaks) / MIB, "<=", PEAK / MIB)
    return entries


def verdicts(entries: list[dict[str, Any]]) -> str:
    words = {True: "met", False: "MISSED", None: "-"}
    rows = [["case", "what", "measured", "asked", ""]]
    for x in entries:
        asked = f"{x['relation']} {x['limit']:g}"
        rows.append([x["case"], x["what"], report.number(x["measured"]), asked, words[x["met"]]])
    return report.aligned(rows)


def scaling_rows(results: dict[str, Any]) -> list[list[str]]:
    points = sorted(results["scaling"].values(), key=lambda p: (p["dtype"], p["rows"]))
    return [
        [
            p["dtype"],
            str(p["rows"]),
            report.number(p["seconds"]),
            report.number(p["us_per_token"]),
            f"{p['peak_bytes'] / MIB:.0f}" if "peak_bytes" in p else "-",
            f"{p['load_average'][0]:.1f}",
        ]
        for p in points
    ]


SCALING_COLUMNS = ["dtype", "rows", "s", "µs a token", "peak MiB", "load average"]


def markdown(results: dict[str, Any]) -> str:
    """The file beside the JSON."""

    def lines(header: list[str], rows: list[list[str]]) -> list[str]:
        rule = ["---"] + ["---:"] * (len(header) - 1)
        return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)] + [""]

    text = ["# linear_distillation_loss on the CPU", "", report.machine_line(results), ""]
    text += [f"bfloat16 product: {results['bfloat16_product']}. Made by `benchmarks.linear`.", ""]
    text += [f"Not measured: {name}: {why}." for name, why in results["missing"].items()]
    for result in results["cases"].values():
        load = " to ".join(f"{x:.1f}" for x in result["load_average"])
        text += ["", f"## {result['case']} (load average {load})", ""]
        text += lines(["", *COLUMNS], rows_of(result))
    if results["scaling"]:
        text += ["", "## Scaling", "", *lines(SCALING_COLUMNS, scaling_rows(results))]
    words = {True: "met", False: "**missed**", None: "not asked"}
    entries = [
        [
            x["case"],
            x["what"],
            report.number(x["measured"]),
            f"{x['relation']} {x['limit']:g}",
            words[x["met"]],
        ]
        for x in thresholds(results)
    ]
    text += ["## Thresholds", "", *lines(["case", "what", "measured", "asked", ""], entries)]
    return "\n".join(text).rstrip() + "\n"


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
parser.add_argument("--scaling", action="store_true", help="our time a token at 256 to 65536 rows")
parser.add_argument("--scaling-rows", nargs="+", type=int, default=SCALING_ROWS)
parser.add_argument("--no-cases", action="store_true", help="nothing but --scaling")
parser.add_argument("--again", action="store_true", help="also what the file of --out holds")
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/linear.json"))
parser.add_argument("--peak", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)


def _results(options: argparse.Namespace) -> dict[str, Any]:
    """Of this run, with what the file already holds of the same machine and versions."""
    results = run.environment(options.threads)
    results["bfloat16_product"] = bfloat16_product()
    results["missing"] = missing()
    if "Liger" not in results["missing"]:
        results["versions"]["liger-kernel"] = importlib.metadata.version("liger-kernel")
    results |= {"cases": {}, "scaling": {}, "failed": []}
    if not options.out.exists():
        return results
    kept = json.loads(options.out.read_text())
    for where in (("threads",), ("machine", "cpu"), ("versions", "torch")):
        before, now = kept, results
        for key in where:
            before, now = before[key], now[key]
        if before != now:
            raise SystemExit(
                f"{options.out} was measured with {' '.join(where)} {before}, here it is {now}; "
                "accepted: the same, or another --out"
            )
    return results | {"cases": kept["cases"], "scaling": kept["scaling"]}


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(_peak(Case(**json.loads(options.peak[0])), options.peak[1]))
        return 0
    results = _results(options)
    print(report.machine_line(results))
    print(f"load average before the start: {results['machine']['load_average']:.1f}")
    print(f"bfloat16 product: {results['bfloat16_product']}", flush=True)
    for name, reason in results["missing"].items():
        print(f"not measured: {name}: {reason}")

    def save() -> None:
        results["thresholds"] = thresholds(results)
        run.save(results, options.out)
        run.write_whole(options.out.with_suffix(".md"), markdown(results).encode())

    cases = [
        Case(loss, dtype, rows, hidden, options.vocab)
        for loss in options.loss
        for dtype in options.dtype
        for hidden in options.hidden
        for rows in options.rows
    ]
    for case in [] if options.no_cases else cases:
        if case.name in results["cases"] and not options.again:
            print(f"in {options.out} already: {case.name}")
            continue
        try:
            result = measure(case, names_of(case, options.only), options.rounds, options.memory)
        except CheckFailed as failure:
            results["failed"].append(str(failure))
            print(f"CHECK FAILED, not timed: {failure}")
            continue
        results["cases"][case.name] = result
        print("\n" + table(result), flush=True)
        save()
    for dtype in options.dtype if options.scaling else []:
        for rows in options.scaling_rows:
            case = Case("jsd", dtype, rows, options.hidden[0], options.vocab)
            if case.name in results["scaling"] and not options.again:
                print(f"in {options.out} already: scaling, {case.name}")
                continue
            # A minute or more each at the far end.
            rounds = max(1, min(options.rounds, 8 * 4096 // rows))
            point = results["scaling"][case.name] = scale(case, rounds, options.memory)
            print(f"scaling, {case.name}: {point['us_per_token']:.0f} µs a token", flush=True)
            save()
    save()
    if results["scaling"]:
        print("\n" + report.aligned([SCALING_COLUMNS, *scaling_rows(results)]))
    if results["thresholds"]:
        print("\n" + verdicts(results["thresholds"]))
    print(f"\nwritten: {options.out} and {options.out.with_suffix('.md').name}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
