"""What models cost: parameters, FLOPs, latency, memory, cold start and energy, across the ways to run them.

runs                   python profile_latency.py runs/teacher runs/distilled
runtimes               python profile_latency.py runs/distilled backends=[eager,onnxruntime:int8,openvino:bf16]
a configuration        python profile_latency.py model.width=32 classes=11 size=[360,480] threads=1 batch=[1,8]
exported files         python profile_latency.py runs/distilled/export/onnx_int8_360x480.onnx
a frame, part by part  python profile_latency.py runs/distilled end_to_end=true
a layer at a time      python profile_latency.py runs/distilled layers=true out=results/latency
two machines           python profile_latency.py compare=[laptop.csv,box.csv]

A backend is written NAME or NAME:PRECISION. PyTorch's run the model itself: eager, channels_last, compile and, on
a GPU, graphs. onnxruntime, openvino, executorch and tensorrt run a file: that in RUN/export/ if it has this size,
precision and batch, or one that is made for the occasion. int8 is then calibrated on drawn scenes: its speed
holds, its answers are of no use.

Each runtime has a process of its own; all take turns, in rounds. Prints a table and writes latency.json into each
run (not into a bare model's folder). With `out` there is a CSV as well, named by device, backends, size, batch and
threads.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import yaml
from tqdm import tqdm

from data import DataConfig, build_dataset
from deploy.export import ExportConfig, export
from deploy.exported import RUNTIMES, Metadata, digest, normalise, read_metadata, version
from deploy.int8 import quantise
from deploy.profiling import count_flops, count_parameters, measure_roofs, profile_layers, summarise
from deploy.runtimes import ARITHMETIC, PYTORCH, Measured, Work, check_installed, measure, parse_backend
from engine.config import run_script
from engine.run import cpu_name, read_json
from engine.tracking import write_json
from errors import ConfigurationError, DamagedFileError
from evaluation.data_report import write_csv
from evaluation.latency_pictures import LayerPoint, Point, draw_pareto, draw_roofline
from evaluation.latency_report import (
    COLUMNS,
    Row,
    backend_name,
    comparison_table,
    file_name,
    latency_table,
    parts_table,
    read_csv,
    slug,
)
from evaluation.report import ABSENT, quantity, significant, table
from models import ModelConfig, SegmentationModel, build_model, load_model

DEFAULT_SIZE = [360, 480]
# The images of each data set as its reader gives them when data.size is null: so a run is evaluated.
EVALUATION_SIZES = {
    "streets": [128, 256],
    "camvid": [360, 480],
    "cityscapes": [1024, 2048],
    "bdd100k": [720, 1280],
}
# What each runtime reads; the last is made where a run has none.
FORMATS = {
    "onnxruntime": ("onnx",),
    "openvino": ("openvino", "onnx"),
    "executorch": ("executorch",),
    "tensorrt": ("onnx",),
}
EXTENSIONS = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte"}
UNTRAINED = "untrained model"
CALIBRATION_SCENES = 4


@dataclass
class Config:
    """What profile_latency.py can be told."""

    runs: list[str] = field(default_factory=list)
    """Run directories, folders of models, or exported files; those among the arguments are added to it."""
    model: ModelConfig | None = None
    """A model that is not trained, profiled beside the runs; without runs it is there by default."""
    classes: int = 19
    """Number of classes of `model`; a run knows its own."""
    batch: Any = 1
    """Images of one pass; or a list, [1,2,4,8] say, each of which is measured."""
    size: list[int] | None = None
    """[height, width] of the images; null is the size at which the runs are evaluated, 360x480 without runs."""
    threads: int = 0
    """CPU threads of every runtime; 0 is PyTorch's choice."""
    rounds: int = 10
    """Rounds, in each of which every model and backend takes its turn."""
    passes: int = 3
    """Timed passes of a turn, after one that is not counted."""
    warmup: int = 2
    """Passes of each before the rounds."""
    backends: list[str] = field(default_factory=lambda: ["eager", "channels_last", "compile"])
    """Ways to run a model, NAME (in fp32) or NAME:PRECISION: eager, channels_last, compile (torch.compile, in
    channels_last) and graphs (CUDA graphs) in fp32, bf16, fp16; onnxruntime in fp32, int8; openvino in fp32, bf16,
    int8; executorch in fp32, int8; tensorrt in fp32, fp16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where PyTorch's backends run; auto is the GPU if there is one."""
    end_to_end: bool = False
    """Also the milliseconds from an image file to coloured classes, part by part, at batch 1."""
    image: str = ""
    """Image file of end_to_end; by default a drawn scene of twice the height and width, as JPEG."""
    layers: bool = False
    """Also each layer of the runs' models: FLOPs, parameters, time; with `out` a roofline picture."""
    out: str = ""
    """Folder for the CSV and the pictures."""
    pareto: bool = False
    """Draw mIoU against latency into `out`, of the runs that are evaluated or, with `compare`, of its files."""
    split: Literal["val", "test"] = "val"
    """Split whose mIoU counts for the picture and the CSV."""
    compare: list[str] = field(default_factory=list)
    """CSV files of this script, put side by side; nothing is measured."""

    def __post_init__(self) -> None:
        for key, least in (("classes", 1), ("threads", 0), ("rounds", 1), ("passes", 1), ("warmup", 0)):
            if getattr(self, key) < least:
                raise ConfigurationError(f"{key}: {getattr(self, key)} is too small; give {least} or more")
        self.batch = self.batch if isinstance(self.batch, list) else [self.batch]
        if not self.batch or not all(type(number) is int and number > 0 for number in self.batch):
            raise ConfigurationError(
                f"batch: {self.batch} is not possible; give a number above 0 or a list of such"
            )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigurationError(f"size: {self.size} is not a size; give [height, width] in pixels")
        pairs = [parse_backend(text) for text in self.backends]
        if not pairs or len(set(pairs)) < len(pairs):
            raise ConfigurationError(f"backends: {self.backends} is not possible; name each once, and one or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("device: there is no CUDA GPU; give auto or cpu")
        if self.end_to_end and 1 not in self.batch:
            raise ConfigurationError("end_to_end: is measured at batch 1; give batch=1 or a list with it")
        if self.image and not Path(self.image).is_file():
            raise ConfigurationError(f"image: {self.image}: no such file; check the path")
        if self.pareto and not self.out:
            raise ConfigurationError("pareto: needs a folder to draw into; give out=FOLDER")


@dataclass
class Names:
    """Class names for a model without a data set."""

    names: tuple[str, ...]


def main(config: Config) -> None:
    if config.compare:
        compare(config)
        return
    files = {run: check_file(Path(run)) for run in config.runs if Path(run).suffix in RUNTIMES}
    pairs = [parse_backend(text) for text in config.backends]
    models = load_models(config, files)
    for backend, _ in pairs if models else []:
        check_installed(backend)
    size = tuple(config.size or common_size(config.runs, files))
    check_sizes(files, size)
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    threads = config.threads or torch.get_num_threads()
    settings = {
        "size": list(size),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()), flush=True)

    left_out: dict[str, dict[str, str]] = {run: {} for run in (*models, *files)}
    with tempfile.TemporaryDirectory() as folder:
        frame = (config.image or draw_frame(size, Path(folder))) if config.end_to_end else ""
        works = [*model_works(models, pairs, config, size, device, Path(folder), left_out)]
        works += file_works(files, config, size)
        measured = measure_all(works, config, threads, frame, left_out)
        costs = {run: model_costs(run, model, size, config.split) for run, model in models.items()}
        costs |= {run: file_costs(metadata) for run, metadata in files.items()}
        rows = make_rows(measured, costs, settings)

    print(latency_table(rows))
    if len({row["peak_memory_of"] for row in rows}) > 1:
        print("peak memory: of PyTorch its tensors, of the others what their process grew by since its imports")
    if config.end_to_end:
        show_parts(measured, config.image or "a drawn scene")
    for run, model in models.items() if config.layers else []:
        show_layers(run, model, size, threads, config)
    for run in models:
        if (Path(run) / "best").is_dir():  # not into a model's own folder
            write_latency(run, settings | costs[run], rows, left_out[run])
    if config.out:
        path = Path(config.out) / f"{file_name(rows)}.csv"
        write_csv(path, rows, list(COLUMNS))
        print(f"written: {path}")
        if config.pareto:
            draw(rows, path.with_suffix(".png"))


