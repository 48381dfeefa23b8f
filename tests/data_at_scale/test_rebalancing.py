"""Rebalancing: every sampler gives the images that it promises, every process its share of the same batches, and
crops and pasted objects are where they should be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from data import DataConfig, build_dataset, transforms
from data.dataset import SegmentationData
from data.sampling import (
    Key,
    class_uniform_order,
    rare_class_order,
    rare_class_probabilities,
    rare_classes,
    repeat_factor_order,
    repeat_factors,
    showing,
    uniform_order,
)
from errors import ConfigurationError

IMAGES, EPOCHS = 40, 200


@pytest.fixture
def counts() -> np.ndarray:
    """40 images of 10 000 pixels: class 1 in 25 of them, in five of these a speck, class 2 in five, class 3 in
    one, class 4 in none."""
    found = np.zeros((IMAGES, 6), np.int64)
    found[:20, 1] = 1500
    found[20:25, 1] = 5
    found[10:15, 2] = 200
    found[39, 3] = 60
    found[:, 5] = 500
    found[:, 0] = 10_000 - found.sum(1)
    return found


def drawn(order: Callable[[int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How often each image was drawn over many epochs, and the class wanted of each position."""
    orders = np.concatenate([order(epoch) for epoch in range(EPOCHS)])
    return np.bincount(orders[:, 0], minlength=IMAGES), orders[:, 1]


def agrees(observed: np.ndarray, expected: np.ndarray) -> None:
    """A chi-square test; what may not be drawn is not, and the rest is not refuted at 1 in 1000."""
    assert not observed[expected == 0].any()
    where = expected > 0
    scaled = expected[where] / expected[where].sum() * observed.sum()
    assert chisquare(observed[where], scaled).pvalue > 1e-3


def test_uniform_draws_each_image_as_often(counts: np.ndarray) -> None:
    images, wanted = drawn(lambda epoch: uniform_order(IMAGES, 32, seed=1, epoch=epoch))
    assert chisquare(images).pvalue > 1e-3  # eight are left out of each epoch
    assert (wanted == -1).all()


def test_rare_class_draws_what_the_formula_says(counts: np.ndarray) -> None:
    images, wanted = drawn(lambda epoch: rare_class_order(counts, 500, temperature=0.4, seed=1, epoch=epoch))
    p = rare_class_probabilities(counts, 0.4)
    agrees(np.bincount(wanted, minlength=5), p)
    expected = sum(
        p[c] * np.isin(np.arange(IMAGES), showing(counts, c)) / len(showing(counts, c)) for c in range(4)
    )
    agrees(images, np.asarray(expected))


def test_class_uniform_draws_classes_alike(counts: np.ndarray) -> None:
    images, wanted = drawn(lambda epoch: class_uniform_order(counts, 34, share=0.5, seed=1, epoch=epoch))
    numbers = np.bincount(wanted + 1, minlength=6)
    assert numbers[0] == 17 * EPOCHS  # half of each epoch, exactly
    agrees(numbers[1:], np.array([1.0, 1, 1, 1, 0]))
    one = class_uniform_order(counts, 34, share=0.5, seed=1, epoch=0)
    by_class = np.bincount(one[one[:, 1] >= 0, 1], minlength=4)
    assert sorted(by_class.tolist()) == [4, 4, 4, 5]  # 17 by four classes
    each = [np.isin(np.arange(IMAGES), showing(counts, c)) / len(showing(counts, c)) for c in range(4)]
    # Without replacement within an epoch, so the true variance is below that of the test.
    agrees(images, 0.5 / IMAGES + 0.5 * np.mean(each, axis=0))


def test_repeat_factors_are_those_of_the_paper(counts: np.ndarray) -> None:
    factors = repeat_factors(counts, 0.8)
    expected = np.ones(IMAGES)
    expected[:25] = np.sqrt(0.8 / (25 / 40))
    expected[10:15] = np.sqrt(0.8 / (5 / 40))
    expected[39] = np.sqrt(0.8 / (1 / 40))
    np.testing.assert_allclose(factors, expected)
    assert (repeat_factors(counts, 0.001) == 1).all()
    images, _ = drawn(lambda epoch: repeat_factor_order(counts, IMAGES, threshold=0.8, seed=1, epoch=epoch))
    agrees(images, expected)
    whole = repeat_factor_order(counts, 200, threshold=0.8, seed=1, epoch=0)[:, 0]  # more than the repeated list
    assert len(whole) == 200


