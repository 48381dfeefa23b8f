"""UNet (Ronneberger et al. 2015), compact and configurable: the student above all, and a teacher when wide."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import Output, SegmentationModel, Tap, crop_to_native, pad_to


def conv_bn_relu(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU; the map keeps its size but for the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


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


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": PlainBlock,
    "separable": SeparableBlock,
    "residual": ResidualBlock,
}


class UNet(SegmentationModel):
    """Encoder, bottleneck and decoder with skip connections behind a strided stem.

    Level i has `width * 2**i` channels at stride `stride * 2**i`; the bottleneck is level `depth`. Departures from
    the paper: batch normalisation, padded convolutions, bilinear upsampling in place of transposed convolutions,
    and a stem that makes the whole network run at 1/stride of the image, which is also the stride of its logits.

    Taps: `encoder.0` (finest) … `encoder.{depth-1}`, `bottleneck`, and, in the order in which they run,
    `decoder.0` (coarsest) … `decoder.{depth-1}` (finest, what the classifier sees).

    Args:
        class_names: names of the classes, in the order of the logits.
        width: channels of level 0.
        depth: number of levels above the bottleneck.
        stride: of the stem and of the logits: 1, 2 or 4.
        block: "plain", "separable" or "residual".
    """

    architecture = "unet"

    def __init__(
        self, class_names: list[str], width: int = 16, depth: int = 3, stride: int = 4, block: str = "plain"
    ) -> None:
        super().__init__()
        self.class_names, self.stride, self.depth = list(class_names), stride, depth
        channels = [width * 2**level for level in range(depth + 1)]
        make = BLOCKS[block]

        if stride == 1:
            self.stem: nn.Module = nn.Identity()
        elif stride == 2:
            self.stem = conv_bn_relu(3, width, stride=2)
        else:
            self.stem = nn.Sequential(
                conv_bn_relu(3, width // 2, stride=2), conv_bn_relu(width // 2, width, stride=2)
            )
        inputs = [3 if stride == 1 else width, *channels[:-1]]
        self.encoder = nn.ModuleList(make(inputs[level], channels[level]) for level in range(depth))
        self.bottleneck = make(channels[-2], channels[-1])
        levels = range(depth - 1, -1, -1)
        self.decoder = nn.ModuleList(
            make(channels[level] + channels[level + 1], channels[level]) for level in levels
        )
        self.classifier = nn.Conv2d(width, len(class_names), 1)

        self.taps = {f"encoder.{level}": Tap(channels[level], stride * 2**level) for level in range(depth)}
        self.taps["bottleneck"] = Tap(channels[depth], stride * 2**depth)
        for i, level in enumerate(levels):
            self.taps[f"decoder.{i}"] = Tap(channels[level], stride * 2**level)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size; padded on the right and below where the strides do not divide it."""
        self.check_taps(taps)
        height, width = images.shape[-2:]
        features = {}

        x = self.stem(pad_to(self.renormalise(images), self.stride * 2**self.depth))
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

        wanted = {tap: crop_to_native(features[tap], height, width, self.taps[tap].stride) for tap in taps}
        return Output(crop_to_native(logits, height, width, self.stride), wanted)
