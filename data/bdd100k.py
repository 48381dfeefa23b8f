"""BDD100K's semantic segmentation, in either layout; label values are trainIds, in some releases with a palette.

10k:    `images/10k/{split}/ID.jpg` and `labels/sem_seg/masks/{split}/ID.png`
older:  `images/{split}/ID.jpg` and `labels/{split}/ID_train_id.png`
"""

from pathlib import Path

from data.files import Pair, list_files, need_folder, pair_up
from errors import ConfigurationError

SUFFIX = "_train_id"
ADVICE = (
    "data.root must hold images/10k and labels/sem_seg/masks of BDD100K, or images/{train,val} and "
    "labels/{train,val} of its older release"
)
SUBSETS = (
    "the segmentation labels belong to the images of images/10k, and images/100k is another subset that lacks many"
)


def find_pairs(root: Path, split: str) -> list[Pair]:
    """The images of a split with their labels, by name. Raises ConfigurationError naming the file or folder."""
    new_images, new_labels = root / "images" / "10k", root / "labels" / "sem_seg" / "masks"
    old_images, old_labels = root / "images" / split, root / "labels" / split
    if new_images.is_dir() or new_labels.is_dir():
        if not new_images.is_dir():
            raise ConfigurationError(f"{new_images}: there is no such folder; {SUBSETS}")
        if not new_labels.is_dir() and old_labels.is_dir():
            raise ConfigurationError(
                f"{new_labels}: there is no such folder, but labels of the older layout in {old_labels}; {ADVICE}"
            )
        need_folder(new_labels, ADVICE)
        images = list_files(need_folder(new_images / split, ADVICE), (".jpg",))
        labels = list_files(need_folder(new_labels / split, _withheld(split)), (".png",))
    else:
        images = list_files(need_folder(old_images, ADVICE), (".jpg",))
        labels = list_files(need_folder(old_labels, _withheld(split)), (SUFFIX + ".png",))
        if images and not labels:
            raise ConfigurationError(f"{old_labels}: holds no file *{SUFFIX}.png; {ADVICE}")
    return pair_up(images, labels, lambda path: path.stem.removesuffix(SUFFIX), SUBSETS)


def _withheld(split: str) -> str:
    return "the labels of the test split are not public, use val" if split == "test" else ADVICE
