"""Check, then time: what happens to one case.

Large cases run in a process of their own (this module is its program): which buffers the heap hands
out again without a page fault depends on what lived in it before, and a page fault costs more than
the loss.
"""

import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels import _ext

from .cases import (
    CONTESTANTS,
    TEMPERATURE,
    Case,
    Contestant,
    Inputs,
    Step,
    make_inputs,
    row_blocks,
    truth,
)

ROOT = Path(__file__).parents[1]
MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 7, 2000, 2

# Relative error allowed to the loss, and to the gradient of the worst row (Euclidean norm), against
# float64. Ours: float32 arithmetic, and one rounding to the logits' dtype at the end. Baselines:
# enough to know that it is the same function; the bfloat16 lines round intermediate results (JSD at
# 256x128256 under torch.compile: gradient off by 0.12).
TOLERANCE = {
    ("ours", "float32"): (1e-5, 1e-5),
    ("ours", "bfloat16"): (1e-5, 2**-8),
    ("baseline", "float32"): (1e-4, 1e-4),
    ("baseline", "bfloat16"): (0.1, 0.25),
}


class CheckFailed(Exception):
    """A contestant's loss or gradient is wrong; nothing of its case is timed."""


class Deadline:
    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def available(device: str = "cpu") -> dict[str, str | None]:
    """Every contestant: None, or why it cannot run here on that device's tensors."""
    return {name: _absent(c, device) for name, c in CONTESTANTS.items()}


def _absent(contestant: Contestant, device: str) -> str | None:
    if contestant.backend is not None:
        try:
            kdkernels.explain(torch.empty(1, 1, device=device), backend=contestant.backend)
        except (RuntimeError, ValueError) as refusal:
            return str(refusal)
    elif contestant.package and importlib.util.find_spec(contestant.package) is None:
        return f"the package {contestant.package} is not installed"
    return None


def run_case(case: Case, names: list[str], seconds: float, threads: int) -> dict[str, Any]:
    """All about one case, for the JSON; CheckFailed before any timing where a result is wrong."""
    if not case.large:
        return check_and_time(case, names, seconds)
    request = json.dumps([asdict(case), names, seconds, threads])
    result = json.loads(_child("benchmarks.run", request))
    if isinstance(result, str):
        raise CheckFailed(result)
    for name, contestant in result["contestants"].items():
        if name != "torch.add":
            contestant["peak_bytes"] = peak_memory(case, name, threads)
    return result


def check_and_time(case: Case, names: list[str], seconds: float) -> dict[str, Any]:
    steps = {name: CONTESTANTS[name].make(case) for name in names}
    inputs = make_inputs(case)
    errors = check(case, steps, inputs)
    others, start = _others_seconds(), time.perf_counter()
    samples = measure(steps, inputs, seconds)
    disturbance = (_others_seconds() - others) / (time.perf_counter() - start)
    contestants = {}
    for name, (times, faults) in samples.items():
        p20, p50, p80 = quantiles(times)
        contestants[name] = {
            "allocation": CONTESTANTS[name].allocation,
            **errors[name],
            "ms": {"p20": p20 * 1e3, "p50": p50 * 1e3, "p80": p80 * 1e3},
            "ns_per_element": p50 * 1e9 / case.elements,
            "gb_per_s": case.bytes / p50 / 1e9,
            "page_faults": statistics.median(faults),
        }
        if case.profile:
            contestants[name]["ops"] = count_ops(steps[name], inputs)
    return {
        "case": case.name,
        "survey": case.survey,
        "divergence": case.divergence,
        "dtype": case.dtype,
        "rows": case.rows,
        "vocab": case.vocab,
        "temperature": TEMPERATURE,
        "bytes": case.bytes,
        "gradient_bytes": case.gradient_bytes,
        "rounds": len(next(iter(samples.values()))[0]),
        "disturbance": disturbance,
        "contestants": contestants,
        "ratios": ratios({name: times for name, (times, _) in samples.items()}),
    }


