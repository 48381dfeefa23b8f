"""The cached teacher: its answers to whole images, written once, then cropped, scaled and mirrored like them.

    FOLDER/key.json               what the cache was made for, by field
    FOLDER/shard_00012/           the answers to `shard` consecutive images, n of them, written by any one process
        logits.npy                uint8 or float16 [n, C, h, w] at native stride, each pixel's below its highest:
                                  round((highest - z) / 0.1), at most 255, or z - highest
        maxima.npy                float32 [n, h, w], the highest; beside float16 alone
        predictions.npy           uint8 [n, h, w], the class of the highest
        TAP.npy                   float16 [n, D, h', w'], a feature map
        figures.npy               int64 [n, 3]: logits that were clipped, labelled positions, those predicted right
        sums.json                 SHA-256 of these files and of the key

The softmax does not see what is subtracted, so most losses don't. What compares logits across positions (`cwd`,
`bpkd`) does, and wants float16, which gives the logits themselves back. Rounding to steps of 0.1 costs a KL
divergence of about 0.1²/24 at most: each logit's error has the variance 0.1²/12, and half of that counts.

A shard is written under a temporary name, synced and renamed, so that it is whole or not there. All files are
read through memory maps, and of a crop only the rows and columns that it needs.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from torch import Tensor

from engine.checkpoint import sync
from engine.run import Run, on_main_process
from engine.teachers import Answer, CacheConfig
from engine.tracking import write_json
from errors import ConfigurationError, DamagedFileError, MachineError, NonFiniteError, Terminated, UserError
from evaluation.report import quantity, significant

FORMAT = "1"
STEP, LEVELS = 0.1, 255
HALF = 65504.0  # the largest number of float16
WHOLE = -1  # as an epoch: the whole image, not augmented
KEY, SUMS = "key.json", "sums.json"
THREADS = 4
FIGURES = 3
Maps = dict[str, np.ndarray]


class Images(Protocol):
    """What a cache needs of a data set: whole images, `sample((-1, index, index), seed=0)`, with their labels."""

    names: list[str]

    def __len__(self) -> int: ...
    def sample(self, key: tuple[int, int, int], *, seed: int) -> Any: ...


class Answering(Protocol):
    """A live teacher."""

    def answer(self, images: Tensor, taps: Sequence[str]) -> Any: ...


@dataclass(frozen=True)
class Layout:
    """Where a cache lies, what it was made for, and how it is divided."""

    folder: Path
    key: dict[str, str]
    images: int
    taps: tuple[str, ...]
    config: CacheConfig

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> range:
        return range(math.ceil(self.images / self.config.shard))

    @property
    def missing(self) -> list[int]:
        """The shards that are yet to be written."""
        return [shard for shard in self.shards if not self.path(shard).is_dir()]

    @property
    def names(self) -> list[str]:
        """Of a shard's arrays."""
        maxima = ["maxima"] if self.config.storage == "float16" else []
        return ["logits", *maxima, "predictions", *self.taps, "figures"]

    def path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}"

    def temporary(self, shard: int) -> Path:
        return self.folder / f".shard_{shard:05d}.tmp"

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.config.shard, min(self.images, (shard + 1) * self.config.shard))

    def sums(self, digests: dict[str, str]) -> bytes:
        """The text of sums.json, which is compared as it stands."""
        return (json.dumps({"key": self.digest, "sha256": digests}, indent=2) + "\n").encode()


