"""distillation_loss's CUDA kernels, executed as PTX on the CPU through their own launch code."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import emulate
import oracle
import pytest
import torch
from cases import (
    ALL,
    assert_no_worse_than_torch,
    differentiated,
    divergence,
    labels_for,
    logits,
    pair,
)

import kdkernels

REASON = emulate.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HALF = (torch.bfloat16, torch.bfloat16)
FLOAT = (torch.float32, torch.float32)


def check(student, teacher, labels=None, *, name, parameters=None, arch="sm_90", **options):
    """Default mode, one pass, and one pass with the teacher's gradient, against the oracle;
    returns the records of the first two.
    """
    told = dict(divergence_name=name, parameters=parameters or {}, reduction="none", **options)
    truth = oracle.distillation(student, teacher, labels, **told)
    own = oracle.eager(student, teacher, labels, **told)
    options |= dict(divergence=divergence(name, parameters or {}), reduction="none")
    call = (student, teacher, labels)
    got, default = emulate.cuda(differentiated, *call, arch=arch, **options)
    assert_no_worse_than_torch(got, truth, own)
    both, record = emulate.cuda(
        kdkernels.distillation_loss_and_grad, *call, arch=arch, teacher_grad=True, **options
    )
    assert_no_worse_than_torch(both, truth, own)
    alone, one_pass = emulate.cuda(
        kdkernels.distillation_loss_and_grad, *call, arch=arch, **options
    )
    assert_no_worse_than_torch((*alone, both[2]), truth, own)
    for each in (default, record, one_pass):
        each.assert_clean()
    return default, one_pass


@pytest.mark.parametrize("name, parameters", ALL)
def test_every_divergence(name, parameters):
    """131 columns: an odd number, so that every row starts elsewhere in a 16-byte chunk."""
    student, teacher = pair(4, 131)
    labels = labels_for(student) if name == "dkd" else None
    told = dict(temperature=2.0, teacher_temperature=1.5)
    check(student, teacher, labels, name=name, parameters=parameters, **told)


# What each is for: 1 and 2, almost nothing in a slot; 31, less than a warp's first slots; 1000, a
# warp a row with several slots a lane; 1031, the first size with a block a row; 4099, mixed
# dtypes in
# rows that start anywhere; 32000 and 50257 (odd), clusters; 128256, a cluster of eight.
SHAPES = [
    ("jsd", (3, 1), HALF),
    ("jsd", (3, 2), FLOAT),
    ("jsd", (3, 31), HALF),
    ("reverse_kl", (3, 1000), FLOAT),
    ("jsd", (3, 1031), HALF),
    ("forward_kl", (2, 4099), (torch.float16, torch.bfloat16)),
    ("reverse_kl", (2, 4099), (torch.bfloat16, torch.float32)),
    ("forward_kl", (2, 32000), HALF),
    ("reverse_kl", (2, 50257), HALF),
    ("jsd", (1, 128256), HALF),
]


@pytest.mark.parametrize("name, shape, dtypes", SHAPES)
def test_shapes(name, shape, dtypes):
    student, teacher = pair(*shape, dtypes=dtypes)
    check(student, teacher, name=name)


# On sm_80 blocks of a row meet in device memory from V = 40,000 (bfloat16) on.
@pytest.mark.parametrize("shape", [(3, 131), (3, 4099), (1, 50257)])
def test_sm_80(shape):
    student, teacher = pair(*shape, dtypes=HALF)
    check(student, teacher, name="forward_kl", arch="sm_80")


# A divergence whose sum of G is not known, alone and with a label term, where blocks meet; the
# second row is masked.
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_sm_80_with_labels(ce_weight):
    student, teacher = pair(2, 50257, dtypes=HALF)
    labels = labels_for(student)
    labels[1] = -100
    options = dict(ce_weight=ce_weight, temperature=2.0)
    _, record = check(student, teacher, labels, name="jsd", arch="sm_80", **options)
    assert record.arguments["student"].read <= 1.01 * 50257 * 2


@pytest.fixture
def little_shared_memory(monkeypatch):
    """Chips with so little of it that a row longer than 9,000 columns goes tile by tile."""
    import ptxrun.module

    for arch, device in list(ptxrun.module.DEVICES.items()):
        little = dataclasses.replace(device, shared_per_block=8400, shared_per_multiprocessor=18000)
        monkeypatch.setitem(ptxrun.module.DEVICES, arch, little)


# An odd number of columns: three tiles in each of the eight blocks of a cluster (of the 32 that
# meet in device memory), the last one short, and each starting anywhere in a chunk.
@pytest.mark.parametrize(
    "name, arch, vocab, options",
    [
        ("forward_kl", "sm_90", 9001, {}),
        ("jsd", "sm_90", 9001, {}),
        ("renyi", "sm_90", 9001, {}),  # a sweep more
        ("dkd", "sm_90", 9001, dict(ce_weight=0.5, label_smoothing=0.1, temperature=2.0)),
        ("forward_kl", "sm_80", 36001, {}),
    ],
)
def test_tile_by_tile(little_shared_memory, name, arch, vocab, options):
    student, teacher = pair(2, vocab, dtypes=HALF)
    labels = labels_for(student) if options else None
    _, record = check(student, teacher, labels, name=name, arch=arch, **options)
    (launch,) = record.all_launches
    assert launch.grid[0] == 2 * (8 if arch == "sm_90" else 32)
    assert record.arguments["student"].read > 1.9 * student.numel() * 2  # not resident: read again


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "dkd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_label_terms(name, temperature):
    """At temperature 1 the label terms share the student's softmax; else they have their own."""
    student, teacher = pair(4, 131)
    options = dict(ce_weight=0.5, label_smoothing=0.1, z_loss_weight=0.01, temperature=temperature)
    check(student, teacher, labels_for(student), name=name, **options)


