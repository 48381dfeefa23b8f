"""Distillation of feature maps: FitNets' hints and attention transfer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.term import (
    Context,
    FeatureTermConfig,
    ModelOutput,
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
    taps: list[str] = field(default_factory=lambda: ["decoder.0", "decoder.1"])
    """Where to compare: a list of `tap`, or `student_tap:teacher_tap`."""


def fitnet(student_features: Tensor, teacher_features: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`mean (f_s - f_t)²` over channels and positions of an image, then over images (Romero et al. 2015).

    The paper halves a sum; the mean does not grow with the image.

    Args:
        student_features, teacher_features: [B, D, h, w], the student's already projected to the teacher's width.
        mask: boolean [B, h, w], True where a position counts.
    """
    student, teacher = full_precision(student_features), full_precision(teacher_features.detach())
    return _image_means((student - teacher).square().mean(1), mask).mean()


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
    return _image_means(difference.square(), mask).mean()


def _image_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the counted positions of each image: [B, h, w] -> [B]; 0 where none counts."""
    if mask is None:
        return values.mean((1, 2))
    return torch.where(mask, values, 0.0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


class FeatureTerm(Term):
    """A function of two feature maps over a list of tap pairs: the mean over pairs of its mean over images.

    The teacher's map is brought to the student's resolution.
    """

    function: Callable[..., Tensor]

    def __init__(self, config: FeatureTermConfig, context: Context) -> None:
        super().__init__()
        self.pairs = pair_taps(term_name(type(config)), config.taps, context)
        self.student_taps, self.teacher_taps = [s for s, _ in self.pairs], [t for _, t in self.pairs]
        self.labelled_only = config.labelled_only

    def project(self, pair: int, features: Tensor) -> Tensor:
        """The student's features as the function takes them."""
        return features

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        assert teacher is not None
        total = torch.zeros((), device=labels.device)
        for pair, (ours, theirs) in enumerate(self.pairs):
            features = self.project(pair, student.features[ours])
            size = (features.shape[-2], features.shape[-1])
            mask = mask_of(labels, size) if self.labelled_only else None
            taught = resize(full_precision(teacher.features[theirs].detach()), size)
            total = total + type(self).function(features, taught, mask=mask)
        return total * (len(labels) / len(self.pairs) / denominator).to(total)


class Fitnet(FeatureTerm):
    """`fitnet` behind a learned 1×1 convolution from the student's width to the teacher's, one a pair."""

    function = staticmethod(fitnet)

    def __init__(self, config: FitnetConfig, context: Context) -> None:
        super().__init__(config, context)
        teacher = context.taught("fitnet")
        self.adapters = nn.ModuleList(
            nn.Conv2d(context.student[s].channels, teacher[t].channels, kernel_size=1) for s, t in self.pairs
        )

    def project(self, pair: int, features: Tensor) -> Tensor:
        return self.adapters[pair](features)


class AttentionTransfer(FeatureTerm):
    """`attention_transfer` over the configured pairs."""

    function = staticmethod(attention_transfer)
