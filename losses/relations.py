"""Distillation of relations between positions: the affinity matrix, without ever making it.

Dimension letters: B images, N positions, S and T channels of student and teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.features import FeatureTerm
from losses.term import FeatureTermConfig, full_precision


@dataclass
class AffinityConfig(FeatureTermConfig):
    """Affinity (He et al. 2019): cosine similarity of every position with every other, on raw features."""

    weight: float = 1.0
    """Factor of the term in the total loss."""


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
    unit_BSN = _unit_vectors(student, mask)
    unit_BTN = _unit_vectors(teacher.detach(), mask)
    positions = unit_BSN.shape[-1] if mask is None else mask.flatten(1).sum(1).clamp(min=1)

    with torch.autocast(student.device.type, enabled=False):
        if unit_BSN.shape[-1] <= min(unit_BSN.shape[1], unit_BTN.shape[1]):
            difference_BNN = unit_BSN.mT @ unit_BSN - unit_BTN.mT @ unit_BTN
            squared = _squared_norm(difference_BNN)
        else:
            # The gradient of the three norms is 4 Ŝ (ŜᵀŜ) - 4 T̂ (T̂ᵀŜ), again without a matrix of N×N.
            squared = _squared_norm(unit_BSN @ unit_BSN.mT) + _squared_norm(unit_BTN @ unit_BTN.mT)
            squared = squared - 2 * _squared_norm(unit_BSN @ unit_BTN.mT)
    return (squared / positions**2).mean().to(unit_BSN.dtype)


def _unit_vectors(features: Tensor, mask: Tensor | None) -> Tensor:
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


class Affinity(FeatureTerm):
    """`affinity` over the configured pairs."""

    function = staticmethod(affinity)