def measure_all(
    works: Sequence[Work], config: Config, threads: int, frame: str, left_out: dict[str, dict[str, str]]
) -> dict[Work, Measured]:
    """What was measured of the works, one batch size after the other; what fails is left out."""
    measured: dict[Work, Measured] = {}
    for batch in dict.fromkeys(work.batch for work in works):
        some = [work for work in works if work.batch == batch]
        total = len(some) * (config.rounds + 1)
        with tqdm(total=total, desc=f"measure batch {batch}", leave=False, dynamic_ncols=True) as bar:

            def show(text: str, bar: Any = bar) -> None:
                bar.set_postfix_str(text)
                bar.update()

            seen, failed = measure(
                some,
                threads=threads,
                rounds=config.rounds,
                passes=config.passes,
                warmup=config.warmup,
                frame=frame if batch == 1 else "",
                progress=show,
            )
        measured |= seen
        for work, reason in failed.items():
            leave_out(left_out, work.run, backend_name(work.backend, work.precision), reason)
    if not measured:
        reasons = "; ".join(dict.fromkeys(reason for some in left_out.values() for reason in some.values()))
        raise ConfigurationError(f"backends: nothing of what is asked for runs here ({reasons}); give eager")
    return measured


# -------------------------------------------------------------------------------------- what is profiled


