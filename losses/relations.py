"""Distillation of relations: between positions, positions and their class, positions of several images.

No matrix of positions by positions is ever made whole.

Dimension letters: B images, N positions, C classes, D channels; S and T channels of student and teacher; P rows
and K keys, of which a block of R rows at a time.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from errors import ConfigurationError
from losses.blocks import keep_gradient, scale_gradient
from losses.features import FeatureTerm
from losses.term import (
    IGNORE_INDEX,
    Context,
    FeatureTermConfig,
    TapsConfig,
    full_precision,
)

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # of a block of similarities


@dataclass
class PairwiseConfig(FeatureTermConfig):
    """Pair-wise distillation (Liu et al. 2019): affinity of a few regions of the image, max-pooled."""

    weight: float = 10.0
    """Factor of the term in the total loss."""
    scale: float = 0.5
    """Height and width of a region as a share of the map's: 0.5 makes 2×2 regions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale < 1:
            raise ConfigurationError(
                f"losses.pairwise.scale: {self.scale} is no share of the map; give 0.5 for 2×2 regions"
            )


@dataclass
class IFVDConfig(TapsConfig):
    """Intra-class feature variation (Wang et al. 2020): how like its class's mean feature each position is."""

    weight: float = 20.0
    """Factor of the term in the total loss (CIRKD's authors' figure; Wang et al.'s own code has 200)."""
    taps: list[str] = field(default_factory=lambda: ["last"])
    """Where to compare: `encoder`, `bottleneck`, `decoder`, `last`, a tap, or `student_tap:teacher_tap`."""


@dataclass
class CIRKDMiniBatchConfig(FeatureTermConfig):
    """CIRKD within a batch (Yang et al. 2022): similarity of each position with all of every image, as a KL."""

    temperature: float = 0.1
    """Divides the cosines before the softmax; the loss has no T²."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigurationError(
                f"losses.cirkd_mini_batch.temperature: {self.temperature} is not positive; give say 0.1"
            )


def affinity(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean over images of `||A_s - A_t||²_F / N²`, where `A_ij = cos(f_i, f_j)` over all N positions of an image.

    He et al. 2019, eq. 4. With row-normalised features Ŝ [N, S] and T̂ [N, T],

        ||A_s - A_t||² = ||Ŝᵀ Ŝ||² + ||T̂ᵀ T̂||² - 2 ||Ŝᵀ T̂||²,

    three small Gram matrices: O(N D²) time and O(D²) memory, exactly the value of the N×N form, which is taken
    only where it is the smaller one (N below the channels). The paper sums norms; the division by N² makes the
    value independent of the image's size. A position whose features are all zero has similarity 0 with all.

    Args:
        student: [B, S, h, w].
        teacher: [B, T, h, w]; no gradient reaches it.
        mask: boolean [B, h, w], True where a position counts, in N too.

    Returns:
        A scalar, at least float32. The squared norms are added up in float64: near a perfect student they cancel.
    """
    positions = student[0, 0].numel() if mask is None else mask.flatten(1).sum(1).clamp(min=1)
    with torch.autocast(student.device.type, enabled=False):
        squared = _AffinityDistance.apply(student, teacher.detach(), mask)
    return (squared / positions**2).mean().to(full_precision(student).dtype)


