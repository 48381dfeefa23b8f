"""Distillation of feature maps, value by value."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import STUDENT_TAPS, TEACHER_TAPS, Answer, Shape, answers, gradients
from plain import logits_and_labels
from torch import Tensor

import distill
from data import CAMVID
from engine.config import parse
from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.features import (
    FitnetConfig,
    MGDConfig,
    ReviewConfig,
    attention_transfer,
    fitnet,
    hierarchical_context,
)
from losses.logits import kl_divergence
from losses.relations import affinity
from losses.term import FeatureTermConfig, term_name
from models import ModelConfig, build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("function", [kl_divergence, affinity, attention_transfer, fitnet, hierarchical_context])
def test_functions_give_the_teacher_no_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    ours, theirs, _ = logits_and_labels((4, 4), (4, 4))
    function(ours, theirs.requires_grad_()).backward()
    assert ours.grad is not None
    assert theirs.grad is None


@pytest.mark.parametrize("masked", [False, True])
def test_fitnet_and_attention_transfer_by_hand(masked: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5) < 0.7 if masked else torch.ones(2, 4, 5, dtype=torch.bool)
    hints, attentions = [], []
    for s, t, m in zip(ours, theirs, mask, strict=True):
        hints.append((s[:, m] - t[:, m]).square().mean())
        a, b = (F.normalize(x[:, m].square().mean(0), dim=0) for x in (s, t))
        attentions.append((a - b).square().mean())
    given = mask if masked else None
    torch.testing.assert_close(fitnet(ours, theirs, mask=given), torch.stack(hints).mean())
    torch.testing.assert_close(attention_transfer(ours, theirs, mask=given), torch.stack(attentions).mean())


@pytest.mark.parametrize(
    ("size", "brought"),
    [
        ((8, 8), lambda x: F.avg_pool2d(x, 2)),
        ((2, 2), lambda x: F.interpolate(x, (4, 4), mode="bilinear")),
        ((3, 7), lambda x: F.interpolate(x, (4, 4), mode="bilinear")),
    ],
)
def test_teacher_of_another_resolution(size: tuple[int, int], brought: Callable[[Tensor], Tensor]) -> None:
    """Its map is brought to the student's, by area where it shrinks, else bilinearly."""
    taps = {"a": Shape(3, 4)}
    config = LossConfig(cross_entropy=None, fitnet=FitnetConfig(weight=1.0, taps=["a"]))
    term = DistillationLoss(config, taps, taps).double()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.zero_()
    teacher = torch.randn(2, 3, *size, dtype=torch.float64)
    student = Answer(torch.zeros(2, 2, 4, 4, dtype=torch.float64), {"a": torch.zeros(2, 3, 4, 4).double()})
    loss, _ = term(student, Answer(student.logits, {"a": teacher}), torch.zeros(2, 16, 16, dtype=torch.int64))
    torch.testing.assert_close(loss, brought(teacher).square().mean())


