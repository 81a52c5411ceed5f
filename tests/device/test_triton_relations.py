"""RKD and DIST losses in Triton, executed as PTX on the CPU."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from broken import broken_copy
from relations import LOSSES, assert_no_worse_than_torch, differentiated, features

import kdkernels

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Of student and teacher. RKD: tiles of 32 points and 16 × 64 columns, the last of each not full;
# angles in blocks of 64 others. DIST: two chunks of rows; a row of three tiles, and rows apart.
CASES = {
    "distances": ("rkd distance", (37, 70), (37, 9), torch.float32),
    "distances, bfloat16": ("rkd distance", (16, 5), (16, 5), torch.bfloat16),
    "angles": ("rkd angle", (67, 6), (67, 5), torch.float32),
    "angles of one block": ("rkd angle", (20, 6), (20, 5), torch.float32),
    "correlations": ("dist", (270, 40), (270, 40), torch.float32),
    "correlations, long rows": ("dist", (9, 4100), (9, 4100), torch.bfloat16),
}


def inputs(case):
    name, shape, teacher_shape, dtype = CASES[case]
    student, teacher = features(shape, 1, dtype), features(teacher_shape, 2, dtype)
    if name != "dist":  # coinciding points, and a pair 1e-3 apart
        student[1], teacher[2] = student[0], teacher[3]
        student[5] = student[6] + 1e-3 * features(shape[1:], 3, dtype)
    return LOSSES[name], student, teacher


@pytest.mark.parametrize("case", [case for case in CASES if case != "angles of one block"])
def test_values(case, triton_runs):
    (ours, definition, _), student, teacher = inputs(case)
    with triton_runs() as record:
        got = differentiated(ours, student, teacher, backend="triton")
    truth = differentiated(definition, student.double(), teacher.double())
    own = differentiated(definition, student.float(), teacher.float())
    half = student.dtype if student.dtype != torch.float32 else None
    assert_no_worse_than_torch(got, truth, own, half, units=8)
    assert record.launches == {"rkd distance": 5, "rkd angle": 4, "dist": 3}[CASES[case][0]]


def test_distances_in_parts(triton_runs, monkeypatch):
    """Above what is kept: 15 rows at a time, each distance computed once more in every sweep."""
    from kdkernels.ops.rkd_loss import triton_kernels

    (ours, _, _), student, teacher = inputs("distances")
    want = differentiated(ours, student, teacher, backend="cpp")
    monkeypatch.setattr(triton_kernels, "_KEPT", 15 * len(student))
    with triton_runs() as record:
        got = differentiated(ours, student, teacher, backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert record.launches == 3 * (2 + 3 + 4)


def test_layouts_temperatures_and_few_rows(triton_runs):
    """Strided rows, a temperature on the device (one out of range: NaN), one row and none."""
    student = features((8, 90), 1, torch.float32)[::2, 3:60]
    teacher = features((57, 4), 2, torch.float16).T
    with triton_runs():
        for n, tau in ((4, 2.5), (4, -1.0), (1, 2.5), (0, 2.5)):
            got, want = (
                differentiated(
                    kdkernels.dist_loss, student[:n], teacher[:n], backend=backend,
                    temperature=torch.tensor(tau),
                )
                for backend in ("triton", "cpp")
            )  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, equal_nan=True)
        for n in (0, 1):
            for op in (kdkernels.rkd_distance_loss, kdkernels.rkd_angle_loss):
                loss, grad = differentiated(op, student[:n], teacher[:n], backend="triton")
                assert loss == 0 and (grad == 0).all()


# The module, the function a mistake is in, the text and instead of it, and a case that shows it.
BROKEN = {
    "pairs' bound": ("rkd_loss", "_pairs", "mask=j < n, o", "mask=j < n + 1, o", "distances"),
    "low part": ("rkd_loss", "twice", "+ rest", "- rest", "angles of one block"),
    "no barrier": ("rkd_loss", "_distance_weights", "tl.debug_barrier()", "", "distances"),
    "tiles": ("dist_loss", "_columns", "_apart * weight", "_apart * more", "correlations"),
}  # fmt: skip


_KEPT: list[object] = []  # a kernel that is freed after its test has no driver to unload it with


def judge(kernels, name, case, runs):
    _, student, teacher = inputs(case)
    with runs():
        if name == "rkd_loss":
            op = f"rkd_{case.split()[0][:-1]}_loss"
            got = getattr(kernels, op)(student, teacher, True)
            want = getattr(torch.ops.kdkernels, op)(student, teacher, True)
        else:
            got = kernels.dist_loss(student, teacher, 1.0, None)
            want = torch.ops.kdkernels.dist_loss(student, teacher, 1.0, None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mistake", BROKEN)
def test_mistakes_are_caught(mistake, tmp_path, triton_runs):
    module, function, text, instead, case = BROKEN[mistake]
    kernels = importlib.import_module(f"kdkernels.ops.{module}.triton_kernels")
    broken = broken_copy(tmp_path, kernels, function, text, instead)
    _KEPT.append(broken)
    with pytest.raises(AssertionError):
        judge(broken, module, case, triton_runs)


# ---- machine code ----

EXACT = dict(enable_fp_fusion=False)
# Kernel, its compile-time arguments, and warps.
MACHINE_CODE = {
    "distances": (
        "rkd_loss", "_pairs", dict(DOUBLE=False, PART=128, BLOCK=32, low=None, inverses=None), 4
    ),
    "squares": ("rkd_loss", "_pairs", dict(DOUBLE=True, PART=128, BLOCK=32), 4),
    "angles": ("rkd_loss", "_angles", dict(ARMS=32, OTHERS=64), 4),
    "pull": ("rkd_loss", "_pull", dict(FIRST=True, POINTS=16, COLUMNS=64), 4),
    "rows": ("dist_loss", "_rows", dict(GIVEN=True, BLOCK=2048), 8),
    "columns": ("dist_loss", "_columns", dict(GIVEN=True, CHUNK=256, HEIGHT=16, BLOCK=128), 4),
    "gradient": ("dist_loss", "_gradient", dict(GIVEN=True, BLOCK=2048), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINE_CODE)
def test_no_spills(name, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    if not assembler.exists():
        pytest.skip(f"no {assembler}")
    module, function, constants, warps = MACHINE_CODE[name]
    module = importlib.import_module(f"kdkernels.ops.{module}.triton_kernels")
    kernel = getattr(module, function)
    numbers = ("n", "vocab", "columns", "first", "rows", "student_stride", "teacher_stride")
    scalars = dict.fromkeys(numbers, "i32") | dict(number="fp32")
    if name in ("rows", "columns", "gradient"):
        scalars |= dict(rows="*fp32", columns="*fp32", student="*bf16", teacher="*bf16")
        scalars |= dict(student_grad="*bf16")
    signature = {
        argument: "constexpr" if argument in constants else scalars.get(argument, "*fp32")
        for argument in kernel.arg_names
    }
    made = triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options=dict(num_warps=warps, **EXACT),
    )
    (tmp_path / "k.ptx").write_text(made.asm["ptx"])
    target = re.search(r"^\.target (\w+)", made.asm["ptx"], re.M).group(1)
    said = subprocess.run(
        [assembler, "-v", "--gpu-name", target, tmp_path / "k.ptx", "-o", tmp_path / "k.cubin"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}, said
