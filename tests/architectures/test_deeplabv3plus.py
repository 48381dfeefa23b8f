"""DeepLabV3+, MobileNetV2 and their encoders: published sizes, dilation that keeps what the weights see, ImageNet
weights that are loaded whole or refused. What every architecture promises is tested in test_every_model.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from errors import ConfigurationError, DamagedFileError
from models import SegmentationModel
from models.backbones import ENCODERS, Encoder, ImagePooling
from models.deeplabv3plus import DeepLabV3Plus
from models.interface import Tap
from models.mobilenetv2 import MobileNetV2

CLASSES = ["road", "car", "sky"]
MODELS: dict[str, Callable[[], SegmentationModel]] = {
    "resnet18": lambda: DeepLabV3Plus(CLASSES, "resnet18", 16, 16, 8),
    "resnet18-stride-8": lambda: DeepLabV3Plus(CLASSES, "resnet18", 8, 16, 8),
    "mobilenetv2": lambda: DeepLabV3Plus(CLASSES, "mobilenetv2", 16, 16, 8),
    "student": lambda: MobileNetV2(CLASSES, 0.35, 32, 16),
}
RESNET18 = {"layer_type": "basic", "depths": (2, 2, 2, 2), "hidden_sizes": (64, 128, 256, 512)}


def make(name: str) -> SegmentationModel:
    """A model with the batch-norm statistics of a batch."""
    torch.manual_seed(0)
    model = MODELS[name]()
    settle(model)
    return model.eval()


def settle(model: nn.Module, size: tuple[int, int] = (96, 128)) -> None:
    """Gives batch-norms the statistics of a batch, and ConvNeXt's blocks a weight that shows."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale_parameter"):
            nn.init.constant_(parameter, 0.5)
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, *size))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, on the scale of the map."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------ shapes and sizes


def test_taps() -> None:
    stages = {
        "encoder.0": Tap(64, 4),
        "encoder.1": Tap(128, 8),
        "encoder.2": Tap(256, 16),
        "encoder.3": Tap(512, 16),
    }
    model = make("resnet18")
    assert model.taps == stages | {"bottleneck": Tap(16, 16), "decoder.0": Tap(16, 4)}
    assert model.stride == 4
    strides = [tap.stride for tap in make("resnet18-stride-8").taps.values()]
    assert strides == [4, 8, 8, 8, 8, 4]
    assert [tap.stride for tap in make("mobilenetv2").taps.values()] == [2, 4, 8, 16, 16, 16, 4]
    assert [tap.stride for tap in make("student").taps.values()] == [2, 4, 8, 16, 32, 32, 32]
    full = MobileNetV2(CLASSES)
    assert [tap.channels for tap in full.taps.values()] == [16, 24, 32, 96, 320, 128, 128]
    assert full.stride == 32


IMAGENET = {  # torchvision's published parameters, and those of the classifier and of what stands only before it
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "mobilenetv2": 3_504_872 - 1_281_000 - 412_160,
    "convnext_tiny": 28_589_128 - 769_000 - 1_536,
    "convnext_small": 50_223_688 - 769_000 - 1_536,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_as_published(name: str) -> None:
    with torch.device("meta"):
        encoder = Encoder(name, 16)
    assert sum(p.numel() for p in encoder.parameters()) == IMAGENET[name]


def test_output_strides_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="output_stride=32"):
        DeepLabV3Plus(CLASSES, output_stride=32)
    with pytest.raises(ValueError, match="output_stride=4"):
        MobileNetV2(CLASSES, output_stride=4)


# -------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("resnet18", 16),
        ("resnet18", 8),
        ("resnet50", 8),
        ("mobilenetv2", 8),
        ("mobilenetv2", 16),
        ("convnext_tiny", 8),
    ],
)
@torch.no_grad()
def test_dilation_keeps_what_the_weights_see(name: str, output_stride: int) -> None:
    """Every second (fourth) position of a dilated map is that of the network with strides, at the border too."""
    torch.manual_seed(0)
    strided, dilated = Encoder(name, 32), Encoder(name, output_stride)
    settle(strided)
    assert dilated.body.load_state_dict(strided.body.state_dict())
    images = torch.randn(1, 3, 96, 128)
    for i, (found, expected) in enumerate(zip(dilated.eval()(images), strided.eval()(images), strict=True)):
        step = strided.strides[i] // dilated.strides[i]
        assert expected.std() > 0.01
        assert_same(found[..., ::step, ::step], expected)
    assert step == 32 // output_stride


