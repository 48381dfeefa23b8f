"""UNet (Ronneberger et al. 2015), compact and configurable: the student above all, and a teacher when wide."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from models.interface import Output, SegmentationModel, Tap, pad_to

STRIDES = (1, 2, 4, 8, 16, 32)
EXPANSION = 4


def conv_bn_relu(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU; the map keeps its size but for the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def initialise(parts: Iterable[nn.Module], classifier: nn.Conv2d) -> None:
    """Draws the weights of all convolutions in `parts` (He et al. 2015), and those of the classifier near 0."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]


class PlainBlock(nn.Sequential):
    """Two 3×3 convolutions, as in the UNet paper, with batch normalisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(conv_bn_relu(inputs, outputs), conv_bn_relu(outputs, outputs))


class SeparableBlock(nn.Sequential):
    """Two depthwise-separable convolutions (MobileNet, Howard et al. 2017): about an eighth of the plain block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            conv_bn_relu(inputs, inputs, groups=inputs),
            conv_bn_relu(inputs, outputs, kernel=1),
            conv_bn_relu(outputs, outputs, groups=outputs),
            conv_bn_relu(outputs, outputs, kernel=1),
        )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut (He et al. 2016), projected where the channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(inputs, outputs)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class InvertedUnit(nn.Module):
    """Inverted bottleneck (MobileNetV2, Sandler et al. 2018): 1×1 expansion and depthwise 3×3, each with batch
    normalisation and ReLU6, then a linear 1×1 projection with batch normalisation; a shortcut where the channels
    agree.

    The hidden channels are 4 times the fewer of `inputs` and `outputs`. The paper takes 6 times `inputs`, but its
    units seldom narrow; those of a decoder narrow threefold, and would cost more than plain convolutions.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = EXPANSION * min(inputs, outputs)
        self.shortcut = inputs == outputs
        self.expand = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(self.depthwise(self.expand(x)))
        return x + projected if self.shortcut else projected


class InvertedBlock(nn.Sequential):
    """Two inverted bottlenecks; the second has the shortcut, as in a stage of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(InvertedUnit(inputs, outputs), InvertedUnit(outputs, outputs))


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": PlainBlock,
    "separable": SeparableBlock,
    "residual": ResidualBlock,
    "inverted": InvertedBlock,
}


def check_shape(depth: int, stride: int, channels: Sequence[int] | None = None, key: str = "model") -> None:
    """Raises ConfigurationError, with the key `model.stride` or `model.channels`, if no UNet has this shape."""
    if stride not in STRIDES:
        known = f"{', '.join(map(str, STRIDES[:-1]))} or {STRIDES[-1]}"
        raise ConfigurationError(f"{key}.stride: {stride} is not a stride of the UNet; give {known}")
    coarsest = min(stride, 4) * 2**depth
    if stride > coarsest:
        raise ConfigurationError(
            f"{key}.stride: {stride} is beyond the bottleneck, which has stride {coarsest} at depth {depth}; "
            "give a smaller stride or a greater depth"
        )
    if channels is None:
        return
    if len(channels) != depth + 1:
        raise ConfigurationError(
            f"{key}.channels: {len(channels)} numbers, but depth {depth} has {depth} levels and the bottleneck; "
            f"give {depth + 1}"
        )
    if min(channels) < 2:
        raise ConfigurationError(f"{key}.channels: {min(channels)} is too few for a level; give 2 or more")


class UNet(SegmentationModel):
    """Encoder, bottleneck and decoder with skip connections behind a strided stem.

    Level i has `channels[i]` channels, or `width * 2**i` where none are given, at stride `stem * 2**i`, where
    `stem`, the stride of the stem, is the logits' stride up to 4; the bottleneck is level `depth`. The decoder
    ends at the level that has the logits' stride. Up to `stride=4` that is level 0. A larger stride leaves out
    the decoder's finest levels, which have the largest maps, while the encoder keeps its own: a student of large
    overall stride with a light decoder (He et al. 2019, arXiv 1903.04688, whose student is a MobileNetV2). Where
    it is the bottleneck's stride there is no decoder, and the classifier stands on the bottleneck.

    Departures from Ronneberger's paper: batch normalisation, padded convolutions, bilinear upsampling in place of
    transposed convolutions, and the strided stem.

    Taps: `encoder.0` (finest) … `encoder.{depth-1}`, `bottleneck`, and, in the order in which they run,
    `decoder.0` (coarsest) … as far as the decoder goes; the last of all is what the classifier sees.

    Args:
        class_names: names of the classes, in the order of the logits.
        width: channels of level 0, of which each level has twice as many as the one before.
        depth: number of levels above the bottleneck.
        stride: of the logits: 1, 2, 4, 8, 16 or 32, and at most that of the bottleneck.
        block: "plain", "separable", "residual" or "inverted".
        channels: of each level, finest first, then of the bottleneck, in place of those that follow from `width`.

    Raises:
        ConfigurationError: there is no such stride at this depth, or `channels` are not depth + 1 numbers above 1.
    """

    architecture = "unet"

    def __init__(
        self,
        class_names: list[str],
        width: int = 16,
        depth: int = 3,
        stride: int = 4,
        block: str = "plain",
        channels: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_shape(depth, stride, channels)
        self.class_names, self.stride, self.depth, self.block = list(class_names), stride, depth, block
        self.channels = [width * 2**level for level in range(depth + 1)] if channels is None else list(channels)
        self.stem_stride = min(stride, 4)
        channels, first, make = self.channels, self.channels[0], BLOCKS[block]

        if self.stem_stride == 1:
            self.stem: nn.Module = nn.Identity()
        elif self.stem_stride == 2:
            self.stem = conv_bn_relu(3, first, stride=2)
        else:
            self.stem = nn.Sequential(
                conv_bn_relu(3, first // 2, stride=2), conv_bn_relu(first // 2, first, stride=2)
            )
        inputs = [3 if self.stem_stride == 1 else first, *channels[:-1]]
        self.encoder = nn.ModuleList(make(inputs[level], channels[level]) for level in range(depth))
        self.bottleneck = make(channels[-2], channels[-1])
        strides = [self.stem_stride * 2**level for level in range(depth + 1)]
        finest = strides.index(stride)
        levels = range(depth - 1, finest - 1, -1)
        self.decoder = nn.ModuleList(
            make(channels[level] + channels[level + 1], channels[level]) for level in levels
        )
        self.classifier = nn.Conv2d(channels[finest], len(class_names), 1)

        self.taps = {f"encoder.{level}": Tap(channels[level], strides[level]) for level in range(depth)}
        self.taps["bottleneck"] = Tap(channels[depth], strides[depth])
        for i, level in enumerate(levels):
            self.taps[f"decoder.{i}"] = Tap(channels[level], strides[level])

        initialise([self], self.classifier)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size; padded on the right and below where the strides do not divide it."""
        self.check_taps(taps)
        features = {}

        x = self.stem(pad_to(self.renormalise(images), self.stem_stride * 2**self.depth))
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            skips.append(x)
            features[f"encoder.{level}"] = x
            x = F.max_pool2d(x, 2)
        features["bottleneck"] = x = self.bottleneck(x)
        for i, block in enumerate(self.decoder):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            features[f"decoder.{i}"] = x = block(torch.cat([skips.pop(), x], dim=1))
        logits = self.classifier(x)

        return self.answer(images, logits, features, taps)