def test_images_that_show_a_class(counts: np.ndarray) -> None:
    assert showing(counts, 2).tolist() == [10, 11, 12, 13, 14]
    counts[10, 2] = 13  # 0.13 %, below DAFormer's share
    assert showing(counts, 2).tolist() == [11, 12, 13, 14]
    counts[11:15, 2] = 0
    assert showing(counts, 2).tolist() == [10]  # it nowhere fills so much


def test_rare_classes(counts: np.ndarray) -> None:
    assert rare_classes(counts, 0.01).tolist() == [2, 3]
    assert rare_classes(counts, 0.001).tolist() == [3]


# batches

SAMPLERS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "rare_class": {"sampling": "rare_class"},
    "rare_class, crops, paste": {"sampling": "rare_class", "rare_crop": 0.05, "copy_paste": 0.7},
    "class_uniform": {"sampling": "class_uniform", "rare_crop": 0.05},
    "repeat_factor": {"sampling": "repeat_factor", "rare_crop": 0.05},
    "copy_paste": {"copy_paste": 1.0},
    "bytes": {"copy_paste": 0.5, "finish_on_device": True},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS)
def scenes(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> SegmentationData:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))
    return build_dataset(
        DataConfig(scenes=8, size=[32, 64], crop=[24, 40], rare_share=0.03, **request.param), "train"
    )


def joined(parts: list[Any]) -> list[torch.Tensor]:
    """The batch that several processes hold parts of, rank by rank."""
    return [torch.stack(fields, 1).flatten(0, 1) for fields in zip(*parts, strict=True)]


def test_same_batches_from_any_number_of_workers_and_processes(scenes: SegmentationData) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 5, "start_step": 0, "steps": 3}
    expected = list(scenes.train_loader(**settings))
    assert len({batch.images.sum().item() for batch in expected}) == 3
    for workers in (1, 2):
        for batch, other in zip(expected, scenes.train_loader(**settings, workers=workers), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(batch, other, strict=True))
    for batch, other in zip(expected[1:], scenes.train_loader(**settings | {"start_step": 1}), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch, other, strict=True))
    for processes in (2, 4):
        ranks = [list(scenes.train_loader(**settings, rank=r, world_size=processes)) for r in range(processes)]
        for step, batch in enumerate(expected):
            together = joined([rank[step] for rank in ranks])
            assert all(torch.equal(x, y) for x, y in zip(batch, together, strict=True))


def test_batches_say_which_pixels_they_hold(scenes: SegmentationData) -> None:
    for batch in scenes.train_loader(batch_size=4, seed=5, start_step=0, steps=2):
        for label, pixels in zip(batch.labels, batch.pixels, strict=True):
            expected = np.bincount(label.numpy().ravel(), minlength=256)
            np.testing.assert_array_equal(pixels[:19], expected[:19])
            assert pixels[19] == expected[255]


# crops that seek, and objects that are pasted


def test_a_crop_seeks_the_classes() -> None:
    label = np.zeros((200, 300), np.uint8)
    label[150:200, 240:300] = 7
    source, crop = (200, 300), (80, 80)
    draws = {"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "blur": 0.0}
    found, plain = [], []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        geometry, _ = transforms.draw(rng, source, crop, **draws)  # type: ignore[arg-type]
        sought = transforms.seek(rng, label, geometry, crop, classes=[7], least=0.1)
        plain.append((transforms.crop_label(label, geometry, crop) == 7).mean())
        found.append((transforms.crop_label(label, sought, crop) == 7).mean())
        if plain[-1] >= 0.11:  # enough is enough: the first crop stays (a sixteenth of the pixels is looked at)
            assert sought == geometry
        assert found[-1] >= plain[-1] - 0.01
    # Of all places a share p is good enough; ten tries find one with probability 1 - (1 - p)^10.
    rows = np.clip(np.arange(121) + 80, 150, 200) - 150
    columns = np.clip(np.arange(221) + 80, 240, 300) - 240
    p = np.mean(np.outer(rows, columns) >= 0.1 * 80 * 80)
    assert abs(np.mean(np.array(found) >= 0.1) - (1 - (1 - p) ** 10)) < 0.06
    assert abs(np.mean(np.array(plain) >= 0.1) - p) < 0.03
    assert sum(np.array(found) > 0) > 3 * sum(np.array(plain) > 0)


def test_a_crop_seeks_the_class_that_was_drawn(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))
    plain = DataConfig(scenes=8, size=[64, 128], crop=[24, 24], scale=[1.0, 1.0], sampling="class_uniform")
    data = [build_dataset(DataConfig(**(vars(plain) | {"rare_crop": least})), "train") for least in (0.0, 0.05)]
    order = data[0].order(64, seed=0, epoch=0)
    keys = [Key(0, position, *row.tolist()) for position, row in enumerate(order) if row[1] >= 0]
    shares = [
        np.mean([(one.sample(key, seed=0).labels == key.wanted).float().mean() for key in keys]) for one in data
    ]
    assert shares[1] > 1.3 * shares[0]


