"""The drawing kit: repeatable dice, a canvas in metres, and sprites, the pictures that things wear.

A sprite's image is RGB and a fourth channel for what can be seen and shines: 0 is transparent, SOLID opaque, and
what exceeds it is light that the thing gives off (lit windows, lamps).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER,
 CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(19)  # fmt: skip
IGNORE = 255
NONE = 254  # on a canvas: nothing drawn yet
SOLID, EDGE = 128, 56  # a pixel belongs to a thing from EDGE on: a little early, for the sake of thin things

Colour = Sequence[float]
Point = Sequence[float] | np.ndarray


class Dice:
    """Uniform numbers fixed by a key; drawn in blocks, ten times cheaper than a generator call for each."""

    def __init__(self, *key: int) -> None:
        self.rng = np.random.default_rng(key)
        self._next = self._numbers().__next__

    def _numbers(self) -> Iterator[float]:
        while True:
            yield from self.rng.random(256).tolist()

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self._next()

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def below(self, count: int) -> int:
        return int(self._next() * count)

    def pick(self, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        if weights is None:
            return options[self.below(len(options))]
        rest = self(0, sum(weights))
        for option, weight in zip(options, weights, strict=True):
            rest -= weight
            if rest < 0:
                return option
        return options[-1]

    def grey(self, low: float, high: float, spread: float = 12) -> tuple[float, float, float]:
        """A dull colour, warmer or cooler than grey by at most `spread`."""
        value, warmth = self(low, high), self(-spread, spread)
        return value + warmth, value, value - warmth

    def paint(self, bright: float = 0.35) -> tuple[float, float, float]:
        """A colour as clothes and paint have it: dull, or bright with that probability."""
        vivid = self.chance(bright)
        value, strength = (self(90, 235), self(0.5, 0.9)) if vivid else (self(30, 225), self(0, 0.25))
        return value * (1 - strength * self()), value * (1 - strength * self()), value * (1 - strength * self())

    def clouds(self, shape: tuple[int, int], cells: tuple[float, float], octaves: int = 3) -> np.ndarray:
        """Smooth noise float32 [h, w] in about -1..1; cells are the waves across the height and width."""
        total = np.zeros(shape, np.float32)
        for octave in range(octaves):
            grid = [max(2, round(c * 2**octave)) for c in cells]
            field = self.rng.random(grid, dtype=np.float32) - 0.5
            total += cv2.resize(field, shape[::-1], interpolation=cv2.INTER_CUBIC) * (1.6 / 1.6**octave)
        return total


class Canvas:
    """A sprite in the making: coordinates in metres, x to the right, y upward from the ground."""

    def __init__(self, width: float, height: float, scale: float) -> None:
        self.width, self.height, self.scale = width, height, scale
        shape = max(2, round(height * scale)), max(2, round(width * scale))
        self.image = np.zeros((*shape, 4), np.uint8)
        self.label = np.full(shape, NONE, np.uint8)

    def poly(self, points: Iterable[Point], colour: Colour, label: int | None = None, glow: float = 0) -> None:
        """Fill a polygon; without a label the one beneath stays (a window is part of its building)."""
        corners = [((x * self.scale - 0.5) * 16, ((self.height - y) * self.scale - 0.5) * 16) for x, y in points]
        fixed = np.rint(corners).astype(np.int32)
        cv2.fillPoly(self.image, [fixed], (*colour, glow), shift=4)
        if label is not None:
            cv2.fillPoly(self.label, [fixed], label, shift=4)

    def rect(self, left: float, bottom: float, right: float, top: float, colour: Colour, label: int | None = None,
             glow: float = 0) -> None:  # fmt: skip
        self.poly([(left, bottom), (left, top), (right, top), (right, bottom)], colour, label, glow)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour, label: int | None = None,
             glow: float = 0, sides: int = 20) -> None:  # fmt: skip
        turns = (np.arange(sides) + 0.5) * (2 * np.pi / sides)
        self.poly(np.stack([x + rx * np.cos(turns), y + ry * np.sin(turns)], 1), colour, label, glow)

    def bar(self, a: Point, b: Point, width: float, colour: Colour, label: int | None = None) -> None:
        """A limb, tube or plank: a thick line from a to b."""
        start, end = np.asarray(a, float), np.asarray(b, float)
        along = end - start
        across = along[::-1] * (-1, 1) * (width / 2 / max(1e-6, float(np.hypot(*along))))
        self.poly([start + across, end + across, end - across, start - across], colour, label)

    def grain(self, dice: Dice, amount: float, cell: float) -> None:
        """Multiply by smooth noise whose waves are `cell` metres long."""
        noise = dice.clouds(self.label.shape, (self.height / cell, self.width / cell))
        shaded = self.image[..., :3] * (1 + amount * noise)[..., None]
        self.image[..., :3] = np.clip(shaded, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Sprite:
    """Width and height in metres, and images [h, w, 4] with their labels from full size down to a few pixels.

    The labels are one number where all is of one class, else [h, w], arbitrary where the image is transparent.
    Each level has a border of one transparent pixel.
    """

    width: float
    height: float
    levels: list[tuple[np.ndarray, np.ndarray | int]]


def mip_levels(canvas: Canvas) -> list[tuple[np.ndarray, np.ndarray | int]]:
    """Halve until small. Colours are averaged over what is solid; the commonest label wins."""
    solid = (canvas.label != NONE).astype(np.float32)
    mean = canvas.image[canvas.label != NONE].mean(0)
    image = canvas.image * solid[..., None]  # premultiplied; the fourth channel is the glow alone
    classes = [int(c) for c in np.unique(canvas.label) if c != NONE]
    votes = [cv2.blur((canvas.label == c).astype(np.float32), (5, 5)) + (canvas.label == c) for c in classes]
    levels: list[tuple[np.ndarray, np.ndarray | int]] = []
    while True:
        # Transparent pixels take the mean colour, or they would leave dark rims.
        level = np.where(solid[..., None] > 0, image / np.maximum(solid, 1e-6)[..., None], mean)
        level[..., 3] = solid * SOLID + image[..., 3] * ((255 - SOLID) / 255)
        level = np.clip(np.rint(level), 0, 255).astype(np.uint8)
        level = cv2.copyMakeBorder(level, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        level[:, [0, -1], 3] = level[[0, -1], :, 3] = 0
        codes = np.array(classes, np.uint8)[np.argmax(np.stack(votes), 0)]
        codes = cv2.copyMakeBorder(codes, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        levels.append((level, codes if len(classes) > 1 else classes[0]))
        height, width = solid.shape
        if min(height, width) <= 3 or max(height, width) <= 8:
            return levels
        half = (width + 1) // 2, (height + 1) // 2
        solid, image, *votes = (cv2.resize(a, half, interpolation=cv2.INTER_AREA) for a in (solid, image, *votes))