def load_models(config: Config, files: Iterable[str]) -> dict[str, SegmentationModel]:
    """The models to profile by the name of their row: the run's directory, or "untrained model"."""
    models = {run: load_model(run) for run in config.runs if run not in files}
    if config.model is not None or not config.runs:
        names = Names(tuple(f"class {number}" for number in range(config.classes)))
        torch.manual_seed(0)
        models[UNTRAINED] = build_model(config.model or ModelConfig(), names)
    return models


def check_file(path: Path) -> Metadata:
    """An exported file's metadata; it is that file, and its runtime is installed.

    Raises:
        ConfigurationError: there is no such file, or its runtime is missing.
        DamagedFileError: it is not the one that was exported.
    """
    if not path.exists():
        raise ConfigurationError(f"{path}: no such file; check the path")
    found = read_metadata(path)
    if digest(path) != found.sha256:
        raise DamagedFileError(f"{path}: not the file that was exported (SHA-256 differs); export it again")
    return found


def common_size(runs: Sequence[str], files: dict[str, Metadata]) -> list[int]:
    """[height, width] at which all of the runs are evaluated, and which the exported files take.

    Raises:
        ConfigurationError: they differ; latencies at different sizes don't belong into one table.
    """
    known = {run: files[run].size if run in files else evaluation_size(Path(run)) for run in runs}
    sizes = {run: size for run, size in known.items() if size is not None}
    if len({tuple(size) for size in sizes.values()}) > 1:
        listed = ", ".join(f"{run} {size[0]}x{size[1]}" for run, size in sizes.items())
        raise ConfigurationError(f"size: the runs are evaluated at different sizes ({listed}); give size=[h,w]")
    return next(iter(sizes.values()), DEFAULT_SIZE)


def evaluation_size(run: Path) -> list[int] | None:
    """[height, width] at which a run is evaluated, by its config.yaml; None where that does not say."""
    path = next((path for path in (run / "config.yaml", run.parent / "config.yaml") if path.is_file()), None)
    if path is None:  # the second is that of a fellow's run, which has no file of its own
        return None
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        size = data["size"]
        return EVALUATION_SIZES.get(data["name"]) if size is None else [int(size[0]), int(size[1])]
    except (yaml.YAMLError, OSError, UnicodeDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path}: does not tell data.size ({error!r}); give size=[h,w]") from error


