"""A teacher in int8: near the float32 one, of the same interface, and refused where it would be nothing."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from data import DataConfig, build_dataset
from deploy import quantize
from deploy.quantize import Int8Chain, has_int8, quantize_int8
from errors import ConfigurationError
from evaluation.metrics import ConfusionMatrix, scores
from losses.upsampled import upsampled_loss
from models.deeplabv3plus import DeepLabV3Plus
from models.interface import SegmentationModel
from models.mobilenetv2 import MobileNetV2
from models.segformer import SegFormer
from models.unet import UNet

CLASSES = ["road", "car", "sky"]

pytestmark = pytest.mark.skipif(not has_int8(), reason="this CPU has no instructions for int8")


def settled(model: SegmentationModel) -> SegmentationModel:
    """In eval mode, with the statistics of a few random images."""
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(2, 3, 64, 96))
    return model.eval()


def difference(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).norm() / theirs.norm())


@pytest.fixture(scope="module")
def trained() -> tuple[UNet, Tensor, Tensor]:
    """A UNet that has learnt a little of drawn scenes, and scenes and labels that it has not seen."""
    torch.manual_seed(0)
    data = build_dataset(DataConfig(scenes=40, size=[64, 128], augment=False), "train")
    images, labels = (torch.stack(part) for part in zip(*(data[-1, i, i][:2] for i in range(40)), strict=True))
    model = UNet(list(data.labels.names), width=16, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        part = torch.arange(4) + 4 * (step % 8)
        loss, _ = upsampled_loss(model(images[part]).logits, labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), images, labels


@torch.no_grad()
def miou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    logits = model(images).logits
    matrix = ConfusionMatrix(logits.shape[1])
    matrix.update(logits, labels)
    return float(scores(matrix.matrix)["miou"])


def test_a_trained_model_answers_alike(trained: tuple[UNet, Tensor, Tensor]) -> None:
    model, images, labels = trained
    before = copy.deepcopy(model.state_dict())
    teacher = quantize_int8(model, [images[:8], *images[8:16]])  # batches and single images
    with torch.no_grad():
        theirs, ours = model(images[32:]).logits, teacher(images[32:]).logits
        p, q = theirs.log_softmax(1), ours.log_softmax(1)
        divergence = float((p.exp() * (p - q)).sum(1).mean())
    assert float((theirs.argmax(1) == ours.argmax(1)).float().mean()) > 0.98
    assert 0 < divergence < 2e-3
    expected = miou(model, images[32:], labels[32:])
    assert expected > 0.12, "the model has learnt nothing that could be lost"
    assert miou(teacher, images[32:], labels[32:]) == pytest.approx(expected, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "chains"),
    [
        (lambda: UNet(CLASSES, width=8, depth=2), 6),  # stem, two levels each way, bottleneck
        (lambda: UNet(CLASSES, width=8, depth=2, block="residual", stride=8), 12),
        (lambda: DeepLabV3Plus(CLASSES, "resnet18", aspp_channels=16), 19),
        (lambda: MobileNetV2(CLASSES, 0.35, 32), 39),
    ],
    ids=["unet", "residual", "deeplabv3plus", "mobilenetv2"],
)
def test_interface_taps_and_sizes_stay(make: Callable[[], SegmentationModel], chains: int) -> None:
    torch.manual_seed(0)
    model = settled(make())
    model.take_images((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = torch.randn(2, 3, 61, 90)
    teacher = quantize_int8(model, [torch.randn(2, 3, 64, 96), images])
    assert sum(isinstance(module, Int8Chain) for module in teacher.modules()) == chains
    same = ("taps", "stride", "class_names", "architecture", "mean", "std")
    assert all(getattr(teacher, name) == getattr(model, name) for name in same)
    with torch.no_grad():
        theirs, ours = model(images, tuple(model.taps)), teacher(images, tuple(model.taps))
    assert type(ours) is type(theirs)
    assert list(ours.features) == list(theirs.features)
    expected_maps, maps = ([answer.logits, *answer.features.values()] for answer in (theirs, ours))
    for expected, map_ in zip(expected_maps, maps, strict=True):
        assert map_.shape == expected.shape
        assert map_.dtype == torch.float32
        assert 0 < difference(expected, map_) < 0.25  # of noise, untrained; a wrong scale or zero point makes it 1
    with pytest.raises(ConfigurationError, match="taps: .* has no tap 'encoder.9'"):
        teacher(images, ["encoder.9"])


def test_copies_and_memory_formats(trained: tuple[UNet, Tensor, Tensor]) -> None:
    model, images, _ = trained
    teacher = quantize_int8(model, [images[:8]])
    other = copy.deepcopy(teacher).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        expected = teacher(images[:2]).logits
        found = other(images[:2].contiguous(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Branches(nn.Sequential):
    """Looks like a chain, and is none: its second half sees what its first half saw."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + self[1](x)


def test_a_module_that_only_looks_like_a_chain_keeps_its_sum(trained: tuple[UNet, Tensor, Tensor]) -> None:
    _, images, _ = trained

    def half() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    torch.manual_seed(0)
    model = nn.Sequential(Branches(half(), half())).eval()
    teacher = quantize_int8(model, [images[:4]])
    assert sum(isinstance(module, Int8Chain) for module in teacher.modules()) == 2
    with torch.no_grad():
        assert difference(model(images[:4]), teacher(images[:4])) < 0.02


def test_each_channel_has_a_scale_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))).eval()
    with torch.no_grad():
        model[0][0].weight[1] *= 1e-3  # type: ignore
    images = torch.randn(1, 3, 32, 32)
    teacher = quantize_int8(model, [images])
    with torch.no_grad():
        theirs, ours = model(images)[0, 1], teacher(images)[0, 1]
    assert difference(theirs - theirs.mean(), ours - ours.mean()) < 0.02


def test_refused_where_it_would_do_nothing_or_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = settled(SegFormer(CLASSES, "b0", [8, 16, 20, 32], [1, 2, 1, 1], 16))
    with pytest.raises(ConfigurationError, match=r"teacher.precision: int8: only 0% .*; give bf16"):
        quantize_int8(transformer, [torch.randn(1, 3, 64, 64)])
    monkeypatch.setattr(quantize, "has_int8", lambda: False)
    with pytest.raises(ConfigurationError, match="teacher.precision: int8: this CPU has no instructions"):
        quantize_int8(settled(UNet(CLASSES, width=4, depth=2)), [torch.randn(1, 3, 64, 64)])
