"""Several processes: as many as were asked for, one run, the gradient and the score of one process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from forks import ROOT, Forks, Outcome

LAUNCHERS = ROOT / "configs/accelerate"
SMALL = [
    "data.size=[32,64]",
    "data.scenes=8",
    "train.batch_size=4",
    "train.steps=6",
    "train.log_every=1",
    "train.evaluate_every=3",
    "train.checkpoint_every=3",
    "train.threads=1",
]
TEACHER = [*SMALL, "model.width=4", "model.depth=2", "train.ema=0.9"]
STUDENT = [
    *SMALL,
    "student.width=4",
    "student.depth=2",
    "losses.fitnet.weight=1",
    "losses.fitnet.start=2",
    "losses.fitnet.until=4",
]


def launch(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with the arguments, in the project's folder."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def processes(run: Path) -> int:
    return json.loads((run / "environment.json").read_text())["processes"]


def completed(outcomes: list[Outcome], code: int = 0) -> list[Outcome]:
    assert [outcome.code for outcome in outcomes] == [code] * len(outcomes), outcomes
    return outcomes


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed([forks.script("train_teacher.py", f"run_dir={run}", *TEACHER)])
    return run


# ------------------------------------------------------------------------------------------- the launcher


@pytest.mark.timeout(600)
def test_launcher_starts_two_that_share_a_run(teacher: Path, tmp_path: Path) -> None:
    """With an adapter whose term is in force at steps 2 and 3 alone: DDP waits for its gradient at the others."""
    run = tmp_path / "run"
    config = str(LAUNCHERS / "two_cpu.yaml")
    done = launch("--config_file", config, "distill.py", str(teacher), f"run_dir={run}", *STUDENT)
    assert done.returncode == 0, done.stderr
    assert processes(run) == 2
    lines = metrics(run)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert ["fitnet" in line for line in lines if line["split"] == "train"] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert [line["step"] for line in lines if line["split"] == "val"] == [3, 6]
    for said in ("step 3: val mIoU", "finished: val mIoU"):
        assert done.stdout.count(said) == 1
    assert json.loads((run / "results.json").read_text())["steps"] == 6


@pytest.mark.timeout(600)
def test_launcher_that_starts_fewer_is_an_error(tmp_path: Path) -> None:
    """`--cpu --num_processes 2` starts one process and says nothing; the run does."""
    done = launch("--cpu", "--num_processes", "2", "train_teacher.py", f"run_dir={tmp_path / 'run'}", *TEACHER)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "asked for several processes, it started one" in errors[0]
    assert not (tmp_path / "run").exists()


def test_launcher_files() -> None:
    """Each asks for what its name says and leaves the precision to the run."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in LAUNCHERS.glob("*.yaml")}
    expected = {"two_cpu": (1, 2), "one_gpu": (1, 1), "eight_gpus": (1, 8), "two_nodes": (2, 16)}
    assert {name: (file["num_machines"], file["num_processes"]) for name, file in files.items()} == expected
    for name, file in files.items():
        assert file["distributed_type"] == ("NO" if name == "one_gpu" else "MULTI_GPU")
        assert file["mixed_precision"] == "no"
        assert file.get("use_cpu", False) == (name == "two_cpu")


# --------------------------------------------------------------------------------- the numbers of one process