class _AffinityDistance(torch.autograd.Function):
    """`||A_s - A_t||²` of each image: float64 [B], from Gram matrices, a block of positions at a time.

    Of columns, the gradient with respect to a block of Ŝ is `4 (Ŝ Ŝᵀ) Ŝ - 4 (Ŝ T̂ᵀ) T̂`, and goes on through the
    division by the columns' lengths. Neither Ŝ nor T̂ ever exists whole.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        flat_BSN, flat_BTN = student.flatten(2), teacher.flatten(2)
        counted_BN = None if mask is None else mask.flatten(1)
        step = max(1, block_elements(student.device) // (len(flat_BSN) * flat_BSN.shape[1]))
        blocks = [slice(start, start + step) for start in range(0, flat_BSN.shape[2], step)]

        def units(flat_BDN: Tensor, block: slice) -> tuple[Tensor, Tensor]:
            """Columns of unit length (0 where one is zero or not counted), and 1 / their lengths likewise."""
            part = full_precision(flat_BDN[:, :, block])
            squared = part.square().sum(1, keepdim=True)
            nonzero = squared > torch.finfo(part.dtype).tiny
            if counted_BN is not None:
                nonzero = nonzero & counted_BN[:, None, block]
            inverse = torch.where(nonzero, torch.where(nonzero, squared, 1.0).rsqrt(), 0.0)
            return part * inverse, inverse

        def unpull(pull: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
            """The gradient of the features, from a quarter of that of their unit vectors."""
            along = (pull * unit).sum(1, keepdim=True)
            return pull.sub_(unit.mul_(along)).mul_(4 * inverse)

        if flat_BSN.shape[2] <= min(flat_BSN.shape[1], flat_BTN.shape[1]):  # the direct form is the smaller one
            (unit_BSN, inverse), (unit_BTN, _) = (units(flat, slice(None)) for flat in (flat_BSN, flat_BTN))
            difference_BNN = unit_BSN.mT @ unit_BSN - unit_BTN.mT @ unit_BTN
            if ctx.needs_input_grad[0]:
                keep_gradient(
                    ctx, unpull(unit_BSN @ difference_BNN, unit_BSN, inverse).view(student.shape), student
                )
            return _squared_norm(difference_BNN)

        ours: Tensor | float = 0.0
        theirs: Tensor | float = 0.0
        across: Tensor | float = 0.0
        for block in blocks:
            (unit_BSn, _), (unit_BTn, _) = units(flat_BSN, block), units(flat_BTN, block)
            ours = ours + unit_BSn @ unit_BSn.mT
            theirs = theirs + unit_BTn @ unit_BTn.mT
            across = across + unit_BSn @ unit_BTn.mT
        assert isinstance(ours, Tensor) and isinstance(theirs, Tensor) and isinstance(across, Tensor)  # noqa: PT018
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(flat_BSN, dtype=full_precision(flat_BSN[:1, :1, :1]).dtype)
            for block in blocks:
                (unit_BSn, inverse), (unit_BTn, _) = units(flat_BSN, block), units(flat_BTN, block)
                gradient[:, :, block] = unpull(ours @ unit_BSn - across @ unit_BTn, unit_BSn, inverse)
            keep_gradient(ctx, gradient.view(student.shape), student)
        return _squared_norm(ours) + _squared_norm(theirs) - 2 * _squared_norm(across)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        return scale_gradient(ctx, grad_B[:, None, None, None]), None, None


def unit_vectors(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, D, h, w] -> [B, D, N] with columns of unit length; zero (its gradient too) where a column is zero."""
    flat = full_precision(features).flatten(2)
    if mask is not None:
        flat = flat * mask.flatten(1)[:, None]
    squared = flat.square().sum(1, keepdim=True)
    nonzero = squared > torch.finfo(flat.dtype).tiny
    return torch.where(nonzero, flat * torch.where(nonzero, squared, 1.0).rsqrt(), 0.0)


