"""Labels straight from logits at native stride, without a float map of full size for each class.

Upsampling C logits to label size and taking the argmax makes C floats a pixel to keep one number of them. Three
observations make it cheap:

1. A bilinear value is a convex combination of four logits. A class that leads at all four leads between them, so
   only pixels whose four neighbours disagree need arithmetic: a tenth of a usual image.
2. They can be computed by operations in any order, if what is too close to call is told apart: where two classes
   come nearer to each other than rounding reaches, their values are made anew by PyTorch's own interpolation.
3. On a CPU PyTorch's argmax over classes takes ten times as long as their maximum and a search for the first class
   that equals it.

Why the labels are identical. Let u = 2^-24, and M the largest magnitude of an image's logits. A bilinear value is
made by at most five roundings on the way of each of its four terms, in whatever order, so it is off by at most
5uM (1 + 4u). Where two classes differ by more than 20uM in one order of operations, they differ in the same
direction in every other, and a class that leads by more than 10uM at all four neighbours leads between them. What
is called near here is a difference of up to 32uM: the rest is for the subtractions that find it and for weights
whose sum is not quite 1.
"""

import math
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

OPEN = 255  # the label of a pixel that has none yet
NEAR = 32 * 2.0**-24
SMALL = 128  # height + width up to which PyTorch has another kernel, which rounds otherwise
FACTORS = (2, 4, 8, 16, 32)  # of which all weights are whole numbers over a power of two, without rounding
BLOCK_ELEMENTS = 2**19  # values computed at once, 2 MiB
MOST_TIES = 256  # pixels whose logits are upsampled anew
TIES_AT_ONCE = 16


@overload
def native_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor: ...
@overload
def native_argmax(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray: ...
@torch.no_grad()
def native_argmax(logits: Tensor | np.ndarray, size: tuple[int, int]) -> Tensor | np.ndarray:
    """The most likely class of each pixel, exactly as upsampling all logits and taking the argmax gives it.

    Equal to `F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1)` pixel for pixel:
    ties go to the lower class, and NaN wins.

    It is fast, and needs hardly any memory, where `size` is 2, 4, 8, 16 or 32 times that of the logits in both
    directions. At other sizes, and where very many pixels are ties, each class is upsampled by itself: three maps
    of full size in place of C. All are upsampled at once where logits are not finite, a single row or column, or
    in channels_last at such a size.

    Args:
        logits: [B, C, h, w] or [C, h, w] at any stride, of any float type, C up to 255.
        size: (H, W) of the labels.

    Returns:
        uint8 [B, H, W] or [H, W], a tensor or an array as the logits are.
    """
    if isinstance(logits, np.ndarray):
        return native_argmax(torch.from_numpy(logits), size).numpy()
    if logits.ndim == 3:
        return native_argmax(logits[None], size)[0]
    if logits.ndim != 4 or not 1 <= logits.shape[1] <= OPEN:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, not [B, C, h, w] with 1 to {OPEN} classes")
    labels = torch.empty(len(logits), *size, dtype=torch.uint8, device=logits.device)
    for image, target in zip(logits, labels, strict=True):
        target.copy_(_label_image(image.float(), size))
    return labels


def _label_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, h, w] -> uint8 [H, W]."""
    lowest, highest = image.aminmax()
    largest = max(-float(lowest), float(highest))
    labels = None
    if math.isfinite(largest) and sum(size) > SMALL:
        if all(length / known in FACTORS for length, known in zip(size, image.shape[1:], strict=True)):
            labels = _label_by_cells(image, size, NEAR * largest + torch.finfo(torch.float32).tiny)
        if labels is None and _memory_format(image) == torch.contiguous_format and min(image.shape[1:]) > 1:
            labels = _label_by_class(image, size)
    return _upsample(image, size).max(0).indices.to(torch.uint8) if labels is None else labels


def _memory_format(image: Tensor) -> torch.memory_format:
    """Which of PyTorch's two kernels takes it: they differ in the last bit."""
    channels_last = image[None].is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, h, w] -> [N, H, W]: what everything here has to agree with."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _label_by_class(image: Tensor, size: tuple[int, int]) -> Tensor:
    """By a running maximum over the classes, each upsampled by itself: three maps of full size in place of C."""
    best = _upsample(image[:1], size)[0]
    labels = torch.zeros(size, dtype=torch.uint8, device=image.device)
    for number in range(1, len(image)):
        values = _upsample(image[number : number + 1], size)[0]
        torch.maximum(labels, (values > best).view(torch.uint8).mul_(number), out=labels)
        torch.maximum(best, values, out=best)
    return labels


