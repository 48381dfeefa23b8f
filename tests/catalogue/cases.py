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
CASES: dict[str, Case] = {
    "cross_entropy": Case("cross_entropy", supervised=True),
    "cross_entropy, weighted and smoothed": Case(
        "cross_entropy",
        {"class_weights": "median", "label_smoothing": 0.1},
        supervised=True,
        excused={"perfect": "a smoothed target costs its entropy"},
    ),
    "kd": Case("kd", {"temperature": 2.0}),
    "kd, weighted": Case("kd", {"class_weights": "median"}),
    "attention_transfer": Case("attention_transfer", BOTH, void=False, tiling=1 / 6),  # of unit norm over space
    "attention_transfer, labelled": Case("attention_transfer", {**BOTH, "labelled_only": True}, tiling=1 / 6),
    "fitnet": Case("fitnet", BOTH, void=False),
    "fitnet, labelled": Case("fitnet", {**BOTH, "labelled_only": True}),
    "affinity": Case("affinity", BOTH, void=False),
    "affinity, labelled": Case("affinity", {**BOTH, "labelled_only": True}),
}


def names(test: str) -> list[str]:
    """The cases that a test of the contract goes over."""
    return [name for name, case in CASES.items() if test not in case.excused]


def objective(name: str, student: Any = STUDENT_TAPS, teacher: Any = TEACHER_TAPS) -> DistillationLoss:
    """The objective of one case, its weight 1, its parameters from a fixed seed."""
    case = CASES[name]
    config = LossConfig(**({"cross_entropy": None} | {case.name: CONFIGS[case.name](weight=1.0, **case.options)}))
    torch.manual_seed(0)
    return DistillationLoss(
        config, student, teacher, classes=CLASSES, class_weights=lambda scheme: WEIGHTS, total_steps=10
    )


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
