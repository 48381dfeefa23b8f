"""`upsampled_loss` as one Triton kernel.

On a GPU nothing but the native logits, the labels and the gradient is read or written: no block of upsampled
logits ever reaches the memory.

A program takes the label rows between two native rows, and a tile of their columns. Along a row the weight of
native column j at label column x is the hat function max(0, 1 - |source(x) - j|), so the gradient goes back to the
native columns by one small matrix product. Neighbouring programs share native pixels and add to them atomically:
the order, and with it the last bit, is not fixed.

Dimension letters: X label columns of the tile, J native columns under it, C classes (padded to a power of two).
"""

# mypy: disallow-incomplete-defs=False
# (in a kernel only compile-time constants are annotated)

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _source(position, scale, last, ALIGN: tl.constexpr):
    """Where a label row or column lies among the native ones, `last` being the last of them."""
    if ALIGN:
        return tl.minimum(position * scale, last)
    return tl.minimum(tl.maximum((position + 0.5) * scale - 0.5, 0.0), last)


@triton.jit
def _wide(logits, row, left_X, right_X, share_X, c_C, classes, plane, width, inside_X):
    """One native row, interpolated to the tile's columns: [X, C]."""
    at = logits + c_C[None, :].to(tl.int64) * plane + row * width
    inside = inside_X[:, None] & (c_C < classes)[None, :]
    left = tl.load(at + left_X[:, None], mask=inside, other=0.0)
    right = tl.load(at + right_X[:, None], mask=inside, other=0.0)
    return left + (right - left) * share_X[:, None]


@triton.jit
def _log_softmax(z_XC, real_C):
    z_XC = tl.where(real_C[None, :], z_XC, -float("inf"))
    z_XC = z_XC - tl.max(z_XC, axis=1)[:, None]
    return z_XC - tl.log(tl.sum(tl.exp(z_XC), axis=1))[:, None]


@triton.jit
def _kernel(
    student,
    teacher,
    labels,
    ce_weights,
    kl_weights,
    first_rows,
    gradient,
    sums,
    classes,
    height,
    width,
    teacher_height,
    teacher_width,
    label_height,
    label_width,
    scale_y,
    scale_x,
    teacher_scale_y,
    teacher_scale_x,
    ce_weight,
    kl_weight,
    temperature,
    smoothing,
    ignore_index,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    CE: tl.constexpr,
    KL: tl.constexpr,
    X: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
):
    image, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    plane, teacher_plane = height * width, teacher_height * teacher_width
    student += image.to(tl.int64) * classes * plane
    gradient += image.to(tl.int64) * classes * plane
    teacher += image.to(tl.int64) * classes * teacher_plane
    labels += image.to(tl.int64) * label_height * label_width

    c_C = tl.arange(0, C)
    real_C = c_C < classes
    x_X = tile * X + tl.arange(0, X)
    inside_X = x_X < label_width
    source_X = _source(tl.minimum(x_X, label_width - 1).to(tl.float32), scale_x, width - 1.0, ALIGN)
    left_X = source_X.to(tl.int32)
    right_X = tl.minimum(left_X + 1, width - 1)
    share_X = source_X - left_X
    below = tl.minimum(row + 1, height - 1)
    upper_XC = _wide(student, row, left_X, right_X, share_X, c_C, classes, plane, width, inside_X)
    lower_XC = _wide(student, below, left_X, right_X, share_X, c_C, classes, plane, width, inside_X)
    to_upper_XC = tl.zeros([X, C], tl.float32)
    to_lower_XC = tl.zeros([X, C], tl.float32)
    ce_C = tl.load(ce_weights + c_C, mask=real_C, other=0.0)
    kl_C = tl.load(kl_weights + c_C, mask=real_C, other=0.0)
    ce, kl = 0.0, 0.0

    teacher_X = _source(
        tl.minimum(x_X, label_width - 1).to(tl.float32), teacher_scale_x, teacher_width - 1.0, ALIGN
    )
    t_left_X = teacher_X.to(tl.int32)
    t_right_X = tl.minimum(t_left_X + 1, teacher_width - 1)
    t_share_X = teacher_X - t_left_X

    first, stop = tl.load(first_rows + row), tl.load(first_rows + row + 1)
    for step in range(ROWS):
        y = first + step
        share = _source(y.to(tl.float32), scale_y, height - 1.0, ALIGN) - row
        z_XC = upper_XC + (lower_XC - upper_XC) * share
        counted_X = inside_X & (y < stop)
        label_X = tl.load(labels + y * label_width + x_X, mask=counted_X, other=ignore_index).to(tl.int32)
        labelled_X = label_X != ignore_index
        hit_XC = (c_C[None, :] == label_X[:, None]) & labelled_X[:, None]
        sent_XC = tl.zeros([X, C], tl.float32)
        if CE:
            log_p_XC = _log_softmax(z_XC, real_C)
            target_XC = tl.where(hit_XC, (1 - smoothing) * ce_C[None, :], 0.0)
            target_XC += tl.where(labelled_X[:, None], smoothing / classes * ce_C[None, :], 0.0)
            ce -= tl.sum(tl.where(target_XC != 0, target_XC * log_p_XC, 0.0))
            total_X = tl.sum(target_XC, axis=1)
            sent_XC += ce_weight * (tl.exp(log_p_XC) * total_X[:, None] - target_XC)
        if KL:
            at = _source(
                tl.minimum(y, label_height - 1).to(tl.float32), teacher_scale_y, teacher_height - 1.0, ALIGN
            )
            t_row = at.to(tl.int32)
            t_below = tl.minimum(t_row + 1, teacher_height - 1)
            t_upper_XC = _wide(
                teacher,
                t_row,
                t_left_X,
                t_right_X,
                t_share_X,
                c_C,
                classes,
                teacher_plane,
                teacher_width,
                inside_X,
            )
            t_lower_XC = _wide(
                teacher,
                t_below,
                t_left_X,
                t_right_X,
                t_share_X,
                c_C,
                classes,
                teacher_plane,
                teacher_width,
                inside_X,
            )
            t_XC = t_upper_XC + (t_lower_XC - t_upper_XC) * (at - t_row)
            log_q_XC = _log_softmax(t_XC / temperature, real_C)
            log_s_XC = _log_softmax(z_XC / temperature, real_C)
            q_XC = tl.exp(log_q_XC)
            pixel_X = tl.sum(tl.where(hit_XC, kl_C[None, :], 0.0), axis=1)
            divergence_X = tl.sum(tl.where(q_XC > 0, q_XC * (log_q_XC - log_s_XC), 0.0), axis=1)
            kl += tl.sum(pixel_X * divergence_X) * temperature * temperature
            sent_XC += (kl_weight * temperature) * pixel_X[:, None] * (tl.exp(log_s_XC) - q_XC)
        to_upper_XC += sent_XC * (1 - share)
        to_lower_XC += sent_XC * share

    programs = tl.num_programs(1) * tl.num_programs(2)
    place = image * programs + row * tl.num_programs(2) + tile
    tl.store(sums + 2 * place, ce)
    tl.store(sums + 2 * place + 1, kl)

    begin = tl.min(left_X, axis=0)
    j_J = begin + tl.arange(0, J)
    hat_JX = tl.maximum(1 - tl.abs(source_X[None, :] - j_J[:, None]), 0.0)
    hat_JX = tl.where(inside_X[None, :], hat_JX, 0.0)
    mask = (j_J < width)[:, None] & real_C[None, :]
    at = gradient + c_C[None, :].to(tl.int64) * plane + j_J[:, None]
    upper_JC = tl.dot(hat_JX, to_upper_XC, input_precision="ieee")
    lower_JC = tl.dot(hat_JX, to_lower_XC, input_precision="ieee")
    tl.atomic_add(at + row * width, upper_JC, mask=mask, sem="relaxed")
    tl.atomic_add(at + below * width, lower_JC, mask=mask, sem="relaxed")


