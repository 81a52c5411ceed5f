"""`python -m benchmarks.roofline`: what the kernels would do on real cards, predicted from counts.

No GPU is used and nothing is timed. Kernels are run on the CPU through ptxrun to count what they do
(roofline_counts.py); a roofline model (roofline_model.py) makes times of the counts; and
`--calibrate` fits and judges the model by published timings of Liger-Kernel's kernels on real
cards, so that every prediction comes with the error that the model made where the truth is known.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from . import roofline_counts as counting
from . import roofline_linear
from .roofline_model import (
    CARDS,
    HOST_BOUND,
    PREDICTED_CARDS,
    Parameters,
    Point,
    Work,
    error,
    fit,
    host_bound,
    predict,
    quantile,
    summary,
    unseen_kernels,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COUNTS = RESULTS / "roofline_counts.json"
CALIBRATION = RESULTS / "roofline_calibration.json"
PREDICTIONS = RESULTS / "roofline.md"
PUBLISHED = ROOT.parent / "shared" / "field" / "data" / "published_gpu_timings.csv"

# That are run; everything counted grows with the rows (a test holds it). RMSNorm's weight does not:
# more rows, so that its part is small.
ROWS = 2
NORM_ROWS = 64

CARD_OF = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA B200": "B200",
}
# Where the version that a timing names has no such kernel, it was timed from a checkout on the way
# to the next release; the first release that has the kernel is counted. For kl_div that would be
# 0.3.0, whose forward writes past the end of its losses; 0.3.1 does not, and moves the same bytes.
# tvd was timed on the day of Liger's pull request 1127 (2026-03-03), which took two sweeps out of
# its forward and was released in 0.8.0.
FIRST_RELEASE = {
    ("kl_div", "0.2.1"): "0.3.1",
    ("jsd", "0.3.1"): "0.4.0",
    ("tvd", "0.7.0"): "0.8.0",
}
VOCABULARIES = {
    "llama_2_7b": 32000,
    "llama_3_8b": 128256,
    "qwen2.5_7b": 152064,
    "qwen2.5_14b": 152064,
    "qwen2.5_72b": 152064,
    "deepseek_v2_lite": 102400,
    "deepseek_v3": 129280,
}
KERNELS = ("cross_entropy", "kl_div", "jsd", "tvd", "softmax", "rms_norm")
LEFT_OUT = (
    "fused_linear_cross_entropy, fused_linear_jsd and distill_jsd_loss are left out: most of their "
    "time is matrix products of cuBLAS, which nothing here counts; the RTX 3090 is no card of the "
    "table."
)


class Counts:
    """The stored counts, and those that are missing made and stored."""

    def __init__(self, path: Path = COUNTS):
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.works = {key: Work.from_json(work) for key, work in stored.items()}

    def save(self) -> None:
        lines = [
            f"{json.dumps(key)}: {json.dumps(work.to_json())}"
            for key, work in sorted(self.works.items())
        ]
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def liger(self, jobs: list[tuple[str, dict[str, Any]]]) -> None:
        """Count the (version, job) that are not stored, one process a version."""
        for version in sorted({version for version, _ in jobs}):
            missing = {
                liger_key(version, job): job
                for other, job in jobs
                if other == version and liger_key(version, job) not in self.works
            }
            if missing:
                print(f"counting {len(missing)} calls of liger-kernel {version}", file=sys.stderr)
                found = counting.count_liger(version, list(missing.values()))
                for key, work in zip(missing, found, strict=True):
                    print(f"  {key}", file=sys.stderr)
                    self.works[key] = work
                    self.save()


def liger_key(version: str, job: dict[str, Any]) -> str:
    names = ("op", "mode", "upstream", "rows", "columns", "arch")
    return "|".join(["liger", version, *(str(job[name]) for name in names)])


def published() -> list[tuple[dict[str, str], str, dict[str, Any], int]]:
    """(line, version to count, job, rows) of each published timing that the model can predict."""
    found = []
    with PUBLISHED.open() as file:
        for line in csv.DictReader(file):
            if line["provider"] not in ("liger", "liger_triton") or line["metric"] != "speed":
                continue
            if line["kernel"] not in KERNELS or line["gpu"] not in CARD_OF:
                continue
            config = json.loads(line["config"])
            if line["x_name"] == "V":
                rows, columns = config["B"] * config["T"], int(line["x_value"])
            elif line["x_name"] == "H":
                rows, columns = config["M"], int(line["x_value"])
            elif line["x_name"] == "BT":
                rows = int(line["x_value"])
                columns = config.get("vocab_size") or config["hidden_size"]
            else:
                rows, columns = config["bsz"] * config["seq_len"], VOCABULARIES[line["x_value"]]
            mode = "forward" if line["mode"] == "no-grad-forward" else line["mode"]
            # The scripts whose configurations name bsz and seq_len start from a random gradient.
            random = "bsz" in config and mode != "forward"
            job = {
                "op": line["kernel"],
                "mode": mode,
                "upstream": "random" if random else "one",
                "rows": NORM_ROWS if line["kernel"] == "rms_norm" else ROWS,
                "columns": columns,
                "arch": CARDS[CARD_OF[line["gpu"]]].arch,
            }
            version = line["liger_version"]
            version = FIRST_RELEASE.get((line["kernel"], version), version)
            found.append((line, version, job, rows))
    return found


def calibration_points(counts: Counts) -> list[Point]:
    timings = published()
    counts.liger([(version, job) for _, version, job, _ in timings])
    return [
        Point(
            kernel=line["kernel"],
            mode=line["mode"],
            card=CARD_OF[line["gpu"]],
            x=f"{line['x_name']}={line['x_value']}",
            date=line["date"],
            version=version,
            seconds=float(line["p50"]) / 1e3,
            work=counts.works[liger_key(version, job)].scaled(rows / job["rows"]),
        )
        for line, version, job, rows in timings
    ]


def calibrate(counts: Counts) -> dict[str, Any]:
    """Fit on the points that may be fitted, judge on all; the contents of CALIBRATION."""
    points = calibration_points(counts)
    spilling = [point for point in points if point.work.spills]
    waiting = [point for point in points if host_bound(point) and not point.work.spills]
    rest = [point for point in points if not point.work.spills and not host_bound(point)]
    fitted = [point for point in rest if not point.held_back]
    held = [point for point in rest if point.held_back]
    parameters = fit(fitted)
    unseen = unseen_kernels(rest)

    def binding(point: Point) -> str:
        return predict(point.work, CARDS[point.card], parameters).binding

    def by(key: Callable[[Point], str], chosen: list[Point]) -> dict[str, Any]:
        return {
            name: summary([p for p in chosen if key(p) == name], parameters)
            for name in sorted({key(point) for point in chosen})
        }

    card, kernel, mode = (attrgetter(name) for name in ("card", "kernel", "mode"))

    groups = {"fitted": fitted, "held back": held, "spilling": spilling, "host-bound": waiting}
    group_of = {id(point): name for name, chosen in groups.items() for point in chosen}
    return {
        "what": "predictions against published timings of Liger-Kernel's Triton kernels; "
        "`error` is the factor between them, at least 1",
        "left_out": LEFT_OUT,
        "parameters": {
            "bandwidth_fraction": dict(parameters.bandwidth),
            "exposed": parameters.exposed,
            "launch_us": parameters.launch * 1e6,
            "synchronisation_us": parameters.synchronisation * 1e6,
            "row_operators": parameters.row_operators,
        },
        "summary": {
            "all": summary(points, parameters),
            **{name: summary(chosen, parameters) for name, chosen in groups.items()},
            "unseen kernel": {
                "points": len(unseen),
                "median": quantile(unseen, 0.5),
                "p90": quantile(unseen, 0.9),
                "worst": max(unseen),
            },
        },
        "by_card": by(card, rest),
        "by_kernel": by(kernel, rest),
        "by_mode": by(mode, rest),
        "by_limit": by(binding, rest),
        "held_back_by_card": by(card, held),
        "held_back_by_kernel": by(kernel, held),
        "spilling_by_kernel": by(kernel, spilling),
        "points": [
            {
                "kernel": point.kernel,
                "mode": point.mode,
                "card": point.card,
                "x": point.x,
                "date": point.date,
                "counted_version": point.version,
                "group": group_of[id(point)],
                "limit": binding(point),
                "published_ms": round(point.seconds * 1e3, 4),
                "predicted_ms": round(
                    predict(point.work, CARDS[point.card], parameters).seconds * 1e3, 4
                ),
                "error": round(error(point, parameters), 3),
            }
            for point in sorted(points, key=lambda point: point.key)
        ],
    }


def stored_parameters(calibration: dict[str, Any]) -> Parameters:
    fitted = calibration["parameters"]
    return Parameters(
        tuple(fitted["bandwidth_fraction"].items()),
        fitted["exposed"],
        fitted["launch_us"] / 1e6,
        fitted["synchronisation_us"] / 1e6,
        fitted["row_operators"],
    )


def error_bar(calibration: dict[str, Any]) -> float:
    """What a prediction is to be multiplied and divided by: the 90th percentile of the error over
    the held-back points, or over kernels that the fit never saw where that is larger.
    """
    found = calibration["summary"]
    return max(found["held back"]["p90"], found["unseen kernel"]["p90"])


def bound_by_memory(calibration: dict[str, Any]) -> int:
    return sum(point["limit"] == "memory" for point in calibration["points"])


def calibration_table(calibration: dict[str, Any]) -> str:
    """The summary in Markdown."""
    lines = [
        "# The roofline model against published timings",
        "",
        "Made by `python -m benchmarks.roofline --calibrate`; every point is in "
        "`roofline_calibration.json`. Published: medians of Liger-Kernel's Triton kernels on real "
        "cards, from its benchmark data. Predicted: counts of the same kernels run through ptxrun, "
        "and the model of `roofline_model.py`. Error: the factor between the two, at least 1.",
        "",
        f"{LEFT_OUT}",
        "",
        f"Held back: a third, by a hash of the point's name. Host-bound: under "
        f"{HOST_BOUND * 1e6:.0f} µs on an ideal card, so that the published time is Python's; "
        "spilling: kernels whose registers ran out (ptxas of Triton here; the timed ones came "
        "from older ones). Neither is fitted. Unseen kernel: each kernel predicted by a fit "
        "without it, over fitted and held-back points. The form of the model (its limits, L2's "
        "share, which parameters there are) was chosen with all points in view; only the "
        "parameters' values were kept from the held-back ones.",
        "",
        "Counted where the named release lacks the kernel that was timed: "
        + ", ".join(f"{kernel} {a}: {b}" for (kernel, a), b in FIRST_RELEASE.items())
        + ".",
        "",
        "| points | n | median | 90th percentile | worst |",
        "|---|---|---|---|---|",
    ]
    sections = [("", calibration["summary"])]
    sections += [
        (f"{name}: ", calibration[f"by_{name}"]) for name in ("card", "kernel", "mode", "limit")
    ]
    sections += [
        ("held back, ", calibration["held_back_by_card"]),
        ("held back, ", calibration["held_back_by_kernel"]),
        ("spilling, ", calibration["spilling_by_kernel"]),
    ]
    for prefix, section in sections:
        for name, found in section.items():
            if found["points"]:
                lines.append(
                    f"| {prefix}{name} | {found['points']} | {found['median']:.2f} | "
                    f"{found['p90']:.2f} | {found['worst']:.2f} |"
                )
    fitted = calibration["parameters"]
    fractions = ", ".join(f"{card} {f:.2f}" for card, f in fitted["bandwidth_fraction"].items())
    lines += [
        "",
        f"Fitted: fraction of the data sheet's bandwidth {fractions}; "
        f"{fitted['exposed']:.2f} of the smaller of memory and arithmetic time not hidden; "
        f"{fitted['launch_us']:.1f} µs a launch; "
        f"{fitted['synchronisation_us']:.0f} µs each time the host waits for the device; "
        f"{fitted['row_operators']:.2f} of the card's fraction in PyTorch's own softmax operators.",
        "",
    ]
    return "\n".join(lines)


# Predictions --------------------------------------------------------------------------------------

PREDICTED_ROWS = 8192
PREDICTED_COLUMNS = (32000, 128256)
OUR_CASES = {
    "forward_kl": {"divergence": "forward_kl", "ce": False},
    "reverse_kl": {"divergence": "reverse_kl", "ce": False},
    "jsd": {"divergence": "jsd", "ce": False},
    "skew_forward_kl": {"divergence": "skew_forward_kl", "ce": False},
    "tvd": {"divergence": "tvd", "ce": False},
    "forward_kl + CE": {"divergence": "forward_kl", "ce": True},
}
BACKENDS = {"triton": "Triton", "cpp": "CUDA"}
PEER = "0.8.5"  # the newest release of liger-kernel when this was written
PEERS = ("kl_div", "jsd", "tvd", "cross_entropy", "fused_linear_jsd")
# Chunks of fused_linear_jsd at 8192 rows, hidden size 4096 and each vocabulary: its own formula.
CHUNKS = {32000: 8, 128256: 32}


@dataclass(frozen=True)
class Line:
    """One line of the prediction table: a call, and its counts for each architecture."""

    whose: str
    case: str
    mode: str
    columns: int
    works: dict[int, Work]  # by architecture, at PREDICTED_ROWS


def our_jobs() -> list[tuple[str, dict[str, Any]]]:
    """(name of the case, job) of everything of ours that is predicted."""
    jobs: list[tuple[str, dict[str, Any]]] = []
    for columns in PREDICTED_COLUMNS:
        size = {"rows": ROWS, "columns": columns}
        for name, case in OUR_CASES.items():
            for mode in ("forward", "backward", "one pass"):
                jobs.append((name, {"op": "distillation_loss", **case, "mode": mode, **size}))
        for mode in ("forward", "backward"):
            case = {"op": "softmax", "divergence": "forward_kl", "ce": False}
            jobs.append(("softmax", {**case, "mode": mode, **size}))
    return jobs


def our_key(backend: str, name: str, job: dict[str, Any], arch: int) -> str:
    return "|".join(("ours", backend, name, job["mode"], str(job["columns"]), str(arch)))


def peer_jobs(arch: int) -> list[dict[str, Any]]:
    common = {"mode": "loss and gradient", "upstream": "one", "rows": ROWS, "arch": arch}
    return [
        {**common, "op": f"from logits: {op}", "columns": columns}
        for columns in PREDICTED_COLUMNS
        for op in PEERS
    ]


ARCHITECTURES = sorted({CARDS[card].arch for card in PREDICTED_CARDS})


def count_all(counts: Counts, backends: list[str]) -> None:
    """Count everything that is predicted, ours anew and peers where missing, and store it."""
    jobs = our_jobs()
    for backend in backends:
        for arch in ARCHITECTURES:
            found = counting.count_ours_apart([job for _, job in jobs], backend, arch)
            for (name, job), work in zip(jobs, found, strict=True):
                key = our_key(backend, name, job, arch)
                print(f"  {key}", file=sys.stderr)
                counts.works[key] = work
                counts.save()
    counts.liger([(PEER, job) for arch in ARCHITECTURES for job in peer_jobs(arch)])


def lines(counts: Counts) -> list[Line]:
    """Everything of the table that counts are stored for."""
    found = []
    for backend, whose in BACKENDS.items():
        for name, job in our_jobs():
            keys = {arch: our_key(backend, name, job, arch) for arch in ARCHITECTURES}
            found.append((whose, name, job, keys))
    for columns in PREDICTED_COLUMNS:
        for op in PEERS:
            job = {**peer_jobs(0)[0], "op": f"from logits: {op}", "columns": columns}
            keys = {arch: liger_key(PEER, {**job, "arch": arch}) for arch in ARCHITECTURES}
            found.append((f"Liger {PEER}", op, job, keys))
    table = []
    for whose, name, job, keys in found:
        stored = {arch: counts.works[key] for arch, key in keys.items() if key in counts.works}
        chunks = CHUNKS[job["columns"]] // ROWS if name == "fused_linear_jsd" else 1
        works = {
            arch: Work(elementwise(work).launches * chunks, work.synchronisations).scaled(
                PREDICTED_ROWS / ROWS / chunks
            )
            for arch, work in stored.items()
        }
        if works:
            table.append(Line(whose, name, job["mode"], job["columns"], works))
    return table


def elementwise(work: Work) -> Work:
    """The work without matrix products."""
    kept = tuple(launch for launch in work.launches if launch.name not in ("mm", "addmm"))
    return replace(work, launches=kept)


def prediction_table(table: list[Line], calibration: dict[str, Any]) -> str:
    """Markdown: counts of each call, then its predicted time on each card."""
    parameters, bar = stored_parameters(calibration), error_bar(calibration)
    head = ["kernels", "call", "V", "launches", "B", "B again", "MUFU", "FMA", "PTX", "spill"]
    out = [
        "# Predicted times (a prediction: nothing here was timed)",
        "",
        "Made by `python -m benchmarks.roofline` from counts of kernels that ran on the CPU "
        f"through ptxrun. {PREDICTED_ROWS} rows of bfloat16 logits. Each predicted time may be "
        f"wrong by a factor of {bar:.2f} either way: the 90th percentile of the model's error, the "
        "larger of held-back points and unseen kernels (`roofline_calibration.md`); "
        f"{calibration['summary']['spilling']['p90']:.2f} where registers are spilled. "
        f"{bound_by_memory(calibration)} of {len(calibration['points'])} published timings are "
        "bound by memory: where another limit binds, the bar is hardly tested, and issue counts "
        "PTX instructions, not those of the machine code. Nobody "
        "published timings of an H200: it takes the H100's fraction of bandwidth.",
        "",
        "Per element of the student's logits, on sm_90: bytes read or written, each byte once a "
        "launch; those asked for again, which L2 holds in part; special functions (ex2, lg2, rcp; "
        "16 a clock and multiprocessor), FMAs, PTX instructions, and bytes of registers spilled "
        "(an estimate). Under each card: predicted ms, the limit that binds, and the fraction "
        "of that limit that the predicted time is. PyTorch's operators around Liger's kernels are "
        "counted; fused_linear_jsd is without its matrix products and the gradient of its weight, "
        "at hidden size 4096.",
        "",
        "| " + " | ".join([*head, *PREDICTED_CARDS]) + " |",
        "|---" * (len(head) + len(PREDICTED_CARDS)) + "|",
    ]
    for line in table:
        work = line.works.get(90) or next(iter(line.works.values()))
        elements = PREDICTED_ROWS * line.columns
        cells = [line.whose, f"{line.case}, {line.mode}", str(line.columns)]
        cells.append(str(len(work.launches)))
        unique = work.total("unique")
        totals = [unique, work.total("requested") - unique]
        totals += [work.total(name) for name in ("mufu", "fma", "instructions", "spilled")]
        cells += [f"{total / elements:.2f}" for total in totals]
        for card in (CARDS[name] for name in PREDICTED_CARDS):
            if card.arch not in line.works:
                cells.append("not counted")
                continue
            found = predict(line.works[card.arch], card, parameters)
            cells.append(f"{found.seconds * 1e3:.2f} ({found.binding} {found.fraction:.2f})")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, ""])


def predictions_text(counts: Counts, calibration: dict[str, Any]) -> str:
    """Both tables."""
    linear = roofline_linear.table(counts.works, stored_parameters(calibration))
    return prediction_table(lines(counts), calibration) + "\n" + linear


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--calibrate", action="store_true", help="fit and judge the model anew, store the result"
    )
    what.add_argument(
        "--count",
        nargs="?",
        const="all",
        choices=["all", *BACKENDS, "linear"],
        help="count our kernels anew (all, one backend's, or linear_distillation_loss's), and "
        "peers where missing",
    )
    options = parser.parse_args()
    counts = Counts()
    try:
        if options.calibrate:
            if not PUBLISHED.exists():
                sys.exit(f"cannot calibrate: the published timings are not at {PUBLISHED}")
            calibration = calibrate(counts)
            CALIBRATION.write_text(json.dumps(calibration, indent=1) + "\n")
            CALIBRATION.with_suffix(".md").write_text(calibration_table(calibration))
            print(calibration_table(calibration))
            return
        if options.count in ("all", "linear"):
            roofline_linear.count(counts.works, counts.save)
        if options.count and options.count != "linear":
            count_all(counts, list(BACKENDS) if options.count == "all" else [options.count])
        if not options.count:
            print(f"from the counts stored in {COUNTS.relative_to(ROOT)} (--count makes them anew)")
    except counting.Missing as e:
        sys.exit(f"cannot count: {e}")
    text = predictions_text(counts, json.loads(CALIBRATION.read_text()))
    PREDICTIONS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
