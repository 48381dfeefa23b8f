"""Distillation of feature maps: FitNets' hints, attention transfer, review, masked generation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from losses.term import (
    BatchNorm,
    Context,
    FeatureTermConfig,
    ModelOutput,
    TapsConfig,
    Term,
    full_precision,
    mask_of,
    pair_taps,
    resize,
    term_name,
)


@dataclass
class FitnetConfig(FeatureTermConfig):
    """FitNets' hints (Romero et al. 2015): mean squared difference after a learned 1×1 projection."""

    weight: float = 10.0
    """Factor of the term in the total loss."""


@dataclass
class AttentionTransferConfig(FeatureTermConfig):
    """Attention transfer (Zagoruyko & Komodakis 2017): where the activations are strong, at each tap."""

    weight: float = 1e4
    """Factor of the term in the total loss (attention maps are of unit norm, so their differences are tiny)."""
    taps: list[str] = field(default_factory=lambda: ["decoder"])
    """Where to compare: `encoder`, `bottleneck`, `decoder`, `last`, a tap, or `student_tap:teacher_tap`."""


@dataclass
class ReviewConfig(FeatureTermConfig):
    """Knowledge review (Chen et al. 2021): maps fused from deep to shallow against the teacher's."""

    weight: float = 1.0
    """Factor of the term in the total loss."""
    taps: list[str] = field(default_factory=lambda: ["encoder", "bottleneck"])
    """Where to compare, in any order: `encoder`, `bottleneck`, `decoder`, a tap, or `student_tap:teacher_tap`."""
    mid_channels: int = 0
    """Channels of the fused maps; 0: those of the student's deepest tap, at most 512."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth != "together":
            raise ConfigurationError(
                f"losses.review.depth: {self.depth} takes taps one by one, and review fuses them; "
                "leave it out, or take say losses.fitnet.depth"
            )
        if self.mid_channels < 0:
            raise ConfigurationError(
                f"losses.review.mid_channels: {self.mid_channels} is negative; give 0 for the default or more"
            )


@dataclass
class MGDConfig(FeatureTermConfig):
    """Masked generative distillation (Yang et al. 2022): the teacher's map from a part of the student's."""

    weight: float = 2e-5
    """Factor of the term in the total loss (it is a sum over channels and positions)."""
    mask_ratio: float = 0.75
    """Share of the student's positions that are hidden, drawn anew at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio < 1:
            raise ConfigurationError(f"losses.mgd.mask_ratio: {self.mask_ratio} is not in [0, 1); give say 0.75")


