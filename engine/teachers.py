"""Where the teacher's answers come from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass
class TeacherConfig:
    """Which teacher, and where its answers come from."""

    run: str = ""
    """Run directory of the teacher; its `best` weights are used."""
    source: Literal["live"] = "live"
    """live: the teacher sees each batch as the student does."""


class OfflineTeacher:
    """A frozen teacher beside the training: in eval mode, without gradients, never wrapped, never optimised.

    Args:
        model: answers `model(images, taps)`.
        device: where it runs.
        autocast: the training's mixed precision.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model.eval().requires_grad_(False)
        self.autocast = autocast

    @torch.no_grad()  # not inference_mode: its tensors can't be saved for a backward pass
    def __call__(self, images: Tensor, taps: Sequence[str]) -> Any:
        with self.autocast():
            return self.model(images, taps)
