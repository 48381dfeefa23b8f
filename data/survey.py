"""What a split holds: classes, objects, places and light, and how far two splits are from each other.

Each image and its label are looked at once, in processes; what was found is kept on disk under a hash of the
files' bytes, so that a second survey only reads and hashes them.

Objects are connected components of a class (8-connectivity) of at least SPECK pixels: what annotators left behind
at the edges of others is smaller. Cars that touch are one object, and a car behind a pole is two.

Brightness is the mean luma (BT.601, 0..255) of the image at an eighth of its size, contrast the standard deviation
there. In CamVid's sequence of the dusk (0001TP) it is 61 in the median and above 47 in 95 of 100 images; in its
sequences of the day it is above 75 in 95 of 100: so DAY. NIGHT is where that dusk ends below; no image of a night
was at hand to try it. Brightness is that of the image, not the hour: a tunnel is night.
"""

import hashlib
import io
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from data.build import DataConfig, Split, build_dataset, find_files
from data.dataset import SegmentationData
from data.files import Pair, check_file, decode_image, is_jpeg, read_bytes, read_image, read_label
from data.labels import IGNORE_INDEX, Labels
from data.processes import map_processes
from data.statistics import Scheme, cache_folder, class_weights
from errors import ConfigurationError

GRID = (36, 64)  # places, rows and columns, at whose middle a label is sampled
CELLS = (9, 16)  # the same for the shift of places, where fewer images fill a cell
SPECK = 10  # pixels
SMALL, LARGE = 1 / 300, 3 / 100  # of the image: 32² and 96² pixels of 640x480, as COCO has them
NIGHT, DAY = 45, 70  # mean luma: night below the first, day from the second, dusk between
RARE = 0.01  # of the labelled pixels
RESAMPLES = 400
VERSION = b"survey 2\n"  # of the records; another one makes the kept records unknown
SCHEMES: tuple[Scheme, ...] = ("inverse", "median", "enet", "effective")
MEASURES = {"pixels": "log2", "images": "log2", "size": "log2", "place": "bits"}

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """What one image shows, of C classes and K objects."""

    size: np.ndarray  # int64 [2], height and width of the label
    pixels: np.ndarray  # int64 [C+1], in the last place those without a class
    boundary: np.ndarray  # int64 [C], those that have another class among their eight neighbours
    object_class: np.ndarray  # uint8 [K]
    object_area: np.ndarray  # int64 [K], pixels
    places: np.ndarray  # uint8 [GRID], the label there
    luma: np.ndarray  # float64 [2], brightness and contrast


@dataclass(frozen=True)
class Survey:
    """What the N images of a split show: the records' fields one below the other."""

    name: str
    labels: Labels
    names: list[str]
    """[N] of the images."""
    sizes: np.ndarray
    """int64 [N, 2], height and width."""
    pixels: np.ndarray
    """int64 [N, C+1], in the last column those without a class."""
    boundary: np.ndarray
    """int64 [N, C], those that have another class among their eight neighbours; void is no class."""
    object_image: np.ndarray
    """int64 [K], the objects' images."""
    object_class: np.ndarray
    """uint8 [K]."""
    object_share: np.ndarray
    """float64 [K], the objects' areas as a share of their image."""
    object_area: np.ndarray
    """int64 [K], the same in pixels."""
    places: np.ndarray
    """uint8 [N, GRID]."""
    brightness: np.ndarray
    """float64 [N], 0..255."""
    contrast: np.ndarray
    """float64 [N]."""
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    """Image uint8 [H, W, 3] RGB and label uint8 [h, w] of an index."""
    known: int
    """How many images a former survey had seen."""


