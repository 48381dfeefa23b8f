"""Distillation of logits.

The logits may stand at any stride: a mask or labels of a larger size have them upsampled to it, by blocks of rows.

Dimension letters: B images, C classes, R label rows of a block, W label columns.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from losses.blocks import (
    ImageTerm,
    PixelTerm,
    PixelTermConfig,
    blocked_mean,
    blocked_sum,
    counted_pixels,
    everywhere,
    safe,
    upsampled_blocks,
)
from losses.term import (
    IGNORE_INDEX,
    ClassWeighting,
    Context,
    FeatureTermConfig,
    ModelOutput,
    TemperatureConfig,
    Term,
    TermConfig,
    full_precision,
    mask_of,
    pair_taps,
    resize,
    term_name,
)


@dataclass
class SoftTermConfig(TemperatureConfig, PixelTermConfig):
    """A term that compares softened distributions, with weights per pixel if asked.

    A rebalanced task needs a rebalanced teacher signal: see `class_weights`.
    """


def _check_factors(config: TermConfig, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < 0:
            name = term_name(type(config))
            raise ConfigurationError(f"losses.{name}.{key}: {getattr(config, key)} is negative; give 0 or more")


@dataclass
class KDConfig(SoftTermConfig):
    """Knowledge distillation of logits (Hinton et al. 2015), per pixel."""

    at: Literal["labels", "logits"] = "labels"
    """Compare at every label pixel, or at the student's own positions: an approximation, almost free."""


@dataclass
class CWDConfig(TemperatureConfig, FeatureTermConfig):
    """Channel-wise distillation (Shu et al. 2021): where in the image each channel is strong."""

    weight: float = 3.0
    """Factor of the term in the total loss; 3 is published for logits, 50 for features."""
    taps: list[str] = field(default_factory=lambda: ["logits"])
    """Where to compare: `logits`, `encoder`, `bottleneck`, `decoder`, `last`, a tap, or `student:teacher` taps."""
    labelled_only: bool = True
    """Leave out positions without a label, which the paper does not."""
    temperature: float = 4.0
    """T: softens both distributions; the loss keeps its T²."""


@dataclass
class DISTConfig(TemperatureConfig):
    """DIST (Huang et al. 2022): correlations over the classes and over the pixels in place of a divergence."""

    temperature: float = 1.0
    """T: softens both distributions; the loss keeps its T². The paper takes 4 for weak models."""
    beta: float = 1.0
    """Factor of the relation between the classes of a pixel."""
    gamma: float = 1.0
    """Factor of the relation between the pixels of a class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factors(self, "beta", "gamma")


@dataclass
class WSLConfig(SoftTermConfig):
    """Weighted soft labels (Zhou et al. 2021): distillation where the student is worse than its teacher."""

    weight: float = 2.25
    """Factor of the term in the total loss."""
    temperature: float = 2.0
    """T: softens both distributions; the loss keeps its T²."""


@dataclass
class DKDConfig(SoftTermConfig):
    """Decoupled distillation (Zhao et al. 2022): target class against the rest, and the rest among themselves."""

    temperature: float = 4.0
    """T: softens both distributions; the loss keeps its T²."""
    alpha: float = 1.0
    """Factor of the target class against the rest."""
    beta: float = 8.0
    """Factor of the other classes among themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factors(self, "alpha", "beta")


@dataclass
class LogitStdConfig(SoftTermConfig):
    """Logit standardisation (Sun et al. 2024): z-scores of each pixel's logits before distillation."""

    weight: float = 9.0
    """Factor of the term in the total loss (published beside a cross-entropy of weight 0.1)."""
    temperature: float = 2.0
    """The base temperature, which divides the z-scores; the loss keeps its T²."""


