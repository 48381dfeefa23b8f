"""What every model is to the rest of the house: images in, logits at native stride and named features out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from errors import ConfigurationError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Output:
    """A model's answer.

    Args:
        logits: float [B, C, h, w] at the model's native stride; h = ceil(H / stride). No model upsamples them.
        features: each requested tap's tensor [B, channels, ceil(H / tap.stride), ceil(W / tap.stride)].
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


torch.export.register_dataclass(Output, serialized_type_name="segdistill.Output")


class Tap(NamedTuple):
    """Where knowledge can be read off a model: the channels and the stride of one feature map."""

    channels: int
    stride: int


class SegmentationModel(nn.Module, PyTorchModelHubMixin):
    """Base of all models; a subclass sets `taps`, `stride` and `class_names` and answers `forward`.

    `forward(images [B, 3, H, W], taps=()) -> Output` for any H and W. `save_pretrained(folder)` writes
    `model.safetensors` and `config.json` in the Hugging Face Hub's form; `models.load_model(folder)` reads them.

    `mean` and `std`, RGB of values in 0..1, are the normalisation that the weights know, and are saved with them.
    A batch that is normalised otherwise is announced by `take_images`, and `forward` converts it by `renormalise`.
    """

    architecture: str
    taps: dict[str, Tap]
    stride: int
    class_names: list[str]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    precision: str = "fp32"
    factor: Tensor | None
    shift: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.changes: dict[str, Any] = {}  # what was done to it after it was built, as config.json has it
        self.register_buffer("factor", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        raise TypeError(f"{type(self).__name__} does not answer forward")

    def take_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """From now on `forward` is given images normalised by these; `mean` and `std` stay as they are."""
        own, given = (torch.tensor([m, s], dtype=torch.float64) for m, s in ((self.mean, self.std), (mean, std)))
        same = torch.equal(own, given)
        factor, shift = given[1] / own[1], (given[0] - own[0]) / own[1]
        where = next(self.parameters(), own).device
        self.factor = None if same else factor.float().view(3, 1, 1).to(where)
        self.shift = None if same else shift.float().view(3, 1, 1).to(where)

    def renormalise(self, images: Tensor) -> Tensor:
        """Images as the weights know them, of those that `take_images` announced."""
        if self.factor is None or self.shift is None:
            return images
        return images * self.factor + self.shift

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory: activations inside blocks are computed again in the backward pass."""
        raise ConfigurationError(
            f"gradient_checkpointing: {self.architecture} has none; leave it out, or lower train.batch_size"
        )

    def notes(self) -> list[str]:
        """What a user should know before it is put to use; printed at the start."""
        return []

    def answer(
        self, images: Tensor, logits: Tensor, features: Mapping[str, Tensor], taps: Sequence[str]
    ) -> Output:
        """Logits and the wanted features in the sizes that belong to `images`, which `forward` was given."""
        height, width = images.shape[-2:]
        wanted = {tap: self.to_native(features[tap], height, width, self.taps[tap].stride) for tap in taps}
        return Output(self.to_native(logits, height, width, self.stride), wanted)

    def to_native(self, map_: Tensor, height: int, width: int, stride: int) -> Tensor:
        """A map of the padded image without what stands over the padding alone."""
        rows, columns = native_size(height, width, stride)
        return map_[..., :rows, :columns]

    def check_taps(self, taps: Sequence[str]) -> None:
        """Raises ConfigurationError, naming the known taps, if one of `taps` is not this model's."""
        unknown = [tap for tap in taps if tap not in self.taps]
        if unknown:
            raise ConfigurationError(
                f"taps: {self.architecture} has no tap {unknown[0]!r}; it has {', '.join(self.taps)}"
            )

    @classmethod
    def _from_pretrained(cls, *, config: Any = None, strict: bool = True, **options: Any) -> Any:
        """As the Hub's mixin does it, but strictly, and with the normalisation.

        Raises:
            ConfigurationError: it was pruned or quantised, and so has other layers than its class makes.
        """
        if (config or {}).get("changes"):
            raise ConfigurationError(
                f"{options.get('model_id')}: the model was changed after it was built "
                f"({', '.join((config or {})['changes'])}); read its folder with models.load_model"
            )
        model = super()._from_pretrained(strict=strict, **options)
        model.mean, model.std = (tuple((config or {}).get(key, getattr(cls, key))) for key in ("mean", "std"))
        return model

    def _save_pretrained(self, save_directory: Any) -> None:
        known: dict[str, Any] = {"name": self.architecture, "mean": list(self.mean), "std": list(self.std)}
        known |= {"changes": self.changes} if self.changes else {}
        self._hub_mixin_config = dict(self._hub_mixin_config or {}) | known  # type: ignore
        super()._save_pretrained(save_directory)


def pad_to(images: Tensor, stride: int) -> Tensor:
    """Images padded with 0 on the right and below to a multiple of `stride`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def native_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Size of a map of the given stride over an image: the quotient rounded up."""
    return (height + stride - 1) // stride, (width + stride - 1) // stride
