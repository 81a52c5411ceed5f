"""distillation_loss against the float64 oracle: loss, both gradients, statistics."""

import functools

import numpy as np
import oracle
import pytest
import torch
from cases import (
    ALL,
    DEFAULT,
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


def check(
    student, teacher, labels=None, *, backend, upstream=1.0, name, parameters=None, **options
):
    """Loss and both gradients through autograd against the oracle; returns the truth."""
    told = dict(divergence_name=name, parameters=parameters or {}, upstream=upstream, **options)
    truth = oracle.distillation(student, teacher, labels, **told)
    own = oracle.eager(student, teacher, labels, **told)
    options |= dict(divergence=divergence(name, parameters or {}), backend=backend)
    leading = student.shape[:-1] if options.get("reduction") == "none" else ()
    upstream = torch.as_tensor(upstream).expand(leading)
    assert_no_worse_than_torch(
        differentiated(student, teacher, labels, upstream=upstream, **options), truth, own
    )
    return truth


def test_dtypes(backend):
    """The loss is float32, or float64 where an input is; gradients have their input's dtype."""
    for dtypes in DTYPES.values():
        student, teacher = pair(2, 31, dtypes=dtypes)
        loss, student_grad, teacher_grad = differentiated(student, teacher, backend=backend)
        assert loss.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        assert (student_grad.dtype, teacher_grad.dtype) == dtypes


TEMPERATURES = dict(temperature=2.0, teacher_temperature=1.5)


@functools.cache
def rows_of(name, parameters, dtypes):
    """Logits, truth and PyTorch's own result per row; every reduction of them is arithmetic.

    131 columns: prime, more than eight of the widest vectors and an odd tail. 32 rows, so that the
    worst row of PyTorch and the worst of ours are comparable and not two draws of a lottery.
    """
    student, teacher = pair(4, 8, 131, dtypes=DTYPES[dtypes])
    labels = labels_for(student) if name == "dkd" else None
    told = dict(divergence_name=name, parameters=dict(parameters), reduction="none", **TEMPERATURES)
    truth = oracle.distillation(student, teacher, labels, **told)
    return student, teacher, labels, truth, oracle.eager(student, teacher, labels, **told)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none", "mean"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name, parameters", ALL)
def test_every_divergence(name, parameters, dtypes, reduction, backend):
    student, teacher, labels, truth, own = rows_of(name, tuple(parameters.items()), dtypes)
    if reduction != "none":
        share = {"sum": 1, "batchmean": 1 / 32, "mean": 1 / 32 / 131}[reduction]
        truth = oracle.Truth(truth.loss.sum() * share, *(x * share for x in truth[1:]))
        own = (own[0].sum() * share, own[1] * share, own[2] * share)
    options = dict(divergence=divergence(name, parameters), reduction=reduction, **TEMPERATURES)
    assert_no_worse_than_torch(
        differentiated(student, teacher, labels, backend=backend, **options), truth, own
    )
    at_once = kdkernels.distillation_loss_and_grad(
        student, teacher, labels, teacher_grad=True, backend=backend, **options
    )
    assert_no_worse_than_torch(at_once, truth, own)


