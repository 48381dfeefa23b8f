"""The objective: sums, schedules, mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, CONFIGS, STUDENT_TAPS, TEACHER_TAPS, WEIGHTS, Answer, answers, objective
from plain import eager

import distill
from data import CAMVID
from engine.config import parse
from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.features import AttentionTransferConfig, FitnetConfig, ReviewConfig, attention_transfer
from losses.latent import AffinityConfig, KTAConfig
from losses.logits import CWDConfig, KDConfig
from losses.supervised import CrossEntropyConfig
from losses.term import TemperatureConfig, TermConfig
from models import ModelConfig, build_model

ROOT = Path(__file__).resolve().parents[2]


def test_objective_is_the_weighted_sum() -> None:
    student, teacher, labels = answers()
    config = LossConfig(
        cross_entropy=CrossEntropyConfig(weight=0.5, class_weights="median"),
        kd=KDConfig(weight=2.0, temperature=3.0),
        attention_transfer=AttentionTransferConfig(weight=100.0, taps=["a", "b"]),
        affinity=AffinityConfig(taps=["b:a"], space="raw"),
    )
    total = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, class_weights=lambda scheme: WEIGHTS)
    assert total.student_taps == ["a", "b"]
    assert total.teacher_taps == ["a", "b"]
    loss, values = total(student, teacher, labels)
    weights = {"cross_entropy": 0.5, "kd": 2.0, "attention_transfer": 100.0, "affinity": 1.0}
    assert set(values) == set(weights)
    torch.testing.assert_close(loss.detach(), sum(weights[name] * value for name, value in values.items()))
    torch.testing.assert_close(values["cross_entropy"], eager(student.logits, labels, class_weights=WEIGHTS))
    pairs = [attention_transfer(student.features[tap], teacher.features[tap]) for tap in ("a", "b")]
    torch.testing.assert_close(values["attention_transfer"], sum(pairs) / 2)
    lines = total.describe()
    assert len(lines) == 4
    assert lines[3] == "affinity: weight 1, b to a"


@pytest.mark.parametrize("variant", [name for name, case in CASES.items() if not case.supervised])
def test_terms_that_need_true_logits_are_those_that_change_without(variant: str) -> None:
    """A number of each position's own is taken off the teacher's logits, as a cache in uint8 does."""
    made = objective(variant).double().eval()
    student, teacher, labels = answers()
    once, _ = made(student, teacher, labels)
    less = Answer(teacher.logits - teacher.logits.amax(1, keepdim=True), teacher.features)
    again, _ = made(student, less, labels)
    same = abs(float((again - once).detach())) <= 1e-9 * abs(float(once.detach()))
    assert made.needs_true_logits == ([] if same else [CASES[variant].name])


def test_terms_are_described_in_steps() -> None:
    config = LossConfig(
        kd=KDConfig(start=0.5, ramp=2),
        fitnet=FitnetConfig(taps=["a"], until=3),
        kta=KTAConfig(taps=["b:a"], until=1.0),
    )
    lines = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, total_steps=8).describe()
    assert lines[1] == "kd: weight 1, steps 4 to 8 of 8, ramp 2"
    assert lines[2].startswith("fitnet: weight 10, steps 0 to 3 of 8, a, ")
    assert lines[3].startswith("kta: weight 50, b to latent of a (3 channels), ")


def test_pixel_terms_alone_and_together_are_the_same() -> None:
    """They share one pass over the logits."""
    student, teacher, labels = answers()
    kd = KDConfig(weight=2.0, temperature=3.0, class_weights="median")
    found = []
    for config in (LossConfig(), LossConfig(cross_entropy=None, kd=kd), LossConfig(kd=kd)):
        term = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, class_weights=lambda scheme: WEIGHTS)
        loss, values = term(student, teacher, labels)
        found.append((loss, values, torch.autograd.grad(loss, student.logits)[0]))
    (ce, ce_values, ce_gradient), (kl, kl_values, kl_gradient), (both, values, gradient) = found
    torch.testing.assert_close(both, ce + kl)
    torch.testing.assert_close(gradient, ce_gradient + kl_gradient)
    torch.testing.assert_close(values, ce_values | kl_values)
    expected = eager(
        student.logits,
        labels,
        teacher.logits,
        ce_weight=0.0,
        kl_weight=1.0,
        temperature=3.0,
        kl_class_weights=WEIGHTS,
    )
    torch.testing.assert_close(values["kd"], expected.detach())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ({"start": 2, "until": 4}, [0, 0, 2, 2, 0, 0, 0, 0]),
        ({"start": 0.25, "until": 0.5}, [0, 0, 2, 2, 0, 0, 0, 0]),
        ({"start": 1, "until": 1.0}, [0, 2, 2, 2, 2, 2, 2, 2]),
        ({"until": 1}, [2, 0, 0, 0, 0, 0, 0, 0]),
        ({"start": 1.0}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"ramp": 3}, [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        ({"start": 2, "ramp": 0.375}, [0, 0, 0.5, 1, 1.5, 2, 2, 2]),
    ],
    ids=str,
)
def test_schedule(options: dict[str, Any], expected: list[float]) -> None:
    """An integer is steps, a float a fraction: 1 is the second step, 1.0 the end."""
    config = TermConfig(weight=2.0, **options)
    assert [config.factor(step, 8) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4, 4, 4, 4, 4, 4]),
        ({"temperature_until": 1.5}, [4, 3.5, 3, 2.5, 2, 1.5]),
        ({"temperature_until": 6.0, "start": 1, "until": 4}, [4, 4, 5, 6, 6, 6]),
        ({"temperature_until": 1.0, "start": 0.5, "until": 9}, [4, 4, 4, 4, 2.5, 1]),
        ({"temperature_until": 1.0, "start": 2, "until": 3}, [4, 4, 4, 1, 1, 1]),  # a window of one step
    ],
    ids=str,
)
def test_temperatures(options: dict[str, Any], expected: list[float]) -> None:
    config = KDConfig(temperature=4.0, **options)
    assert [config.temperature_at(step, 6) for step in range(6)] == pytest.approx(expected)


WHERE = {"self_distillation": {"taps": ["a"]}}
SOFT = [name for name, config in CONFIGS.items() if issubclass(config, TemperatureConfig)]


@pytest.mark.parametrize("name", SOFT)
def test_a_changing_temperature_is_that_of_the_step(name: str) -> None:
    """Whatever step was asked for before: as with that temperature from the start."""
    student, teacher, labels = answers()

    def make(**options: float) -> DistillationLoss:
        torch.manual_seed(0)
        losses: dict[str, Any] = {name: CONFIGS[name](**WHERE.get(name, {}), **options)}
        taps = (STUDENT_TAPS, TEACHER_TAPS)
        return DistillationLoss(LossConfig(**losses), *taps, classes=CLASSES, total_steps=3).double()

    annealed = make(temperature=4.0, temperature_until=2.0)
    (line,) = (line for line in annealed.describe() if line.startswith(f"{name}:"))
    assert ", temperature 4 to 2" in line
    seen = []
    for step, temperature in ((2, 2.0), (0, 4.0), (1, 3.0)):
        loss, values = annealed(student, teacher, labels, step=step)
        expected, _ = make(temperature=temperature)(student, teacher, labels, step=step)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        seen.append(float(values[name]))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("depth", ["deep_to_shallow", "shallow_to_deep"])
def test_taps_come_into_force_one_after_the_other(depth: str) -> None:
    """By depth, in equal shares of the window; each value is the whole term's at that tap alone."""
    student, teacher, labels = answers()
    config = LossConfig(
        cross_entropy=None,
        fitnet=FitnetConfig(weight=3.0, taps=["a", "b:a"], depth=depth, start=2, until=0.7, ramp=1),
        cwd=CWDConfig(taps=["logits", "b"], depth=depth),
    )
    objective = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, total_steps=10).double()
    found, taps = [], []
    for step in range(10):
        loss, values = objective(student, teacher, labels, step=step)
        found.append(" ".join(values))
        taps.append(" ".join(objective.teacher_taps_at(step)))
        for parameter in objective.parameters():
            torch.autograd.grad(loss, parameter, retain_graph=True)  # of all adapters, at every step
    first, last = ("b", "logits") if depth == "deep_to_shallow" else ("logits", "b")
    hints = ["", "", *[" fitnet_0"] * 2, *[" fitnet_1"] * 3, "", "", ""]
    assert found == [f"cwd_{step // 5}{hint}" for step, hint in enumerate(hints)]
    pairs = ["b:a", "a:a"] if depth == "deep_to_shallow" else ["a:a", "b:a"]
    assert [objective.configs[f"fitnet_{i}"].taps for i in range(2)] == [[pair] for pair in pairs]  # type: ignore
    factors = [[objective.configs[f"fitnet_{i}"].factor(step, 10) for step in (2, 4, 5)] for i in range(2)]
    assert factors == [[1.5, 0.0, 0.0], [0.0, 1.5, 3.0]]
    cwd = [" ".join(objective.configs[f"cwd_{i}"].taps) for i in range(2)]  # type: ignore[attr-defined]
    assert cwd == [place if place == "logits" else "b:b" for place in (first, last)]
    assert taps[0] == ("b" if depth == "deep_to_shallow" else "")
    assert taps[4] == ("a b" if depth == "deep_to_shallow" else "a")
    assert objective.describe()[2].startswith(f"fitnet_0: weight 3, steps 2 to 4 of 10, ramp 1, {pairs[0][0]}")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: LossConfig(fitnet=FitnetConfig(taps=["a", "neck"])),
            "losses.fitnet.taps: the student has no tap 'neck'; name some of a, b",
        ),
        (
            lambda: LossConfig(affinity=AffinityConfig(taps=["a:neck"])),
            "losses.affinity.taps: the teacher has no tap 'neck'; name some of a, b",
        ),
        (
            lambda: LossConfig(attention_transfer=AttentionTransferConfig(taps=[])),
            "losses.attention_transfer.taps: empty; name at least one tap",
        ),
        (lambda: LossConfig(kd=KDConfig(temperature=0)), "losses.kd.temperature: 0 is not positive"),
        (lambda: LossConfig(kd=KDConfig(weight=-1)), "losses.kd.weight: -1 is not a weight; give 0 or more"),
        (
            lambda: LossConfig(kd=KDConfig(start=1.5)),
            "losses.kd.start: 1.5 is out of range; give steps as an integer",
        ),
        (
            lambda: LossConfig(cross_entropy=CrossEntropyConfig(label_smoothing=1.0)),
            "losses.cross_entropy.label_smoothing: 1.0 is not in [0, 1)",
        ),
        (
            lambda: LossConfig(kd=KDConfig(weight=float("nan"))),
            "losses.kd.weight: nan is not a weight; give 0 or more",
        ),
        (
            lambda: LossConfig(kd=KDConfig(start=5, until=3)),
            "losses.kd.until: 3 is not after start 5",
        ),
        (
            lambda: LossConfig(fitnet=FitnetConfig(taps=["a", "a"])),
            "losses.fitnet.taps: a is there twice; name it once",
        ),
        (
            lambda: LossConfig(fitnet=FitnetConfig(taps=["a: a"])),
            "losses.fitnet.taps: 'a: a' is no tap; write tap or student_tap:teacher_tap",
        ),
        (
            lambda: LossConfig(fitnet=FitnetConfig(taps=[{"a": "a"}])),  # type: ignore[list-item]
            "losses.fitnet.taps: \"{'a': 'a'}\" is no tap",
        ),
        (
            lambda: LossConfig(kd=KDConfig(temperature_until=-1.0)),
            "losses.kd.temperature_until: -1.0 is not positive",
        ),
        (
            lambda: LossConfig(fitnet=FitnetConfig(taps=["a", "b"], depth="deep_to_shallow", start=5, until=9)),
            "losses.fitnet.depth: 2 pairs of taps do not fit the 0 steps of the term's window",
        ),
        (
            lambda: LossConfig(review=ReviewConfig(depth="shallow_to_deep")),
            "losses.review.depth: shallow_to_deep takes taps one by one, and review fuses them",
        ),
        (lambda: LossConfig(kta=KTAConfig(p=0)), "losses.kta: p 0 and q 2 are orders of norms; give 1 or 2"),
        (lambda: LossConfig(cross_entropy=None), "losses: no term is configured"),
        (
            lambda: LossConfig(cross_entropy=CrossEntropyConfig(class_weights="enet")),
            "losses: class_weights=enet needs a data set's label counts",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], LossConfig], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DistillationLoss(make(), STUDENT_TAPS, TEACHER_TAPS)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("preset", ["hint_then_logits", "deep_to_shallow", "shallow_to_deep", "temperature"])
