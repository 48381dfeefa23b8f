"""The stages of compress.py: made, killed and resumed, scored through their runtime, and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forks import Forks, Outcome
from safetensors.torch import load_file

import compress
from data import DataConfig, build_dataset
from deploy.exported import open_exported, read_metadata
from engine.config import parse
from errors import ConfigurationError
from models import load_model

for package in ("torch_pruning", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

TINY = ["data.size=[32,64]", "data.scenes=16", "train.batch_size=4", "train.steps=40", "train.lr=0.02"]
PARENT = [*TINY, "model.width=8", "model.depth=2", "train.log_every=40"]
TRAINED = ["train.steps=12", "train.batch_size=4", "train.log_every=4", "train.checkpoint_every=4"]
STAGES = [
    "stages=[prune,finetune,int8,qat,export]",
    *(f"finetune.{key}" for key in TRAINED),
    *(f"qat.{key}" for key in TRAINED),
    "int8.images=4",
    "export.images=2",
    "latency.rounds=0",
]

SHORT = ["stages=[prune,finetune]", *STAGES[1:]]


@pytest.fixture(scope="module")
def parent(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("parent") / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *PARENT))
    return run


@pytest.fixture(scope="module")
def whole(forks: Forks, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of stages that nothing befell."""
    run = tmp_path_factory.mktemp("whole") / "run"
    completed(forks.script("compress.py", str(parent), f"run_dir={run}", *STAGES))
    return run


