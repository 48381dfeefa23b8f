"""Procedural street scenes with exact labels, in the 19 classes of Cityscapes: pictures without a download.

A scene is a world: a winding street in chunks of 35 m, each a function of (seed, index, chunk), with flat things
(see streets_sprites) standing at positions x (to the right of the road's line), z (along it) in metres. A frame is
one projection of that world. Ground and things write into a depth buffer, so labels are exact at every pixel, and
textures are fixed to the things, so the frames of a clip agree with each other but for the sensor's noise.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from data.streets_sprites import (
    EDGE, IGNORE, ROAD, SIDEWALK, SKY, SOLID, TERRAIN, Colour, Dice, sprite,
)  # fmt: skip

NEAR, FAR, CHUNK = 1.0, 104.0, 35.0  # metres
SKY_DISTANCE, SKYLINE = 500.0, -1.0  # the skyline's z is no place: it goes with the camera
HALF, CELLS = 24.0, 20  # the street's cross-section spans ±HALF metres, with so many cells to the metre
PLAIN, DASHED, ZEBRA, STOP, JUNCTION = range(5)  # kinds of cross-section


class Panel(NamedTuple):
    """An upright rectangle in the world wearing a sprite, its left edge at (x0, z0) and its right at (x1, z1)."""

    kind: str
    variant: int
    tint: Colour
    x0: float
    x1: float
    z0: float
    z1: float
    top: float
    vx: float = 0.0
    vz: float = 0.0
    shadow: float = 0.0  # width of its shadow on the ground
    back: int = 0  # ±1 if it shows its face only to a camera on that side of it


@dataclass
class World:
    """What is sampled once for a scene."""

    seed: int
    index: int
    dice: Dice
    panels: list[Panel] = field(default_factory=list)
    bands: list[tuple[float, float, int]] = field(default_factory=list)  # (z from, z to, cross-section kind)
    facades: list[tuple[float, float, int, float]] = field(default_factory=list)  # (z from, z to, side, height)

    def __post_init__(self) -> None:
        dice = self.dice
        self.focal, self.eye, self.horizon = dice(0.85, 1.15), dice(1.15, 1.75), dice(0.34, 0.48)
        self.speed = dice(0.25, 0.7)  # metres a frame
        self.bend, self.bend_length, self.bend_phase = dice(0, 7), dice(35, 90), dice(0, 6.3)
        self.yaw, self.shift = dice(-0.04, 0.04), dice(-0.5, 0.5)
        self.lane = dice(2.9, 3.6)
        self.oncoming, self.same = dice.pick([1, 2, 0], [5, 2, 2]), dice.pick([0, 1], [4, 1])
        self.parking = {side: 2.2 if dice.chance(0.42) else 0.0 for side in (-1, 1)}
        self.kerb = {1: self.lane * (0.5 + self.same) + self.parking[1],
                     -1: self.lane * (0.5 + self.oncoming) + self.parking[-1]}  # fmt: skip
        self.verge = {side: dice(0.8, 2.5) if dice.chance(0.4) else 0.0 for side in (-1, 1)}
        self.line = {side: self.kerb[side] + self.verge[side] + dice(1.5, 4.5) for side in (-1, 1)}
        self.trees = {side: dice(6, 14) if dice.chance(0.6) else 0.0 for side in (-1, 1)}
        self.town = dice.pick([(8, 1, 1, 1), (4, 3, 2, 2), (1.5, 5, 2, 2)], [5, 3, 2])  # building, park, wall, fence
        self.busy, self.crowd = dice(0.1, 1), dice(0, 1) ** 2
        self.rails = dice.chance(0.14) and self.oncoming > 0
        self.lanes = {k: dice(0.9, 1.25) * self.speed * (-1 if k < 0 else 1) for k in range(-self.oncoming, self.same + 1)}
        self.light = _light(dice)
        self.sections, self.labels = _cross_sections(self)
        self.bonnet = dice.chance(0.35)
        self.bonnet_height, self.bonnet_paint = dice(0.05, 0.13), dice.grey(25, 150)
        self.noise_shift = dice(0, 100), dice(0, 100)
        self.dash, self.gap = dice(2, 5), dice(3, 8)

    def path(self, z):
        """The street's line: its lateral offset at z (a number or an array)."""
        return self.bend * np.sin(z / self.bend_length + self.bend_phase)

    def populate(self, travel: float) -> None:
        for chunk in range(int((FAR + travel) / CHUNK) + 1):
            _chunk(self, Dice(self.seed, self.index, 1, chunk), chunk * CHUNK)
        dice = Dice(self.seed, self.index, 2)
        for k in range(-2, 2):  # what closes the view
            _across(self, "skyline", dice.below(12), k * 55 + 30, 65, SKYLINE, dice(14, 30), _grey(dice, 0.5, 1))


