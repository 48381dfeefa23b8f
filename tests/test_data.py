"""Data sets from files written here: what is read, what the loaders yield, and the message for each fault."""

import os
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from data import CAMVID, CITYSCAPES, DataConfig, build_dataset, statistics, transforms
from data.labels import CITYSCAPES_TRAIN_IDS, label_id_table
from errors import ConfigurationError, MachineError

SIZE = (24, 32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEGDISTILL_CACHE", str(folder))
    return folder


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (size[1], size[0]), interpolation=cv2.INTER_CUBIC))


def values(seed: int, top: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, size).astype(np.uint8)


def write_camvid(root: Path, number: int = 6, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    for split in splits:
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(number):
            picture(i).save(root / split / f"scene_{i}.jpg", quality=95)
            Image.fromarray(values(i, 12)).save(root / f"{split}annot" / f"scene_{i}.png")
    return root


def write_cityscapes(root: Path, suffix: str = "labelIds", top: int = 34) -> Path:
    for i, city in enumerate(("aachen", "bonn", "aachen")):
        name = f"{city}_{i:06d}_000019"
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / "train" / city).mkdir(parents=True, exist_ok=True)
        picture(i).save(root / "leftImg8bit" / "train" / city / f"{name}_leftImg8bit.png")
        gt = root / "gtFine" / "train" / city
        Image.fromarray(values(i, top)).save(gt / f"{name}_gtFine_{suffix}.png")
        picture(i).save(gt / f"{name}_gtFine_color.png")
    return root


def write_bdd100k(root: Path, layout: str = "10k", palette: bool = False) -> Path:
    older = layout == "older"
    images = root / ("images/train" if older else "images/10k/train")
    labels = root / ("labels/train" if older else "labels/sem_seg/masks/train")
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i in range(3):
        picture(i).save(images / f"0a{i}.jpg")
        label = values(i, 20)
        label[label == 19] = 255
        mask = Image.fromarray(label)
        if palette:
            mask = mask.convert("P")
            mask.putdata(label.ravel().tolist())
            mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        mask.save(labels / (f"0a{i}_train_id.png" if older else f"0a{i}.png"))
    return root


def camvid(root: Path, **changed: Any) -> DataConfig:
    return DataConfig(name="camvid", root=str(root), **changed)


# reading


