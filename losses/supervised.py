"""Losses of the labels alone, for teachers, baselines and students.

Dimension letters: B images, C classes, R label rows of a block, W label columns, P pixels of an image.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigurationError
from losses.blocks import (
    ImageTerm,
    PixelTerm,
    PixelTermConfig,
    blocked_mean,
    blocked_sum,
    counted_pixels,
    safe,
    upsampled_blocks,
)
from losses.term import IGNORE_INDEX, Context, ModelOutput, TermConfig, full_precision


@dataclass
class CrossEntropyConfig(PixelTermConfig):
    """Cross-entropy with the labels."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(
                f"losses.cross_entropy.label_smoothing: {self.label_smoothing} is not in [0, 1); give say 0.1"
            )


@dataclass
class FocalConfig(PixelTermConfig):
    """Focal loss (Lin et al. 2017): cross-entropy with little weight on what is already right."""

    gamma: float = 2.0
    """How fast the weight falls with the probability of the label's class; 0 is cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ConfigurationError(f"losses.focal.gamma: {self.gamma} is negative; give 0 or more, say 2")


@dataclass
class DiceConfig(TermConfig):
    """Soft Dice (Milletari et al. 2016): the overlap with each class of the image."""


@dataclass
class LovaszConfig(TermConfig):
    """Lovász-softmax (Berman et al. 2018): the Jaccard index of each class of the image, made convex."""


@dataclass
class OHEMConfig(TermConfig):
    """Cross-entropy of the hardest pixels of each image alone (Shrivastava et al. 2016)."""

    threshold: float = 0.7
    """A pixel is kept if the probability of its label's class is below it."""
    least: float = 0.190735
    """Share of an image's labelled pixels that is kept at least: about 100,000 of an image of 512×1024."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("threshold", "least"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigurationError(f"losses.ohem.{key}: {getattr(self, key)} is not in (0, 1]; give say 0.7")


@dataclass
class BoundaryConfig(PixelTermConfig):
    """Cross-entropy with more weight near the boundaries of the labels (Ronneberger et al. 2015)."""

    strength: float = 10.0
    """How much weight a boundary pixel has besides the 1 that every pixel has."""
    width: float = 5.0
    """Standard deviation, in label pixels, of the bell by which the weight falls off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength < 0:
            raise ConfigurationError(f"losses.boundary.strength: {self.strength} is negative; give 0 or more")
        if self.width <= 0:
            raise ConfigurationError(f"losses.boundary.width: {self.width} is not positive; give say 5")


@dataclass
class ConfidencePenaltyConfig(PixelTermConfig):
    """Confidence penalty (Pereyra et al. 2017): rewards entropy, for teachers worth imitating."""

    weight: float = 0.1
    """Factor of the term in the total loss."""


@dataclass
class MarginConfig(PixelTermConfig):
    """Margin-based label smoothing (Liu et al. 2022): no logit need be further than this below the highest."""

    weight: float = 0.1
    """Factor of the term in the total loss."""
    margin: float = 10.0
    """Distance between logits that costs nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin < 0:
            raise ConfigurationError(f"losses.margin.margin: {self.margin} is negative; give 0 or more, say 10")


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 4), mean over labelled pixels of `-(1 - p)^gamma * log p`.

    p is the softmax's probability of the label's class; the paper's is a sigmoid's, of one class at a time.

    Args:
        logits: [B, C, h, w], at any stride; upsampled by blocks to the labels.
        labels: int64 [B, H, W]; 255 is left out.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, without a labelled pixel. Differentiable once.
    """

    def pixels(ours: Tensor, theirs: None, target: Tensor) -> Tensor:
        return _focal(ours, target, gamma)

    return blocked_mean(pixels, logits, None, *counted_pixels(labels))


