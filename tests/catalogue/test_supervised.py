"""Losses of the labels alone, value by value."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, CONFIGS, STUDENT_TAPS, TEACHER_TAPS, VOID, WEIGHTS, Answer, answers
from plain import logits_and_labels
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig, blocks
from losses.supervised import (
    BoundaryConfig,
    FocalConfig,
    MarginConfig,
    OHEMConfig,
    boundary,
    boundary_weight,
    confidence_penalty,
    dice,
    focal,
    lovasz,
    margin,
    ohem,
)


def images(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each image's labelled pixels: logits [C, P] and labels [P]."""
    return [(z[:, y != VOID], y[y != VOID]) for z, y in zip(logits, labels, strict=True)]


def together(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all images: logits [C, P] and labels [P]."""
    found = images(logits, labels)
    return torch.cat([z for z, _ in found], 1), torch.cat([y for _, y in found])


def plain_focal(logits: Tensor, labels: Tensor) -> Tensor:
    z, y = together(logits, labels)
    p = z.softmax(0)[y, torch.arange(len(y))]
    return (-((1 - p) ** 1.5) * p.log()).mean()


def plain_dice(logits: Tensor, labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for z, y in images(logits, labels):
        p, present = z.softmax(0), y.unique().tolist()
        for c in present:
            hit = (y == c).double()
            total = total + (1 - 2 * (p[c] * hit).sum() / (p[c].square() + hit.square()).sum()) / len(present)
    return total / len(labels)


def plain_lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """By the definition: errors from the highest on, each times what its pixel adds to the Jaccard loss."""
    total = torch.zeros((), dtype=torch.float64)
    for z, y in images(logits, labels):
        p, present = z.softmax(0), y.unique().tolist()
        for c in present:
            hit = y == c
            errors = torch.where(hit, 1 - p[c], p[c])
            wrong, before = torch.zeros_like(hit), 0.0
            for pixel in errors.argsort(descending=True).tolist():
                wrong[pixel] = True
                jaccard = 1 - float((hit & ~wrong).sum()) / float((hit | wrong).sum())
                total = total + errors[pixel] * (jaccard - before) / len(present)
                before = jaccard
    return total / len(labels)


def plain_ohem(logits: Tensor, labels: Tensor) -> Tensor:
    means = []
    for z, y in images(logits, labels):
        p = z.softmax(0)[y, torch.arange(len(y))]
        number = max(math.ceil(0.3 * len(y)), int((p < 0.15).sum()))
        means.append(-p.sort().values[:number].log().mean())
    return torch.stack(means).mean()


def plain_boundary_weight(labels: Tensor, strength: float, width: float) -> Tensor:
    """Every distance between every two pixels; the bell is cut off beyond a square of three widths."""
    found = torch.zeros(labels.shape, dtype=torch.float64)
    height, length = labels.shape[1:]
    for b in range(len(labels)):
        y = labels[b]
        edges = set()
        for i in range(height):
            for j in range(length):
                for k, l in ((i + 1, j), (i, j + 1)):
                    if k < height and l < length and VOID not in (y[i, j], y[k, l]) and y[i, j] != y[k, l]:
                        edges |= {(i, j), (k, l)}
        for i, j in (y != VOID).nonzero().tolist():
            reach = math.ceil(3 * width)
            squared = [
                (i - k) ** 2 + (j - l) ** 2 for k, l in edges if abs(i - k) <= reach and abs(j - l) <= reach
            ]
            bell = math.exp(-min(squared) / (2 * width**2)) if squared else 0.0
            found[b, i, j] = 1 + strength * bell
    return found


def plain_boundary(logits: Tensor, labels: Tensor) -> Tensor:
    weight = plain_boundary_weight(labels, 4.0, 0.8)
    cost = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none")
    return (weight * cost).sum() / weight.sum()


def plain_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.distributions.Categorical(logits=together(logits, labels)[0].T).entropy().mean()


def plain_margin(logits: Tensor, labels: Tensor) -> Tensor:
    z, _ = together(logits, labels)
    return torch.stack([(column.max() - column - 0.7).clamp(min=0).mean() for column in z.T]).mean()


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "focal": (lambda z, y: focal(z, y, gamma=1.5), plain_focal),
    "dice": (dice, plain_dice),
    "lovasz": (lovasz, plain_lovasz),
    "ohem": (lambda z, y: ohem(z, y, threshold=0.15, least=0.3), plain_ohem),
    "boundary": (lambda z, y: boundary(z, y, strength=4.0, width=0.8), plain_boundary),
    "confidence_penalty": (lambda z, y: confidence_penalty(z, mask=y != VOID), plain_entropy),
    "margin": (lambda z, y: margin(z, mask=y != VOID, margin=0.7), plain_margin),
}


def blobs(labels: Tensor) -> Tensor:
    """Labels with something to be near to, classes that are missing, and an image that is almost void."""
    labels = labels.clone()
    labels[0][labels[0] != VOID] = 1
    labels[0, 2:4, 3:] = 4
    labels[1] = VOID
    labels[1, 2:5, 1:6] = 3
    labels[1, 3, 2] = 0
    return labels


@pytest.mark.parametrize("block", [1, 10**9])
@pytest.mark.parametrize(("native", "size"), [((6, 8), (6, 8)), ((3, 4), (7, 9))])
@pytest.mark.parametrize("change", [blobs, torch.clone])
@pytest.mark.parametrize("name", FORMS)
def test_against_the_plain_form(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Tensor], Tensor],
    native: tuple[int, int],
    size: tuple[int, int],
    block: int,
) -> None:
    """Value and gradient, everything at the labels' size."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
    logits, _, labels = logits_and_labels(native, size)
    labels = change(labels)
    found, plain = FORMS[name]
    expected = plain(F.interpolate(logits, size, mode="bilinear", align_corners=False), labels)
    loss = found(logits, labels)
    tolerance = 1e-6 if name == "boundary" else 1e-10  # whose weights are in float32
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    (gradient,), (pulled,) = torch.autograd.grad(expected, logits), torch.autograd.grad(loss, logits)
    assert float((pulled - gradient).abs().max()) <= tolerance * float(gradient.abs().max())


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name: str) -> None:
    logits, _, labels = logits_and_labels((2, 3), (5, 4))
    assert torch.autograd.gradcheck(lambda x: FORMS[name][0](x, labels), (logits,))


