"""Street scenes as files in the layouts of Cityscapes and BDD100K, to test what reads those."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from data.labels import CITYSCAPES_TRAIN_IDS
from data.streets.scene import Size, draw_scene


def write_cityscapes(root: Path | str, *, scenes: Mapping[str, int], size: Size = (128, 256), seed: int = 0,
                     labels: Literal["labelIds", "labelTrainIds", "both"] = "labelIds") -> None:  # fmt: skip
    """`leftImg8bit/{split}/{city}/{city}_{seq}_{frame}_leftImg8bit.png` and `gtFine/…_gtFine_{labels}.png`.

    scenes gives the number of scenes of each split; labelIds has 0 (unlabelled) where there is no class. Each
    split has two cities. Scene k over all splits, in the order given, is draw_scene(k, seed=seed, size=size).
    """
    label_ids = np.zeros(256, np.uint8)
    for label_id, train_id in CITYSCAPES_TRAIN_IDS.items():
        label_ids[train_id] = label_id
    tables = {"labelIds": label_ids, "labelTrainIds": np.arange(256, dtype=np.uint8)}
    for split, place, index in _places(scenes):
        city = f"{split}{'burg' if place % 2 else 'stadt'}"
        stem = f"{split}/{city}/{city}_{index:06d}_000019"
        image, label = draw_scene(index, seed=seed, size=size)
        _write(Path(root) / "leftImg8bit" / f"{stem}_leftImg8bit.png", image[..., ::-1])
        for kind in tables if labels == "both" else [labels]:
            _write(Path(root) / "gtFine" / f"{stem}_gtFine_{kind}.png", tables[kind][label])


def write_bdd100k(root: Path | str, *, scenes: Mapping[str, int], size: Size = (128, 256), seed: int = 0,
                  layout: Literal["10k", "older"] = "10k") -> None:  # fmt: skip
    """JPEG images and trainId PNGs, numbered as write_cityscapes does.

    "10k" is `images/10k/{split}/ID.jpg` with `labels/sem_seg/masks/{split}/ID.png`; "older" is
    `images/{split}/ID.jpg` with `labels/{split}/ID_train_id.png`.
    """
    images, masks, suffix = {"10k": ("images/10k", "labels/sem_seg/masks", ""),
                             "older": ("images", "labels", "_train_id")}[layout]  # fmt: skip
    for split, _, index in _places(scenes):
        name = f"{index:08x}-{index * 2654435761 % 2**32:08x}"
        image, label = draw_scene(index, seed=seed, size=size)
        _write(Path(root) / images / split / f"{name}.jpg", image[..., ::-1])
        _write(Path(root) / masks / split / f"{name}{suffix}.png", label)


def _places(scenes: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """(split, place in the split, index of the scene)."""
    index = 0
    for split, count in scenes.items():
        for place in range(count):
            yield split, place, index
            index += 1


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path}: could not be written")