def _focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """`focal` of each pixel, from target classes [B, R, W]."""
    cost = F.cross_entropy(logits, target, reduction="none")
    missing = -torch.expm1(-cost)  # 1 - p
    missing = missing.clamp(min=torch.finfo(cost.dtype).tiny)  # at 0 a power has no finite gradient
    return missing**gamma * cost


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice (Milletari et al. 2016), a mean over images and over the classes present in each.

        1 - 2 * sum(p * y) / (sum(p²) + sum(y²)),    sums over the labelled pixels of an image

    p the softmax's probabilities and y the labels, 0 or 1. A class that is in no label of an image has no overlap
    to speak of and is left out, where common code smooths it by adding 1 to both sums, which rewards small
    images, and has void pixels' probabilities in the lower sum.

    Args:
        logits: [B, C, h, w], at any stride; upsampled by blocks to the labels.
        labels: int64 [B, H, W]; 255 is left out.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, without a labelled pixel. Differentiable once.
    """

    def overlaps(logits: Tensor, _: None, labels: Tensor) -> Tensor:
        labelled = (labels != IGNORE_INDEX)[:, None]
        probability = logits.softmax(1) * labelled
        target = torch.where(labelled, labels[:, None], 0)
        hit = torch.zeros_like(probability).scatter_(1, target, labelled.to(probability))
        sums = (probability * hit, probability.square(), hit)
        return torch.stack([x.sum((2, 3)) for x in sums])

    def finish(total: Tensor) -> Tensor:
        hits_BC, squares_BC, area_BC = total
        present = area_BC > 0
        lost = 1 - 2 * hits_BC / torch.where(present, squares_BC + area_BC, 1.0)
        classes = present.sum(1).clamp(min=1)
        return (torch.where(present, lost, 0.0).sum(1) / classes).mean()

    return blocked_sum(overlaps, logits, None, [labels], finish=finish)


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Lovász-softmax (Berman et al. 2018), a mean over images and over the classes present in each.

    For class c the errors `|y - p_c|` of an image's labelled pixels, sorted from the highest, are weighted by
    what each adds to the Jaccard loss of all those before it. This is the authors' `per_image=True` with
    `classes='present'`; their default sorts the pixels of the whole batch at once. The differences of the
    Jaccard loss are taken in float64: of a million pixels each adds about as much as float32 rounds away.

    An image's rows are all upsampled at once, and the classes sorted one after the other.

    Args:
        logits: [B, C, h, w], at any stride.
        labels: int64 [B, H, W]; 255 is left out.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, without a labelled pixel. Differentiable once.
    """

    def image(logits: Tensor, _: None, labels: Tensor) -> Tensor:
        flat, labels = logits[0].flatten(1), labels.flatten()
        labelled = labels != IGNORE_INDEX
        probability, target = flat[:, labelled].softmax(0), labels[labelled]
        present = target.unique()
        hit = target == present[:, None]
        errors = (hit.to(probability) - probability[present]).abs()
        steps = [_jaccard_steps(*pair) for pair in zip(errors.detach(), hit, strict=True)]
        return (errors * torch.stack(steps)).sum() / len(present) if steps else errors.sum()

    return blocked_sum(image, logits, None, [labels], whole_images=True) / max(1, len(logits))


def _jaccard_steps(errors: Tensor, hit: Tensor) -> Tensor:
    """What each pixel [P] adds to the Jaccard loss when pixels become wrong from the highest error on."""
    order = errors.argsort(descending=True)
    hits = hit[order].long()
    left, area = hits.sum() - hits.cumsum(0), hits.sum() + (1 - hits).cumsum(0)
    jaccard = 1 - left.double() / area.double()
    steps = torch.diff(jaccard, prepend=jaccard.new_zeros(1))
    return torch.empty_like(errors).scatter_(0, order, steps.to(errors))


def ohem(logits: Tensor, labels: Tensor, *, threshold: float = 0.7, least: float = 0.190735) -> Tensor:
    """Cross-entropy of the hardest pixels (Shrivastava et al. 2016), a mean over those kept, then over images.

    Kept are the labelled pixels whose label's class has a probability below `threshold`, and at least the
    share `least` of an image's labelled pixels, the hardest. The constants are those commonly used for
    Cityscapes, where the least number is fixed, and taken over the whole batch, so that it keeps more of smaller
    crops and depends on how the batch is split; here it is a share of each image. Pixels as hard as the last that
    is kept are kept too.

    Args:
        logits: [B, C, h, w], at any stride; upsampled by blocks to the labels, twice.
        labels: int64 [B, H, W]; 255 is left out.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, without a labelled pixel. Differentiable once.
    """
    labelled, target = counted_pixels(labels)
    kept = _hardest(logits, labelled, target, threshold, least)
    number = kept.sum((1, 2), keepdim=True).clamp(min=1)
    weight = full_precision(kept.to(logits.dtype)) / (max(1, len(logits)) * number)

    def block(ours: Tensor, theirs: None, target: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(ours, target, reduction="none") * weight).sum()

    return blocked_sum(block, logits, None, [target, weight])