def _squared_norm(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm of each matrix: [B, P, Q] -> [B], float64."""
    return matrix.double().square().sum((1, 2))


def pairwise(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, scale: float = 0.5) -> Tensor:
    """`affinity` of regions in place of positions: each `ceil(scale * size)` high and wide, max-pooled by channel.

    Structured knowledge distillation, Liu et al. 2019: the mean over images of the mean over pairs of regions of
    the squared difference of cosines. The authors' code sums them and divides by (number of regions)² and by the
    images, which is the same. It departs from this in two places: its regions are `floor(scale * size)` wide with
    what remains as regions of their own, so that a map of 65 gets a third row of regions one pixel high (here the
    default always makes 2×2); and it takes the features' norms as constants in the gradient, where this is the
    gradient of the value. On even sizes the values agree.

    Args:
        student, teacher: [B, S, h, w] and [B, T, h, w]; no gradient reaches the teacher.
        mask: boolean [B, h, w], True where a position counts; a region without one does not count either.
        scale: in (0, 1).
    """

    def regions(features: Tensor) -> Tensor:
        window = [math.ceil(size * scale) for size in features.shape[-2:]]
        return F.max_pool2d(features, window, ceil_mode=True)

    ours, theirs = full_precision(student), full_precision(teacher.detach())
    if mask is None:
        return affinity(regions(ours), regions(theirs))
    counted = regions(mask[:, None].to(ours))[:, 0] > 0

    def masked(features: Tensor) -> Tensor:
        return torch.where(counted[:, None], regions(features.masked_fill(~mask[:, None], -math.inf)), 0.0)

    return affinity(masked(ours), masked(theirs), mask=counted)


class Pairwise(FeatureTerm):
    """`pairwise` over the configured pairs."""

    def __init__(self, config: PairwiseConfig, context: Context) -> None:
        super().__init__(config, context)
        self.scale = config.scale

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        return pairwise(student, teacher, mask=mask, scale=self.scale)


def ifvd(student: Tensor, teacher: Tensor, labels: Tensor, *, classes: int | None = None) -> Tensor:
    """Mean over images of the mean over labelled positions of `(cos(f_i, m_i)_s - cos(f_i, m_i)_t)²`.

    m_i is the mean feature of the class of position i in its image. Intra-class feature variation distillation,
    Wang et al. 2020. A cosine needs the direction of m alone, so it is taken with the class's sum; sums and
    cosines are two small matrix products, where the authors' code fills a map of centres class by class, with some
    copies of all features each. The gradient goes through the means, as theirs does. Their mean counts unlabelled
    positions too, with a difference of 0; here they are out, and the loss of an image does not depend on how many
    there are. A feature that is all zero has similarity 0.

    Args:
        student, teacher: [B, S, h, w] and [B, T, h, w]; no gradient reaches the teacher.
        labels: int64 [B, H, W], 255 unlabelled; brought to the features' size by nearest neighbour.
        classes: their number; one more than the largest label without it.
    """
    target_BN = labels_at(labels, (student.shape[-2], student.shape[-1])).flatten(1)
    labelled_BN = target_BN != IGNORE_INDEX
    target_BN = torch.where(labelled_BN, target_BN, 0)
    every_C = torch.arange(classes or int(target_BN.max()) + 1, device=labels.device)
    member_BNC = (target_BN[..., None] == every_C) & labelled_BN[..., None]
    with torch.autocast(student.device.type, enabled=False):
        difference_BN = _ClassSimilarity.apply(student, target_BN, member_BNC)
        difference_BN = difference_BN - _ClassSimilarity.apply(teacher.detach(), target_BN, member_BNC)
    squared_BN = torch.where(labelled_BN, difference_BN.square(), 0.0)
    return (squared_BN.sum(1) / labelled_BN.sum(1).clamp(min=1)).mean()


class _ClassSimilarity(torch.autograd.Function):
    """Cosine [B, N] of each position with the mean over its class in its image, and its gradient in one product.

    With the sums m of the classes, lengths a of features and b of sums, and what arrives g, the gradient of f_n is

        g_n (m / (a_n b) - cos_n f_n / a_n²) + h,    h = sum over the class of g_i (f_i / (a_i b) - cos_i m / b²).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, target_BN: Tensor, member_BNC: Tensor) -> Tensor:
        flat_BDN = full_precision(features).flatten(2)
        member_BNC = member_BNC.to(flat_BDN)
        sums_BDC = flat_BDN @ member_BNC
        dots_BN = (sums_BDC.mT @ flat_BDN).gather(1, target_BN[:, None])[:, 0]
        inverse_BN = _inverse(torch.linalg.vector_norm(flat_BDN, dim=1))
        of_sums_BC = _inverse(torch.linalg.vector_norm(sums_BDC, dim=1))
        cosines_BN = dots_BN * inverse_BN * of_sums_BC.gather(1, target_BN)
        ctx.save_for_backward(features, member_BNC, sums_BDC, inverse_BN, of_sums_BC, cosines_BN)
        return cosines_BN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor, None, None]:
        features, member_BNC, sums_BDC, inverse_BN, of_sums_BC, cosines_BN = ctx.saved_tensors
        flat_BDN = full_precision(features).flatten(2)
        share_BNC = member_BNC * of_sums_BC[:, None]  # the position's class, over the length of its sum
        pulled_BC = (member_BNC.mT @ (grad_BN * cosines_BN)[..., None])[..., 0] * of_sums_BC.square()
        spread_BDC = flat_BDN @ (share_BNC * (grad_BN * inverse_BN)[..., None])
        spread_BDC = spread_BDC - sums_BDC * pulled_BC[:, None]
        own_BNC = share_BNC * (grad_BN * inverse_BN)[..., None]
        gradient = torch.cat([sums_BDC, spread_BDC], 2) @ torch.cat([own_BNC, member_BNC], 2).mT
        gradient.addcmul_(flat_BDN, -(grad_BN * cosines_BN * inverse_BN.square())[:, None])
        return gradient.view(features.shape).to(features.dtype), None, None


