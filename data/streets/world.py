"""What stands where: the street of one scene as upright panels and cross-sections of the ground, and its light.

The street winds along z (metres ahead); x is the way to the right of its line, in metres too. It is made of chunks
of 40 m, each a function of (seed, index, chunk), so a clip of any length continues the scene that it begins with.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np

from data.streets.canvas import ROAD, SIDEWALK, TERRAIN, Colour, Dice
from data.streets.sprites import sprite

START, FAR, CHUNK = 2.0, 70.0, 40.0  # metres: the camera's first place, how far it sees, a chunk's length
SKYLINE = -1.0  # the skyline's z is no place: it goes with the camera
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
        self.focal, self.eye, self.horizon = dice(1.05, 1.4), dice(1.2, 1.8), dice(0.34, 0.48)
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
        self.town = dice.pick([(8, 1, 1, 1), (4, 3, 2, 2), (1.5, 4, 2.5, 2.5)], [5, 3, 2])  # see _lots
        self.busy, self.crowd = dice(0.1, 1), dice(0, 1) ** 2
        self.rails = dice.chance(0.25) and self.oncoming > 0
        self.lanes = {lane: dice(0.9, 1.25) * self.speed * (-1 if lane < 0 else 1)
                      for lane in range(-self.oncoming, self.same + 1)}  # fmt: skip
        self.light = _light(dice)
        self.sections, self.labels = _cross_sections(self)
        self.bonnet = dice.chance(0.35)
        self.bonnet_height, self.bonnet_paint = dice(0.05, 0.13), dice.grey(25, 150)
        self.noise_shift = dice(0, 100), dice(0, 100)
        self.dash, self.gap = dice(2, 5), dice(3, 8)

    def path(self, z: Any) -> Any:
        """The street's line: its lateral offset at z (a number or an array)."""
        return self.bend * np.sin(z / self.bend_length + self.bend_phase)

    def populate(self, travel: float) -> None:
        reach = START + FAR + 6.5 + travel  # a crossing begins before its chunk
        for chunk in range(int(reach / CHUNK) + 1):
            _chunk(self, Dice(self.seed, self.index, 1, chunk), chunk * CHUNK)
        dice = Dice(self.seed, self.index, 2)
        for k in range(-2, 2):  # what closes the view
            _across(self, "skyline", dice.below(12), k * 55 + 30, 65, SKYLINE, dice(14, 30), _grey(dice, 0.5, 1))


def _light(dice: Dice) -> dict[str, Any]:
    """Time of day and weather: colours multiply the picture, so every class shares the same range of them."""
    hour = dice.pick(["day", "overcast", "low sun", "dusk"], [6, 4, 1.5, 0.8])
    level = {"day": dice(1.0, 1.3), "overcast": dice(0.9, 1.15), "low sun": dice(0.9, 1.2),
             "dusk": dice(0.45, 0.7)}  # fmt: skip
    warm = {"day": dice(-0.05, 0.08), "overcast": dice(-0.08, 0.04), "low sun": dice(0.05, 0.18),
            "dusk": dice(-0.2, 0.0)}[hour]  # fmt: skip
    top, low = {
        "day": ((dice(60, 140), dice(115, 175), dice(195, 240)), (dice(190, 225), dice(205, 230), dice(215, 240))),
        "overcast": (dice.grey(175, 225, 7), dice.grey(205, 245, 6)),
        "low sun": (
            (dice(110, 160), dice(130, 170), dice(170, 215)),
            (dice(235, 255), dice(190, 225), dice(130, 190)),
        ),
        "dusk": ((dice(25, 70), dice(35, 80), dice(70, 120)), (dice(90, 190), dice(80, 130), dice(90, 130))),
    }[hour]
    foggy = dice.chance(0.06)
    haze = dice(0.012, 0.03) if foggy else dice(0.001, 0.005)
    return {
        "ambient": np.array([1 + warm, 1, 1 - warm], np.float32) * level[hour],
        "dusk": hour == "dusk", "lamps": dice(0.9, 1.6),
        "top": np.array(low if foggy else top, np.float32), "low": np.array(low, np.float32),
        "fog": np.array(low, np.float32) * dice(0.75, 1.0), "haze": haze,
        "clouds": dice(0, 45) if hour != "dusk" else dice(0, 15),
        "shadow": 0.0 if foggy else {"day": dice(0.25, 0.5), "low sun": dice(0.25, 0.5)}.get(hour, dice(0, 0.15)),
        "sun": dice.pick([-1, 1]), "reach": dice(0.15, 0.9),
        "sensor": dice(1, 2.5) + (dice(1, 4) if hour == "dusk" else 0), "blur": dice(0, 0.8) ** 2,
        "contrast": dice(0.9, 1.12),
    }  # fmt: skip


def _grey(dice: Dice, low: float, high: float, spread: float = 0.06) -> Colour:
    value, warmth = dice(low, high), dice(-spread, spread)
    return value * (1 + warmth), value, value * (1 - warmth)