def test_presets_of_what_comes_when(preset: str) -> None:
    """On top of the demo's configuration, which keeps the weights of its classes."""
    files = [str(ROOT / "configs" / name) for name in ("demo_distill.yaml", f"paradigms/{preset}.yaml")]
    config = parse(distill.Config, files, runs="teacher.run")
    assert config.losses.kd is not None
    assert config.losses.kd.class_weights == "enet"
    taps = build_model(ModelConfig(width=4), CAMVID).taps
    objective = DistillationLoss(
        config.losses, taps, taps, class_weights=lambda _: torch.ones(11), total_steps=700
    )
    said = " | ".join(objective.describe())
    expected = {
        "hint_then_logits": ["cross_entropy: weight 1, steps 175 to 700", "kd: weight 1, steps 175 to 700"]
        + ["fitnet: weight 10, steps 0 to 175 of 700, bottleneck, "],
        "deep_to_shallow": ["fitnet_0: weight 10, steps 0 to 100 of 700, bottleneck, "]
        + ["fitnet_6: weight 10, steps 600 to 700 of 700, decoder.2, "],
        "shallow_to_deep": [
            "fitnet_0: weight 10, steps 0 to 100 of 700, decoder.2, ",
            "fitnet_6: weight 10, steps 600 to 700 of 700, bottleneck, ",
        ],
        "temperature": ["kd: weight 1, temperature 4 to 1"],
    }
    for part in expected[preset]:
        assert part in said
