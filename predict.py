"""Draw what a model sees: overlays, masks and videos of images, folders, video files or a camera.

images, by a run     python predict.py runs/distilled input=photos out=predictions
a video              python predict.py runs/distilled input=drive.mp4 out=predictions
an exported file     python predict.py runs/distilled/export/onnx_int8_360x480.onnx input=drive.mp4
a camera             python predict.py runs/distilled input=camera:0 frames=300
frames into a video  python predict.py runs/distilled input=folder video=true rate=15

Outputs are named after the inputs: OUT/NAME_overlay.png, NAME_mask.png and NAME_side_by_side.png of an image,
NAME_overlay.mp4 and NAME_side_by_side.mp4 of a video, and its masks as OUT/NAME_mask/000000.png and so on.
"""

import math
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import cv2
import numpy as np
import torch
from tqdm import tqdm

from data.files import open_image, read_bytes
from data.folder import palette
from data.labels import CAMVID, CITYSCAPES
from data.transforms import resize_image, resize_label
from deploy.exported import RUNTIMES, normalise, open_exported
from deploy.postprocess import native_argmax
from engine.config import run_script
from errors import ConfigurationError, MachineError
from evaluation.pictures import colourise, legend, overlay
from evaluation.report import significant, table
from models import load_model
from profile_latency import evaluation_size

IMAGES = (".jpeg", ".jpg", ".png")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
KINDS = ("overlay", "side_by_side", "mask")
AHEAD = 4  # frames that wait to be computed, and to be written

T = TypeVar("T")


