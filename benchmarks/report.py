"""What is said about the measurements: tables, thresholds, Markdown for the README, the plot."""

import io
from typing import Any

from .cases import SHAPES, SMALL

MIB = 2**20

# (divergence, dtype, ours, baseline, least median of baseline time / our time), at both SHAPES.
SPEEDUPS = [
    ("forward_kl", "float32", "cpp, in place", "eager", 20),
    ("forward_kl", "float32", "cpp, in place", "torch.compile", 5),
    ("forward_kl", "float32", "cpp, fresh", "eager", 8),
    ("forward_kl", "float32", "cpp, fresh", "torch.compile", 2.5),
    ("forward_kl", "bfloat16", "cpp, in place", "eager", 6),
    ("forward_kl", "bfloat16", "cpp, in place", "torch.compile", 5),
    ("forward_kl", "bfloat16", "cpp, fresh", "eager", 4),
    ("forward_kl", "bfloat16", "cpp, fresh", "torch.compile", 2.5),
    ("jsd", "float32", "cpp, in place", "eager", 20),
    ("jsd", "float32", "cpp, in place", "torch.compile", 8),
    ("jsd", "bfloat16", "cpp, in place", "eager", 20),
    ("jsd", "bfloat16", "cpp, in place", "torch.compile", 8),
]
SMALL_SPEEDUPS = {"forward_kl": 1, "jsd": 2}  # cpp, fresh against eager
ADD_MULTIPLE = 1.5  # float32 forward KL in place, against torch.add; only with AVX-512
OPS = 2  # of kdkernels in a profile: one forward, one backward
SCRATCH = (
    2 * MIB
)  # of memory per thread beyond the inputs, and beyond the gradient where it is a fresh one


def ratio(result: dict[str, Any], ours: str, baseline: str) -> dict[str, Any] | None:
    for pair in result["ratios"]:
        if (pair["ours"], pair["baseline"]) == (ours, baseline):
            return pair
    return None


