"""Augmentation in OpenCV and NumPy, drawn from a generator of its own and recorded as a geometry.

A geometry is seven integers, `(source height, source width, scaled height, scaled width, top, left, flip)`: the
image was resized to the scaled size, padded at the right and below where that is smaller than the crop, cropped
at (top, left), and mirrored if flip is 1. Whoever has the source and the geometry gets the same crop.

Only the crop is computed, never the whole scaled image: the image through one bilinear `warpAffine` whose
coordinates are those of `cv2.resize` (pixel centres, no antialiasing; the values agree to a few grey levels, for
older OpenCV rounds coordinates to 1/32), the label exactly by nearest neighbour. Colour jitter, normalisation
and the conversion to float are one table look-up per channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data.labels import IGNORE_INDEX

Size = tuple[int, int]  # height, width


class Geometry(NamedTuple):
    """How a crop was made of its source; see the module's text."""

    source_height: int
    source_width: int
    scaled_height: int
    scaled_width: int
    top: int
    left: int
    flip: int


class Appearance(NamedTuple):
    """The random part of the colours; the defaults change nothing."""

    contrast: float = 1.0  # about the grey value 128
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)  # brightness times a cast per channel, R G B
    saturation: float = 1.0  # 0 is grey
    sigma: float = 0.0  # of the Gaussian blur, in pixels of the crop; 0 is none


def draw(
    rng: np.random.Generator,
    source: Size,
    crop: Size,
    *,
    scale: Sequence[float],
    flip: float,
    jitter: float,
    blur: float,
) -> tuple[Geometry, Appearance]:
    """Draw one augmentation: a scale uniform in `scale`, a crop uniform over its places, a flip with probability
    `flip`, a blur with probability `blur`, and colours within `1 ± jitter`.

    The generator gives the same 12 numbers whatever the settings, so that switching one part off leaves the
    others as they were.
    """
    u = rng.random(12)
    factor = scale[0] + (scale[1] - scale[0]) * u[0]
    height, width = max(1, round(source[0] * factor)), max(1, round(source[1] * factor))
    top = int(u[1] * (max(height - crop[0], 0) + 1))
    left = int(u[2] * (max(width - crop[1], 0) + 1))
    geometry = Geometry(*source, height, width, top, left, int(u[3] < flip))
    colour = 1 + jitter * (2 * u[4:10] - 1)  # contrast, brightness, saturation, and a cast of a fifth of it
    cast = 1 + (colour[3:] - 1) / 5
    appearance = Appearance(
        contrast=float(colour[0]),
        gains=(float(colour[1] * cast[0]), float(colour[1] * cast[1]), float(colour[1] * cast[2])),
        saturation=float(colour[2]),
        sigma=float(0.3 + 0.9 * u[11]) if u[10] < blur else 0.0,
    )
    return geometry, appearance


def central(source: Size, crop: Size) -> Geometry:
    """The geometry without augmentation: unscaled, unflipped, the crop in the middle."""
    top, left = max(source[0] - crop[0], 0) // 2, max(source[1] - crop[1], 0) // 2
    return Geometry(*source, *source, top, left, 0)


def inside(geometry: Geometry, crop: Size) -> Size:
    """Height and width of the part of the crop that is image, not padding."""
    return (
        min(crop[0], geometry.scaled_height - geometry.top),
        min(crop[1], geometry.scaled_width - geometry.left),
    )


def place(part: Size, crop: Size, flip: int) -> tuple[slice, slice]:
    """Rows and columns of a crop where a part of that size lies, padded at the right and below, then mirrored."""
    left = crop[1] - part[1] if flip else 0
    return slice(0, part[0]), slice(left, left + part[1])