@dataclass
class Config:
    """What predict.py can be told."""

    run: str = ""
    """Run directory, model's folder or exported file; the one among the arguments is put here."""
    input: str = ""
    """An image (.jpg, .png), a folder of images, a video file, or camera:0, the number being the camera's."""
    out: str = "predictions"
    """Folder of what is written."""
    write: list[str] = field(default_factory=lambda: ["overlay"])
    """What is written of each input: some of overlay, side_by_side (image and classes) and mask."""
    opacity: float = 0.5
    """Of the colours over the image in an overlay, from 0 to 1."""
    masks: Literal["trainids", "colours"] = "trainids"
    """What a mask holds: the number of each pixel's class, or its colour."""
    legend: bool = True
    """Write the classes and their colours below overlays and side by sides."""
    size: list[int] | None = None
    """[height, width] of what the network is given; null is the size at which the run is evaluated, or that of the
    exported file, and the images' own where neither says one. Labels have the images' own size in any case."""
    video: bool = False
    """Write a folder of images, in the order of their names, as one video."""
    rate: float = 15.0
    """Frames per second of a video that is made from images, or from a source that does not tell its own."""
    frames: int = 0
    """Stop after so many images or frames; 0 takes all, of a camera until Ctrl-C."""
    runtime: str = ""
    """What runs an exported file, where there is a choice: onnxruntime, openvino or tensorrt for .onnx."""
    threads: int = 0
    """CPU threads of the network; 0 leaves the choice to PyTorch or the runtime."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a run's network runs; auto is the GPU if there is one."""
    show: bool = False
    """Show each overlay in a window, too; q ends it."""
    overwrite: bool = False
    """Replace outputs that exist."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.write if kind not in KINDS]
        if unknown or not self.write or len(set(self.write)) < len(self.write):
            wrong = repr(unknown[0]) if unknown else self.write
            raise ConfigurationError(f"write: {wrong} is not possible; give some of {', '.join(KINDS)}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigurationError(f"size: {self.size} is not a size; give [height, width] in pixels")
        if not 0 <= self.opacity <= 1:
            raise ConfigurationError(f"opacity: {self.opacity} is not possible; give 0 to 1")
        if not 0 < self.rate <= 1000:
            raise ConfigurationError(f"rate: {self.rate} is not possible; give frames per second, up to 1000")
        for key in ("frames", "threads"):
            if getattr(self, key) < 0:
                raise ConfigurationError(f"{key}: {getattr(self, key)} is not possible; give 0 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("device: there is no CUDA GPU; give auto or cpu")


@dataclass
class Frame:
    """An image, uint8 [H, W, 3] RGB, and the name of what is written of it."""

    name: str
    image: np.ndarray


@dataclass
class Source:
    """Where frames come from.

    Args:
        name: of the outputs of a clip.
        frames: gives them, once.
        names: those of all frames, if they stand by themselves; a clip has none.
        count: how many there will be; None if that is not known.
        rate: frames per second of a clip.
    """

    name: str
    frames: Iterator[Frame]
    names: list[str]
    count: int | None
    rate: float


def main(config: Config) -> None:
    if not config.run:
        raise ConfigurationError("run: no model is named; give a run directory or an exported file")
    predictor = open_predictor(config)
    print(predictor.described, flush=True)
    source = open_source(config)
    times = Times()
    with ExitStack() as stack:
        writers = open_writers(config, source, predictor)
        for writer in writers:
            stack.callback(writer.close)
        done = predict_frames(config, source, predictor, writers, times)
    print(f"written: {', '.join(writer.described for writer in writers)}")
    print(times.report(done))


def predict_frames(
    config: Config, source: Source, predictor: "Predictor", writers: Sequence["Writer"], times: "Times"
) -> int:
    """Every frame of the source through the model into the writers; the number of frames. Ctrl-C ends it.

    A thread reads ahead, and another one draws and writes, beside the network.
    """
    done = 0
    bar = tqdm(total=source.count, unit="frame", desc=source.name, dynamic_ncols=True)
    with bar, Behind() as behind, suppress(KeyboardInterrupt):
        for frame in ahead(times.each("read", source.frames)):
            labels = predictor.labels(frame.image, times)
            behind.submit(write_frame, writers, frame, labels, times)
            done += 1
            bar.update()
            if config.show and not shown(overlay(frame.image, labels, predictor.colours, config.opacity)):
                break
    return done


def write_frame(writers: Sequence["Writer"], frame: Frame, labels: np.ndarray, times: "Times") -> None:
    for writer in writers:
        with times.part("draw"):
            picture = writer.draw(frame.image, labels)
        with times.part("write"):
            writer.add(frame.name, picture)


def shown(picture: np.ndarray) -> bool:
    """Shows an RGB picture in a window; whether to go on."""
    try:
        cv2.imshow("predict.py, q ends it", picture[..., ::-1])
        return cv2.waitKey(1) & 0xFF != ord("q")
    except cv2.error as error:
        raise ConfigurationError("show: this OpenCV or machine has no windows; leave show out") from error


# ------------------------------------------------------------------------------------------------ threads


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, of which a thread makes the next few before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item


class Behind:
    """A thread that does in order what is submitted, up to the first error, which a later submission or the end
    raises."""

    def __enter__(self) -> "Behind":
        self.pool, self.waiting, self.failed = ThreadPoolExecutor(1), deque[Future[None]](), False
        return self

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Waits if too much is waiting already."""
        if len(self.waiting) == AHEAD:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(self._do, function, *arguments))

    def _do(self, function: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        self.failed = True
        function(*arguments)
        self.failed = False

    def __exit__(self, *_: object) -> None:
        with self.pool:
            for future in self.waiting:
                future.result()


class Times:
    """Seconds that went into each part of the work. Parts run beside one another, so they add up to more than the
    whole."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = dict.fromkeys(("read", "prepare", "network", "post", "draw", "write"), 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time that it takes to get each."""
        while True:
            with self.part(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def report(self, frames: int) -> str:
        """Frames per second as a whole and by part."""
        whole = time.perf_counter() - self.start
        seconds = self.seconds | {"all, side by side": whole}
        rows = [
            {
                "part": name,
                "ms a frame": significant(1000 * spent / max(1, frames)),
                "frames/s": significant(frames / max(spent, 1e-9)),
            }
            for name, spent in seconds.items()
        ]
        return f"{frames} frames in {significant(whole)} s\n\n{table(rows)}"


# ------------------------------------------------------------------------------------------------- models


class Predictor(ABC):
    """A model with its classes.

    Args:
        size: [height, width] that the network is given; None is that of each image.
        described: a line about it.
    """

    names: Sequence[str]
    colours: Sequence[tuple[int, int, int]]
    size: Sequence[int] | None
    described: str

    def labels(self, image: np.ndarray, times: Times) -> np.ndarray:
        """uint8 [H, W, 3] RGB -> uint8 [H, W]."""
        height, width = image.shape[:2]
        with times.part("prepare"):
            batch = self.prepare(
                resize_image(image, (self.size[0], self.size[1]) if self.size else (height, width))
            )
        with times.part("network"):
            answer = self.answer(batch)
        with times.part("post"):
            return self.finish(answer, (height, width))

    @abstractmethod
    def prepare(self, image: np.ndarray) -> Any:
        """uint8 [h, w, 3] RGB -> what the network takes."""

    @abstractmethod
    def answer(self, batch: Any) -> Any:
        """What the network gives for that."""

    @abstractmethod
    def finish(self, answer: Any, size: tuple[int, int]) -> np.ndarray:
        """The network's answer -> uint8 labels of `size`."""


def open_predictor(config: Config) -> Predictor:
    if config.run.endswith(tuple(RUNTIMES)):
        return FilePredictor(config)
    if config.runtime:
        raise ConfigurationError(f"runtime: is for exported files, and {config.run} is a run; leave it out")
    return RunPredictor(config)


class RunPredictor(Predictor):
    """A run in PyTorch."""

    def __init__(self, config: Config) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.model = load_model(config.run).to(self.device).eval()
        self.size = config.size or evaluation_size(Path(config.run))
        self.names = self.model.class_names
        self.colours = colours_of(self.names)
        size = f"at {format_size(self.size)}" if self.size else "at the images' own size"
        self.described = (
            f"{config.run}: {self.model.architecture}, {len(self.names)} classes, {size}, {self.device}"
        )

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(normalise(image[None], self.model.mean, self.model.std)).to(self.device)
        return batch.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def answer(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.model(batch).logits
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return logits

    def finish(self, answer: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        return native_argmax(answer, size)[0].cpu().numpy()


class FilePredictor(Predictor):
    """An exported file in its runtime."""

    def __init__(self, config: Config) -> None:
        self.exported = open_exported(config.run, runtime=config.runtime, threads=config.threads)
        known = self.exported.metadata
        if config.size and known.size and config.size != known.size:
            raise ConfigurationError(
                f"size: {config.run} takes {format_size(known.size)} alone; leave size out, or export it anew"
            )
        self.size = known.size or config.size
        self.batch = known.input["shape"][0] or 1
        self.names = known.class_names
        self.colours = [(red, green, blue) for red, green, blue in known.colours]
        size = f"images are resized to {format_size(self.size)}, labels back" if self.size else "any size"
        what = f"{known.format} {known.precision} by {self.exported.runtime}"
        self.described = f"{config.run}: {what}, {len(self.names)} classes; {size}"

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return self.exported.prepare(np.repeat(image[None], self.batch, 0))

    def answer(self, batch: np.ndarray) -> np.ndarray:
        return self.exported(batch)[:1]

    def finish(self, answer: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize_label(self.exported.finish(answer, size)[0], size)


def format_size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def colours_of(names: Sequence[str]) -> Sequence[tuple[int, int, int]]:
    """Those of Cityscapes or CamVid for their classes, else a palette."""
    known = next((labels.colours for labels in (CITYSCAPES, CAMVID) if list(labels.names) == list(names)), None)
    return known or palette(len(names))


# ------------------------------------------------------------------------------------------------ sources


def open_source(config: Config) -> Source:
    """What `input` names.

    Raises:
        ConfigurationError: it does not exist, cannot be opened, or is of another kind.
    """
    kind, _, number = config.input.partition(":")
    if kind == "camera":
        if not number.isdigit():
            raise ConfigurationError(f"input: {config.input} names no camera; write camera:0")
        return open_clip(config, int(number), f"camera{number}")
    path = Path(config.input)
    if config.input and path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        if not paths:
            raise ConfigurationError(f"{path}: holds no images ({', '.join(IMAGES)}); name another folder")
        if path.resolve() == Path(config.out).resolve():
            raise ConfigurationError(f"out: {path} is the folder of the images; name another")
        return image_source(config, paths, path.resolve().name)
    if not path.is_file():
        raise ConfigurationError(f"input: {config.input!r} does not exist; give a file, a folder or camera:0")
    if path.suffix.lower() in VIDEOS:
        return open_clip(config, str(path), path.stem)
    if path.suffix.lower() not in IMAGES:
        raise ConfigurationError(
            f"{path}: unknown ending; give an image ({', '.join(IMAGES)}) or a video ({', '.join(VIDEOS)})"
        )
    return image_source(config, [path], path.stem)


def image_source(config: Config, paths: list[Path], name: str) -> Source:
    paths = paths[: config.frames or None]
    names = [path.stem for path in paths]
    twice = next((path for path in paths if names.count(path.stem) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"{twice}: another image has the same name, and so would its output; rename it")
    frames = (Frame(path.stem, read_picture(path)) for path in paths)
    return Source(name, frames, [] if config.video else names, len(paths), config.rate)


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB, turned as the file says. Raises ConfigurationError naming the file."""
    data = read_bytes(path)
    open_image(path, data)  # refuses what is cut or damaged, which OpenCV would fill with grey
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ConfigurationError(f"{path}: cannot be decoded; copy it again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def open_clip(config: Config, where: str | int, name: str) -> Source:
    """A video file or a camera."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong is said here, in one line
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    capture = cv2.VideoCapture(where)
    if not capture.isOpened():
        if isinstance(where, int):
            raise ConfigurationError(f"input: there is no camera {where}; give another number, or a file")
        raise ConfigurationError(
            f"{where}: cannot be opened as a video; is it whole, and its codec known to OpenCV?"
        )
    announced = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT))) if isinstance(where, str) else 0
    rate = capture.get(cv2.CAP_PROP_FPS)
    wanted = [count for count in (announced, config.frames) if count]
    frames = read_clip(capture, where, announced, config.frames)
    return Source(name, frames, [], min(wanted, default=None), rate if 0 < rate <= 1000 else config.rate)


def read_clip(capture: cv2.VideoCapture, where: str | int, announced: int, most: int) -> Iterator[Frame]:
    """Frames of an open video or camera, `most` of them or all (0).

    Raises:
        ConfigurationError: after the last frame, if a file or a camera breaks off before that.
    """
    count = 0
    try:
        while not most or count < most:
            whole, picture = capture.read()
            if not whole:
                break
            yield Frame(f"{count:06d}", cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            count += 1
    finally:
        capture.release()
    camera = isinstance(where, int)
    expected = most or (math.inf if camera else announced)
    if announced:
        expected = min(expected, announced)
    # The length that a file announces may follow from its duration: a few frames less are no fault.
    if count == 0 or expected - count > (0 if camera else max(2, announced // 50)):
        of = f" of {expected}" if expected < math.inf else ""
        what = f"camera:{where}" if camera else where
        raise ConfigurationError(f"{what}: breaks off after {count}{of} frames; what was made of them is kept")


# ------------------------------------------------------------------------------------------------ outputs


Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Writer(Protocol):
    """Takes pictures one by one; `close` ends it and keeps what there is."""

    draw: Draw
    described: str

    def add(self, name: str, picture: np.ndarray) -> None: ...

    def close(self) -> None: ...


def open_writers(config: Config, source: Source, predictor: Predictor) -> list[Writer]:
    """One for each kind of output.

    Raises:
        ConfigurationError: an output exists and `overwrite` is not set, or nothing can be written there.
    """
    out, drawing = Path(config.out), Drawing(config, predictor)
    paths: dict[str, list[Path]] = {}
    for kind in config.write:
        ending = "" if kind == "mask" else ".mp4"
        paths[kind] = [out / f"{name}_{kind}.png" for name in source.names] or [
            out / f"{source.name}_{kind}{ending}"
        ]
    existing = [path for kind in config.write for path in paths[kind] if path.exists()]
    if existing and not config.overwrite:
        raise ConfigurationError(f"{existing[0]}: exists already; give overwrite=true, or another out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigurationError(f"out: can't write to {out} ({error.strerror}); name another folder") from error
    for path in existing:
        if path.is_dir():
            shutil.rmtree(path)  # masks of a clip
    writers: list[Writer] = []
    for kind in config.write:
        draw = drawing.of(kind)
        if source.names:
            writers.append(PictureWriter(out, f"_{kind}", draw))
        elif kind == "mask":
            writers.append(PictureWriter(paths[kind][0], "", draw))
        else:
            writers.append(VideoWriter(paths[kind][0], source.rate, draw))
    return writers


class Drawing:
    """How the outputs look."""

    def __init__(self, config: Config, predictor: Predictor) -> None:
        self.config, self.names, self.colours = config, predictor.names, predictor.colours
        self.legends: dict[int, np.ndarray] = {}  # by width

    def of(self, kind: str) -> Draw:
        return {"overlay": self.overlay, "side_by_side": self.side_by_side, "mask": self.mask}[kind]

    def overlay(self, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return self.with_legend(overlay(image, labels, self.colours, self.config.opacity))

    def side_by_side(self, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return self.with_legend(np.hstack([image, colourise(labels, self.colours)]))

    def mask(self, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return labels if self.config.masks == "trainids" else colourise(labels, self.colours)

    def with_legend(self, picture: np.ndarray) -> np.ndarray:
        if not self.config.legend:
            return picture
        width = picture.shape[1]
        if width not in self.legends:
            self.legends[width] = legend(self.names, self.colours, width)
        return np.vstack([picture, self.legends[width]])


class PictureWriter:
    """PNG files FOLDER/NAME{suffix}.png."""

    def __init__(self, folder: Path, suffix: str, draw: Draw) -> None:
        self.folder, self.suffix, self.draw = folder, suffix, draw
        self.described = f"{folder}/*{suffix}.png"

    def add(self, name: str, picture: np.ndarray) -> None:
        ordered = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        path = self.folder / f"{name}{self.suffix}.png"
        aside = path.with_name(f"{path.name}.tmp")
        self.folder.mkdir(exist_ok=True)
        aside.write_bytes(cv2.imencode(".png", ordered)[1].tobytes())
        os.replace(aside, path)

    def close(self) -> None:
        pass


class VideoWriter:
    """An mp4 (MPEG-4 part 2), written aside and renamed when it is closed; an odd row or column is doubled."""

    def __init__(self, path: Path, rate: float, draw: Draw) -> None:
        self.path, self.rate, self.draw = path, rate, draw
        self.described = str(path)
        self.aside = path.with_name(f"{path.stem}.part{path.suffix}")
        self.writer: cv2.VideoWriter | None = None
        self.size: tuple[int, int] = (0, 0)
        self.frames = 0

    def add(self, name: str, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        if self.writer is None:
            self.size = (height, width)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(
                str(self.aside), code, self.rate, (width + width % 2, height + height % 2)
            )
            if not self.writer.isOpened():
                raise MachineError(f"{self.path}: OpenCV cannot write an mp4 here; give write=[mask]")
        if (height, width) != self.size:
            raise ConfigurationError(
                f"{name}: its picture has {format_size((height, width))}, the first of the video had "
                f"{format_size(self.size)}; bring the images to one size, or leave video out"
            )
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        self.writer.write(cv2.copyMakeBorder(bgr, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE))
        self.frames += 1

    def close(self) -> None:
        if self.writer is None:
            return
        self.writer.release()
        whole = cv2.VideoCapture(str(self.aside))
        found = round(whole.get(cv2.CAP_PROP_FRAME_COUNT))
        whole.release()
        if found != self.frames:  # OpenCV does not tell that the disk is full
            raise MachineError(f"{self.aside}: has {max(0, found)} of {self.frames} frames; is the disk full?")
        os.replace(self.aside, self.path)


if __name__ == "__main__":
    run_script(main, Config, runs="run", files=tuple(RUNTIMES))
