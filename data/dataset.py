"""The data set that every reader becomes: samples, label counts, class weights and loaders."""

import hashlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import statistics, transforms
from data.device import finish_images
from data.files import (
    Pair,
    bad_values_error,
    check_one_size,
    check_pairs,
    map_threads,
    read_bytes,
    read_image,
    read_label,
    read_label_values,
)
from data.labels import IGNORE_INDEX, INVALID, Labels
from data.sampling import (
    Key,
    Order,
    StepSampler,
    class_uniform_order,
    rare_class_order,
    rare_classes,
    repeat_factor_order,
    showing,
    uniform_order,
)
from data.transforms import Size
from errors import ConfigurationError, MachineError


class Batch(NamedTuple):
    """What a loader yields; without the first dimension, one sample.

    With `data.finish_on_device` images are uint8 [B, H, W, 3] and labels uint8 until `SegmentationData.finish`.
    """

    images: Tensor
    """[B, 3, H, W] float32, normalised, in channels-last memory."""
    labels: Tensor
    """[B, H, W] int64 trainIds, 255 where there is none; UNLABELLED all over an image that has no label at all."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    """[B] int64, the image's index in the data set."""
    position: Tensor
    """[B] int64, its position in the epoch's global order."""
    geometry: Tensor
    """[B, 7] int64: source height and width, scaled height and width, top, left, flip; see data/transforms.py."""
    appearance: Tensor
    """[B, 6] float64: contrast, gains of red, green and blue, saturation, sigma; see data/transforms.py."""
    pixels: Tensor
    """[B, C+1] int64: pixels of each class in `labels`, in the last place those of none."""


class Settings(NamedTuple):
    """How samples are made of images; the fields are those of DataConfig."""

    size: Size | None = None
    crop: Size | None = None
    augment: bool = True
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.3
    blur: float = 0.1
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    finish_on_device: bool = False
    reduced_decoding: bool = False
    sampling: str = "uniform"
    rare_class_temperature: float = 0.01
    class_uniform_share: float = 0.5
    repeat_threshold: float = 0.5
    rare_share: float = 0.01
    rare_classes: tuple[str, ...] = ()
    rare_crop: float = 0.0
    copy_paste: float = 0.0


class Cut(NamedTuple):
    """The pixels of a sample before colours, normalisation and padding of the image."""

    part: np.ndarray  # uint8 [h, w, 3], at most of the crop's size
    label: np.ndarray  # uint8 [crop height, crop width]; in evaluation at label size
    crop: Size
    geometry: transforms.Geometry
    appearance: transforms.Appearance


EVALUATION = -1  # as a key's epoch: the whole image, no augmentation, the label at its own size


