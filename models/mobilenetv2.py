"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) with a light head: the student of large stride."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbones import Encoder, ImagePooling, load_encoder
from models.interface import Output, SegmentationModel, Tap, pad_to
from models.unet import conv_bn_relu, initialise


class MobileNetV2(SegmentationModel):
    """MobileNetV2 and logits at its own output stride, with no decoder that goes back to finer maps.

    The students of knowledge adaptation (He et al. 2019, arXiv 1903.04688) are MobileNetV2 at output stride 16 and
    32. The head is that of MobileNetV2's own authors (section 6.3 and their code): DeepLabV3's without its atrous
    convolutions, that is a 1×1 reduction beside image-level context, projected together, on the 320-channel map.
    Here the context is taken of the reduced map, which makes it cheaper.

    Taps: `encoder.0` … `encoder.4`, the last maps of the published network's strides 2, 4, 8, 16 and 32, none of
    them coarser than the output stride; `bottleneck`, the reduced map; `decoder.0`, what the classifier sees.

    Args:
        class_names: names of the classes, in the order of the logits.
        multiplier: of the encoder's channels; there are ImageNet weights for 0.35, 0.5, 0.75, 1.0 and 1.4.
        output_stride: of the logits: 8, 16 or 32; below 32 the last stages are dilated.
        head_channels: of the head.
    """

    architecture = "mobilenetv2"

    def __init__(
        self, class_names: list[str], multiplier: float = 1.0, output_stride: int = 32, head_channels: int = 128
    ) -> None:
        super().__init__()
        self.class_names, self.stride = list(class_names), output_stride
        self.encoder = Encoder("mobilenetv2", output_stride, multiplier)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.bottleneck = conv_bn_relu(channels[-1], head_channels, kernel=1)
        self.context = ImagePooling(head_channels, head_channels)
        self.project = conv_bn_relu(2 * head_channels, head_channels, kernel=1)
        self.classifier = nn.Conv2d(head_channels, len(class_names), 1)

        self.taps = {f"encoder.{i}": Tap(*shape) for i, shape in enumerate(zip(channels, strides, strict=True))}
        self.taps["bottleneck"] = self.taps["decoder.0"] = Tap(head_channels, output_stride)

        initialise([self.bottleneck, self.context, self.project], self.classifier)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size; padded on the right and below where the strides do not divide it."""
        self.check_taps(taps)
        maps = self.encoder(pad_to(self.renormalise(images), self.stride))
        features = {f"encoder.{i}": map_ for i, map_ in enumerate(maps)}
        features["bottleneck"] = x = self.bottleneck(maps[-1])
        features["decoder.0"] = x = self.project(torch.cat([x, self.context(x)], dim=1))
        logits = self.classifier(x)

        return self.answer(images, logits, features, taps)

    def enable_gradient_checkpointing(self) -> None:
        """Keeps only the inputs of the encoder's blocks for the backward pass."""
        self.encoder.checkpointing = True

    def load_encoder(self, source: str, key: str = "model.weights") -> None:
        """Loads a classifier's ImageNet weights into the encoder, as `models.backbones.load_encoder` says.

        google/mobilenet_v2_1.0_224, google/mobilenet_v2_0.75_160 and so on; the multiplier must agree.
        """
        load_encoder(self, self.encoder, source, key)