# ----------------------------------------------------------------------------------------------- by cells


def _label_by_cells(image: Tensor, size: tuple[int, int], near: float) -> Tensor | None:
    """Cell by cell between four logits, where each has the same even number of pixels; None for too many ties.

    Cells at the border lie half outside of the map, between its logits and the same again.
    """
    classes, height, width = image.shape
    down, along = size[0] // height, size[1] // width
    padded = F.pad(image.contiguous()[None], (1, 1, 1, 1), mode="replicate")[0]
    winners = _find_winners(padded.clone(), near)
    first = winners[:-1, :-1]
    agreed = (first == winners[:-1, 1:]) & (first == winners[1:, :-1]) & (first == winners[1:, 1:])
    cells = torch.where(agreed, first, OPEN)
    labels = cells[:, None, :, None].expand(-1, down, -1, along).flatten()

    row, column = (cells == OPEN).nonzero().T
    length = (width + 1) * along
    pixels = torch.arange(down, device=image.device)[:, None] * length + torch.arange(along, device=image.device)
    corners = torch.tensor([[0], [1], [width + 2], [width + 3]], device=image.device)
    weights = torch.stack(
        [a * b for a in _shares(down, image)[..., None] for b in _shares(along, image)[:, None]], -1
    )
    weights = weights.flatten(0, 1).expand(classes, -1, -1)  # [C, pixels of a cell, 4]
    many = max(1, BLOCK_ELEMENTS // (classes * pixels.numel()))
    ties = [corners.new_zeros(0)]
    for corner, pixel in zip(
        (row * (width + 2) + column).split(many), (row * down * length + column * along).split(many), strict=True
    ):
        logits = padded.flatten(1).index_select(1, (corners + corner).flatten()).view(classes, 4, -1)
        found = _find_winners(torch.bmm(weights, logits).flatten(1), near)
        places = (pixels.view(-1, 1) + pixel).flatten()
        labels.index_copy_(0, places, found)
        ties.append(places[found == OPEN])
        if sum(map(len, ties)) > MOST_TIES:
            return None
    labels = labels.view(-1, length)[down // 2 :, along // 2 :][: size[0], : size[1]].contiguous()
    places = torch.cat(ties)
    at = torch.stack([places // length - down // 2, places % length - along // 2])
    inside = ((at >= 0) & (at < at.new_tensor(size)[:, None])).all(0)
    for y, x in at[:, inside].split(TIES_AT_ONCE, 1):
        labels[y, x] = _label_exactly(image, y, x, down, along)
    return labels


def _shares(count: int, like: Tensor) -> Tensor:
    """[2, count]: weights of the two logits between which so many pixels lie."""
    second = (torch.arange(count, device=like.device) + 0.5) / count
    return torch.stack([1 - second, second])


def _find_winners(values: Tensor, near: float) -> Tensor:
    """The leading class of [C, ...], uint8 [...], OPEN where another is near. Overwrites `values`."""
    rivals = torch.ge(values, values.amax(0) - near, out=values)  # into bool it takes four times as long
    one = torch.ones(len(values), device=values.device)
    count, number = torch.stack([one, one.cumsum(0) - 1]) @ rivals.flatten(1)
    return torch.where(count == 1, number, OPEN).to(torch.uint8).view(values.shape[1:])


def _label_exactly(image: Tensor, y: Tensor, x: Tensor, down: int, along: int) -> Tensor:
    """uint8 [N]: labels of pixels (y, x) by PyTorch's own interpolation, each in a small map of its neighbours.

    The first rows and columns of such a map have the weights of the pixels that they stand for, since weights
    repeat without rounding. On the right it repeats the last logit until it is no longer small for PyTorch.
    """
    _, height, width = image.shape
    first = [((at + 0.5) / factor - 0.5).floor().clamp(min=0).long() for at, factor in ((y, down), (x, along))]
    lines = (first[0][:, None] + torch.arange(2, device=y.device)).clamp(max=height - 1)
    columns = (first[1][:, None] + torch.arange(2, device=y.device)).clamp(max=width - 1)
    columns = torch.cat([columns, columns[:, 1:].expand(-1, SMALL // along)], 1)
    maps = image[:, lines[:, :, None], columns[:, None]].transpose(0, 1)
    maps = maps.contiguous(memory_format=_memory_format(image))
    values = F.interpolate(maps, (2 * down, columns.shape[1] * along), mode="bilinear", align_corners=False)
    number = torch.arange(len(y), device=y.device)
    return values[number, :, y - first[0] * down, x - first[1] * along].argmax(1).to(torch.uint8)
