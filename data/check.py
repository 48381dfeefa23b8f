"""The doctor: every file of a data set examined, and every fault listed with its remedy.

`build_dataset` stops at the first fault, and sees what can be seen without decoding the images; this goes on,
decodes all of them and compares them with one another. A fault is what would spoil a training or its score; a
notice is told only. What can be found among the pictures stands in data/similarity.py.

A JPEG whose middle is damaged decodes to wrong pixels without an error; the decoder only complains on standard
error, and of that a fault is made. Tried on CamVid's files, it found all of 300 lost and 300 overwritten blocks
of 512 bytes, 284 of 300 zeroed ones, and two thirds of the single flipped bits that change more than a hundredth
of the pixels: for the code can fall into step again, and then nothing in the file tells.
"""

import hashlib
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
from PIL import Image

from data.build import DataConfig, Files, Split, find_files
from data.files import (
    Notes,
    Pair,
    bad_values_error,
    check_orientation,
    decode_image,
    open_image,
    read_bytes,
    read_label_values,
    take_notes,
)
from data.labels import INVALID, label_id_table
from data.processes import map_processes
from data.similarity import COPY, find_similar, make_thumbnail
from errors import ConfigurationError

FRAMES = 60  # closer frames of one video are neighbours: two seconds at 30 Hz
COMPANIONS = (
    "_color",
    "_instanceIds",
    "_instanceTrainIds",
    "_labelIds",
    "_labelTrainIds",
    "_polygons",
    "_train_color",
)
"""Endings of files that Cityscapes and BDD100K deliver beside the labels, and nobody reads."""

COMPLAINT = r"Corrupt JPEG data: (.+)|(Premature end of JPEG.+|Invalid (?:SOS|progressive) .+|Inconsistent prog.+)"
"""libjpeg's warnings of data that it made up; others are of no consequence."""

Check = Literal[
    "layout", "pairing", "ignored", "image file", "label file", "size", "values", "classes", "duplicate", "leakage"
]
Severity = Literal["fault", "notice"]


class Fault(NamedTuple):
    """One line of the report."""

    split: str
    check: Check
    severity: Severity
    file: str
    problem: str
    fix: str


class Look(NamedTuple):
    """What one image and its label showed."""

    faults: list[Fault]
    size: tuple[int, int] | None = None
    """Height and width of the image, if it could be decoded."""
    pixels: str = ""
    """SHA-256 of the decoded image; empty also for an image of one colour, which is no copy of another such."""
    thumbnail: np.ndarray | None = None
    """uint8 [64, 64], as `pixels`."""
    label: str = ""
    """SHA-256 of the label's values, if it could be decoded."""
    values: np.ndarray | None = None
    """int64 [256]: the label's pixels of each value that its file holds."""


class Seen(NamedTuple):
    """A split's files, and what each of its pairs showed."""

    split: str
    files: Files
    looks: list[Look]

    def counts(self) -> np.ndarray:
        """int64 [pairs, C]: pixels of each class; zeros for a label that could not be read."""
        table = self.files.table
        one_hot = table[:, None] == np.arange(len(self.files.labels))
        values = np.zeros((len(self.looks), 256), np.int64)
        for row, look in zip(values, self.looks, strict=True):
            if look.values is not None:
                row[:] = look.values
        return values @ one_hot


def find_faults(config: DataConfig, splits: Sequence[str], *, workers: int = 0) -> list[Fault]:
    """All faults and notices of the files of these splits: split by split, faults first.

    `workers` is that of map_processes. Where `nothing_to_check` there are none.
    """
    if nothing_to_check(config):
        return []
    faults: list[Fault] = []
    found: list[tuple[str, Files]] = []
    for split in splits:
        with take_notes() as notes:
            try:
                files = find_files(config, cast(Split, split))
            except ConfigurationError as error:
                fault = _fault(split, "layout", str(error))
                is_key = re.fullmatch(r"data\.\w+", fault.file) and not Path(fault.file).exists()
                if is_key:  # the same for each split
                    return [fault._replace(split="")]
                faults.append(fault)
                continue
        faults += _name_faults(split, files, notes)
        found.append((split, files))
    tasks = [(split, pair, files.table) for split, files in found for pair in files.pairs]
    looks = iter(list(map_processes(_examine, tasks, workers=workers, desc="checking", unit="pair")))
    seen = [Seen(split, files, [next(looks) for _ in files.pairs]) for split, files in found]
    for one in seen:
        faults += [fault for look in one.looks for fault in look.faults]
        faults += [*_size_notices(one), *_label_faults(one)]
    faults += [*_class_notices(seen), *_picture_faults(seen), *_video_notices(seen)]
    order = {split: position for position, split in enumerate(["", *splits])}
    return sorted(faults, key=lambda fault: (order[fault.split], fault.severity))