@pytest.mark.parametrize("name", FORMS)
def test_nothing_labelled_is_zero(name: str) -> None:
    logits, _, labels = logits_and_labels((4, 4), (8, 8))
    loss = FORMS[name][0](logits, torch.full_like(labels, VOID))
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("name", FORMS)
def test_a_teacher_is_not_looked_at(name: str) -> None:
    """Nor upsampled, which would be for nothing."""
    student, _, labels = answers()
    config = LossConfig(**({"cross_entropy": None} | {name: CONFIGS[name]()}))
    term = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, classes=CLASSES)
    alone, _ = term(student, None, labels)
    beside, _ = term(student, Answer("logits"), labels)  # type: ignore[arg-type]
    torch.testing.assert_close(beside, alone, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_where_the_answer_is_certain(gamma: float) -> None:
    """The power of 1 - p = 0 has an infinite gradient below gamma = 1; with gamma 0 it is cross-entropy."""
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]]).view(1, 2, 2, 1).requires_grad_()
    for labels in (torch.tensor([[[0], [1]]]), torch.tensor([[[1], [0]]])):
        loss = focal(logits, labels, gamma=gamma)
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()
        if gamma == 0:
            torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_dice_leaves_absent_classes_and_void_out() -> None:
    """With a smoothed ratio they would count."""
    labels = torch.full((1, 4, 4), VOID)
    labels[:, :, 0], labels[:, :, 1] = 0, 2
    sure = 1000.0 * F.one_hot(torch.where(labels == VOID, 1, labels), 3).movedim(-1, 1)
    assert dice(sure, labels) == 0
    assert lovasz(sure, labels) == 0
    wrong = 1000.0 * F.one_hot(torch.where(labels == 2, 0, labels).clamp(max=2), 3).movedim(-1, 1)
    expected = ((1 - 2 * 4 / (8 + 4)) + 1) / 2  # class 0 is found in twice its area, class 2 not at all
    assert float(dice(wrong, labels)) == pytest.approx(expected)
    assert float(lovasz(wrong, labels)) == pytest.approx((0.5 + 1) / 2)  # and the Jaccard loss of both


def test_lovasz_of_an_answer_that_is_sure_is_the_jaccard_loss() -> None:
    torch.manual_seed(0)
    labels, answer = torch.randint(0, 3, (2, 1, 16, 16))
    loss = lovasz(1000.0 * F.one_hot(answer, 3).movedim(-1, 1), labels)
    iou = [float(((labels == c) & (answer == c)).sum() / ((labels == c) | (answer == c)).sum()) for c in range(3)]
    assert float(loss) == pytest.approx(1 - sum(iou) / 3)


