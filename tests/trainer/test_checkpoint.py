"""The files of a checkpoint: whole or not at all, verified, the newest few kept."""

import json

import pytest
import torch

from kdkernels.trainer.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_file,
)

FILES = ["state.json", "student.safetensors", "optimizer.safetensors"]


def save(folder, step, keep=2):
    tensors = {
        "student": {"weight": torch.full((3, 2), float(step))},
        "optimizer": {"weight/step": torch.tensor(float(step))},
    }
    return save_checkpoint(folder, step, tensors, {"rate": 0.1 * step}, keep)


def test_round_trip_keeps_the_newest_ones(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]
    tensors, state = load_checkpoint(tmp_path)
    assert torch.equal(tensors["student"]["weight"], torch.full((3, 2), 15.0))
    assert tensors["optimizer"]["weight/step"].item() == 15.0
    assert state["step"] == 15 and state["rate"] == 0.1 * 15


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "bit flipped":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    elif how == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "emptied", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_survives(tmp_path, name, how):
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    damage(newer / name, how)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path)
    message = str(raised.value)
    assert message.startswith(str(newer / name))
    assert ("missing" if how == "missing" else "damaged") in message
    assert f"{older}, is intact: move {newer} out of" in message
    assert checkpoints(tmp_path) == [older, newer]  # nothing is removed

    newer.rename(tmp_path / "away")
    assert load_checkpoint(tmp_path)[1]["step"] == 5


def test_every_flipped_bit_of_the_state_is_noticed(tmp_path):
    file = save(tmp_path, 5) / "state.json"
    content = file.read_bytes()
    state = load_checkpoint(tmp_path)[1]
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        try:
            assert load_checkpoint(tmp_path)[1] == state  # a blank that became another blank
        except CheckpointError as error:
            assert "state.json" in str(error)


def test_damage_in_two_names_both(tmp_path):
    oldest, older, newer = (save(tmp_path, step, keep=3) for step in (5, 10, 15))
    for path in (older, newer):
        damage(path / "student.safetensors", "truncated")
    with pytest.raises(CheckpointError, match=f"{oldest}, is intact: move {older} and {newer} out"):
        load_checkpoint(tmp_path)
    damage(oldest / "state.json", "truncated")
    with pytest.raises(CheckpointError, match="No intact checkpoint is left"):
        load_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path):
    from kdkernels.trainer.checkpoint import _digest_json

    file = save(tmp_path, 5) / "state.json"
    state = {**json.loads(file.read_text())["state"], "format": 99}
    file.write_text(json.dumps({"sha256": _digest_json(state), "state": state}))
    with pytest.raises(CheckpointError, match="has format 99; accepted is 1"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_file(file, b"old")
    save(tmp_path / "run", 5)

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_file(file, b"new")
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / "run", 10)
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000005"]
    save(tmp_path / "run", 10)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "step-00000005",
        "step-00000010",
    ]


def test_a_half_removed_checkpoint_is_none(tmp_path, monkeypatch):
    for step in (5, 10):
        save(tmp_path, step)

    def half(folder):
        (folder / "state.json").unlink()
        raise OSError("interrupted")

    monkeypatch.setattr("shutil.rmtree", half)
    with pytest.raises(OSError, match="interrupted"):
        save(tmp_path, 15)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]
    save(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 2
