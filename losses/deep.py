"""Deep self-distillation: the last layer of a network teaches classifiers at its earlier ones."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from errors import ConfigurationError
from losses.blocks import PixelTerm, PixelTermConfig, counted_pixels, safe
from losses.term import (
    BatchNorm,
    Context,
    ModelOutput,
    Taps,
    TemperatureConfig,
    check_taps,
    full_precision,
    resize,
)
from losses.upsampled import upsampled_loss

WORDS = ("encoder", "bottleneck", "decoder")


@dataclass
class SelfDistillationConfig(TemperatureConfig, PixelTermConfig):
    """Deep self-distillation (Zhang et al. 2019): the last layer teaches classifiers at earlier ones."""

    temperature: float = 3.0
    """T: softens both distributions; the loss keeps its T²."""
    taps: list[str] = field(default_factory=lambda: ["encoder", "bottleneck"])
    """Where the classifiers stand: `encoder`, `bottleneck`, `decoder` (but for its last tap), or a tap."""
    alpha: float = 0.3
    """Share of what the last layer teaches, the rest is the labels'; 0: deep supervision by the labels alone."""
    hint: float = 0.03
    """Factor of the distance to the features that the last layer sees; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taps("self_distillation", self.taps)
        if not 0 <= self.alpha <= 1:
            raise ConfigurationError(
                f"losses.self_distillation.alpha: {self.alpha} is no share; give a number from 0 to 1"
            )
        if self.hint < 0:
            raise ConfigurationError(f"losses.self_distillation.hint: {self.hint} is negative; give 0 or more")


class Head(nn.Module):
    """An auxiliary classifier: 3×3 convolution to the width of the last features, batch-norm, ReLU, classifier."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), BatchNorm(width))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the features before the ReLU."""
        adapted = self.adapter(features)
        return self.classifier(adapted.relu()), adapted


class SelfDistillation(PixelTerm):
    """Be Your Own Teacher (Zhang et al. 2019): a mean over classifiers at earlier taps, each of which costs

        (1 - alpha) * CE(aux, y) + alpha * T² * KL(last || aux) + hint * || A(f) - f_last ||_2,

    a mean over labelled pixels, by class weights if asked. `last` are the model's own logits and `f_last` the map
    that they are made of, both without a gradient: the deep part teaches and the shallow one learns, through it
    all that stands before a tap. With alpha and hint 0 it is deep supervision (Lee et al. 2015). The classifiers
    are the term's own: they are trained and resumed with the run, and the model is saved without them.

    Alpha 0.3, T 3 and hint 0.03 are those of the authors' code, beside a cross-entropy of the last classifier,
    here a term by itself. Where it departs:

    - its classifiers stand behind stacks of strided convolutions that end in a pooled vector; here a 3×3
      convolution, and all is compared where a tap stands: `f_last` is brought to its resolution, the logits go up
      to label size;
    - its soft cross-entropy has no T², so that alpha weighs nine times less there;
    - its distance is the norm of the difference of all vectors of a batch, which depends on the batch; here each
      position has its own, and their mean is taken. There the shallowest classifier has none;
    - it adds the classifiers up; the mean does not grow with their number.
    """

    taught = False

    def __init__(self, config: SelfDistillationConfig, context: Context) -> None:
        super().__init__(config, context)
        if not context.classes:
            raise ConfigurationError(
                "losses.self_distillation: needs the number of classes; give DistillationLoss its argument classes"
            )
        self.alpha, self.hint, self.temperature = config.alpha, config.hint, config.temperature
        self.last = last_tap(context.student)
        self.taps = earlier_taps(config.taps, context.student)
        self.student_taps = [*self.taps, self.last] if self.hint else self.taps
        width = context.student[self.last].channels
        self.heads = nn.ModuleList(
            Head(context.student[tap].channels, width, context.classes) for tap in self.taps
        )

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=labels.device)
        for tap, head in zip(self.taps, self.heads, strict=True):
            logits, adapted = head(student.features[tap])
            value, _ = upsampled_loss(
                logits,
                labels,
                student.logits,
                ce_weight=1 - self.alpha,
                kl_weight=self.alpha,
                temperature=self.temperature,
                class_weights=self.class_weights,
                ce_denominator=denominator,
                kl_denominator=denominator,
                kl_class_weights=self.class_weights,
            )
            total = total + value
            if self.hint:
                distance = self.distance(adapted, student.features[self.last].detach(), labels)
                total = total + self.hint * distance / safe(denominator, distance)
        return total / len(self.taps)

    def distance(self, ours: Tensor, last: Tensor, labels: Tensor) -> Tensor:
        """`|| ours - last ||_2` over the channels of each position, times the (weighted) labelled pixels there."""
        size = (ours.shape[-2], ours.shape[-1])
        difference = full_precision(ours) - resize(full_precision(last), size)
        labelled, target = counted_pixels(labels)
        weight = labelled.to(difference)
        if self.class_weights is not None:
            weight = weight * self.class_weights.to(weight)[target]
        pixels = labels[0].numel() / (size[0] * size[1])  # that a position stands for
        here = resize(weight[:, None], size)[:, 0] * pixels
        return (torch.linalg.vector_norm(difference, dim=1) * here).sum()

    def note(self) -> str:
        return f"classifiers at {', '.join(self.taps)}"


def last_tap(model: Taps) -> str:
    """What the model's own classifier sees: the last tap of its decoder, or of all where there is none."""
    return [tap for tap in model if tap.partition(".")[0] == "decoder" or "decoder.0" not in model][-1]


def earlier_taps(taps: list[str], model: Taps) -> list[str]:
    """The taps that are meant, without the last.

    Raises:
        ConfigurationError: naming the taps there are, where one is none, is the last, or no tap is left.
    """
    last, found = last_tap(model), []
    known = ", ".join(tap for tap in model if tap != last)
    for tap in taps:
        if tap == last and tap not in WORDS:
            raise ConfigurationError(
                f"losses.self_distillation.taps: {tap} is what the model's own classifier sees, which teaches the "
                f"others; name some of {known}"
            )
        if tap not in model and tap not in WORDS:
            raise ConfigurationError(
                f"losses.self_distillation.taps: the model has no tap {tap!r}; name some of {known}, "
                f"or {', '.join(WORDS)}"
            )
        found += [one for one in model if tap in (one, one.partition(".")[0]) and one != last]
    if not found:
        raise ConfigurationError(
            f"losses.self_distillation.taps: {', '.join(taps)} is nothing but what the model's own classifier "
            f"sees; name some of {known}"
        )
    return list(dict.fromkeys(found))