def nothing_to_check(config: DataConfig) -> str:
    """Why a data set has no files to check, or "" where it has."""
    if config.name in ("streets", "huggingface"):
        return "has no files of images and labels, there is nothing to check"
    if config.packed and config.packed_folder and not config.root:
        return "is a pack without its source, there is nothing to check; opening the pack compares its SHA-256"
    return ""


def _fault(split: str, check: Check, message: str, file: Path | None = None) -> Fault:
    """Of a message `file: problem; fix`; a file whose name may hold such marks is given."""
    if file is not None:
        message = message.removeprefix(str(file))
    name, _, rest = message.partition(": ")
    problem, _, fix = rest.partition("; ")
    return Fault(split, check, "fault", name if file is None else str(file), problem, fix)


# names


def _name_faults(split: str, files: Files, notes: Notes) -> Iterator[Fault]:
    """Of files that do not pair, that differ in case only, or that nothing reads."""
    for message in notes.errors:
        yield _fault(split, "pairing", message)
    if not files.pairs:
        problem = f"the split {split!r} has no image with a label"
        yield Fault(split, "layout", "fault", str(files.root), problem, "check data.root")
    first: dict[str, Path] = {}
    for pair in files.pairs:
        twin = first.setdefault(pair.name.casefold(), pair.image)
        if twin != pair.image:
            problem = f"has the same name as {twin} but for upper and lower case"
            fix = "rename or remove one of them, for some file systems keep only one"
            yield Fault(split, "pairing", "fault", str(pair.image), problem, fix)
    for folder in sorted(notes.folders | {path.parent for path in notes.files}):
        ignored = defaultdict(list)
        for path in sorted(folder.iterdir()):
            known = path in notes.files or path.is_dir() or path.stem.endswith(COMPANIONS)
            if not known and not path.name.startswith("."):
                ignored[path.suffix].append(path)
        for suffix, paths in sorted(ignored.items()):
            problem = "is not read" + (
                f", as {len(paths)} files *{suffix} of this folder" if len(paths) > 1 else ""
            )
            fix = "name it as the files that are read, or remove it"
            yield Fault(split, "ignored", "notice", str(paths[0]), problem, fix)


# one image and its label


def _examine(task: tuple[str, Pair, np.ndarray]) -> Look:
    split, pair, table = task
    faults: list[Fault] = []
    look = Look(faults)
    try:
        look = _look_at_image(split, pair.image, faults)
    except ConfigurationError as error:
        faults.append(_fault(split, "image file", str(error), pair.image))
    try:
        return _look_at_label(split, pair, table, look)
    except ConfigurationError as error:
        faults.append(_fault(split, "label file", str(error), pair.label))
        return look


def _look_at_image(split: str, path: Path, faults: list[Fault]) -> Look:
    data = read_bytes(path)
    header = open_image(path, data)
    size = header.size[::-1]
    try:
        check_orientation(path, header)
    except ConfigurationError as error:
        faults.append(_fault(split, "image file", str(error), path))
    told = list(_mode_faults(header, data))
    with _complaints() as complaints:
        image = decode_image(path, np.frombuffer(data, np.uint8))
    for complaint in complaints:
        told.append(
            ("fault", f"is damaged, and decodes to wrong pixels all the same ({complaint})", "copy it again")
        )
    uniform = bool((image == image[0, 0]).all())
    if uniform:
        told.append(
            ("notice", "is of one colour all over", "look at it, and remove it with its label if it is empty")
        )
    faults += [Fault(split, "image file", severity, str(path), problem, fix) for severity, problem, fix in told]
    if uniform:
        return Look(faults, size)
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(image.data)
    return Look(faults, size, digest.hexdigest(), make_thumbnail(image))


