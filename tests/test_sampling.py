"""The order of the images: stateless, split over ranks and parts without loss, rare classes as often as asked."""

from typing import Any

import numpy as np
import pytest

from data.sampling import (
    StepSampler,
    rare_class_order,
    rare_class_probabilities,
    uniform_order,
)


def test_uniform_order_is_a_permutation_of_seed_and_epoch() -> None:
    order = uniform_order(50, 48, seed=3, epoch=7)
    assert len(set(order[:, 0].tolist())) == 48
    assert (order[:, 1] == -1).all()
    np.testing.assert_array_equal(order, uniform_order(50, 48, seed=3, epoch=7))
    assert (order != uniform_order(50, 48, seed=3, epoch=8)).any()
    assert (order != uniform_order(50, 48, seed=4, epoch=7)).any()


def test_small_set_repeats_until_the_batch_is_full() -> None:
    order = uniform_order(3, 8, seed=0, epoch=0)[:, 0]
    assert len(order) == 8
    assert sorted(order[:3].tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(order[:3], order[3:6])


def test_order_and_first_augmentation_have_different_generators() -> None:
    """NumPy pads entropy with zeros: default_rng([s, e]) is default_rng([s, e, 0])."""
    order = np.random.default_rng([5, 2, 0]).permutation(100)
    assert (uniform_order(100, 100, seed=5, epoch=2)[:, 0] != order).any()


def sampler(**changed: int) -> StepSampler:
    settings = {"steps_per_epoch": 3, "batch_size": 8, "start": 0, "stop": 7} | changed
    return StepSampler(lambda epoch: uniform_order(26, 24, seed=1, epoch=epoch), **settings)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_parts_join_to_the_whole_batch(world_size: int, accumulate: int) -> None:
    whole = list(sampler())
    assert len(whole) == 7
    ranks = [list(sampler(rank=rank, world_size=world_size, accumulate=accumulate)) for rank in range(world_size)]
    part = 8 // accumulate
    for step, batch in enumerate(whole):
        for a in range(accumulate):
            expected = batch[a * part : (a + 1) * part]
            for rank in range(world_size):
                found = ranks[rank][step * accumulate + a]
                assert found == expected[rank::world_size]
                assert len(found) == 8 // (world_size * accumulate)


def test_stream_crosses_epochs_and_starts_anywhere() -> None:
    whole = list(sampler())
    assert [batch[0][:2] for batch in whole] == [(0, 0), (0, 8), (0, 16), (1, 0), (1, 8), (1, 16), (2, 0)]
    for start in range(8):
        tail = sampler(start=start)
        assert list(tail) == whole[start:]
        assert len(tail) == 7 - start


def test_rare_class_distribution() -> None:
    """2000 draws against the formula; class 2 is rare, class 3 never occurs."""
    rng = np.random.default_rng(0)
    counts = np.zeros((40, 5), np.int64)
    counts[:, 0] = rng.integers(5000, 9000, 40)
    counts[:, 1] = rng.integers(100, 2000, 40)
    counts[4:7, 2] = 300
    counts[:, 4] = 500
    f = counts[:, :4].sum(0) / counts[:, :4].sum()
    temperature = 0.5
    e = np.where(f > 0, np.exp((1 - f) / temperature), 0)
    expected = e / e.sum()
    np.testing.assert_allclose(rare_class_probabilities(counts, temperature), expected, rtol=1e-12)

    settings: dict[str, Any] = {"temperature": temperature, "seed": 0}
    orders = [rare_class_order(counts, 500, **settings, epoch=epoch) for epoch in range(4)]
    order = np.concatenate(orders)
    # classes 0 and 1 are in all 40 images, class 2 in three
    per_image = np.bincount(order[:, 0], minlength=40) / len(order)
    assert (counts[order[:, 0], order[:, 1]] > 0).all()  # the class wanted is there
    common = (expected[0] + expected[1]) / 40
    np.testing.assert_allclose(per_image[4:7], common + expected[2] / 3, atol=0.03)
    others = np.delete(per_image, [4, 5, 6])
    assert abs(others.mean() - common) < 0.002
    np.testing.assert_array_equal(orders[2], rare_class_order(counts, 500, **settings, epoch=2))
    assert (orders[0] != orders[1]).any()


def test_rare_class_wants_more_than_a_few_pixels_where_it_can() -> None:
    counts = np.zeros((3, 3), np.int64)
    counts[:, 0] = 100_000
    counts[:, 1] = [1, 5000, 0]
    order = rare_class_order(counts, 50, temperature=0.01, seed=0, epoch=0)
    assert set(map(tuple, order)) == {(1, 1)}  # class 1 is drawn throughout, and image 0 shows too little of it
    counts[1, 1] = 1
    order = rare_class_order(counts, 50, temperature=0.01, seed=0, epoch=0)
    assert set(order[:, 0].tolist()) == {0, 1}


def test_low_temperature_does_not_overflow() -> None:
    counts = np.array([[10**12, 1, 0]], np.int64)
    np.testing.assert_allclose(rare_class_probabilities(counts, 1e-4), [0, 1])
