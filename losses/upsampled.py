"""The loss that every segmenter pays: native-stride logits, upsampled to the labels, against labels and teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.term import full_precision


def upsampled_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    align_corners: bool = False,
    ce_denominator: Tensor | float | None = None,
    kl_denominator: Tensor | float | None = None,
    kl_class_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy and distillation of logits at label size: `ce_weight * CE + kl_weight * KL`.

    Both logits are upsampled bilinearly to the labels' size. Over the labelled pixels, w the class weights,

        CE = sum w[y] * (-log softmax(s)[y]) / sum w[y]               (smoothing as in PyTorch's cross_entropy)
        KL = T² * sum v[y] * KL(softmax(t / T) || softmax(s / T)) / sum v[y],   v = 1 without `kl_class_weights`

    (Hinton et al. 2015). The value is a true KL divergence, 0 for a perfect student, and a mean over pixels:
    `kl_div(reduction="batchmean")`, often seen, sums over a map's pixels, and dropping T² lets the temperature
    change the weight.

    Args:
        student_logits: [B, C, h, w] at any stride.
        labels: int64 [B, H, W]; `ignore_index` is left out of both terms.
        teacher_logits: [B, C, h', w'] at any stride; no gradient reaches them.
        class_weights: [C], of the cross-entropy.
        kl_class_weights: [C], of the distillation: a rebalanced task needs a rebalanced teacher signal.
        ce_denominator, kl_denominator: in place of the sums of weights in these labels, those of the whole
            batch of which they are a part.

    Returns:
        The loss, at least float32, and the two terms, unweighted and detached, as "ce" and "kl". Without a
        labelled pixel the terms and their gradients are 0.
    """
    student = F.interpolate(
        full_precision(student_logits), size=labels.shape[-2:], mode="bilinear", align_corners=align_corners
    )
    zero = full_precision(student_logits).sum() * 0.0
    labelled = labels != ignore_index
    target = torch.where(labelled, labels, 0)
    loss, values = zero, {"ce": zero.detach(), "kl": zero.detach()}

    if ce_weight:
        weights = None if class_weights is None else class_weights.to(student)
        if ce_denominator is None:
            ce_denominator = label_weight(labels, class_weights, ignore_index)
        ce = F.cross_entropy(
            student, labels, weights, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )
        ce = ce / safe(ce_denominator, student)
        loss, values["ce"] = loss + ce_weight * ce, ce.detach()

    if kl_weight:
        if teacher_logits is None:
            raise ValueError("kl_weight is not 0 but there are no teacher_logits")
        teacher = F.interpolate(
            full_precision(teacher_logits.detach()),
            size=labels.shape[-2:],
            mode="bilinear",
            align_corners=align_corners,
        )
        log_student = F.log_softmax(student / temperature, dim=1)
        log_teacher = F.log_softmax(teacher / temperature, dim=1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1)  # [B, H, W]
        pixel_weights = labelled.to(student)
        if kl_class_weights is not None:
            pixel_weights = pixel_weights * kl_class_weights.to(student)[target]
        if kl_denominator is None:
            kl_denominator = label_weight(labels, kl_class_weights, ignore_index)
        kl = temperature**2 * (divergence * pixel_weights).sum()
        kl = kl / safe(kl_denominator, student)
        loss, values["kl"] = loss + kl_weight * kl, kl.detach()
    return loss, values


def label_weight(labels: Tensor, class_weights: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """Labelled pixels of [B, H, W], or the sum of their class weights: a float64 scalar, the terms' denominator."""
    labelled = labels != ignore_index
    if class_weights is None:
        return labelled.sum().double()
    weights = class_weights.double().to(labels.device)[torch.where(labelled, labels, 0)]
    return (weights * labelled).sum()


def safe(denominator: Tensor | float, like: Tensor) -> Tensor:
    """The denominator in the type of `like`; 1 where it is 0, so that nothing over nothing is 0 and not NaN."""
    total = torch.as_tensor(denominator).to(like)
    return torch.where(total == 0, torch.ones_like(total), total)
