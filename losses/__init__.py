"""Losses of segmentation and distillation; each a function, and a term where it needs parameters or state."""

from losses.distillation import DistillationLoss, LossConfig

__all__ = ["DistillationLoss", "LossConfig"]
