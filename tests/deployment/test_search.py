"""The search for a student: its space, costs, proxy and front, and whole searches that are cut off and go on."""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from forks import Forks
from PIL import Image

import distill
import search_student
import train_teacher
from data import CITYSCAPES, DataConfig, build_dataset
from deploy import search
from deploy.profiling import count_flops, count_parameters
from deploy.search import SpaceConfig, draw, front_of, hopeless, naswot, rank_correlation, spread, widest
from engine.config import parse, run_script
from errors import ConfigurationError
from models import ModelConfig, build_model, load_model
from models.slimmable import SLIMMABLE, answer_as, cut_out, has_slice
from models.unet import UNet

optuna = pytest.importorskip("optuna", reason="optuna is not installed")

TINY = [
    "data.size=[32,64]",
    "data.scenes=8",
    "train.steps=4",
    "train.batch_size=4",
    "trial_steps=4",
    "trial_evaluate_every=2",
    "reference.width=8",
    "reference.depth=2",
    "space.width=[4,16]",
    "space.depth=[1,2]",
    "space.multiple=4",
    "finalists=1",
    "cost=parameters",
    "pruner=none",
]
BUDGET = 20_000
ONE = ["space.depth=[2]", "space.stride=[8]"]

Call = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that finds nothing gives up sooner."""
    monkeypatch.setattr(search_student, "DRAWS", 8)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a search in this process: its exit code, and what it printed or the line of its error."""

    def run(*arguments: object, script: Any = search_student) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        code = 0
        try:
            run_script(script.main, script.Config, runs=None if script is train_teacher else "teacher.run")
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (1 if code else 0), captured.err
        return code, lines[0] if lines else captured.out

    return run


def trials(run: Path) -> list[Any]:
    """All trials of a search, as they stand in its study."""
    return optuna.load_study(study_name="search", storage=f"sqlite:///{run / 'study.db'}").trials


