"""DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611): the convolutional teacher."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import CONVNEXT, Encoder, ImagePooling, load_encoder
from models.batchnorm import recomputed
from models.interface import Output, SegmentationModel, Tap, pad_to
from models.unet import conv_bn_relu, initialise


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017, arXiv 1706.05587, figure 5).

    A 1×1 convolution, 3×3 ones at three rates, and image-level context, side by side, then projected together.

    Args:
        inputs: channels of the map.
        outputs: channels of each of the five branches, and of the result.
        rates: of the three atrous convolutions.
    """

    def __init__(self, inputs: int, outputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(inputs, outputs, kernel=1)])
        for rate in rates:
            self.branches.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                )
            )
        self.branches.append(ImagePooling(inputs, outputs))
        self.project = conv_bn_relu(5 * outputs, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.branches], dim=1))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each position of a map [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DeepLabV3Plus(SegmentationModel):
    """Dilated encoder, atrous pyramid over its coarsest map, and a small decoder at stride 4.

    The decoder reduces the encoder's map of stride 4 to few channels, concatenates the upsampled pyramid and
    refines both by two 3×3 convolutions. The atrous rates are 6, 12 and 18, and twice that at output stride 8.

    Departures from the paper: plain convolutions, where its Xception variant has separable ones; upsampling with
    `align_corners=False`; no dropout, of which its authors' code has 0.1 after the pyramid. Over ConvNeXt, whose
    maps are not normalised, each of the two that are used passes a layer normalisation, as in ConvNeXt's authors'
    code for segmentation.

    Taps: `encoder.0` … the encoder's stages (from stride 4; MobileNetV2's from stride 2), `bottleneck`, which is
    the pyramid's result, and `decoder.0`, what the classifier sees.

    Args:
        class_names: names of the classes, in the order of the logits.
        encoder: "resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "convnext_tiny" or
            "convnext_small".
        output_stride: of the encoder's coarsest map: 8 or 16.
        aspp_channels: of each branch of the pyramid and of the decoder.
        low_level_channels: to which the map of stride 4 is reduced.
    """

    architecture = "deeplabv3plus"

    def __init__(
        self,
        class_names: list[str],
        encoder: str = "resnet18",
        output_stride: int = 16,
        aspp_channels: int = 256,
        low_level_channels: int = 48,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"output_stride={output_stride}; there are 8 and 16")
        self.class_names, self.stride, self.output_stride = list(class_names), 4, output_stride
        self.checkpointing = False
        self.encoder = Encoder(encoder, output_stride)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.low_level = strides.index(4)
        normalised = self.encoder.family is not CONVNEXT
        self.deep_norm = nn.Identity() if normalised else ChannelNorm(channels[-1], eps=1e-6)
        self.low_norm = nn.Identity() if normalised else ChannelNorm(channels[self.low_level], eps=1e-6)
        self.aspp = ASPP(channels[-1], aspp_channels, [rate * 16 // output_stride for rate in (6, 12, 18)])
        self.reduce = conv_bn_relu(channels[self.low_level], low_level_channels, kernel=1)
        self.decoder = nn.Sequential(
            conv_bn_relu(aspp_channels + low_level_channels, aspp_channels),
            conv_bn_relu(aspp_channels, aspp_channels),
        )
        self.classifier = nn.Conv2d(aspp_channels, len(class_names), 1)

        self.taps = {f"encoder.{i}": Tap(*shape) for i, shape in enumerate(zip(channels, strides, strict=True))}
        self.taps["bottleneck"] = Tap(aspp_channels, output_stride)
        self.taps["decoder.0"] = Tap(aspp_channels, 4)

        initialise([self.aspp, self.reduce, self.decoder], self.classifier)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size; padded on the right and below where the strides do not divide it."""
        self.check_taps(taps)
        maps = self.encoder(pad_to(self.renormalise(images), self.output_stride))
        features = {f"encoder.{i}": map_ for i, map_ in enumerate(maps)}
        features["bottleneck"] = x = self._run(self.aspp, self.deep_norm(maps[-1]))
        x = F.interpolate(x, scale_factor=self.output_stride / 4, mode="bilinear", align_corners=False)
        low = self.reduce(self.low_norm(maps[self.low_level]))
        features["decoder.0"] = x = self._run(self.decoder, torch.cat([x, low], dim=1))
        logits = self.classifier(x)

        return self.answer(images, logits, features, taps)

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        return recomputed(module, x) if self.checkpointing and self.training else module(x)

    def enable_gradient_checkpointing(self) -> None:
        """Keeps only what the encoder's blocks, the pyramid and the decoder are given, for the backward pass."""
        self.checkpointing = self.encoder.checkpointing = True

    def load_encoder(self, source: str, key: str = "model.weights") -> None:
        """Loads a classifier's ImageNet weights into the encoder, as `models.backbones.load_encoder` says.

        Those of the encoders are microsoft/resnet-18, -34, -50, -101, google/mobilenet_v2_1.0_224 and
        facebook/convnext-tiny-224, -small-224.
        """
        load_encoder(self, self.encoder, source, key)
