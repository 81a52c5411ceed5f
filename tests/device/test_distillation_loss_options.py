"""The row kernels of distillation_loss's options in Triton and in CUDA, executed as PTX on the CPU;
against the reference in float64, which tests/ops hold to an oracle of its own.
"""

import contextlib
import math

import emulate
import options_oracle
import pytest
import torch
from cases import labels_for, logits, pair

import kdkernels
from kdkernels.divergences import DIVERGENCES
from kdkernels.ops.distillation_loss import reference

pytest.importorskip("triton", reason="Triton is not installed")

# Away from the ends of their ranges.
PARAMETERS = {"renyi": (0.7, 0.0), "ab": (0.4, 0.7), "dkd": (1.5, 2.0), "forward_kl": (0.0, 0.0)}


@pytest.fixture(params=["triton", "cuda"])
def kernels(request, triton_runs):
    """``with kernels() as module``: a backend's four functions, checked for faults at the end."""

    @contextlib.contextmanager
    def runs():
        if request.param == "triton":
            from kdkernels.ops.distillation_loss import triton_rows

            with triton_runs():
                yield triton_rows
            return
        reason = emulate.missing()
        if reason is not None:
            pytest.skip(reason)
        with emulate.installed("sm_90") as implementation, emulate.recorded() as record:
            yield implementation
        record.assert_clean()

    return runs


# 1301: odd rows of 1300 columns and padding, more than a tile of Triton's temperature sums (1024);
# row 1 must not be read (factor 0, NaN).
def test_moments_and_their_gradient(kernels):
    x = logits(3, 1301, dtype=torch.bfloat16)
    x[2, :1300] = 3.3  # equal columns
    grad, factor = logits(3, 1301, seed=5), torch.tensor([0.5, 0.0, -2.0])
    want = grad.double()
    with kernels() as module:
        got = module.row_moments(x, 1300)
        mean = got[0].clone()
        spoiled = x.clone()
        spoiled[1] = math.nan
        module.add_centered_(grad, spoiled, mean, factor, 1300)
    exact = x[:, :1300].double()
    torch.testing.assert_close(got[0].double(), exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), exact.std(1), rtol=1e-6, atol=0)
    assert got[1, 2] == 0
    want[:, :1300] += factor[:, None] * (exact - mean[:, None])
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_sums(name, kernels):
    student, teacher = pair(3, 1301, dtypes=(torch.float32, torch.bfloat16))
    labels = labels_for(student, vocab_size=1300)
    first, second = PARAMETERS.get(name, (0.3, 0.0))
    given = labels if name == "dkd" else None
    options = (
        given, None, name, first, None, second, None, 1.5, None, 2.0, None, 1.0, None, 0.0, None,
        0.0, None, None, None, True, 0.0, -100, True, 1300, "sum", False,
    )  # fmt: skip
    _, rows = reference.distillation_loss(student, teacher, *options)
    rows[reference.ROWS.index("kd_scale"), 1] = 0
    student[1], teacher[1] = math.nan, math.nan
    with kernels() as module:
        got = module.temperature_sums(student, teacher, rows, given, name, 1300)
    want = reference.temperature_sums(
        student.double(), teacher.double(), rows.double(), given, name, 1300
    )
    assert not got[:, 1].any()
    # Of what is added up, about 10·(|G| + p) a row: the logits lie as far from the maximum.
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adaptive_weights(dtype, kernels):
    """Rows without equal columns, with many, all equal, and one column with nearly everything."""
    student, teacher = pair(4, 1301, dtypes=(torch.float32, dtype))
    teacher[1] = teacher[1].round()
    teacher[2] = 0
    teacher[3, 700] = 60
    tau = torch.tensor([1.0, 2.0, 1.0, 0.5])
    with kernels() as module:
        got = module.adaptive_weights(student, teacher, tau, torch.full((1,), 1.5), 1300)
    p = torch.softmax(student[:, :1300].double() / tau[:, None], -1)
    q = torch.softmax(teacher[:, :1300].double() / 1.5, -1)
    want = options_oracle.adaptive_weight(p, q)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_the_whole_of_it(triton_runs):
    """Everything at once through the public function: AKL of standardised logits at a learned
    temperature, in bfloat16.
    """
    student, teacher = pair(3, 1001, dtypes=(torch.bfloat16, torch.bfloat16))
    results = []
    for dtype, runs in ((torch.bfloat16, triton_runs), (torch.float64, contextlib.nullcontext)):
        s, t = (x.to(dtype).requires_grad_() for x in (student, teacher))
        tau = torch.tensor(2.0, requires_grad=True)
        with runs():
            loss = kdkernels.distillation_loss(
                s, t, divergence="adaptive_kl", temperature=tau, standardize=True,
                teacher_grad=True, backend="triton" if dtype != torch.float64 else "reference",
            )  # fmt: skip
            results.append([loss, *torch.autograd.grad(loss, (s, t, tau))])
    for got, want in zip(*results, strict=True):
        unit = 2**-7 if got.dtype == torch.bfloat16 else 2e-6
        error = (got.double() - want.double()).abs().max()
        # T²'s part of the temperature's gradient, which cancels, is of the loss's size.
        size = (
            torch.maximum(want.abs().max(), results[1][0]) if want.dim() == 0 else want.abs().max()
        )
        assert error <= unit * size


def test_a_center(triton_runs):
    student, teacher = pair(2, 300)
    center = logits(300, seed=5)
    options = dict(divergence="cross_entropy", temperature=0.5, reduction="none")
    with triton_runs():
        got = kdkernels.distillation_loss_and_grad(
            student, teacher, teacher_center=center, backend="triton", **options
        )
    want = kdkernels.distillation_loss_and_grad(
        student, teacher - center, backend="reference", **options
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