def check_sizes(files: dict[str, Metadata], size: tuple[int, ...]) -> None:
    """Raises ConfigurationError if an exported file does not take images of `size`."""
    for path, metadata in files.items():
        if metadata.size is not None and tuple(metadata.size) != size:
            own, given = (f"{height}x{width}" for height, width in (metadata.size, size))
            raise ConfigurationError(
                f"{path}: takes images of {own}, not {given}; leave size out or export it anew"
            )


def model_works(
    models: dict[str, SegmentationModel],
    pairs: list[tuple[str, str]],
    config: Config,
    size: tuple[int, ...],
    device: str,
    folder: Path,
    left_out: dict[str, dict[str, str]],
) -> Iterable[Work]:
    """Each model in each backend and batch size; exported where it has to be."""
    scenes: list[np.ndarray] = []
    bar = tqdm([(run, *pair) for run in models for pair in pairs], desc="prepare", leave=False, dynamic_ncols=True)
    for run, backend, precision in bar:
        bar.set_postfix_str(f"{run} {backend_name(backend, precision)}")
        aside = folder / str(list(models).index(run))
        if run == UNTRAINED:
            models[run].save_pretrained(aside / "best")
        for batch in config.batch:
            path = str(aside / "best") if run == UNTRAINED else run
            if backend not in PYTORCH:
                wanted = "fp32" if (backend, precision) in ARITHMETIC else precision
                found = find_export(Path(run) / "export", FORMATS[backend], wanted, batch, size)
                made = aside / f"batch{batch}"
                found = found or find_export(made, FORMATS[backend], wanted, batch, size)
                scenes = scenes or draw_scenes(size, CALIBRATION_SCENES)
                try:
                    path = str(
                        found or make_export(models[run], FORMATS[backend][-1], wanted, batch, scenes, made)
                    )
                except ConfigurationError as error:
                    leave_out(left_out, run, backend_name(backend, precision), str(error))
                    continue
            yield Work(run, backend, precision, batch, path, (size[0], size[1]), device)


def find_export(
    folder: Path, formats: Sequence[str], precision: str, batch: int, size: tuple[int, ...]
) -> Path | None:
    """The file of this precision, batch and size that takes normalised images and gives logits, if it exists."""
    for format_ in formats:
        path = folder / f"{format_}_{precision}_{size[0]}x{size[1]}{EXTENSIONS[format_]}"
        if path.exists():
            found = read_metadata(path)
            plain = found.input["dtype"] == "float32" and found.output["kind"] == "logits"
            if plain and found.input["shape"][0] in (None, batch):
                return path
    return None


def make_export(
    model: SegmentationModel, format_: str, precision: str, batch: int, scenes: Sequence[np.ndarray], folder: Path
) -> Path:
    """A file for this profile alone; int8 is calibrated on drawn scenes."""
    if precision == "int8" and model.precision != "int8":
        images = normalise(np.stack(scenes), model.mean, model.std)
        model = quantise(model, [torch.from_numpy(image) for image in images])
    given = ExportConfig(formats=[format_], batch=batch, images=1)
    return export(model, given, folder, scenes)[0]


def file_works(files: dict[str, Metadata], config: Config, size: tuple[int, ...]) -> list[Work]:
    """Each exported file that was named, in its runtimes: those of `backends` that read it, or its first."""
    works = []
    for path, metadata in files.items():
        readers = RUNTIMES[Path(path).suffix]
        pairs = [parse_backend(text) for text in config.backends]
        chosen = [
            (b, p)
            for b, p in pairs
            if b in readers and ("fp32" if (b, p) in ARITHMETIC else p) == metadata.precision
        ]
        fixed = metadata.input["shape"][0]
        for backend, precision in chosen or [(readers[0], metadata.precision)]:
            check_installed(backend)
            works += [
                Work(path, backend, precision, batch, path, (size[0], size[1]))
                for batch in (config.batch if fixed is None else [fixed])
            ]
    return works