def finished(run: Path) -> dict[int, tuple[str, float, Any]]:
    """Name, score and time of the trials that were trained, by number."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return {
        trial.number: (trial.user_attrs["name"], trial.user_attrs["miou"], trial.datetime_complete)
        for trial in trials(run)
        if trial.state in states
    }


# ------------------------------------------------------------------------------------------ space, cost, front


def fixed(**choices: Any) -> Any:
    return optuna.trial.FixedTrial(choices)


def test_channels_follow_width_and_growth_by_multiples() -> None:
    space = SpaceConfig(depth=[3], stride=[8], block=["plain"], width=[12], growth=[1.0, 1.5, 2.0], multiple=8)
    choices = {"depth": 3, "stride": 8, "block": "plain", "growth1": 2.0, "growth2": 1.5, "growth3": 1.0}
    (shape,) = draw(fixed(**choices, width=12), space, fill=False)
    assert shape == {"depth": 3, "stride": 8, "block": "plain", "channels": [16, 24, 40, 40]}
    free = SpaceConfig(depth=[3], stride=[8], width=[12], growth=[1.0, 1.5, 2.0], multiple=1)
    assert draw(fixed(**choices, width=12), free, fill=False)[0]["channels"] == [12, 24, 36, 36]


def test_with_a_budget_every_width_between_is_tried_once() -> None:
    space = SpaceConfig(depth=[1], stride=[4], block=["plain"], width=[8, 32], growth=[2.0], multiple=8)
    shapes = draw(fixed(depth=1, stride=4, block="plain", growth1=2.0), space, fill=True)
    channels = [shape["channels"] for shape in shapes]
    assert channels == sorted(channels)
    assert len(set(map(tuple, channels))) == len(channels)
    assert channels[0] == [8, 16]
    assert channels[-1] == [32, 64]
    assert [8, 24] in channels  # widths 10 and 11: finer than a level at a time
    assert all(count % 8 == 0 for pair in channels for count in pair)


def test_a_stride_that_the_depth_does_not_have_is_no_shape() -> None:
    space = SpaceConfig(depth=[1, 2], stride=[16], block=["plain"], growth=[2.0])
    choices = {"stride": 16, "block": "plain", "growth1": 2.0, "growth2": 2.0}
    assert draw(fixed(depth=1, **choices), space, fill=True) == []
    assert draw(fixed(depth=2, **choices), space, fill=True) != []


@pytest.mark.parametrize("most", [-1, 0, 3, 7.5, 20, 99])
def test_the_widest_within_a_budget_is_found(most: float) -> None:
    prices = [1, 2, 3, 5, 8, 13, 21]
    shapes = [{"channels": [number]} for number in range(len(prices))]
    asked: list[int] = []

    def cost(shape: Any) -> float:
        asked.append(shape["channels"][0])
        return prices[asked[-1]]

    affordable = [number for number, price in enumerate(prices) if price <= most]
    found = widest(shapes, cost, most)
    assert (found and found[0]["channels"][0]) == (affordable[-1] if affordable else None)
    assert found is None or found[1] == prices[affordable[-1]]
    assert len(asked) <= 3


def test_a_shape_that_nearly_spends_the_budget_is_enough() -> None:
    shapes = [{"channels": [number]} for number in range(101)]
    found = widest(shapes, lambda shape: shape["channels"][0], 51)
    assert found == (shapes[50], 50)  # the first that is asked for: no other is


@pytest.mark.parametrize("block", ["plain", "separable", "residual", "inverted"])
def test_costs_by_formula_are_those_of_the_model(block: str) -> None:
    shape = {"depth": 2, "stride": 8, "block": block, "channels": [8, 24, 16]}
    model = build_model(ModelConfig(**shape), CITYSCAPES)
    assert search.counted(shape, "parameters", 19, [40, 72]) == count_parameters(model)
    assert search.counted(shape, "flops", 19, [40, 72]) == count_flops(model, [40, 72])


def test_latency_is_relative_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    now, loads = [0.0], iter([1, 1, 5, 5, 1, 1, 9, 9])  # of the machine, at each pass

    def work(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds * next(loads)

        return run

    monkeypatch.setattr("deploy.profiling.time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = search.LatencyConfig(rounds=3, warmup=1)
    times = search.latencies({"reference": work(0.002), "candidate": work(0.003)}, config)
    assert times["reference"] == pytest.approx([10, 2, 18])
    assert search.ratio(times, "candidate") == pytest.approx(1.5)


def test_the_front_is_that_of_brute_force() -> None:
    generator = np.random.default_rng(0)
    for size in range(1, 40):
        costs, scores = generator.integers(0, 30, (2, size)).tolist()
        rows = [{"cost": c, "miou": s, "pruned": c % 7 == 0} for c, s in zip(costs, scores, strict=True)]
        whole = [(row["cost"], row["miou"]) for row in rows if not row["pruned"]]
        unbeaten = [
            (cost, score)
            for cost, score in whole
            if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in whole)
        ]
        assert [(row["cost"], row["miou"]) for row in front_of(rows)] == sorted(unbeaten)


def test_finalists_are_spread_over_the_front() -> None:
    front: list[Any] = ["cheapest", "cheap", "middle", "dear", "dearest"]
    assert spread(front, 3) == ["dearest", "middle", "cheapest"]
    assert spread(front[:2], 3) == ["cheap", "cheapest"]
    assert spread(front, 1) == ["dearest"]
    assert spread([], 3) == []


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, 2]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


# ------------------------------------------------------------------------------------------------- the proxy


def test_the_proxy_is_deterministic_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=4, depth=2), CITYSCAPES).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 64)
    score = naswot(model, images)
    assert naswot(model, images) == score
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks for part in model.modules())
    assert naswot(model, images[[0, 0, 1, 1]] + 1e-3 * images) < score  # nearly the same images: nearly singular


def test_the_proxys_kernel_counts_the_units_that_agree() -> None:
    class Signs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = torch.nn.ReLU()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.relu(images)

    images = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])  # of three units two agree
    assert naswot(Signs(), images) == pytest.approx(np.log(3 * 3 - 2 * 2))


def test_only_the_lowest_share_is_hopeless_and_only_among_enough() -> None:
    def study(scores: list[float]) -> Any:
        return SimpleNamespace(get_trials=lambda: [SimpleNamespace(user_attrs={"proxy": s}) for s in scores])

    many = study([float(score) for score in range(search.FIRST_RANDOM + 1)])
    assert hopeless(2.0, many, 0.25)
    assert not hopeless(3.0, many, 0.25)
    assert not hopeless(-5.0, study([1.0] * (search.FIRST_RANDOM - 1)), 0.25)


# ---------------------------------------------------------------------------------------------- whole searches


def test_a_search_ends_with_students(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "search"
    code, output = call(*TINY, f"run_dir={run}", "trials=4", f"budget={BUDGET}")
    assert code == 0
    rows = json.loads((run / "results.json").read_text())["trials"]
    assert len(rows) == len(finished(run)) == 4
    assert len({row["name"] for row in rows}) == 4
    assert all(row["parameters"] == row["cost"] <= BUDGET for row in rows)
    assert max(row["cost"] for row in rows) > 0.7 * BUDGET  # the budget is spent
    assert not list(run.glob("trials/*/checkpoints")) + list(run.glob("trials/*/best"))
    assert Image.open(run / "search.png").size[0] > 400

    best = max(rows, key=lambda row: row["miou"])
    paths = {path.stem: path for path in (run / "students").iterdir()}
    assert set(paths) == {"reference", best["name"]}
    given = yaml.safe_load(paths[best["name"]].read_text())
    assert set(given) == {"run_dir", "model", "data", "train"}  # no more than what differs
    config = parse(train_teacher.Config, [str(paths[best["name"]])])
    model = build_model(config.model, CITYSCAPES)
    assert count_parameters(model) == best["parameters"]
    finalist = run / "finalists" / best["name"]
    trained = load_model(finalist)
    assert {k: v.shape for k, v in trained.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    figures = json.loads((finalist / "results.json").read_text())
    code, output = call(paths[best["name"]], script=train_teacher)  # the very training of the finalist
    assert code == 0
    again = json.loads((run / "students" / best["name"] / "results.json").read_text())
    assert again["miou"] == figures["miou"]

    before = finished(run)
    code, output = call(run / "config.yaml", "resume=true", "trials=5")  # it may go on beyond its end
    assert code == 0
    assert {number: value for number, value in finished(run).items() if number in before} == before
    assert len(finished(run)) == 5
    code, line = call(run / "config.yaml", "resume=true", "space.depth=[2]")
    assert code == 2
    assert line.startswith("error: space.depth: differs from")
    assert len(finished(run)) == 5


def test_two_objectives_by_measured_latency(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "search"
    options = [
        "cost=latency",
        "latency.rounds=2",
        "sampler=nsga2",
        "trials=5",
        "finalists=2",
        "space.stride=[4,8]",
    ]
    code, output = call(*TINY, f"run_dir={run}", *options)
    assert code == 0
    found = json.loads((run / "results.json").read_text())
    assert len(found["trials"]) == 5
    assert all(trial.values == [row["miou"], row["cost"]] for trial, row in _pairs(run, found["trials"]))
    by_name = {row["name"]: row for row in found["trials"]}
    front = [by_name[name] for name in found["front"]]
    assert [row["cost"] for row in front] == sorted(row["cost"] for row in front)
    assert max(by_name.values(), key=lambda row: row["miou"])["miou"] == front[-1]["miou"]
    assert [row["name"] for row in found["finalists"]][0] == "reference"
    assert {row["name"] for row in found["finalists"][1:]} <= set(found["front"])
    assert 0 < found["reference"]["latency"] < 1000


def _pairs(run: Path, rows: list[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    known = {trial.number: trial for trial in trials(run)}
    return [(known[row["trial"]], row) for row in rows]


def test_a_teacher_answers_once_for_all_trials(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "search"
    data = [option for option in TINY if option.startswith(("data", "train"))]
    assert call(*data, "model.width=4", "model.depth=2", f"run_dir={teacher}", script=train_teacher)[0] == 0
    asked: list[int] = []
    genuine = load_model(teacher).__class__.forward

    def forward(self: Any, images: torch.Tensor, taps: Any = ()) -> Any:
        if self.channels == [4, 8, 16]:
            asked.append(len(images))
        return genuine(self, images, taps)

    monkeypatch.setattr("models.unet.UNet.forward", forward)
    options = [f"run_dir={run}", "trials=2", f"budget={BUDGET}", "space.width=[8,16]"]
    code, line = call(teacher, *TINY, *options)
    assert (code, "losses.kd" in line) == (2, True)  # nothing that it could teach
    asked.clear()
    code, output = call(teacher, *TINY, *options, "losses.kd.weight=1", "resume=false", f"run_dir={run}2")
    assert code == 0
    once = 2 + 1 + 8  # its score on two images, the size of an answer, the training images
    assert sum(asked) == once + 2 * 2  # and as ever its score at the start of each full training
    assert (teacher / "cache" / "shard_00000").is_dir()
    (path,) = [path for path in (tmp_path / "search2" / "students").iterdir() if path.stem != "reference"]
    config = parse(distill.Config, [str(path)], runs="teacher.run")
    assert (config.teacher.run, config.teacher.source, config.losses.kd is not None) == (
        str(teacher),
        "cache",
        True,
    )
    logs = [path.read_text() for path in (tmp_path / "search2/trials").glob("0*/metrics.jsonl")]
    assert len(logs) == 2
    assert all('"kd"' in log for log in logs)


def test_what_is_hopeless_is_discarded_before_training(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FIRST_RANDOM", 2)
    run = tmp_path / "search"
    options = ["proxy=naswot", "proxy_share=0.5", "trials=4", "finalists=0", f"budget={BUDGET}"]
    code, output = call(*TINY, f"run_dir={run}", *options)
    assert code == 0
    reasons = [trial.user_attrs.get("discarded", "") for trial in trials(run)]
    low = [trial for trial, reason in zip(trials(run), reasons, strict=True) if "low score" in reason]
    assert low
    assert all(trial.state == optuna.trial.TrialState.FAIL and "miou" not in trial.user_attrs for trial in low)
    assert len(finished(run)) == 4  # they are not among the trials that were asked for
    kept = [trial.user_attrs["proxy"] for trial in trials(run) if trial.number in finished(run)]
    assert max(trial.user_attrs["proxy"] for trial in low) < max(kept)
    known = json.loads((run / "results.json").read_text())["rank_correlation"]
    assert set(known) == {"proxy", "parameters", "flops", "cost"}


def test_a_trial_that_falls_behind_is_pruned(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "FIRST_RANDOM", 2)
    run = tmp_path / "search"
    code, output = call(*TINY, f"run_dir={run}", "pruner=median", "trials=6", "finalists=0", f"budget={BUDGET}")
    assert code == 0
    rows = json.loads((run / "results.json").read_text())["trials"]
    pruned = [row for row in rows if row["pruned"]]
    assert pruned
    assert all(row["steps"] == (2 if row["pruned"] else 4) for row in rows)
    assert len(rows) == 6
    firsts = {trial.number: (trial.intermediate_values[2], row["pruned"]) for trial, row in _pairs(run, rows)}
    for number, (value, gone) in firsts.items():
        earlier = [other for n, (other, out) in firsts.items() if n < number and not out]
        assert gone == (len(earlier) > 0 and value < np.median(earlier))


@pytest.mark.usefixtures("few_draws")
def test_a_space_that_is_used_up_ends_the_search(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "search"
    narrow = ["space.depth=[1]", "space.stride=[4]", "space.growth=[2.0]", "space.block=[plain,residual]"]
    code, output = call(*TINY, f"run_dir={run}", *narrow, "trials=5", "finalists=0", f"budget={BUDGET}")
    assert code == 0
    assert "the search ends with 2 trials" in output
    assert len(finished(run)) == 2


# -------------------------------------------------------------------------------------------- shared weights


@pytest.mark.parametrize("block", SLIMMABLE)
def test_a_slice_is_the_unet_of_the_first_channels(block: str) -> None:
    torch.manual_seed(0)
    wide = UNet(["a", "b", "c"], depth=2, stride=4, block=block, channels=[8, 16, 24])
    images = torch.randn(2, 3, 32, 48)
    before = {name: buffer.clone() for name, buffer in wide.named_buffers()}
    whole = answer_as(wide, [8, 16, 24], images).logits
    narrow = answer_as(wide, [4, 16, 10], images).logits
    assert all(torch.equal(buffer, before[name]) for name, buffer in wide.named_buffers())
    assert torch.equal(whole, wide.train()(images).logits)
    narrow.sum().backward()
    first = wide.get_parameter("stem.1.0.weight")
    assert first.grad is not None
    assert first.grad[:4, :2].abs().sum() > 0
    assert (
        first.grad[4:].abs().sum() == first.grad[:, 2:].abs().sum() == 0
    )  # the other channels know nothing of it
    last = wide.get_parameter(f"decoder.1.{'0' if block == 'plain' else '1'}.0.weight")
    assert last.grad is not None
    reads = last.grad.abs().sum((0, 2, 3)) > 0  # of 8 channels of the skip 4, of 16 from below all
    assert reads.tolist() == [True] * 4 + [False] * 4 + [True] * 16

    cut = cut_out(wide, [4, 16, 10], [images])
    assert not cut.training
    assert cut.channels == [4, 16, 10]
    assert torch.equal(cut.train()(images).logits, narrow)  # its weights are those
    means = cut_out(wide, [4, 16, 10], [images]).get_buffer("stem.0.1.running_mean")
    seen = F.conv2d(images, wide.get_parameter("stem.0.0.weight")[:2], stride=2, padding=1)
    torch.testing.assert_close(means, seen.mean((0, 2, 3)))  # and its statistics those of the batch


def test_only_what_is_no_wider_is_a_slice() -> None:
    wide = UNet(["a", "b"], depth=1, channels=[8, 16])
    assert has_slice(wide, [8, 16])
    assert has_slice(wide, [2, 12])
    assert not has_slice(wide, [10, 12])


def test_a_search_by_shared_weights(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "search"
    one = [*ONE, "space.block=[plain]", "method=slimmable"]
    options = [*one, "shared_channels=[16,24,40]", "shared_steps=6", "trials=4", f"budget={BUDGET}"]
    code, output = call(*TINY, f"run_dir={run}", *options)
    assert code == 0
    rows = json.loads((run / "results.json").read_text())["trials"]
    assert len({row["name"] for row in rows}) == 4
    shared = load_model(run / "shared")
    assert all(has_slice(shared, row["shape"]["channels"]) for row in rows)  # type: ignore[arg-type]
    assert len({row["miou"] for row in rows}) > 1
    logged = [json.loads(line) for line in (run / "shared" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["narrow"] > 0 for line in logged if line["split"] == "train")
    assert not list((run / "trials").glob("*/metrics.jsonl"))  # nothing else is trained for a trial
    best = max(rows, key=lambda row: row["miou"])
    assert (run / "finalists" / best["name"] / "best").is_dir()


# ------------------------------------------------------------------------------------------------ cut off


SEARCH = [*TINY, "trials=3", f"budget={BUDGET}"]


@pytest.mark.parametrize("where", ["trials/0001", pytest.param("finalists/reference", marks=pytest.mark.slow)])
def test_a_search_that_was_killed_goes_on(forks: Forks, tmp_path: Path, where: str) -> None:
    run = tmp_path / "search"
    outcome = forks.script("search_student.py", *SEARCH, f"run_dir={run}", kill_in_link=[str(run / where), 2])
    assert outcome.code == -signal.SIGKILL, outcome.text
    before = finished(run)
    states = [trial.state.name for trial in trials(run)]
    assert states.count("RUNNING") == (where == "trials/0001")
    outcome = forks.script("search_student.py", str(run / "config.yaml"), "resume=true")
    assert outcome.code == 0, outcome.text
    after = finished(run)
    assert {number: after[number] for number in before} == before  # nothing is done twice
    assert len(after) == len({name for name, _, _ in after.values()}) == 3
    known = trials(run)
    assert not any(trial.state.name in ("RUNNING", "WAITING") for trial in known)
    if where == "trials/0001":
        assert known[1].state.name == "FAIL"
        again = next(trial for trial in known[2:] if trial.params == known[1].params)
        assert again.state.name == "COMPLETE"  # its choices were taken up


@pytest.mark.slow
def test_sigterm_ends_a_search_and_it_goes_on(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "search"
    options = [*SEARCH, "finalists=0", f"run_dir={run}"]
    outcome = forks.script("search_student.py", *options, terminate_in_step=1)
    assert outcome.code == 143, outcome.text
    assert f"error: {run}: stopped by SIGTERM; go on with resume=true" in outcome.text
    outcome = forks.script("search_student.py", *options, "resume=true")
    assert outcome.code == 0, outcome.text
    assert len(finished(run)) == 3


def join(run: str, rank_arguments: list[str]) -> None:
    """In one of two processes: the first begins a search, the second joins it."""
    from forks import run_script_file

    rank = int(os.environ.pop("RANK"))
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    while rank and not Path(run, "study.db").exists():
        time.sleep(0.05)
    run_script_file("search_student.py", *rank_arguments, f"run_dir={run}", *(["resume=true"] if rank else []))


def test_two_processes_share_the_trials_and_finalists(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "search"
    options = [*TINY, "trials=6", f"budget={BUDGET}", "finalists=1"]
    outcomes = forks.call("deployment.test_search:join", str(run), options, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    after = finished(run)
    assert len(after) == len({name for name, _, _ in after.values()}) == 6
    said = [
        {int(line.split()[1][:-1]) for line in text.splitlines() if line.startswith("trial ")}
        for _, text in outcomes
    ]
    assert said[0] | said[1] == set(after)
    assert not said[0] & said[1]
    assert said[0]
    assert said[1]
    finalists = json.loads((run / "results.json").read_text())["finalists"]
    assert len(finalists) == 2
    written = [text.count(f"written: {run}/finalists/") for _, text in outcomes]
    assert sum(written) == 2


@pytest.mark.slow
def test_workers_end_with_the_search_that_started_them(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "search"
    options = [*TINY, "trials=400", "space.multiple=1", f"budget={BUDGET}", f"run_dir={run}", "workers=2"]
    outcome = forks.script("search_student.py", *options, kill_in_link=[str(run / "trials/0060"), 1])
    assert outcome.code in (-signal.SIGKILL, 0), outcome.text
    for _ in itertools.takewhile(lambda _: _alive(run), range(100)):
        time.sleep(0.2)
    assert not _alive(run)


def _alive(run: Path) -> bool:
    """Whether a process of this search is there."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"run_dir={run}".encode() in path.read_bytes():
                return True
        except OSError:
            continue  # it has just ended
    return False


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["budget=10"], ["budget: ", "in a row", "the cheapest costs"]),
        (["budget_ratio=0.0001"], ["budget_ratio: ", "the cheapest costs"]),
        (["budget=1000", "budget_ratio=1.0"], ["budget_ratio", "one of both"]),
        (["budget=-1"], ["budget", "above 0"]),
        (["cost=latency", "latency.runtime=tflite"], ["latency.runtime", "onnxruntime"]),
        (["sampler=nsga2", "budget=1000"], ["sampler", "two objectives"]),
        (["proxy=naswot"], ["proxy", "budget_ratio"]),
        (["space.block=[dense]"], ["space.block", "dense", "inverted"]),
        (["space.stride=[3]"], ["space.stride", "3"]),
        (["space.depth=[]"], ["space.depth"]),
        (["space.widht=[8]"], ["space.widht", "space.width"]),
        (["space.stride=[16]", "space.depth=[1]"], ["space: ", "no UNet of this stride"]),
        (["trials=0"], ["trials"]),
        (["method=slimmable"], ["space.depth", "one"]),
        (["method=slimmable", *ONE, "space.block=[residual]"], ["space.block", "plain or separable"]),
        (["method=slimmable", *ONE, "space.block=[plain]"], ["shared_channels", "give 3"]),
        (["shared_channels=[8,16]"], ["shared_channels", "method=slimmable"]),
        (["reference.stride=16", "reference.depth=1"], ["reference.stride"]),
        (["teacher.run=nowhere", "losses.kd.weight=1"], ["nowhere"]),
        (["teacher.run=nowhere", "teacher.source=live"], ["teacher.source", "cache"]),
    ],
)
def test_wrong_keys(call: Call, tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    code, line = call(*TINY, f"run_dir={tmp_path / 'search'}", *arguments)
    assert code == 2
    assert all(word in line for word in expected), line
    assert {path.name for path in tmp_path.glob("search/*")} <= {"config.yaml"}  # nothing is in the way


def test_what_is_not_installed_is_named(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, line = call(*TINY, f"run_dir={tmp_path / 'search'}")
    assert (code, line) == (2, "error: optuna: is not installed; pip install optuna")
    assert not (tmp_path / "search").exists()


def test_a_launcher_is_refused(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, line = call(*TINY, f"run_dir={tmp_path / 'search'}")
    assert code == 2
    assert line.startswith("error: workers: ")


def test_an_existing_search_is_refused(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "search"
    (run / "trials").mkdir(parents=True)
    code, line = call(*TINY, f"run_dir={run}")
    assert code == 2
    assert "resume=true" in line


def test_a_space_refuses_nonsense() -> None:
    for wrong in (
        {"growth": [-1.0]},
        {"width": [1]},
        {"multiple": 0},
        {"depth": [9]},
        {"block": ["plain", "plain"]},
    ):
        with pytest.raises(ConfigurationError, match="space"):
            SpaceConfig(**wrong)  # type: ignore[arg-type]


def test_decoded_images_are_kept() -> None:
    data = search_student.keep_decoded(build_dataset(DataConfig(size=[32, 64], scenes=4), "train"))
    assert data.read(1)[0] is data.read(1)[0]
