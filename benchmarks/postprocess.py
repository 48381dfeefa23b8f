"""Time and memory of labels from native logits: python benchmarks/postprocess.py [RUN …] [key=value …]

`deploy.postprocess.native_argmax` beside upsampling all logits and taking the argmax, or the indices of the
maximum, which PyTorch finds faster; on random logits, and on those of trained runs, for the first validation image
of each, enlarged so that the logits have the stride of the row. The labels are compared pixel for pixel.

Time: median of rounds in which the forms take turns, in one process. Memory: each form in a process of its own,
the growth of the peak resident memory (VmHWM) over the logits, and the peak of what PyTorch allocated.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from common import measure_memory, print_memory, publish
from torch import Tensor

from data import build_dataset
from deploy.exported import normalise
from deploy.postprocess import native_argmax
from deploy.profiling import measure_latency
from engine.config import run_script
from errors import ConfigurationError
from evaluate import data_config
from evaluation.report import significant, table
from models import load_model

RANDOM = "random"
GOAL = 5.0  # times as fast as upsampling and argmax


@dataclass
class Config:
    """What benchmarks/postprocess.py can be told."""

    runs: list[str] = field(default_factory=list)
    """Run directories, whose logits are measured beside random ones; those among the arguments are added."""
    size: list[int] = field(default_factory=lambda: [1024, 2048])
    """[height, width] of the labels."""
    classes: int = 19
    """Classes of the random logits; a run has its own."""
    strides: list[int] = field(default_factory=lambda: [4, 8])
    """Strides of the logits."""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """CPU threads, each measured by itself."""
    rounds: int = 7
    """Timed rounds."""
    output: str = "results/postprocess.md"
    """Where the table is written."""
    memory_of: str = ""
    """Measures the memory of one form alone and prints it as JSON: what the benchmark runs."""

    def __post_init__(self) -> None:
        if not self.threads or not self.strides or min(*self.threads, *self.strides, self.rounds) < 1:
            raise ConfigurationError("threads, strides, rounds: give numbers of 1 or more, at least one of each")


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return upsample(logits, size).argmax(1)


def upsample_max(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return upsample(logits, size).max(1).indices


FORMS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "argmax": upsample_argmax,
    "max": upsample_max,
    "native": native_argmax,
}


def make_logits(source: str, stride: int, config: Config) -> Tensor:
    """Float32 [1, C, h, w] for labels of `size`: normally distributed, or a run's answer to an image."""
    height, width = config.size
    if source == RANDOM:
        torch.manual_seed(0)
        return 3 * torch.randn(1, config.classes, -(-height // stride), -(-width // stride))
    data_of_run = data_config(Path(source), "")
    image, _ = build_dataset(data_of_run, "val").read(0)
    model = load_model(source)
    model.take_images(data_of_run.mean, data_of_run.std)
    enlarged = cv2.resize(image, (width * model.stride // stride, height * model.stride // stride))
    with torch.no_grad():
        return model(torch.from_numpy(normalise(enlarged[None], data_of_run.mean, data_of_run.std))).logits


def measure(source: str, stride: int, threads: int, config: Config) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(threads)
    logits, (height, width) = make_logits(source, stride, config), config.size
    works = {name: partial(form, logits, (height, width)) for name, form in FORMS.items()}
    times = measure_latency(works, rounds=config.rounds, warmup=1)
    ms = {name: statistics.median(times[name]) for name in works}
    memory = {name: measure_memory(f"{name} {stride} {threads} {source}") for name in ("argmax", "native")}
    expected = works["argmax"]()
    different = sum(int((works[name]() != expected).sum()) for name in ("max", "native"))
    return {
        "logits": Path(source).name,
        "classes": logits.shape[1],
        "stride": stride,
        "threads": threads,
        "argmax ms": significant(ms["argmax"]),
        "max ms": significant(ms["max"]),
        "native ms": significant(ms["native"]),
        "faster than argmax": f"{significant(ms['argmax'] / ms['native'])} ×",
        "than max": f"{significant(ms['max'] / ms['native'])} ×",
        "argmax MiB": significant(memory["argmax"]["resident"] / 2**20),
        "native MiB": significant(memory["native"]["resident"] / 2**20),
        "native allocated MiB": significant(memory["native"]["allocated"] / 2**20),
        "different pixels": different,
        "ratio": ms["argmax"] / ms["native"],
    }


def main(config: Config) -> None:
    if config.memory_of:
        form, stride, threads, source = config.memory_of.split(" ", 3)
        torch.set_num_threads(int(threads))
        small = make_logits(RANDOM, 4, replace(config, size=[128, 256]))
        logits = make_logits(source, int(stride), config)
        print_memory(
            partial(FORMS[form], small, (128, 256)), partial(FORMS[form], logits, (config.size[0], config.size[1]))
        )
        return
    cases = [
        (source, stride, threads)
        for threads in config.threads
        for source in (RANDOM, *config.runs)
        for stride in config.strides
    ]
    rows = [measure(*case, config) for case in tqdm(cases, unit="case", dynamic_ncols=True)]
    slowest = min(row.pop("ratio") for row in rows)
    publish(
        f"""# Labels from native logits

Labels of {config.size[0]}×{config.size[1]}; median of {config.rounds} rounds in which the forms took turns. \
argmax: `F.interpolate` of all
logits and `argmax`; max: the same with the indices of `max`, which PyTorch finds faster; native:
`deploy.postprocess.native_argmax`.

{table(rows)}

At least {significant(slowest)} × as fast as upsampling and argmax (goal {GOAL:g}): \
{"reached" if slowest >= GOAL else "missed"}.

MiB: growth of the peak resident memory of a process that runs this form alone, over the logits. Allocated: peak of
what PyTorch allocated. Different: pixels whose labels are not those of upsampling and argmax.
""",
        config.output,
    )


if __name__ == "__main__":
    run_script(main, Config, runs="runs")
