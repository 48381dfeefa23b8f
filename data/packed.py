"""Packed data: the images of a split decoded once, in shards that are read through memory maps.

    FOLDER/                  {data.packed_folder, or packed in data.root}/{split}_{form}, _{H}x{W} if resized
        shard_00012.bin      consecutive images, each with its label behind it, both at multiples of 64 bytes
                             raw   uint8 [H, W, 3] RGB, uint8 [h, w] trainIds
                             jpeg  the bytes of a JPEG, the trainIds under zlib
        shard_00012.json     where each stands, label counts, SHA-256 of the source's files and of the shard
        manifest.json        what was packed; written last. Like the others it ends with the SHA-256 of itself

Images are at data.size where that is set, labels at their own. A file is written under a temporary name, synced
and renamed, and its bytes depend on the source alone: a packing that was cut off goes on with what is missing.
"""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from data.build import DataConfig, Split, build_dataset, find_files, find_root
from data.dataset import FileData, SegmentationData, Settings, count_classes
from data.files import check_one_size, decode_image, is_jpeg, map_threads, read_bytes
from data.labels import Labels
from data.processes import map_processes
from data.transforms import resize_image
from errors import ConfigurationError, DamagedFileError, MachineError

FORMAT = 1
ALIGNMENT = 64
SHARD, MOST_SHARDS = 64, 500  # images a shard, or more where so many maps would take too many file handles
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
SAMPLED = 8  # images by which the size of the jpeg form is estimated
MANIFEST = "manifest.json"


def pack_folder(config: DataConfig, split: str) -> Path:
    """Where a split's packed files are. Raises ConfigurationError where the configuration does not say."""
    parent = Path(config.packed_folder).expanduser() if config.packed_folder else find_root(config) / "packed"
    size = "" if config.size is None else f"_{config.size[0]}x{config.size[1]}"
    return parent / f"{config.name}_{split}_{config.packed_form}{size}"


def pack_command(config: DataConfig, split: str) -> str:
    """The command that packs a split as the configuration names it."""
    words = [f"data.name={config.name}", f"data.root={config.root or 'FOLDER'}"]
    words += [f"data.classes={config.classes}" if config.classes else ""]
    words += ["data.packed_form=jpeg" if config.packed_form == "jpeg" else ""]
    words += [f"data.packed_folder={config.packed_folder}" if config.packed_folder else ""]
    size = f" data.size=[{config.size[0]},{config.size[1]}]" if config.size else ""
    return (
        f"python inspect_data.py pack=true splits=[{split}] " + shlex.join(word for word in words if word) + size
    )


# -------------------------------------------------------------------------------------------------- writing