def _light(dice: Dice) -> dict:
    """Time of day and weather: colours multiply the picture, so every class shares the same range of them."""
    hour = dice.pick(["day", "overcast", "low sun", "dusk"], [5, 4, 2, 1.5])
    level = {"day": dice(1.0, 1.45), "overcast": dice(0.75, 1.15), "low sun": dice(0.8, 1.25), "dusk": dice(0.3, 0.6)}
    warm = {"day": dice(-0.05, 0.08), "overcast": dice(-0.08, 0.04), "low sun": dice(0.08, 0.25),
            "dusk": dice(-0.2, 0.0)}[hour]  # fmt: skip
    top, low = {
        "day": ((dice(60, 140), dice(115, 175), dice(195, 240)), (dice(190, 225), dice(205, 230), dice(215, 240))),
        "overcast": (dice.grey(140, 215, 8), dice.grey(190, 240, 6)),
        "low sun": ((dice(110, 160), dice(130, 170), dice(170, 215)), (dice(235, 255), dice(190, 225), dice(130, 190))),
        "dusk": ((dice(25, 70), dice(35, 80), dice(70, 120)), (dice(90, 190), dice(80, 130), dice(90, 130))),
    }[hour]
    foggy = dice.chance(0.12)
    haze = dice(0.015, 0.04) if foggy else dice(0.001, 0.007)
    return {
        "ambient": np.array([1 + warm, 1, 1 - warm], np.float32) * level[hour],
        "dusk": hour == "dusk", "lamps": dice(0.9, 1.6),
        "top": np.array(low if foggy else top, np.float32), "low": np.array(low, np.float32),
        "fog": np.array(low, np.float32) * dice(0.75, 1.0), "haze": haze,
        "clouds": dice(0, 45) if hour != "dusk" else dice(0, 15),
        "shadow": 0.0 if foggy else {"day": dice(0.3, 0.6), "low sun": dice(0.3, 0.55)}.get(hour, dice(0, 0.15)),
        "sun": dice.pick([-1, 1]), "reach": dice(0.15, 0.9),
        "sensor": dice(1, 4) + (dice(2, 6) if hour == "dusk" else 0), "blur": dice(0, 1.1) ** 2,
        "contrast": dice(0.85, 1.15),
    }  # fmt: skip


def _grey(dice: Dice, low: float, high: float, spread: float = 0.06) -> Colour:
    value, warmth = dice(low, high), dice(-spread, spread)
    return value * (1 + warmth), value, value * (1 - warmth)


def _house(dice: Dice) -> Colour:
    tint = dice.pick([(1, 1, 1), (1, 0.93, 0.8), (0.95, 0.8, 0.6), (0.75, 0.5, 0.4), (0.6, 0.58, 0.56),
                      (0.7, 0.75, 0.82), (0.72, 0.8, 0.66), (0.9, 0.7, 0.66), (0.42, 0.4, 0.42)])  # fmt: skip
    value = dice(0.7, 1.05)
    return tuple(value * v for v in tint)


def _livery(dice: Dice) -> Colour:
    return tuple(v / 225 for v in (dice.grey(25, 235, 8) if dice.chance(0.7) else dice.paint()))


