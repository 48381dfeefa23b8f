"""The two label spaces: the 19 classes of Cityscapes (also BDD100K and streets) and the 11 of CamVid.

A label file is turned into trainIds by a table of 256 entries: trainIds from 0, `IGNORE_INDEX` for pixels
without a class, `INVALID` for values that such a file cannot hold.
"""

from dataclasses import dataclass

import numpy as np

IGNORE_INDEX = 255  # the label of a pixel that has no class, everywhere after loading
INVALID = 254  # in a table only: a value that is an error
UNLABELLED = 253  # after loading: of all pixels of an image that has no label, of which only a teacher can speak


@dataclass(frozen=True)
class Labels:
    """Class names and RGB colours (0..255), in the order of the trainIds."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.names)


CITYSCAPES = Labels(
    names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    colours=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
        (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
)  # fmt: skip
"""The 19 evaluated classes of Cityscapes with its official colours."""

CAMVID = Labels(
    names=(
        "sky", "building", "pole", "road", "pavement", "tree", "signsymbol", "fence", "car", "pedestrian",
        "bicyclist",
    ),
    colours=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip
"""The 11 classes of the usual CamVid split, with the colours that SegNet and its followers draw them in."""

CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
"""Cityscapes' labelId -> trainId; every other labelId (0..33, and -1, stored as 255) is ignored."""


def train_id_table(classes: int) -> np.ndarray:
    """uint8 [256]: the identity on 0..classes-1 and 255, all else INVALID."""
    table = np.full(256, INVALID, np.uint8)
    table[:classes] = np.arange(classes)
    table[IGNORE_INDEX] = IGNORE_INDEX
    return table


def label_id_table() -> np.ndarray:
    """uint8 [256]: Cityscapes' labelIds to trainIds; ids 0..33 without a class and 255 (-1) are ignored."""
    table = np.full(256, INVALID, np.uint8)
    table[:34] = IGNORE_INDEX
    table[255] = IGNORE_INDEX
    for label_id, train_id in CITYSCAPES_TRAIN_IDS.items():
        table[label_id] = train_id
    return table


def camvid_table() -> np.ndarray:
    """uint8 [256]: 0..10 are the classes, 11 (void) and 255 are ignored."""
    table = train_id_table(len(CAMVID))
    table[11] = IGNORE_INDEX
    return table