def _inverse(length: Tensor) -> Tensor:
    """1 / length, and 0 with a zero gradient where it is 0."""
    nonzero = length > math.sqrt(torch.finfo(length.dtype).tiny)
    return torch.where(nonzero, 1 / torch.where(nonzero, length, 1.0), 0.0)


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] at another size, by nearest neighbour, as `mask_of` takes them."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].long()


class IFVD(FeatureTerm):
    """`ifvd` over the configured pairs, the teacher's map brought to the student's resolution: their mean."""

    def __init__(self, config: IFVDConfig, context: Context) -> None:
        super().__init__(config, context)
        self.classes = context.classes or None

    def compare_labelled(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return ifvd(student, teacher, labels, classes=self.classes)


def cirkd_mini_batch(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, temperature: float = 0.1
) -> Tensor:
    """Mean over pairs of images (i, j) and positions n of i of `KL(p_t || p_s)`, over the positions m of j.

    `p(m) = softmax_m(cos(f_n, f_m) / temperature)`. Cross-image relational distillation, Yang et al. 2022; an
    image is paired with itself too, and there is no T², as in the authors' code. Value and gradient come from one
    pass over blocks of rows, so that of the matrix of all positions by all positions, of which plain code keeps
    several, no more than a block ever exists. As in their code, maps of 256×256 and above are first average-pooled
    by 4. A feature that is all zero has similarity 0 with all.

    Args:
        student, teacher: [B, S, h, w] and [B, T, h, w]; no gradient reaches the teacher.
        mask: boolean [B, h, w], True where a position counts, as row and as column.
    """
    if min(student.shape[-2:]) >= 256:
        if mask is not None:  # of the mean's direction alone is made use, so its denominator may be what it is
            student, teacher = (features * mask[:, None] for features in (student, teacher))
            mask = F.max_pool2d(mask[:, None].float(), 4, ceil_mode=True)[:, 0] > 0
        student, teacher = (F.avg_pool2d(features, 4, ceil_mode=True) for features in (student, teacher))
    batch = len(student)
    rows_PS = unit_vectors(student, mask).mT.flatten(0, 1)
    rows_PT = unit_vectors(teacher.detach(), mask).mT.flatten(0, 1)
    if mask is None:
        counted_BN = rows_PS.new_ones(batch, rows_PS.shape[0] // batch)
    else:
        counted_BN = mask.flatten(1).to(rows_PS)
    weight_BN = counted_BN / (counted_BN.sum(1, keepdim=True).clamp(min=1) * batch**2)
    return row_divergence(
        rows_PS,
        rows_PT,
        rows_PS,
        rows_PT,
        weight=weight_BN.flatten(),
        counted=None if mask is None else mask.flatten(),
        groups=batch,
        temperature=temperature,
    )


def row_divergence(
    student_rows: Tensor,
    teacher_rows: Tensor,
    student_keys: Tensor,
    teacher_keys: Tensor,
    *,
    weight: Tensor,
    counted: Tensor | None = None,
    groups: int = 1,
    temperature: float,
) -> Tensor:
    """Weighted sum over rows of `KL(p_t || p_s)`, `p = softmax(rows · keysᵀ / temperature)`, by blocks of rows.

    The value and, in the same pass, the gradients are made a block of rows at a time: memory is that of the inputs
    and a block, however many keys there are.

    Args:
        student_rows, student_keys: [P, S] and [K, S]; both get a gradient, once differentiable.
        teacher_rows, teacher_keys: [P, T] and [K, T].
        weight: [P], of the rows.
        counted: boolean [K], False for keys that do not take part; none does: 0.
        groups: number of equal parts of the keys, each with a softmax of its own, whose divergences are added up.
    """
    with torch.autocast(student_rows.device.type, enabled=False):
        return _RowDivergence.apply(
            student_rows,
            student_keys,
            teacher_rows.detach(),
            teacher_keys.detach(),
            weight,
            counted,
            groups,
            temperature,
        )


def block_elements(device: torch.device) -> int:
    """How many similarities a block has."""
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"])


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_PS: Tensor,
        keys_KS: Tensor,
        rows_PT: Tensor,
        keys_KT: Tensor,
        weight_P: Tensor,
        counted_K: Tensor | None,
        groups: int,
        temperature: float,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        gradients = [
            torch.zeros_like(x) if want else None for x, want in zip((rows_PS, keys_KS), wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float64, device=rows_PS.device)
        blank = None if counted_K is None else ~counted_K

        def log_shares(rows_RD: Tensor, keys_KD: Tensor) -> Tensor:
            logits_RK = (rows_RD @ keys_KD.T).div_(temperature)
            if blank is not None:
                least = torch.finfo(logits_RK.dtype).min  # -inf would make NaN where all are blank
                logits_RK.masked_fill_(blank, least)
            return F.log_softmax(logits_RK.view(len(rows_RD), groups, -1), dim=-1)

        step = max(1, block_elements(rows_PS.device) // max(1, len(keys_KS)))
        for start in range(0, len(rows_PS), step):
            block = slice(start, start + step)
            theirs = log_shares(rows_PT[block], keys_KT)
            shares = theirs.exp()
            ours = log_shares(rows_PS[block], keys_KS)
            rows_weight = weight_P[block]
            total += (theirs.sub_(ours).mul_(shares).sum((1, 2)) * rows_weight).sum(dtype=torch.float64)
            if any(wanted):
                pull_RK = ours.exp_().sub_(shares).flatten(1).mul_((rows_weight / temperature)[:, None])
                if gradients[0] is not None:
                    torch.mm(pull_RK, keys_KS, out=gradients[0][block])
                if gradients[1] is not None:
                    gradients[1].addmm_(pull_RK.T, rows_PS[block])
        ctx.save_for_backward(*gradients)
        return total.to(rows_PS.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * grad_loss for gradient in ctx.saved_tensors)
        return *scaled, *[None] * 6


class CIRKDMiniBatch(FeatureTerm):
    """`cirkd_mini_batch` over the configured pairs.

    It sees the images of one process and one accumulated part, as the authors' code does: splitting a batch
    changes which pairs there are.
    """

    def __init__(self, config: CIRKDMiniBatchConfig, context: Context) -> None:
        super().__init__(config, context)
        self.temperature = config.temperature

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        return cirkd_mini_batch(student, teacher, mask=mask, temperature=self.temperature)

    def note(self) -> str:
        return "pairs of the images of one process and part"
