"""Deep self-distillation: its formula, where its gradients go, its taps, and what is saved of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, STUDENT_TAPS, VOID, WEIGHTS, Shape, answers, gradients
from forks import Forks
from plain import eager
from safetensors.torch import load_file

from errors import ConfigurationError
from losses.deep import SelfDistillation, SelfDistillationConfig, earlier_taps
from losses.term import Context

UNET = {
    **{f"encoder.{i}": Shape(8 * 2**i, 4 * 2**i) for i in range(3)},
    "bottleneck": Shape(64, 32),
    **{f"decoder.{i}": Shape(32 // 2**i, 16 // 2**i) for i in range(3)},
}
SEGFORMER = {tap: shape for tap, shape in UNET.items() if tap[:7] != "decoder"} | {"decoder.0": Shape(16, 4)}
HEADLESS = {tap: shape for tap, shape in UNET.items() if tap[:7] != "decoder"}


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_by_hand(weights: torch.Tensor | None) -> None:
    """Labels of 8×12, two taps at half of that, the last features at a quarter."""
    torch.manual_seed(0)
    config = SelfDistillationConfig(taps=["a", "c"], alpha=0.4, temperature=2.0, hint=0.5)
    model = {"c": Shape(2, 2), **STUDENT_TAPS}
    term = SelfDistillation(config, Context(model, None, CLASSES, lambda _: weights)).double()
    student, _, labels = answers()
    student.features["c"] = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    value = term(student, None, labels, term.count(labels))

    last = F.interpolate(student.features["b"], (4, 6), mode="bilinear", align_corners=False)
    weight = torch.ones(CLASSES).double() if weights is None else weights.double()
    weight = torch.where(labels == VOID, 0.0, weight[labels.clamp(max=CLASSES - 1)])
    both = {"class_weights": weights, "kl_class_weights": weights}
    costs = []
    for tap, head in zip("ac", term.heads, strict=True):
        adapted = head.adapter(student.features[tap])
        logits = head.classifier(adapted.relu())
        cost = eager(logits, labels, student.logits, ce_weight=0.6, kl_weight=0.4, temperature=2.0, **both)
        distance = (adapted - last).square().sum(1).sqrt().repeat_interleave(2, 1).repeat_interleave(2, 2)
        costs.append(cost + 0.5 * (distance * weight).sum() / weight.sum())
    torch.testing.assert_close(value, sum(costs) / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"alpha": 1.0}, {"hint": 0.0}], ids=str)
def test_the_last_layer_teaches_and_does_not_learn(options: dict[str, float]) -> None:
    config = SelfDistillationConfig(taps=["a"], **options)
    term = SelfDistillation(config, Context(STUDENT_TAPS, None, CLASSES)).double()
    student, _, labels = answers()
    value = term(student, None, labels, term.count(labels))
    reached = dict(zip(["logits", "a", "b"], [bool(g.any()) for g in gradients(value, student)], strict=True))
    assert reached == {"logits": False, "a": True, "b": False}
    other = answers(seed=1)[0]
    student.logits.data = other.logits.data
    after = term(student, None, labels, term.count(labels))
    assert (after != value) == (options.get("alpha") != 0)
    assert term.student_taps == (["a"] if options.get("hint") == 0 else ["a", "b"])


@pytest.mark.parametrize(
    ("model", "taps", "expected"),
    [
        (UNET, ["encoder", "bottleneck"], "encoder.0 encoder.1 encoder.2 bottleneck"),
        (UNET, ["bottleneck", "decoder"], "bottleneck decoder.0 decoder.1"),
        (UNET, ["decoder.1", "decoder", "encoder.0"], "decoder.1 decoder.0 encoder.0"),
        (SEGFORMER, ["decoder", "bottleneck"], "bottleneck"),
        (HEADLESS, ["encoder", "bottleneck"], "encoder.0 encoder.1 encoder.2"),
    ],
)
def test_words(model: dict[str, Shape], taps: list[str], expected: str) -> None:
    """The last tap is the teacher, and never among them."""
    assert earlier_taps(taps, model) == expected.split()


@pytest.mark.parametrize(
    ("model", "options", "classes", "said"),
    [
        (UNET, {"taps": ["decoder.2"]}, 3, "taps: decoder.2 is what the model's own classifier sees"),
        (UNET, {"taps": ["neck"]}, 3, "taps: the model has no tap 'neck'; name some of encoder.0, "),
        (UNET, {"taps": ["last"]}, 3, "taps: the model has no tap 'last'; name some of encoder.0, "),
        (SEGFORMER, {"taps": ["decoder"]}, 3, "taps: decoder is nothing but what the model's own classifier sees"),
        (UNET, {"alpha": 1.5}, 3, "alpha: 1.5 is no share"),
        (UNET, {"hint": -1.0}, 3, "hint: -1.0 is negative"),
        (UNET, {"temperature": 0.0}, 3, "temperature: 0.0 is not positive"),
        (UNET, {}, 0, "self_distillation: needs the number of classes"),
    ],
)
def test_mistakes(model: dict[str, Shape], options: dict[str, Any], classes: int, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SelfDistillation(SelfDistillationConfig(**options), Context(model, None, classes))
    assert said in str(caught.value)


def test_the_model_is_saved_without_the_classifiers(forks: Forks, tmp_path: Path) -> None:
    """They train with it, which needs no teacher, and stand in the checkpoint."""
    run = tmp_path / "run"
    settings = ["data.size=[32,64]", "data.scenes=8", "train.batch_size=4", "train.steps=4", "model.width=4"]
    outcome = forks.script("train_teacher.py", f"run_dir={run}", *settings, "losses.self_distillation={}")
    assert outcome.code == 0, outcome.text
    (line,) = (line for line in outcome.text.splitlines() if "self_distillation: " in line)
    assert line.endswith("classifiers at encoder.0, encoder.1, encoder.2, bottleneck")
    saved = torch.load(run / "checkpoints/step_00000004/state.pt", weights_only=True)["players"][0]["learner"]
    heads = {name for name in saved if name.startswith("objective.terms.self_distillation.heads.")}
    assert {name.split(".")[4] for name in heads} == {"0", "1", "2", "3"}
    assert all(math.isfinite(float(saved[name].double().sum())) for name in heads)
    best = load_file(run / "best/model.safetensors")
    assert {f"model.{name}" for name in best} == {name for name in saved if name.startswith("model.")}
