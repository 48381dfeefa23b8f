"""The procedural street scenes: fixed by their seed, of the right shape and statistics, coherent in time."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data import bdd100k, cityscapes
from data.labels import IGNORE_INDEX, label_id_table
from data.streets import draw_clip, draw_scene, write_bdd100k, write_cityscapes

SIZE = (64, 128)
ROAD, BUILDING, CAR, RIDER, TRAIN, MOTORCYCLE, BICYCLE = 0, 2, 13, 12, 16, 17, 18


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, np.ndarray]:
    """200 images and labels at 64x128."""
    cv2.setNumThreads(1)
    pairs = [draw_scene(index, seed=3, size=SIZE) for index in range(200)]
    return np.stack([image for image, _ in pairs]), np.stack([label for _, label in pairs])


def test_a_scene_is_fixed_by_seed_and_index() -> None:
    image, label = draw_scene(5, seed=1)
    again, label_again = draw_scene(5, seed=1)
    assert np.array_equal(image, again)
    assert np.array_equal(label, label_again)
    for other in (draw_scene(6, seed=1), draw_scene(5, seed=2)):
        assert (label != other[1]).mean() > 0.1


@pytest.mark.parametrize("size", [(128, 256), (32, 48), (97, 131), (360, 480), (160, 90), (16, 16)])
def test_any_size(size: tuple[int, int]) -> None:
    for index in range(3):
        image, label = draw_scene(index, seed=0, size=size)
        assert image.shape == (*size, 3)
        assert label.shape == size
        assert image.dtype == label.dtype == np.uint8
        assert image.flags.c_contiguous
        assert label.flags.c_contiguous


def test_sizes_show_the_same_scene() -> None:
    small, large = (draw_scene(4, seed=0, size=size)[1] for size in ((96, 192), (288, 576)))
    reduced = cv2.resize(large, (192, 96), interpolation=cv2.INTER_NEAREST)
    assert (small == reduced).mean() > 0.9


def test_labels_and_long_tail(scenes: tuple[np.ndarray, np.ndarray]) -> None:
    counts = np.bincount(scenes[1].ravel(), minlength=256)
    assert set(np.flatnonzero(counts)) == {*range(19), IGNORE_INDEX}  # all classes, and some pixels of none
    share = counts / counts.sum()
    assert 0.25 < share[ROAD] < 0.45
    assert 0.12 < share[BUILDING] < 0.3
    assert 0.003 < share[IGNORE_INDEX] < 0.08
    for rare in (RIDER, TRAIN, MOTORCYCLE, BICYCLE):
        assert share[rare] < 0.015
    assert share[[MOTORCYCLE, BICYCLE]].max() < share[CAR] / 10


def test_colour_alone_does_not_tell_the_class(scenes: tuple[np.ndarray, np.ndarray]) -> None:
    """Nearest mean colour of a class, fitted and tested on the same scenes, does badly."""
    images, labels = scenes[0].reshape(-1, 3)[::3].astype(np.float32), scenes[1].ravel()[::3]
    images, labels = images[labels < 19], labels[labels < 19]
    means = np.stack([images[labels == c].mean(0) for c in range(19)])
    guess = (images @ (2 * means.T) - (means**2).sum(1)).argmax(1)
    matrix = np.bincount(labels.astype(np.int64) * 19 + guess, minlength=361).reshape(19, 19)
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert iou.mean() < 0.2
    spread = np.stack([images[labels == c].std(0).mean() for c in range(19)])
    assert spread.min() > 15  # every class varies in colour


@pytest.mark.parametrize("index", [0, 7])
def test_a_clip_moves_and_hangs_together(index: int) -> None:
    clip = draw_clip(index, seed=2, size=SIZE, frames=12)
    assert len(clip) == 12
    first = draw_scene(index, seed=2, size=SIZE)
    assert np.array_equal(clip[0][0], first[0])
    assert np.array_equal(clip[0][1], first[1])
    shorter = draw_clip(index, seed=2, size=SIZE, frames=4)
    for (image, label), (image_again, label_again) in zip(shorter, clip, strict=False):
        assert np.array_equal(image, image_again)
        assert np.array_equal(label, label_again)
    near = [(a == b).mean() for (_, a), (_, b) in zip(clip, clip[1:], strict=False)]
    assert min(near) > 0.7
    assert max(near) < 1
    assert (clip[0][1] == clip[-1][1]).mean() < np.mean(near)  # it goes on moving
    change = [cv2.absdiff(a, b).mean() for (a, _), (b, _) in zip(clip, clip[1:], strict=False)]
    assert max(change) < 0.6 * cv2.absdiff(clip[0][0], draw_scene(index + 1, seed=2, size=SIZE)[0]).mean()


def test_cityscapes_files_hold_the_labels(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, scenes={"train": 3, "val": 1}, size=SIZE, seed=4)
    pairs, label_ids = cityscapes.find_pairs(tmp_path, "train")
    assert label_ids
    assert len(pairs) == 3
    images = sorted((tmp_path / "leftImg8bit").rglob("*.png"), key=lambda path: path.name.split("_")[1])
    assert len(images) == 4
    for index, path in enumerate(images):
        image, label = draw_scene(index, seed=4, size=SIZE)
        assert np.array_equal(cv2.imread(str(path))[..., ::-1], image)
        stored = str(path).replace("leftImg8bit.png", "gtFine_labelIds.png").replace("leftImg8bit", "gtFine")
        assert np.array_equal(label_id_table()[cv2.imread(stored, cv2.IMREAD_UNCHANGED)], label)


@pytest.mark.parametrize("layout", ["10k", "older"])
def test_bdd100k_files_hold_the_labels(tmp_path: Path, layout: str) -> None:
    write_bdd100k(tmp_path, scenes={"train": 2, "val": 1}, size=SIZE, seed=4, layout=layout)  # type: ignore[arg-type]
    pairs = [*bdd100k.find_pairs(tmp_path, "train"), *bdd100k.find_pairs(tmp_path, "val")]
    masks = sorted((tmp_path / "labels").rglob("*.png"), key=lambda path: path.name)
    assert len(pairs) == len(masks) == 3
    for index, path in enumerate(masks):
        assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), draw_scene(index, seed=4, size=SIZE)[1])