def survey(config: DataConfig, split: Split, *, name: str = "", workers: int = 0) -> Survey:
    """Looks at all images of a split, under a bar; sources in data.mix are left out.

    Raises ConfigurationError naming the file that is wrong; `workers` is that of map_processes.
    """
    config = replace(config, mix=[])
    cache = _open_cache()
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    answers: Iterator[_Answer]
    desc = f"survey of {name or split}"
    if config.packed or config.name in ("streets", "huggingface"):
        data = build_dataset(config, split)
        labels, names, read = data.labels, data.names, data.read
        key = f"{data.manifest_hash()} {data._count_key()}"  # the files of a pack may change and keep their sizes
        _opened[key] = data
        try:
            work = partial(_examine_read, key, len(labels), cache)
            answers = map_processes(work, range(len(data)), workers=workers, desc=desc, unit="image")
            records = _keep(cache, answers)
        finally:
            del _opened[key]
    else:
        files = find_files(config, split)
        labels, pairs, table = files.labels, files.pairs, files.table
        if not pairs:
            raise ConfigurationError(f"{files.root}: the split {split!r} has no images; check data.root")
        names = [pair.name for pair in pairs]
        read = lambda index: (read_image(pairs[index].image), read_label(pairs[index].label, table))  # noqa: E731
        work_pair = partial(_examine_pair, table, len(labels), cache)
        answers = map_processes(work_pair, pairs, workers=workers, desc=desc, unit="image")
        records = _keep(cache, answers)
    found = _join(name or split, labels, names, read, records)
    if not found.pixels[:, :-1].any():
        withheld = "the labels of test are withheld, use val" if split == "test" else "check the labels"
        raise ConfigurationError(f"{config.root or config.name}: no pixel of {split!r} has a class; {withheld}")
    return found


def _join(name: str, labels: Labels, names: list[str], read: Any, answers: "list[_Answer]") -> Survey:
    records = [answer.record for answer in answers]
    sizes = np.array([record.size for record in records])
    object_image = np.repeat(np.arange(len(records)), [len(record.object_class) for record in records])
    object_area = np.concatenate([record.object_area for record in records])
    luma = np.array([record.luma for record in records])
    return Survey(
        name=name,
        labels=labels,
        names=names,
        sizes=sizes,
        pixels=np.array([record.pixels for record in records]),
        boundary=np.array([record.boundary for record in records]),
        object_image=object_image,
        object_class=np.concatenate([record.object_class for record in records]),
        object_share=object_area / sizes.prod(1)[object_image],
        object_area=object_area,
        places=np.array([record.places for record in records]),
        brightness=luma[:, 0],
        contrast=luma[:, 1],
        read=read,
        known=sum(answer.body is None for answer in answers),
    )


# one image


