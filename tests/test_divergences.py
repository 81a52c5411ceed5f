"""The divergences: registry, both languages, values by hand, identities; and the oracle itself."""

import inspect
import math
import pickle

import numpy as np
import oracle
import pytest
import torch
from cases import ALL, DEFAULT, divergence, labels_for, pair

import kdkernels
from kdkernels import divergences
from kdkernels._ext import cpp_error
from kdkernels.divergences import DIVERGENCES
from kdkernels.ops.distillation_loss import reference

needs_cpp = pytest.mark.skipif(
    cpp_error() is not None, reason="compares the C++ library, which is not built here"
)


def value(student, teacher, labels=None, backend=None, **options):
    return kdkernels.distillation_loss(
        student, teacher, labels, reduction="none", backend=backend, **options
    )


# The registry ------------------------------------------------------------------------------------


def test_the_registry():
    assert list(DIVERGENCES) == list(oracle.DEFAULTS)
    for name, make in DIVERGENCES.items():
        assert make is getattr(divergences, name)
        signature = inspect.signature(make)
        assert {p.name: p.default for p in signature.parameters.values()} == oracle.DEFAULTS[name]
        assert make().name == name


def test_objects_are_values():
    member = divergences.jsd(0.3)
    twin = pickle.loads(pickle.dumps(member))
    student, teacher = pair(3, 31)
    assert torch.equal(
        value(student, teacher, divergence=twin), value(student, teacher, divergence=member)
    )
    assert "jsd" in repr(member) and "0.3" in repr(member)
    with pytest.raises(AttributeError):
        member.first = 0.5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_name_is_its_defaults(name, backend):
    student, teacher = pair(3, 31)
    labels = labels_for(student)
    assert torch.equal(
        value(student, teacher, labels, divergence=name, backend=backend),
        value(student, teacher, labels, divergence=DIVERGENCES[name](), backend=backend),
    )