def thresholds(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a threshold and case measured, met or not."""
    entries: list[dict[str, Any]] = []

    def entry(case, what, measured, relation, limit, unit="×"):
        met = measured >= limit if relation == "≥" else measured <= limit
        entries.append(
            {
                "case": case,
                "what": what,
                "measured": measured,
                "relation": relation,
                "limit": limit,
                "unit": unit,
                "met": met,
            }
        )

    measured = {result["case"]: result for result in run["cases"]}
    for divergence, dtype, ours, baseline, least in SPEEDUPS:
        for rows, vocab in SHAPES:
            case = f"{divergence}/{dtype}/{rows}x{vocab}"
            if case in measured and (pair := ratio(measured[case], ours, baseline)):
                entry(case, f"{baseline} / {ours}", pair["p50"], "≥", least)
    for rows, vocab in SHAPES:
        case = f"forward_kl/float32/{rows}x{vocab}"
        if case in measured and run["machine"]["isa"] == "avx512":
            if pair := ratio(measured[case], "cpp, in place", "torch.add"):
                entry(case, "cpp, in place / torch.add", 1 / pair["p50"], "≤", ADD_MULTIPLE)
    for small in SMALL:
        if small.name in measured:
            result = measured[small.name]
            if pair := ratio(result, "cpp, fresh", "eager"):
                least = SMALL_SPEEDUPS[small.divergence]
                entry(small.name, "eager / cpp, fresh", pair["p50"], "≥", least)
            for ours in ("cpp, fresh", "cpp, in place"):
                if ours in result["contestants"]:
                    count = own_ops(result["contestants"][ours]["ops"])
                    entry(small.name, f"ops of kdkernels in a profile: {ours}", count, "≤", OPS, "")
    for case, result in measured.items():
        for ours, beside in (("cpp, fresh", result["gradient_bytes"]), ("cpp, in place", 0)):
            peak = result["contestants"].get(ours, {}).get("peak_bytes")
            if peak is not None and (result["rows"], result["vocab"]) in SHAPES:
                limit = (beside + SCRATCH * run["threads"]) / MIB
                entry(
                    case, f"peak memory beyond the inputs: {ours}", peak / MIB, "≤", limit, " MiB"
                )
    return entries


def own_ops(ops: dict[str, int]) -> int:
    return sum(count for name, count in ops.items() if name.startswith("kdkernels::"))


# ---- text ----


def aligned(rows: list[list[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def spread(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return "-"
    return f"{number(pair['p50'])} ({number(pair['p20'])}-{number(pair['p80'])})"


def case_table(result: dict[str, Any]) -> str:
    """One line a contestant.

    At the right of a baseline: how many times longer than ours it took, median (p20-p80) of the
    rounds' ratios.
    """
    ours = list(dict.fromkeys(pair["ours"] for pair in result["ratios"]))
    title = f"{result['case']}  T={result['temperature']:g}, {result['rounds']} rounds"
    others = f"other processes used {result['disturbance']:.2f} cores meanwhile"
    head = [
        "ms p20",
        "p50",
        "p80",
        "ns/logit",
        "GB/s",
        "faults",
        "peak MiB",
        "loss err",
        "grad err",
    ]
    rows = [[title, "gradient", *head, *(f"/ {name}" for name in ours)]]
    for name, c in result["contestants"].items():
        errors = [f"{c[e]:.0e}" if e in c else "-" for e in ("loss_error", "gradient_error")]
        rows.append(
            [
                "  " + name,
                c["allocation"],
                *(number(c["ms"][p]) for p in ("p20", "p50", "p80")),
                number(c["ns_per_element"]),
                number(c["gb_per_s"]),
                f"{c['page_faults']:.0f}",
                f"{c['peak_bytes'] / MIB:.1f}" if "peak_bytes" in c else "-",
                *errors,
                *(spread(ratio(result, other, name)) for other in ours),
            ]
        )
    table = f"{aligned(rows)}\n  {others}"
    for name, c in result["contestants"].items():
        if "ops" in c:
            total = sum(c["ops"].values())
            table += (
                f"\n  ops in a profile: {name}: {total}, of them kdkernels: {own_ops(c['ops'])}"
            )
    return table


def gpu_table(result: dict[str, Any], run: dict[str, Any]) -> str:
    """One line a contestant of `python -m benchmarks.gpu`.

    At the right of ours: how many times longer each baseline took, median (p20-p80) of the rounds'
    ratios; and the prediction with its error bar, where there is one.
    """
    baselines = list(dict.fromkeys(pair["baseline"] for pair in result["ratios"]))
    title = f"{result['case']}  T={result['temperature']:g}, {result['rounds']} rounds"
    head = ["ms p20", "p50", "p80", "host ms", "GB/s", "of copy", "loss err", "grad err"]
    rows = [[title, "gradient", *head, "predicted ms", *(f"{name} /" for name in baselines)]]
    waits = False
    for name, c in result["contestants"].items():
        errors = [f"{c[e]:.0e}" if e in c else "-" for e in ("loss_error", "gradient_error")]
        late = c["host_ms"] > run["busy_ms"]
        waits |= late
        predicted = c.get("predicted_ms")
        rows.append(
            [
                "  " + name,
                c["allocation"],
                *(number(c["ms"][p]) for p in ("p20", "p50", "p80")),
                number(c["host_ms"]) + ("!" if late else ""),
                number(c["gb_per_s"]),
                f"{c['gb_per_s'] / run['copy_gb_per_s']:.0%}",
                *errors,
                "{} ({}-{})".format(*(number(predicted[k]) for k in ("ms", "low", "high")))
                if predicted
                else "-",
                *(spread(ratio(result, name, baseline)) for baseline in baselines),
            ]
        )
    note = f"\n  !: longer than the {number(run['busy_ms'])} ms that the device was kept busy: its"
    note += " time holds waits for the host"
    return aligned(rows) + (note if waits else "")


def check_table(run: dict[str, Any]) -> str:
    """One line a group of checks: how many, and the one that came nearest to its limit."""
    rows = [["checked against float64", "checks", "failed", "error", "allowed", "of"]]
    for name, group in run["checks"].items():
        worst = group["worst"]
        what = f"{worst['backend']} {worst['shape']} {worst['what']}"
        figures = [f"{worst['error']:.1e}", f"{worst['limit']:.1e}", what]
        rows.append([name, f"{group['checks']}", f"{len(group['failed'])}", *figures])
    return "\n".join([aligned(rows), *(f"CHECK FAILED: {text}" for text in run["failed"])])


def threshold_rows(run: dict[str, Any]) -> list[list[str]]:
    rows = [["case", "threshold", "wanted", "measured", "met"]]
    for t in run["thresholds"]:
        wanted = f"{t['relation']} {t['limit']:g}{t['unit']}"
        measured = f"{number(t['measured'])}{t['unit']}" if t["unit"] else f"{t['measured']}"
        rows.append([t["case"], t["what"], wanted, measured, "met" if t["met"] else "NOT MET"])
    return rows


def threshold_table(run: dict[str, Any]) -> str:
    if not run["thresholds"]:
        return "No threshold of the issue belongs to the cases measured."
    missed = sum(not t["met"] for t in run["thresholds"])
    count = len(run["thresholds"])
    return f"{aligned(threshold_rows(run))}\n{count - missed} of {count} met, {missed} not met."


def machine_line(run: dict[str, Any]) -> str:
    machine, versions = run["machine"], run["versions"]
    commit = f"commit {run['commit'][:10]}" if run["commit"] else "no commit"
    if gpu := machine.get("gpu"):
        return (
            f"{gpu['name']}, torch {versions['torch']}, Triton {versions['triton']}, {commit}"
            f"{' with changes' if run['changed_since'] else ''}, {run['date'][:10]}"
        )
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, {run['threads']} threads, "
        f"transparent huge pages: {machine['transparent_hugepages']}, torch {versions['torch']}, "
        f"{commit}{' with changes' if run['changed_since'] else ''}, {run['date'][:10]}"
    )


def _parts(run: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cases that stand alone, and those of the survey of divergences."""
    cases = run["cases"]
    return [r for r in cases if not r["survey"]], [r for r in cases if r["survey"]]


# ---- Markdown for the README ----


def markdown(run: dict[str, Any]) -> str:
    """The README's figures: large and small cases, every divergence, and the thresholds."""
    return "\n\n".join(
        [
            f"Printed by `python -m benchmarks`: {machine_line(run)}. Times are medians "
            "in ms of loss and student gradient; ratios are medians over the rounds. Other "
            f"processes used at most {max(r['disturbance'] for r in run['cases']):.2f} cores "
            "meanwhile.",
            *(_markdown_table(_speed_rows(part)) for part in _parts(run) if part),
            _markdown_table(threshold_rows(run)),
        ]
    )


def _markdown_table(rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _speed_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One line a case: milliseconds of everyone, then eager and torch.compile over ours."""
    names = list(dict.fromkeys(name for result in results for name in result["contestants"]))
    pairs = [
        (baseline, ours)
        for baseline in ("eager", "torch.compile")
        for ours in ("cpp, fresh", "cpp, in place")
        if any(ratio(result, ours, baseline) for result in results)
    ]
    rows = [["case", *names, *(f"{baseline} / {ours}" for baseline, ours in pairs)]]
    for result in results:
        row = [result["case"]]
        for name in names:
            contestant = result["contestants"].get(name)
            row.append(number(contestant["ms"]["p50"]) if contestant else "")
        for baseline, ours in pairs:
            pair = ratio(result, ours, baseline)
            row.append(f"{number(pair['p50'])}×" if pair else "")
        rows.append(row)
    return rows


# ---- plot ----

COLOURS = {
    "cpp, fresh": "#6baed6",
    "cpp, in place": "#08519c",
    "cpp, one pass": "#3182bd",
    "triton, fresh": "#74c476",
    "triton, in place": "#006d2c",
    "triton, one pass": "#31a354",
    "reference, fresh": "#c7b9d8",
    "eager": "#8c8c8c",
    "eager, float32": "#a6a6a6",
    "eager, probabilities": "#bfbfbf",
    "torch.compile": "#e08a3c",
    "liger": "#c2577e",
    "torch.add": "#d9d9b0",
}


def plot(run: dict[str, Any]) -> bytes:
    """PNG: one panel a case with every contestant's time, one with all divergences side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels, survey = _parts(run)
    columns = min(4, max(1, len(panels)))
    lines = -(-len(panels) // columns)
    heights = [3.0] * lines + [3.6] * bool(survey)
    size = (max(8, 4.6 * columns), sum(heights) + 0.8)
    figure = plt.figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.08))
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for i, result in enumerate(panels):
        _bars(figure.add_subplot(grid[i // columns, i % columns]), result)
    if survey:
        _side_by_side(figure.add_subplot(grid[lines, :]), survey)
    figure.suptitle(
        "Loss and student gradient: median time, whiskers p20 to p80\n" + machine_line(run),
        fontsize=10,
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


def _bars(axes: Any, result: dict[str, Any]) -> None:
    names = list(result["contestants"])
    times = [result["contestants"][name]["ms"] for name in names]
    middle = [t["p50"] for t in times]
    whiskers = [[t["p50"] - t["p20"] for t in times], [t["p80"] - t["p50"] for t in times]]
    axes.barh(names, middle, xerr=whiskers, color=[COLOURS[n] for n in names], error_kw={"lw": 0.8})
    for i, name in enumerate(names):
        pair = ratio(result, name, "eager")
        text = number(middle[i]) + (f"   {number(pair['p50'])}×" if pair else "")
        axes.text(
            1,
            i,
            text,
            va="center",
            ha="right",
            fontsize=8,
            backgroundcolor="white",
            transform=axes.get_yaxis_transform(),
        )
        if predicted := result["contestants"][name].get("predicted_ms"):
            axes.plot(predicted["ms"], i, "k|", markersize=12)  # under whose bar it stands or not
    axes.invert_yaxis()
    # A third of the width for the texts. The whisker of a disturbed machine may leave the picture.
    axes.set_xlim(0, 1.5 * min(max(t["p80"] for t in times), 1.5 * max(middle)))
    axes.set_title(result["case"], fontsize=10)
    axes.set_xlabel("ms; at the right: median, times eager's speed", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _side_by_side(axes: Any, survey: list[dict[str, Any]]) -> None:
    names = list(survey[0]["contestants"])
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        middle = [result["contestants"][name]["ms"]["p50"] for result in survey]
        places = [i + (k - (len(names) - 1) / 2) * width for i in range(len(survey))]
        axes.bar(places, middle, width, label=name, color=COLOURS[name])
    axes.set_yscale("log")
    axes.set_ylabel("ms (log scale)", fontsize=8)
    axes.set_xticks(range(len(survey)), [result["divergence"] for result in survey])
    axes.set_title(
        f"every divergence, {survey[0]['dtype']} {survey[0]['rows']}x{survey[0]['vocab']}",
        fontsize=10,
    )
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, ncols=len(names), loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 3)  # room for the legend
    axes.spines[["top", "right"]].set_visible(False)
