"""The loss that every segmenter pays: native-stride logits, upsampled to the labels, against labels and teacher.

Dimension letters: B images, C classes, R label rows of a block, K native rows under them, W label columns.
"""

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.blocks import Rows, keep_gradient, label_weight, rows_a_block, safe, scale_gradient
from losses.term import full_precision

# The Triton kernel is off until it is asked for: it was checked against the blocks in Triton's interpreter alone.
TRITON = os.environ.get("SEGDISTILL_TRITON") == "1"


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

    Value and gradient are exact and made in one pass over blocks of label rows: a few native rows are upsampled,
    the softmax taken, the gradient pushed back through the transposed interpolation, and the block dropped.
    Nothing of full size is kept.

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
        labelled pixel the terms and their gradients are 0. Differentiable once.
    """
    if kl_weight and teacher_logits is None:
        raise ValueError("kl_weight is not 0 but there are no teacher_logits")
    if ce_denominator is None:
        ce_denominator = label_weight(labels, class_weights, ignore_index)
    if kl_denominator is None:
        kl_denominator = label_weight(labels, kl_class_weights, ignore_index)
    settings = _Settings(
        float(ce_weight), float(kl_weight), float(temperature), label_smoothing, ignore_index, align_corners
    )
    with torch.autocast(student_logits.device.type, enabled=False):  # or the interpolation's products are in bf16
        loss, ce, kl = _UpsampledLoss.apply(
            student_logits,
            labels,
            teacher_logits.detach() if kl_weight and teacher_logits is not None else None,
            class_weights,
            kl_class_weights,
            ce_denominator,
            kl_denominator,
            settings,
        )
    return loss, {"ce": ce, "kl": kl}


class _Settings(NamedTuple):
    ce_weight: float
    kl_weight: float
    temperature: float
    label_smoothing: float
    ignore_index: int
    align_corners: bool


class _UpsampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None,
        class_weights: Tensor | None,
        kl_class_weights: Tensor | None,
        ce_denominator: Tensor | float,
        kl_denominator: Tensor | float,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, classes = student_logits.shape[:2]
        size = (labels.shape[-2], labels.shape[-1])
        taught = None if teacher_logits is None else full_precision(teacher_logits)

        # The type of the sums and of the gradient, and what each class and pixel weighs in them.
        like = full_precision(student_logits.new_zeros(()))
        ce_weights = like.new_ones(classes) if class_weights is None else class_weights.to(like)
        kl_weights = like.new_ones(classes) if kl_class_weights is None else kl_class_weights.to(like)
        ce_weights = ce_weights / safe(ce_denominator, like)
        kl_weights = kl_weights / safe(kl_denominator, like)
        wanted = ctx.needs_input_grad[0]
        if in_one_kernel(student_logits):
            from losses.upsampled_triton import value_and_gradient

            native, options = full_precision(student_logits), settings._asdict()
            ce, kl, found = value_and_gradient(native, taught, labels, ce_weights, kl_weights, **options)
            return _answer(ctx, student_logits, ce, kl, found if wanted else None, settings)

        student = Rows(student_logits, size, settings.align_corners)
        teacher = None
        if taught is not None:  # upsampling is linear, so the temperature may divide before it
            teacher = Rows(taught / settings.temperature, size, settings.align_corners)
        labelled = labels != settings.ignore_index
        target = torch.where(labelled, labels, 0)
        ce_pixels = ce_weights[target].mul_(labelled).unsqueeze(1)  # [B, 1, H, W]
        kl_pixels = kl_weights[target].mul_(labelled).unsqueeze(1) if teacher is not None else ce_pixels
        spread = ce_weights * (settings.label_smoothing / classes) if settings.label_smoothing else None
        target = target.unsqueeze(1)
        ce, kl = (like.new_zeros((), dtype=torch.float64) for _ in range(2))
        gradient = torch.zeros_like(student.native) if wanted else None

        step = rows_a_block(batch * classes * size[1], student_logits.device)
        for start in range(0, size[0], step):
            stop = min(start + step, size[0])
            rows, matrix_RK = student.block(start, stop)
            logits = student.upsample(rows, matrix_RK)
            answers = _Answers(logits)
            if teacher is not None:
                soft = F.log_softmax(teacher.upsample(*teacher.block(start, stop)), dim=1)
                kl += _distillation(answers, soft, kl_pixels[:, :, start:stop], settings)
            if settings.ce_weight:
                truth, pixels = target[:, :, start:stop], ce_pixels[:, :, start:stop]
                ce += _cross_entropy(answers, truth, pixels, labelled[:, None, start:stop], spread, settings)
            if gradient is not None:
                gradient[:, :, rows] += student.transpose(answers.gradient(), matrix_RK)

        return _answer(ctx, student_logits, ce, kl, gradient, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return scale_gradient(ctx, grad_loss), *[None] * 7


def _answer(
    ctx: Any, student_logits: Tensor, ce: Tensor, kl: Tensor, gradient: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and terms from the float64 sums; the gradient is kept for the backward pass."""
    if gradient is not None:
        keep_gradient(ctx, gradient, student_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    loss, ce, kl = ((settings.ce_weight * ce + settings.kl_weight * kl).to(dtype), ce.to(dtype), kl.to(dtype))
    ctx.mark_non_differentiable(ce, kl)
    return loss, ce, kl


def in_one_kernel(logits: Tensor) -> bool:
    """Whether the Triton kernel does the work: on a GPU, where it is asked for and its atomic sums may be."""
    if not TRITON or logits.dtype == torch.float64 or logits.shape[1] > 128:  # more don't fit into shared memory
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    return logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


class _Answers:
    """Log-probabilities of a block of logits at the temperatures that are asked for, and what reaches them.

    Each temperature keeps the gradient with respect to its log-probabilities; one fused backward pass of the
    log-softmax turns that into the gradient with respect to the logits.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.log_probabilities: dict[float, Tensor] = {}
        self.upstream: dict[float, Tensor] = {}

    def at(self, temperature: float) -> Tensor:
        """Log-probabilities [B, C, R, W]."""
        if temperature not in self.log_probabilities:
            logits = self.logits if temperature == 1 else self.logits / temperature
            self.log_probabilities[temperature] = F.log_softmax(logits, dim=1)
        return self.log_probabilities[temperature]

    def gradient(self) -> Tensor:
        """With respect to the logits [B, C, R, W]."""
        total = None
        for temperature, upstream in self.upstream.items():
            output = self.log_probabilities[temperature]
            part = torch.ops.aten._log_softmax_backward_data(upstream, output, 1, upstream.dtype)
            part = part if temperature == 1 else part.div_(temperature)
            total = part if total is None else total.add_(part)
        return torch.zeros_like(self.logits) if total is None else total


def _cross_entropy(
    answers: _Answers,
    target: Tensor,
    pixels: Tensor,
    labelled: Tensor,
    spread: Tensor | None,
    settings: _Settings,
) -> Tensor:
    """The block's weighted sum, float64; hands `ce_weight` times its gradient to `answers`.

    Args:
        target, pixels, labelled: [B, 1, R, W], what each pixel is, weighs, and whether it counts.
        spread: [C], with label smoothing: every class's share of the target.
    """
    log_probabilities = answers.at(1.0)
    if 1.0 not in answers.upstream:
        answers.upstream[1.0] = torch.zeros_like(log_probabilities)
    upstream = answers.upstream[1.0]
    pixels = pixels * (1 - settings.label_smoothing)
    value = -(pixels * log_probabilities.gather(1, target)).sum().double()
    if spread is not None:
        share = spread.view(1, -1, 1, 1) * labelled
        value -= (share * log_probabilities).sum().double()
        upstream.sub_(share, alpha=settings.ce_weight)
    upstream.scatter_add_(1, target, pixels.mul_(-settings.ce_weight))
    return value


def _distillation(answers: _Answers, soft: Tensor, pixels: Tensor, settings: _Settings) -> Tensor:
    """The block's weighted sum of T² KL, from the teacher's log-probabilities `soft`; likewise, and first."""
    log_probabilities = answers.at(settings.temperature)
    upstream = soft.exp().mul_(pixels * (-settings.kl_weight * settings.temperature**2))
    answers.upstream[settings.temperature] = upstream
    difference = soft.sub_(log_probabilities)
    return torch.dot(difference.flatten(), upstream.flatten()).double() / -settings.kl_weight
