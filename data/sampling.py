"""The order of the images: a function of (seed, epoch) alone, so that nothing need be stored to go on.

An epoch is a list of `steps per epoch * batch size` positions; `order` says which image stands at each. The
batches of all epochs are one stream of steps, of which `StepSampler` yields what one process needs.
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


Order = Callable[[int], np.ndarray]  # epoch -> int64 [positions], the index at each position

# DAFormer wants 3000 pixels of the class in a 2048x1024 image; the same share of any other size
RARE_CLASS_SHARE = 3000 / (2048 * 1024)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    # NumPy pads the entropy with zeros, so [seed, epoch] would be the generator of position 0's augmentation
    return np.random.default_rng([seed, epoch, 0, 1])


def uniform_order(images: int, positions: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 [positions]: a permutation of the images, cut to `positions`, or repeated where there are fewer."""
    order = _generator(seed, epoch).permutation(images)
    return np.resize(order, positions)


def rare_class_order(
    counts: np.ndarray, positions: int, *, temperature: float, seed: int, epoch: int
) -> np.ndarray:
    """int64 [positions]: at each a class is drawn by its rarity, then an image among those that show it.

    `P(c) = softmax over c of (1 − f_c) / temperature`, f_c the class's share of the labelled pixels; classes
    that never occur are left out. An image shows a class if 0.14 % of it is of that class (DAFormer's 3000
    pixels at 2048x1024), or, for a class that nowhere fills so much, if any pixel is. Images are drawn with
    replacement. After DAFormer (Hoyer et al. 2022, equation 10), which also draws crops again until they show
    the class; this does not.

    `counts` is int64 [N, C+1], pixels per image and class, the last column those without a class.
    """
    probabilities = rare_class_probabilities(counts, temperature)
    enough = np.maximum(1, RARE_CLASS_SHARE * counts.sum(1, keepdims=True))
    rng = _generator(seed, epoch)
    drawn = rng.choice(len(probabilities), size=positions, p=probabilities)
    u = rng.random(positions)
    order = np.empty(positions, np.int64)
    for c in np.unique(drawn):
        candidates = np.flatnonzero(counts[:, c] >= enough[:, 0])
        if not len(candidates):
            candidates = np.flatnonzero(counts[:, c])
        here = drawn == c
        order[here] = candidates[(u[here] * len(candidates)).astype(np.int64)]
    return order


def rare_class_probabilities(counts: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [C]: the probability with which `rare_class_order` draws each class."""
    pixels = counts[:, :-1].sum(0).astype(np.float64)
    logits = np.where(pixels > 0, (1 - pixels / pixels.sum()) / temperature, -np.inf)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


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
        current, indices = -1, np.empty(0, np.int64)
        part = self.batch_size // self.accumulate
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, indices = epoch, self.order(epoch)
            for a in range(self.accumulate):
                first = within * self.batch_size + a * part
                positions = range(first + self.rank, first + part, self.world_size)
                yield [Key(epoch, position, int(indices[position])) for position in positions]
