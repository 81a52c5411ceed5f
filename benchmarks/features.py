"""feature_loss and joint_distillation_loss against the lines people write today.

    python -m benchmarks.features --help

A step is the loss and the gradients of everything of the student: logits and features. Every
contestant is checked against float64 on the case's own inputs before anything of it is timed. They
are timed alternately; what a contestant allocates, its gradients among it, is inside, letting go of
them is not. A ratio is the median of the rounds' ratios.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

from . import report, run
from .run import CheckFailed

TEMPERATURE, KD_WEIGHT, CE_WEIGHT = 4.0, 0.9, 0.1
OURS, EAGER, COMPILE = "kdkernels", "eager", "torch.compile"
# Relative error of the loss and of each gradient (Euclidean norm); baselines round what lies
# between their operations.
TOLERANCE = {
    (True, "float32"): 1e-5,
    (True, "bfloat16"): 2**-8,
    (False, "float32"): 1e-4,
    (False, "bfloat16"): 0.1,
}

# Features of one batch, without its size. CIFAR's ResNet8x4 and ResNet32x4: three stages (in the
# field report's sizes, ../shared/field/vision-peers.md, P3) and the pooled vector.
CIFAR = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (256,))
# A network for 28×28 or 8×8 images, and one of a demo's size: there a step is mostly calls.
SMALL = ((32, 8, 8), (64, 8, 8), (128, 4, 4), (256,))
TINY = ((16, 8, 8), (32, 4, 4), (64, 2, 2), (64,))
TOKENS = ((197, 192),) * 4  # four layers of DeiT-Ti


@dataclass(frozen=True)
class Case:
    kind: str  # "joint": with logits, KD and cross-entropy; "features": the features alone
    metric: str
    size: str  # which of SIZES
    dtype: str = "float32"
    rows: int = 128
    vocab: int = 100

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.metric}/{self.size}/{self.dtype}/{self.rows}x{self.vocab}"


SIZES = {"cifar": CIFAR, "small": SMALL, "tiny": TINY, "tokens": TOKENS}
CASES = [
    *(Case("joint", metric, "cifar") for metric in ("l2", "attention", "cosine")),
    *(Case("joint", metric, "small") for metric in ("l2", "attention", "cosine")),
    *(Case("joint", metric, "tiny") for metric in ("l2", "attention", "cosine")),
    Case("joint", "l2", "cifar", "bfloat16"),
    Case("joint", "l2", "tiny", rows=64),
    *(
        Case("features", metric, "cifar")
        for metric in ("l2", "smooth_l1", "cosine", "normalised", "attention", "gaussian_nll")
    ),
    *(Case("features", metric, "tokens", rows=32) for metric in ("l2", "cosine")),
    *(Case("features", metric, "tokens", "bfloat16", rows=32) for metric in ("l2", "cosine")),
]


class Inputs(NamedTuple):
    leaves: tuple[Tensor, ...]  # what gets gradients: logits (joint), features, log-variances
    teacher_logits: Tensor
    teacher_features: tuple[Tensor, ...]
    labels: Tensor

    def double(self) -> "Inputs":
        leaves = tuple(x.detach().double().requires_grad_() for x in self.leaves)
        features = tuple(x.double() for x in self.teacher_features)
        return Inputs(leaves, self.teacher_logits.double(), features, self.labels)


Step = Callable[[Inputs], Any]  # the loss


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = SIZES[case.size]
    features = [normal(case.rows, *size) for size in sizes]
    logits = [normal(case.rows, case.vocab).mul_(3)] if case.kind == "joint" else []
    dims = [x.shape[_channel(x)] for x in features]
    variances = [normal(n) for n in dims] if case.metric == "gaussian_nll" else []
    return Inputs(
        tuple(x.requires_grad_() for x in (*logits, *features, *variances)),
        normal(case.rows, case.vocab).mul_(3),
        tuple(normal(case.rows, *size) for size in sizes),
        torch.randint(case.vocab, (case.rows,), generator=generator),
    )


def _channel(feature: Tensor) -> int:
    return 1 if feature.dim() == 4 else feature.dim() - 1


# ---- the lines people write today, each as torch's "mean" ----


def _attention(x: Tensor) -> Tensor:
    # A vector has one position, whose normalised map is 1 whatever it holds.
    positions = x.pow(2).mean(_channel(x)).flatten(1) if x.dim() > 2 else x.pow(2).mean(1, True)
    return F.normalize(positions)


def _gaussian(student: Tensor, t: Tensor, log_variance: Tensor) -> Tensor:
    teacher, variance = t.movedim(_channel(t), -1), log_variance.exp().expand(student.shape)
    return F.gaussian_nll_loss(student, teacher, variance, eps=0.0)


LINES: dict[str, Callable[..., Tensor]] = {
    "l2": lambda s, t: F.mse_loss(s, t),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t),
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t, dim=_channel(s))).mean(),
    "normalised": lambda s, t: F.mse_loss(
        F.normalize(s, dim=_channel(s)), F.normalize(t, dim=_channel(t))
    ),
    "attention": lambda s, t: (_attention(s) - _attention(t)).pow(2).mean(),
    "gaussian_nll": lambda s, t, v: _gaussian(s.movedim(_channel(s), -1), t, v),
}


def _lines(case: Case) -> Step:
    distance, layers = LINES[case.metric], len(SIZES[case.size])

    def step(inputs: Inputs) -> Tensor:
        first = 1 if case.kind == "joint" else 0
        students = inputs.leaves[first : first + layers]
        variances: list[Any] = [(v,) for v in inputs.leaves[first + layers :]] or [()] * layers
        loss = sum(
            distance(s, t, *v)
            for s, t, v in zip(students, inputs.teacher_features, variances, strict=True)
        )
        if case.kind == "joint":
            logits = inputs.leaves[0]
            kd = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, dim=-1),
                F.softmax(inputs.teacher_logits / TEMPERATURE, dim=-1),
                reduction="batchmean",
            )
            ce = F.cross_entropy(logits, inputs.labels)
            loss = KD_WEIGHT * TEMPERATURE**2 * kd + CE_WEIGHT * ce + loss
        assert isinstance(loss, Tensor)
        return loss

    return step


def _compiled(case: Case) -> Step:
    torch._dynamo.reset()
    return torch.compile(_lines(case), fullgraph=True, dynamic=False)


def _ours(case: Case) -> Step:
    layers, gaussian = len(SIZES[case.size]), case.metric == "gaussian_nll"
    options: dict[str, Any] = {"metric": "l2" if case.metric == "normalised" else case.metric}
    if case.metric == "normalised":
        options["normalize"] = "l2"

    def step(inputs: Inputs) -> Any:
        if case.kind == "joint":
            return kdkernels.joint_distillation_loss(
                inputs.leaves[0],
                inputs.teacher_logits,
                inputs.labels,
                inputs.leaves[1:],
                inputs.teacher_features,
                feature_reduction="mean",
                temperature=TEMPERATURE,
                kd_weight=KD_WEIGHT,
                ce_weight=CE_WEIGHT,
                backend="cpp",
                **options,
            )
        variances: dict[str, Any] = {"log_variance": inputs.leaves[layers:]} if gaussian else {}
        return kdkernels.feature_loss(
            inputs.leaves[:layers],
            inputs.teacher_features,
            reduction="mean",
            backend="cpp",
            **options,
            **variances,
        )

    return step


CONTESTANTS = {OURS: _ours, EAGER: _lines, COMPILE: _compiled}


def gradients(step: Step, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = step(inputs)
    return loss, torch.autograd.grad(loss, inputs.leaves)


def check(case: Case, name: str, step: Step, inputs: Inputs) -> dict[str, float]:
    """Largest relative errors against float64."""
    true_loss, true = gradients(_lines(case), inputs.double())
    loss, grads = gradients(step, inputs)
    # A gradient of exactly 0 (attention's of a vector) has no relative error.
    of_grads = [
        float((got.double() - want).norm() / (want.norm() + 1e-12))
        for got, want in zip(grads, true, strict=True)
    ]
    errors = {
        "loss": float(((loss.double() - true_loss) / true_loss).detach().abs()),
        "gradient": max(of_grads),
    }
    allowed = TOLERANCE[name == OURS, case.dtype]
    if not max(errors.values()) <= allowed:  # NaN fails too
        raise CheckFailed(f"{case.name}: {name}: relative errors {errors}; allowed: {allowed:.2g}")
    return errors


def measure(case: Case, names: list[str], seconds: float) -> dict[str, Any]:
    inputs = make_inputs(case)
    steps = {name: CONTESTANTS[name](case) for name in names}
    errors = {name: check(case, name, step, inputs) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    rounds, end = -run.WARM_UP, time.perf_counter() + seconds
    while rounds < run.MIN_ROUNDS or (rounds < run.MAX_ROUNDS and time.perf_counter() < end):
        for name, step in steps.items():
            start = time.perf_counter()
            result = gradients(step, inputs)
            stop = time.perf_counter()
            del result
            if rounds >= 0:
                times[name].append(stop - start)
        rounds += 1
    gc.enable()
    return {
        "case": case.name,
        "elements": sum(x.numel() for x in inputs.leaves),
        "rounds": rounds,
        "contestants": {
            name: {
                "ms": statistics.median(t) * 1e3,
                "fastest_ms": min(t) * 1e3,
                "of_ours": statistics.median(b / a for a, b in zip(times[OURS], t, strict=True)),
                "errors": errors[name],
            }
            for name, t in times.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    rows = [[result["case"], "ms", "fastest", "× ours", "error: loss", "gradient"]]
    for name, x in result["contestants"].items():
        rows.append(
            [
                name,
                *(report.number(x[key]) for key in ("ms", "fastest_ms", "of_ours")),
                *(f"{x['errors'][key]:.1e}" for key in ("loss", "gradient")),
            ]
        )
    return report.aligned(rows)


parser = argparse.ArgumentParser(
    prog="python -m benchmarks.features",
    description="Feature distances, alone and together with KD and cross-entropy, on the CPU: loss "
    "and all gradients, ours against eager PyTorch and torch.compile.",
)
parser.add_argument("--case", action="append", metavar="PATTERN", help="as joint/*/cifar/*")
parser.add_argument("--seconds", type=float, default=5.0, help="for each case; at least 7 rounds")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--no-compile", action="store_true")
parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/features.json"))


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    patterns = options.case or ["*"]
    cases = [case for case in CASES if any(fnmatch(case.name, p) for p in patterns)]
    if not cases:
        parser.error(f"no case fits --case {' '.join(patterns)}")
    torch.set_num_threads(options.threads)
    results = run.environment(options.threads) | {"cases": [], "failed": []}
    print(report.machine_line(results))
    print(f"load average before the start: {results['machine']['load_average']:.1f}", flush=True)
    names = [name for name in CONTESTANTS if not (options.no_compile and name == COMPILE)]
    for case in cases:
        try:
            result = measure(case, names, options.seconds)
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