# Both languages ----------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("name, parameters", ALL)
def test_every_divergence_exists_in_both_languages_and_agrees(name, parameters):
    """Loss, row statistics and gradients in float64, where the two differ by rounding alone."""
    student, teacher = pair(6, 131, dtypes=(torch.float64, torch.float64))
    labels = labels_for(student)
    options = dict(
        divergence=divergence(name, parameters),
        temperature=1.7,
        teacher_temperature=0.8,
        ce_weight=0.5,
        z_loss_weight=0.1,
        return_stats=True,
        teacher_grad=True,
    )
    of_cpp, of_reference = (
        kdkernels.distillation_loss_and_grad(student, teacher, labels, backend=b, **options)
        for b in ("cpp", "reference")
    )
    for a, b in zip((*of_cpp[:3], *of_cpp[3]), (*of_reference[:3], *of_reference[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@needs_cpp
@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_both_languages_keep_the_same_row_statistics(name, parameters):
    """`rows` is a contract between forwards and backwards: one may serve the other's."""
    student, teacher = pair(6, 131, dtypes=(torch.float64, torch.float64))
    first, second = (float(x) for x in (divergence(name, {}).first, divergence(name, {}).second))
    arguments = [student, teacher, labels_for(student), None, name, first, None, second, None]
    arguments += [1.7, None, 0.8, None, 1.0, None, 0.5, None, 0.1, None, None, None]
    arguments += [True, 0.1, -100, True, 131, "none", True]
    of_cpp = torch.ops.kdkernels.distillation_loss(*arguments)[1]
    of_reference = reference.distillation_loss(*arguments)[1]
    assert len(of_cpp) == len(reference.ROWS) + len(reference.STATS)
    for line, a, b in zip((*reference.ROWS, *reference.STATS), of_cpp, of_reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, x=line: f"{x}: {m}")


@needs_cpp
def test_an_unknown_name_is_refused_by_the_library_too():
    student, teacher = pair(2, 31)
    arguments = [student, teacher, None, None, "hellinger", 0.0, None, 0.0, None]
    arguments += [1.0, None, 1.0, None, 1.0, None, 0.0, None, 0.0, None, None, None]
    arguments += [True, 0.0, -100, True, 31, "sum", False]
    with pytest.raises(RuntimeError, match="hellinger"):
        torch.ops.kdkernels.distillation_loss(*arguments)


# By hand -----------------------------------------------------------------------------------------

# Student (1/2, 1/2), teacher (3/4, 1/4): logits (0, 0) and (log 3, 0).
# log 3/2 = 0.405465, log 2 = 0.693147, log 3 = 1.098612.
BY_HAND = [
    ("forward_kl", {}, 0.1308120),  # 3/4 log 3/2 - 1/4 log 2
    ("reverse_kl", {}, 0.1438410),  # 1/2 log 2/3 + 1/2 log 2
    ("jeffreys", {}, 0.1373265),  # (log 3)/8
    ("jeffreys", {"weight": 0.25}, 0.1405838),  # 1/4 forward + 3/4 reverse
    ("jsd", {}, 0.0338221),  # m = (5/8, 3/8)
    ("jsd", {"normalized": True}, 0.1352883),  # 4 times that
    ("jsd", {"beta": 0.25}, 0.0248700),  # m = (9/16, 7/16)
    ("jsd", {"beta": 0.0}, 0.1308120),
    ("jsd", {"beta": 1.0}, 0.1438410),
    ("skew_forward_kl", {"lam": 0.5}, 0.0353749),  # 3/4 log 6/5 + 1/4 log 2/3
    ("skew_reverse_kl", {"lam": 0.5}, 0.0322693),  # 1/2 log 4/5 + 1/2 log 4/3
    ("alpha", {}, 0.1362967),  # 4 (1 - (sqrt(3/8) + sqrt(1/8)))
    ("alpha", {"alpha": 2.0}, 0.1250000),  # (9/8 + 1/8 - 1)/2
    ("tvd", {}, 0.2500000),
    ("renyi", {}, 0.0693365),  # -2 log(sqrt(3/8) + sqrt(1/8))
    ("renyi", {"order": 2.0}, 0.2231436),  # log(9/8 + 1/8)
    ("ab", {"alpha": 1.0, "beta": 1.0}, 0.0625000),  # half the squared distance
    ("dkd", {}, 0.1308120),  # label 0: nothing but the label and one other
]


@pytest.mark.parametrize("name, parameters, expected", BY_HAND)
def test_by_hand(name, parameters, expected, backend):
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    labels = torch.tensor([0])
    got = value(student, teacher, labels, divergence=divergence(name, parameters), backend=backend)
    assert got.item() == pytest.approx(expected, abs=5e-8)


def test_dkd_by_hand(backend):
    """Three classes, label 0: student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4).

    Target: 1/4 log 1/2 + 3/4 log 3/2 = 0.1308120. Rest: student (1/2, 1/2), teacher (2/3, 1/3):
    2/3 log 4/3 + 1/3 log 2/3 = 0.0566330.
    """
    student = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64).log()
    for weights, expected in (
        ((1.0, 0.0), 0.1308120),
        ((0.0, 1.0), 0.0566330),
        ((2.0, 8.0), 0.7146880),
    ):
        got = value(
            student,
            teacher,
            torch.tensor([0]),
            divergence=divergences.dkd(*weights),
            backend=backend,
        )
        assert got.item() == pytest.approx(expected, abs=2e-7)


def test_a_gradient_by_hand(backend):
    """Forward KL at T = 2 of the rows above: T^2 (p - q)/T = (-1/2, 1/2); a quarter without T^2."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    for t_squared, expected in ((True, [-0.5, 0.5]), (False, [-0.125, 0.125])):
        _, grad = kdkernels.distillation_loss_and_grad(
            student, teacher, temperature=2.0, t_squared=t_squared, backend=backend
        )
        assert grad[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_total_variation_with_one_tie_by_hand(backend):
    """p = (1/2, 1/2, 0), q = (1/2, 0, 1/2): 1/2 sign(p - q) is (0, 1/2, -1/2), times p (0, 1/4, 0).

    Less p times the sum, 1/4: (-1/8, 1/8, 0). Another subgradient at the tie would give 0 or twice.
    """
    student = torch.tensor([[0.0, 0.0, -math.inf]])
    teacher = torch.tensor([[0.0, -math.inf, 0.0]])
    loss, student_grad, teacher_grad = kdkernels.distillation_loss_and_grad(
        student, teacher, divergence="tvd", teacher_grad=True, backend=backend
    )
    assert loss.item() == 0.5
    assert student_grad[0].tolist() == [-0.125, 0.125, 0.0]
    assert teacher_grad[0].tolist() == [-0.125, 0.0, 0.125]


# Identities --------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    return pair(6, 131, dtypes=(torch.float64, torch.float64))


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)


def test_swapping_student_and_teacher(rows, backend):
    s, t = rows
    d = divergences
    for one, other in (
        (d.forward_kl(), d.reverse_kl()),
        (d.jeffreys(0.3), d.jeffreys(0.7)),
        (d.jsd(0.3), d.jsd(0.7)),
        (d.skew_forward_kl(0.3), d.skew_reverse_kl(0.3)),
        (d.alpha(0.3), d.alpha(0.7)),
        (d.alpha(-0.5), d.alpha(1.5)),
        (d.tvd(), d.tvd()),
        (d.ab(0.3, 0.9), d.ab(0.9, 0.3)),
    ):
        same(
            value(s, t, divergence=one, backend=backend),
            value(t, s, divergence=other, backend=backend),
        )


def test_relations_between_divergences(rows, backend):
    s, t = rows

    def d(name, *parameters):
        return value(s, t, divergence=DIVERGENCES[name](*parameters), backend=backend)

    same(d("jeffreys", 0.3), 0.3 * d("forward_kl") + 0.7 * d("reverse_kl"))
    same(d("jsd", 0.3), 0.3 * d("skew_forward_kl", 0.3) + 0.7 * d("skew_reverse_kl", 0.7))
    same(d("jsd", 0.3, True), d("jsd", 0.3) / 0.21)
    same(d("ab", 0.3, 0.7), d("alpha", 0.3))
    same(d("renyi", 0.5), -2 * torch.log1p(-d("alpha", 0.5) / 4))
    same(d("alpha", 1.0), d("forward_kl"))
    same(d("alpha", 0.0), d("reverse_kl"))
    same(d("renyi", 1.0), d("forward_kl"))
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        assert (d(name, 1.0) == 0).all()
        same(d(name, 0.0), d(name.replace("skew_", "")))


@pytest.mark.parametrize("step", [1e-4, 1e-7])
def test_limits_are_continuous(step, backend):
    """Close to a parameter where the formula is 0/0: no jump, no digits lost beyond the step."""
    s, t = pair(6, 131, dtypes=(torch.float64, torch.float64), scale=0.5)

    def d(name, *parameters):
        return value(s, t, divergence=DIVERGENCES[name](*parameters), backend=backend)

    for near, limit in (
        (d("jsd", step, True), d("forward_kl")),
        (d("jsd", 1 - step, True), d("reverse_kl")),
        (d("alpha", 1 - step), d("forward_kl")),
        (d("alpha", 1 + step), d("forward_kl")),
        (d("alpha", step), d("reverse_kl")),
        (d("alpha", -step), d("reverse_kl")),
        (d("renyi", 1 - step), d("forward_kl")),
        (d("renyi", 1 + step), d("forward_kl")),
        (d("skew_forward_kl", step), d("forward_kl")),
        (d("skew_reverse_kl", step), d("reverse_kl")),
    ):
        same(near, limit, tolerance=100 * step)


def test_the_documented_jump_of_jsd(rows, backend):
    """The convention of TRL and Liger: the ends are the KLs, although JSD(beta) goes to 0 there."""
    s, t = rows
    inside = value(s, t, divergence=divergences.jsd(1e-6), backend=backend)
    end = value(s, t, divergence=divergences.jsd(0.0), backend=backend)
    assert (inside < 1e-4).all() and (end > 0.1).all()


def test_dkd_contains_forward_kl(rows, backend):
    """Zhao et al. 2022: KL = target KL + (1 - teacher's probability of the label) KL of rest."""
    s, t = rows
    labels = labels_for(s)
    of_rest = 1 - t.softmax(-1).gather(-1, labels[:, None])[:, 0]
    same(
        value(s, t, labels, divergence=divergences.dkd(1.0, of_rest), backend=backend),
        value(s, t, divergence="forward_kl", backend=backend),
    )


@pytest.mark.parametrize("name, parameters", ALL)
def test_offsets_and_order_of_columns_do_not_matter(name, parameters, rows, backend):
    s, t = rows
    labels = labels_for(s)
    order = torch.randperm(131)
    told = dict(divergence=divergence(name, parameters), backend=backend)
    before = value(s, t, labels, **told)
    same(value(s[:, order], t[:, order], order.argsort()[labels], **told), before)
    same(value(s + 3.0, t - 5.0, labels, **told), before)


# The oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", ALL)
def test_the_oracle_against_finite_differences(name, parameters):
    k = {**oracle.DEFAULTS[name], **parameters}
    student, teacher = (oracle.to_numpy(x) for x in pair(17, dtypes=(torch.float64,) * 2))
    step = oracle.REAL(1e-6)

    def at(x, y):
        return oracle.divergence(name, k, x, y, 4)

    _, by_student, by_teacher = at(student, teacher)
    for i in range(17):
        e = np.zeros(17, oracle.REAL)
        e[i] = step
        by_s = (at(student + e, teacher)[0] - at(student - e, teacher)[0]) / (2 * step)
        by_t = (at(student, teacher + e)[0] - at(student, teacher - e)[0]) / (2 * step)
        assert abs(by_s - by_student.by_logits[i]) < 1e-10
        assert abs(by_t - by_teacher.by_logits[i]) < 1e-10


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("name, parameters", ALL)
def test_the_oracles_infinities_are_limits(name, parameters, where):
    """-inf gives what a logit of -3000 gives (its probability is 1e-1300), where that is finite."""
    k = {**oracle.DEFAULTS[name], **parameters}
    x, y = (oracle.to_numpy(v) for v in pair(17, dtypes=(torch.float64,) * 2))
    infinite, far, farther = ((x.copy(), y.copy()) for _ in range(3))
    for i in {"student": [0], "teacher": [1], "both": [0, 1]}[where]:
        infinite[i][5], far[i][5], farther[i][5] = -np.inf, -3000, -6000
    value_far, *grads_far = oracle.divergence(name, k, *far, 4)
    value, *grads = oracle.divergence(name, k, *infinite, 4)
    if np.isfinite(value):
        assert abs(value_far - value) < 1e-12 * max(1, value)
    else:
        assert value == np.inf and oracle.divergence(name, k, *farther, 4)[0] > value_far + 1e-6
    for grad, grad_far in zip(grads, grads_far, strict=True):
        if np.isfinite(grad.by_logits).all():
            np.testing.assert_allclose(grad.by_logits, grad_far.by_logits, atol=1e-12)
        else:
            assert np.isinf(value)