def test_pasted_objects_by_hand() -> None:
    """The rider (4) with the bicycle (5) is pasted, the bicycle alone and the speck are not."""
    image, other = np.full((20, 30, 3), 10, np.uint8), np.full((20, 30, 3), 200, np.uint8)
    label, theirs = np.zeros((20, 30), np.uint8), np.ones((20, 30), np.uint8)
    theirs[2:6, 2:6] = 4
    theirs[6:9, 2:6] = 5
    theirs[12:18, 10:14] = 5
    theirs[2:4, 20:24] = 4
    part, pasted = transforms.paste(image, label, 0, other, theirs, 0, wanted=4, together=[4, 5])
    where = np.zeros((20, 30), bool)
    where[2:9, 2:6] = True
    np.testing.assert_array_equal(pasted, np.where(where, theirs, 0))
    np.testing.assert_array_equal(part, np.where(where[..., None], 200, image))
    assert not label.any()  # what it was given stays
    assert (image == 10).all()


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("other_flip", [0, 1])
def test_nothing_is_pasted_onto_padding(flip: int, other_flip: int) -> None:
    """Crops of 20x30: ours is padded to 12x25 at the side away from the image, theirs to 16x20."""
    label, theirs = np.full((20, 30), 255, np.uint8), np.full((20, 30), 255, np.uint8)
    ours = np.zeros((20, 30), bool)
    ours[:12, 5:30] = flip
    ours[:12, :25] |= not flip
    label[ours] = 0
    shown = np.zeros((20, 30), bool)
    shown[:16, 10:] = other_flip
    shown[:16, :20] |= not other_flip
    theirs[shown] = 3
    other = np.arange(16 * 20, dtype=np.uint8).reshape(16, 20, 1).repeat(3, 2)
    part, pasted = transforms.paste(
        np.full((12, 25, 3), 99, np.uint8), label, flip, other, theirs, other_flip, wanted=3, together=[3]
    )
    np.testing.assert_array_equal(pasted == 3, ours & shown)
    assert (pasted[~ours] == 255).all()
    whole = transforms.pad_image(part, (20, 30), flip)
    source = transforms.pad_image(other, (20, 30), other_flip)
    np.testing.assert_array_equal(whole[ours & shown], source[ours & shown])
    assert (whole[ours & ~shown] == 99).all()


def test_copy_paste_gives_rare_classes_their_share(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))

    def share(**changed: Any) -> float:
        config = DataConfig(scenes=12, size=[64, 128], crop=[48, 96], rare_classes=["person", "rider"], **changed)
        batches = build_dataset(config, "train").train_loader(batch_size=4, seed=0, start_step=0, steps=12)
        pixels = sum(batch.pixels.sum(0) for batch in batches)
        return float(pixels[[11, 12]].sum() / pixels.sum())

    plain, half, always = share(), share(copy_paste=0.5), share(copy_paste=1.0)
    assert plain < half < always
    assert always > 1.5 * plain


def test_an_unknown_rare_class_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))
    data = build_dataset(DataConfig(scenes=4, size=[32, 64], copy_paste=0.5, rare_classes=["unicorn"]), "train")
    with pytest.raises(
        ConfigurationError, match=r"^data\.rare_classes: there is no class 'unicorn'; name some of road"
    ):
        data.train_loader(batch_size=2, seed=0, start_step=0, steps=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("class_uniform_share", 1.5), ("rare_crop", -0.1), ("copy_paste", 2.0), ("repeat_threshold", 0.0)],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"^data\.{key}: {value} is not possible; give a number"):
        DataConfig(**{key: value})  # type: ignore[arg-type]


