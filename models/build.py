"""A model from its configuration or from a folder."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Union

import torch
from torch import nn

from errors import ConfigurationError, DamagedFileError
from models import budget
from models.interface import IMAGENET_MEAN, IMAGENET_STD, SegmentationModel
from models.pruned import restore_shapes
from models.quantised import restore_plan
from models.slicing import slice_from
from models.unet import UNet, check_shape
from models.weights import check_weights, read_weights

Architecture = Literal["unet", "deeplabv3plus", "segformer", "mobilenetv2", "dabnet", "hub"]


def architecture(name: str) -> type[SegmentationModel]:
    """The class of an architecture. Those that need transformers are imported on demand: it takes seconds.

    Raises:
        KeyError: there is none of that name.
    """
    module, cls = {
        "unet": ("unet", "UNet"),
        "deeplabv3plus": ("deeplabv3plus", "DeepLabV3Plus"),
        "segformer": ("segformer", "SegFormer"),
        "mobilenetv2": ("mobilenetv2", "MobileNetV2"),
        "dabnet": ("dabnet", "DABNet"),
        "hub": ("hub", "HubModel"),
    }[name]
    return getattr(importlib.import_module(f"models.{module}"), cls)


@dataclass
class ModelConfig:
    """Which model, and its shape; a key of another architecture is an error."""

    key: ClassVar[str] = "model"
    preset_width: ClassVar[int] = 32  # that of train_teacher.py, which is there whatever the architecture

    name: Architecture = "unet"
    """Architecture; hub is any segmentation model of Hugging Face transformers."""
    width: int = 16
    """UNet: channels of its finest level; each level below has twice as many."""
    depth: int = 3
    """UNet: levels above the bottleneck."""
    stride: int = 4
    """UNet: stride of its logits, 1, 2, 4, 8, 16 or 32; that of the stem too up to 4, beyond it the decoder ends
    sooner."""
    block: Literal["plain", "separable", "residual", "inverted"] = "plain"
    """UNet: plain double convolution, depthwise-separable, residual, or inverted bottleneck."""
    channels: list[int] | None = None
    """UNet: channels of each level, the bottleneck last, in place of `width`."""
    max_parameters: int | None = None
    """UNet: the widest that has no more parameters, in place of `width`."""
    max_flops: Union[int, float, None] = None  # noqa: UP007 (OmegaConf tells 5 from 0.5 by it)
    """UNet: the widest that has no more FLOPs (two for a multiply-add) at `flops_size`, in place of `width`."""
    flops_size: list[int] = field(default_factory=lambda: [512, 1024])
    """[height, width] of the image of `max_flops`."""
    slice_from: str = ""
    """UNet: run of a wider UNet whose most important channels are the first weights."""
    encoder: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "convnext_tiny", "convnext_small"
    ] = "resnet18"
    """DeepLabV3+: its encoder."""
    output_stride: int | None = None
    """Stride of the encoder's last map. DeepLabV3+: 8 or 16 (default); MobileNetV2: 8, 16 or 32 (default)."""
    variant: Literal["b0", "b1", "b2", "b3", "b4", "b5"] = "b0"
    """SegFormer: its size."""
    multiplier: float = 1.0
    """MobileNetV2: factor of its channels."""
    weights: str = ""
    """Folder or Hub name of the weights to begin with: of the encoder (DeepLabV3+, MobileNetV2, SegFormer) or of
    the whole (SegFormer, hub). Nothing is drawn at random that they should have."""
    new_head: bool = False
    """hub: draw the classifier anew, where `weights` knows other classes than the data set."""
    pretrained: bool = True
    """hub: false takes the shape alone from `weights` and draws all weights at random."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        own = {*KEYS[self.name], "name", "gradient_checkpointing"}
        for known in fields(self):
            value = getattr(self, known.name)
            default = known.default if known.default is not MISSING else known.default_factory()  # type: ignore
            preset = known.name == "width" and value == self.preset_width
            if known.name not in own and value != default and not preset:
                raise self.wrong(
                    known.name, f"is no key of {self.name}, which has {', '.join(sorted(own))}; leave it out"
                )
        chosen = next((key for key in ("channels", "max_parameters", "max_flops") if getattr(self, key)), None)
        if chosen and self.width not in (ModelConfig.width, self.preset_width):
            raise self.wrong("width", f"stands beside {chosen}, which decides it; give one of both")
        if self.width < 2 or self.width % 2:
            raise self.wrong("width", f"{self.width} is not an even number of channels; give 2 or more")
        if not 1 <= self.depth <= 6:
            raise self.wrong("depth", f"{self.depth} is out of range; give 1 to 6")
        check_shape(self.depth, self.stride, self.channels, self.key)
        if self.channels is not None and (self.max_parameters or self.max_flops):
            raise self.wrong("channels", "stands beside a budget, which chooses them; give one of both")
        for key in ("max_parameters", "max_flops", "multiplier"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise self.wrong(key, f"{value} is not positive; give more")
        if len(self.flops_size) != 2 or min(self.flops_size) < 1:
            raise self.wrong("flops_size", f"{self.flops_size} is not a size; give [height, width] in pixels")
        strides = {"deeplabv3plus": (8, 16), "mobilenetv2": (8, 16, 32)}.get(self.name, ())
        if self.output_stride is not None and self.output_stride not in strides:
            raise self.wrong(
                "output_stride",
                f"{self.output_stride} is no output stride of {self.name}; give {' or '.join(map(str, strides))}",
            )
        if self.name == "hub" and not self.weights:
            raise self.wrong("weights", "hub needs the folder or Hub name of a model; give it")

    def wrong(self, field: str, message: str) -> ConfigurationError:
        """The error of one of its keys, as the user wrote it."""
        return ConfigurationError(f"{self.key}.{field}: {message}")


KEYS: dict[str, tuple[str, ...]] = {
    "unet": (
        "width",
        "depth",
        "stride",
        "block",
        "channels",
        "max_parameters",
        "max_flops",
        "flops_size",
        "slice_from",
    ),
    "deeplabv3plus": ("encoder", "output_stride", "weights"),
    "segformer": ("variant", "weights"),
    "mobilenetv2": ("multiplier", "output_stride", "weights"),
    "dabnet": (),
    "hub": ("weights", "new_head", "pretrained"),
}
"""The keys of each architecture, besides those of all."""


@dataclass
class StudentConfig(ModelConfig):
    """The student's model."""

    key: ClassVar[str] = "student"
    preset_width: ClassVar[int] = ModelConfig.width


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


