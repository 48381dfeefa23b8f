"""Costs of models against hand computations, and profile_latency.py from its command line."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

import profile_latency
from deploy.exported import RUNTIMES
from deploy.profiling import (
    Prepared,
    count_flops,
    count_parameters,
    measure_latency,
    peak_allocation,
    peak_memory,
    prepare,
    profile_layers,
    summarise,
)
from deploy.runtimes import BackendUnavailable
from engine.config import parse, run_script
from errors import ConfigurationError, DamagedFileError
from evaluation.data_report import write_csv
from evaluation.latency_pictures import LayerPoint, Point, draw_pareto, draw_roofline, pareto_front, place_labels
from evaluation.latency_report import COLUMNS, comparison_table, file_name, read_csv
from models import ModelConfig, build_model


def tiny_run(folder: Path, config: str = "data: {name: streets, size: [32, 64]}\n") -> Path:
    """A run as a training leaves it: best weights and a configuration."""
    torch.manual_seed(0)
    labels = SimpleNamespace(names=("road", "sky", "car"))
    build_model(ModelConfig(width=2, depth=1), labels).save_pretrained(folder / "best")
    (folder / "config.yaml").write_text(config)
    return folder


def profile(*arguments: str) -> None:
    quick = ["rounds=2", "passes=1", "warmup=1", "device=cpu", "threads=1"]
    files = tuple(RUNTIMES)
    profile_latency.main(parse(profile_latency.Config, [*quick, *arguments], runs="runs", files=files))


def test_flops_of_a_convolution_by_hand() -> None:
    model = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    assert count_flops(model, (20, 30)) == 2 * (10 * 15) * 8 * (3 * 3 * 3)
    depthwise = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
    assert count_flops(depthwise, (7, 9)) == 2 * (7 * 9) * 3 * (5 * 5)


class Attention(nn.Module):
    """Pixels attend to pixels, by PyTorch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)[:, None]
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_flops_of_attention_by_hand() -> None:
    positions = 5 * 7
    assert count_flops(Attention(), (5, 7)) == 2 * positions * 3 * 8 + 2 * 2 * positions**2 * 8


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, (8, 8))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert count_parameters(model) == 3 * 8 * 9 + 8 + 2 * 8  # running statistics are buffers
    assert count_parameters(nn.ModuleList([model, model])) == count_parameters(model)


def test_peak_allocation_by_hand() -> None:
    def work() -> None:
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        third = second.double()  # 12000: the peak
        del second, third
        torch.ones(2000)  # 8000

    assert peak_allocation(work, torch.device("cpu")) == 12000


def test_peak_memory_has_weights_input_and_activations() -> None:
    model = nn.Conv2d(3, 5, 1, bias=False)
    image = torch.zeros(1, 3, 16, 16)
    weights, output = 4 * 3 * 5, 4 * 5 * 16 * 16
    measured = peak_memory(prepare(model, image, "eager"))
    assert measured >= weights + 4 * image.numel() + output
    assert measured < 3 * (weights + 4 * image.numel() + output)  # the convolution's own scratch space


def test_rounds_take_the_passes_in_turn_and_leave_out_the_warm_up() -> None:
    calls: list[str] = []
    passes = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure_latency(passes, rounds=2, warmup=1, progress=lambda: calls.append("|"))
    assert "".join(calls) == "ab|ab|ab|"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_summary_of_times() -> None:
    values = summarise([float(number) for number in range(1, 102)], batch=4)
    assert values == {"median_ms": 51.0, "p95_ms": 96.0, "images_per_second": pytest.approx(4000 / 51)}


def test_backends_give_the_same_answer_and_leave_the_model_alone() -> None:
    model = build_model(ModelConfig(width=4, depth=1), SimpleNamespace(names=("a", "b"))).train()
    image = torch.randn(2, 3, 20, 24)
    eager, last = (prepare(model, image, backend) for backend in ("eager", "channels_last"))
    torch.testing.assert_close(eager.run(eager.images).logits, last.run(last.images).logits)
    assert last.images.is_contiguous(memory_format=torch.channels_last)
    assert model.training
    assert next(model.parameters()).requires_grad


