"""A data set of one's own: what its folder and its classes.yaml may say, and the library `datasets`."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data import DataConfig, build_dataset
from data.folder import palette, read_classes
from errors import ConfigurationError

NAMES = "names: [road, person, sky]\n"
SIZE = (12, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (SIZE[1], SIZE[0]), interpolation=cv2.INTER_CUBIC))


def mask(seed: int, values: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), SIZE)


def write_folder(root: Path, values: list[int], classes: str = NAMES) -> Path:
    """Two images in folders of their own and one above them, of the three endings."""
    root.mkdir()
    (root / "classes.yaml").write_text(classes)
    for split in ("train", "val"):
        for i, name in enumerate(("a/one.jpg", "b/c/one.JPEG", "two.png")):
            path = root / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path, "PNG" if name.endswith("png") else "JPEG")
            path = (root / "masks" / split / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask(i, values)).save(path)
    return root


def own(root: Path, **changed: Any) -> DataConfig:
    return DataConfig(name="folder", root=str(root), **changed)


def test_a_folder_is_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "own", [0, 1, 2, 255])
    (root / "images" / "train" / ".hidden").mkdir()
    (root / "images" / "train" / ".hidden" / "three.png").write_bytes(b"")
    (root / "images" / "train" / "notes.txt").write_text("no image")
    data = build_dataset(own(root), "train")
    assert data.labels.names == ("road", "person", "sky")
    assert data.names == ["a--one", "b--c--one", "two"]
    image, label = data.read(2)
    np.testing.assert_array_equal(image, np.asarray(picture(2)))
    np.testing.assert_array_equal(label, mask(2, [0, 1, 2, 255]))
    np.testing.assert_array_equal(data.read(1)[1], mask(1, [0, 1, 2, 255]))
    batch = next(iter(data.train_loader(batch_size=3, seed=0, start_step=0, steps=1)))
    assert batch.images.shape == (3, 3, *SIZE)
    assert len(build_dataset(own(root), "val")) == 3


def test_values_of_the_masks_are_mapped(tmp_path: Path) -> None:
    said = (
        NAMES
        + "values: {road: 7, person: [24, 25], sky: 0}\nignore: [9, 255]\n"
        + "colours: [[1, 2, 3], [4, 5, 6], [7, 8, 9]]\n"
    )
    root = write_folder(tmp_path / "own", [0, 7, 9, 24, 25, 255], said)
    data = build_dataset(own(root), "train")
    values = mask(0, [0, 7, 9, 24, 25, 255])
    expected = np.vectorize({0: 2, 7: 0, 9: 255, 24: 1, 25: 1, 255: 255}.get)(values)
    np.testing.assert_array_equal(data.read(0)[1], expected)
    assert data.labels.colours == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


def test_classes_elsewhere_and_other_values(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "own", [0, 1, 2, 3])
    with pytest.raises(ConfigurationError, match=r"one\.png: label values 3 are outside the known 0\.\.2"):
        build_dataset(own(root), "train")
    file = tmp_path / "four.yaml"
    file.write_text("names: [a, b, c, d]\n")
    assert len(build_dataset(own(root, classes=str(file)), "train").labels) == 4


def test_what_does_not_pair_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "own", [0, 1, 2])
    (root / "masks" / "train" / "a" / "one.png").rename(root / "masks" / "train" / "one.png")
    with pytest.raises(ConfigurationError, match=r"images/train/a/one\.jpg: has no label \(1 of 3"):
        build_dataset(own(root), "train")
    with pytest.raises(ConfigurationError, match=r"images/test: there is no such folder; data.root must hold"):
        build_dataset(own(root), "test")
    (root / "classes.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"classes\.yaml: there is no such file; write one"):
        build_dataset(own(root), "val")


MISTAKES = {
    "colours: []": "names: is missing",
    "names: []": "names: there are none",
    "names: road": "names: must be a list of words, as in .road, person., and 'road' is none",
    "names: [road, no]": "names: must be a list of words.* and False is none; quote it",
    "names: [road, 7]": "names: must be a list of words.* and 7 is none; quote it",
    "names: [road, road]": "names: 'road' is there twice",
    f"names: {[str(i) for i in range(254)]}": "names: 254 classes are too many",
    "nams: [road]": r"nams: no such key; did you mean names\?",
    "names: [road]\nnames: [sky]": "cannot be read as YAML .*duplicate",
    "names: [road": "cannot be read as YAML .line 2",
    "- road\n- sky": "must be a mapping",
    "road": "road: no such key; there are names, colours",
    NAMES + "colours: [[1, 2, 3]]": "colours: 1 for 3 classes",
    NAMES + "colours: [[1, 2, 3], [1, 2], [1, 2, 3]]": r"colours: \[1, 2\] is no colour",
    NAMES + "colours: [[1, 2, 3], [1, 2, 256], [1, 2, 3]]": "colours: 256 is no whole number from 0 to 255",
    NAMES + "colours: red": "colours: must be a list of .red, green, blue. of each class, and 'red' is none",
    NAMES + "values: [1, 2, 3]": "values: must be a mapping",
    NAMES + "values: {road: 1, person: 2}": "values: 'sky' has none",
    NAMES + "values: {road: 1, persn: 2, sky: 3}": r"values\.persn: no such class; did you mean person\?",
    NAMES + "values: {road: 1, person: 1, sky: 3}": r"values\.person: 1 is that of 'road' too",
    NAMES + "values: {road: 1, person: [2, 2], sky: 3}": r"values\.person: 2 is that of 'person' too",
    NAMES + "values: {road: 1, person: 255, sky: 3}": r"values\.person: 255 is ignored always",
    NAMES + "values: {road: 1, person: 256, sky: 3}": r"values\.person: 256 is no whole number",
    NAMES + "values: {road: -1, person: 2, sky: 3}": r"values\.road: -1 is no whole number",
    NAMES + "values: {road: true, person: 2, sky: 3}": r"values\.road: True is no whole number",
    NAMES + "values: {road: [], person: 2, sky: 3}": r"values\.road: is empty",
    NAMES + "ignore: [2]": "ignore: 2 is that of 'sky' too",
    NAMES + "ignore: 3": "ignore: must be a list of numbers",
    NAMES + "ignore: [1.5]": r"ignore: 1\.5 is no whole number",
}


@pytest.mark.parametrize("said", MISTAKES, ids=[f"{i}" for i in range(len(MISTAKES))])
def test_a_mistake_in_the_classes_is_one_line_that_names_file_and_key(tmp_path: Path, said: str) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(said + "\n")
    with pytest.raises(ConfigurationError, match=MISTAKES[said]) as caught:
        read_classes(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_the_palette_is_well_spread() -> None:
    colours = palette(253)
    assert len(set(colours)) == 253
    assert palette(19) == colours[:19]
    assert (0, 0, 0) not in colours
    lab = cv2.cvtColor(np.array([colours[:19]], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)[~np.eye(19, dtype=bool)]
    assert distances.min() > 35  # Cityscapes' own 19 come as near as 15


# the library `datasets`

COLUMNS = ("image", "label")


def save_rows(
    folder: Path, images: list[Any], masks: list[Any], columns: tuple[str, str] = COLUMNS, **splits: int
) -> DataConfig:
    """Rows as the library saves them, so many of them in each split, and a classes.yaml beside."""
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    made = {}
    for split, number in (splits or {"train": len(images)}).items():
        rows = {columns[0]: images[:number], columns[1]: masks[:number], "name": ["x"] * number}
        made[split] = datasets.Dataset.from_dict(rows)
        for column in columns:
            made[split] = made[split].cast_column(column, datasets.Image())
    datasets.DatasetDict(made).save_to_disk(folder)
    (folder / "classes.yaml").write_text(NAMES)
    return DataConfig(name="huggingface", root=str(folder), classes=str(folder / "classes.yaml"))


def with_palette(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return image


def test_rows_of_the_library_are_read(tmp_path: Path) -> None:
    masks = [mask(i, [0, 1, 2, 255]) for i in range(4)]
    drawn = [
        Image.fromarray(masks[0]),
        with_palette(masks[1]),
        Image.fromarray(masks[2]),
        Image.fromarray(masks[3]),
    ]
    picture(2).save(tmp_path / "two.jpg", quality=95, subsampling=0)
    images: list[Any] = [picture(0), picture(1).convert("L"), str(tmp_path / "two.jpg"), picture(3)]
    config = save_rows(tmp_path / "rows", images, drawn, ("pixel_values", "annotation"), train=4, validation=2)
    data = build_dataset(config, "train")
    assert (len(data), data.labels.names) == (4, ("road", "person", "sky"))
    assert len(build_dataset(config, "val")) == 2
    for i in (0, 1, 2, 3):
        image, label = data.read(i)
        np.testing.assert_array_equal(label, masks[i])
        exact = np.asarray((picture(i).convert("L") if i == 1 else picture(i)).convert("RGB")).astype(int)
        assert np.abs(image - exact).mean() < (8 if i == 2 else 0.5)
    assert data.label_counts().sum() == 4 * SIZE[0] * SIZE[1]
    assert data.manifest_hash() == build_dataset(config, "train").manifest_hash()
    assert data.manifest_hash() != build_dataset(config, "val").manifest_hash()
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "start_step": 0, "steps": 3}
    for one, two in zip(data.train_loader(**settings), data.train_loader(**settings, workers=2), strict=True):
        assert all((x == y).all() for x, y in zip(one, two, strict=True))


FAULTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "has no split validation or val, but train; rename one": (None, None, {"split": "val"}),
    r"no column of type Image called image, pixel_values, img for the image, its columns are picture \(Image\)": (
        None,
        None,
        {"columns": ("picture", "label")},
    ),
    "no column of type Image called label, labels": (None, None, {"columns": ("image", "segments")}),
    r"several columns of type Image called img, image for the image": (None, None, {"columns": ("img", "image")}),
    r"rows/train/0/label: is a PNG of mode RGB": (None, picture(0), {}),
    r"rows/train/0/label: is a TIFF of mode I;16": (None, Image.fromarray(np.zeros(SIZE, np.uint16)), {}),
    r"rows/train/0/label: is 4x5 but its image is 16x12": (None, Image.fromarray(np.zeros((5, 4), np.uint8)), {}),
    r"rows/train/0/label: label values 3 are outside": (None, Image.fromarray(np.full(SIZE, 3, np.uint8)), {}),
    r"rows/train/0/image: is empty; remove the row": ("none", None, {}),
    r"rows/train/0/image: is a truncated PNG": ("cut", None, {}),
    r"rows/train/0/image: is neither a PNG nor a JPEG": ("text", None, {}),
    r"rows/train: no pixel has a class": (None, Image.fromarray(np.full(SIZE, 255, np.uint8)), {}),
}


@pytest.mark.parametrize("message", FAULTS, ids=[f"{i}" for i in range(len(FAULTS))])
def test_faults_of_rows_are_told(tmp_path: Path, message: str) -> None:
    image, label, changed = FAULTS[message]
    changed = dict(changed)
    picture(0).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    kinds = {"none": None, "cut": {"bytes": whole[:-20], "path": None}, "text": {"bytes": b"words", "path": None}}
    image = kinds[image] if isinstance(image, str) else picture(0)
    split = changed.pop("split", "train")
    label = Image.fromarray(mask(0, [0, 1, 2])) if label is None else label
    config = save_rows(tmp_path / "rows", [image], [label], **changed)
    with pytest.raises(ConfigurationError, match=message):
        build_dataset(config, split)


def test_where_the_rows_are_is_told(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    config = save_rows(tmp_path / "rows", [picture(0)], [Image.fromarray(mask(0, [0, 1]))])
    single = tmp_path / "single"
    datasets.load_from_disk(config.root)["train"].save_to_disk(single)
    for root, classes, message in (
        ("", config.classes, r"data\.root: there is no folder ''"),
        ("/nowhere/at/all", config.classes, r"data\.root: there is no folder '/nowhere/at/all'"),
        (str(tmp_path), config.classes, r"data\.root: .* cannot be opened"),
        (str(single), config.classes, r"data\.root: .*single is a single split"),
        (config.root, "", r"data\.classes: is empty"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            build_dataset(DataConfig(name="huggingface", root=root, classes=classes), "train")


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigurationError, match="^datasets: the library is not installed; pip install 'datasets>=4'$"
    ):
        build_dataset(DataConfig(name="huggingface", root="x/y", classes="c.yaml"), "train")
