"""Where backend="triton" may be had, and Triton's other targets."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import labels_for, pair

import kdkernels
from kdkernels.divergences import DIVERGENCES

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]


def test_refused_without_a_driver_that_runs_here():
    if torch.cuda.is_available():
        pytest.skip("has a GPU, whose tensors are the ones that are served")
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve this call: .*driver"):
        kdkernels.distillation_loss(*pair(2, 8), backend="triton")


def test_float64_is_refused_by_name(triton_runs):
    student, teacher = pair(2, 8, dtypes=(torch.float32, torch.float64))
    with triton_runs():
        with pytest.raises(RuntimeError, match="backend='triton'.*float64; accepted: float32"):
            kdkernels.distillation_loss(student, teacher, backend="triton")
        with pytest.raises(RuntimeError, match="float64"):
            kdkernels.explain(student, teacher, backend="triton")
        assert kdkernels.explain(student, backend="triton").startswith("triton")


def test_kl_div_has_no_triton_kernels(triton_runs):
    x = torch.randn(2, 8)
    with triton_runs(), pytest.raises(RuntimeError, match="no CUDA or Triton kernels"):
        kdkernels.kl_div(x, x.softmax(-1), reduction="sum", backend="triton")


def test_none_never_emulates(triton_runs):
    """On CPU tensors None is the C++ library or the reference, whatever Triton's driver can do."""
    with triton_runs():
        assert not kdkernels.explain(torch.zeros(2, 8)).startswith("triton")


