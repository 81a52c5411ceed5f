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
from pathlib import Path
from typing import Any

from . import roofline_counts as counting
from .roofline_model import (
    CARDS,
    HOST_BOUND,
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
PUBLISHED = ROOT.parent / "shared" / "field" / "data" / "published_gpu_timings.csv"

ROWS = 2  # that are run; everything counted grows with the rows (a test holds it)

CARD_OF = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA B200": "B200",
}
# Where the version that a timing names has no such kernel, it was timed from a checkout on the way
# to the next release; the first release that has the kernel is counted. For kl_div that would be
# 0.3.0, whose forward writes past the end of its losses (found by ptxrun); 0.3.1 does not, and moves
# the same bytes.
FIRST_RELEASE = {("kl_div", "0.2.1"): "0.3.1", ("jsd", "0.3.1"): "0.4.0"}
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
    names = ("op", "mode", "upstream", "columns", "arch")
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
                "rows": ROWS,
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
            work=counts.works[liger_key(version, job)].scaled(rows / ROWS),
        )
        for line, version, job, rows in timings
    ]
