"""Encoders of transformers whose last strides can be dilations, and ImageNet weights for them."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import ConfigurationError, DamagedFileError
from models.interface import SegmentationModel


@dataclass(frozen=True)
class Family:
    """What the encoders of one kind have in common.

    Args:
        name: the kind, as transformers' configuration has it in `model_type`.
        prefix: of the encoder's weights in the checkpoint of a classifier.
        shape: the fields of the configuration on which weights depend.
        head: what the encoder's checkpoint has for classification alone.
        stages: the modules of each stage in running order, out of transformers' model.
    """

    name: str
    prefix: str
    shape: tuple[str, ...]
    head: str
    stages: Callable[[Any], list[list[nn.Module]]]


def _resnet_stages(body: Any) -> list[list[nn.Module]]:
    first, *rest = [list(stage.layers) for stage in body.encoder.stages]
    return [[body.embedder, *first], *rest]


def _convnext_stages(body: Any) -> list[list[nn.Module]]:
    first, *rest = [[*stage.downsampling_layer, *stage.layers] for stage in body.encoder.stages]
    return [[body.embeddings, *first], *rest]


def _mobilenetv2_stages(body: Any) -> list[list[nn.Module]]:
    blocks = list(body.layer)
    return [[body.conv_stem], blocks[:2], blocks[2:5], blocks[5:12], blocks[12:]]


RESNET = Family(
    "resnet",
    "resnet.",
    ("embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act")
    + ("downsample_in_first_stage", "downsample_in_bottleneck"),
    "pooler",
    _resnet_stages,
)
CONVNEXT = Family(
    "convnext", "convnext.", ("patch_size", "hidden_sizes", "depths", "hidden_act"), "layernorm", _convnext_stages
)
MOBILENETV2 = Family(
    "mobilenet_v2",
    "mobilenet_v2.",
    ("depth_multiplier", "depth_divisible_by", "min_depth", "expand_ratio", "first_layer_is_expansion")
    + ("hidden_act", "layer_norm_eps"),
    "conv_1x1",
    _mobilenetv2_stages,
)

BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
ENCODERS: dict[str, tuple[Family, dict[str, Any]]] = {
    "resnet18": (RESNET, {"layer_type": "basic", "depths": (2, 2, 2, 2), "hidden_sizes": BASIC}),
    "resnet34": (RESNET, {"layer_type": "basic", "depths": (3, 4, 6, 3), "hidden_sizes": BASIC}),
    "resnet50": (RESNET, {"layer_type": "bottleneck", "depths": (3, 4, 6, 3), "hidden_sizes": BOTTLENECK}),
    "resnet101": (RESNET, {"layer_type": "bottleneck", "depths": (3, 4, 23, 3), "hidden_sizes": BOTTLENECK}),
    "mobilenetv2": (MOBILENETV2, {}),
    "convnext_tiny": (CONVNEXT, {"depths": (3, 3, 9, 3), "hidden_sizes": (96, 192, 384, 768)}),
    "convnext_small": (CONVNEXT, {"depths": (3, 3, 27, 3), "hidden_sizes": (96, 192, 384, 768)}),
}
"""The encoders by name, each with its family and what its configuration says."""


class Encoder(nn.Module):
    """An image classifier of transformers without its head: images to the maps of its stages, fine to coarse.

    Weights have the names and shapes of the published checkpoints under `body`, whatever the output stride: where
    a stage would go beyond it, the stage's stride becomes 1 and all that follows looks at every second position
    (Chen et al. 2018, arXiv 1606.00915, section 3.1). The convolution that had the stride keeps the spacing with
    which it was trained, so every second position of the dilated map is, to rounding, the map of the network with
    strides. In a ResNet, the first 3×3 of a stage therefore has less dilation than those after it, as in
    torchvision.

    Two things of transformers' MobileNetV2 are not taken over. Its convolutions pad as TensorFlow does, more on
    the right and below, so that a position of a map is centred on the last and not on the first of the pixels that
    it stands over, unlike in the ResNets. Padded alike on both sides, the weights compute the same function of
    images shifted by stride - 1 pixels, but at the border. And its batch-norm forgets all but the last batch
    (`momentum=0.997`: TensorFlow counts it the other way round); here momentum is PyTorch's 0.1.

    Args:
        name: one of `ENCODERS`.
        output_stride: stride of the coarsest map: 8, 16 or 32.
        multiplier: of MobileNetV2's channels.
    """

    def __init__(self, name: str, output_stride: int, multiplier: float = 1.0) -> None:
        from transformers import (
            ConvNextConfig,
            ConvNextModel,
            MobileNetV2Config,
            MobileNetV2Model,
            ResNetConfig,
            ResNetModel,
        )

        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride}; there are 8, 16 and 32")
        self.name, self.output_stride, self.checkpointing = name, output_stride, False
        self.family, settings = ENCODERS[name]
        if self.family is RESNET:
            self.body: Any = ResNetModel(ResNetConfig(**settings))
            self.channels, strides = list(settings["hidden_sizes"]), [4, 8, 16, 32]
        elif self.family is CONVNEXT:
            self.body = ConvNextModel(ConvNextConfig(**settings))
            self.channels, strides = list(settings["hidden_sizes"]), [4, 8, 16, 32]
        else:
            self.body = MobileNetV2Model(
                MobileNetV2Config(depth_multiplier=multiplier, tf_padding=False), add_pooling_layer=False
            )
            stages = MOBILENETV2.stages(self.body)
            self.channels = [stage[-1].reduce_1x1.convolution.out_channels for stage in stages]  # type: ignore
            strides = [2, 4, 8, 16, 32]
            for module in self.body.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1
        delattr(self.body, self.family.head)

        dilation = 1
        for i, stride in enumerate(strides):
            if stride > output_stride:
                if self.family is CONVNEXT:
                    downsampling = self.body.encoder.stages[i].downsampling_layer
                    downsampling[1] = UnevenConv2d(downsampling[1])
                for module in self.stages()[i]:
                    dilate(module, dilation, 2 * dilation)
                dilation *= 2
        self.strides = [min(stride, output_stride) for stride in strides]

    def stages(self) -> list[list[nn.Module]]:
        """The modules of each stage, in running order."""
        return self.family.stages(self.body)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, H, W], H and W multiples of the output stride."""
        maps, x = [], images
        for stage in self.stages():
            for module in stage:
                x = recomputed(module, x) if self.checkpointing and self.training else module(x)
            maps.append(x)
        return maps


