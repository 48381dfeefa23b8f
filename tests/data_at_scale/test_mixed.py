"""Several data sets as one: the share of each, their order, their labels; and the library `datasets`."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import CITYSCAPES, DataConfig, build_dataset
from data.labels import IGNORE_INDEX, UNLABELLED
from data.mixed import MixConfig, MixedData, divide
from data.sampling import Key
from data.streets.write import write_bdd100k
from errors import ConfigurationError
from losses import term

SIZE = (24, 48)
SAMPLINGS = ["uniform", "rare_class", "class_uniform", "repeat_factor"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ten scenes written as BDD100K, and five images of three sizes without labels, in folders of their own."""
    root = tmp_path_factory.mktemp("roots")
    write_bdd100k(root / "bdd100k", scenes={"train": 10, "val": 2}, size=SIZE, seed=3)
    rng = np.random.default_rng(0)
    for i, size in enumerate([(24, 48), (30, 40), (24, 48), (50, 20), (24, 48)]):
        path = root / "images" / f"{i % 2}" / f"{i}.{'jpg' if i else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return {"bdd100k": str(root / "bdd100k"), "images": str(root / "images")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))


def config(roots: dict[str, str], **changed: Any) -> DataConfig:
    """Eight scenes of streets with weight 2, ten of BDD100K with 1, five unlabelled images with 0.7."""
    mix = [
        MixConfig(name="bdd100k", root=roots["bdd100k"]),
        MixConfig(root=roots["images"], unlabelled=True, weight=0.7),
    ]
    return DataConfig(**{"size": list(SIZE), "scenes": 8, "mix": mix, "mix_weight": 2.0} | changed)


def mixed(roots: dict[str, str], **changed: Any) -> MixedData:
    data = build_dataset(config(roots, **changed), "train")
    assert isinstance(data, MixedData)
    return data


def test_the_parts_are_read(roots: dict[str, str]) -> None:
    data = mixed(roots)
    assert (len(data), data.unlabelled, data.labels) == (23, True, CITYSCAPES)
    assert data.notes() == ["streets: 8 images, 54.1% of an epoch", "bdd100k: 10 images, 27.0% of an epoch",
                            "unlabelled: 5 images without labels, 18.9% of an epoch"]  # fmt: skip
    assert data.names[0] == "streets--train_000000"
    assert data.names[8].startswith("bdd100k--00000000-")
    assert data.names[18:] == [f"unlabelled--{name}" for name in ("0--0", "0--2", "0--4", "1--1", "1--3")]
    streets = build_dataset(config(roots, mix=[]), "train")
    bdd100k = build_dataset(config(roots, mix=[], name="bdd100k", root=roots["bdd100k"]), "train")
    for index, part, own in ((0, streets, 0), (7, streets, 7), (8, bdd100k, 0), (17, bdd100k, 9)):
        for found, expected in zip(data.read(index), part.read(own), strict=True):
            np.testing.assert_array_equal(found, expected)
    image, label = data.read(21)
    assert image.shape == (30, 40, 3)
    assert label.shape == (30, 40)
    assert (label == UNLABELLED).all()
    counts = np.concatenate([streets.label_counts(), bdd100k.label_counts()])
    np.testing.assert_array_equal(data.label_counts()[:18], counts)
    assert not data.label_counts()[18:, :-1].any()
    assert data.label_counts()[18:, -1].tolist() == [24 * 48, 24 * 48, 24 * 48, 1200, 1000]
    assert torch.equal(data.class_weights("median"), torch.from_numpy(median_weights(counts)))


def median_weights(counts: np.ndarray) -> np.ndarray:
    from data.statistics import class_weights

    return class_weights(counts, "median")