def build_model(
    config: ModelConfig,
    labels: ClassNames,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> SegmentationModel:
    """A model for the classes of `labels`: freshly initialised, or from the weights that the configuration names.

    Args:
        mean, std: normalisation of the images that it will be given.

    Raises:
        ConfigurationError: weights that don't exist or don't fit, with the configuration's key.
        DamagedFileError: weights that can't be read or are incomplete.
    """
    names = list(labels.names)
    cls: Any = architecture(config.name)
    model: Any
    if config.name == "hub":
        model = build_hub(config, names)
    else:
        model = cls(names, **shape_of(config, len(names)))
        model.mean, model.std = tuple(mean), tuple(std)
        if config.weights:
            load = model.load_weights if config.name == "segformer" else model.load_encoder
            load(config.weights, f"{config.key}.weights")
    if config.slice_from:
        slice_from_run(config, model)
    if config.gradient_checkpointing:
        try:
            model.enable_gradient_checkpointing()
        except ConfigurationError as error:
            raise ConfigurationError(f"{config.key}.{error}") from error
    model.take_images(mean, std)
    return model


def shape_of(config: ModelConfig, classes: int) -> dict[str, Any]:
    """The arguments of an architecture besides the class names; a budget becomes channels."""
    if config.name == "unet":
        if config.max_parameters is None and config.max_flops is None:
            shape = {"depth": config.depth, "stride": config.stride, "block": config.block}
            return shape | ({"channels": list(config.channels)} if config.channels else {"width": config.width})
        try:
            return budget.student_for(
                parameters=config.max_parameters,
                flops=config.max_flops,
                stride=config.stride,
                depth=config.depth,
                block=config.block,
                classes=classes,
                size=config.flops_size,
            )
        except ConfigurationError as error:  # of a budget: it names an argument, where the user gave a key
            raise ConfigurationError(str(error).replace("student_for.", f"{config.key}.max_")) from error
    keys = [key for key in KEYS[config.name] if key != "weights" and getattr(config, key) is not None]
    return {key: getattr(config, key) for key in keys}


def student_for(
    *,
    parameters: int | None = None,
    flops: float | None = None,
    stride: int = 4,
    depth: int = 3,
    block: Literal["plain", "separable", "residual", "inverted"] = "plain",
    classes: int = 19,
    size: tuple[int, int] = (512, 1024),
) -> ModelConfig:
    """The widest UNet within a budget, at most 2 % below it.

    `build_model(student_for(parameters=500_000), labels)` makes it.

    Args:
        parameters: most parameters.
        flops: most FLOPs of an image of `size` (height, width), two for a multiply-add, as evaluation counts them.
        stride: of the logits.
        classes: of the data set, which the classifier's share of the budget depends on.

    Raises:
        ConfigurationError: no budget, or one that no UNet of this shape meets.
    """
    shape = budget.student_for(
        parameters=parameters, flops=flops, stride=stride, depth=depth, block=block, classes=classes, size=size
    )
    return ModelConfig(**shape)


def build_hub(config: ModelConfig, names: list[str]) -> SegmentationModel:
    """A model of transformers for the data set's classes."""
    from models import hub

    key = f"{config.key}.weights"
    if not config.pretrained:
        return hub.from_shape(config.weights, key, names)
    if config.new_head:
        return hub.from_hub(config.weights, key, class_names=names)
    model = hub.from_hub(config.weights, key)
    if model.class_names != names:
        raise ConfigurationError(
            f"{key}: {config.weights} knows {len(model.class_names)} classes and the data set {len(names)}, or in "
            f"other words; add {config.key}.new_head=true to draw its classifier anew"
        )
    return model


def slice_from_run(config: ModelConfig, model: UNet) -> None:
    """The first weights of a UNet as a pruned copy of a wider one."""
    key = f"{config.key}.slice_from"
    wide = load_model(config.slice_from, key)
    if not isinstance(wide, UNet):
        raise ConfigurationError(f"{key}: {config.slice_from} is a {wide.architecture}; name the run of a UNet")
    slice_from(model, wide, key)


def load_model(folder: str | Path, key: str = "model") -> SegmentationModel:
    """The model that `save_pretrained` wrote to `folder`, ours or that of transformers, in eval mode.

    A run's directory stands for its `best`. A missing, superfluous or misshapen weight is an error, never a random
    initialisation.

    Args:
        key: of the configuration, for errors that are about a folder of transformers.

    Raises:
        ConfigurationError: the folder or one of its two files does not exist, or the run was not evaluated yet.
        DamagedFileError: a file can't be read, or its weights are not those of its configuration.
    """
    folder = Path(folder)
    if (folder / "best").is_dir():
        folder = folder / "best"
    elif (folder / "config.yaml").exists():
        raise ConfigurationError(f"{folder}: holds no weights yet (no best/); finish the run, or name another")
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{folder / 'config.json'}: no such file; a model's folder has config.json and weights"
        )
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        of_transformers = "model_type" in config
        if not of_transformers:
            cls = architecture(config.pop("name"))
            mean, std = config.pop("mean", IMAGENET_MEAN), config.pop("std", IMAGENET_STD)
            changes = config.pop("changes", {})
            model = cls(**config)
            model.mean, model.std = tuple(mean), tuple(std)
            if "pruned" in changes:  # first: what is quantised has the pruned shapes
                restore_shapes(model, changes["pruned"])
            if "quantised" in changes:
                restore_plan(model, changes["quantised"])
    except (ValueError, KeyError, TypeError, AttributeError, ConfigurationError) as error:
        raise DamagedFileError(
            f"{folder / 'config.json'}: not the configuration of a model ({error!r}); save the model again, or "
            "add an architecture of your own to models/build.py"
        ) from error
    if of_transformers:
        from models import hub

        return hub.from_hub(str(folder), key).eval()
    state = read_weights(folder)
    where = f"{folder / 'model.safetensors'}: weights of another model"
    check_weights(state, model.state_dict(), where, "check the folder's config.json")
    model.load_state_dict(state)
    return model.eval()
