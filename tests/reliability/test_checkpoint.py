"""Checkpoints and folders that are whole or not there."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from engine.checkpoint import (
    MANIFEST,
    STATE,
    checkpoints,
    load_checkpoint,
    recover_folder,
    replace_folder,
    save_checkpoint,
)
from errors import DamagedFileError

STATE_OF = {step: {"x": torch.full((5,), float(step))} for step in range(1, 6)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_are_kept_and_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    for step, state in STATE_OF.items():
        save_checkpoint(tmp_path, step, state, keep=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded["x"], STATE_OF[5]["x"])


def test_what_was_left_of_others_is_cleared(tmp_path: Path) -> None:
    """A save that was cut off, and a deletion that was; nothing else."""
    save_checkpoint(tmp_path, 1, STATE_OF[1], keep=3)
    for name in (".step_00000002.tmp", "step_00000003", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_bytes(b"half")
    assert checkpoints(tmp_path) == [tmp_path / "step_00000001"]
    save_checkpoint(tmp_path, 4, STATE_OF[4], keep=3)
    assert names(tmp_path) == ["mine", "step_00000001", "step_00000004"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In a hundred random places of the state; in its manifest, one that matters or none."""
    path = save_checkpoint(tmp_path, 1, {"x": torch.randn(100)}, keep=1) / STATE
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(100):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(DamagedFileError, match="damaged, its SHA-256 is not that of the manifest"):
            load_checkpoint(tmp_path)
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}'])
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    path = save_checkpoint(tmp_path, 1, STATE_OF[1], keep=1)
    (path / MANIFEST).write_text(text)
    with pytest.raises(DamagedFileError, match="incomplete"):
        load_checkpoint(tmp_path)


def test_state_is_missing_or_truncated(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, STATE_OF[1], keep=1)
    data = (path / STATE).read_bytes()
    (path / STATE).write_bytes(data[:-1])
    with pytest.raises(DamagedFileError, match="damaged"):
        load_checkpoint(tmp_path)
    (path / STATE).unlink()
    with pytest.raises(DamagedFileError, match="incomplete"):
        load_checkpoint(tmp_path)


class Malice:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("import builtins; builtins.unpickled = True",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Even with a manifest that vouches for it."""
    import builtins

    path = save_checkpoint(tmp_path, 1, STATE_OF[1], keep=1)
    torch.save({"x": Malice()}, path / STATE)
    digest = hashlib.sha256((path / STATE).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps({"step": 1, "sha256": {STATE: digest}}))
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(tmp_path)
    assert not hasattr(builtins, "unpickled")


def test_folder_is_replaced_and_recovered(tmp_path: Path) -> None:
    """Whichever of the renames of the replacement was the last."""

    def folder(name: str, text: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
        return tmp_path / name

    target = folder("best", "old")
    replace_folder(folder(".best.tmp", "new"), target)
    assert names(tmp_path) == ["best"]
    assert (target / "file").read_text() == "new"

    target.rename(tmp_path / ".best.previous")  # cut off after the first rename
    recover_folder(target)
    assert names(tmp_path) == ["best"]
    assert (target / "file").read_text() == "new"

    folder(".best.previous", "old")  # cut off after the second
    recover_folder(target)
    assert names(tmp_path) == ["best"]
    assert (target / "file").read_text() == "new"
