"""Pictures of predictions: coloured classes, errors, overlays, and a titled grid of them.

All pictures are uint8 NumPy arrays [H, W, 3] in RGB.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

IGNORE_INDEX = 255
WRONG = (255, 96, 0)  # orange stands out from grey and black also to the colour-blind
CORRECT = (110, 110, 110)

Colours = Sequence[tuple[int, int, int]]


def _numpy(array: np.ndarray | Tensor) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def colourise(label: np.ndarray | Tensor, colours: Colours) -> np.ndarray:
    """Classes [H, W] -> their colours; everything that is no class (255 above all) is black."""
    palette = np.zeros((256, 1, 3), np.uint8)
    palette[: len(colours), 0] = colours
    classes = _numpy(label).astype(np.uint8)
    return cv2.LUT(cv2.merge([classes] * 3), palette)


def error_map(
    prediction: np.ndarray | Tensor, label: np.ndarray | Tensor, image: np.ndarray | None = None
) -> np.ndarray:
    """Predicted and true classes [H, W] -> right pixels grey (the dimmed image, if given), wrong ones orange,
    ignored ones black."""
    guess, truth = _numpy(prediction), _numpy(label)
    if guess.shape != truth.shape:
        raise ValueError(f"a prediction of {guess.shape} for a label of {truth.shape}")
    if image is None:
        picture = np.full((*truth.shape, 3), CORRECT, np.uint8)
    else:
        grey = 40 + 0.4 * image.astype(np.float32).mean(-1, keepdims=True)
        picture = np.repeat(grey, 3, axis=-1).astype(np.uint8)
    picture[guess != truth] = WRONG
    picture[truth == IGNORE_INDEX] = 0
    return picture


def overlay(image: np.ndarray, label: np.ndarray | Tensor, colours: Colours, opacity: float = 0.5) -> np.ndarray:
    """The image with the classes' colours over it; pixels without a class stay as they are."""
    classes = _numpy(label)
    mixed = cv2.addWeighted(np.ascontiguousarray(image), 1 - opacity, colourise(classes, colours), opacity, 0)
    without = (classes < 0) | (classes >= len(colours))
    mixed[without] = image[without]
    return mixed


def legend(names: Sequence[str], colours: Colours, width: int) -> np.ndarray:
    """A white strip `width` columns wide: a field of each class's colour and its name, in lines of equal columns.

    Its height is even. Names are written in ten pixels at least; what is wider than the strip is cut off.
    """
    font = _font_that_fits(names, max(60, width // 6))
    line, text = round(1.6 * font.size), max((font.getlength(name) for name in names), default=0)
    item = round(text + 2.4 * font.size)
    columns = max(1, min(len(names), width // item))
    lines = -(-len(names) // columns)
    sheet = Image.new("RGB", (width, lines * line + lines * line % 2), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        left, top = number % columns * width // columns + font.size // 2, number // columns * line
        field = (left, top + line // 5, left + font.size, top + line - line // 5)
        draw.rectangle(field, fill=tuple(colour), outline=(90, 90, 90))
        draw.text((left + 1.4 * font.size, top + line // 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def heat_map(values: np.ndarray | Tensor, highest: float) -> np.ndarray:
    """Values [H, W] from 0 to `highest` as colours from dark blue over green to yellow (viridis); NaN is white.

    What lies outside takes the colour of the nearer end.
    """
    numbers = _numpy(values).astype(np.float64)
    levels = np.rint(255 * np.nan_to_num(numbers / highest, nan=0.0).clip(0, 1)).astype(np.uint8)
    picture = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()
    picture[np.isnan(numbers)] = 255
    return picture


def colour_scale(width: int, highest: float, unit: str = "", height: int = 32) -> np.ndarray:
    """The colours of `heat_map` from 0 at the left to `highest` at the right, with the numbers in them."""
    sheet = Image.fromarray(heat_map(np.tile(np.linspace(0, highest, width), (height, 1)), highest))
    draw, font = ImageDraw.Draw(sheet), _font_that_fits([], 14 * height // 2)
    last = f"{highest:.3g} {unit}".rstrip()
    draw.text((6, height // 2), "0", fill="white", font=font, anchor="lm")
    draw.text((width - 6, height // 2), last, fill="black", font=font, anchor="rm")
    return np.asarray(sheet)


def denormalise(images: np.ndarray | Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images [..., 3, H, W] -> uint8 [..., H, W, 3]; `mean` and `std` of colours in 0..1."""
    values = np.moveaxis(_numpy(images).astype(np.float32), -3, -1)
    colours = values * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return np.rint(255 * colours.clip(0, 1)).astype(np.uint8)


def grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str],
    *,
    row_titles: Sequence[str] | None = None,
    cell_width: int = 256,
    gap: int = 6,
) -> np.ndarray:
    """One picture of rows of pictures under column titles, on white.

    Pictures are brought to `cell_width` columns where they are narrower, by a whole factor and without
    smoothing, and to the size of the first of their row; None leaves a cell empty. `row_titles` stand above
    their rows at the left.
    """
    if not rows or any(len(row) != len(column_titles) for row in rows):
        raise ValueError(f"every row needs {len(column_titles)} pictures, and there must be a row")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"{len(row_titles)} row titles for {len(rows)} rows")
    cells = [_same_size(row, cell_width) for row in rows]
    width = max(row[0].shape[1] for row in cells)
    font = _font_that_fits(column_titles, width)
    line = int(1.5 * font.size)
    above = line if row_titles is not None else 0
    height = line + sum(row[0].shape[0] + gap + above for row in cells)
    sheet = Image.new("RGB", (gap + (width + gap) * len(column_titles), height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        middle = gap + column * (width + gap) + width // 2
        draw.text((middle, gap + line // 2), title, fill="black", font=font, anchor="mm")
    top = line + gap
    for number, row in enumerate(cells):
        if row_titles is not None:
            draw.text((gap, top + above // 2), row_titles[number], fill="black", font=font, anchor="lm")
            top += above
        for column, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (gap + column * (width + gap), top))
        top += row[0].shape[0] + gap
    return np.asarray(sheet)


def _same_size(row: Sequence[np.ndarray | None], least_width: int) -> list[np.ndarray]:
    """All pictures of a row at the size of its first one, enlarged by a whole factor to `least_width`."""
    first = next((cell for cell in row if cell is not None), None)
    if first is None:
        raise ValueError("a row without any picture")
    factor = max(1, -(-least_width // first.shape[1]))
    size = (first.shape[1] * factor, first.shape[0] * factor)
    blank = np.full((size[1], size[0], 3), 255, np.uint8)
    nearest = Image.Resampling.NEAREST
    return [blank if c is None else np.asarray(Image.fromarray(c).resize(size, nearest)) for c in row]


def _font_that_fits(texts: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, as large as the widest text allows, between 10 and 32 pixels."""
    size = min(32, max(14, width // 14))
    while True:
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("this Pillow was built without FreeType; install the wheel from PyPI")
        if size <= 10 or max((font.getlength(text) for text in texts), default=0) <= width:
            return font
        size -= 1


def save_png(path: str | os.PathLike[str], array: np.ndarray | Tensor) -> None:
    """Write a picture [H, W, 3] or [H, W] of uint8 as PNG, whole or not at all; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(_numpy(array)).save(temporary, format="PNG")
    os.replace(temporary, path)
