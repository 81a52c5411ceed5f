"""python -m benchmarks.gpu: on a machine with a GPU, check every kernel, then time it. See --help.

On a machine without a network that has torch, Triton, g++ and nvcc:

    export CUDA_HOME=/usr/local/cuda
    KDKERNELS_CUDA=1 pip install --no-build-isolation --no-deps -e .
    python -m benchmarks.gpu

or, without installing, ``KDKERNELS_CUDA=1 python setup.py build_ext --inplace`` in place of pip;
both need setuptools 77 or newer.
``TORCH_CUDA_ARCH_LIST=9.0`` builds for one architecture, in a fraction of the time. Without nvcc
leave the build out: Triton's kernels need none, and what is missing is said.

What a time is: the device's, between two CUDA events around one loss and gradient. Before the first
event the L2 cache is overwritten and the device kept busy, so that the host has queued the whole
call before it starts; what the host itself takes is a column of its own. A case whose host time is
longer than the device was kept busy is marked, because its time then holds waits for the host.
"""

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import kdkernels

from . import gpu_checks, gpu_linear, report, roofline, run
from .cases import CONTESTANTS, GPU, GPU_QUICK, TEMPERATURE, Case, Inputs, Step, make_inputs

# Seconds. Together with starting and plotting under eight minutes.
CHECKS, TIMINGS = 240, 200
BACKENDS = ("cpp", "triton")
BUSY_CYCLES = 4_000_000  # about 2 ms, in which the host queues a call

parser = argparse.ArgumentParser(
    prog="python -m benchmarks.gpu",
    description="Checks every CUDA and Triton kernel against float64 on this machine's GPU, then "
    "times them against eager PyTorch, torch.compile, Liger-Kernel and torch.add, and compares "
    "with the predictions of python -m benchmarks.roofline. Under 8 minutes. Prints tables, writes "
    "OUT.json and OUT.png. Ends with 1 where a check fails or was not made, 2 where there is no "
    "GPU or nothing to measure.",
)
parser.add_argument("--quick", action="store_true", help="one dtype and few cases: a minute or two")
parser.add_argument(
    "--case",
    action="append",
    metavar="PATTERN",
    help="only checks (jsd/bfloat16) and cases (jsd/bfloat16/2048x32000) that fit, as jsd/*",
)
parser.add_argument("--list", action="store_true", help="print checks and cases and end")
parser.add_argument("--seconds", type=float, help="for timing each case (default 3; --quick 1)")
parser.add_argument(
    "--out", type=Path, default=Path("runs/benchmarks/gpu"), help="default %(default)s"
)


