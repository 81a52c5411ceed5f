"""Objectives against plain torch, resume with projectors, and failures reported by name."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from trainer.runs import CLASSES, make_config, make_data, make_loader
from trainer.test_resume import CONTEXT

from kdkernels.trainer import CheckpointError, evaluate, train
from kdkernels.trainer.objective import (
    Features,
    Labels,
    Logits,
    Objective,
    Regression,
    Regularizer,
    Relation,
    Schedule,
    Similarity,
)

STEP = {"epochs": 1, "accumulation_steps": 1, "optimizer": "sgd", "momentum": 0.0}


def net(width, seed, outputs=CLASSES):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, outputs),
    ).double()  # fmt: skip


def config(**options):
    """Of an objective: the loss is not in it."""
    return make_config(**{"mask_kd": True, "max_grad_norm": None, **options})


def run(objective, run_dir=None, *, seed=0, widths=(8, 16), loader=None, **options):
    student, teacher = net(widths[0], seed), net(widths[1], 1)
    inputs, labels = make_data()
    loader = loader or make_loader(inputs.double(), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(
            config(run_dir=run_dir, **options),
            student,
            loader,
            teacher=teacher,
            objective=objective,
        )
    return student, result


def one_step(objective, student, teacher, inputs, labels, expected_loss, batch_size=44, **options):
    """Train one step and compare with plain SGD on `expected_loss(student)`."""
    expected = copy.deepcopy(student)
    loader = make_loader(inputs, labels, batch_size, shuffle=False)
    settings = config(**{**STEP, "warmup_steps": 0, "schedule": "constant", **options})
    train(settings, student, loader, teacher=teacher, objective=objective)
    expected_loss(expected).backward()
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        gradient = 0.0 if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours, theirs - 0.01 * gradient, rtol=1e-9, atol=1e-12)


def kd(logits, target, temperature):
    logs = (F.log_softmax(x / temperature, -1) for x in (logits, target))
    return temperature**2 * F.kl_div(*logs, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("batch_size", [44, 13])  # one batch; a step of 4, the last of 5 rows
def test_logits_labels_features_and_regularizer(batch_size):
    student, teacher = net(8, 0), net(8, 1)
    inputs, labels = make_data()
    inputs = inputs.double()
    objective = Objective(
        logits=Logits(temperature=3.0, mask_kd=False),
        labels=Labels(),
        features=[Features("[13]", metric="l2"), Features("0", "2", metric="cosine", weight=0.5)],
        regularizer=Regularizer("group"),
        weights={"logits": 0.7, "labels": 0.2, "features": 0.3, "regularizer": 0.01},
    )

    def loss(model):
        with torch.no_grad():
            theirs = [teacher[: i + 1](inputs) for i in range(5)]
        ours = [model[: i + 1](inputs) for i in range(5)]
        l2 = sum((ours[i] - theirs[i]).square().sum(1).mean() for i in (1, 3))
        cosine = (1 - F.cosine_similarity(ours[0], theirs[2])).mean()
        size = sum(
            math.sqrt(weight.shape[1]) * weight.norm(dim=1).sum()
            for weight in (model[0].weight, model[2].weight, model[4].weight)
        )
        hard = F.cross_entropy(ours[4], labels)
        soft = kd(ours[4], theirs[4], 3.0)
        return 0.7 * soft + 0.2 * hard + 0.3 * (l2 + 0.5 * cosine) + 0.01 * size

    one_step(
        objective, student, teacher, inputs, labels, loss, batch_size,
        accumulation_steps=math.ceil(44 / batch_size),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gram", "rkd_distance", "rkd_angle", "dist"])
def test_relations_of_a_batch(kind):
    import kdkernels

    student, teacher = net(8, 0), net(16, 1)
    inputs, labels = make_data()
    inputs = inputs.double()
    layer = None if kind == "dist" else "2"
    op = getattr(kdkernels, f"{kind}_loss")

    def loss(model):
        end = 5 if layer is None else 3
        return 2.0 * op(model[:end](inputs), teacher[:end](inputs).detach())

    objective = Objective(relations=Relation(kind, layer, weight=2.0))
    one_step(objective, student, teacher, inputs, labels, loss)


def test_similarity_of_a_batch():
    from kdkernels import similarity_loss

    student, teacher = net(8, 0), net(16, 1)
    inputs, labels = make_data()
    inputs = inputs.double()

    def loss(model):
        rows = model[:3](inputs), teacher[:3](inputs).detach()
        return similarity_loss(*rows, kernel="pkt", gamma=2.0, temperature=0.5)

    objective = Objective(similarity=Similarity("2", kernel="pkt", gamma=2.0, temperature=0.5))
    one_step(objective, student, teacher, inputs, labels, loss)


@pytest.mark.parametrize("teacher_loss", ["mse", "huber", "bounded"])
def test_regression(teacher_loss):
    student, teacher = net(8, 0, 1), net(16, 1, 1)
    inputs, _ = make_data()
    inputs = inputs.double()
    targets = inputs[:, 0] * 0.3 + 0.1
    targets[::3] = math.nan
    known = ~targets.isnan()
    objective = Objective(
        regression=Regression(loss="huber", delta=0.2, teacher_loss=teacher_loss, margin=0.01),
        weights={"regression_teacher": 0.5},
    )

    def loss(model):
        ours, theirs = model(inputs).squeeze(1), teacher(inputs).squeeze(1).detach()
        hard = F.huber_loss(ours[known], targets[known], delta=0.2)
        if teacher_loss == "mse":
            soft = F.mse_loss(ours, theirs)
        elif teacher_loss == "huber":
            soft = F.huber_loss(ours, theirs, delta=0.2)
        else:
            mine = (ours - targets)[known].square()
            worse = mine > (theirs - targets)[known].square() + 0.01
            assert 0 < worse.sum() < len(worse)
            soft = (mine * worse).mean()
        return hard + 0.5 * soft

    one_step(
        objective, student, teacher, inputs, targets, loss, batch_size=13, accumulation_steps=4
    )


def test_regression_shapes_do_not_broadcast():
    inputs, _ = make_data()
    loader = make_loader(inputs.double(), torch.zeros(44, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"student's output has shape \(4, 5\) and the targets"):
        run(Objective(regression=Regression()), loader=loader)


def test_the_objective_of_a_config_is_the_run_without_one(tmp_path):
    options = {"temperature": 3.0, "kd_weight": 0.7, "ce_weight": 0.3, "mask_kd": False}
    plain, _ = run(None, tmp_path / "a", **options)
    objective = Objective(
        logits=Logits(temperature=3.0, mask_kd=False),
        labels=Labels(),
        weights={"logits": 0.7, "labels": 0.3},
    )
    given, _ = run(objective, tmp_path / "b")
    for a, b in zip(plain.parameters(), given.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"temperature is 3.0 in the config while an objective"):
        run(objective, temperature=3.0)


def test_evaluate_real_targets():
    model = net(8, 0, 1)
    inputs, _ = make_data()
    inputs, targets = inputs.double(), torch.arange(44.0).double() / 44
    targets[::3] = math.nan
    known = ~targets.isnan()
    error = (model(inputs).squeeze(1) - targets)[known]
    for batch_size in (44, 7):
        metrics = evaluate(model, make_loader(inputs, targets, batch_size))
        assert metrics == {
            "mse": pytest.approx(error.square().mean().item(), rel=1e-6),
            "mae": pytest.approx(error.abs().mean().item(), rel=1e-6),
        }


# ---- projectors ----

WIDE = Objective(
    logits=Logits(), labels=Labels(), features=[Features("[02]"), Features("3", metric="cosine")]
)


def test_projectors_are_trained_saved_resumed_and_not_exported(tmp_path):
    straight, _ = run(WIDE, tmp_path / "a", optimizer="adamw")
    folders = sorted((tmp_path / "a" / "checkpoints").iterdir())
    earlier, newest = (load_file(folder / "student.safetensors") for folder in folders)
    keys = {key for key in newest if key.startswith("projectors.")}
    names = ("features[0]:0", "features[0]:2", "features[1]:3")
    assert keys == {f"projectors.{name}.{part}" for name in names for part in ("weight", "bias")}
    assert all(not torch.equal(newest[key], earlier[key]) for key in keys)
    moments = load_file(folders[-1] / "optimizer.safetensors")
    assert {key.rsplit("/", 1)[0] for key in moments} == set(newest)

    exported = load_file(tmp_path / "a" / "student.safetensors")
    assert exported.keys() == straight.state_dict().keys()
    folders[-1].rename(tmp_path / "moved away")  # as if the run had been stopped there
    resumed, result = run(WIDE, tmp_path / "a", seed=7, optimizer="adamw")
    assert result.resumed_from == 20
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    again = load_file(folders[-1] / "student.safetensors")
    assert all(torch.equal(newest[key], again[key]) for key in newest)
    assert all(not module._forward_hooks for module in straight.modules())

    other = Objective(logits=Logits(), labels=Labels(), features=[Features("[02]")])
    with pytest.raises(CheckpointError, match="objective was"):
        run(other, tmp_path / "a", optimizer="adamw")


def test_maps_get_a_projector_over_channels():
    torch.manual_seed(0)

    def maps(channels):
        return nn.Sequential(
            nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, channels, 1), nn.Flatten(),
            nn.Linear(12 * channels, CLASSES),
        ).double()  # fmt: skip

    student, teacher = maps(2), maps(6)
    before = student[1].weight.clone()
    inputs, labels = make_data()
    loader = make_loader(inputs.double(), labels)
    objective = Objective(features=Features("1"), labels=Labels())
    train(config(epochs=1), student, loader, teacher=teacher, objective=objective)
    assert not torch.equal(student[1].weight, before)


def _wide_run(run_dir, seed):
    torch.set_num_threads(1)
    run(WIDE, run_dir, seed=seed, epochs=40, checkpoint_every=5, optimizer="adamw")


def test_killed_with_projectors_and_resumed(tmp_path):
    _wide_run(tmp_path / "straight", 0)
    kills = 0
    for seed, newest in enumerate((0, 60, 140)):
        process = CONTEXT.Process(target=_wide_run, args=(str(tmp_path / "killed"), seed))
        process.start()
        while process.is_alive() and newest > max(
            [int(path.name[5:]) for path in tmp_path.glob("killed/checkpoints/step-*")], default=-1
        ):
            time.sleep(0.001)
        process.kill()
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 3, "the run was over before it could be killed"
    _wide_run(tmp_path / "killed", 9)
    a, b = (tmp_path / name / "student.safetensors" for name in ("straight", "killed"))
    assert a.read_bytes() == b.read_bytes()


def test_two_processes_with_projectors_equal_one_that_accumulates(tmp_path):
    """Every term but those among a batch's samples: a process has its own batch."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from trainer.test_objective import *\n"
        "inputs, labels = make_data(48)\n"
        "objective = Objective(\n"
        "    logits=Logits(), labels=Labels(), features=[Features('[02]')],\n"
        "    regularizer=Regularizer('group'), weights={'regularizer': 0.01},\n"
        ")\n"
        "run(objective, sys.argv[1], loader=make_loader(inputs.double(), labels),\n"
        "    accumulation_steps=int(sys.argv[2]), optimizer='sgd')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, name, accumulation in (([], "one", "2"), (two, "two", "1")):
        command = [sys.executable, *launcher, str(script), str(tmp_path / name), accumulation]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            assert process.wait(120) == 0
        finally:
            if process.poll() is None:  # the launcher alone would leave its workers behind
                os.killpg(process.pid, signal.SIGKILL)
    newest = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("one", "two")]
    one, other = (load_file(folder / "student.safetensors") for folder in newest)
    assert any(name.startswith("projectors.") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["compiled", "bf16"])