def _house(dice: Dice) -> Colour:
    tint = dice.pick([(1, 1, 1), (1, 0.93, 0.8), (0.95, 0.8, 0.6), (0.75, 0.5, 0.4), (0.6, 0.58, 0.56),
                      (0.7, 0.75, 0.82), (0.9, 0.7, 0.66), (0.82, 0.8, 0.78)])  # fmt: skip
    value = dice(0.7, 1.05)
    return [value * v for v in tint]


FENCES = [(1.0, 0.72, 0.5), (0.8, 0.55, 0.38), (0.6, 0.78, 0.6), (0.95, 0.92, 0.86)]  # wood, paint
LIVERIES = {"bus": [(1, 0.72, 0.2), (0.85, 0.25, 0.22), (0.3, 0.5, 0.85)],
            "truck": [(0.95, 0.95, 0.95), (0.98, 0.6, 0.25), (0.3, 0.45, 0.6)],
            "train": [(0.98, 0.92, 0.6), (0.5, 0.85, 0.55), (0.6, 0.9, 0.85)]}  # fmt: skip


def _livery(dice: Dice, kind: str) -> Colour:
    if kind == "car":
        return [v / 225 for v in (dice.grey(25, 235, 8) if dice.chance(0.6) else dice.paint(0.8))]
    value = dice(0.75, 1.05)
    return [value * v for v in dice.pick(LIVERIES[kind])]


