"""Reading image and label files, and the checks that a whole split passes before the first step.

Each fault is one ConfigurationError that begins with the file. OpenCV decodes the images (fast), Pillow the
labels (it keeps the indices of a palette PNG and checks the CRC of each chunk).
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data.labels import INVALID
from errors import ConfigurationError

MAX_PIXELS = 2**26  # a header that claims more (8192x8192) is taken for damage or malice
THREADS = 4  # of the checks of a whole split; more gain nothing, for much of the work holds Python's lock

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_HEAD = 33  # PNG's signature and IHDR chunk
_DECODING = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_TAIL = 1024  # some writers append a few bytes after the end marker

Size = tuple[int, int]  # height, width
A = TypeVar("A")
R = TypeVar("R")


class Pair(NamedTuple):
    """One image of a split with its label file, and its table from the file's values to trainIds."""

    name: str
    image: Path
    label: Path


def map_threads(function: Callable[[A], R], items: Sequence[A]) -> Iterable[R]:
    """The results in order; the first exception is raised. Threads, for the work is reading and decoding."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_bytes(path: Path) -> bytes:
    """The file's bytes; ConfigurationError naming it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); check the data set") from error


def _check_frame(path: Path, start: bytes, end: bytes, empty: bool) -> str:
    """The file's kind, 'PNG' or 'JPEG', by its first and last bytes. Refuses what is empty, cut or foreign."""
    if empty:
        raise ConfigurationError(f"{path}: is an empty file; copy it again")
    if start.startswith(_PNG_START):
        if _PNG_END not in end:
            raise ConfigurationError(f"{path}: is a truncated PNG (no end marker); copy it again")
        return "PNG"
    if start.startswith(_JPEG_START):
        if _JPEG_END not in end:
            raise ConfigurationError(f"{path}: is a truncated JPEG (no end marker); copy it again")
        return "JPEG"
    raise ConfigurationError(f"{path}: is neither a PNG nor a JPEG file; replace it by the original")


def _open(path: Path, stream: Any) -> Image.Image:
    """Pillow's lazily opened image, with its header checked."""
    try:
        image = Image.open(stream, formats=("PNG", "JPEG"))
    except Image.DecompressionBombError as error:
        raise ConfigurationError(f"{path}: its header claims an absurd size; replace the file") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ConfigurationError(f"{path}: its header is damaged; copy it again") from error
    _check_size(path, *image.size)
    return image


def open_image(path: Path, data: bytes) -> Image.Image:
    """Pillow's image of a file's bytes, not decoded yet. Refuses what is empty, cut, foreign, absurd or damaged as
    far as its header and its end show."""
    _check_frame(path, data[:_HEAD], data[-_TAIL:], not data)
    return _open(path, io.BytesIO(data))


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ConfigurationError(
            f"{path}: its header claims {width}x{height} pixels, more than {MAX_PIXELS}; replace the file"
        )


def _label_header(path: Path, kind: str, start: bytes) -> Size:
    """Height and width of a label: a PNG with one 8-bit channel, or with a palette, as its IHDR chunk says."""
    if kind != "PNG":
        raise ConfigurationError(f"{path}: is a JPEG, which does not keep label values; a label must be a PNG")
    if len(start) < 33 or start[12:16] != b"IHDR" or zlib.crc32(start[12:29]) != int.from_bytes(start[29:33]):
        raise ConfigurationError(f"{path}: its header is damaged; copy it again")
    width, height, depth, colour = struct.unpack(">IIBB", start[16:26])
    if colour not in (0, 3):
        raise ConfigurationError(
            f"{path}: is a colour image, where a label holds one class number a pixel; convert it"
        )
    if colour == 0 and depth != 8:
        raise ConfigurationError(f"{path}: is a {depth}-bit label; a label must have 8 bits a pixel")
    _check_size(path, width, height)
    return height, width


def check_orientation(path: Path, image: Image.Image) -> None:
    """Raises ConfigurationError for an image whose EXIF data turn it, or are damaged."""
    data = image.info.get("exif")  # not getexif(): on a PNG without EXIF it decodes the whole image
    if not data:
        return
    exif = Image.Exif()
    try:
        exif.load(data)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigurationError(f"{path}: its EXIF data are damaged; save the image without them") from error
    if orientation not in (0, 1):
        raise ConfigurationError(
            f"{path}: its EXIF orientation is {orientation}, so readers disagree on which way is up; "
            "turn the pixels and remove the tag"
        )


