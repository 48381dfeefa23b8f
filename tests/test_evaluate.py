"""evaluate.py over several runs: tables, figures and pictures, seeds summed up, bias and variance over them."""

import json
import math
from pathlib import Path

import pytest
from forks import Forks
from PIL import Image

TINY = [
    "data.size=[32,64]",
    "data.scenes=8",
    "train.steps=2",
    "train.batch_size=4",
    "model.width=4",
    "model.depth=2",
]


@pytest.fixture(scope="module")
def runs(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one method and one of another."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"plain-0": ["seed=0"], "plain-1": ["seed=1"], "focal-0": ["losses.focal={}"]}
    for name, more in settings.items():
        outcome = forks.script("train_teacher.py", f"run_dir={folder / name}", *TINY, *more)
        assert outcome.code == 0, outcome.text
    return [folder / name for name in settings]


def test_comparison(forks: Forks, runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "comparison"
    outcome = forks.script("evaluate.py", *map(str, runs), f"out={out}", "pictures=1")
    assert outcome.code == 0, outcome.text
    page = out.with_name("comparison.md").read_text()
    figures = json.loads(out.with_name("comparison.json").read_text())["runs"]
    assert [figure["run"] for figure in figures] == [str(run) for run in runs]
    assert figures[0]["method"] == figures[1]["method"] != figures[2]["method"]
    assert out.with_name("comparison.png").stat().st_size > 1000
    assert str(runs[0].parent / "plain") in page.partition("Over seeds")[2].partition("IoU by class")[0]
    for run, figure in zip(runs, figures, strict=True):
        assert f"{100 * figure['miou']:.2f}" in page
        trained = json.loads((run / "results.json").read_text())
        assert figure["miou"] == pytest.approx(trained["best_miou"])
        assert 0 < figure["entropy"] < math.log(19)
        assert 0 < figure["ece"] < 1
        assert 0 < figure["class_correlation"] < 1
        saved = json.loads((run / "evaluation_val.json").read_text())
        assert saved["nll"] == figure["nll"]
        assert f"{figure['nll']:.4f}" in page.partition("calibration error")[2]
        assert len(list((run / "images").glob("val_*.png"))) == 1


def test_a_run_without_weights_yet(forks: Forks, runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    outcome = forks.script("evaluate.py", str(tmp_path))
    assert outcome.code == 2
    assert f"error: {tmp_path}: holds no weights yet (no best/); finish the run" in outcome.text


def test_without_a_run(forks: Forks) -> None:
    outcome = forks.script("evaluate.py")
    assert outcome.code == 2
    assert "error: runs: no run is named" in outcome.text


# ------------------------------------------------------------------------------------------ bias and variance


def figures(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.json").read_text())


def test_bias_and_variance(forks: Forks, runs: list[Path], tmp_path: Path) -> None:
    """The parts add up to the mean cross-entropy that the other mode measures; in one process and in two."""
    seeds, outs = [str(run) for run in runs[:2]], [tmp_path / "one", tmp_path / "two"]
    assert forks.script("evaluate.py", *seeds, f"out={tmp_path / 'scores'}", "pictures=1").code == 0
    nll = sum(run["nll"] for run in figures(tmp_path / "scores")["runs"]) / 2
    for ranks, out in enumerate(outs, 1):
        arguments = ["evaluate.py", *seeds, "mode=bias_variance", f"out={out}", "pictures=2", f"teacher={runs[2]}"]
        for outcome in forks.call("forks:run_script_file", *arguments, ranks=ranks):
            assert outcome.code == 0, outcome.text
    (found,), (again,) = (figures(out)["methods"] for out in outs)
    assert found["method"] == str(runs[0].parent / "plain")
    assert found["runs"] == seeds
    assert found["loss"] == pytest.approx(nll, abs=1e-6)
    assert found["bias"] + found["variance"] == pytest.approx(nll, abs=1e-6)
    assert abs(found["difference"]) < 1e-12
    assert found["noise"] == 0
    assert 0 < found["variance"] < found["bias"]
    for name in ("loss", "bias", "variance", "pixels"):
        assert again[name] == pytest.approx(found[name], rel=1e-12)
    assert again["regions"]["boundary"] == pytest.approx(found["regions"]["boundary"], rel=1e-9, abs=1e-12)
    page = (tmp_path / "one.md").read_text()
    road = found["classes"]["road"]
    assert f"{road['bias']:.3f} + {road['variance']:.3f}" in page
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.width > 5 * 256


def test_one_seed_has_no_variance(forks: Forks, runs: list[Path]) -> None:
    outcome = forks.script("evaluate.py", *map(str, runs), "mode=bias_variance")
    assert outcome.code == 2
    assert f"error: runs: {runs[2]}: no other run differs from it in the seed alone" in outcome.text
    outcome = forks.script("evaluate.py", str(runs[0]), str(runs[0]), "mode=bias_variance")
    assert outcome.code == 2
    assert f"error: {runs[0]}: has the seed and the method of {runs[0]}" in outcome.text


def test_a_teacher_that_is_not_there(forks: Forks, runs: list[Path], tmp_path: Path) -> None:
    arguments = [*map(str, runs[:2]), "mode=bias_variance", f"teacher={tmp_path}"]
    outcome = forks.script("evaluate.py", *arguments)
    assert outcome.code == 2
    assert f"error: {tmp_path / 'config.json'}: no such file" in outcome.text


def test_a_teacher_of_the_same_seed_is_no_other_method(tmp_path: Path) -> None:
    from evaluate import method

    def run(name: str, seed: int, teacher: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(f"run_dir: {name}\nseed: {seed}\nteacher: {{run: {teacher}}}\n")
        return folder

    assert method(run("a", 0, "runs/t-0")) == method(run("b", 1, "runs/t-1"))
    assert method(tmp_path / "a") != method(run("c", 1, "runs/t-0"))
    assert method(tmp_path / "a") != method(run("d", 0, "runs/u-0"))