def dilate(module: nn.Module, before: int, after: int) -> None:
    """Makes a module of stride 2 one of stride 1; `before` is the dilation that its input asks for.

    A convolution that had the stride has the dilation `before`, the others have `after`.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            rate = after if conv.stride == (1, 1) else before
            kernel = conv.kernel_size[0]
            conv.stride, conv.dilation = (1, 1), (rate, rate)
            conv.padding = (kernel // 2 * rate,) * 2


class UnevenConv2d(nn.Conv2d):
    """A convolution with an even kernel and without a stride that keeps the map's size.

    All padding is on the right and below, so that an output stands over the first of its inputs, as that of the
    strided convolution `conv` does whose weights it takes.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)  # type: ignore
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = ((k - 1) * d for k, d in zip(self.kernel_size, self.dilation, strict=True))
        x = F.pad(x, (0, columns, 0, rows))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation)


class ImagePooling(nn.Module):
    """Image-level context (ParseNet, Liu et al. 2015): the mean of a map, 1×1 convolution, batch-norm, ReLU, on
    every position.

    In training with one image there is one value per channel, which batch-norm would turn into 0 or refuse: then,
    and only then, it uses its running statistics. A synchronised batch-norm counts the images of all processes, so
    every process calls it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        pooled = self.reduce(x.mean((2, 3), keepdim=True))
        if norm.training and len(pooled) == 1 and not _synchronised(norm):
            pooled = F.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        else:
            pooled = norm(pooled)
        return F.relu(pooled).expand(-1, -1, *x.shape[-2:])


def _synchronised(norm: nn.Module) -> bool:
    """Whether a batch-norm sees the images of more than one process."""
    return isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1


class _KeptStatistics:
    """Within it, the batch-norms of a module move copies of their running statistics.

    Without any, as under `track_running_stats=False`, batch-norm would save fewer tensors than the first time,
    which checkpointing refuses.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
        self.kept: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        for norm in self.norms:
            for name, buffer in norm.named_buffers(recurse=False):
                self.kept.append((norm, name, buffer))
                setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer)
        self.kept.clear()


