"""linear_distillation_loss on real cards, predicted: the second table of benchmarks.roofline.

Matrix products are not run: their time is that of their floating-point operations at a stated share
of the card's peak. Around them: the row kernels of a chunk, counted as elsewhere; for
``low_memory`` what the kernels do to a tile of logits after its products. That is counted on one
block of rows at two hidden sizes: the part that grows with the hidden size is the products' own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import roofline_counts as counting
from .roofline_model import CARDS, Card, Launch, Parameters, Work, limits, predict

ROWS, VOCAB, HIDDEN = 8192, 128256, 4096
CHUNK_ROWS = 2048
# Floating-point operations a second, bfloat16, dense: NVIDIA's data sheets of A100, H100 SXM, H200
# and HGX B200 (an eighth of the board).
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
# Of it: assumed, not measured. cuBLAS at these sizes, and a product of Triton's with cp.async,
# which has no warp specialisation.
CUBLAS, TRITON = 0.70, 0.55
CASES = {"forward_kl": 1, "jsd": 2}  # sweeps of the forward
ARCHITECTURES = (80, 90)  # ptxrun has none of sm_100's tensor cores; its cards take sm_90's counts

# One block of rows and one chunk of columns, counted at both hidden sizes; the row kernel's rows.
BLOCK, CHUNK, WIDTHS, ROW_KERNEL_ROWS = 128, 4096, (64, 128), 2


def key(what: str, case: str, arch: int) -> str:
    return "|".join(("ours", "triton", "linear", what, case, str(arch)))


def _low_memory_step(case: str, width: int) -> Callable[[], Any]:
    import kdkernels

    torch.manual_seed(0)
    hidden = [torch.randn(BLOCK, width).bfloat16() for _ in range(2)]
    weight = [(torch.randn(CHUNK, width) * width**-0.5).bfloat16() for _ in range(2)]
    hidden[0].requires_grad_()

    def step() -> None:
        loss: Any = kdkernels.linear_distillation_loss(
            hidden[0], weight[0], hidden[1], weight[1], divergence=case, low_memory=True
        )
        loss.backward()

    return step


def _chunk_step(case: str) -> Callable[[], Any]:
    """The row kernel in place on float32 logits."""
    import kdkernels

    torch.manual_seed(0)
    student, teacher = (torch.randn(ROW_KERNEL_ROWS, VOCAB) for _ in range(2))
    student.requires_grad_()

    def step() -> None:
        kdkernels.distillation_loss(
            student.clone(), teacher, divergence=case, inplace=True, backend="triton"
        )

    return step


def count(works: dict[str, Work], save: Callable[[], None]) -> None:
    counting.require()
    for arch in ARCHITECTURES:
        for case in CASES:
            for what, step in (
                *((f"H={width}", _low_memory_step(case, width)) for width in WIDTHS),
                ("row kernel", _chunk_step(case)),
            ):
                print(f"  {key(what, case, arch)}", file=sys.stderr, flush=True)
                found = counting.count(step, arch)
                # Of PyTorch's operators only matrix products would be of a tile's size.
                launches = tuple(launch for launch in found.launches if launch.kernel)
                works[key(what, case, arch)] = Work(launches)
                save()


@dataclass(frozen=True)
class Kernel:
    """Per tile element: what the products do not explain."""

    name: str
    launch: Launch  # at ROWS and VOCAB
    registers: int


def _kernels(works: dict[str, Work], case: str, arch: int) -> list[Kernel]:
    found = []
    factor = ROWS * VOCAB / (BLOCK * CHUNK)
    narrow, wide = (works[key(f"H={width}", case, arch)].launches for width in WIDTHS)
    for a, b in zip(narrow, wide, strict=True):
        if a.name == "_finish":
            continue
        rest = {
            f.name: max(0.0, 2 * getattr(a, f.name) - getattr(b, f.name)) * factor
            for f in fields(Launch)
            if f.name in ("mufu", "fma", "instructions", "spilled")
        }
        found.append(Kernel(a.name, replace(a, requested=0.0, unique=0.0, **rest), a.registers))
    return found


def table(works: dict[str, Work], parameters: Parameters) -> str:
    """Markdown; "" where nothing is counted."""
    if key("row kernel", "jsd", ARCHITECTURES[-1]) not in works:
        return ""
    flops = 2.0 * ROWS * VOCAB * HIDDEN  # one product of one model
    budget = CHUNK_ROWS * VOCAB * 10 / 2**30
    out = [
        "# linear_distillation_loss (a prediction: nothing here was timed)",
        "",
        f"Loss and gradients of the student's hidden states and weight, bfloat16, N = {ROWS}, "
        f"V = {VOCAB}, hidden size {HIDDEN} of both models. Matrix products at an assumed "
        f"{CUBLAS:.2f} (cuBLAS) and {TRITON:.2f} (Triton's) of the dense bfloat16 peak "
        "(A100 312, H100 and H200 989, B200 2250 TFLOPS): assumptions, that everything here "
        "depends on. Chunks: four products of 2·N·V·H "
        f"({4 * flops / 1e12:.1f} TFLOP in all), {CHUNK_ROWS} rows each, then the row kernel in "
        "place on float32 logits, their gradient's rounding to bfloat16, and the float32 sum of "
        f"the weight's gradient once a chunk; {budget:.1f} GiB of buffers and "
        f"{VOCAB * HIDDEN * 4 / 2**30:.1f} GiB of sum. low_memory: six products "
        f"({6 * flops / 1e12:.1f} TFLOP; JSD eight, {8 * flops / 1e12:.1f}), two of them cuBLAS's; "
        "what its kernels do to a tile after its products (counted on sm_80 and sm_90, B200 with "
        "sm_90's counts) comes on top, as one block fills a multiprocessor; about 0.35 GiB of "
        "buffers. Each cell: ms, and of those products + the rest.",
        "",
        "| path | divergence | " + " | ".join(PEAK) + " |",
        "|---" * (2 + len(PEAK)) + "|",
    ]
    for case, sweeps in CASES.items():
        for path in ("chunks", "low_memory"):
            cells = [path, case]
            for name, peak in PEAK.items():
                card = CARDS[name]
                arch = min(card.arch, 90)
                if path == "chunks":
                    products = 4 * flops / (CUBLAS * peak)
                    rest = _chunks_rest(works[key("row kernel", case, arch)], card, parameters)
                else:
                    formed = 2 * (sweeps + 1) * flops / (TRITON * peak)
                    products = formed + 2 * flops / (CUBLAS * peak)
                    rest = _low_memory_rest(_kernels(works, case, arch), card, parameters)
                cells.append(
                    f"{1e3 * (products + rest):.0f} ({1e3 * products:.0f} + {1e3 * rest:.1f})"
                )
            out.append("| " + " | ".join(cells) + " |")
    out += ["", "Of a logit pair, after its products, by kernel:", ""]
    out += ["| divergence | sm | kernel | MUFU | PTX | spilled B | registers |", "|---" * 7 + "|"]
    elements = ROWS * VOCAB
    for case in CASES:
        for arch in ARCHITECTURES:
            for kernel in _kernels(works, case, arch):
                found = kernel.launch
                cells = [case, str(arch), kernel.name]
                cells += [
                    f"{x / elements:.2f}" for x in (found.mufu, found.instructions, found.spilled)
                ]
                out.append("| " + " | ".join([*cells, str(kernel.registers)]) + " |")
    return "\n".join([*out, ""])


def _chunks_rest(row_kernel: Work, card: Card, parameters: Parameters) -> float:
    rows = predict(row_kernel.scaled(ROWS / ROW_KERNEL_ROWS), card, parameters).seconds
    moved = ROWS * VOCAB * 6  # float32 read, bfloat16 written
    moved += -(-ROWS // CHUNK_ROWS) * VOCAB * HIDDEN * 8
    return rows + moved / (card.bandwidth * parameters.fraction(card))


def _low_memory_rest(kernels: list[Kernel], card: Card, parameters: Parameters) -> float:
    seconds = 0.0
    for kernel in kernels:
        peaks = limits(replace(kernel.launch, spilled=0.0), card)
        # Spills stay in L1, at 128 bytes a clock and multiprocessor.
        spills = kernel.launch.spilled / (128 * card.sms * card.clock)
        seconds += max(peaks.values()) + spills
    panel = ROWS * HIDDEN  # columns of a panel times rows: as many bytes as the hidden states
    panels = -(-VOCAB * ROWS // panel)
    moved = ROWS * VOCAB * 2  # the panels, written; the products read them
    moved += panels * ROWS * HIDDEN * 8  # the hidden states' float32 sum
    moved += VOCAB * HIDDEN * 10  # the weight's gradient: float32 written and read, then rounded
    return seconds + moved / (card.bandwidth * parameters.fraction(card))