@torch.no_grad()
def test_stages_are_those_of_transformers() -> None:
    images = torch.randn(1, 3, 64, 96)
    for name, model in {
        "resnet18": ResNetModel(ResNetConfig(**RESNET18)),
        "convnext_tiny": ConvNextModel(ConvNextConfig()),
    }.items():
        encoder = Encoder(name, 32)
        settle(encoder, (64, 64))
        model.load_state_dict(encoder.body.state_dict(), strict=name == "resnet18")
        hidden = model.eval()(images, output_hidden_states=True).hidden_states[-4:]
        for found, expected in zip(encoder.eval()(images), hidden, strict=True):
            assert_same(found, expected)


@torch.no_grad()
def test_symmetric_padding_shifts_mobilenetv2() -> None:
    """Its weights mean the same with TensorFlow's padding, of images shifted by stride - 1, but at the border."""
    encoder = Encoder("mobilenetv2", 32, 0.35)
    settle(encoder)
    original = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35))
    original.load_state_dict(encoder.body.state_dict(), strict=False)
    images = torch.randn(1, 3, 128, 128)
    shifted = F.pad(images, (7, -7, 7, -7))
    expected = original.eval()(shifted, output_hidden_states=True).hidden_states[4]
    found = encoder.eval()(images)[2]
    inside = (..., slice(5, -5), slice(5, -5))
    assert_same(found[inside], expected[inside])


def test_mobilenetv2_remembers_more_than_the_last_batch() -> None:
    norms = [module for module in MobileNetV2(CLASSES, 0.35).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}


# -------------------------------------------------------------------------------------------------- training


def test_image_pooling_of_one_image() -> None:
    """One value per channel has no variance: the running statistics stand in, and do not move."""
    torch.manual_seed(0)
    pooling = ImagePooling(4, 6).train()
    pooling(torch.randn(8, 4, 3, 5))
    before = pooling.norm.running_mean.clone()
    one = torch.randn(1, 4, 3, 5)
    trained = pooling(one)
    assert torch.equal(pooling.norm.running_mean, before)
    assert torch.equal(trained, pooling.eval()(one))
    assert trained.shape == (1, 6, 3, 5)
    pooling.train()(torch.randn(2, 4, 3, 5))
    assert not torch.equal(pooling.norm.running_mean, before)


def test_image_pooling_can_be_synchronised() -> None:
    """Over several processes a batch-norm of one image each has more than one value a channel."""
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(ImagePooling(4, 6)).norm) is nn.SyncBatchNorm


