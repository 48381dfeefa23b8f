"""Where a teacher's answers come from: frozen models beside the training, the learner itself, or its fellows."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError

Autocast = Callable[[], AbstractContextManager[Any]]


class Answer(NamedTuple):
    """What a teacher says of a batch."""

    logits: Tensor
    """[B, C, h, w] at any stride."""
    features: Mapping[str, Tensor]
    """[B, D, h, w] by tap."""


class Teacher(Protocol):
    """Answers a batch, of which it may see images, index and geometry, but never the labels."""

    def __call__(self, batch: Any, taps: Sequence[str]) -> Any: ...


@dataclass
class CacheConfig:
    """The cache of `teacher.source=cache`; see engine/cache.py."""

    folder: str = ""
    """Folder of the cache; empty: `cache` in the teacher's run."""
    storage: Literal["uint8", "float16"] = "uint8"
    """Form of the logits: steps of 0.1 below each pixel's highest in a byte, or float16."""
    shard: int = 16
    """Images that are written at a time."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ConfigurationError(f"teacher.cache.shard: {self.shard} is too small; give 1 image or more")


@dataclass
class TeacherConfig:
    """Which teacher, and where its answers come from."""

    run: str = ""
    """Run directory of the teacher, whose `best` weights are used, or folder of a model, ours or transformers'."""
    hub: str = ""
    """Name on the Hugging Face Hub, owner/name or owner/name@revision, in place of `run`."""
    runs: list[str] = field(default_factory=list)
    """Further teachers, each a run directory or a folder, whose answers are averaged with those of the first."""
    classes: dict[str, str] = field(default_factory=dict)
    """Our classes and what the teacher calls them, `{bicyclist: rider + bicycle}`, where names don't tell."""
    absent: list[str] = field(default_factory=list)
    """Our classes that the teacher may lack; it gives them a millionth of the probability."""
    accept_near_chance: bool = False
    """Go on with a teacher from a folder or the Hub that scores as if it guessed."""
    source: Literal["live", "cache", "average", "itself"] = "live"
    """live: the teacher sees each batch as the student does. cache: it sees each whole image once, and its answers
    are cropped, scaled and mirrored like the image. average: the moving average of the student's own weights
    (train.ema) teaches it. itself: the student teaches itself. The last two have no other teacher."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The cache of `source=cache`."""
    size: list[int] | None = None
    """[height, width] at which the teacher of a cache sees the images; null: data.size, as the student, at which
    its score is announced in any case."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """The teacher sees the images enlarged by this factor; its answers to several are averaged."""
    flip: bool = False
    """Average the teacher's answer with its answer to the mirrored image, mirrored back."""
    averaging: Literal["mean", "entropy", "agreement"] = "mean"
    """Of several answers: the mean of the probabilities, or with weights at each pixel: exp(-entropy) of each
    answer, or exp(-KL) of each answer to the mean of all."""
    perturb: float = 0.0
    """average, itself: how strongly the student's images are changed in contrast, colour and noise and by a blank
    rectangle before the student sees them, 0 to 1; the teacher sees them unchanged."""
    precision: Literal["train", "fp32", "bf16", "fp16", "int8"] = "train"
    """Arithmetic of the teacher; train: that of train.precision, but a cache is filled in fp32. int8 is for
    convolutional teachers on a CPU."""
    compile: bool = False
    """Compile the live teacher by torch.compile, which takes a minute and a C++ compiler or a GPU."""
    stream: bool = False
    """Let the live teacher work on a CUDA stream of its own, beside the student's forward pass."""

    def __post_init__(self) -> None:
        if self.run and self.hub:
            raise ConfigurationError("teacher.hub: teacher.run is given too; give one teacher")
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            raise ConfigurationError(f"teacher.scales: {self.scales} are no factors; give one or more in 0..8")
        if not 0 <= self.perturb <= 1:
            raise ConfigurationError(f"teacher.perturb: {self.perturb} is no strength; give 0 to 1")
        if self.own:
            self.only("source", "scales", "flip", "averaging", "perturb", where=f"teacher.source={self.source}")
        elif self.perturb:
            raise ConfigurationError(
                f"teacher.perturb: is for teacher.source=average or itself, not {self.source}; leave it out"
            )
        if self.size is not None and self.source != "cache":
            raise ConfigurationError(
                "teacher.size: is for teacher.source=cache; leave it out, or see teacher.scales"
            )
        if self.stream and self.source != "live":
            raise ConfigurationError("teacher.stream: is for teacher.source=live; leave it out")

    def only(self, *known: str, where: str) -> None:
        """Raises ConfigurationError if a key besides these is not at its default: it would do nothing there."""
        usual = TeacherConfig()
        for key in (one.name for one in fields(self)):
            if key not in known and getattr(self, key) != getattr(usual, key):
                raise ConfigurationError(f"teacher.{key}: does nothing with {where}; leave one of them out")

    @property
    def own(self) -> bool:
        """Whether the student is its own teacher."""
        return self.source in ("average", "itself")


