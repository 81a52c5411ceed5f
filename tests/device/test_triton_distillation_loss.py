"""distillation_loss in Triton, executed as PTX on the CPU, against the float64 oracle."""

import math

import numpy as np
import oracle
import pytest
import torch
from broken import broken_copy
from cases import (
    ALL,
    DTYPES,
    assert_no_worse_than_torch,
    differentiated,
    divergence,
    labels_for,
    logits,
    pair,
)

import kdkernels
from kdkernels.divergences import DIVERGENCES

pytest.importorskip("triton", reason="Triton is not installed")

TEMPERATURES = dict(temperature=2.0, teacher_temperature=1.5)
STATISTICS = [field for field in kdkernels.DistillationStats._fields]


def check(runs, name, parameters, student, teacher, labels=None, *, run=(), **options):
    """Loss and both gradients through autograd against the oracle."""
    told = dict(divergence_name=name, parameters=parameters, **options)
    truth = oracle.distillation(student, teacher, labels, **told)
    own = oracle.eager(student, teacher, labels, **told)
    with runs(**dict(run)) as record:
        got = differentiated(
            student,
            teacher,
            labels,
            divergence=divergence(name, parameters),
            backend="triton",
            **options,
        )
    assert_no_worse_than_torch(got, truth, own)
    return record


@pytest.mark.parametrize("name, parameters", ALL)
def test_every_divergence(name, parameters, triton_runs):
    """131 columns: prime, so that no row but the first starts at a multiple of 16 bytes; 32 rows,
    so that PyTorch's worst row and ours are comparable.
    """
    student, teacher = pair(32, 131)
    labels = labels_for(student) if name == "dkd" else None
    arch = 80 if len(parameters) % 2 else 90
    check(
        triton_runs, name, parameters, student, teacher, labels, run=dict(arch=arch),
        reduction="none", **TEMPERATURES,
    )  # fmt: skip


# Class A in every dtype and mix. Class B, whose second sweep reads through the same function: the
# mix of both 16-bit dtypes; float32 is above, each of the others below.
@pytest.mark.parametrize("dtypes, name", [
    *((key, "forward_kl") for key in DTYPES if "64" not in key), ("float16-bfloat16", "jsd"),
])  # fmt: skip
def test_dtypes(name, dtypes, triton_runs):
    """32 columns, one masked tile of whole groups."""
    student, teacher = pair(32, 32, dtypes=DTYPES[dtypes])
    check(triton_runs, name, {}, student, teacher, **TEMPERATURES)


# Columns, dtype of both: what the number is for.
SIZES = [
    (1, "float32"),  # the smallest row
    (2, "bfloat16"),
    (8, "bfloat16"),  # one group
    (1000, "float32"),  # one tile of whole groups that is not full
    (2049, "bfloat16"),  # a full tile and one column; odd, so shifted
    (8192, "bfloat16"),  # one full chunk
    (9000, "float16"),  # two chunks
    (32000, "bfloat16"),
    (50257, "bfloat16"),  # GPT-2: odd, long
    (128256, "bfloat16"),  # Llama 3: 16 chunks
]


