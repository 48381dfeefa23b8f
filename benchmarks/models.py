"""What the architectures cost, as docs/models.md: python benchmarks/models.py [only=[unet,dabnet]] [key=value …]

Parameters, FLOPs, stride, taps, and the latency of the eager forward pass of one image: median of rounds in which
the models take turns, the slow ones among themselves in fewer rounds.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import tqdm
from common import publish

from deploy.profiling import count_flops, count_parameters, measure_latency, prepare
from engine.config import run_script
from errors import ConfigurationError
from evaluation.report import quantity, significant, table
from models import ModelConfig, SegmentationModel, build_model

SHAPES: dict[str, list[dict[str, Any]]] = {
    "unet": [
        {"width": 16},
        {"width": 32},
        {"width": 48},
        {"width": 32, "block": "separable"},
        {"width": 32, "block": "inverted"},
        {"width": 32, "block": "residual"},
        {"width": 32, "depth": 4, "stride": 16},
        {"max_parameters": 1_000_000},
    ],
    "dabnet": [{}],
    "mobilenetv2": [{"multiplier": 0.35}, {"multiplier": 0.5}, {}, {"output_stride": 16}],
    "deeplabv3plus": [
        {"encoder": "mobilenetv2"},
        {"encoder": "resnet18"},
        {"encoder": "resnet50"},
        {"encoder": "resnet50", "output_stride": 8},
        {"encoder": "resnet101"},
        {"encoder": "convnext_tiny"},
    ],
    "segformer": [{"variant": f"b{number}"} for number in range(6)],
}

HEAD = """# The models

What the architectures are for, what they call their maps, and what they cost. `model.…` is a key of
`train_teacher.py` and `profile_latency.py`, `student.…` the same of `distill.py`; `--help` lists them all.
Sources, and where a model departs from its paper or its authors' code, stand in the docstrings of `models/`.

**What each is for.**

- `unet`: the default, a student of any size, trained from scratch; wide, it is a teacher too.
- `dabnet`: the published compact real-time design, 0.76 M parameters, logits at stride 8: a student that others
  can compare with.
- `mobilenetv2`: the student of phones and embedded boards, its width set by `multiplier`, logits at the stride of
  its last map.
- `deeplabv3plus`: the teacher of most distillation papers, on a ResNet, MobileNetV2 or ConvNeXt; the smaller
  encoders make middling models and assistants.
- `segformer`: the transformer, B0 for a student, B1 to B5 for teachers.
- `hub`: any segmentation model of Hugging Face transformers, as a teacher above all:
  `model.weights=FOLDER_OR_NAME`.

**How to choose.** A teacher should be the best model that you can run; begin its encoder from pretrained weights
(`model.weights=…`) where there are some, since from scratch on a small data set a large encoder loses to a small
one. It sees every batch of the training and nothing of the deployment. A student is chosen by what it may cost:
`student.max_parameters=500000` or `student.max_flops=2e9` makes the widest UNet that fits, and
`student.block=separable` or `inverted` buys width for parameters. A large stride is the cheapest way to be fast:
`student.stride=16` leaves out the decoder's finest and costliest levels; the logits are coarser, but the losses
upsample them exactly (`losses/upsampled.py`), and thin things suffer first. Parameters,
FLOPs and time do not agree: depthwise convolutions have few FLOPs and take long for them, so measure on the
machine that matters (`python profile_latency.py model.name=… size=[h,w]`).

**Words.** `encoder.0` … are the encoder's maps from fine to coarse, `bottleneck` is the coarsest context,
`decoder.0` … the decoder's maps in the order in which they run, the last of them what the classifier sees. Below,
64@8 is a map of 64 channels at stride 8: an image of H×W has there ceil(H / 8) × ceil(W / 8) positions. The stride
is that of the logits: no model upsamples them. FLOPs count a multiply-add as 2, of convolutions and matrix
products.

"""


@dataclass
class Config:
    """What benchmarks/models.py can be told."""

    size: list[int] = field(default_factory=lambda: [512, 1024])
    """[height, width] of the image."""
    classes: int = 19
    """Classes."""
    rounds: int = 11
    """Timed rounds."""
    slow_rounds: int = 3
    """Timed rounds of the models that are slow."""
    slow: float = 1e11
    """FLOPs from which a model is slow."""
    warmup: int = 1
    """Rounds before those that are timed, one more than the pass that prepares a model."""
    threads: int = 2
    """CPU threads."""
    only: list[str] = field(default_factory=list)
    """Architectures; empty: all."""
    output: str = "docs/models.md"
    """Where the page is written."""

    def __post_init__(self) -> None:
        if set(self.only) - set(SHAPES):
            raise ConfigurationError(f"only: there are {', '.join(SHAPES)}; name some of them")


@dataclass
class Names:
    """Class names without a data set."""

    names: tuple[str, ...]


@dataclass
class Row:
    """One model: what it is called on the command line, and what it costs."""

    name: str
    shape: str
    parameters: int
    flops: int
    stride: int
    taps: str


def measure(config: Config) -> list[tuple[Row, float]]:
    """Every model with the median of its milliseconds, from the fewest parameters to the most."""
    names = Names(tuple(f"class {number}" for number in range(config.classes)))
    images = torch.randn(1, 3, *config.size)
    passes, rows = {}, []
    wanted = [(name, shape) for name in config.only or SHAPES for shape in SHAPES[name]]
    for name, shape in tqdm(wanted, unit="model", dynamic_ncols=True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(**{"name": name} | shape), names)
        row = Row(
            name,
            " ".join(f"{key}={value}" for key, value in shape.items()),
            count_parameters(model),
            count_flops(model, config.size),
            model.stride,
            compact(model),
        )
        rows.append(row)
        passes[len(rows) - 1] = prepare(model, images, "eager")
    times: dict[int, list[float]] = {}
    for slow, rounds in ((False, config.rounds), (True, config.slow_rounds)):
        some = {number: run for number, run in passes.items() if (rows[number].flops >= config.slow) == slow}
        bar = tqdm(total=rounds + config.warmup, unit="round", dynamic_ncols=True)
        times |= measure_latency(some, rounds=rounds, warmup=config.warmup, progress=bar.update)
        bar.close()
    found = [(row, statistics.median(times[number])) for number, row in enumerate(rows)]
    return sorted(found, key=lambda pair: pair[0].parameters)


def compact(model: SegmentationModel) -> str:
    """The taps in short: encoder 16@4 32@8; bottleneck 64@16; decoder 32@8 16@4."""
    parts: dict[str, list[str]] = {}
    for name, tap in model.taps.items():
        parts.setdefault(name.partition(".")[0], []).append(f"{tap.channels}@{tap.stride}")
    return "; ".join(f"{part} {' '.join(maps)}" for part, maps in parts.items())


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    rows = [
        {
            "model": row.name,
            "shape": row.shape,
            "params": quantity(row.parameters),
            "FLOPs": quantity(row.flops),
            "ms": significant(ms),
            "stride": row.stride,
            "taps": row.taps,
        }
        for row, ms in measure(config)
    ]
    height, width = config.size
    cost = f"""## What they cost

One image of {height}×{width}, {config.classes} classes, float32, PyTorch's eager mode; median of {config.rounds} \
rounds in which the models took turns
({config.slow_rounds} for those from {quantity(config.slow)} FLOPs on). From the fewest parameters to the most.

{table(rows)}
"""
    publish(HEAD + cost, config.output)


if __name__ == "__main__":
    run_script(main, Config)