def examine(label: np.ndarray, grey: np.ndarray, classes: int) -> Record:
    """The record of a label uint8 [H, W] of trainIds and of its image's luma, at whatever size."""
    height, width = label.shape
    pixels, boundary = np.zeros(classes + 1, np.int64), np.zeros(classes, np.int64)
    square = np.ones((3, 3), np.uint8)
    least = cv2.erode(label, square)  # of the classes around, for void is the largest number
    most = cv2.dilate(cv2.LUT(label, _VOID_AS_ZERO), square)
    edge = cv2.compare(most, least, cv2.CMP_GT)
    # a component begins where a row changes, so that few changes are surely few components, for which 16 bits do
    changes = cv2.countNonZero(cv2.compare(label[:, 1:], label[:, :-1], cv2.CMP_NE)) if width > 1 else 0
    depth = cv2.CV_16U if changes + height < 2**16 else cv2.CV_32S
    found, same = [], np.empty(label.shape, bool)
    for c in range(classes):
        mask = np.equal(label, c, out=same).view(np.uint8)
        left, top, wide, high = cv2.boundingRect(mask)
        if not wide:
            continue
        box = np.s_[top : top + high, left : left + wide]
        stats = cv2.connectedComponentsWithStats(mask[box], None, None, None, 8, depth)[2]
        area = stats[1:, cv2.CC_STAT_AREA].astype(np.int64)
        pixels[c] = area.sum()
        boundary[c] = cv2.countNonZero(cv2.bitwise_and(mask[box], edge[box]))
        found.append((c, area[area >= SPECK]))
    pixels[-1] = label.size - pixels.sum()
    rows, columns = (
        ((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(GRID, label.shape, strict=True)
    )
    mean, deviation = cv2.meanStdDev(grey)
    return Record(
        size=np.array([height, width]),
        pixels=pixels,
        boundary=boundary,
        object_class=np.repeat([c for c, _ in found], [len(area) for _, area in found]).astype(np.uint8),
        object_area=np.concatenate([np.zeros(0, np.int64), *(area for _, area in found)]),
        places=label[rows[:, None], columns],
        luma=np.array([mean[0, 0], deviation[0, 0]]),
    )


_VOID_AS_ZERO = np.where(np.arange(256) == IGNORE_INDEX, 0, np.arange(256)).astype(np.uint8)


class _Answer(NamedTuple):
    """A record, and what to keep on disk if it is new."""

    record: Record
    key: str
    body: bytes | None


def _examine_pair(table: np.ndarray, classes: int, cache: Path | None, pair: Pair) -> _Answer:
    image = read_bytes(pair.image)
    digest = hashlib.sha256(VERSION + table.tobytes() + bytes([classes]))
    for data in (read_bytes(pair.label), image):
        digest.update(hashlib.sha256(data).digest())
    key = digest.hexdigest()
    if (known := _find(cache, key)) is not None:
        return _Answer(known, key, None)
    height, width, _ = check_file(pair.image, label=False)
    label = read_label(pair.label, table)
    if label.shape != (height, width):
        raise ConfigurationError(
            f"{pair.label}: is {label.shape[1]}x{label.shape[0]} but its image {pair.image} is {width}x{height}; "
            "a label must have its image's size"
        )
    buffer = np.frombuffer(image, np.uint8)
    if is_jpeg(image):
        grey = cv2.imdecode(buffer, cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION)
        if grey is None:
            raise ConfigurationError(f"{pair.image}: cannot be decoded; copy it again")
    else:  # of which reduced decoding would take every eighth pixel, not the mean
        grey = _reduced_grey(decode_image(pair.image, buffer))
    record = examine(label, grey, classes)
    return _Answer(record, key, _to_bytes(record))


_opened: dict[str, SegmentationData] = {}
"""Data sets for the forks of map_processes, which inherit them: not all can be sent."""


def _examine_read(opened: str, classes: int, cache: Path | None, index: int) -> _Answer:
    key = hashlib.sha256(VERSION + f"{opened} {classes} {index}".encode()).hexdigest()
    if (known := _find(cache, key)) is not None:
        return _Answer(known, key, None)
    image, label = _opened[opened].read(index)
    record = examine(label, _reduced_grey(image), classes)
    return _Answer(record, key, _to_bytes(record))


def _reduced_grey(image: np.ndarray) -> np.ndarray:
    """uint8 [H/8, W/8] luma of uint8 [H, W, 3] RGB, each pixel the mean of 8x8."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    size = -(-grey.shape[1] // 8), -(-grey.shape[0] // 8)
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


# what is kept on disk


def _to_bytes(record: Record) -> bytes:
    """SHA-256, then the arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **record._asdict())
    body = buffer.getvalue()
    return hashlib.sha256(body).digest() + body


def _open_cache() -> Path | None:
    """The file of the records, whole and ready; None, with a warning, where there can be none."""
    path = cache_folder() / "survey.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                with closing(_connect(path)) as file:
                    if file.execute("PRAGMA quick_check").fetchone() == ("ok",):
                        file.execute("CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, body BLOB)")
                        return path
                problem = "its check fails"
            except sqlite3.OperationalError:  # locked, or not to be opened: no sign of damage
                raise
            except sqlite3.DatabaseError as error:
                problem = str(error)
            log.warning("%s: is damaged (%s); it begins anew, and the images are looked at again", path, problem)
            path.unlink(missing_ok=True)
    except (OSError, sqlite3.OperationalError) as error:
        log.warning("%s: cannot be used (%s); what the survey finds is not kept", path, error)
    return None


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=60)  # that long it waits for another process's turn


def _find(path: Path | None, key: str) -> Record | None:
    """The record kept under a key; a damaged one is none. A connection each, for forks must not share one."""
    if path is None:
        return None
    try:
        with closing(_connect(path)) as file:
            row = file.execute("SELECT body FROM records WHERE key = ?", (key,)).fetchone()
    except sqlite3.DatabaseError as error:
        log.warning("%s: cannot be read (%s); the image is looked at again", path, error)
        return None
    if row is None:
        return None
    digest, body = row[0][:32], row[0][32:]
    if hashlib.sha256(body).digest() != digest:
        log.warning("%s: a record is damaged; the image is looked at again", path)
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return Record(**arrays)


def _keep(path: Path | None, answers: Iterable[_Answer]) -> list[_Answer]:
    """All answers; the new ones are written as they come, so that a survey that is stopped has lost little."""
    done: list[_Answer] = []
    fresh: list[tuple[str, bytes]] = []
    for answer in answers:
        done.append(answer)
        if answer.body is not None:
            fresh.append((answer.key, answer.body))
        if len(fresh) == 256:
            _write(path, fresh)
            fresh = []
    _write(path, fresh)
    return done


def _write(path: Path | None, rows: Sequence[tuple[str, bytes]]) -> None:
    if path is None or not rows:
        return
    try:
        with closing(_connect(path)) as file, file:
            file.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", rows)
    except sqlite3.DatabaseError as error:
        log.warning("%s: cannot be written (%s); %d records are not kept", path, error, len(rows))


