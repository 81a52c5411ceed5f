"""What distillation_loss refuses: messages name the argument, what was given, what is accepted."""

import math
import re

import pytest
import torch
from cases import pair

import kdkernels
from kdkernels import divergences

STUDENT, TEACHER = pair(4, 67)
LABELS = torch.tensor([1, 2, 3, 4])


def needs_grad(*shape):
    return torch.ones(shape, requires_grad=True)


def meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


# (error, what is changed in a good call, words that must be in the message)
REFUSED = [
    # types and dtypes
    (TypeError, dict(student_logits=[[1.0]]), "student_logits | list | Tensor"),
    (TypeError, dict(teacher_logits=[[1.0]]), "teacher_logits | list | Tensor"),
    (TypeError, dict(student_logits=STUDENT.long()), "student_logits | torch.int64 | float32"),
    (TypeError, dict(teacher_logits=TEACHER > 0), "teacher_logits | torch.bool | bfloat16"),
    (TypeError, dict(student_logits=STUDENT.cfloat()), "student_logits | complex64"),
    (TypeError, dict(labels=LABELS.float()), "labels | torch.float32 | integer"),
    (TypeError, dict(labels=[1, 2, 3, 4]), "labels | list | Tensor"),
    (TypeError, dict(token_weights=[1.0] * 4), "token_weights | list | Tensor"),
    (TypeError, dict(temperature="2"), "temperature | str | float or Tensor"),
    (TypeError, dict(temperature=torch.ones((), dtype=torch.cfloat)), "temperature | complex64"),
    (TypeError, dict(kd_weight=torch.ones(4) > 0), "kd_weight | torch.bool"),
    (TypeError, dict(kd_weight=None), "kd_weight | NoneType"),
    (TypeError, dict(temperature=True), "temperature | bool"),
    ((TypeError, ValueError), dict(divergence=3), "divergence | 3"),
    # shapes
    (ValueError, dict(student_logits=torch.tensor(1.0)), "student_logits | () | V"),
    (ValueError, dict(student_logits=STUDENT[:, :0], teacher_logits=TEACHER[:, :0]), "(4, 0)"),
    (ValueError, dict(teacher_logits=TEACHER[:3]), "teacher_logits | (3, 67) | (4, 67)"),
    (ValueError, dict(teacher_logits=TEACHER[:, :66]), "teacher_logits | (4, 66) | vocab_size"),
    (ValueError, dict(teacher_logits=TEACHER[None]), "teacher_logits | (1, 4, 67)"),
    (ValueError, dict(labels=LABELS[:3]), "labels | (3,) | (4,)"),
    (ValueError, dict(labels=torch.zeros(4, 67, dtype=torch.long)), "labels | (4, 67) | (4,)"),
    (ValueError, dict(token_weights=torch.ones(3)), "token_weights | (3,) | (4,)"),
    (ValueError, dict(temperature=torch.ones(3)), "temperature | (3,) | (4,)"),
    (ValueError, dict(teacher_temperature=torch.ones(1, 4)), "teacher_temperature | (1, 4)"),
    (ValueError, dict(ce_weight=torch.ones(5)), "ce_weight | (5,)"),
    (ValueError, dict(normalizer=torch.ones(4)), "normalizer | (4,)"),
    (ValueError, dict(divergence=divergences.jsd(torch.ones(5))), "jsd | (5,) | (4,)"),
    # devices
    (ValueError, dict(teacher_logits=meta(4, 67)), "teacher_logits | meta | cpu"),
    (ValueError, dict(labels=meta(4, dtype=torch.long)), "labels | meta | cpu"),
    (ValueError, dict(token_weights=meta(4)), "token_weights | meta | cpu"),
    (ValueError, dict(temperature=meta()), "temperature | meta | cpu"),
    (ValueError, dict(divergence=divergences.jsd(meta())), "jsd | meta | cpu"),
    # ranges
    (ValueError, dict(temperature=0.0), "temperature=0.0 | > 0"),
    (ValueError, dict(temperature=-1), "temperature=-1 | > 0"),
    (ValueError, dict(temperature=math.nan), "temperature=nan"),
    (ValueError, dict(temperature=math.inf), "temperature=inf"),
    (ValueError, dict(teacher_temperature=0.0), "teacher_temperature=0.0 | > 0"),
    (ValueError, dict(kd_weight=math.nan), "kd_weight=nan"),
    (ValueError, dict(z_loss_weight=math.inf), "z_loss_weight=inf"),
    (ValueError, dict(normalizer=0.0), "normalizer=0.0 | > 0"),
    (ValueError, dict(normalizer=-3), "normalizer=-3 | > 0"),
    (ValueError, dict(label_smoothing=1.1), "label_smoothing=1.1 | [0, 1]"),
    (ValueError, dict(label_smoothing=-0.1), "label_smoothing=-0.1 | [0, 1]"),
    (ValueError, dict(vocab_size=0), "vocab_size=0 | 67"),
    (ValueError, dict(vocab_size=68), "vocab_size=68 | 67"),
    # names
    (ValueError, dict(divergence="hellinger"), "divergence='hellinger' | forward_kl | dkd"),
    (ValueError, dict(reduction="average"), "reduction='average' | batchmean | none"),
    (ValueError, dict(backend="tpu"), "backend='tpu' | reference"),
    # combinations
    (ValueError, dict(labels=None, ce_weight=0.5), "labels | ce_weight=0.5"),
    (ValueError, dict(labels=None, ce_weight=torch.tensor(0.5)), "labels | ce_weight"),
    (ValueError, dict(labels=None, divergence="dkd"), "labels | dkd"),
    (ValueError, dict(mask_kd=False, divergence="dkd"), "mask_kd=False | dkd"),
    (ValueError, dict(normalizer=3.0, reduction="sum"), "normalizer | reduction='sum' | batchmean"),
    (ValueError, dict(normalizer=3.0, reduction="none"), "normalizer | reduction='none'"),
    # tensors that require grad would get none
    (ValueError, dict(kd_weight=needs_grad(4)), "kd_weight | requires grad"),
    (ValueError, dict(token_weights=needs_grad(4)), "token_weights | requires grad"),
    (ValueError, dict(normalizer=needs_grad()), "normalizer | requires grad"),
]  # fmt: skip