def crop_image(image: np.ndarray, geometry: Geometry, crop: Size) -> np.ndarray:
    """uint8 [h, w, 3], the part of the crop that is image: at most the crop's size, not padded, mirrored if
    the geometry says so (the padding is then at the left)."""
    height, width = inside(geometry, crop)
    top, left = geometry.top, geometry.left
    if (geometry.scaled_height, geometry.scaled_width) == image.shape[:2]:
        part = image[top : top + height, left : left + width]
    else:
        y, x = image.shape[0] / geometry.scaled_height, image.shape[1] / geometry.scaled_width
        # output pixel (i, j) has its centre at ((top+i+½)·y − ½, (left+j+½)·x − ½) of the source
        matrix = np.array([[x, 0, (left + 0.5) * x - 0.5], [0, y, (top + 0.5) * y - 0.5]])
        part = cv2.warpAffine(
            _with_alpha(image, matrix, height, width),
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        part = cv2.cvtColor(part, cv2.COLOR_RGBA2RGB)
    return cv2.flip(part, 1) if geometry.flip else part


def _with_alpha(image: np.ndarray, matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 4], undefined but where a crop of so many pixels needs it, and one pixel around.

    OpenCV warps four channels in a third of the time that it takes for three. They stay in their places, for with
    other coordinates the rounding would be another.
    """
    steps, starts = np.diag(matrix)[::-1], matrix[::-1, 2]
    first = np.maximum(np.floor(starts).astype(int) - 1, 0)
    beyond = np.ceil(starts + steps * (height - 1, width - 1)).astype(int) + 2
    needed = np.s_[first[0] : beyond[0], first[1] : beyond[1]]
    wide = np.empty((*image.shape[:2], 4), np.uint8)
    cv2.cvtColor(image[needed], cv2.COLOR_RGB2RGBA, dst=wide[needed])
    return wide


def seek(
    rng: np.random.Generator,
    label: np.ndarray,
    geometry: Geometry,
    crop: Size,
    *,
    classes: Sequence[int],
    least: float,
    tries: int = 10,
) -> Geometry:
    """The first of up to `tries` places of a crop of which a share `least` is of some classes, or the one that has
    most of them; the first is that of `geometry`, and scale and flip stay.

    After DAFormer (Hoyer et al. 2022), which asks for 1500 pixels of the class in a crop of 512x512, 0.6 %. Each
    fourth row and column is looked at.
    """
    table = np.zeros(256, np.uint8)
    table[list(classes)] = 1
    best, most = geometry, -1.0
    for attempt in range(tries):
        if attempt:
            u = rng.random(2)
            top = int(u[0] * (max(geometry.scaled_height - crop[0], 0) + 1))
            left = int(u[1] * (max(geometry.scaled_width - crop[1], 0) + 1))
            geometry = geometry._replace(top=top, left=left)
        height, width = inside(geometry, crop)
        rows = _nearest(geometry.top, height, label.shape[0], geometry.scaled_height)[::4]
        columns = _nearest(geometry.left, width, label.shape[1], geometry.scaled_width)[::4]
        share = 16 * int(table[label[rows].take(columns, axis=1)].sum()) / (crop[0] * crop[1])
        if share > most:
            best, most = geometry, share
        if most >= least:
            break
    return best


def paste(
    part: np.ndarray,
    label: np.ndarray,
    flip: int,
    other_part: np.ndarray,
    other_label: np.ndarray,
    other_flip: int,
    *,
    wanted: int,
    together: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """A crop with another's objects on it, at the same place: image part uint8 [h, w, 3] and label uint8 [H, W].

    An object is a connected region of 16 pixels or more of the classes `together` in which class `wanted` is: so a
    rider comes with the bicycle. Nothing is pasted onto padding. After Ghiasi et al. 2021 (Simple copy-paste), of
    whole instances; here a region serves, since labels of classes know no instances, and edges are not blended.
    """
    crop = (label.shape[0], label.shape[1])
    table = np.zeros(256, np.uint8)
    table[[wanted, *together]] = 1
    _, regions = cv2.connectedComponents(cv2.LUT(other_label, table), connectivity=8)
    chosen = np.bincount(regions.ravel()) >= 16
    with_wanted = np.zeros(len(chosen), bool)
    with_wanted[np.unique(regions[other_label == wanted])] = True
    shown = place((part.shape[0], part.shape[1]), crop, flip)
    objects = (chosen & with_wanted)[regions[shown]]
    source = pad_image(other_part, crop, other_flip)[shown]
    pasted = label.copy()
    pasted[shown] = np.where(objects, other_label[shown], label[shown])
    return np.where(objects[..., None], source, part), pasted


def crop_label(label: np.ndarray, geometry: Geometry, crop: Size) -> np.ndarray:
    """uint8 [crop height, crop width] by nearest neighbour, the padding IGNORE_INDEX."""
    height, width = inside(geometry, crop)
    rows = _nearest(geometry.top, height, label.shape[0], geometry.scaled_height)
    columns = _nearest(geometry.left, width, label.shape[1], geometry.scaled_width)
    part = label[rows].take(columns, axis=1)
    if (height, width) != crop:
        part = np.pad(part, ((0, crop[0] - height), (0, crop[1] - width)), constant_values=IGNORE_INDEX)
    return np.ascontiguousarray(part[:, ::-1]) if geometry.flip else part


def _nearest(start: int, count: int, source: int, scaled: int) -> np.ndarray:
    """The source rows under the centres of the scaled rows start..start+count-1, in exact integer arithmetic."""
    return (2 * np.arange(start, start + count) + 1) * source // (2 * scaled)


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [*size, 3]: by area where it shrinks (antialiased), else bilinear."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [*size] by nearest neighbour."""
    if label.shape == size:
        return label
    return crop_label(label, Geometry(label.shape[0], label.shape[1], *size, 0, 0, 0), size)


def colour_table(mean: Sequence[float], std: Sequence[float], appearance: Appearance) -> np.ndarray:
    """float32 [3, 256]: the normalised value of each grey value, `(v/255 − mean) / std` after the jitter."""
    values = np.arange(256, dtype=np.float64)
    jittered = (values - 128) * appearance.contrast + 128
    gains = np.array(appearance.gains)[:, None]
    jittered = np.clip(jittered[None] * gains, 0, 255)
    table = (jittered / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    return table.astype(np.float32)


def pad_image(part: np.ndarray, crop: Size, flip: int) -> np.ndarray:
    """uint8 [*crop, 3] of a part [h, w, 3]: 0 at the side away from the image."""
    size = (part.shape[0], part.shape[1])
    if size == crop:
        return np.ascontiguousarray(part)
    padded = np.zeros((*crop, 3), np.uint8)
    padded[place(size, crop, flip)] = part
    return padded


def finish_image(
    part: np.ndarray,
    crop: Size,
    flip: int,
    table: np.ndarray,
    appearance: Appearance,
    image: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [crop height, crop width, 3], in `image` if it is given: saturation, blur and colour table on uint8
    [h, w, 3] RGB, then the padding with 0, which is the mean, at the side away from the image."""
    if appearance.saturation != 1:
        grey = cv2.cvtColor(cv2.cvtColor(part, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        part = cv2.addWeighted(part, appearance.saturation, grey, 1 - appearance.saturation, 0)
    if appearance.sigma > 0:
        part = cv2.GaussianBlur(part, (5, 5), appearance.sigma)
    size = (part.shape[0], part.shape[1])
    if image is None:
        image = np.empty((*crop, 3), np.float32)
    if size != crop:
        image[:] = 0
    cv2.LUT(part, np.ascontiguousarray(table.T)[None], dst=image[place(size, crop, flip)])
    return image
