"""Every architecture trains as a teacher and as a student, and teaches a UNet, on drawn streets."""

import json
import math
from pathlib import Path

import pytest
from folders import SEGFORMER, write_folder
from forks import Forks, Outcome

TINY = ["data.size=[32,64]", "data.scenes=8", "train.batch_size=4", "train.steps=20", "train.log_every=20"]
UNET = ["name=unet", "width=8", "depth=2"]
MODELS = {
    "unet": UNET,
    "unet-stride16": ["name=unet", "max_parameters=30000", "stride=16", "block=separable"],
    "unet-inverted": ["name=unet", "width=8", "depth=2", "block=inverted"],
    "deeplabv3plus-resnet18": ["name=deeplabv3plus", "encoder=resnet18"],
    "deeplabv3plus-mobilenetv2": ["name=deeplabv3plus", "encoder=mobilenetv2", "output_stride=8"],
    "segformer": ["name=segformer"],
    "mobilenetv2": ["name=mobilenetv2", "multiplier=0.35"],
    "dabnet": ["name=dabnet"],
    "hub": ["name=hub", "weights=FOLDER", "new_head=true"],
    "hub-from-scratch": ["name=hub", "weights=FOLDER", "pretrained=false", "gradient_checkpointing=true"],
}
TEACHING = ["losses.kd={}", "losses.attention_transfer={}", "losses.affinity={}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hub") / "segformer", SEGFORMER, ["road", "car", "sky"])


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet that teaches."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed([forks.script("train_teacher.py", f"run_dir={run}", *TINY, *keys("model", UNET))])
    return run


def keys(role: str, settings: list[str], folder: Path | None = None) -> list[str]:
    return [f"{role}.{setting}".replace("FOLDER", str(folder)) for setting in settings]


def completed(outcomes: list[Outcome]) -> None:
    assert {outcome.code for outcome in outcomes} == {0}, "\n".join(outcome.text[-3000:] for outcome in outcomes)


def check(run: Path, terms: list[str], ranks: int = 1) -> None:
    """The run came to its end, every term finite and at work."""
    assert json.loads((run / "environment.json").read_text())["processes"] == ranks
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if line["split"] == "train")
    assert (last["step"], last["skipped"]) == (20, 0)
    for term in terms:
        assert math.isfinite(last[term]), term
        assert last[term] > 0, term
    assert (run / "best" / "model.safetensors").exists()


def teach_and_learn(forks: Forks, name: str, folder: Path, teacher: Path, tmp_path: Path, ranks: int) -> None:
    script = "forks:run_script_file"
    taught, trained, student = tmp_path / "taught", tmp_path / "trained", tmp_path / "student"
    settings = MODELS[name]
    alone = [f"run_dir={trained}", *TINY, *keys("model", settings, folder)]
    completed(forks.call(script, "train_teacher.py", *alone, ranks=ranks, timeout=240))
    check(trained, ["cross_entropy"], ranks)
    unet = [f"run_dir={taught}", *TINY, *TEACHING, *keys("student", UNET)]
    completed(forks.call(script, "distill.py", str(trained), *unet, ranks=ranks, timeout=240))
    check(taught, ["cross_entropy", "kd", "attention_transfer", "affinity"], ranks)
    learning = [f"run_dir={student}", *TINY, "losses.fitnet={}", *keys("student", settings, folder)]
    completed(forks.call(script, "distill.py", str(teacher), *learning, ranks=ranks, timeout=240))
    check(student, ["cross_entropy", "kd", "fitnet"], ranks)


@pytest.mark.parametrize("name", MODELS)
def test_trains_teaches_and_learns(forks: Forks, name: str, folder: Path, teacher: Path, tmp_path: Path) -> None:
    teach_and_learn(forks, name, folder, teacher, tmp_path, ranks=1)


@pytest.mark.parametrize(
    "name",
    [name if name in ("mobilenetv2", "hub") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_in_two_processes(forks: Forks, name: str, folder: Path, teacher: Path, tmp_path: Path) -> None:
    teach_and_learn(forks, name, folder, teacher, tmp_path, ranks=2)
