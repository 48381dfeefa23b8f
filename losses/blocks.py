"""Losses at label size from logits at native stride, a few label rows at a time.

Logits stand at stride 4 or 8, labels at stride 1. What is upsampled whole costs sixteen or more times the memory
of the logits, several times over; here no more than a block of rows is ever upsampled, and value and gradient are
exact.

Dimension letters: B images, C classes, R label rows of a block, K native rows under them, W label columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.term import (
    IGNORE_INDEX,
    ClassWeighting,
    Context,
    ModelOutput,
    Term,
    TermConfig,
    full_precision,
)

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a block of upsampled logits: it should stay in the cache
NARROW = 128  # native columns up to which a product with a matrix interpolates faster than PyTorch does, on a CPU


def blocked_sum(
    function: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    maps: Sequence[Tensor],
    *,
    finish: Callable[[Tensor], Tensor] | None = None,
    whole_images: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """A loss made of sums over pixels, with both logits upsampled bilinearly to the size of `maps`, by blocks.

    `function(student [B, C, R, W], teacher [B, C, R, W] or None, *maps [B, ..., R, W])` is written in plain
    PyTorch and returns the block's sums, a tensor of a fixed shape; they are added up over the blocks in float64.
    Without `finish` the total is a scalar and the loss. With it the loss is `finish(total)`, of overlaps say
    (Dice), and the blocks are gone through twice: for the totals, and then for the gradient, which is that of
    `function` with what `finish` sends back to each total.

    Args:
        student_logits: [B, C, h, w] at any stride.
        teacher_logits: [B, C', h', w'] at any stride, or None; no gradient reaches them.
        maps: labels, masks, weights: [B, ..., H, W].
        whole_images: a block is one image with all of its rows, for what must sort an image's pixels; the loss is
            then the sum over images.
        align_corners: as in PyTorch's interpolate.

    Returns:
        The loss in at least float32. Differentiable once, with respect to the student's logits alone.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        teacher = None if teacher_logits is None else teacher_logits.detach()
        return _BlockedSum.apply(
            student_logits, teacher, tuple(maps), function, finish, whole_images, align_corners
        )


class _BlockedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        maps: tuple[Tensor, ...],
        function: Callable[..., Tensor],
        finish: Callable[[Tensor], Tensor] | None,
        whole_images: bool,
        align_corners: bool,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        size = (maps[0].shape[-2], maps[0].shape[-1])
        student = Rows(student_logits, size, align_corners)
        teacher = None if teacher_logits is None else Rows(teacher_logits, size, align_corners)
        gradient = torch.zeros_like(student.native) if wanted else None
        upstream = None

        def go_through(backward: bool) -> Tensor:
            total: Tensor | None = None
            for images, start, stop in _blocks(student, size, whole_images):
                rows, matrix_RK = student.block(start, stop)
                ours = student.upsample(rows, matrix_RK, images).requires_grad_(backward)
                theirs = None if teacher is None else teacher.upsample(*teacher.block(start, stop), images)
                with torch.set_grad_enabled(backward):
                    value = function(ours, theirs, *(map_[images, ..., start:stop, :] for map_ in maps))
                if backward and value.requires_grad:
                    assert gradient is not None
                    sent = None if upstream is None else upstream.to(value.dtype)
                    (pulled,) = torch.autograd.grad(value, ours, sent)
                    gradient[images, :, rows] += student.transpose(pulled, matrix_RK)
                total = value.detach().double() if total is None else total + value.detach()
            assert total is not None
            return total

        if finish is None:
            loss = go_through(wanted)
        else:
            total = go_through(False).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = finish(total)
            if wanted and loss.requires_grad:
                (upstream,) = torch.autograd.grad(loss, total)
                go_through(True)
        if gradient is not None:
            keep_gradient(ctx, gradient, student_logits)
        return loss.detach().to(student.native.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return scale_gradient(ctx, grad_loss), *[None] * 6


def _blocks(logits: "Rows", size: tuple[int, int], whole_images: bool) -> Iterator[tuple[slice, int, int]]:
    """Which images and which label rows, start and stop, each block takes."""
    batch, classes = logits.native.shape[:2]
    if whole_images:
        yield from ((slice(image, image + 1), 0, size[0]) for image in range(batch))
        return
    step = rows_a_block(batch * classes * size[1], logits.native.device)
    yield from ((slice(None), start, min(start + step, size[0])) for start in range(0, size[0], step))


def rows_a_block(row_elements: int, device: torch.device) -> int:
    """How many label rows a block takes, each of so many elements over all images and classes."""
    return max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // row_elements)


def upsampled_blocks(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Goes over [B, C, h, w] upsampled to `size`: rows, and their block [B, C, R, W] in at least float32.

    For totals that are wanted before the loss, without a gradient.
    """
    rows = Rows(logits, size, align_corners=False)
    for images, start, stop in _blocks(rows, size, whole_images=False):
        with torch.autocast(logits.device.type, enabled=False):  # not around the yield, which would leave it on
            block = rows.upsample(*rows.block(start, stop), images)
        yield slice(start, stop), block


class Rows:
    """Bilinear upsampling of [B, C, h, w] to [B, C, H, W], any rows of it at a time, and its transpose.

    Where the sizes agree there is nothing to interpolate and the rows are handed through.
    """

    def __init__(self, native: Tensor, size: tuple[int, int], align_corners: bool) -> None:
        self.native = full_precision(native.detach()).contiguous()  # else rows would be copied each time
        self.width, self.align_corners = size[1], align_corners
        self.same = native.shape[-2:] == torch.Size(size)
        self.height = size[0]
        # On a GPU the transpose of PyTorch's interpolation is not deterministic, a product with a matrix is. On a
        # CPU it is slow, and the product, zeros and all, faster where the map is not wide.
        self.columns_WJ: Tensor | None = None
        exact = self.native.is_cuda and torch.are_deterministic_algorithms_enabled()
        if exact or (self.native.device.type == "cpu" and native.shape[-1] <= NARROW and not self.same):
            _, self.columns_WJ = _interpolation(native.shape[-1], size[1], 0, size[1], align_corners, self.native)

    def block(self, start: int, stop: int) -> tuple[slice, Tensor]:
        """The native rows under label rows start..stop, and the matrix [R, K] that interpolates between them."""
        if self.same:
            return slice(start, stop), self.native.new_empty(0)
        height = self.native.shape[-2]
        return _interpolation(height, self.height, start, stop, self.align_corners, self.native)

    def upsample(
        self, rows: slice, matrix_RK: Tensor, images: slice = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """Label rows [B, C, R, W], of all images or of some; in the memory of `out` unless the sizes agree."""
        native = self.native[images, :, rows]
        if self.same:
            return native
        if self.columns_WJ is not None:
            wide_BCKW = F.linear(native.contiguous(), self.columns_WJ)
        else:
            size = (native.shape[-2], self.width)
            wide_BCKW = F.interpolate(native, size=size, mode="bilinear", align_corners=self.align_corners)
        return torch.matmul(matrix_RK, wide_BCKW, out=out)

    def transpose(self, gradient_BCRW: Tensor, matrix_RK: Tensor) -> Tensor:
        """What a gradient with respect to label rows is with respect to their native rows: [B, C, K, w]."""
        if self.same:
            return gradient_BCRW
        wide_BCKW = matrix_RK.mT @ gradient_BCRW
        if self.columns_WJ is not None:
            return wide_BCKW @ self.columns_WJ
        size = list(wide_BCKW.shape[-2:])
        native = [*wide_BCKW.shape[:-1], self.native.shape[-1]]
        return torch.ops.aten.upsample_bilinear2d_backward(wide_BCKW, size, native, self.align_corners)


def _interpolation(
    native: int, full: int, start: int, stop: int, align_corners: bool, like: Tensor
) -> tuple[slice, Tensor]:
    """Along one axis the native places under the full-size places start..stop, and what interpolates between them.

    A native place has the weight of the hat function `max(0, 1 - |source - place|)`. The matrix [places, native
    places] is made on its device, for a copy from the host would have to be waited for.
    """
    scale = (native - 1) / max(full - 1, 1) if align_corners else native / full
    offset = 0.0 if align_corners else 0.5

    def source(place: int) -> float:
        return min(max((place + offset) * scale - offset, 0.0), native - 1)

    first, last = int(source(start)), min(int(source(stop - 1)) + 1, native - 1)
    places = torch.arange(start, stop, dtype=torch.float64, device=like.device)
    sources = ((places + offset) * scale - offset).clamp(0, native - 1)
    under = torch.arange(first, last + 1, dtype=torch.float64, device=like.device)
    matrix = (1 - (sources[:, None] - under).abs()).clamp(min=0)
    return slice(first, last + 1), matrix.to(like.dtype)


def keep_gradient(ctx: Any, gradient: Tensor, logits: Tensor) -> None:
    """Keeps the gradient for the backward pass, in its own precision: fp16's scale has yet to be applied to it."""
    ctx.save_for_backward(gradient)
    columns = logits.is_contiguous(memory_format=torch.channels_last) and not logits.is_contiguous()
    ctx.form = {
        "dtype": logits.dtype,
        "memory_format": torch.channels_last if columns else torch.contiguous_format,
    }


def scale_gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    """The kept gradient times that of the loss, in the form of the logits."""
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss.to(gradient.dtype)).to(**ctx.form)


class ImageTerm(Term):
    """A mean over images of what `compare` makes of each image's logits and labels."""

    def __init__(self, config: TermConfig, context: Context) -> None:
        super().__init__()

    def compare(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """The mean over the images at hand, from both models' logits [B, C, h, w] and labels [B, H, W]."""
        raise TypeError(f"{type(self).__name__} does not answer compare")

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        value = self.compare(student.logits, None if teacher is None else teacher.logits, labels)
        return value * (len(labels) / denominator).to(value)


def label_weight(labels: Tensor, class_weights: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """Labelled pixels of [B, H, W], or the sum of their class weights: float64, the terms' denominator."""
    labelled = labels != ignore_index
    if class_weights is None:
        return labelled.sum().double()
    weights = class_weights.double().to(labels.device)[torch.where(labelled, labels, 0)]
    return (weights * labelled).sum()


def safe(denominator: Tensor | float, like: Tensor) -> Tensor:
    """The denominator in the type of `like`; 1 where it is 0, so that nothing over nothing is 0 and not NaN."""
    total = torch.as_tensor(denominator).to(like)
    return torch.where(total == 0, torch.ones_like(total), total)


def blocked_mean(
    pixels: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    mask: Tensor | None,
    *maps: Tensor,
) -> Tensor:
    """Mean over the pixels of `mask` of `pixels(student, teacher, *maps) -> [B, R, W]`, by blocks at its size.

    Args:
        mask: boolean [B, H, W], to whose size the logits are upsampled; without it all pixels at the student's
            native size count.
        maps: [B, ..., H, W], handed to `pixels`.

    Returns:
        A scalar, at least float32; 0, with a zero gradient, where no pixel counts.
    """
    if mask is None:
        mask = everywhere(student_logits)

    def block(ours: Tensor, theirs: Tensor | None, counted: Tensor, *maps: Tensor) -> Tensor:
        return torch.where(counted, pixels(ours, theirs, *maps), 0.0).sum()

    total = blocked_sum(block, student_logits, teacher_logits, [mask, *maps])
    return total / safe(mask.sum(), total)


def counted_pixels(labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which pixels count, and the labels with 0 in place of void."""
    labelled = labels != IGNORE_INDEX
    return labelled if mask is None else labelled & mask, torch.where(labelled, labels, 0)


def everywhere(maps: Tensor) -> Tensor:
    """The mask [B, h, w] of all positions of [B, C, h, w]."""
    return torch.ones_like(maps[:, 0], dtype=torch.bool)


@dataclass
class PixelTermConfig(TermConfig):
    """A term that is a mean over labelled pixels."""

    class_weights: ClassWeighting = "uniform"
    """Weights of the pixels by their label's class: uniform, inverse, median, enet, effective."""


class PixelTerm(Term):
    """A mean over labelled pixels, at label size, of what `pixels` gives each; by class weights if asked."""

    class_weights: Tensor | None

    def __init__(self, config: PixelTermConfig, context: Context) -> None:
        super().__init__()
        self.register_buffer("class_weights", context.class_weights(config.class_weights), persistent=False)

    def count(self, labels: Tensor) -> Tensor:
        return label_weight(labels, self.class_weights)

    def pixels(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """[B, R, W] from a block of both models' logits [B, C, R, W] and its labels, void ones replaced by 0."""
        raise TypeError(f"{type(self).__name__} does not answer pixels")

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        def block(ours: Tensor, theirs: Tensor | None, labels: Tensor) -> Tensor:
            labelled, target = counted_pixels(labels)
            values = torch.where(labelled, self.pixels(ours, theirs, target), 0.0)
            if self.class_weights is not None:
                values = values * self.class_weights.to(values)[target]
            return values.sum()

        taught = teacher.logits if self.taught and teacher is not None else None
        total = blocked_sum(block, student.logits, taught, [labels])
        return total / safe(denominator, total)