def value_and_gradient(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    ce_weights: Tensor,
    kl_weights: Tensor,
    *,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, KL (float64 scalars) and the gradient of their weighted sum with respect to `student`.

    Args:
        student, teacher: float32 [B, C, h, w] and [B, C, h', w'].
        labels: int64 [B, H, W].
        ce_weights, kl_weights: float32 [C], what a pixel of each class weighs, its share of the denominator.
    """
    batch, classes, height, width = student.shape
    size = (labels.shape[-2], labels.shape[-1])
    student, labels = student.contiguous(), labels.contiguous()
    taught = student if teacher is None else teacher.contiguous()

    def scale(native: int, full: int) -> float:
        return _scale(native, full, align_corners)

    first_rows, most_rows = _rows_under(height, size[0], align_corners, student.device)
    padded = max(16, triton.next_power_of_2(classes))
    tile = max(16, min(64, 2048 // padded))  # what a program keeps in registers grows with both
    gradient = torch.zeros_like(student)
    tiles = triton.cdiv(size[1], tile)
    sums = torch.zeros(batch, height, tiles, 2, dtype=torch.float32, device=student.device)
    columns = int(tile * scale(width, size[1])) + 3
    _kernel[(batch, height, tiles)](
        student,
        taught,
        labels,
        ce_weights,
        kl_weights,
        first_rows,
        gradient,
        sums,
        classes,
        height,
        width,
        taught.shape[-2],
        taught.shape[-1],
        *size,
        scale(height, size[0]),
        scale(width, size[1]),
        scale(taught.shape[-2], size[0]),
        scale(taught.shape[-1], size[1]),
        ce_weight,
        kl_weight,
        temperature,
        label_smoothing,
        ignore_index,
        ROWS=most_rows,
        ALIGN=align_corners,
        CE=ce_weight != 0,
        KL=teacher is not None,
        X=tile,
        J=max(16, triton.next_power_of_2(columns)),
        C=padded,
        num_warps=8,
    )
    ce, kl = sums.double().sum((0, 1, 2))
    return ce, kl, gradient


def _scale(native: int, full: int, align_corners: bool) -> float:
    return (native - 1) / max(full - 1, 1) if align_corners else native / full


@functools.lru_cache(maxsize=64)
def _rows_under(native: int, full: int, align_corners: bool, device: torch.device) -> tuple[Tensor, int]:
    """Int32 [native + 1]: the label rows whose upper native row is i stand from the i-th number to the next.

    And the most that a native row has; kept, since to ask a GPU would be to wait for it.
    """
    y, scale = torch.arange(full, dtype=torch.float32), _scale(native, full, align_corners)
    source = y * scale if align_corners else ((y + 0.5) * scale - 0.5).clamp(min=0)
    first = torch.searchsorted(source.clamp(max=native - 1).long(), torch.arange(native + 1)).to(torch.int32)
    return first.to(device), int(first.diff().max())
