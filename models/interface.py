"""What every model is to the rest of the house: images in, logits at native stride and named features out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from errors import ConfigurationError


@dataclass
class Output:
    """A model's answer.

    Args:
        logits: float [B, C, h, w] at the model's native stride; h = ceil(H / stride). No model upsamples them.
        features: each requested tap's tensor [B, channels, ceil(H / tap.stride), ceil(W / tap.stride)].
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


class Tap(NamedTuple):
    """Where knowledge can be read off a model: the channels and the stride of one feature map."""

    channels: int
    stride: int


class SegmentationModel(nn.Module, PyTorchModelHubMixin):
    """Base of all models; a subclass sets `taps`, `stride` and `class_names` and answers `forward`.

    `forward(images [B, 3, H, W], taps=()) -> Output` for any H and W. `save_pretrained(folder)` writes
    `model.safetensors` and `config.json` in the Hugging Face Hub's form; `models.load_model(folder)` reads them.
    """

    architecture: str
    taps: dict[str, Tap]
    stride: int
    class_names: list[str]

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        raise TypeError(f"{type(self).__name__} does not answer forward")

    def check_taps(self, taps: Sequence[str]) -> None:
        """Raises ConfigurationError, naming the known taps, if one of `taps` is not this model's."""
        unknown = [tap for tap in taps if tap not in self.taps]
        if unknown:
            raise ConfigurationError(
                f"taps: {self.architecture} has no tap {unknown[0]!r}; it has {', '.join(self.taps)}"
            )

    def _save_pretrained(self, save_directory: Any) -> None:
        self._hub_mixin_config = {"name": self.architecture, **(self._hub_mixin_config or {})}  # type: ignore
        super()._save_pretrained(save_directory)


def native_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Size of a map of the given stride over an image: the quotient rounded up."""
    return math.ceil(height / stride), math.ceil(width / stride)
