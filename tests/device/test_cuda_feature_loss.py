"""feature_loss's CUDA kernels, executed as PTX on the CPU through their own launch code."""

import emulate
import emulate_features
import pytest
import torch
from feature_cases import CASES, KINDS, assert_true, case, differentiated, layers

import kdkernels

REASON = emulate.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.parametrize("dtype, masked, reduction", KINDS)
@pytest.mark.parametrize("metric, options", CASES)
def test_values_and_gradients(metric, options, dtype, masked, reduction):
    students, teachers, options = case(metric, options, dtype, masked, reduction)
    got, record = emulate_features.cuda(
        differentiated, kdkernels.feature_loss, students, teachers, **options
    )
    record.assert_clean()
    # All layers at once; reduction="none" computes its gradients in the backward. Then the upstream
    # factor, without a look at it.
    assert record.launches == 2
    assert_true(got, students, teachers, **options)


# Positions of neighbouring channels and channels of neighbouring positions; the cosine of 320
# channels takes several slots a thread.
@pytest.mark.parametrize("metric", ["l2", "smooth_l1", "cosine", "gaussian_nll", "attention"])
@pytest.mark.parametrize("shape", [(4, 320, 8, 16), (4, 64, 320)])
def test_bytes(metric, shape):
    """Every feature is read once and its gradient written once; attention reads the student
    twice.
    """
    students, teachers = ([torch.randn(shape).bfloat16()] for _ in range(2))
    options = dict(metric=metric, backend="cpp")
    dim = 1 if len(shape) == 4 else 2
    if metric == "gaussian_nll":
        options["log_variance"] = [torch.zeros(shape[dim])]
    elements = 2 * students[0].numel()
    with emulate_features.installed() as implementation, emulate.recorded("traffic") as record:
        call = kdkernels.ops.feature_loss.prepare(students, teachers, **options)
        implementation.feature_loss(*call.arguments(), None, [True, False])
    assert record.launches == 1
    read = record.arguments["student0"].read
    assert read <= 1.001 * elements * (2 if metric == "attention" else 1)
    assert record.arguments["teacher0"].read <= 1.001 * elements
    assert record.arguments["grad0"].written <= 1.001 * elements
    assert record.arguments["grad0"].read == 0


def test_vectors_that_shared_memory_does_not_hold():
    students = [torch.randn(3, 2, 60001), torch.randn(3, 4100, 3, 3)]
    teachers = [torch.randn_like(x) for x in students]
    got, record = emulate_features.cuda(
        differentiated, kdkernels.feature_loss, students, teachers, metric="cosine"
    )
    record.assert_clean()
    assert_true(got, students, teachers, metric="cosine")


def test_more_layers_than_a_launch_has():
    """And a tensor of weights, of which one is 0: NaN in that layer goes nowhere."""
    students = [torch.randn(3, 5 + i) for i in range(33)]
    teachers = [torch.randn_like(x) for x in students]
    weights = torch.linspace(0, 1, 33)
    got, record = emulate_features.cuda(
        differentiated, kdkernels.feature_loss, students, teachers, metric="l2", weights=weights
    )
    record.assert_clean()
    assert record.launches == 3  # two, and the upstream factor
    assert_true(got, students, teachers, metric="l2", weights=weights)
    students[0][:] = torch.nan
    again, _ = emulate_features.cuda(
        differentiated, kdkernels.feature_loss, students, teachers, metric="l2", weights=weights
    )
    assert torch.equal(again[0], got[0]) and (again[1][0] == 0).all()


def test_empty_and_masked():
    """No samples, no positions, nothing but masked ones: 0, with gradients of 0."""
    students = [torch.randn(3, 4, 8), torch.full((3, 5, 8), torch.nan), torch.randn(3, 0, 8)]
    teachers = [torch.randn_like(x) for x in students]
    masks = [torch.zeros(3, 4), torch.zeros(3), None]
    for metric in ("l2", "cosine", "attention"):
        (loss, grads), record = emulate_features.cuda(
            differentiated, kdkernels.feature_loss, students, teachers, metric=metric, mask=masks
        )
        record.assert_clean()
        assert loss == 0 and all((g == 0).all() for g in grads)
    nothing = [x[:0] for x in students[:2]]
    loss, _ = emulate_features.cuda(kdkernels.feature_loss, nothing, nothing, metric="l2")
    assert loss == 0


def test_the_same_bits_whatever_the_order_of_blocks():
    import ptxrun

    students, teachers = layers(torch.float32, 1), layers(torch.float32, 2)
    results = []
    for seed in (1, 2):
        with ptxrun.configured(seed=seed):
            (loss, grads), _ = emulate_features.cuda(
                differentiated, kdkernels.feature_loss, students, teachers, metric="cosine"
            )
        results.append([loss, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_upstream_factor_scales_the_kept_gradient():
    students, teachers = layers(torch.bfloat16, 1), layers(torch.bfloat16, 2)
    options = dict(metric="l2", upstream=torch.tensor(3.0))
    got, record = emulate_features.cuda(
        differentiated, kdkernels.feature_loss, students, teachers, **options
    )
    record.assert_clean()
    assert_true(got, students, teachers, **options)


def test_float64_is_refused():
    wide = [torch.randn(3, 8).double()]
    with pytest.raises(emulate.DeviceError, match="float64 features"):
        emulate_features.cuda(kdkernels.feature_loss, wide, wide, metric="l2")
