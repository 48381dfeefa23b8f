"""The plain form of cross-entropy and KD: everything at full size."""

import torch
import torch.nn.functional as F
from cases import CLASSES, VOID
from torch import Tensor


def eager(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    kl_class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """The plain form: everything at full size, PyTorch's own losses."""

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, labels.shape[-2:], mode="bilinear", align_corners=align_corners)

    ours = enlarged(student)
    weights = None if class_weights is None else class_weights.to(ours)
    loss = ce_weight * F.cross_entropy(ours, labels, weights, ignore_index=VOID, label_smoothing=label_smoothing)
    if kl_weight:
        assert teacher is not None
        theirs = F.softmax(enlarged(teacher) / temperature, 1)
        pixels = F.kl_div(F.log_softmax(ours / temperature, 1), theirs, reduction="none").sum(1)
        share = (labels != VOID).to(ours)
        if kl_class_weights is not None:
            share = share * kl_class_weights.to(ours)[torch.where(labels == VOID, 0, labels)]
        loss = loss + kl_weight * temperature**2 * (pixels * share).sum() / share.sum()
    return loss


def logits_and_labels(
    native: tuple[int, int], size: tuple[int, int], teacher: tuple[int, int] | None = None, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ours = torch.randn(batch, CLASSES, *native, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(batch, CLASSES, *(teacher or native), dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (batch, *size))
    labels[torch.rand(labels.shape) < 0.2] = VOID
    return ours, theirs, labels
