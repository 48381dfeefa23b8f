"""Cityscapes: `leftImg8bit/{split}/{city}/{city}_{seq}_{frame}_leftImg8bit.png` and
`gtFine/{split}/{city}/{city}_{seq}_{frame}_gtFine_labelIds.png` (or `…_labelTrainIds.png`).
"""

from pathlib import Path

from data.files import Pair, list_files, need_folder, pair_up

ADVICE = "data.root must hold the folders leftImg8bit and gtFine of Cityscapes"
IMAGE = "_leftImg8bit.png"
LABEL_IDS = "_gtFine_labelIds.png"
TRAIN_IDS = "_gtFine_labelTrainIds.png"


def find_pairs(root: Path, split: str) -> tuple[list[Pair], bool]:
    """The images of a split with their labels, and whether these are labelIds (True) or trainIds.

    labelIds are taken where a split has both, for they are what Cityscapes itself distributes. Raises
    ConfigurationError naming the file or folder.
    """
    images = _files(need_folder(root / "leftImg8bit" / split, ADVICE), IMAGE)
    folder = need_folder(root / "gtFine" / split, ADVICE)
    labels = _files(folder, LABEL_IDS)
    label_ids = bool(labels)
    if not label_ids:
        labels = _files(folder, TRAIN_IDS)
    pairs = pair_up(images, labels, _name, "add or remove the file")
    return pairs, label_ids


def _files(folder: Path, suffix: str) -> list[Path]:
    cities = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for city in cities for path in list_files(city, (suffix,))]


def _name(path: Path) -> str:
    """`aachen_000000_000019`, which is unique in the data set and common to image and label."""
    for suffix in (IMAGE, LABEL_IDS, TRAIN_IDS):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem
