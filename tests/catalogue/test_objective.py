"""The objective: sums, schedules, mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import STUDENT_TAPS, TEACHER_TAPS, WEIGHTS, answers
from plain import eager

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.features import AttentionTransferConfig, FitnetConfig, attention_transfer
from losses.latent import AffinityConfig, KTAConfig
from losses.logits import KDConfig
from losses.supervised import CrossEntropyConfig
from losses.term import TermConfig


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
