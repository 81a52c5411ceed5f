"""feature_loss's Triton kernels, executed as PTX on the CPU."""

import pytest
import torch
from feature_cases import CASES, KINDS, assert_true, case, differentiated

import kdkernels


# Each compiles kernels of its own, and each layer is compiled into them: few, of two layouts.
@pytest.mark.parametrize(
    "which, kind, only", [(0, 0, (1, 5)), (2, 2, (3, 0)), (3, 3, (0, 6)), (4, 1, (5,)), (6, 2, (2, 0))]
)
def test_values_and_gradients(triton_runs, which, kind, only):
    (metric, options), (dtype, masked, reduction) = CASES[which], KINDS[kind]
    students, teachers, options = case(metric, options, dtype, masked, reduction, only)
    with triton_runs() as record:
        got = differentiated(
            kdkernels.feature_loss, students, teachers, backend="triton", **options
        )
    assert_true(got, students, teachers, **options)
