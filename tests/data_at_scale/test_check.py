"""The doctor names each planted file with its fault, and nothing else; clean sets of all layouts have none."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_data import cut, flip_bit, huge_png, overwrite

from data import DataConfig, similarity
from data.check import Fault, find_faults
from data.similarity import find_similar, make_thumbnail
from data.streets import draw_scene, write_bdd100k, write_cityscapes

SIZE = (96, 192)
SCENES = {"train": 5, "val": 3}


def write_camvid(root: Path) -> None:
    index = 0
    for split, number in SCENES.items():
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for _ in range(number):
            image, label = draw_scene(index, seed=3, size=SIZE)
            Image.fromarray(image).save(root / split / f"{split}_{index:04d}.jpg", quality=95)
            Image.fromarray(np.minimum(label, 11)).save(root / f"{split}annot" / f"{split}_{index:04d}.png")
            index += 1


def write_folder(root: Path) -> None:
    write_bdd100k(root / "written", scenes=SCENES, size=SIZE, seed=2)
    shutil.move(root / "written" / "images" / "10k", root / "images")
    shutil.move(root / "written" / "labels" / "sem_seg" / "masks", root / "masks")
    (root / "classes.yaml").write_text(f"names: [{', '.join(f'c{i}' for i in range(19))}]\n")


WRITERS: dict[str, Callable[[Path], object]] = {
    "camvid": write_camvid,
    "cityscapes": lambda root: write_cityscapes(root, scenes=SCENES, size=SIZE),
    "cityscapes, labelTrainIds": lambda root: write_cityscapes(
        root, scenes=SCENES, size=SIZE, labels="labelTrainIds"
    ),
    "cityscapes, both": lambda root: write_cityscapes(root, scenes=SCENES, size=SIZE, labels="both"),
    "bdd100k": lambda root: write_bdd100k(root, scenes=SCENES, size=SIZE),
    "bdd100k, older": lambda root: write_bdd100k(root, scenes=SCENES, size=SIZE, layout="older"),
    "folder": write_folder,
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a layout's clean set, written when it is first asked for; to be copied, not changed."""
    parent = tmp_path_factory.mktemp("clean")

    def write(layout: str) -> Path:
        root = parent / layout.replace(", ", "_")
        if not root.exists():
            root.mkdir()
            WRITERS[layout](root)
        return root

    return write


def diagnose(layout: str, root: Path, workers: int = 1) -> list[Fault]:
    config = DataConfig(name=layout.partition(",")[0], root=str(root))  # type: ignore[arg-type]
    return find_faults(config, ["train", "val"], workers=workers)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_clean_set_has_no_fault(clean: Callable[[str], Path], layout: str) -> None:
    found = diagnose(layout, clean(layout))
    assert [fault for fault in found if fault.check != "classes"] == []  # not every class is in so few scenes
    assert {fault.severity for fault in found} <= {"notice"}


# planting: each function harms a set and returns the file that is to be named


def nth(folder: Path, k: int) -> Path:
    return sorted(folder.iterdir())[k]


def bdd_image(root: Path, k: int = 2, split: str = "train") -> Path:
    return nth(root / "images" / "10k" / split, k)


def bdd_label(root: Path, k: int = 2, split: str = "train") -> Path:
    return nth(root / "labels" / "sem_seg" / "masks" / split, k)


def city_image(root: Path, k: int = 1) -> Path:
    return nth(root / "leftImg8bit" / "train" / "trainstadt", k)


def city_labels(root: Path) -> list[Path]:
    return sorted((root / "gtFine").rglob("*_labelIds.png"))


def image_of(harm: Callable[[Path], object]) -> Callable[[Path], Path]:
    def plant(root: Path) -> Path:
        path = bdd_image(root)
        harm(path)
        return path

    return plant


def label_of(harm: Callable[[Path], object]) -> Callable[[Path], Path]:
    def plant(root: Path) -> Path:
        path = bdd_label(root)
        harm(path)
        return path

    return plant


def png_of(harm: Callable[[Path], object]) -> Callable[[Path], Path]:
    def plant(root: Path) -> Path:
        path = city_image(root)
        harm(path)
        return path

    return plant