# Class B is cut by the same function: the smallest row, one shifted, one of two chunks, a long one.
@pytest.mark.parametrize("columns, dtypes, name", [
    *((*size, "forward_kl") for size in SIZES),
    *((*size, "jsd") for size in SIZES if size[0] in (1, 2049, 9000, 32000)),
])  # fmt: skip
def test_sizes(name, columns, dtypes, triton_runs):
    student, teacher = pair(3 if columns < 2000 else 2, columns, dtypes=DTYPES[dtypes])
    check(
        triton_runs, name, {}, student, teacher, **TEMPERATURES,
        run=dict(check=True if columns < 10000 else "traffic"),
    )  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_statistics_label_terms_and_masks(name, triton_runs):
    """Everything at once: statistics, cross-entropy with smoothing, z-loss, weights, ignored and
    masked rows with NaN inside, padded columns with inf, per-token temperatures, odd strides.
    """
    n, vocab = 12, 77
    student = logits(n, 90, seed=1)[:, 3:84]  # rows of 81 columns at an odd address
    teacher = logits(n, 83, seed=2)
    labels = labels_for(student, vocab_size=vocab)
    labels[1] = -100
    weights = torch.linspace(0.5, 1.5, n)
    weights[2] = 0
    student[1:3] = torch.nan
    teacher[1:3] = torch.nan
    student[:, vocab:] = torch.inf
    teacher[:, vocab:] = torch.nan
    teacher[5] = student[5, :vocab].nan_to_num().sum()  # a constant row
    options = dict(
        temperature=torch.linspace(1, 3, n),
        teacher_temperature=1.5,
        ce_weight=0.5,
        z_loss_weight=1e-3,
        label_smoothing=0.1,
        token_weights=weights,
        vocab_size=vocab,
        kd_weight=0.7,
    )
    told = dict(divergence_name=name, **options)
    truth = oracle.distillation(student, teacher, labels, **told)
    own = oracle.eager(student, teacher, labels, **told)
    plain = ("kd_weight", "ce_weight", "z_loss_weight")
    own_statistics = oracle.eager_statistics(
        student, teacher, labels, **{key: x for key, x in told.items() if key not in plain}
    )
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    with triton_runs():
        loss, statistics = kdkernels.distillation_loss(
            *leaves, labels, divergence=name, backend="triton", return_stats=True,
            teacher_grad=True, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_no_worse_than_torch((loss.detach(), *grads), truth, own)
    # The backward of one implementation takes the rows of another.
    assert loss.grad_fn.rest[0] == "triton"
    loss.grad_fn.rest = ("reference", *loss.grad_fn.rest[1:])
    for got, want in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for field in STATISTICS:
        oracle.assert_no_worse_than_torch(
            getattr(statistics, field), getattr(truth, field), own_statistics[field], field
        )
    for grad in grads:
        assert not grad[1:3].any() and not grad[:, vocab:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_minus_infinity(name, triton_runs):
    """Rows with −inf in the student, the teacher, both, in the first column and in a whole group.

    Where the reference, which the existing tests hold to the oracle, is finite, so is Triton; and
    the other way round.
    """
    student, teacher = pair(6, 131)  # as above: the kernels are there
    student[0, 3] = student[1, :8] = teacher[2, 3] = teacher[3, 8:16] = -math.inf
    student[4, 5] = teacher[4, 5] = -math.inf
    labels = torch.full((6,), 20) if name == "dkd" else None
    options = dict(divergence=name, reduction="none", **TEMPERATURES)
    want = differentiated(student, teacher, labels, backend="reference", **options)
    with triton_runs():
        got = differentiated(student, teacher, labels, backend="triton", **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["forward_kl", "dkd"])
def test_label_out_of_range_is_nan_in_that_row_alone(name, triton_runs):
    student, teacher = pair(4, 40)
    labels = torch.tensor([1, 40, -7, 3])
    with triton_runs():
        loss, student_grad, _ = differentiated(
            student, teacher, labels, divergence=name, ce_weight=1.0, reduction="none",
            backend="triton",
        )  # fmt: skip
    assert loss.isnan().tolist() == [False, True, True, False]
    assert student_grad[[0, 3]].isfinite().all()


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "dkd"])
def test_in_place_and_one_pass_are_the_default(name, triton_runs):
    """The same bits three ways, an upstream factor, and a second backward that raises."""
    student, teacher = pair(5, 3000, dtypes=DTYPES["bfloat16"])
    labels = labels_for(student)
    options = dict(divergence=name, ce_weight=0.5, backend="triton", **TEMPERATURES)
    with triton_runs():
        _, want, _ = differentiated(student, teacher, labels, **options)
        _, grad = kdkernels.distillation_loss_and_grad(student, teacher, labels, **options)
        assert torch.equal(grad, want)
        leaf = student.clone().requires_grad_()
        copy = leaf * 1
        loss = kdkernels.distillation_loss(copy, teacher, labels, inplace=True, **options)
        loss.backward(retain_graph=True)
        assert torch.equal(leaf.grad, want)
        with pytest.raises(RuntimeError, match="second backward"):
            loss.backward()
        leaf.grad = None
        copy = leaf * 1
        loss = kdkernels.distillation_loss(copy, teacher, labels, inplace=True, **options)
        (3 * loss).backward()
        assert torch.equal(leaf.grad, (want.float() * 3).bfloat16())