def test_bf16_converts_the_copy() -> None:
    prepared = prepare(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16), "eager")
    assert isinstance(prepared, Prepared)
    assert prepared.run(prepared.images).dtype == torch.bfloat16


def test_table_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tiny_run(tmp_path / "first"), tiny_run(tmp_path / "second")
    (second / "results.json").write_text('{"split": "val", "miou": 0.5}')
    out = tmp_path / "out"
    profile(str(first), str(second), "batch=2", "backends=[eager,channels_last:bf16]", f"out={out}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    headings = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert headings == [
        "run", "params", "FLOPs", "backend", "precision", "batch", "median ms", "p95 ms", "images/s", "speed ×",
        "peak memory", "cold start ms", "load ms",
    ]  # fmt: skip
    assert [line.split("|")[1].strip() for line in lines[2:]] == [str(first)] * 2 + [str(second)] * 2

    report = json.loads((first / "latency.json").read_text())
    assert report["size"] == [32, 64]
    assert report["threads"] == 1
    assert report["torch"] == torch.__version__
    assert report["parameters"] > 0
    assert report["flops"] > 0
    assert report["left_out"] == {}
    eager, last = report["rows"]
    assert [(row["backend"], row["precision"], row["batch"]) for row in (eager, last)] == [
        ("eager", "fp32", 2),
        ("channels_last", "bf16", 2),
    ]
    assert report["latency_ms"] == eager["median_ms"] <= eager["p95_ms"]
    assert eager["images_per_second"] == pytest.approx(2000 / eager["median_ms"])
    assert eager["speedup"] == 1
    assert last["speedup"] == pytest.approx(eager["median_ms"] / last["median_ms"])
    assert eager["peak_memory_bytes"] > 4 * report["parameters"]
    assert last["peak_memory_bytes"] < eager["peak_memory_bytes"]  # bf16
    assert eager["start_ms"] > eager["load_ms"] > 0

    (path,) = out.iterdir()
    assert path.name.endswith("_eager-fp32+channels_last-bf16_32x64_batch2_threads1.csv")
    rows = read_csv(path)
    assert rows[0] == {name: eager[name] for name in COLUMNS}
    assert [row["run"] for row in rows] == [str(first)] * 2 + [str(second)] * 2
    assert [row["miou"] for row in rows] == [None, None, 0.5, None]  # bf16 was not evaluated


def test_a_model_configuration_needs_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    profile("model.width=2", "model.depth=1", "classes=3", "size=[16,16]", "backends=[eager]")
    out = capsys.readouterr().out
    assert "untrained model" in out
    assert "written" not in out


def test_without_a_compiler_its_absence_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    profile(str(run), "backends=[eager,compile]")
    printed = capsys.readouterr()
    assert "compile is left out: there is no C++ compiler" in printed.out + printed.err
    report = json.loads((run / "latency.json").read_text())
    assert [row["backend"] for row in report["rows"]] == ["eager"]
    assert "no C++ compiler" in report["left_out"]["compile"]


def test_a_failing_compilation_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> object:
        def call(_: object) -> None:
            raise torch._inductor.exc.CppCompileError(["c++"], "Python.h: no such file")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(BackendUnavailable, match="torch.compile fails: C\\+\\+ compile error"):
        prepare(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 8, 8), "compile")


def test_only_compile_left_and_no_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="backends: nothing .* C\\+\\+ compiler"):
        profile(str(run), "backends=[compile]")
    assert not (run / "latency.json").exists()


@pytest.mark.slow
def test_compile_gives_the_same_answer() -> None:
    model = build_model(ModelConfig(width=4, depth=1), SimpleNamespace(names=("a", "b"))).eval()
    image = torch.randn(1, 3, 20, 24)
    try:
        compiled = prepare(model, image, "compile")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        torch.testing.assert_close(compiled.run(compiled.images).logits, model(image).logits)
    assert peak_memory(compiled) > 4 * count_parameters(model)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("data: {name: camvid, size: null, crop: [240, 320]}", [360, 480]),  # a crop is for training alone
        ("data: {name: camvid, size: [180, 240]}", [180, 240]),
        ("data: {name: streets, size: null}", [128, 256]),
        ("data: {name: elsewhere, size: null}", None),
    ],
)
def test_evaluation_size_of_a_run(tmp_path: Path, config: str, expected: list[int] | None) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert profile_latency.evaluation_size(tmp_path) == expected


