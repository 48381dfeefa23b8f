"""One frame of a world: ground and things are projected into a depth buffer, then lit and developed.

Labels are written with the colours, so they are exact at every pixel. Textures are fixed to the things and to the
ground, so the frames of a clip agree with each other but for the sensor's noise.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from data.streets.canvas import EDGE, IGNORE, SIDEWALK, SKY, SOLID, TERRAIN, Dice
from data.streets.sprites import sprite
from data.streets.world import CELLS, DASHED, FAR, HALF, PLAIN, SKYLINE, START, World

Size = tuple[int, int]  # height, width
Pair = tuple[np.ndarray, np.ndarray]  # image, label
NEAR, SKY_DISTANCE = 1.0, 500.0  # metres


@lru_cache(maxsize=1)
def _noise_tiles() -> tuple[np.ndarray, np.ndarray]:
    """Periodic smooth noise, float32 in about ±1: for the ground (two periods wide) and for clouds."""
    dice = Dice(0)

    def periodic(cells: int) -> np.ndarray:
        grid = np.pad(dice.rng.random((cells, cells), dtype=np.float32) - 0.5, 4, mode="wrap")
        size, edge = 512 // cells * (cells + 8), 512 // cells * 4
        field = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        return field[edge : edge + 512, edge : edge + 512] * 2

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
    z = START + world.speed * frame
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
    sky[..., :3] *= 0.95 / np.maximum(light["ambient"], 0.3)
    return sky.clip(0, 255).astype(np.uint8)


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
        if low < camera.z + FAR:
            kind[(z >= low) & (z < high)] = band
    cell = (x + HALF) * CELLS - 0.5
    np.clip(cell, 0, 2 * HALF * CELLS - 1, out=cell)
    blurred = np.clip(np.log2(depth * CELLS / camera.focal) / 2 + 1, 0, 2).astype(np.int32)
    across = np.ones(width, np.float32)
    row = (kind + 5 * blurred).astype(np.float32)
    ground = cv2.remap(world.sections, cell, np.outer(row, across), cv2.INTER_LINEAR)
    label = cv2.remap(world.labels, cell, np.outer(kind.astype(np.float32), across), cv2.INTER_NEAREST)
    along = np.outer((z * CELLS % 512).astype(np.float32), across)
    texture = cv2.remap(_noise_tiles()[0], cell, along, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    shade = 1 + cv2.LUT(label, _ROUGHNESS) * texture * np.minimum(1, 18 / depth)[:, None]
    if world.light["shadow"]:
        shade[_shadowed(world, camera, x, z)] *= 1 - world.light["shadow"]
    image[split:] = cv2.multiply(ground, cv2.merge([shade] * 4), dtype=cv2.CV_8U)
    image[split:, :, 3] = label
    nearness[split:] = (1 / depth)[:, None]
    return Frame(image, nearness, glow)


def _shadowed(world: World, camera: Camera, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The ground in the shadow of the houses on the sunny side: bool like x."""
    side = world.light["sun"]
    reach = np.zeros(len(z), np.float32)
    for low, high, where, top in world.facades:
        if where == side and low < camera.z + FAR:
            reach[(z >= low) & (z < high)] = top * world.light["reach"]
    return x * side > (world.line[side] - reach)[:, None]


def _shadows_below(world: World, camera: Camera, frame: Frame, boxes: np.ndarray) -> None:
    """Soft dark spots under things: boxes [n, 3] of lateral position, depth and width."""
    height, width = frame.nearness.shape
    mask = np.zeros((height, width), np.uint8)
    for x, depth, wide in boxes.tolist():
        scale = camera.focal / depth
        axes = wide / 2 * scale, wide / 2 * scale * min(1.0, world.eye * 1.3 / depth)
        centre = camera.cx + x * scale, camera.horizon + world.eye * scale
        if axes[0] > 1.5 and -axes[0] < centre[0] < width + axes[0]:
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
            flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
            painted[..., 3] = cv2.warpPerspective(codes, matrix, size, flags=flags)
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
    developed = cv2.multiply(lit, cv2.merge([clear] * 3))
    if light["blur"] > 0.25:
        developed = cv2.GaussianBlur(developed, (0, 0), light["blur"] * max(1.0, width / 512))
    top, left = dice.below(64), dice.below(64)
    noise = _sensor(height, width)[top : top + height, left : left + width]
    developed = cv2.scaleAdd(noise, light["sensor"], developed)
    offset = np.append(light["fog"] * contrast + 110 * (1 - contrast), 0.0)
    return np.asarray(cv2.add(developed, offset, dtype=cv2.CV_8U))


@lru_cache(maxsize=4)
def _sensor(height: int, width: int) -> np.ndarray:
    """A sheet of noise, larger than the picture; each frame cuts its own piece."""
    return np.random.default_rng(1).standard_normal((height + 64, width + 64, 3), dtype=np.float32)


def _bonnet(world: World, frame: Frame) -> None:
    """The hood of the camera's own car belongs to no class."""
    height, width = frame.nearness.shape
    mask = np.zeros((height, width), np.uint8)
    axes = round(width * 0.58), round(height * world.bonnet_height)
    cv2.ellipse(mask, (width // 2, height), axes, 0, 0, 360, 1, -1)
    v, u = np.nonzero(mask)
    gleam = 0.7 + 0.5 * (height - v) / (height * world.bonnet_height) + 0.1 * np.cos(u * 9 / width)
    frame.image[v, u, :3] = np.clip(np.array(world.bonnet_paint) * gleam[:, None], 0, 255)
    frame.image[v, u, 3], frame.nearness[v, u] = IGNORE, 1.0
    if frame.glow is not None:
        frame.glow[v, u] = 0


def draw_clip(index: int, *, seed: int, size: Size = (128, 256), frames: int) -> list[Pair]:
    """A drive through one scene: `frames` pairs as draw_scene gives them, the first being draw_scene's own.

    A longer clip begins with the shorter one. The camera and the things move by metres a frame that suit about 17
    frames a second.
    """
    world = World(seed, index, Dice(seed, index))
    world.populate(2.25 * world.speed * (frames - 1))  # the camera's way, and that of what comes towards it
    clip = []
    for time in range(frames):
        camera = _camera(world, *size, time)
        frame = _backdrop(world, camera, *size)
        _project(world, camera, frame, time)
        if world.bonnet:
            _bonnet(world, frame)
        clip.append((_develop(world, frame, Dice(seed, index, 0, time)), frame.image[..., 3].copy()))
    return clip


def draw_scene(index: int, *, seed: int, size: Size = (128, 256)) -> Pair:
    """One scene, fixed by (seed, index), at any size (height, width), which changes its detail alone.

    Returns the image, uint8 [h, w, 3] RGB, and the label, uint8 [h, w]: trainIds 0..18, and 255 for the bonnet of
    the camera's car and for clutter.
    """
    return draw_clip(index, seed=seed, size=size, frames=1)[0]
