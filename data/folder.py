"""A data set of your own: `images/{split}/**`, `masks/{split}/**` and a file of its classes; and images alone.

    names: [road, person]                      # in the order of the model's outputs
    colours: [[128, 64, 128], [220, 20, 60]]   # red, green, blue of each; left out: a palette
    values: {road: 7, person: [24, 25]}        # of each class in the masks; left out: 0, 1, …
    ignore: [0]                                # further values in the masks that are no class; 255 always is none

Images are JPEG or PNG, masks PNG with one value a pixel; they belong together by path, without the ending.
"""

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.dataset import SegmentationData, Settings
from data.files import Pair, check_file, check_one_size, map_threads, need_folder, pair_up, read_image
from data.labels import IGNORE_INDEX, INVALID, UNLABELLED, Labels
from errors import ConfigurationError

IMAGES = (".jpg", ".jpeg", ".png")
ADVICE = "data.root must hold images/{train,val,test} and masks/{train,val,test}"
KEYS = ("names", "colours", "values", "ignore")


class Classes(NamedTuple):
    """What a classes.yaml says."""

    labels: Labels
    table: np.ndarray
    """uint8 [256], from a mask's values to trainIds; see data/labels.py."""


def find_pairs(root: Path, split: str) -> list[Pair]:
    """The images of a split with their masks, by path. Raises ConfigurationError naming the file or folder."""
    images, masks = (need_folder(root / kind / split, ADVICE) for kind in ("images", "masks"))
    below = {path: folder for folder in (images, masks) for path in find_files(folder, IMAGES)}
    pairs = pair_up(
        [path for path, folder in below.items() if folder == images],
        [path for path, folder in below.items() if folder == masks and path.suffix.lower() == ".png"],
        lambda path: path.relative_to(below[path]).with_suffix("").as_posix(),
        "add or remove the file",
    )
    return [pair._replace(name=pair.name.replace("/", "--")) for pair in pairs]  # names become those of files


def find_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The visible files in and below a folder whose names end in one of `suffixes`, in whatever case, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_classes(path: Path) -> Classes:
    """The classes that a YAML file names. Raises ConfigurationError naming the file and the key that is wrong."""
    said = _load(path)
    for key in said:
        if key not in KEYS:
            raise _wrong(path, str(key), f"no such key; {_suggestion(str(key), KEYS)}")
    names = _list(path, "names", said.get("names"), str, "words, as in [road, person]")
    if not names:
        raise _wrong(path, "names", "there are none; name the classes, as in [road, person]")
    if len(names) > UNLABELLED:
        raise _wrong(path, "names", f"{len(names)} classes are too many; a label has room for {UNLABELLED}")
    for name in names:
        if names.count(name) > 1:
            raise _wrong(path, "names", f"{name!r} is there twice; name it once")
    labels = Labels(tuple(names), _colours(path, said.get("colours"), len(names)))
    return Classes(labels, _table(path, names, said.get("values"), said.get("ignore")))


def _load(path: Path) -> dict[Any, Any]:
    try:
        said = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it is not valid"
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigurationError(f"{path}: cannot be read as YAML ({where}{problem}); correct it") from error
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path}: there is no such file; write one with the names of the classes, or give data.classes"
        ) from error
    except (OmegaConfBaseException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["it is not valid"])[0]
        raise ConfigurationError(f"{path}: cannot be read as YAML ({reason}); correct it") from error
    if not isinstance(said, dict):
        raise ConfigurationError(f"{path}: must be a mapping, key: value on each line")
    return said


def _colours(path: Path, said: Any, number: int) -> tuple[tuple[int, int, int], ...]:
    if said is None:
        return palette(number)
    colours = _list(path, "colours", said, list, "[red, green, blue] of each class")
    if len(colours) != number:
        raise _wrong(path, "colours", f"{len(colours)} for {number} classes; give one each, or leave them out")
    found = []
    for colour in colours:
        red_green_blue = _values(path, "colours", colour)
        if len(red_green_blue) != 3:
            raise _wrong(path, "colours", f"{colour} is no colour; give [red, green, blue], each from 0 to 255")
        found.append((red_green_blue[0], red_green_blue[1], red_green_blue[2]))
    return tuple(found)


