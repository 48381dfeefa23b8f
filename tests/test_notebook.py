"""The notebooks run from top to bottom on a tiny run, and their two forms hold the same cells."""

import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

HOUSE = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((HOUSE / "notebooks").glob("*.py"))
PICTURES = {"01_first_look": 3, "02_what_losses_see": 1}  # curves, IoU by class, predictions; maps
TINY = ["data.size=[32,64]", "data.scenes=8", "train.steps=4", "train.log_every=1", "train.evaluate_every=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, width in (("teacher", 4), ("student", 2)):
        command = [sys.executable, "train_teacher.py", f"run_dir={folder / name}", f"model.width={width}", *TINY]
        subprocess.run([*command, "model.depth=2"], cwd=HOUSE, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(runs))
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(HOUSE)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
    for table in (o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})):
        assert "teacher" in table
        assert "student" in table


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_forms_are_one_notebook(path: Path) -> None:
    """`make notebook` was called after the last change, and the .ipynb carries no outputs."""
    written, made = jupytext.read(path.with_suffix(".ipynb")), jupytext.read(path)
    assert [cell.source for cell in written.cells] == [cell.source for cell in made.cells]
    assert not any(cell.get("outputs") for cell in written.cells)
