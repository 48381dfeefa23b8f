"""How much a model's probabilities say: entropy, cross-entropy, calibration, and what they tell of other classes.

Everything comes from sums over pixels, which add up over images and processes; counts are whole numbers.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evaluation.metrics import IGNORE_INDEX

BLOCK_ELEMENTS = 2**19  # numbers of upsampled logits that exist at once: they stay in the cache
BINS = 15


class Calibration:
    """Sums over labelled pixels, at label size, of which `summarise` makes the figures.

    It stands beside a ConfusionMatrix and gets the same logits and labels.

    Args:
        num_classes: C, at least 2.
        device: where logits and labels are, and the sums stay.
        every: takes each `every`-th row and column of the labels; 1 takes all, at 2.5 times the time of an
            evaluation without. 5 is for the evaluations during a training: a 25th of the pixels says nearly the
            same, as neighbours tell little new (on CamVid within 0.001), at a tenth more time; and an odd number
            meets a grid of logits at stride 4, 8 or 16 in all of its phases, so that models of different strides
            are treated alike.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, every: int = 1) -> None:
        self.num_classes = num_classes
        self.every = every
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # entropy, cross-entropy
        self.confidence = torch.zeros(BINS, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, BINS, dtype=torch.int64, device=device)  # pixels, and those answered right
        self.soft_confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
        self._reduced = False

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: `logits` [B, C, h, w] at the model's stride, `labels` integers [B, H, W], 255 void.

        The probabilities are those of the bilinearly upsampled logits, in float32, of a block of rows at a time.
        """
        if self._reduced:
            raise RuntimeError("the sums are already added up over the processes; begin a new calibration")
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {self.num_classes} classes")
        size = (labels.shape[-2], labels.shape[-1])
        for image, truth in zip(logits.float(), labels, strict=True):
            for rows, columns, block in upsampled_blocks(image, size, self.every):
                self._add(block.flatten(1), truth[rows, columns].flatten())

    def _add(self, logits: Tensor, truth: Tensor) -> None:
        """P pixels: logits [C, P], labels [P]."""
        labelled = truth != IGNORE_INDEX
        if not labelled.all():
            logits, truth = logits[:, labelled], truth[labelled]
        if not len(truth):
            return
        if int(truth.min()) < 0 or int(truth.max()) >= self.num_classes:
            raise ValueError(f"labels from {truth.min()} to {truth.max()} among {self.num_classes} classes")
        highest, guess = logits.max(0)
        logits = logits - highest
        odds = logits.exp()
        total = odds.sum(0)
        probability, log_total = odds / total, total.log()
        entropy = log_total - (probability * logits).sum(0)
        cost = log_total - logits.gather(0, truth[None])[0]
        self.totals += torch.stack([entropy.sum(dtype=torch.float64), cost.sum(dtype=torch.float64)])
        confidence = 1 / total
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        counts = (2 * place + (guess == truth)).bincount(minlength=2 * BINS).view(BINS, 2)
        self.counts += torch.stack([counts.sum(1), counts[:, 1]])
        self.confidence.index_add_(0, place, confidence.double())
        truths = truth == torch.arange(self.num_classes, device=truth.device)[:, None]
        self.soft_confusion += truths.to(probability) @ probability.T

    def reduce(self, accelerator: Any = None) -> None:
        """Sum over the processes of an Accelerator, once: a second call changes nothing."""
        if accelerator is not None and not self._reduced:
            for name in ("totals", "confidence", "counts", "soft_confusion"):
                setattr(self, name, accelerator.reduce(getattr(self, name), reduction="sum"))
            self._reduced = True

    def summarise(self) -> dict[str, float]:
        """The figures; NaN where nothing is labelled.

        `entropy`: mean of the entropy of the predicted distribution, in nats, from 0 to log C.
        `nll`: mean cross-entropy of the labels, in nats.
        `ece`: expected calibration error (Guo et al. 2017, eq. 3): |accuracy - mean confidence| of each of 15
        equally wide bins of confidence, (0, 1/15] to (14/15, 1], weighted by the bins' shares of the pixels. The
        confidence is the probability of the answer.
        `class_correlation`: see below.
        """
        pixels, right = self.counts.tolist()
        number = sum(pixels)
        if not number:
            return dict.fromkeys(("entropy", "nll", "ece", "class_correlation"), math.nan)
        entropy, cost = self.totals.tolist()
        gaps = [abs(hit - sure) for hit, sure in zip(right, self.confidence.tolist(), strict=True)]
        return {
            "entropy": entropy / number,
            "nll": cost / number,
            "ece": sum(gaps) / number,
            "class_correlation": class_correlation(self.soft_confusion),
        }


def class_correlation(soft_confusion: Tensor) -> float:
    """How far the probability that misses the truth depends on the classes: the knowledge that is called dark.

        1 - H(q_y) / log(C - 1),    q_y(c) the share of class c != y in the probability missed at pixels of y

    a mean over the true classes y. `soft_confusion` [C, C] has the predicted probabilities summed over the pixels
    of each true class (rows). It is 0 where what is missed is spread evenly over the other classes, as label
    smoothing asks for, whereby relations between classes are lost to a student (Müller et al. 2019; Yuan et al.
    2020), and 1 where each class is mistaken for one other alone. What distinguishes the wrong classes from one
    another is what a student learns from a teacher beyond the labels (Fan et al. 2024, arXiv:2405.13078, who
    take their variance pixel by pixel). It does not depend on how much is missed: that is the entropy's part.

    The nearer reading, a mean of the Pearson correlations between the probabilities of two classes over the
    pixels, tells less: the probabilities add up to 1, so that it is close to -1 / (C - 1) for every model.

    Classes that are not labelled, or never missed, are left out; NaN where there is no other, or C is 2.
    """
    missed = soft_confusion.double().cpu().clone().fill_diagonal_(0)
    missed = missed[missed.sum(1) > 0]
    wrong = soft_confusion.shape[0] - 1
    if wrong < 2 or not len(missed):
        return math.nan
    share = missed / missed.sum(1, keepdim=True)
    return float((1 + torch.special.xlogy(share, share).sum(1) / math.log(wrong)).mean())


def upsampled_blocks(
    logits: Tensor, size: tuple[int, int], every: int = 1
) -> Iterator[tuple[slice, slice, Tensor]]:
    """An image's logits [C, h, w] at label size, bilinear as in PyTorch (align_corners=False), by blocks of rows.

    Yields the block's rows and columns of the label, each `every`-th, and its logits [C, rows, columns] in the
    type that they came in.
    """
    height, width = size
    columns = slice(every // 2, width, every)
    across = len(range(*columns.indices(width)))
    tall = every * max(1, BLOCK_ELEMENTS // (logits.shape[0] * max(1, across)))
    for start in range(every // 2, height, tall):
        rows = slice(start, min(start + tall, height), every)
        yield rows, columns, _between(_between(logits, 1, rows, height), 2, columns, width)


def _between(values: Tensor, dimension: int, chosen: slice, length: int) -> Tensor:
    """Values at the chosen places, interpolated as if the dimension were brought to `length`."""
    known = values.shape[dimension]
    places = torch.arange(*chosen.indices(length), dtype=torch.float64, device=values.device)
    places = ((places + 0.5) * known / length - 0.5).clamp(0, known - 1)
    before = places.long()
    share = (places - before).to(values.dtype)
    if dimension == 1:
        share = share[:, None]
    after = (before + 1).clamp(max=known - 1)
    return torch.lerp(values.index_select(dimension, before), values.index_select(dimension, after), share)
