"""Images and masks of the library `datasets`: a folder of its `save_to_disk`, or a name on the Hub.

Two columns of its type Image are read, the image and the mask; what a mask's values mean, a file says as for
data/folder.py. The library is not among the requirements: `pip install datasets`.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from data import files
from data.dataset import SegmentationData, Settings
from data.folder import Classes, read_classes
from data.labels import INVALID
from errors import ConfigurationError

IMAGES = ("image", "pixel_values", "img")
MASKS = ("label", "labels", "annotation", "mask", "semantic_segmentation")
TIFF = (b"II*\0", b"MM\0*")
SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


def open_huggingface(root: str, classes: str, split: str, settings: Settings) -> "HuggingFaceData":
    """A split of the data set at `root`, with the classes of the YAML file `classes`.

    Raises ConfigurationError naming the key, split, column or row that is wrong, or the library if it is missing.
    """
    missing = ConfigurationError("datasets: the library is not installed; pip install 'datasets>=4'")
    try:
        import datasets
    except ImportError as error:
        raise missing from error
    if not hasattr(datasets, "__version__"):  # a folder of that name in the current one
        raise missing
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ConfigurationError(
            f"datasets: version {datasets.__version__} may run code from the Hub; pip install 'datasets>=4'"
        )
    if not classes:
        raise ConfigurationError(
            "data.classes: is empty; huggingface needs a YAML file with the names of the classes"
        )
    said = read_classes(Path(classes).expanduser())
    splits = _load(datasets, root)
    name = next((name for name in SPLITS[split] if name in splits), None)
    if name is None:
        wanted, there = " or ".join(SPLITS[split]), ", ".join(map(str, splits))
        raise ConfigurationError(f"data.root: {root} has no split {wanted}, but {there}; rename one")
    rows = splits[name]
    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    columns = []
    for what, names in (("image", IMAGES), ("mask", MASKS)):
        found = [column for column in images if column in names]
        if len(found) != 1:
            there = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in rows.features.items())
            number = "several columns" if found else "no column"
            raise ConfigurationError(
                f"data.root: {root} has {number} of type Image called {', '.join(found or names)} for the {what}, "
                f"its columns are {there}; rename one, or remove the others"
            )
        columns.append(found[0])
    if not len(rows):
        raise ConfigurationError(f"data.root: the split {name} of {root} has no images; check it")
    fingerprint = f"{rows._fingerprint} {len(rows)} {columns}"
    rows = rows.select_columns(columns)
    for column in columns:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return HuggingFaceData(f"{root}/{name}", rows, fingerprint, columns, said, split, settings)


def _load(datasets: Any, root: str) -> Mapping[Any, Any]:
    """The splits of a data set by name."""
    folder = Path(root).expanduser()
    on_disk = bool(root) and folder.is_dir()
    if not on_disk and len(root.split("/")) != 2:
        raise ConfigurationError(
            f"data.root: there is no folder {root!r}; give that of save_to_disk, or a name on the Hub, owner/name"
        )
    try:
        found = datasets.load_from_disk(str(folder)) if on_disk else datasets.load_dataset(root)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"data.root: {root} cannot be opened ({reason}); check it") from error
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"data.root: {root} is a single split; save a DatasetDict with train and validation"
        )
    return found


class HuggingFaceData(SegmentationData):
    """A split of rows with an image and a mask, each the bytes of a PNG or JPEG file. The constructor checks them
    as FileData does; in errors a row is called ROOT/SPLIT/NUMBER/COLUMN."""

    def __init__(
        self,
        called: str,
        rows: Any,
        fingerprint: str,
        columns: list[str],
        classes: Classes,
        split: str,
        settings: Settings,
    ) -> None:
        width = len(str(len(rows) - 1))
        super().__init__(split, classes.labels, [f"{i:0{width}}" for i in range(len(rows))], settings)
        self.called, self.rows, self.fingerprint, self.columns = called, rows, fingerprint, columns
        self.table = classes.table
        self._sizes = np.array(list(files.map_threads(self._check, range(len(self)))), np.int64)
        if not self.label_counts()[:, :-1].any():
            raise ConfigurationError(f"{called}: no pixel has a class; check the masks and data.classes")

    def _bytes(self, index: int) -> list[tuple[Path, bytes]]:
        """Of the image and the mask what they are called and their files."""
        row, found = self.rows[index], []
        for column in self.columns:
            name, value = Path(f"{self.called}/{index}/{column}"), row[column]
            if value is None:
                raise ConfigurationError(f"{name}: is empty; remove the row")
            data = value["bytes"] if value["bytes"] is not None else files.read_bytes(Path(value["path"]))
            found.append((name, data))
        return found

    def _check(self, index: int) -> tuple[int, int]:
        """Height and width of a row."""
        (image, image_data), (mask, mask_data) = self._bytes(index)
        opened = files.open_image(image, image_data)
        files.check_orientation(image, opened)
        sizes = [(one.height, one.width) for one in (opened, _open_mask(mask, mask_data))]
        if sizes[0] != sizes[1]:
            (height, width), (mask_height, mask_width) = sizes
            raise ConfigurationError(
                f"{mask}: is {mask_width}x{mask_height} but its image is {width}x{height}; a mask must have its "
                "image's size"
            )
        return sizes[0]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        (image, image_data), (mask, mask_data) = self._bytes(index)
        values = _mask_values(mask, mask_data)
        label = cv2.LUT(values, self.table)
        if (label == INVALID).any():
            raise files.bad_values_error(mask, np.unique(values[label == INVALID]).tolist(), self.table)
        return files.decode_image(image, np.frombuffer(image_data, np.uint8)), label

    def manifest_hash(self) -> str:
        return hashlib.sha256(f"huggingface {self.fingerprint}".encode()).hexdigest()

    def _count_key(self) -> str:
        return hashlib.sha256(b"label counts 1\n" + self.fingerprint.encode() + self.table.tobytes()).hexdigest()

    def _check_one_size(self) -> None:
        files.check_one_size(self._sizes, [f"{self.called}/{name}" for name in self.names])


def _open_mask(name: Path, data: bytes) -> Image.Image:
    """Pillow's image, not decoded yet, of a PNG with one number of 8 bits, or of a palette, a pixel; or of a TIFF,
    as which the library itself stores a palette."""
    if data.startswith(TIFF):
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=("TIFF",))
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise ConfigurationError(f"{name}: its header is damaged; copy it again") from error
    else:
        image = files.open_image(name, data)
    if image.format not in ("PNG", "TIFF") or image.mode not in ("L", "P"):
        raise ConfigurationError(
            f"{name}: is a {image.format} of mode {image.mode}, where a mask must be a PNG with one number of 8 "
            "bits a pixel; convert it"
        )
    return image


def _mask_values(name: Path, data: bytes) -> np.ndarray:
    """uint8 [H, W] as they stand in the file, of a palette the indices."""
    image = _open_mask(name, data)
    try:
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigurationError(f"{name}: cannot be decoded, its data are damaged; copy it again") from error
