"""What a loss term is: a sum over items divided by a denominator that depends on the labels alone."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError

IGNORE_INDEX = 255
UNLABELLED = 253  # of all pixels of an image that has no label, of which only a teacher can speak


class ModelOutput(Protocol):
    """What a term needs of a model's answer."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def features(self) -> Mapping[str, Tensor]: ...


class TapShape(Protocol):
    """What a term needs to know of a tap before it sees a tensor."""

    @property
    def channels(self) -> int: ...
    @property
    def stride(self) -> int: ...


Taps = Mapping[str, TapShape]

ClassWeighting = Literal["uniform", "inverse", "median", "enet", "effective"]


@dataclass
class Context:
    """What a term may need to know of the two models and of the data when it is built.

    Args:
        student: what the student publishes.
        teacher: what the teacher publishes; None where there is no teacher.
        classes: number of classes; 0 where it is not known.
        class_weights: the [C] weights of a scheme of `ClassWeighting`; None for "uniform".
        latents: the objective's `losses.latent.Latents`, of which a term may require a tap.
    """

    student: Taps
    teacher: Taps | None = None
    classes: int = 0
    class_weights: Callable[[str], Tensor | None] = lambda scheme: None
    latents: Any = None

    def taught(self, name: str) -> Taps:
        """The teacher's taps, for the term `name`, which can't be without one."""
        if self.teacher is None:
            raise ConfigurationError(
                f"losses.{name}: compares with a teacher, and there is none; leave it out, or use distill.py"
            )
        return self.teacher