def test_nothing_but_the_label_counts():
    """The softmax at temperature 2 is then neither computed nor read."""
    student, teacher = pair(3, 131)
    options = dict(kd_weight=0.0, ce_weight=1.0, temperature=2.0)
    check(student, teacher, labels_for(student), name="forward_kl", **options)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("vocab", [131, 1100])  # a warp a row; a block a row
def test_statistics_of_a_row_without_kd(name, vocab):
    """Its gradient reads the exponentials that the sweep for the statistics must have left."""
    student, teacher = pair(3, vocab)
    options = dict(
        divergence=name, kd_weight=torch.tensor([1.0, 0.0, 1.0]), ce_weight=1.0, return_stats=True
    )
    call = (student, teacher, labels_for(student))
    got, record = emulate.cuda(kdkernels.distillation_loss_and_grad, *call, **options)
    expected = kdkernels.distillation_loss_and_grad(*call, backend="reference", **options)
    record.assert_clean()
    torch.testing.assert_close(got[1], expected[1], rtol=2e-5, atol=2e-7)


def test_statistics_and_reductions_agree_with_the_reference():
    student, teacher = pair(5, 200)
    labels, weights = labels_for(student), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    labels[3] = -100
    for name in ("forward_kl", "dkd"):
        options = dict(divergence=name, ce_weight=0.3, label_smoothing=0.1, token_weights=weights)
        for reduction in ("batchmean", "sum", "mean"):
            told = dict(options, reduction=reduction, return_stats=True)
            got, record = emulate.cuda(
                kdkernels.distillation_loss_and_grad, student, teacher, labels, **told
            )
            expected = kdkernels.distillation_loss_and_grad(
                student, teacher, labels, backend="reference", **told
            )
            for x, y in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-7)
            record.assert_clean()
            assert record.launches == 1


def test_a_masked_row_is_not_read():
    """NaN in it cannot leak, and its bytes are not asked for."""
    student, teacher = pair(3, 1024, dtypes=HALF)
    student[1], teacher[1] = torch.nan, torch.nan
    labels = torch.tensor([3, -100, 5])
    (loss, grad), record = emulate.cuda(
        kdkernels.distillation_loss_and_grad, student, teacher, labels, divergence="jsd"
    )
    assert loss.isfinite() and (grad[1] == 0).all() and grad.isfinite().all()
    assert record.arguments["student"].read == 2 * 1024 * 2


def test_padded_columns():
    """vocab_size below the columns: padding is not read (NaN) and its gradient is 0."""
    student, teacher = logits(2, 2056, seed=1), logits(2, 2050, seed=2)
    student[:, 2049:], teacher[:, 2049:] = torch.nan, torch.nan
    (loss, grad), record = emulate.cuda(
        kdkernels.distillation_loss_and_grad, student, teacher, vocab_size=2049
    )
    expected = kdkernels.distillation_loss_and_grad(
        student[:, :2049].contiguous(), teacher[:, :2049].contiguous()
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[:, :2049], expected[1], rtol=1e-4, atol=1e-8)
    assert (grad[:, 2049:] == 0).all()
    record.assert_clean()