def test_lovasz_of_many_pixels_in_float32() -> None:
    """Each step is about 1e-6, which the difference of two Jaccard losses in float32 would lose."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 2, 512, 512), torch.randint(0, 2, (1, 512, 512))
    single, double = (logits.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    found, expected = (torch.autograd.grad(lovasz(x, labels), x)[0].double() for x in (single, double))
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_ohem_keeps_what_it_must() -> None:
    """A share of the labelled pixels where all are easy, all below the threshold where many are hard."""
    labels = torch.zeros(2, 10, 10, dtype=torch.int64)
    labels[1, :, 5:] = VOID
    logits = torch.zeros(2, 2, 10, 10)
    logits[:, 0] = 5 + torch.rand(2, 10, 10)
    logits.requires_grad_()

    def kept(**options: float) -> list[int]:
        (gradient,) = torch.autograd.grad(ohem(logits, labels, **options), logits)
        return gradient[:, 0].ne(0).sum((1, 2)).tolist()

    assert kept(least=0.2) == [20, 10]
    assert kept(least=0.001) == [1, 1]
    assert kept(threshold=0.9999) == [100, 50]
    ties = torch.full((1, 2, 4, 4), 3.0)
    ties[:, 1] = -3
    loss = ohem(ties, labels[:1, :4, :4])  # all as hard as the last that is kept
    torch.testing.assert_close(loss, F.cross_entropy(ties, labels[:1, :4, :4]))


def test_ohem_keeps_100_000_of_the_usual_image() -> None:
    assert OHEMConfig().least * 512 * 1024 == pytest.approx(100_000)
    assert OHEMConfig().threshold == 0.7


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_boundary_weight(width: float) -> None:
    _, _, labels = logits_and_labels((7, 12), (7, 12))
    labels = blobs(labels)
    expected = plain_boundary_weight(labels, 10.0, width)
    torch.testing.assert_close(boundary_weight(labels, 10.0, width).double(), expected, rtol=1e-6, atol=0)


def test_boundary_of_one_class_is_cross_entropy() -> None:
    """The border of the image and of what is void is no boundary."""
    logits, _, labels = logits_and_labels((4, 6), (4, 6))
    labels[labels != VOID] = 2
    torch.testing.assert_close(boundary(logits, labels), F.cross_entropy(logits, labels, ignore_index=VOID))


def test_boundary_weights_and_class_weights_multiply() -> None:
    student, _, labels = answers()
    config = LossConfig(cross_entropy=None, boundary=BoundaryConfig(class_weights="median", width=1.0))
    term = DistillationLoss(config, STUDENT_TAPS, classes=CLASSES, class_weights=lambda _: WEIGHTS)
    found, _ = term(student, None, labels)
    weight = plain_boundary_weight(labels, 10.0, 1.0) * WEIGHTS.double()[torch.where(labels == VOID, 0, labels)]
    cost = F.cross_entropy(student.logits, labels, ignore_index=VOID, reduction="none")
    torch.testing.assert_close(found, (weight * cost).sum() / weight.sum(), rtol=1e-6, atol=0)
    assert float(term.counts(labels)) == pytest.approx(float(weight.sum()), rel=1e-6)


def test_terms_for_high_entropy_pull_towards_it() -> None:
    """Down their gradients entropy rises; logits within the margin are left alone."""
    logits = torch.tensor([12.0, 3.0, -1.0]).view(1, 3, 1, 1).requires_grad_()
    assert float(confidence_penalty(torch.zeros(1, 4, 2, 2))) == pytest.approx(-math.log(4))
    (gradient,) = torch.autograd.grad(confidence_penalty(logits), logits)
    assert gradient[0, 0] > 0
    assert gradient[0, 1] < 0
    loss = margin(logits)
    assert float(loss.detach()) == pytest.approx(3 / 3)  # 13 below the highest, 10 are free, one of three classes
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([1 / 3, 0.0, -1 / 3]))
    assert margin(logits, margin=13.5) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FocalConfig(gamma=-1.0), "losses.focal.gamma: -1.0 is negative; give 0 or more"),
        (lambda: OHEMConfig(threshold=0.0), "losses.ohem.threshold: 0.0 is not in (0, 1]; give say 0.7"),
        (lambda: OHEMConfig(least=1.5), "losses.ohem.least: 1.5 is not in (0, 1]"),
        (lambda: BoundaryConfig(strength=-1.0), "losses.boundary.strength: -1.0 is negative; give 0 or more"),
        (lambda: BoundaryConfig(width=0.0), "losses.boundary.width: 0.0 is not positive; give say 5"),
        (lambda: MarginConfig(margin=-1.0), "losses.margin.margin: -1.0 is negative; give 0 or more"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert str(caught.value).startswith(said)
