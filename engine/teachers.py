"""Where the teacher's answers come from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errors import ConfigurationError


@dataclass
class TeacherConfig:
    """Which teacher, and where its answers come from."""

    run: str = ""
    """Run directory of the teacher, whose `best` weights are used, or folder of a model, ours or transformers'."""
    hub: str = ""
    """Name on the Hugging Face Hub, owner/name or owner/name@revision, in place of `run`."""
    classes: dict[str, str] = field(default_factory=dict)
    """Our classes and what the teacher calls them, `{bicyclist: rider + bicycle}`, where names don't tell."""
    absent: list[str] = field(default_factory=list)
    """Our classes that the teacher may lack; it gives them a millionth of the probability."""
    accept_near_chance: bool = False
    """Go on with a teacher from a folder or the Hub that scores as if it guessed."""
    source: Literal["live"] = "live"
    """live: the teacher sees each batch as the student does."""

    def __post_init__(self) -> None:
        if self.run and self.hub:
            raise ConfigurationError("teacher.hub: teacher.run is given too; give one teacher")


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