@dataclass
class BPKDConfig(SoftTermConfig):
    """Boundary-privileged distillation (Liu et al. 2024): the edges of each class apart from its body."""

    temperature: float = 4.0
    """T: softens both distributions; the loss keeps its T²."""
    class_weights: ClassWeighting = "uniform"
    """Weights of the classes' edges and bodies: uniform, inverse, median, enet, effective."""
    edge: float = 100.0
    """Factor of the edges: the paper's 50 with its inner factor of 2."""
    body: float = 20.0
    """Factor of the bodies."""
    edge_width: int = 7
    """Side, in label pixels, of the window in which two classes must meet; odd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factors(self, "edge", "body")
        if self.edge_width < 3 or self.edge_width % 2 == 0:
            raise ConfigurationError(
                f"losses.bpkd.edge_width: {self.edge_width} is not an odd number from 3; give say 7"
            )


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): mean over pixels of `T² * KL(softmax(t/T) || softmax(s/T))`.

    Args:
        student_logits, teacher_logits: [B, C, h, w], at any stride; no gradient reaches the teacher's.
        mask: boolean [B, H, W], True where a pixel counts, to whose size the logits are upsampled; all of the
            student's pixels count without it.
        temperature: T.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, where no pixel counts. Differentiable once.
    """

    def pixels(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence(student, teacher, temperature)

    return blocked_mean(pixels, student_logits, teacher_logits, mask)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² KL(softmax(t/T) || softmax(s/T))` over the classes: [B, C, R, W] -> [B, R, W]."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(1)


def wsl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 2.0,
) -> Tensor:
    """Weighted soft labels (Zhou et al. 2021): mean over pixels of `w * T² * KL`, KL as in `kl_divergence`.

    The weight `w = 1 - exp(-CE_s / CE_t)` is of the cross-entropies of both models at temperature 1, without a
    gradient: near 0 where the student already does better than its teacher, near 1 where it does worse.

    The authors' code multiplies the weight into a soft cross-entropy: the same gradient, but a perfect student's
    value is not 0.

    Args:
        student_logits, teacher_logits: [B, C, h, w], at any stride; no gradient reaches the teacher's.
        labels: int64 [B, H, W], to whose size the logits are upsampled; 255 is left out.
        mask: boolean [B, H, W], True where a labelled pixel counts.
    """

    def pixels(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return _weighted_divergence(student, teacher, target, temperature)

    return blocked_mean(pixels, student_logits, teacher_logits, *counted_pixels(labels, mask))


def _weighted_divergence(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`wsl` of each pixel, from target classes [B, R, W]."""
    with torch.no_grad():
        ours, theirs = _cross_entropy(student, target), _cross_entropy(teacher, target)
        weight = -torch.expm1(-ours / (theirs + 1e-7))
    return weight * _divergence(student, teacher, temperature)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022): mean over pixels of `T² * (alpha * TCKD + beta * NCKD)`.

    TCKD is the KL divergence of the pair (p of the target class, 1 - p), NCKD that of the softmax over all other
    classes. With `alpha = 1` and `beta = 1 - p_t` of the teacher the sum would be the ordinary KL divergence.

    The authors' code leaves the target class out by subtracting 1000 from its logit, which fails where logits are
    themselves that large, and takes the logarithm of a softmax; here it is masked, and both probabilities of the
    pair come as log-sigmoids of the target's logit less the log-sum-exp of the others. In the ordinary range the
    values are the same. With two classes NCKD is 0.

    Args:
        student_logits, teacher_logits: [B, C, h, w], at any stride; no gradient reaches the teacher's.
        labels: int64 [B, H, W], to whose size the logits are upsampled; 255 is left out.
        mask: boolean [B, H, W], True where a labelled pixel counts.
        temperature: T; the authors take 4 on CIFAR-100 and 1 on ImageNet.
    """

    def pixels(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return _decoupled(student, teacher, target, temperature, alpha, beta)

    return blocked_mean(pixels, student_logits, teacher_logits, *counted_pixels(labels, mask))


def _decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """`dkd` of each pixel, from target classes [B, R, W]."""
    if student.shape[1] == 1:
        return student[:, 0] * 0.0  # of one class there is nothing to say
    target = target[:, None]
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, target, True)

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds of the target class [B, R, W], and the others' log-probabilities, -inf at the target."""
        logits = logits / temperature
        others = logits.masked_fill(is_target, -math.inf)
        return logits.gather(1, target)[:, 0] - others.logsumexp(1), F.log_softmax(others, dim=1)

    (odds, others), (taught_odds, taught_others) = split(student), split(teacher)
    yes = taught_odds.sigmoid() * (F.logsigmoid(taught_odds) - F.logsigmoid(odds))
    no = (-taught_odds).sigmoid() * (F.logsigmoid(-taught_odds) - F.logsigmoid(-odds))
    difference = (taught_others - others).masked_fill(is_target, 0.0)
    return temperature**2 * (alpha * (yes + no) + beta * (taught_others.exp() * difference).sum(1))


def logit_std(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 2.0
) -> Tensor:
    """Logit standardisation (Sun et al. 2024): `kl_divergence` of the z-scores of each pixel's logits.

    `(z - mean(z)) / (std(z) + 1e-7)` over the classes, with the unbiased deviation as in the authors' code, for
    both models: the student need not reproduce the range of its teacher's logits. A pixel whose logits are all
    equal has the z-score 0 and no gradient; the authors' is NaN.

    The published weight of 9 stands beside a cross-entropy of 0.1, both of which follow the 0.9 and 0.1 that the
    authors' code base has for plain distillation.

    Args:
        student_logits, teacher_logits: [B, C, h, w], at any stride; no gradient reaches the teacher's.
        mask: boolean [B, H, W], True where a pixel counts, to whose size the logits are upsampled.
        temperature: the base temperature.
    """

    def pixels(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence(_standardised(student), _standardised(teacher), temperature)

    return blocked_mean(pixels, student_logits, teacher_logits, mask)


def _standardised(logits: Tensor) -> Tensor:
    """z-scores over the classes: [B, C, R, W]."""
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(logits.shape[1] - 1, 1)
    varies = variance > _rounding(logits.detach().square().mean(1, keepdim=True))
    return torch.where(varies, centred / (torch.where(varies, variance, 1.0).sqrt() + 1e-7), 0.0)


def _rounding(squares: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The variance up to which numbers of this mean square, computed in `dtype`, are equal but for rounding."""
    finfo = torch.finfo(dtype or squares.dtype)
    return (8 * finfo.eps) ** 2 * squares + finfo.tiny


def channel_wise(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 4.0
) -> Tensor:
    """Channel-wise distillation (Shu et al. 2021), a mean over channels and images of

        T² * KL(softmax(t / T) || softmax(s / T)),    the softmax over the positions of an image.

    With the sums over positions that the softmax needs known beforehand, the divergence is a sum over positions
    of `p_s - p_t - p_t * log(p_s / p_t)`, to which each adds 0 or more, so that no large sums cancel near a
    perfect student, and its gradient, `p_s - p_t`, needs no second look at the sums.

    The authors' code takes the logarithm of a softmax and has all positions count, which is the same value without
    a mask. CIRKD's divides by the student's channels before its projection to the teacher's width; here the mean
    is over the channels that are compared.

    Args:
        student_logits, teacher_logits: [B, C, h, w], logits or features, at any stride; no gradient reaches the
            teacher's.
        mask: boolean [B, H, W], True where a position counts, to whose size both are upsampled; the student's
            own positions without it.
        temperature: T.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, where nothing counts. Differentiable once.
    """
    region = (everywhere(student_logits) if mask is None else mask)[:, None]
    distributions = [_Spatial.of(logits, region, temperature) for logits in (student_logits, teacher_logits)]

    def block(ours: Tensor, theirs: Tensor, region: Tensor) -> Tensor:
        return _spatial_divergence(ours, theirs, region, *distributions).sum()

    total = blocked_sum(block, student_logits, teacher_logits, [region])
    return total * (temperature**2 / max(1, student_logits.shape[0] * student_logits.shape[1]))


class _Spatial(NamedTuple):
    """What makes `z / T` a log-probability over an image's positions: the maximum, and the sum's logarithm."""

    temperature: float
    top: Tensor  # [B, C, 1, 1]
    log_sum: Tensor  # of exp(z / T - top), likewise

    @classmethod
    def of(cls, logits: Tensor, region: Tensor, temperature: float) -> "_Spatial":
        """From [B, C, h, w] over the positions of the boolean region [B, 1 or C, H, W], each channel its own."""
        top = full_precision(logits.detach()).new_full((*logits.shape[:2], 1, 1), -math.inf)
        total = torch.zeros_like(top, dtype=torch.float64)
        for rows, block in upsampled_blocks(logits, (region.shape[-2], region.shape[-1])):
            block = (block / temperature).masked_fill(~region[:, :, rows], -math.inf)
            higher = torch.maximum(top, block.amax((2, 3), keepdim=True))
            finite = torch.where(higher == -math.inf, 0.0, higher)
            total = total * (top - finite).exp() + (block - finite).exp().sum((2, 3), True, dtype=torch.float64)
            top = higher
        top = torch.where(top == -math.inf, 0.0, top)
        return cls(temperature, top, safe(total, total).log().to(top))

    def log_probabilities(self, logits: Tensor, region: Tensor) -> Tensor:
        """[B, C, R, W], 0 outside the region."""
        return (logits / self.temperature - self.top - self.log_sum).masked_fill(~region, 0.0)


def _spatial_divergence(
    student: Tensor, teacher: Tensor, region: Tensor, ours: _Spatial, theirs: _Spatial
) -> Tensor:
    """What each position and channel [B, C, R, W] adds to the divergence over space; 0 outside the region."""
    log_ours = ours.log_probabilities(student, region)
    log_theirs = theirs.log_probabilities(teacher, region)
    return log_ours.exp() - log_theirs.exp() * (1.0 + (log_ours - log_theirs))


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """DIST (Huang et al. 2022), a mean over images of `T² * (beta * inter + gamma * intra)`.

    Of the probabilities p = softmax(s / T) and q = softmax(t / T), and Pearson's correlation r,

        inter = mean over pixels  of 1 - r(p, q) over the classes of a pixel,
        intra = mean over classes of 1 - r(p, q) over the pixels of an image.

    The authors' code for segmentation takes the second correlation over all pixels of the batch at once, so that
    it changes with the batch; here it stays within an image. It adds 1e-8 to the product of norms, by which a
    class of small probabilities costs something even if the student is perfect, and has no T². Here a pixel or
    class that the teacher gives one and the same probability all over has nothing to teach and costs 0; one where
    the student alone does costs 1 (r = 0), without a gradient.

    `1 - r` is computed as half the squared distance of the centred vectors of unit length, which is exact near 0.

    Args:
        student_logits, teacher_logits: [B, C, h, w], at any stride; no gradient reaches the teacher's.
        mask: boolean [B, H, W], True where a pixel counts, to whose size the logits are upsampled.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, where nothing counts. Differentiable once.
    """
    mask = everywhere(student_logits) if mask is None else mask
    counted_B = mask.sum((1, 2)).double()
    moments = _moments(student_logits, teacher_logits, mask, temperature)
    batch, classes = student_logits.shape[:2]
    like = full_precision(student_logits.detach()).new_zeros(())
    inter_B111 = (beta / (batch * safe(counted_B, counted_B)))[:, None, None].to(like)
    intra = gamma / (batch * classes)

    def block(ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
        p, q = (logits / temperature for logits in (ours, theirs))
        p, q = p.softmax(1), q.softmax(1)
        between_classes = torch.where(counted, _one_less_correlation(p, q), 0.0)
        with torch.no_grad():
            u, v = moments.units(p, q, counted[:, None])
            between_pixels = 0.5 * (u - v).square()
            slope = (moments.correlation * u - v) * moments.scales[0]
        # The gradient through mean and norm, which are of other blocks too, is in the slope; its own value is 0.
        between_pixels = between_pixels + slope * (p - p.detach())
        return (inter_B111 * between_classes).sum() + intra * between_pixels.sum()

    total = blocked_sum(block, student_logits, teacher_logits, [mask])
    return temperature**2 * (total + intra * moments.unmatched.sum())


def _one_less_correlation(p: Tensor, q: Tensor) -> Tensor:
    """`1 - r` over the classes of each pixel: [B, C, R, W] -> [B, R, W]."""

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(1, keepdim=True)
        squared = centred.square().sum(1, keepdim=True)
        varies = squared > _rounding(x.detach().square().sum(1, keepdim=True))
        return torch.where(varies, centred * torch.where(varies, squared, 1.0).rsqrt(), 0.0), varies[:, 0]

    (u, ours), (v, theirs) = unit(p), unit(q)
    distance = 0.5 * (u - v).square().sum(1)
    return torch.where(ours & theirs, distance, theirs.to(distance))


class _Moments(NamedTuple):
    """Per image and class [B, C, 1, 1]: what makes probabilities vectors of unit length over the pixels."""

    means: Tensor  # [2, B, C, 1, 1] of student and teacher
    scales: Tensor  # 1 / the norm, likewise; 0 where either of the two is constant
    correlation: Tensor
    unmatched: Tensor  # 1 where the student alone is constant

    def units(self, p: Tensor, q: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip((p, q), self.means, self.scales, strict=True)
        ours, theirs = (((x - mean) * scale).masked_fill(~counted, 0.0) for x, mean, scale in pairs)
        return ours, theirs


def _moments(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float) -> _Moments:
    """Means, norms and correlation, block merged to block in float64 (Chan et al. 1983) and not by raw moments."""
    size = (mask.shape[-2], mask.shape[-1])
    like = full_precision(student_logits.detach()).new_zeros(())
    count = torch.zeros(len(mask), 1, 1, 1, dtype=torch.float64, device=mask.device)
    shape = (2, *student_logits.shape[:2], 1, 1)  # student and teacher
    mean, squares = (torch.zeros(shape, dtype=torch.float64, device=mask.device) for _ in range(2))
    products = torch.zeros_like(mean[0])
    both = zip(upsampled_blocks(student_logits, size), upsampled_blocks(teacher_logits, size), strict=True)
    for (rows, ours), (_, theirs) in both:
        counted = mask[:, None, rows]
        more = counted.sum((2, 3), keepdim=True).double()
        blocks = [(x / temperature).softmax(1).masked_fill(~counted, 0.0) for x in (ours, theirs)]
        sums = torch.stack([x.sum((2, 3), True, dtype=torch.float64) for x in blocks])
        means = sums / safe(more, more)
        p, q = ((x - m.to(x)).masked_fill_(~counted, 0.0) for x, m in zip(blocks, means, strict=True))
        step, share = means - mean, count * more / safe(count + more, more)
        squares = squares + step.square() * share
        squares = squares + torch.stack([x.square().sum((2, 3), True, dtype=torch.float64) for x in (p, q)])
        products = products + step[0] * step[1] * share + (p * q).sum((2, 3), True, dtype=torch.float64)
        mean, count = mean + step * more / safe(count + more, more), count + more
    varies = squares > count * _rounding(mean.square(), like.dtype)
    alive = varies[0] & varies[1]
    norms = torch.where(alive, squares, 1.0).sqrt()
    correlation = torch.where(alive, products / (norms[0] * norms[1]), 0.0)
    scales = torch.where(alive, 1.0 / norms, 0.0)
    return _Moments(mean.to(like), scales.to(like), correlation.to(like), (varies[1] & ~varies[0]).to(like))


def bpkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    edge: float = 100.0,
    body: float = 20.0,
    edge_width: int = 7,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Boundary-privileged distillation (Liu et al. 2024), a mean over images of `edge * L_E + body * L_B`.

    E_c, the edge of class c, are the labelled pixels in whose window of `edge_width` pixels c meets another class
    (dilation less erosion of the class's mask); B_c, its body, are all other labelled pixels.

        L_E = sum over c of the mean over i in E_c of T² * KL(softmax(m_i t_i / T) || softmax(m_i s_i / T)),
        L_B = mean over c of T² * KL(softmax over B_c of t_c / T || softmax over B_c of s_c / T),

    where m_i keeps the logits of the classes whose edge pixel i is in and sets the others to 0 (the paper's
    pre-mask; that only pixels of E_c count for c is its post-mask).

    The authors published no training code; the constants are those of the paper as a public reimplementation
    reads them: 50 for edges, with an inner factor of 2, 20 for bodies, T = 4, a window of 7. The paper pools the
    masks to the size of the logits, where they become fractions that multiply them, and leaves the masked-out
    logits as zeros in the softmax over space; here logits come up to label size, the masks stay boolean, and the
    softmax over space runs over the body alone. A void pixel is of no class: it makes no edge.

    Args:
        student_logits, teacher_logits: [B, C, h, w], at any stride; no gradient reaches the teacher's.
        labels: int64 [B, H, W], to whose size the logits are upsampled; 255 is left out.
        class_weights: [C], factors of the classes in the sum of L_E and in the mean of L_B, of which the mean
            weight is 1.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, without a labelled pixel. Differentiable once.
    """
    batch, classes = student_logits.shape[:2]
    like = full_precision(student_logits.detach()).new_zeros(())
    edges = _class_edges(labels, classes, edge_width)
    bodies = (labels != IGNORE_INDEX)[:, None] & ~edges
    share_C = like.new_ones(classes) if class_weights is None else class_weights.to(like)
    share_C = share_C / share_C.mean()
    per_edge_BC = (share_C / edges.sum((2, 3)).clamp(min=1)).to(like)
    edge_weight = torch.zeros(labels.shape, dtype=like.dtype, device=labels.device)
    for one in range(classes):
        edge_weight += edges[:, one] * per_edge_BC[:, one, None, None]
    distributions = [_Spatial.of(logits, bodies, temperature) for logits in (student_logits, teacher_logits)]
    share_1C11 = share_C[:, None, None] * (temperature**2 / classes)

    def block(ours: Tensor, theirs: Tensor, edges: Tensor, bodies: Tensor, edge_weight: Tensor) -> Tensor:
        kept = [logits.masked_fill(~edges, 0.0) for logits in (ours, theirs)]
        at_edges = (edge_weight * _divergence(kept[0], kept[1], temperature)).sum()
        inside = (share_1C11 * _spatial_divergence(ours, theirs, bodies, *distributions)).sum()
        return edge * at_edges + body * inside

    return blocked_sum(block, student_logits, teacher_logits, [edges, bodies, edge_weight]) / max(1, batch)


def _class_edges(labels: Tensor, classes: int, width: int) -> Tensor:
    """Boolean [B, C, H, W]: labelled pixels in whose window of `width` pixels class c meets another one."""
    near = torch.stack([_dilated(labels == one, width) for one in range(classes)], dim=1)
    meeting = (near.sum(1) > 1) & (labels != IGNORE_INDEX)
    return near & meeting[:, None]


def _dilated(mask: Tensor, width: int) -> Tensor:
    """Boolean [B, H, W]: True within a window of `width` pixels around a True."""
    along = F.max_pool2d(mask[:, None].float(), (1, width), stride=1, padding=(0, width // 2))
    return F.max_pool2d(along, (width, 1), stride=1, padding=(width // 2, 0))[:, 0].bool()


class SoftTerm(PixelTerm):
    """A mean over labelled pixels of a comparison of both models' distributions over the classes."""

    def __init__(self, config: SoftTermConfig, context: Context) -> None:
        context.taught(term_name(type(config)))
        super().__init__(config, context)
        self.temperature = config.temperature


class KD(SoftTerm):
    """KD as `upsampled_loss` and `native_divergence` make it; the objective calls them."""

    def __init__(self, config: KDConfig, context: Context) -> None:
        super().__init__(config, context)
        self.at = config.at

    def note(self) -> str:
        return "at the logits' positions" if self.at == "logits" else ""


class WSL(SoftTerm):
    """`wsl` of the labelled pixels."""

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return _weighted_divergence(student, teacher, labels, self.temperature)


class DKD(SoftTerm):
    """`dkd` of the labelled pixels."""

    def __init__(self, config: DKDConfig, context: Context) -> None:
        super().__init__(config, context)
        self.alpha, self.beta = config.alpha, config.beta

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return _decoupled(student, teacher, labels, self.temperature, self.alpha, self.beta)


class LogitStd(SoftTerm):
    """`logit_std` of the labelled pixels."""

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return _divergence(_standardised(student), _standardised(teacher), self.temperature)


class DIST(ImageTerm):
    """`dist` over the labelled pixels of each image."""

    def __init__(self, config: DISTConfig, context: Context) -> None:
        super().__init__(config, context)
        context.taught("dist")
        self.temperature, self.beta, self.gamma = config.temperature, config.beta, config.gamma

    def compare(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return dist(
            student,
            teacher,
            mask=labels != IGNORE_INDEX,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
        )


class BPKD(ImageTerm):
    """`bpkd` over the labelled pixels of each image; edges and bodies have their own denominators in each."""

    true_logits = True  # bodies by a softmax over space, edges with zeros in place of logits
    class_weights: Tensor | None

    def __init__(self, config: BPKDConfig, context: Context) -> None:
        super().__init__(config, context)
        context.taught("bpkd")
        self.config, self.temperature = config, config.temperature
        self.register_buffer("class_weights", context.class_weights(config.class_weights), persistent=False)

    def compare(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return bpkd(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            edge=self.config.edge,
            body=self.config.body,
            edge_width=self.config.edge_width,
            class_weights=self.class_weights,
        )


class CWD(Term):
    """`channel_wise` over the configured pairs: their mean.

    The logits are compared at label size. Features are compared at the student's resolution, the student's behind
    a learned 1×1 convolution to the teacher's width (without a bias, which a softmax over space does not see).
    """

    def __init__(self, config: CWDConfig, context: Context) -> None:
        super().__init__()
        teacher = context.taught("cwd")
        features = [tap for tap in config.taps if tap != "logits"]
        self.pairs = pair_taps("cwd", features, context)
        self.student_taps, self.teacher_taps = [s for s, _ in self.pairs], [t for _, t in self.pairs]
        self.adapters = nn.ModuleList(
            nn.Conv2d(context.student[s].channels, teacher[t].channels, kernel_size=1, bias=False)
            for s, t in self.pairs
        )
        self.logits = self.true_logits = len(features) < len(config.taps)
        self.labelled_only, self.temperature = config.labelled_only, config.temperature

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        assert teacher is not None
        values = []
        if self.logits:
            mask = labels != IGNORE_INDEX if self.labelled_only else torch.ones_like(labels, dtype=torch.bool)
            values.append(self.compare(student.logits, teacher.logits, mask))
        for (ours, theirs), adapter in zip(self.pairs, self.adapters, strict=True):
            features = adapter(student.features[ours])
            size = (features.shape[-2], features.shape[-1])
            taught = resize(full_precision(teacher.features[theirs].detach()), size)
            values.append(self.compare(features, taught, mask_of(labels, size) if self.labelled_only else None))
        value = torch.stack(values).mean()
        return value * (len(labels) / denominator).to(value)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        return channel_wise(student, teacher, mask=mask, temperature=self.temperature)

    def note(self) -> str:
        return "logits" if self.logits else ""