def check(case: Case, steps: dict[str, Step], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Relative errors of every contestant against float64; raises CheckFailed beyond TOLERANCE."""
    true_loss, true_gradient = truth(case, inputs)
    errors: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        loss, gradient = step(inputs.student.clone(), inputs)
        if name == "torch.add":
            errors[name] = {}
            continue
        rows = [
            (gradient[rows].double() - true_gradient[rows]).norm(dim=1)
            / true_gradient[rows].norm(dim=1)
            for rows in row_blocks(case)
        ]
        found = (
            float((loss.detach().double() - true_loss).abs() / true_loss.abs()),
            float(torch.cat(rows).max()),
        )
        whose = "baseline" if CONTESTANTS[name].backend is None else "ours"
        allowed = TOLERANCE[whose, case.dtype]
        for what, error, limit in zip(("loss", "gradient"), found, allowed, strict=True):
            if not error <= limit:  # NaN fails too
                raise CheckFailed(
                    f"{case.name}: {name}: relative error of the {what} {error:.2g}; "
                    f"allowed: {limit:.2g}"
                )
        errors[name] = {"loss_error": found[0], "gradient_error": found[1]}
    return errors


def measure(
    steps: dict[str, Step], inputs: Inputs, seconds: float
) -> dict[str, tuple[list[float], list[int]]]:
    """Seconds and page faults of every call, alternately (A B C A B C ...) until the time is spent.

    Outside the timed part: the clone that makes the student logits, which in place they are gone
    after each call and which every contestant gets alike; and letting go of the gradient. Inside:
    everything else, the page faults of whatever a contestant allocates included.
    """
    samples: dict[str, tuple[list[float], list[int]]] = {name: ([], []) for name in steps}
    gc.collect()
    gc.disable()
    try:
        rounds, deadline = -WARM_UP, time.perf_counter() + seconds
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < deadline):
            for name, step in steps.items():
                student = inputs.student.clone()
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = time.perf_counter()
                result = step(student, inputs)
                stop = time.perf_counter()
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
                del result, student
                if rounds >= 0:
                    samples[name][0].append(stop - start)
                    samples[name][1].append(faults)
            rounds += 1
    finally:
        gc.enable()
    return samples


def _others_seconds() -> float:
    """Processor seconds that everybody but this process has used:
    timings mean little where it grows.
    """
    with open("/proc/stat") as stat:
        user, nice, system, idle, iowait, *interrupts = map(int, stat.readline().split()[1:9])
    ticks = user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def ratios(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every baseline's time over every one of ours, round by round:
    a slow second hits both alike.
    """
    result = []
    for baseline in times:
        for ours in times:
            if CONTESTANTS[baseline].backend is None and CONTESTANTS[ours].backend is not None:
                pairs = [b / o for b, o in zip(times[baseline], times[ours], strict=True)]
                p20, p50, p80 = quantiles(pairs)
                result.append(
                    {"baseline": baseline, "ours": ours, "p20": p20, "p50": p50, "p80": p80}
                )
    return result


def count_ops(step: Step, inputs: Inputs) -> dict[str, int]:
    """Ops of one loss and gradient, as ``ops_of`` counts."""
    student = inputs.student.clone()
    return ops_of(lambda: step(student, inputs))


def ops_of(call: Callable[[], object]) -> dict[str, int]:
    """Ops of a call in PyTorch's dispatcher, by name; none that another called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def is_op(event: Any) -> bool:
        return "::" in event.name and not event.name.startswith(("autograd::", "c10::"))

    def inside_op(event: Any) -> bool:
        parent = event.cpu_parent
        return parent is not None and (is_op(parent) or inside_op(parent))

    events = profile.events() or []
    return dict(Counter(e.name for e in events if is_op(e) and not inside_op(e)))


def peak_memory(case: Case, contestant: str, threads: int) -> int:
    """Bytes beyond the inputs, from a fresh process: see memory.py."""
    arguments = (case.divergence, case.dtype, case.rows, case.vocab, contestant, threads)
    return int(_child("benchmarks.memory", *map(str, arguments)))


def _child(module: str, *arguments: str) -> str:
    """What a fresh process with this module as its program prints."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


# ---- where and when ----


def environment(threads: int) -> dict[str, Any]:
    """Date, commit, machine and versions."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": _git("diff", "--name-only", "HEAD", "--", ".", ":!benchmarks/results"),
        "threads": threads,
        "machine": {
            "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "isa": _ext.cpu_level(),
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "transparent_hugepages": _huge_pages(),
            "load_average": os.getloadavg()[0],
            "system": platform.platform(),
        },
        "versions": {
            "kdkernels": kdkernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _git(*arguments: str) -> str | None:
    """What git says, or None outside a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _first(path: str, key: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return None


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "not built in"


def write_whole(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save(results: dict[str, Any], path: Path) -> None:
    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    fields, names, seconds, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    try:
        print(json.dumps(check_and_time(Case(**fields), names, seconds)))
    except CheckFailed as failure:
        print(json.dumps(str(failure)))