def test_two_backwards_with_different_upstream_factors(triton_runs):
    student, teacher = pair(4, 131)
    leaf = student.clone().requires_grad_()
    with triton_runs():
        loss = kdkernels.distillation_loss(leaf, teacher, reduction="none", backend="triton")
        up = torch.tensor([1.0, 0.0, -2.0, 3.0])
        (once,) = torch.autograd.grad(loss, leaf, torch.ones(4), retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf, up)
    torch.testing.assert_close(again, once * up[:, None])


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha", "renyi", "ab", "dkd"])
def test_hardware_approximations(name, triton_runs):
    """ex2.approx and lg2.approx off by as much as PTX allows: 2 units each, a few a result.

    The one bound with headroom for it: twice the worst that was measured (8.1e-7, the loss of ab).
    """
    student, teacher = pair(8, 131)
    labels = labels_for(student) if name == "dkd" else None
    truth = oracle.distillation(
        student, teacher, labels, divergence_name=name, reduction="none", **TEMPERATURES
    )
    for seed in (1, 2):
        with triton_runs(approx_seed=seed):
            loss, ds, dt = differentiated(
                student, teacher, labels, divergence=name, reduction="none", backend="triton",
                **TEMPERATURES,
            )  # fmt: skip
        assert np.abs(loss.numpy() / truth.loss - 1).max() < 1.6e-6
        for got, want, terms in (
            (ds, truth.student_grad, truth.student_terms),
            (dt, truth.teacher_grad, truth.teacher_terms),
        ):
            assert (np.abs(got.numpy() - want) / terms[:, None]).max() < 1.6e-6


def test_permuted_schedules_and_other_rows(triton_runs):
    """A row of two chunks has the same bits in any order of threads, and alone."""
    student, teacher = pair(3, 9000, dtypes=DTYPES["bfloat16"])
    results = []
    for rows, seed in ((slice(0, 3), {}), (slice(0, 3), dict(seed=1)), (slice(1, 2), dict(seed=2))):
        for name in ("forward_kl", "jsd"):
            with triton_runs(check=False, **seed):
                loss, ds, dt = differentiated(
                    student[rows], teacher[rows], divergence=name, reduction="none",
                    backend="triton",
                )  # fmt: skip
            own = slice(1, 2) if len(loss) == 3 else slice(None)
            results.append((loss[own], ds[own], dt[own]))
    for k, result in enumerate(results):
        for x, y in zip(result, results[k % 2], strict=True):
            assert torch.equal(x, y)


SWEEPS = {"forward_kl": 1, "reverse_kl": 1, "jeffreys": 1, "alpha": 1, "renyi": 1, "ab": 1,
          "dkd": 1, "jsd": 2, "skew_forward_kl": 2, "skew_reverse_kl": 2, "tvd": 2}  # fmt: skip
