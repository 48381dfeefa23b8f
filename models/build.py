"""A model from its configuration or from a folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from errors import ConfigurationError, DamagedFileError
from models.interface import IMAGENET_MEAN, IMAGENET_STD, SegmentationModel
from models.unet import UNet

ARCHITECTURES: dict[str, type[SegmentationModel]] = {"unet": UNet}


@dataclass
class ModelConfig:
    """Which model, and its shape."""

    name: Literal["unet"] = "unet"
    """Architecture."""
    width: int = 16
    """UNet: channels of its finest level; each level below has twice as many."""
    depth: int = 3
    """UNet: levels above the bottleneck."""
    stride: int = 4
    """UNet: stride of the stem and of the logits: 1, 2 or 4."""
    block: Literal["plain", "separable", "residual"] = "plain"
    """UNet: plain double convolution, depthwise-separable, or residual."""

    def __post_init__(self) -> None:
        if self.stride not in (1, 2, 4):
            raise ConfigurationError(f"model.stride: {self.stride} is not a stride of the UNet; give 1, 2 or 4")
        if self.width < 2 or self.width % 2:
            raise ConfigurationError(
                f"model.width: {self.width} is not an even number of channels; give 2 or more"
            )
        if not 1 <= self.depth <= 6:
            raise ConfigurationError(f"model.depth: {self.depth} is out of range; give 1 to 6")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights and their names, shortened: tells whether something was made for this very model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class ClassNames(Protocol):
    """What a model asks of a data set's labels."""

    @property
    def names(self) -> tuple[str, ...]: ...


def build_model(config: ModelConfig, labels: ClassNames) -> SegmentationModel:
    """A freshly initialised model for the classes of `labels`."""
    return UNet(list(labels.names), config.width, config.depth, config.stride, config.block)


def load_model(folder: str | Path) -> SegmentationModel:
    """The model that `save_pretrained` wrote to `folder`.

    A missing, superfluous or misshapen weight is an error, never a random initialisation.

    Raises:
        ConfigurationError: the folder or one of its two files does not exist.
        DamagedFileError: a file can't be read, or its weights are not those of its configuration.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigurationError(
                f"{folder / name}: no such file; a model's folder has config.json and weights"
            )
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        architecture = ARCHITECTURES[config.pop("name")]
        mean, std = config.pop("mean", IMAGENET_MEAN), config.pop("std", IMAGENET_STD)
        model = architecture(**config)
        model.mean, model.std = tuple(mean), tuple(std)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{folder / 'config.json'}: not the configuration of a model ({error!r}); save the model again"
        ) from error
    weights = folder / "model.safetensors"
    try:
        with safe_open(weights, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{weights}: can't be read ({error}); save the model again") from error
    expected = model.state_dict()
    wrong = [f"missing {name}" for name in expected.keys() - state.keys()]
    wrong += [f"superfluous {name}" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name} is {list(state[name].shape)}, not {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if wrong:
        listed = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DamagedFileError(f"{weights}: weights of another model: {listed}; check the folder's config.json")
    model.load_state_dict(state)
    return model