def leave_out(left_out: dict[str, dict[str, str]], run: str, backend: str, reason: str) -> None:
    left_out[run][backend] = reason
    tqdm.write(f"{run}: {backend} is left out: {reason}")


def draw_scenes(size: tuple[int, ...], count: int) -> list[np.ndarray]:
    """Drawn street scenes, uint8 [H, W, 3]."""
    data = build_dataset(DataConfig(name="streets", size=list(size)), "val")
    return [data.read(index)[0] for index in range(count)]


def draw_frame(size: tuple[int, ...], folder: Path) -> str:
    """A drawn scene of twice the size as a JPEG file."""
    scene = draw_scenes((2 * size[0], 2 * size[1]), 1)[0]
    path = folder / "frame.jpg"
    cv2.imwrite(str(path), cv2.cvtColor(scene, cv2.COLOR_RGB2BGR))
    return str(path)


# ------------------------------------------------------------------------------------------ what came out


def model_costs(run: str, model: SegmentationModel, size: tuple[int, ...], split: str) -> dict[str, Any]:
    """Parameters, FLOPs of an image, and mIoU if the run was evaluated."""
    miou = None if run == UNTRAINED else miou_of_run(Path(run), split)
    return {"parameters": count_parameters(model), "flops": count_flops(model, size), "miou": miou}


def miou_of_run(run: Path, split: str) -> float | None:
    """mIoU (0..1) on a split by evaluation_SPLIT.json, or by results.json if that is of this split."""
    for path in (run / f"evaluation_{split}.json", run / "results.json"):
        if path.exists():
            found = read_json(path)
            if found.get("split") == split and "miou" in found:
                return found["miou"]
    return None


def file_costs(metadata: Metadata) -> dict[str, Any]:
    return {"parameters": metadata.parameters, "flops": metadata.flops, "miou": metadata.miou}


