"""Time and memory of every loss, forward and backward: python benchmarks/losses.py [only=[kd]] [key=value …]

Three tables, by default at sizes at which public implementations are used: all losses, each beside the form in
which its formula is commonly written (benchmarks/straightforward.py); cross-entropy with KD from logits at
stride 4, beside plain PyTorch and what torch.compile makes of that; affinity on maps that grow.

Time: median of rounds in which the forms of a loss take turns, in one process. Memory: each form in a process of
its own, the growth of the peak resident memory (VmHWM) over its inputs, and the peak of what PyTorch allocated.
"""

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from accelerate.utils import tqdm
from common import measure_memory, print_memory, publish
from straightforward import FORMS, VOID, Answer, Problem
from torch import Tensor

from deploy.profiling import measure_latency
from engine.config import run_script
from errors import ConfigurationError
from evaluation.report import significant, table
from losses import DistillationLoss, LossConfig
from losses.contrast import Queue
from losses.distillation import TERMS
from losses.relations import affinity
from losses.term import term_name
from losses.upsampled import upsampled_loss
from models.interface import Tap

CONFIGS = {term_name(config): config for config in TERMS}
TAP, LAST = "map", "last"  # what features are compared, and what the classifier sees
OPTIONS: dict[str, dict[str, Any]] = {"affinity": {"space": "raw"}}  # where the default has no plain form
KERNEL, GROWTH = "upsampling", "growth"  # the other two tables, in `only`
KERNEL_FORMS = ("blocks", "eager", "compile")
GOALS = {"eager": (2.5, 10.0), "compile": (1.0, 3.0)}  # how much faster and smaller the blocks should be
GROWTH_CHANNELS = (128, 256)


@dataclass
class Config:
    """What benchmarks/losses.py can be told."""

    batch: int = 2
    """Images."""
    labels: list[int] = field(default_factory=lambda: [512, 1024])
    """[height, width] of the labels."""
    classes: int = 19
    """Classes."""
    stride: int = 8
    """Stride of both models' logits in the first table."""
    kernel_stride: int = 4
    """Stride of both models' logits in the second."""
    features: list[int] = field(default_factory=lambda: [45, 60])
    """[height, width] of the feature maps of the first table."""
    channels: int = 512
    """Channels of both models' feature maps in the first table."""
    heights: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Heights of the maps of the third table, twice as wide."""
    rounds: int = 5
    """Timed rounds."""
    threads: int = 2
    """CPU threads."""
    only: list[str] = field(default_factory=list)
    """Keys under `losses`, or upsampling and growth for the other two tables; empty: everything."""
    output: str = "results/losses.md"
    """Where the tables are written."""
    memory_of: str = ""
    """Measures the memory of one form alone and prints it as JSON: what the benchmark runs."""

    def __post_init__(self) -> None:
        known = [*CONFIGS, KERNEL, GROWTH]
        if set(self.only) - set(known):
            raise ConfigurationError(f"only: there are {', '.join(known)}; name some of them")

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only


SMALL = {"labels": [32, 64], "features": [4, 6], "heights": [4, 8, 16]}  # to load the libraries


@dataclass
class Work:
    """One form of a loss on its inputs, adapters among them; calling it is a forward and a backward pass."""

    form: Callable[[], Tensor]
    inputs: list[Tensor]

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        """The value, and the gradients with respect to those of the inputs that it depends on."""
        torch.manual_seed(0)
        value = self.form()
        found = torch.autograd.grad(value, self.inputs, allow_unused=True)
        return value.detach(), [torch.zeros(()) if x is None else x for x in found]


def prepare(config: Config, name: str) -> Work:
    """The work of that name: LOSS.ours, LOSS.plain, upsampling.FORM, growth.NUMBER."""
    torch.manual_seed(0)
    loss, _, form = name.partition(".")
    if loss == KERNEL:
        return prepare_kernel(config, form)
    if loss == GROWTH:
        height, (ours, theirs) = config.heights[int(form)], GROWTH_CHANNELS
        student = torch.randn(1, ours, height, 2 * height).requires_grad_()
        teacher = torch.randn(1, theirs, height, 2 * height)
        return Work(lambda: affinity(student, teacher), [student])
    problem = make_problem(config, loss)
    adapters = [x for x in problem.objective.parameters() if x.requires_grad]
    inputs = [problem.student.logits, *problem.student.features.values(), *adapters]
    if form == "plain":
        return Work(lambda: FORMS[loss](problem), inputs)
    student, teacher = problem.student, problem.teacher
    return Work(lambda: problem.objective(student, teacher, problem.labels, images=problem.images)[0], inputs)


def make_labels(config: Config) -> Tensor:
    """Rectangles of classes, an eighth of them void."""
    coarse = torch.randint(config.classes, (config.batch, 1, 16, 32))
    coarse[torch.rand(coarse.shape) < 0.125] = VOID
    return F.interpolate(coarse.float(), config.labels, mode="nearest")[:, 0].long()


def make_logits(config: Config, stride: int) -> Tensor:
    height, width = (-(-size // stride) for size in config.labels)
    return 3 * torch.randn(config.batch, config.classes, height, width)


def make_problem(config: Config, name: str) -> Problem:
    """Random logits and features after a ReLU, and the objective that has one loss with its published options."""
    names = {key.name for key in fields(CONFIGS[name])}
    default = CONFIGS[name]()
    options = dict(OPTIONS.get(name, {}))
    if "taps" in names and default.taps != ["logits"]:
        options["taps"] = [TAP]
    made = CONFIGS[name](weight=1.0, **options)
    losses: dict[str, Any] = {"cross_entropy": None, name: made}
    taps = dict.fromkeys((TAP, LAST), Tap(config.channels, config.stride))
    objective = DistillationLoss(LossConfig(**losses), taps, taps, classes=config.classes)
    for memory in objective.modules():
        if isinstance(memory, Queue):  # full, as it is for most of a training
            memory.keys.normal_(std=memory.keys.shape[2] ** -0.5)
            memory.filled.fill_(memory.keys.shape[1])

    def answer() -> Answer:
        wanted = dict.fromkeys([TAP, *objective.student_taps])
        features = {tap: torch.randn(config.batch, config.channels, *config.features).relu() for tap in wanted}
        return Answer(make_logits(config, config.stride), features)

    student, teacher = answer(), answer()
    for tensor in (student.logits, *student.features.values()):
        tensor.requires_grad_()
    images = torch.randn(config.batch, 3, *config.labels)
    return Problem(objective, made, TAP, student, teacher, make_labels(config), images)


def prepare_kernel(config: Config, form: str) -> Work:
    student, teacher = make_logits(config, config.kernel_stride), make_logits(config, config.kernel_stride)
    student, labels = student.requires_grad_(), make_labels(config)
    if form == "blocks":
        return Work(lambda: upsampled_loss(student, labels, teacher, kl_weight=1.0)[0], [student])
    function = torch.compile(eager, dynamic=False) if form == "compile" else eager
    return Work(lambda: function(student, teacher, labels), [student])


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and KD of both models' logits, upsampled to the labels."""
    ours, theirs = (
        F.interpolate(x, labels.shape[-2:], mode="bilinear", align_corners=False) for x in (student, teacher)
    )
    pixels = F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), reduction="none", log_target=True).sum(1)
    labelled = labels != VOID
    return F.cross_entropy(ours, labels, ignore_index=VOID) + (pixels * labelled).sum() / labelled.sum()