def open_cache(
    run: Run,
    teacher: Answering,
    data: Images,
    folder: Path,
    key: dict[str, str],
    taps: Sequence[str],
    config: CacheConfig,
) -> "CachedTeacher":
    """Writes what is missing of a cache, checks all of it against its SHA-256, and opens it.

    The processes write shards of their own, into a folder that all of them see. Every image is answered by itself,
    so the cache does not depend on their number, nor on where its writing was cut off.

    Args:
        teacher: answers the images that are missing, and the first for its size; unused if none is.
        data: the training images, as the teacher is to see them.
        key: what the answers depend on, by field, in words or hashes; format, storage, shard, number of images
            and taps are added here.
        taps: the features that are wanted; a cache that has more serves as well.

    Raises:
        ConfigurationError: the images have unequal sizes, or the folder can't be written.
        DamagedFileError: the cache was made for something else, or is damaged.
        MachineError: the disk is full. What was written is deleted then.
        NonFiniteError: the teacher's answer is not finite.
        Terminated: SIGTERM arrived; whole shards stay.
    """
    folder = Path(folder)
    taps = on_main_process(run.accelerator, lambda: taps_of(folder, taps))
    fields = {"count": len(data), "taps": ", ".join(taps) or "none", "storage": config.storage}
    fields |= {"shard": config.shard, "format": FORMAT}
    whole_key = dict(sorted((key | {name: str(value) for name, value in fields.items()}).items()))
    layout = Layout(folder, whole_key, len(data), tuple(taps), config)
    on_main_process(run.accelerator, lambda: check_key(layout))
    missing = on_main_process(run.accelerator, lambda: layout.missing)
    if missing:
        write_cache(run, teacher, data, layout, missing)
    figures = on_main_process(run.accelerator, lambda: verify(layout).tolist())
    opened: list[CachedTeacher] = []
    on_every_process(run.accelerator, lambda: opened.append(CachedTeacher(layout, run.accelerator.device)))
    run.say(describe(layout, figures, opened[0]))
    return opened[0]


def taps_of(folder: Path, wanted: Sequence[str]) -> list[str]:
    """The taps of a cache that is there, if it has all that are wanted; else those that are."""
    try:
        said = str(json.loads((folder / KEY).read_bytes())["taps"])
    except (OSError, ValueError, TypeError, KeyError):
        return sorted(wanted)  # what is wrong with the key, check_key says
    found = [] if said == "none" else said.split(", ")
    return found if set(wanted) <= set(found) else sorted(wanted)


def check_key(layout: Layout) -> None:
    """Raises DamagedFileError naming the field in which a cache that exists was made for something else."""
    path = layout.folder / KEY
    try:
        text = path.read_bytes()
        found = dict(json.loads(text))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFileError(f"{path}: damaged ({error}); delete {layout.folder}") from error
    for field in [*layout.key, *found]:
        before, now = found.get(field), layout.key.get(field)
        if before != now:
            raise DamagedFileError(
                f"teacher.cache.folder: {layout.folder}: made for other {field} "
                f"({_short(before)}, now {_short(now)}); name another folder or delete it"
            )
    if text != (json.dumps(layout.key, indent=2) + "\n").encode():
        raise DamagedFileError(f"{path}: damaged; delete {layout.folder}")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


# -------------------------------------------------------------------------------------------------- writing


