"""The confusion matrix and its scores: against torchmetrics, by hand, and their invariants."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from evaluation.metrics import ConfusionMatrix, chance_miou, predict, scores

# Three classes are labelled, the fourth is only predicted, the fifth occurs nowhere.
BY_HAND = np.array([[6, 2, 0, 0, 0], [1, 3, 0, 0, 0], [0, 0, 4, 2, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


def whole(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scores_by_hand(as_tensor: bool) -> None:
    matrix = torch.from_numpy(BY_HAND) if as_tensor else BY_HAND
    result = scores(matrix)
    assert isinstance(result["iou"], torch.Tensor if as_tensor else np.ndarray)
    iou = np.asarray(result["iou"])
    assert iou.dtype == np.float64
    np.testing.assert_allclose(iou, [6 / 9, 3 / 6, 4 / 6, 0.0, math.nan])
    assert result["miou"] == pytest.approx((6 / 9 + 3 / 6 + 4 / 6 + 0) / 4)
    assert result["pixel_accuracy"] == pytest.approx(13 / 18)
    assert result["class_accuracy"] == pytest.approx((6 / 8 + 3 / 4 + 4 / 6) / 3)
    assert all(isinstance(result[name], float) for name in ("miou", "pixel_accuracy", "class_accuracy"))


def test_scores_of_nothing_are_nan_without_a_warning() -> None:
    with np.errstate(all="raise"):
        result = scores(np.zeros((3, 3), dtype=np.int64))
    assert np.isnan(result["iou"]).all()
    assert all(math.isnan(result[name]) for name in ("miou", "pixel_accuracy", "class_accuracy"))


@pytest.mark.parametrize("bad", [np.zeros((2, 3), int), np.zeros(4, int), np.zeros((2, 2)), -np.eye(2, dtype=int)])
def test_scores_refuse_what_is_no_matrix_of_counts(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="confusion matrix"):
        scores(bad)


def test_agrees_with_torchmetrics_with_void_pixels_and_an_absent_class() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = 7
    counted = ConfusionMatrix(classes)
    all_predictions, all_labels = [], []
    for _ in range(3):
        logits = torch.randn(2, classes, 12, 16, generator=generator)
        logits[:, 5] = -1e9  # class 5: neither predicted nor labelled
        labels = torch.randint(0, classes, (2, 48, 64), generator=generator)
        labels[labels == 5] = 255
        labels[:, :7] = 255
        all_predictions.append(counted.update(logits, labels))
        all_labels.append(labels)
    predictions, labels = torch.cat(all_predictions), torch.cat(all_labels)
    result = scores(counted.matrix)
    options: dict[str, Any] = {"num_classes": classes, "ignore_index": 255}
    per_class = multiclass_jaccard_index(predictions, labels, average="none", **options)
    present = [c for c in range(classes) if c != 5]
    np.testing.assert_allclose(result["iou"][present], per_class[present], rtol=1e-6)
    assert torch.isnan(result["iou"][5])
    macro = multiclass_jaccard_index(predictions, labels, average="macro", **options)
    assert result["miou"] == pytest.approx(float(macro), rel=1e-6)
    micro = multiclass_accuracy(predictions, labels, average="micro", **options)
    assert result["pixel_accuracy"] == pytest.approx(float(micro), rel=1e-6)
    recall = multiclass_accuracy(predictions, labels, average="macro", **options)
    assert result["class_accuracy"] == pytest.approx(float(recall), rel=1e-6)
    assert int(counted.matrix.sum()) == int((labels != 255).sum())


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("classes", "source", "size"),
    [
        (19, (32, 64), (128, 256)),
        (11, (45, 60), (360, 480)),
        (5, (30, 48), (60, 132)),
        (3, (40, 130), (40, 130)),  # no upsampling
        (19, (37, 53), (150, 200)),  # no whole factor
        (7, (30, 60), (90, 180)),  # a factor of three
        (7, (40, 50), (33, 47)),  # smaller than the logits
        (4, (100, 8), (400, 32)),  # narrow
    ],
)
def test_prediction_is_bit_identical_to_upsampling(
    classes: int,
    source: tuple[int, int],
    size: tuple[int, int],
    memory: torch.memory_format,
) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, *source, generator=generator).contiguous(memory_format=memory)
    assert torch.equal(predict(logits, size), whole(logits, size))


def test_half_precision_logits_are_upsampled_in_float32() -> None:
    logits = torch.randn(1, 5, 16, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(predict(logits, (64, 160)), whole(logits.float(), (64, 160)))


def test_a_label_that_is_no_class_is_refused() -> None:
    counted = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="label 3 among 3 classes"):
        counted.update(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 3))
    with pytest.raises(ValueError, match="label -1"):
        counted.update(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), -1))
    with pytest.raises(ValueError, match="for 3 classes"):
        counted.update(torch.randn(1, 4, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="predictions"):
        counted.update_labels(torch.zeros(1, 2, 2), torch.zeros(1, 4, 4))
    assert int(counted.matrix.sum()) == 0


def test_all_void_counts_nothing() -> None:
    counted = ConfusionMatrix(3)
    counted.update(torch.randn(2, 3, 4, 4), torch.full((2, 8, 8), 255))
    assert int(counted.matrix.sum()) == 0


def test_reduce_sums_once() -> None:
    class Two:
        """Stands for an Accelerator of two processes with equal counts."""

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return tensor * 2

    counted = ConfusionMatrix(2)
    counted.update_labels(torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 1, 3, dtype=torch.int64))
    assert int(counted.reduce().sum()) == 3
    assert int(counted.reduce(Two()).sum()) == 6
    assert int(counted.reduce(Two()).sum()) == 6
    with pytest.raises(RuntimeError, match="already summed"):
        counted.update_labels(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3, dtype=torch.int64))


matrices = npst.arrays(np.int64, st.integers(1, 6).map(lambda n: (n, n)), elements=st.integers(0, 10**12))


@settings(max_examples=60, deadline=None)
@given(matrix=matrices, seed=st.integers(0, 99))
def test_invariants(matrix: np.ndarray, seed: int) -> None:
    result = scores(matrix)
    iou = result["iou"]
    np.testing.assert_array_equal(iou, scores(torch.from_numpy(matrix))["iou"].numpy())
    np.testing.assert_array_equal(np.isnan(iou), matrix.sum(0) + matrix.sum(1) == 0)
    assert ((iou >= 0) & (iou <= 1) | np.isnan(iou)).all()
    order = np.random.default_rng(seed).permutation(len(matrix))
    shuffled = scores(matrix[np.ix_(order, order)])
    np.testing.assert_array_equal(shuffled["iou"], iou[order])
    scaled = scores(matrix * 3)  # three times the same images
    for name in ("miou", "pixel_accuracy", "class_accuracy"):
        np.testing.assert_allclose([shuffled[name], scaled[name]], result[name], rtol=1e-12)
    perfect = scores(np.diag(matrix.sum(1)))
    if matrix.sum():
        assert perfect["miou"] == perfect["pixel_accuracy"] == perfect["class_accuracy"] == 1.0
        assert result["pixel_accuracy"] <= 1.0
    swapped = scores(matrix.T)  # the union is symmetric, recall is not
    np.testing.assert_array_equal(swapped["iou"], iou)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 6), max_size=3), seed=st.integers(0, 99))
def test_counts_do_not_depend_on_how_images_are_split(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, 5, 6, generator=generator)
    labels = torch.randint(0, 5, (6, 10, 12), generator=generator)
    labels[labels == 4] = 255
    together, apart = ConfusionMatrix(4), ConfusionMatrix(4)
    together.update(logits, labels)
    edges = [0, *sorted(cuts), 6]
    for start, stop in zip(edges, edges[1:], strict=False):
        apart.update(logits[start:stop], labels[start:stop])
    assert torch.equal(together.matrix, apart.matrix)


# -------------------------------------------------------------------------------------------------- chance


def test_chance_is_what_shuffled_answers_score() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.choice(5, 400_000, p=[0.5, 0.3, 0.1, 0.06, 0.04]), rng.choice(5, 400_000)
    shuffled = np.bincount(truth * 5 + guess, minlength=25).reshape(5, 5)
    assert chance_miou(shuffled) == pytest.approx(scores(shuffled)["miou"], abs=2e-3)
    knowing = np.diag([50, 30, 10, 6, 4])
    assert chance_miou(knowing) < 0.3 * scores(knowing)["miou"]
    assert chance_miou(torch.from_numpy(knowing)) == chance_miou(knowing)


def test_one_answer_for_all_is_its_own_chance() -> None:
    matrix = np.zeros((4, 4), np.int64)
    matrix[:3, 1] = [5, 90, 5]  # and a class that is nowhere
    assert chance_miou(matrix) == pytest.approx(scores(matrix)["miou"])
    assert np.isnan(chance_miou(np.zeros((3, 3), np.int64)))
