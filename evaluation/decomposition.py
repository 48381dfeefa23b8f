"""Bias and variance of a method: its expected cross-entropy over seeds, taken apart at every pixel.

For runs k = 1..K of one method, with predicted distributions p_k, and a target distribution t:

    mean_k -sum_c t(c) log p_k(c)  =  H(t)  +  KL(t || p)  +  mean_k KL(p || p_k)
    expected loss                     noise    bias           variance

    p(c) = exp(mean_k log p_k(c)) / Z,    the normalised geometric mean of the p_k

(Heskes 1998; Yang et al. 2020). Of a label y the noise is 0 and the bias `-log p(y)`: what is wrong with the
method whichever seed it is trained with. The variance is what the seed does to it. Over K runs it is their
variance about their own mean, on average smaller than the method's by about (K - 1) / K; the rest is in the bias.
So compare methods over equal numbers of runs.

All is computed in float64, at label size, of a block of rows at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.calibration import upsampled_blocks
from evaluation.metrics import IGNORE_INDEX

REGIONS = ("interior", "boundary")


class Parts(NamedTuple):
    """What a decomposition gives at each pixel, float64 in nats."""

    loss: Tensor
    """The measured one: the mean over the runs of the cross-entropy, computed without the others."""
    noise: Tensor
    bias: Tensor
    variance: Tensor


def decompose(logits: Tensor, target: Tensor) -> Parts:
    """Noise, bias and variance of each pixel.

    Args:
        logits: [K, C, ...] of the K runs, finite.
        target: labels, integers [...], or distributions, floats [C, ...].

    Returns:
        Four tensors [...]; loss = noise + bias + variance but for rounding.
    """
    log_p = logits.double().log_softmax(1)
    mean = log_p.mean(0)
    log_mean = mean.log_softmax(0)  # divides by Z
    variance = (log_mean.exp() * (log_mean - log_p)).sum(1).mean(0)
    if target.is_floating_point():
        known = target.double()
        loss = -(known * log_p).sum(1).mean(0)
        noise = -torch.special.xlogy(known, known).sum(0)
        bias = (torch.special.xlogy(known, known) - known * log_mean).sum(0)
        return Parts(loss, noise, bias, variance)
    truths = target.expand(len(logits), *target.shape)
    loss = F.cross_entropy(logits.double(), truths, reduction="none").mean(0)
    bias = -log_mean.gather(0, target[None])[0]
    return Parts(loss, torch.zeros_like(bias), bias, variance)


@torch.no_grad()
def decompose_image(logits: Sequence[Tensor], labels: Tensor) -> Parts:
    """Maps [H, W] of one image; NaN where it has no label.

    `logits` of each run [C, h, w], each at its own stride, `labels` integers [H, W], 255 void.
    """
    size = (labels.shape[-2], labels.shape[-1])
    labelled = labels != IGNORE_INDEX
    target = torch.where(labelled, labels, 0)
    maps = torch.full((len(Parts._fields), *size), math.nan, dtype=torch.float64, device=labels.device)
    for blocks in zip(*(upsampled_blocks(one.double(), size) for one in logits), strict=True):
        rows = blocks[0][0]
        parts = decompose(torch.stack([block for _, _, block in blocks]), target[rows])
        maps[:, rows] = torch.stack(parts).where(labelled[rows], math.nan)
    return Parts(*maps)


def near_boundary(labels: Tensor, width: int) -> Tensor:
    """Boolean [H, W]: labelled pixels with one of another class at most `width` rows and columns away.

    Void is no class: beside it alone there is no boundary.
    """
    labelled = labels != IGNORE_INDEX
    values = labels[None].float()
    highest = _highest_near(values.masked_fill(~labelled, -math.inf), width)
    lowest = -_highest_near((-values).masked_fill(~labelled, -math.inf), width)
    return labelled & (highest != lowest)[0]


def _highest_near(values: Tensor, width: int) -> Tensor:
    return F.max_pool2d(values, 2 * width + 1, stride=1, padding=width)


@torch.no_grad()
def wsl_weights(students: Sequence[Tensor], teacher: Tensor, labels: Tensor) -> Tensor:
    """The weights of weighted soft labels (Zhou et al. 2021), `1 - exp(-CE_student / CE_teacher)`, float64 [H, W].

    They are that method's guess at each pixel of whether a soft label helps the bias or hurts the variance: low
    where the student already does well by the teacher. A mean over the runs; NaN where there is no label. The
    logits are [C, h, w], `labels` integers [H, W].
    """
    theirs = decompose_image([teacher], labels).loss
    ours = torch.stack([decompose_image([student], labels).loss for student in students])
    return -torch.expm1(-ours / (theirs + 1e-7)).mean(0)


class Decomposition:
    """Sums of loss, noise, bias and variance over labelled pixels, by region and true class.

    Args:
        num_classes: C.
        device: where logits and labels are, and the sums stay.
        width: of the region at boundaries, see `near_boundary`.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, width: int = 3) -> None:
        self.num_classes = num_classes
        self.width = width
        cells = len(REGIONS) * num_classes
        self.counts = torch.zeros(cells, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(Parts._fields), cells, dtype=torch.float64, device=device)
        self._reduced = False

    def update(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Take in one image: the logits [C, h, w] of each run, and its labels [H, W]."""
        labelled = labels != IGNORE_INDEX
        region = near_boundary(labels, self.width).long()
        cell = (region * self.num_classes + labels)[labelled]
        self.counts += cell.bincount(minlength=len(self.counts))
        self.sums.index_add_(1, cell, torch.stack(decompose_image(logits, labels))[:, labelled])

    def reduce(self, accelerator: Any = None) -> None:
        """Sum over the processes of an Accelerator, once: a second call changes nothing."""
        if accelerator is not None and not self._reduced:
            self.counts = accelerator.reduce(self.counts, reduction="sum")
            self.sums = accelerator.reduce(self.sums, reduction="sum")
            self._reduced = True

    def summarise(self, names: Sequence[str]) -> dict[str, Any]:
        """Means in nats over all labelled pixels, `regions` and `classes` by name; NaN where there is no pixel.

        Each has `loss`, `noise`, `bias`, `variance`, `difference` (loss less the sum of the other three) and
        `pixels`.
        """
        counts = self.counts.view(len(REGIONS), self.num_classes)
        sums = self.sums.view(-1, len(REGIONS), self.num_classes)
        by_region = zip(REGIONS, counts.sum(1), sums.sum(2).T, strict=True)
        by_class = zip(names, counts.sum(0), sums.sum(1).T, strict=True)
        return _means(counts.sum(), sums.sum((1, 2))) | {
            "regions": {name: _means(count, total) for name, count, total in by_region},
            "classes": {name: _means(count, total) for name, count, total in by_class},
        }


def _means(count: Tensor, totals: Tensor) -> dict[str, Any]:
    number = int(count)
    values = [total / number if number else math.nan for total in totals.tolist()]
    parts = dict(zip(Parts._fields, values, strict=True))
    loss, *others = values
    return parts | {"difference": loss - sum(others), "pixels": number}
