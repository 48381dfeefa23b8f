"""Encoders of transformers whose last strides can be dilations, and ImageNet weights for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError, DamagedFileError
from models.batchnorm import SafeBatchNorm2d, recomputed
from models.interface import SegmentationModel
from models.weights import check_weights, fetch_folder, read_json, read_normalisation, read_weights


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
    every position. With one image there is one value a channel, for which see SafeBatchNorm2d."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = SafeBatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.reduce(x.mean((2, 3), keepdim=True)))
        return F.relu(pooled).expand(-1, -1, *x.shape[-2:])


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
    folder = fetch_folder(source, key)
    _check_same_shape(encoder, folder, source, key)
    state = read_weights(folder)
    family = encoder.family
    if any(name.startswith(family.prefix) for name in state):
        state = {
            name.removeprefix(family.prefix): value
            for name, value in state.items()
            if name.startswith(family.prefix)
        }
    state = {name: value for name, value in state.items() if not name.startswith(family.head + ".")}
    check_weights(
        state, encoder.body.state_dict(), f"{folder}: its weights are not those of {encoder.name}", "save it again"
    )
    normalisation = folder / "preprocessor_config.json"
    if normalisation.is_file():
        model.mean, model.std, _ = read_normalisation(folder, key)
    encoder.body.load_state_dict(state)


def _check_same_shape(encoder: Encoder, folder: Path, source: str, key: str) -> None:
    """Raises ConfigurationError unless the configuration in `folder` is that of `encoder`."""
    path = folder / "config.json"
    own, stated = encoder.body.config, read_json(path)
    try:
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