class Pack(NamedTuple):
    """What is packed, and where to."""

    data: FileData
    folder: Path
    key: dict[str, Any]
    """What the packed files depend on, which is the manifest; its hash stands in each index."""

    @property
    def shards(self) -> range:
        return range(-(-len(self.data) // self.key["shard"]))

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        number = self.key["shard"]
        return range(shard * number, min(len(self.data), (shard + 1) * number))

    def encode(self, index: int) -> tuple[np.ndarray, np.ndarray, bytes, bytes]:
        """An image and its label, and the bytes that are kept of each."""
        image, label = self.data.read(index)
        resized = image if self.key["size"] is None else resize_image(image, tuple(self.key["size"]))
        if self.key["form"] == "raw":
            return resized, label, resized.tobytes(), label.tobytes()
        kept = read_bytes(self.data.pairs[index].image)
        if resized.shape != image.shape or not is_jpeg(kept):
            kept = cv2.imencode(".jpg", cv2.cvtColor(resized, cv2.COLOR_RGB2BGR), QUALITY)[1].tobytes()
        return resized, label, kept, zlib.compress(label.tobytes())

    def estimate(self) -> tuple[int, str]:
        """Bytes of all shards, and that in words."""
        if self.key["form"] == "raw":
            sizes = [(self.key["size"] or size, size) for size in self.data.sizes.tolist()]
            total = sum(aligned(3 * h * w) + aligned(rows * columns) for (h, w), (rows, columns) in sizes)
            return total, f"{total:,} bytes"
        some = np.unique(np.linspace(0, len(self.data) - 1, SAMPLED).round().astype(int)).tolist()
        kept = sum(map_threads(lambda i: sum(aligned(len(part)) for part in self.encode(i)[2:]), some))
        total = round(kept / len(some) * len(self.data))
        return total, f"about {total:,} bytes, by a sample of {len(some)}"


def write_pack(config: DataConfig, split: Split, workers: int = 0, say: Callable[[str], None] = print) -> Path:
    """Packs a split as `config` names it, or what is missing of it; returns the folder.

    Args:
        workers: processes that write a shard each; 0 takes as many as there are cores.
        say: takes the lines that tell of the folder and its size.

    Raises:
        ConfigurationError: the source is wrong, or the folder can't be written to.
        DamagedFileError: the folder holds what was packed of other files, or is damaged.
        MachineError: there is no room, or a worker was killed. Whole shards stay, to go on with.
    """
    data = build_dataset(replace(config, packed=False, reduced_decoding=False, mix=[]), split)
    if not isinstance(data, FileData):
        raise ConfigurationError(f"data.name: {config.name} has no files to pack; name a data set that has")
    pack = Pack(data, pack_folder(config, split), _key(config, data))
    folder, number = pack.folder, len(data)
    whole = [shard for shard in pack.shards if all(path.is_file() for path in _paths(folder, shard))]
    if _is_finished(pack, whole):
        say(f"{folder}: is packed already, {number} images; read them by data.packed=true")
        return folder
    total, words = pack.estimate()
    needed = total - sum(_paths(folder, shard)[0].stat().st_size for shard in whole)
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    lossy = " (lossy where a source is no JPEG of that size)" if config.packed_form == "jpeg" else ""
    rest = f"; {len(whole)} of {len(pack.shards)} shards are there" if whole else ""
    say(f"{folder}: {number} images as {config.packed_form}{lossy}: {words}{rest}; {free:,} bytes are free")
    if free < needed:
        raise MachineError(
            f"{folder}: {needed:,} bytes are needed and {free:,} are free; free some space, name another "
            "data.packed_folder, set data.size or give data.packed_form=jpeg"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [shard for shard in pack.shards if shard not in whole]
        write = partial(_write_shard, pack)
        with _alone(folder):
            for _ in map_processes(write, missing, workers=workers, chunk=1, desc=f"pack {split}", unit="shard"):
                pass
            with _written(folder / MANIFEST) as file:
                file.write(_seal(pack.key))
    except OSError as error:
        raise _user_error(error, folder) from error
    say(f"{folder}: {number} images are packed; read them by data.packed=true")
    return folder


def _key(config: DataConfig, data: FileData) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": config.name,
        "split": data.split,
        "form": config.packed_form,
        "size": config.size,
        "images": len(data),
        "shard": max(SHARD, -(-len(data) // MOST_SHARDS)),
        "classes": list(data.labels.names),
        "colours": [list(colour) for colour in data.labels.colours],
        "values": hashlib.sha256(data.table.tobytes()).hexdigest(),
        "source": data.manifest_hash(),
    }


def _is_finished(pack: Pack, whole: list[int]) -> bool:
    """Whether nothing is missing. Raises DamagedFileError where what is there was packed of something else."""
    advice = f"delete {pack.folder} to pack anew, or name another data.packed_folder"

    def compare(shard: int) -> None:
        content = _check_shard(pack.folder, shard, "delete it to have it written again")
        if content["key"] != _digest(pack.key, shard):
            raise DamagedFileError(f"{pack.folder}: was packed of other files or in another way; {advice}")
        for index, image in zip(pack.indices(shard), content["images"], strict=True):
            for path, (_, digest) in zip(pack.data.pairs[index][1:], image["source"], strict=True):
                if _sha256(path) != digest:
                    raise DamagedFileError(f"{path}: has changed since {pack.folder} was packed of it; {advice}")

    list(map_threads(compare, whole))
    manifest = pack.folder / MANIFEST
    return len(whole) == len(pack.shards) and manifest.exists() and manifest.read_bytes() == _seal(pack.key)


def _write_shard(pack: Pack, shard: int) -> None:
    """One shard and then its index, by which it is whole."""
    path, index_path = _paths(pack.folder, shard)
    images, digest, offset = [], hashlib.sha256(), 0
    try:
        with _written(path) as file:
            for index in pack.indices(shard):
                image, label, *kept = pack.encode(index)
                places = []
                for array, data in zip((image, label), kept, strict=True):
                    places.append([offset, len(data), *array.shape[:2]])
                    padded = data + bytes(aligned(len(data)) - len(data))
                    file.write(padded)
                    digest.update(padded)
                    offset += len(padded)
                pair = pack.data.pairs[index]
                source = [[one.stat().st_size, _sha256(one)] for one in (pair.image, pair.label)]
                if [size for size, _ in source] != pack.data.file_sizes[index].tolist():
                    raise ConfigurationError(f"{pair.image}: or its label was changed meanwhile; pack again")
                images.append(
                    {
                        "name": pair.name,
                        "image": places[0],
                        "label": places[1],
                        "counts": count_classes(label, len(pack.data.labels)).tolist(),
                        "source": source,
                    }
                )
        content = {
            "key": _digest(pack.key, shard),
            "bytes": offset,
            "sha256": digest.hexdigest(),
            "images": images,
        }
        with _written(index_path) as file:
            file.write(_seal(content))
    except OSError as error:
        raise _user_error(error, path) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a folder for this packing. Raises ConfigurationError where another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"{folder}: another process is packing into it; wait for it to end"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there once it is whole: written under another name, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _user_error(error: OSError, path: Path) -> Exception:
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno == errno.EROFS:
        return ConfigurationError(
            f"data.packed_folder: can't write {path} ({error.strerror}); name another folder"
        )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some space and pack again, whole shards stay" if full else "check the disk"
    return MachineError(f"{path}: {error.strerror}; {advice}")


def aligned(number: int) -> int:
    """The next multiple of ALIGNMENT."""
    return number + -number % ALIGNMENT


def _paths(folder: Path, shard: int) -> tuple[Path, Path]:
    """A shard and its index."""
    return folder / f"shard_{shard:05d}.bin", folder / f"shard_{shard:05d}.json"


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _seal(content: dict[str, Any]) -> bytes:
    """JSON that ends with its own hash."""
    return (json.dumps(content | {"seal": _digest(content)}) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------- reading


def _load(path: Path, advice: str) -> dict[str, Any]:
    """What `_seal` made a file of. Raises DamagedFileError."""
    try:
        data = path.read_bytes()
        content = dict(json.loads(data))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFileError(f"{path}: is damaged ({error}); {advice}") from error
    content.pop("seal", None)
    if data != _seal(content):
        raise DamagedFileError(f"{path}: is damaged, its SHA-256 is another; {advice}")
    return content


VERIFIED: set[tuple[str, int, int]] = set()
"""Shards that this process has compared with their SHA-256: path, size and time of change."""


def _check_shard(folder: Path, shard: int, advice: str) -> dict[str, Any]:
    """A shard's index, after the shard was compared with its size and its SHA-256: with the latter once a process,
    and by the first process of a machine alone, for where that ends, all end. Raises DamagedFileError."""
    path, index_path = _paths(folder, shard)
    content = _load(index_path, advice)
    try:
        found = path.stat()
        key = (str(path.absolute()), found.st_size, found.st_mtime_ns)
        same = found.st_size == content["bytes"]
        if same and key not in VERIFIED and os.environ.get("LOCAL_RANK", "0") == "0":
            same = _sha256(path) == content["sha256"]
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    if not same:
        raise DamagedFileError(f"{path}: is damaged, its SHA-256 is another; {advice}")
    VERIFIED.add(key)
    return content


class PackedData(SegmentationData):
    """A packed split. Pixels are views of a memory map (raw) or decoded from one (jpeg).

    Every shard is compared with its SHA-256, and the names and sizes of the source's files with those that were
    packed; with data.packed_folder and without data.root there need be no source.

    Raises:
        ConfigurationError: nothing was packed, or not all of it.
        DamagedFileError: the packed files are damaged, of another format or of other files.
    """

    def __init__(self, config: DataConfig, split: Split, settings: Settings) -> None:
        if config.name in ("streets", "huggingface"):
            raise ConfigurationError(f"data.packed: {config.name} has no files to pack; leave it out")
        self.folder = folder = pack_folder(config, split)
        self.form = config.packed_form
        command = pack_command(config, split)
        if not (folder / MANIFEST).is_file():
            state = "holds no finished pack" if folder.is_dir() else "there is no such folder"
            raise ConfigurationError(f"{folder}: {state}; pack the images by {command}")
        anew = f"delete {folder} and pack again by {command}"
        self.manifest = _load(folder / MANIFEST, f"delete it and pack again by {command}")
        wanted = {"format": FORMAT, "name": config.name, "split": split, "form": self.form, "size": config.size}
        for name, value in wanted.items():
            if self.manifest.get(name) != value:
                raise DamagedFileError(
                    f"{folder}: was packed with {name} {self.manifest.get(name)}, not {value}; {anew}"
                )
        images = [image for content in self._verify(command) for image in content["images"]]
        colours = tuple((red, green, blue) for red, green, blue in self.manifest["colours"])
        labels = Labels(tuple(self.manifest["classes"]), colours)
        super().__init__(split, labels, [image["name"] for image in images], settings)
        self._places = np.array([[image["image"], image["label"]] for image in images], np.int64)  # [N, 2, 4]
        self._counts = np.array([image["counts"] for image in images], np.int64)
        self._maps: dict[int, np.ndarray] = {}
        if config.root or not config.packed_folder:
            self._compare(config, split, [[size for size, _ in image["source"]] for image in images], anew)

    def _verify(self, command: str) -> list[dict[str, Any]]:
        """The indexes, after every file was compared with its SHA-256."""

        def check(shard: int) -> dict[str, Any]:
            path, index_path = _paths(self.folder, shard)
            advice = f"delete {path} and {index_path.name}, then pack again by {command}"
            content = _check_shard(self.folder, shard, advice)
            if content["key"] != _digest(self.manifest, shard):
                raise DamagedFileError(f"{index_path}: is that of another pack; {advice}")
            return content

        shards = range(-(-self.manifest["images"] // self.manifest["shard"]))
        hidden = len(shards) < 8 or os.environ.get("RANK", "0") != "0"
        bar = {"total": len(shards), "unit": "shard", "desc": "check the pack", "dynamic_ncols": True}
        return list(tqdm(map_threads(check, shards), **bar, leave=False, disable=hidden))

    def _compare(self, config: DataConfig, split: Split, sizes: list[list[int]], anew: str) -> None:
        """Raises DamagedFileError where the source's files are no longer those that were packed."""
        files = find_files(config, split)
        values = hashlib.sha256(files.table.tobytes()).hexdigest()
        if values != self.manifest["values"] or files.labels.names != self.labels.names:
            raise DamagedFileError(f"{self.folder}: was packed with other classes or label values; {anew}")
        if [pair.name for pair in files.pairs] != self.names:
            other = sorted({pair.name for pair in files.pairs} ^ set(self.names))
            raise DamagedFileError(f"{self.folder}: was packed of other files, see {other[0]}; {anew}")
        found = map_threads(lambda pair: [pair.image.stat().st_size, pair.label.stat().st_size], files.pairs)
        for pair, before, now in zip(files.pairs, sizes, found, strict=True):
            if before != now:
                path = pair.image if before[0] != now[0] else pair.label
                raise DamagedFileError(f"{path}: is another file than {self.folder} was packed of; {anew}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # each process maps for itself

    def notes(self) -> list[str]:
        return [f"packed as {self.form}, {self.folder}", *super().notes()]

    def _check_one_size(self) -> None:
        check_one_size(self._places[:, 0, 2:], self.names)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        shard = index // self.manifest["shard"]
        if shard not in self._maps:
            self._maps[shard] = self._map(shard)
        image, label = (
            (self._maps[shard][offset : offset + length], (height, width))
            for offset, length, height, width in self._places[index].tolist()
        )
        if self.form == "raw":
            return image[0].reshape(*image[1], 3), label[0].reshape(label[1])
        path = _paths(self.folder, shard)[0]
        try:
            values = np.frombuffer(zlib.decompress(label[0].tobytes()), np.uint8).reshape(label[1])
        except (zlib.error, ValueError) as error:
            raise ConfigurationError(f"{path}: has changed; leave the packed files alone during a run") from error
        return decode_image(path, image[0]), values

    def _map(self, shard: int) -> np.ndarray:
        path = _paths(self.folder, shard)[0]
        try:
            return np.asarray(np.memmap(path, np.uint8, "r"))
        except OSError as error:
            raise ConfigurationError(
                f"{path}: cannot be read ({error.strerror}); leave the packed files alone during a run"
            ) from error

    def manifest_hash(self) -> str:
        """That of the source where the pixels are the source's, else one of its own."""
        if self.form == "raw" and self.manifest["size"] is None:
            return self.manifest["source"]
        return _digest([self.manifest[name] for name in ("format", "source", "form", "size")])

    def _count_key(self) -> str:
        return _digest(self.manifest)
