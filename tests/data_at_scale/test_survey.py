"""Statistics of data sets: each figure on labels whose answer is known, and what is kept on disk."""

import logging
import multiprocessing
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data import DataConfig, build_dataset
from data.survey import (
    GRID,
    LARGE,
    SMALL,
    Survey,
    class_rows,
    cooccurrence,
    examine,
    findings,
    imbalance,
    instance_rows,
    priors,
    shift,
    shift_findings,
    split_row,
    survey,
)
from errors import ConfigurationError

SIZE = (36, 64)
SKY, ROAD, CAR, BICYCLIST, VOID = 0, 3, 8, 10, 11  # as CamVid's files have them


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEGDISTILL_CACHE", str(folder))
    return folder / "survey.sqlite"


def write(
    root: Path, labels: Sequence[np.ndarray], luma: Sequence[int] | None = None, split: str = "train"
) -> DataConfig:
    """CamVid's layout; each image is grey and of an even luma, with one other pixel that makes it the only one."""
    for folder in (split, f"{split}annot"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(labels):
        image = np.full((*label.shape, 3), 100 if luma is None else luma[i], np.uint8)
        image[0, 0] = i
        Image.fromarray(image).save(root / split / f"{i:03d}.jpg", quality=95)
        Image.fromarray(label.astype(np.uint8)).save(root / f"{split}annot" / f"{i:03d}.png")
    return DataConfig(name="camvid", root=str(root))


def random_labels(number: int, seed: int = 0, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 12, (number, 5, 7)).astype(np.uint8)
    return [cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST) for label in coarse]


