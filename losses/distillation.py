"""The objective: the configured terms, their weights and schedules, added up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor, nn

from errors import ConfigurationError
from losses.features import AttentionTransfer, AttentionTransferConfig, Fitnet, FitnetConfig
from losses.relations import Affinity, AffinityConfig
from losses.term import ModelOutput, Taps, Term, TermConfig
from losses.upsampled import label_weight, upsampled_loss

ClassWeighting = Literal["uniform", "inverse", "median", "enet", "effective"]


@dataclass
class CrossEntropyConfig(TermConfig):
    """Cross-entropy with the labels."""

    class_weights: ClassWeighting = "uniform"
    """uniform, inverse frequency, median frequency, ENet's 1/ln(1.02+p), effective number of samples."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(
                f"losses.cross_entropy.label_smoothing: {self.label_smoothing} is not in [0, 1); give say 0.1"
            )


@dataclass
class KDConfig(TermConfig):
    """Knowledge distillation of logits (Hinton et al. 2015), per pixel, at label size."""

    temperature: float = 1.0
    """T: softens both distributions; the loss keeps its T²."""
    class_weights: ClassWeighting = "uniform"
    """Weights of the pixels by their label's class: a rebalanced task needs a rebalanced teacher signal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigurationError(
                f"losses.kd.temperature: {self.temperature} is not positive; give 1.0 or more"
            )


@dataclass
class LossConfig:
    """One optional field per loss; naming one switches it on (`losses.affinity.weight=1`)."""

    cross_entropy: CrossEntropyConfig | None = field(default_factory=CrossEntropyConfig)
    """Cross-entropy with the labels."""
    kd: KDConfig | None = None
    """Knowledge distillation of logits."""
    attention_transfer: AttentionTransferConfig | None = None
    """Attention transfer."""
    fitnet: FitnetConfig | None = None
    """FitNets' hints."""
    affinity: AffinityConfig | None = None
    """Affinity of all pairs of positions."""

    def active(self) -> dict[str, TermConfig]:
        """The configured terms by name, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


class PixelTerm(Term):
    """Cross-entropy or KD: what its pixels weigh. Their values are made together, by `upsampled_loss`."""

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)

    def count(self, labels: Tensor) -> Tensor:
        return label_weight(labels, self.class_weights)


FEATURE_TERMS: dict[str, Callable[..., Term]] = {
    "attention_transfer": AttentionTransfer,
    "fitnet": Fitnet,
    "affinity": Affinity,
}


class DistillationLoss(nn.Module):
    """Sum of the configured terms, each with its weight and its window in training.

    Args:
        config: which terms.
        student_taps, teacher_taps: what the models publish; no teacher is None.
        class_weights: gives the [C] weights of a scheme; needed where a term asks for one.
        total_steps: length of training, of which schedules may be fractions.
        extra: terms of your own by name, each with its weight and schedule.
    """

    def __init__(
        self,
        config: LossConfig,
        student_taps: Taps,
        teacher_taps: Taps | None = None,
        *,
        class_weights: Callable[[str], Tensor] | None = None,
        total_steps: int = 1,
        extra: Mapping[str, tuple[TermConfig, Term]] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.configs, self.total_steps = config, config.active(), total_steps
        if not self.configs and not extra:
            raise ConfigurationError("losses: no term is configured; leave losses.cross_entropy as it is")

        def weights(scheme: str) -> Tensor | None:
            if scheme == "uniform":
                return None
            if class_weights is None:
                raise ConfigurationError(f"losses: class_weights={scheme} needs a data set's label counts")
            return class_weights(scheme)

        terms: dict[str, Term] = {}
        if config.cross_entropy is not None:
            terms["cross_entropy"] = PixelTerm(weights(config.cross_entropy.class_weights))
        if config.kd is not None:
            if teacher_taps is None:
                raise ConfigurationError(
                    "losses.kd: compares with a teacher, and there is none; leave the term out"
                )
            terms["kd"] = PixelTerm(weights(config.kd.class_weights))
        for name, term in FEATURE_TERMS.items():
            if name in self.configs:
                terms[name] = term(self.configs[name], student_taps, teacher_taps)
        for name, (term_config, own_term) in (extra or {}).items():
            self.configs[name], terms[name] = term_config, own_term
        self.terms = nn.ModuleDict(terms)

    @property
    def student_taps(self) -> list[str]:
        """Taps that the student must answer with."""
        return sorted({tap for term in self.terms.values() for tap in term.student_taps})  # type: ignore

    @property
    def teacher_taps(self) -> list[str]:
        """Taps that the teacher must answer with."""
        return sorted({tap for term in self.terms.values() for tap in term.teacher_taps})  # type: ignore

    def counts(self, labels: Tensor) -> Tensor:
        """Each term's local denominator: float64 [terms], to be added up over parts and processes."""
        return torch.stack([term.count(labels) for term in self.terms.values()])  # type: ignore

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        labels: Tensor,
        *,
        step: int = 0,
        denominators: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at `step` (from 0), and the terms in force, unweighted and detached, by name.

        Args:
            labels: int64 [B, H, W], 255 ignored.
            denominators: float64 [terms]; those of the whole batch if this is a part of it, else `counts(labels)`.
        """
        if denominators is None:
            denominators = self.counts(labels)
        precision = torch.promote_types(student.logits.dtype, torch.float32)
        shares = dict(zip(self.terms, denominators.to(precision), strict=True))
        factors = {name: config.factor(step, self.total_steps) for name, config in self.configs.items()}
        loss, values = self._pixel_terms(student, teacher, labels, factors, shares)
        for name, term in self.terms.items():
            if isinstance(term, PixelTerm):
                continue
            if factors[name]:
                value = term(student, teacher, labels, shares[name])
                loss, values[name] = loss + factors[name] * value, value.detach()
            else:
                # Outside its window a term still touches its parameters, or DDP waits for their gradients.
                loss = loss + sum(0.0 * parameter.sum() for parameter in term.parameters())
        return loss, values

    def _pixel_terms(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        labels: Tensor,
        factors: dict[str, float],
        shares: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and KD in one pass over the upsampled logits; a zero that touches them if none is on."""
        ce, kd = factors.get("cross_entropy", 0.0), factors.get("kd", 0.0)
        if not ce and not kd:
            return student.logits.sum(dtype=torch.float32) * 0.0, {}
        loss, made = upsampled_loss(
            student.logits,
            labels,
            teacher.logits if kd and teacher is not None else None,
            ce_weight=ce,
            kl_weight=kd,
            temperature=self.config.kd.temperature if self.config.kd else 1.0,
            class_weights=self.terms["cross_entropy"].class_weights if ce else None,  # type: ignore[arg-type]
            label_smoothing=self.config.cross_entropy.label_smoothing if self.config.cross_entropy else 0.0,
            ce_denominator=shares.get("cross_entropy"),
            kl_denominator=shares.get("kd"),
            kl_class_weights=self.terms["kd"].class_weights if kd else None,  # type: ignore[arg-type]
        )
        names = {"cross_entropy": "ce", "kd": "kl"}
        return loss, {name: made[key] for name, key in names.items() if factors.get(name)}

    def describe(self) -> list[str]:
        """One line a term: weight, window, taps, adapters' parameters."""
        lines = []
        for name, term in self.terms.items():
            config = self.configs[name]
            line = f"{name}: weight {config.weight:g}"
            if config.start or config.until is not None or config.ramp:
                line += f", from {config.start} until {'the end' if config.until is None else config.until}"
                line += f", ramp {config.ramp}" if config.ramp else ""
            if getattr(term, "pairs", None):
                line += ", " + " ".join(s if s == t else f"{s}:{t}" for s, t in term.pairs)  # type: ignore
            adapters = sum(p.numel() for p in term.parameters())
            lines.append(line + (f", {adapters:,} parameters of its own" if adapters else ""))
        return lines
