"""The cached teacher: its crops, its precision, what it refuses, and what is left where its writing is cut off."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cached import KEY, TAP, Pictures, Table, fill, learned
from forks import Forks

import engine.cache
from data.transforms import Geometry, crop_label, draw
from engine.cache import stride_of
from errors import ConfigurationError, DamagedFileError, MachineError, NonFiniteError, Terminated

Draws = list[tuple[Geometry, tuple[int, int]]]


def batch_of(geometries: list[Geometry], crop: tuple[int, int]) -> Any:
    """A batch of which image i is crop i of image i."""
    images = torch.zeros(len(geometries), 3, *crop)
    return SimpleNamespace(
        images=images, index=torch.arange(len(geometries)), geometry=torch.tensor(geometries, dtype=torch.int64)
    )


def draws(source: tuple[int, int], number: int, *, largest: tuple[int, int] = (64, 72)) -> Draws:
    """Random geometries in crops of several sizes, enlarged, shrunk, padded and flipped."""
    found: Draws = []
    for index in range(number):
        rng = np.random.default_rng([7, index])
        crop = [(16, 24), (17, 23), (40, 48), largest][index % 4]
        geometry, _ = draw(rng, source, crop, scale=(0.5, 2.0), flip=0.5, jitter=0.0, blur=0.0)
        found.append((geometry, crop))
    assert {geometry.flip for geometry, _ in found} == {0, 1}
    assert any(geometry.scaled_height < crop[0] for geometry, crop in found)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- geometry


def slow_crop(map_: np.ndarray, geometry: Geometry, crop: tuple[int, int], stride: int) -> np.ndarray:
    """A map under a crop, value by value, from the words of data/transforms.py."""
    rows, columns = math.ceil(crop[0] / stride), math.ceil(crop[1] / stride)
    result = np.zeros((len(map_), rows, columns))

    def place(centre: float, top: int, scaled: int, length: int) -> tuple[int, int, float]:
        at = (top + centre) / scaled * length - 0.5
        at = min(max(at, 0.0), length - 1.0)
        low = min(int(at), length - 1)
        return low, min(low + 1, length - 1), at - low

    for i in range(rows):
        y0, y1, v = place((i + 0.5) * crop[0] / rows, geometry.top, geometry.scaled_height, map_.shape[1])
        for j in range(columns):
            centre = (j + 0.5) * crop[1] / columns
            centre = crop[1] - centre if geometry.flip else centre
            x0, x1, u = place(centre, geometry.left, geometry.scaled_width, map_.shape[2])
            upper = (1 - u) * map_[:, y0, x0] + u * map_[:, y0, x1]
            lower = (1 - u) * map_[:, y1, x0] + u * map_[:, y1, x1]
            result[:, i, j] = (1 - v) * upper + v * lower
    return result


@pytest.mark.parametrize(("source", "stride"), [((48, 64), 4), ((50, 61), 4), ((33, 32), 16), ((40, 40), 1)])
def test_crops_are_those_of_the_slow_way(tmp_path: Path, source: tuple[int, int], stride: int) -> None:
    """Several images at a time, of logits and of features, which stand at twice the stride."""
    size = (math.ceil(source[0] / stride), math.ceil(source[1] / stride))
    coarse = (math.ceil(source[0] / stride / 2), math.ceil(source[1] / stride / 2))
    made = draws(source, 16)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((len(made), 5, *size))).float()
    features = torch.from_numpy(rng.standard_normal((len(made), 3, *coarse))).half().float()
    cached = fill(tmp_path, Table(logits, features), Pictures(len(made), source), storage="float16")
    for crop in {crop for _, crop in made}:
        ours = [index for index, (_, size) in enumerate(made) if size == crop]
        batch = batch_of([made[index][0] for index in ours], crop)
        batch.index = torch.tensor(ours)
        answer = cached(batch, [TAP])
        for row, index in enumerate(ours):
            for maps, answered, step in (
                (logits, answer.logits, stride),
                (features, answer.features[TAP], 2 * stride),
            ):
                expected = slow_crop(maps[index].numpy().astype(float), made[index][0], crop, step)
                assert answered[row].shape == expected.shape
                np.testing.assert_allclose(answered[row].numpy(), expected, atol=0.004)


def test_crops_meet_the_labels(tmp_path: Path) -> None:
    """Upsampled to the crop, a map that is a ramp over the image says where data/transforms.py took each label.

    A label is that of the nearest source pixel, and half a pixel off at most; where the map's border is held, the
    ramp says nothing.
    """
    source, stride = (96, 120), 4
    size = (source[0] // stride, source[1] // stride)
    centres = [(torch.arange(length) + 0.5) * stride - 0.5 for length in size]  # in source pixels
    ramp = torch.stack([centres[0][:, None].expand(size), centres[1][None].expand(size)])
    made = [
        pair for pair in draws(source, 24, largest=(96, 120)) if pair[1][0] % stride == pair[1][1] % stride == 0
    ]
    teacher = Table(ramp.expand(len(made), -1, -1, -1), torch.zeros(len(made), 1, 1, 1))
    cached = fill(tmp_path, teacher, Pictures(len(made), source), storage="float16", taps=())
    rows, columns = np.indices(source).astype(np.uint8)
    compared = 0
    for index, (geometry, crop) in enumerate(made):
        batch = batch_of([geometry], crop)
        batch.index = torch.tensor([index])
        upsampled = F.interpolate(cached(batch, ()).logits, size=crop, mode="bilinear")[0].numpy()
        taken = [crop_label(coordinates, geometry, crop) for coordinates in (rows, columns)]
        scale = geometry.scaled_height / source[0], geometry.scaled_width / source[1]
        for axis in range(2):
            edge = stride * max(1, 1 / scale[axis]) + 1  # held: half a position of the map and of the answer
            inside = (taken[axis] >= edge) & (taken[axis] < source[axis] - edge)
            # the answer's own border, where upsampling holds its outermost position
            border = math.ceil(stride / 2)
            inside[:border] = inside[-border:] = inside[:, :border] = inside[:, -border:] = False
            off = (upsampled[axis] - taken[axis])[inside]
            if off.size:
                assert np.abs(off).max() <= 0.5 / min(1.0, scale[axis]) + 0.05
                assert abs(off.mean()) < 0.3
                compared += off.size
    assert compared > 10_000


def test_strides() -> None:
    """Also of maps so small that the quotient of the sizes misleads."""
    assert stride_of(360, 480, 90, 120) == 4
    assert stride_of(362, 481, 91, 121) == 4
    assert stride_of(33, 32, 3, 2) == 16
    assert stride_of(90, 90, 30, 30) == 3


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(("storage", "limit"), [("uint8", 1e-3), ("float16", 1e-5)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_divergence_from_the_logits_in_float32(tmp_path: Path, storage: str, limit: float, offset: float) -> None:
    """Of logits of which some lie close together, taken through the same crops; at any height above 0."""
    made = [geometry for geometry, crop in draws((24, 32), 32) if crop == (16, 24)]
    teacher = learned(len(made), spread=2.0)
    teacher.logits += offset
    cached = fill(tmp_path, teacher, Pictures(len(made), (24, 32)), storage=storage)
    answer = cached(batch_of(made, (16, 24)), ())
    assert answer.logits.dtype == torch.float32
    total = 0.0
    for index, geometry in enumerate(made):
        exact = slow_crop(teacher.logits[index].numpy().astype(float), geometry, (16, 24), 4)
        wanted = torch.from_numpy(exact).log_softmax(0)
        found = answer.logits[index].double().log_softmax(0)
        total += float((wanted.exp() * (wanted - found)).sum(0).mean())
    assert 0 < total / len(made) <= limit


def test_what_is_stored(tmp_path: Path) -> None:
    """Each image at its place; far logits are clipped, and that is said; void is left out of what is right."""
    teacher = learned(7)
    teacher.logits[5, 2] -= 100.0
    teacher.logits[:, 0] += 10.0  # right by far
    said: list[str] = []
    cached = fill(tmp_path, teacher, Pictures(7, (24, 32)), said=said)
    for index in range(7):
        stored = np.load(tmp_path / f"shard_0000{index // 3}" / "logits.npy")[index % 3]
        exact = teacher.logits[index].numpy()
        below = np.minimum(exact.max(0) - exact, 25.5)
        assert np.abs(stored * 0.1 - below).max() <= 0.0501
        predictions = np.load(tmp_path / f"shard_0000{index // 3}" / "predictions.npy")[index % 3]
        assert np.array_equal(predictions, exact.argmax(0))
        assert predictions.dtype == np.uint8
    assert cached.shape(TAP) == (3, 3, 4)
    right = [float((one.argmax(0)[:3] == 0).double().mean()) for one in teacher.logits]
    clipped = (teacher.logits.max(1, keepdim=True)[0] - teacher.logits > 25.55).sum() / teacher.logits.numel()
    assert "7 images are written" in said[0]
    assert f"right at {100 * sum(right) / 7:.2f} % of their labelled positions" in said[-1]
    assert f"{100 * clipped:.2f} % of the logits clipped" in said[-1]


def test_bytes_are_announced(tmp_path: Path) -> None:
    """Before anything is written, and as they then are."""
    said: list[str] = []
    fill(tmp_path / "cache", learned(6), Pictures(6, (24, 32)), said=said)
    an_image = int(said[0].rpartition(", ")[2].removesuffix(" bytes an image").replace(",", ""))
    arrays = sum(
        len(data) for name, data in contents(tmp_path / "cache").items() if name.endswith((".npy", "sums.json"))
    )
    assert 0 <= 6 * an_image - arrays < 6


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    teacher = learned(7)
    teacher.logits[4, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="picture_4"):
        fill(tmp_path, teacher, Pictures(7, (24, 32)))


# -------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 7 images in 3 shards."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    fill(folder, learned(7), Pictures(7, (24, 32)))
    return folder


@pytest.mark.parametrize("field", [*KEY, "taps", "storage", "shard", "count", "format", "one more", "one less"])
def test_each_field_of_the_key_is_compared(whole: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"key": dict(KEY)}
    count, named = 7, field
    if field in KEY:
        options["key"][field] += "x"
    elif field == "one more":
        options["key"]["views"] = "flip"
        named = "views"
    elif field == "one less":
        del options["key"]["precision"]
        named = "precision"
    elif field == "format":
        monkeypatch.setattr(engine.cache, "FORMAT", "0")
    elif field == "count":
        count = 8
    else:
        options |= {"taps": {"taps": ("encoder.0",)}, "storage": {"storage": "float16"}, "shard": {"shard": 4}}[
            field
        ]
    before = contents(whole)
    with pytest.raises(DamagedFileError) as caught:
        fill(whole, learned(8), Pictures(count, (24, 32)), **options)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"teacher.cache.folder: {whole}: made for other {named} (")
    assert contents(whole) == before


def test_more_taps_than_wanted(whole: Path) -> None:
    """A cache with features serves who wants none; nothing is written."""
    before = contents(whole)
    without = fill(whole, learned(8), Pictures(7, (24, 32)), taps=())
    assert without.layout.taps == (TAP,)
    assert contents(whole) == before


def test_key_is_compared_as_it_stands(tmp_path: Path) -> None:
    """A letter of an escape may change its case and mean the same."""
    key = KEY | {"classes": "road, façade"}
    fill(tmp_path, learned(7), Pictures(7, (24, 32)), key=key)
    text = (tmp_path / "key.json").read_text()
    assert "\\u00e7" in text
    (tmp_path / "key.json").write_text(text.replace("\\u00e7", "\\u00E7"))
    with pytest.raises(DamagedFileError, match="key.json: damaged"):
        fill(tmp_path, learned(7), Pictures(7, (24, 32)), key=key)


def test_flipped_bits_are_noticed(whole: Path, tmp_path: Path) -> None:
    """100 at random, of every file at least one."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    data, teacher = Pictures(7, (24, 32)), learned(7)
    for number in range(100):
        path = files[number % len(files)]
        genuine = path.read_bytes()
        damaged = bytearray(genuine)
        damaged[rng.integers(len(genuine))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            fill(folder, teacher, data)
        path.write_bytes(genuine)
    fill(folder, teacher, data)
    assert set(teacher.asked) == set()  # nothing was missing


@pytest.mark.parametrize("name", ["logits.npy", "sums.json"])
def test_a_file_that_is_gone(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    (folder / "shard_00001" / name).unlink()
    with pytest.raises(DamagedFileError, match=r"shard_00001: incomplete .*; delete .*shard_00001 to have it"):
        fill(folder, learned(7), Pictures(7, (24, 32)))


def test_a_shard_of_another_cache(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(folder, learned(7), Pictures(7, (24, 32)), key=KEY | {"teacher": "c" * 64})
    shutil.rmtree(folder / "shard_00001")
    shutil.copytree(whole / "shard_00001", folder / "shard_00001")
    with pytest.raises(DamagedFileError, match="sums.json: damaged, or of another cache"):
        fill(folder, learned(7), Pictures(7, (24, 32)), key=KEY | {"teacher": "c" * 64})


def test_images_of_unequal_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^data.size: picture_5 is 32x25 but picture_0 is 32x24"):
        fill(tmp_path, learned(7), Pictures(7, (24, 32), odd=5))


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises((ConfigurationError, DamagedFileError), match=r"cache"):
        fill(tmp_path / "cache", learned(7), Pictures(7, (24, 32)))


# ----------------------------------------------------------------------------------- cut off, and a full disk


def test_missing_shards_alone_are_written(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "shard_00001")
    (folder / ".shard_00001.tmp").mkdir()
    (folder / ".shard_00001.tmp" / "logits.npy").write_text("half a file")
    teacher = learned(7)
    fill(folder, teacher, Pictures(7, (24, 32)))
    assert teacher.asked == [0, 3, 4, 5]  # the first for its size
    assert contents(folder) == contents(whole)


def test_stopped_by_a_signal(tmp_path: Path) -> None:
    with pytest.raises(Terminated, match="stopped by SIGTERM"):
        fill(tmp_path, learned(7), Pictures(7, (24, 32)), terminated=True)


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match="the cache takes .*B and 1.00 kB are free"):
        fill(tmp_path / "cache", learned(7), Pictures(7, (24, 32)))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("limit", [300, 500])
def test_a_full_disk_leaves_nothing(forks: Forks, tmp_path: Path, ranks: int, limit: int) -> None:
    """It meets the key, or the logits; of two processes the second."""
    folder = tmp_path / "cache"
    options = {"limit": limit, "rank": ranks - 1} if limit == 500 else {"limit": limit}
    outcomes = forks.call("paradigms.cached:in_process", str(folder), options, ranks=ranks)
    for outcome in outcomes:
        assert "MachineError" in outcome.text.splitlines()[-1], outcome.text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there_before(forks: Forks, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "shard_00001")
    before = contents(folder)
    outcome = forks.call("paradigms.cached:in_process", str(folder), {"limit": 500})[0]
    assert "MachineError" in outcome.text.splitlines()[-1], outcome.text
    assert contents(folder) == before


def test_two_processes_write_the_same(forks: Forks, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    outcomes = forks.call("paradigms.cached:in_process", str(folder), {}, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert all("opened 3 shards" in outcome.text for outcome in outcomes)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    ("options", "error"), [({"damaged": 4}, "picture_4"), ({"terminated": True, "rank": 1}, "Terminated")], ids=str
)
def test_an_error_of_one_process_ends_both(
    forks: Forks, tmp_path: Path, options: dict[str, Any], error: str
) -> None:
    outcomes = forks.call("paradigms.cached:in_process", str(tmp_path / "cache"), options, ranks=2, timeout=30)
    for outcome in outcomes:
        assert error in outcome.text.splitlines()[-1], outcome.text


def operations(forks: Forks, folder: Path) -> list[str]:
    """What is written, synced, renamed and deleted for the cache of `in_process`."""
    log = folder / "operations"
    cache = folder / "listed"
    watched = [str(cache), str(log)]
    outcome = forks.call("paradigms.cached:in_process", str(cache), {}, list_operations=watched)[0]
    assert outcome.code == 0, outcome.text
    return log.read_text().splitlines()


def killed_and_resumed(forks: Forks, whole: Path, folder: Path, number: int, ranks: int) -> None:
    killed = forks.call("paradigms.cached:in_process", str(folder), {}, kill_at=[str(folder), number])[0]
    assert killed.code == -9, killed.text
    for outcome in forks.call("paradigms.cached:in_process", str(folder), {}, ranks=ranks):
        assert outcome.code == 0, outcome.text
    assert contents(folder) == contents(whole), number


def test_killed_in_a_rename_and_resumed(forks: Forks, whole: Path, tmp_path: Path) -> None:
    """In writing the second shard, by one process and by two."""
    found = operations(forks, tmp_path)
    for number, ranks in ((found.index("replace .shard_00001.tmp"), 1), (found.index("write logits.npy") + 9, 2)):
        killed_and_resumed(forks, whole, tmp_path / f"cache_{number}", number, ranks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_anywhere_and_resumed(forks: Forks, whole: Path, tmp_path: Path) -> None:
    found = operations(forks, tmp_path)
    assert len(found) > 40
    for number in range(len(found)):
        killed_and_resumed(forks, whole, tmp_path / f"cache_{number}", number, 1 + number % 2)
