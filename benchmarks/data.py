"""How fast training samples come from source files and from packed ones: python benchmarks/data.py [key=value …]

Scenes of streets are written as PNG pairs of Cityscapes' size and layout and as JPEG pairs of BDD100K's, then
packed as raw pixels and as JPEGs. Measured are: batches of random crops on one core, finished there or handed over
as bytes; a loader of so many workers; JPEGs that are decoded at reduced size; and the share of its time that a
training of the demo's student waits for data.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate.utils import tqdm
from common import publish  # which puts the project before this folder, where data is this file

from data import DataConfig, SegmentationData, build_dataset
from data.build import find_files
from data.packed import write_pack
from data.streets.write import write_bdd100k, write_cityscapes
from engine.config import run_script
from errors import MachineError
from evaluation.report import significant, table

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"cityscapes": "2048×1024 PNG", "bdd100k": "1280×720 JPEG"}
GOAL = {"cityscapes": 5.0, "bdd100k": 2.0}
GOAL_WAITING = 0.05
FORMS = ("source", "packed raw", "packed jpeg")


@dataclass
class Config:
    """What benchmarks/data.py can be told."""

    images: int = 24
    """Scenes of each source."""
    crop: list[int] = field(default_factory=lambda: [512, 1024])
    """[height, width] of the crops, drawn by the usual augmentation."""
    batch: int = 8
    """Images of a batch."""
    rounds: int = 15
    """Timed rounds; in each, every way of reading makes one batch."""
    warmup: int = 2
    """Rounds before them that are not counted."""
    reduced_size: list[int] = field(default_factory=lambda: [360, 640])
    """data.size of the JPEGs that are decoded at reduced size."""
    workers: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Numbers of workers of the loaders."""
    loader_batches: int = 24
    """Batches that are taken from each loader; the first quarter of them is not counted."""
    target: float = 400.0
    """Images a second that a GPU's training takes: assumed is a student of 0.5 M parameters in bf16."""
    steps: int = 160
    """Steps of the demo's student; the waiting in the first quarter of them is not counted."""
    output: str = "results/data.md"
    """Where the tables are written."""


def write_sources(config: Config, folder: Path) -> dict[str, DataConfig]:
    """The two sources and their packs; the configuration of each source by name."""
    write_cityscapes(folder / "cityscapes", scenes={"train": config.images}, size=(1024, 2048))
    write_bdd100k(folder / "bdd100k", scenes={"train": config.images}, size=(720, 1280))
    sources = {}
    for name in NAMES:
        sources[name] = DataConfig(name=name, root=str(folder / name), crop=config.crop)  # type: ignore[arg-type]
        for form in ("raw", "jpeg"):
            write_pack(replace(sources[name], packed_form=form), "train", workers=1, say=lambda line: None)
    return sources


def read_as(source: DataConfig, form: str, **changed: Any) -> SegmentationData:
    packed_form = "jpeg" if form == "packed jpeg" else "raw"
    return build_dataset(replace(source, packed=form != "source", packed_form=packed_form, **changed), "train")


def batches(data: SegmentationData, size: int, *, finished: bool) -> Callable[[], Any]:
    """Makes the next batch at each call."""
    numbers = count()

    def one() -> Any:
        first = next(numbers) * size
        keys: Any = [(0, position, position % len(data)) for position in range(first, first + size)]
        return data.batch(keys, seed=0, finished=finished)

    return one


def measure(parts: dict[str, Callable[[], Any]], config: Config, what: str) -> dict[str, list[float]]:
    """Seconds of this process's own time in each round; what else the machine does does not count."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in tqdm(range(config.warmup + config.rounds), desc=what, unit="round", dynamic_ncols=True):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if number >= config.warmup:
                times[name].append(time.process_time() - start)
    return times


def rows_of(times: dict[str, list[float]], batch: int, against: str) -> list[dict[str, str]]:
    return [
        {
            "form": name,
            "ms an image": significant(1000 * statistics.median(values) / batch),
            "images/s": significant(batch / statistics.median(values)),
            f"of {against}": f"{ratio(times, name, against):.2f}",
        }
        for name, values in times.items()
    ]


def ratio(times: dict[str, list[float]], name: str, against: str) -> float:
    """How many times the images a second of another, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[against], times[name], strict=True))


def measure_loader(data: SegmentationData, config: Config, workers: int) -> float:
    """Images a second by the clock."""
    given = {"batch_size": config.batch, "seed": 0, "start_step": 0, "steps": config.loader_batches}
    first = config.loader_batches // 4
    for number, _ in enumerate(data.train_loader(**given, workers=workers)):  # type: ignore[arg-type]
        if number + 1 == first:
            start = time.perf_counter()
    return (config.loader_batches - first) * config.batch / (time.perf_counter() - start)


