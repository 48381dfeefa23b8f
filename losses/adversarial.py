"""Holistic distillation (Liu et al. 2019): a critic tells the student's score maps from the teacher's.

Dimension letters: B images, C classes, D channels, N positions.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from losses.blocks import safe
from losses.term import Context, ModelOutput, Term, TermConfig, full_precision, resize


@dataclass
class HolisticConfig(TermConfig):
    """Holistic distillation (Liu et al. 2019): a WGAN-GP critic over the image and the score map."""

    weight: float = 0.1
    """Factor of the term in the total loss, on the student's side."""
    gradient_penalty: float = 10.0
    """Weight of the critic's gradient penalty."""
    critic_width: int = 64
    """Channels of the critic's first convolution; each of the next three doubles them."""
    critic_lr: float = 4e-4
    """Highest learning rate of the critic; it follows the schedule of the training."""
    critic_betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decays of the two averages of the critic's optimizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_penalty < 0:
            raise ConfigurationError(
                f"losses.holistic.gradient_penalty: {self.gradient_penalty} is negative; give 0 or more"
            )
        if self.critic_width < 1:
            raise ConfigurationError(
                f"losses.holistic.critic_width: {self.critic_width} is too small; give 1 or more"
            )
        if self.critic_lr <= 0:
            raise ConfigurationError(f"losses.holistic.critic_lr: {self.critic_lr} is not positive; give say 4e-4")
        if len(self.critic_betas) != 2 or not all(0 <= beta < 1 for beta in self.critic_betas):
            raise ConfigurationError(
                f"losses.holistic.critic_betas: {self.critic_betas} is not two decays; give [0.9, 0.99]"
            )


class SelfAttention(nn.Module):
    """Each position takes in what all others show, as far as it is like it (Zhang et al. 2019, SAGAN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query_BDN, key_BDN, value_BDN = (make(x).flatten(2) for make in (self.query, self.key, self.value))
        attention_BNN = (query_BDN.mT @ key_BDN).softmax(2)  # in plain products, which can be differentiated twice
        return x + self.gain * (value_BDN @ attention_BNN.mT).view_as(x)


class Critic(nn.Module):
    """A score for each image and score map, of any size: four strided convolutions, self-attention, a mean.

    In the manner of SAGAN's discriminator, which the authors take. Departures: it sees the image, as the paper
    says and the authors' code does not, and the score map as probabilities; its convolutions are 3×3 and its score
    is the mean over positions of a 1×1 convolution, so that any size goes (theirs is made for 65×65); one
    self-attention at the coarsest level in place of two; no batch-norm at its input, with which the gradient
    penalty of one image would depend on the others (Gulrajani et al. 2017); no spectral norm, since the penalty
    limits the slope already.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        widths = [3 + classes, *(width * 2**i for i in range(4))]
        self.convolutions = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1) for i in range(4))
        self.attention = SelfAttention(widths[-1])
        self.score = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, images: Tensor, scores: Tensor) -> Tensor:
        """[B]: higher for what looks like the teacher's."""
        x = torch.cat([images, scores], 1)
        for convolution in self.convolutions:
            x = F.leaky_relu(convolution(x), 0.1)
        return self.score(self.attention(x)).mean((1, 2, 3))