# Exponentials a column over forward and backward of the student's gradient: X, Y, the group's
# rescaling (¼) and the lanes' combination in the forward; p, q and what else in the backward. Class
# B also p and q of its second sweep; alpha, Rényi a third exponential, AB three.
EXPONENTIALS = {"forward_kl": 4.5, "reverse_kl": 3.5, "jeffreys": 4.5, "alpha": 6.7, "renyi": 6.7,
                "ab": 9.1, "dkd": 4.5, "jsd": 6.6, "skew_forward_kl": 6.6, "skew_reverse_kl": 6.6,
                "tvd": 5.6}  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_traffic_and_work(name, triton_runs):
    """16384 columns of bfloat16: each sweep reads a logit once, the gradient is written once."""
    columns = 16384
    student, teacher = pair(2, columns, dtypes=DTYPES["bfloat16"])
    labels = labels_for(student)
    leaf = student.clone().requires_grad_()
    with triton_runs(check="traffic") as record:
        kdkernels.distillation_loss(
            leaf, teacher, labels, divergence=name, backend="triton", **TEMPERATURES
        ).backward()
    sweeps = SWEEPS[name] + 1
    size = 2 * student.numel()
    moved = {key: x.read + x.written for key, x in record.arguments.items()}
    assert moved["student"] == moved["teacher"] == sweeps * size
    assert moved["student_grad"] == size
    sectors = {key: x.sectors for key, x in record.arguments.items()}
    assert sectors["student"] == sectors["teacher"] == sweeps * size / 32
    # Row statistics and chunks' states, in sectors: a warp reads one number.
    others = sum(n for key, n in sectors.items() if key not in ("student", "teacher",
                                                                "student_grad"))  # fmt: skip
    assert others < 0.2 * sum(sectors.values())
    per_column = {op: n / student.numel() for op, n in record.opcodes.items()}
    assert per_column["ex2"] <= EXPONENTIALS[name]
    mixes = name in ("jsd", "skew_forward_kl", "skew_reverse_kl")
    assert per_column.get("lg2", 0) <= (2.1 if mixes else 0.01)
    divisions = 2.4 if name.startswith("skew") else 0.35
    assert per_column.get("div", 0) + per_column.get("rcp", 0) <= divisions
    assert record.launches == SWEEPS[name] + 2


def test_one_pass_moves_ten_bytes(triton_runs):
    student, teacher = pair(1, 16384, dtypes=DTYPES["bfloat16"])
    with triton_runs(check="traffic") as record:
        kdkernels.distillation_loss_and_grad(
            student, teacher, labels_for(student), backend="triton"
        )
    big = ("student", "teacher", "student_grad")
    moved = sum(record.arguments[key].read + record.arguments[key].written for key in big)
    assert moved == 10 * student.numel()


def test_masked_rows_are_not_read(triton_runs):
    student, teacher = pair(4, 16384, dtypes=DTYPES["bfloat16"])
    labels = torch.tensor([-100, 5, -100, -100])
    with triton_runs(check="traffic") as record:
        kdkernels.distillation_loss_and_grad(student, teacher, labels, backend="triton")
    assert record.arguments["teacher"].read == 2 * 2 * 16384


def test_values_compile_nothing_new(triton_runs):
    """Other N, V of the bucket, temperatures, parameters, weights and strides: the same kernels."""
    from kdkernels.ops.distillation_loss import triton_kernels

    def kernels():
        caches = (getattr(triton_kernels, name) for name in ("_statistics", "_sums", "_finish",
                                                            "_gradient"))  # fmt: skip
        return sum(len(cache[0]) for f in caches for cache in f.device_caches.values())

    def call(n, columns, **options):
        student, teacher = pair(n, columns)
        with triton_runs(check=False):
            kdkernels.distillation_loss_and_grad(student, teacher, backend="triton", **options)

    call(3, 512, divergence=kdkernels.divergences.jsd(0.3), temperature=2.0)
    before = kernels()
    for k, (n, columns) in enumerate(((1, 516), (16, 640), (5, 1024), (2, 1000))):
        beta = kdkernels.divergences.jsd(0.1 * k)
        call(n, columns, divergence=beta, temperature=1.0 + k, kd_weight=0.1 * k)
    call(4, 640, divergence="jsd", temperature=torch.linspace(1, 2, 4))
    assert kernels() == before