def _cross_sections(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Colours uint8 [3 sharpnesses × 5 kinds, cells, 4] and labels [5, cells] over x, the look of the ground."""
    dice, n = world.dice, int(2 * HALF * CELLS)
    colours, labels = np.zeros((5, n, 4), np.uint8), np.zeros((5, n), np.uint8)

    def strip(low: float, high: float, colour: Colour, label: int, kinds: slice = slice(None)) -> None:
        cells = slice(max(0, round((low + HALF) * CELLS)), max(0, round((high + HALF) * CELLS)))
        colours[kinds, cells], labels[kinds, cells] = (*(min(255, v) for v in colour), 0), label

    asphalt, slabs = dice.grey(62, 140, 6), dice.grey(85, 190, 12)
    grass = dice.pick([(88, 116, 54), (112, 120, 66), (74, 96, 50), (138, 122, 84), (120, 104, 80)])
    strip(-HALF, HALF, asphalt, ROAD)
    for side in (-1, 1):
        edge, green, line = world.kerb[side], world.kerb[side] + world.verge[side], world.line[side]
        lot = (grass, TERRAIN) if dice.chance(0.7) else (slabs, SIDEWALK)
        kerbstone = [v * dice(1.0, 1.35) for v in slabs]
        kinds = slice(PLAIN, JUNCTION)
        for low, high, colour, label in ((edge, edge + 0.2, kerbstone, SIDEWALK), (edge + 0.2, green, grass, TERRAIN),
                                         (max(green, edge + 0.2), line, slabs, SIDEWALK), (line, HALF, *lot)):
            strip(*sorted((side * low, side * high)), colour, label, kinds)
        if world.parking[side]:
            strip(*sorted((side * (edge - 2.2), side * edge)), [v * dice(0.85, 1.2) for v in asphalt], ROAD, kinds)
    mark = [dice(170, 235)] * 3 if dice.chance(0.88) else [215, 180, 70]
    inner = {side: world.kerb[side] - world.parking[side] for side in (-1, 1)}
    lines = [world.lane * (k - 0.5) for k in range(-world.oncoming, world.same + 2)]
    solid = dice.chance(0.4)
    for x in lines:
        border = min(abs(x - inner[1]), abs(x + inner[-1])) < 0.3
        if border and not dice.chance(0.6):
            continue
        x += 0 if not border else -0.25 * math.copysign(1, x)
        centre = abs(x + world.lane / 2) < 0.1
        strip(x - 0.08, x + 0.08, mark, ROAD, slice(PLAIN if border or (centre and solid) else DASHED, ZEBRA))
    for x in np.arange(-inner[-1] + 0.4, inner[1] - 0.5, 1.0):
        strip(x, x + 0.5, mark, ROAD, slice(ZEBRA, STOP))
    strip(-world.lane / 2, inner[1], mark, ROAD, slice(STOP, JUNCTION))
    if world.rails:
        for x in (-0.72, 0.72):
            x -= world.lane * world.oncoming
            strip(x - 0.07, x + 0.07, [v * 0.6 for v in asphalt], ROAD)
    return np.concatenate([colours, cv2.blur(colours, (5, 1)), cv2.blur(colours, (17, 1))]), labels


def _chunk(world: World, dice: Dice, start: float) -> None:
    """Fill one chunk of the street."""
    end, add = start + CHUNK, world.panels.append
    begin = start
    if start > 0 and dice.chance(0.3):
        begin = start + dice(7, 11)
        world.bands.append((start, begin, JUNCTION))
        if dice.chance(0.5):
            world.bands += [(start - 4.5, start - 1.5, ZEBRA), (start - 6.2, start - 5.7, STOP)]
            _crossing(world, dice, start - 3)
        if dice.chance(0.6):
            for side in (-1, 1):
                _stand(world, dice, "light", 12, side * (world.kerb[side] + 0.4), start - 1)
        if dice.chance(0.35):  # crossing traffic
            _flat(world, dice, dice.pick(["car", "car", "bus", "truck"]) + " side", 24, dice(-14, 14), start + 4,
                  _livery(dice), vx=dice(-0.6, 0.6))  # fmt: skip
    for side in (-1, 1):
        _lots(world, dice, side, begin, end)
        _kerbside(world, dice, side, begin, end)
    for lane, speed in world.lanes.items():
        z = start + dice(6, 60) / (0.4 + world.busy)
        rail = world.rails and lane == -world.oncoming
        while z < end - 6:
            kind = "train" if rail and dice.chance(0.5) else dice.pick(["car", "truck", "bus", "cyclist", "biker"],
                                                                       [24, 0.9, 0.7, 0.5, 0.6])  # fmt: skip
            x = lane * world.lane + dice(-0.3, 0.3)
            if kind in ("cyclist", "biker"):
                x += dice(0.3, 1.2) * (1 if lane >= 0 else -1)
                _flat(world, dice, f"{kind} rear", 12, x, z, _grey(dice, 0.7, 1.1), vz=speed)
                z += 6
            else:
                z += _box(world, dice, kind, x, z, lane < 0, vz=speed) + dice(5, 50) / (0.4 + world.busy)


def _lots(world: World, dice: Dice, side: int, z: float, end: float) -> None:
    """Buildings, parks, walls and fences along one side."""
    line = world.line[side]
    while z < end - 0.5:
        length = dice(8, 20)
        length = end - z if end - z - length < 7 else length
        lot = dice.pick(["building", "park", "wall", "fence"], world.town)
        if lot == "building" or dice.chance(0.35):
            back = line + (dice(0, 3) if lot == "building" and dice.chance(0.4) else 0) + 6 * (lot != "building")
            tint, variant = _house(dice), dice.below(40)
            top = dice(4.5, 8) if world.town[0] < 2 else dice(8, 20)
            lit = 1.12 if side == world.light["sun"] * -1 else 0.85
            _along(world, "building", variant, side * back, z, z + length, top, [v * lit for v in tint])
            depth = dice(9, 14)
            _across(world, "building", variant + 7, side * (back + depth / 2), depth, z + 0.05, top, tint)
            world.facades.append((z, z + length, side, top))
            if back - line > 1 and lot == "building" and dice.chance(0.6):
                lot = dice.pick(["wall", "fence"])
        if lot in ("wall", "fence"):
            height, tint, variant = dice(0.8, 2.2) + 0.6 * (lot == "wall"), _house(dice), dice.below(12)
            count = max(1, round(length / 5))
            for k in range(count):
                _along(world, lot, variant, side * line, z + k * length / count, z + (k + 1) * length / count, height,
                       tint)  # fmt: skip
            _across(world, lot, variant, side * (line + 4), 8, z + 0.1, height, tint)
        if lot != "building":
            for _ in range(1 + dice.below(3)):
                _plant(world, dice, side * (line + dice(1.5, 9)), z + dice(0, length), dice(0.9, 1.6))
            if lot == "park" and dice.chance(0.5):
                _along(world, "bush", dice.below(16), side * (line + 0.3), z, z + length, dice(0.7, 1.8),
                       _grey(dice, 0.6, 1.1))  # fmt: skip
        z += length


def _kerbside(world: World, dice: Dice, side: int, z: float, end: float) -> None:
    """Everything that stands, walks or is parked between the road and the lots of one side."""
    kerb, line = world.kerb[side], world.line[side]
    if world.trees[side]:
        for at in np.arange(z + dice(0, 5), end, world.trees[side]):
            _plant(world, dice, side * (kerb + 0.3 + world.verge[side] / 2), float(at), dice(0.6, 1.1))
    for kind, variants, mean in (("lamp", 12, 1.0), ("sign", 36, 1.0), ("light", 12, 0.3), ("clutter", 20, 0.7)):
        while dice.chance(mean / (1 + mean)):
            _stand(world, dice, kind, variants, side * (kerb + dice(0.3, 0.7)), dice(z, end))
    if world.parking[side]:
        at = z + dice(0, 8)
        while at < end - 8:
            kind = dice.pick(["car", "truck"], [50, 1])
            at += _box(world, dice, kind, side * (kerb - 1.1), at, side < 0) + dice(0.8, 13)
    while dice.chance(0.35 + 0.5 * world.crowd):
        x, walk = side * dice(kerb + 0.3, line - 0.3), dice(-0.08, 0.08) * dice.chance(0.7)
        at = dice(z, end)
        for _ in range(1 + dice.below(3) * dice.chance(0.4)):
            _person(world, dice, x + dice(-0.5, 0.5), at + dice(0, 0.6), vz=walk)
    while dice.chance(0.33):
        kind, view = dice.pick(["bicycle", "motorcycle"], [3, 1]), dice.pick(["side", "rear"])
        _flat(world, dice, f"{kind} {view}", 8, side * dice(kerb + 0.3, line - 0.2), dice(z, end), _grey(dice, 0.6, 1.2))
    if dice.chance(0.25):
        kind = dice.pick(["cyclist", "biker"], [3, 1])
        _flat(world, dice, f"{kind} rear", 12, side * (kerb - world.parking[side] - 0.5), dice(z, end),
              _grey(dice, 0.7, 1.1), vz=side * 0.15)  # fmt: skip


def _crossing(world: World, dice: Dice, z: float) -> None:
    """People and now and then a cyclist on a zebra crossing."""
    while dice.chance(0.45):
        _person(world, dice, dice(-world.kerb[-1], world.kerb[1]), z + dice(-1, 1), vx=dice(-0.08, 0.08))
    if dice.chance(0.35):
        _flat(world, dice, dice.pick(["cyclist", "cyclist", "biker"]) + " side", 12, dice(-5, 5), z, _grey(dice, 0.7, 1.1),
              vx=dice(-0.2, 0.2))  # fmt: skip


def _across(world: World, kind: str, variant: int, x: float, width: float, z: float, top: float, tint: Colour,
            vx: float = 0.0, vz: float = 0.0, shadow: float = 0.0) -> None:  # fmt: skip
    world.panels.append(Panel(kind, variant, tint, x - width / 2, x + width / 2, z, z, top, vx, vz, shadow))


def _along(world: World, kind: str, variant: int, x: float, z0: float, z1: float, top: float, tint: Colour,
           vz: float = 0.0, back: int = 0) -> None:  # fmt: skip
    world.panels.append(Panel(kind, variant, tint, x, x, z0, z1, top, 0.0, vz, 0.0, back))


def _flat(world: World, dice: Dice, kind: str, variants: int, x: float, z: float, tint: Colour, *, size: float = 1.0,
          vx: float = 0.0, vz: float = 0.0, shadow: float = 1.0) -> None:  # fmt: skip
    """A thing facing the camera at its natural proportions; one moving to the left is mirrored."""
    variant = dice.below(variants)
    look = sprite(kind, variant, 1)
    flip = -1 if vx < 0 or (vx == 0 and dice.chance(0.5)) else 1
    _across(world, kind, variant, x, look.width * size * flip, z, look.height * size, tint, vx, vz,
            look.width * size * shadow)  # fmt: skip


def _stand(world: World, dice: Dice, kind: str, variants: int, x: float, z: float) -> None:
    _flat(world, dice, kind, variants, x, z, _grey(dice, 0.75, 1.15), shadow=0.5 if kind == "clutter" else 0)


def _person(world: World, dice: Dice, x: float, z: float, *, vx: float = 0.0, vz: float = 0.0) -> None:
    _flat(world, dice, "person", 40, x, z, _grey(dice, 0.7, 1.15), vx=vx, vz=vz)


def _plant(world: World, dice: Dice, x: float, z: float, size: float) -> None:
    kind, variants = dice.pick([("tree", 36), ("bush", 16)], [3, 1])
    _flat(world, dice, kind, variants, x, z, _grey(dice, 0.6, 1.2, 0.15), size=size)


def _box(world: World, dice: Dice, kind: str, x: float, z: float, towards: bool, vz: float = 0.0) -> float:
    """A vehicle seen from its end and along its inner side; returns its length."""
    variant, tint = dice.below(24), _livery(dice) if kind in ("car", "truck") else _grey(dice, 0.5, 1.05, 0.2)
    end, flank = sprite(f"{kind} {'front' if towards else 'rear'}", variant, 1), sprite(f"{kind} side", variant, 1)
    _across(world, f"{kind} {'front' if towards else 'rear'}", variant, x, end.width, z, end.height, tint, 0, vz,
            end.width * 1.25)  # fmt: skip
    near, far = (z + flank.width, z) if towards else (z, z + flank.width)
    for side in (-1, 1):
        _along(world, f"{kind} side", variant, x + side * end.width / 2, near, far, flank.height,
               [v * 0.85 for v in tint], vz, side)  # fmt: skip
    return flank.width


@lru_cache(maxsize=1)
def _noise_tiles() -> tuple[np.ndarray, np.ndarray]:
    """Two periodic pictures of smooth noise, float32 in about ±1: for the ground (two periods wide), for clouds."""
    dice = Dice(0)

    def periodic(cells: int) -> np.ndarray:
        grid = np.pad(dice.rng.random((cells, cells), dtype=np.float32) - 0.5, 4, mode="wrap")
        size = 512 // cells * (cells + 8)
        edge = 512 // cells * 4
        return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)[edge : edge + 512, edge : edge + 512] * 2

    ground = 0.55 * periodic(8) + 0.45 * periodic(64) + 0.5 * periodic(512)
    clouds = 0.8 * periodic(4) + 0.45 * periodic(16) + 0.25 * periodic(64)
    return np.tile(ground, 2), clouds


class Camera(NamedTuple):
    """Pose and lens of one frame; u = cx + focal·x/d and v = horizon + focal·(eye − y)/d in pixels."""

    x: float
    z: float
    heading: float
    focal: float
    cx: float
    horizon: float


def _camera(world: World, height: int, width: int, frame: int) -> Camera:
    z = 2.0 + world.speed * frame
    slope = world.bend / world.bend_length * math.cos(z / world.bend_length + world.bend_phase)
    nod = 0.004 * math.sin(0.55 * frame) + 0.002 * math.sin(1.3 * frame)
    return Camera(float(world.path(z)) + world.shift + 0.1 * math.sin(0.11 * frame), z,
                  slope + world.yaw + 0.006 * math.sin(0.17 * frame), world.focal * width, width / 2,
                  world.horizon * height + nod * width)  # fmt: skip


_ROUGHNESS = np.full(256, 0.1, np.float32)  # how strongly the grain shows on each class of ground
_ROUGHNESS[[TERRAIN, SIDEWALK]] = 0.3, 0.14


@dataclass
class Frame:
    """A picture in the making; the label sits in the image's fourth channel, so that both are written at once."""

    image: np.ndarray  # uint8 [h, w, 4]: RGB and trainId
    nearness: np.ndarray  # float32 [h, w]: one over the distance
    glow: np.ndarray | None  # uint8 [h, w]: light given off, above SOLID; after dusk alone


def _sky(world: World, camera: Camera, height: int, width: int) -> np.ndarray:
    """Gradient and clouds at half the size: uint8 [h/2, w/2, 4]. Clouds turn with the camera's heading."""
    light, shape = world.light, ((height + 1) // 2, (width + 1) // 2)
    rise = np.minimum(np.arange(shape[0], 0, -1, dtype=np.float32) / (0.15 * width), 1)[:, None] ** 0.7
    pitch = 400 / shape[1]  # cells of the noise per pixel
    turn = np.array([[pitch, 0, camera.heading * 400 + world.noise_shift[0] * 5],
                     [0, pitch * 2.5, world.noise_shift[1] * 5 - camera.horizon / 2 * pitch * 2.5]])  # fmt: skip
    cloud = cv2.warpAffine(_noise_tiles()[1], turn, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                           borderMode=cv2.BORDER_WRAP)  # fmt: skip
    sky = np.zeros((*shape, 4), np.float32)
    sky[..., 3] = SKY
    sky[..., :3] = (light["low"] + (light["top"] - light["low"]) * rise)[:, None]
    sky[..., :3] += (np.maximum(cloud + 0.1, -0.2) * light["clouds"])[..., None]
    # The whole picture is multiplied by the ambient light at the end, but the sky shines by itself.
    return cv2.transform(sky, np.diag([*(0.95 / np.maximum(light["ambient"], 0.3)), 1.0])).clip(0, 255).astype(np.uint8)


def _backdrop(world: World, camera: Camera, height: int, width: int) -> Frame:
    """Sky and ground; every row of the ground lies at one distance."""
    image = np.empty((height, width, 4), np.uint8)
    glow = np.zeros((height, width), np.uint8) if world.light["dusk"] else None
    nearness = np.full((height, width), 1 / SKY_DISTANCE, np.float32)
    split = min(max(math.ceil(camera.horizon - 0.5), 0), height)
    if split:
        image[:split] = cv2.resize(_sky(world, camera, split, width), (width, split))
    if split == height:
        return Frame(image, nearness, glow)
    rows = np.arange(split, height, dtype=np.float32) + 0.5 - camera.horizon
    depth = np.minimum(camera.focal * world.eye / np.maximum(rows, 1e-3), SKY_DISTANCE)
    z = camera.z + depth
    x = (np.arange(width, dtype=np.float32) + (0.5 - camera.cx)) * (depth / camera.focal)[:, None]
    x += (camera.x + camera.heading * depth - world.path(z)).astype(np.float32)[:, None]
    kind = np.where(z % (world.dash + world.gap) < world.dash, DASHED, PLAIN)
    for low, high, band in world.bands:
        kind[(z >= low) & (z < high)] = band
    cell = (x + HALF) * CELLS - 0.5
    np.clip(cell, 0, 2 * HALF * CELLS - 1, out=cell)
    blurred = np.clip(np.log2(depth * CELLS / camera.focal) / 2 + 1, 0, 2).astype(np.int32)
    across = np.ones(width, np.float32)
    ground = cv2.remap(world.sections, cell, np.outer((kind + 5 * blurred).astype(np.float32), across), cv2.INTER_LINEAR)
    label = cv2.remap(world.labels, cell, np.outer(kind.astype(np.float32), across), cv2.INTER_NEAREST)
    along = np.outer((z * CELLS % 512).astype(np.float32), across)
    texture = cv2.remap(_noise_tiles()[0], cell, along, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    shade = cv2.LUT(label, _ROUGHNESS)
    shade *= texture
    shade *= np.minimum(1, 18 / depth)[:, None]
    shade += 1
    if world.light["shadow"]:
        shade[_shadowed(world, x, z)] *= 1 - world.light["shadow"]
    image[split:] = cv2.multiply(ground, cv2.merge([shade] * 4), dtype=cv2.CV_8U)
    image[split:, :, 3] = label
    nearness[split:] = (1 / depth)[:, None]
    return Frame(image, nearness, glow)


def _shadowed(world: World, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The ground in the shadow of the houses on the sunny side: bool like x."""
    side = world.light["sun"]
    reach = np.zeros(len(z), np.float32)
    for low, high, where, top in world.facades:
        if where == side:
            reach[(z >= low) & (z < high)] = top * world.light["reach"]
    return x * side > (world.line[side] - reach)[:, None]


def _shadows_below(world: World, camera: Camera, frame: Frame, boxes: np.ndarray) -> None:
    """Soft dark spots under things: boxes [n, 3] of lateral position, depth and width."""
    mask = np.zeros(frame.nearness.shape, np.uint8)
    for x, depth, wide in boxes.tolist():
        scale = camera.focal / depth
        axes = wide / 2 * scale, wide / 2 * scale * min(1.0, world.eye * 1.3 / depth)
        centre = camera.cx + x * scale, camera.horizon + world.eye * scale
        if axes[0] > 1.5 and -axes[0] < centre[0] < mask.shape[1] + axes[0]:
            cv2.ellipse(mask, (round(centre[0] * 8), round(centre[1] * 8)),
                        (round(axes[0] * 8), max(8, round(axes[1] * 8))), 0, 0, 360, 255, -1, shift=3)  # fmt: skip
    dark = 0.75 - 0.5 * world.light["shadow"]
    cv2.copyTo(cv2.transform(frame.image, np.diag([dark, dark, dark, 1.0])), mask, frame.image)


def _project(world: World, camera: Camera, frame: Frame, time: int) -> None:
    """Draw every panel where it is at `time`, from near to far, through the depth buffer.

    Over an upright plane the nearness q is affine in the column u, and so are q·s for the texture's column s and
    q·t for its row: one homography a panel, computed for all of them at once.
    """
    panels, (height, width) = world.panels, frame.nearness.shape
    ends = np.array([panel[3:] for panel in panels])
    x, z, top = ends[:, 0:2] + ends[:, 5:6] * time, ends[:, 2:4] + ends[:, 6:7] * time, ends[:, 4]
    shadow, back, distant = ends[:, 7], ends[:, 8], ends[:, 2] == SKYLINE
    depth = np.where(distant[:, None], FAR * 1.3, z - camera.z)
    lateral = np.where(distant[:, None], x, x + world.path(z) - camera.x - camera.heading * depth)
    seen = (depth.max(1) > NEAR) & (distant | (depth.min(1) < FAR)) & (back * lateral.mean(1) <= 0)
    _shadows_below(world, camera, frame, np.stack([lateral.mean(1), depth.mean(1), shadow], 1)[
        seen & (shadow > 0) & (depth.min(1) > NEAR) & (depth.min(1) < 50)])  # fmt: skip
    step = depth[:, ::-1] - depth  # cut off what is behind the camera
    cut = np.where(depth < NEAR, (NEAR - depth) / np.where(step == 0, 1, step), 0)
    lateral, s = lateral + cut * (lateral[:, ::-1] - lateral), [0.0, 1.0] + cut * [1.0, -1.0]
    q = 1 / np.maximum(depth + cut * step, NEAR / 2)
    u = camera.cx + camera.focal * lateral * q
    thin = (step[:, 0] == 0) & (np.abs(u[:, 1] - u[:, 0]) < 1.2)
    u[thin] = u[thin].mean(1, keepdims=True) + [-0.6, 0.6]
    span, tall = u[:, 1] - u[:, 0], camera.focal * top
    foot = camera.horizon + camera.focal * world.eye * q
    left, right = np.floor(u.min(1)).clip(0).astype(int), np.ceil(u.max(1)).clip(max=width).astype(int)
    up = np.floor((foot - tall[:, None] * q).min(1)).clip(0).astype(int)
    down = np.ceil(foot.max(1)).clip(max=height).astype(int)
    area = np.abs(span) * tall * q.mean(1)
    order = np.flatnonzero(seen & (np.abs(span) > 0.5) & (area > 14) & (right > left) & (down > up))
    order = order[np.argsort(-q[order].max(1))]

    sharpness = 1 if width <= 640 else 2 if width <= 1280 else 4
    looks = []
    for k in order.tolist():
        levels = sprite(panels[k].kind, panels[k].variant, sharpness).levels
        looks.append(levels[min(len(levels) - 1, max(0, round(math.log2(levels[0][0].size / 4 / area[k]) / 2)))])
    # Rows of the homography from (u, v, 1): texture column, texture row, and the nearness that divides both.
    q, u, s, span, tall = q[order], u[order], s[order], span[order], tall[order]
    maps = np.zeros((len(order), 3, 3))
    for row, (start, end) in ((2, q.T), (0, (s * q).T)):
        maps[:, row, 0] = (end - start) / span
        maps[:, row, 2] = start - maps[:, row, 0] * u[:, 0]
    maps[:, 1, 1], maps[:, 1, 2] = 1 / tall, -camera.horizon / tall
    maps[:, 1] -= (world.eye / top[order] - 1)[:, None] * maps[:, 2]
    maps[:, :, 2] += maps[:, :, 0] * (left[order] + 0.5)[:, None] + maps[:, :, 1] * (up[order] + 0.5)[:, None]
    nearness = maps[:, 2].astype(np.float32)
    maps[:, :2] *= np.array([(image.shape[1] - 2, image.shape[0] - 2) for image, _ in looks]).reshape(-1, 2, 1)
    maps[:, :2] += 0.5 * maps[:, 2:]  # the border of one pixel less half a pixel to its centre
    paints = np.zeros((len(order), 4, 5))  # tint the colours; a single label replaces the fourth channel
    paints[:, range(3), range(3)] = [panels[k].tint for k in order.tolist()]
    paints[:, 3, 4] = [0 if isinstance(codes, np.ndarray) else codes for _, codes in looks]

    columns, solid = np.arange(width, dtype=np.float32), np.uint32(EDGE << 24)
    boxes = np.stack([left, right, up, down], 1)[order].tolist()
    for (image, codes), (x0, x1, y0, y1), (slope, _, first), matrix, paint in zip(
        looks, boxes, nearness, maps, paints, strict=True
    ):
        box, size = (slice(y0, y1), slice(x0, x1)), (x1 - x0, y1 - y0)
        near, before = columns[: x1 - x0] * slope + first, frame.nearness[box]
        visible = before < near
        if not visible.any():
            continue
        pixels = cv2.warpPerspective(image, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        visible &= pixels.view(np.uint32)[..., 0] >= solid  # the fourth channel is the highest byte
        painted = cv2.transform(pixels, paint)
        if isinstance(codes, np.ndarray):
            painted[..., 3] = cv2.warpPerspective(codes, matrix, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
        cv2.copyTo(painted, visible.view(np.uint8), frame.image[box])
        np.copyto(before, near, where=visible)
        if frame.glow is not None:
            np.copyto(frame.glow[box], pixels[..., 3], where=visible)


def _develop(world: World, frame: Frame, dice: Dice) -> np.ndarray:
    """Light, haze, lamps, lens and sensor: uint8 [h, w, 3]."""
    light, (height, width) = world.light, frame.nearness.shape
    gain, contrast = light["ambient"], light["contrast"]
    image = cv2.cvtColor(frame.image, cv2.COLOR_RGBA2RGB).astype(np.float32)
    # (image·gain + lamps − fog)·clear + fog, then the contrast about a middle grey
    lit = cv2.transform(image, np.column_stack([np.diag(gain * contrast), -light["fog"] * contrast]))
    if frame.glow is not None:
        lamps = image * (np.maximum(frame.glow, SOLID) - np.float32(SOLID))[..., None]
        lamps *= light["lamps"] * contrast / (255 - SOLID)
        lit += lamps + cv2.GaussianBlur(lamps, (0, 0), width / 80)
    clear = cv2.exp(-light["haze"] / frame.nearness)
    image = cv2.multiply(lit, cv2.merge([clear] * 3))
    offset = light["fog"] * contrast + 110 * (1 - contrast)
    if light["blur"] > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), light["blur"] * max(1.0, width / 512))
    top, left = dice.below(64), dice.below(64)
    image = cv2.scaleAdd(_sensor(height, width)[top : top + height, left : left + width], light["sensor"], image)
    return cv2.add(image, (*offset.tolist(), 0.0), dtype=cv2.CV_8U)


@lru_cache(maxsize=4)
def _sensor(height: int, width: int) -> np.ndarray:
    """A sheet of noise, larger than the picture; each frame cuts its own piece."""
    return np.random.default_rng(1).standard_normal((height + 64, width + 64, 3), dtype=np.float32)


def _bonnet(world: World, frame: Frame) -> None:
    """The hood of the camera's own car belongs to no class."""
    height, width = frame.nearness.shape
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 2, height), (round(width * 0.58), round(height * world.bonnet_height)), 0, 0, 360, 1, -1)
    v, u = np.nonzero(mask)
    gleam = 0.7 + 0.5 * (height - v) / (height * world.bonnet_height) + 0.1 * np.cos(u * 9 / width)
    frame.image[v, u, :3] = np.clip(np.array(world.bonnet_paint) * gleam[:, None], 0, 255)
    frame.image[v, u, 3], frame.nearness[v, u] = IGNORE, 1.0
    if frame.glow is not None:
        frame.glow[v, u] = 0


def draw_clip(index: int, *, seed: int, size: tuple[int, int] = (128, 256), frames: int) -> list[
    tuple[np.ndarray, np.ndarray]
]:  # fmt: skip
    """A drive through one scene: `frames` pairs as draw_scene gives them, the first being draw_scene's own."""
    world = World(seed, index, Dice(seed, index))
    world.populate(world.speed * frames)
    clip = []
    for time in range(frames):
        camera = _camera(world, *size, time)
        frame = _backdrop(world, camera, *size)
        _project(world, camera, frame, time)
        if world.bonnet:
            _bonnet(world, frame)
        clip.append((_develop(world, frame, Dice(seed, index, 0, time)), frame.image[..., 3].copy()))
    return clip


def draw_scene(index: int, *, seed: int, size: tuple[int, int] = (128, 256)) -> tuple[np.ndarray, np.ndarray]:
    """One scene, fixed by (seed, index): image uint8 [h, w, 3] RGB, and label uint8 [h, w] of trainIds 0..18 or 255."""
    return draw_clip(index, seed=seed, size=size, frames=1)[0]
