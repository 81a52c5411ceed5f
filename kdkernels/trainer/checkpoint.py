"""Checkpoints: written whole or not at all, verified before use, and unable to run code.

A checkpoint is a folder `step-00000120` with safetensors files and one `state.json`, which holds
the SHA-256 of every file beside it and of itself. It is written under a temporary name, flushed to
the disk and renamed, so that a process killed at any moment leaves only complete checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and how to go on."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; one that was there stays until the new one is complete."""
    partial = path.with_name(_PARTIAL + path.name)
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """`write_file` for a safetensors file of contiguous CPU copies of the tensors."""
    partial = path.with_name(_PARTIAL + path.name)
    _save_tensors(partial, tensors)
    os.replace(partial, path)
    _flush(path.parent)


def write_json(path: Path, state: dict[str, Any]) -> None:
    """`write_file` for anything JSON can hold, with its own SHA-256."""
    document = {"sha256": _digest_json(state), "state": state}
    write_file(path, json.dumps(document).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises CheckpointError if the file is missing or damaged."""
    try:
        document = json.loads(path.read_bytes())
        recorded, state = document["sha256"], document["state"]
        intact = recorded == _digest_json(state)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    return state


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write checkpoint `step` under `folder` and remove all but the `keep` newest.

    `tensors` maps a file's name (without suffix) to its tensors; `state` is anything JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(_PARTIAL + "*"):  # of a process killed while it wrote or removed
        shutil.rmtree(leftover)
    name = f"step-{step:08d}"
    partial = folder / (_PARTIAL + name)
    partial.mkdir()
    digests = {}
    for stem, content in tensors.items():
        file = partial / f"{stem}.safetensors"
        _save_tensors(file, content)
        digests[file.name] = _digest(file)
    payload = {**state, "format": FORMAT, "step": step, "sha256": digests}
    write_json(partial / "state.json", payload)
    _flush(partial)
    os.rename(partial, folder / name)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a half-removed folder must never look like a checkpoint.
        doomed = old.with_name(_PARTIAL + old.name)
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return folder / name


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint under `folder`, or None if there is none.

    Raises CheckpointError if it is damaged. Nothing is removed then: the message says which older
    checkpoint is intact and how to go on from it.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = verify(newest)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_advice(newest, found[:-1])}") from error
    tensors = {Path(name).stem: load_file(newest / name) for name in state["sha256"]}
    return tensors, state


def verify(checkpoint: Path) -> dict[str, Any]:
    """State of a checkpoint whose files all have the checksums they were written with.

    Raises CheckpointError, naming the first file that is missing, damaged or of another format.
    """
    file = checkpoint / "state.json"
    state = read_json(file)
    if state["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {state['format']}; accepted is {FORMAT}")
    for name, digest in state["sha256"].items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if _digest(file) != digest:
            raise CheckpointError(f"{file} is damaged: its content does not match its checksum")
    return state


def _advice(damaged: Path, older: list[Path]) -> str:
    for candidate in reversed(older):
        try:
            verify(candidate)
        except CheckpointError:
            continue
        newer = [damaged] + [path for path in older if path > candidate]
        names = " and ".join(str(path) for path in sorted(newer))
        return (
            f"The checkpoint before it, {candidate}, is intact: move {names} out of "
            f"{damaged.parent} and run the same command again to go on from it"
        )
    return "No intact checkpoint is left before it: start again with another run_dir"


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, path)
    path.chmod(mode)  # it leaves 0600 whatever the umask
    _flush(path)


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_json(payload: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
