"""What the things of a street look like: one function for each kind, drawing in metres on a canvas.

A sprite is drawn once per kind, variant and sharpness, and tinted, stretched and projected anew for every object
that wears it.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from data.streets.canvas import (
    BICYCLE,
    BUILDING,
    BUS,
    CAR,
    FENCE,
    IGNORE,
    MOTORCYCLE,
    PERSON,
    POLE,
    RIDER,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    TRAIN,
    TRUCK,
    VEGETATION,
    WALL,
    Canvas,
    Dice,
    Sprite,
    mip_levels,
)  # fmt: skip

VESTS = [(222, 226, 60), (240, 140, 40), (206, 46, 50), (60, 150, 220)]  # what riders like to be seen in
GLASS, TYRE, DARK = (52, 60, 68), (26, 26, 28), (44, 44, 48)

Painter = Callable[[Dice, float], Canvas]
PAINTERS: dict[str, tuple[Painter, int]] = {}


def painter(*kinds: str, variants: int) -> Callable[[Callable[..., Canvas]], Callable[..., Canvas]]:
    """Register a drawing function for each kind; a kind "car rear" calls it with view="rear"."""

    def register(function: Callable[..., Canvas]) -> Callable[..., Canvas]:
        for kind in kinds:
            view = kind.partition(" ")[2]
            PAINTERS[kind] = (partial(function, view=view) if view else function), variants
        return function

    return register


def sprite(kind: str, variant: int, sharpness: int = 1) -> Sprite:
    """A variant (any number) of a kind, drawn at a sharpness that multiplies its resolution."""
    return _sprite(kind, variant % PAINTERS[kind][1], sharpness)


@lru_cache(maxsize=2048)
def _sprite(kind: str, variant: int, sharpness: int) -> Sprite:
    # The views of one thing share their dice, so that the side of a car fits its rear.
    dice, paint = Dice(zlib.crc32(kind.partition(" ")[0].encode()), variant), PAINTERS[kind][0]
    canvas = paint(dice, float(sharpness))
    return Sprite(canvas.width, canvas.height, mip_levels(canvas))


# Buildings and what stands beside a street


@painter("building", variants=40)
def _building(dice: Dice, s: float) -> Canvas:
    floors, ground, storey = 1 + dice.below(6), dice(3, 4.4), dice(2.7, 3.4)
    width, eaves = dice(9, 18), ground + floors * storey
    roof = dice(0.3, 0.8) if dice.chance(0.6) else dice(2, 4)
    c = Canvas(width, eaves + roof, 12 * s)
    wall, trim = dice.grey(165, 235), dice.grey(110, 250)
    c.rect(0, 0, width, eaves, wall, BUILDING)
    if dice.chance(0.35):  # bricks or boards
        pitch = dice(0.3, 0.6)
        for k in range(int(eaves / pitch)):
            c.rect(0, k * pitch, width, k * pitch + 0.1, [v * 0.86 for v in wall])
    tiles = dice.grey(70, 150, 25)
    inset = dice(0, 1.5) if roof > 1 else 0
    c.poly([(0, eaves), (inset, eaves + roof), (width - inset, eaves + roof), (width, eaves)], tiles, BUILDING)
    c.rect(0, eaves - 0.25, width, eaves + 0.1, trim)
    c.grain(dice, 0.12, 2.5)
    columns = max(2, int(width / dice(1.9, 3.4)))
    pitch, share, tall = width / columns, dice(0.4, 0.75), dice(0.45, 0.72)
    blind, sill, lit = dice.grey(150, 240, 20), dice.chance(0.6), dice(0.08, 0.5)
    balcony = dice.chance(0.25)
    for floor in range(floors):
        low = ground + floor * storey + storey * 0.22
        for column in range(columns):
            left, right = (column + 0.5 - share / 2) * pitch, (column + 0.5 + share / 2) * pitch
            shine = dice(-18, 26) if dice.chance(0.85) else 70
            glass = blind if dice.chance(0.12) else [v + shine for v in GLASS]
            glow = dice(120, 255) if dice.chance(lit) else 0
            c.rect(left - 0.1, low - 0.1, right + 0.1, low + storey * tall + 0.1, trim)
            c.rect(left, low, right, low + storey * tall, (190, 160, 110) if glow else glass, glow=glow)
            c.rect((left + right) / 2 - 0.05, low, (left + right) / 2 + 0.05, low + storey * tall, trim)
            if sill:
                c.rect(left - 0.2, low - 0.25, right + 0.2, low - 0.1, trim)
        if balcony:
            c.rect(pitch * 0.3, low - 0.3, width - pitch * 0.3, low + 0.5, [v * 0.75 for v in trim])
    shop = dice.chance(0.55)
    awning = dice.paint()
    for column in range(0, columns, 1 + shop):
        left, right = (column + 0.15) * pitch, min(width, (column + (1.85 if shop else 0.75)) * pitch)
        glow = dice(80, 230) if shop and dice.chance(0.7) else 0
        glass = [v + dice(-15, 50) for v in GLASS]
        c.rect(left, 0.5 if shop else 1.0, right, ground * 0.72, (180, 160, 120) if glow else glass, glow=glow)
        if shop:
            c.rect(left, ground * 0.74, right, ground * 0.95, awning)
    door = dice(0.2, 0.7) * width
    c.rect(door, 0, door + 1.3, 2.4, dice.grey(40, 110, 20))
    return c


@painter("wall", variants=10)
def _wall(dice: Dice, s: float) -> Canvas:
    width, height = dice(6, 10), dice(1.2, 3.4)
    c = Canvas(width, height, 20 * s)
    base = dice.grey(130, 215, 15)
    c.rect(0, 0, width, height, base, WALL)
    step_y, step_x = dice.pick([(0.3, 0.6), (0.5, 1.0), (2.0, 2.0), (0.9, 9.0)])
    for row in range(int(height / step_y) + 1):
        for column in range(-1, int(width / step_x) + 1):
            left = (column + 0.5 * (row % 2)) * step_x
            shade = dice(0.85, 1.1)
            c.rect(left + 0.03, row * step_y + 0.03, left + step_x - 0.03, (row + 1) * step_y - 0.03,
                   [v * shade for v in base])  # fmt: skip
    if dice.chance(0.4):  # graffiti
        for _ in range(5):
            x, y = dice(0, width), dice(0.3, height)
            c.bar((x, y), (x + dice(-1.5, 1.5), y + dice(-0.8, 0.8)), 0.15, dice.paint())
    c.rect(0, height - 0.15, width, height, [v * 1.1 for v in base])
    c.grain(dice, 0.2, 1.2)
    return c


@painter("fence", variants=12)
def _fence(dice: Dice, s: float) -> Canvas:
    width, height, wide = 4.0, dice(0.9, 2.0), dice(0.05, 0.16)
    c = Canvas(width, height, 32 * s)
    style, colour, gap = dice.below(3), dice.grey(60, 230, 20), dice.grey(35, 110, 25)
    if style == 0:  # guard rail
        for x in (0.1, 2.0, 3.9):
            c.rect(x - 0.08, 0, x + 0.08, height * 0.7, colour, FENCE)
        for k in range(3):
            shade = [v * (0.8, 1.1, 0.7)[k] for v in colour]
            c.rect(0, height * (0.4 + 0.1 * k), width, height * (0.5 + 0.1 * k), shade, FENCE)
        return c
    c.rect(0, 0.05, width, height * 0.97, gap, FENCE)  # what is seen through the gaps belongs to the fence
    c.grain(dice, 0.5, 0.5)
    pitch = wide * dice(1.6, 3)
    for k in range(int(width / pitch) + 1):
        c.rect(k * pitch, 0, k * pitch + wide, height, [v * dice(0.85, 1.1) for v in colour], FENCE)
    for y in (0.2, 0.85):
        c.rect(0, y * height - 0.05, width, y * height + 0.05, [v * 0.8 for v in colour], FENCE)
    return c


def _foliage(c: Canvas, dice: Dice, x: float, y: float, rx: float, ry: float, density: float) -> None:
    """A ragged crown: noise decides its edge and its clumps of light and dark."""
    height, width = c.label.shape
    cells = min(10, c.height * 1.1), min(22, c.width * 1.1)
    edge, clumps = dice.clouds((height, width), cells), dice.clouds((height, width), cells)
    v, u = np.mgrid[:height, :width].astype(np.float32) / np.float32(c.scale)
    dx, dy = (u - x) / rx, (c.height - v - y) / ry
    inside = dx * dx + dy * dy < density + 0.45 * edge
    summer = [(84, 112, 48), (62, 92, 52), (100, 116, 60), (72, 84, 56)]
    autumn = [(134, 116, 52), (124, 84, 50), (104, 98, 88)]
    green = np.array(dice.pick(summer if dice.chance(0.92) else autumn), np.float32)
    light = 1 + 0.45 * clumps + 0.25 * dy - 0.1 * dx
    c.image[inside, :3] = np.clip(green * light[..., None], 0, 255)[inside]
    c.label[inside] = VEGETATION


@painter("tree", variants=36)
def _tree(dice: Dice, s: float) -> Canvas:
    height, width = dice(4.5, 10), dice(3.2, 6.5)
    c = Canvas(width, height, 18 * s)
    trunk, bark = height * dice(0.2, 0.4), dice.grey(60, 110, 14)
    c.bar((width / 2, 0), (width / 2 + dice(-0.2, 0.2), trunk + 1.2), dice(0.18, 0.42), bark, VEGETATION)
    for side in (-0.5, 0.5):
        c.bar((width / 2, trunk), (width * (0.5 + side * 0.5), trunk + 1.5), 0.14, bark, VEGETATION)
    crown = (height - trunk) / 2
    _foliage(c, dice, width / 2, trunk + crown, width * 0.47, crown * 0.95, dice(0.6, 0.85))
    return c


@painter("bush", variants=16)
def _bush(dice: Dice, s: float) -> Canvas:
    height, width = dice(0.7, 2.4), dice(1.5, 5)
    c = Canvas(width, height, 32 * s)
    if dice.chance(0.4):  # a clipped hedge
        c.rect(0.05, 0, width - 0.05, height * 0.9, (60, 70, 45), VEGETATION)
    _foliage(c, dice, width / 2, height * 0.35, width * 0.5, height * 0.6, 0.75)
    return c


@painter("skyline", variants=12)
def _skyline(dice: Dice, s: float) -> Canvas:
    c = Canvas(60, 26, 4 * s)
    x, woods = 0.0, dice.chance(0.5)
    while x < 60:
        wide, height = dice(5, 16), dice(5, 22) * (0.6 if woods else 1)
        if not woods:
            c.rect(x, 0, x + wide, height, dice.grey(110, 190, 20), BUILDING)
            for k in range(int(height / 3)):
                c.rect(x + 0.6, k * 3 + 1, x + wide - 0.6, k * 3 + 2.2, dice.grey(70, 120))
        x += wide
    if woods:
        for x in (8, 22, 36, 50):
            _foliage(c, dice, x, 4, 11, dice(6, 13), 0.8)
    _foliage(c, dice, 30, 0, 34, dice(2, 7), 0.8)
    return c


def _post(c: Canvas, dice: Dice, top: float, width: float = 0.18) -> None:
    x, colour = c.width / 2, dice.grey(115, 180)
    c.rect(x - width / 2, 0, x + width / 2, top, colour, POLE)
    c.rect(x, 0, x + width / 2, top, [v * 0.75 for v in colour])


@painter("lamp", variants=12)
def _lamp(dice: Dice, s: float) -> Canvas:
    height = dice(4.5, 9)
    c = Canvas(3.0, height, 24 * s)
    _post(c, dice, height - 0.1, dice(0.18, 0.32))
    if dice.chance(0.75):
        c.bar((1.5, height - 0.15), (2.6, height - 0.12), 0.12, (110, 110, 112), POLE)
        c.rect(2.2, height - 0.3, 2.95, height - 0.1, (225, 220, 190), POLE, glow=255)
    return c


@painter("sign", variants=36)
def _sign(dice: Dice, s: float) -> Canvas:
    size, height = dice(0.65, 1.15), dice(2.3, 3.3)
    wide = dice.chance(0.2)
    c = Canvas(size * (2 if wide else 1), height, 48 * s)
    _post(c, dice, height - size * 0.4, 0.12)
    x, y, r = c.width / 2, height - size / 2, size / 2
    face, edge = dice.pick([((230, 230, 226), (178, 34, 38)), ((34, 74, 160), (235, 235, 235)),
                            ((236, 196, 40), (240, 240, 235)),
                            ((170, 30, 34), (235, 235, 230)), ((40, 110, 70), (220, 224, 220))])  # fmt: skip
    if wide:
        c.rect(0, height - size, c.width, height, edge, TRAFFIC_SIGN)
        c.rect(0.06, height - size + 0.06, c.width - 0.06, height - 0.06, face)
        for k in (0.35, 0.6):
            c.rect(0.25, height - size * (k + 0.12), c.width - 0.3, height - size * k, edge)
        return c
    sides = dice.pick([3, 4, 8, 24], [2, 1, 1, 3])
    c.disc(x, y, r, r, edge, TRAFFIC_SIGN, sides=sides)
    c.disc(x, y, r * 0.76, r * 0.76, face, sides=sides)
    if dice.chance(0.6):
        c.rect(x - r * 0.35, y - r * 0.16, x + r * 0.35, y + r * 0.16, dice.pick([DARK, edge]))
    if dice.chance(0.3):
        c.rect(x - r * 0.6, height - size * 1.55, x + r * 0.6, height - size * 1.08, (225, 225, 220), TRAFFIC_SIGN)
    return c


@painter("light", variants=12)
def _light(dice: Dice, s: float) -> Canvas:
    height = dice(2.8, 4.4)
    c = Canvas(0.6, height, 48 * s)
    _post(c, dice, height - 0.3, 0.15)
    c.rect(0.04, height - 1.25, 0.56, height, dice.pick([DARK, (40, 44, 40), (196, 160, 40)]), TRAFFIC_LIGHT)
    lit = dice.below(3)
    for k, colour in enumerate([(60, 220, 130), (245, 190, 60), (240, 50, 40)]):
        on = k == lit
        c.disc(0.3, height - 1.05 + 0.4 * k, 0.16, 0.16, colour if on else [v * 0.22 for v in colour],
               glow=255 if on else 0)  # fmt: skip
    return c


@painter("clutter", variants=20)
def _clutter(dice: Dice, s: float) -> Canvas:
    """Bins, boxes, placards and stones: things that no class covers."""
    width, height = dice(0.4, 1.3), dice(0.5, 1.6)
    c = Canvas(width, height, 48 * s)
    body = dice.paint()
    taper = dice(0, 0.1)
    c.poly([(taper, 0), (0, height * 0.9), (width, height * 0.9), (width - taper, 0)], body, IGNORE)
    c.rect(0, height * 0.85, width, height, [v * 0.7 for v in body], IGNORE)
    c.rect(width * 0.2, height * 0.4, width * 0.8, height * 0.65, dice.grey(60, 220))
    return c


# Vehicles: a side view (its front at the right), a rear and a front


def _wheels(c: Canvas, places: Sequence[float], radius: float, label: int) -> None:
    for x in places:
        c.disc(x, radius, radius, radius, TYRE, label)
        c.disc(x, radius, radius * 0.55, radius * 0.55, (120, 120, 124))


@painter("car side", "car rear", "car front", variants=24)
def _car(dice: Dice, s: float, view: str) -> Canvas:
    length, width, height = dice(3.7, 4.9), dice(1.7, 1.9), dice(1.4, 1.85)
    body, belt, boot, bonnet = (225, 225, 225), height * dice(0.52, 0.62), dice(0, 0.18), dice(0.2, 0.3)
    glass = [v + dice(-15, 30) for v in GLASS]
    if view == "side":
        c = Canvas(length, height, 36 * s)
        rear, front = (0.02 + boot * 0.5) * length, (1 - bonnet) * length
        c.poly([(0.02, 0.28), (0, belt), (rear, belt * 1.06), (rear + 0.5, height), (front - 0.8, height),
                (front, belt * 1.08), (length - 0.1, belt * 0.88), (length, 0.3)], body, CAR)  # fmt: skip
        c.rect(0.05, 0.24, length - 0.05, 0.42, DARK)
        c.poly([(rear + 0.15, belt * 1.05), (rear + 0.58, height - 0.1), (front - 0.88, height - 0.1),
                (front - 0.2, belt * 1.05)], glass)  # fmt: skip
        for x in (0.42, 0.62):
            c.rect(length * x, 0.4, length * x + 0.07, height - 0.05, [v * 0.8 for v in body])
        c.rect(0, belt * 0.75, 0.18, belt * 0.95, (170, 30, 30), glow=200)
        c.rect(length - 0.25, belt * 0.65, length, belt * 0.8, (240, 235, 210), glow=255)
        _wheels(c, (length * 0.19, length * 0.81), 0.33, CAR)
        return c
    c = Canvas(width, height, 56 * s)
    for x in (0.08, width - 0.32):
        c.rect(x, 0, x + 0.24, 0.4, TYRE, CAR)
    c.rect(0.05, 0.2, width - 0.05, 0.45, DARK, CAR)
    c.poly([(0.02, 0.3), (0, belt), (0.2, height - 0.04), (0.32, height), (width - 0.32, height),
            (width - 0.2, height - 0.04), (width, belt), (width - 0.02, 0.3)], body, CAR)  # fmt: skip
    c.poly([(0.16, belt * 1.04), (0.3, height - 0.1), (width - 0.3, height - 0.1), (width - 0.16, belt * 1.04)],
           glass)  # fmt: skip
    c.rect(width * 0.34, 0.42, width * 0.66, 0.54, (235, 235, 225))
    lamp, glow = ((185, 28, 30), 220) if view == "rear" else ((245, 242, 225), 255)
    for x in (0.03, width - 0.37):
        c.rect(x, belt * 0.72, x + 0.34, belt * 0.92, lamp, glow=glow)
    if view == "front":
        c.rect(width * 0.25, belt * 0.68, width * 0.75, belt * 0.85, DARK)
    return c


@painter("truck side", "truck rear", "truck front", variants=8)
def _truck(dice: Dice, s: float, view: str) -> Canvas:
    length, width, height = dice(6, 9.5), dice(2.2, 2.5), dice(2.9, 3.7)
    cargo, cab = dice.grey(180, 240), dice.paint()
    if view == "side":
        c = Canvas(length, height, 24 * s)
        split = length - 1.9
        c.rect(split, 0.5, split + 0.15, height * 0.8, DARK, TRUCK)
        c.rect(0.1, 0.45, length - 0.1, 0.9, DARK, TRUCK)
        c.rect(0, 0.85, split, height, cargo, TRUCK)
        for k in range(int(split / 1.2)):
            c.rect(k * 1.2, 0.85, k * 1.2 + 0.06, height, [v * 0.85 for v in cargo])
        c.rect(split * 0.2, height * 0.5, split * 0.75, height * 0.7, dice.paint())
        c.poly([(split + 0.1, 0.4), (split + 0.1, height * 0.86), (length - 0.4, height * 0.86),
                (length, height * 0.5), (length, 0.4)], cab, TRUCK)  # fmt: skip
        c.poly([(split + 0.7, height * 0.5), (split + 0.7, height * 0.76), (length - 0.5, height * 0.76),
                (length - 0.15, height * 0.5)], GLASS)  # fmt: skip
        _wheels(c, (1.2, 2.2, length - 1), 0.48, TRUCK)
        return c
    c = Canvas(width, height, 36 * s)
    for x in (0.1, width - 0.5):
        c.rect(x, 0, x + 0.4, 0.8, TYRE, TRUCK)
    c.rect(0.1, 0.45, width - 0.1, 0.85, DARK, TRUCK)
    if view == "rear":
        c.rect(0, 0.8, width, height, cargo, TRUCK)
        c.rect(width / 2 - 0.03, 0.8, width / 2 + 0.03, height, [v * 0.6 for v in cargo])
        c.rect(0.08, height - 0.2, width - 0.08, height - 0.1, [v * 0.7 for v in cargo])
        for x in (0.1, width - 0.45):
            c.rect(x, 0.5, x + 0.35, 0.7, (190, 30, 30), glow=230)
    else:
        c.rect(0.05, height * 0.6, width - 0.05, height, [v * 0.9 for v in cargo], TRUCK)
        c.rect(0, 0.4, width, height * 0.82, cab, TRUCK)
        c.rect(0.15, height * 0.48, width - 0.15, height * 0.76, GLASS)
        c.rect(0.4, 0.7, width - 0.4, height * 0.4, DARK)
        for x in (0.1, width - 0.5):
            c.rect(x, 0.5, x + 0.4, 0.75, (245, 242, 225), glow=255)
    return c


@painter("bus side", "bus rear", "bus front", variants=8)
def _bus(dice: Dice, s: float, view: str) -> Canvas:
    return _coach(dice, s, view, BUS, dice(9.5, 13), dice(2.5, 2.6), dice(2.9, 3.3))


@painter("train side", "train rear", "train front", variants=8)
def _train(dice: Dice, s: float, view: str) -> Canvas:
    return _coach(dice, s, view, TRAIN, dice(22, 34), dice(2.5, 2.7), dice(3.4, 3.8))


def _coach(dice: Dice, s: float, view: str, label: int, length: float, width: float, height: float) -> Canvas:
    """Bus and tram differ in length, wheels, nose and joints alone."""
    tram = label == TRAIN
    body, stripe, low, high = (228, 226, 220), dice.paint(), height * dice(0.4, 0.46), height * dice(0.76, 0.84)
    floor = 0.12 if tram else 0.32
    if view == "side":
        c = Canvas(length, height, (12 if tram else 20) * s)
        nose = 1.1 if tram else 0.15
        c.poly([(0, floor), (0, low), (nose, height - 0.1), (length - nose, height - 0.1), (length, low),
                (length, floor)], body, label)  # fmt: skip
        c.rect(0, floor, length, floor + dice(0.3, 0.9), stripe)
        pitch = dice(1.3, 2.0)
        for k in range(int((length - 2 * nose) / pitch)):
            left = nose + k * pitch
            door = k % 4 == 2
            c.rect(left + 0.08, floor + 0.15 if door else low, left + pitch - 0.08, high, GLASS, glow=90)
        if tram:
            for x in (1 / 3, 2 / 3):
                c.rect(length * x - 0.3, floor, length * x + 0.3, height - 0.1, DARK)
            c.rect(length * 0.4, height - 0.12, length * 0.6, height, (90, 90, 92), label)
        else:
            _wheels(c, (length * 0.2, length * 0.27, length * 0.78), 0.48, label)
        return c
    c = Canvas(width, height, 36 * s)
    if not tram:
        for x in (0.1, width - 0.45):
            c.rect(x, 0, x + 0.35, 0.6, TYRE, label)
    lean = 0.28 if tram else 0.05
    c.poly([(0, floor), (0, low), (lean, height), (width - lean, height), (width, low), (width, floor)], body,
           label)  # fmt: skip
    c.rect(0.02, floor, width - 0.02, low * 0.6, stripe)
    c.poly([(0.15, low * 0.9), (lean + 0.12, high), (width - lean - 0.12, high), (width - 0.15, low * 0.9)],
           [v + dice(-10, 20) for v in GLASS], glow=50)  # fmt: skip
    c.rect(0.35, high + 0.06, width - 0.35, height - 0.1, DARK)
    c.rect(0.6, high + 0.12, width - 0.6, height - 0.16, (240, 180, 70), glow=255 if view == "front" else 0)
    lamp = ((245, 242, 225), 255) if view == "front" else ((190, 30, 30), 230)
    for x in (0.15, width - 0.5):
        c.rect(x, low * 0.4, x + 0.35, low * 0.58, lamp[0], glow=lamp[1])
    return c


# People and two-wheelers


def _body(c: Canvas, dice: Dice, x: float, hip: float, lean: float, label: int, size: float = 1.0) -> None:
    """Trunk, arms and head above the hip; the legs depend on what the person does."""
    coat = dice.pick(VESTS) if label == RIDER and dice.chance(0.85) else dice.paint(bright=0.75)
    skin = dice.pick([(222, 178, 150), (196, 148, 118), (140, 100, 78), (92, 66, 52)])
    hair = dice.grey(25, 110, 10)
    top = x + lean, hip + 0.6 * size
    c.bar((x, hip - 0.08), top, 0.4 * size, coat, label)
    c.disc(*top, 0.22 * size, 0.14 * size, coat, label)
    c.disc(top[0] + lean * 0.3, top[1] + 0.24 * size, 0.11 * size, 0.15 * size, skin, label)
    c.disc(top[0] + lean * 0.3, top[1] + 0.31 * size, 0.12 * size, 0.1 * size, hair, label)
    shade = [v * 0.8 for v in coat]
    for side in (-0.2, 0.2):
        hand = x + lean * 1.7 + side * dice(0.6, 1.6), hip + 0.05
        c.bar((top[0] + side, top[1]), hand, 0.12 * size, shade, label)


@painter("person", variants=40)
def _person(dice: Dice, s: float) -> Canvas:
    size = dice(0.9, 1.08) if dice.chance(0.85) else dice(0.6, 0.8)
    c = Canvas(0.9, 1.9 * size, 56 * s)
    hip, x, stride = 0.88 * size, 0.45, dice(0.02, 0.28)
    legs = dice.paint() if dice.chance(0.4) else (dice(30, 60), dice(40, 70), dice(70, 120))
    if dice.chance(0.2):  # a skirt or long coat
        c.poly([(x - 0.16, hip), (x + 0.16, hip), (x + 0.27, 0.4), (x - 0.27, 0.4)], legs, PERSON)
    for side in (-1, 1):
        c.bar((x + 0.08 * side, hip), (x + side * stride, 0.04), 0.16 * size, legs, PERSON)
        c.rect(x + side * stride - 0.08, 0, x + side * stride + 0.1, 0.08, TYRE, PERSON)
    _body(c, dice, x, hip, 0.0, PERSON, size)
    if dice.chance(0.25):
        c.rect(x + 0.2, 0.55 * size, x + 0.42, 0.9 * size, dice.paint(), PERSON)
    return c


def _cycle(c: Canvas, dice: Dice, view: str, label: int) -> None:
    """A bicycle or motorcycle, from the side or from behind."""
    motor, x = label == MOTORCYCLE, c.width / 2
    colour = dice.paint(bright=0.8 if motor else 0.4)
    radius, base = (0.3, 0.66) if motor else (0.34, 0.52)
    if view == "rear":
        c.rect(x - (0.1 if motor else 0.045), 0, x + (0.1 if motor else 0.045), radius * 2, TYRE, label)
        c.rect(x - 0.32, 0.95, x + 0.32, 1.02, DARK, label)
        c.bar((x, 0.5), (x, 1.0), 0.42 if motor else 0.1, colour, label)
        c.rect(x - 0.08, 0.68, x + 0.08, 0.78, (190, 30, 30), glow=200)
        return
    for wheel in (x - base, x + base):
        c.disc(wheel, radius, radius, radius, TYRE, label)
        c.disc(wheel, radius, radius * 0.72, radius * 0.72, (92, 92, 94))  # as annotators do, spokes and all
    if motor:
        c.poly([(x - 0.8, 0.62), (x - 0.1, 0.8), (x + 0.35, 0.95), (x + 0.4, 0.5), (x - 0.3, 0.25)], colour, label)
        c.rect(x - 0.3, 0.2, x + 0.25, 0.5, DARK, label)
        c.bar((x + base, 0.3), (x + 0.35, 1.05), 0.14, (110, 110, 112), label)
    else:
        hub, fork, crank = (x - base, radius), (x + base, radius), (x - 0.05, 0.3)
        seat, head = (x - 0.2, 0.82), (x + 0.35, 0.82)
        for a, b in ((hub, seat), (seat, head), (hub, crank), (crank, head), (crank, seat), (fork, head)):
            c.bar(a, b, 0.07, colour, label)
        c.rect(x - 0.35, 0.86, x - 0.1, 0.93, TYRE, label)
    c.bar((x + 0.32, 0.85), (x + 0.28, 1.05), 0.08, DARK, label)


@painter("bicycle side", "bicycle rear", variants=8)
def _bicycle(dice: Dice, s: float, view: str) -> Canvas:
    c = Canvas(1.8 if view == "side" else 0.7, 1.08, 56 * s)
    _cycle(c, dice, view, BICYCLE)
    return c


@painter("motorcycle side", "motorcycle rear", variants=8)
def _motorcycle(dice: Dice, s: float, view: str) -> Canvas:
    c = Canvas(2.1 if view == "side" else 0.8, 1.12, 56 * s)
    _cycle(c, dice, view, MOTORCYCLE)
    return c


@painter("cyclist side", "cyclist rear", variants=12)
def _cyclist(dice: Dice, s: float, view: str) -> Canvas:
    return _ridden(dice, s, view, BICYCLE)


@painter("biker side", "biker rear", variants=12)
def _biker(dice: Dice, s: float, view: str) -> Canvas:
    return _ridden(dice, s, view, MOTORCYCLE)


def _ridden(dice: Dice, s: float, view: str, label: int) -> Canvas:
    c = Canvas((1.8 if label == BICYCLE else 2.1) if view == "side" else 0.9, 1.98, 56 * s)
    _cycle(c, dice, view, label)
    x, hip, legs = c.width / 2, 0.92, dice.grey(30, 110)
    if view == "side":
        c.bar((x - 0.22, hip), (x + 0.12, 0.68), 0.17, legs, RIDER)
        c.bar((x + 0.12, 0.68), (x - 0.02, 0.25), 0.14, legs, RIDER)
        _body(c, dice, x - 0.22, hip, 0.28, RIDER)
        c.bar((x + 0.02, hip + 0.48), (x + 0.3, 1.02), 0.1, legs, RIDER)
    else:
        for side in (-1, 1):
            c.bar((x + 0.1 * side, hip), (x + 0.17 * side, 0.35), 0.15, legs, RIDER)
        _body(c, dice, x, hip, 0.0, RIDER)
    if dice.chance(0.5) or label == MOTORCYCLE:  # a helmet
        lean = 0.28 * 1.3 - 0.22 if view == "side" else 0
        c.disc(x + lean, hip + 0.88, 0.15, 0.13, dice.paint(), RIDER)
    return c
