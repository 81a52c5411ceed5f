"""The command line, the demo at toy size, and what happens without the extras."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import kdkernels
from kdkernels.cli import main
from kdkernels.trainer.demo import interval, run_demo
from kdkernels.trainer.mnist import (
    MnistConfig,
    RandomShift,
    hide_labels,
    load_digits,
    load_teacher,
    make_student,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"kdkernels {kdkernels.__version__}\n"
    for arguments in (["--help"], ["train", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "usage: kdkernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train", "--wings", "2"], ["train", "--epochs", "x"]]
)
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: kdkernels" in capsys.readouterr().err


def test_demo_and_train(tmp_path, capsys):
    """The demo at toy size, then `train` with the teacher it left, twice."""
    demo = tmp_path / "demo"
    arguments = ["--seeds", "2", "--epochs", "1", "--teacher-epochs", "2"]
    assert main(["demo", "--run-dir", str(demo), *arguments]) == 0
    printed = capsys.readouterr().out
    report = json.loads((demo / "report.json").read_text())
    text = (demo / "report.md").read_text()
    assert text in printed
    assert {path.name for path in demo.iterdir()} == {
        *("report.md", "report.json", "learning_curve.png"),
        *("student.safetensors", "teacher.safetensors"),
    }
    assert (demo / "learning_curve.png").read_bytes().startswith(PNG_SIGNATURE)
    make_student().load_state_dict(load_file(demo / "student.safetensors"))
    assert report["data"]["labelled"] == 100 and report["data"]["unlabelled"] == 3900
    alone, distilled = (
        report["arms"][arm]["per_seed"] for arm in ("cross-entropy alone", "distilled")
    )
    gains = report["gain"]["per_seed"]
    assert gains == [d - a for d, a in zip(distilled, alone, strict=True)]
    assert report["gain"]["accuracy"] == interval(gains)
    steps = {h[-1]["step"] for arm in report["arms"].values() for h in arm["histories"]}
    assert steps in ({62}, {63}, {62, 63})
    assert f"{100 * report['gain']['accuracy']['mean']:+.1f}" in text

    command = ["train", "--run-dir", str(tmp_path / "run"), "--epochs", "1", "--no-progress"]
    command += ["--teacher", str(demo / "teacher.safetensors"), "--checkpoint-every", "20"]
    command += [
        "--divergence",
        "jsd",
        "--divergence-args",
        '{"beta": 0.3}',
        "--max-grad-norm",
        "none",
    ]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "step 63: test accuracy" in first and "was complete" not in first
    weights = (tmp_path / "run" / "student.safetensors").read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run was complete\n" + first
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == weights

    assert main([*command, "--seed", "5"]) == 1
    assert "holds another run: seed was 0 and is 5" in capsys.readouterr().err


def test_train_makes_its_own_teacher_and_resumes(tmp_path, capsys):
    command = ["train", "--run-dir", str(tmp_path), "--epochs", "1", "--teacher-epochs", "1"]
    command += ["--checkpoint-every", "50"]
    assert main(command) == 0
    weights = (tmp_path / "student.safetensors").read_bytes()
    (tmp_path / "checkpoints" / "step-00000063").rename(tmp_path / "moved away")
    (tmp_path / "student.safetensors").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "went on from step 50" in capsys.readouterr().out
    assert (tmp_path / "student.safetensors").read_bytes() == weights


def test_failures_are_one_line_and_status_1(tmp_path, capsys):
    assert main(["train", "--run-dir", str(tmp_path), "--schedule", "step"]) == 1
    assert capsys.readouterr().err.startswith("kdkernels train: schedule is 'step'; accepted is")
    (tmp_path / "junk").write_bytes(b"not weights")
    assert main(["train", "--run-dir", str(tmp_path), "--teacher", str(tmp_path / "junk")]) == 1
    assert f"teacher {tmp_path}/junk cannot be loaded" in capsys.readouterr().err
    assert main(["demo", "--run-dir", str(tmp_path), "--seeds", "1"]) == 1
    assert "seeds is 1; accepted is an integer of at least 2" in capsys.readouterr().err


# ---- the digits ----


def test_digits_are_split_without_overlap():
    digits = load_digits()
    assert digits.train_images.shape == (4000, 784) and digits.test_images.shape == (1000, 784)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    other = load_digits(seed=1)
    assert not torch.equal(digits.test_images, other.test_images)
    both = torch.cat([digits.train_images, digits.test_images])
    both_other = torch.cat([other.train_images, other.test_images])
    assert torch.equal(
        both.double().sum(0), both_other.double().sum(0)
    )  # every digit is in exactly one part


def test_hidden_labels():
    labels = torch.arange(10).repeat(30)
    hidden = hide_labels(labels, 3, seed=0)
    kept = hidden != -100
    assert hidden[kept].bincount().tolist() == [3] * 10
    assert torch.equal(hidden[kept], labels[kept])
    assert not torch.equal(hidden, hide_labels(labels, 3, seed=1))
    with pytest.raises(ValueError, match="31 images a class asked for; accepted is 1 to 30"):
        hide_labels(labels, 31, seed=0)


def test_random_shift_moves_whole_images():
    image = torch.zeros(28, 28)
    image[10:13, 5:8] = torch.arange(1.0, 10.0).view(3, 3)
    shift = RandomShift(2).train()
    torch.manual_seed(0)
    moved = shift(image.flatten().expand(400, -1)).view(400, 28, 28)
    places = set()
    for one in moved:
        row, column = (one == 1).nonzero()[0].tolist()
        assert torch.equal(one[row : row + 3, column : column + 3], image[10:13, 5:8])
        assert one.sum() == image.sum()
        places.add((row - 10, column - 5))
    assert places == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    assert torch.equal(shift.eval()(image.flatten()[None]), image.flatten()[None])


def test_demo_and_digits_refuse_what_they_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="epochs is 0; accepted is an integer of at least 1"):
        run_demo(tmp_path, epochs=0)
    with pytest.raises(ValueError, match="batch_size is 0; accepted is an integer of at least 1"):
        MnistConfig(batch_size=0)
    with pytest.raises(ValueError, match="run_dir is None; accepted is the name of a folder"):
        MnistConfig(run_dir=None)
    with pytest.raises(ValueError, match="absent.safetensors cannot be loaded"):
        load_teacher(tmp_path / "absent.safetensors")


def test_interval_is_students():
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.303 (any table): 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx({"mean": 2.0, "half_width": 2.4843}, abs=1e-3)


# ---- imports ----


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_importing_kdkernels_leaves_the_trainer_alone():
    done = python(
        "import sys, kdkernels, kdkernels.cli\n"
        "heavy = {'accelerate', 'mlxtend', 'matplotlib', 'tensorboard', 'transformers',\n"
        "         'kdkernels.trainer'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "module", "extra"),
    [
        ("accelerate", "kdkernels.trainer", "demo"),
        ("matplotlib", "kdkernels.trainer.demo", "demo"),
        ("mlxtend", "kdkernels.trainer.mnist", "demo"),
        ("transformers", "kdkernels.trainer.demo_llm", "llm"),
    ],
)
def test_a_missing_extra_says_what_to_install(missing, module, extra):
    use = "; m.load_digits()" if missing == "mlxtend" else ""
    code = f"import sys; sys.modules[{missing!r}] = None; import {module} as m{use}"
    done = python(code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: kdkernels.trainer needs {missing}")
    assert last.endswith(f"pip install kdkernels[{extra}]")
