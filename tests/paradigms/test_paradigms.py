"""Every way of teaching, by one command on streets: it trains; killed and resumed it is the run that was not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ROOT, Forks, Outcome

TINY = ["data.size=[32,64]", "data.crop=[32,48]", "data.scenes=12", "train.batch_size=4", "train.steps=8"]
TINY += ["train.log_every=1", "train.checkpoint_every=4", "train.evaluate_every=4", "train.lr=1e-3"]
SMALL = ["width=4", "depth=2"]
STUDENT = [*TINY, *(f"student.{key}" for key in SMALL)]
FELLOW = "{width: 6, depth: 2}"
CONFIGS = ROOT / "configs/paradigms"
ONLINE = ["mode=online", f"online.models=[{FELLOW}]"]

# Each with whether it is given a teacher's run.
PARADIGMS: dict[str, tuple[list[str], bool]] = {
    "live": (["losses.fitnet={}"], True),
    "cached": (["teacher.source=cache", "losses.fitnet={}"], True),
    "several teachers": (["teacher.runs=[TEACHER]", "teacher.averaging=entropy", "teacher.precision=bf16"], True),
    "views": (["teacher.flip=true", "teacher.scales=[1.0,1.5]", "teacher.averaging=agreement"], True),
    "online": ([*ONLINE, "online.lr=5e-4", "online.optimizer=sgd", "losses.fitnet={}"], False),
    "online, by turns": ([*ONLINE, "online.alternate=step", "online.losses.kd.weight=0.5"], False),
    "online, by epochs": ([*ONLINE, "online.alternate=epoch"], True),
    "mutual": (["mode=online", f"online.models=[{FELLOW},{FELLOW}]", "online.losses.kd.weight=1"], False),
    "mean teacher": (["teacher.source=average", "teacher.perturb=0.5", "train.ema=0.9"], False),
    "consistency": (["teacher.source=itself", "teacher.perturb=0.5", "teacher.flip=true"], False),
    "deep layers teach": ([str(CONFIGS / "deep_self_distillation.yaml"), "losses.kd=null"], True),
    "hints, then logits": ([str(CONFIGS / "hint_then_logits.yaml")], True),
    "by depth": ([str(CONFIGS / "deep_to_shallow.yaml")], True),
    "by temperature": ([str(CONFIGS / "temperature.yaml")], True),
    "by resolution": (["train.resolution=[0.5,1.0]"], True),
    "assistants": ([f"assistants=[{FELLOW}]"], True),
    "born again": (["generations=2"], True),
}
CHAINS = ("assistants", "born again")


def completed(outcomes: list[Outcome], code: int = 0) -> str:
    assert {outcome.code for outcome in outcomes} == {code}, "\n".join(one.text[-3000:] for one in outcomes)
    return outcomes[0].text


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed([forks.script("train_teacher.py", f"run_dir={run}", *TINY, *(f"model.{key}" for key in SMALL))])
    return run


def distil(forks: Forks, *arguments: str, ranks: int = 1, code: int = 0, **event: Any) -> str:
    outcomes = forks.call("forks:run_script_file", "distill.py", *arguments, ranks=ranks, timeout=240, **event)
    return completed(outcomes, code)


def arguments_of(name: str, teacher: Path, run: Path) -> list[str]:
    """Of the one command; a cache lies beside the run, so that each has its own."""
    settings, taught = PARADIGMS[name]
    settings = [setting.replace("TEACHER", str(teacher)) for setting in settings]
    cache = [f"teacher.cache.folder={run}.cache"] if name == "cached" else []
    return [*([str(teacher)] if taught else []), f"run_dir={run}", *STUDENT, *settings, *cache]


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in pairs for k, v in leaves(item, f"{name}/{key}").items()}
    return {name: value}


def record(run: Path) -> dict[str, Any]:
    """All that a run leaves but for times: its last checkpoint, its log, its results and its weights."""
    saved = torch.load(run / "checkpoints/step_00000008/state.pt", weights_only=True)
    timed = ("seconds", "window_start")
    found = {name: value for name, value in leaves(saved).items() if name.rpartition("/")[2] not in timed}
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        found |= leaves({k: v for k, v in json.loads(line).items() if k != "system"}, f"metrics {number}")
    results = json.loads((run / "results.json").read_text())
    found |= leaves({k: v for k, v in results.items() if k != "train_seconds"}, "results")
    for path in run.rglob("best/*"):
        if path.suffix != ".md":
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def assert_same(run: Path, whole: Path) -> None:
    ours, theirs = record(run), record(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, name


def train_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def kill_and_resume(forks: Forks, teacher: Path, folder: Path, name: str, ranks: int) -> Path:
    """The run that nothing befell; one that was killed in its second half and went on is the same."""
    whole, run = folder / "whole", folder / "run"
    distil(forks, *arguments_of(name, teacher, whole), ranks=ranks)
    if name in CHAINS:
        event: dict[str, Any] = {"kill_in_link": [str(run / "2"), 6]}
    else:
        event = {"kill_in_step": 6}
    distil(forks, *arguments_of(name, teacher, run), ranks=ranks, code=-9, **event)
    text = distil(forks, str(run / "config.yaml"), "resume=true", ranks=ranks)
    assert "goes on at step 4" in text
    parts = ["1", "2"] if name in CHAINS else ["."]
    for part in parts:
        assert_same(run / part, whole / part)
    return whole


@pytest.mark.parametrize("name", PARADIGMS)
def test_one_process(forks: Forks, teacher: Path, tmp_path: Path, name: str) -> None:
    kill_and_resume(forks, teacher, tmp_path, name, 1)


@pytest.mark.parametrize(
    "name", [n if n in ("online", "assistants") else pytest.param(n, marks=pytest.mark.slow) for n in PARADIGMS]
)
def test_two_processes(forks: Forks, teacher: Path, tmp_path: Path, name: str) -> None:
    kill_and_resume(forks, teacher, tmp_path, name, 2)
