"""DABNet (Li & Kim 2019): the published compact real-time design, 0.76 M parameters and no attention."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from models.interface import Output, SegmentationModel, Tap, pad_to


def bn_prelu(channels: int) -> nn.Sequential:
    """Batch normalisation and a PReLU with a slope for each channel."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels))


def conv_bn_prelu(
    inputs: int,
    outputs: int,
    *,
    kernel: tuple[int, int] = (3, 3),
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution without bias, batch normalisation, PReLU; the map keeps its size but for the stride."""
    padding = (dilation * (kernel[0] // 2), dilation * (kernel[1] // 2))
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False), bn_prelu(outputs)
    )


def asymmetric(channels: int, dilation: int) -> nn.Sequential:
    """A depthwise 3×3 convolution factorised into 3×1 and 1×3."""
    return nn.Sequential(
        conv_bn_prelu(channels, channels, kernel=(3, 1), dilation=dilation, groups=channels),
        conv_bn_prelu(channels, channels, kernel=(1, 3), dilation=dilation, groups=channels),
    )


class DABModule(nn.Module):
    """Depthwise asymmetric bottleneck: half the channels, a local and a dilated branch added, and a shortcut.

    Activation comes before the convolutions, so what leaves a module is a sum that no activation has met.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = nn.Sequential(bn_prelu(channels), conv_bn_prelu(channels, half))
        self.local = asymmetric(half, 1)
        self.context = asymmetric(half, dilation)
        self.expand = nn.Sequential(bn_prelu(half), nn.Conv2d(half, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        return self.expand(self.local(reduced) + self.context(reduced)) + x


class DownSampling(nn.Module):
    """Halves the map as ENet does (Paszke et al. 2016): a strided convolution beside a max pooling where channels
    are added, the convolution alone where they are not."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pools = inputs < outputs
        new = outputs - inputs if self.pools else outputs
        self.conv = nn.Conv2d(inputs, new, 3, 2, 1, bias=False)
        self.activation = bn_prelu(outputs)

    def forward(self, x: Tensor) -> Tensor:
        halved = self.conv(x)
        if self.pools:
            halved = torch.cat([halved, F.max_pool2d(x, 2)], dim=1)
        return self.activation(halved)


class DABNet(SegmentationModel):
    """Depth-wise Asymmetric Bottleneck Network (Li & Kim, BMVC 2019, arXiv 1907.11357), a student.

    Convolutions alone, trained from scratch: its authors report 70.1 % mIoU on the Cityscapes test set and 66.7 %
    on CamVid's (trained on train and val), where EDANet reports 67.3 % and CGNet 64.8 % on the former, and LEDNet
    69.2 % with an attention pyramid.

    The layers, their order, padding, BN epsilon and initialisation are the authors'
    (github.com/Reagan1311/DABNet, model/DABNet.py); the same weights give their logits. Departures: the logits
    stay at stride 8, where the authors upsample them to the image; an image whose sides 8 does not divide is
    padded on the right and below, where theirs fails on odd maps; and for other than six modules in the second
    block the dilations 4, 8 and 16 share the modules as evenly as they do for six.

    Taps: `encoder.0` (stem, stride 2), `encoder.1` (first block, stride 4), `bottleneck` (second block, stride 8),
    each before the reduced image is put beside it, and `decoder.0`, what the classifier sees: the second
    block's output and input and the reduced image. The two blocks' maps are sums without an activation behind.

    Args:
        class_names: names of the classes, in the order of the logits.
        blocks: DAB modules of the two blocks; [3, 6] is the paper's.
    """

    architecture = "dabnet"

    def __init__(self, class_names: list[str], blocks: Sequence[int] = (3, 6)) -> None:
        if len(blocks) != 2 or min(blocks) < 1:
            raise ConfigurationError(
                f"model.blocks: {list(blocks)} are not the modules of DABNet's two blocks; give two numbers"
            )
        super().__init__()
        self.class_names, self.stride = list(class_names), 8

        self.stem = nn.Sequential(conv_bn_prelu(3, 32, stride=2), conv_bn_prelu(32, 32), conv_bn_prelu(32, 32))
        self.joined1 = bn_prelu(32 + 3)
        self.down1 = DownSampling(32 + 3, 64)
        self.block1 = nn.Sequential(*(DABModule(64, 2) for _ in range(blocks[0])))
        self.joined2 = bn_prelu(2 * 64 + 3)
        self.down2 = DownSampling(2 * 64 + 3, 128)
        dilations = [4 * 2 ** (3 * i // blocks[1]) for i in range(blocks[1])]
        self.block2 = nn.Sequential(*(DABModule(128, dilation) for dilation in dilations))
        self.joined3 = bn_prelu(2 * 128 + 3)
        self.classifier = nn.Conv2d(2 * 128 + 3, len(class_names), 1, bias=False)

        self.taps = {
            "encoder.0": Tap(32, 2),
            "encoder.1": Tap(64, 4),
            "bottleneck": Tap(128, 8),
            "decoder.0": Tap(2 * 128 + 3, 8),
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size; padded on the right and below where the strides do not divide it."""
        self.check_taps(taps)
        features = {}

        image = pad_to(self.renormalise(images), self.stride)
        features["encoder.0"] = x = self.stem(image)
        image = F.avg_pool2d(image, 3, 2, 1)
        down = self.down1(self.joined1(torch.cat([x, image], dim=1)))
        features["encoder.1"] = x = self.block1(down)
        image = F.avg_pool2d(image, 3, 2, 1)
        down = self.down2(self.joined2(torch.cat([x, down, image], dim=1)))
        features["bottleneck"] = x = self.block2(down)
        image = F.avg_pool2d(image, 3, 2, 1)
        features["decoder.0"] = x = self.joined3(torch.cat([x, down, image], dim=1))
        logits = self.classifier(x)

        return self.answer(images, logits, features, taps)
