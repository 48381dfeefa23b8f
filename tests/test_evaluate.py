"""evaluate.py over several runs: tables, figures and pictures, and seeds of one method summed up."""

import json
from pathlib import Path

import pytest
from forks import Forks

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
