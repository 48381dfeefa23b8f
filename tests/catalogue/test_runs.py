"""Every term in a training of its own by its defaults, ten together, and in two processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CONFIGS
from forks import Forks, Outcome

TINY = ["data.size=[32,64]", "data.scenes=8", "train.batch_size=4", "train.steps=20", "train.log_every=20"]
MORE = {"margin": ["losses.margin.margin=0.1"]}  # logits so early are within the default margin
SUPERVISED = {case.name for case in CASES.values() if case.supervised}
TOGETHER = [
    "cross_entropy",
    "dice",
    "kd",
    "dist",
    "fitnet",
    "review",
    "kta",
    "affinity",
    "ifvd",
    "cirkd_mini_batch",
    "cirkd_memory",
    "holistic",
]


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed([forks.script("train_teacher.py", f"run_dir={run}", *TINY, "model.width=8")])
    return run


def completed(outcomes: list[Outcome]) -> None:
    assert {outcome.code for outcome in outcomes} == {0}, "\n".join(outcome.text for outcome in outcomes)


def switched_on(names: list[str]) -> list[str]:
    return [setting for name in names for setting in (f"losses.{name}={{}}", *MORE.get(name, []))]


def distil(
    forks: Forks, teacher: Path, run: Path, names: list[str], ranks: int = 1, **event: Any
) -> dict[str, Any]:
    """The last line of the training by these terms, each with its defaults."""
    settings = [f"run_dir={run}", *TINY, "student.width=4", "losses.kd=null", *switched_on(names)]
    completed(forks.call("forks:run_script_file", "distill.py", str(teacher), *settings, ranks=ranks, **event))
    assert json.loads((run / "environment.json").read_text())["processes"] == ranks
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if line["split"] == "train")


def check(last: dict[str, Any], names: list[str]) -> None:
    assert last["step"] == 20
    assert last["skipped"] == 0
    for name in names:
        assert math.isfinite(last[name]), name
        assert last[name] != 0, name


@pytest.mark.parametrize("name", CONFIGS)
def test_alone(forks: Forks, teacher: Path, tmp_path: Path, name: str) -> None:
    check(distil(forks, teacher, tmp_path / "run", [name]), [name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_alone_in_two_processes(forks: Forks, teacher: Path, tmp_path: Path, name: str) -> None:
    check(distil(forks, teacher, tmp_path / "run", [name], ranks=2), [name])


@pytest.mark.parametrize("ranks", [1, 2])
def test_many_together(forks: Forks, teacher: Path, tmp_path: Path, ranks: int) -> None:
    """Ten and more, with a stage before them, a critic beside them and queues."""
    assert len(TOGETHER) >= 10
    last = distil(forks, teacher, tmp_path / "run", TOGETHER, ranks=ranks)
    check(last, [*TOGETHER, "critic.loss"])


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_supervised_terms_train_a_teacher(forks: Forks, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    settings = [f"run_dir={run}", *TINY, "model.width=4", *switched_on([name])]
    completed([forks.script("train_teacher.py", *settings)])
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    check(line, [name])


def learners(run: Path) -> list[dict[str, torch.Tensor]]:
    saved = torch.load(run / "checkpoints/step_00000020/state.pt", weights_only=True)
    return [player["learner"] for player in saved["players"]]


def test_memories_stand_in_checkpoints_alone(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    """Not in `best/`, which is the student and nothing else; nor does the critic stand there."""
    run = tmp_path / "run"
    distil(forks, teacher, run, ["cirkd_memory", "holistic"])
    student, critic = learners(run)
    queues = [name for name in student if name.endswith(".keys")]
    assert queues
    assert critic
    assert not any("critic" in name for name in student)
    from safetensors.torch import load_file

    assert {f"model.{name}" for name in load_file(run / "best/model.safetensors")} == {
        name for name in student if name.startswith("model.")
    }


@pytest.mark.parametrize("event", [{"kill_in_step": 9}, {"kill_in_step": 15}], ids=str)
def test_two_processes_with_queues_and_critic_resume_exactly(
    forks: Forks, teacher: Path, tmp_path: Path, event: dict[str, int]
) -> None:
    """Killed and resumed in two processes: queues, their pointers, critic and its optimizer, bit for bit.

    The queues are small, so that their ends are passed.
    """
    settings = [
        "train.checkpoint_every=6",
        "losses.cirkd_memory.pixel_memory=24",
        "losses.cirkd_memory.region_memory=7",
    ]
    settings += ["losses.holistic={}", "student.width=4", *TINY]
    script = ("forks:run_script_file", "distill.py")
    whole, run = tmp_path / "whole", tmp_path / "run"
    completed(forks.call(*script, str(teacher), f"run_dir={whole}", *settings, ranks=2))
    outcomes = forks.call(*script, str(teacher), f"run_dir={run}", *settings, ranks=2, **event)
    assert {outcome.code for outcome in outcomes} == {-9}
    completed(forks.call(*script, str(run / "config.yaml"), "resume=true", ranks=2))
    saved = [torch.load(r / "checkpoints/step_00000020/state.pt", weights_only=True) for r in (run, whole)]
    assert len(saved[0]["players"]) == 2
    for ours, theirs in zip(*(s["players"] for s in saved), strict=True):
        assert ours["learner"].keys() == theirs["learner"].keys()
        for name, value in ours["learner"].items():
            assert torch.equal(value, theirs["learner"][name]), name
        for entry, other in zip(*(p["optimizer"]["state"].values() for p in (ours, theirs)), strict=True):
            assert all(torch.equal(value, other[key]) for key, value in entry.items())
    queues = {name: value for name, value in saved[0]["players"][0]["learner"].items() if name.endswith(".keys")}
    assert any(value.any() for value in queues.values())
