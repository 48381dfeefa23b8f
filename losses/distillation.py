"""The objective: the configured terms, their weights and schedules, added up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from losses.adversarial import Holistic, HolisticConfig
from losses.blocks import PixelTerm
from losses.contrast import AfDCD, AfDCDConfig, CIRKDMemory, CIRKDMemoryConfig
from losses.deep import SelfDistillation, SelfDistillationConfig
from losses.features import (
    MGD,
    AttentionTransfer,
    AttentionTransferConfig,
    Fitnet,
    FitnetConfig,
    MGDConfig,
    Review,
    ReviewConfig,
)
from losses.latent import KTA, Affinity, AffinityConfig, AutoencoderConfig, KTAConfig, Latents
from losses.logits import (
    BPKD,
    CWD,
    DIST,
    DKD,
    KD,
    WSL,
    BPKDConfig,
    CWDConfig,
    DISTConfig,
    DKDConfig,
    KDConfig,
    LogitStd,
    LogitStdConfig,
    WSLConfig,
)
from losses.relations import (
    IFVD,
    CIRKDMiniBatch,
    CIRKDMiniBatchConfig,
    IFVDConfig,
    Pairwise,
    PairwiseConfig,
)
from losses.supervised import (
    OHEM,
    Boundary,
    BoundaryConfig,
    ConfidencePenalty,
    ConfidencePenaltyConfig,
    CrossEntropyConfig,
    Dice,
    DiceConfig,
    Focal,
    FocalConfig,
    Lovasz,
    LovaszConfig,
    Margin,
    MarginConfig,
    OHEMConfig,
    Supervised,
)
from losses.term import (
    IGNORE_INDEX,
    UNLABELLED,
    Context,
    ModelOutput,
    Taps,
    TapsConfig,
    TemperatureConfig,
    Term,
    TermConfig,
    deepest_first,
    pair_taps,
)
from losses.upsampled import native_divergence, upsampled_loss


@dataclass
class LossConfig:
    """One optional field per loss; naming one switches it on (`losses.affinity.weight=1`)."""

    cross_entropy: CrossEntropyConfig | None = field(default_factory=CrossEntropyConfig)
    """Cross-entropy with the labels."""
    focal: FocalConfig | None = None
    """Focal loss."""
    dice: DiceConfig | None = None
    """Soft Dice."""
    lovasz: LovaszConfig | None = None
    """Lovász-softmax."""
    ohem: OHEMConfig | None = None
    """Cross-entropy of the hardest pixels."""
    boundary: BoundaryConfig | None = None
    """Cross-entropy with more weight near boundaries."""
    confidence_penalty: ConfidencePenaltyConfig | None = None
    """Confidence penalty, for teachers of high entropy."""
    margin: MarginConfig | None = None
    """Margin-based label smoothing, for teachers of high entropy."""
    self_distillation: SelfDistillationConfig | None = None
    """Deep self-distillation: the last layer teaches classifiers at earlier ones."""
    kd: KDConfig | None = None
    """Knowledge distillation of logits."""
    cwd: CWDConfig | None = None
    """Channel-wise distillation."""
    dist: DISTConfig | None = None
    """DIST: correlations in place of a divergence."""
    wsl: WSLConfig | None = None
    """Weighted soft labels."""
    dkd: DKDConfig | None = None
    """Decoupled distillation."""
    logit_std: LogitStdConfig | None = None
    """Logit standardisation."""
    bpkd: BPKDConfig | None = None
    """Boundary-privileged distillation."""
    attention_transfer: AttentionTransferConfig | None = None
    """Attention transfer."""
    fitnet: FitnetConfig | None = None
    """FitNets' hints."""
    review: ReviewConfig | None = None
    """Knowledge review: maps fused from deep to shallow."""
    mgd: MGDConfig | None = None
    """Masked generative distillation."""
    kta: KTAConfig | None = None
    """Knowledge translation and adaptation: features in an autoencoder's latent space."""
    affinity: AffinityConfig | None = None
    """Affinity of all pairs of positions."""
    pairwise: PairwiseConfig | None = None
    """Affinity of a few max-pooled regions."""
    ifvd: IFVDConfig | None = None
    """How like its class's mean feature each position is."""
    cirkd_mini_batch: CIRKDMiniBatchConfig | None = None
    """Similarities across the images of a batch."""
    cirkd_memory: CIRKDMemoryConfig | None = None
    """Similarities to a memory of the teacher's embeddings."""
    af_dcd: AfDCDConfig | None = None
    """Dense contrast of patches of channels and positions."""
    holistic: HolisticConfig | None = None
    """A critic of image and score map."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """The autoencoder of `kta` and `affinity`."""

    def active(self) -> dict[str, TermConfig]:
        """The configured terms by name, in the order of the fields."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: config for name, config in found.items() if isinstance(config, TermConfig)}