def _table(path: Path, names: list[str], said: Any, ignored: Any) -> np.ndarray:
    """uint8 [256] of `values`, or the positions in `names`, and `ignore`."""
    values = {name: [i] for i, name in enumerate(names)}
    if said is not None:
        if not isinstance(said, dict):
            raise _wrong(path, "values", "must be a mapping from classes to values, as in {road: 7}")
        for name in said:
            if name not in names:
                raise _wrong(path, f"values.{name}", f"no such class; {_suggestion(str(name), names)}")
        for name in names:
            if name not in said:
                raise _wrong(
                    path, "values", f"{name!r} has none; give the values of every class, or leave them out"
                )
            given = said[name] if isinstance(said[name], list) else [said[name]]
            values[name] = _values(path, f"values.{name}", given)
    table = np.full(256, INVALID, np.uint8)
    owner = {IGNORE_INDEX: "ignored always"}
    taken = [(f"values.{name}", repr(name), i, values[name]) for i, name in enumerate(names)]
    for value in _values(path, "ignore", [] if ignored is None else ignored):
        if value != IGNORE_INDEX:
            taken.append(("ignore", "ignore", IGNORE_INDEX, [value]))
    for key, whose, train_id, own in taken:
        if not own:
            raise _wrong(path, key, "is empty; give a value or a list of values")
        for value in own:
            if value in owner:
                whose_too = owner[value] if value == IGNORE_INDEX else f"that of {owner[value]} too"
                raise _wrong(path, key, f"{value} is {whose_too}; give each value once")
            owner[value], table[value] = whose, train_id
    table[IGNORE_INDEX] = IGNORE_INDEX
    return table


def _list(path: Path, key: str, said: Any, kind: type, what: str) -> list[Any]:
    if said is None and key == "names":
        raise _wrong(path, key, "is missing; name the classes, as in [road, person]")
    if not isinstance(said, list) or not all(isinstance(item, kind) for item in said):
        odd = next((item for item in said if not isinstance(item, kind)), "") if isinstance(said, list) else said
        quote = "; quote it" if kind is str and isinstance(said, list) else ""
        raise _wrong(path, key, f"must be a list of {what}, and {odd!r} is none{quote}")
    return said


def _values(path: Path, key: str, said: Any) -> list[int]:
    """Numbers from 0 to 255."""
    if not isinstance(said, list):
        raise _wrong(path, key, f"must be a list of numbers from 0 to 255, and {said!r} is none")
    for value in said:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
            raise _wrong(path, key, f"{value!r} is no whole number from 0 to 255")
    return said


def _suggestion(wrong: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _wrong(path: Path, key: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"{path}: {key}: {what}")


def palette(number: int) -> tuple[tuple[int, int, int], ...]:
    """So many colours, up to 253: each of a grid of 8x8x8 that is farthest, in CIELAB, from all before it and from
    black and white."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 8).round()] * 3, indexing="ij"), -1).reshape(-1, 3)
    lab = cv2.cvtColor((grid[None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    distance = np.minimum(*(np.linalg.norm(lab - lab[i], axis=1) for i in (0, -1)))
    chosen = []
    for _ in range(number):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in grid[chosen])


class UnlabelledData(SegmentationData):
    """Images without labels: all JPEG and PNG files in a folder and below it. Every pixel's label is UNLABELLED.

    Their order is uniform, for other samplings go by labels.
    """

    unlabelled = True

    def __init__(self, root: Path, labels: Labels, settings: Settings) -> None:
        self.paths = find_files(root, IMAGES)
        if not self.paths:
            raise ConfigurationError(
                f"{root}: holds no JPEG or PNG image; name the folder of the unlabelled images"
            )
        names = [path.relative_to(root).with_suffix("").as_posix().replace("/", "--") for path in self.paths]
        super().__init__("train", labels, names, settings._replace(sampling="uniform"))
        checked = map_threads(lambda path: check_file(path, label=False), self.paths)
        self._facts = np.array(list(checked), np.int64)  # [N, 3]: height, width, bytes

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(self.paths[index])
        return image, np.full(image.shape[:2], UNLABELLED, np.uint8)

    def manifest_hash(self) -> str:
        digest = hashlib.sha256(f"unlabelled {len(self)}\n".encode())
        for name, facts in zip(self.names, self._facts.tolist(), strict=True):
            digest.update(f"{name} {facts}\n".encode())
        return digest.hexdigest()

    def label_counts(self) -> np.ndarray:
        counts = np.zeros((len(self), len(self.labels) + 1), np.int64)
        counts[:, -1] = self._facts[:, 0] * self._facts[:, 1]
        return counts

    def _check_one_size(self) -> None:
        check_one_size(self._facts[:, :2], self.paths)