def test_a_parameter_tensor_may_ask_for_another_divergence_in_each_row():
    student, teacher = pair(3, 131)
    beta = torch.tensor([0.0, 0.5, 1.0])
    told = dict(divergence=kdkernels.divergences.jsd(beta=beta), reduction="none")
    got, _ = emulate.cuda(kdkernels.distillation_loss_and_grad, student, teacher, **told)
    expected = kdkernels.distillation_loss_and_grad(student, teacher, backend="reference", **told)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-8)


def test_a_label_out_of_range_makes_its_row_nan():
    student, teacher = pair(3, 131)
    labels = torch.tensor([1, 131, 2])
    loss, record = emulate.cuda(
        kdkernels.distillation_loss, student, teacher, labels, ce_weight=1.0, reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, False]
    record.assert_clean()


@pytest.mark.parametrize("name", ["forward_kl", "dkd"])
@pytest.mark.parametrize("terms", [{}, {"z_loss_weight": 0.1}, {"ce_weight": 1.0}])
def test_a_label_out_of_range_counts_where_the_reference_reads_it(monkeypatch, name, terms):
    """Where a term has weight 0 it makes nothing NaN."""
    op = sys.modules["kdkernels.ops.distillation_loss"]
    monkeypatch.setattr(op, "check_labels", lambda *labels: None)  # on a GPU nobody looks
    student, teacher = pair(2, 131)
    labels = torch.tensor([131, 2])
    run = kdkernels.distillation_loss_and_grad
    for kd_weight in (0.0, 1.0):
        options = dict(divergence=name, kd_weight=kd_weight, reduction="none", **terms)
        got, record = emulate.cuda(run, student, teacher, labels, **options)
        expected = run(student, teacher, labels, backend="reference", **options)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-7, equal_nan=True)
        record.assert_clean()


# Rows apart by an odd number of elements, so that each starts elsewhere in a chunk: a warp a row,
# a block, eight blocks.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [3, 1000, 4099, 20001])
def test_scale_rows(dtype, columns):
    """Row by row a factor, of which 1 leaves the row alone; 0 stays 0 whatever the factor."""
    whole = logits(5, columns + 2 - columns % 2 + 1, dtype=dtype)
    grad, beside = whole[:, :columns], whole[:, columns:].clone()
    grad[:, 1] = 0
    factor = torch.tensor([2.0, 1.0, -0.3, torch.inf, torch.nan])
    expected = (grad.float() * factor[:, None]).to(dtype)
    expected[:, 1] = 0
    with emulate.installed() as kernels, emulate.recorded() as record:
        kernels.scale_rows_(grad, factor)
    record.assert_clean()
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(whole[:, columns:], beside)
    size = columns * grad.element_size()
    assert record.arguments["grad"].written == record.arguments["grad"].read == 4 * size
    with emulate.installed() as kernels, emulate.recorded() as record:
        kernels.scale_rows_(grad, torch.ones(()))
    assert record.written == 0 and "grad" not in record.arguments


def test_in_place_and_its_upstream_factor():
    student, teacher = pair(3, 2056, dtypes=HALF)
    expected = kdkernels.distillation_loss_and_grad(student, teacher)[1]

    def run():
        leaf = student.clone().requires_grad_()
        loss = kdkernels.distillation_loss(leaf.mul(1), teacher, inplace=True)
        return torch.autograd.grad(loss, leaf, torch.tensor(2.0))[0]

    got, record = emulate.cuda(run)
    torch.testing.assert_close(got.float(), 2 * expected.float(), rtol=0.01, atol=1e-7)
    record.assert_clean()


