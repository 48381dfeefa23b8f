"""Augmentation: its geometry replays exactly, its colours and padding are what the text says."""

from typing import Any

import cv2
import numpy as np
import pytest

from data import transforms
from data.labels import IGNORE_INDEX
from data.transforms import Appearance, Geometry

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def full_nearest(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole label resized by nearest neighbour with pixel centres, pixel by pixel."""
    rows = [int((i + 0.5) * label.shape[0] / height) for i in range(height)]
    columns = [int((j + 0.5) * label.shape[1] / width) for j in range(width)]
    return label[np.ix_(rows, columns)]


def replay(label: np.ndarray, geometry: Geometry, crop: tuple[int, int]) -> np.ndarray:
    """A geometry's definition, step by step: resize, pad, crop, mirror."""
    _, _, height, width, top, left, flip = geometry
    scaled = full_nearest(label, height, width)
    below, right = max(0, crop[0] - height), max(0, crop[1] - width)
    padded = np.pad(scaled, ((0, below), (0, right)), constant_values=IGNORE_INDEX)
    cropped = padded[top : top + crop[0], left : left + crop[1]]
    return cropped[:, ::-1] if flip else cropped


def some_geometries(source: tuple[int, int], crop: tuple[int, int], number: int) -> list[Geometry]:
    settings: dict[str, Any] = {"scale": (0.4, 2.1), "flip": 0.5, "jitter": 0.3, "blur": 0.5}
    return [transforms.draw(np.random.default_rng([3, 0, p]), source, crop, **settings)[0] for p in range(number)]


@pytest.mark.parametrize(("source", "crop"), [((36, 48), (24, 32)), ((50, 41), (64, 20)), ((7, 9), (5, 31))])
def test_label_crop_is_the_geometry(source: tuple[int, int], crop: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(0, 19, source).astype(np.uint8)
    flips = set()
    for geometry in some_geometries(source, crop, 60):
        found = transforms.crop_label(label, geometry, crop)
        assert found.shape == crop
        np.testing.assert_array_equal(found, replay(label, geometry, crop))
        flips.add(geometry.flip)
    assert flips == {0, 1}


def test_image_crop_is_the_crop_of_the_resized_image() -> None:
    """A smooth image, so that OpenCV 4's rounding of coordinates to 1/32 pixel stays within a few levels."""
    source, crop = (90, 120), (60, 80)
    y, x = np.mgrid[:90, :120].astype(np.float64)
    image = np.stack([2 * x, 2 * y, 120 + 80 * np.sin(x / 9) * np.cos(y / 7)], -1).astype(np.uint8)
    for geometry in some_geometries(source, crop, 40):
        _, _, height, width, top, left, flip = geometry
        whole = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        expected = whole[top : top + crop[0], left : left + crop[1]]
        expected = expected[:, ::-1] if flip else expected
        found = transforms.crop_image(image, geometry, crop)
        assert found.shape == expected.shape
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 3
        assert difference.mean() < 0.6


def test_image_and_label_stay_together() -> None:
    """An image that is its own label still is, away from the edges that bilinear mixing blurs."""
    label = np.zeros((60, 80), np.uint8)
    label[20:40, 30:55] = 200
    image = np.repeat(label[:, :, None], 3, 2)
    for geometry in some_geometries((60, 80), (40, 48), 30):
        part = transforms.crop_image(image, geometry, (40, 48))[:, :, 0]
        found = transforms.crop_label(label, geometry, (40, 48))
        columns = slice(48 - part.shape[1], 48) if geometry.flip else slice(0, part.shape[1])
        beside = found[: part.shape[0], columns]
        sure = (part == 0) | (part == 200)
        assert sure.mean() > 0.7
        assert (beside[sure] == part[sure]).mean() > 0.995


@pytest.mark.parametrize("flip", [0, 1])
def test_padding_is_zero_after_normalisation_and_ignored(flip: int) -> None:
    image = np.full((10, 12, 3), 200, np.uint8)
    geometry = Geometry(10, 12, 10, 12, 0, 0, flip)
    crop = (16, 20)
    table = transforms.colour_table(MEAN, STD, Appearance())
    found = transforms.finish_image(
        transforms.crop_image(image, geometry, crop), crop, flip, table, Appearance()
    ).transpose(2, 0, 1)
    label = transforms.crop_label(np.ones((10, 12), np.uint8), geometry, crop)
    assert found.shape == (3, 16, 20)
    assert found.dtype == np.float32
    padding = label == IGNORE_INDEX
    assert padding.sum() == 16 * 20 - 10 * 12
    assert (found[:, padding] == 0).all()
    assert (found[:, ~padding] != 0).all()
    assert (label[:10, 8:] == 1).all() if flip else (label[:10, :12] == 1).all()


def test_normalisation_is_the_formula() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    table = transforms.colour_table(MEAN, STD, Appearance())
    found = transforms.finish_image(image, (5, 6), 0, table, Appearance()).transpose(2, 0, 1)
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-6)


def test_colours() -> None:
    table = transforms.colour_table((0, 0, 0), (1, 1, 1), Appearance(contrast=0.5, gains=(1.0, 1.2, 2.0)))
    np.testing.assert_allclose(table[0], (np.arange(256) * 0.5 + 64) / 255, atol=1e-6)
    assert table[2, 255] == 1  # clipped
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    plain = transforms.colour_table((0, 0, 0), (1, 1, 1), Appearance())
    grey = transforms.finish_image(image, (8, 8), 0, plain, Appearance(saturation=0.0)).transpose(2, 0, 1)
    np.testing.assert_array_equal(grey[0], grey[1])
    np.testing.assert_array_equal(grey[0], grey[2])
    blurred = transforms.finish_image(image, (8, 8), 0, plain, Appearance(sigma=1.0)).transpose(2, 0, 1)
    assert blurred.std() < 0.8 * (image / 255).std()


def test_switching_one_part_off_leaves_the_others() -> None:
    def draw(**changed: float) -> tuple[Geometry, Appearance]:
        settings: dict[str, Any] = {"scale": (0.5, 2.0), "flip": 0.5, "jitter": 0.3, "blur": 0.5} | changed
        return transforms.draw(np.random.default_rng([0, 1, 2]), (36, 48), (24, 24), **settings)

    geometry, appearance = draw()
    assert draw(jitter=0.0)[0] == geometry
    assert draw(jitter=0.0)[1] == Appearance(sigma=appearance.sigma)
    assert draw(flip=0.0)[0][:6] == geometry[:6]
    assert draw(blur=0.0)[1][:3] == appearance[:3]


def test_resize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(transforms.resize_image(image, (8, 8)), image)
    halved = transforms.resize_image(image, (4, 4))
    mean = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(halved - mean).max() <= 0.5
    label = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(transforms.resize_label(label, (16, 16)), label.repeat(2, 0).repeat(2, 1))