@pytest.mark.parametrize("name", ["resnet18", "student"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    """Gradients and batch-norm's statistics, after a second backward pass over the same graph too."""
    images, gradients, buffers = torch.randn(2, 3, 64, 64), [], []
    for checkpointing in (False, True):
        model = make(name).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = model(images).logits.square().mean()
        for _ in range(2):
            loss.backward(retain_graph=True)
        gradients.append([parameter.grad for parameter in model.parameters()])
        buffers.append(list(model.buffers()))
    for found, expected in zip(*gradients, strict=True):
        assert_same(found, expected)
    assert all(torch.equal(found, expected) for found, expected in zip(*buffers, strict=True))


# ------------------------------------------------------------------------------------ the ways to run a model


class Logits(nn.Module):
    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


@torch.no_grad()
def test_exported_for_any_size() -> None:
    """Of which the stride divides height and width."""
    model, images = make("student"), torch.randn(2, 3, 64, 96)
    batch, height, width = (torch.export.Dim(axis, min=2, max=20) for axis in ("batch", "height", "width"))
    shapes = {"images": {0: batch, 2: 32 * height, 3: 32 * width}}
    program = torch.export.export(Logits(model), (images,), dynamic_shapes=shapes)
    for other in (images, torch.randn(3, 3, 128, 64)):
        assert_same(program.module()(other), model(other).logits)


def test_transformers_is_imported_when_a_model_is_made() -> None:
    code = "import sys, models.deeplabv3plus, models.mobilenetv2; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0


# -------------------------------------------------------------------------------------------- ImageNet weights


def statistics(model: nn.Module) -> None:
    """Batch-norms that are not those of a fresh model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """The folder of an ImageNet classifier as it is on the Hub."""
    folder = tmp_path / "imagenet"
    model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35))
    statistics(model)
    model.save_pretrained(folder)
    stated = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return folder


def test_weights_of_a_resnet(tmp_path: Path) -> None:
    source = ResNetForImageClassification(ResNetConfig(**RESNET18)).eval()
    statistics(source)
    source.save_pretrained(tmp_path)
    model = DeepLabV3Plus(CLASSES, "resnet18", 16, 16, 8).eval()
    model.load_encoder(str(tmp_path))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = model(images, taps=["encoder.3"]).features["encoder.3"]
        assert_same(found[..., ::2, ::2], source.resnet(images).last_hidden_state)
    assert model.mean == (0.485, 0.456, 0.406)  # of no preprocessor_config.json


def test_weights_of_a_convnext(tmp_path: Path) -> None:
    source = ConvNextModel(ConvNextConfig())  # without the classifier its weights have no prefix
    source.save_pretrained(tmp_path)
    model = DeepLabV3Plus(CLASSES, "convnext_tiny", 8, 16, 8)
    model.load_encoder(str(tmp_path))
    for name, value in model.encoder.body.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("output_stride", [8, 32])
def test_weights_of_a_mobilenetv2(classifier: Path, output_stride: int) -> None:
    model = MobileNetV2(CLASSES, 0.35, output_stride)
    model.load_encoder(str(classifier))
    expected = load_file(classifier / "model.safetensors")
    for name, value in model.encoder.body.state_dict().items():
        assert torch.equal(value, expected[f"mobilenet_v2.{name}"]), name
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def test_weights_in_several_files(classifier: Path) -> None:
    whole = load_file(classifier / "model.safetensors")
    (classifier / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[:50], "model-00002-of-00002.safetensors": names[50:]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, classifier / file)
    (classifier / "model.safetensors.index.json").write_text("{}")
    model = MobileNetV2(CLASSES, 0.35)
    model.load_encoder(str(classifier))
    name = "layer.15.reduce_1x1.convolution.weight"
    assert torch.equal(model.encoder.body.state_dict()[name], whole[f"mobilenet_v2.{name}"])


def refused(model: DeepLabV3Plus | MobileNetV2, source: Path | str, error: type[Exception]) -> str:
    """What is said; nothing may have been loaded."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error) as caught:
        model.load_encoder(str(source), "student.weights")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "\n" not in str(caught.value)
    assert model.mean == (0.485, 0.456, 0.406)
    return str(caught.value)


def test_other_architectures(classifier: Path, tmp_path: Path) -> None:
    said = refused(DeepLabV3Plus(CLASSES, "resnet18", 16, 16, 8), classifier, ConfigurationError)
    assert said == (
        f"student.weights: {classifier} is a model of type mobilenet_v2, but resnet18 needs one of resnet"
    )
    said = refused(MobileNetV2(CLASSES, 0.5), classifier, ConfigurationError)
    assert said == (
        f"student.weights: {classifier} has depth_multiplier 0.35, but mobilenetv2 has 0.5; "
        "give the weights of this encoder"
    )
    ResNetConfig(**RESNET18).save_pretrained(classifier)
    said = refused(DeepLabV3Plus(CLASSES, "resnet34", 16, 16, 8), classifier, ConfigurationError)
    assert "has depths [2, 2, 2, 2], but resnet34 has [3, 4, 6, 3]" in said
    said = refused(MobileNetV2(CLASSES, 0.35), tmp_path / "nowhere", ConfigurationError)
    assert said.startswith("student.weights: ")


def test_weights_that_are_missing_superfluous_or_misshapen(classifier: Path) -> None:
    path, model = classifier / "model.safetensors", MobileNetV2(CLASSES, 0.35)
    whole, prefix = load_file(path), "mobilenet_v2."
    one = "layer.3.conv_3x3.normalization.weight"
    save_file({name: value for name, value in whole.items() if name != prefix + one}, path)
    said = refused(model, classifier, DamagedFileError)
    assert said == f"{classifier}: its weights are not those of mobilenetv2: missing {one}; save it again"
    save_file(whole | {f"{prefix}layer.16.weight": torch.zeros(2)}, path)
    assert "superfluous layer.16.weight" in refused(model, classifier, DamagedFileError)
    save_file(whole | {prefix + one: torch.zeros(5)}, path)
    assert f"{one} is [5], not [96]" in refused(model, classifier, DamagedFileError)
    save_file({name: value for name, value in whole.items() if "layer.3" not in name}, path)
    said = refused(model, classifier, DamagedFileError)
    assert said.count("missing layer.3.") == 5
    assert "and 13 more" in said


def test_damaged_files(classifier: Path) -> None:
    model = MobileNetV2(CLASSES, 0.35)
    preprocessor = classifier / "preprocessor_config.json"
    for text in ("{", "[]", '{"image_mean": [0.5], "image_std": [1, 1, 1]}'):
        preprocessor.write_text(text)
        assert str(preprocessor) in refused(model, classifier, DamagedFileError)
    preprocessor.unlink()
    path = classifier / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert "can't be read" in refused(model, classifier, DamagedFileError)
    config = classifier / "config.json"
    for text in ("{", "[]", '{"model_type": "mobilenet_v2", "depth_multiplier": "big"}'):
        config.write_text(text)
        assert str(config) in refused(model, classifier, DamagedFileError)