def test_runs_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "first")
    second = tiny_run(tmp_path / "second", "data: {name: camvid, size: null}\n")
    with pytest.raises(ConfigurationError, match=r"size: .*32x64.*360x480.*give size=\[h,w\]"):
        profile(str(first), str(second))


@pytest.mark.parametrize("config", ["data: [", "seed: 0", "data: {name: camvid, size: 7}", "- 1"])
def test_unreadable_configuration_is_one_line(tmp_path: Path, config: str) -> None:
    run = tiny_run(tmp_path / "run", config)
    with pytest.raises(ConfigurationError, match=r"config.yaml: does not tell data.size"):
        profile(str(run))


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("size=[3]", "size"),
        ("batch=0", "batch"),
        ("rounds=0", "rounds"),
        ("backends=[eager,tensor]", "backends"),
        ("backends=[]", "backends"),
        ("backends=[eager,eager]", "backends"),
        ("backends=[eager,eager:fp32]", "backends"),
        ("backends=[eager:int8]", "backends: 'eager:int8' is not possible; eager has fp32, bf16, fp16"),
        ("backends=[onnxruntime:bf16]", "backends: 'onnxruntime:bf16'"),
        ("batch=[]", "batch"),
        ("batch=[1,0]", "batch"),
        ("batch=many", "batch"),
        ("passes=0", "passes"),
        ("image=nowhere.jpg", "image"),
        ("pareto=true", "pareto"),
        ("compare=[nowhere.csv]", "compare: nowhere.csv"),
        ("runs=[nowhere]", "nowhere"),
    ],
)
def test_wrong_keys_are_named(argument: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}"):
        profile(argument)


def test_a_missing_run_ends_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["profile_latency.py", "runs/no-such-run"])
    with pytest.raises(SystemExit) as end:
        run_script(profile_latency.main, profile_latency.Config, runs="runs")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "runs/no-such-run: no such file or run directory" in error


def test_layers_have_the_flops_and_the_parameters_of_the_model() -> None:
    model = build_model(ModelConfig(width=4, depth=2), SimpleNamespace(names=("a", "b")))
    layers = profile_layers(model, torch.randn(1, 3, 32, 48), rounds=2, warmup=1)
    assert [layer.name for layer in layers][0] == "stem.0.0"
    assert layers[-1].name == "between the layers"
    assert layers[-1].flops == 0
    assert sum(layer.flops for layer in layers) == count_flops(model, (32, 48))
    assert sum(layer.parameters for layer in layers) == count_parameters(model)
    assert all(layer.milliseconds > 0 for layer in layers)
    stem = layers[0]  # 3 -> 2 channels, 3x3, stride 2
    assert (stem.kind, stem.parameters, stem.flops) == ("Conv2d", 54, 2 * 16 * 24 * 54)
    assert stem.bytes == 4 * (3 * 32 * 48 + 2 * 16 * 24 + 54)
    assert stem.intensity == stem.flops / stem.bytes


def test_hooks_are_put_on_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    profile_layers(model, torch.randn(1, 3, 8, 8), rounds=1, warmup=0)
    assert not any(module._forward_hooks for module in model.modules())


