"""feature_loss's Triton kernels, executed as PTX on the CPU."""

import pytest
import torch
from cases import labels_for, pair
from feature_cases import CASES, KINDS, assert_true, case, differentiated

import kdkernels


# Each compiles kernels of its own, and each layer is compiled into them: few.
@pytest.mark.parametrize(
    "which, kind, only", [(0, 1, (1, 5)), (2, 2, (3,)), (3, 3, (0,)), (6, 2, (2,))]
)
def test_values_and_gradients(triton_runs, which, kind, only):
    (metric, options), (dtype, masked, reduction) = CASES[which], KINDS[kind]
    students, teachers, options = case(metric, options, dtype, masked, reduction, only)
    with triton_runs():
        got = differentiated(
            kdkernels.feature_loss, students, teachers, backend="triton", **options
        )
    assert_true(got, students, teachers, **options)


def test_joint(triton_runs):
    """The sum of its parts' losses, and their gradients."""
    student, teacher = pair(3, 131)
    labels, told = labels_for(student), dict(ce_weight=0.5, temperature=2.0)
    students, teachers, options = case("l2", {}, torch.bfloat16, False, "batchmean", (1, 5))
    weights = options["weights"]
    leaves = [x.detach().requires_grad_() for x in (student, *students)]

    def grads(op, backend):
        loss = op(backend)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    def joint(backend):
        return kdkernels.joint_distillation_loss(
            leaves[0],
            teacher,
            labels,
            leaves[1:],
            teachers,
            feature_weights=weights,
            backend=backend,
            **told,
        )

    with triton_runs():
        got = grads(joint, "triton")
    expected = grads(joint, "reference")
    torch.testing.assert_close(got[0], expected[0])
    for mine, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs)