def check_file(path: Path, *, label: bool) -> tuple[int, int, int]:
    """(height, width, bytes) of an image or label file by its first and last bytes, without decoding it.

    Raises ConfigurationError for what can be seen that way: unreadable, empty, truncated or foreign files,
    damaged or absurd headers, colour or 16-bit labels, EXIF-rotated images.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(_HEAD)
            size = stream.seek(0, io.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            kind = _check_frame(path, start, stream.read(), size == 0)
            if label:
                return *_label_header(path, kind, start), size
            stream.seek(0)
            image = _open(path, stream)
            check_orientation(path, image)
            return image.height, image.width, size
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); check the data set") from error


def check_pairs(pairs: Sequence[Pair]) -> np.ndarray:
    """int64 [N, 4]: image height, image width, image bytes, label bytes of every pair.

    Raises ConfigurationError as `check_file`, or where a label has another size than its image.
    """

    def check(pair: Pair) -> tuple[int, int, int, int]:
        height, width, image_bytes = check_file(pair.image, label=False)
        label_height, label_width, label_bytes = check_file(pair.label, label=True)
        if (label_height, label_width) != (height, width):
            raise ConfigurationError(
                f"{pair.label}: is {label_width}x{label_height} but its image {pair.image} is {width}x{height}; "
                "a label must have its image's size"
            )
        return height, width, image_bytes, label_bytes

    return np.array(list(map_threads(check, pairs)), np.int64).reshape(-1, 4)


def is_jpeg(data: bytes) -> bool:
    """Whether a file of these bytes is a JPEG."""
    return data.startswith(_JPEG_START)


def check_one_size(sizes: np.ndarray, names: Sequence[object]) -> None:
    """Raises ConfigurationError where the heights and widths [N, 2] of what `names` are called differ."""
    different = np.flatnonzero((sizes != sizes[0]).any(1))
    if len(different):
        raise ConfigurationError(
            f"{names[different[0]]}: is of another size than {names[0]}; set data.crop or data.size to batch them"
        )


def read_image(path: Path, reduction: int = 1) -> np.ndarray:
    """uint8 [H, W, 3] RGB; a JPEG at a half, a quarter or an eighth of its size, rounded up, for a `reduction` of
    2, 4 or 8. Raises ConfigurationError naming the file."""
    data = read_bytes(path)
    _check_frame(path, data[:_HEAD], data[-_TAIL:], not data)
    return decode_image(path, np.frombuffer(data, np.uint8), reduction if is_jpeg(data) else 1)


def decode_image(path: Path, data: np.ndarray, reduction: int = 1) -> np.ndarray:
    """As read_image, of bytes that stand in a file."""
    # the orientation is refused by check_file; here it is ignored, so that the pixels never turn silently
    flags = _DECODING[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(data, flags)
    except cv2.error as error:
        raise ConfigurationError(f"{path}: cannot be decoded; copy it again") from error
    if image is None:
        raise ConfigurationError(f"{path}: cannot be decoded; copy it again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label_values(path: Path) -> np.ndarray:
    """uint8 [H, W], the values as they stand in the file (of a palette PNG: the indices)."""
    data = read_bytes(path)
    kind = _check_frame(path, data[:_HEAD], data[-_TAIL:], not data)
    _label_header(path, kind, data[:_HEAD])
    image = _open(path, io.BytesIO(data))
    try:
        values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be decoded, its data are damaged; copy it again") from error
    return values


def bad_values_error(path: Path, values: Sequence[int], table: np.ndarray) -> ConfigurationError:
    """The error for a label file that holds `values`, which `table` calls INVALID."""
    classes = int(table[table < INVALID].max()) + 1
    shown = ", ".join(str(value) for value in values[:5]) + (", …" if len(values) > 5 else "")
    identity = classes == 19 and table[18] == 18
    if identity and all(19 <= value <= 34 for value in values):
        advice = "they look like labelIds in place of labelTrainIds; convert the labels"
    else:
        advice = "correct the label"
    known = sorted(np.flatnonzero(table != INVALID).tolist())
    top = max(value for value in known if value != 255)
    return ConfigurationError(f"{path}: label values {shown} are outside the known 0..{top} and 255; {advice}")


def read_label(path: Path, table: np.ndarray) -> np.ndarray:
    """uint8 [H, W] trainIds by `table` (uint8 [256]). Raises ConfigurationError for a value that is INVALID."""
    values = read_label_values(path)
    label = cv2.LUT(values, table)
    if (label == INVALID).any():
        raise bad_values_error(path, np.unique(values[label == INVALID]).tolist(), table)
    return label


def pair_up(images: Sequence[Path], labels: Sequence[Path], name: Callable[[Path], str], hint: str) -> list[Pair]:
    """Join images and labels by `name(path)`, sorted by name.

    `hint` is appended to the error for a label without image. Raises ConfigurationError naming the file for an
    image without label, a label without image, or two files of the same name; within `take_notes`, notes it and
    goes on.
    """
    notes = _notes.get()
    if notes is not None:
        notes.files.update(images, labels)
    image_of = _by_name(images, name)
    label_of = _by_name(labels, name)
    for key, path in sorted(image_of.items()):
        if key not in label_of:
            missing = len(image_of.keys() - label_of.keys())
            _refuse(
                f"{path}: has no label ({missing} of {len(image_of)} images have none); add or remove the file"
            )
    for key, path in sorted(label_of.items()):
        if key not in image_of:
            missing = len(label_of.keys() - image_of.keys())
            _refuse(f"{path}: has no image ({missing} of {len(label_of)} labels have none); {hint}")
    return [Pair(key, image_of[key], label_of[key]) for key in sorted(image_of.keys() & label_of.keys())]


def _by_name(paths: Sequence[Path], name: Callable[[Path], str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        key = name(path)
        if key in found:
            _refuse(f"{path}: has the same name as {found[key]}; remove one of them")
        found.setdefault(key, path)
    return found


@dataclass
class Notes:
    """What is noted of the files of a split while they are paired."""

    errors: list[str] = field(default_factory=list)
    folders: set[Path] = field(default_factory=set)
    """Those that `list_files` looked into."""
    files: set[Path] = field(default_factory=set)
    """Those that `pair_up` was given."""


_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def take_notes() -> Iterator[Notes]:
    """Within it `pair_up` notes all its errors in place of raising the first, for a report on a whole data set."""
    token = _notes.set(notes := Notes())
    try:
        yield notes
    finally:
        _notes.reset(token)


def _refuse(message: str) -> None:
    notes = _notes.get()
    if notes is None:
        raise ConfigurationError(message)
    notes.errors.append(message)


def list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The visible files of a folder whose names end in one of `suffixes`, sorted."""
    if (notes := _notes.get()) is not None:
        notes.folders.add(folder)
    return sorted(p for p in folder.iterdir() if p.name.endswith(suffixes) and not p.name.startswith("."))


def need_folder(folder: Path, advice: str) -> Path:
    """The folder; ConfigurationError if there is none."""
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder; {advice}")
    return folder
