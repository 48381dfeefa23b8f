"""Scores of a segmentation, all computed from one confusion matrix of whole-number counts.

Counts add up exactly, so the scores depend neither on the order of the images nor on the number of processes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy.postprocess import native_argmax

IGNORE_INDEX = 255


@torch.no_grad()
def predict(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most likely class of each pixel at label size.

    `logits` [B, C, h, w] at the model's stride, `size` (H, W) -> int64 [B, H, W]: the argmax of the bilinearly
    upsampled logits (float32, align_corners=False), bit for bit, mostly without ever holding all of them: 19
    classes at 1024x2048 would take 160 MB an image.
    """
    return native_argmax(logits, size).long()


class ConfusionMatrix:
    """Counts of (true class, predicted class) over the labelled pixels; `matrix` is int64 [C, C], rows truth."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._reduced = False

    def update(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count a batch and return its predictions, int64 [B, H, W].

        `logits` [B, C, h, w] at the model's stride, `labels` integers [B, H, W], where 255 is not counted.
        Raises ValueError for a label that is neither a class nor 255.
        """
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {self.num_classes} classes")
        predictions = predict(logits, (labels.shape[-2], labels.shape[-1]))
        self.update_labels(predictions, labels)
        return predictions

    def update_labels(self, predictions: Tensor, labels: Tensor) -> None:
        """Count predicted classes, integers [B, H, W], where there are no logits."""
        if self._reduced:
            raise RuntimeError("the matrix is already summed over the processes; begin a new one")
        if predictions.shape != labels.shape:
            raise ValueError(f"predictions {tuple(predictions.shape)} for labels {tuple(labels.shape)}")
        labelled = labels != IGNORE_INDEX
        truth = labels[labelled].to(self.matrix.device, torch.int64)
        guess = predictions[labelled].to(self.matrix.device, torch.int64)
        for what, values in (("label", truth), ("prediction", guess)):
            if values.numel() and (int(values.min()) < 0 or int(values.max()) >= self.num_classes):
                wrong = values[(values < 0) | (values >= self.num_classes)]
                raise ValueError(f"{what} {int(wrong[0])} among {self.num_classes} classes (only 255 is ignored)")
        counts = torch.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.matrix += counts.view(self.num_classes, self.num_classes)

    def reduce(self, accelerator: Any = None) -> Tensor:
        """Sum over the processes of an Accelerator, once: a second call changes nothing. Returns the matrix."""
        if accelerator is not None and not self._reduced:
            self.matrix = accelerator.reduce(self.matrix, reduction="sum")
            self._reduced = True
        return self.matrix


def scores(matrix: np.ndarray | Tensor) -> dict[str, Any]:
    """Scores of a confusion matrix of counts [C, C], rows truth, NumPy or tensor.

    `iou`: intersection over union of each class, float64 [C] of the same kind as the input (a tensor's on the
    CPU), NaN for a class that is neither labelled nor predicted anywhere; `miou`: its mean without those;
    `pixel_accuracy`: share of labelled pixels that are right; `class_accuracy`: mean recall over the classes
    that are labelled somewhere. The three are floats, NaN where nothing is labelled. Raises ValueError for
    anything that is not a square matrix of counts.
    """
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"a confusion matrix is square and of integers, not {counts.shape} of {counts.dtype}")
    if (counts < 0).any():
        raise ValueError("a confusion matrix has no negative counts")
    right = counts.diagonal().astype(np.int64)
    truth, guess = counts.sum(1, dtype=np.int64), counts.sum(0, dtype=np.int64)
    iou = _ratio(right, truth + guess - right)
    return {
        "iou": torch.from_numpy(iou) if isinstance(matrix, Tensor) else iou,
        "miou": _mean(iou),
        "pixel_accuracy": float(_ratio(right.sum(), truth.sum())),
        "class_accuracy": _mean(_ratio(right, truth)),
    }


def chance_miou(matrix: np.ndarray | Tensor) -> float:
    """The mIoU that answers as frequent as those of a confusion matrix have if they know nothing of the truth.

    The expected counts are the products of the matrix's marginals, as in Cohen's kappa. An answer that is always
    the same class is its own chance.
    """
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    total = max(int(counts.sum(dtype=np.int64)), 1)
    truth, guess = counts.sum(1, dtype=np.float64), counts.sum(0, dtype=np.float64)
    right = truth * guess / total
    return _mean(_ratio(right, truth + guess - right))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, NaN where whole is 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    """Mean without NaNs; NaN where there is nothing else."""
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if finite.size else float("nan")
