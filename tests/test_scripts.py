"""The scripts from the command line to their files, and what they say to wrong input before the first step."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import yaml

import compress
import distill
import evaluate
import search_student
import train_teacher
from data import CITYSCAPES
from engine.config import parse, run_script

ROOT = Path(__file__).resolve().parents[1]
TINY = ["data.size=[32,64]", "data.scenes=8", "train.steps=4", "train.log_every=2", "train.batch_size=4"]
SMALL = {"train_teacher": ["model.width=4", "model.depth=2"], "distill": ["student.width=2", "student.depth=2"]}
RUNS = {"distill": "teacher.run", "evaluate": "runs"}

Call = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a script in this process: its exit code and the last line on standard error."""

    def run(script: ModuleType, *arguments: object) -> tuple[int, str]:
        name = script.__name__
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL.get(name, []), *map(str, arguments)])
        code = 0
        try:
            run_script(script.main, script.Config, runs=RUNS.get(name))
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        print(captured.out, captured.err)
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (1 if code else 0)
        return code, lines[0] if lines else captured.out

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    arguments = [*SMALL["train_teacher"], *TINY, f"run_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_teacher.py", *arguments])
        run_script(train_teacher.main, train_teacher.Config)
    return folder


def camvid(root: Path, images: int = 4) -> Path:
    """A small data set in CamVid's layout."""
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(images):
            image = generator.integers(0, 255, (48, 64, 3), np.uint8)
            label = generator.integers(0, 12, (48, 64), np.uint8)
            cv2.imwrite(str(root / split / f"{i}.png"), image)
            cv2.imwrite(str(root / f"{split}annot" / f"{i}.png"), label)
    return root


