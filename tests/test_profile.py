"""Costs of models against hand computations, and profile_latency.py from its command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import profile_latency
from deploy.profiling import (
    BackendUnavailable,
    Prepared,
    count_flops,
    count_parameters,
    measure_latency,
    peak_allocation,
    peak_memory,
    prepare,
    summarise,
)
from engine.config import parse, run_script
from errors import ConfigurationError
from models import ModelConfig, build_model


def tiny_run(folder: Path, config: str = "data: {name: streets, size: [32, 64]}\n") -> Path:
    """A run as a training leaves it: best weights and a configuration."""
    torch.manual_seed(0)
    labels = SimpleNamespace(names=("road", "sky", "car"))
    build_model(ModelConfig(width=2, depth=1), labels).save_pretrained(folder / "best")
    (folder / "config.yaml").write_text(config)
    return folder


def profile(*arguments: str) -> None:
    quick = ["rounds=2", "warmup=1", "device=cpu"]
    profile_latency.main(parse(profile_latency.Config, [*quick, *arguments], runs="runs"))


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


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tiny_run(tmp_path / "first"), tiny_run(tmp_path / "second")
    profile(str(first), str(second), "batch=2", "backends=[eager,channels_last]")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    headings = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert headings == ["run", "params", "FLOPs", "backend", "median ms", "p95 ms", "images/s", "peak memory"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [str(first)] * 2 + [str(second)] * 2

    report = json.loads((first / "latency.json").read_text())
    assert report["size"] == [32, 64]
    assert report["batch"] == 2
    assert report["threads"] == torch.get_num_threads()
    assert report["precision"] == "fp32"
    assert report["torch"] == torch.__version__
    assert report["parameters"] > 0
    assert report["flops"] > 0
    assert list(report["backends"]) == ["eager", "channels_last"]
    eager = report["backends"]["eager"]
    assert report["latency_ms"] == eager["median_ms"] <= eager["p95_ms"]
    assert eager["images_per_second"] == pytest.approx(2000 / eager["median_ms"])
    assert eager["peak_memory_bytes"] > 4 * report["parameters"]
    assert report["left_out"] == {}
    assert (second / "latency.json").is_file()


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
    assert list(report["backends"]) == ["eager"]
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
    with pytest.raises(ConfigurationError, match="backends: none of compile"):
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