def test_under_torch_compile(triton_runs):
    """fullgraph, with the same result, for two values of a temperature tensor in one graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    student, teacher = pair(4, 131)
    leaf = student.clone().requires_grad_()

    def step(s, t, temperature):
        return kdkernels.distillation_loss(s, t, temperature=temperature, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with triton_runs(check=False):
        for value in (1.0, 2.5):
            temperature = torch.tensor(value)
            (got,) = torch.autograd.grad(compiled(leaf, teacher, temperature), leaf)
            (want,) = torch.autograd.grad(step(leaf, teacher, temperature), leaf)
            assert torch.equal(got, want)
    assert counter.frame_count == 1


def call_options(name, vocab, reduction, labels=None):
    """What the forward ops take after both logits, at temperature 1."""
    return (
        labels, None, name, 0.5, None, 0.0, None, 1.0, None, 1.0, None, 1.0, None, 0.0, None, 0.0,
        None, None, None, True, 0.0, -100, True, vocab, reduction, False,
    )  # fmt: skip


def test_opcheck(triton_runs):
    student, teacher = pair(4, 131)  # as in test_under_torch_compile: the kernels are there
    ops = torch.ops.kdkernels
    options = call_options("forward_kl", 131, "batchmean")
    with triton_runs(check=False):
        torch.library.opcheck(ops.distillation_loss_triton.default, (student, teacher, *options))
        for op in (ops.distillation_loss_and_grad_triton, ops.distillation_loss_and_grad__triton):
            torch.library.opcheck(op.default, (student.clone(), teacher, *options, False))
        _, rows = ops.distillation_loss_triton(student, teacher, *options)
        torch.library.opcheck(
            ops.distillation_loss_backward_triton.default,
            (torch.ones(()), student, teacher, rows, None, "forward_kl", 0.0, 131, True, True),
        )
        torch.library.opcheck(ops.scale_rows__triton.default, (student.clone(), torch.ones(4) * 2))


# ---- the checks themselves ----

# What a mistake would look like in each kernel and in what several share: the function it is in,
# the text, instead of it, and a divergence that gets there.
BROKEN = {
    "bound": ("tile", "inside(start, shift, vocab,", "inside(start, shift, vocab + 4,",
              "forward_kl"),
    "chunk": ("one", "chunk < chunks,", "chunk < chunks - 1,", "forward_kl"),
    "tail": ("_statistics", "range(low, high)", "range(low, 1)", "forward_kl"),
    "barrier": ("_finish", "tl.debug_barrier()", "", "dkd"),
    "rescaling": ("rescaled", "rs = tl.exp2(down_s)", "rs = 1.0 + 0.0 * down_s", "forward_kl"),
    "sums' tail": ("_sums", "range(low, high)", "range(low, 1)", "jsd"),
    "gradient's bound": ("_gradient", "mask=here", "mask=position < vocab + 4", "forward_kl"),
    "gradient's sum": ("gradient_row", "sum_h = d - sum_g", "sum_h = d", "jsd"),
}  # fmt: skip


def judge(kernels, name, runs):
    """Two rows of two chunks, the last of a masked tile, through a module of kernels."""
    student, teacher = pair(2, 9000)
    labels = labels_for(student)
    options = call_options(name, 9000, "none", labels)
    told = dict(parameters=dict(target_weight=0.5, non_target_weight=0.0)) if name == "dkd" else {}
    truth = oracle.distillation(
        student, teacher, labels, divergence_name=name, reduction="none", **told
    )
    with runs():
        loss, _, *grads = kernels.distillation_loss_and_grad(student, teacher, *options, True)
    np.testing.assert_allclose(loss.numpy(), truth.loss, rtol=1e-5)
    for got, want in zip(grads, (truth.student_grad, truth.teacher_grad), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("mistake", BROKEN)
def test_mistakes_are_caught(mistake, tmp_path, triton_runs):
    from kdkernels.ops.distillation_loss import triton_kernels

    *where, name = BROKEN[mistake]
    judge(triton_kernels, name, triton_runs)
    broken = broken_copy(tmp_path, triton_kernels, *where)
    with pytest.raises(AssertionError):
        judge(broken, name, triton_runs)


def test_a_mistake_in_the_scaling_is_caught(tmp_path, triton_runs):
    from kdkernels.ops.distillation_loss import triton_kernels

    def scale(kernels):
        with triton_runs():
            kernels.scale_rows_(logits(2, 9000), torch.full((2,), 2.0))

    scale(triton_kernels)
    bound = ("_scale", "inside(start, shift, columns,", "inside(start, shift, columns + 4,")
    broken = broken_copy(tmp_path, triton_kernels, *bound)
    with pytest.raises(AssertionError):
        scale(broken)