def recomputed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """`module(*inputs)`, whose activations are not kept but computed again in the backward pass.

    Batch-norm's running statistics move once, as without.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _KeptStatistics(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


def load_encoder(model: SegmentationModel, encoder: Encoder, source: str, key: str) -> None:
    """Gives `encoder`, a part of `model`, the weights of a classifier of transformers, its head left out.

    `model` takes over the normalisation that the classifier's preprocessor_config.json states, if there is one:
    call it before `take_images`.

    Args:
        source: a folder, or a model's name on the Hub.
        key: where the user wrote it; begins the message of an error.

    Raises:
        ConfigurationError: there is no such folder or model, no network, or it is another architecture.
        DamagedFileError: a file can't be read, or a weight is missing, superfluous or misshapen.
    """
    from models.hub import fetch_folder

    folder = fetch_folder(source, key)
    _check_same_shape(encoder, folder, source, key)
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        paths = sorted(folder.glob("model-*-of-*.safetensors"))
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{path}: can't be read ({error}); download or save it again") from error

    family = encoder.family
    if any(name.startswith(family.prefix) for name in state):
        state = {
            name.removeprefix(family.prefix): value
            for name, value in state.items()
            if name.startswith(family.prefix)
        }
    state = {name: value for name, value in state.items() if not name.startswith(family.head + ".")}
    expected = encoder.body.state_dict()
    wrong = [f"missing {name}" for name in expected.keys() - state.keys()]
    wrong += [f"superfluous {name}" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name} is {list(state[name].shape)}, not {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if wrong:
        listed = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DamagedFileError(f"{folder}: its weights are not those of {encoder.name}: {listed}; save it again")
    normalisation = _read_normalisation(folder / "preprocessor_config.json")
    encoder.body.load_state_dict(state)
    if normalisation is not None:
        model.mean, model.std = normalisation


def _check_same_shape(encoder: Encoder, folder: Path, source: str, key: str) -> None:
    """Raises ConfigurationError unless the configuration in `folder` is that of `encoder`."""
    path = folder / "config.json"
    own = encoder.body.config
    try:
        stated = json.loads(path.read_text())
        kind = stated.get("model_type")
        given = type(own).from_dict(stated) if kind == encoder.family.name else own
        different = [name for name in encoder.family.shape if _plain(given, name) != _plain(own, name)]
    except Exception as error:  # transformers' validators raise of many kinds
        reason = " ".join(str(error).split())
        raise DamagedFileError(f"{path}: not the configuration of a model ({reason})") from error
    if kind != encoder.family.name:
        raise ConfigurationError(
            f"{key}: {source} is a model of type {kind}, but {encoder.name} needs one of {encoder.family.name}"
        )
    if different:
        name = different[0]
        raise ConfigurationError(
            f"{key}: {source} has {name} {_plain(given, name)}, but {encoder.name} has {_plain(own, name)}; "
            "give the weights of this encoder"
        )


def _plain(config: Any, name: str) -> Any:
    value = getattr(config, name)
    return list(value) if isinstance(value, list | tuple) else value


def _read_normalisation(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that a preprocessor_config.json states, or None where there is none."""
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text())
        if stated.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if "image_mean" not in stated or "image_std" not in stated:
            return None
        mean, std = _three(stated["image_mean"]), _three(stated["image_std"])
        if min(std) <= 0:
            raise ValueError("image_std is not positive")
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path}: states no normalisation ({error}); download or save it again") from error
    return mean, std


def _three(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError(f"{len(values)} values instead of 3")
    return tuple(float(value) for value in values)