def test_validation_is_of_the_data_set_itself(roots: dict[str, str]) -> None:
    val = build_dataset(config(roots), "val")
    assert (len(val), val.unlabelled) == (2, False)
    assert val.manifest_hash() == build_dataset(config(roots, mix=[]), "val").manifest_hash()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_shares_are_exact_in_every_epoch(roots: dict[str, str], sampling: str) -> None:
    data = mixed(roots, sampling=sampling)
    orders = [data.order(20, seed=5, epoch=epoch) for epoch in range(6)]
    for order in orders:
        assert order.shape == (20, 2)
        shares = np.histogram(order[:, 0], [0, 8, 18, 23])[0].tolist()
        assert shares == [11, 5, 4]  # of 20: 10.81, 5.41, 3.78
    assert len({order.tobytes() for order in orders}) == 6
    np.testing.assert_array_equal(orders[3], mixed(roots, sampling=sampling).order(20, seed=5, epoch=3))
    assert (orders[3] != data.order(20, seed=6, epoch=3)).any()
    wanted = np.concatenate(orders)
    asked = wanted[wanted[:, 1] >= 0]
    assert bool(len(asked)) == (sampling in ("rare_class", "class_uniform"))
    assert (data.label_counts()[asked[:, 0], asked[:, 1]] > 0).all()
    assert (wanted[wanted[:, 0] >= 18, 1] == -1).all()


def test_a_source_goes_through_all_of_its_images_before_any_comes_again(roots: dict[str, str]) -> None:
    data = mixed(roots)
    drawn = np.concatenate([data.order(20, seed=0, epoch=epoch)[:, 0] for epoch in range(40)])
    for first, last, number in ((0, 8, 11), (8, 18, 5), (18, 23, 4)):
        times = Counter(drawn[(drawn >= first) & (drawn < last)].tolist())
        assert len(times) == last - first
        assert set(times.values()) == {40 * number // (last - first)}


def test_sources_of_one_length_are_ordered_apart(roots: dict[str, str]) -> None:
    data = mixed(roots, mix=[MixConfig(name="streets", split="train")], mix_weight=1.0)
    assert data.names[8] == "streets-2--train_000000"
    orders = [data.order(8, seed=0, epoch=epoch)[:, 0] for epoch in range(4)]  # four of each
    assert any(set(order[order < 8]) != set(order[order >= 8] - 8) for order in orders)


def test_shares_are_whole_numbers_by_the_largest_remainders() -> None:
    assert divide(20, [2, 1, 0.7]) == [11, 5, 4]
    assert divide(10, [1, 1, 1]) == [4, 3, 3]
    assert divide(7, [0.1]) == [7]
    rng = np.random.default_rng(0)
    for _ in range(200):
        positions, weights = int(rng.integers(1, 1000)), rng.random(int(rng.integers(1, 6))) + 1e-3
        numbers = divide(positions, weights.tolist())
        assert sum(numbers) == positions
        assert (np.abs(numbers - positions * weights / weights.sum()) < 1).all()


def test_a_source_that_would_never_come_is_refused(roots: dict[str, str]) -> None:
    mix = [MixConfig(name="bdd100k", root=roots["bdd100k"], weight=0.01)]
    loader = mixed(roots, mix=mix).train_loader(batch_size=4, seed=0, start_step=0, steps=1)
    with pytest.raises(
        ConfigurationError, match=r"data\.mix: bdd100k has so small a weight, 0\.01, that none of the 16"
    ):
        next(iter(loader))


@pytest.mark.parametrize("changed", [{}, {"rare_crop": 0.2, "copy_paste": 1.0, "sampling": "class_uniform"}])
def test_batches_do_not_depend_on_workers_processes_or_the_start(roots: dict[str, str], changed: Any) -> None:
    data = mixed(roots, crop=[16, 24], **changed)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 1, "start_step": 0, "steps": 7}
    expected = list(data.train_loader(**settings))
    others = [list(data.train_loader(**settings, workers=2))]
    others.append(expected[:4] + list(data.train_loader(**settings | {"start_step": 4})))
    for other in others:
        for batch, found in zip(expected, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(batch, found, strict=True))
    ranks = [list(data.train_loader(**settings, rank=rank, world_size=2)) for rank in range(2)]
    for batch, halves in zip(expected, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch.images[0::2], halves[0].images)
        assert torch.equal(batch.labels[1::2], halves[1].labels)