@dataclass
class Measured:
    """Of one form: median milliseconds, bytes."""

    ms: float
    resident: int
    allocated: int

    def cells(self) -> dict[str, str]:
        return {
            "ms": significant(self.ms),
            "resident MiB": significant(self.resident / 2**20),
            "allocated MiB": significant(self.allocated / 2**20),
        }


def measure(config: Config, works: dict[str, Work]) -> dict[str, Measured]:
    """Time and memory of forms that take turns."""
    times = measure_latency(works, rounds=config.rounds, warmup=1)
    memory = {name: measure_memory(name) for name in works}
    return {name: Measured(statistics.median(times[name]), **memory[name]) for name in works}


def difference(found: list[Tensor], expected: list[Tensor]) -> str:
    """`‖found - expected‖ / ‖expected‖`, of all tensors together."""
    pairs = [(x.double(), y.double()) for x, y in zip(found, expected, strict=True)]
    different = sum(float((x - y).square().sum()) for x, y in pairs)
    return f"{(different / max(sum(float(y.square().sum()) for _, y in pairs), 1e-300)) ** 0.5:.0e}"


def losses_table(config: Config) -> str:
    rows = []
    for loss in tqdm([name for name in CONFIGS if config.wants(name)], unit="loss", dynamic_ncols=True):
        works = {name: prepare(config, name) for name in (f"{loss}.ours", f"{loss}.plain")[: 1 + (loss in FORMS)]}
        found = measure(config, works)
        ours = found[f"{loss}.ours"]
        row = {"loss": loss, **ours.cells()}
        if loss in FORMS:
            plain = found[f"{loss}.plain"]
            row |= {f"plain {key}": value for key, value in plain.cells().items()}
            row["faster"] = f"{significant(plain.ms / ours.ms)} ×"
            row["smaller"] = f"{significant(plain.resident / ours.resident)} ×"
            (value, gradient), (plain_value, plain_gradient) = (work() for work in works.values())
            row["value"] = difference([value], [plain_value])
            row["gradient"] = difference(gradient, plain_gradient)
        rows.append(row)
    height, width = config.labels
    return f"""## Every loss

Batch {config.batch}; {config.classes} classes, logits at stride {config.stride}, labels {height}×{width}; features
of {config.features[0]}×{config.features[1]} with {config.channels} channels for student and teacher. Plain: the \
same formula as it is
commonly written; a dash where it would be written as it is here. Smaller: of the resident memory. Value and
gradient: relative difference from the plain form, both in float32.

{table(rows)}
"""