@pytest.fixture(scope="module")
def gradients(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """(processes, accumulated parts) -> the gradient of one step."""
    folder, found = tmp_path_factory.mktemp("gradients"), {}
    for ranks, parts in ((1, 1), (2, 1), (1, 2), (2, 2)):
        output = folder / f"{ranks}_{parts}.pt"
        completed(forks.call("ranks:gradients", str(output), parts, ranks=ranks))
        found[ranks, parts] = torch.load(output, weights_only=True)
    return found


@pytest.mark.parametrize("split", [(2, 1), (1, 2), (2, 2)], ids=["processes", "parts", "both"])
def test_gradient_is_that_of_the_whole_batch(
    gradients: dict[tuple[int, int], dict[str, Any]], split: tuple[int, int]
) -> None:
    """In float64, with unequal numbers of void pixels and all terms; the logged values too."""
    whole, found = gradients[1, 1], gradients[split]
    assert found["processes"] == split[0]
    assert found["teacher_untouched"]  # not its batch-norm's statistics either
    assert torch.equal(found["draw"], whole["draw"])  # random numbers are those of seed, step and process
    assert found["gradients"].keys() == whole["gradients"].keys()
    scale = max(float(gradient.abs().max()) for gradient in whole["gradients"].values())
    assert scale > 1e-3
    for name, gradient in whole["gradients"].items():
        assert gradient.dtype == torch.float64
        assert gradient.any(), name
        assert float((found["gradients"][name] - gradient).abs().max()) <= 1e-10 * float(gradient.abs().max()), (
            name
        )
    assert found["logged"].keys() == whole["logged"].keys()
    for name, value in whole["logged"].items():
        assert found["logged"][name] == pytest.approx(value, rel=1e-10), name


def test_matrix_does_not_depend_on_processes(forks: Forks, tmp_path: Path) -> None:
    """The matrix of 1, 2, 3 and 4 processes over 1, 5, 7 and 8 images: no image is left out or counted twice."""
    found = {}
    for ranks in (1, 2, 3, 4):
        completed(forks.call("ranks:matrices", str(tmp_path / str(ranks)), [1, 5, 7, 8], ranks=ranks))
        saved = torch.load(tmp_path / str(ranks), weights_only=True)
        assert saved["processes"] == ranks
        found[ranks] = saved["matrices"]
    for number, matrix in found[1].items():
        assert matrix.dtype == torch.int64
        assert 0.9 * number * 32 * 64 < int(matrix.sum()) <= number * 32 * 64
        for ranks in (2, 3, 4):
            assert torch.equal(found[ranks][number], matrix), (ranks, number)


# ------------------------------------------------------------------------------------ cut off, and failing


def state(run: Path) -> list[torch.Tensor]:
    saved = torch.load(run / "checkpoints/step_00000006/state.pt", weights_only=True)["players"][0]
    moments = [v for entry in saved["optimizer"]["state"].values() for v in entry.values()]
    return [*saved["learner"].values(), *saved["ema"].values(), *moments]


def test_two_processes_resume_exactly(forks: Forks, tmp_path: Path) -> None:
    """Killed together; or one is told to end, and both save and say so once."""
    script = ("forks:run_script_file", "train_teacher.py")
    whole = tmp_path / "whole"
    completed(forks.call(*script, f"run_dir={whole}", *TEACHER, ranks=2))
    assert processes(whole) == 2
    for number, (event, code) in enumerate([({"kill_in_step": 4}, -9), ({"terminate_rank_in_step": [1, 3]}, 143)]):
        run = tmp_path / str(number)
        outcomes = completed(forks.call(*script, f"run_dir={run}", *TEACHER, ranks=2, **event), code)
        if code == 143:
            assert "stopped by SIGTERM at step 4, saved" in outcomes[0].text
        completed(forks.call(*script, str(run / "config.yaml"), "resume=true", ranks=2))
        assert all(torch.equal(a, b) for a, b in zip(state(run), state(whole), strict=True))
        logs = [[{k: v for k, v in line.items() if k != "system"} for line in metrics(r)] for r in (run, whole)]
        assert logs[0] == logs[1]


def test_batch_that_does_not_split_is_named(forks: Forks, tmp_path: Path) -> None:
    outcomes = forks.call(
        "forks:run_script_file",
        "train_teacher.py",
        f"run_dir={tmp_path / 'run'}",
        *TEACHER,
        "train.batch_size=3",
        ranks=2,
    )
    completed(outcomes, 2)
    assert "error: train.batch_size: 3 is not a multiple of 2 processes" in outcomes[0].text


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Two processes in a long training, past their first steps."""
    run = tmp_path / "run"
    config = str(LAUNCHERS / "two_cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "train_teacher.py"]
    process = subprocess.Popen(
        [*command, f"run_dir={run}", *TEACHER, "train.steps=100000", "train.evaluate_every=0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=(tmp_path / "errors").open("w"),
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    yield process, run
    for one in family:
        if one.is_running():
            one.kill()
    process.kill()
    process.wait()


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [one for one in family if any("train_teacher.py" in part for part in one.cmdline()[1:3])]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_dies_and_all_end(launched: tuple["subprocess.Popen[str]", Path]) -> None:
    """Within half a minute, and none stays."""
    process, _ = launched
    ranks = workers_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(30) != 0
    assert not [one for one in ranks if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launcher_told_to_end_saves(launched: tuple["subprocess.Popen[str]", Path]) -> None:
    """SIGTERM to the launcher alone reaches the processes, which save a step without a checkpoint of its own."""
    process, run = launched
    before = {path.name for path in (run / "checkpoints").glob("step_*")}
    process.terminate()
    assert process.wait(60) != 0
    assert "saved; go on with resume=true" in (run.parent / "errors").read_text()
    assert {path.name for path in (run / "checkpoints").glob("step_*")} - before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_on_cpus(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, "train_teacher.py", f"run_dir={run}", *TEACHER], cwd=ROOT, env=environment, check=True
    )
    assert processes(run) == 2