def test_unlabelled_images_are_told_from_padding_and_from_evaluation(roots: dict[str, str]) -> None:
    data = mixed(roots, crop=[40, 64], scale=[0.5, 0.5], size=None)
    sample = data.sample(Key(0, 3, 21), seed=0)  # 15x20 of the 40x64
    assert sorted(sample.labels.unique().tolist()) == [UNLABELLED, IGNORE_INDEX]
    assert int((sample.labels == UNLABELLED).sum()) == 15 * 20
    assert sample.pixels.tolist() == [0] * 19 + [40 * 64]
    whole = data.sample(Key(-1, 21, 21), seed=0)
    assert whole.labels.unique().tolist() == [IGNORE_INDEX]
    sizes = [tuple(batch.images.shape[-2:]) for batch in data.eval_loader()]
    assert sizes[18:] == [(24, 48), (24, 48), (24, 48), (30, 40), (50, 20)]


def test_the_constants_of_data_and_losses_agree() -> None:
    assert (term.IGNORE_INDEX, term.UNLABELLED) == (IGNORE_INDEX, UNLABELLED)


def test_other_files_are_another_data_set(roots: dict[str, str]) -> None:
    data = mixed(roots)
    assert data.manifest_hash() == mixed(roots).manifest_hash()
    assert data.manifest_hash() != mixed(roots, mix=config(roots).mix[:1]).manifest_hash()
    assert data.manifest_hash() != mixed(roots, scenes=9).manifest_hash()


def test_unequal_sizes_need_a_crop(roots: dict[str, str]) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "start_step": 0, "steps": 1}
    only = config(roots).mix
    with pytest.raises(ConfigurationError, match=r"images/1/1\.jpg: is of another size than .*set data\.crop"):
        mixed(roots, size=None, mix=only[1:]).train_loader(**settings)
    with pytest.raises(ConfigurationError, match=r"bdd100k--00000000-00000000: is of another size than streets--"):
        mixed(roots, size=None, mix=only[:1]).train_loader(**settings)
    mixed(roots, size=None, mix=only, crop=[8, 8]).train_loader(**settings)


def test_what_cannot_be_mixed_is_refused(roots: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    for kind in ("images", "masks"):
        (own / kind / "train").mkdir(parents=True)
        mode = "RGB" if kind == "images" else "L"
        Image.new(mode, (48, 24)).save(own / kind / "train" / "one.png")
    (own / "classes.yaml").write_text(f"names: {['road', 'pavement', *CITYSCAPES.names[2:]]}\n")

    def refused(message: str, **said: Any) -> None:
        with pytest.raises(ConfigurationError, match=message):
            mixed(roots, mix=[MixConfig(**said)])

    refused(
        "data.mix: the classes of streets and folder differ, class 1 is 'sidewalk' in the former and 'pavement'",
        name="folder",
        root=str(own),
    )
    (own / "classes.yaml").write_text(f"names: {list(CITYSCAPES.names[:18])}\n")
    refused("class 18 is 'bicycle' in the former and 'none' in", name="folder", root=str(own))
    refused(r"data\.mix\[0\]\.root: is empty; give the folder of bdd100k", name="bdd100k")
    refused(r"data\.mix\[0\]\.root: there is no folder '/nowhere'", root="/nowhere", unlabelled=True)
    refused(r"data\.mix\[0\]\.name: is missing", root=roots["images"])
    refused(r"data\.mix\[0\]\.weight: 0", root=roots["images"], unlabelled=True, weight=0)
    refused(r"data\.mix\[0\]\.weight: inf", root=roots["images"], unlabelled=True, weight=float("inf"))
    refused(r"data\.mix\[0\]\.name: says nothing of unlabelled", name="camvid", root="/", unlabelled=True)
    refused(r"empty: holds no JPEG or PNG image", root=str(empty(tmp_path)), unlabelled=True)
    broken = empty(tmp_path) / "a.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(r"a\.png: is a truncated PNG", root=str(broken.parent), unlabelled=True)
    with pytest.raises(ConfigurationError, match=r"data\.mix_weight: 0"):
        config(roots, mix_weight=0)


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir(exist_ok=True)
    return folder / "empty"
