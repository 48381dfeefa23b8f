"""The loss that every segmenter pays: native-stride logits, upsampled to the labels, against labels and teacher.

Dimension letters: B images, C classes, R label rows of a block, K native rows under them, W label columns.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.blocks import Rows, keep_gradient, label_weight, rows_a_block, safe, scale_gradient
from losses.term import full_precision, resize

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


def native_divergence(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """`weight` times the KL of `upsampled_loss` at the student's own positions: an approximation, almost free.

        KL = T² * (H W / h w) * sum v[y] * KL(softmax(t / T) || softmax(s / T)) / sum v[y]

    The first sum is over the native positions, y the label nearest to each; the second over all pixels of the
    labels, so that parts of a batch add up to it. The teacher's logits are brought to the student's size, by area
    where they are larger. Between positions that do not agree, where logits at label size are between the two,
    nothing is compared.

    Much code that distils segmenters compares there: `CriterionPixelWise` of Liu et al. 2019 (structured
    knowledge distillation) and, with T², `CriterionKD` of Yang et al. 2022 (CIRKD). Both let positions without a
    label count, and the former sums over the batch and gives a cross-entropy in place of a divergence.

    Args:
        student_logits: [B, C, h, w] at any stride.
        labels: int64 [B, H, W]; a position whose nearest label is `ignore_index` is left out.
        teacher_logits: [B, C, h', w'] at any stride; no gradient reaches them.
        class_weights: [C], v.
        denominator: in place of the sum of weights in these labels, that of the whole batch.

    Returns:
        The loss, at least float32, and the term, unweighted and detached. Differentiable once.
    """
    size = (student_logits.shape[-2], student_logits.shape[-1])
    if denominator is None:
        denominator = label_weight(labels, class_weights, ignore_index)
    covered = labels.shape[-2] * labels.shape[-1] / (size[0] * size[1])
    loss, made = upsampled_loss(
        student_logits,
        _nearest(labels, size),
        resize(full_precision(teacher_logits.detach()), size),
        ce_weight=0.0,
        kl_weight=weight,
        temperature=temperature,
        kl_class_weights=class_weights,
        ignore_index=ignore_index,
        ce_denominator=1.0,
        kl_denominator=denominator / covered,
    )
    return loss, made["kl"]


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Of labels [B, H, W] those at the centres of h×w equal cells: [B, h, w]."""
    for axis, native in ((1, size[0]), (2, size[1])):
        centres = (torch.arange(native, device=labels.device) + 0.5) * (labels.shape[axis] / native)
        labels = labels.index_select(axis, centres.long())
    return labels


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
        like = full_precision(student_logits.new_zeros(()))  # of the type of the sums and of the gradient
        ce_denominator, kl_denominator = safe(ce_denominator, like), safe(kl_denominator, like)
        wanted = ctx.needs_input_grad[0]
        if in_one_kernel(student_logits):
            from losses.upsampled_triton import value_and_gradient

            ones = like.new_ones(classes)
            ce_weights = (ones if class_weights is None else class_weights.to(like)) / ce_denominator
            kl_weights = (ones if kl_class_weights is None else kl_class_weights.to(like)) / kl_denominator
            native, options = full_precision(student_logits), settings._asdict()
            taught = None if teacher_logits is None else full_precision(teacher_logits)
            ce, kl, found = value_and_gradient(native, taught, labels, ce_weights, kl_weights, **options)
            return _answer(ctx, student_logits, ce, kl, found if wanted else None, settings)

        temperature = 1.0 if teacher_logits is None else settings.temperature
        student = _Softened(student_logits, size, temperature, settings.align_corners)
        teacher = None
        if teacher_logits is not None:
            teacher = _Softened(teacher_logits, size, temperature, settings.align_corners)
        step = rows_a_block(batch * classes * size[1], student_logits.device)
        labelled = labels != settings.ignore_index
        target, counted = torch.where(labelled, labels, 0).unsqueeze(1), labelled.to(like).unsqueeze(1)

        # What each pixel [B, 1, H, W] weighs in the loss: its true class, all of its classes, its teacher. Of the
        # teacher's T² one factor stays for the value, the other is gone by the derivative of logits / T.
        factor = settings.ce_weight * (1 - settings.label_smoothing) / ce_denominator
        true = _weigh(target, counted * factor, class_weights)
        mass, spread = true, None
        if settings.label_smoothing:
            spread = like.new_ones(classes) if class_weights is None else class_weights.to(like)
            spread = spread * (settings.ce_weight * settings.label_smoothing / (classes * ce_denominator))
            mass = true + counted * spread.sum()
        taught = None
        if teacher is not None:
            factor = settings.kl_weight * temperature / kl_denominator
            taught = _weigh(target, counted * factor, kl_class_weights)
        soft_mass = mass if taught is None else taught + mass if temperature == 1 else taught

        ce, kl = (like.new_zeros((), dtype=torch.float64) for _ in range(2))
        gradient = torch.zeros_like(student.native) if wanted else None
        for start in range(0, size[0], step):
            stop = min(start + step, size[0])
            block = (slice(None), slice(None), slice(start, stop))
            rows, matrix_RK = student.block(start, stop)
            ours = student.exponentials(rows, matrix_RK)
            hard = ours if temperature == 1 or not settings.ce_weight else student.hardened(ours)
            theirs = None
            if teacher is not None and taught is not None:
                alike = teacher.native.shape[-2:] == student.native.shape[-2:]
                theirs = teacher.exponentials(*((rows, matrix_RK) if alike else teacher.block(start, stop)))
                kl += _distillation(ours, theirs, taught[block])
            if settings.ce_weight:
                ce += _cross_entropy(
                    hard, temperature, target[block], true[block], mass[block], counted[block], spread
                )
            if gradient is None:
                continue
            slope = ours.powers.mul_(soft_mass[block] / ours.totals)
            if hard is not ours:
                slope.addcmul_(hard.powers, mass[block] / hard.totals)
            if theirs is not None:
                slope.sub_(theirs.powers)
            if settings.ce_weight:
                slope.scatter_add_(1, target[block], -true[block])
            if spread is not None:
                slope.addcmul_(counted[block], spread.view(-1, 1, 1), value=-1)
            gradient[:, :, rows] += student.transpose(slope, matrix_RK)

        ce = ce / settings.ce_weight if settings.ce_weight else ce
        kl = kl * (temperature / settings.kl_weight) if teacher is not None else kl
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


