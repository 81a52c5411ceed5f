"""The C++ row kernels without torch around them, at each CPU level that this machine has.

Everywhere else the tests see the one level that the library chooses. Here the same cases that run
under the sanitizers are built with the library's own flags, and every level is compared with the
oracle and thereby with the others.
"""

import functools
import itertools
import os
import shutil

import numpy as np
import oracle
import pytest
import torch
from sanitize import build, cases

from kdkernels.ops.feature_loss import reference


def sizes(module):
    return 1, 2, 16, 17, module.block + 1  # the second block is one column


@pytest.fixture(scope="session")
def module():
    if shutil.which(build.COMPILER) is None and not os.environ.get("KDKERNELS_REQUIRE_BUILD"):
        pytest.skip(f"no C++ compiler: {build.COMPILER} is not installed")
    return cases.load(build.build("plain", flags=build.setup_flags())["plain"])


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request, module):
    if request.param not in module.levels:
        pytest.skip(f"this CPU, or KDKERNELS_CPU_LEVEL, has no {request.param}")
    return request.param


def compare(got, truth, terms):
    """Within 64 units in the last place of the largest of `terms` in the row, and the rounding at
    the store.

    tests/ops holds one level to PyTorch's own error. What can differ at another one is the width of
    a vector, the remainder of a loop, a conversion: a mistake there is not small.
    """
    truth, value = np.float64(truth), cases.read(got)
    assert value.shape == truth.shape
    name = {np.dtype(dtype): name for name, dtype in cases.DTYPES.items()}[got.dtype]
    unit = np.finfo(np.float64 if name == "float64" else np.float32).eps
    stored = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}.get(name, (0, 0))
    terms = np.maximum(np.abs(np.float64(terms)), np.abs(truth)).max(-1, keepdims=True, initial=0)
    bound = 64 * unit * terms + stored[0] * np.abs(truth) + stored[1]
    wrong = ~(np.abs(value - truth) <= bound)
    assert not wrong.any(), (got.dtype, np.argwhere(wrong)[:3], value[wrong][:3], truth[wrong][:3])


@functools.cache
def truth_of(case):
    inputs = cases.inputs_of(case)
    options = {k: v for k, v in inputs.options.items() if k != "return_stats"}
    return oracle.distillation(
        inputs.student,
        inputs.teacher,
        inputs.labels,
        divergence_name=case.divergence,
        parameters=inputs.parameters,
        token_weights=inputs.token_weights,
        vocab_size=case.vocab,
        reduction="none",
        **options,
    )


def test_find_bad_label(module):
    cases.find_bad_label(module)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES)
def test_distillation(module, level, divergence):
    """Each way to the loss and both gradients: see cases.distillation."""
    for case in cases.distillation_cases(module.block, sizes(module)):
        if case.divergence != divergence:
            continue
        truth = truth_of(case)
        got = cases.same_on_threads(cases.distillation, module, level, case, threads=3)
        for name in ("totals", "one_pass_totals"):
            # A loss is a sum of terms of about the probabilities' size, which may cancel.
            compare(got[name], truth.loss, np.minimum(1, truth.student_terms))
        upstream = cases.UPSTREAM[: case.rows, None]
        for name, gradient, terms in (
            ("student", truth.student_grad, truth.student_terms),
            ("teacher", truth.teacher_grad, truth.teacher_terms),
        ):
            compare(got[name], gradient, terms[:, None])
            compare(got[f"backward_{name}"], gradient * upstream, terms[:, None] * upstream)
        compare(got["one_pass_student"], truth.student_grad, truth.student_terms[:, None])
        if case.terms == "all" and case.rows:
            lines = got["rows"][-6:].T  # kKd and on, csrc/distillation_loss/problem.h
            statistics = np.stack(truth[3:9], -1)
            compare(lines, statistics, np.ones_like(statistics))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factor", [0.5, 1 / 3, 1024.0])
