"""Packed images: the same pixels as the source's, whole or not there, and never of other files."""

import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from forks import Forks
from PIL import Image

from data import Batch, DataConfig, build_dataset, packed, transforms
from data.dataset import count_classes
from data.files import read_image
from data.packed import PackedData, pack_folder, write_pack
from data.streets.write import write_bdd100k, write_cityscapes
from data.transforms import resize_image
from errors import ConfigurationError, DamagedFileError, MachineError, UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = (48, 80)
CROP = [32, 48]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "SHARD", 2)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five images in each of three layouts: PNGs with labelIds, JPEGs with trainIds, JPEGs and a PNG."""
    root = tmp_path_factory.mktemp("sources")
    write_cityscapes(root / "cityscapes", scenes={"train": 5}, size=SIZE)
    write_bdd100k(root / "bdd100k", scenes={"train": 5}, size=SIZE)
    for folder in ("train", "trainannot"):
        (root / "camvid" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(5):
        suffix = "png" if i == 3 else "jpg"
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"camvid/train/scene_{i}.{suffix}"), cv2.resize(small, SIZE[::-1]))
        label = np.repeat(np.repeat(rng.integers(0, 12, (6, 8), dtype=np.uint8), 8, 0), 10, 1)
        Image.fromarray(label).save(root / f"camvid/trainannot/scene_{i}.png")
    return {name: root / name for name in ("cityscapes", "bdd100k", "camvid")}


Make = Callable[..., DataConfig]


@pytest.fixture
def make(sources: dict[str, Path], tmp_path: Path) -> Make:
    """The configuration of a data set whose pack is in a folder of the test."""

    def configure(name: str = "camvid", **changed: Any) -> DataConfig:
        given = {
            "root": str(sources[name]),
            "packed_folder": str(tmp_path / "packed"),
            "crop": CROP,
            "packed": True,
        }
        return DataConfig(name=name, **given | changed)  # type: ignore[arg-type]

    return configure


def write(config: DataConfig, workers: int = 1) -> list[str]:
    """Packs the training split; what was said."""
    said: list[str] = []
    write_pack(config, "train", workers, said.append)
    return said


def opened(config: DataConfig) -> tuple[PackedData, Any]:
    """The packed split and the source."""
    found = build_dataset(config, "train")
    assert isinstance(found, PackedData)
    return found, build_dataset(replace(config, packed=False), "train")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_batches_are_equal(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# pixels


@pytest.mark.parametrize("name", ["cityscapes", "bdd100k", "camvid"])
def test_raw_is_the_source(make: Make, name: str) -> None:
    config = make(name)
    write(config)
    data, source = opened(config)
    assert data.names == source.names
    assert data.labels == source.labels
    assert data.manifest_hash() == source.manifest_hash()
    np.testing.assert_array_equal(data.label_counts(), source.label_counts())
    for index in range(5):
        for found, wanted in zip(data.read(index), source.read(index), strict=True):
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, wanted)
            assert isinstance(found.base, np.ndarray)  # a view, not a copy
        assert_batches_are_equal(data.sample((0, 7, index), seed=3), source.sample((0, 7, index), seed=3))


@pytest.mark.parametrize("size", [[24, 40], [64, 100]])
def test_resized_is_what_training_makes_of_the_source(make: Make, size: list[int]) -> None:
    config = make(size=size, crop=[20, 20])
    write(config)
    data, source = opened(config)
    assert pack_folder(config, "train").name == f"{config.name}_train_raw_{size[0]}x{size[1]}"
    assert data.manifest_hash() != source.manifest_hash()
    for index in range(5):
        image, label = data.read(index)
        given, given_label = source.read(index)
        np.testing.assert_array_equal(image, resize_image(given, (size[0], size[1])))
        np.testing.assert_array_equal(label, given_label)
        for epoch in (0, -1):
            assert_batches_are_equal(
                data.sample((epoch, 7, index), seed=3), source.sample((epoch, 7, index), seed=3)
            )


def test_jpegs_are_the_sources_own_bytes(make: Make) -> None:
    config = make("bdd100k", packed_form="jpeg")
    said = write(config)
    assert "lossy where" in said[0]
    assert "about" in said[0]
    data, source = opened(config)
    shard = (data.folder / "shard_00000.bin").read_bytes()
    assert source.pairs[0].image.read_bytes() in shard
    for index in range(5):
        for found, wanted in zip(data.read(index), source.read(index), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert data.manifest_hash() not in (source.manifest_hash(), build_pack_hash(make("bdd100k")))


def build_pack_hash(config: DataConfig) -> str:
    write(config)
    return build_dataset(config, "train").manifest_hash()


@pytest.mark.parametrize("size", [None, [24, 40]])
def test_jpegs_of_other_sources_are_near(make: Make, size: list[int] | None) -> None:
    config = make("cityscapes" if size is None else "bdd100k", packed_form="jpeg", size=size, crop=None)
    write(config)
    data, source = opened(config)
    for index in range(5):
        image, label = data.read(index)
        wanted = source.read(index)[0] if size is None else resize_image(source.read(index)[0], (size[0], size[1]))
        assert 0 < np.abs(image.astype(int) - wanted).mean() < 3
        np.testing.assert_array_equal(label, source.read(index)[1])


@pytest.mark.parametrize("form", ["raw", "jpeg"])
@pytest.mark.parametrize("finish", [False, True])
def test_loaders_give_the_sources_batches(make: Make, form: str, finish: bool) -> None:
    """Whatever the workers; and nothing is said of arrays that cannot be written to."""
    config = make("bdd100k", packed_form=form, finish_on_device=finish, augment=form == "raw")
    write(config)
    data, source = opened(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for workers in (0, 2) if form == "raw" and finish else (0,):
            given = {"batch_size": 2, "seed": 0, "start_step": 0, "steps": 3}
            loaders = [one.train_loader(**given, workers=workers) for one in (data, source)]
            for one, other in zip(*loaders, strict=True):
                assert_batches_are_equal(one, other)
        for one, other in zip(data.eval_loader(), source.eval_loader(), strict=True):
            assert_batches_are_equal(one, other)


def test_maps_stay_where_they_are(make: Make) -> None:
    """A map that was opened is not copied into what a spawned worker is given."""
    config = make(packed_folder=make().packed_folder)
    write(config)
    data = build_dataset(config, "train")
    before = len(ForkingPickler.dumps(data))
    for index in range(5):
        data.read(index)
    assert len(ForkingPickler.dumps(data)) == before


# writing


def test_it_says_what_it_does(make: Make) -> None:
    config = make()
    folder = pack_folder(config, "train")
    said = write(config)
    total = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert total == 5 * (48 * 80 * 3 + 48 * 80)
    assert said[0].startswith(f"{folder}: 5 images as raw: {total:,} bytes; ")
    assert said[0].endswith("bytes are free")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write(config) == [f"{folder}: is packed already, 5 images; read them by data.packed=true"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_estimate_of_jpegs_is_near(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("bdd100k", packed_form="jpeg")
    said = write(config)
    total = sum(path.stat().st_size for path in pack_folder(config, "train").glob("*.bin"))
    assert f"about {total:,} bytes, by a sample of 5;" in said[0]
    monkeypatch.setattr(packed, "SAMPLED", 2)
    shutil.rmtree(pack_folder(config, "train"))
    estimate = int(write(config)[0].split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert estimate == pytest.approx(total, rel=0.3)


def test_processes_write_the_same(make: Make, tmp_path: Path) -> None:
    one, two = make(), make(packed_folder=str(tmp_path / "two"))
    write(one)
    write(two, workers=2)
    assert contents(pack_folder(two, "train")) == contents(pack_folder(one, "train"))


def pack(root: str, folder: str, form: str, workers: int) -> None:
    """What the forks run."""
    os.environ["SEGDISTILL_CACHE"] = str(Path(folder).parent / "cache")
    packed.SHARD = 2
    config = DataConfig(name="camvid", root=root, packed_folder=folder, packed_form=form)  # type: ignore[arg-type]
    try:
        write_pack(config, "train", workers)
    except UserError as error:
        sys.exit(error.exit_code)


OPERATIONS = 38
SOME = [3, 7, 9, 13, 18, 34, 37]


def killed_and_resumed(forks: Forks, make: Make, form: str, point: int) -> None:
    whole, cut = make(packed_form=form), make(packed_form=form)
    cut.packed_folder += "_cut"
    write(whole)
    arguments = ["test_packed:pack", cut.root, cut.packed_folder, form, 1]
    event = {"first_on_path": str(Path(__file__).parent), "kill_at": [cut.packed_folder, point]}
    outcome = forks.call(*arguments, **event)[0]
    assert outcome.code == -9, outcome.text
    if point + 1 < OPERATIONS:  # the last is the sync of a folder in which all is there
        with pytest.raises(ConfigurationError, match=r"pack the images by python inspect_data\.py pack=true"):
            build_dataset(cut, "train")
    write(cut)
    assert contents(pack_folder(cut, "train")) == contents(pack_folder(whole, "train"))


@pytest.mark.parametrize("point", SOME)
def test_killed_while_packing(forks: Forks, make: Make, point: int) -> None:
    killed_and_resumed(forks, make, "raw", point)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw", "jpeg"])
@pytest.mark.parametrize("point", range(OPERATIONS))
def test_killed_anywhere(forks: Forks, make: Make, form: str, point: int) -> None:
    killed_and_resumed(forks, make, form, point)


def test_there_are_so_many_operations(forks: Forks, make: Make, tmp_path: Path) -> None:
    config, log = make(), tmp_path / "log"
    arguments = ["test_packed:pack", config.root, config.packed_folder, "raw", 1]
    event = {"first_on_path": str(Path(__file__).parent), "list_operations": [config.packed_folder, str(log)]}
    outcome = forks.call(*arguments, **event)[0]
    assert outcome.code == 0, outcome.text
    operations = log.read_text().splitlines()
    assert len(operations) == OPERATIONS, operations
    assert operations[-4:] == ["write .manifest.json.tmp", "fsync .manifest.json.tmp",
                               "replace .manifest.json.tmp", "fsync camvid_train_raw"]  # fmt: skip


def test_a_killed_worker_ends_the_packing(forks: Forks, make: Make) -> None:
    config = make()
    arguments = ["test_packed:pack", config.root, config.packed_folder, "raw", 2]
    event = {"first_on_path": str(Path(__file__).parent),
             "kill_at_operation": [config.packed_folder, "replace", ".shard_00001.bin.tmp", 0]}  # fmt: skip
    outcome = forks.call(*arguments, **event)[0]
    assert outcome.code == 5, outcome.text
    whole = replace(config, packed_folder=config.packed_folder + "_whole")
    for one in (config, whole):
        write(one)
    assert contents(pack_folder(config, "train")) == contents(pack_folder(whole, "train"))


def test_a_missing_shard_is_written_again(make: Make) -> None:
    config = make()
    write(config)
    folder = pack_folder(config, "train")
    before = contents(folder)
    (folder / "shard_00001.bin").unlink()
    with pytest.raises(DamagedFileError, match=r"shard_00001\.bin: cannot be read"):
        build_dataset(config, "train")
    assert "2 of 3 shards are there" in write(config)[0]
    assert contents(folder) == before


@pytest.mark.parametrize(("name", "code"), [("manifest.json", 0), ("shard_00001.json", 3)])
def test_damage_is_not_gone_on_with(make: Make, name: str, code: int) -> None:
    """A damaged manifest is written again; of a damaged index it is said that it is to be deleted."""
    config = make()
    write(config)
    folder = pack_folder(config, "train")
    before = contents(folder)
    (folder / name).write_bytes(before[name].replace(b"2", b"3"))
    if code:
        with pytest.raises(DamagedFileError, match=f"{name}: is damaged, its SHA-256 is another; delete it"):
            write(config)
        (folder / name).unlink()
    write(config)
    assert contents(folder) == before


def test_shards_of_another_pack(make: Make) -> None:
    """Whole, but not in their places."""
    config = make()
    write(config)
    folder = pack_folder(config, "train")
    for suffix in ("bin", "json"):
        shutil.copy(folder / f"shard_00000.{suffix}", folder / f"shard_00001.{suffix}")
    with pytest.raises(DamagedFileError, match=r"shard_00001\.json: is that of another pack; delete"):
        build_dataset(config, "train")


def test_a_full_disk(make: Make) -> None:
    config = make()
    write(replace(config, packed_folder=config.packed_folder + "_whole"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(MachineError, match=r"shard_00000\.bin: File too large; free some space"):
            write(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(pack_folder(config, "train").iterdir()) == []
    write(config)
    whole = pack_folder(replace(config, packed_folder=config.packed_folder + "_whole"), "train")
    assert contents(pack_folder(config, "train")) == contents(whole)


def test_too_little_room(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))  # type: ignore[attr-defined]
    with pytest.raises(MachineError, match="76,800 bytes are needed and 999 are free"):
        write(make())
    assert not Path(make().packed_folder).exists()


def test_a_folder_that_cannot_be_written(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"^data\.packed_folder: can't write"):
        write(make(packed_folder=str(tmp_path / "file" / "packed")))

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigurationError, match=r"shard_00000\.bin \(Permission denied\); name another folder"):
        write(make())


def test_a_pack_of_other_files_is_not_gone_on_with(make: Make, sources: dict[str, Path], tmp_path: Path) -> None:
    """Begun or finished; of files of another size, or with one byte changed."""
    config = make()
    write(config)
    folder = pack_folder(config, "train")
    root = tmp_path / "other"
    shutil.copytree(sources["camvid"], root)
    other = make(root=str(root), packed_folder=config.packed_folder)
    write(other)  # a copy of the same files
    image = root / "train" / "scene_3.png"
    whole = image.read_bytes()
    for manifest in (True, False):
        if not manifest:
            (folder / "manifest.json").unlink()
        cv2.imwrite(str(image), cv2.imread(str(image)), [cv2.IMWRITE_PNG_COMPRESSION, 0])
        with pytest.raises(DamagedFileError, match="was packed of other files or in another way; delete"):
            write(other)
        image.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
        with pytest.raises(DamagedFileError, match=r"scene_3\.png: has changed since .* was packed of it; delete"):
            write(other)
        image.write_bytes(whole)
    write(other)


def test_a_damaged_pack_is_not_called_finished(make: Make) -> None:
    config = make()
    write(config)
    shard = next(pack_folder(config, "train").glob("*.bin"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedFileError, match="is damaged, its SHA-256 is another; delete"):
        write(config)


def test_two_do_not_pack_into_one_folder(make: Make) -> None:
    config = make()
    folder = pack_folder(config, "train")
    folder.mkdir(parents=True)
    with (
        packed._alone(folder),
        pytest.raises(ConfigurationError, match="another process is packing into it; wait"),
    ):
        write(config)
    write(config)


def test_workers_end_with_the_process_that_they_work_for() -> None:
    """Killed, it leaves none behind that would go on writing."""
    work = "import os, sys, time; sys.path.insert(0, '.'); from data.processes import map_processes; "
    work += "list(map_processes(lambda_, [0, 1, 2, 3], workers=2))"
    work = work.replace("list(", "\ndef lambda_(i): print(os.getpid(), flush=True); time.sleep(60)\nlist(")
    process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait(10)
    for _ in range(100):
        if not any(Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes()
                   for worker in workers):  # fmt: skip
            return
        time.sleep(0.1)
    raise AssertionError("a worker is alive")


def test_there_is_none(make: Make, tmp_path: Path) -> None:
    config = make(size=[24, 40], packed_form="jpeg")
    with pytest.raises(ConfigurationError) as caught:
        build_dataset(config, "train")
    assert str(caught.value) == (
        f"{config.packed_folder}/camvid_train_jpeg_24x40: there is no such folder; pack the images by "
        f"python inspect_data.py pack=true splits=[train] data.name=camvid data.root={config.root} "
        f"data.packed_form=jpeg data.packed_folder={config.packed_folder} data.size=[24,40]"
    )
    with pytest.raises(ConfigurationError, match=r"^data\.packed: streets has no files to pack; leave"):
        build_dataset(DataConfig(packed=True), "train")
    with pytest.raises(ConfigurationError, match=r"^data\.name: streets has no files to pack"):
        write(DataConfig(packed_folder=str(tmp_path)))


def test_the_source_is_compared_where_it_is_named(make: Make, sources: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sources["camvid"], root)
    config = make(root=str(root), packed_folder="")
    write(config)
    assert pack_folder(config, "train") == root / "packed" / "camvid_train_raw"
    build_dataset(config, "train")
    label = root / "trainannot" / "scene_4.png"
    before = label.read_bytes()
    label.write_bytes(before + b" ")
    with pytest.raises(DamagedFileError, match=r"scene_4\.png: is another file than"):
        build_dataset(config, "train")
    label.write_bytes(before)
    build_dataset(config, "train")
    alone = replace(config, root="", packed_folder=str(root / "packed"))
    for folder, suffix in (("train", "png"), ("trainannot", "png")):
        shutil.copy(root / folder / f"scene_3.{suffix}", root / folder / f"scene_9.{suffix}")
    with pytest.raises(DamagedFileError, match="was packed of other files, see scene_9"):
        build_dataset(config, "train")
    data = build_dataset(alone, "train")  # at its own word
    assert len(data) == 5
    shutil.rmtree(root / "train")
    assert build_dataset(alone, "train").read(0)[0].shape == (*SIZE, 3)


def test_another_way_of_reading_labels_is_noticed(make: Make, sources: dict[str, Path], tmp_path: Path) -> None:
    """The same sizes and names, but trainIds in place of labelIds."""
    config = make("cityscapes")
    write(config)
    root = tmp_path / "root"
    shutil.copytree(sources["cityscapes"], root)
    for path in (root / "gtFine").rglob("*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(DamagedFileError, match="was packed with other classes or label values"):
        build_dataset(replace(config, root=str(root)), "train")


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "bdd100k"), ("split", "val"), ("form", "jpeg"), ("size", [24, 40]), ("format", 2)],
)
def test_another_pack_in_this_ones_place(make: Make, field: str, value: Any) -> None:
    config = make()
    write(config)
    folder = pack_folder(config, "train")
    content = packed._load(folder / "manifest.json", "") | {field: value}
    (folder / "manifest.json").write_bytes(packed._seal(content))
    with pytest.raises(DamagedFileError, match=f"with {field} .*; delete {folder} and pack again by python"):
        build_dataset(config, "train")


def test_every_flipped_bit_is_noticed(make: Make) -> None:
    config = make()
    write(config)
    folder = pack_folder(config, "train")
    paths = sorted(folder.iterdir())
    rng = np.random.default_rng(0)
    for flip in range(100):
        path = paths[flip % len(paths)]
        before = path.read_bytes()
        damaged = bytearray(before)
        damaged[rng.integers(len(before))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=path.stem):
            build_dataset(config, "train")
        path.write_bytes(before)
    build_dataset(config, "train")


def test_images_of_unequal_size(make: Make, sources: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(sources["camvid"], root)
    for folder in ("train", "trainannot"):
        image = Image.open(root / folder / "scene_3.png")
        image.crop((0, 0, 70, 40)).save(root / folder / "scene_3.png")
    config = make(root=str(root), crop=None)
    write(config)
    data, source = opened(config)
    assert data.read(3)[0].shape == (40, 70, 3)
    np.testing.assert_array_equal(data.read(3)[1], source.read(3)[1])
    with pytest.raises(ConfigurationError, match=r"scene_3: is of another size than scene_0; set data\.crop"):
        data.train_loader(batch_size=2, seed=0, start_step=0, steps=1)


# reduced decoding


@pytest.mark.parametrize(
    ("size", "decoded"), [([24, 40], (24, 40)), ([13, 20], (24, 40)), ([12, 20], (12, 20)), ([25, 40], SIZE)]
)
def test_jpegs_are_decoded_smaller(make: Make, size: list[int], decoded: tuple[int, int]) -> None:
    config = make(size=size, packed=False, reduced_decoding=True, crop=None)
    data, usual = build_dataset(config, "train"), build_dataset(replace(config, reduced_decoding=False), "train")
    assert data.manifest_hash() != usual.manifest_hash()
    for index in range(5):
        image, label = data.read(index)
        whole, whole_label = usual.read(index)
        assert image.shape[:2] == (SIZE if index == 3 else decoded)  # scene_3 is a PNG
        np.testing.assert_array_equal(label, whole_label)
        wanted, found = usual.sample((-1, 0, index), seed=0), data.sample((-1, 0, index), seed=0)
        assert found.images.shape == wanted.images.shape
        assert found.geometry.tolist() == wanted.geometry.tolist()
        assert (found.images - wanted.images).abs().mean() < 0.1
    assert build_dataset(replace(config, size=None), "train").read(0)[0].shape[:2] == SIZE


def test_odd_sizes_are_rounded_up(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.zeros((45, 67, 3), np.uint8))
    assert [read_image(path, n).shape[:2] for n in (1, 2, 4, 8)] == [(45, 67), (23, 34), (12, 17), (6, 9)]


def test_another_image_during_a_run_is_noticed_all_the_same(
    make: Make, sources: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(sources["camvid"], root)
    data = build_dataset(make(root=str(root), size=[24, 40], packed=False, reduced_decoding=True), "train")
    cv2.imwrite(str(root / "train" / "scene_1.jpg"), np.zeros((64, 80, 3), np.uint8))
    with pytest.raises(ConfigurationError, match=r"scene_1\.jpg: is 40x32 but was 80x48 when"):
        data.read(1)


# the fast path


@pytest.mark.parametrize("finished", [False, True])
def test_a_batch_is_its_samples(make: Make, finished: bool) -> None:
    data = build_dataset(make("bdd100k", packed=False, blur=0.5), "train")
    keys: Any = [(0, position, position % 5) for position in range(8)]

    def single(key: Any, seed: int) -> Batch:
        return Batch(*(field[0] for field in data.batch([key], seed=seed, finished=finished)))

    samples = [single(key, seed=1) for key in keys]
    batch = data.batch(keys, seed=1, finished=finished)
    assert_batches_are_equal(batch, [torch.stack(field) for field in zip(*samples, strict=True)])
    assert len({sample.geometry for sample in samples}) == 8


def test_four_channels_are_warped_like_three() -> None:
    """Whatever stands around the pixels that a crop needs."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        source = (int(rng.integers(2, 200)), int(rng.integers(2, 200)))
        crop = (int(rng.integers(2, 150)), int(rng.integers(2, 150)))
        image = rng.integers(0, 256, (*source, 3), dtype=np.uint8)
        geometry, _ = transforms.draw(rng, source, crop, scale=(0.3, 2.5), flip=0.0, jitter=0.0, blur=0.0)
        found = transforms.crop_image(image, geometry, crop)
        _, _, height, width, top, left, _ = geometry
        y, x = source[0] / height, source[1] / width
        wanted = cv2.warpAffine(
            image,
            np.array([[x, 0, (left + 0.5) * x - 0.5], [0, y, (top + 0.5) * y - 0.5]]),
            found.shape[1::-1],
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        np.testing.assert_array_equal(found, wanted)


def test_runs_are_counted_like_pixels() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (40, 50)):
        for values in (1, 3, 256):
            label = rng.integers(0, values, shape).astype(np.uint8)
            pixels = np.bincount(label.ravel(), minlength=256)
            assert count_classes(label, 19).tolist() == [*pixels[:19], pixels[19:].sum()]