def fitnet(student_features: Tensor, teacher_features: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`mean (f_s - f_t)²` over channels and positions of an image, then over images (Romero et al. 2015).

    The paper halves a sum; the mean does not grow with the image.

    Args:
        student_features, teacher_features: [B, D, h, w], the student's already projected to the teacher's width.
        mask: boolean [B, h, w], True where a position counts.
    """
    student, teacher = full_precision(student_features), full_precision(teacher_features.detach())
    return image_means((student - teacher).square().mean(1), mask).mean()


def attention_transfer(
    student_features: Tensor, teacher_features: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Mean over positions of `(A_s - A_t)²`, A the activation map of unit norm, then over images.

    `A = vec(mean_d f²) / ||vec(mean_d f²)||_2` (Zagoruyko & Komodakis 2017, eq. 2 with p = 2, in the form of
    the authors' code). As A has unit norm over space, the value falls with the number of positions: tiling
    the image changes it, as the paper has it.

    Args:
        student_features, teacher_features: [B, Ds, h, w], [B, Dt, h, w].
        mask: boolean [B, h, w], True where a position counts, in the norm too.
    """

    def attention(features: Tensor) -> Tensor:
        energy = full_precision(features).square().mean(1)
        if mask is not None:
            energy = torch.where(mask, energy, 0.0)
        return F.normalize(energy.flatten(1), eps=1e-6).view_as(energy)

    difference = attention(student_features) - attention(teacher_features.detach())
    return image_means(difference.square(), mask).mean()


def hierarchical_context(
    student_features: Tensor, teacher_features: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Mean squared difference of two maps and of their poolings to 4×4, 2×2 and 1×1, weighted 1, 1/2, 1/4, 1/8.

    The hierarchical context loss of Chen et al. 2021 (section 3.4), the weights divided by their sum as in the
    authors' code. A pooling that would not make the map smaller in both directions is left out; the authors look
    at the height alone, which is the same on their square maps.

    Args:
        student_features, teacher_features: [B, D, h, w], the student's already of the teacher's width.
        mask: boolean [B, h, w], True where a position counts; a pooled one counts if any of its own does.
    """
    difference = full_precision(student_features) - full_precision(teacher_features.detach())
    total, weight, weights = fitnet(difference, torch.zeros_like(difference), mask=mask), 1.0, 1.0
    for size in (level for level in (4, 2, 1) if level < min(difference.shape[-2:])):
        if mask is None:
            pooled, counted = _pool(difference, size), None
        else:
            share = _pool(mask[:, None].to(difference), size)
            inside = _pool(torch.where(mask[:, None], difference, 0.0), size)
            counted = share[:, 0] > 0
            pooled = inside / torch.where(share > 0, share, 1.0)
        weight /= 2
        total = total + weight * fitnet(pooled, torch.zeros_like(pooled), mask=counted)
        weights += weight
    return total / weights


def _pool(maps: Tensor, size: int) -> Tensor:
    """`adaptive_avg_pool2d` to size×size as two products, whose gradient is deterministic on a GPU too."""

    def means(length: int) -> Tensor:
        cell, place = torch.arange(size, device=maps.device)[:, None], torch.arange(length, device=maps.device)
        inside = (place >= cell * length // size) & (place < -(-(cell + 1) * length // size))
        return inside.to(maps) / inside.sum(1, keepdim=True)

    return means(maps.shape[-2]) @ maps @ means(maps.shape[-1]).mT


def image_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the counted positions of each image: [B, h, w] -> [B]; 0 where none counts."""
    if mask is None:
        return values.mean((1, 2))
    return torch.where(mask, values, 0.0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


class FeatureTerm(Term):
    """A function of two feature maps over a list of tap pairs: the mean over pairs of its mean over images.

    The teacher's map is brought to the student's resolution, by area where it shrinks, else bilinearly, and the
    student's to the teacher's width where the function needs it.
    """

    function: Callable[..., Tensor]
    not_coarser = False  # whether the teacher's map may not be coarser than the student's

    def __init__(self, config: TapsConfig, context: Context) -> None:
        super().__init__()
        self.name = term_name(type(config))
        self.pairs = pair_taps(self.name, config.taps, context, self.not_coarser)
        self.student_taps, self.teacher_taps = [s for s, _ in self.pairs], [t for _, t in self.pairs]
        self.labelled_only = isinstance(config, FeatureTermConfig) and config.labelled_only
        teacher = context.taught(self.name)
        self.widths = [(context.student[s].channels, teacher[t].channels) for s, t in self.pairs]

    def project(self, pair: int, features: Tensor) -> Tensor:
        """The student's features as the function takes them."""
        return features

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over images for one pair."""
        return type(self).function(student, teacher, mask=mask)

    def compare_labelled(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """`compare` with a mask from the labels if one is wanted; a term may look at the labels themselves."""
        size = (student.shape[-2], student.shape[-1])
        return self.compare(student, teacher, mask_of(labels, size) if self.labelled_only else None)

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=labels.device)
        for pair in range(len(self.pairs)):
            ours, theirs = self.maps(pair, student, teacher)
            features = self.project(pair, ours)
            taught = resize(full_precision(theirs), (features.shape[-2], features.shape[-1]))
            total = total + self.compare_labelled(features, taught, labels)
        return total * (len(labels) / len(self.pairs) / denominator).to(total)

    def maps(self, pair: int, student: ModelOutput, teacher: ModelOutput | None) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's map of a pair, the latter without gradient.

        Raises:
            ConfigurationError: naming both taps, where one is no map of the published width, or of other images.
        """
        assert teacher is not None
        taps, widths = self.pairs[pair], self.widths[pair]
        ours, theirs = student.features[taps[0]], teacher.features[taps[1]].detach()
        maps = ours.ndim == theirs.ndim == 4 and len(ours) == len(theirs)
        if not maps or (ours.shape[1], theirs.shape[1]) != widths:
            announced = " and ".join(f"[B, {width}, h, w]" for width in widths)
            raise ConfigurationError(
                f"losses.{self.name}.taps: the student's {taps[0]} is {list(ours.shape)} and the teacher's "
                f"{taps[1]} {list(theirs.shape)}, where {announced} are announced; name taps that are maps of one "
                "batch, or correct what the model publishes"
            )
        return ours, theirs


class Fitnet(FeatureTerm):
    """`fitnet` behind a learned 1×1 convolution from the student's width to the teacher's, one a pair."""

    function = staticmethod(fitnet)

    def __init__(self, config: FitnetConfig, context: Context) -> None:
        super().__init__(config, context)
        self.adapters = nn.ModuleList(nn.Conv2d(ours, theirs, kernel_size=1) for ours, theirs in self.widths)

    def project(self, pair: int, features: Tensor) -> Tensor:
        return self.adapters[pair](features)


class AttentionTransfer(FeatureTerm):
    """`attention_transfer` over the configured pairs."""

    function = staticmethod(attention_transfer)


class Fusion(nn.Module):
    """Attention-based fusion (Chen et al. 2021, section 3.3) of a map with what came from the deeper ones.

    Args:
        student, mid, teacher: channels of the student's map, of the fused one, of the teacher's.
        deepest: nothing comes from deeper.
    """

    def __init__(self, student: int, mid: int, teacher: int, *, deepest: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(student, mid, 1, bias=False), BatchNorm(mid))
        self.attention = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        self.outer = nn.Sequential(nn.Conv2d(mid, teacher, 3, padding=1, bias=False), BatchNorm(teacher))
        for convolution in (self.inner[0], self.outer[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # type: ignore[arg-type]

    def forward(self, features: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher's map of `size`, and what goes on to the next shallower fusion."""
        fused = self.inner(features)
        if self.attention is not None and deeper is not None:
            deeper = _nearest(deeper, (fused.shape[-2], fused.shape[-1]))
            share = self.attention(torch.cat([fused, deeper], 1)).sigmoid()
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        fused = _nearest(fused, size)
        return self.outer(fused), fused


def _nearest(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if features.shape[-2:] == size else F.interpolate(features, size, mode="nearest")


class Review(FeatureTerm):
    """Knowledge review (Chen et al. 2021, "Distilling Knowledge via Knowledge Review"): the sum over pairs of
    `hierarchical_context` between the student's fused maps and the teacher's.

    The pairs are put in order from deep to shallow by the student's published strides; of two maps of one stride
    the one published later is the deeper. Each student's map is projected to `mid_channels`, fused with what comes
    from the deeper ones (brought to its size, two attention maps as weights), brought to the teacher's size by
    nearest neighbour, and projected to the teacher's width, all as in the authors' code: there the sizes are
    numbers given for square maps, here they are read off the maps. The convolutions see the neighbourhood, so with
    `labelled_only` unlabelled positions are not compared but are seen; batch-norm's statistics are those of the
    images that are passed together.
    """

    def __init__(self, config: ReviewConfig, context: Context) -> None:
        super().__init__(config, context)
        if len(set(self.student_taps)) < len(self.pairs):
            named = [":".join(pair) for pair in self.pairs if self.student_taps.count(pair[0]) > 1]
            raise ConfigurationError(
                f"losses.review.taps: {' and '.join(named)} take one tap of the student, which can't be reviewed "
                "by itself; name each of the student's taps once"
            )
        published = list(context.student)
        depths = [(context.student[tap].stride, published.index(tap)) for tap in self.student_taps]
        order = sorted(range(len(depths)), key=depths.__getitem__, reverse=True)
        self.pairs, self.widths = [self.pairs[i] for i in order], [self.widths[i] for i in order]
        mid = config.mid_channels or min(512, self.widths[0][0])
        self.fusions = nn.ModuleList(
            Fusion(ours, mid, theirs, deepest=i == 0) for i, (ours, theirs) in enumerate(self.widths)
        )

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        total, deeper = torch.zeros((), device=labels.device), None
        for pair, fusion in enumerate(self.fusions):
            ours, theirs = self.maps(pair, student, teacher)
            size = (theirs.shape[-2], theirs.shape[-1])
            made, deeper = fusion(ours, deeper, size)
            mask = mask_of(labels, size) if self.labelled_only else None
            total = total + hierarchical_context(made, theirs, mask=mask)
        return total * (len(labels) / denominator).to(total)


class MGD(FeatureTerm):
    """Masked generative distillation (Yang et al. 2022, eq. 4): `sum (f_t - G(M · align(f_s)))²`, mean of images.

    M hides a share `mask_ratio` of the positions, drawn at each step from PyTorch's generator of the device; G is
    a 3×3 convolution, ReLU, a 3×3 convolution; `align` a 1×1 convolution where the widths differ. The difference
    is summed over channels and positions and divided by the images alone, as in the paper and the authors' code,
    and the published weight of 2e-5 belongs to that sum: an image of twice the height and width costs four times
    as much, and so does a tap of half the stride. At other crops than the paper's scale the weight by the inverse
    of the area.

    Over several pairs the mean is taken, where the authors have one. The convolutions see the neighbourhood, so
    with `labelled_only` unlabelled positions are not compared but are seen.
    """

    def __init__(self, config: MGDConfig, context: Context) -> None:
        super().__init__(config, context)
        self.mask_ratio = config.mask_ratio
        self.aligns = nn.ModuleList(
            nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1) for ours, theirs in self.widths
        )
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)
            )
            for _, width in self.widths
        )

    def project(self, pair: int, features: Tensor) -> Tensor:
        aligned = self.aligns[pair](features)
        shown = torch.rand(len(aligned), 1, *aligned.shape[-2:], device=aligned.device) <= 1 - self.mask_ratio
        return self.generators[pair](torch.where(shown, aligned, 0.0))

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        squares = (full_precision(student) - full_precision(teacher)).square().sum(1)
        return (squares if mask is None else torch.where(mask, squares, 0.0)).sum((1, 2)).mean()