def _mode_faults(header: Image.Image, data: bytes) -> Iterator[tuple[Severity, str, str]]:
    """What is unusual in how an image stores its colours: a fault, where they are not read as they are meant."""
    if header.format == "PNG" and data[24] == 16:
        yield "fault", "has 16 bits a channel, of which only the upper 8 are read", "scale it to 8 bits"
    if header.mode == "CMYK":
        yield "fault", "is a CMYK image, whose colours each decoder reads otherwise", "convert it to RGB"
    if header.mode in ("1", "L", "LA", "I;16"):
        yield "notice", "is grey", "leave it, if that is meant: its three channels are equal"
    if header.mode == "P":
        yield "notice", "has a palette, as labels have", "look whether it is a photograph: its colours are read"
    if header.mode in ("LA", "RGBA"):
        yield "notice", "has an alpha channel, which is not read", "leave it, if all of it is opaque"


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What libjpeg writes to standard error about damaged data within the block, known when it has ended."""
    complaints: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written:
        before = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield complaints
        finally:
            os.dup2(before, 2)
            os.close(before)
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                complaint = re.search(COMPLAINT, line)
                if complaint:
                    complaints.append(complaint[1] or complaint[2])
                elif not line.startswith("libpng error"):  # that one becomes an exception
                    print(line, file=sys.stderr)


def _look_at_label(split: str, pair: Pair, table: np.ndarray, look: Look) -> Look:
    values = read_label_values(pair.label)
    if look.size not in (None, values.shape):
        (label_height, label_width), (height, width) = values.shape, look.size
        problem = f"is {label_width}x{label_height} but its image {pair.image} is {width}x{height}"
        fix = "a label must have its image's size"
        look.faults.append(Fault(split, "size", "fault", str(pair.label), problem, fix))
    counts = np.bincount(values.ravel(), minlength=256)
    bad = np.flatnonzero((counts > 0) & (table == INVALID)).tolist()
    if bad:
        error = bad_values_error(pair.label, bad, table)
        look.faults.append(_fault(split, "values", str(error), pair.label))
    digest = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()
    return look._replace(label=digest, values=counts)


# a split


def _size_notices(seen: Seen) -> Iterator[Fault]:
    sizes = Counter(look.size for look in seen.looks if look.size is not None)
    if len(sizes) > 1:
        second = sizes.most_common()[1][0]
        pairs = zip(seen.files.pairs, seen.looks, strict=True)
        example = next(pair for pair, look in pairs if look.size == second)
        shown = ", ".join(f"{number} of {width}x{height}" for (height, width), number in sizes.most_common(5))
        problem = f"is not of the size of most images; there are {len(sizes)} sizes: {shown}"
        fix = "set data.crop or data.size, for a batch needs one size"
        yield Fault(seen.split, "size", "notice", str(example.image), problem, fix)


def _label_faults(seen: Seen) -> Iterator[Fault]:
    """Of labels without a class, of trainIds that are read as labelIds, and of equal labels."""
    readable = [
        (pair.label, look, bool(pixels.any()))
        for pair, look, pixels in zip(seen.files.pairs, seen.looks, seen.counts(), strict=True)
        if look.values is not None
    ]
    if not readable:
        return
    root, split = str(seen.files.root), seen.split
    if not any(labelled for _, _, labelled in readable):
        fix = "the labels of test are withheld, use val" if split == "test" else "check the labels"
        yield Fault(split, "values", "fault", root, f"no pixel of the split {split!r} has a class", fix)
        return
    values = np.sum([look.values for look in seen.looks if look.values is not None], axis=0)
    if np.array_equal(seen.files.table, label_id_table()) and not values[19:34].any():
        problem = f"no label of the split {split!r} has a value from 19 to 33: trainIds in files named labelIds"
        yield Fault(split, "values", "fault", root, problem, "name them _gtFine_labelTrainIds.png")
    same = defaultdict(list)
    for path, look, labelled in readable:
        if labelled:
            same[look.label].append((path, look.pixels))
        else:
            fix = "leave it, if there is nothing to label: it teaches nothing"
            yield Fault(split, "values", "notice", str(path), "has no pixel of a class", fix)
    for copies in same.values():
        path, pixels = copies[0]
        others = [other for other, its_pixels in copies[1:] if its_pixels != pixels]
        if others and len(copies) == len(readable):
            problem, fix = f"all {len(copies)} labels of the split {split!r} are the same", "copy the labels again"
            yield Fault(split, "duplicate", "fault", root, problem, fix)
        else:
            for other in others:
                fix = "look whether one was saved under both names"
                problem = f"holds the same as {path}, though their images differ"
                yield Fault(split, "duplicate", "notice", str(other), problem, fix)


# all splits


def _class_notices(seen: list[Seen]) -> Iterator[Fault]:
    """Of classes that training never sees."""
    pixels = {one.split: one.counts().sum(0) for one in seen if one.looks}
    if "train" not in pixels:
        return
    train = next(one for one in seen if one.split == "train")
    for k, name in enumerate(train.files.labels.names):
        if pixels["train"][k]:
            continue
        others = [f"{number[k]} pixels of {split}" for split, number in pixels.items() if number[k]]
        where = f", but in {' and '.join(others)}" if others else ""
        fix = "split anew, or expect an IoU of 0" if others else "know that it is left out of the mean IoU"
        yield Fault(
            "train",
            "classes",
            "notice",
            str(train.files.root),
            f"the class {name!r} never occurs in train{where}",
            fix,
        )


class Picture(NamedTuple):
    split: str
    path: Path
    pixels: str
    thumbnail: np.ndarray


def _picture_faults(seen: list[Seen]) -> Iterator[Fault]:
    """Of images that are there twice, in a split or in two, exactly or nearly."""
    pictures = [
        Picture(one.split, pair.image, look.pixels, look.thumbnail)
        for one in seen
        for pair, look in zip(one.files.pairs, one.looks, strict=True)
        if look.thumbnail is not None
    ]
    first: dict[tuple[str, str], Picture] = {}  # by split and pixels
    leaked = set()
    distinct = []  # all but exact copies within a split
    for k, picture in enumerate(pictures):
        twin = first.setdefault((picture.split, picture.pixels), picture)
        if twin is not picture:
            problem = f"shows exactly what {twin.path} shows"
            fix = "remove one with its label"
            yield Fault(picture.split, "duplicate", "fault", str(picture.path), problem, fix)
        else:
            distinct.append(k)
        for one in seen:
            original = first.get((one.split, picture.pixels))
            if one.split != picture.split and original is not None:
                leaked.add(k)
                yield _leak(picture, original, "shows exactly what {} shows")
    if not pictures:
        return
    splits = [one.split for one in seen]
    similar = find_similar(
        np.array([pictures[k].thumbnail for k in distinct]),
        np.array([splits.index(pictures[k].split) for k in distinct]),
    )
    nearly: dict[tuple[str, str], list[tuple[float, int, int]]] = defaultdict(list)
    for row, column, agreement in sorted(similar.tolist(), key=lambda pair: -pair[2]):
        i, j = distinct[row], distinct[column]
        a, b = pictures[i], pictures[j]
        if j in leaked:  # also where the pixels of both are the same
            continue
        if a.split != b.split and agreement >= COPY:
            leaked.add(j)
            yield _leak(b, a, f"shows what {{}} shows, saved anew or resized (agreement {agreement:.2f})")
        else:
            nearly[a.split, b.split].append((agreement, i, j))
    for (split, other), pairs in nearly.items():
        agreement, i, j = pairs[0]
        number = len(pairs)  # of each image there is one
        of = sum(picture.split == other for picture in pictures)
        problem = (
            f"nearly shows what {pictures[i].path} shows (agreement {agreement:.2f}), as {number} of {of} images "
        )
        if split == other:
            copies = sum(agreement >= COPY for agreement, _, _ in pairs)
            problem += f"do with another of {other}; {copies} of these can hardly be told apart"
            fix = "leave them, if they are frames of a video: they count for less than their number"
            yield Fault(other, "duplicate", "notice", str(pictures[j].path), problem, fix)
        else:
            fix = "split by place or by video, or know that the score is that of known scenes"
            yield Fault(
                other, "leakage", "notice", str(pictures[j].path), problem + f"do with one of {split}", fix
            )


def _leak(picture: Picture, other: Picture, how: str) -> Fault:
    problem = how.format(f"{other.path} of {other.split}")
    return Fault(picture.split, "leakage", "fault", str(picture.path), problem, "remove it from one of the splits")


def _video_notices(seen: list[Seen]) -> Iterator[Fault]:
    """Of neighbouring frames of one video in two splits, by names that end in a number: 0016E5_07959.

    Where both splits have the same number, they count by themselves (a0--000 in each), and it is no one video.
    """
    for one, other in combinations(seen, 2):
        known: dict[str, list[tuple[int, Pair]]] = defaultdict(list)
        for pair in one.files.pairs:
            if frame := _frame(pair.name):
                known[frame[0]].append((frame[1], pair))
        numbers = {video: np.array([number for number, _ in frames]) for video, frames in known.items()}
        theirs = [_frame(pair.name) for pair in other.files.pairs]
        apart = {frame[0] for frame in theirs if frame and frame[1] in numbers.get(frame[0], ())}
        gaps = []
        for pair, frame in zip(other.files.pairs, theirs, strict=True):
            if frame is None or frame[0] not in known or frame[0] in apart:
                continue
            distances = np.abs(numbers[frame[0]] - frame[1])
            nearest = int(distances.argmin())
            gaps.append((int(distances[nearest]), pair, known[frame[0]][nearest][1]))
        close = [gap for gap in gaps if gap[0] < FRAMES]
        if close:
            gap, pair, neighbour = min(close, key=lambda close: close[0])
            problem = (
                f"by its name is {gap} frames from {neighbour.image} of {one.split}; {len(close)} of "
                f"{len(other.files.pairs)} images are less than {FRAMES} frames from one of {one.split}, and "
                f"{len(gaps)} are of its videos"
            )
            fix = "split by video, or know that the score is that of known scenes"
            yield Fault(other.split, "leakage", "notice", str(pair.image), problem, fix)


def _frame(name: str) -> tuple[str, int] | None:
    """The video and the number of a frame, if its name says: 0016E5_ and 7959; a bare number names no video."""
    parts = re.fullmatch(r"(.*\D)(\d{1,18})", name)
    return (parts[1], int(parts[2])) if parts else None
