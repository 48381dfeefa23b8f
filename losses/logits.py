"""Distillation of logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigurationError
from losses.blocks import PixelTermConfig
from losses.term import full_precision, term_name


@dataclass
class SoftTermConfig(PixelTermConfig):
    """A term that compares softened distributions, with weights per pixel if asked.

    A rebalanced task needs a rebalanced teacher signal: see `class_weights`.
    """

    temperature: float = 1.0
    """T: softens both distributions; the loss keeps its T²."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigurationError(
                f"losses.{term_name(type(self))}.temperature: {self.temperature} is not positive; give 1.0 or more"
            )


@dataclass
class KDConfig(SoftTermConfig):
    """Knowledge distillation of logits (Hinton et al. 2015), per pixel, at label size."""


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): mean over pixels of `T² * KL(softmax(t/T) || softmax(s/T))`.

    Args:
        student_logits, teacher_logits: [B, C, h, w]; no gradient reaches the teacher's.
        mask: boolean [B, h, w], True where a pixel counts; all count without it.
        temperature: T.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, where no pixel counts.
    """
    student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full_precision(teacher_logits.detach()) / temperature, dim=1)
    divergence = temperature**2 * (teacher.exp() * (teacher - student)).sum(1)
    if mask is None:
        return divergence.mean()
    return torch.where(mask, divergence, 0.0).sum() / mask.sum().clamp(min=1)