def row(run: str, backend: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    """A line of the CSV."""
    known = dict.fromkeys(COLUMNS) | {"precision": "fp32", "batch": 1, "height": 32, "width": 64, "threads": 2}
    return known | {"run": run, "backend": backend, "median_ms": milliseconds, "device": "Fast(R) Chip 9"} | more


def test_files_are_compared_row_by_row() -> None:
    first = [row("a", "eager", 10.0), row("a", "openvino", 4.0), row("b", "eager", 3.0)]
    second = [row("a", "openvino", 1.0), row("a", "eager", 30.0), row("a", "eager", 7.0, batch=2)]
    lines = [
        [c.strip() for c in line.strip("|").split("|")] for line in comparison_table([first, second]).splitlines()
    ]
    assert lines[0] == ["run", "backend", "precision", "batch", "1: ms", "2: ms", "2: ×"]
    assert lines[2:] == [
        ["a", "eager", "fp32", "1", "10.0", "30.0", "3.00"],
        ["a", "openvino", "fp32", "1", "4.00", "1.00", "0.25"],
        ["b", "eager", "fp32", "1", "3.00", "–", "–"],
        ["a", "eager", "fp32", "2", "–", "7.00", "–"],
    ]


def test_a_csv_is_named_by_what_is_in_it() -> None:
    rows = [row("a", "eager", 1), row("a", "openvino", 1, precision="bf16"), row("b", "eager", 1, batch=4)]
    rows.append(row("b", "openvino", 1, precision="int8"))
    assert file_name(rows) == "fast-chip-9_eager-fp32+openvino-bf16-int8_32x64_batch1-4_threads2"


@pytest.mark.parametrize("text", ["", "run,backend\na,eager\n", ",".join(COLUMNS), ",".join(COLUMNS) + "\na,b"])
def test_a_damaged_csv_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DamagedFileError, match=r"a\.csv: .*; measure it again"):
        profile(f"compare=[{tmp_path / 'a.csv'}]")


def test_compared_files_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, milliseconds in (("slow", 20.0), ("fast", 5.0)):
        write_csv(tmp_path / f"{name}.csv", [row("a", "eager", milliseconds, miou=0.5)], list(COLUMNS))
    files = f"compare=[{tmp_path / 'slow.csv'},{tmp_path / 'fast.csv'}]"
    profile(files, "pareto=true", f"out={tmp_path / 'out'}")
    assert "0.25" in capsys.readouterr().out
    assert (tmp_path / "out" / "compared.png").stat().st_size > 10_000


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point(*values) for values in (("a", "", 1, 0.5), ("b", "", 2, 0.4), ("c", "", 3, 0.6), ("d", "", 3, 0.55))
    ]
    assert [point.label for point in pareto_front(points)] == ["a", "c"]
    same = [Point("e", "", 1, 0.5), Point("f", "", 1, 0.5)]
    assert len(pareto_front(same)) == 2


def test_labels_cover_neither_points_nor_one_another() -> None:
    axes = Figure(figsize=(8, 5)).add_subplot()
    places = [(0.01 * number, 0.02 * (number % 3)) for number in range(12)]
    axes.scatter(*zip(*places, strict=True))
    texts = place_labels(axes, places, [f"a longer label {number}" for number in range(12)], [False] * 12)
    assert len(texts) >= 10
    renderer = axes.figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    points = axes.transData.transform(places)
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_pictures_of_one_point_and_of_layers(tmp_path: Path) -> None:
    draw_pareto([Point("a", "eager", 3.0, 0.5)], tmp_path / "new" / "one.png")
    layers = [LayerPoint("stem", "Conv2d", 2.5, 1e9, 0.4), LayerPoint("head", "Linear", 40.0, 9e9, 0.1)]
    draw_roofline(layers, (5e10, 1e10), tmp_path / "roofline.png", "a title")
    for path in (tmp_path / "new" / "one.png", tmp_path / "roofline.png"):
        assert cv2.imread(str(path)).std() > 5


def test_miou_is_that_of_the_split(tmp_path: Path) -> None:
    assert profile_latency.miou_of_run(tmp_path, "val") is None
    (tmp_path / "results.json").write_text('{"split": "val", "miou": 0.4}')
    assert profile_latency.miou_of_run(tmp_path, "test") is None
    assert profile_latency.miou_of_run(tmp_path, "val") == 0.4
    (tmp_path / "evaluation_test.json").write_text('{"split": "test", "miou": 0.3}')
    assert profile_latency.miou_of_run(tmp_path, "test") == 0.3


def test_a_missing_runtime_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.runtimes.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="^backends: openvino is not installed; pip install openvino"):
        profile("backends=[eager,openvino]")
