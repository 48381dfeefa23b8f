"""A run that is cut off, wherever, and goes on is bit for bit the run that was not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, Outcome

SETTINGS = [
    "data.size=[32,64]",
    "data.scenes=8",
    "train.batch_size=4",
    "train.steps=12",
    "train.checkpoint_every=3",
    "train.log_every=2",
    "train.evaluate_every=6",
    "train.ema=0.9",
    "train.lr=0.01",
]
TEACHER = [*SETTINGS, "model.width=4", "model.depth=2"]
STUDENT = [
    *SETTINGS,
    "student.width=4",
    "student.depth=2",
    "losses.fitnet.weight=1",
    "losses.fitnet.start=2",
    "losses.fitnet.until=7",
    "losses.attention_transfer.weight=100",
    "losses.affinity.weight=1",
]
TIMES = {"seconds", "window_start"}


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and number in a nested state, by the path to it."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in leaves(item, f"{name}/{key}").items()}
    return {name: value}


def state(run: Path, step: int = 12) -> dict[str, Any]:
    """The checkpoint of a step, without times."""
    saved = torch.load(run / f"checkpoints/step_{step:08d}/state.pt", weights_only=True)
    return {name: value for name, value in leaves(saved).items() if name.rpartition("/")[2] not in TIMES}


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "system"} for line in lines]


def results(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "results.json").read_text()).items() if k != "train_seconds"}


def assert_same(run: Path, reference: Path) -> None:
    """Weights, optimizer, average, progress, best weights, log and results, bit for bit."""
    found, expected = state(run), state(reference)
    assert found.keys() == expected.keys()
    different = [
        name
        for name, value in expected.items()
        if (not torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] != value)
    ]
    assert different == []
    for name in ("model.safetensors", "config.json"):
        assert (run / "best" / name).read_bytes() == (reference / "best" / name).read_bytes(), name
    assert metrics(run) == metrics(reference)
    assert results(run) == results(reference)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000009", "step_00000012"]


Start = Callable[..., Outcome]


def completed(outcome: Outcome, code: int = 0) -> Outcome:
    assert outcome.code == code, outcome.text
    return outcome


@pytest.fixture(scope="module")
def reference(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's run that nothing befell."""
    run = tmp_path_factory.mktemp("reference") / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER))
    return run


@pytest.fixture(scope="module")
def halves(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with accumulation."""
    run = tmp_path_factory.mktemp("halves") / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, "train.accumulate=2"))
    return run


@pytest.fixture(scope="module")
def distilled(forks: Forks, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation with an adapter and a schedule, by the teacher of `reference`."""
    run = tmp_path_factory.mktemp("distilled") / "run"
    completed(forks.script("distill.py", str(reference), f"run_dir={run}", *STUDENT))
    return run


def resumed(forks: Forks, run: Path, script: str = "train_teacher.py") -> str:
    return completed(forks.script(script, str(run / "config.yaml"), "resume=true")).text


def test_the_reference_is_what_it_should_be(reference: Path) -> None:
    """Else the comparisons below compare nothing."""
    found = state(reference)
    assert any("/ema/module." in name for name in found)
    assert any("exp_avg_sq" in name for name in found)
    assert found["/progress/step"] == 12
    assert float(found["/players/0/ema/n_averaged"]) == 12
    first = state(reference, 9)
    assert not torch.equal(*(s["/players/0/learner/model.classifier.weight"] for s in (first, found)))
    assert [(line["step"], line["split"]) for line in metrics(reference)] == [
        *((step, "train") for step in (2, 4, 6)),
        (6, "val"),
        *((step, "train") for step in (8, 10, 12)),
        (12, "val"),
    ]


@pytest.mark.parametrize(
    ("event", "from_step"),
    [
        ({"kill_in_step": 1}, 0),
        ({"kill_in_step": 8}, 6),
        ({"kill_at_operation": ["write", "state.pt", 1]}, 3),
        ({"kill_at_operation": ["replace", ".step_00000009.tmp", 0]}, 6),
        ({"kill_at_operation": ["write", "metrics.jsonl", 4]}, 6),
        ({"kill_at_operation": ["replace", ".best.tmp", 1]}, 9),
        ({"kill_at_operation": ["rmdir", "step_00000006", 0]}, 12),
        ({"kill_at_operation": ["replace", "results.tmp", 0]}, 12),
    ],
    ids=str,
)
def test_killed_and_resumed(
    forks: Forks, reference: Path, tmp_path: Path, event: dict[str, Any], from_step: int
) -> None:
    """In the first steps, between checkpoints, in the middle of writing one, before its rename, in a line of the
    log, between the two renames of best/, in the last deletion of an old checkpoint, and before the results."""
    run = tmp_path / "run"
    event = {k: [str(run), *v] if isinstance(v, list) else v for k, v in event.items()}
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, **event), -9)
    text = resumed(forks, run)
    assert re.search(rf"(goes on|so it starts) at step {from_step}\b", text), text
    assert_same(run, reference)