def measure_waiting(config: Config, folder: Path, workers: int, steps: int) -> dict[str, float]:
    """Share of its time that a training waits, and its images a second, after the first quarter of its steps."""
    run, every = folder / f"demo_{workers}_{steps}", max(1, steps // 4)
    command = [sys.executable, "train_teacher.py", "configs/demo_baseline.yaml", f"run_dir={run}"]
    command += [f"train.steps={steps}", "train.evaluate_every=0", f"train.log_every={every}"]
    command += [f"data.workers={workers}", "train.threads=1"]
    environment = os.environ | {"SEGDISTILL_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"train_teacher.py: {done.stderr.splitlines()[-1]}; run it by itself")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = [line["system"] for line in lines if line["split"] == "train"][1:]
    return {name: statistics.mean(one[name] for one in said) for name in ("waiting", "images_per_second")}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_sources(config, folder)
        times, sizes = {}, []
        for source, given in sources.items():
            parts = {}
            for form in FORMS:
                data = read_as(given, form)
                parts[form] = batches(data, config.batch, finished=True)
                parts[f"{form}, as bytes"] = batches(data, config.batch, finished=False)
            times[source] = measure(parts, config, NAMES[source])
            files = {"source": [path for pair in find_files(given, "train").pairs for path in pair[1:]]}
            files |= {
                f"packed {form}": list(folder.glob(f"{source}/packed/*_{form}/*")) for form in ("raw", "jpeg")
            }
            sizes.append(
                {"files": NAMES[source]}
                | {
                    form: f"{sum(path.stat().st_size for path in paths) / config.images / 1e6:.2f} MB"
                    for form, paths in files.items()
                }
            )
        small = replace(sources["bdd100k"], size=config.reduced_size, crop=None)
        reduced = {
            what: batches(build_dataset(replace(small, **changed), "train"), config.batch, finished=False)
            for what, changed in {"decoded whole": {}, "reduced decoding": {"reduced_decoding": True}}.items()
        }
        reduced_times = measure(reduced, config, "reduced decoding")
        loaders = []
        for source, given in sources.items():
            for form, finish in (("source", False), ("packed raw", False), ("packed raw", True)):
                data = read_as(given, form, finish_on_device=finish)
                row = {"files": NAMES[source], "form": form + (", as bytes" if finish else "")}
                for workers in config.workers:
                    row[f"workers {workers}"] = significant(measure_loader(data, config, workers))
                loaders.append(row)
        measure_waiting(config, folder, 0, 4)  # counts the labels, for which it draws all scenes
        waits = {workers: measure_waiting(config, folder, workers, config.steps) for workers in (0, 1)}

    waiting = [
        {
            "workers": str(workers),
            "waiting": f"{100 * one['waiting']:.1f} %",
            "images/s": significant(one["images_per_second"]),
        }
        for workers, one in waits.items()
    ]
    goals = []
    for source, goal in GOAL.items():
        for form, against in (("packed raw", "source"), ("packed raw, as bytes", "source, as bytes")):
            found = ratio(times[source], form, against)
            reached = "reached" if found >= goal else "missed"
            goals.append(f"- {NAMES[source]}, {form} against {against}: {found:.2f}; goal {goal:g}: {reached}.")
    share = waits[1]["waiting"]
    reached = "reached" if share < GOAL_WAITING else "missed"
    goals.append(
        f"- Waiting with one worker: {100 * share:.1f} %; goal below {100 * GOAL_WAITING:g} %: {reached}."
    )
    for source in GOAL:
        speed = config.batch / statistics.median(times[source]["packed raw, as bytes"])
        goals.append(
            f"- {NAMES[source]}, packed raw, as bytes: {significant(speed)} images/s a core; the target of "
            f"{config.target:g} images/s a GPU takes {math.ceil(config.target / speed)} core(s)."
        )
    tables = "\n\n".join(
        f"{NAMES[source]}, images a second of one core's time:\n\n{table(rows_of(found, config.batch, 'source'))}"
        for source, found in times.items()
    )
    crop = "×".join(str(side) for side in config.crop)
    text = f"""# Reading training data

{config.images} drawn scenes of each size; batches of {config.batch} crops of {crop} by the usual augmentation
(scaled by 0.5 to 2, mirrored, jittered, some blurred); {config.rounds} rounds in which all took turns, ratios are
medians over them. The files are in the page cache. "As bytes" is `data.finish_on_device=true`: colours and
normalisation are left to the device. Drawn scenes compress better than photographs, so real PNGs take longer to
decode.

{tables}

Bytes an image with its label:

{table(sizes)}

1280×720 JPEGs at `data.size={config.reduced_size}`, not cropped, as bytes:

{table(rows_of(reduced_times, config.batch, "decoded whole"))}

Images a second by the clock, of `train_loader` and with nothing else to do:

{table(loaders)}

Of its time, a training of the demo's student (`configs/demo_baseline.yaml`, one thread, {config.steps} steps less
the first quarter; the first 75 draw the scenes) waits for data:

{table(waiting)}

{chr(10).join(goals)}

The target is an assumption: what one GPU of the H100's class may train a UNet of 0.5 M parameters on, in bf16.
"""
    publish(text, config.output)


if __name__ == "__main__":
    run_script(main, Config)