@dataclass
class TermConfig:
    """Weight and schedule, which every term has."""

    weight: float = 1.0
    """Factor of the term in the total loss."""
    start: Union[int, float] = 0  # noqa: UP007 (OmegaConf tells 5 from 0.5 by it)
    """First step of the term: an integer is steps, a float a fraction of training."""
    until: Union[int, float, None] = None  # noqa: UP007
    """Step at which the term ends (exclusive), likewise; null: never."""
    ramp: Union[int, float] = 0  # noqa: UP007
    """Steps, or fraction of training, over which the weight rises linearly from 0 after `start`."""

    def __post_init__(self) -> None:
        name = term_name(type(self))
        for key in ("start", "until", "ramp"):
            value = getattr(self, key)
            if value is not None and not (0 <= value <= 1 if isinstance(value, float) else value >= 0):
                raise ConfigurationError(
                    f"losses.{name}.{key}: {value} is out of range; "
                    "give steps as an integer from 0 or a fraction of training as a float from 0.0 to 1.0"
                )
        if self.until is not None and type(self.until) is type(self.start) and self.until <= self.start:
            raise ConfigurationError(f"losses.{name}.until: {self.until} is not after start {self.start}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigurationError(f"losses.{name}.weight: {self.weight} is not a weight; give 0 or more")

    def factor(self, step: int, total_steps: int) -> float:
        """The weight in force at `step` (from 0) of `total_steps`; 0 outside the term's window."""
        start, until, ramp = self.steps(total_steps)
        if step < start or step >= until:
            return 0.0
        return self.weight * min(1.0, (step - start + 1) / (ramp + 1))

    def steps(self, total_steps: int) -> tuple[int, float, int]:
        """First step, the step at which it ends, and length of the ramp."""

        def in_steps(value: int | float) -> int:
            return value if isinstance(value, int) else round(value * total_steps)

        until = math.inf if self.until is None else in_steps(self.until)
        return in_steps(self.start), until, in_steps(self.ramp)

    def window(self, total_steps: int) -> str:
        """The window for people; nothing where it is all of the training."""
        start, until, ramp = self.steps(total_steps)
        if not start and not ramp and until >= total_steps:
            return ""
        shown = f", steps {start} to {min(until, total_steps)} of {total_steps}"
        return shown + (f", ramp {ramp}" if ramp else "")


@dataclass
class TemperatureConfig(TermConfig):
    """A term that compares softened distributions."""

    temperature: float = 1.0
    """T: softens both distributions; the loss keeps its T²."""
    temperature_until: float | None = None
    """T at the end of the term's window, to which it changes linearly; null: it stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("temperature", "temperature_until"):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigurationError(
                    f"losses.{term_name(type(self))}.{key}: {value} is not positive; give say 1.0"
                )

    def temperature_at(self, step: int, total_steps: int) -> float:
        """T at `step` (from 0): `temperature` at the window's first step, `temperature_until` at its last.

        Annealed or rising by the step alone, after Jafari et al. 2021 (Annealing Knowledge Distillation), who go
        from a high temperature to 1. They divide the teacher's logits alone and compare by squared differences;
        here each term stays what it is.
        """
        if self.temperature_until is None:
            return self.temperature
        start, until, _ = self.steps(total_steps)
        last = min(until, total_steps) - 1
        share = min(max((step - start) / max(last - start, 1), 0.0), 1.0)
        return self.temperature + share * (self.temperature_until - self.temperature)


@dataclass
class TapsConfig(TermConfig):
    """A term that compares feature maps at one or several depths."""

    taps: list[str] = field(default_factory=lambda: ["bottleneck"])
    """Where to compare: `encoder`, `bottleneck`, `decoder`, `last`, a tap, or `student_tap:teacher_tap`."""
    depth: Literal["together", "deep_to_shallow", "shallow_to_deep"] = "together"
    """All taps at each step, or one after the other by depth, each for an equal share of the term's window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taps(term_name(type(self)), self.taps)


@dataclass
class FeatureTermConfig(TapsConfig):
    """One that takes the whole map unless it is told otherwise."""

    labelled_only: bool = False
    """Leave out positions without a label, which the paper does not."""


def check_taps(name: str, taps: list[str]) -> None:
    """Raises ConfigurationError if a list of taps is empty, holds one twice or what is no tap."""
    if not taps:
        raise ConfigurationError(f"losses.{name}.taps: empty; name at least one tap")
    for tap in taps:
        if not isinstance(tap, str) or not re.fullmatch(r"[^\s:]+(:[^\s:]+)?", tap):
            raise ConfigurationError(
                f"losses.{name}.taps: {str(tap)!r} is no tap; write tap or student_tap:teacher_tap, without blanks"
            )
        if taps.count(tap) > 1:
            raise ConfigurationError(f"losses.{name}.taps: {tap} is there twice; name it once")


def term_name(config: type) -> str:
    """The key under `losses`: `kd` of `KDConfig`, `cirkd_memory` of `CIRKDMemoryConfig`."""
    words = r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    return re.sub(words, "_", config.__name__.removesuffix("Config")).lower()


class Term(nn.Module):
    """A configurable loss, made by `Term(config, context)`.

    `forward(student, teacher, labels, denominator)` is a sum over items divided by `denominator`, which is
    `count(labels)` added up over the accumulated parts and the processes of a step, so that the gradient is
    that of the whole batch however it is split. A term that sees `images` too has `wants_images` and takes them
    as a keyword.
    """

    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    taught = True  # it compares with a teacher; where no term in force does, none is asked
    true_logits = False  # less a number of each position's own, the teacher's logits would give another value
    wants_images = False

    def count(self, labels: Tensor) -> Tensor:
        """Local denominator, float64 scalar. Here the number of images; pixel terms count labelled pixels."""
        return labels.new_full((), len(labels), dtype=torch.float64)

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not answer forward")

    def opponent(self, config: Any, total_steps: int) -> nn.Module | None:
        """A learner that works against the student, with an optimizer of its own; most terms have none."""
        return None

    def memories(self) -> list[str]:
        """Names of buffers that all processes write alike, as queues are."""
        return []

    def note(self) -> str:
        """What the list of active terms should say besides weight, window, taps and parameters."""
        return ""


def pair_taps(
    name: str, taps: Sequence[str], context: Context, not_coarser: bool = False
) -> list[tuple[str, str]]:
    """Splits `tap` and `student:teacher` into pairs and checks that both models have them.

    Args:
        not_coarser: see auto_taps.

    Raises:
        ConfigurationError: naming the key and the taps there are.
    """
    teacher = context.taught(name)
    pairs = []
    for tap in taps:
        if tap in AUTO_TAPS:
            pairs += auto_taps(name, tap, context.student, teacher, not_coarser)
            continue
        ours, _, theirs = tap.partition(":")
        theirs = theirs or ours
        for side, wanted, known in (("student", ours, context.student), ("teacher", theirs, teacher)):
            if wanted not in known:
                raise ConfigurationError(
                    f"losses.{name}.taps: the {side} has no tap {wanted!r}; name some of {', '.join(known)}, "
                    f"or {', '.join(AUTO_TAPS)}, which stand for pairs of them"
                )
        pairs.append((ours, theirs))
    return list(dict.fromkeys(pairs))


AUTO_TAPS = ("encoder", "bottleneck", "decoder", "last")


def auto_taps(
    name: str, part: str, student: Taps, teacher: Taps, not_coarser: bool = False
) -> list[tuple[str, str]]:
    """The pairs of a part of two models, by stride and depth, whatever the models are.

    - `encoder`, `decoder`: as many pairs as the model with fewer taps there has, in the order of depth, no tap
      twice, so that the strides differ least; of two equal choices the one at the same relative depth, and a
      teacher's map rather finer than coarser.
    - `bottleneck`: the bottlenecks; for a term that can't take a teacher's map coarser than the student's
      (`not_coarser`), the deepest of the teacher's encoder that is not, if its bottleneck is.
    - `last`: what the two classifiers see.

    A model without a decoder classifies its bottleneck, which then stands for its decoder.

    Raises:
        ConfigurationError: a model has no tap there.
    """

    def taps_of(model: Taps, part: str) -> list[str]:
        found = [tap for tap in model if tap.partition(".")[0] == part]
        return found or (taps_of(model, "bottleneck") if part == "decoder" else [])

    wanted = "decoder" if part == "last" else part
    ours, theirs = taps_of(student, wanted), taps_of(teacher, wanted)
    for side, found, model in (("student", ours, student), ("teacher", theirs, teacher)):
        if not found:
            raise ConfigurationError(
                f"losses.{name}.taps: the {side} has no tap in its {wanted}; name some of {', '.join(model)}"
            )
    if part == "last":
        return [(ours[-1], theirs[-1])]
    if part == "bottleneck" and not_coarser and teacher[theirs[0]].stride > student[ours[0]].stride:
        stride = student[ours[0]].stride
        theirs = [tap for tap in taps_of(teacher, "encoder") if teacher[tap].stride <= stride][-1:] or theirs

    def cost(pairs: list[tuple[int, int]]) -> float:
        total = 0.0
        for i, j in pairs:
            octaves = math.log2(student[ours[i]].stride / teacher[theirs[j]].stride)
            depths = (i + 0.5) / len(ours) - (j + 0.5) / len(theirs)
            total += abs(octaves) + 0.1 * (octaves < 0) + 0.01 * abs(depths)
        return total

    count = min(len(ours), len(theirs))
    choices = (
        list(zip(some, others, strict=True))
        for some in itertools.combinations(range(len(ours)), count)
        for others in itertools.combinations(range(len(theirs)), count)
    )
    return [(ours[i], theirs[j]) for i, j in min(choices, key=cost)]


def deepest_first(taps: Sequence[str], model: Taps) -> list[str]:
    """Taps of a model in the order of depth: the coarsest first, and of one stride the nearest to the bottleneck.

    Depth is what lies between a place and both ends of the network: in a UNet the bottleneck is the deepest, and
    the encoder's and the decoder's taps follow in turn, from the coarse to the fine (the encoder's before the
    decoder's of the same stride). Nearness is counted in the order in which the model publishes its taps; without
    a bottleneck the last of its coarsest taps stands for it. What is no tap of the model, its logits say, is the
    shallowest.
    """
    places = {tap: place for place, tap in enumerate(model)}
    coarsest = max(model, key=lambda tap: (model[tap].stride, places[tap]))
    neck = places.get("bottleneck", places[coarsest])

    def height(tap: str) -> tuple[int, ...]:
        return (-model[tap].stride, abs(places[tap] - neck), places[tap]) if tap in places else (0,)

    return sorted(taps, key=height)


def mask_of(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Boolean [B, h, w], True where labelled, reduced to feature size by nearest neighbour."""
    labelled = (labels != IGNORE_INDEX)[:, None].float()
    return F.interpolate(labelled, size=size, mode="nearest")[:, 0].bool()


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Brings a map [B, D, H, W] to another resolution: by area where it shrinks, else bilinearly."""
    if features.shape[-2:] == torch.Size(size):
        return features
    if features.shape[-2] >= size[0] and features.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def full_precision(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that survives a batch of one 1×1 map, by its running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)
