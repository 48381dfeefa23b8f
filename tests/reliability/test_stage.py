"""Stage 1 of knowledge adaptation within a run: written, taken up again, taken from another run, cut off."""

from pathlib import Path
from typing import Any

import pytest
from forks import Forks, Outcome
from safetensors.torch import load_file
from test_resume import assert_same, completed, metrics, state

TINY = ["data.size=[32,64]", "data.scenes=16", "train.batch_size=4", "train.steps=12", "train.ema=0.9"]
TINY += ["train.log_every=2", "train.evaluate_every=6", "train.checkpoint_every=3"]
TEACHER = [*TINY, "model.width=4", "model.depth=2"]
STUDENT = [*TINY, "student.width=4", "student.depth=2", "losses.autoencoder.epochs=1.5"]  # of 4 steps
STUDENT += ["losses.kta.taps=[decoder.1]", "losses.affinity.taps=[decoder.1]", "losses.kta.weight=1"]


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER))
    return run


@pytest.fixture(scope="module")
def whole(forks: Forks, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation that nothing befell."""
    run = tmp_path_factory.mktemp("whole") / "run"
    completed(forks.script("distill.py", str(teacher), f"run_dir={run}", *STUDENT))
    return run


def test_stage_comes_first_and_is_logged(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["stage_step"] for line in lines[:4]] == [1, 2, 4, 6]
    assert {line["split"] for line in lines[4:]} == {"train", "val"}
    assert lines[3]["decoder.1/latent4.error"] < lines[0]["decoder.1/latent4.error"]
    kept = load_file(whole / "autoencoder.safetensors")
    saved = state(whole)
    names = [name for name in saved if "latents.encoders" in name]
    assert len(names) == len(kept)
    for name in names:  # as the stage left them, to the end of the run
        assert saved[name].equal(kept[name.partition("latents.encoders.")[2]]), name


@pytest.mark.parametrize(
    "event",
    [
        {"kill_in_step": 4},
        {"kill_at_operation": ["write", "autoencoder.tmp", 0]},
        {"kill_at_operation": ["replace", "autoencoder.tmp", 0]},
        {"kill_at_operation": ["replace", ".step_00000003.tmp", 0]},
        {"kill_at_operation": ["replace", ".step_00000009.tmp", 0]},
    ],
    ids=str,
)
def test_killed_and_resumed(
    forks: Forks, teacher: Path, whole: Path, tmp_path: Path, event: dict[str, Any]
) -> None:
    """In the stage, in writing its weights, before their rename, before the first checkpoint, after one."""
    run = tmp_path / "run"
    event = {k: [str(run), *v] if isinstance(v, list) else v for k, v in event.items()}
    completed(forks.script("distill.py", str(teacher), f"run_dir={run}", *STUDENT, **event), -9)
    completed(forks.script("distill.py", str(run / "config.yaml"), "resume=true"))
    assert (run / "autoencoder.safetensors").read_bytes() == (whole / "autoencoder.safetensors").read_bytes()
    assert_same(run, whole)


def test_terminated_in_the_stage(forks: Forks, teacher: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = completed(
        forks.script("distill.py", str(teacher), f"run_dir={run}", *STUDENT, terminate_in_step=2), 143
    )
    assert f"error: {run}: stopped by SIGTERM during autoencoder; begin it anew with resume=true" in outcome.text
    completed(forks.script("distill.py", str(run / "config.yaml"), "resume=true"))
    assert_same(run, whole)


def from_file(forks: Forks, teacher: Path, run: Path, file: Path, *more: str) -> Outcome:
    settings = [*STUDENT, f"losses.autoencoder.file={file}", *more]
    return forks.script("distill.py", str(teacher), f"run_dir={run}", *settings)


def test_taken_from_another_run(forks: Forks, teacher: Path, whole: Path, tmp_path: Path) -> None:
    """The same training follows, and no stage."""
    run = tmp_path / "run"
    outcome = completed(from_file(forks, teacher, run, whole))
    assert f"taken from {whole / 'autoencoder.safetensors'}" in outcome.text
    assert metrics(run) == [line for line in metrics(whole) if line["split"] != "autoencoder"]


@pytest.mark.parametrize(
    ("damage", "more", "code", "said"),
    [
        (
            "none",
            ["losses.autoencoder.channels=3"],
            2,
            "made for latents decoder.1 at stride 4, 2 channels, ",
        ),
        ("other teacher", [], 2, "made for teacher"),
        ("missing", [], 2, "no such file"),
        ("truncated", [], 3, "damaged"),
    ],
)
def test_file_that_can_not_be_taken(
    forks: Forks, teacher: Path, whole: Path, tmp_path: Path, damage: str, more: list[str], code: int, said: str
) -> None:
    file = tmp_path / "file.safetensors"
    data = (whole / "autoencoder.safetensors").read_bytes()
    if damage == "other teacher":
        other = tmp_path / "other"
        completed(forks.script("train_teacher.py", f"run_dir={other}", *TEACHER, "seed=1", "train.steps=1"))
        teacher = other
    if damage != "missing":
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    outcome = completed(from_file(forks, teacher, tmp_path / "run", file, *more), code)
    errors = [line for line in outcome.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: losses.autoencoder.file: {file}: {said}")
    assert "teacher: val mIoU" not in outcome.text  # before the teacher is evaluated
    assert "Traceback" not in outcome.text


def test_file_that_no_term_uses(forks: Forks, teacher: Path, whole: Path, tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path / 'run'}", "data.scenes=8", f"losses.autoencoder.file={whole}"]
    outcome = completed(forks.script("distill.py", str(teacher), *settings), 2)
    assert "error: losses.autoencoder.file: no term uses it" in outcome.text