class _Exponentials(NamedTuple):
    """Of a block's logits / T, from which each pixel's own number may have been taken; see `_Softened`.

    The softmax is `powers / totals`; the division is left to the maps of the pixels' weights.
    """

    logits: Tensor  # [B, C, R, W], those / T
    powers: Tensor  # exponentials of them, or of those that are not divided
    totals: Tensor  # [B, 1, R, W], sums of the exponentials


class _Softened(Rows):
    """Rows of logits / T with their exponentials, in the same memory for every block.

    At every native position the highest logit is taken off, which no softmax sees. Between positions that do not
    agree on the highest one all are then below 0, by no more than three quarters of the lowest: where that is not
    low, exponentials are as good as after a maximum at label size. Elsewhere that is taken off too, and on a GPU,
    where a look at the numbers would have to be waited for.
    """

    LOWEST = -64.0  # exp(0.75 * LOWEST) is far from the smallest float32

    def __init__(self, logits: Tensor, size: tuple[int, int], temperature: float, align_corners: bool) -> None:
        logits = full_precision(logits.detach())
        logits = logits - logits.amax(1, keepdim=True)
        lowest = self.LOWEST * min(temperature, 1.0)
        self.low = logits.is_cuda or logits.numel() == 0 or not float(logits.amin()) > lowest  # NaN is low
        super().__init__(logits.div_(temperature) if temperature != 1 else logits, size, align_corners)
        self.temperature = temperature
        self.memory: dict[str, Tensor] = {}

    def exponentials(self, rows: slice, matrix_RK: Tensor) -> _Exponentials:
        shape = (*self.native.shape[:2], len(matrix_RK), self.width)
        logits = self.upsample(rows, matrix_RK, out=None if self.same else self._memory("logits", shape))
        if self.low:
            logits -= logits.amax(1, keepdim=True)
        powers = torch.exp(logits, out=self._memory("powers", logits.shape))
        return _Exponentials(logits, powers, powers.sum(1, keepdim=True))

    def hardened(self, soft: _Exponentials) -> _Exponentials:
        """The exponentials at temperature 1, from the block's at T."""
        powers = self._memory("hard", soft.powers.shape)
        if self.temperature == 2:
            torch.mul(soft.powers, soft.powers, out=powers)
        else:
            torch.mul(soft.logits, self.temperature, out=powers).exp_()
        return _Exponentials(soft.logits, powers, powers.sum(1, keepdim=True))

    def _memory(self, name: str, shape: Sequence[int]) -> Tensor:
        """Fresh memory of a block's size would be asked of the system, which costs as much as several passes."""
        size = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = self.native.new_empty(size)
        return self.memory[name][:size].view(shape)


def _weigh(target: Tensor, pixels: Tensor, class_weights: Tensor | None) -> Tensor:
    """The map `pixels` [B, 1, H, W] times the weight of each pixel's class."""
    if class_weights is None:
        return pixels
    return pixels.mul_(class_weights.to(pixels).index_select(0, target.flatten()).view_as(pixels))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten()).double()


def _cross_entropy(
    hard: _Exponentials,
    temperature: float,
    target: Tensor,
    true: Tensor,
    mass: Tensor,
    counted: Tensor,
    spread: Tensor | None,
) -> Tensor:
    """The block's weighted sum, float64.

    Args:
        temperature: T, by which the logits were divided.
        target, true, mass, counted: [B, 1, R, W], what each pixel is, what its true class weighs and what all of
            its classes, and whether it counts.
        spread: [C], with label smoothing: what every class of a pixel weighs.
    """
    value = _dot(mass, hard.totals.log()) - temperature * _dot(true, hard.logits.gather(1, target))
    if spread is not None:
        value -= temperature * _dot((hard.logits * spread.view(-1, 1, 1)).sum(1, keepdim=True), counted)
    return value


def _distillation(ours: _Exponentials, theirs: _Exponentials, pixels: Tensor) -> Tensor:
    """The block's sum, float64, of KL(teacher || student) times `pixels` [B, 1, R, W].

    Of the teacher `pixels` times its softmax remains, as powers, and its logits are used up.
    """
    theirs.powers.mul_(pixels / theirs.totals)
    difference = theirs.logits.sub_(ours.logits)
    return _dot(theirs.powers, difference) + _dot(pixels, (ours.totals / theirs.totals).log_())