def test_camvid_is_read(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d")), "train")
    assert data.labels is CAMVID
    assert data.names == [f"scene_{i}" for i in range(6)]
    image, label = data.read(2)
    assert image.shape == (*SIZE, 3)
    assert np.abs(image.astype(int) - np.asarray(picture(2))).mean() < 12  # JPEG, and red is red
    expected = values(2, 12)
    np.testing.assert_array_equal(label, np.where(expected == 11, 255, expected))


def test_root_falls_back_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMVID_ROOT", str(write_camvid(tmp_path / "d")))
    assert len(build_dataset(DataConfig(name="camvid"), "val")) == 6


def test_cityscapes_label_ids_are_mapped(tmp_path: Path) -> None:
    data = build_dataset(DataConfig(name="cityscapes", root=str(write_cityscapes(tmp_path))), "train")
    assert data.names == ["aachen_000000_000019", "aachen_000002_000019", "bonn_000001_000019"]
    _, label = data.read(1)
    raw = values(2, 34)
    expected = np.vectorize(lambda v: CITYSCAPES_TRAIN_IDS.get(v, 255))(raw)
    np.testing.assert_array_equal(label, expected)
    assert label_id_table()[255] == 255


def test_cityscapes_train_ids(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, "labelTrainIds", 19)
    data = build_dataset(DataConfig(name="cityscapes", root=str(root)), "train")
    np.testing.assert_array_equal(data.read(0)[1], values(0, 19))


@pytest.mark.parametrize("layout", ["10k", "older"])
@pytest.mark.parametrize("palette", [False, True])
def test_bdd100k_layouts_and_palettes(tmp_path: Path, layout: str, palette: bool) -> None:
    data = build_dataset(DataConfig(name="bdd100k", root=str(write_bdd100k(tmp_path, layout, palette))), "train")
    assert data.labels is CITYSCAPES
    assert data.names == ["0a0", "0a1", "0a2"]
    expected = values(1, 20)
    np.testing.assert_array_equal(data.read(1)[1], np.where(expected == 19, 255, expected))


def test_streets() -> None:
    data = build_dataset(DataConfig(scenes=8, size=[32, 64]), "train")
    val = build_dataset(DataConfig(scenes=8, size=[32, 64]), "val")
    assert (len(data), len(val)) == (8, 2)
    image, label = data.read(0)
    assert image.shape == (32, 64, 3)
    assert label.shape == (32, 64)
    assert (val.read(0)[0] != image).any()
    assert data.label_counts().sum() == 8 * 32 * 64
    batch = next(iter(data.train_loader(batch_size=4, seed=0, start_step=0, steps=1)))
    assert batch.images.shape == (4, 3, 32, 64)


def test_omegaconf_accepts_the_configuration() -> None:
    config = OmegaConf.merge(
        OmegaConf.structured(DataConfig), OmegaConf.from_dotlist(["name=camvid", "crop=[240,320]", "size=null"])
    )
    made = OmegaConf.to_object(config)
    assert isinstance(made, DataConfig)
    assert made.crop == [240, 320]


# samples and loaders


def whole(loader: Any) -> list[Any]:
    return list(loader)


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def test_sample_replays_from_its_geometry(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), crop=[20, 40], blur=0.0, jitter=0.0), "train")
    for batch in data.train_loader(batch_size=3, seed=1, start_step=0, steps=8):
        assert batch.images.shape == (3, 3, 20, 40)
        assert batch.images.dtype == torch.float32
        assert all(field.dtype == torch.int64 for field in batch[1:5])
        for k in range(3):
            image, label = data.read(int(batch.index[k]))
            geometry = transforms.Geometry(*batch.geometry[k].tolist())
            assert geometry[:2] == SIZE
            expected = transforms.crop_label(label, geometry, (20, 40))
            np.testing.assert_array_equal(batch.labels[k].numpy(), expected)
            part = transforms.crop_image(image, geometry, (20, 40))
            table = transforms.colour_table(data.settings.mean, data.settings.std, transforms.Appearance())
            again = transforms.finish_image(
                part, (20, 40), geometry.flip, table, transforms.Appearance()
            ).transpose(2, 0, 1)
            np.testing.assert_array_equal(batch.images[k].numpy(), again)


def test_size_comes_before_everything(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), size=[12, 16]), "train")
    batch = next(iter(data.train_loader(batch_size=2, seed=0, start_step=0, steps=1)))
    assert batch.images.shape == (2, 3, 12, 16)
    assert batch.geometry[0, :2].tolist() == [12, 16]
    label = transforms.resize_label(data.read(int(batch.index[0]))[1], (12, 16))
    expected = transforms.crop_label(label, transforms.Geometry(*batch.geometry[0].tolist()), (12, 16))
    np.testing.assert_array_equal(batch.labels[0].numpy(), expected)
    one = next(iter(data.eval_loader()))
    assert one.images.shape == (1, 3, 12, 16)
    np.testing.assert_array_equal(one.labels[0].numpy(), data.read(0)[1])  # labels stay at label size


def test_without_augmentation_the_crop_is_central(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), crop=[8, 8], augment=False), "train")
    batch = next(iter(data.train_loader(batch_size=6, seed=0, start_step=0, steps=1)))
    for k in range(6):
        label = data.read(int(batch.index[k]))[1]
        np.testing.assert_array_equal(batch.labels[k].numpy(), label[8:16, 12:20])


def test_workers_change_no_byte(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), crop=[16, 16]), "train")
    settings: dict[str, Any] = {"batch_size": 4, "seed": 2, "start_step": 0, "steps": 5, "accumulate": 2}
    expected = whole(data.train_loader(**settings, workers=0))
    assert len(expected) == 10
    for workers in (1, 2):
        assert same(expected, whole(data.train_loader(**settings, workers=workers)))
    assert same(whole(data.eval_loader()), whole(data.eval_loader(workers=2)))