def test_every_16_bit_number(module, level, dtype, factor):
    """Load, multiply in float32, store: subnormals, ties to even, overflow, inf, NaN,
    as NumPy has them.
    """
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(16, -1)
    before = bits if dtype == "bfloat16" else bits.view(np.float16)
    after = before.copy()
    module.distillation_loss.scale_rows(level, 1, after, np.array([factor], np.float32))
    values = cases.from_bfloat16(before) if dtype == "bfloat16" else before.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = cases.stored(values * np.float32(factor), dtype)
    nan = np.isnan(values)
    assert np.isnan(cases.read(after)[nan]).all()
    np.testing.assert_array_equal(after.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_softmax(module, level, dtype):
    for case in cases.softmax_cases(module.block, sizes(module)):
        if case.dtype != dtype:
            continue
        got = cases.same_on_threads(cases.softmax, module, level, case, threads=3)
        x, upstream, output = (
            cases.read(got[name]).astype(oracle.REAL) for name in ("x", "upstream", "output")
        )
        temperature = np.array([1.0, 2.0, 0.5, 1.5, 4.0])[: case.rows, None]
        log_p = oracle.log_softmax(x / temperature) if case.rows else x
        compare(got["output"], log_p if case.log else np.exp(log_p), 0 * x)
        # Of the output as it was rounded when it was stored, since that is all that a backward has.
        p = np.exp(output) if case.log else output
        if case.log:
            terms = upstream, p * upstream.sum(-1, keepdims=True)
        else:
            mean = (p * upstream).sum(-1, keepdims=True) / p.sum(-1, keepdims=True)
            terms = p * upstream, p * mean
        size = np.abs(terms).sum(0) / temperature
        compare(got["gradient"], (terms[0] - terms[1]) / temperature, size)


@pytest.mark.parametrize("student, target", [*itertools.product(cases.DTYPES, cases.DTYPES)])
def test_kl_div(module, level, student, target):
    for case in cases.kl_div_cases(module.block, module.kl_div.task):
        if case.dtypes != (student, target):
            continue
        got = cases.same_on_threads(cases.kl_div, module, level, case, threads=3)
        x, t, upstream = (
            cases.read(got[name]).astype(oracle.REAL) for name in ("x", "t", "upstream")
        )
        # A target that underflows to 0 contributes 0, also to its own gradient.
        log_t = t if case.log_target else np.log(np.where(t == 0, 1, t))
        q = np.exp(t) if case.log_target else t
        terms, size = q * (log_t - x), q * (np.abs(log_t) + np.abs(x))
        compare(got["terms"], terms, size)
        real = np.float64 if "float64" in case.dtypes else np.float32
        sums = got["sums"].sum(keepdims=True).astype(real)
        compare(sums, [terms.sum()], [size.sum()])
        compare(got["input_grad"], -q * upstream, 0 * x)
        by_target = upstream * (q if case.log_target else t != 0)
        slope, size = log_t - x + 1, np.abs(log_t) + np.abs(x) + 1
        compare(got["target_grad"], by_target * slope, np.abs(by_target) * size)


@pytest.mark.parametrize("metric, normalize", cases.FEATURE_METRICS)
def test_feature_loss(module, level, metric, normalize):
    """Against the reference, in float64, of what the arrays hold."""
    for case in cases.feature_cases(module.block):
        if (case.metric, case.normalize) != (metric, normalize):
            continue
        got = cases.same_on_threads(cases.feature_loss, module, level, case, threads=3)
        student, teacher, mask, log_variance = (
            torch.from_numpy(cases.read(got[name]))
            for name in ("student", "teacher", "mask", "log_variance")
        )
        gaussian = metric == "gaussian_nll"
        losses, _, (gradient, variance_sums) = reference.feature_loss(
            [student],
            [teacher],
            [mask],
            [log_variance if gaussian else None],
            [3],
            metric,
            normalize,
            0.75,
            [1.0],
            None,
            "none",
            None,
            [True, gaussian],
        )
        samples = student.shape[0]
        # Terms of both signs are added up over all channels and positions.
        size = np.abs(np.asarray(losses)).max(initial=1) * np.ones((1, samples))
        compare(np.float32(got["losses"][None]), losses.numpy(), size)
        flat = [x.reshape(samples, -1) for x in (got["gradient"], gradient.numpy())]
        compare(*flat, np.abs(flat[1]).max(initial=1e-3) * np.ones((1, 1)))
        if gaussian:
            sums = np.float32(got["variance_sums"][None])
            compare(sums, variance_sums.numpy()[None], np.full((1, 1), float(student.numel())))