def test_compiled_and_autocast_students(way):
    student, teacher = net(8, 0).float(), net(16, 1).float()
    inputs, labels = make_data()
    loader = make_loader(inputs, labels, shuffle=False)
    options = {"epochs": 1, "mixed_precision": "bf16" if way == "bf16" else "no"}
    plain = copy.deepcopy(student)
    model = torch.compile(student, backend="aot_eager") if way == "compiled" else student
    model(inputs[:4])  # a graph without hooks exists
    train(config(**options), model, loader, teacher=teacher, objective=WIDE)
    train(config(epochs=1), plain, loader, teacher=teacher, objective=WIDE)
    tolerance = 1e-5 if way == "compiled" else 0.03
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- schedules ----


def test_schedules():
    line = Schedule(4.0, 1.0, steps=3, begin=2)
    assert [line.at(step) for step in (0, 2, 3, 5, 99)] == [4.0, 4.0, 3.0, 1.0, 1.0]
    assert Schedule(0.0, 1.0, 2, shape="cosine").at(1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shape is 'cosin'.*did you mean 'cosine'"):
        Schedule(0.0, 1.0, 2, shape="cosin")
    changing = Objective(
        logits=Logits(
            divergence="jsd",
            divergence_args={"beta": Schedule(0.1, 0.9, 10)},
            temperature=Schedule(4.0, 2.0, 10),
        ),
        labels=Labels(),
        weights={"logits": Schedule(1.0, 0.0, 5)},
    )
    student, _ = run(changing, epochs=1)
    assert student[0].weight.isfinite().all()
    assert changing.weights_at(5) == {"logits": 0.0, "labels": 1.0}
    # Steps 0 to 5 of the schedule, then constant: the same weights as the constants give there.
    constant = Objective(logits=Logits(temperature=Schedule(4.0, 4.0, 1)), labels=Labels())
    a, _ = run(constant, epochs=1)
    b, _ = run(Objective(logits=Logits(temperature=4.0), labels=Labels()), epochs=1)
    assert torch.equal(a[0].weight, b[0].weight)


# ---- what would fail in silence ----


def watched(objective, student=None, teacher=None):
    inputs, labels = make_data()
    loader = make_loader(inputs.double(), labels)
    student, teacher = student or net(8, 0), teacher or net(16, 1)
    train(config(epochs=1), student, loader, teacher=teacher, objective=objective)


def test_a_layer_without_gradient_is_an_error():
    student = net(8, 0)
    student[0].requires_grad_(False)  # its projector alone would be trained
    with pytest.raises(ValueError, match=r"features\[0\]/1: this output of the student has no gr"):
        watched(Objective(labels=Labels(), features=Features("1")), student)


def test_a_term_without_effect_is_named():
    class Zero(nn.Module):
        def forward(self, x):
            return x * 0.0

    teacher = nn.Sequential(*net(16, 1), Zero())
    with pytest.warns(UserWarning) as caught:
        watched(Objective(logits=Logits(), labels=Labels()), teacher=teacher)
    assert [str(w.message) for w in caught if "teaches nothing" in str(w.message)] == [
        "teacher's output: the same for every sample of the first 3 steps: it teaches nothing"
    ]

    with pytest.warns(UserWarning, match=r"logits: this term has had gradient 0 in all of the fir"):
        inputs, _ = make_data()
        loader = make_loader(inputs.double(), torch.full((44,), -100))  # mask_kd hides every row
        train(
            config(epochs=1),
            net(8, 0),
            loader,
            teacher=net(16, 1),
            objective=Objective(logits=Logits(), features=Features("0")),
        )


def test_inputs_changed_on_the_way_to_the_teacher():
    student = nn.Sequential(nn.ReLU(inplace=True), *net(8, 0))
    with pytest.raises(ValueError, match="student and teacher see different inputs.*input 0"):
        watched(Objective(logits=Logits()), student)


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="weights' key is 'logit'.*did you mean 'logits'"):
        Objective(logits=Logits(), weights={"logit": 1.0})
    with pytest.raises(ValueError, match="weights has 'labels', but the objective has no labels"):
        Objective(logits=Logits(), weights={"labels": 1.0})
    with pytest.raises(ValueError, match="no term has a weight"):
        Objective(logits=Logits(), weights={"logits": 0.0})
    with pytest.raises(ValueError, match="teacher has no layer '9'; the nearest are"):
        watched(Objective(features=Features("1", "9")))
    with pytest.raises(
        ValueError, match=r"features\[0\] names 2 layers of the student \(0, 2\) an"
    ):
        watched(Objective(features=Features("[02]", "0")))
    with pytest.raises(ValueError, match=r"teacher is None; features\[0\] need one"):
        inputs, labels = make_data()
        loader = make_loader(inputs.double(), labels)
        train(config(), net(8, 0), loader, objective=Objective(features=Features("0")))
    with pytest.raises(ValueError, match="regularizer.layers is '1'"):
        Regularizer("l1", layers="1").value(net(8, 0))


def test_removable_channels():
    model = net(8, 0)
    model[2].weight.data[:2] = 0.0
    model[0].weight.data[5] *= 1e-4
    assert Regularizer("group").removable_channels(model) == 3 / (8 + 8 + CLASSES)
    assert Regularizer("group", layers="2").removable_channels(model) == 2 / 8
