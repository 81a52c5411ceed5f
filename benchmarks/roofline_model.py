"""What a card would do with counted work: limits, a time predicted from them, and its calibration.

Pure arithmetic on counts (`roofline_counts.py` makes them). Every time that leaves this module is a
prediction; the only measured times here are the published ones that it is fitted to and judged by.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

# Exponentials, logarithms, reciprocals, square roots: one special function unit, 16 results a clock
# and multiprocessor on compute capability 8.0, 9.0 and 10.0 (CUDA C++ Programming Guide, table of
# arithmetic throughput; for 9.0 and 10.0 also FlashAttention-4's paper).
MUFU_PER_CLOCK = 16
# Four schedulers, each one warp instruction of 32 threads a clock.
ISSUES_PER_CLOCK = 128
REGISTERS_PER_SM, THREADS_PER_SM, BLOCKS_PER_SM = 65536, 2048, 32


@dataclass(frozen=True)
class Card:
    name: str
    arch: int
    sms: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes a second
    l2: int  # bytes
    fma_per_clock: int  # FP32 lanes of a multiprocessor


CARDS = {
    card.name: card
    for card in (
        # NVIDIA A100 data sheet and GA100 white paper: 108 SMs, 1410 MHz, 19.5 TFLOPS FP32
        # (= 108 x 64 lanes x 2 x 1.41 GHz), 2039 GB/s for the 80 GB SXM card, 40 MB of L2.
        Card("A100", 80, 108, 1.410e9, 2.039e12, 40 << 20, 64),
        # NVIDIA H100 data sheet and GH100 white paper: SXM5 132 SMs, 67 TFLOPS FP32
        # (= 132 x 128 x 2 x 1.98 GHz), 3.35 TB/s, 50 MB of L2.
        Card("H100", 90, 132, 1.980e9, 3.35e12, 50 << 20, 128),
        # The same sources: PCIe, 114 SMs, 51 TFLOPS (= 114 x 128 x 2 x 1.755 GHz), 2 TB/s.
        Card("H100 PCIe", 90, 114, 1.755e9, 2.0e12, 50 << 20, 128),
        # NVIDIA H200 data sheet: the H100's chip, 67 TFLOPS FP32, 4.8 TB/s.
        Card("H200", 90, 132, 1.980e9, 4.8e12, 50 << 20, 128),
        # NVIDIA HGX B200 data sheet, an eighth of the board: 75 TFLOPS FP32 (= 148 x 128 x 2 x
        # 1.965 GHz), 8 TB/s. 148 SMs and 126 MB of L2: what the driver reports.
        Card("B200", 100, 148, 1.965e9, 8.0e12, 126 << 20, 128),
    )
}
PREDICTED_CARDS = ("A100", "H100", "H200", "B200")


@dataclass(frozen=True)
class Launch:
    """Counts of one launch, of a Triton or CUDA kernel or of one of PyTorch's own operators.

    `requested`: bytes of the 32-byte sectors of global memory that the program's warps ask for.
    `unique`: the same, each byte of each tensor once for reading and once for writing. PyTorch's
    operators have only these two (from tensor sizes, see roofline_counts.PASSES); memory binds
    them.
    """

    name: str
    kernel: bool
    requested: float
    unique: float
    mufu: float = 0.0
    fma: float = 0.0
    instructions: float = 0.0  # thread-level, of PTX
    blocks: float = 0.0
    threads: int = 0  # of a block
    registers: int = 0  # of a thread; 0 where not known
    shared: int = 0  # bytes of a block
    spilled: float = 0.0  # bytes of local memory stored and loaded because registers ran out

    def scaled(self, factor: float) -> "Launch":
        """The counts for `factor` times as many rows."""
        names = ("requested", "unique", "mufu", "fma", "instructions", "blocks", "spilled")
        return replace(self, **{name: getattr(self, name) * factor for name in names})


@dataclass(frozen=True)
class Work:
    """One call: what it launches, and how often it makes the host wait for the device."""

    launches: tuple[Launch, ...]
    synchronisations: int = 0

    def scaled(self, factor: float) -> "Work":
        return replace(self, launches=tuple(launch.scaled(factor) for launch in self.launches))

    def total(self, name: str) -> float:
        return sum(getattr(launch, name) for launch in self.launches)

    @property
    def spills(self) -> bool:
        return any(launch.spilled for launch in self.launches)

    def to_json(self) -> dict[str, Any]:
        kept = []
        for launch in self.launches:
            values = {f.name: (getattr(launch, f.name), f.default) for f in fields(Launch)}
            kept.append({name: value for name, (value, left) in values.items() if value != left})
        return {"launches": kept, "synchronisations": self.synchronisations}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Work":
        launches = tuple(Launch(**launch) for launch in data["launches"])
        return Work(launches, data["synchronisations"])


@dataclass(frozen=True)
class Parameters:
    """What is fitted. The defaults are the ideal card: every limit reached, nothing else costs."""

    bandwidth: tuple[tuple[str, float], ...] = ()  # fraction of the data sheet's reached, by card
    exposed: float = 0.0  # share of the smaller of memory and arithmetic time that is not hidden
    launch: float = 0.0  # seconds a launch
    synchronisation: float = 0.0  # seconds each time the host waits
    # PyTorch's row operators (softmax and its kin), relative to the card's fraction: they are in
    # most published backwards, and slower than a stream
    row_operators: float = 1.0

    def fraction(self, card: Card) -> float:
        """A card that nobody published timings of takes the fraction of the H100."""
        known = dict(self.bandwidth)
        return known.get(card.name, known.get("H100", 1.0))


IDEAL = Parameters()


def resident_blocks(launch: Launch, card: Card) -> int:
    """Blocks alive at once on the whole card."""
    limits = [BLOCKS_PER_SM, THREADS_PER_SM // max(launch.threads, 32)]
    if launch.registers:
        limits.append(REGISTERS_PER_SM // (launch.registers * max(launch.threads, 32)))
    if launch.shared:
        # 1 KB of each block's is the system's; an SM has 164 KB (8.0) or 228 KB (9.0, 10.0).
        limits.append((164 if card.arch == 80 else 228) * 1024 // (launch.shared + 1024))
    return max(1, min(limits)) * card.sms


def memory_bytes(launch: Launch, card: Card) -> float:
    """Bytes that reach the memory: of what is asked for again, the part that L2 does not hold.

    Rows are worked on by one block each and re-read in the same order, so the share found in L2 is
    its size over that of the rows in flight, up to 1. Spilled registers count in full.
    """
    again = launch.requested - launch.unique
    if again > 0 and launch.blocks:
        alive = min(resident_blocks(launch, card), launch.blocks)
        in_flight = alive * launch.unique / launch.blocks
        again *= 1 - min(1.0, card.l2 / in_flight)
    return launch.unique + again + launch.spilled


def limits(launch: Launch, card: Card) -> dict[str, float]:
    """Seconds that each part of the card would need at its peak."""
    clocks = card.sms * card.clock
    return {
        "memory": memory_bytes(launch, card) / card.bandwidth,
        "MUFU": launch.mufu / (MUFU_PER_CLOCK * clocks),
        "FMA": launch.fma / (card.fma_per_clock * clocks),
        "issue": launch.instructions / (ISSUES_PER_CLOCK * clocks),
    }


@dataclass(frozen=True)
class Prediction:
    seconds: float
    binding: str  # the limit that most of `limit` comes from
    limit: float  # seconds: the sum over launches of the largest limit

    @property
    def fraction(self) -> float:
        """Of the binding limit: 1 where the card's peak is reached."""
        return self.limit / self.seconds