def make_rows(
    measured: dict[Work, Measured], costs: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> list[Row]:
    """A row for each work, by run and batch size, then in the order of the backends."""
    times = {work: summarise(seen.times_ms, work.batch) for work, seen in measured.items()}
    eager = {
        (str(Path(work.run)), work.batch): values["median_ms"]
        for work, values in times.items()
        if (work.backend, work.precision) == ("eager", "fp32")
    }
    rows = []
    for work in sorted(measured, key=lambda work: list(costs).index(work.run)):
        seen = measured[work]
        own = eager.get((str(Path(work.run)), work.batch)) or eager.get((run_of_file(work.run), work.batch))
        row = {
            "run": work.run,
            "backend": work.backend,
            "precision": work.precision,
            "batch": work.batch,
            "height": work.size[0],
            "width": work.size[1],
            "threads": settings["threads"],
            "device": settings["device"],
            "version": version("torch" if work.backend in PYTORCH else work.backend),
            **times[work],
            "fastest_ms": min(seen.times_ms),
            "speedup": own and own / times[work]["median_ms"],
            "peak_memory_bytes": seen.peak_memory_bytes,
            "peak_memory_of": "tensors" if work.backend in PYTORCH else "process",
            "start_ms": seen.start_ms,
            "load_ms": seen.load_ms,
            "first_ms": seen.first_ms,
            "joules_per_image": seen.joules_per_image,
            "parameters": costs[work.run]["parameters"],
            "flops": costs[work.run]["flops"],
            "miou": miou_of_work(work, costs[work.run]["miou"]),
        }
        rows.append(row)
    return rows


def run_of_file(path: str) -> str:
    """The run to which RUN/export/FILE belongs."""
    return str(Path(path).parent.parent)


def miou_of_work(work: Work, miou_of_run: float | None) -> float | None:
    """mIoU of what ran: what an exported file knows of itself, or in fp32 that of the run."""
    own = None
    if work.backend not in PYTORCH and (work.backend, work.precision) not in ARITHMETIC:
        own = read_metadata(Path(work.path)).miou
    return miou_of_run if own is None and work.precision == "fp32" else own


def write_latency(run: str, about: dict[str, Any], rows: list[Row], left_out: dict[str, str]) -> None:
    """RUN/latency.json; latency_ms is that of eager fp32 at the first batch size, null if it was not measured."""
    own = [row for row in rows if row["run"] == run]
    eager = [row["median_ms"] for row in own if (row["backend"], row["precision"]) == ("eager", "fp32")]
    path = Path(run) / "latency.json"
    write_json(path, about | {"latency_ms": eager[0] if eager else None, "rows": own, "left_out": left_out})
    print(f"written: {path}")


# ------------------------------------------------------------------------------ parts, layers and pictures


def show_parts(measured: dict[Work, Measured], what: str) -> None:
    """Prints how long each part of a frame takes."""
    parts = [
        (work.run, backend_name(work.backend, work.precision), seen.parts_ms)
        for work, seen in measured.items()
        if seen.parts_ms
    ]
    print(f"\nFrom {what} to coloured classes, milliseconds:\n\n{parts_table(parts)}")


def show_layers(run: str, model: SegmentationModel, size: tuple[int, ...], threads: int, config: Config) -> None:
    """Prints what each layer costs in eager mode on the CPU, and draws the roofline into `out`."""
    torch.set_num_threads(threads)
    rounds = config.rounds * config.passes
    layers = profile_layers(model, torch.randn(1, 3, *size), rounds=rounds, warmup=config.warmup)
    whole = sum(layer.milliseconds for layer in layers)
    lines = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "params": quantity(layer.parameters),
            "FLOPs": quantity(layer.flops) if layer.flops else ABSENT,
            "FLOPs/byte": significant(layer.intensity) if layer.flops else ABSENT,
            "ms": f"{layer.milliseconds:.3f}",
            "share %": f"{100 * layer.milliseconds / whole:.1f}",
            "GFLOP/s": significant(layer.flops / layer.milliseconds / 1e6) if layer.flops else ABSENT,
        }
        for layer in layers
    ]
    print(f"\n{run}, layer by layer, eager, fp32, batch 1:\n\n{table(lines)}")
    if config.out:
        points = [
            LayerPoint(
                layer.name,
                layer.kind,
                layer.intensity,
                1000 * layer.flops / layer.milliseconds,
                layer.milliseconds / whole,
            )
            for layer in layers
            if layer.flops and layer.kind
        ]
        path = Path(config.out) / f"{slug(run)}_{size[0]}x{size[1]}_threads{threads}_roofline.png"
        draw_roofline(
            points, measure_roofs(), path, f"{run}, {size[0]}x{size[1]}, {cpu_name()}, threads {threads}"
        )
        print(f"written: {path}")


def draw(rows: Sequence[Row], path: Path, groups: Sequence[str] = ()) -> None:
    """mIoU against latency of the rows at batch 1 whose mIoU is known; `groups` goes before each row's backend."""
    known = [
        Point(
            row["run"],
            " ".join(filter(None, [group, backend_name(row["backend"], row["precision"])])),
            row["median_ms"],
            row["miou"],
        )
        for row, group in zip(rows, groups or [""] * len(rows), strict=True)
        if row["miou"] is not None and row["batch"] == 1
    ]
    if not known:
        raise ConfigurationError("pareto: no mIoU is known at batch 1; run evaluate.py on the runs first")
    first = rows[0]
    title = f"{first['height']}x{first['width']}, threads {first['threads']}, {first['device']}"
    draw_pareto(known, path, title if not groups else "")
    print(f"written: {path}")


def compare(config: Config) -> None:
    """Prints the rows of several CSV files side by side; draws them in one picture if that is asked for."""
    files = {path: read_csv(Path(path)) for path in config.compare}
    for number, path in enumerate(files, 1):
        print(f"{number}: {path}")
    print(f"\n{comparison_table(list(files.values()))}")
    if config.pareto:
        rows = [row for rows in files.values() for row in rows]
        groups = [str(number) for number, rows in enumerate(files.values(), 1) for _ in rows]
        draw(rows, Path(config.out) / "compared.png", groups)


if __name__ == "__main__":
    run_script(main, Config, runs="runs", files=tuple(RUNTIMES))
