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


@pytest.mark.parametrize(("alternate", "length"), [("none", 0), ("step", 1), ("epoch", 3)])
def test_turns(forks: Forks, tmp_path: Path, alternate: str, length: int) -> None:
    """Each learner's values are logged at the steps at which it learns; scores are logged of both."""
    run = tmp_path / "run"
    distil(forks, f"run_dir={run}", *STUDENT, *ONLINE, f"online.alternate={alternate}")
    lines = train_lines(run)
    learnt = [("teacher.cross_entropy" in line, "cross_entropy" in line) for line in lines]
    assert learnt == [
        (True, True) if not length else (step // length % 2 == 0, step // length % 2 == 1) for step in range(8)
    ]
    assert all("kd" in line for line in lines if "cross_entropy" in line)
    splits = [json.loads(text)["split"] for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert splits.count("val") == splits.count("val.teacher") == 2
    results = json.loads((run / "results.json").read_text())
    assert results["parameters"] != results["teacher"]["parameters"]
    for figures in (results, results["teacher"]):
        assert {"miou", "best_miou", "entropy", "ece", "class_correlation"} <= figures.keys()


def test_critics_by_turns(forks: Forks, tmp_path: Path) -> None:
    """Each learner has a critic of its own, which learns when its learner does."""
    run = tmp_path / "run"
    critics = ["losses.holistic={}", "online.losses.holistic={}", "online.alternate=step"]
    distil(forks, f"run_dir={run}", *STUDENT, *ONLINE, *critics)
    for step, line in enumerate(train_lines(run)):
        assert ("teacher.critic.loss" in line, "critic.loss" in line) == (step % 2 == 0, step % 2 == 1)


def test_a_fellow_is_a_run_too(forks: Forks, tmp_path: Path) -> None:
    """Its weights are evaluated and taught from like those of any run; its score is the one that was logged."""
    run = tmp_path / "run"
    distil(forks, f"run_dir={run}", *STUDENT, *ONLINE)
    outcome = forks.script("evaluate.py", str(run), str(run / "teacher"), "pictures=1")
    text = completed([outcome])
    assert "Over seeds" not in text
    scored = json.loads((run / "teacher/evaluation_val.json").read_text())
    assert scored["miou"] == json.loads((run / "results.json").read_text())["teacher"]["best_miou"]
    again = [*STUDENT, "teacher.accept_near_chance=true", f"run_dir={tmp_path / 'next'}"]
    distil(forks, str(run / "teacher"), *again)


def test_a_fellow_begins_with_the_teacher_that_is_given(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    """With its weights, which its first step changes."""
    run = tmp_path / "run"
    settings = [*ONLINE, "train.steps=1", "train.evaluate_every=0", "online.lr=1e-9", "online.weight_decay=0"]
    distil(forks, str(teacher), f"run_dir={run}", *STUDENT, *settings)
    from safetensors.torch import load_file

    before, after = (load_file(path / "best/model.safetensors") for path in (teacher, run / "teacher"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)


def test_a_chain_is_resumed_as_a_whole(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    """Each link is taught by the one before, the last with the seed that was given; finished, it is left alone."""
    import yaml

    run = tmp_path / "run"
    distil(forks, *arguments_of("assistants", teacher, run), "generations=2", "seed=3")
    links = [yaml.safe_load((run / str(number) / "config.yaml").read_text()) for number in (1, 2, 3)]
    assert [link["teacher"]["run"] for link in links] == [str(teacher), f"{run}/1", f"{run}/2"]
    assert [link["student"]["width"] for link in links] == [6, 4, 4]
    assert [link["seed"] for link in links] == [5, 4, 3]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    text = distil(forks, str(run / "config.yaml"), "resume=true")
    assert "finished" in text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    text = distil(forks, *arguments_of("assistants", teacher, run), code=2)
    assert f"error: run_dir: {run} exists" in text
    text = distil(forks, str(run / "config.yaml"), "train.lr=1", "resume=true", code=2)
    assert "error: train.lr: differs from" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["mode=online", "teacher.flip=true"], "teacher.flip: does nothing with mode=online"),
        (["mode=online", "generations=2"], "generations: a chain needs mode=offline"),
        (["generations=2", "losses.autoencoder.file=x"], "losses.autoencoder.file: is of one teacher"),
        (["teacher.source=itself", "losses.kd=null"], "losses: with teacher.source=itself, and none compares"),
        (["mode=online", "online.alternate=epoch", "train.steps=5"], "online.alternate: 5 steps are too few"),
        (["mode=online", "losses.kta={}"], "losses.kta: mode=online has no frozen teacher"),
        (["teacher.source=average"], "train.ema: teacher.source=average is the average of weights"),
        (
            ["teacher.source=itself", "losses.affinity={}"],
            "losses.kta: teacher.source=itself has no frozen teacher",
        ),
        (["TEACHER", "teacher.source=cache", "losses.bpkd={}"], "losses.bpkd: compares logits across positions"),
        (["online.models=[]"], "online.models: empty"),
        (["mode=online", "online.models=[{widht: 3}]"], "online.models[0].widht: no such key"),
        (["generations=0"], "generations: 0 is too few"),
    ],
    ids=str,
)
def test_what_does_not_go_together(
    forks: Forks, teacher: Path, tmp_path: Path, settings: list[str], said: str
) -> None:
    settings = [str(teacher) if setting == "TEACHER" else setting for setting in settings]
    text = distil(forks, f"run_dir={tmp_path / 'run'}", *STUDENT, *settings, code=2)
    assert f"error: {said}" in text
