"""The order of the images: a function of (seed, epoch) alone, so that nothing need be stored to go on.

An epoch is a list of `steps per epoch * batch size` positions; an order says which image stands at each, and which
class its crop is to show where a class was drawn. The batches of all epochs are one stream of steps, of which
`StepSampler` yields what one process needs.

`counts` is always int64 [N, C+1]: pixels per image and class, in the last column those without a class.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Key(NamedTuple):
    """What makes a sample, beside the seed."""

    epoch: int
    position: int
    """Its place in the epoch's global order."""
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    """The image's index in the data set."""
    wanted: int = -1
    """The class that its crop is to show, if the sampler drew one."""


Order = Callable[[int], np.ndarray]  # epoch -> int64 [positions, 2]: image, and the class wanted of it or -1

# DAFormer wants 3000 pixels of the class in a 2048x1024 image; the same share of any other size
RARE_CLASS_SHARE = 3000 / (2048 * 1024)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    # NumPy pads the entropy with zeros, so [seed, epoch] would be the generator of position 0's augmentation
    return np.random.default_rng([seed, epoch, 0, 1])


def uniform_order(images: int, positions: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 [positions, 2]: a permutation of the images, cut to `positions`, or repeated where there are fewer."""
    return without_class(np.resize(_generator(seed, epoch).permutation(images), positions))


def without_class(indices: np.ndarray) -> np.ndarray:
    """int64 [positions, 2] of images [positions] of which no class is wanted."""
    return np.stack([indices, np.full(len(indices), -1)], axis=1)


def rare_class_order(
    counts: np.ndarray, positions: int, *, temperature: float, seed: int, epoch: int
) -> np.ndarray:
    """int64 [positions, 2]: at each a class is drawn by its rarity, then an image among those that show it.

    `P(c) = softmax over c of (1 − f_c) / temperature`, f_c the class's share of the labelled pixels; classes
    that never occur are left out. Images are drawn with replacement among those of `showing`. After DAFormer
    (Hoyer et al. 2022, equation 10), which also draws crops again until they show the class, as rare_crop does.
    """
    probabilities = rare_class_probabilities(counts, temperature)
    rng = _generator(seed, epoch)
    drawn = rng.choice(len(probabilities), size=positions, p=probabilities)
    u = rng.random(positions)
    order = np.empty(positions, np.int64)
    for c in np.unique(drawn):
        candidates = showing(counts, c)
        here = drawn == c
        order[here] = candidates[(u[here] * len(candidates)).astype(np.int64)]
    return np.stack([order, drawn], axis=1)


def showing(counts: np.ndarray, c: int) -> np.ndarray:
    """int64, the images that show class c: at least 0.14 % of them is of it (DAFormer's 3000 pixels at 2048x1024),
    or, where it nowhere fills so much, any pixel is."""
    candidates = np.flatnonzero(counts[:, c] >= np.maximum(1, RARE_CLASS_SHARE * counts.sum(1)))
    return candidates if len(candidates) else np.flatnonzero(counts[:, c])


def rare_class_probabilities(counts: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [C]: the probability with which `rare_class_order` draws each class."""
    pixels = counts[:, :-1].sum(0).astype(np.float64)
    logits = np.where(pixels > 0, (1 - pixels / pixels.sum()) / temperature, -np.inf)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def class_uniform_order(counts: np.ndarray, positions: int, *, share: float, seed: int, epoch: int) -> np.ndarray:
    """int64 [positions, 2]: `share` of an epoch in equal parts from the classes that occur, the rest from all.

    Each class goes through a permutation of the images of `showing`, again and again if they are few; so does the
    rest through all images. What does not divide goes to classes drawn anew each epoch. After Zhu et al. 2019
    (Improving semantic segmentation via video propagation and label relaxation, section 3.4), who also centre the
    crop on the class, for which there is data.rare_crop here.
    """
    rng = _generator(seed, epoch)
    classes = rng.permutation(np.flatnonzero(counts[:, :-1].any(0)))
    by_class = round(share * positions)
    numbers = [by_class // len(classes) + (place < by_class % len(classes)) for place in range(len(classes))]
    parts = [without_class(np.resize(rng.permutation(len(counts)), positions - by_class))]
    for c, number in zip(classes.tolist(), numbers, strict=True):
        images = np.resize(rng.permutation(showing(counts, c)), number)
        parts.append(np.stack([images, np.full(number, c)], axis=1))
    return rng.permutation(np.concatenate(parts))


def repeat_factor_order(
    counts: np.ndarray, positions: int, *, threshold: float, seed: int, epoch: int
) -> np.ndarray:
    """int64 [positions, 2]: a permutation of the images, each repeated by its factor, cut to `positions`.

    What a factor has beyond a whole number is drawn anew each epoch. After Gupta et al. 2019 (LVIS, section 4.1).
    """
    rng = _generator(seed, epoch)
    factors = repeat_factors(counts, threshold)
    times = np.floor(factors + rng.random(len(factors))).astype(np.int64)
    repeated = rng.permutation(np.repeat(np.arange(len(factors)), times))
    return without_class(np.resize(repeated, positions))


def repeat_factors(counts: np.ndarray, threshold: float) -> np.ndarray:
    """float64 [N], at least 1: the largest over an image's classes of sqrt(threshold / f_c), f_c the share of the
    images that show class c by any pixel. The paper's threshold of 0.001 is for 1203 classes; with 19 it does
    nothing."""
    shown = counts[:, :-1] > 0
    frequency = np.maximum(shown.mean(0), 1 / len(counts))
    by_class = np.maximum(1, np.sqrt(threshold / frequency))
    return np.where(shown, by_class, 1).max(1)


def rare_classes(counts: np.ndarray, share: float) -> np.ndarray:
    """int64, the classes that occur and have less than `share` of the labelled pixels."""
    pixels = counts[:, :-1].sum(0)
    return np.flatnonzero((pixels > 0) & (pixels < share * pixels.sum()))


class StepSampler(Sampler[list[Key]]):
    """Yields the micro-batches of one process from step `start` up to `stop`, over all epochs: `accumulate` a
    step, each a list of (epoch, position, index).

    Part a of rank r in a step whose positions begin at p0 holds `p0 + a·(B/A) + r + k·world_size`, so that all
    ranks and parts together are the batch of B that a single process would see.
    """

    def __init__(
        self,
        order: Order,
        *,
        steps_per_epoch: int,
        batch_size: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.order = order
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.start, self.stop = start, stop
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        current, drawn = -1, np.empty((0, 2), np.int64)
        part = self.batch_size // self.accumulate
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, drawn = epoch, self.order(epoch)
            for a in range(self.accumulate):
                first = within * self.batch_size + a * part
                positions = range(first + self.rank, first + part, self.world_size)
                yield [Key(epoch, position, *drawn[position].tolist()) for position in positions]
