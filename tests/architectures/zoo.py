"""The architectures as the tests see them: a small model of each, and what it is excused from."""

from collections.abc import Callable

from test_hub import configuration

from models import SegmentationModel
from models.dabnet import DABNet
from models.deeplabv3plus import DeepLabV3Plus
from models.hub import HubModel
from models.mobilenetv2 import MobileNetV2
from models.segformer import SegFormer
from models.unet import UNet

CLASSES = ["road", "car", "sky"]


def deeplab(encoder: str, output_stride: int) -> SegmentationModel:
    return DeepLabV3Plus(CLASSES, encoder, output_stride, aspp_channels=16)


ZOO: dict[str, Callable[[], SegmentationModel]] = {
    "unet": lambda: UNet(CLASSES, width=4, depth=2),
    "unet-separable-stride-1": lambda: UNet(CLASSES, width=4, depth=2, stride=1, block="separable"),
    "unet-residual-stride-8": lambda: UNet(CLASSES, width=4, depth=2, stride=8, block="residual"),
    "unet-inverted-stride-32": lambda: UNet(CLASSES, channels=[3, 5, 8, 9], stride=32, block="inverted"),
    "dabnet": lambda: DABNet(CLASSES, [1, 3]),
    "mobilenetv2-16": lambda: MobileNetV2(CLASSES, 0.35, 16),
    "mobilenetv2-32": lambda: MobileNetV2(CLASSES, 0.35, 32),
    "deeplabv3plus-resnet18-16": lambda: deeplab("resnet18", 16),
    "deeplabv3plus-resnet18-8": lambda: deeplab("resnet18", 8),
    "deeplabv3plus-mobilenetv2": lambda: deeplab("mobilenetv2", 16),
    "deeplabv3plus-convnext_tiny": lambda: deeplab("convnext_tiny", 16),
    "segformer": lambda: SegFormer(CLASSES, "b0", [8, 16, 20, 32], [1, 2, 1, 1], 16),
    "segformer-b0": lambda: SegFormer(CLASSES),
    "hub-beit": lambda: HubModel(CLASSES, configuration("beit")),
    "hub-mask2former": lambda: HubModel(CLASSES, configuration("mask2former")),
}

CHECKPOINTING = tuple(name for name in ZOO if not name.startswith(("unet", "dabnet")))
"""Those whose activations can be computed again in the backward pass."""

TWINS = {
    "mobilenetv2-32": "mobilenetv2-16",
    "deeplabv3plus-resnet18-8": "deeplabv3plus-resnet18-16",
    "segformer-b0": "segformer",
}
EXCUSED = {
    ("vocabulary_of_taps", "hub-beit"): "a ViT has one stride, and its pyramid begins at a coarser one",
    ("flops_are_counted", "hub-beit"): "every image is resized to the network's one size, so all cost the same",
    ("bf16_autocast", "hub-mask2former"): "masks attention by the sign of logits that are near 0 untrained",
} | {
    (test, model): f"takes seconds, and runs the same lines as {twin}"
    for model, twin in TWINS.items()
    for test in ("compiled_in_one_graph", "exported")
}
"""(test, model) -> why the model can't meet it."""