def _hardest(logits: Tensor, labelled: Tensor, target: Tensor, threshold: float, least: float) -> Tensor:
    """Boolean [B, H, W]: the pixels that `ohem` keeps."""
    cost = torch.zeros(labelled.shape, dtype=full_precision(logits.detach()).dtype, device=logits.device)
    for rows, block in upsampled_blocks(logits.detach(), (labelled.shape[-2], labelled.shape[-1])):
        cost[:, rows] = F.cross_entropy(block, target[:, rows], reduction="none")
    hardest_first = cost.masked_fill(~labelled, -math.inf).flatten(1).sort(descending=True).values
    number = (least * labelled.flatten(1).sum(1)).ceil().long().clamp(min=1)
    limit = hardest_first.gather(1, number[:, None] - 1)[:, None]
    return labelled & ((cost >= limit) | (cost > -math.log(threshold)))


def boundary(logits: Tensor, labels: Tensor, *, strength: float = 10.0, width: float = 5.0) -> Tensor:
    """Cross-entropy with more weight near boundaries (Ronneberger et al. 2015, eq. 2), a weighted mean.

        w = 1 + strength * exp(-d² / (2 * width²)),    sum(w * CE) / sum(w) over labelled pixels

    d is the distance, in pixels of the labels, to the nearest pixel with a neighbour above, below, left or right
    of another class; void is no class. U-Net takes the sum of the distances to the two nearest cells; semantic
    labels have no cells, so the distance to the nearest boundary takes its place. Constants are U-Net's. The
    bell is cut off at three times its width.

    Args:
        logits: [B, C, h, w], at any stride; upsampled by blocks to the labels.
        labels: int64 [B, H, W]; 255 is left out.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, without a labelled pixel. Differentiable once.
    """
    weight = boundary_weight(labels, strength, width)

    def block(ours: Tensor, theirs: None, labels: Tensor, weight: Tensor) -> Tensor:
        return _boundary_cost(ours, labels, weight).sum()

    total = blocked_sum(block, logits, None, [labels, weight])
    return total / safe(weight.sum(dtype=torch.float64), total)


def boundary_weight(labels: Tensor, strength: float, width: float) -> Tensor:
    """`w` of `boundary`: float32 [B, H, W], 0 where void."""
    labelled = labels != IGNORE_INDEX
    edge = torch.zeros_like(labelled)
    for one, other in (
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ((slice(None), slice(None), slice(1, None)), (slice(None), slice(None), slice(None, -1))),
    ):
        differs = (labels[one] != labels[other]) & labelled[one] & labelled[other]
        edge[one] |= differs
        edge[other] |= differs
    bell = (edge.float(), math.ceil(3 * width))
    # exp(-d²) of the nearest is the highest product of one factor a direction.
    near = _widest(_widest(*bell, width, dimension=1), bell[1], width, dimension=2)
    return (1 + strength * near) * labelled


def _widest(values: Tensor, reach: int, width: float, dimension: int) -> Tensor:
    """Highest of the values within `reach` along a dimension, each times its bell of the distance."""
    best = values.clone()
    length = values.shape[dimension]
    for step in range(1, min(reach, length - 1) + 1):
        faded = values * math.exp(-(step**2) / (2 * width**2))
        before, after = best.narrow(dimension, 0, length - step), best.narrow(dimension, step, length - step)
        torch.maximum(before, faded.narrow(dimension, step, length - step), out=before)
        torch.maximum(after, faded.narrow(dimension, 0, length - step), out=after)
    return best


