"""Checkpoints that are whole or not there: written aside, synced, hashed, then renamed."""

import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from engine.tracking import write_json
from errors import DamagedFileError

STATE, MANIFEST = "state.pt", "manifest.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step_XXXXXXXX` and deletes all but the newest `keep` checkpoints.

    The state is written under a temporary name and synced, the manifest with its SHA-256 after it, and the folder
    is renamed last: killed at any moment, the folder of that name is whole or absent.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    with (temporary / STATE).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    write_json(temporary / MANIFEST, {"step": step, "sha256": {STATE: hashlib.sha256(data).hexdigest()}})
    sync(temporary)
    if target.exists():
        delete_checkpoint(target)
    temporary.replace(target)
    sync(folder)
    clear_checkpoints(folder, keep)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first; one without its manifest was being deleted."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name)]
    return sorted(path for path in named if (path / MANIFEST).exists())


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint in `folder`; None where there is none.

    Raises:
        DamagedFileError: it is not what its manifest says. The one before it is never taken silently.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    advice = f"delete {newest} to go on from the checkpoint before it"
    try:
        expected = json.loads((newest / MANIFEST).read_text())["sha256"][STATE]
        data = (newest / STATE).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{newest}: incomplete ({error}); {advice}") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise DamagedFileError(f"{newest / STATE}: damaged, its SHA-256 is not that of the manifest; {advice}")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def clear_checkpoints(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep`, and what was left where a save or a deletion was cut short."""
    newest = checkpoints(folder)[-keep:]
    for path in sorted(folder.iterdir()):
        if path not in newest and re.fullmatch(r"step_\d{8}|\.step_\d{8}\.tmp", path.name):
            delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """The manifest goes first, so that a deletion cut short never looks like a checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def replace_folder(temporary: Path, target: Path) -> None:
    """Puts `temporary` in the place of the folder `target`. Cut short, `recover_folder` finishes it."""
    previous = target.with_name(f".{target.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    if target.exists():
        target.replace(previous)
    temporary.replace(target)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Brings back what `replace_folder` had moved aside when it was cut short, or finishes its deletion."""
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and target.exists():
        shutil.rmtree(previous)
    elif previous.exists():
        previous.replace(target)


def sync(path: Path) -> None:
    """Puts a file's bytes, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
