"""A run killed with SIGKILL and started again ends with the weights of one that was not."""

import json
import multiprocessing
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from trainer.runs import make_models, run, run_and_report

from kdkernels.trainer import CheckpointError

TOTAL_STEPS = 24

# Children are forked from a process that has imported these but computed nothing: no thread pool is
# copied, and the slow imports are paid once (Python 3.11's server finds installed modules only).
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "accelerate"])


def start(run_dir, kill_at=None, **options):
    process = CONTEXT.Process(target=run_and_report, args=(str(run_dir), options, kill_at))
    process.start()
    return process


def finish(process):
    process.join(60)
    return process.exitcode


def assert_same_run(run_dir, reference):
    assert (run_dir / "student.safetensors").read_bytes() == (
        reference / "student.safetensors"
    ).read_bytes()
    assert json.loads((run_dir / "result.json").read_text()) == json.loads(
        (reference / "result.json").read_text()
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run nobody interrupts."""
    folder = tmp_path_factory.mktemp("reference")
    assert finish(start(folder)) == 0
    return folder


def test_killed_at_every_call_of_the_checkpoint_writer(tmp_path, reference):
    # A save makes 8 calls, 2 more for the old checkpoint it removes and 1 more to clear what a kill
    # left: kills 1 to 8 hit the step-0 checkpoint, the others every stage of the later ones.
    for kill_at in range(1, 21):
        exit_code = finish(start(tmp_path, kill_at))
        if exit_code == 0:
            break  # fewer calls were left to the end of the run than kill_at
        assert exit_code == -signal.SIGKILL
    assert kill_at > 12, "the run ended before the kills had covered a whole save"
    assert finish(start(tmp_path)) == 0
    assert_same_run(tmp_path, reference)


def test_killed_from_outside_at_any_moment(tmp_path):
    options = {"epochs": 40, "checkpoint_every": 7, "eval_every": 13}
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert finish(start(reference, **options)) == 0
    kills = 0
    for newest in (0, 28, 70, 119, 175):
        process = start(killed, **options)
        while process.is_alive() and latest(killed) < newest:
            time.sleep(0.001)
        process.kill()
        kills += finish(process) == -signal.SIGKILL
    assert kills >= 3, "the run was over before it could be killed"
    assert finish(start(killed, **options)) == 0
    assert_same_run(killed, reference)


def latest(run_dir):
    steps = [int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*")]
    return max(steps, default=-1)


@pytest.mark.parametrize("steps", [4, 6, 8], ids=["mid-epoch", "end of an epoch", "mid-epoch 2"])
def test_goes_on_from_every_place_in_the_data(tmp_path, steps):
    straight, _ = run(tmp_path / "a", checkpoint_every=steps, keep_checkpoints=9)
    for checkpoint in (tmp_path / "a" / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) == steps:
            checkpoint.rename(tmp_path / "kept")
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "kept").rename(tmp_path / "b" / "checkpoints" / f"step-{steps:08d}")
    other = make_models(seed=7)[0]  # a restarted script need not draw the same initial weights
    resumed, result = run(
        tmp_path / "b", other, checkpoint_every=steps, keep_checkpoints=9, log_every=1
    )
    assert result.resumed_from == steps
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_complete_run_is_loaded_and_not_trained_again(tmp_path):
    student, first = run(tmp_path)
    again, second = run(tmp_path, make_models(seed=7)[0])
    assert (first.resumed_from, second.resumed_from) == (None, TOTAL_STEPS)
    assert first.history == second.history
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_checkpoints_and_evaluations_do_not_change_the_training(tmp_path):
    plain, _ = run()
    watched, _ = run(tmp_path, eval_every=1, checkpoint_every=1, log_every=1)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_sgd_momentum_resumes(tmp_path):
    options = {"optimizer": "sgd", "learning_rate": 0.1}
    straight, _ = run(tmp_path / "a", **options)
    run(tmp_path / "b", **options)
    drop_newest(tmp_path / "b")
    resumed, result = run(tmp_path / "b", make_models(seed=7)[0], **options)
    assert result.resumed_from == 20
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def drop_newest(run_dir):
    newest = max((run_dir / "checkpoints").iterdir())
    newest.rename(run_dir / "moved away")
    return newest


def test_a_damaged_checkpoint_names_itself_and_the_one_to_go_on_from(tmp_path):
    straight, _ = run(tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        run(tmp_path)
    message = str(raised.value)
    assert str(file) in message and "step-00000020, is intact" in message
    assert f"move {newest} out of" in message and "same command" in message

    drop_newest(tmp_path)  # as it says
    resumed, result = run(tmp_path)
    assert result.resumed_from == 20
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_another_run_in_the_folder_is_refused_by_name(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="learning_rate was 0.01 and is 0.02"):
        run(tmp_path, epochs=1, learning_rate=0.02)
    with pytest.raises(CheckpointError, match="temperature was 4.0 and is 2.0"):
        run(tmp_path, epochs=1, temperature=2.0)
    wide = torch.nn.Sequential(torch.nn.Linear(12, 5))
    with pytest.raises(
        CheckpointError, match=r"another student: 0.bias is \(8,\) there and \(5,\)"
    ):
        run(tmp_path, wide, epochs=1)
    run(tmp_path, epochs=1, log_every=3, keep_checkpoints=5)  # what does not touch the weights


def test_the_final_weights_load_into_a_new_student(tmp_path):
    student, _ = run(tmp_path, epochs=1)
    fresh = make_models(seed=7)[0]
    fresh.load_state_dict(load_file(tmp_path / "student.safetensors"))
    for name, value in student.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_tied_weights_are_saved_and_resumed(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 12, bias=False), torch.nn.Linear(12, 12, bias=False)
        )
        model[1].weight = model[0].weight
        return torch.nn.Sequential(model, torch.nn.Linear(12, 5))

    straight, _ = run(tmp_path, tied())
    drop_newest(tmp_path)
    resumed, _ = run(tmp_path, tied())
    assert resumed[0][1].weight is resumed[0][0].weight
    assert torch.equal(straight[0][0].weight, resumed[0][0].weight)


def test_resuming_runs_no_pickle(tmp_path, monkeypatch):
    run(tmp_path)
    drop_newest(tmp_path)
    files = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}

    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert run(tmp_path)[1].resumed_from == 20