class DeviceClock:
    """Times calls on the device. Made once: it owns the memory that pushes the inputs out of L2."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(max(2 * l2, 2**28), dtype=torch.uint8, device="cuda")

    def prepare(self) -> None:
        self.flush.zero_()
        torch.cuda._sleep(BUSY_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def busy_seconds(self) -> float:
        """How long `prepare` keeps the device busy."""
        times = []
        for _ in range(5):
            start = self.mark()
            torch.cuda._sleep(BUSY_CYCLES)
            stop = self.mark()
            self.wait()
            times.append(start.elapsed_time(stop) / 1e3)
        return sorted(times)[2]


Samples = dict[str, tuple[list[float], list[float]]]  # seconds of the device, and of the host


def measure(steps: dict[str, Step], inputs: Inputs, seconds: float, clock: DeviceClock) -> Samples:
    """Alternately (A B C A B C ...), at least run.MIN_ROUNDS, until the time is spent."""
    samples: Samples = {name: ([], []) for name in steps}
    gc.collect()
    gc.disable()
    try:
        rounds, deadline = -run.WARM_UP, run.Deadline(seconds)
        while rounds < run.MIN_ROUNDS or (rounds < run.MAX_ROUNDS and deadline.left() > 0):
            marks = {}
            for name, step in steps.items():
                student = inputs.student.clone()
                clock.prepare()
                start = clock.mark()
                host = time.perf_counter()
                result = step(student, inputs)
                host = time.perf_counter() - host
                marks[name] = (start, clock.mark(), host)
                del result, student
            clock.wait()
            for name, (start, stop, host) in marks.items():
                if rounds >= 0:
                    samples[name][0].append(start.elapsed_time(stop) / 1e3)
                    samples[name][1].append(host)
            rounds += 1
    finally:
        gc.enable()
    return samples


def time_case(case: Case, names: list[str], seconds: float, clock: DeviceClock) -> dict[str, Any]:
    """CheckFailed before any timing where a result is wrong."""
    inputs = make_inputs(case, gpu_checks.DEVICE)
    if case.divergence == gpu_checks.SOFTMAX:
        steps = {name: softmax_step(name) for name in names}
        errors = check_softmax(case, steps, inputs)
        # Forward: logits read, output written; backward: output and upstream read, one written.
        moved = 5 * case.gradient_bytes
    else:
        steps = {name: CONTESTANTS[name].make(case) for name in names}
        errors, moved = run.check(case, steps, inputs), case.bytes
    samples = measure(steps, inputs, seconds, clock)
    contestants = {}
    for name, (times, host) in samples.items():
        p20, p50, p80 = run.quantiles(times)
        contestants[name] = {
            "allocation": CONTESTANTS[name].allocation,
            **errors[name],
            "ms": {"p20": p20 * 1e3, "p50": p50 * 1e3, "p80": p80 * 1e3},
            "host_ms": run.quantiles(host)[1] * 1e3,
            "gb_per_s": moved / p50 / 1e9,
        }
    return {
        "case": case.name,
        "survey": case.survey,
        "divergence": case.divergence,
        "dtype": case.dtype,
        "rows": case.rows,
        "vocab": case.vocab,
        "temperature": TEMPERATURE,
        "bytes": moved,
        "rounds": len(next(iter(samples.values()))[0]),
        "contestants": contestants,
        "ratios": run.ratios({name: times for name, (times, _) in samples.items()}),
    }


def softmax_step(contestant: str) -> Step:
    """Softmax and its gradient with the teacher's logits as the upstream one."""
    backend = CONTESTANTS[contestant].backend

    def softmax(x: Tensor) -> Tensor:
        if backend is None:
            return torch.softmax(x / TEMPERATURE, -1)
        return kdkernels.softmax(x, temperature=TEMPERATURE, backend=backend)

    def step(student: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        y = softmax(student)
        return y, torch.autograd.grad(y, student, inputs.teacher)[0]

    return step


def check_softmax(
    case: Case, steps: dict[str, Step], inputs: Inputs
) -> dict[str, dict[str, float]]:
    """As run.check; the output stands for the loss. Its gradient starts from a rounded output."""
    x = inputs.student.detach().double().requires_grad_()
    y = torch.softmax(x / TEMPERATURE, -1)
    truth = (y.detach(), torch.autograd.grad(y, x, inputs.teacher.double())[0])
    errors = {}
    for name, step in steps.items():
        got = step(inputs.student.clone(), inputs)
        found = [
            float(((g.detach().double() - t).norm(dim=1) / t.norm(dim=1)).max())
            for g, t in zip(got, truth, strict=True)
        ]
        whose = "baseline" if CONTESTANTS[name].backend is None else "ours"
        limit = 4 * run.TOLERANCE[whose, case.dtype][1]
        if not max(found) <= limit:
            raise run.CheckFailed(f"{case.name}: {name}: {max(found):.2g}; allowed: {limit:.2g}")
        errors[name] = {"loss_error": found[0], "gradient_error": found[1]}
    return errors


def device_copy(clock: DeviceClock, size: int = 2**30) -> float:
    """Bytes a second that a copy within device memory reads and writes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for _ in range(10):
        clock.prepare()
        start = clock.mark()
        target.copy_(source)
        stop = clock.mark()
        clock.wait()
        times.append(start.elapsed_time(stop) / 1e3)
    return 2 * size / run.quantiles(times)[1]


def environment() -> dict[str, Any]:
    """Date, commit, device and versions."""
    properties = torch.cuda.get_device_properties(0)
    found = run.environment(torch.get_num_threads())
    found["machine"]["gpu"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }
    found["versions"] |= {
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "liger_kernel": _version("liger_kernel"),
    }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The calls that a contestant makes, by the names of roofline's counts.
CALLS = {"fresh": ("forward", "backward"), "one pass": ("one pass",), "in place": ("one pass",)}


def predictions(case: Case, gpu: str) -> dict[str, dict[str, float]]:
    """Contestant to the milliseconds that python -m benchmarks.roofline predicts on this GPU from
    its stored counts, with the model's error bar; those counts are of bfloat16 logits.
    """
    # The longest name that fits: "H100 PCIe" is no "H100".
    card = max((name for name in roofline.CARDS if name in gpu), key=len, default=None)
    if card is None or case.dtype != "bfloat16":
        return {}
    calibration = json.loads(roofline.CALIBRATION.read_text())
    parameters, bar = roofline.stored_parameters(calibration), roofline.error_bar(calibration)
    works, arch = roofline.Counts().works, roofline.CARDS[card].arch
    found = {}
    for name in case.contestants:
        contestant = CONTESTANTS[name]
        if contestant.backend is None:
            continue
        keys = [
            roofline.our_key(
                contestant.backend, case.divergence, {"mode": call, "columns": case.vocab}, arch
            )
            for call in CALLS[name.split(", ")[1]]
        ]
        if all(key in works for key in keys):
            calls = [works[key].scaled(case.rows / roofline.ROWS) for key in keys]
            cost = [roofline.predict(call, roofline.CARDS[card], parameters) for call in calls]
            ms = 1e3 * sum(prediction.seconds for prediction in cost)
            found[name] = {"ms": ms, "low": ms / bar, "high": ms * bar}
    return found


def refusal() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no CUDA device: torch {torch.__version__} (built {built}) sees none"
    return None


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    cases = GPU_QUICK if options.quick else GPU
    linear: tuple[gpu_linear.LinearCase, ...] = gpu_linear.CASES
    if options.quick:
        linear = gpu_linear.QUICK
    groups = [g for g in gpu_checks.groups() if not options.quick or g.dtype == "bfloat16"]
    if options.case:

        def fits(name: str) -> bool:
            return any(fnmatch(name, pattern) for pattern in options.case)

        cases = [case for case in cases if fits(case.name)]
        linear = tuple(case for case in linear if fits(case.name))
        groups = [group for group in groups if fits(group.name)]
        if not cases and not groups and not linear:
            parser.error(f"nothing fits --case {' '.join(options.case)}; see --list")
    if options.list:
        checks = [f"check {group.name}" for group in groups]
        print("\n".join([*checks, *(c.name for c in cases), *(c.name for c in linear)]))
        return 0
    reason = refusal()
    available = {} if reason else run.available(gpu_checks.DEVICE)
    absent = {name: why for name, why in available.items() if why}
    backends = [b for b in BACKENDS if f"{b}, fresh" not in absent]
    if not reason and not backends:
        reason = "; ".join(f"{b}: {absent[f'{b}, fresh']}" for b in BACKENDS)
    if reason:
        print(f"python -m benchmarks.gpu has nothing to measure: {reason}", file=sys.stderr)
        return 2
    seconds = options.seconds or (1 if options.quick else 3)
    return measure_all(cases, groups, backends, absent, seconds, options.out, linear)


def time_linear(
    results: dict[str, Any],
    linear: tuple[gpu_linear.LinearCase, ...],
    seconds: float,
    clock: DeviceClock,
    deadline: run.Deadline,
) -> None:
    """linear_distillation_loss, into results["linear"]."""
    results["linear"] = []

    def alternately(steps: dict[str, Any]) -> Samples:
        ignoring: Any = {name: lambda _student, _inputs, s=s: s() for name, s in steps.items()}
        nothing: Any = SimpleNamespace(student=torch.empty(0))
        return measure(ignoring, nothing, seconds, clock)

    for case in linear:
        print(flush=True)
        if deadline.left() < 0:
            results["not_timed"].append(case.name)
            print(f"not timed: {case.name}: the {TIMINGS} seconds for timings are spent")
            continue
        try:
            result = gpu_linear.time_case(case, alternately, gpu_checks.DEVICE)
        except (run.CheckFailed, RuntimeError) as failure:  # a kernel's error, or out of memory
            results["failed"].append(str(failure))
            print(f"FAILED, not timed: {case.name}: {failure}")
            continue
        results["linear"].append(result)
        print(gpu_linear.table(result))


def measure_all(
    cases: list[Case],
    groups: list[gpu_checks.Group],
    backends: list[str],
    absent: dict[str, str],
    seconds: float,
    out: Path,
    linear: tuple[gpu_linear.LinearCase, ...] = (),
) -> int:
    begin = time.monotonic()
    table, picture = (out.with_name(out.name + end) for end in (".json", ".png"))
    results = environment() | {"absent": absent, "cases": [], "failed": [], "not_timed": []}
    print(report.machine_line(results))
    for name, why in absent.items():
        if any(name in case.contestants for case in cases):
            print(f"not measured: {name}: {why}")

    print(f"\nchecking {', '.join(backends)} against float64: {len(groups)} groups", flush=True)
    checks = gpu_checks.run_all(groups, backends, CHECKS, gpu_checks.DEVICE, gpu_checks.SHAPES)
    results["failed"] += [c.text for found in checks.values() for c in found if not c.passed]
    results["checks"] = {
        name: {
            "checks": len(found),
            "failed": [asdict(c) for c in found if not c.passed],
            "worst": asdict(max(found, key=lambda c: c.error / c.limit if c.limit else 0)),
        }
        for name, found in checks.items()
    }
    print(report.check_table(results))
    run.save(results, table)

    clock = DeviceClock()
    results["busy_ms"] = clock.busy_seconds() * 1e3
    results["copy_gb_per_s"] = device_copy(clock) / 1e9
    print(f"\ndevice copy: {results['copy_gb_per_s']:.0f} GB/s read and written")
    if not any(predictions(case, results["machine"]["gpu"]["name"]) for case in cases):
        print("python -m benchmarks.roofline has no prediction of these cases on this GPU")
    deadline = run.Deadline(TIMINGS)
    for case in cases:
        print(flush=True)
        if deadline.left() < 0:
            results["not_timed"].append(case.name)
            print(f"not timed: {case.name}: the {TIMINGS} seconds for timings are spent")
            continue
        names = [name for name in case.contestants if name not in absent]
        try:
            result = time_case(case, names, seconds, clock)
        except (run.CheckFailed, RuntimeError) as failure:  # a kernel's error, or out of memory
            results["failed"].append(str(failure))
            print(f"FAILED, not timed: {case.name}: {failure}")
            continue
        for name, expected in predictions(case, results["machine"]["gpu"]["name"]).items():
            if name in result["contestants"]:
                result["contestants"][name]["predicted_ms"] = expected
        results["cases"].append(result)
        run.save(results, table)
        print(report.gpu_table(result, results))

    time_linear(results, linear, seconds, clock, deadline)
    results["seconds"] = time.monotonic() - begin
    run.save(results, table)
    print(f"\nwritten: {table}")
    if results["cases"]:
        try:
            plotted = report.plot(results)
        except ImportError as error:  # the machine it is for has no network to install one from
            print(f"no picture: {error}")
        else:
            run.write_whole(picture, plotted)
            print(f"written: {picture}")
    failed = len(results["failed"])
    verdict = f"{failed} FAILED" if failed else "every check passed"
    print(f"{verdict}; {len(results['not_timed'])} cases not timed; {results['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