def test_terminated_and_resumed(forks: Forks, reference: Path, tmp_path: Path) -> None:
    """SIGTERM saves the step at hand, here one without a checkpoint or a log line of its own."""
    run = tmp_path / "run"
    outcome = forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, terminate_in_step=6)
    completed(outcome, 143)
    errors = [line for line in outcome.text.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {run}: stopped by SIGTERM at step 7, saved; go on with resume=true"]
    assert "goes on at step 7" in resumed(forks, run)
    assert_same(run, reference)


def test_terminated_group_with_workers(forks: Forks, reference: Path, tmp_path: Path) -> None:
    """A scheduler's SIGTERM reaches the loader's workers too; the run still saves and goes on."""
    run = tmp_path / "run"
    settings = [*TEACHER, "data.workers=2"]
    outcome = forks.script("train_teacher.py", f"run_dir={run}", *settings, terminate_group_after_step=3)
    completed(outcome, 143)
    assert "goes on at step 5" in resumed(forks, run)
    assert_same(run, reference)


def test_terminated_in_the_last_step(forks: Forks, reference: Path, tmp_path: Path) -> None:
    """There is nothing left to go on with: the run ends as it would."""
    run = tmp_path / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, terminate_in_step=11))
    assert_same(run, reference)


@pytest.mark.parametrize("event", [{"kill_in_step": 4}, {"terminate_in_step": 7}], ids=str)
def test_accumulated_parts(forks: Forks, halves: Path, tmp_path: Path, event: dict[str, int]) -> None:
    run = tmp_path / "run"
    settings = [*TEACHER, "train.accumulate=2"]
    completed(
        forks.script("train_teacher.py", f"run_dir={run}", *settings, **event), -9 if "kill" in str(event) else 143
    )
    resumed(forks, run)
    assert_same(run, halves)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(forks: Forks, reference: Path, tmp_path: Path, workers: int) -> None:
    """Killed with workers, resumed with others."""
    run = tmp_path / "run"
    settings = [*TEACHER, f"data.workers={workers}"]
    completed(forks.script("train_teacher.py", f"run_dir={run}", *settings, kill_in_step=7), -9)
    resumed(forks, run)
    assert_same(run, reference)


@pytest.mark.parametrize("step", [1, 4, 8])
def test_distillation(forks: Forks, distilled: Path, tmp_path: Path, reference: Path, step: int) -> None:
    """Killed before, within and after the window of a term that has an adapter."""
    assert any("objective.terms.fitnet.adapters" in name for name in state(distilled))
    active = ["fitnet" in line for line in metrics(distilled) if line["split"] == "train"]
    assert active == [False, True, True, True, False, False]
    run = tmp_path / "run"
    completed(forks.script("distill.py", str(reference), f"run_dir={run}", *STUDENT, kill_in_step=step), -9)
    resumed(forks, run, "distill.py")
    assert_same(run, distilled)


def test_a_finished_run_says_so(forks: Forks, reference: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    assert "finished" in resumed(forks, reference)
    assert before == {path: path.stat().st_mtime_ns for path in reference.rglob("*")}


def test_damage_is_noticed(forks: Forks, reference: Path, tmp_path: Path) -> None:
    """A flipped bit in the newest checkpoint: exit code 3, never the one before it in silence."""
    run = tmp_path / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, kill_in_step=7), -9)
    path = run / "checkpoints/step_00000006/state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    outcome = forks.script("train_teacher.py", str(run / "config.yaml"), "resume=true")
    completed(outcome, 3)
    assert f"error: {path}: damaged, its SHA-256 is not that of the manifest" in outcome.text


def operations(forks: Forks, run: Path, log: Path, *arguments: str) -> list[str]:
    completed(forks.script("train_teacher.py", *arguments, list_operations=[str(run), str(log)]))
    return log.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_operation_on_files(forks: Forks, reference: Path, tmp_path: Path) -> None:
    """At every write, sync, rename and deletion of a run."""
    listed = operations(forks, tmp_path / "listed", tmp_path / "log", f"run_dir={tmp_path / 'listed'}", *TEACHER)
    assert {line.split()[0] for line in listed} >= {"write", "fsync", "replace", "unlink", "rmdir", "mkdir"}
    for number, name in enumerate(listed):
        run = tmp_path / f"run{number}"
        event = [str(run), number]
        completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, kill_at=event), -9)
        again = [str(run / "config.yaml")] if (run / "config.yaml").exists() else [f"run_dir={run}", *TEACHER]
        outcome = forks.script("train_teacher.py", *again, "resume=true")
        print(number, name)
        assert outcome.code == 0, outcome.text
        assert_same(run, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_operation_of_a_resumption(forks: Forks, reference: Path, tmp_path: Path) -> None:
    """Cut off a second time while it takes up its checkpoint, up to the next one."""

    def cut_off(run: Path) -> list[str]:
        event = [str(run), "replace", ".best.tmp", 0]
        completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER, kill_at_operation=event), -9)
        return [str(run / "config.yaml"), "resume=true"]

    listed_run = tmp_path / "listed"
    listed = operations(forks, listed_run, tmp_path / "log", *cut_off(listed_run))
    until = listed.index("replace .step_00000006.tmp") + 2
    for number, name in enumerate(listed[:until]):
        run = tmp_path / f"run{number}"
        again = cut_off(run)
        completed(forks.script("train_teacher.py", *again, kill_at=[str(run), number]), -9)
        outcome = forks.script("train_teacher.py", *again)
        print(number, name)
        assert outcome.code == 0, outcome.text
        assert_same(run, reference)