def test_teacher_to_student_to_table(call: Call, teacher: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    terms = ["losses.kd.weight=1", "losses.affinity.weight=1", "losses.fitnet={}", "losses.attention_transfer={}"]
    code, output = call(distill, teacher, *TINY, f"run_dir={student}", *terms)
    assert code == 0
    assert "teacher: val mIoU" in output
    events = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    values = next(event for event in events if event["split"] == "train")
    assert {"cross_entropy", "kd", "affinity", "fitnet", "attention_transfer", "lr"} <= values.keys()
    assert {"images_per_second", "process_memory_mib", "cpu_percent"} <= values["system"].keys()
    assert 0 < values["system"]["waiting"] < 1
    shares = {name.removeprefix("pixels."): value for name, value in values.items() if name.startswith("pixels.")}
    assert list(shares) == list(CITYSCAPES.names)
    assert 0.5 < sum(shares.values()) <= 1  # the rest has no label
    assert shares["road"] > 0.1

    code, output = call(evaluate, teacher, student, "split=test", f"out={tmp_path / 'out' / 'mine'}", "pictures=2")
    assert code == 0
    assert "mIoU" in (tmp_path / "out" / "mine.md").read_text()
    figures = json.loads((tmp_path / "out" / "mine.json").read_text())["runs"]
    assert [run["parameters"] for run in figures] == sorted((r["parameters"] for r in figures), reverse=True)
    assert cv2.imread(str(tmp_path / "out" / "mine.png")) is not None
    assert len(list((student / "images").glob("test_*.png"))) == 2
    assert json.loads((student / "evaluation_test.json").read_text())["images"] == 2


def test_evaluating_again_gives_the_same(call: Call, teacher: Path) -> None:
    final = json.loads((teacher / "results.json").read_text())
    call(evaluate, teacher)
    again = json.loads((teacher / "evaluation_val.json").read_text())
    assert again["miou"] == final["best_miou"]


def test_existing_run_is_refused_and_finished_run_says_so(call: Call, teacher: Path) -> None:
    before = (teacher / "metrics.jsonl").read_bytes()
    code, line = call(train_teacher, *TINY, f"run_dir={teacher}")
    assert code == 2
    assert "exists" in line
    code, line = call(train_teacher, teacher / "config.yaml", "resume=true")
    assert code == 0
    assert "finished" in line
    code, line = call(train_teacher, teacher / "config.yaml", "resume=true", "model.width=6")
    assert code == 2
    assert "model.width" in line
    assert (teacher / "metrics.jsonl").read_bytes() == before


def test_a_wrong_path_leaves_nothing_in_the_way(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, line = call(train_teacher, "data.name=camvid", f"data.root={tmp_path / 'absent'}", f"run_dir={run}")
    assert code == 2
    assert str(tmp_path / "absent") in line
    assert call(train_teacher, *TINY, f"run_dir={run}")[0] == 0


def test_a_run_does_not_go_on_with_other_files(call: Call, tmp_path: Path) -> None:
    root, run = camvid(tmp_path / "camvid"), tmp_path / "run"
    options = ["data.name=camvid", f"data.root={root}", f"run_dir={run}", "train.batch_size=4", "train.steps=1"]
    assert call(train_teacher, *options)[0] == 0
    (run / "results.json").unlink()
    assert call(train_teacher, *options, "resume=true")[0] == 0
    (run / "results.json").unlink()
    for folder in ("train", "trainannot"):
        (root / folder / "2.png").rename(root / folder / "9.png")
    code, line = call(train_teacher, *options, "resume=true")
    assert code == 2
    assert "environment.json" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["losses.afinity.weight=1"], ["losses.afinity", "losses.affinity"]),
        (["train.lr=fast"], ["train.lr", "fast"]),
        (["train.precision=fp16"], ["train.precision", "CUDA"]),
        (["losses.kd.weight=1"], ["losses.kd", "teacher"]),
        (["train.batch_size=3", "train.accumulate=2"], ["train.batch_size"]),
        (["train.lr=.inf"], ["train.lr"]),
        (["model.stride=3"], ["stride"]),
    ],
)
def test_wrong_keys(call: Call, tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    code, line = call(train_teacher, *TINY, f"run_dir={tmp_path / 'run'}", *arguments)
    assert code == 2
    assert all(word in line for word in expected), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def _missing_label(root: Path) -> Path:
    (root / "trainannot" / "2.png").unlink()
    return root / "train" / "2.png"


def _other_size(root: Path) -> Path:
    cv2.imwrite(str(root / "valannot" / "1.png"), np.zeros((40, 64), np.uint8))
    return root / "valannot" / "1.png"


def _label_value(root: Path) -> Path:
    cv2.imwrite(str(root / "trainannot" / "1.png"), np.full((48, 64), 34, np.uint8))
    return root / "trainannot" / "1.png"


def _truncated_png(root: Path) -> Path:
    path = root / "train" / "3.png"
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _truncated_jpeg(root: Path) -> Path:
    for path in (root / "train").glob("*.png"):
        cv2.imwrite(str(path.with_suffix(".jpg")), cv2.imread(str(path)))
        path.unlink()
    path = root / "train" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    return path


FAULTS = [_missing_label, _other_size, _label_value, _truncated_png, _truncated_jpeg]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_wrong_files(call: Call, tmp_path: Path, plant: Callable[[Path], Path]) -> None:
    path = plant(camvid(tmp_path / "camvid"))
    options = ["data.name=camvid", f"data.root={tmp_path / 'camvid'}", f"run_dir={tmp_path / 'run'}"]
    code, line = call(train_teacher, *options, "train.steps=1")
    assert code == 2
    assert path.name in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_clean_files_train(call: Call, tmp_path: Path) -> None:
    root = camvid(tmp_path / "camvid")
    options = ["data.name=camvid", f"data.root={root}", f"run_dir={tmp_path / 'run'}", "train.batch_size=4"]
    assert call(train_teacher, *options, "train.steps=1", "data.crop=[48,80]")[0] == 0


def test_wrong_teachers(call: Call, teacher: Path, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    code, line = call(distill, *TINY, run)
    assert (code, "teacher.run" in line) == (2, True)
    root = camvid(tmp_path / "camvid")
    code, line = call(distill, teacher, "data.name=camvid", f"data.root={root}", run, "teacher.absent=[mud]")
    assert code == 2
    assert line.startswith("error: teacher.absent: 'mud' is no class of the data set; it has sky, building")
    weights = teacher / "best" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[: len(whole) // 2])
        code, line = call(distill, teacher, *TINY, run)
    finally:
        weights.write_bytes(whole)
    assert code == 3
    assert "model.safetensors" in line
    code, line = call(distill, teacher, *TINY, run, "losses.affinity.taps=[decoder.7]")
    assert code == 2
    assert "decoder.0" in line


CONFIGURATIONS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "accelerate"]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_the_repositorys_configurations_are_read(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    its_own = {"teacher", "student", "assistants", "generations"} & given.keys()
    script = distill if its_own or path.parent.name == "focus" else train_teacher
    if path.parent.name == "search":
        script = search_student
    if path.parent.name == "camvid_compress":
        script = compress
    config = parse(script.Config, [str(path)], runs=RUNS.get(script.__name__))
    if "run_dir" in given:
        assert config.run_dir == given["run_dir"]
        assert config.run_dir.startswith("runs/")
