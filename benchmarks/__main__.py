"""python -m benchmarks: check, then time, ours against what people write today. See --help."""

import argparse
import json
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch

from . import report, run
from .cases import FULL, QUICK

parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description="Kernel microbenchmarks on the CPU: loss and student gradient, ours against eager "
    "PyTorch, torch.compile and torch.add. Every result is checked against float64 before anything "
    "is timed; a wrong one ends with status 1. Contestants are timed alternately. Prints a table "
    "and the thresholds, writes OUT.json and OUT.png.",
)
parser.add_argument("--quick", action="store_true", help="smaller cases, in less than a minute")
parser.add_argument(
    "--case",
    action="append",
    metavar="PATTERN",
    help="only cases whose name fits, as jsd/* or */bfloat16/*; may be repeated",
)
parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
parser.add_argument(
    "--seconds",
    type=float,
    help="for timing each case, at least 7 rounds (default 20; --quick 0.5)",
)
parser.add_argument("--threads", type=int, default=2, help="default 2")
parser.add_argument("--no-compile", action="store_true", help="without the torch.compile baseline")
parser.add_argument(
    "--out", type=Path, default=Path("runs/benchmarks/cpu"), help="default %(default)s"
)
parser.add_argument(
    "--markdown",
    type=Path,
    metavar="JSON",
    help="print the README's tables from such a file and end",
)


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    if options.markdown:
        print(report.markdown(json.loads(options.markdown.read_text())))
        return 0
    cases = QUICK if options.quick else FULL
    if options.case:
        cases = [c for c in cases if any(fnmatch(c.name, pattern) for pattern in options.case)]
        if not cases:
            parser.error(f"no case fits --case {' '.join(options.case)}; see --list")
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    # torch.compile writes the number of threads into its code.
    torch.set_num_threads(options.threads)
    seconds = options.seconds or (0.5 if options.quick else 20)

    results = run.environment(options.threads) | {"cases": [], "failed": []}
    print(report.machine_line(results))
    print(f"load average before the start: {results['machine']['load_average']:.1f}", flush=True)
    wanted = {name for case in cases for name in case.contestants}
    absent = {name: reason for name, reason in run.available().items() if reason and name in wanted}
    if options.no_compile:
        absent["torch.compile"] = "--no-compile"
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    for case in cases:
        print(flush=True)
        names = [name for name in case.contestants if name not in absent]
        try:
            result = run.run_case(case, names, seconds, options.threads)
        except run.CheckFailed as failure:
            results["failed"].append(str(failure))
            print(f"CHECK FAILED, not timed: {failure}")
            continue
        results["cases"].append(result)
        print(report.case_table(result))

    results["absent"] = absent
    results["thresholds"] = report.thresholds(results)
    print("\n" + report.threshold_table(results))
    table, picture = (options.out.with_name(options.out.name + end) for end in (".json", ".png"))
    run.save(results, table)
    print(f"\nwritten: {table}")
    if results["cases"]:
        run.write_whole(picture, report.plot(results))
        print(f"written: {picture}")
    if results["failed"]:
        print(f"{len(results['failed'])} of {len(cases)} cases failed their check")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