# the figures of a split


def shares(s: Survey) -> np.ndarray:
    """float64 [C], each class's share of the labelled pixels."""
    pixels = s.pixels[:, :-1].sum(0)
    return pixels / max(pixels.sum(), 1)


def shown(s: Survey) -> np.ndarray:
    """bool [N, C], whether an image shows a class."""
    return s.pixels[:, :-1] > 0


def imbalance(s: Survey) -> float:
    """Pixels of the most frequent class for each of the rarest that occurs."""
    found = shares(s)
    return float(found.max() / found[found > 0].min())


def split_row(s: Survey) -> dict[str, Any]:
    """The split as a whole."""
    sizes, numbers = np.unique(s.sizes, axis=0, return_counts=True)
    often = numbers.argmax()
    total, labelled = s.pixels.sum(), s.pixels[:, :-1].sum()
    return {
        "split": s.name,
        "images": len(s.names),
        "size": f"{sizes[often, 1]}x{sizes[often, 0]}" + (f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""),
        "pixels": int(total),
        "void_share": 1 - labelled / total,
        "boundary_share": s.boundary.sum() / max(labelled, 1),
        "imbalance": imbalance(s),
        "instances": len(s.object_class),
        "brightness": s.brightness.mean(),
        "contrast": s.contrast.mean(),
        "night_share": (s.brightness < NIGHT).mean(),
        "dusk_share": ((s.brightness >= NIGHT) & (s.brightness < DAY)).mean(),
        "day_share": (s.brightness >= DAY).mean(),
    }


def class_rows(s: Survey) -> list[dict[str, Any]]:
    """A row a class: pixels, images, boundary, effective number, weights. Shares are 0..1, of labelled pixels.

    The effective number is (1 − β^n) / (1 − β) with the β of the scheme "effective" (Cui et al. 2019; see
    data/statistics.py): of n pixels, as many tell something new.
    """
    pixels, images = s.pixels[:, :-1].sum(0), shown(s).sum(0)
    n = pixels.astype(np.float64)
    beta_gap = 1 / max(n[n > 0].mean(), 2)
    effective = -np.expm1(np.log1p(-beta_gap) * n) / beta_gap
    weights = {scheme: class_weights(s.pixels, scheme) for scheme in SCHEMES}
    rows = []
    for c, name in enumerate(s.labels.names):
        per_image = s.pixels[shown(s)[:, c], c]
        rows.append(
            {
                "class": name,
                "pixels": int(pixels[c]),
                "pixel_share": shares(s)[c],
                "images": int(images[c]),
                "image_share": images[c] / len(s.names),
                "pixels_per_image_mean": per_image.mean() if len(per_image) else np.nan,
                "pixels_per_image_median": float(np.median(per_image)) if len(per_image) else np.nan,
                "boundary_share": s.boundary[:, c].sum() / pixels[c] if pixels[c] else np.nan,
                "effective_number": effective[c],
            }
            | {f"weight_{scheme}": float(weight[c]) for scheme, weight in weights.items()}
        )
    return rows


def instance_rows(s: Survey) -> list[dict[str, Any]]:
    """A row a class: its objects and their areas, as shares of the image."""
    rows = []
    for c, name in enumerate(s.labels.names):
        area = s.object_share[s.object_class == c]
        few = np.full(5, np.nan) if not len(area) else np.quantile(area, [0.05, 0.25, 0.5, 0.75, 0.95])
        parts = [area < SMALL, (area >= SMALL) & (area < LARGE), area >= LARGE]
        images = max(int(shown(s)[:, c].sum()), 1)
        rows.append(
            {"class": name, "instances": len(area), "per_image_that_shows_it": len(area) / images}
            | dict(zip(["area_p5", "area_p25", "area_median", "area_p75", "area_p95"], few.tolist(), strict=True))
            | {
                f"{word}_share": float(part.mean()) if len(area) else np.nan
                for word, part in zip(["small", "medium", "large"], parts, strict=True)
            }
        )
    return rows


def cooccurrence(s: Survey) -> np.ndarray:
    """float64 [C, C]: of the images that show the row's class, the share that shows the column's; NaN for none."""
    present = shown(s).astype(np.float64)
    together = present.T @ present
    images = together.diagonal()[:, None]
    return np.divide(together, images, out=np.full_like(together, np.nan), where=images > 0)


def priors(s: Survey) -> np.ndarray:
    """float64 [C, GRID]: the share of the images that show the class at that place."""
    return np.array([(s.places == c).mean(0) for c in range(len(s.labels))])


