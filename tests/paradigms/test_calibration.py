"""Calibration: against plain NumPy, by known answers, and added up over images and processes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.calibration import Calibration, class_correlation, upsampled_blocks
from evaluation.metrics import ConfusionMatrix

NAMES = ("entropy", "nll", "ece", "class_correlation")


def example(classes: int = 5, size: tuple[int, int] = (40, 136)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, classes, size[0] // 4, size[1] // 4, generator=generator)
    labels = torch.randint(0, classes + 1, (4, *size), generator=generator)
    labels[labels == classes] = 255
    labels[2] = 255
    return logits, labels


def by_numpy(logits: torch.Tensor, labels: torch.Tensor, every: int) -> dict[str, float]:
    """All probabilities at once, in float64, pixel after pixel of the definitions."""
    size = (labels.shape[-2], labels.shape[-1])
    p = F.interpolate(logits.double(), size, mode="bilinear").softmax(1).permute(0, 2, 3, 1).numpy()
    chosen = slice(every // 2, None, every)
    p, y = p[:, chosen, chosen].reshape(-1, p.shape[-1]), labels[:, chosen, chosen].numpy().reshape(-1)
    p, y = p[y != 255], y[y != 255]
    confidence, right = p.max(1), p.argmax(1) == y
    ece = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    structured = []
    for c in range(p.shape[1]):
        others = np.delete(p[y == c].sum(0), c)
        q = others / others.sum()
        structured.append(1 + (q * np.log(q)).sum() / math.log(len(q)))
    return {
        "entropy": -(p * np.log(p)).sum(1).mean(),
        "nll": -np.log(p[np.arange(len(y)), y]).mean(),
        "ece": ece,
        "class_correlation": float(np.mean(structured)),
    }


@pytest.mark.parametrize("every", [1, 3, 5])
def test_agrees_with_plain_numpy(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.calibration.BLOCK_ELEMENTS", 7 * 5 * 136)  # several blocks, the last smaller
    logits, labels = example()
    calibration = Calibration(5, every=every)
    calibration.update(logits, labels)
    assert calibration.summarise() == pytest.approx(by_numpy(logits, labels, every), rel=1e-5)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("size", [(48, 64), (150, 200), (33, 47), (12, 16)])
def test_blocks_are_the_whole_upsampled_map(
    size: tuple[int, int], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = F.interpolate(logits[None], size, mode="bilinear")[0]
    limit = 4 * 5 * size[1]
    monkeypatch.setattr("evaluation.calibration.BLOCK_ELEMENTS", limit)
    seen = torch.zeros(size, dtype=torch.int64)
    for rows, columns, block in upsampled_blocks(logits, size, every):
        assert block.numel() <= limit
        torch.testing.assert_close(block, whole[:, rows, columns], rtol=0, atol=1e-12)
        seen[rows, columns] += 1
    expected = torch.zeros(size, dtype=torch.int64)
    expected[every // 2 :: every, every // 2 :: every] = 1
    assert torch.equal(seen, expected)


def figures(probabilities: list[float], labels: list[int]) -> dict[str, float]:
    """Of pixels that all have the same predicted distribution."""
    calibration = Calibration(len(probabilities))
    logits = torch.tensor(probabilities).log()[None, :, None, None].expand(1, -1, 1, len(labels))
    calibration.update(logits, torch.tensor(labels)[None, None])
    return calibration.summarise()


def test_known_answers() -> None:
    even = figures([0.25] * 4, [0, 1, 2, 3])
    assert even == pytest.approx(
        {"entropy": math.log(4), "nll": math.log(4), "ece": 0, "class_correlation": 0}, abs=1e-6
    )
    calibrated = figures([0.8, 0.1, 0.1], [0] * 8 + [1, 2])
    assert calibrated["ece"] == pytest.approx(0, abs=1e-6)
    assert calibrated["nll"] == pytest.approx(calibrated["entropy"], rel=1e-6)
    assert figures([0.8, 0.1, 0.1], [0, 1, 1, 1])["ece"] == pytest.approx(0.55)
    assert figures([0.7, 0.2, 0.1], [0] * 10)["nll"] == pytest.approx(-math.log(0.7))


def test_opposite_errors_do_not_cancel_between_bins() -> None:
    """Half of the pixels too sure by 0.2, half too doubtful by 0.4: together they would be off by 0.1."""
    calibration = Calibration(2)
    for sure, right in ((0.9, 7), (0.6, 10)):
        logits = torch.tensor([sure, 1 - sure]).log()[None, :, None, None].expand(1, -1, 1, 10)
        calibration.update(logits, torch.tensor([0] * right + [1] * (10 - right))[None, None])
    assert calibration.summarise()["ece"] == pytest.approx(0.3)


def test_relations_between_classes() -> None:
    pairs = torch.tensor([[5.0, 1, 0, 0], [3, 9, 0, 0], [0, 0, 4, 2], [0, 0, 1, 1]])
    assert class_correlation(pairs) == pytest.approx(1)  # each class is mistaken for one other
    smoothed = torch.eye(4) * 8 + 0.5
    assert class_correlation(smoothed) == pytest.approx(0, abs=1e-12)
    half = torch.tensor([[5.0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]])  # absent; never missed
    assert class_correlation(half) == pytest.approx(1 - math.log(2) / math.log(3))
    assert class_correlation(half * 1000) == class_correlation(half)
    assert math.isnan(class_correlation(torch.eye(3)))
    assert math.isnan(class_correlation(torch.ones(2, 2)))


def test_without_a_label_all_is_nan() -> None:
    empty = Calibration(3)
    assert set(empty.summarise()) == set(NAMES)
    empty.update(torch.randn(1, 3, 4, 4), torch.full((1, 8, 8), 255))
    assert all(math.isnan(value) for value in empty.summarise().values())


def test_halves_add_up_to_the_whole() -> None:
    logits, labels = example()
    whole, halves = Calibration(5), [Calibration(5), Calibration(5)]
    whole.update(logits, labels)
    for half, images in zip(halves, (slice(0, 1), slice(1, 4)), strict=True):
        half.update(logits[images], labels[images])

    class Two:
        """Stands for an Accelerator that adds what the other process has."""

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            names = ("totals", "confidence", "counts", "soft_confusion")
            other = [name for name in names if getattr(halves[0], name) is tensor]
            return tensor + getattr(halves[1], other[0])

    halves[0].reduce(Two())
    halves[0].reduce(Two())
    assert torch.equal(halves[0].counts, whole.counts)
    assert halves[0].summarise() == pytest.approx(whole.summarise(), rel=1e-12)
    with pytest.raises(RuntimeError, match="already added up"):
        halves[0].update(logits, labels)


def test_right_and_labelled_as_the_confusion_matrix_counts() -> None:
    logits, labels = example()
    calibration, matrix = Calibration(5), ConfusionMatrix(5)
    calibration.update(logits, labels)
    matrix.update(logits, labels)
    pixels, right = calibration.counts.sum(1).tolist()
    assert pixels == int(matrix.matrix.sum())
    assert abs(right - int(matrix.matrix.trace())) <= 1  # a tie may fall either way
    rows: Any = calibration.soft_confusion.sum(1)
    torch.testing.assert_close(rows, matrix.matrix.sum(1).double(), rtol=1e-5, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="labels from 3 to 3 among 3 classes"):
        Calibration(3).update(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 3))
    with pytest.raises(ValueError, match="for 3 classes"):
        Calibration(3).update(torch.randn(1, 4, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