@pytest.mark.parametrize("sampling", ["uniform", "rare_class"])
def test_ranks_parts_and_a_later_start_give_the_same_batches(tmp_path: Path, sampling: str) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), crop=[16, 16], sampling=sampling), "train")
    settings: dict[str, Any] = {"batch_size": 4, "seed": 2, "steps": 4}
    expected = whole(data.train_loader(**settings, start_step=0))
    assert same(expected[2:], whole(data.train_loader(**settings, start_step=2)))
    for world_size in (1, 2):
        for accumulate in (1, 2):
            ranks = [
                whole(
                    data.train_loader(
                        **settings, start_step=0, rank=rank, world_size=world_size, accumulate=accumulate
                    )
                )
                for rank in range(world_size)
            ]
            for step, batch in enumerate(expected):
                for a in range(accumulate):
                    part = [ranks[rank][step * accumulate + a] for rank in range(world_size)]
                    joined = [torch.stack(fields, 1).flatten(0, 1) for fields in zip(*part, strict=True)]
                    piece = slice(a * 4 // accumulate, (a + 1) * 4 // accumulate)
                    assert all(torch.equal(x[piece], y) for x, y in zip(batch, joined, strict=True))


def test_same_image_twice_in_an_epoch_is_augmented_twice(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d", 2), crop=[16, 16]), "train")
    batch = next(iter(data.train_loader(batch_size=4, seed=0, start_step=0, steps=1)))
    assert batch.index[0] == batch.index[2]
    assert not torch.equal(batch.images[0], batch.images[2])
    assert data.steps_per_epoch(4) == 1


def test_evaluation_is_split_without_padding(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d", 7)), "val")
    for world_size in (1, 2, 3):
        seen = [
            int(batch.index)
            for rank in range(world_size)
            for batch in data.eval_loader(rank=rank, world_size=world_size)
        ]
        assert sorted(seen) == list(range(7))


def test_loader_leaves_torch_generator_alone(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), crop=[16, 16]), "train")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole(data.train_loader(batch_size=2, seed=0, start_step=0, steps=2, workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_size_must_divide(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d")), "train")
    with pytest.raises(ConfigurationError, match=r"^train\.batch_size: 6 is not a multiple of 2 .* 2 accum"):
        data.train_loader(batch_size=6, seed=0, start_step=0, steps=1, world_size=2, accumulate=2)


def test_seed_and_split_are_checked(tmp_path: Path) -> None:
    config = camvid(write_camvid(tmp_path / "d"))
    for seed in (-1, 2**32):
        with pytest.raises(ConfigurationError, match=rf"^seed: {seed} is outside"):
            build_dataset(config, "train").train_loader(batch_size=2, seed=seed, start_step=0, steps=1)
    with pytest.raises(ConfigurationError, match="^split: 'training' is unknown"):
        build_dataset(config, "training")  # type: ignore[arg-type]


# statistics


def test_class_weights_by_hand() -> None:
    """Two images, 3 classes of which the last never occurs: n = (60, 20, 0), 20 of 100 pixels unlabelled."""
    counts = np.array([[40, 0, 0, 10], [20, 20, 0, 10]], np.int64)
    f0, f1 = 0.75, 0.25
    hand = {
        "uniform": (1.0, 1.0, 1.0),
        "inverse": (2 * (1 / f0) / (1 / f0 + 1 / f1), 2 * (1 / f1) / (1 / f0 + 1 / f1), 1.0),
        "enet": (1 / np.log(1.02 + f0), 1 / np.log(1.02 + f1), 1 / np.log(1.02)),
    }
    q0, q1 = 60 / 100, 20 / 50  # class 0 is in both images, class 1 in one
    m = (q0 + q1) / 2
    hand["median"] = (2 * (m / q0) / (m / q0 + m / q1), 2 * (m / q1) / (m / q0 + m / q1), 1.0)
    beta = 1 - 1 / 40
    e0, e1 = (1 - beta) / (1 - beta**60), (1 - beta) / (1 - beta**20)
    hand["effective"] = (2 * e0 / (e0 + e1), 2 * e1 / (e0 + e1), 1.0)
    for scheme, expected in hand.items():
        found = statistics.class_weights(counts, scheme)  # type: ignore[arg-type]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=scheme)
    found = statistics.class_weights(counts, "effective", beta=0.9)
    e0, e1 = 0.1 / (1 - 0.9**60), 0.1 / (1 - 0.9**20)
    np.testing.assert_allclose(found[:2], [2 * e0 / (e0 + e1), 2 * e1 / (e0 + e1)], rtol=1e-6)


def test_class_weights_are_finite_for_huge_counts() -> None:
    counts = np.array([[10**11, 10**3, 0, 1]], np.int64)
    for scheme in ("uniform", "inverse", "median", "enet", "effective"):
        found = statistics.class_weights(counts, scheme)
        assert np.isfinite(found).all()
        assert (found > 0).all()
        assert found[1] >= found[0]


def test_counts_are_cached_by_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_camvid(tmp_path / "d")
    counts = build_dataset(camvid(root), "train").label_counts()
    expected = [np.bincount(values(i, 12).ravel(), minlength=12) for i in range(6)]
    np.testing.assert_array_equal(counts, expected)
    moved = tmp_path / "moved"
    shutil.move(root, moved)
    with monkeypatch.context() as patch:
        patch.setattr("data.dataset.read_label_values", None)  # counting again would fail
        np.testing.assert_array_equal(build_dataset(camvid(moved), "train").label_counts(), counts)
    Image.fromarray(values(99, 12)).save(moved / "trainannot" / "scene_0.png")
    assert (build_dataset(camvid(moved), "train").label_counts() != counts).any()


def test_damaged_cache_is_counted_again(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = camvid(write_camvid(tmp_path / "d"))
    counts = build_dataset(config, "train").label_counts()
    (file,) = cache.iterdir()
    for damage in (b"", file.read_bytes()[:-1], bytes(range(200))):
        file.write_bytes(damage)
        np.testing.assert_array_equal(build_dataset(config, "train").label_counts(), counts)
        assert "is damaged; the labels are counted again" in caplog.text
        caplog.clear()


def test_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SEGDISTILL_CACHE", str(blocked))
    assert len(build_dataset(camvid(write_camvid(tmp_path / "d")), "train")) == 6
    assert "label counts are not kept" in caplog.text


def test_manifest_hash(tmp_path: Path) -> None:
    root = write_camvid(tmp_path / "d")
    data = build_dataset(camvid(root), "train")
    assert len(data.manifest_hash()) == 64
    assert data.manifest_hash() == build_dataset(camvid(root), "train").manifest_hash()
    assert data.manifest_hash() != build_dataset(camvid(root), "val").manifest_hash()
    for path in (root / "train" / "scene_0.jpg", root / "trainannot" / "scene_0.png"):
        path.rename(path.with_stem("scene_00"))
    assert data.manifest_hash() != build_dataset(camvid(root), "train").manifest_hash()


def test_camvid_counts_are_those_of_its_table() -> None:
    root = os.environ.get("CAMVID_ROOT")
    if not root:
        pytest.skip("CAMVID_ROOT is not set")
    table = {
        "train": (10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967,
                  2503995),
        "val": (1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531, 387010,
                297271),
        "test": (6870982, 9906732, 473895, 10390661, 3731857, 4530895, 406612, 476807, 1599124, 255232, 76220,
                 1543383),
    }  # fmt: skip
    for split, expected in table.items():
        data = build_dataset(camvid(Path(root)), split)  # type: ignore[arg-type]
        assert tuple(data.label_counts().sum(0).tolist()) == expected


# faults: each gives one line that begins with the file or key


def set_label(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def damaged_png(path: Path) -> None:
    picture(0).save(path, format="PNG")
    flip_bit(path)


def huge_png(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))


def rotate_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(path, exif=exif)


def damaged_exif(path: Path) -> None:
    picture(0).save(path, exif=b"Exif\0\0nonsense that is no TIFF header")


def overwrite(path: Path, start: int, data: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:start] + data + old[start + len(data) :])


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


IMAGE, LABEL = "train/scene_3.jpg", "trainannot/scene_3.png"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "image missing": (LABEL, lambda p: (p.parents[1] / IMAGE).unlink(), r"has no image \(1 of 6"),
    "label missing": (IMAGE, lambda p: (p.parents[1] / LABEL).unlink(), r"has no label \(1 of 6"),
    "empty image": (IMAGE, lambda p: p.write_bytes(b""), "is an empty file"),
    "empty label": (LABEL, lambda p: p.write_bytes(b""), "is an empty file"),
    "truncated image": (IMAGE, cut, "is a truncated JPEG"),
    "truncated label": (LABEL, cut, "is a truncated PNG"),
    "text as image": (IMAGE, lambda p: p.write_text("hello"), "is neither a PNG nor a JPEG"),
    "text as label": (LABEL, lambda p: p.write_text("hello"), "is neither a PNG nor a JPEG"),
    "JPEG label": (LABEL, lambda p: picture(0).save(p, format="JPEG"), "a label must be a PNG"),
    "label of another size": (LABEL, lambda p: set_label(p, values(0, 11, (24, 30))), "is 30x24 but its image"),
    "value outside": (LABEL, lambda p: set_label(p, values(0, 11) + 3), "label values 12, 13 are outside"),
    "colour label": (LABEL, lambda p: picture(0).save(p), "is a colour image"),
    "16-bit label": (LABEL, lambda p: set_label(p, values(0, 11).astype(np.uint16)), "is a 16-bit label"),
    "1-bit label": (LABEL, lambda p: Image.new("1", SIZE[::-1]).save(p), "is a 1-bit label"),
    "damaged label": (LABEL, flip_bit, "cannot be decoded"),
    "damaged label header": (LABEL, lambda p: overwrite(p, 18, b"\x33"), "its header is damaged"),
    "damaged image header": (IMAGE, lambda p: overwrite(p, 3, b"\0" * 600), "its header is damaged"),
    "damaged EXIF": (IMAGE, damaged_exif, "EXIF data are damaged"),
    "rotated image": (IMAGE, rotate_by_exif, "EXIF orientation is 6"),
    "huge label": (LABEL, huge_png, "its header claims"),
    "huge image": (IMAGE, huge_png, "its header claims"),
    "same name twice": ("train/scene_3.png", lambda p: picture(0).save(p), "has the same name as"),
    "folder as file": (LABEL, replace_by_folder, "cannot be read"),
}  # fmt: skip


def one_line(error: BaseException, start: str, text: str) -> None:
    message = str(error)
    assert message.startswith(start), message
    assert text.replace("\\", "") in message, message
    assert "\n" not in message
    assert "; " in message  # what to do


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_when_the_data_set_is_built(tmp_path: Path, fault: str) -> None:
    name, harm, text = FAULTS[fault]
    root = write_camvid(tmp_path / "d", splits=("train",))
    harm(root / name)
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(camvid(root), "train")
    start = str(root / name)
    if fault == "same name twice":
        start = str(root / "train" / "scene_3.")
    one_line(caught.value, start, text)


def test_missing_root_and_empty_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAMVID_ROOT", raising=False)
    for name in ("camvid", "cityscapes", "bdd100k"):
        empty = "is empty and CAMVID_ROOT is not set" if name == "camvid" else "is empty; "
        for root, text in (("", empty), (str(tmp_path / "absent"), "there is no folder")):
            with pytest.raises(ConfigurationError) as caught:
                build_dataset(DataConfig(name=name, root=root), "train")
            one_line(caught.value, "data.root: ", text)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(camvid(tmp_path / "other"), "train")
    one_line(caught.value, str(tmp_path / "other" / "train"), "there is no such folder")
    write_camvid(tmp_path / "d", 0)
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(camvid(tmp_path / "d"), "train")
    one_line(caught.value, str(tmp_path / "d"), "the split 'train' has no images")


def test_all_void_split(tmp_path: Path) -> None:
    root = write_camvid(tmp_path / "d")
    for path in (root / "valannot").iterdir():
        set_label(path, np.full(SIZE, 11, np.uint8))
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(camvid(root), "val")
    one_line(caught.value, str(root), "no pixel of the split 'val' has a class")


@pytest.mark.parametrize(("top", "hint"), [(34, True), (200, False)])
def test_label_ids_in_place_of_train_ids(tmp_path: Path, top: int, hint: bool) -> None:
    root = write_cityscapes(tmp_path, "labelTrainIds", 19)
    bad = root / "gtFine" / "train" / "bonn" / "bonn_000001_000019_gtFine_labelTrainIds.png"
    label = values(0, 19)
    label[0, 0] = top
    set_label(bad, label)
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(DataConfig(name="cityscapes", root=str(root)), "train")
    one_line(caught.value, str(bad), f"label values {top} are outside the known 0..18 and 255")
    assert ("look like labelIds" in str(caught.value)) == hint


def test_bdd100k_of_the_wrong_layout(tmp_path: Path) -> None:
    subset = tmp_path / "subset"
    write_bdd100k(subset)
    (subset / "images" / "10k").rename(subset / "images" / "100k")
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(DataConfig(name="bdd100k", root=str(subset)), "train")
    one_line(caught.value, str(subset / "images" / "10k"), "another subset")

    one_gone = write_bdd100k(tmp_path / "gone")
    (one_gone / "images" / "10k" / "train" / "0a1.jpg").unlink()
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(DataConfig(name="bdd100k", root=str(one_gone)), "train")
    one_line(caught.value, str(one_gone / "labels" / "sem_seg" / "masks" / "train" / "0a1.png"), "another subset")

    mixed = write_bdd100k(tmp_path / "mixed")
    shutil.move(mixed / "labels" / "sem_seg" / "masks" / "train", mixed / "labels" / "train")
    shutil.rmtree(mixed / "labels" / "sem_seg")
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(DataConfig(name="bdd100k", root=str(mixed)), "train")
    one_line(caught.value, str(mixed / "labels" / "sem_seg" / "masks"), "the older layout")

    wrong = write_bdd100k(tmp_path / "wrong", "older")
    for path in (wrong / "labels" / "train").iterdir():
        path.rename(path.with_name(path.name.replace("_train_id", "")))
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(DataConfig(name="bdd100k", root=str(wrong)), "train")
    one_line(caught.value, str(wrong / "labels" / "train"), "holds no file *_train_id.png")

    (wrong / "images" / "test").mkdir()
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(DataConfig(name="bdd100k", root=str(wrong)), "test")
    one_line(caught.value, str(wrong / "labels" / "test"), "not public, use val")


BREAKS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": (IMAGE, cut, "is a truncated JPEG"),
    "gone": (LABEL, lambda p: p.unlink(), "cannot be read"),
    "another size": (IMAGE, lambda p: picture(0, (30, 30)).save(p), "is 30x30 but was 32x24 when"),
    "bad value": (LABEL, lambda p: set_label(p, values(0, 11) + 3), "label values 12, 13 are outside"),
    "not decodable": (IMAGE, damaged_png, "cannot be decoded"),
    "too large to decode": (IMAGE, huge_png, "cannot be decoded"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", BREAKS)
def test_a_file_that_breaks_during_the_run_is_one_line(tmp_path: Path, what: str, workers: int) -> None:
    name, harm, text = BREAKS[what]
    root = write_camvid(tmp_path / "d")
    data = build_dataset(camvid(root, crop=[16, 16]), "train")
    harm(root / name)
    with pytest.raises(ConfigurationError) as caught:
        whole(data.train_loader(batch_size=6, seed=0, start_step=0, steps=1, workers=workers))
    one_line(caught.value, str(root / name), text)
    with pytest.raises(ConfigurationError):
        whole(data.eval_loader(workers=workers))


def test_a_killed_worker_is_an_error_of_the_machine(tmp_path: Path) -> None:
    data = build_dataset(camvid(write_camvid(tmp_path / "d"), crop=[16, 16]), "train")
    parent, read = os.getpid(), data.read

    def die(index: int) -> tuple[np.ndarray, np.ndarray]:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(index)

    data.read = die  # type: ignore[method-assign]
    with pytest.raises(MachineError, match=r"^data\.workers: DataLoader worker \(pid"):
        whole(data.train_loader(batch_size=2, seed=0, start_step=0, steps=4, workers=1))


def test_images_of_unequal_size_need_a_crop(tmp_path: Path) -> None:
    root = write_camvid(tmp_path / "d")
    picture(0, (24, 40)).save(root / IMAGE)
    set_label(root / LABEL, values(0, 11, (24, 40)))
    data = build_dataset(camvid(root), "train")
    with pytest.raises(ConfigurationError) as caught:
        data.train_loader(batch_size=2, seed=0, start_step=0, steps=1)
    one_line(caught.value, str(root / IMAGE), "set data.crop or data.size")
    data = build_dataset(camvid(root, crop=[16, 16]), "train")
    assert len(whole(data.train_loader(batch_size=3, seed=0, start_step=0, steps=2))) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", [3]),
        ("crop", [0, 5]),
        ("scale", [2.0, 0.5]),
        ("scale", [0.0, 1.0]),
        ("flip", 1.5),
        ("blur", -0.1),
        ("jitter", 2.0),
        ("mean", [0.5]),
        ("std", [0.0, 1.0, 1.0]),
        ("workers", -1),
        ("rare_class_temperature", 0.0),
        ("scenes", 0),
    ],
)
def test_configuration_errors_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DataConfig(**{key: value})
    one_line(caught.value, f"data.{key}: ", "is not possible")