def write_cache(run: Run, teacher: Answering, data: Images, layout: Layout, missing: list[int]) -> None:
    """Writes the missing shards, one a process in each turn, after which an error is that of all processes.

    A full disk undoes what was written here, and all of the cache if nothing was there before.
    """
    accelerator = run.accelerator
    size, bytes_an_image = on_main_process(
        accelerator, lambda: _measure(teacher, data, layout, accelerator.device)
    )
    images = sum(len(layout.indices(shard)) for shard in missing)
    run.say(
        f"teacher: {layout.folder}: its answers to {images} images are written, "
        f"{quantity(images * bytes_an_image)}B, {bytes_an_image:,} bytes an image"
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = missing[rank::world]
    try:
        on_main_process(accelerator, lambda: _begin(layout, images * bytes_an_image))
        with tqdm(total=images, unit="image", desc="cache", dynamic_ncols=True) as bar:
            for first in range(0, len(missing), world):
                turn = missing[first : first + world]

                def write(shard: int | None = turn[rank] if rank < len(turn) else None) -> None:
                    if run.terminated:
                        raise Terminated(
                            f"{layout.folder}: stopped by SIGTERM, the whole shards stay; go on with resume=true"
                        )
                    if shard is not None:
                        _write_shard(teacher, data, layout, shard, size, accelerator.device)

                on_every_process(accelerator, write)
                bar.update(sum(len(layout.indices(shard)) for shard in turn))
    except MachineError:
        for shard in mine:
            shutil.rmtree(layout.path(shard), ignore_errors=True)
            shutil.rmtree(layout.temporary(shard), ignore_errors=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not any(layout.folder.glob("shard_*")):
            for path in (layout.folder / KEY, (layout.folder / KEY).with_suffix(".tmp")):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds something that is not ours, or is not there
                layout.folder.rmdir()
        raise


def _measure(teacher: Answering, data: Images, layout: Layout, device: torch.device) -> tuple[list[int], int]:
    """Height and width of the first image, and the bytes that its answer takes with its share of the headers."""
    sample = data.sample((WHOLE, 0, 0), seed=0)
    maps = encode(teacher, sample, layout, device, data.names[0])
    headers = len(maps) * 128 + len(layout.sums(dict.fromkeys((f"{name}.npy" for name in maps), "0" * 64)))
    return list(sample.images.shape[-2:]), sum(a.nbytes for a in maps.values()) + math.ceil(
        headers / min(layout.config.shard, layout.images)
    )


def _begin(layout: Layout, needed: int) -> None:
    """Looks for room and writes the key, before anything else."""
    existing = next(path for path in (layout.folder, *layout.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise MachineError(
            f"{layout.folder}: the cache takes {quantity(needed)}B and {quantity(free)}B are free; "
            "free some space, or name another folder by teacher.cache.folder"
        )
    try:
        layout.folder.mkdir(parents=True, exist_ok=True)
        write_json(layout.folder / KEY, layout.key)
        sync(layout.folder)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigurationError(
            f"teacher.cache.folder: can't write to {layout.folder} ({error.strerror}); name another"
        ) from error
    except OSError as error:
        raise _machine_error(error, layout.folder) from error


def _write_shard(
    teacher: Answering, data: Images, layout: Layout, shard: int, size: list[int], device: torch.device
) -> None:
    """One shard, image after image, so that no more than one image's answer is in memory."""
    temporary, indices = layout.temporary(shard), layout.indices(shard)
    files: dict[str, _MapFile] = {}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with ExitStack() as opened:
            for index, sample in zip(indices, _read_ahead(data, indices), strict=True):
                if list(sample.images.shape[-2:]) != size:
                    height, width = sample.images.shape[-2:]
                    raise ConfigurationError(
                        f"data.size: {data.names[index]} is {width}x{height} but {data.names[0]} is "
                        f"{size[1]}x{size[0]}, and a cache takes one size; set data.size or teacher.size"
                    )
                for name, array in encode(teacher, sample, layout, device, data.names[index]).items():
                    if name not in files:
                        file = opened.enter_context((temporary / f"{name}.npy").open("wb"))
                        files[name] = _MapFile(file, len(indices), array)
                    files[name].write(array.tobytes())
            for written in files.values():
                written.sync()
        with (temporary / SUMS).open("wb") as sums:
            sums.write(layout.sums({f"{name}.npy": written.digest.hexdigest() for name, written in files.items()}))
            sums.flush()
            os.fsync(sums.fileno())
        sync(temporary)
        temporary.replace(layout.path(shard))
        sync(layout.folder)
    except OSError as error:
        raise _machine_error(error, layout.path(shard)) from error


class _MapFile:
    """An .npy file of `count` arrays like one, that are written one at a time, and its SHA-256."""

    def __init__(self, file: Any, count: int, like: np.ndarray) -> None:
        self.file, self.digest = file, hashlib.sha256()
        header = io.BytesIO()
        shape = {"shape": (count, *like.shape), "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, shape | {"descr": np.lib.format.dtype_to_descr(like.dtype)})
        self.write(header.getvalue())

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def _machine_error(error: OSError, path: Path) -> MachineError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "what was written of the cache is deleted; free some space, or name another teacher.cache.folder"
    return MachineError(f"{path}: {error.strerror}; {advice if full else 'check the disk'}")


def _read_ahead(data: Images, indices: Sequence[int]) -> Iterator[Any]:
    """The samples of whole images in order, the next few of them being decoded meanwhile."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[Any]] = deque()
        for index in indices:
            waiting.append(pool.submit(data.sample, (WHOLE, index, index), seed=0))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.no_grad()
def encode(teacher: Answering, sample: Any, layout: Layout, device: torch.device, name: str) -> Maps:
    """The arrays that are kept of the teacher's answer to one image, by name."""
    images = sample.images.unsqueeze(0).to(device).contiguous(memory_format=torch.channels_last)
    answer = teacher.answer(images, layout.taps)
    logits = answer.logits[0].float()
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"teacher: its logits of {name} are not finite; give teacher.precision=fp32")
    highest, predictions = logits.max(0)
    below = highest - logits
    kept: dict[str, Tensor] = {}
    if layout.config.storage == "uint8":
        levels = (below / STEP).round_()
        clipped = (levels > LEVELS).sum()
        kept["logits"] = levels.clamp_(max=LEVELS).to(torch.uint8)
    else:
        clipped = (below > HALF).sum()
        kept["logits"] = below.neg_().clamp_(min=-HALF).half()
        kept["maxima"] = highest
    kept["predictions"] = predictions.to(torch.uint8)
    for tap in layout.taps:
        kept[tap] = answer.features[tap][0].float().clamp(-HALF, HALF).half()
    truth = _nearest(sample.labels, predictions.shape).to(device)
    labelled = truth != 255
    kept["figures"] = torch.stack([clipped, labelled.sum(), (truth == predictions).sum()])
    return {name: kept[name].contiguous().cpu().numpy() for name in layout.names}


def _nearest(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels [H, W] at the centres of a map's positions."""
    rows, columns = (
        (2 * torch.arange(places) + 1) * full // (2 * places)
        for places, full in zip(size, labels.shape, strict=True)
    )
    return labels[rows][:, columns]


def on_every_process(accelerator: Accelerator, action: Callable[[], Any]) -> None:
    """Runs `action()` on every process; the UserError of any of them is raised on all."""
    errors: list[UserError | None] = [None]
    try:
        action()
    except UserError as error:
        errors = [error]
    if accelerator.num_processes > 1:
        errors = gather_object(errors)
    for found in errors:
        if found is not None:
            raise found


# -------------------------------------------------------------------------------------------------- reading


def verify(layout: Layout) -> np.ndarray:
    """int64 [N, 3], the figures of all images, after every file was compared with its SHA-256.

    Raises:
        DamagedFileError: naming the file or shard, by which it is to be deleted and written anew.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        checks = pool.map(lambda shard: _verify_shard(layout, shard), layout.shards)
        figures = list(
            tqdm(
                checks,
                total=len(layout.shards),
                unit="shard",
                desc="check the cache",
                leave=False,
                dynamic_ncols=True,
            )
        )
    return np.concatenate(figures)


def _verify_shard(layout: Layout, shard: int) -> np.ndarray:
    folder = layout.path(shard)
    advice = f"delete {folder} to have it written again"
    try:
        said = (folder / SUMS).read_bytes()
        found = {}
        for name in layout.names:
            with (folder / f"{name}.npy").open("rb") as file:
                found[f"{name}.npy"] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedFileError(f"{folder}: incomplete ({error}); {advice}") from error
    if said == layout.sums(found):
        return np.load(folder / "figures.npy", allow_pickle=False)
    for name, digest in found.items():
        if digest.encode() not in said:
            raise DamagedFileError(f"{folder / name}: damaged, its SHA-256 is not that of {SUMS}; {advice}")
    raise DamagedFileError(f"{folder / SUMS}: damaged, or of another cache; {advice}")


def describe(layout: Layout, figures: list[list[int]], cached: "CachedTeacher") -> str:
    """One line on what a cache holds."""
    clipped, labelled, right = np.sum(figures, axis=0)
    logits = layout.images * math.prod(cached.shape("logits"))
    accuracy = f"{100 * right / labelled:.2f} %" if labelled else "none"
    share = f"{significant(100 * clipped / logits)} %" if clipped else "none"
    return (
        f"teacher: {layout.folder}: answers to {layout.images} images as {layout.config.storage}; "
        f"right at {accuracy} of their labelled positions, {share} of the logits clipped"
    )


class CachedTeacher:
    """Answers a batch from a cache, by the index and the geometry of its images.

    Args:
        layout: of a cache that was verified.
        device: where the answers go; what is read goes there as it is stored.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.maps: list[Maps] = []
        read = [name for name in layout.names if name not in ("predictions", "figures")]
        for shard in layout.shards:
            folder = layout.path(shard)
            try:
                loaded = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in read}
            except (OSError, ValueError) as error:
                raise DamagedFileError(
                    f"{folder}: can't be read by every process ({error}); put the cache where all of them see it"
                ) from error
            self.maps.append({name: array.view(np.ndarray) for name, array in loaded.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one image's array."""
        return self.maps[0][name].shape[1:]

    @torch.no_grad()
    def __call__(self, batch: Any, taps: Sequence[str]) -> Answer:
        """Logits and features of a batch's crops, as if the teacher's maps were scaled, cropped and mirrored.

        A map covers its image evenly, as where logits are upsampled to the labels. What is made of it covers the
        crop evenly, with ceil(crop / stride) rows and columns; bilinear, and outside with the border's values.
        """
        places = list(zip(batch.index.tolist(), batch.geometry.tolist(), strict=True))
        crop = (batch.images.shape[-2], batch.images.shape[-1])
        logits = self._crops("logits", places, crop)
        if self.layout.config.storage == "uint8":
            logits = logits.mul_(-STEP)
        else:
            logits = logits + self._crops("maxima", places, crop)
        return Answer(logits, {tap: self._crops(tap, places, crop) for tap in taps})

    def _crops(self, name: str, places: list[tuple[int, list[int]]], crop: tuple[int, int]) -> Tensor:
        """float32 [B, D, h, w] (D is 1 for maps without channels) for images and their geometries."""
        sources, rows, columns = [], [], []
        for index, geometry in places:
            array = self.maps[index // self.layout.config.shard][name][index % self.layout.config.shard]
            sources.append(array if array.ndim == 3 else array[None])
            at_rows, at_columns = positions(geometry, crop, array.shape[-2:])
            rows.append(at_rows)
            columns.append(at_columns)
        (top, height), (left, width) = _windows(rows, array.shape[-2]), _windows(columns, array.shape[-1])
        blocks = np.empty((len(places), len(sources[0]), height, width), array.dtype)
        for block, source, y, x in zip(blocks, sources, top, left, strict=True):
            block[:] = source[:, y : y + height, x : x + width]
        # grid_sample's coordinates: -1 and 1 are the outer edges of the block
        at_y = (2 * (np.stack(rows) - top[:, None]) + 1) / height - 1
        at_x = (2 * (np.stack(columns) - left[:, None]) + 1) / width - 1
        grid = np.empty((len(places), at_y.shape[1], at_x.shape[1], 2), np.float32)
        grid[..., 0], grid[..., 1] = at_x[:, None, :], at_y[:, :, None]
        values = torch.from_numpy(blocks).to(self.device, non_blocking=True).float()
        where = torch.from_numpy(grid).to(self.device, non_blocking=True)
        return F.grid_sample(values, where, mode="bilinear", padding_mode="border", align_corners=False)


def positions(
    geometry: Sequence[int], crop: tuple[int, int], size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows and columns of a crop's answer lie on a map, from 0 at the centre of its first: float64.

    Args:
        geometry: of the crop; see data/transforms.py.
        crop: its height and width, padding included.
        size: height and width of the map.
    """
    source, scaled, offset, flip = geometry[0:2], geometry[2:4], geometry[4:6], geometry[6]
    stride = stride_of(source[0], source[1], size[0], size[1])
    found = []
    for axis in range(2):
        number = math.ceil(crop[axis] / stride)
        centres = offset[axis] + (np.arange(number) + 0.5) * (crop[axis] / number)  # in pixels of the scaled image
        found.append(np.clip(centres * (size[axis] / scaled[axis]) - 0.5, 0, size[axis] - 1))
    rows, columns = found
    return rows, columns[::-1] if flip else columns


@cache
def stride_of(source_height: int, source_width: int, height: int, width: int) -> int:
    """Stride of a map over an image: the power of two whose quotients are its sizes rounded up, or the nearest."""
    for stride in (1, 2, 4, 8, 16, 32, 64):
        if (math.ceil(source_height / stride), math.ceil(source_width / stride)) == (height, width):
            return stride
    return max(1, round(source_height / height))


def _windows(at: list[np.ndarray], length: int) -> tuple[np.ndarray, int]:
    """Starts and the common length of windows of a map's rows that hold all that is between these."""
    first = np.array([int(one.min()) for one in at])
    last = np.array([min(int(one.max()) + 1, length - 1) for one in at])
    longest = int((last - first).max()) + 1
    return np.minimum(first, length - longest), longest
