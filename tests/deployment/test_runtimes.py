"""Workers: turns, deaths, threads, memory and energy; and profile_latency.py over exported files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import profile_latency
from deploy import runtimes
from deploy.exported import RUNTIMES
from deploy.runtimes import (
    PARTS,
    BackendUnavailable,
    Energy,
    Measured,
    Work,
    Worker,
    Workers,
    find_gpus,
    measure,
    parse_backend,
)
from engine.config import parse, run_script
from errors import ConfigurationError
from evaluation.latency_report import read_csv
from models import ModelConfig, build_model

SIZE = (32, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    build_model(ModelConfig(width=4, depth=1), SimpleNamespace(names=("road", "sky", "car"))).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def run_with_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an exported file, as compress.py leaves it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from deploy.export import ExportConfig, export

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = build_model(ModelConfig(width=4, depth=1), SimpleNamespace(names=("road", "sky", "car")))
    network.save_pretrained(folder / "best")
    (folder / "config.yaml").write_text("data: {name: streets, size: [32, 64]}\n")
    scenes = profile_latency.draw_scenes(SIZE, 1)
    export(network, ExportConfig(formats=["onnx"]), folder / "export", scenes, run=str(folder), miou=0.25)
    return folder


def profile(*arguments: str) -> None:
    quick = ["rounds=2", "passes=1", "warmup=0", "device=cpu", "threads=1"]
    config = parse(profile_latency.Config, [*quick, *arguments], runs="runs", files=tuple(RUNTIMES))
    profile_latency.main(config)


def work(path: str, backend: str = "eager", **more: object) -> Work:
    return Work(
        **{"run": path, "backend": backend, "precision": "fp32", "batch": 1, "path": path, "size": SIZE} | more
    )  # type: ignore[arg-type]


def state(process: int) -> str:
    """A process's state as /proc tells it: T is stopped, Z dead; "" where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------ workers


def test_pytorch_shares_a_worker_that_stops_between_its_turns(model: str) -> None:
    eager, last = work(model), work(model, batch=2)
    with Workers(threads=1) as workers:
        seen = workers.load(eager, warmup=1)
        workers.load(last, warmup=0)
        assert workers.of[eager] is workers.of[last]
        process = workers.of[eager].process
        assert seen.start_ms > seen.load_ms > 0 < seen.first_ms
        assert wait_for(lambda: state(process.pid) == "T")
        times = workers.ask(eager, "turn", passes=3)["times_ms"]
        assert len(times) == 1 + 3
        assert all(time > 0 for time in times)
        assert wait_for(lambda: state(process.pid) == "T")
        assert len(os.listdir(f"/proc/{process.pid}/task")) == 1  # as many threads as asked for
        one, two = (workers.ask(each, "memory")["bytes"] for each in (eager, last))
        assert two - one >= 3 * 4 * SIZE[0] * SIZE[1]  # the second image at least
    assert process.returncode == -signal.SIGKILL


def test_works_take_turns_and_one_that_can_not_run_leaves_them(model: str) -> None:
    told: list[str] = []
    works = [work(model), work(model, "graphs"), work(model, batch=2)]
    measured, failed = measure(works, threads=3, rounds=2, passes=3, warmup=0, progress=told.append)
    assert failed == {works[1]: "CUDA graphs need a CUDA GPU"}
    assert list(measured) == [works[0], works[2]]
    assert all(len(seen.times_ms) == 2 * 3 for seen in measured.values())  # those that open a turn don't count
    assert [text.split()[0] for text in told] == ["load"] * 3 + ["round"] * 4
    assert [text.split()[1] for text in told[3:]] == ["1", "1", "2", "2"]


