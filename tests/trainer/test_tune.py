"""Cross-validation: the folds, the choice, the files, and what is refused."""

import json
import math
import multiprocessing
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer.runs import make_config, make_data, make_models
from trainer.searches import GRID, make_student, search, search_and_report

from kdkernels.cli import main
from kdkernels.trainer import CheckpointError, tune
from kdkernels.trainer.data import make_loader
from kdkernels.trainer.loop import evaluate, train

ROOT = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.utils.tensorboard", "accelerate", "matplotlib", "sklearn"]
)


def same_weights(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# ---- folds ----


def test_folds_are_stratified_and_unlabelled_rows_are_in_every_training_part():
    labels = torch.tensor([0] * 30 + [1] * 15 + [2] * 5 + [-100] * 40)[torch.randperm(90)]
    splits, stratified = tune._split(labels, np.arange(90), 5, make_config())
    assert stratified and len(splits) == 5
    for training, test in splits:
        assert labels[test].bincount().tolist() == [6, 3, 1]
        assert sorted([*training, *test]) == list(range(90))  # disjoint, and every row
        assert (labels[training] == -100).sum() == 40
    assert sorted(np.concatenate([test for _, test in splits])) == sorted(
        (labels != -100).nonzero().flatten().tolist()
    )


def test_rare_classes_and_sequences_are_split_at_random():
    rare = torch.tensor([0] * 20 + [1] * 2)  # 2 rows for 3 folds
    sequences = torch.randint(0, 5, (22, 4))
    sequences[:6] = -100  # no label at all
    sequences[6:, 0] = -100  # a label in some of a row's places is a labelled row
    for labels, labelled in ((rare, 22), (sequences, 16)):
        splits, stratified = tune._split(labels, np.arange(22), 3, make_config())
        assert not stratified
        assert sum(len(test) for _, test in splits) == labelled
    with pytest.raises(ValueError, match="2 rows have a label; 3 folds need as many"):
        tune._split(torch.tensor([0, 1, -100, -100]), np.arange(4), 3, make_config())


# ---- what is trained ----


def test_scores_are_those_of_training_by_hand():
    inputs, labels = make_data(48, labelled=0.7)
    result = search(data=(inputs, labels), config={"seed": 5})
    entry = result.settings[3]
    assert entry.setting == {"kd_weight": 0.9, "temperature": 4.0}
    config = make_config(epochs=2, accumulation_steps=1, seed=5)
    splits, _ = tune._split(labels, np.arange(48), 3, config)
    for fold, (rows, test) in enumerate(splits):
        by_hand = make_config(epochs=2, accumulation_steps=1, seed=5 + fold)
        torch.manual_seed(5 + fold)
        student = make_student()
        state = torch.get_rng_state()
        teacher = make_models()[1]
        torch.set_rng_state(state)
        loader = make_loader(inputs[rows], labels[rows], 8, shuffle=True)
        train(by_hand, student, loader, teacher=teacher)
        test_loader = make_loader(inputs[test], labels[test], 8, shuffle=False)
        assert evaluate(student, test_loader)["accuracy"] == entry.scores[fold]


def test_seeds_are_the_same_for_every_setting():
    """Two spellings of one training: a setting's place in the grid must not change its scores."""
    result = search(grid={"weight_decay": [0.0, 1e-300]})
    first, second = result.settings
    assert first.scores == second.scores
    assert result.chosen == {"weight_decay": 0.0}  # a tie goes to the earlier one
    other = search(grid={"weight_decay": [0.0]}, config={"seed": 9})
    assert other.settings[0].scores != first.scores


def test_any_field_may_be_in_the_grid_and_a_bad_setting_is_found_first():
    grid = {"optimizer": ["sgd", "adamw"], "divergence": ["jsd", "reverse_kl"], "epochs": [1]}
    result = search(grid=grid)
    assert len(result.settings) == 4 and set(result.chosen) == set(grid)
    assert result.config.optimizer == result.chosen["optimizer"] and result.config.epochs == 1
    with pytest.raises(ValueError, match=r"the setting \{'temperature': 0.0\}: temperature is 0.0"):
        search(grid={"temperature": [1.0, 0.0]})


def learnable(rows=90):
    """Three classes a linear layer tells apart with certainty."""
    labels = torch.arange(rows) % 5
    return torch.nn.functional.one_hot(labels, 12).float() * 4, labels


# 8 rates of which one learns: 2e-2; the others stand still (cosine from 1e-9) whatever the seed
RATES = [1e-9, 2e-9, 3e-9, 2e-2, 4e-9, 5e-9, 6e-9, 7e-9]


def test_halving_keeps_the_best_of_a_clear_cut_case_and_trains_less(monkeypatch):
    runs = []
    real = tune._run_job
    monkeypatch.setattr(tune, "_run_job", lambda c, job: runs.append(job) or real(c, job))
    result = search(
        *(None, learnable()),
        grid={"learning_rate": RATES},
        config={"kd_weight": 0.0, "ce_weight": 1.0, "warmup_steps": 0, "epochs": 6},
        folds=5,
        halving=True,
        metric="cross_entropy",  # no ties
    )
    assert result.chosen == {"learning_rate": 2e-2}
    counts = sorted(len(entry.scores) for entry in result.settings)
    assert counts == [2, 2, 2, 2, 3, 3, 5, 5]  # 8, after 2 folds 4, after 3 folds 2
    assert len(runs) == sum(counts) == 24
    assert [e.dropped for e in result.settings] == [len(e.scores) < 5 for e in result.settings]
    assert "dropped" in result.table() and result.table().splitlines()[2].count("**chosen**")


def test_halving_keeps_ties(monkeypatch):
    monkeypatch.setattr(tune, "_run_job", lambda c, job: {"accuracy": 0.5, "cross_entropy": 1.0})
    monkeypatch.setattr(tune, "_train", lambda *a: {})
    result = search(grid={"epochs": [1, 2, 3, 4]}, folds=5, halving=True)
    assert [len(entry.scores) for entry in result.settings] == [5] * 4
    assert result.chosen == {"epochs": 1}


def test_a_diverged_setting_is_reported_and_never_chosen():
    data = make_data(48, labelled=1.0)
    data = data[0] * 1e18, data[1]
    kwargs = {"data": data, "config": {"optimizer": "sgd", "max_grad_norm": None, "kd_weight": 0.0}}
    kwargs["config"] |= {"ce_weight": 1.0, "warmup_steps": 0}
    for halving in (False, True):
        result = search(grid={"learning_rate": [1e30, 1e-40]}, halving=halving, **kwargs)
        assert result.chosen == {"learning_rate": 1e-40}
        assert result.settings[0].mean is None
        assert "loss is" in result.settings[0].error
        assert "diverged: step" in result.table()
        assert result.heat_map("learning_rate", "learning_rate").startswith(PNG_SIGNATURE)
    with pytest.raises(
        FloatingPointError, match="every setting of the grid diverged; the first: s"
    ):
        search(grid={"learning_rate": [1e30]}, **kwargs)


def test_interval_is_nadeau_and_bengios():
    # 1, 2, 3: s = 1, t(0.975, 2) = 4.303 (any table), n_test/n_train = 1/2: 4.303 sqrt(1/3 + 1/2)
    assert tune._interval([1.0, 2.0, 3.0], 3) == pytest.approx((2.0, 3.9280), abs=1e-3)
    # after 2 of 5 folds: t(0.975, 1) = 12.706, s = sqrt(1/2), 12.706 sqrt((1/2 + 1/4) / 2)
    assert tune._interval([1.0, 2.0], 5) == pytest.approx((1.5, 7.7808), abs=1e-3)


def test_nested_test_compares_with_the_defaults():
    grid = {"learning_rate": [1e-9, 2e-2]}
    config = {"kd_weight": 0.0, "ce_weight": 1.0, "warmup_steps": 0, "epochs": 6}
    config["learning_rate"] = 1e-8  # the defaults learn nothing
    options = {"grid": grid, "config": config, "outer_folds": 3, "folds": 2}
    for metric, sign in (("accuracy", 1), ("cross_entropy", -1)):
        outer = search(data=learnable(), metric=metric, **options).outer
        assert outer.chosen == [{"learning_rate": 2e-2}] * 3
        pairs = zip(outer.default_scores, outer.scores, strict=True)
        assert outer.regret == [sign * (d - s) for d, s in pairs]
        assert outer.mean_regret < -0.1  # the choice paid
    assert search(grid={"epochs": [1]}).outer is None


# ---- files, resuming, processes ----


def test_files_and_a_second_call(tmp_path):
    first = search(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == first.report()
    assert (tmp_path / "table.md").read_text() == first.table() + "\n"
    assert (tmp_path / "heat_map.png").read_bytes().startswith(PNG_SIGNATURE)
    assert len(list((tmp_path / "results").iterdir())) == 4 * 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    again = search(tmp_path)
    assert again.report() == first.report() and same_weights(again.student, first.student)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    memory_only = search()
    assert memory_only.report() == first.report()
    assert same_weights(memory_only.student, first.student)


def test_workers_give_the_same_result(tmp_path):
    alone = search()
    classes = 5  # a local function: pickle could not send it
    beside = search(
        tmp_path,
        student=lambda: torch.nn.Sequential(
            *(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Dropout(0.3)),
            torch.nn.Linear(8, classes),
        ),
        workers=2,
    )
    assert beside.report() == alone.report() and same_weights(beside.student, alone.student)


def start(run_dir, kill_at=None):
    process = CONTEXT.Process(target=search_and_report, args=(str(run_dir), kill_at))
    process.start()
    process.join(100)
    return process.exitcode


def test_killed_and_started_again_it_gives_the_same_result(tmp_path):
    # A result takes 3 calls (2 fsync, 1 replace): 28 results, then the student's checkpoints.
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert start(reference) == 0
    for kill_at in (5, 30, 62):
        assert start(killed, kill_at) == -signal.SIGKILL
    assert start(killed) == 0
    for name in ("result.json", "table.md", "refit/student.safetensors"):
        assert (killed / name).read_bytes() == (reference / name).read_bytes(), name
    names = {path.name for path in (reference / "results").iterdir()}
    assert names <= {path.name for path in (killed / "results").iterdir()}
    assert len(names) == 2 * (4 * 2 + 2) + 4 * 2


def test_a_damaged_result_names_itself_and_the_way_on(tmp_path):
    first = search(tmp_path)
    file = min((tmp_path / "results").iterdir())
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole.replace(b"accuracy", b"accurate"), b"", b"[]"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged") as raised:
            search(tmp_path)
        assert str(file) in str(raised.value) and "Remove it and run the same" in str(raised.value)
    file.unlink()  # as it says
    assert search(tmp_path).report() == first.report()
    assert file.read_bytes() == whole
    (tmp_path / "search.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"search.json is damaged.*another run_dir"):
        search(tmp_path)


def test_another_search_in_the_folder_is_refused_by_name(tmp_path):
    grid, data = {"temperature": [1.0, 2.0]}, make_data(48, labelled=0.7)
    search(tmp_path, grid=grid)
    for changed, message in (
        ({"grid": {"temperature": [1.0, 3.0]}}, r"grid\['temperature'\] was \[1.0, 2.0\] and is"),
        ({"grid": {**grid, "epochs": [1]}}, r"grid\['epochs'\] was absent and is \[1\]"),
        ({"folds": 2}, "folds was 3 and is 2"),
        ({"config": {"learning_rate": 0.5}}, "learning_rate was 0.01 and is 0.5"),
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"data": (data[0] + 1e-6, data[1])}, "search: data changed"),
        ({"student": lambda: torch.nn.Linear(12, 5)}, "student changed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            search(tmp_path, **{"grid": grid, **changed})
    search(tmp_path, grid=grid, config={"log_every": 3})  # what does not touch the scores


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grid": {"temprature": [1.0]}},
            "grid has the key 'temprature'; the nearest accepted is ",
        ),
        ({"grid": {"seed": [1, 2]}}, "grid has the key 'seed'"),
        ({"grid": {}}, "grid is {}"),
        ({"grid": {"optimizer": "sgd"}}, r"grid\['optimizer'\] is 'sgd'; accepted is a list"),
        ({"grid": {"epochs": []}}, r"grid\['epochs'\] is \[\]; accepted is a list of values"),
        ({"grid": {"temperature": [1, 1.0]}}, r"grid\['temperature'\] holds 1.0 twice"),
        ({"folds": 1}, "folds is 1; accepted is an integer of at least 2"),
        ({"outer_folds": 0}, "outer_folds is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"metric": "f1"}, "metric is 'f1'; accepted is one of accuracy, cross_entropy"),
        ({"data": (torch.zeros(9, 12), torch.zeros(8).long())}, "data is inputs of shape"),
        ({"data": (torch.zeros(9, 12), torch.zeros(9))}, "torch.float32 labels"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_a_teacher_is_needed_only_where_a_setting_distils():
    data, config = make_data(48, labelled=0.7), make_config(epochs=1, ce_weight=1.0)
    arguments = (torch.nn.Linear, None, data, config)
    with pytest.raises(ValueError, match="teacher is None while a setting has a kd_weight above 0"):
        tune.cross_validate(*arguments, grid=GRID, folds=2)
    result = tune.cross_validate(
        lambda: torch.nn.Linear(12, 5), *arguments[1:], grid={"kd_weight": [0.0]}, folds=2
    )
    assert result.chosen == {"kd_weight": 0.0} and math.isfinite(result.settings[0].mean)


def test_heat_map_of_another_key():
    result = search(grid={**GRID, "epochs": [1, 2]}, folds=2)
    assert result.heat_map("epochs", "temperature").startswith(PNG_SIGNATURE)
    with pytest.raises(
        ValueError, match="heat_map has the key 'epoch'; the nearest accepted is 'epo"
    ):
        result.heat_map("epoch", "temperature")


# ---- command line, example ----


def test_tune_from_the_command_line(tmp_path, capsys):
    command = ["tune", "--run-dir", str(tmp_path / "run"), "--epochs", "1", "--teacher-epochs", "1"]
    command += ["--grid", '{"temperature": [1, 4], "kd_weight": [0.1, 0.9]}', "--folds", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert f"chosen: {json.dumps(report['chosen'])}\ntest accuracy" in printed
    assert (tmp_path / "run" / "table.md").read_text() in printed
    assert (tmp_path / "run" / "refit" / "student.safetensors").is_file()
    assert main(command) == 0
    assert capsys.readouterr().out == printed

    assert main([*command[:-4], "--grid", '{"temprature": [1]}']) == 1
    assert (
        "kdkernels tune: grid has the key 'temprature'; the nearest accepted is 'temperature'"
        in (capsys.readouterr().err)
    )


def test_the_example_in_its_quick_form(tmp_path, monkeypatch, capsys):
    file = ROOT / "examples" / "tune_lambda_temperature.py"
    assert len(file.read_text().splitlines()) < 120
    monkeypatch.setattr(sys, "argv", [str(file), "--quick", "--run-dir", str(tmp_path)])
    runpy.run_path(str(file), run_name="__main__")
    printed = capsys.readouterr().out
    chosen = json.loads((tmp_path / "seed-0" / "report.json").read_text())["chosen"]
    assert f"seed 0: chosen {chosen}; test accuracy" in printed
    assert "chosen minus defaults: " in printed and "best in hindsight minus chosen: " in printed