# the shift between two splits


def shift(a: Survey, b: Survey, *, seed: int = 0) -> list[dict[str, Any]]:
    """How b differs from a: a row for each measure and class, and for the classes and the brightness in all.

        pixels      log2 of the ratio of the class's shares of the labelled pixels, b to a
        images      log2 of the ratio of the shares of the images that show it
        size        log2 of the ratio of its objects' median area, as a share of the image
        place       Jensen-Shannon divergence, in bits (0..1), of where its pixels are, on CELLS
        classes     the same of the classes' shares of the pixels
        brightness  the same of the images' brightness, in 16 bins

    `chance` is the largest of the same between RESAMPLES pairs of draws, of as many images as a and b have, from
    the images of both together, with replacement: what differs no further may be the choice of images. `marked` is
    what differs further; of 400 equal ones, one is by chance. Images of one video are alike, and count for more
    than they tell: between clips much is marked.
    """
    n, rng = (len(a.names), len(b.names)), np.random.default_rng([seed, len(a.names), len(b.names)])
    weights = []  # [1 + RESAMPLES, n_a + n_b]: how often each draw has each image, the splits themselves first
    for k, number in enumerate(n):
        itself = np.repeat([k == 0, k == 1], n)[None]
        drawn = rng.multinomial(number, np.full(sum(n), 1 / sum(n)), size=RESAMPLES)
        weights.append(np.concatenate([itself, drawn]).astype(np.float32))
    pooled = _Pool(a, b)
    of_a, of_b = (pooled.figures(weight) for weight in weights)
    rows = []
    for measure in (*MEASURES, "classes", "brightness"):
        x, y = of_a[measure], of_b[measure]
        logarithm = MEASURES.get(measure) == "log2"
        if logarithm:
            with np.errstate(divide="ignore", invalid="ignore"):
                moved = np.log2(y) - np.log2(x)
        else:
            moved = _divergence(x, y)  # [1 + RESAMPLES, C] or, over all classes, [1 + RESAMPLES, 1]
        for c in range(moved.shape[1]):
            by_chance = np.abs(moved[1:, c])
            chance = float(by_chance[~np.isnan(by_chance)].max(initial=0.0)) if len(by_chance) else 0.0
            value = float(moved[0, c])
            rows.append(
                {
                    "measure": measure,
                    "class": a.labels.names[c] if measure in MEASURES else "",
                    a.name: float(x[0, c]) if logarithm else np.nan,
                    b.name: float(y[0, c]) if logarithm else np.nan,
                    "shift": value,
                    "chance": chance,
                    "marked": bool(abs(value) > chance),
                }
            )
    return rows


