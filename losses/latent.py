"""Knowledge adaptation (He et al. 2019, "Knowledge Adaptation for Efficient Semantic Segmentation").

Stage 1 trains an autoencoder on the teacher's features (`Reconstruction`); stage 2 freezes its encoder and lets
the student match the latent features (KTA) and their affinity. `Latents` publishes an encoder's answer as one more
tap of the teacher, so that the terms that use it are feature terms like any other, and share it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from errors import ConfigurationError
from losses.blocks import safe
from losses.features import FeatureTerm, image_means
from losses.relations import affinity
from losses.term import BatchNorm, Context, FeatureTermConfig, ModelOutput, full_precision


@dataclass
class AutoencoderConfig:
    """The autoencoder of the teacher's features, for the terms that compare in its latent space."""

    channels: int = 0
    """Channels of the latent; 0: half of the teacher's."""
    alpha: float = 1e-7
    """Weight of the latent's L1 norm beside the squared error of the reconstruction, both sums as in the paper."""
    lr: float = 0.1
    """Learning rate of stage 1 (SGD)."""
    epochs: float = 1.0
    """Length of stage 1 in passes over the training images."""
    file: str = ""
    """Encoders from another run, its folder or its `autoencoder.safetensors`, in place of stage 1."""

    def __post_init__(self) -> None:
        if self.channels < 0:
            raise ConfigurationError(f"losses.autoencoder.channels: {self.channels} is negative; give 0 or more")
        if self.epochs <= 0 or self.lr <= 0:
            raise ConfigurationError("losses.autoencoder: epochs and lr must be positive; leave their defaults")


@dataclass
class KTAConfig(FeatureTermConfig):
    """Knowledge translation and adaptation (He et al. 2019, eq. 2): features in an autoencoder's latent space."""

    weight: float = 50.0
    """Factor of the term in the total loss."""
    p: int = 1
    """Order of the norm of the difference."""
    q: int = 2
    """Order of the norm that the features of each position are divided by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p < 1 or self.q < 1:
            raise ConfigurationError(f"losses.kta: p {self.p} and q {self.q} are orders of norms; give 1 or 2")


@dataclass
class AffinityConfig(FeatureTermConfig):
    """Affinity (He et al. 2019, eq. 4): cosine similarity of every position with every other."""

    weight: float = 1.0
    """Factor of the term in the total loss; the paper's, whose normalisation is another: find it on validation."""
    space: Literal["latent", "raw"] = "latent"
    """latent: of the autoencoder's latent and the student's adapted features; raw: of both models' features."""


