"""similarity_loss in Triton, executed as PTX on the CPU, against float64."""

import pytest
import similarity_oracle as truth
import torch

import kdkernels

pytest.importorskip("triton", reason="Triton is not installed")


def differentiated(x, **options):
    """Loss and gradients of student, its keys, γ and T."""
    leaves = {k: v.clone().requires_grad_() for k, v in x.items() if not k.startswith("teacher")}
    loss = kdkernels.similarity_loss(**{**x, **leaves}, **options)
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))


# Rows and keys that fill no tile of 32 or 64, and more keys than a tile; 37 and 19 columns: no
# multiple of what is multiplied at a time, and 37 more than it. Class A with a parameter gradient,
# where keys are rows (both roles, diagonal left out) on sm_80's tiles; class B with keys of their
# own, without, on sm_90's.
CASES = {
    "rbf": (80, dict(kernel="rbf", own=True, parameters=True)),
    "pkt": (90, dict(kernel="pkt", own=False, parameters=False, divergence="jsd")),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_faults(name, triton_runs):
    arch, case = CASES[name]
    case = dict(case)
    divergence = case.pop("divergence", "forward_kl")
    x, options = truth.inputs(n=70, m=75, width=37, teacher_width=19, **case)
    want = truth.similarity(x, divergence=divergence, **options)
    own = truth.eager(x, divergence=divergence, **options)
    with triton_runs(arch=arch) as record:
        got = differentiated(x, divergence=divergence, backend="triton", **options)
    truth.assert_no_worse(got, want, own)
    n = 70
    # statistics, (log Z, sums,) finish, rows, (parameters,) keys
    assert record.launches == (5 if name == "rbf" else 6)
    # What is not features is a few numbers a row: nothing of the size of rows × keys exists.
    assert sum(record.arguments[key].written for key in ("states", "rows", "totals")) < 400 * n
    with triton_runs(arch=arch, check=False, seed=5):  # another order of threads: the same bits
        again = differentiated(x, divergence=divergence, backend="triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