class SegmentationData(Dataset[Batch], ABC):
    """Images with labels of one split. A reader gives `read` and `manifest_hash`."""

    unlabelled = False
    """Whether there are images without labels, of which only a teacher can speak."""

    def __init__(self, split: str, labels: Labels, names: list[str], settings: Settings) -> None:
        self.split = split
        self.labels = labels
        self.names = names
        self.settings = settings
        self._plain_table = transforms.colour_table(settings.mean, settings.std, transforms.Appearance())
        self._counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H, W, 3] RGB and label uint8 [H, W] trainIds, as they are on disk.

        Raises ConfigurationError naming the file for everything that can be wrong with it.
        """

    @abstractmethod
    def manifest_hash(self) -> str:
        """SHA-256 in hex over the names and sizes of the files, to notice another data set."""

    def _count_key(self) -> str:
        """A hash of everything that the label counts depend on."""
        return self.manifest_hash()

    def _count_one(self, index: int) -> np.ndarray:
        return count_classes(self.read(index)[1], len(self.labels))

    # samples

    def __getitem__(self, key: Key) -> Batch:
        """The sample of (epoch, position, index), with the augmentation of seed 0."""
        return self.sample(key, seed=0)

    def sample(self, key: Key, *, seed: int) -> Batch:
        """One unbatched sample; its augmentation is a function of (seed, epoch, position).

        An epoch of -1 asks for the image as in evaluation: whole, resized to `size` if that is set, not
        augmented, with its label at label size.
        """
        return Batch(*(field[0] for field in self.batch([key], seed=seed)))

    def batch(self, keys: Sequence[Key], *, seed: int, finished: bool = True) -> Batch:
        """Several samples stacked; not finished they are bytes, images [B, H, W, 3] padded with 0 and labels."""
        keys, settings = [Key(*key) for key in keys], self.settings
        cuts = [self._pixels(key, seed) for key in keys]
        labels = np.stack([cut.label for cut in cuts])
        if finished:
            images = np.empty((len(cuts), *cuts[0].crop, 3), np.float32)
            labels = labels.astype(np.int64)
            for cut, image in zip(cuts, images, strict=True):
                table = self._plain_table
                if cut.appearance != transforms.Appearance():
                    table = transforms.colour_table(settings.mean, settings.std, cut.appearance)
                transforms.finish_image(cut.part, cut.crop, cut.geometry.flip, table, cut.appearance, image)
        else:
            images = np.stack([transforms.pad_image(cut.part, cut.crop, cut.geometry.flip) for cut in cuts])
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2) if finished else torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            index=torch.tensor([key.index for key in keys]),
            position=torch.tensor([key.position for key in keys]),
            geometry=torch.tensor([cut.geometry for cut in cuts], dtype=torch.int64),
            appearance=torch.tensor(np.stack([np.hstack(cut.appearance) for cut in cuts]), dtype=torch.float64),
            pixels=torch.from_numpy(np.stack([count_classes(cut.label, len(self.labels)) for cut in cuts])),
        )

    def finish(self, batch: Batch) -> Batch:
        """What a `batch` that is not finished left to do, on the batch's device; a finished batch stays as it is.

        Equal to what `sample` gives, but for a grey level or so where saturation or blur were changed.
        """
        if batch.images.dtype != torch.uint8:
            return batch
        images = finish_images(
            batch.images, batch.geometry, batch.appearance, self.settings.mean, self.settings.std
        )
        return batch._replace(images=images, labels=batch.labels.long())

    def _pixels(self, key: Key, seed: int) -> "Cut":
        """The pixels of a sample."""
        if key.epoch == EVALUATION:
            return self._cut(key.index, None)
        settings = self.settings
        wanted = [key.wanted] if key.wanted >= 0 else self.rare if settings.rare_crop else []
        rng = np.random.default_rng([seed, key.epoch, key.position])
        cut = self._cut(key.index, rng, wanted, settings.rare_crop)
        if settings.augment and settings.copy_paste:
            rng = np.random.default_rng([seed, key.epoch, key.position, 2])
            if rng.random() < settings.copy_paste:
                cut = self._paste(cut, rng)
        return cut

    def _cut(
        self, index: int, rng: np.random.Generator | None, wanted: Sequence[int] = (), least: float = 0.0
    ) -> "Cut":
        """A crop of an image by random numbers, with a share `least` of the wanted classes if there is such a
        crop; without a generator the image as in evaluation."""
        settings = self.settings
        image, label = self.read(index)
        if settings.size is not None:
            image = transforms.resize_image(image, settings.size)
        source: Size = image.shape[0], image.shape[1]
        appearance = transforms.Appearance()
        if rng is None:
            return Cut(image, label, source, transforms.central(source, source), appearance)
        label = transforms.resize_label(label, source)
        crop = settings.crop or source
        geometry = transforms.central(source, crop)
        if settings.augment:
            geometry, appearance = transforms.draw(
                rng,
                source,
                crop,
                scale=settings.scale,
                flip=settings.flip,
                jitter=settings.jitter,
                blur=settings.blur,
            )
            if least:
                geometry = transforms.seek(rng, label, geometry, crop, classes=wanted, least=least)
        part = transforms.crop_image(image, geometry, crop)
        return Cut(part, transforms.crop_label(label, geometry, crop), crop, geometry, appearance)

    def _paste(self, cut: Cut, rng: np.random.Generator) -> Cut:
        """The sample with objects of a rare class of another image on it, at the places that they have there.

        The class is drawn uniformly, the image among those that show it; its crop is drawn like the sample's, with
        one in a hundred pixels of that class if there is such a crop.
        """
        if not self.rare:
            return cut
        c = int(rng.choice(self.rare))
        other = self._cut(int(rng.choice(showing(self.label_counts(), c))), rng, [c], least=0.01)
        part, label = transforms.paste(
            cut.part,
            cut.label,
            cut.geometry.flip,
            other.part,
            other.label,
            other.geometry.flip,
            wanted=c,
            together=self.rare,
        )
        return cut._replace(part=part, label=label)

    def notes(self) -> list[str]:
        """What a person should know of the samples at the start of a training, besides their number."""
        settings = self.settings
        told = [] if settings.sampling == "uniform" else [f"drawn by {settings.sampling}"]
        if settings.copy_paste or (settings.rare_crop and settings.sampling != "rare_class"):
            names = ", ".join(self.labels.names[c] for c in self.rare) or "none"
            told.append(f"rare classes for crops and copy-paste: {names}")
        return told

    @cached_property
    def rare(self) -> list[int]:
        """The classes that data.rare_crop and data.copy_paste call rare."""
        if not self.settings.rare_classes:
            return rare_classes(self.label_counts(), self.settings.rare_share).tolist()
        unknown = [name for name in self.settings.rare_classes if name not in self.labels.names]
        if unknown:
            raise ConfigurationError(
                f"data.rare_classes: there is no class {unknown[0]!r}; name some of {', '.join(self.labels.names)}"
            )
        numbers = [self.labels.names.index(name) for name in self.settings.rare_classes]
        return [c for c in numbers if self.label_counts()[:, c].any()]

    def _check_one_size(self) -> None:
        """Raises ConfigurationError where images of unequal size would have to stand in one batch."""

    # statistics

    def label_counts(self) -> np.ndarray:
        """int64 [N, C+1]: pixels per image and class, in the last column those without a class.

        Counted once from every label (which also checks every value), then kept on disk under a hash of the
        label files' bytes. Raises ConfigurationError naming the first bad file.
        """
        if self._counts is None:
            shape = (len(self), len(self.labels) + 1)
            key = self._count_key()
            self._counts = statistics.load_counts(key, shape)
            if self._counts is None:
                rows = map_threads(self._count_one, range(len(self)))
                self._counts = statistics.gather_counts(rows, len(self), self.split)
                statistics.store_counts(key, self._counts)
        return self._counts

    def class_weights(self, scheme: statistics.Scheme) -> Tensor:
        """float32 [C]; the formulas stand in data/statistics.py."""
        return torch.from_numpy(statistics.class_weights(self.label_counts(), scheme))

    # loaders

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many whole batches an epoch has, at least one."""
        return max(1, len(self) // batch_size)

    def _order(self, batch_size: int, seed: int) -> Order:
        positions = self.steps_per_epoch(batch_size) * batch_size
        return lambda epoch: self.order(positions, seed=seed, epoch=epoch)

    def order(self, positions: int, *, seed: int, epoch: int) -> np.ndarray:
        """int64 [positions, 2]: the image at each position of an epoch, and the class wanted of it or -1."""
        settings = self.settings
        if settings.sampling == "uniform":
            return uniform_order(len(self), positions, seed=seed, epoch=epoch)
        counts = self.label_counts()
        if settings.sampling == "rare_class":
            temperature = settings.rare_class_temperature
            return rare_class_order(counts, positions, temperature=temperature, seed=seed, epoch=epoch)
        if settings.sampling == "class_uniform":
            share = settings.class_uniform_share
            return class_uniform_order(counts, positions, share=share, seed=seed, epoch=epoch)
        return repeat_factor_order(counts, positions, threshold=settings.repeat_threshold, seed=seed, epoch=epoch)

    def train_loader(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> "Loader":
        """One stream of augmented micro-batches from step `start_step` up to `steps`, over all epochs.

        `batch_size` is over all processes and accumulated parts; the loader yields this rank's `accumulate`
        micro-batches a step. Neither the number of workers nor the starting step changes what a step gets.
        Where the split is smaller than a batch, its order repeats until the batch is full.
        """
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise ConfigurationError(
                f"train.batch_size: {batch_size} is not a multiple of {world_size} processes times {accumulate} "
                "accumulated parts; choose one that is"
            )
        if not 0 <= seed < 2**32:
            raise ConfigurationError(f"seed: {seed} is outside 0..4294967295; choose one inside")
        if self.settings.crop is None and self.settings.size is None:
            self._check_one_size()
        by_class = self.settings.sampling == "rare_class"  # which gives every crop a class to seek
        wanted = self.settings.copy_paste or (self.settings.rare_crop and not by_class)
        if wanted and not self.rare:  # counted here, once for all workers
            raise ConfigurationError(
                f"data.rare_share: no class has less than {self.settings.rare_share:g} of the pixels, so there is "
                "nothing to seek or paste; raise it, or name data.rare_classes"
            )
        sampler = StepSampler(
            self._order(batch_size, seed),
            steps_per_epoch=self.steps_per_epoch(batch_size),
            batch_size=batch_size,
            start=start_step,
            stop=steps,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
        )
        return _loader(self, seed, sampler, workers, pin_memory)

    def eval_loader(self, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> "Loader":
        """The images of this rank, one a batch and in order: rank, rank + world_size, … without padding.

        Whole images, not augmented, with their labels at label size.
        """
        keys = [[Key(EVALUATION, index, index)] for index in range(rank, len(self), world_size)]
        return _loader(self, 0, keys, workers, False)


class FileData(SegmentationData):
    """A split of image and label files. The constructor checks every file as far as that goes without decoding
    the images: their ends, headers and sizes, and every value of every label (kept on disk, see label_counts).
    """

    def __init__(
        self, split: str, labels: Labels, pairs: Sequence[Pair], table: np.ndarray, settings: Settings, root: Path
    ) -> None:
        if not pairs:
            raise ConfigurationError(f"{root}: the split {split!r} has no images; check data.root")
        super().__init__(split, labels, [pair.name for pair in pairs], settings)
        self.pairs = list(pairs)
        self.table = table
        self.root = root
        self._facts = check_pairs(self.pairs)
        if not self.label_counts()[:, :-1].any():
            withheld = "; the labels of test are withheld, use val" if split == "test" else "; check the labels"
            raise ConfigurationError(f"{root}: no pixel of the split {split!r} has a class{withheld}")

    def _check_one_size(self) -> None:
        check_one_size(self.sizes, [pair.image for pair in self.pairs])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pairs[index]
        height, width = self.sizes[index].tolist()
        reduction = self._reduction(height, width)
        image = read_image(pair.image, reduction)
        label = read_label(pair.label, self.table)
        reduced = -(-height // reduction), -(-width // reduction)  # but for PNGs
        for path, found, allowed in ((pair.image, image, reduced), (pair.label, label, (height, width))):
            if found.shape[:2] not in (allowed, (height, width)):
                raise ConfigurationError(
                    f"{path}: is {found.shape[1]}x{found.shape[0]} but was {width}x{height} when the data set was "
                    "opened; leave the files alone during a run"
                )
        return image, label

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N, 2], height and width of the images as they are on disk."""
        return self._facts[:, :2]

    @property
    def file_sizes(self) -> np.ndarray:
        """int64 [N, 2], bytes of the image's file and of the label's."""
        return self._facts[:, 2:]

    def _reduction(self, height: int, width: int) -> int:
        """By how much a JPEG may be decoded smaller: what of 8, 4, 2 and 1 first leaves data.size."""
        size = self.settings.size
        if size is None or not self.settings.reduced_decoding:
            return 1
        return next(
            (n for n in (8, 4, 2) if -(-height // n) >= size[0] and -(-width // n) >= size[1]),
            1,
        )

    def manifest_hash(self) -> str:
        reduced = " reduced" if self.settings.reduced_decoding and self.settings.size else ""
        digest = hashlib.sha256(f"{self.split} {len(self)}{reduced}\n".encode())
        for name, facts in zip(self.names, self._facts.tolist(), strict=True):
            digest.update(f"{name} {facts}\n".encode())
        return digest.hexdigest()

    def _count_key(self) -> str:
        digest = hashlib.sha256(b"label counts 1\n" + self.table.tobytes())
        for one in map_threads(lambda pair: hashlib.sha256(read_bytes(pair.label)).digest(), self.pairs):
            digest.update(one)
        return digest.hexdigest()

    def _count_one(self, index: int) -> np.ndarray:
        path = self.pairs[index].label
        values = np.bincount(read_label_values(path).ravel(), minlength=256)
        bad = np.flatnonzero((values > 0) & (self.table == INVALID))
        if len(bad):
            raise bad_values_error(path, bad.tolist(), self.table)
        by_train_id = np.bincount(self.table, weights=values, minlength=256).astype(np.int64)
        return np.append(by_train_id[: len(self.labels)], by_train_id[IGNORE_INDEX])


def count_classes(label: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes+1] of a label of trainIds: pixels per class, and in the last place all others."""
    flat = label.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)  # of runs, of which labels are made
    values = np.bincount(flat[ends], np.diff(ends, prepend=-1), 256).astype(np.int64)  # exact up to 2^53 pixels
    return np.append(values[:classes], values[classes:].sum())


class _Guarded(Dataset[Any]):
    """A data set with its seed, as the loader sees it: an error of the user's files is handed over as a value,
    for an exception raised in a worker arrives with the worker's traceback as its text."""

    def __init__(self, data: SegmentationData, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitems__(self, keys: list[Key]) -> list[Any] | str:
        """The whole batch, which the loader's collate_fn has only to hand on; its small fields as arrays, for each
        tensor that a worker hands over costs a connection of its own, most of a millisecond."""
        try:
            batch = self.data.batch(keys, seed=self.seed, finished=not self.data.settings.finish_on_device)
        except ConfigurationError as error:
            return str(error)
        return [batch.images, batch.labels, *(field.numpy() for field in batch[2:])]


def _hand_on(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # one thread a worker: the workers are the parallelism
    signal.signal(signal.SIGTERM, _outlive_once)


def _outlive_once(*_: Any) -> None:
    """SIGTERM to all processes is the training's to answer, which needs batches for it. A second one ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader(DataLoader[Batch]):
    """A DataLoader whose errors are those of errors.py, in one line, whatever the number of workers."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        try:
            while True:
                try:
                    batch: Any = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if str(error).startswith("DataLoader worker (pid"):  # so torch says that one was killed
                        line = str(error).splitlines()[0]
                        raise MachineError(f"data.workers: {line}; out of memory? try fewer workers") from error
                    raise
                if isinstance(batch, str):
                    raise ConfigurationError(batch)
                yield Batch(*batch[:2], *(torch.from_numpy(field) for field in batch[2:]))
        finally:
            del batches  # or a traceback would keep the workers, and the garbage collector end them at any time


def _loader(data: SegmentationData, seed: int, sampler: Any, workers: int, pin_memory: bool) -> Loader:
    return Loader(
        _Guarded(data, seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_hand_on,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),  # or it would draw from, and so change, torch's own state
    )
