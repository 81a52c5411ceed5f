"""The loop against plain PyTorch, and what it promises about models, data, seeds and errors."""

import copy
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from trainer.runs import CLASSES, make_config, make_data, make_loader, make_models, run

from kdkernels.trainer import evaluate, train
from kdkernels.trainer.config import learning_rate


def plain_student(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


def plain_teacher():
    torch.manual_seed(1)
    return nn.Linear(12, CLASSES).double()


def double_data(rows=44):
    inputs, labels = make_data(rows)
    return inputs.double(), labels


@pytest.mark.parametrize("mask_kd", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_equal_plain_pytorch(mask_kd, optimizer):
    """Loss, denominators, clipping, schedule and optimiser, written out with torch alone."""
    inputs, labels = double_data()
    config = make_config(
        epochs=2,
        accumulation_steps=3,
        mask_kd=mask_kd,
        optimizer=optimizer,
        weight_decay=0.1,
        max_grad_norm=0.5,
        temperature=3.0,
        kd_weight=0.7,
        ce_weight=0.4,
        label_smoothing=0.1,
    )
    student, teacher = plain_student(), plain_teacher()
    expected = copy.deepcopy(student)
    train(config, student, make_loader(inputs, labels, shuffle=False), teacher=teacher)

    if optimizer == "sgd":
        stepper = torch.optim.SGD(expected.parameters(), momentum=0.9, weight_decay=0.1)
    else:
        stepper = torch.optim.AdamW(expected.parameters(), weight_decay=0.1)
    chunks = list(zip(inputs.split(12), labels.split(12), strict=True))  # 3 batches of 4 a step
    clipped = 0
    for step, (x, y) in enumerate(chunks * 2):
        logits, target = expected(x), teacher(x).detach()
        labelled = y != -100
        kd = F.kl_div(
            F.log_softmax(logits / 3, -1),
            F.log_softmax(target / 3, -1),
            log_target=True,
            reduction="none",
        )
        kd = 9 * kd.sum(-1)[labelled if mask_kd else slice(None)].mean()
        loss = 0.7 * kd + 0.4 * F.cross_entropy(logits[labelled], y[labelled], label_smoothing=0.1)
        stepper.zero_grad()
        loss.backward()
        clipped += nn.utils.clip_grad_norm_(expected.parameters(), 0.5).item() > 0.5
        for group in stepper.param_groups:
            group["lr"] = learning_rate(config, step, len(chunks) * 2)
        stepper.step()
    assert clipped > 0
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_accumulation_equals_a_big_batch():
    # 44 rows: steps of 12, 12, 12 and 8 rows; with batches of 5 the last of each step is uneven in
    # its share of labels, and the last step of the epoch is short.
    inputs, labels = double_data(43)
    labels[5:10] = -100  # a batch without any label
    students = []
    for batch_size, accumulation in ((15, 1), (5, 3), (3, 5)):
        student = plain_student()
        config = make_config(accumulation_steps=accumulation, optimizer="sgd", max_grad_norm=0.5)
        loader = make_loader(inputs, labels, batch_size, shuffle=False)
        result = train(config, student, loader, teacher=plain_teacher())
        assert result.steps == 4 * math.ceil(43 / 15)
        students.append(student)
    for other in students[1:]:
        for a, b in zip(students[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_without_teacher_it_is_cross_entropy():
    inputs, labels = double_data()
    student = plain_student()
    expected = copy.deepcopy(student)
    config = make_config(
        epochs=1, accumulation_steps=1, kd_weight=0.0, ce_weight=1.0, optimizer="sgd", momentum=0.0
    )
    train(config, student, make_loader(inputs, labels, 44, shuffle=False))
    loss = F.cross_entropy(expected(inputs), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        stepped = theirs - learning_rate(config, 0, 1) * theirs.grad
        torch.testing.assert_close(ours, stepped, rtol=1e-10, atol=1e-13)


def test_gradients_the_caller_left_are_not_used():
    clean, soiled = plain_student(), plain_student()
    for parameter in soiled.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    for student in (clean, soiled):
        train(make_config(), student, make_loader(*double_data()), teacher=plain_teacher())
    for a, b in zip(clean.parameters(), soiled.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- models and loaders are left as they were ----


def test_teacher_is_frozen_and_put_back():
    teacher = nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, CLASSES)
    )
    teacher.train()
    teacher[2].eval()  # a mixture of modes, and of trainable parameters
    teacher[0].weight.requires_grad_(False)
    seen = []
    teacher.register_forward_hook(
        lambda module, args, output: seen.append(
            (any(m.training for m in module.modules()), output.requires_grad)
        )
    )
    before = copy.deepcopy(teacher.state_dict())
    run(teacher=teacher)
    assert seen and set(seen) == {(False, False)}
    assert [m.training for m in teacher.modules()] == [True, True, True, False, True]
    assert [p.requires_grad for p in teacher.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in before.items():
        assert torch.equal(value, teacher.state_dict()[name]), name


def test_student_trains_in_train_mode_and_is_put_back():
    student, _ = make_models()
    student.eval()
    seen = []
    student.register_forward_hook(lambda module, args, output: seen.append(module.training))
    _, result = run(student=student, eval_every=1, accumulation_steps=1, epochs=1)
    assert not student.training
    # 11 training batches, and after each of the 11 steps 5 evaluation batches.
    assert seen == [True, *[False] * 5] * 11
    assert len(result.history) == 11


def test_modes_come_back_after_an_error():
    student, teacher = make_models()
    student.eval()
    teacher.train()
    loader = make_loader(torch.full((8, 12), math.nan), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(FloatingPointError):
        train(make_config(), student, loader, teacher=teacher)
    assert not student.training and teacher.training


def test_the_callers_loader_is_not_changed():
    student, teacher = make_models()
    loader = make_loader(*make_data())
    eval_loader = make_loader(*make_data(labelled=1.0))
    samplers = loader.batch_sampler.sampler, eval_loader.batch_sampler.sampler
    train(make_config(epochs=1), student, loader, teacher=teacher, eval_loader=eval_loader)
    assert (loader.batch_sampler.sampler, eval_loader.batch_sampler.sampler) == samplers


# ---- order and seeds ----


def orders(run_dir=None, **options):
    """The order in which each epoch reads 44 rows."""
    student, teacher = make_models()
    inputs, labels = make_data()
    inputs[:, 0] = torch.arange(44)
    read = []
    student.register_forward_pre_hook(
        lambda module, args: read.extend(args[0][:, 0].int().tolist() if module.training else [])
    )
    config = make_config(accumulation_steps=1, checkpoint_every=8, run_dir=run_dir, **options)
    train(config, student, make_loader(inputs, labels), teacher=teacher)
    return [tuple(read[start : start + 44]) for start in range(0, len(read), 44)]


def test_every_epoch_has_its_own_order():
    first, second = orders(seed=0), orders(seed=1)
    assert orders(seed=0) == first
    assert all(sorted(order) == list(range(44)) for order in first + second)
    assert len(set(first + second)) == 8  # neither repeated nor seed 1 one epoch behind seed 0


def test_a_resumed_run_reads_what_is_left(tmp_path):
    whole = orders(tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    assert newest.name == "step-00000044"
    newest.rename(tmp_path / "moved away")
    (rest,) = orders(tmp_path)  # from step 40 of 44: 4 batches of the last epoch
    assert rest == whole[-1][28:]


def test_seeds_reproduce_bitwise():
    first, _ = run(seed=3)
    second, _ = run(seed=3)
    other, _ = run(seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first[0].weight, other[0].weight)


def test_two_processes_equal_one_that_accumulates(tmp_path):
    """DDP on two processes reads the same rows a step and averages over the same counts."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from trainer.runs import *\n"
        "torch.manual_seed(0)\n"
        "student = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES))\n"
        "inputs, labels = make_data(48)\n"
        "config = make_config(run_dir=sys.argv[1], accumulation_steps=int(sys.argv[2]),\n"
        "                     optimizer='sgd', learning_rate=0.1)\n"
        "train(config, student, make_loader(inputs, labels), teacher=make_models()[1])\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, name, accumulation in (([], "one", "2"), (two, "two", "1")):
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), str(tmp_path / name), accumulation],
            env=environment,
            start_new_session=True,
        )
        try:
            assert process.wait(120) == 0
        finally:
            if process.poll() is None:  # the launcher alone would leave its workers behind
                os.killpg(process.pid, signal.SIGKILL)
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)


# ---- evaluation ----


class Table(nn.Module):
    """Logits looked up by the first input: what each row predicts is written in the test."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.dropout = nn.Dropout(0.9)

    def forward(self, inputs):
        return self.dropout(self.logits[inputs[:, 0].long()])


def test_evaluate_counts_labelled_rows_only():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    model = Table(probabilities.log()).train()
    inputs = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 2.0])[:, None]
    labels = torch.tensor([0, 1, 1, -100, 2, 2, -100])
    for batch_size in (1, 2, 7):
        metrics = evaluate(model, make_loader(inputs, labels, batch_size, shuffle=False))
        assert metrics["accuracy"] == 3 / 5
        expected = -sum(map(math.log, (0.7, 0.8, 0.3, 0.1, 0.4))) / 5
        assert metrics["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    assert model.training and model.dropout.training
    with pytest.raises(ValueError, match="no row with a label"):
        evaluate(model, make_loader(inputs, torch.full((7,), -100), 7))


def test_evaluate_takes_sequences():
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)
    inputs, labels = torch.randn(6, 3, 4), torch.randint(0, CLASSES, (6, 3))
    metrics = evaluate(model, make_loader(inputs, labels, 4))
    logits = model(inputs).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten()).item()
    assert metrics["cross_entropy"] == pytest.approx(expected, rel=1e-6)
    assert metrics["accuracy"] == (logits.argmax(-1) == labels.flatten()).double().mean().item()


# ---- errors ----


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    inputs, labels = make_data()
    inputs[21] = math.nan  # batch 5 of 11, in the third step of two batches
    student, teacher = make_models()
    config = make_config(run_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(FloatingPointError) as raised:
        train(config, student, make_loader(inputs, labels, shuffle=False), teacher=teacher)
    message = str(raised.value)
    assert message.startswith("step 3 (epoch 0, batch 4): loss is nan")
    assert "the weights are those of step 2" in message
    assert str(tmp_path / "checkpoints" / "step-00000002") in message
    saved = load_file(tmp_path / "checkpoints" / "step-00000002" / "student.safetensors")
    for name, parameter in student.named_parameters():
        assert torch.equal(saved[name], parameter), name


def test_a_gradient_that_is_not_finite_names_its_step():
    class Steep(nn.Linear):
        def forward(self, inputs):  # sqrt has an infinite gradient at 0
            return super().forward(inputs) + (self.bias * 0).abs().sqrt()

    _, teacher = make_models()
    with pytest.raises(FloatingPointError, match="step 1 .* gradient norm is nan"):
        train(make_config(), Steep(12, CLASSES), make_loader(*make_data()), teacher=teacher)


def test_arguments_that_do_not_fit_together():
    student, teacher = make_models()
    loader = make_loader(*make_data())
    with pytest.raises(ValueError, match="teacher is None while kd_weight is 0.9"):
        train(make_config(), student, loader)
    empty = make_loader(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64), shuffle=False)
    with pytest.raises(ValueError, match="train_loader is empty"):
        train(make_config(), student, empty, teacher=teacher)

    unbatched = DataLoader(make_loader(*make_data()).dataset, batch_size=None)
    with pytest.raises(ValueError, match="train_loader has batch_size None"):
        train(make_config(), student, unbatched, teacher=teacher)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="train_loader has no length"):
        train(make_config(), student, DataLoader(Stream()), teacher=teacher)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        train(make_config(), student, loader, teacher=teacher)


# ---- autocast, TensorBoard ----


def test_bf16_autocast_trains_float32_weights():
    """Between two float32 runs: Accelerate keeps one precision a process, and refuses another."""
    for mixed_precision, seen_by_teacher in (
        ("no", torch.float32),
        ("bf16", torch.bfloat16),
        ("no", torch.float32),
    ):
        student, teacher = make_models()
        seen = set()
        teacher.register_forward_hook(lambda m, args, output, seen=seen: seen.add(output.dtype))
        before = student[0].weight.clone()
        run(student=student, teacher=teacher, mixed_precision=mixed_precision)
        assert seen == {seen_by_teacher}
        assert student[0].weight.dtype == torch.float32
        assert student[0].weight.isfinite().all() and not torch.equal(student[0].weight, before)
        assert student(torch.randn(4, 12)).dtype == torch.float32  # the wrapper is gone again


def test_tensorboard_scalars_survive_a_resume_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, log_every=2)
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.rename(tmp_path / "moved away")
    run(tmp_path, log_every=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        *(
            f"train/{name}"
            for name in ("loss", "kd", "cross_entropy", "learning_rate", "grad_norm")
        ),
        *(f"eval/{name}" for name in ("accuracy", "cross_entropy")),
    }
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 25, 2))
    assert [event.step for event in events.Scalars("eval/accuracy")] == [6, 12, 18, 24]
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    config = make_config()
    expected = [learning_rate(config, step - 1, 24) for step in range(2, 25, 2)]
    assert rates == pytest.approx(expected, rel=1e-6)