@pytest.mark.parametrize("arch, vocab", [("sm_90", 131), ("sm_90", 50257), ("sm_80", 50257)])
def test_same_bits_whatever_the_schedule_and_the_rows_beside(arch, vocab):
    """A warp a row; a cluster; blocks that meet in device memory. The last row, alone and copied,
    has another alignment.
    """
    import ptxrun

    student, teacher = pair(3, vocab, dtypes=HALF)
    options = dict(divergence="forward_kl", reduction="none", arch=arch)
    run = (kdkernels.distillation_loss_and_grad, student, teacher)
    (loss, grad), _ = emulate.cuda(*run, **options)
    for seed in (1, 2):
        with ptxrun.configured(seed=seed):
            (again, grad_again), record = emulate.cuda(*run, **options)
        record.assert_clean()
        assert torch.equal(loss, again) and torch.equal(grad, grad_again)
    alone = (kdkernels.distillation_loss_and_grad, student[2:].clone(), teacher[2:].clone())
    (one, one_grad), _ = emulate.cuda(*alone, **options)
    assert torch.equal(loss[2:], one) and torch.equal(grad[2:], one_grad)


def test_hardware_approximations_at_their_worst():
    """ex2.approx anywhere within the bound that PTX documents."""
    import ptxrun

    student, teacher = pair(4, 1000)
    expected = kdkernels.distillation_loss_and_grad(student.double(), teacher.double())
    for seed in (1, 2):
        with ptxrun.configured(approx_seed=seed):
            (loss, grad), _ = emulate.cuda(kdkernels.distillation_loss_and_grad, student, teacher)
        torch.testing.assert_close(loss.double(), expected[0], rtol=3e-6, atol=0)
        torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-9)


# bytes: 4 forward, 6 backward, 6 in one pass, at most 1 % over. Exponentials: 2 where they are
# kept;
# 4 where forward KL computes them again.
@pytest.mark.parametrize(
    "name, rows, vocab, exponentials",
    [("forward_kl", 2, 32000, 2), ("jsd", 1, 128256, 2), ("forward_kl", 1, 128256, 4)],
)
def test_traffic(name, rows, vocab, exponentials):
    student, teacher = pair(rows, vocab, dtypes=HALF)
    elements = student.numel()
    _, record = emulate.cuda(
        kdkernels.distillation_loss_and_grad, student, teacher, divergence=name
    )
    assert record.launches == 1
    for argument in ("student", "teacher"):
        assert 2 * elements <= record.arguments[argument].read <= 2.02 * elements
    written = record.arguments["student_grad"]
    assert 2 * elements <= written.written <= 2.02 * elements
    assert written.sectors * 32 <= 2.02 * elements
    assert record.opcodes["ex2"] <= (exponentials + 0.25 / 8) * elements
    assert record.opcodes.get("lg2", 0) == 0
    divisions = record.opcodes.get("div", 0) + record.opcodes.get("rcp", 0)
    assert divisions <= 0.25 * elements  # a few for each slot of eight
    assert record.bank_conflicts <= 0.01 * record.shared_requests

    leaf = student.clone().requires_grad_()
    loss, forward = emulate.cuda(kdkernels.distillation_loss, leaf, teacher, divergence=name)
    assert forward.launches == 1 and forward.read <= 4.04 * elements
    # The backward of a graph made inside runs outside, under its own record.
    with emulate.installed(), emulate.recorded() as backward:
        loss.backward()
    assert backward.launches == 1
    assert backward.arguments["student_grad"].written <= 2.02 * elements