class LiveTeacher:
    """Frozen models beside the training: in eval mode, without gradients, never wrapped, never optimised.

    Args:
        models: each answers `model(images, taps)`; features are those of the first.
        device: where they run.
        autocast: their mixed precision.
        config: views and averaging.
    """

    def __init__(
        self, models: Sequence[nn.Module], device: torch.device, autocast: Autocast, config: TeacherConfig
    ) -> None:
        self.models: list[Any] = []
        for model in models:
            model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.models.append(model.eval().requires_grad_(False))
        self.autocast, self.config = autocast, config
        if config.compile:
            compilers = (os.environ.get("CXX") or "g++", "clang++")
            if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
                raise ConfigurationError("teacher.compile: needs a C++ compiler; install g++, or leave it out")
            self.models = [torch.compile(model) for model in self.models]
        if config.stream and device.type != "cuda":
            raise ConfigurationError("teacher.stream: needs a CUDA GPU and there is none; leave it out")
        self.stream = torch.cuda.Stream(device) if config.stream else None

    def answer(self, images: Tensor, taps: Sequence[str]) -> Any:
        """What the models say of images [B, 3, H, W] as the student's batches are normalised."""
        with self.autocast():
            return consult(self.models, images, taps, self.config)

    def __call__(self, batch: Any, taps: Sequence[str]) -> Any:
        """The answer to a batch; with a stream of its own, it is there after `wait`."""
        if self.stream is None:
            return self.answer(batch.images, taps)
        self.stream.wait_stream(torch.cuda.current_stream())
        batch.images.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            return self.answer(batch.images, taps)

    def wait(self, answer: Any) -> None:
        """Makes what follows wait for an answer on a stream of its own."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            for tensor in (answer.logits, *answer.features.values()):
                tensor.record_stream(torch.cuda.current_stream())

    def as_model(self) -> nn.Module:
        """A module that answers as it does, to be evaluated."""
        return Consulted(self)


class Consulted(nn.Module):
    """A teacher in a model's clothes; it holds no parameters of its own."""

    def __init__(self, teacher: LiveTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Any:
        return self.teacher.answer(images, taps)


class OwnTeacher:
    """The learner as its own teacher: the average of its weights (Tarvainen & Valpola 2017), or as it stands.

    It answers in eval mode, by the running statistics of batch normalisation. The player that it teaches sets
    `player`.
    """

    def __init__(self, autocast: Autocast, config: TeacherConfig) -> None:
        self.player: Any = None
        self.autocast, self.config = autocast, config

    def __call__(self, batch: Any, taps: Sequence[str]) -> Any:
        average = self.config.source == "average"
        model = self.player.evaluated if average else self.player.learner.model
        with in_eval_mode(model), self.autocast():
            return consult([model], batch.images, taps, self.config)


class PeerTeacher:
    """Fellow learners as a teacher: the mean of their probabilities, and the features of the first.

    What a fellow said of the batch in its own step just before is taken as it was, by weights not yet updated and
    in train mode; one that has not stepped answers in eval mode. The mean over k - 1 fellows at temperature 1 has
    the gradient of deep mutual learning's mean of divergences (Zhang et al. 2018, eq. 7).
    """

    def __init__(self, fellows: Sequence[Any], autocast: Autocast, config: TeacherConfig) -> None:
        self.fellows, self.autocast, self.config = fellows, autocast, config

    def __call__(self, batch: Any, taps: Sequence[str]) -> Any:
        answers: list[Any] = []
        for fellow in self.fellows:
            said = [answer for part, answer in fellow.said if part is batch]
            if not said:
                with in_eval_mode(fellow.model), self.autocast():
                    said = [consult([fellow.model], batch.images, taps if not answers else (), TeacherConfig())]
            answers += said
        if len(answers) == 1:
            return answers[0]
        return Answer(average([answer.logits for answer in answers], self.config.averaging), answers[0].features)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode and each of its parts back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def own_autocast(precision: str, device: torch.device, training: Autocast) -> Autocast:
    """The autocast of `teacher.precision` on a device; `training` is that of the training.

    Raises:
        ConfigurationError: fp16 without CUDA.
    """
    if precision == "train":
        return training
    if precision == "fp16" and device.type != "cuda":
        raise ConfigurationError("teacher.precision: fp16 needs a CUDA GPU and there is none; give bf16 or fp32")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in types:
        return nullcontext
    return partial(torch.autocast, device.type, types[precision])


@torch.no_grad()  # not inference_mode: its tensors can't be saved for a backward pass
def consult(models: Sequence[Any], images: Tensor, taps: Sequence[str], config: TeacherConfig) -> Any:
    """What several models say of several views of images [B, 3, H, W], as one answer at the first one's stride.

    One model and one view answer as they are. Else the logits of each view are brought to the size that the first
    model's have without enlargement, and the logarithm of their averaged probabilities takes the logits' place.
    Features are those of the first model, of its first view.
    """
    if len(models) == 1 and config.scales == [1.0] and not config.flip:
        return models[0](images, taps)
    logits: list[Tensor] = []
    features: Mapping[str, Tensor] = {}
    height, width = images.shape[-2:]
    for model in models:
        for scale in config.scales:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            seen = resized(images, size)
            for mirrored in (False, True) if config.flip else (False,):
                first = not logits
                output = model(seen.flip(-1) if mirrored else seen, taps if first else ())
                logits.append(output.logits.flip(-1) if mirrored else output.logits)
                if first:
                    features = output.features
                    native = [math.ceil(side / scale) for side in output.logits.shape[-2:]]
    return Answer(average([resized(one.float(), native) for one in logits], config.averaging), features)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, antialiased where it shrinks."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False, antialias=shrinks)


def average(logits: Sequence[Tensor], averaging: str) -> Tensor:
    """The logarithm of the weighted mean of several answers' probabilities, each [B, C, h, w].

    At each pixel the weights are equal (`mean`), or the softmax over the answers of minus their entropy
    (`entropy`: who is sure counts more), or of minus their divergence from the plain mean (`agreement`: who
    stands alone counts less), both in nats.
    """
    finest = max((one.shape[-2:] for one in logits), key=lambda size: size[0] * size[1])
    logs = torch.stack([resized(one.float(), finest).log_softmax(1) for one in logits])
    if averaging == "mean":
        return logs.logsumexp(0) - math.log(len(logs))
    doubt = -(logs.exp() * logs).sum(2, keepdim=True)  # of each answer: [K, B, 1, h, w]
    if averaging == "agreement":
        mean = logs.logsumexp(0) - math.log(len(logs))
        doubt = (logs.exp() * (logs - mean)).sum(2, keepdim=True)
    return (logs + (-doubt).log_softmax(0)).logsumexp(0)


def perturbed(images: Tensor, strength: float) -> Tensor:
    """Normalised images [B, 3, H, W] with contrast, saturation and noise changed at random and a blank rectangle.

    Contrast and saturation change by up to `strength` each, noise has up to a quarter of it as its deviation, and
    the rectangle, blank at the mean colour, up to half of it of each side (consistency needs strong changes in
    segmentation: French et al. 2020). The numbers are torch's, and so a function of seed, step and process.
    """
    batch, _, height, width = images.shape
    draws = torch.rand(8, batch, 1, 1, 1, device=images.device)
    contrast, saturation = 1 + strength * (2 * draws[:2] - 1)
    grey = images.mean(1, keepdim=True)
    changed = grey + (images - grey) * saturation
    middle = changed.mean((1, 2, 3), keepdim=True)
    changed = middle + (changed - middle) * contrast
    changed = changed + strength / 4 * draws[2] * torch.randn_like(changed)
    sides, centres = strength / 2 * draws[3:5], draws[5:7]
    rows = ((torch.arange(height, device=images.device) + 0.5) / height).view(1, 1, -1, 1)
    columns = ((torch.arange(width, device=images.device) + 0.5) / width).view(1, 1, 1, -1)
    blank = ((rows - centres[0]).abs() < sides[0] / 2) & ((columns - centres[1]).abs() < sides[1] / 2)
    return changed.masked_fill(blank, 0.0).contiguous(memory_format=torch.channels_last)