@pytest.fixture(scope="module")
def short(forks: Forks, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruning and fine-tuning that nothing befell."""
    run = tmp_path_factory.mktemp("short") / "run"
    completed(forks.script("compress.py", str(parent), f"run_dir={run}", *SHORT))
    return run


def completed(outcome: Outcome, code: int = 0) -> str:
    assert outcome.code == code, outcome.text
    return outcome.text


def error_of(outcome: Outcome, code: int) -> str:
    lines = [line for line in completed(outcome, code).splitlines() if line.startswith("error:")]
    assert len(lines) == 1, outcome.text
    assert "Traceback" not in outcome.text
    return lines[0]


def entries(run: Path) -> list[dict[str, Any]]:
    record = json.loads((run / "stages.json").read_text())
    return [{k: v for k, v in entry.items() if k != "train_seconds"} for entry in record["entries"]]


def test_stages(whole: Path, parent: Path) -> None:
    """Each is a run that others can take; each row tells what is there."""
    found = {entry["stage"]: entry for entry in entries(whole)}
    assert list(found) == ["parent", "1-prune", "2-finetune", "3-int8", "4-qat", "5-export"]
    assert found["1-prune"]["flops"] == pytest.approx(found["parent"]["flops"] / 2, rel=0.02)
    assert found["2-finetune"]["miou"] == json.loads((whole / "2-finetune/results.json").read_text())["best_miou"]
    for stage in ("1-prune", "2-finetune", "3-int8", "4-qat"):
        model = load_model(whole / stage)
        assert model.changes["pruned"] == load_model(whole / "1-prune").changes["pruned"]
        assert model.precision == found[stage]["precision"] == ("int8" if stage[0] in "34" else "fp32")
    for stage, compared in {"2-finetune": "parent", "4-qat": "2-finetune", "5-export": "4-qat"}.items():
        assert found[stage]["against"] == compared
        lost = 100 * (found[compared]["miou"] - found[stage]["miou"])
        assert found[stage]["lost"] == pytest.approx(lost)
    text = (whole / "stages.md").read_text()
    assert [stage for stage in found if f"| {stage} " not in text] == []
    for path in whole.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        assert config["data"]["scenes"] == 16
        assert config["model"] == str(parent)
    assert not list(whole.rglob(".*"))


def test_int8_is_scored_through_its_runtime(whole: Path) -> None:
    """The mIoU of the row is that of the file, image by image in ONNX Runtime, and stands in its metadata."""
    (entry,) = [entry for entry in entries(whole) if entry["stage"] == "3-int8"]
    path = whole / "3-int8" / entry["file"]
    exported, data = open_exported(path, threads=1), build_dataset(DataConfig(size=[32, 64], scenes=16), "val")
    assert exported.runtime == entry["runtime"] == "onnxruntime"
    counts = np.zeros((19, 19), np.int64)
    for index in range(len(data)):
        image, label = data.read(index)
        labelled = label != 255
        np.add.at(counts, (label[labelled], exported.labels(image)[labelled]), 1)
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    assert entry["miou"] == pytest.approx((right[union > 0] / union[union > 0]).mean())
    assert read_metadata(path).miou == entry["miou"]
    assert entry["bytes"] == path.stat().st_size


def test_evaluate_and_profile_take_a_stage(forks: Forks, whole: Path, tmp_path: Path) -> None:
    settings = ["pictures=1", f"out={tmp_path / 'table'}"]
    completed(forks.script("evaluate.py", str(whole / "1-prune"), str(whole / "2-finetune"), *settings))
    scored = json.loads((tmp_path / "table.json").read_text())["runs"]
    known = {entry["stage"]: entry["miou"] for entry in entries(whole)}
    assert [run["miou"] for run in scored] == [known["1-prune"], known["2-finetune"]]


def killed_and_resumed(
    forks: Forks, parent: Path, run: Path, reference: Path, stages: list[str], event: Any
) -> None:
    """Cut off by SIGKILL and gone on with, it is bit for bit the reference; finished, it stays as it is."""
    event = {k: [str(run / v[0]), v[1]] if k == "kill_in_link" else [str(run), *v] for k, v in event.items()}
    completed(forks.script("compress.py", str(parent), f"run_dir={run}", *stages, **event), -9)
    assert not (run / "stages.md").exists()
    again = ["compress.py", str(run / "config.yaml"), "resume=true"]
    completed(forks.script(*again))
    assert entries(run) == entries(reference)
    weights = [path.relative_to(reference) for path in reference.rglob("*.safetensors")]
    assert len(weights) >= 2
    for path in weights:
        found, expected = load_file(run / path), load_file(reference / path)
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "finished" in completed(forks.script(*again))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize(
    "event",
    [
        {"kill_in_link": ["2-finetune", 6]},
        {"kill_at_operation": ["write", "prune.tmp", 0]},
        {"kill_at_operation": ["replace", ".1-prune.tmp", 0]},
        {"kill_at_operation": ["replace", "stages.tmp", 2]},
    ],
    ids=str,
)
def test_killed_and_resumed(
    forks: Forks, parent: Path, short: Path, tmp_path: Path, event: dict[str, Any]
) -> None:
    """In a step of a training, while a stage is written, before it has its name, before its row is written."""
    killed_and_resumed(forks, parent, tmp_path / "run", short, SHORT, event)


@pytest.mark.slow
@pytest.mark.parametrize(
    "event",
    [
        {"kill_in_link": ["4-qat", 6]},
        {"kill_at_operation": ["replace", ".3-int8.tmp", 0]},
        {"kill_at_operation": ["replace", "onnx_int8_32x64.onnx", 0]},
        {"kill_at_operation": ["replace", "stages.tmp", 4]},
    ],
    ids=str,
)
def test_killed_in_later_stages(
    forks: Forks, parent: Path, whole: Path, tmp_path: Path, event: dict[str, Any]
) -> None:
    killed_and_resumed(forks, parent, tmp_path / "run", whole, STAGES, event)


def test_rounds(forks: Forks, parent: Path, tmp_path: Path) -> None:
    """Each round goes a part of the way, and has its share of the steps; labels alone need no teacher."""
    run = tmp_path / "run"
    settings = ["stages=[prune,finetune]", "prune.rounds=2", "finetune.losses.kd=null", "prune.importance=taylor"]
    settings += ["finetune.train.steps=7", "finetune.train.batch_size=4", "prune.batches=2", "latency.rounds=0"]
    text = completed(forks.script("compress.py", str(parent), f"run_dir={run}", *settings))
    assert "teacher" not in text
    found = entries(run)
    assert [e["stage"] for e in found[1:]] == ["1-prune", "2-finetune", "3-prune", "4-finetune"]
    shares = [entry["flops"] / found[0]["flops"] for entry in found]
    assert shares == pytest.approx([1, 0.5**0.5, 0.5**0.5, 0.5, 0.5], rel=0.02)
    steps = [
        json.loads((run / stage / "results.json").read_text())["steps"] for stage in ("2-finetune", "4-finetune")
    ]
    assert steps == [3, 4]


def test_a_stage_that_loses_too_much(forks: Forks, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["stages=[prune,export]", "prune.share=0.3", "max_loss={prune: -100}", "latency.rounds=0"]
    stopped = forks.script("compress.py", str(parent), f"run_dir={run}", *settings, "stop_on_loss=true")
    assert error_of(stopped, 2).startswith("error: max_loss.prune: 1-prune lost ")
    assert (run / "stages.md").exists()
    assert not (run / "2-export").exists()
    again = forks.script("compress.py", str(run / "config.yaml"), "resume=true")
    assert error_of(again, 2).startswith("error: max_loss.prune: 1-prune lost ")
    other = tmp_path / "other"
    text = completed(forks.script("compress.py", str(parent), f"run_dir={other}", *settings[:1], *settings[2:]))
    assert "WARNING: max_loss.prune: 1-prune lost " in text
    assert (other / "2-export/export").is_dir()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["stages=[prune,quantise]"], "stages: 'quantise' is no stage; give some of prune"),
        (["stages=[]"], "stages: none is named"),
        (["stages=[int8,prune]"], "stages: prune stands behind int8"),
        (["stages=[prune]", "prune.rounds=2"], "prune.rounds: 2 rounds need a finetune"),
        (["max_loss={tune: 1}"], "max_loss: 'tune' is no stage"),
        (["latency.threads=0"], "latency.threads: 0 is too small"),
    ],
    ids=str,
)
def test_wrong_configurations(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(compress.Config, settings, runs="model")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "model: no run is named"),
        (["model=nowhere"], "model: nowhere/config.yaml: no such file"),
        (["PARENT", "data.sizes=[8,8]"], "data.sizes: "),
        (["PARENT", "data.name=camvid", "data.root=nowhere"], "data.root: there is no folder nowhere"),
        (["PARENT", "stages=[prune]", "prune.share=0.001"], "prune.share: 0.001 of the flops is out of reach"),
    ],
    ids=str,
)
def test_wrong_inputs(forks: Forks, parent: Path, tmp_path: Path, settings: list[str], said: str) -> None:
    given = [str(parent) if one == "PARENT" else one for one in settings]
    outcome = forks.script("compress.py", *given, f"run_dir={tmp_path / 'run'}")
    assert error_of(outcome, 2).startswith(f"error: {said}")


def test_calibration_shows_all_classes() -> None:
    """Few images, each once and whole, that show rare classes more often than any; the same for a seed."""
    data = build_dataset(DataConfig(size=[32, 64], scenes=100, crop=[16, 16]), "train")
    images = compress.calibration_sample(data, 12, seed=3)
    assert len(images) == 12
    assert {tuple(image.shape) for image in images} == {(3, 32, 64)}
    assert len({image.numpy().tobytes() for image in images}) == 12
    again = compress.calibration_sample(data, 12, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(images, again, strict=True))

    counts = data.label_counts()[:, :-1]
    wholes = {data.sample((-1, i, i), seed=0).images.numpy().tobytes(): i for i in range(len(data))}  # type: ignore
    shown = counts[[wholes[image.numpy().tobytes()] for image in images]]
    rng = np.random.default_rng(0)
    plain = [counts[rng.permutation(len(counts))[:12]] for _ in range(20)]
    rare = counts.any(0) & ((counts > 0).mean(0) < 0.3)
    assert rare.any()
    assert (shown[:, rare] > 0).sum() > np.mean([(one[:, rare] > 0).sum() for one in plain])