TERMS: dict[type[TermConfig], Callable[[Any, Context], Term]] = {
    CrossEntropyConfig: Supervised,  # these two are made together, by `upsampled_loss`
    KDConfig: KD,
    FocalConfig: Focal,
    DiceConfig: Dice,
    LovaszConfig: Lovasz,
    OHEMConfig: OHEM,
    BoundaryConfig: Boundary,
    ConfidencePenaltyConfig: ConfidencePenalty,
    MarginConfig: Margin,
    SelfDistillationConfig: SelfDistillation,
    CWDConfig: CWD,
    DISTConfig: DIST,
    WSLConfig: WSL,
    DKDConfig: DKD,
    LogitStdConfig: LogitStd,
    BPKDConfig: BPKD,
    AttentionTransferConfig: AttentionTransfer,
    FitnetConfig: Fitnet,
    ReviewConfig: Review,
    MGDConfig: MGD,
    KTAConfig: KTA,
    AffinityConfig: Affinity,
    PairwiseConfig: Pairwise,
    IFVDConfig: IFVD,
    CIRKDMiniBatchConfig: CIRKDMiniBatch,
    CIRKDMemoryConfig: CIRKDMemory,
    AfDCDConfig: AfDCD,
    HolisticConfig: Holistic,
}


def in_turn(name: str, config: TermConfig, context: Context, total_steps: int) -> dict[str, TermConfig]:
    """A term as it is; or, if its taps come one after the other, the terms of each: `fitnet_0`, `fitnet_1`, …

    They are numbered in the order in which they come into force. Each has the weight, the ramp and all else of the
    whole term, and an equal share of its window.

    Raises:
        ConfigurationError: the window has fewer steps than there are pairs of taps.
    """
    if not isinstance(config, TapsConfig) or config.depth == "together":
        return {name: config}
    not_coarser = getattr(TERMS[type(config)], "not_coarser", False)
    pairs = pair_taps(name, [tap for tap in config.taps if tap != "logits"], context, not_coarser)
    taps = {f"{ours}:{theirs}": ours for ours, theirs in pairs}
    taps |= {"logits": "logits"} if "logits" in config.taps else {}
    order = deepest_first(list(dict.fromkeys(taps.values())), context.student)
    turns = sorted(taps, key=lambda tap: order.index(taps[tap]), reverse=config.depth == "shallow_to_deep")
    start, until, _ = config.steps(total_steps)
    steps = int(min(until, total_steps)) - start
    if steps < len(turns):
        raise ConfigurationError(
            f"losses.{name}.depth: {len(turns)} pairs of taps do not fit the {max(steps, 0)} steps of the term's "
            "window; train for longer, or name fewer taps"
        )
    bounds = [start + steps * i // len(turns) for i in range(len(turns) + 1)]
    return {
        f"{name}_{i}": replace(config, taps=[tap], depth="together", start=bounds[i], until=bounds[i + 1])
        for i, tap in enumerate(turns)
    }


class DistillationLoss(nn.Module):
    """Sum of the configured terms, each with its weight and its window in training.

    Of images without labels the teacher alone speaks. Terms that compare with it take its most likely classes for
    the labels there (pseudo-labels, Lee 2013), so that masks hold these pixels and terms that go by classes find
    some; to all others these pixels are void, and the images none of those that they average over.

    Args:
        config: which terms.
        student_taps, teacher_taps: what the models publish; no teacher is None.
        classes: number of classes; needed by terms with a memory or a critic.
        class_weights: gives the [C] weights of a scheme; needed where a term asks for one.
        total_steps: length of training, of which schedules may be fractions.
        extra: terms of your own by name, each with its weight and schedule.
        unlabelled: labels may be UNLABELLED. Cross-entropy and KD then take a pass each.

    Raises:
        ConfigurationError: no term is configured, or one cannot be with these models or data.
    """

    def __init__(
        self,
        config: LossConfig,
        student_taps: Taps,
        teacher_taps: Taps | None = None,
        *,
        classes: int = 0,
        class_weights: Callable[[str], Tensor] | None = None,
        total_steps: int = 1,
        extra: Mapping[str, tuple[TermConfig, Term]] | None = None,
        unlabelled: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.total_steps = config, total_steps
        if not config.active() and not extra:
            raise ConfigurationError("losses: no term is configured; leave losses.cross_entropy as it is")

        def weights(scheme: str) -> Tensor | None:
            if scheme == "uniform":
                return None
            if class_weights is None:
                raise ConfigurationError(f"losses: class_weights={scheme} needs a data set's label counts")
            return class_weights(scheme)

        self.latents = Latents(config.autoencoder)
        context = Context(student_taps, teacher_taps, classes, weights, self.latents)
        self.configs: dict[str, TermConfig] = {}
        for name, part in config.active().items():
            self.configs |= in_turn(name, part, context, total_steps)
        terms = {name: TERMS[type(part)](part, context) for name, part in self.configs.items()}
        for name, (term_config, own_term) in (extra or {}).items():
            self.configs[name], terms[name] = term_config, own_term
        self.terms = nn.ModuleDict(terms)
        self.taught = teacher_taps is not None
        self.unlabelled = unlabelled
        for name, term in terms.items():
            if unlabelled and term.taught and isinstance(term, PixelTerm) and term.class_weights is not None:
                raise ConfigurationError(
                    f"losses.{name}.class_weights: unlabelled pixels are counted before the teacher tells their "
                    "classes; leave it at uniform"
                )

    @property
    def student_taps(self) -> list[str]:
        """Taps that the student must answer with."""
        return sorted({tap for term in self.terms.values() for tap in term.student_taps})  # type: ignore

    @property
    def teacher_taps(self) -> list[str]:
        """Taps that the teacher must answer with at one step or another, a cache's say."""
        return self.latents.sources([tap for term in self.terms.values() for tap in term.teacher_taps])  # type: ignore

    def teacher_taps_at(self, step: int) -> list[str]:
        """Taps that the teacher must answer with at `step` (from 0): those of the terms in force."""
        return self.latents.sources([tap for term in self._in_force(step) for tap in term.teacher_taps])

    def needs_teacher(self, step: int) -> bool:
        """Whether a term in force at `step` (from 0) compares with a teacher; else forward takes None for it."""
        return self.taught and any(term.taught for term in self._in_force(step))

    @property
    def needs_true_logits(self) -> list[str]:
        """The terms that compare a teacher's logits across positions, or with a constant, by name.

        A softmax over the classes does not see a number that is taken off all logits of a position, and most terms
        begin with one; these change.
        """
        return [name for name, term in self.terms.items() if term.true_logits]

    def _in_force(self, step: int) -> list[Term]:
        factors = {name: config.factor(step, self.total_steps) for name, config in self.configs.items()}
        return [term for name, term in self.terms.items() if factors[name]]  # type: ignore[misc]

    def make_opponents(self) -> list[nn.Module]:
        """Learners of their own that the terms bring, critics say, to be stepped as players beside the student."""
        made = (term.opponent(self.configs[name], self.total_steps) for name, term in self.terms.items())  # type: ignore
        return [learner for learner in made if learner is not None]

    @property
    def memories(self) -> list[str]:
        """Names of buffers that all processes write alike: large, and not to be broadcast."""
        return [f"terms.{name}.{buffer}" for name, term in self.terms.items() for buffer in term.memories()]  # type: ignore

    def counts(self, labels: Tensor) -> Tensor:
        """Each term's local denominator: float64 [terms], to be added up over parts and processes."""
        own = taught = labels
        if self.unlabelled:
            blank = labels == UNLABELLED
            own, taught = labels.masked_fill(blank, IGNORE_INDEX), labels.masked_fill(blank, 0)
            own = own[(own != IGNORE_INDEX).flatten(1).any(1) | ~blank.flatten(1).any(1)]
        return torch.stack([term.count(taught if term.taught else own) for term in self.terms.values()])  # type: ignore

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        labels: Tensor,
        *,
        step: int = 0,
        denominators: Tensor | None = None,
        images: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at `step` (from 0), and the terms in force, unweighted and detached, by name.

        Args:
            teacher: its answer, with `teacher_taps_at(step)`; may be None where `needs_teacher(step)` is False.
            labels: int64 [B, H, W], 255 ignored; UNLABELLED (253) where only the teacher speaks.
            denominators: float64 [terms]; those of the whole batch if this is a part of it, else `counts(labels)`.
            images: [B, 3, H, W], which some terms see.
        """
        if denominators is None:
            denominators = self.counts(labels)
        precision = torch.promote_types(student.logits.dtype, torch.float32)
        shares = dict(zip(self.terms, denominators.to(precision), strict=True))
        for name, config in self.configs.items():
            if isinstance(config, TemperatureConfig):
                self.terms[name].temperature = config.temperature_at(step, self.total_steps)  # type: ignore
        factors = {name: config.factor(step, self.total_steps) for name, config in self.configs.items()}
        if teacher is not None:
            taps = [tap for term in self._in_force(step) for tap in term.teacher_taps]
            teacher = self.latents.extend(teacher, taps)
        own = taught = labels
        if self.unlabelled:
            own, taught = told_apart(labels, teacher)
            shares = {name: torch.where(share == 0, 1, share) for name, share in shares.items()}
        loss, values = self._pixel_terms(student, teacher, own, taught, factors, shares)
        for name, term in self.terms.items():
            if name in ("cross_entropy", "kd"):
                continue
            if factors[name]:
                extra = {"images": images} if term.wants_images else {}
                value = term(student, teacher, taught if term.taught else own, shares[name], **extra)
                loss, values[name] = loss + factors[name] * value, value.detach()
            else:
                # Outside its window a term still touches its parameters, or DDP waits for their gradients.
                touched = (parameter.sum() for parameter in term.parameters() if parameter.requires_grad)
                loss = loss + sum(0.0 * value for value in touched)
        return loss, values

    def _pixel_terms(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        labels: Tensor,
        taught_labels: Tensor,
        factors: dict[str, float],
        shares: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and KD in one pass over the upsampled logits; a zero that touches them if none is on.

        KD at the student's own positions is a pass of its own, and so are both where their labels differ.
        """
        ce, kd = factors.get("cross_entropy", 0.0), factors.get("kd", 0.0)
        if not ce and not kd:
            return student.logits.sum(dtype=torch.float32) * 0.0, {}
        taught = teacher.logits if kd and teacher is not None else None
        temperature: Any = self.terms["kd"].temperature if kd else 1.0
        kl_class_weights: Any = self.terms["kd"].class_weights if kd else None
        loss, values = student.logits.new_zeros((), dtype=torch.float32), {}
        if taught is not None and self.terms["kd"].at == "logits":
            loss, values["kd"] = native_divergence(
                student.logits,
                taught_labels,
                taught,
                weight=kd,
                temperature=temperature,
                class_weights=kl_class_weights,
                denominator=shares.get("kd"),
            )
            kd, taught = 0.0, None
        passes = [(taught_labels, ce, kd)]
        if self.unlabelled:
            passes = [(labels, ce, 0.0), (taught_labels, 0.0, kd)]
        for seen, ce, kd in passes:
            if not ce and not kd:
                continue
            exact, made = upsampled_loss(
                student.logits,
                seen,
                taught,
                ce_weight=ce,
                kl_weight=kd,
                temperature=temperature,
                class_weights=self.terms["cross_entropy"].class_weights if ce else None,  # type: ignore[arg-type]
                label_smoothing=self.config.cross_entropy.label_smoothing if self.config.cross_entropy else 0.0,
                ce_denominator=shares.get("cross_entropy"),
                kl_denominator=shares.get("kd"),
                kl_class_weights=kl_class_weights,
            )
            loss = loss + exact
            values |= {name: made[key] for name, key, on in (("cross_entropy", "ce", ce), ("kd", "kl", kd)) if on}
        return loss, values

    def describe(self) -> list[str]:
        """One line a term: weight, window, taps, adapters' parameters."""
        lines = []
        for name, term in self.terms.items():
            config = self.configs[name]
            line = f"{name}: weight {config.weight:g}"
            line += config.window(self.total_steps)
            if isinstance(config, TemperatureConfig) and config.temperature_until is not None:
                line += f", temperature {config.temperature:g} to {config.temperature_until:g}"
            if getattr(term, "pairs", None):
                pairs = [(s, self.latents.describe(t)) for s, t in term.pairs]  # type: ignore
                line += ", " + ", ".join(s if s == t else f"{s} to {t}" for s, t in pairs)
            adapters = sum(p.numel() for p in term.parameters() if p.requires_grad)
            line += f", {adapters:,} parameters of its own" if adapters else ""
            lines.append(line + (f", {term.note()}" if term.note() else ""))  # type: ignore[operator]
        return lines


def told_apart(labels: Tensor, teacher: ModelOutput | None) -> tuple[Tensor, Tensor]:
    """Labels [B, H, W] for terms of the labels alone, in which UNLABELLED is void, and for those that compare with
    a teacher, in which it is the teacher's most likely class at the nearest of its positions."""
    blank = labels == UNLABELLED
    own = labels.masked_fill(blank, IGNORE_INDEX)
    if teacher is None:
        return own, own
    said = teacher.logits.detach().argmax(1, keepdim=True).float()
    nearest = F.interpolate(said, size=labels.shape[-2:], mode="nearest-exact")[:, 0].long()
    return own, torch.where(blank, nearest, labels)
