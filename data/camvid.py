"""CamVid in the layout of the SegNet tutorial: `{split}/NAME.jpg|png` and `{split}annot/NAME.png`.

Label values are 0..10 and 11 for void. The split is the literature's: 367 train, 101 val, 233 test at 360x480.
"""

from pathlib import Path

from data.files import Pair, list_files, need_folder, pair_up

ADVICE = "data.root must hold the folders train, trainannot, val, valannot, test, testannot of CamVid"


def find_pairs(root: Path, split: str) -> list[Pair]:
    """The images of a split with their labels, by name. Raises ConfigurationError naming the file or folder."""
    images = list_files(need_folder(root / split, ADVICE), (".jpg", ".jpeg", ".png"))
    labels = list_files(need_folder(root / f"{split}annot", ADVICE), (".png",))
    return pair_up(images, labels, lambda path: path.stem, "add or remove the file")