@pytest.mark.parametrize("error, changed, words", REFUSED, ids=[words for *_, words in REFUSED])
@pytest.mark.parametrize("name", ["distillation_loss", "distillation_loss_and_grad"])
def test_refused(name, error, changed, words, backend):
    call = dict(student_logits=STUDENT, teacher_logits=TEACHER, labels=LABELS, backend=backend)
    before = STUDENT.clone()
    with pytest.raises(error) as raised:
        getattr(kdkernels, name)(**{**call, **changed})
    for word in words.split(" | "):
        assert word in str(raised.value)
    assert torch.equal(STUDENT, before) and STUDENT._version == 0


def test_the_plain_call_of_these_tests_is_accepted(backend):
    kdkernels.distillation_loss(STUDENT, TEACHER, LABELS, backend=backend)


# (divergence, arguments, words that must be in the message)
WRONG_PARAMETERS = [
    ("jeffreys", dict(weight=1.5), "jeffreys | weight=1.5 | [0, 1]"),
    ("jeffreys", dict(weight=-0.5), "jeffreys | weight=-0.5 | [0, 1]"),
    ("jsd", dict(beta=1.01), "jsd | beta=1.01 | [0, 1]"),
    ("jsd", dict(beta=math.nan), "jsd | beta=nan | [0, 1]"),
    ("skew_forward_kl", dict(lam=2), "skew_forward_kl | lam=2 | [0, 1]"),
    ("skew_reverse_kl", dict(lam=-1), "skew_reverse_kl | lam=-1 | [0, 1]"),
    ("alpha", dict(alpha=math.inf), "alpha | alpha=inf | finite"),
    ("renyi", dict(order=0), "renyi | order=0 | > 0"),
    ("ab", dict(alpha=0.0), "ab | alpha=0.0 | > 0"),
    ("ab", dict(beta=0.0), "ab | beta=0.0 | > 0"),
    ("dkd", dict(target_weight=-1.0), "dkd | target_weight=-1.0 | >= 0"),
    ("dkd", dict(non_target_weight=-8), "dkd | non_target_weight=-8 | >= 0"),
    ("jsd", dict(beta=needs_grad()), "jsd | beta | requires grad"),
]