def only(config: FeatureTermConfig, student: Any = STUDENT_TAPS, teacher: Any = TEACHER_TAPS) -> DistillationLoss:
    """One term with random parameters, in float64."""
    torch.manual_seed(0)
    losses: dict[str, Any] = {"cross_entropy": None, term_name(type(config)): config}
    made = DistillationLoss(LossConfig(**losses), student, teacher).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(2, 7, 4, 6), "where [B, 3, h, w] and [B, 6, h, w] are announced"),
        (torch.zeros(2, 24, 6), "[2, 24, 6]"),
        (torch.zeros(3, 6, 4, 6), "[3, 6, 4, 6]"),
    ],
)
@pytest.mark.parametrize("config", [FitnetConfig, ReviewConfig, MGDConfig])
def test_maps_that_cannot_be_compared(config: type[FeatureTermConfig], wrong: Tensor, told: str) -> None:
    """Another width than the model publishes, tokens in place of a map, another number of images."""
    term = only(config(taps=["a"]))
    student, teacher, labels = answers()
    teacher.features["a"] = wrong.double()
    with pytest.raises(ConfigurationError) as error:
        term(student, teacher, labels)
    message = str(error.value)
    assert message.startswith(
        f"losses.{term_name(config)}.taps: the student's a is [2, 3, 4, 6] and the teacher's a"
    )
    assert told in message


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "levels"), [((5, 9), [4, 2, 1]), ((4, 3), [2, 1]), ((2, 7), [1]), ((1, 1), [])])
def test_hierarchical_context_by_hand(size: tuple[int, int], levels: list[int], masked: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    mask = torch.rand(2, *size) < 0.7 if masked else torch.ones(2, *size, dtype=torch.bool)
    if masked:
        mask[0, :, : size[1] // 2] = False  # whole cells

    def cells(extent: int, level: int) -> list[slice]:
        return [slice(i * extent // level, -(-(i + 1) * extent // level)) for i in range(level)]

    images = []
    for s, t, m in zip(ours, theirs, mask, strict=True):
        total, weights = (s - t)[:, m].square().sum() / (3 * m.sum()).clamp(min=1), 1.0
        for depth, level in enumerate(levels, 1):
            pooled = [
                (s - t)[:, rows, columns][:, m[rows, columns]].mean(1)
                for rows in cells(size[0], level)
                for columns in cells(size[1], level)
                if m[rows, columns].any()
            ]
            total = total + 0.5**depth * (torch.stack(pooled).square().mean() if pooled else 0.0)
            weights += 0.5**depth
        images.append(total / weights)
    found = hierarchical_context(ours, theirs, mask=mask if masked else None)
    torch.testing.assert_close(found, torch.stack(images).mean())


REVIEWED = {"shallow": Shape(3, 2), "middle": Shape(4, 4), "deep": Shape(5, 8)}
REVIEWERS = {"shallow": Shape(6, 2), "middle": Shape(7, 8), "deep": Shape(8, 8)}


def reviewed(seed: int = 3) -> tuple[Answer, Answer, Tensor]:
    """Maps of odd sizes, the teacher's of others than the student's."""
    torch.manual_seed(seed)

    def maps(taps: dict[str, Shape], sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        shapes = [(2, tap.channels, *size) for tap, size in zip(taps.values(), sizes, strict=True)]
        found = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        return dict(zip(taps, found, strict=True))

    logits = torch.randn(2, 5, 19, 25, dtype=torch.float64, requires_grad=True)
    student = Answer(logits, maps(REVIEWED, [(10, 13), (5, 7), (3, 4)]))
    teacher = Answer(logits, maps(REVIEWERS, [(10, 13), (3, 4), (3, 3)]))
    return student, teacher, torch.zeros(2, 19, 25, dtype=torch.int64)


def test_review_against_a_plain_form() -> None:
    term = only(ReviewConfig(taps=["middle", "shallow", "deep"]), REVIEWED, REVIEWERS)
    fusions = term.terms["review"].fusions  # type: ignore[union-attr]
    student, teacher, labels = reviewed()

    def normalised(x: Tensor, norm: Any) -> Tensor:
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    def enlarged(x: Tensor, size: tuple[int, ...]) -> Tensor:
        rows, columns = (torch.arange(n) * old // n for n, old in zip(size, x.shape[-2:], strict=True))
        return x[:, :, rows[:, None], columns]

    expected, passed = torch.zeros(()).double(), torch.zeros(())
    for tap, fusion in zip(["deep", "middle", "shallow"], fusions, strict=True):
        ours, theirs = student.features[tap], teacher.features[tap].detach()
        x = normalised(torch.einsum("oi,bihw->bohw", fusion.inner[0].weight[:, :, 0, 0], ours), fusion.inner[1])
        assert x.shape[1] == 5  # the deepest tap's channels
        if tap != "deep":
            above = enlarged(passed, ours.shape[-2:])
            share = F.conv2d(torch.cat([x, above], 1), fusion.attention.weight, fusion.attention.bias).sigmoid()
            x = x * share[:, 0, None] + above * share[:, 1, None]
        passed = enlarged(x, theirs.shape[-2:])
        made = normalised(F.conv2d(passed, fusion.outer[0].weight, padding=1), fusion.outer[1])
        expected = expected + hierarchical_context(made, theirs)

    loss, _ = term(student, teacher, labels)
    torch.testing.assert_close(loss, expected)
    plain = gradients(expected, student)
    assert all(gradient.any() for gradient in plain[1:])
    for found, gradient in zip(gradients(loss, student), plain, strict=True):
        torch.testing.assert_close(found, gradient)


def test_review_goes_from_deep_to_shallow_whatever_the_order_of_the_taps() -> None:
    taps = {"late": Shape(3, 8), "early": Shape(3, 16), "later": Shape(3, 8)}
    for given in (["early", "late", "later"], ["later", "late", "early"]):
        (term,) = only(ReviewConfig(taps=given), taps, taps).terms.values()
        assert [ours for ours, _ in term.pairs] == ["early", "later", "late"]  # type: ignore[union-attr]
    (term,) = only(ReviewConfig(taps=["b:a", "a:b"])).terms.values()
    assert term.pairs == [("b", "a"), ("a", "b")]


def test_review_of_one_tap_twice() -> None:
    with pytest.raises(ConfigurationError, match=r"losses.review.taps: a:a and a:b take one tap of the student"):
        only(ReviewConfig(taps=["a", "b", "a:b"]))


@pytest.mark.parametrize(("asked", "made"), [(0, 512), (9, 9)])
def test_review_middle_channels(asked: int, made: int) -> None:
    wide = {"a": Shape(3, 2), "b": Shape(600, 4)}
    (term,) = only(ReviewConfig(taps=["a", "b"], mid_channels=asked), wide, TEACHER_TAPS).terms.values()
    assert {fusion.inner[0].out_channels for fusion in term.fusions} == {made}  # type: ignore[union-attr]


def test_review_learns_from_one_image_of_one_position() -> None:
    """Batch-norm has no statistics of it."""
    term = only(ReviewConfig(taps=["a", "b"])).train()
    student, teacher, labels = answers(1, 1, 1)
    loss, _ = term(student, teacher, labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, student))


@pytest.mark.parametrize("channels", [3, 6])
def test_mgd_by_hand(channels: int) -> None:
    """Same draws: value and gradient; 1×1 projection only where the widths differ."""
    term = only(MGDConfig(weight=1.0, taps=["a"]), {"a": Shape(channels, 2)}, TEACHER_TAPS)
    student, teacher, labels = answers(3)
    student.features = {"a": torch.randn(3, channels, 4, 6, dtype=torch.float64, requires_grad=True)}
    weights = [parameter for name, parameter in term.named_parameters()]
    torch.manual_seed(5)
    loss, _ = term(student, teacher, labels)

    torch.manual_seed(5)
    shown = (torch.rand(3, 1, 4, 6) <= 0.25).double()
    x = student.features["a"]
    if channels != 6:
        x = F.conv2d(x, weights[0], weights[1])
    first, first_bias, second, second_bias = weights[-4:]
    assert len(weights) == (4 if channels == 6 else 6)
    x = F.conv2d(F.conv2d(x * shown, first, first_bias, padding=1).relu(), second, second_bias, padding=1)
    expected = (x - teacher.features["a"].detach()).square().sum() / 3
    torch.testing.assert_close(loss, expected)
    for found, gradient in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(found, gradient)


def pointwise(term: DistillationLoss) -> DistillationLoss:
    """Every convolution the identity, as far as the widths go."""
    for module in term.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.dirac_(module.weight)
            torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return term


def test_mgd_of_a_perfect_student_hides_what_its_ratio_says() -> None:
    """With the identity for its generation and maps after a ReLU, what is left is the teacher's hidden part."""
    torch.manual_seed(0)
    maps = torch.rand(4, 6, 40, 50, dtype=torch.float64)
    answer, labels = Answer(maps, {"a": maps}), torch.zeros(4, 80, 100, dtype=torch.int64)
    for ratio in (0.0, 0.3, 0.75):
        term = pointwise(only(MGDConfig(taps=["a"], mask_ratio=ratio), TEACHER_TAPS, TEACHER_TAPS))
        shares = [
            float(term(answer, answer, labels)[1]["mgd"] / maps.square().sum((1, 2, 3)).mean()) for _ in "12"
        ]
        assert shares == pytest.approx([ratio, ratio], abs=0.02)
        assert (shares[0] == shares[1]) == (ratio == 0)  # drawn anew


def test_mgd_is_a_sum_over_positions() -> None:
    """With kernels that do not see the border, an image of six tiles costs six times as much."""
    term = pointwise(only(MGDConfig(weight=1.0, taps=["a", "b"], mask_ratio=0.0)))
    student, teacher, labels = answers()
    tiled = [
        Answer(answer.logits, {tap: map_.repeat(1, 1, 2, 3) for tap, map_ in answer.features.items()})
        for answer in (student, teacher)
    ]
    once, _ = term(student, teacher, labels)
    six, _ = term(*tiled, labels.repeat(1, 2, 3))
    torch.testing.assert_close(six, 6 * once)


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        (ReviewConfig, {"mid_channels": -1}, "losses.review.mid_channels: -1 is negative"),
        (MGDConfig, {"mask_ratio": 1.0}, r"losses.mgd.mask_ratio: 1.0 is not in \[0, 1\)"),
        (MGDConfig, {"taps": []}, "losses.mgd.taps: empty"),
    ],
)
def test_mistakes(config: type[FeatureTermConfig], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        config(**options)


@pytest.mark.parametrize(
    ("preset", "taps"),
    [
        ("encoder", ["encoder"]),
        ("bottleneck", ["bottleneck"]),
        ("decoder", ["decoder"]),
        ("all", ["encoder", "bottleneck", "decoder"]),
    ],
)
def test_focus_presets(preset: str, taps: list[str]) -> None:
    """Each names its taps on top of the file before it, and the last one wins."""
    files = [
        str(ROOT / "configs" / name)
        for name in ("camvid_cpu_distill.yaml", "focus/all.yaml", "focus/encoder.yaml", f"focus/{preset}.yaml")
    ]
    losses = parse(distill.Config, files, runs="teacher.run").losses
    assert set(losses.active()) == {"cross_entropy", "kd", "fitnet", "attention_transfer"}
    assert losses.fitnet is not None
    assert losses.attention_transfer is not None
    assert losses.kd is not None
    assert losses.fitnet.taps == losses.attention_transfer.taps == taps
    assert losses.kd.temperature == 2.0
    models = (build_model(ModelConfig(width=4), CAMVID), build_model(ModelConfig(width=4, depth=2), CAMVID))
    for student, teacher in itertools.permutations([model.taps for model in models]):
        pairs = DistillationLoss(LossConfig(fitnet=losses.fitnet), student, teacher).terms["fitnet"].pairs
        shallow = [f"{part}.{i}" for part in ("encoder", "decoder") for i in range(2)]
        expected = [tap for tap in [*shallow, "bottleneck"] if preset in ("all", tap.partition(".")[0])]
        assert len(pairs) == len(expected)