def test_what_is_rare_is_said(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))
    config: dict[str, Any] = {"scenes": 8, "size": [32, 64]}
    assert build_dataset(DataConfig(**config), "train").notes() == []
    named = build_dataset(DataConfig(**config, copy_paste=0.5, rare_classes=["person", "car"]), "train")
    assert named.notes() == ["rare classes for crops and copy-paste: person, car"]
    by_class = build_dataset(DataConfig(**config, sampling="rare_class", rare_crop=0.1, rare_share=1e-9), "train")
    assert by_class.notes() == ["drawn by rare_class"]
    next(iter(by_class.train_loader(batch_size=2, seed=0, start_step=0, steps=1)))  # the sampler says what to seek


def test_what_would_do_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))
    for key in ("rare_crop", "copy_paste"):
        with pytest.raises(
            ConfigurationError, match=rf"^data\.{key}: 0.5 is not possible; it does nothing with data"
        ):
            DataConfig(augment=False, **{key: 0.5})  # type: ignore[arg-type]
        data = build_dataset(DataConfig(scenes=4, size=[32, 64], rare_share=1e-9, **{key: 0.5}), "train")  # type: ignore[arg-type]
        with pytest.raises(
            ConfigurationError, match=r"^data\.rare_share: no class has less than 1e-09 of the pixels"
        ):
            data.train_loader(batch_size=2, seed=0, start_step=0, steps=1)
    with pytest.raises(ConfigurationError, match=r"^data\.root: data\.name=streets is drawn and has no folder"):
        build_dataset(DataConfig(root="datasets/mine"), "train")


# colours on the device


@pytest.mark.parametrize(("jitter", "blur", "exact"), [(0.0, 0.0, True), (0.3, 0.0, False), (0.3, 1.0, False)])
def test_finished_on_the_device_as_in_the_workers(
    jitter: float, blur: float, exact: bool, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """The same floats where no saturation or blur is drawn, else at most one grey level between them a place."""
    monkeypatch.setenv("SEGDISTILL_CACHE", str(cache))
    config = {"scenes": 8, "size": [64, 128], "crop": [80, 96], "jitter": jitter, "blur": blur}
    workers = build_dataset(DataConfig(**config), "train")
    device = build_dataset(DataConfig(**config, finish_on_device=True), "train")
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "start_step": 0, "steps": 6}
    padded = set()
    for batch, raw in zip(workers.train_loader(**settings), device.train_loader(**settings), strict=True):
        assert raw.images.dtype == raw.labels.dtype == torch.uint8
        assert raw.images.shape == (4, 80, 96, 3)
        found = device.finish(raw)
        assert found.images.shape == batch.images.shape
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.labels, batch.labels)
        assert found.labels.dtype == torch.int64
        padded |= {int(place[6]) for place in batch.geometry if place[3] < 96}  # beside the image: flipped or not
        if exact:
            assert torch.equal(found.images, batch.images)
        else:
            # One level is 1/255/std, times contrast and gains of up to 1.3² · 1.06.
            level = 1.3**2 * 1.06 / 255 / 0.224
            assert (found.images - batch.images).abs().max() <= 1.01 * level * (2 if blur else 1)
            assert (found.images != batch.images).float().mean() < (0.3 if blur else 0.02)
        assert device.finish(found) is found  # once is enough
    assert padded == {0, 1}
    for one, other in zip(workers.eval_loader(), device.eval_loader(), strict=True):
        assert torch.equal(device.finish(other).images, one.images)
        assert torch.equal(device.finish(other).labels, one.labels)


def test_saturation_is_that_of_opencv() -> None:
    from data.device import blur, saturate

    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    for share in (0.0, 0.7, 1.0, 1.3):
        expected = cv2.addWeighted(image, share, grey, 1 - share, 0)
        found = saturate(
            torch.from_numpy(image).permute(2, 0, 1)[None], torch.tensor([share], dtype=torch.float64)
        )
        difference = (found[0].permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.05  # of halves, which the two round in different ways
    for sigma in (0.3, 0.8, 1.2):
        expected = cv2.GaussianBlur(image, (5, 5), sigma)
        softened = blur(torch.from_numpy(image).permute(2, 0, 1), sigma).permute(1, 2, 0)
        assert (softened.int() - torch.from_numpy(expected).int()).abs().max() <= 1