@pytest.mark.parametrize(
    "name, given, words", WRONG_PARAMETERS, ids=[words for *_, words in WRONG_PARAMETERS]
)
def test_parameters_out_of_range(name, given, words):
    with pytest.raises(ValueError) as raised:
        divergences.DIVERGENCES[name](**given)
    for word in words.split(" | "):
        assert word in str(raised.value)


@pytest.mark.parametrize("given", ["0.5", None, True, [0.5]], ids=str)
def test_parameters_of_the_wrong_type(given):
    with pytest.raises(TypeError, match="beta.*accepted"):
        divergences.jsd(given)
    with pytest.raises(TypeError, match="beta.*int64.*accepted"):
        divergences.jsd(torch.tensor(1))


OUT_OF_RANGE = {
    "jeffreys": ("weight", [-0.1, 1.1, math.nan]),
    "jsd": ("beta", [-0.1, 1.1, math.nan]),
    "skew_forward_kl": ("lam", [-0.1, 1.1, math.nan]),
    "skew_reverse_kl": ("lam", [-0.1, 1.1, math.nan]),
    "alpha": ("alpha", [math.inf, -math.inf, math.nan]),
    "renyi": ("order", [0.0, -1.0, math.nan]),
    "ab": ("alpha", [0.0, -0.1, math.nan]),
    "dkd": ("non_target_weight", [-0.1, math.inf, math.nan]),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_tensor_out_of_range_gives_nan_in_its_row(name, backend):
    """Tensors are not read on the host; the wrong rows alone say so."""
    parameter, wrong = OUT_OF_RANGE[name]
    values = torch.tensor([0.5, *wrong])
    member = divergences.DIVERGENCES[name](**{parameter: values})
    loss, grad = kdkernels.distillation_loss_and_grad(
        STUDENT, TEACHER, LABELS, divergence=member, reduction="none", backend=backend
    )
    assert loss.isnan().tolist() == [False, True, True, True]
    assert grad.isnan().any(-1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("which", ["temperature", "teacher_temperature"])
def test_a_temperature_tensor_out_of_range_gives_nan_in_its_row(which, backend):
    values = torch.tensor([0.5, 0.0, -1.0, math.nan])
    loss, grad = kdkernels.distillation_loss_and_grad(
        STUDENT, TEACHER, reduction="none", backend=backend, **{which: values}
    )
    assert loss.isnan().tolist() == [False, True, True, True]
    assert grad.isnan().any(-1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("label", [67, -1, -101, 2**40, -(2**40)])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_labels_out_of_range(inplace, label, backend):
    """Before anything is written: the logits are as they were, in place too."""
    student = STUDENT.clone()
    labels = torch.tensor([1, -100, label, 3])
    expected = re.escape(f"labels[2] is {label}") + ".*0 to 66.*-100"
    with pytest.raises(IndexError, match=expected):
        kdkernels.distillation_loss(student, TEACHER, labels, ce_weight=1.0, backend=backend)
    with pytest.raises(IndexError, match=expected):
        kdkernels.distillation_loss_and_grad(
            student, TEACHER, labels, ce_weight=1.0, inplace=inplace, backend=backend
        )
    leaf = student.clone().requires_grad_()
    output = leaf * 1
    with pytest.raises(IndexError, match=expected):
        kdkernels.distillation_loss(
            output, TEACHER, labels, ce_weight=1.0, inplace=inplace, backend=backend
        )
    assert torch.equal(student, STUDENT) and torch.equal(output, STUDENT)
    assert output._version == 0


def test_labels_of_padding_columns_are_out_of_range(backend):
    with pytest.raises(IndexError, match=r"labels\[3\] is 4.*0 to 3"):
        kdkernels.distillation_loss(STUDENT, TEACHER, LABELS, vocab_size=4, backend=backend)


def test_the_label_of_a_masked_row_is_checked_too(backend):
    """A weight of 0 does not make a wrong label right: it is most likely a bug in the data."""
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with pytest.raises(IndexError, match=r"labels\[2\] is 99"):
        kdkernels.distillation_loss(
            STUDENT, TEACHER, torch.tensor([1, 2, 99, 3]), token_weights=weights, backend=backend
        )


def test_integer_dtypes_of_labels(backend):
    want = kdkernels.distillation_loss(STUDENT, TEACHER, LABELS, ce_weight=1.0, backend=backend)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        got = kdkernels.distillation_loss(
            STUDENT, TEACHER, LABELS.to(dtype), ce_weight=1.0, backend=backend
        )
        assert torch.equal(got, want)


def test_in_place_rows_that_cannot_be_written_as_they_lie(backend):
    for view, reason in (
        (torch.randn(67, 4).T, "columns apart"),
        (torch.randn(1, 67).expand(4, 67), "rows on top of each other"),
        (torch.randn(2, 3, 67)[:, :2], "leading dimensions that do not flatten"),
        (torch.randn(500).as_strided((4, 67), (60, 1)), "rows that overlap"),
    ):
        before = view.clone()
        with pytest.raises(ValueError, match="inplace.*strides") as raised:
            kdkernels.distillation_loss_and_grad(
                view, torch.zeros(view.shape), inplace=True, backend=backend
            )
        assert str(tuple(view.stride())) in str(raised.value), reason
        assert torch.equal(view, before)


def test_in_place_beside_a_teacher_in_the_same_memory(backend):
    """A row written before the next is read as its teacher."""
    buffer = torch.randn(5, 67)
    before = buffer.clone()
    with pytest.raises(ValueError, match="inplace.*teacher_logits.*memory"):
        kdkernels.distillation_loss_and_grad(buffer[:4], buffer[1:], inplace=True, backend=backend)
    assert torch.equal(buffer, before)


def test_cpp_refuses_another_device():
    with pytest.raises(RuntimeError, match="backend='cpp'"):
        kdkernels.distillation_loss(meta(4, 67), meta(4, 67), backend="cpp")
    assert kdkernels.distillation_loss(meta(4, 67), meta(4, 67)).device.type == "meta"


def test_cpp_without_a_library(monkeypatch):
    """Asked for by name it raises with the reason; left to choose, the reference serves."""
    monkeypatch.setattr(kdkernels._ext, "_cpp_error", "no compiler when this was installed")
    with pytest.raises(RuntimeError, match="backend='cpp'.*no compiler when this was installed"):
        kdkernels.distillation_loss(STUDENT, TEACHER, backend="cpp")
    assert "reference" in kdkernels.explain(STUDENT)
    assert "no compiler when this was installed" in kdkernels.explain(STUDENT)


def test_explain_agrees_with_what_is_called(backend):
    assert kdkernels.explain(STUDENT, backend=backend).startswith(backend)
    assert kdkernels.explain(meta(4, 67)).startswith("reference")
    with pytest.raises(ValueError, match="backend='tpu'"):
        kdkernels.explain(STUDENT, backend="tpu")


def test_an_unknown_option():
    with pytest.raises(TypeError, match="temprature"):
        kdkernels.distillation_loss(STUDENT, TEACHER, temprature=2.0)
    with pytest.raises(TypeError, match="temprature.*temperature"):
        kdkernels.DistillationLoss(temprature=2.0)
    with pytest.raises(TypeError, match="temprature"):
        kdkernels.distillation_loss_and_grad(STUDENT, TEACHER, temprature=2.0)


def test_the_module_refuses_what_it_can_when_it_is_made():
    with pytest.raises(ValueError, match="divergence='hellinger'"):
        kdkernels.DistillationLoss(divergence="hellinger")


def test_label_error_inside_a_compiled_graph():
    """The op itself raises there; a RuntimeError with the same words."""
    if "cpp" not in kdkernels.explain(STUDENT):
        pytest.skip(
            "the C++ library is not built: the reference does not look at labels in a graph"
        )
    function = torch.compile(kdkernels.distillation_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises((RuntimeError, IndexError), match=r"labels\[1\] is 67"):
        function(STUDENT, TEACHER, torch.tensor([1, 67, 2, 3]), ce_weight=1.0)