def by_hand(label: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Pixels, boundary pixels and (class, area) of the objects, the slow way."""
    height, width = label.shape
    pixels = np.array([(label == c).sum() for c in range(classes)] + [(label == 255).sum()])
    boundary = np.zeros(classes, int)
    for y, x in np.argwhere(label < classes):
        around = label[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        boundary[label[y, x]] += bool(((around != label[y, x]) & (around != 255)).any())
    objects = []
    for c in range(classes):
        marks, number = ndimage.label(label == c, np.ones((3, 3)))
        areas = np.bincount(marks.ravel(), minlength=number + 1)[1:]
        objects += [(c, int(area)) for area in areas if area >= 10]
    return pixels, boundary, objects


# one image


def test_objects_pixels_and_boundaries_of_a_drawn_label() -> None:
    label = np.zeros((12, 20), np.uint8)
    label[1:5, 1:5] = 1  # 16 pixels, and at its corner 16 more: one object
    label[5:9, 5:9] = 1
    label[1:4, 10:13] = 2  # 9 pixels: a speck
    label[6:8, 12:17] = 2  # 10: an object
    label[:, 19] = 255
    record = examine(label, np.full((2, 3), 7, np.uint8), 4)
    assert record.size.tolist() == [12, 20]
    assert record.pixels.tolist() == [240 - 32 - 19 - 12, 32, 19, 0, 12]
    objects = list(zip(record.object_class.tolist(), record.object_area.tolist(), strict=True))
    assert objects == [(0, 177), (1, 32), (2, 10)]
    # blocks of 4x4 have 12 at their rim, the speck 8, the object of two rows all 10; void at the right makes none
    assert record.boundary[1:].tolist() == [24, 18, 0]
    assert record.boundary.tolist() == by_hand(label, 4)[1].tolist()
    assert record.luma.tolist() == [7.0, 0.0]


def test_void_is_no_class_beside_a_pixel() -> None:
    label = np.full((6, 6), 1, np.uint8)
    label[:, 3:] = 255
    assert examine(label, np.zeros((1, 1), np.uint8), 3).boundary.tolist() == [0, 0, 0]
    label[0, 3] = 0  # beside two pixels of class 1
    assert examine(label, np.zeros((1, 1), np.uint8), 3).boundary.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("size", "classes"), [((30, 40), 5), ((1, 50), 3), ((50, 1), 3), ((290, 310), 3)])
def test_records_equal_the_slow_way_on_noise(size: tuple[int, int], classes: int) -> None:
    """The last is so noisy that components are counted in 32 bits."""
    rng = np.random.default_rng(5)
    label = rng.integers(0, classes + 1, size).astype(np.uint8)
    label[label == classes] = 255
    record = examine(label, np.zeros((1, 1), np.uint8), classes)
    pixels, boundary, objects = by_hand(label, classes)
    assert record.pixels.tolist() == pixels.tolist()
    assert record.boundary.tolist() == boundary.tolist()
    assert sorted(zip(record.object_class.tolist(), record.object_area.tolist(), strict=True)) == sorted(objects)


def test_many_provisional_components_are_not_confused() -> None:
    """A grid of 70 225 lone pixels, and one object below it: 16 bits would overflow."""
    label = np.zeros((540, 530), np.uint8)
    label[:530:2, ::2] = 1
    label[535:, 100:200] = 1
    record = examine(label, np.zeros((1, 1), np.uint8), 2)
    assert record.object_area[record.object_class == 1].tolist() == [500]
    assert record.pixels[1] == 265 * 265 + 500


def test_places_are_sampled_in_the_middle_of_each_cell() -> None:
    label = np.repeat(np.repeat(np.arange(36 * 64).reshape(GRID) % 7, 4, 0), 4, 1).astype(np.uint8)
    label[::4] = label[3::4] = label[:, ::4] = 9  # but for the middles of the cells
    np.testing.assert_array_equal(examine(label, label, 10).places, np.arange(36 * 64).reshape(GRID) % 7)


# a split


def test_a_split_is_the_sum_of_its_images(tmp_path: Path) -> None:
    labels = random_labels(9)
    s = survey(write(tmp_path / "d", labels, range(10, 190, 20)), "train", workers=1)
    assert s.names == [f"{i:03d}" for i in range(9)]
    kinds = [np.where(label == VOID, 255, label) for label in labels]
    found = [by_hand(kind, 11) for kind in kinds]
    np.testing.assert_array_equal(s.pixels, [pixels for pixels, _, _ in found])
    np.testing.assert_array_equal(s.boundary, [boundary for _, boundary, _ in found])
    objects = sorted((i, c, area) for i, (_, _, those) in enumerate(found) for c, area in those)
    mine = zip(s.object_image.tolist(), s.object_class.tolist(), s.object_area.tolist(), strict=True)
    assert sorted(mine) == objects
    np.testing.assert_allclose(s.object_share, s.object_area / (36 * 64))
    np.testing.assert_allclose(s.brightness, range(10, 190, 20), atol=2)
    np.testing.assert_array_equal(
        s.pixels, build_dataset(DataConfig(name="camvid", root=str(tmp_path / "d")), "train").label_counts()
    )
    image, label = s.read(4)
    np.testing.assert_array_equal(label, kinds[4])
    assert image.shape == (*SIZE, 3)


def test_brightness_by_reduced_decoding_is_that_of_the_whole_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(
        rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (200, 133), interpolation=cv2.INTER_CUBIC
    )
    luma = image @ [0.299, 0.587, 0.114]
    for suffix, options in ((".jpg", {"quality": 95}), (".png", {})):
        root = tmp_path / suffix[1:]
        config = write(root, [np.zeros((133, 200), np.uint8)])
        (root / "train" / "000.jpg").unlink()
        Image.fromarray(image).save(root / "train" / f"000.{suffix[1:]}", **options)
        if suffix == ".png":  # CamVid's images may be either
            os.rename(root / "train" / "000.png", root / "train" / "000.jpg")
        s = survey(config, "train", workers=1)
        assert abs(s.brightness[0] - luma.mean()) < 1.5
        assert 0.9 * luma.std() < s.contrast[0] < 1.05 * luma.std()


def test_png_and_jpeg_of_fine_detail_have_the_same_contrast(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 1), dtype=np.uint8).repeat(3, 2)
    contrasts = []
    for suffix, options in (("JPEG", {"quality": 98}), ("PNG", {})):
        config = write(tmp_path / suffix, [np.zeros((128, 256), np.uint8)])
        Image.fromarray(image).save(tmp_path / suffix / "train" / "000.jpg", suffix, **options)
        contrasts.append(survey(config, "train", workers=1).contrast[0])
    assert contrasts[0] == pytest.approx(image.std() / 8, rel=0.1)  # of means of 64
    assert contrasts[1] == pytest.approx(contrasts[0], rel=0.03)


@pytest.fixture
def known(tmp_path: Path) -> Survey:
    """Four images: sky everywhere; road in three; car in two of those, once large; a bicyclist in the first."""
    labels = [np.full(SIZE, SKY) for _ in range(4)]
    for label in labels[:3]:
        label[18:] = ROAD
    labels[0][20:30, 0:10] = CAR  # 100 of 2304 pixels: large
    labels[1][20:22, 0:6] = CAR  # 12: medium, as 1/300 are 7.7
    labels[1][34:36, 20:30] = VOID
    labels[0][30:32, 40:45] = BICYCLIST
    return survey(write(tmp_path / "known", labels, [30, 60, 90, 120]), "train", name="known", workers=1)


def test_cooccurrence(known: Survey) -> None:
    matrix = cooccurrence(known)
    assert matrix[SKY].tolist() == [1, 0, 0, 0.75, 0, 0, 0, 0, 0.5, 0, 0.25]
    assert matrix[CAR, [SKY, ROAD, CAR, BICYCLIST]].tolist() == [1, 1, 1, 0.5]
    assert matrix[BICYCLIST, [SKY, ROAD, CAR, BICYCLIST]].tolist() == [1, 1, 1, 1]
    assert np.isnan(matrix[1]).all()


def test_spatial_priors(known: Survey) -> None:
    where = priors(known)
    assert where.shape == (11, *GRID)
    assert (where[SKY, :18] == 1).all()
    assert (where[SKY, 18:] == 0.25).all()
    assert where[CAR, 20, 2] == 0.5
    assert where[CAR, 25, 2] == 0.25
    assert where[BICYCLIST].sum() == 10 / 4
    assert (where.sum(0)[34:36, 20:30] == 0.75).all()  # void in one of four


def test_instances(known: Survey) -> None:
    rows = {row["class"]: row for row in instance_rows(known)}
    car = rows["car"]
    assert (car["instances"], car["per_image_that_shows_it"]) == (2, 1.0)
    assert (car["small_share"], car["medium_share"], car["large_share"]) == (0, 0.5, 0.5)
    assert car["area_median"] == pytest.approx((12 + 100) / 2 / 2304)
    assert rows["bicyclist"]["medium_share"] == 1  # 10 pixels
    assert rows["tree"]["instances"] == 0
    assert np.isnan(rows["tree"]["area_median"])
    assert [limit * 640 * 480 for limit in (SMALL, LARGE)] == pytest.approx([32**2, 96**2])


def test_class_rows(known: Survey) -> None:
    rows = {row["class"]: row for row in class_rows(known)}
    labelled = 4 * 2304 - 20
    assert rows["car"]["pixels"] == 112
    assert rows["car"]["pixel_share"] == pytest.approx(112 / labelled)
    assert (rows["car"]["images"], rows["car"]["image_share"]) == (2, 0.5)
    assert (rows["car"]["pixels_per_image_mean"], rows["car"]["pixels_per_image_median"]) == (56, 56)
    assert rows["car"]["boundary_share"] == pytest.approx(known.boundary[:, CAR].sum() / 112)
    n = np.array([rows[name]["pixels"] for name in known.labels.names], float)
    beta = 1 - 1 / n[n > 0].mean()
    for name, number in zip(known.labels.names, n, strict=True):
        assert rows[name]["effective_number"] == pytest.approx((1 - beta**number) / (1 - beta), abs=1e-9)
    ratio = rows["bicyclist"]["effective_number"] / rows["sky"]["effective_number"]
    assert rows["sky"]["weight_effective"] / rows["bicyclist"]["weight_effective"] == pytest.approx(
        ratio, rel=1e-5
    )
    inverse = rows["bicyclist"]["weight_inverse"] / rows["sky"]["weight_inverse"]
    assert inverse == pytest.approx(rows["sky"]["pixels"] / 10, rel=1e-5)


def test_the_split_as_a_whole(known: Survey) -> None:
    row = split_row(known)
    assert (row["images"], row["size"], row["pixels"]) == (4, "64x36", 4 * 2304)
    assert row["void_share"] == pytest.approx(20 / (4 * 2304))
    assert (row["night_share"], row["dusk_share"], row["day_share"]) == (0.25, 0.25, 0.5)
    assert row["imbalance"] == imbalance(known) == known.pixels[:, SKY].sum() / 10
    said = " ".join(findings(known))
    assert "pixels of sky" in said
    assert "bicyclist (0.11 %, in 25 % of the images)" in said
    assert "bicyclist ×4" in said
    assert "fence and pedestrian never occur here" in said
    assert "×4" not in " ".join(findings(known, advice=False))


def test_sizes_may_differ(tmp_path: Path) -> None:
    labels = [*random_labels(3), *random_labels(1, size=(20, 30))]
    s = survey(write(tmp_path, labels), "train", workers=1)
    assert split_row(s)["size"] == "64x36 and 1 more"
    assert s.sizes.tolist() == [[36, 64]] * 3 + [[20, 30]]


def test_drawn_scenes_are_surveyed_once(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(scenes=6)
    s = survey(config, "train", workers=1)
    np.testing.assert_array_equal(s.pixels, build_dataset(config, "train").label_counts())
    again = survey(config, "train", workers=1)
    assert (s.known, again.known) == (0, 6)
    equal(s, again)
    assert survey(DataConfig(scenes=6, streets_seed=1), "train", workers=1).known == 0


# what is kept


def equal(a: Survey, b: Survey) -> None:
    for key in ("pixels", "boundary", "object_image", "object_class", "object_area", "places", "brightness"):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key), err_msg=key)


def test_a_second_survey_knows_all_but_what_changed(tmp_path: Path) -> None:
    labels = random_labels(5)
    config = write(tmp_path / "d", labels)
    first, second = survey(config, "train", workers=1), survey(config, "train", workers=1)
    assert (first.known, second.known) == (0, 5)
    equal(first, second)
    write(tmp_path / "d", [*labels[:4], labels[4] * 0])  # another label
    changed = survey(config, "train", workers=1)
    assert changed.known == 4
    assert changed.pixels[4, SKY] == 36 * 64
    image = np.full((*SIZE, 3), 200, np.uint8)
    Image.fromarray(image).save(tmp_path / "d" / "train" / "001.jpg")  # another image
    changed = survey(config, "train", workers=1)
    assert changed.known == 4
    assert changed.brightness[1] == pytest.approx(200, abs=1)


def test_another_table_is_another_record(tmp_path: Path) -> None:
    """The same files read by other classes: CamVid's 11 is void, and a class of one's own data set."""
    labels = random_labels(2)
    survey(write(tmp_path / "d", labels), "train", workers=1)
    os.makedirs(tmp_path / "own" / "images")
    os.makedirs(tmp_path / "own" / "masks")
    os.rename(tmp_path / "d" / "train", tmp_path / "own" / "images" / "train")
    os.rename(tmp_path / "d" / "trainannot", tmp_path / "own" / "masks" / "train")
    (tmp_path / "own" / "classes.yaml").write_text(f"names: [{', '.join(f'c{i}' for i in range(12))}]\n")
    own = survey(DataConfig(name="folder", root=str(tmp_path / "own")), "train", workers=1)
    assert own.known == 0
    assert own.pixels[:, 11].sum() == sum((label == VOID).sum() for label in labels)


def test_a_damaged_record_is_made_anew(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write(tmp_path / "d", random_labels(4))
    first = survey(config, "train", workers=1)
    with sqlite3.connect(cache) as file:
        key, body = file.execute("SELECT key, body FROM records").fetchone()
        flipped = body[:50] + bytes([body[50] ^ 1]) + body[51:]
        file.execute("UPDATE records SET body = ? WHERE key = ?", (flipped, key))
    file.close()
    with caplog.at_level(logging.WARNING):
        second = survey(config, "train", workers=1)
    assert second.known == 3
    assert "a record is damaged" in caplog.text
    equal(first, second)
    assert survey(config, "train", workers=1).known == 4


@pytest.mark.parametrize("damage", ["text", "cut", "zeros"])
def test_a_damaged_cache_begins_anew(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = write(tmp_path / "d", random_labels(30))
    first = survey(config, "train", workers=1)
    data = cache.read_bytes()
    cut = {
        "text": b"not a database" * 100,
        "cut": data[: len(data) // 2],
        "zeros": data[:4096] + bytes(len(data) - 4096),
    }
    cache.write_bytes(cut[damage])
    with caplog.at_level(logging.WARNING):
        second = survey(config, "train", workers=1)
    assert "is damaged" in caplog.text
    equal(first, second)
    assert survey(config, "train", workers=1).known == 30


def test_without_a_place_to_keep_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = write(tmp_path / "d", random_labels(3))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert survey(config, "train", workers=1).known == 0
        assert survey(config, "train", workers=1).known == 0
    assert "what the survey finds is not kept" in caplog.text


def _survey_both(config: DataConfig, results: Any) -> None:
    results.put(survey(config, "train", workers=1).pixels.sum(0).tolist())


def test_processes_share_the_records(tmp_path: Path, cache: Path) -> None:
    config = write(tmp_path / "d", random_labels(40))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_survey_both, args=(config, results)) for _ in range(2)]
    for process in both:
        process.start()
    sums = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sums[0] == sums[1]
    workers = survey(config, "train", workers=2)
    assert workers.known == 40
    cache.unlink()
    fresh = survey(config, "train", workers=2)
    assert fresh.known == 0
    equal(workers, fresh)


# what is wrong


def test_wrong_files_are_named(tmp_path: Path) -> None:
    labels = random_labels(3)
    config = write(tmp_path / "d", labels)
    path = tmp_path / "d" / "trainannot" / "001.png"
    for wrong, said in (
        (np.full(SIZE, 77, np.uint8), "label values 77 are outside"),
        (np.zeros((36, 63), np.uint8), "is 63x36 but its image"),
    ):
        Image.fromarray(wrong).save(path)
        with pytest.raises(ConfigurationError, match=said) as error:
            survey(config, "train", workers=2)
        assert str(error.value).startswith(str(path))
    write(tmp_path / "d", labels)
    image = tmp_path / "d" / "train" / "002.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(ConfigurationError, match="002.jpg: is a truncated JPEG"):
        survey(config, "train", workers=1)


def test_a_split_without_a_class(tmp_path: Path) -> None:
    config = write(tmp_path / "d", [np.full(SIZE, VOID)])
    with pytest.raises(ConfigurationError, match="no pixel of 'train' has a class; check the labels"):
        survey(config, "train", workers=1)


# shifts


def measured(rows: list[dict[str, Any]], measure: str, name: str = "") -> dict[str, Any]:
    return next(row for row in rows if row["measure"] == measure and row["class"] == name)


def test_equal_splits_do_not_shift(tmp_path: Path) -> None:
    s = survey(write(tmp_path / "d", random_labels(12)), "train", workers=1)
    rows = shift(s, s)
    assert not any(row["marked"] for row in rows)
    assert all(row["shift"] == pytest.approx(0, abs=1e-6) for row in rows if not np.isnan(row["shift"]))
    assert all(row["chance"] > 0 for row in rows if row["measure"] == "pixels")
    assert [row["chance"] for row in shift(s, s)] == [row["chance"] for row in rows]
    assert [line for line in shift_findings(s, s, rows) if "divergence" not in line] == []


def test_halves_of_one_population_hardly_shift(tmp_path: Path) -> None:
    luma = np.random.default_rng(3).integers(20, 200, 120)
    a = survey(write(tmp_path / "a", random_labels(60, 1), luma[:60]), "train", name="a", workers=1)
    b = survey(write(tmp_path / "b", random_labels(60, 2), luma[60:]), "train", name="b", workers=1)
    rows = shift(a, b)
    assert sum(row["marked"] for row in rows) <= 1


def test_planted_shifts_are_marked(tmp_path: Path) -> None:
    """In b the cars are larger, lower and twice as many pixels, the images darker, and there is a bicyclist."""
    rng = np.random.default_rng(0)
    sets: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    for name, labels in sets.items():
        for i in range(40):
            label = np.full(SIZE, SKY)
            label[18:] = ROAD
            x = int(rng.integers(0, 50))
            if name == "a":
                label[2:4, x : x + 5 + i % 5] = CAR
            else:
                label[30:34, x : x + 5 + i % 5] = CAR
                label[20:22, 0:8] = BICYCLIST
            labels.append(label)
    a = survey(write(tmp_path / "a", sets["a"], rng.integers(120, 140, 40)), "train", name="a", workers=1)
    b = survey(write(tmp_path / "b", sets["b"], rng.integers(30, 50, 40)), "train", name="b", workers=1)
    rows = shift(a, b)
    for measure in ("pixels", "size"):
        row = measured(rows, measure, "car")
        assert row["shift"] == pytest.approx(1)
        assert row["marked"]
        assert row["b"] == pytest.approx(2 * row["a"])
    assert measured(rows, "place", "car")["shift"] == pytest.approx(1)  # nowhere the same
    assert measured(rows, "place", "car")["marked"]
    assert measured(rows, "images", "car")["shift"] == 0
    assert not measured(rows, "images", "car")["marked"]
    assert measured(rows, "pixels", "bicyclist")["shift"] == np.inf
    assert measured(rows, "pixels", "bicyclist")["marked"]
    assert np.isnan(measured(rows, "pixels", "tree")["shift"])
    assert abs(measured(rows, "pixels", "sky")["shift"]) < 0.1
    assert measured(rows, "brightness")["shift"] == pytest.approx(1)
    assert measured(rows, "brightness")["marked"]
    said = " ".join(shift_findings(a, b, rows))
    assert "bicyclist only there" in said
    assert "car ×2" in said
    opposite = shift(b, a)
    assert measured(opposite, "pixels", "car")["shift"] == pytest.approx(-1)
    assert "bicyclist not there" in " ".join(shift_findings(b, a, opposite))


# real images


@pytest.mark.skipif("CAMVID_ROOT" not in os.environ, reason="CAMVID_ROOT names no CamVid")
def test_camvid_has_the_pixels_that_are_known_of_it() -> None:
    lines = (Path(os.environ["CAMVID_ROOT"]) / "README.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") == 5]
    expected = {cells[0]: [int(cell) for cell in cells[1:]] for cells in table if cells[1].isdigit()}
    assert len(expected) == 12
    for k, (split, images) in enumerate({"train": 367, "val": 101, "test": 233}.items()):
        s = survey(DataConfig(name="camvid"), split, workers=2)  # type: ignore[arg-type]
        assert len(s.names) == images
        found = dict(zip([*s.labels.names, "void"], s.pixels.sum(0).tolist(), strict=True))
        assert found == {name: numbers[k] for name, numbers in expected.items()}