def test_traffic_of_the_longest_vocabulary():
    """262,144 columns, of which a cluster of eight still holds a share each: 6 bytes a column."""
    student, teacher = pair(1, 262144, dtypes=HALF)
    (loss, _), record = emulate.cuda(
        kdkernels.distillation_loss_and_grad, student, teacher, check="traffic"
    )
    expected = kdkernels.distillation_loss(student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (launch,) = record.all_launches
    assert launch.cluster == (8, 1, 1)
    assert record.read + record.written <= 1.01 * 6 * student.numel()
    assert record.arguments["student_grad"].written == 2 * student.numel()


def test_many_short_rows_are_one_launch_with_a_warp_each():
    student, teacher = pair(64, 100, dtypes=HALF)
    _, record = emulate.cuda(kdkernels.distillation_loss_and_grad, student, teacher)
    (launch,) = record.all_launches
    assert launch.grid[0] == 16 and launch.cluster == (1, 1, 1)


def test_cluster_and_shared_memory():
    student, teacher = pair(1, 128256, dtypes=HALF)
    _, record = emulate.cuda(kdkernels.distillation_loss_and_grad, student, teacher)
    (launch,) = record.all_launches
    assert launch.cluster == (8, 1, 1) and launch.grid[0] == 8
    assert 8 * launch.shared_bytes >= 4 * 128256  # resident


def test_a_refused_call_is_reported_with_its_kernel():
    student, teacher = pair(1, 131)
    with pytest.raises(emulate.DeviceError, match="distillation_loss: float64 logits"):
        emulate.cuda(kdkernels.distillation_loss, student.double(), teacher.double())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources to break."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(emulate.ROOT / "csrc", root / "csrc")
    (root / "tests").mkdir()
    shutil.copy(emulate.ROOT / "tests" / "emulate_shim.cpp", root / "tests")
    return root


def distils(arch, vocab, root):
    student, teacher = pair(1, vocab)
    run = kdkernels.distillation_loss_and_grad
    return emulate.cuda(run, student, teacher, arch=arch, root=root)[1]


def normalises(arch, vocab, root):
    return emulate.cuda(kdkernels.softmax, logits(1, vocab), arch=arch, root=root)[1]


# One defect at a time, and a call that meets it: what every kernel shares, each family of kernels,
# and both ways in which blocks of a row wait for each other.
BUGS = {
    "reduction without its barrier": (
        "csrc/blocks.cuh",
        "    __syncthreads();\n    mine = *rein",
        "    mine = *rein",
        (distils, "sm_90", 1031),
    ),
    "one column too many": (
        "csrc/blocks.cuh",
        "column >= 0 && column < piece.n;",
        "column >= 0 && column <= piece.n;",
        (distils, "sm_90", 1031),
    ),
    "gradient stored without a barrier": (
        "csrc/distillation_loss/rows.cuh",
        "      team.sync();\n      if (p.student_grad.data) put(",
        "      if (p.student_grad.data) put(",
        (distils, "sm_90", 1031),
    ),
    "softmax stored without a barrier": (
        "csrc/softmax/cuda.cu",
        "      team.sync();\n      put(team, area,",
        "      put(team, area,",
        (normalises, "sm_90", 1031),
    ),
    "cluster without its barrier": (
        "csrc/blocks.cuh",
        "      cluster_barrier();\n      mine = lane",
        "      mine = lane",
        (distils, "sm_90", 32000),
    ),
    "cooperating blocks that do not wait": (
        "csrc/blocks.cuh",
        "(*static_cast<volatile unsigned*>(arrived) < exchanges * blocks)",
        "(false)",
        (distils, "sm_80", 32000),
    ),
    "cooperating blocks without a fence": (
        "csrc/blocks.cuh",
        "        __threadfence();\n        unsigned* arrived",
        "        unsigned* arrived",
        (distils, "sm_80", 32000),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_copy_is_caught(tree, tmp_path, bug):
    import ptxrun

    file, right, wrong, (run, *call) = BUGS[bug]
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    text = (root / file).read_text()
    assert text.count(right) >= 1
    (root / file).write_text(text.replace(right, wrong))
    try:
        record = run(*call, root)
    except ptxrun.KernelFault:
        return
    assert record.faults


def test_a_failed_launch_is_reported_with_kernel_and_shape(tree, tmp_path):
    """Blocks of 2048 threads, which no chip takes."""
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    text = (root / "csrc/launch.cuh").read_text()
    right = "config.blockDim = dim3(kThreads);"
    assert text.count(right) == 1
    (root / "csrc/launch.cuh").write_text(text.replace(right, "config.blockDim = dim3(2048);"))
    student, teacher = pair(1, 131)
    message = "distillation_loss forward_kl: launch failed: .*; grid 1, block .* shared memory"
    with pytest.raises(emulate.DeviceError, match=message):
        emulate.cuda(kdkernels.distillation_loss, student, teacher, root=root)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_spills(arch, tmp_path):
    import ptxrun.build

    source = emulate.ROOT / "csrc" / "distillation_loss" / "cuda_kl.cu"
    nvcc = [
        ptxrun.build.find_nvcc(),
        "-std=c++17",
        "-O3",
        f"-arch={arch}",
        "-cubin",
        "-Xptxas",
        "-v",
    ]
    done = subprocess.run(
        [*map(str, nvcc), str(source), "-o", str(tmp_path / "x.cubin")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 4 and set(spills) == {("0", "0")}
    assert pathlib.Path(tmp_path / "x.cubin").stat().st_size > 0
