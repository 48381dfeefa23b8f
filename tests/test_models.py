"""The models: shapes and taps as published, weights that are loaded whole or refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_teacher
from errors import ConfigurationError, DamagedFileError
from models import ModelConfig, Output, StudentConfig, build_model, load_model
from models.interface import Tap
from models.unet import UNet


class Names:
    """Class names as a data set has them."""

    names = ("road", "car", "sky")


def small(**changes: object) -> UNet:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**({"width": 4, "depth": 2} | changes)), Names)  # type: ignore[arg-type]
    assert isinstance(model, UNet)
    return model.eval()


def up(size: int, stride: int) -> int:
    return -(-size // stride)


# ------------------------------------------------------------------------------------------ shapes and taps


@pytest.mark.parametrize("block", ["plain", "separable", "residual"])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (5, 61), (1, 1)])
def test_maps_are_as_published(block: str, stride: int, size: tuple[int, int]) -> None:
    model = small(block=block, stride=stride)
    output = model(torch.randn(2, 3, *size), taps=list(model.taps))
    assert isinstance(output, Output)
    assert output.logits.shape == (2, 3, up(size[0], stride), up(size[1], stride))
    assert output.logits.dtype == torch.float32
    assert list(output.features) == ["encoder.0", "encoder.1", "bottleneck", "decoder.0", "decoder.1"]
    for name, features in output.features.items():
        tap = model.taps[name]
        assert features.shape == (2, tap.channels, up(size[0], tap.stride), up(size[1], tap.stride)), name


def test_taps_of_a_deeper_model() -> None:
    model = small(width=6, depth=3, stride=2)
    assert model.taps == {
        "encoder.0": Tap(6, 2),
        "encoder.1": Tap(12, 4),
        "encoder.2": Tap(24, 8),
        "bottleneck": Tap(48, 16),
        "decoder.0": Tap(24, 8),
        "decoder.1": Tap(12, 4),
        "decoder.2": Tap(6, 2),
    }
    assert model.stride == 2
    assert model.class_names == ["road", "car", "sky"]


def test_only_the_taps_that_are_asked_for() -> None:
    model, images = small(), torch.randn(1, 3, 32, 32)
    assert model(images).features == {}
    assert set(model(images, taps=["bottleneck"]).features) == {"bottleneck"}
    torch.testing.assert_close(model(images, taps=list(model.taps)).logits, model(images).logits)


def test_last_tap_is_what_the_classifier_sees() -> None:
    model = small()
    output = model(torch.randn(1, 3, 30, 50), taps=["decoder.1"])
    torch.testing.assert_close(model.classifier(output.features["decoder.1"]), output.logits)


def test_unknown_tap_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError) as caught:
        small()(torch.randn(1, 3, 32, 32), taps=["encoder.0", "neck"])
    known = "encoder.0, encoder.1, bottleneck, decoder.0, decoder.1"
    assert str(caught.value) == f"taps: unet has no tap 'neck'; it has {known}"


def test_padding_is_on_the_right_and_below() -> None:
    """So that position (i, j) of a map always stands over the same pixels."""
    model = small(depth=1, stride=2)
    images = torch.randn(1, 3, 61, 45)
    padded = torch.nn.functional.pad(images, (0, 3, 0, 3))
    torch.testing.assert_close(model(images).logits, model(padded).logits[..., :31, :23])


@pytest.mark.parametrize("block", ["plain", "separable", "residual"])
def test_gradient_reaches_every_parameter(block: str) -> None:
    model = small(block=block).train()
    model(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


# ---------------------------------------------------------------------------------- precision and memory


def test_bf16_autocast() -> None:
    model, images = small(), torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, taps=["bottleneck"])
    assert output.logits.dtype == torch.bfloat16
    exact = model(images).logits
    assert (output.logits.float() - exact).norm() < 0.05 * exact.norm()


def test_channels_last_is_kept_and_changes_nothing() -> None:
    model, images = small(), torch.randn(2, 3, 33, 47)
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    found = model(images.contiguous(memory_format=torch.channels_last), taps=["bottleneck"])
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert found.features["bottleneck"].is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------- configuration


def millions(config: ModelConfig) -> float:
    return sum(parameter.numel() for parameter in build_model(config, Names).parameters()) / 1e6


def test_from_a_tenth_to_thirty_million_parameters() -> None:
    assert 0.05 < millions(ModelConfig(width=8, depth=3)) < 0.15
    assert 0.4 < millions(ModelConfig(width=16, depth=3)) < 0.6  # the default student
    assert 28 < millions(ModelConfig(width=64, depth=4)) < 35
    assert millions(ModelConfig(width=32, block="separable")) < millions(ModelConfig(width=32)) / 5
    assert millions(ModelConfig(width=32, block="residual")) > millions(ModelConfig(width=32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stride": 3}, "model.stride: 3 is not a stride of the UNet; give 1, 2, 4, 8, 16 or 32"),
        (
            {"stride": 32, "depth": 2},
            "model.stride: 32 is beyond the bottleneck, which has stride 16 at depth 2; give a smaller stride or "
            "a greater depth",
        ),
        ({"channels": [4, 8]}, "model.channels: 2 numbers, but depth 3 has 3 levels and the bottleneck; give 4"),
        (
            {"channels": [4, 8, 8, 8], "max_parameters": 9},
            "model.channels: stands beside a budget, which chooses them; give one of both",
        ),
        ({"max_flops": 0.0}, "model.max_flops: 0.0 is not positive; give more"),
        (
            {"name": "segformer", "depth": 2},
            "model.depth: is no key of segformer, which has gradient_checkpointing, name, variant, weights; "
            "leave it out",
        ),
        (
            {"name": "dabnet", "weights": "x"},
            "model.weights: is no key of dabnet, which has gradient_checkpointing, name; leave it out",
        ),
        (
            {"name": "mobilenetv2", "output_stride": 4},
            "model.output_stride: 4 is no output stride of mobilenetv2; give 8 or 16 or 32",
        ),
        ({"name": "hub"}, "model.weights: hub needs the folder or Hub name of a model; give it"),
        ({"width": 5}, "model.width: 5 is not an even number of channels; give 2 or more"),
        ({"depth": 0}, "model.depth: 0 is out of range; give 1 to 6"),
        ({"depth": 7}, "model.depth: 7 is out of range; give 1 to 6"),
    ],
)
def test_shapes_that_do_not_exist(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ModelConfig(**changes)  # type: ignore[arg-type]
    assert str(caught.value) == said


def test_the_students_keys_are_called_so() -> None:
    with pytest.raises(ConfigurationError, match=r"^student.depth: is no key of dabnet"):
        StudentConfig(name="dabnet", depth=1)


def test_gradient_checkpointing_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match=r"^student.gradient_checkpointing: unet has none; leave it out"):
        build_model(StudentConfig(gradient_checkpointing=True), Names)


def test_a_budget_decides_the_width() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^student.width: stands beside max_parameters, which decides it"
    ):
        StudentConfig(width=32, max_parameters=10**6)
    assert StudentConfig(max_parameters=10**6).width == 16


def test_the_teachers_preset_width_is_no_mistake() -> None:
    assert ModelConfig(name="dabnet", width=32).name == "dabnet"
    assert train_teacher.Config().model.width == 32
    with pytest.raises(ConfigurationError, match=r"^model.width: is no key of dabnet"):
        ModelConfig(name="dabnet", width=48)


def test_a_normalisation_that_is_announced_late_is_where_the_model_is() -> None:
    model = small().to("meta")
    model.take_images((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert model.factor.device.type == model.shift.device.type == "meta"
    model.take_images(model.mean, model.std)
    assert model.factor is None


def test_same_seed_same_weights() -> None:
    for a, b in zip(small().state_dict().values(), small().state_dict().values(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------- saved and loaded


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small(stride=2, block="residual").train()
    model(torch.randn(2, 3, 32, 32))  # so that batch-norm's statistics are not those of a fresh model
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loaded_as_it_was_saved(saved: Path) -> None:
    images = torch.randn(1, 3, 40, 40)
    for model in (load_model(saved), load_model(str(saved)), UNet.from_pretrained(saved)):
        model.eval()
        assert isinstance(model, UNet)
        assert (model.stride, model.class_names) == (2, ["road", "car", "sky"])
        expected = load_file(saved / "model.safetensors")
        assert set(model.state_dict()) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        torch.testing.assert_close(model(images).logits, load_model(saved).eval()(images).logits)
    assert json.loads((saved / "config.json").read_text())["name"] == "unet"


def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path) -> None:
    load_model(saved).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def assert_refused(folder: Path, said: str) -> None:
    with pytest.raises(DamagedFileError) as caught:
        load_model(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_missing_files(saved: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (saved / name).rename(saved / "elsewhere")
        with pytest.raises(ConfigurationError, match=f"{name}: no such file"):
            load_model(saved)
        (saved / "elsewhere").rename(saved / name)
    with pytest.raises(ConfigurationError, match="no such file"):
        load_model(saved.parent / "nowhere")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, length: int) -> None:
    path = saved / "model.safetensors"
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    assert_refused(saved, "can't be read")


def test_weights_that_are_missing_superfluous_or_misshapen(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = load_file(path)
    less = {name: value for name, value in whole.items() if name != "classifier.bias"}
    save_file(less, path)
    assert_refused(saved, "weights of another model: missing classifier.bias; check the folder's config.json")
    save_file(whole | {"head.weight": torch.zeros(2)}, path)
    assert_refused(saved, "superfluous head.weight")
    save_file(whole | {"classifier.bias": torch.zeros(5)}, path)
    assert_refused(saved, "classifier.bias is [5], not [3]")
    save_file({name: value for name, value in whole.items() if "encoder" not in name}, path)
    assert_refused(saved, "more;")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"name": "resnet"}', '{"class_names": ["a"]}', '{"name": "unet", "widht": 4}'],
)
def test_configurations_that_are_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    assert_refused(saved, "not the configuration of a model")


def test_configuration_of_another_width(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"width": 8}))
    assert_refused(saved, "weights of another model")


def test_a_pickle_is_not_opened(saved: Path) -> None:
    """Weights are safetensors, which can't carry code."""
    torch.save({"x": torch.zeros(1)}, saved / "model.safetensors")
    assert_refused(saved, "can't be read")