def predict(work: Work, card: Card, parameters: Parameters) -> Prediction:
    """The time of one call: launches one after the other, each bound by its largest limit."""
    seconds = len(work.launches) * parameters.launch
    seconds += work.synchronisations * parameters.synchronisation
    share: dict[str, float] = {}
    for launch in work.launches:
        peak = limits(launch, card)
        name = max(peak, key=lambda key: peak[key])
        share[name] = share.get(name, 0.0) + peak[name]
        fraction = parameters.fraction(card)
        if launch.blocks and not launch.kernel:
            fraction *= parameters.row_operators
        memory = peak["memory"] / fraction
        arithmetic = max(peak["MUFU"], peak["FMA"], peak["issue"])
        seconds += max(memory, arithmetic) + parameters.exposed * min(memory, arithmetic)
    binding = max(share, key=lambda key: share[key])
    return Prediction(seconds, binding, sum(share.values()))


# Calibration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One published timing and the counts of what was timed."""

    kernel: str
    mode: str
    card: str
    x: str
    date: str
    version: str  # of the package that was counted
    seconds: float  # published, on the real card
    work: Work

    @property
    def key(self) -> str:
        return "|".join((self.kernel, self.mode, self.card, self.x, self.date))

    @property
    def held_back(self) -> bool:
        """A third of the points, chosen by a hash of their names: never used for fitting."""
        return hashlib.sha256(self.key.encode()).digest()[0] % 3 == 0