class _Pool:
    """The images of two splits together."""

    def __init__(self, a: Survey, b: Survey) -> None:
        self.classes = len(a.labels)
        self.pixels = np.concatenate([a.pixels, b.pixels])[:, :-1].astype(np.float64)
        self.places = np.concatenate([a.places, b.places])
        bins = np.minimum(np.concatenate([a.brightness, b.brightness]) / 16, 15).astype(int)
        self.light = np.eye(16, dtype=np.float32)[bins]
        image = np.concatenate([a.object_image, b.object_image + len(a.names)])
        kind, area = (
            np.concatenate([getattr(a, key), getattr(b, key)]) for key in ("object_class", "object_share")
        )
        order = np.argsort(area, kind="stable")
        self.objects = [(image[o], area[o]) for o in (order[kind[order] == c] for c in range(self.classes))]

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Of every draw [D, N]: by measure [D, C], or distributions [D, C, cells], [D, 1, bins]."""
        pixels = weights.astype(np.float64) @ self.pixels
        shares = pixels / np.maximum(pixels.sum(1, keepdims=True), 1)
        places = []
        for c in range(self.classes):
            blocks = (self.places == c).reshape(-1, CELLS[0], GRID[0] // CELLS[0], CELLS[1], GRID[1] // CELLS[1])
            places.append(weights @ blocks.sum((2, 4)).reshape(len(blocks), -1).astype(np.float32))
        return {
            "pixels": shares,
            "images": weights @ (self.pixels > 0).astype(np.float32) / weights.sum(1, keepdims=True),
            "size": np.stack([_medians(weights, *objects) for objects in self.objects], 1),
            "place": np.stack(places, 1),
            "classes": shares[:, None],
            "brightness": (weights @ self.light)[:, None],
        }


def _medians(weights: np.ndarray, image: np.ndarray, area: np.ndarray) -> np.ndarray:
    """[D], the median area of objects sorted by area in each draw of images; NaN for none."""
    found = np.full(len(weights), np.nan)
    if len(area):
        for k, weight in enumerate(weights):
            below = np.cumsum(weight[image], dtype=np.float64)
            if below[-1] > 0:
                found[k] = area[np.searchsorted(below, below[-1] / 2)]
    return found


def _divergence(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of distributions over the last axis; NaN where one of them is empty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (v.astype(np.float64) / v.sum(-1, keepdims=True) for v in (x, y))
        middle = (p + q) / 2
        parts = [np.where(v > 0, v * np.log2(v / middle), 0 * v).sum(-1) for v in (p, q)]
    return np.maximum(sum(parts) / 2, 0)


# in words


def findings(s: Survey, *, advice: bool = True) -> list[str]:
    """What one should know of a split, each a sentence or two; with what to do about it in training."""
    share, images, whole = shares(s), shown(s).mean(0), split_row(s)
    name = s.labels.names
    order = np.argsort(share, kind="stable").tolist()
    occurs = [c for c in order if share[c] > 0]
    absent = [name[c] for c in order if share[c] == 0]
    said = [
        f"{whole['images']} images of {whole['size']}; {_percent(whole['void_share'])} of their pixels are void.",
        f"The imbalance is {imbalance(s):,.0f}: so many pixels of {name[occurs[-1]]} "
        f"({_percent(share[occurs[-1]])}) for each of {name[occurs[0]]} ({_percent(share[occurs[0]])}).",
    ]
    if absent:
        said.append(f"{_list(absent)} never {'occurs' if len(absent) == 1 else 'occur'} here.")
    rare = [c for c in occurs if share[c] < RARE]
    if rare:
        listed = _list([f"{name[c]} ({_percent(share[c])}, in {_percent(images[c])} of the images)" for c in rare])
        said.append(f"Below {_percent(RARE)} of the pixels: {listed}.")
    else:
        said.append(f"No class that occurs has less than {_percent(RARE)} of the pixels.")
    if rare and advice:
        effective, enet = (class_weights(s.pixels, scheme)[occurs] for scheme in ("effective", "enet"))
        said += [
            "Sampling by class (data.sampling=rare_class or repeat_factor) shows them at most so much oftener: "
            f"{_list([f'{name[c]} ×{_two_digits(1 / images[c])}' for c in rare])}. Crops that seek them "
            "(data.rare_crop), copy-paste (data.copy_paste) and weights of the loss (class_weights) go further.",
            f"Those weights would span a factor of {imbalance(s):,.0f} (inverse), "
            f"{effective.max() / effective.min():,.0f} (effective) or {enet.max() / enet.min():,.0f} (enet).",
        ]
    return [
        *said,
        f"By brightness {_percent(whole['day_share'])} of the images are day, {_percent(whole['dusk_share'])} "
        f"dusk and {_percent(whole['night_share'])} night.",
    ]


def shift_findings(a: Survey, b: Survey, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What stands out in the rows of `shift`."""
    said = []
    for measure, word in (
        ("pixels", "share of the pixels"),
        ("images", "share of the images"),
        ("size", "median area"),
    ):
        marked = [row for row in rows if row["measure"] == measure and row["marked"]]
        marked.sort(key=lambda row: -abs(row["shift"]))
        if marked:
            listed = _list([f"{row['class']} {_factor(row['shift'])}" for row in marked[:6]])
            more = f"; {len(marked) - 6} more" if len(marked) > 6 else ""
            said.append(f"{b.name} against {a.name}, {word}: {listed}{more}.")
    overall = {row["measure"]: row for row in rows if not row["class"]}
    parts = [
        f"{word} {overall[measure]['shift']:.3f} bits ({overall[measure]['chance']:.3f} by chance)"
        for measure, word in (("classes", "classes of the pixels"), ("brightness", "brightness of the images"))
    ]
    return [*said, f"{b.name} against {a.name}, Jensen-Shannon divergence: {_list(parts)}."]


def _factor(log2: float) -> str:
    if np.isinf(log2):
        return "only there" if log2 > 0 else "not there"
    return f"×{_two_digits(2.0**log2)}"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _percent(share: float) -> str:
    """Two significant digits, more where it is nearly all: 0.034 %, 99.7 %."""
    return f"{float(f'{100 * share:.2g}') if share < 0.95 else round(100 * share, 1):g} %"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