def _cross_sections(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Colours uint8 [3 sharpnesses × 5 kinds, cells, 4] and labels [5, cells] over x, the look of the ground."""
    dice, n = world.dice, int(2 * HALF * CELLS)
    colours, labels = np.zeros((5, n, 4), np.uint8), np.zeros((5, n), np.uint8)

    def strip(low: float, high: float, colour: Colour, label: int, kinds: slice = slice(None)) -> None:
        cells = slice(max(0, round((low + HALF) * CELLS)), max(0, round((high + HALF) * CELLS)))
        colours[kinds, cells], labels[kinds, cells] = (*(min(255, v) for v in colour), 0), label

    def beside(place: tuple[int, float, float], colour: Colour, label: int) -> None:
        side, near, far = place
        strip(min(side * near, side * far), max(side * near, side * far), colour, label, slice(PLAIN, JUNCTION))

    asphalt, slabs = dice.grey(62, 110, 4), dice.grey(118, 190, 10)
    grass = dice.pick([(108, 136, 60), (126, 136, 70), (94, 120, 54), (150, 134, 88), (132, 114, 84)])
    strip(-HALF, HALF, asphalt, ROAD)
    for side in (-1, 1):
        edge, green, line = world.kerb[side], world.kerb[side] + world.verge[side], world.line[side]
        lot = (grass, TERRAIN) if dice.chance(0.7) else (slabs, SIDEWALK)
        paler, worn = dice(1.0, 1.35), dice(0.85, 1.2)
        kerbstone = [v * paler for v in slabs]
        beside((side, edge, edge + 0.2), kerbstone, SIDEWALK)
        beside((side, edge + 0.2, green), grass, TERRAIN)
        beside((side, max(green, edge + 0.2), line), slabs, SIDEWALK)
        beside((side, line, HALF), *lot)
        if world.parking[side]:
            beside((side, edge - 2.2, edge), [v * worn for v in asphalt], ROAD)
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
    begin, end = start, start + CHUNK
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
            kind, x = dice.pick(["car", "bus", "truck"], [2, 1, 1]), dice(-14, 14)
            _flat(world, dice, f"{kind} side", 24, x, start + 4, _livery(dice, kind), vx=dice(-0.6, 0.6))
    for side in (-1, 1):
        _lots(world, dice, side, begin, end)
        _kerbside(world, dice, side, begin, end)
    for lane, speed in world.lanes.items():
        z = start + 4 + dice(6, 60) / (0.4 + world.busy)
        rail = world.rails and lane == -world.oncoming
        while z < end - 6:
            kind = dice.pick(["car", "truck", "bus", "cyclist", "biker"], [24, 1.6, 2.4, 0.6, 1.2])
            kind = "train" if rail and dice.chance(0.7) else kind
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
            top = dice(4.5, 8) if world.town[0] < 2 else dice(6, 16)
            lit = 1.12 if side == world.light["sun"] * -1 else 0.85
            _along(world, "building", variant, side * back, z, z + length, top, [v * lit for v in tint])
            depth = dice(9, 14)
            _across(world, "building", variant + 7, side * (back + depth / 2), depth, z + 0.05, top, tint)
            world.facades.append((z, z + length, side, top))
            if back - line > 1 and lot == "building" and dice.chance(0.6):
                lot = dice.pick(["wall", "fence"])
        if lot in ("wall", "fence"):
            height, variant = dice(0.8, 2.2) + 0.6 * (lot == "wall"), dice.below(12)
            tint = _grey(dice, 0.65, 1.05, 0.12) if lot == "wall" else dice.pick(FENCES)
            count = max(1, round(length / 5))
            for k in range(count):
                ends = z + k * length / count, z + (k + 1) * length / count
                _along(world, lot, variant, side * line, *ends, height, tint)
            _across(world, lot, variant, side * (line + 4), 8, z + 0.1, height, tint)
        if lot != "building":
            for _ in range(1 + dice.below(3)):
                kind = dice.pick(["tree", "bush"], [3, 2])
                _plant(world, dice, kind, side * (line + dice(1.5, 9)), z + dice(0, length), dice(0.9, 1.6))
            if lot == "park" and dice.chance(0.5):
                _along(world, "bush", dice.below(16), side * (line + 0.3), z, z + length, dice(0.7, 1.8),
                       _grey(dice, 0.6, 1.1))  # fmt: skip
        z += length


def _kerbside(world: World, dice: Dice, side: int, z: float, end: float) -> None:
    """Everything that stands, walks or is parked between the road and the lots of one side."""
    kerb, line = world.kerb[side], world.line[side]
    if world.trees[side]:
        for at in np.arange(z + dice(0, 5), end, world.trees[side]):
            _plant(world, dice, "tree", side * (kerb + 0.3 + world.verge[side] / 2), float(at), dice(0.6, 1.1))
    for kind, variants, mean in (("lamp", 12, 1.0), ("sign", 36, 1.0), ("light", 12, 0.7), ("clutter", 20, 0.7)):
        while dice.chance(mean / (1 + mean)):
            _stand(world, dice, kind, variants, side * (kerb + dice(0.3, 0.7)), dice(z, end))
    if world.parking[side]:
        at = z + dice(0, 8)
        while at < end - 8:
            kind = dice.pick(["car", "truck"], [50, 1])
            at += _box(world, dice, kind, side * (kerb - 1.1), at, side < 0) + dice(1, 20)
    while dice.chance(0.55 + 0.35 * world.crowd):
        x, walk = side * dice(kerb + 0.3, line - 0.3), dice(-0.08, 0.08) * dice.chance(0.7)
        at = dice(z, end)
        for _ in range(1 + dice.below(3) * dice.chance(0.4)):
            _person(world, dice, x + dice(-0.5, 0.5), at + dice(0, 0.6), vz=walk)
    while dice.chance(0.6):
        kind, view = dice.pick(["bicycle", "motorcycle"], [3, 2]), dice.pick(["side", "rear"], [2, 1])
        x = side * dice(kerb + 0.3, line - 0.2)
        _flat(world, dice, f"{kind} {view}", 8, x, dice(z, end), _grey(dice, 0.6, 1.2))
    if dice.chance(0.14):
        kind = dice.pick(["cyclist", "biker"], [3, 1])
        _flat(world, dice, f"{kind} rear", 12, side * (kerb - world.parking[side] - 0.5), dice(z, end),
              _grey(dice, 0.7, 1.1), vz=side * 0.15)  # fmt: skip


def _crossing(world: World, dice: Dice, z: float) -> None:
    """People and now and then a cyclist on a zebra crossing."""
    while dice.chance(0.45):
        _person(world, dice, dice(-world.kerb[-1], world.kerb[1]), z + dice(-1, 1), vx=dice(-0.08, 0.08))
    if dice.chance(0.35):
        kind = dice.pick(["cyclist", "biker"], [2, 1])
        _flat(world, dice, f"{kind} side", 12, dice(-5, 5), z, _grey(dice, 0.7, 1.1), vx=dice(-0.2, 0.2))


def _across(world: World, kind: str, variant: int, x: float, width: float, z: float, top: float, tint: Colour,
            vx: float = 0.0, vz: float = 0.0, shadow: float = 0.0) -> None:  # fmt: skip
    world.panels.append(Panel(kind, variant, tint, x - width / 2, x + width / 2, z, z, top, vx, vz, shadow))


def _along(world: World, kind: str, variant: int, x: float, z0: float, z1: float, top: float, tint: Colour,
           vz: float = 0.0, back: int = 0) -> None:  # fmt: skip
    world.panels.append(Panel(kind, variant, tint, x, x, z0, z1, top, 0.0, vz, 0.0, back))


def _flat(world: World, dice: Dice, kind: str, variants: int, x: float, z: float, tint: Colour, *,
          size: float = 1.0, vx: float = 0.0, vz: float = 0.0, shadow: float = 1.0) -> None:  # fmt: skip
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


def _plant(world: World, dice: Dice, kind: str, x: float, z: float, size: float) -> None:
    _flat(world, dice, kind, 36, x, z, _grey(dice, 0.7, 1.2, 0.1), size=size)


def _box(world: World, dice: Dice, kind: str, x: float, z: float, towards: bool, vz: float = 0.0) -> float:
    """A vehicle seen from its end and along its inner side; returns its length."""
    variant, tint = dice.below(24), _livery(dice, kind)
    end, flank = sprite(f"{kind} {'front' if towards else 'rear'}", variant, 1), sprite(f"{kind} side", variant, 1)
    _across(world, f"{kind} {'front' if towards else 'rear'}", variant, x, end.width, z, end.height, tint, 0, vz,
            end.width * 1.25)  # fmt: skip
    near, far = (z + flank.width, z) if towards else (z, z + flank.width)
    for side in (-1, 1):
        _along(world, f"{kind} side", variant, x + side * end.width / 2, near, far, flank.height,
               [v * 0.85 for v in tint], vz, side)  # fmt: skip
    return flank.width