# A call predicted (by the ideal card) to keep the device busy for less than this waits for Python
# and the launches: its published time says how fast the host was. Reported apart, not fitted.
HOST_BOUND = 100e-6


def host_bound(point: Point) -> bool:
    return predict(point.work, CARDS[point.card], IDEAL).seconds < HOST_BOUND


def error(point: Point, parameters: Parameters) -> float:
    """The factor between prediction and publication, at least 1."""
    predicted = predict(point.work, CARDS[point.card], parameters).seconds
    return math.exp(abs(math.log(predicted / point.seconds)))


def fit(points: Sequence[Point]) -> Parameters:
    """The parameters with the least mean absolute logarithm of the error factor.

    Coordinate by coordinate over a shrinking grid: nothing here is smooth, and everything is cheap.
    """
    cards = sorted({point.card for point in points})
    values = {
        **{card: 0.85 for card in cards},
        "exposed": 0.5,
        "launch": 5e-6,
        "sync": 2e-5,
        "row": 0.9,
    }
    bounds = {
        **{card: (0.3, 1.0) for card in cards},
        "exposed": (0.0, 1.0),
        "launch": (0.0, 2e-5),
        "sync": (0.0, 3e-4),
        "row": (0.3, 1.0),
    }

    def parameters() -> Parameters:
        return Parameters(
            tuple((card, values[card]) for card in cards),
            values["exposed"],
            values["launch"],
            values["sync"],
            values["row"],
        )

    def cost() -> float:
        found = parameters()
        return sum(math.log(error(point, found)) for point in points)

    step = 0.25
    while step > 1e-3:
        improved = False
        for name, (low, high) in bounds.items():
            best, start = cost(), values[name]
            for direction in (-1, 1):
                values[name] = min(high, max(low, start + direction * step * (high - low)))
                if cost() < best - 1e-9:
                    improved = True
                    break
            else:
                values[name] = start
        if not improved:
            step /= 2
    return parameters()


def quantile(values: Iterable[float], q: float) -> float:
    """The value at rank ceil(q n): one of the values, no interpolation."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def summary(points: Sequence[Point], parameters: Parameters) -> dict[str, float]:
    """Points, and the median, 90th percentile and largest error factor."""
    errors = [error(point, parameters) for point in points]
    if not errors:
        return {"points": 0}
    return {
        "points": len(errors),
        "median": quantile(errors, 0.5),
        "p90": quantile(errors, 0.9),
        "worst": max(errors),
    }


def unseen_kernels(
    points: Sequence[Point], kernel: Callable[[Point], str] = lambda point: point.kernel
) -> list[float]:
    """Error factors of each kernel's points, predicted by a fit that saw no point of that kernel.

    What a prediction of a new kernel is worth: a held-back point has siblings among the fitted.
    """
    errors = []
    for name in sorted({kernel(point) for point in points}):
        parameters = fit([point for point in points if kernel(point) != name])
        errors += [error(point, parameters) for point in points if kernel(point) == name]
    return errors
