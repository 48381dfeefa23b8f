"""The catalogue of losses as the tests see it: a case a term and option, what each promises, and small inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losses import DistillationLoss, LossConfig
from losses.distillation import TERMS
from losses.term import term_name

VOID = 255
CLASSES = 5
CONFIGS = {term_name(config): config for config in TERMS}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25])


@dataclass
class Shape:
    """A tap as a model publishes it."""

    channels: int
    stride: int


@dataclass
class Answer:
    """A model's output."""

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


STUDENT_TAPS = {"a": Shape(3, 2), "b": Shape(4, 4)}
TEACHER_TAPS = {"a": Shape(6, 2), "b": Shape(7, 4)}


@dataclass
class Case:
    """A term with some options, and what it promises.

    Args:
        name: its field in LossConfig.
        options: of its configuration.
        void: unlabelled pixels are left out; the loss of labels that are all void is 0.
        tiling: factor by which tiling the image changes the loss.
        supervised: it needs no teacher.
        reaches: where its gradient arrives: "logits" or taps; by default those of `options["taps"]`, else logits.
        excused: tests of the contract that it can't meet, each with the reason.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    void: bool = True
    tiling: float = 1.0
    supervised: bool = False
    reaches: tuple[str, ...] = ()
    excused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reaches = self.reaches or tuple(self.options.get("taps", ["logits"]))


BOTH = {"taps": ["a", "b"]}
TILED_EDGES = "where tiles meet there are new edges of classes"
LATENT = {
    "perfect": "the student's adapter is not the autoencoder's encoder",
    "tiling": "3×3 convolutions see the border",
}
REGIONS = {"tiling": "a region is a share of the image, and a tiled image's is another"}
LOCAL = {"parts": "it compares the images of a part with one another"}
MEMORY = {
    "perfect": "the student's embedding is behind a head of its own",
    "doubling": "what is in the memory depends on the batch",
    "tiling": "what is in the memory depends on the image",
    "void": "batch-norm carries what stands at unlabelled positions",
    "parts": "in eval its memory is empty and it is 0; with a memory it is tested apart",
}
GENERATED = {
    "perfect": "the student's features go through a generator of its own",
    "tiling": "3×3 convolutions see the border",
}
JUDGED = {
    "perfect": "a critic's score has no zero",
    "tiling": "3×3 convolutions see the border",
}
CONVOLVED = {"void": "3×3 convolutions and batch-norm carry what stands beside a labelled position"}
AUXILIARY = {
    "perfect": "its classifiers are not the student's",
    "tiling": "3×3 convolutions see the border",
}
FUSED = {
    "perfect": "batch-norm and fusion stand before the comparison",
    "tiling": "3×3 convolutions see the border, and the pyramid's cells grow",
}
GENERATED = {
    "perfect": "the generation's ReLU and mask keep the student's map from arriving as it is",
    "tiling": "3×3 convolutions see the border",
}
MASKED = dict.fromkeys(("doubling", "parts"), "each image of a batch gets a mask of its own")
CASES: dict[str, Case] = {
    "cross_entropy": Case("cross_entropy", supervised=True),
    "cross_entropy, weighted and smoothed": Case(
        "cross_entropy",
        {"class_weights": "median", "label_smoothing": 0.1},
        supervised=True,
        excused={"perfect": "a smoothed target costs its entropy"},
    ),
    "focal": Case("focal", supervised=True),
    "focal, weighted": Case("focal", {"class_weights": "median", "gamma": 0.5}, supervised=True),
    "dice": Case("dice", supervised=True),
    "lovasz": Case("lovasz", supervised=True),
    "ohem": Case("ohem", {"threshold": 0.1, "least": 0.3}, supervised=True),
    "boundary": Case("boundary", {"width": 1.0}, supervised=True, excused={"tiling": TILED_EDGES}),
    "boundary, weighted": Case(
        "boundary",
        {"width": 2.0, "class_weights": "median"},
        supervised=True,
        excused={"tiling": TILED_EDGES},
    ),
    "confidence_penalty": Case("confidence_penalty", supervised=True),
    "margin": Case(
        "margin",
        {"margin": 1.0},
        supervised=True,
        excused={"perfect": "it penalises sure answers, right or wrong"},
    ),
    "self_distillation": Case(
        "self_distillation", {"taps": ["a"]}, supervised=True, excused=AUXILIARY | CONVOLVED
    ),
    "self_distillation, weighted": Case(
        "self_distillation",
        {"taps": ["a"], "class_weights": "median", "alpha": 0.6, "temperature": 2.0, "hint": 0.5},
        supervised=True,
        excused=AUXILIARY | CONVOLVED,
    ),
    "self_distillation, labels alone": Case(
        "self_distillation",
        {"taps": ["a"], "alpha": 0.0, "hint": 0.0},
        supervised=True,
        excused=AUXILIARY | CONVOLVED,
    ),
    "kd": Case("kd", {"temperature": 2.0}),
    "kd, weighted": Case("kd", {"class_weights": "median"}),
    "kd, at logits": Case("kd", {"at": "logits", "temperature": 2.0, "class_weights": "median"}),
    "cwd": Case("cwd"),
    "cwd, all positions": Case("cwd", {"labelled_only": False}, void=False),
    "cwd, features": Case("cwd", {"taps": ["logits", "a", "b"]}),
    "dist": Case("dist", {"temperature": 2.0, "beta": 0.5}),
    "wsl": Case("wsl"),
    "wsl, weighted": Case("wsl", {"class_weights": "median"}),
    "dkd": Case("dkd"),
    "dkd, weighted": Case("dkd", {"class_weights": "median"}),
    "logit_std": Case("logit_std"),
    "logit_std, weighted": Case("logit_std", {"class_weights": "median"}),
    "bpkd": Case("bpkd", {"edge_width": 3}, excused={"tiling": TILED_EDGES}),
    "bpkd, weighted": Case("bpkd", {"edge_width": 3, "class_weights": "median"}, excused={"tiling": TILED_EDGES}),
    "attention_transfer": Case("attention_transfer", BOTH, void=False, tiling=1 / 6),  # of unit norm over space
    "attention_transfer, labelled": Case("attention_transfer", {**BOTH, "labelled_only": True}, tiling=1 / 6),
    "fitnet": Case("fitnet", BOTH, void=False),
    "fitnet, labelled": Case("fitnet", {**BOTH, "labelled_only": True}),
    "review": Case("review", BOTH, void=False, excused=FUSED),
    "review, one pair, labelled": Case(
        "review", {"taps": ["b:a"], "labelled_only": True}, reaches=("b",), excused=FUSED | CONVOLVED
    ),
    "mgd": Case("mgd", BOTH, void=False, excused=GENERATED | MASKED),
    "mgd, nothing masked": Case("mgd", {**BOTH, "mask_ratio": 0.0}, void=False, excused=GENERATED),
    "mgd, labelled": Case("mgd", {**BOTH, "labelled_only": True}, excused=GENERATED | MASKED | CONVOLVED),
    "affinity": Case("affinity", {**BOTH, "space": "raw"}, void=False),
    "affinity, labelled": Case("affinity", {**BOTH, "space": "raw", "labelled_only": True}),
    "affinity, latent": Case("affinity", BOTH, void=False, excused=LATENT),
    "pairwise": Case("pairwise", BOTH, void=False, excused=REGIONS),
    "pairwise, labelled": Case("pairwise", {**BOTH, "labelled_only": True}, excused=REGIONS),
    "ifvd": Case("ifvd", BOTH),
    "cirkd_mini_batch": Case("cirkd_mini_batch", BOTH, void=False, excused=LOCAL),
    "cirkd_mini_batch, labelled": Case("cirkd_mini_batch", {**BOTH, "labelled_only": True}, excused=LOCAL),
    "cirkd_memory": Case("cirkd_memory", {"taps": ["b"]}, excused=MEMORY),
    "af_dcd": Case(
        "af_dcd", {"taps": ["a"], "mask_ratio": 0.0, "groups": 3, "pool": 2}, void=False, excused=GENERATED
    ),
    "holistic": Case("holistic", {"critic_width": 4}, void=False, excused=JUDGED),
    "kta": Case("kta", BOTH, void=False, excused=LATENT),
    "kta, labelled": Case("kta", {**BOTH, "labelled_only": True}, excused=LATENT | CONVOLVED),
}


def names(test: str) -> list[str]:
    """The cases that a test of the contract goes over."""
    return [name for name, case in CASES.items() if test not in case.excused]


def objective(name: str, student: Any = STUDENT_TAPS, teacher: Any = TEACHER_TAPS) -> DistillationLoss:
    """The objective of one case, its weight 1, its parameters and its draws from fixed seeds."""
    case = CASES[name]
    config = LossConfig(**({"cross_entropy": None} | {case.name: CONFIGS[case.name](weight=1.0, **case.options)}))
    torch.manual_seed(0)
    made = DistillationLoss(
        config, student, teacher, classes=CLASSES, class_weights=lambda scheme: WEIGHTS, total_steps=10
    )
    return stepped(made)


def stepped(made: DistillationLoss) -> DistillationLoss:
    """Called as the loop does: with the step's seed set, and images, here of the labels."""

    def hook(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(1)
        images = torch.stack([(arguments[2] + i).float().sin() for i in range(3)], 1)
        return arguments, {"images": images} | options

    made.register_forward_pre_hook(hook, with_kwargs=True)
    return made


def answers(
    batch: int = 2, height: int = 8, width: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Answer, Answer, Tensor]:
    """Student and teacher on random maps, logits at label size, a fifth of the labels void, all with gradients."""
    torch.manual_seed(seed)

    def answer(taps: dict[str, Shape]) -> Answer:
        features = {
            name: torch.randn(batch, tap.channels, -(-height // tap.stride), -(-width // tap.stride), dtype=dtype)
            for name, tap in taps.items()
        }
        logits = torch.randn(batch, CLASSES, height, width, dtype=dtype)
        return Answer(logits.requires_grad_(), {k: v.requires_grad_() for k, v in features.items()})

    labels = torch.randint(0, CLASSES, (batch, height, width))
    labels[torch.rand(labels.shape) < 0.2] = VOID
    return answer(STUDENT_TAPS), answer(TEACHER_TAPS), labels


def changed(answer: Answer, change: Callable[[Tensor], Tensor]) -> Answer:
    """The answer with every tensor changed, as new leaves."""
    return Answer(
        change(answer.logits.detach()).requires_grad_(),
        {name: change(value.detach()).requires_grad_() for name, value in answer.features.items()},
    )


def leaves(answer: Answer) -> list[Tensor]:
    return [answer.logits, *answer.features.values()]


def gradients(loss: Tensor, answer: Answer) -> list[Tensor]:
    """The gradient with respect to each tensor of the answer, zero where there is none."""
    found = torch.autograd.grad(loss, leaves(answer), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves(answer), found, strict=True)]