class Holistic(Term):
    """Mean over images of minus the critic's score of the student's score map (Liu et al. 2019; WGAN).

    The critic is no part of the term's parameters: it learns in a player of its own (`opponent`), and the term
    sees it through detached parameters, so that the student's optimizer never moves it. Images and the teacher's
    map are brought to the size of the student's logits. All positions count, labelled or not. The score has no
    zero: it is the difference between the two models' scores that says something, and the critic reports it.
    """

    wants_images = True

    def __init__(self, config: HolisticConfig, context: Context) -> None:
        super().__init__()
        context.taught("holistic")
        if not context.classes:
            raise ConfigurationError(
                "losses.holistic: needs the number of classes; give DistillationLoss its argument classes"
            )
        self.hidden = (Critic(context.classes, config.critic_width),)  # in a tuple, and so not a submodule
        self.parts: deque[tuple[Tensor, Tensor, Tensor]] = deque()
        self.remembers = False

    @property
    def critic(self) -> Critic:
        return self.hidden[0]

    def opponent(self, config: HolisticConfig, total_steps: int) -> nn.Module:
        self.remembers = True
        return CriticLearner(self, config, total_steps)

    def note(self) -> str:
        return f"critic of {sum(p.numel() for p in self.critic.parameters()):,} parameters"

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        labels: Tensor,
        denominator: Tensor,
        *,
        images: Tensor | None = None,
    ) -> Tensor:
        assert teacher is not None
        assert images is not None
        size = (student.logits.shape[-2], student.logits.shape[-1])
        scores = full_precision(student.logits).softmax(1)
        seen = resize(full_precision(images.detach()), size).to(scores)
        if self.training and self.remembers:
            taught = resize(full_precision(teacher.logits.detach()), size).softmax(1)
            self.parts.append((seen, scores.detach(), taught))
        state = {name: value.detach().to(scores) for name, value in self.critic.named_parameters()}
        with torch.autocast(scores.device.type, enabled=False):
            judged = torch.func.functional_call(self.critic, state, (seen, scores))
        return -judged.sum() / safe(denominator, judged)


class CriticLearner(nn.Module):
    """The critic's side, stepped by the loop beside the student: `D(student) - D(teacher) + λ (|∇D| - 1)²`.

    WGAN-GP, Gulrajani et al. 2017: the mean over images, the gradient's norm that with respect to the whole score
    map, at a random point between the two models' maps. It takes what the term saw at this step, part by part, in
    that order, and computes in float32. The authors scale this loss with the student's 0.1, which Adam undoes;
    Adam with these betas is what IFVD's and CIRKD's code has, SKD's has SGD with momentum 0.9.
    """

    name = "critic"

    def __init__(self, term: Holistic, config: HolisticConfig, total_steps: int) -> None:
        super().__init__()
        self.model = term.critic
        self.config, self.total_steps, self.parts = config, total_steps, term.parts

    @property
    def options(self) -> dict[str, Any]:
        """Where its training differs from the student's."""
        config = self.config
        return {
            "optimizer": "adamw",
            "lr": config.critic_lr,
            "betas": list(config.critic_betas),
            "weight_decay": 0.0,
            "clip": 0.0,
            "ema": 0.0,
        }

    def active(self, step: int) -> bool:
        """Whether the term is in force: a critic whose weight is 0 does not learn."""
        return self.config.factor(step, self.total_steps) != 0

    def wanted(self, step: int) -> None:
        """It needs no teacher: the term has seen the answer."""

    def counts(self, labels: Tensor) -> Tensor:
        """The number of images, the denominator: float64 [1]."""
        return labels.new_full((1,), len(labels), dtype=torch.float64)

    def forward(
        self, images: Tensor, labels: Tensor, answer: Any, step: int, denominators: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the next remembered part; `distance` is by how much the teacher is scored higher."""
        seen, student, teacher = self.parts.popleft()
        share = safe(denominators[0], student)
        with torch.autocast(seen.device.type, enabled=False):
            distance = (self.model(seen, teacher) - self.model(seen, student)).sum() / share
            penalty = gradient_penalty(self.model, seen, student, teacher).sum() / share
        loss = self.config.gradient_penalty * penalty - distance
        return loss, {"distance": distance.detach(), "penalty": penalty.detach()}


def gradient_penalty(critic: nn.Module, images: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """`(|∇D| - 1)²` of each image, [B], at a random point between two score maps [B, C, h, w]."""
    share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    between = torch.lerp(student, teacher, share).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(critic(images, between).sum(), between, create_graph=True)
    squared = slope.square().sum((1, 2, 3))
    nonzero = squared > torch.finfo(squared.dtype).tiny  # the root of 0 has no slope
    norm = torch.where(nonzero, torch.where(nonzero, squared, 1.0).sqrt(), 0.0)
    return (norm - 1).square()