def change(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Saves what the function makes of an image file's or a label file's pixels, as PNG."""
    return lambda path: Image.fromarray(function(np.asarray(Image.open(path)))).save(path, format="PNG")


def convert(mode: str, kind: str) -> Callable[[Path], None]:
    return lambda path: Image.open(path).convert(mode).save(path, format=kind)


def no_image(root: Path) -> Path:
    bdd_image(root).unlink()
    return bdd_label(root)


def no_label(root: Path) -> Path:
    bdd_label(root).unlink()
    return bdd_image(root)


def lose_block(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 300 :])


def damage_exif(path: Path) -> None:
    Image.open(path).save(path, exif=b"Exif\0\0nonsense that is no TIFF header")


def turn(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def sixteen_bits(path: Path) -> None:
    cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 16)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jpg")


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def copy_pair(root: Path, name: str, split: str = "train") -> Path:
    """The third pair of train, once more."""
    image, label = bdd_image(root), bdd_label(root)
    shutil.copy(label, bdd_label(root, 0, split).with_name(f"{name}.png"))
    return Path(shutil.copy(image, bdd_image(root, 0, split).with_name(f"{name}.jpg")))


def case_twin(root: Path) -> Path:
    for path in (bdd_image(root), bdd_label(root)):
        other = draw_scene(50, seed=0, size=SIZE)[path.suffix == ".png"]
        Image.fromarray(other).save(path.with_stem("ABCD"))
        path.rename(path.with_stem("abcd"))
    return root / "images/10k/train/abcd.jpg"


def same_name_twice(root: Path) -> Path:
    path = nth(root / "train", 1)
    Image.open(path).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def resave(path: Path) -> None:
    """Smaller and compressed, with its label."""
    label = next(path.parents[3].glob(f"labels/**/{path.stem}.png"))
    height, width = SIZE[0] * 9 // 10, SIZE[1] * 9 // 10
    Image.open(path).resize((width, height)).save(path, quality=60)
    Image.open(label).resize((width, height), Image.Resampling.NEAREST).save(label)


def resaved(root: Path) -> Path:
    path = copy_pair(root, "zz", "val")
    resave(path)
    return path


def train_ids_as_label_ids(root: Path) -> Path:
    for path in sorted((root / "gtFine" / "train").rglob("*_labelIds.png")):
        twin = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        twin.rename(path)
    return root


def void_split(root: Path) -> Path:
    for k in range(SCENES["val"]):
        change(lambda label: np.full_like(label, 255))(bdd_label(root, k, "val"))
    return root


def equal_labels(root: Path) -> Path:
    for k in range(1, SCENES["val"]):
        shutil.copy(bdd_label(root, 0, "val"), bdd_label(root, k, "val"))
    return root


def no_split(root: Path) -> Path:
    shutil.rmtree(root / "images/10k/val")
    return root / "images/10k/val"


def empty_split(root: Path) -> Path:
    for folder in ("images/10k/val", "labels/sem_seg/masks/val"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    return root


FAULTS: dict[str, tuple[str, Callable[[Path], Path], str, str]] = {
    "image missing": ("bdd100k", no_image, "pairing", "has no image (1 of 5"),
    "label missing": ("bdd100k", no_label, "pairing", "has no label (1 of 5"),
    "same name twice": ("camvid", same_name_twice, "pairing", "has the same name as"),
    "same name but for case": ("bdd100k", case_twin, "pairing", "upper and lower case"),
    "empty image": ("bdd100k", image_of(lambda p: p.write_bytes(b"")), "image file", "is an empty file"),
    "truncated JPEG": ("bdd100k", image_of(cut), "image file", "truncated JPEG"),
    "truncated PNG": ("cityscapes", png_of(cut), "image file", "truncated PNG"),
    "text as image": ("bdd100k", image_of(lambda p: p.write_text("hello")), "image file", "neither a PNG nor"),
    "damaged JPEG data": ("bdd100k", image_of(lose_block), "image file", "decodes to wrong pixels"),
    "damaged JPEG header": ("bdd100k", image_of(lambda p: overwrite(p, 3, b"\0" * 600)), "image file", "header"),
    "damaged PNG data": ("cityscapes", png_of(flip_bit), "image file", "cannot be decoded"),
    "damaged EXIF": ("bdd100k", image_of(damage_exif), "image file", "EXIF data are damaged"),
    "turned by EXIF": ("bdd100k", image_of(turn), "image file", "EXIF orientation is 6"),
    "huge image": ("bdd100k", image_of(huge_png), "image file", "its header claims"),
    "CMYK image": ("bdd100k", image_of(convert("CMYK", "JPEG")), "image file", "is a CMYK image"),
    "16-bit image": ("cityscapes", png_of(sixteen_bits), "image file", "16 bits a channel"),
    "dangling link": ("bdd100k", image_of(dangle), "image file", "cannot be read"),
    "folder as image": ("bdd100k", image_of(become_folder), "image file", "cannot be read"),
    "empty label": ("bdd100k", label_of(lambda p: p.write_bytes(b"")), "label file", "is an empty file"),
    "truncated label": ("bdd100k", label_of(cut), "label file", "truncated PNG"),
    "text as label": ("bdd100k", label_of(lambda p: p.write_text("hello")), "label file", "neither a PNG nor"),
    "JPEG as label": ("bdd100k", label_of(convert("RGB", "JPEG")), "label file", "a JPEG, which does not keep"),
    "colour label": ("bdd100k", label_of(convert("RGB", "PNG")), "label file", "is a colour image"),
    "16-bit label": ("bdd100k", label_of(change(lambda x: x.astype(np.uint16))), "label file", "16-bit label"),
    "damaged label": ("bdd100k", label_of(flip_bit), "label file", "cannot be decoded"),
    "huge label": ("bdd100k", label_of(huge_png), "label file", "its header claims"),
    "label of another size": ("bdd100k", label_of(change(lambda x: x[:-2])), "size", "is 192x94 but its image"),
    "value outside": ("bdd100k", label_of(change(lambda x: np.where(x == 0, 200, x).astype(np.uint8))), "values",
                      "label values 200 are outside"),
    "labelIds for trainIds": ("bdd100k", label_of(change(lambda x: np.where(x == 0, 33, x).astype(np.uint8))),
                              "values", "label values 33 are outside"),
    "trainIds for labelIds": ("cityscapes, both", train_ids_as_label_ids, "values", "trainIds in files named"),
    "split all void": ("bdd100k", void_split, "values", "no pixel of the split 'val'"),
    "labels all the same": ("bdd100k", equal_labels, "duplicate", "all 3 labels of the split 'val' are the same"),
    "image twice": ("bdd100k", lambda root: copy_pair(root, "zz"), "duplicate", "shows exactly what"),
    "image in two splits": ("bdd100k", lambda root: copy_pair(root, "zz", "val"), "leakage", "shows exactly what"),
    "image saved anew in two splits": ("bdd100k", resaved, "leakage", "saved anew or resized"),
    "no split": ("bdd100k", no_split, "layout", "there is no such folder"),
    "empty split": ("bdd100k", empty_split, "layout", "the split 'val' has no image"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_named_and_nothing_else(
    clean: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    layout, plant, check, text = FAULTS[fault]
    root = Path(shutil.copytree(clean(layout), tmp_path / "set"))
    path = plant(root)
    found = [one for one in diagnose(layout, root) if one.severity == "fault"]
    assert [(one.check, one.file) for one in found] == [(check, str(path))]
    assert text in found[0].problem
    assert found[0].fix
    assert found[0].split == (
        "val" if f"{os.sep}val" in str(path) or "'val'" in text or " two splits" in fault else "train"
    )


def test_the_hint_at_label_ids_is_kept(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    FAULTS["labelIds for trainIds"][1](root)
    (found,) = (one for one in diagnose("bdd100k", root) if one.check == "values")
    assert "labelIds in place of labelTrainIds" in found.fix


def test_many_faults_are_all_listed_by_any_number_of_workers(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    bdd_label(root, 4).unlink()
    cut(bdd_image(root, 0))
    change(lambda label: np.full((50, 60), 200, np.uint8))(bdd_label(root, 1))
    bdd_label(root, 2).write_bytes(b"")
    turn(bdd_image(root, 2))
    turn(bdd_image(root, 3))
    change(lambda label: label[:-2])(bdd_label(root, 3))
    shutil.copy(bdd_image(root, 1), bdd_image(root, 1, "val"))
    found = [one for one in diagnose("bdd100k", root) if one.severity == "fault"]
    assert sorted((one.split, one.check, one.file) for one in found) == sorted(
        [
            ("train", "pairing", str(bdd_image(root, 4))),
            ("train", "image file", str(bdd_image(root, 0))),
            ("train", "image file", str(bdd_image(root, 2))),
            ("train", "image file", str(bdd_image(root, 3))),
            ("train", "label file", str(bdd_label(root, 2))),
            ("train", "size", str(bdd_label(root, 3))),
            ("train", "size", str(bdd_label(root, 1))),
            ("train", "values", str(bdd_label(root, 1))),
            ("val", "leakage", str(bdd_image(root, 1, "val"))),
        ]
    )
    assert diagnose("bdd100k", root, workers=2) == diagnose("bdd100k", root)


def test_a_set_that_cannot_be_found_is_one_fault(tmp_path: Path) -> None:
    (found,) = diagnose("camvid", tmp_path / "absent")
    assert found[:4] == ("", "layout", "fault", "data.root")
    assert found.problem.startswith("there is no folder")


def test_the_wrong_layout_of_bdd100k(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    (root / "images/10k").rename(root / "images/100k")
    found = diagnose("bdd100k", root)
    assert [(one.split, one.check, one.file) for one in found] == [
        (split, "layout", str(root / "images/10k")) for split in ("train", "val")
    ]
    assert "another subset" in found[0].fix


def test_a_folder_named_like_a_key_is_a_folder(
    clean: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "data.v1"))
    shutil.rmtree(root / "images/10k/val")
    monkeypatch.chdir(tmp_path)
    fault, *others = diagnose("bdd100k", Path("data.v1"))
    assert others  # train was looked at
    found = [one for one in (fault, *others) if one.severity == "fault"]
    assert [(one.split, one.file) for one in found] == [("val", "data.v1/images/10k/val")]


def test_what_has_no_files_has_no_faults() -> None:
    assert find_faults(DataConfig(), ["train", "val"]) == []
    pack = DataConfig(name="bdd100k", packed=True, packed_folder="anywhere")
    assert find_faults(pack, ["train", "val"]) == []


# notices


def all_void(root: Path) -> Path:
    change(lambda label: np.full_like(label, 255))(bdd_label(root))
    return bdd_label(root)


def same_label(root: Path) -> Path:
    shutil.copy(bdd_label(root, 1), bdd_label(root, 2))
    return bdd_label(root, 2)


def other_size(root: Path) -> Path:
    change(lambda image: image[:-4])(bdd_label(root))
    Image.open(bdd_image(root)).crop((0, 0, SIZE[1], SIZE[0] - 4)).save(bdd_image(root), quality=95)
    return bdd_image(root)


def unread(name: str) -> Callable[[Path], Path]:
    def plant(root: Path) -> Path:
        path = bdd_image(root).with_name(name)
        path.write_bytes(bdd_image(root).read_bytes())
        return path

    return plant


NOTICES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "grey image": (image_of(convert("L", "JPEG")), "image file", "is grey"),
    "palette image": (image_of(convert("P", "PNG")), "image file", "has a palette"),
    "alpha channel": (image_of(convert("RGBA", "PNG")), "image file", "has an alpha channel"),
    "one colour": (image_of(change(np.zeros_like)), "image file", "of one colour"),
    "all void": (all_void, "values", "has no pixel of a class"),
    "the same label": (same_label, "duplicate", "though their images differ"),
    "another size": (other_size, "size", "there are 2 sizes: 4 of 192x96, 1 of 192x92"),
    "another ending": (unread("zz.jpeg"), "ignored", "is not read"),
    "ending in capitals": (unread("zz.JPG"), "ignored", "is not read"),
    "stray file": (unread("Thumbs.db"), "ignored", "is not read"),
}


@pytest.mark.parametrize("notice", NOTICES)
def test_each_oddity_is_told_but_is_no_fault(clean: Callable[[str], Path], tmp_path: Path, notice: str) -> None:
    plant, check, text = NOTICES[notice]
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    path = plant(root)
    found = [one for one in diagnose("bdd100k", root) if one.check != "classes"]
    assert [(one.severity, one.check, one.file) for one in found] == [("notice", check, str(path))]
    assert text in found[0].problem


def test_images_of_one_colour_are_not_copies(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    black = [bdd_image(root, 1), bdd_image(root, 2), bdd_image(root, 0, "val")]
    for path in black:
        change(np.zeros_like)(path)
    found = [one for one in diagnose("bdd100k", root) if one.check != "classes"]
    assert [(one.severity, one.check, one.file) for one in found] == [
        ("notice", "image file", str(path)) for path in black
    ]


def test_classes_that_training_never_sees(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    for split, number in SCENES.items():
        for k in range(number):
            path = bdd_label(root, k, split)
            gone = (0, 1) if split == "train" else (1,)  # road, sidewalk
            change(lambda label, gone=gone: np.where(np.isin(label, gone), 255, label))(path)  # type: ignore[misc]
    found = {one.problem for one in diagnose("bdd100k", root) if one.check == "classes"}
    assert any(one.startswith("the class 'road' never occurs in train, but in ") for one in found)
    assert "the class 'sidewalk' never occurs in train" in found
    assert not any("'building'" in one for one in found)


def test_neighbouring_frames_in_two_splits(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("camvid"), tmp_path / "set"))
    frames = {"train_0001": "0016E5_07920", "train_0002": "0016E5_08190", "val_0005": "0016E5_07959",
              "val_0006": "0016E5_08060"}  # fmt: skip
    for old, new in frames.items():
        for path in root.rglob(f"{old}.*"):
            path.rename(path.with_stem(new))
    (found,) = (one for one in diagnose("camvid", root) if one.check == "leakage")
    assert (found.split, found.severity, Path(found.file).stem) == ("val", "notice", "0016E5_07959")
    assert "is 39 frames from" in found.problem
    assert "1 of 3 images are less than 60 frames from one of train, and 2 are of its videos" in found.problem


def test_splits_that_count_by_themselves_are_no_video(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("camvid"), tmp_path / "set"))
    frames = {"train_0001": "a_001", "train_0002": "a_002", "val_0005": "a_002", "val_0006": "a_003"}
    for old, new in frames.items():
        for path in root.rglob(f"{old}.*"):
            path.rename(path.with_stem(new))
    assert not [one for one in diagnose("camvid", root) if one.check == "leakage"]


def test_nearly_the_same_pictures_are_told(clean: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(clean("camvid"), tmp_path / "set"))
    for old, new in (
        ("train/train_0000.jpg", "train/train_0001.jpg"),
        ("train/train_0003.jpg", "val/val_0006.jpg"),
    ):
        image = Image.open(root / old)
        image.crop((2, 2, SIZE[1] - 2, SIZE[0] - 2)).resize(image.size).save(root / new, quality=95)
    train, val = [one for one in diagnose("camvid", root) if one.check in ("duplicate", "leakage")]
    assert train[:4] == ("train", "duplicate", "notice", str(root / "train/train_0001.jpg"))
    assert "as 1 of 5 images do with another of train; 0 of these" in train.problem
    assert val[:4] == ("val", "leakage", "notice", str(root / "val/val_0006.jpg"))
    assert "as 1 of 3 images do with one of train" in val.problem


def test_copies_within_a_split_are_told_and_a_leak_is_listed_once(
    clean: Callable[[str], Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(clean("bdd100k"), tmp_path / "set"))
    resave(copy_pair(root, "yy"))
    (told,) = (one for one in diagnose("bdd100k", root) if one.check in ("duplicate", "leakage"))
    assert told[:4] == ("train", "duplicate", "notice", str(root / "images/10k/train/yy.jpg"))
    assert "1 of these can hardly be told apart" in told.problem
    leaked = copy_pair(root, "zz", "val")
    found = [one for one in diagnose("bdd100k", root) if one.severity == "fault"]
    assert [(one.check, one.file) for one in found] == [("leakage", str(leaked))]


# the pictures


def copies(image: np.ndarray) -> list[np.ndarray]:
    height, width = image.shape[:2]
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])[1]
    return [
        cv2.imdecode(jpeg, cv2.IMREAD_COLOR),
        cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA),
        cv2.resize(image, (width * 11 // 10, height * 11 // 10)),
        cv2.convertScaleAbs(image, alpha=0.8, beta=20),
    ]


def find_all(thumbnails: np.ndarray) -> np.ndarray:
    """All similar pairs: each image is a group of its own."""
    return find_similar(thumbnails, np.arange(len(thumbnails)))


def test_copies_are_similar_and_other_scenes_are_not() -> None:
    scenes = [draw_scene(i, seed=0, size=(192, 384))[0] for i in range(24)]
    pictures = [picture for scene in scenes for picture in [scene, *copies(scene)]]
    found = find_all(np.array([make_thumbnail(picture) for picture in pictures]))
    assert (found["i"] // 5 == found["j"] // 5).all()
    assert len(found) == 24 * 10  # every pair of the five of a scene
    assert found["agreement"].min() >= similarity.COPY


def test_dark_scenes_under_the_same_bonnet_are_not_copies() -> None:
    dice = np.random.default_rng(0)
    bonnet = np.zeros((192, 384, 3), np.uint8)
    cv2.ellipse(bonnet, (192, 202), (180, 38), 0, 0, 360, (70, 70, 80), -1)
    cv2.putText(bonnet, "2017-06-01 22:14", (8, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (200, 200, 200))
    pictures = []
    for i in range(40):
        scene = draw_scene(i, seed=0, size=(192, 384))[0] * 0.08 + dice.normal(0, 2, (192, 384, 3))
        pictures.append(np.maximum(scene.clip(0, 255).astype(np.uint8), bonnet))
    thumbnails = np.array([make_thumbnail(picture) for picture in [*pictures, copies(pictures[7])[0]]])
    found = find_all(thumbnails)
    assert found[["i", "j"]].tolist() == [(7, 40)]
    signs = np.array([similarity.hash_signs(thumbnail) for thumbnail in thumbnails])
    assert (
        sum(close.sum() for *_, close in similarity._candidates(signs)) > 20
    )  # by their hashes alone they would be


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [draw_scene(i, seed=0, size=SIZE)[0] for i in range(3)]
    thumbnails = np.array([make_thumbnail(one) for scene in scenes for one in (scene, *copies(scene))])
    expected = find_all(thumbnails)
    assert len(expected) == 30
    monkeypatch.setattr(similarity, "BLOCK", 2)
    found = find_all(thumbnails)
    assert found[["i", "j"]].tolist() == expected[["i", "j"]].tolist()
    np.testing.assert_allclose(found["agreement"], expected["agreement"], atol=1e-6)


def test_of_many_copies_the_best_of_each_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_thumbnail(draw_scene(0, seed=0, size=(192, 384))[0]).astype(np.int16)
    noise = np.random.default_rng(0).integers(-3, 4, (1000, *scene.shape))
    thumbnails, groups = (scene + noise).clip(0, 255).astype(np.uint8), np.arange(1000) // 500
    before = time.process_time()
    found = find_similar(thumbnails, groups)
    assert time.process_time() - before < 5  # a tenth of that; gathered pair by pair, many times that
    assert sorted(zip(groups[found["i"]].tolist(), found["j"].tolist(), strict=True)) == [
        *((0, j) for j in range(1, 1000)),
        *((1, j) for j in range(501, 1000)),
    ]
    few = find_all(thumbnails[490:510])
    monkeypatch.setattr(similarity, "BLOCK", 4)  # so that a group's images are in several
    for one in find_similar(thumbnails[490:510], groups[490:510]):
        rivals = few[(few["j"] == one["j"]) & (groups[490 + few["i"]] == groups[490 + one["i"]])]
        assert one["i"] == rivals["i"][rivals["agreement"].argmax()]


def test_camvid() -> None:
    root = os.environ.get("CAMVID_ROOT")
    if not root:
        pytest.skip("CAMVID_ROOT is not set")
    found = find_faults(DataConfig(name="camvid", root=root), ["train", "val", "test"])
    assert [one for one in found if one.severity == "fault"] == []
    told = {one.split: one for one in found if one.check == "leakage"}
    assert set(told) == {"val", "test"}
    assert "is 31 frames from" in told["val"].problem
    assert "101 are of its videos" in told["val"].problem
    assert "62 are of its videos" in told["test"].problem
    assert {one.split for one in found if one.check == "duplicate"} == {"train", "val", "test"}