# 1 and 2: nothing and almost nothing to normalise; 31: less than one AVX-512 pair of vectors;
# 1000, 32000 (Llama 2). 50257 (GPT-2, odd) and 128256 (Llama 3) for one of each kind of row loop.
VOCABS = [(name, vocab) for name in DIVERGENCES for vocab in (1, 2, 31, 1000, 32000)]
VOCABS += [(name, v) for name in ("forward_kl", "reverse_kl", "jsd") for v in (50257, 128256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, vocab", VOCABS)
def test_vocab_sizes(name, vocab, dtype, backend):
    rows = 64 if vocab <= 31 else 16 if vocab == 1000 else 2
    student, teacher = pair(rows, vocab, dtypes=(dtype, dtype))
    labels = labels_for(student) if name == "dkd" else None
    check(student, teacher, labels, backend=backend, name=name)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none", "mean"])
def test_cross_entropy_alone(reduction, dtypes, backend):
    student, teacher = pair(7, 131, dtypes=DTYPES[dtypes])
    labels = labels_for(student)
    labels[2] = -100
    options = dict(kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1, reduction=reduction)
    check(student, teacher, labels, name="forward_kl", backend=backend, **options)
    if reduction == "none":
        torch_loss = torch.nn.functional.cross_entropy(
            student.double(), labels, label_smoothing=0.1, reduction="none"
        )
        got = kdkernels.distillation_loss(student, teacher, labels, backend=backend, **options)
        torch.testing.assert_close(got.double(), torch_loss, rtol=1e-6, atol=0)


def combined_options(leading):
    """Every option at once, each tensor option per token."""

    def per_token(low, high, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(leading, generator=generator) * (high - low) + low

    weights = per_token(0.2, 2.0, 10)
    weights.view(-1)[1] = 0.0
    return dict(
        temperature=per_token(0.5, 4.0, 11),
        teacher_temperature=per_token(0.5, 4.0, 12),
        kd_weight=per_token(0.1, 1.0, 13),
        ce_weight=per_token(0.1, 1.0, 14),
        z_loss_weight=per_token(0.01, 0.1, 15),
        label_smoothing=0.1,
        token_weights=weights,
    )


def per_token_parameters(name, parameters, leading):
    """The same parameters as tensors, another value in every row, the ends among them."""
    steps = torch.linspace(0, 1, leading.numel()).reshape(leading)
    inside = {
        "alpha": {"alpha": steps * 2 - 0.5},  # crosses 0 and 1
        "renyi": {"order": steps * 1.75 + 0.25},  # crosses 1
        "ab": {"alpha": steps + 0.1, "beta": 1.2 - steps},
        "dkd": {"target_weight": steps, "non_target_weight": 2 - steps},
    }
    return inside.get(name, {key: steps for key in parameters if key != "normalized"})


def test_jsd_at_either_side_of_another_logarithm(backend):
    """The CPU kernel takes log(p/m) another way for beta from 0.36 to 0.64: at both ends, at one
    half and beyond, rows far apart, where m/p goes down to 1 - beta. 131 columns: an odd tail."""
    betas = torch.tensor([0.355, 0.36, 0.5, 0.64, 0.645]).repeat(8).reshape(8, 5)
    student, teacher = pair(8, 5, 131)
    for dtype in (torch.float32, torch.float64):
        check(
            (student * 5).to(dtype),
            (teacher * 5).to(dtype),
            backend=backend,
            name="jsd",
            parameters={"beta": betas.to(dtype)},
        )


@pytest.mark.parametrize(
    "name, mask_kd",
    [(name, True) for name in DIVERGENCES]
    + [(name, False) for name in DIVERGENCES if name != "dkd"],  # which needs every label
)
@pytest.mark.parametrize("normalizer", [None, 7.0, torch.tensor(3.0)], ids=["own", "7", "tensor"])
def test_every_option_together(name, mask_kd, normalizer, backend):
    student, teacher = pair(8, 5, 80)  # enough rows for PyTorch's worst to be typical
    labels = labels_for(student, vocab_size=67)
    labels[0, 3] = labels[2, 2] = 7
    student[..., 67:] = torch.nan  # padding is never read
    teacher[..., 67:] = torch.inf
    labels[1, 1] = labels[2, 0] = 7 if name == "dkd" else -1
    truth = check(
        student,
        teacher,
        labels,
        backend=backend,
        name=name,
        parameters=per_token_parameters(name, oracle.DEFAULTS[name], labels.shape),
        ignore_index=-1,
        mask_kd=mask_kd,
        vocab_size=67,
        normalizer=normalizer,
        reduction="mean",
        upstream=0.7,
        **combined_options(labels.shape),
    )
    assert truth.loss > 0 and np.isfinite(truth.student_grad).all()


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_scalar_tensors_are_floats(name, parameters, backend):
    """0-d tensors give bitwise what the same floats give."""
    student, teacher = pair(4, 67)
    labels = labels_for(student)
    member = {
        key: (value if isinstance(value, bool) else torch.tensor(value))
        for key, value in oracle.DEFAULTS[name].items()
    }
    options = dict(temperature=2.0, teacher_temperature=1.5, kd_weight=0.75, ce_weight=0.25)
    floats = differentiated(
        student, teacher, labels, divergence=divergence(name, {}), backend=backend, **options
    )
    tensors = differentiated(
        student,
        teacher,
        labels,
        divergence=divergence(name, member),
        backend=backend,
        **{key: torch.tensor(value) for key, value in options.items()},
    )
    for a, b in zip(floats, tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha", "dkd"])  # one of each row loop
def test_statistics(name, dtypes, backend):
    student, teacher = pair(2, 6, 131, dtypes=DTYPES[dtypes])
    teacher[0, :3] = student[0, :3]  # some rows whose largest logits agree
    teacher[0, 4] = -student[0, 4]
    student[1, 0, [5, 90]] = teacher[1, 0, [5, 90]] = 12.0  # ties: the first counts
    student[1, 1, [5, 90]] = teacher[1, 1, 90] = 12.0
    labels = labels_for(student)
    labels[1, 3] = -100
    weights = torch.ones(2, 6)
    weights[1, 4] = 0
    options = dict(temperature=2.0, token_weights=weights, ce_weight=0.5, label_smoothing=0.1)
    loss, stats = kdkernels.distillation_loss(
        student.requires_grad_(),
        teacher,
        labels,
        divergence=name,
        return_stats=True,
        backend=backend,
        **options,
    )
    truth = oracle.distillation(student, teacher, labels, divergence_name=name, **options)
    own = oracle.eager_statistics(student, teacher, labels, divergence_name=name, **options)
    assert loss.requires_grad and stats._fields == tuple(own)
    assert 0 < truth.top1_agreement.sum() < 10
    for field, got in zip(stats._fields, stats, strict=True):
        assert got.dtype == loss.dtype and not got.requires_grad, field
        oracle.assert_no_worse_than_torch(got, getattr(truth, field), own[field], field)


@pytest.mark.parametrize("mask_kd", [True, False])
def test_statistics_keep_their_own_masks(mask_kd, backend):
    student, teacher = pair(4, 31)
    labels = torch.tensor([3, -100, 4, 5])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    _, stats = kdkernels.distillation_loss(
        student,
        teacher,
        labels,
        token_weights=weights,
        mask_kd=mask_kd,
        ce_weight=1.0,
        return_stats=True,
        backend=backend,
    )
    for rows in (stats.kd, stats.student_entropy, stats.teacher_entropy):
        assert (rows != 0).tolist() == [True, not mask_kd, False, True]
    for rows in (stats.ce, stats.label_log_prob):
        assert (rows != 0).tolist() == [True, False, False, True]


def test_statistics_without_labels(backend):
    student, teacher = pair(4, 31)
    _, stats = kdkernels.distillation_loss(student, teacher, return_stats=True, backend=backend)
    assert (stats.ce == 0).all() and (stats.label_log_prob == 0).all() and (stats.kd > 0).all()


def test_statistics_where_a_term_has_no_weight(backend):
    """Statistics describe the rows, whatever the terms weigh."""
    student, teacher = pair(4, 31)
    labels = labels_for(student)
    _, with_weight = kdkernels.distillation_loss(
        student, teacher, labels, ce_weight=1.0, return_stats=True, backend=backend
    )
    _, without = kdkernels.distillation_loss(
        student, teacher, labels, kd_weight=0.0, return_stats=True, backend=backend
    )
    for a, b in zip(with_weight, without, strict=True):
        assert torch.equal(a, b)


# Numerics ----------------------------------------------------------------------------------------

SMALL = ["forward_kl", "reverse_kl", "jeffreys", "jsd"]


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])  # KL of about 5e-5, 5e-7, 5e-9
@pytest.mark.parametrize("name", SMALL)
def test_small_divergences_keep_their_digits(name, noise, backend):
    """Relative error 1e-4 where the textbook sum is 70 % wrong (at noise 1e-3)."""
    student = logits(4, 32768, scale=2.0)
    teacher = student + noise * logits(4, 32768, seed=3, scale=1.0)
    truth = oracle.distillation(student, teacher, divergence_name=name, reduction="none")
    got = kdkernels.distillation_loss(
        student, teacher, divergence=name, reduction="none", backend=backend
    )
    # The inputs' own rounding (log-sum-exps of float32) bounds what any float32 sum can reach.
    tolerance = {1e-2: 1e-5, 1e-3: 1e-4, 1e-4: 1e-2}[noise]
    np.testing.assert_allclose(got.double().numpy(), truth.loss, rtol=tolerance)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name, parameters", ALL)
def test_gradients_near_the_teacher(name, parameters, noise, backend):
    """Late in training the gradient is a small difference, and is held to its own size here.

    By the median row: the worst is the one whose gradient happens to be smallest, for us as for
    PyTorch, and says nothing about either.
    """
    student = logits(64, 257)
    teacher = student + noise * logits(64, 257, seed=3, scale=1.0)
    labels = labels_for(student)
    told = dict(divergence_name=name, parameters=parameters)
    truth = oracle.distillation(student, teacher, labels, **told).student_grad
    _, grad = kdkernels.distillation_loss_and_grad(
        student, teacher, labels, divergence=divergence(name, parameters), backend=backend
    )
    if parameters.get("lam") == 1:
        assert (grad == 0).all()
        return

    def median_error(x):
        error = np.abs(x.double().numpy() - truth).max(-1)
        return np.median(error / np.abs(truth).max(-1))

    unit = torch.finfo(torch.float32).eps
    own = median_error(oracle.eager(student, teacher, labels, **told)[1])
    assert median_error(grad) <= max(2 * own, 4 * unit)


@pytest.mark.parametrize("name, parameters", ALL)
def test_identical_rows(name, parameters, backend):
    """A student equal to its teacher: loss 0 up to rounding, never below, and no gradient."""
    student = logits(5, 1000)
    labels = labels_for(student)
    loss, student_grad, teacher_grad = differentiated(
        student,
        student,
        labels,
        divergence=divergence(name, parameters),
        reduction="none",
        backend=backend,
    )
    assert (loss >= 0).all() and (loss <= 1e-6).all()
    assert student_grad.abs().max() <= 1e-6 and teacher_grad.abs().max() <= 1e-6


@pytest.mark.parametrize("name, parameters", ALL)
def test_never_negative(name, parameters, backend):
    """Rows that differ by less than float32 resolves in their sums."""
    student = logits(64, 257)
    teacher = student + 1e-6 * logits(64, 257, seed=5)
    loss = kdkernels.distillation_loss(
        student,
        teacher,
        labels_for(student),
        divergence=divergence(name, parameters),
        reduction="none",
        backend=backend,
    )
    assert (loss >= 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_large_offsets(name, parameters, offset, backend):
    """softmax does not see an offset; s - t of raw logits, or s/T before the maximum, does."""
    student, teacher = pair(3, 257)
    student, teacher = (
        student + offset,
        teacher - offset,
    )  # rounded here, so both sides see the same
    labels = labels_for(student)
    check(
        student, teacher, labels, name=name, parameters=parameters, temperature=1.7, backend=backend
    )
    loss, *_ = differentiated(
        student, teacher, labels, divergence=name, temperature=1.7, backend=backend
    )
    shifted, *_ = differentiated(
        student - offset,
        teacher + offset,
        labels,
        divergence=name,
        temperature=1.7,
        backend=backend,
    )
    torch.testing.assert_close(loss, shifted, rtol=2e-6, atol=0)


# The others are themselves past float32 there: exp(400).
AT_LOW_TEMPERATURE = [
    case
    for case in ALL
    if case.id not in ("alpha-alpha=-0.5", "alpha-alpha=1.5", "renyi-order=2.0")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, parameters", AT_LOW_TEMPERATURE)
def test_low_temperature(name, parameters, dtype, backend):
    """T = 0.05 on N(0, 3) logits: log-probabilities down to -400, most probabilities underflow."""
    student, teacher = pair(16, 1000, dtypes=(dtype, dtype))
    labels = labels_for(student)
    check(
        student,
        teacher,
        labels,
        name=name,
        parameters=parameters,
        temperature=0.05,
        reduction="none",
        backend=backend,
    )


@pytest.mark.parametrize("name, parameters", ALL)
def test_peaky_rows(name, parameters, backend):
    """One column holds everything: the same one, or another in the last 16 rows."""
    student, teacher = pair(32, 100, scale=1.0)
    student[:, 17] += 30
    teacher[:16, 17] += 30
    teacher[16:, 18] += 30
    labels = torch.tensor([17, 18, 17, 5]).repeat_interleave(8)
    check(
        student,
        teacher,
        labels,
        name=name,
        parameters=parameters,
        reduction="none",
        ce_weight=0.5,
        backend=backend,
    )


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_gradients_sum_to_zero(name, parameters, backend):
    """Adding a constant to a row changes nothing, so its gradient sums to nothing."""
    student, teacher = pair(4, 1000, dtypes=(torch.float64, torch.float64))
    _, *grads = differentiated(
        student, teacher, labels_for(student), divergence=name, ce_weight=1.0, backend=backend
    )
    for grad in grads:
        assert (grad.sum(-1).abs() <= 1e-14 * grad.abs().sum(-1)).all()