def _boundary_cost(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none") * weight.to(logits)


def confidence_penalty(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Confidence penalty (Pereyra et al. 2017): mean over pixels of `-H(p)`, the negative entropy.

    Beside cross-entropy, with weight beta. The entropy is the sum over the classes; a common implementation
    takes their mean, by which beta depends on the number of classes.

    Args:
        logits: [B, C, h, w], at any stride; upsampled by blocks to the mask.
        mask: boolean [B, H, W], True where a pixel counts; all of the logits' pixels without it.

    Returns:
        A scalar from -log(C) to 0, at least float32; 0, with a zero gradient, where no pixel counts.
        Differentiable once.
    """
    return blocked_mean(lambda ours, _: _negative_entropy(ours), logits, None, mask)


def _negative_entropy(logits: Tensor) -> Tensor:
    log_probability = F.log_softmax(logits, dim=1)
    return (log_probability.exp() * log_probability).sum(1)


def margin(logits: Tensor, *, mask: Tensor | None = None, margin: float = 10.0) -> Tensor:
    """Margin-based label smoothing (Liu et al. 2022): mean of `max(0, max(z) - z - m)`.

    The mean is over pixels and classes, m the margin. Beside cross-entropy, with weight 0.1. Logits within the
    margin of the highest cost nothing, so a teacher keeps telling the other classes apart. Label smoothing is the
    case m = 0, which asks for equal logits.

    Args:
        logits: [B, C, h, w], at any stride; upsampled by blocks to the mask.
        mask: boolean [B, H, W], True where a pixel counts; all of the logits' pixels without it.
    """
    return blocked_mean(lambda ours, _: _beyond_margin(ours, margin), logits, None, mask)


def _beyond_margin(logits: Tensor, margin: float) -> Tensor:
    return F.relu(logits.max(dim=1, keepdim=True).values - logits - margin).mean(1)


class Supervised(PixelTerm):
    """A mean over labelled pixels that knows no teacher."""

    taught = False


class Focal(Supervised):
    """`focal` of the labelled pixels."""

    def __init__(self, config: FocalConfig, context: Context) -> None:
        super().__init__(config, context)
        self.gamma = config.gamma

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return _focal(student, labels, self.gamma)


class ConfidencePenalty(Supervised):
    """`confidence_penalty` of the labelled pixels."""

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return _negative_entropy(student)


class Margin(Supervised):
    """`margin` of the labelled pixels."""

    def __init__(self, config: MarginConfig, context: Context) -> None:
        super().__init__(config, context)
        self.margin = config.margin

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return _beyond_margin(student, self.margin)


class Boundary(Supervised):
    """`boundary` of the labelled pixels; the denominator is the sum of their weights."""

    def __init__(self, config: BoundaryConfig, context: Context) -> None:
        super().__init__(config, context)
        self.strength, self.width = config.strength, config.width

    def count(self, labels: Tensor) -> Tensor:
        return self.weight(labels).sum(dtype=torch.float64)

    def weight(self, labels: Tensor) -> Tensor:
        """[B, H, W], by distance and class; 0 where void."""
        weight = boundary_weight(labels, self.strength, self.width)
        if self.class_weights is None:
            return weight
        return weight * self.class_weights.to(weight)[counted_pixels(labels)[1]]

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        def block(ours: Tensor, theirs: None, labels: Tensor, weight: Tensor) -> Tensor:
            return _boundary_cost(ours, labels, weight).sum()

        total = blocked_sum(block, student.logits, None, [labels, self.weight(labels)])
        return total / safe(denominator, total)


class Dice(ImageTerm):
    """`dice`."""

    taught = False

    def compare(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return dice(student, labels)


class Lovasz(ImageTerm):
    """`lovasz`."""

    taught = False

    def compare(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return lovasz(student, labels)


class OHEM(ImageTerm):
    """`ohem`."""

    taught = False

    def __init__(self, config: OHEMConfig, context: Context) -> None:
        super().__init__(config, context)
        self.threshold, self.least = config.threshold, config.least

    def compare(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return ohem(student, labels, threshold=self.threshold, least=self.least)
