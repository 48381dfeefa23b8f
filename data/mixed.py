"""Training images of several data sets at once, each with its share of an epoch, and images without labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data.dataset import EVALUATION, Cut, SegmentationData, Settings
from data.files import check_one_size
from data.labels import IGNORE_INDEX, UNLABELLED
from data.sampling import Key
from errors import ConfigurationError

Name = Literal["streets", "camvid", "cityscapes", "bdd100k", "folder", "huggingface"]


@dataclass
class MixConfig:
    """A further source of training images; size, crop and augmentation are those of `data`."""

    name: Name | None = None
    """The data set, of the same classes as `data.name`; none for unlabelled images."""
    root: str = ""
    """Its folder, or that of the unlabelled images, which may lie in folders of their own there."""
    classes: str = ""
    """As data.classes."""
    split: Literal["train", "val", "test"] = "train"
    """The split of it that is trained on."""
    weight: float = 1.0
    """Its share of an epoch, relative to the other weights and to data.mix_weight."""
    unlabelled: bool = False
    """Images alone, for which only a teacher speaks."""


class Source(NamedTuple):
    """A part of a mixed data set."""

    called: str
    data: SegmentationData
    weight: float


class MixedData(SegmentationData):
    """Several sources as one data set: their images one after the other, and in each epoch as many positions as
    there are images in all, of which each source has exactly its share.

    A source's own epochs, ordered by data.sampling over its images, follow one another without a gap: what one
    epoch of the whole leaves over stands at the beginning of the next.
    """

    def __init__(self, sources: Sequence[Source], settings: Settings) -> None:
        first, *others = sources
        for other in others:
            _check_same_classes(first, other)
        names = [f"{called}--{name}" for called, data, _ in sources for name in data.names]
        super().__init__(first.data.split, first.data.labels, names, settings)
        self.sources = list(sources)
        self.unlabelled = any(data.unlabelled for _, data, _ in sources)
        self.starts = np.cumsum([0, *(len(data) for _, data, _ in sources)])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[source].data.read(index - int(self.starts[source]))

    def _pixels(self, key: Key, seed: int) -> Cut:
        cut = super()._pixels(key, seed)
        if key.epoch == EVALUATION:  # against which no teacher speaks
            cut = cut._replace(label=np.where(cut.label == UNLABELLED, np.uint8(IGNORE_INDEX), cut.label))
        return cut

    def notes(self) -> list[str]:
        whole = sum(weight for _, _, weight in self.sources)
        shares = []
        for called, data, weight in self.sources:
            unlabelled = " without labels" if data.unlabelled else ""
            shares.append(f"{called}: {len(data)} images{unlabelled}, {weight / whole:.1%} of an epoch")
        return [*shares, *super().notes()]

    def manifest_hash(self) -> str:
        hashes = [f"{called} {data.manifest_hash()}\n" for called, data, _ in self.sources]
        return hashlib.sha256("".join(["mixed\n", *hashes]).encode()).hexdigest()

    def label_counts(self) -> np.ndarray:
        if self._counts is None:
            self._counts = np.concatenate([data.label_counts() for _, data, _ in self.sources])
        return self._counts

    def _check_one_size(self) -> None:
        for _, data, _ in self.sources:
            data._check_one_size()
        sizes = [data.read(0)[0].shape[:2] for _, data, _ in self.sources]
        check_one_size(np.array(sizes), [self.names[start] for start in self.starts[:-1]])

    def order(self, positions: int, *, seed: int, epoch: int) -> np.ndarray:
        """int64 [positions, 2]: those of each source, in turn for as many positions as it has, shuffled."""
        numbers = divide(positions, [weight for _, _, weight in self.sources])
        parts = []
        for place, (source, number) in enumerate(zip(self.sources, numbers, strict=True)):
            if not number:
                raise ConfigurationError(
                    f"data.mix: {source.called} has so small a weight, {source.weight:g}, that none of the "
                    f"{positions} positions of an epoch is its; give it more"
                )
            own_seed = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
            drawn = _stretch(source.data, epoch * number, number, own_seed)
            parts.append(drawn + [self.starts[place], 0])
        return np.random.default_rng([seed, epoch, 0, 3]).permutation(np.concatenate(parts))


def _stretch(data: SegmentationData, start: int, number: int, seed: int) -> np.ndarray:
    """int64 [number, 2], from `start` on of all epochs of a source one after the other."""
    epochs = range(start // len(data), (start + number - 1) // len(data) + 1)
    drawn = np.concatenate([data.order(len(data), seed=seed, epoch=epoch) for epoch in epochs])
    return drawn[start - epochs[0] * len(data) :][:number]


def divide(positions: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `positions`, in the ratio of the weights: by the largest remainders."""
    exact = positions * np.array(weights) / sum(weights)
    numbers = np.floor(exact).astype(np.int64)
    largest = np.argsort(numbers - exact, kind="stable")[: positions - numbers.sum()]
    numbers[largest] += 1
    return numbers.tolist()


def _check_same_classes(first: Source, other: Source) -> None:
    ours, theirs = first.data.labels.names, other.data.labels.names
    for number in range(max(len(ours), len(theirs))):
        one, two = (names[number] if number < len(names) else "none" for names in (ours, theirs))
        if one != two:
            raise ConfigurationError(
                f"data.mix: the classes of {first.called} and {other.called} differ, class {number} is {one!r} in "
                f"the former and {two!r} in the latter; mix data sets of the same classes in the same order"
            )