def kernel_table(config: Config) -> str:
    compiler = torch._inductor.config.cpp.cxx[-1]
    forms = [form for form in KERNEL_FORMS if form != "compile" or shutil.which(compiler)]
    works = {f"{KERNEL}.{form}": prepare(config, f"{KERNEL}.{form}") for form in forms}
    found = measure(config, works)
    value, gradient = exact_kernel(config)
    rows, goals, ours = [], [], found[f"{KERNEL}.blocks"]
    for form in forms:
        one, (one_value, one_gradient) = found[f"{KERNEL}.{form}"], works[f"{KERNEL}.{form}"]()
        differences = {
            "value": difference([one_value], [value]),
            "gradient": difference(one_gradient, gradient),
        }
        rows.append({"form": form, **one.cells(), **differences})
        if form in GOALS:
            faster, smaller = one.ms / ours.ms, min(one.resident / ours.resident, one.allocated / ours.allocated)
            reached = faster >= GOALS[form][0] and smaller >= GOALS[form][1]
            goals.append(
                f"Against {form}: {significant(faster)} × as fast (goal {GOALS[form][0]:g}), "
                f"1/{significant(smaller)} of the memory (goal 1/{GOALS[form][1]:g}), the worse of both counts: "
                f"{'reached' if reached else 'missed'}."
            )
    missing = "" if "compile" in forms else f"\nThere is no C++ compiler ({compiler}) for torch.compile.\n"
    height, width = config.labels
    return f"""## Cross-entropy and KD from stride {config.kernel_stride}

Batch {config.batch}, {config.classes} classes, labels {height}×{width}: \
`losses.upsampled.upsampled_loss` by
blocks of rows, the plain form, and `torch.compile` of it. Value and gradient: relative difference from the plain
form in float64.

{table(rows)}
{missing}
{chr(10).join(goals)}
"""


def exact_kernel(config: Config) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of the plain form in float64."""
    torch.manual_seed(0)
    student, teacher = (make_logits(config, config.kernel_stride).double() for _ in "st")
    student.requires_grad_()
    labels = make_labels(config)
    return Work(lambda: eager(student, teacher, labels), [student])()


def growth_table(config: Config) -> str:
    rows, per_position = [], []
    for number, height in enumerate(config.heights):
        name = f"{GROWTH}.{number}"
        found = measure(config, {name: prepare(config, name)})[name]
        per_position.append(found.ms / (2 * height**2))
        rows.append(
            {
                "map": f"{height}×{2 * height}",
                "positions": 2 * height**2,
                **found.cells(),
                "µs a position": significant(1000 * per_position[-1]),
            }
        )
    return f"""## Affinity on maps that grow

One image, {GROWTH_CHANNELS[0]} student and {GROWTH_CHANNELS[1]} teacher channels.

{table(rows)}

The time a position differs by a factor of {significant(max(per_position) / min(per_position))} between the \
maps; a matrix of positions by
positions would make it grow with the positions.
"""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    if config.memory_of:
        name = config.memory_of
        small = (
            config if name == f"{KERNEL}.compile" else replace(config, **SMALL)
        )  # it compiles at its first call
        work = prepare(config, name)
        print_memory(work if small is config else prepare(small, name), work)
        return
    parts = ["# Time and memory of the losses\n"]
    parts.append(
        f"Forward and backward, float32; median of {config.rounds} rounds in which the forms took turns.\n"
    )
    if any(config.wants(name) for name in CONFIGS):
        parts.append(losses_table(config))
    for name, part in ((KERNEL, kernel_table), (GROWTH, growth_table)):
        if config.wants(name):
            parts.append(part(config))
    parts.append(
        "Resident: growth of the peak resident memory of a process that runs this form alone, over its inputs.\n"
        "Allocated: peak of what PyTorch allocated.\n"
    )
    publish("\n".join(parts), config.output)


if __name__ == "__main__":
    run_script(main, Config)
