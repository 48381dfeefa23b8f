"""What models cost: parameters, FLOPs, latency and peak memory, in eager mode, channels_last and torch.compile.

runs                   python profile_latency.py runs/teacher runs/distilled
a configuration        python profile_latency.py model.width=32 classes=11 size=[360,480]
one thread, batch 8    python profile_latency.py runs/distilled threads=1 batch=8

Prints a table and writes latency.json into each run (not into a bare model's folder).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from deploy.profiling import (
    BACKENDS,
    BackendUnavailable,
    Prepared,
    count_flops,
    count_parameters,
    measure_latency,
    peak_memory,
    prepare,
    summarise,
)
from engine.config import run_script
from engine.run import cpu_name
from engine.tracking import write_json
from errors import ConfigurationError
from evaluation.report import quantity, significant, table
from models import ModelConfig, SegmentationModel, build_model, load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SIZE = [360, 480]
# The images of each data set as its reader gives them when data.size is null: so a run is evaluated.
EVALUATION_SIZES = {
    "streets": [128, 256],
    "camvid": [360, 480],
    "cityscapes": [1024, 2048],
    "bdd100k": [720, 1280],
}


@dataclass
class Config:
    """What profile_latency.py can be told."""

    runs: list[str] = field(default_factory=list)
    """Run directories, or folders of models; directories among the arguments are added to it."""
    model: ModelConfig | None = None
    """A model that is not trained, profiled beside the runs; without runs it is there by default."""
    classes: int = 19
    """Number of classes of `model`; a run knows its own."""
    batch: int = 1
    """Images of one pass."""
    size: list[int] | None = None
    """[height, width] of the images; null is the size at which the runs are evaluated, 360x480 without runs."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    rounds: int = 30
    """Timed passes of each model and backend, taken in turn."""
    warmup: int = 5
    """Passes of each before those that are timed."""
    backends: list[str] = field(default_factory=lambda: list(BACKENDS))
    """Ways to run a model: eager, channels_last, compile (torch.compile, in channels_last)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; bf16 converts weights and images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is the GPU if there is one."""

    def __post_init__(self) -> None:
        for key, least in (("classes", 1), ("batch", 1), ("threads", 0), ("rounds", 1), ("warmup", 0)):
            if getattr(self, key) < least:
                raise ConfigurationError(f"{key}: {getattr(self, key)} is too small; give {least} or more")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigurationError(f"size: {self.size} is not a size; give [height, width] in pixels")
        unknown = [name for name in self.backends if name not in BACKENDS]
        if unknown or not self.backends or len(set(self.backends)) < len(self.backends):
            wrong = repr(unknown[0]) if unknown else self.backends
            raise ConfigurationError(f"backends: {wrong} is not possible; give some of {', '.join(BACKENDS)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("device: there is no CUDA GPU; give auto or cpu")


@dataclass
class Names:
    """Class names for a model without a data set."""

    names: tuple[str, ...]


def main(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    models = load_models(config)
    size = config.size or common_size(config.runs)
    settings = {
        "size": list(size),
        "batch": config.batch,
        "threads": torch.get_num_threads(),
        "precision": config.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()), flush=True)

    images = torch.randn(config.batch, 3, *size, device=device, dtype=DTYPES[config.precision])
    prepared, left_out = prepare_all(models, images, config.backends)
    measured = measure_all(prepared, config)
    reports = {}
    for run, model in models.items():
        backends = {backend: values for (name, backend), values in measured.items() if name == run}
        reports[run] = settings | {
            "parameters": count_parameters(model),
            "flops": count_flops(model, size),
            "latency_ms": backends.get("eager", {}).get("median_ms"),
            "backends": backends,
            "left_out": left_out[run],
        }
    print(format_table(reports))
    for run in config.runs:
        if (Path(run) / "best").is_dir():  # not into a model's own folder
            write_json(Path(run) / "latency.json", reports[run])
            print(f"written: {Path(run) / 'latency.json'}")


def load_models(config: Config) -> dict[str, SegmentationModel]:
    """The models to profile by the name of their row: the run's directory, or "untrained model"."""
    models = {run: load_model(run) for run in config.runs}
    if config.model is not None or not models:
        names = Names(tuple(f"class {number}" for number in range(config.classes)))
        models["untrained model"] = build_model(config.model or ModelConfig(), names)
    return models


def common_size(runs: list[str]) -> list[int]:
    """[height, width] at which all of the runs are evaluated.

    Raises:
        ConfigurationError: they are evaluated at different sizes, whose latencies don't belong into one table.
    """
    known = {run: size for run in runs if (size := evaluation_size(Path(run))) is not None}
    if len({tuple(size) for size in known.values()}) > 1:
        listed = ", ".join(f"{run} {size[0]}x{size[1]}" for run, size in known.items())
        raise ConfigurationError(f"size: the runs are evaluated at different sizes ({listed}); give size=[h,w]")
    return next(iter(known.values()), DEFAULT_SIZE)


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


def prepare_all(
    models: Mapping[str, SegmentationModel], images: torch.Tensor, backends: list[str]
) -> tuple[dict[tuple[str, str], Prepared], dict[str, dict[str, str]]]:
    """Each model in each backend by (model, backend); and by model the backends left out, with their reasons."""
    prepared: dict[tuple[str, str], Prepared] = {}
    left_out: dict[str, dict[str, str]] = {name: {} for name in models}
    pairs = [(name, backend) for name in models for backend in backends]
    bar = tqdm(pairs, desc="prepare", leave=False, dynamic_ncols=True)
    for name, backend in bar:
        bar.set_postfix_str(f"{name} {backend}")
        try:
            prepared[name, backend] = prepare(models[name], images, backend)
        except BackendUnavailable as error:
            left_out[name][backend] = str(error)
            bar.write(f"{name}: {backend} is left out: {error}")
    if not prepared:
        reasons = "; ".join(dict.fromkeys(reason for reasons in left_out.values() for reason in reasons.values()))
        raise ConfigurationError(f"backends: none of {', '.join(backends)} runs here ({reasons}); give eager")
    return prepared, left_out


def measure_all(
    prepared: Mapping[tuple[str, str], Prepared], config: Config
) -> dict[tuple[str, str], dict[str, Any]]:
    """Latency and peak memory of everything that was prepared, by (model, backend)."""
    with tqdm(total=config.warmup + config.rounds, desc="measure", leave=False, dynamic_ncols=True) as bar:
        times = measure_latency(prepared, rounds=config.rounds, warmup=config.warmup, progress=bar.update)
    return {
        key: summarise(times[key], config.batch) | {"peak_memory_bytes": peak_memory(work)}
        for key, work in prepared.items()
    }


def format_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each model and backend."""
    rows = [
        {
            "run": run,
            "params": quantity(report["parameters"]),
            "FLOPs": quantity(report["flops"]),
            "backend": backend,
            "median ms": significant(values["median_ms"]),
            "p95 ms": significant(values["p95_ms"]),
            "images/s": significant(values["images_per_second"]),
            "peak memory": f"{significant(values['peak_memory_bytes'] / 2**20)} MiB",
        }
        for run, report in reports.items()
        for backend, values in report["backends"].items()
    ]
    return table(rows)


if __name__ == "__main__":
    run_script(main, Config, runs="runs")
