"""linear_distillation_loss(low_memory=True), executed as PTX on the CPU, against float64.

Every divergence runs in Triton's interpreter, with small tiles; as PTX, because each kernel takes
10 s to translate, forward KL with every option, JSD (two sweeps) and DKD in tiles of full size, on
one architecture each.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import labels_for
from low_memory import NAMES, check, every_option, models
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]


def test_every_divergence_and_kind_of_teacher_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/low_memory.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# 200 rows: a full block and one that is not. 300 columns: full tiles and one that is not, in one
# chunk, and with memory for 128 columns three panels. Hidden sizes that fill no step of 64.
SIZES = dict(n=200, vocab=300, widths=(96, 40), dtype=torch.bfloat16)


def test_every_option(triton_runs):
    """And bits: of permuted schedules, and of a token's loss alone and among others."""
    tensors = models(**SIZES)
    labels, heads, options = every_option("forward_kl", 200, 300)
    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            tensors[name][1:3] = 0.5
    with triton_runs(arch=80) as record:
        check(tensors, labels, "forward_kl", {}, heads=heads, floor=3e-3, **options)
    # A warp's m16n8k16 is 4096 FLOPs; whole tiles and steps: 256 rows, 384 columns, 128 + 64.
    for kernel in ("_statistics", "_gradient"):
        flops = record.kernels[kernel].opcodes["mma"] / 32 * 4096
        assert flops == 2 * 256 * 384 * (128 + 64), kernel

    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            tensors[name][1:3] = torch.nan  # of masked rows

    def run(rows, **configured):
        given = {
            name: x.detach()[rows].requires_grad_() if name.endswith("hidden") else x
            for name, x in tensors.items()
        }
        told = {k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        with triton_runs(arch=80, check=False, **configured):
            loss = kdkernels.linear_distillation_loss(
                **given, labels=labels[rows], low_memory=True, reduction="none",
                teacher_grad=True, **heads, **told,
            )  # fmt: skip
            return loss, torch.autograd.grad(loss.sum(), list(given.values()))

    loss, grads = run(slice(0, 200))
    assert not loss[1:3].any() and all(g.isfinite().all() for g in grads)
    assert not grads[0][1:3].any()
    again, again_grads = run(slice(0, 200), seed=1)
    assert torch.equal(loss, again)
    assert all(torch.equal(x, y) for x, y in zip(grads, again_grads, strict=True))
    alone, _ = run(slice(150, 151))
    assert torch.equal(alone, loss[150:151])


def test_two_sweeps(triton_runs):
    """JSD with upstream factors by token. Near the teacher: issue 4's case, at its size of V·H."""
    tensors = models(**{**SIZES, "widths": (96, 96)}, bias=False)
    up = torch.linspace(-1, 2, 200, dtype=torch.float64)
    with triton_runs(arch=90):
        check(tensors, None, "jsd", {}, floor=3e-3, reduction="none", upstream=up, temperature=2.0)
        near = models(64, 1024, (96, 96), torch.bfloat16, bias=False)
        for part in ("hidden", "weight"):
            x = near[f"student_{part}"].detach()
            near[f"teacher_{part}"] = (x + 0.03 * x.std() * torch.randn_like(x)).requires_grad_()
        check(near, None, "jsd", {}, floor=3e-3, reduction="sum")


def test_float16_and_given_logits(triton_runs):
    """DKD reads both logits at the label. Of the logits' gradient, 1e-7 and smaller, float16 would
    leave nothing; the hidden states' and the weight's are larger. The teacher's by column.
    """
    tensors = models(n=70, vocab=300, widths=(64, 0), dtype=torch.float16, teacher="logits")
    by_column = tensors["teacher_logits"].detach().t().contiguous().t().requires_grad_()
    tensors["teacher_logits"] = by_column
    labels = labels_for(torch.empty(70, 300))
    with triton_runs(arch=90):
        check(tensors, labels, "dkd", {}, floor=2e-3)


def test_compiles_to_one_graph(triton_runs):
    torch._dynamo.reset()
    tensors = models(**SIZES)
    labels, heads, options = every_option("forward_kl", 200, 300)

    def loss(*leaves):
        given = dict(zip(tensors, leaves, strict=True))
        return kdkernels.linear_distillation_loss(
            **given, labels=labels, low_memory=True, teacher_grad=True, **heads, **options
        )

    leaves = list(tensors.values())
    counter = CompileCounterWithBackend("aot_eager")
    with triton_runs(arch=80, check=False):
        want = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, backend=counter, fullgraph=True)
        got = torch.autograd.grad(compiled(*leaves), leaves)
    assert counter.frame_count == 1
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_opcheck(triton_runs):
    """Schema, fake kernels and what they are registered for."""
    from kdkernels.ops import linear_distillation_loss as package
    from kdkernels.ops.linear_distillation_loss import low_memory

    tensors = models(**SIZES)
    labels, heads, options = every_option("forward_kl", 200, 300)
    calls = []
    with triton_runs(arch=80, check=False):
        for name in ("low_memory", "low_memory_backward"):
            op = getattr(torch.ops.kdkernels, f"linear_distillation_loss_{name}_triton")
            calls.append(op)
        given = [tensors.get(name) for name in NAMES]
        given = [None if x is None else x.detach() for x in given]
        transforms = (5.0, 0.7, torch.bfloat16, None, 1.3, torch.bfloat16)
        row = package.row_options(
            labels, torch.Size([200]), 300, torch.device("cpu"), torch.float32, **options
        )
        torch.library.opcheck(calls[0], (*given, *transforms, *row), test_utils=CHECKS)
        loss, rows, at_labels = calls[0](*given, *transforms, *row)
        arguments = (
            torch.ones(()), rows, at_labels, low_memory.PANEL_BYTES, [True] * 6 + [False], *given,
            *transforms, labels, "forward_kl", 0.1, 300,
        )  # fmt: skip
        torch.library.opcheck(calls[1], arguments, test_utils=CHECKS)


CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("change, error, text", [
    (dict(backend="cpp"), RuntimeError, "backend='cpp' cannot serve low_memory=True: .*'triton'"),
    (dict(backend="reference"), RuntimeError, "backend='reference' cannot serve low_memory=True"),
    (dict(chunk_rows=4), ValueError, "chunk_rows=4 with low_memory=True.*accepted: memory_budget"),
    (dict(low_memory=1), TypeError, "low_memory is a int; accepted: bool"),
])  # fmt: skip
def test_errors(change, error, text, triton_runs):
    tensors = models(4, 9, (3, 5))
    with triton_runs(), pytest.raises(error, match=text):
        kdkernels.linear_distillation_loss(**tensors, **{"low_memory": True, **change})


def test_no_rows_and_double_backward(triton_runs):
    """0 with a graph; nothing is launched."""
    tensors = models(0, 9, (3, 5))
    leaves = list(tensors.values())
    with triton_runs() as record:
        loss = kdkernels.linear_distillation_loss(**tensors, low_memory=True, teacher_grad=True)
        assert loss == 0
        for grad, leaf in zip(
            torch.autograd.grad(loss, leaves, retain_graph=True), leaves, strict=True
        ):
            assert grad.shape == leaf.shape and not grad.any()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward"):
            grads[1].sum().backward()
    assert record.launches == 0


def test_float64_is_refused(triton_runs):
    tensors = models(4, 9, (3, 5), torch.float64)
    with triton_runs(), pytest.raises(RuntimeError, match="low_memory=True: .*float64"):
        kdkernels.linear_distillation_loss(**tensors, low_memory=True)


def test_no_kernels_for_cpu_tensors():
    if torch.cuda.is_available():
        pytest.skip("has a GPU, whose tensors are the ones that are served")
    with pytest.raises(RuntimeError, match="low_memory=True: .*driver"):
        kdkernels.linear_distillation_loss(**models(4, 9, (3, 5)), low_memory=True)


def test_no_float_is_added_atomically():
    source = ROOT / "kdkernels" / "ops" / "linear_distillation_loss" / "triton_kernels.py"
    assert not re.search(r"tl\.atomic", source.read_text())