def test_in_the_interpreter():
    """A quick second opinion: NumPy instead of PTX. float32, as it truncates bfloat16."""
    code = """
import sys; sys.path.insert(0, "tests")
import torch, kdkernels
from cases import differentiated, labels_for, pair
student, teacher = pair(2, 40)
labels = labels_for(student)
for name in ("forward_kl", "jsd", "ab", "dkd"):
    got, want = (
        differentiated(student, teacher, labels, divergence=name, ce_weight=0.5,
                       label_smoothing=0.1, temperature=2.0, backend=backend)
        for backend in ("triton", "reference")
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
for f in (kdkernels.softmax, kdkernels.log_softmax):
    torch.testing.assert_close(f(student, backend="triton"), f(student, backend="reference"))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- machine code ----


def compiled(runs, arch, name, columns=16384):
    """{kernel: PTX} of a bfloat16 call with all its statistics, forward and backward."""
    from kdkernels.ops.distillation_loss import triton_kernels

    kernels = [getattr(triton_kernels, f"_{k}") for k in ("statistics", "sums", "finish",
                                                          "gradient")]  # fmt: skip
    for kernel in kernels:
        kernel.device_caches.clear()
    student, teacher = pair(1, columns, dtypes=(torch.bfloat16, torch.bfloat16))
    leaf = student.requires_grad_()
    with runs(arch=arch, check=False):
        kdkernels.distillation_loss(
            leaf, teacher, labels_for(student), divergence=name, backend="triton"
        ).backward()
    return {
        kernel.__name__: made.asm["ptx"]
        for kernel in kernels
        for cache in kernel.device_caches.values()
        for made in cache[0].values()
    }


@pytest.mark.parametrize("arch, name", [
    (80, "forward_kl"), (80, "dkd"), (90, "forward_kl"), (90, "jsd"), (90, "alpha"), (90, "ab"),
    (90, "skew_reverse_kl"), (100, "jeffreys"), (100, "skew_forward_kl"),
])  # fmt: skip
def test_machine_code(arch, name, tmp_path, triton_runs):
    """No spills, every load and store of logits 16 bytes wide, no software logarithm."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = tools / "ptxas-blackwell"
    if not (assembler.exists() and (tools / "nvdisasm").exists()):
        pytest.skip(f"ptxas-blackwell or nvdisasm is not in {tools}")
    for kernel, ptx in compiled(triton_runs, arch, name).items():
        (tmp_path / "k.ptx").write_text(ptx)
        target = re.search(r"^\.target (\w+)", ptx, re.M).group(1)
        done = subprocess.run(
            [assembler, "-v", "--gpu-name", target, tmp_path / "k.ptx", "-o", tmp_path / "k.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}, kernel
        assert int(re.search(r"Used (\d+) registers", done.stderr).group(1)) <= 96, kernel
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", tmp_path / "k.cubin"], capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
        widths = collections.Counter(re.findall(r"\b((?:LDG|STG)\.E[.\w]*)", sass))
        if kernel == "_finish":
            continue
        wide_loads = sum(n for op, n in widths.items() if op.startswith("LDG") and "128" in op)
        assert wide_loads >= 4, (kernel, widths)  # both rows, full tiles and the masked one
        # 16-bit loads would be logits; 16-bit stores are the zeros of padded columns.
        assert not any(op.startswith("LDG") and "U16" in op for op in widths), (kernel, widths)
        if kernel == "_gradient":
            assert any(op.startswith("STG") and "128" in op for op in widths), widths


def test_odd_strides_are_read_wide(triton_runs):
    """V = 50257: the body of the rows is 16 bytes a load, two bytes at the ends alone."""
    ptx = compiled(triton_runs, 90, "forward_kl", columns=50257)
    for kernel in ("_statistics", "_gradient"):
        assert ptx[kernel].count("ld.global.v4") >= 2, kernel


def compile_for_amd(kernel, constants):
    """gfx942, offline. That is all that is known of AMD: nothing here has run there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("student", "teacher", "student_grad", "teacher_grad"), "*bf16")
    types |= dict(masks="*u8", labels="*i64", smoothing="fp32")
    pointers = ("upstream", "rows", "student_label", "teacher_label", "states", "sums", "totals")
    types |= dict.fromkeys(pointers, "*fp32")
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=dict(num_warps=4))
    assert "gfx942" in made.asm["amdgcn"]


CUT = dict(
    BLOCK=2048, GROUP=8, CHUNK=8192, SHIFTED=False, RAGGED=False, STUDENT_WIDE=True,
    TEACHER_WIDE=True,
)  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_compile_for_amd(name):
    from kdkernels.divergences_triton import TERMS
    from kdkernels.ops.distillation_loss import triton_kernels

    term = TERMS[name]
    constants = dict(
        NAME=name, TERM=term.function, MIXES=term.mixes, EXCLUDES=name == "dkd", HARDWARE=False,
        LABELLED=True, STUDENT_GRAD=True, TEACHER_GRAD=True, STUDENT_GRAD_WIDE=True,
        TEACHER_GRAD_WIDE=True, **CUT,
    )  # fmt: skip
    compile_for_amd(triton_kernels._gradient, constants)


# alpha: has float64 logarithms; dkd: the branch of its own; jsd: a second sweep.
@pytest.mark.parametrize("name", ["alpha", "dkd", "jsd"])
def test_forward_compiles_for_amd(name):
    from kdkernels.divergences_triton import TERMS
    from kdkernels.ops.distillation_loss import triton_kernels as kernels

    term = TERMS[name]
    kind = kernels.UNIT.value | kernels.SMOOTHING.value | kernels.STATS.value
    kind |= kernels.EXCLUDE.value if name == "dkd" else 0
    kind |= kernels.TILTED.value if term.tilted else 0
    kind |= kernels.FORWARD.value if term.forward else 0
    compile_for_amd(kernels._statistics, dict(KIND=kind, **CUT))
    if name == "jsd":
        sums = dict(TERM=term.function, MIXES=term.mixes, HARDWARE=False, CHUNKS=4)
        compile_for_amd(kernels._sums, sums | CUT)
    finish = dict(
        NAME=name, KIND=kind, HARDWARE=False, CHUNKS=4, CLASS_B=name == "jsd", LABELLED=True
    )
    compile_for_amd(kernels._finish, finish)