def test_a_worker_that_dies_is_a_reason_and_the_others_go_on(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dying, living = work(model, "channels_last"), work(model)
    load = Workers.load

    def load_alone(self: Workers, which: Work, warmup: int) -> Measured:
        self.pytorch = None  # each gets a worker of its own
        return load(self, which, warmup)

    ask = Workers.ask

    def ask_the_dead(self: Workers, which: Work, what: str, **options: object) -> dict[str, object]:
        if which == dying and what == "turn":
            self.of[which].process.kill()
        return ask(self, which, what, **options)

    monkeypatch.setattr(Workers, "load", load_alone)
    monkeypatch.setattr(Workers, "ask", ask_the_dead)
    measured, failed = measure([dying, living], threads=1, rounds=1, passes=1, warmup=0)
    assert list(measured) == [living]
    assert failed == {dying: "its process was ended by SIGKILL, out of memory perhaps"}


def test_a_worker_that_can_not_start_says_why() -> None:
    with pytest.raises(
        BackendUnavailable, match="ended with 1: ModuleNotFoundError: No module named 'no_runtime'"
    ):
        Worker("no_runtime", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_stopped_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal; from deploy.runtimes import Worker\n"
        "print(Worker('onnx', 1).process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pytest.importorskip("onnx")
    environment = os.environ | {"PYTHONPATH": str(runtimes.ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert wait_for(lambda: state(int(done.stdout)) in ("", "Z"))


@pytest.mark.parametrize(
    ("text", "expected"), [("eager", ("eager", "fp32")), ("openvino:int8", ("openvino", "int8"))]
)
def test_backends_are_read(text: str, expected: tuple[str, str]) -> None:
    assert parse_backend(text) == expected


# ------------------------------------------------------------------------------------------------- energy


def test_energy_is_read_and_a_counter_may_wrap_around(tmp_path: Path) -> None:
    for name, most in (("intel-rapl:0", 1000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 5)):
        zone = tmp_path / name
        zone.mkdir()
        (zone / "max_energy_range_uj").write_text(f"{most}\n")
        (zone / "energy_uj").write_text("900\n")
    energy = Energy(tmp_path)
    with energy.measure() as spent:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")  # 200 µJ on, over the end of its range
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("3000900\n")  # 3 J
        (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("5000000\n")  # a part of the first
    if not find_gpus():
        assert spent.joules == pytest.approx(3.0002)


def test_without_a_counter_nothing_is_known(tmp_path: Path) -> None:
    with Energy(tmp_path).measure() as spent:
        pass
    assert spent.joules is None or find_gpus()


# ------------------------------------------------------------------------------------------ exported files


def test_runtimes_of_a_run(run_with_files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backends = "backends=[eager,onnxruntime,onnxruntime:int8]"
    path = run_with_files / "export" / "onnx_fp32_32x64.onnx"
    before = set(path.parent.iterdir())
    profile(str(run_with_files), str(path), backends, "end_to_end=true", f"out={tmp_path}", "pareto=true")
    printed = capsys.readouterr().out
    assert set(path.parent.iterdir()) == before
    assert [word for word in PARTS if word in printed] == list(PARTS)
    report = json.loads((run_with_files / "latency.json").read_text())
    assert [(row["backend"], row["precision"]) for row in report["rows"]] == [
        ("eager", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
    ]
    eager, fp32, int8 = report["rows"]
    assert report["latency_ms"] == eager["median_ms"]
    assert fp32["speedup"] == pytest.approx(eager["median_ms"] / fp32["median_ms"])
    assert 2**20 < fp32["peak_memory_bytes"] < 2**29
    assert (eager["peak_memory_of"], int8["peak_memory_of"]) == ("tensors", "process")

    table, picture = sorted(tmp_path.iterdir())
    assert picture.suffix == ".png"
    *_, of_file = read_csv(table)
    assert (of_file["run"], of_file["backend"], of_file["miou"]) == (str(path), "onnxruntime", 0.25)
    assert of_file["speedup"] == pytest.approx(
        eager["median_ms"] / of_file["median_ms"]
    )  # of the run it belongs to


def test_the_file_of_a_run_is_taken_before_one_is_made(
    run_with_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: object) -> Path:
        raise ConfigurationError("made")

    monkeypatch.setattr(profile_latency, "make_export", make)
    model = profile_latency.load_model(str(run_with_files))
    left_out: dict[str, dict[str, str]] = {"run": {}}
    for batch, expected in ((1, ["onnx_fp32_32x64.onnx"]), (2, [])):  # it takes one image
        works = profile_latency.model_works(
            {str(run_with_files): model},
            [("onnxruntime", "fp32")],
            profile_latency.Config(batch=batch),
            SIZE,
            "cpu",
            run_with_files,
            left_out | {str(run_with_files): {}},
        )
        assert [Path(each.path).name for each in works] == expected


def end_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit code and last line of the script."""
    monkeypatch.setattr("sys.argv", ["profile_latency.py", "threads=1", *arguments])
    with pytest.raises(SystemExit) as end:
        run_script(profile_latency.main, profile_latency.Config, runs="runs", files=tuple(RUNTIMES))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return int(end.value.code or 0), error


def test_errors_of_files_are_one_line_with_an_exit_code(
    run_with_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_with_files / "export" / "onnx_fp32_32x64.onnx"
    code, error = end_of(monkeypatch, capsys, str(path), "size=[64,64]")
    assert code == 2
    assert f"{path}: takes images of 32x64, not 64x64" in error

    code, error = end_of(monkeypatch, capsys, "runs=[no/such.onnx]")
    assert code == 2
    assert "no/such.onnx: no such file" in error

    damaged = tmp_path / path.name
    damaged.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / f"{path.name}.json").write_bytes(path.with_name(f"{path.name}.json").read_bytes())
    code, error = end_of(monkeypatch, capsys, str(damaged))
    assert code == 3
    assert str(damaged) in error

    (tmp_path / f"{path.name}.json").unlink()
    code, error = end_of(monkeypatch, capsys, str(damaged))
    assert code == 3
    assert "json: missing" in error

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    code, error = end_of(monkeypatch, capsys, str(path))
    assert code == 2
    assert "onnxruntime is not installed; pip install onnxruntime" in error