def adaptation(
    student_features: Tensor, teacher_features: Tensor, *, mask: Tensor | None = None, p: int = 1, q: int = 2
) -> Tensor:
    """Mean over positions of `|| f_s / ||f_s||_q - f_t / ||f_t||_q ||_p` (He et al. 2019, eq. 2).

    The norms run over the channels of one position. torchdistill's KTALoss, the public code there is, flattens a
    whole map into one vector instead, and its value then depends on the image's size. A position whose features
    are all zero stays zero.

    Args:
        student_features, teacher_features: [B, D, h, w], the student's adapted, the teacher's encoded.
        mask: boolean [B, h, w], True where a position counts.
    """

    def unit(features: Tensor) -> Tensor:
        features = full_precision(features)
        norm = torch.linalg.vector_norm(features, ord=q, dim=1, keepdim=True)
        nonzero = norm > torch.finfo(norm.dtype).tiny
        return torch.where(nonzero, features / torch.where(nonzero, norm, 1.0), 0.0)

    difference = unit(student_features) - unit(teacher_features.detach())
    return image_means(torch.linalg.vector_norm(difference, ord=p, dim=1), mask).mean()


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """The paper's block: 3×3 convolution, batch normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), BatchNorm(outputs), nn.ReLU())


class Encoder(nn.Sequential):
    """Three 3×3 convolutions, the last `halvings` of them strided."""

    def __init__(self, channels: int, latent: int, halvings: int) -> None:
        strides = [2 if i >= 3 - halvings else 1 for i in range(3)]
        widths = [channels, latent, latent, latent]
        super().__init__(*(conv_bn_relu(widths[i], widths[i + 1], strides[i]) for i in range(3)))


class Decoder(nn.Module):
    """The encoder's mirror: three transposed convolutions, the last without normalisation."""

    def __init__(self, channels: int, latent: int, halvings: int) -> None:
        super().__init__()
        strides = [2 if i < halvings else 1 for i in range(3)]
        widths = [latent, latent, latent, channels]
        self.steps = nn.ModuleList(
            nn.ConvTranspose2d(widths[i], widths[i + 1], 3, strides[i], 1) for i in range(3)
        )
        self.norms = nn.ModuleList([BatchNorm(latent), BatchNorm(latent), nn.Identity()])

    def forward(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """The features [B, channels, *size] from which `latent` was encoded."""
        sizes = [size]  # of what each step answers, from the last to the first
        for step in reversed(list(self.steps)[1:]):
            height, width = sizes[-1]
            stride = step.stride[0]  # type: ignore[index]
            sizes.append((math.ceil(height / stride), math.ceil(width / stride)))
        x = latent
        for i, (step, norm) in enumerate(zip(self.steps, self.norms, strict=True)):
            x = norm(step(x, output_size=sizes[2 - i]))
            x = x.relu() if i < 2 else x
        return x


class LatentTap(NamedTuple):
    """A latent space as the terms see it, and where it comes from."""

    channels: int
    stride: int
    source: str
    source_channels: int
    halvings: int


class Answer(NamedTuple):
    """A teacher's output with its latent features beside the others."""

    logits: Tensor
    features: Mapping[str, Tensor]


class Latents(nn.Module):
    """Frozen encoders of the teacher's features, each published as a tap of the teacher."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.taps: dict[str, LatentTap] = {}
        self.made_for: dict[str, str] = {}  # what the encoders depend on, in words
        self.encoders = nn.ModuleDict()

    def require(self, name: str, student_tap: str, teacher_tap: str, context: Context) -> str:
        """The name of the latent tap of `teacher_tap` at the resolution of `student_tap`; made on first demand.

        Raises:
            ConfigurationError: the student's stride is not 1, 2, 4 or 8 times the teacher's.
        """
        student, teacher = context.student[student_tap], context.taught(name)[teacher_tap]
        ratio = student.stride / teacher.stride
        if ratio not in (1, 2, 4, 8):
            raise ConfigurationError(
                f"losses.{name}.taps: the student's {student_tap} has stride {student.stride} and the teacher's "
                f"{teacher_tap} {teacher.stride}; the encoder's three convolutions make the teacher's map 1, 2, 4 "
                "or 8 times coarser, so pair a student's tap of that stride"
            )
        tap = f"{teacher_tap}/latent{student.stride}"
        if tap not in self.taps:
            channels = self.config.channels or max(1, teacher.channels // 2)
            halvings = int(math.log2(ratio))
            self.taps[tap] = LatentTap(channels, student.stride, teacher_tap, teacher.channels, halvings)
            self.encoders[self.key(tap)] = Encoder(teacher.channels, channels, halvings)
            shapes = [f"{t.source} at stride {t.stride}, {t.channels} channels" for t in self.taps.values()]
            self.made_for["latents"] = "; ".join(sorted(shapes))
            self.freeze()
        return tap

    def describe(self, tap: str) -> str:
        """A tap of the teacher, latent or its own, for people."""
        if tap not in self.taps:
            return tap
        return f"latent of {self.taps[tap].source} ({self.taps[tap].channels} channels)"

    @staticmethod
    def key(tap: str) -> str:
        """A tap's name as a module may be called."""
        return tap.replace(".", "-")

    def freeze(self) -> None:
        """Ends stage 1: no gradient, no change of batch-norm's statistics."""
        self.encoders.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Latents":
        """Frozen encoders stay in eval mode."""
        super().train(mode)
        self.encoders.eval()
        return self

    def sources(self, taps: list[str]) -> list[str]:
        """The teacher's own taps that these, latent ones among them, are made of."""
        return sorted({self.taps[tap].source if tap in self.taps else tap for tap in taps})

    @torch.no_grad()
    def extend(self, teacher: ModelOutput, taps: list[str]) -> ModelOutput:
        """The teacher's output with the latent features of those of `taps` that are latent."""
        made = {
            tap: self.encoders[self.key(tap)](teacher.features[self.taps[tap].source])
            for tap in taps
            if tap in self.taps
        }
        return Answer(teacher.logits, {**teacher.features, **made}) if made else teacher


class Reconstruction(nn.Module):
    """Stage 1, as the loop steps it: `||f_t - D(E(f_t))||² + α ||E(f_t)||_1` (He et al. 2019, eq. 1).

    Both sums are divided by the number of the features' elements, so that neither depends on the image's size and
    α stays what the paper has.
    """

    name = "autoencoder"

    def __init__(self, latents: Latents, teacher: Callable[..., ModelOutput]) -> None:
        super().__init__()
        self.teacher = teacher
        self.alpha, self.taps, self.encoders = latents.config.alpha, latents.taps, latents.encoders
        self.decoders = nn.ModuleDict(
            {
                Latents.key(name): Decoder(tap.source_channels, tap.channels, tap.halvings)
                for name, tap in latents.taps.items()
            }
        )
        self.encoders.requires_grad_(True)
        self.teacher_taps = latents.sources(list(latents.taps))

    def wanted(self, step: int) -> list[str]:
        """The teacher's taps that a step needs."""
        return self.teacher_taps

    def counts(self, labels: Tensor) -> Tensor:
        """The number of images, the denominator: float64 [1]."""
        return labels.new_full((1,), len(labels), dtype=torch.float64)

    def forward(
        self, images: Tensor, labels: Tensor, answer: ModelOutput, step: int, denominators: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and by latent tap the error of the reconstruction as a share of the features' squared norm."""
        loss, values = torch.zeros((), device=images.device), {}
        for name, tap in self.taps.items():
            features = answer.features[tap.source]
            latent = self.encoders[Latents.key(name)](features)
            made = self.decoders[Latents.key(name)](latent, (features.shape[-2], features.shape[-1]))
            features, made = full_precision(features), full_precision(made)
            error = (features - made).square().sum((1, 2, 3))
            sparsity = self.alpha * full_precision(latent).abs().sum((1, 2, 3))
            share = safe(denominators[0], error)
            loss = loss + ((error + sparsity) / features[0].numel()).sum() / share
            energy = features.square().sum((1, 2, 3))
            values[f"{name}.error"] = (
                error.detach() / energy.clamp(min=torch.finfo(energy.dtype).tiny)
            ).sum() / share
        return loss, values


class KTA(FeatureTerm):
    """`adaptation` of the student's features, behind 3×3 convolution, batch-norm and ReLU, to the latent."""

    not_coarser = True

    def __init__(self, config: KTAConfig, context: Context) -> None:
        super().__init__(config, context)
        self.p, self.q = config.p, config.q
        self.adapters = to_latent(self, "kta", context)

    def project(self, pair: int, features: Tensor) -> Tensor:
        return self.adapters[pair](features)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        return adaptation(student, teacher, mask=mask, p=self.p, q=self.q)


class Affinity(FeatureTerm):
    """`affinity` over the pairs, in the latent space behind an adapter of its own, or on raw features."""

    function = staticmethod(affinity)
    not_coarser = True

    def __init__(self, config: AffinityConfig, context: Context) -> None:
        super().__init__(config, context)
        latent = config.space == "latent"
        self.adapters = to_latent(self, "affinity", context) if latent else [nn.Identity()] * len(self.pairs)

    def project(self, pair: int, features: Tensor) -> Tensor:
        return self.adapters[pair](features)


def to_latent(term: FeatureTerm, name: str, context: Context) -> nn.ModuleList:
    """Points a term's pairs at the latents of the teacher's taps; returns the student's adapters to them."""
    adapters = []
    for pair, (ours, theirs) in enumerate(term.pairs):
        assert context.latents is not None
        latent = context.latents.require(name, ours, theirs, context)
        term.pairs[pair] = (ours, latent)
        term.widths[pair] = (context.student[ours].channels, context.latents.taps[latent].channels)
        adapters.append(conv_bn_relu(*term.widths[pair]))
    term.teacher_taps = [theirs for _, theirs in term.pairs]
    return nn.ModuleList(adapters)
