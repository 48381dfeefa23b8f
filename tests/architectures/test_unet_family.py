"""The UNet in all its shapes: channels, blocks, strides, those that fit a budget, and slices of wider ones."""

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploy.profiling import count_flops, count_parameters
from errors import ConfigurationError
from models import load_model
from models.budget import student_for, unet_costs
from models.interface import Tap
from models.slicing import channel_importance, slice_from
from models.unet import STRIDES, InvertedUnit, UNet

BLOCKS = ["plain", "separable", "residual", "inverted"]
NAMES = ["road", "car", "sky"]


def unet(seed: int = 0, **shape: Any) -> Any:
    torch.manual_seed(seed)
    return UNet(NAMES, **({"depth": 3, "width": 4} | shape)).eval()


def up(size: int, stride: int) -> int:
    return -(-size // stride)


def said_by(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ shapes and taps


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("stride", STRIDES)
def test_maps_are_as_published(block: str, stride: int) -> None:
    model = unet(block=block, stride=stride)
    for height, width in [(64, 64), (33, 71), (5, 1), (1, 1)]:
        output = model(torch.randn(2, 3, height, width), taps=list(model.taps))
        assert output.logits.shape == (2, 3, up(height, stride), up(width, stride))
        assert list(output.features) == list(model.taps)
        for name, features in output.features.items():
            tap = model.taps[name]
            assert features.shape == (2, tap.channels, up(height, tap.stride), up(width, tap.stride)), name


@pytest.mark.parametrize(("stride", "decoders"), [(1, 3), (2, 3), (4, 3), (8, 2), (16, 1), (32, 0)])
def test_the_decoder_ends_where_the_logits_stand(stride: int, decoders: int) -> None:
    model, stem = unet(stride=stride), min(stride, 4)
    expected = {"encoder.0": Tap(4, stem), "encoder.1": Tap(8, 2 * stem), "encoder.2": Tap(16, 4 * stem)}
    expected["bottleneck"] = Tap(32, 8 * stem)
    for i in range(decoders):
        expected[f"decoder.{i}"] = Tap(16 // 2**i, 4 * stem // 2**i)
    assert model.taps == expected
    assert list(model.taps) == list(expected)
    last = list(expected)[-1]
    assert expected[last].stride == stride == model.stride
    output = model(torch.randn(1, 3, 70, 90), taps=[last])
    torch.testing.assert_close(model.classifier(output.features[last]), output.logits)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("stride", STRIDES)
def test_gradient_reaches_every_parameter(block: str, stride: int) -> None:
    model = unet(block=block, stride=stride).train()
    model(torch.randn(1, 3, 64, 96)).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_channels_of_each_level() -> None:
    model = unet(channels=[6, 10, 10, 30], stride=8, block="residual")
    assert [tap.channels for tap in model.taps.values()] == [6, 10, 10, 30, 10, 10]
    assert model.stem[0][0].out_channels == 3
    odd = unet(channels=[5, 7, 9, 11])
    assert odd.stem[0][0].out_channels == 2
    assert odd(torch.randn(1, 3, 31, 31)).logits.shape == (1, 3, 8, 8)


def test_width_is_short_for_doubling_channels() -> None:
    a, b = unet(width=6), unet(channels=[6, 12, 24, 48])
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_inverted_bottleneck() -> None:
    """As in MobileNetV2: expanded four times the narrower side, ReLU6 within, linear at its end, a shortcut where
    the channels agree."""
    torch.manual_seed(0)
    unit, x = InvertedUnit(6, 6).eval(), 50 * torch.randn(2, 6, 9, 9)
    hidden = unit.depthwise(unit.expand(x))
    assert hidden.shape[1] == 24
    assert hidden.min() == 0
    assert hidden.max() == 6
    torch.testing.assert_close(unit(x), x + unit.project(hidden))
    assert unit(x).min() < 0
    for inputs, outputs in [(4, 8), (8, 4)]:
        unit = InvertedUnit(inputs, outputs)
        assert unit.expand[0].out_channels == 16
        assert unit(torch.randn(2, inputs, 5, 5)).shape == (2, outputs, 5, 5)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"stride": 3}, "model.stride: 3 is not a stride of the UNet; give 1, 2, 4, 8, 16 or 32"),
        ({"stride": 64}, "model.stride: 64 is not a stride of the UNet; give 1, 2, 4, 8, 16 or 32"),
        (
            {"stride": 32, "depth": 2},
            "model.stride: 32 is beyond the bottleneck, which has stride 16 at depth 2; "
            "give a smaller stride or a greater depth",
        ),
        (
            {"channels": [4, 8, 16]},
            "model.channels: 3 numbers, but depth 3 has 3 levels and the bottleneck; give 4",
        ),
        ({"channels": [1, 8, 16, 32]}, "model.channels: 1 is too few for a level; give 2 or more"),
    ],
)
def test_shapes_that_do_not_exist(shape: dict[str, Any], said: str) -> None:
    assert said_by(unet, **shape) == said


@pytest.mark.parametrize("shape", [{"channels": [4, 6, 9, 12]}, {"stride": 16, "block": "inverted"}])
def test_loaded_as_it_was_saved(shape: dict[str, Any], tmp_path: Path) -> None:
    model, images = unet(**shape), torch.randn(1, 3, 40, 70)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.taps == model.taps
    assert torch.equal(loaded(images).logits, model(images).logits)


class Logits(nn.Module):
    """A model that answers with a tensor."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


@pytest.mark.parametrize(("block", "stride"), [("inverted", 8), ("residual", 16)])
def test_compiles_and_exports_whole(block: str, stride: int) -> None:
    model, images = unet(block=block, stride=stride, depth=2), torch.randn(1, 3, 40, 70)
    expected = model(images, taps=["bottleneck"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images, taps=["bottleneck"])
    torch.testing.assert_close(compiled.features["bottleneck"], expected.features["bottleneck"])
    exported = torch.export.export(Logits(model), (images,)).module()(images)
    torch.testing.assert_close(exported, expected.logits)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images).logits
    assert (rounded.float() - expected.logits).norm() < 0.05 * expected.logits.norm()


# ------------------------------------------------------------------------------------------------- budgets


SHAPES = [(b, s, d) for b, s, d in product(BLOCKS, STRIDES, (2, 3, 4)) if s <= min(s, 4) * 2**d]


def drawn_nowhere(shape: dict[str, Any], classes: int = 19) -> UNet:
    """A UNet that has shapes alone: counting what it costs computes nothing."""
    with torch.device("meta"):
        return UNet([str(i) for i in range(classes)], **shape)


def parameters_of(shape: dict[str, Any], classes: int = 19) -> int:
    return count_parameters(drawn_nowhere(shape, classes))


def flops_of(shape: dict[str, Any], classes: int = 19, size: tuple[int, int] = (512, 1024)) -> int:
    return count_flops(drawn_nowhere(shape, classes), size)


def test_costs_by_formula_are_those_that_are_measured() -> None:
    draw = random.Random(0)
    for block, stride in product(BLOCKS, STRIDES):
        depth = {1: 4, 32: 3}.get(stride, 2)
        channels = [draw.randint(2, 40) for _ in range(depth + 1)]
        channels[1] = draw.choice([channels[0], channels[1]])  # shortcuts without projection
        size = draw.choice([(512, 1024), (360, 481), (33, 7)])
        classes = draw.choice([2, 11, 19])
        found = unet_costs(np.array(channels), stride=stride, block=block, classes=classes, size=size)
        shape = {"depth": depth, "stride": stride, "block": block, "channels": channels}
        assert int(found[0]) == parameters_of(shape, classes), shape
        assert int(found[1]) == flops_of(shape, classes, size), shape


@pytest.mark.parametrize("kind", ["parameters", "flops"])
def test_budgets_are_met_within_two_per_cent_and_never_exceeded(kind: str) -> None:
    draw = random.Random(kind)
    low, high = {"parameters": (2e4, 5e7), "flops": (5e7, 5e11)}[kind]
    for block, stride, depth in draw.sample(SHAPES, 20):
        smallest = 2 * 2 ** np.arange(depth + 1)
        least = unet_costs(smallest, stride=stride, block=block, classes=19, size=(512, 1024))[kind == "flops"]
        bottom = max(low, 2 * float(least))
        budget = int(bottom * (high / bottom) ** draw.random())
        shape = student_for(**dict[str, Any]({kind: budget}), block=block, stride=stride, depth=depth)
        assert (shape["block"], shape["stride"], shape["depth"]) == (block, stride, depth)
        share = (flops_of if kind == "flops" else parameters_of)(shape) / budget
        assert 0.98 <= share <= 1, (shape, budget, share)


def test_channels_about_double_and_are_round() -> None:
    for parameters in (100_000, 500_000, 2_000_000, 20_000_000):
        channels = student_for(parameters=parameters)["channels"]
        assert all(1.7 <= b / a <= 2.3 for a, b in zip(channels, channels[1:], strict=False))
    assert all(count % 8 == 0 for count in channels)


def test_a_wider_budget_gives_a_wider_network() -> None:
    found = [sum(student_for(parameters=p)["channels"]) for p in (20_000, 50_000, 200_000, 1_000_000, 9_000_000)]
    assert found == sorted(set(found))
    assert student_for(parameters=200_000) == student_for(parameters=200_000)


def test_of_two_budgets_the_tighter_binds() -> None:
    by_parameters, by_flops = student_for(parameters=500_000), student_for(flops=5e9)
    assert by_parameters != by_flops
    parameters, flops = parameters_of(by_parameters), flops_of(by_flops)
    assert student_for(parameters=500_000, flops=1e12) == by_parameters
    assert student_for(parameters=50_000_000, flops=5e9) == by_flops
    both = student_for(parameters=parameters, flops=flops)
    assert parameters_of(both) <= parameters
    assert flops_of(both) <= flops


def test_classes_and_size_are_part_of_the_budget() -> None:
    shape = student_for(flops=3e9, size=(360, 480), classes=11, block="separable")
    assert 0.98 * 3e9 <= flops_of(shape, 11, (360, 480)) <= 3e9
    shape = student_for(parameters=20_000, classes=150, block="separable")
    assert 0.98 * 20_000 <= parameters_of(shape, 150) <= 20_000


def test_budgets_that_can_not_be_met() -> None:
    assert said_by(student_for) == "student_for: no budget; give parameters, flops or both"
    smallest = {"channels": [2, 4, 8, 16]}
    needed = parameters_of(smallest), flops_of(smallest)
    text = "is too few: the smallest UNet of depth 3, stride 4 and block plain needs"
    end = "give that, or another shape"
    assert said_by(student_for, parameters=5) == f"student_for.parameters: 5 {text} {needed[0]}; {end}"
    assert said_by(student_for, parameters=10**6, flops=7) == (
        f"student_for.flops: 7 {text} {needed[1]} at 512×1024; {end}"
    )
    assert said_by(student_for, parameters=10**6, stride=32, depth=2).startswith(
        "student_for.stride: 32 is beyond"
    )
    assert said_by(student_for, parameters=10**6, block="foo").startswith("student_for.block: 'foo' is no block")
    assert student_for(parameters=needed[0])["channels"] == [2, 4, 8, 16]


# -------------------------------------------------------------------------------------------------- slices


def trained(seed: int, **shape: Any) -> Any:
    """A UNet whose batch normalisations and classifier are not those of a fresh one."""
    model = unet(seed, **shape)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for values in (norm.weight.data, norm.running_var):
            values.uniform_(0.5, 1.5)
        for values in (norm.bias.data, norm.running_mean):
            values.normal_(std=0.1)
        norm.num_batches_tracked.fill_(7)
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.classifier.bias)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return list(mine) == list(other) and all(torch.equal(mine[name], other[name]) for name in mine)


SLICED = [(block, stride) for block in BLOCKS for stride in (1, 4)] + [("inverted", 2), ("residual", 16)]


@pytest.mark.parametrize(("block", "stride"), SLICED)
def test_a_slice_as_wide_as_the_teacher_is_the_teacher(block: str, stride: int) -> None:
    teacher = trained(0, block=block, stride=stride, channels=[4, 8, 8, 12])
    student = unet(1, block=block, stride=stride, channels=[4, 8, 8, 12])
    slice_from(student, teacher)
    assert same(student, teacher)


class Padded:
    """A wider UNet of the same function, written without the code of the slices: where each of the small one's
    channels went is found by following the maps."""

    def __init__(self, small: Any, channels: list[int]) -> None:
        self.small = small
        shape = {"depth": small.depth, "stride": small.stride, "block": small.block}
        self.wide = trained(5, **shape, channels=channels)
        self.places: dict[str, Tensor] = {}
        rgb = torch.arange(3)
        x = rgb
        if small.stem_stride == 2:
            x = self.write("stem", x)
        elif small.stem_stride == 4:
            x = self.write("stem.1", self.write("stem.0", x))
        skips, widths = [], []
        for level in range(small.depth):
            x = self.block(f"encoder.{level}", x)
            skips.append(x)
            widths.append(channels[level])
        x = self.block("bottleneck", x)
        for i in range(len(small.decoder)):
            x = self.block(f"decoder.{i}", torch.cat([skips.pop(), widths.pop() + x]))
        self.wide.classifier.weight.data[:, x] = small.classifier.weight.data
        self.wide.classifier.bias.data = small.classifier.bias.data.clone()

    def write(self, name: str, columns: Tensor, rows: Tensor | None = None, *, depthwise: bool = False) -> Tensor:
        """Puts a layer's weights at `rows` (drawn if not given), kills the other rows, and returns `rows`."""
        convolution, own = (model.get_submodule(f"{name}.0") for model in (self.wide, self.small))
        norm, own_norm = (model.get_submodule(f"{name}.1") for model in (self.wide, self.small))
        if rows is None:
            rows = torch.randperm(convolution.out_channels)[: own.out_channels]
        if depthwise:
            convolution.weight.data[rows] = own.weight.data
        else:
            convolution.weight.data[rows[:, None], columns] = own.weight.data
        for part in ("weight", "bias", "running_mean", "running_var"):
            if part in ("weight", "bias"):
                getattr(norm, part).data.zero_()
            getattr(norm, part).data[rows] = getattr(own_norm, part).data
        return rows

    def block(self, name: str, x: Tensor) -> Tensor:
        if self.small.block == "plain":
            return self.write(f"{name}.1", self.write(f"{name}.0", x))
        if self.small.block == "separable":
            self.write(f"{name}.0", x, x, depthwise=True)
            hidden = self.write(f"{name}.1", x)
            self.write(f"{name}.2", hidden, hidden, depthwise=True)
            return self.write(f"{name}.3", hidden)
        if self.small.block == "residual":
            hidden = self.write(f"{name}.first", x)
            if isinstance(self.small.get_submodule(f"{name}.shortcut"), nn.Identity):
                return self.write(f"{name}.second", hidden, x)
            return self.write(f"{name}.shortcut", x, self.write(f"{name}.second", hidden))
        for unit in ("0", "1"):
            hidden = self.write(f"{name}.{unit}.expand", x)
            self.write(f"{name}.{unit}.depthwise", hidden, hidden, depthwise=True)
            shortcut = self.small.get_submodule(f"{name}.{unit}").shortcut
            x = self.write(f"{name}.{unit}.project", hidden, x if shortcut else None)
        return x


@pytest.mark.parametrize(("block", "stride"), SLICED)
@pytest.mark.parametrize(
    ("narrow", "channels"), [([4, 6, 8, 10], [7, 10, 13, 21]), ([4, 6, 6, 12], [8, 9, 9, 14])]
)
def test_a_slice_without_the_dead_channels_computes_the_same(
    block: str, stride: int, narrow: list[int], channels: list[int]
) -> None:
    small = trained(3, block=block, stride=stride, channels=narrow)
    torch.manual_seed(9)
    wide, images = Padded(small, channels).wide, torch.randn(2, 3, 37, 65)
    expected = small(images).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(wide(images).logits, expected, rtol=1e-3, atol=1e-4)

    student = unet(4, block=block, stride=stride, channels=narrow)
    slice_from(student, wide)
    torch.testing.assert_close(student(images).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_truly_narrower_slice_is_whole(block: str) -> None:
    """Every weight is the teacher's, at other places; the student computes finite numbers and trains."""
    teacher, student = trained(0, block=block, width=8), unet(1, block=block, width=4)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    slice_from(student, teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    for name, value in student.state_dict().items():
        assert torch.isin(value, before[name]).all(), name
    student.train()(torch.randn(2, 3, 64, 64)).logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


def test_importance_is_filter_norm_times_scale() -> None:
    teacher = trained(0, width=4, depth=1, stride=2)
    convolution, norm = teacher.encoder[0][0][0], teacher.encoder[0][0][1]
    scores = channel_importance(teacher)["encoder.0.hidden"]
    by_hand = [float((convolution.weight[i].abs().sum() * norm.weight[i].abs()).detach()) for i in range(4)]
    assert scores.argsort().tolist() == np.argsort(by_hand).tolist()
    norm.weight.data[2] *= -100
    assert channel_importance(teacher)["encoder.0.hidden"].argmax() == 2

    student = unet(1, width=2, depth=1, stride=2)
    slice_from(student, teacher)
    kept = sorted(np.argsort([*by_hand[:2], 1e9, by_hand[3]])[-2:].tolist())
    assert torch.equal(student.encoder[0][0][1].weight, norm.weight[kept])


def test_channels_that_a_shortcut_adds_up_are_chosen_together() -> None:
    teacher = trained(0, block="residual", width=4, stride=2)
    teacher.stem[1].weight.data.copy_(torch.tensor([1.0, 1, 0, 0]))
    teacher.encoder[0].second[1].weight.data.copy_(torch.tensor([0.0, 9, 9, 0]))
    student = unet(1, block="residual", width=2, stride=2)
    slice_from(student, teacher)
    assert torch.equal(student.stem[1].weight, torch.tensor([1.0, 0]))
    assert torch.equal(student.encoder[0].second[1].weight, torch.tensor([9.0, 9]))


def test_the_classifier_goes_along_where_it_means_the_same() -> None:
    teacher = trained(0, width=8)
    other: Any = UNet(["road", "car", "tree"], 4)
    larger = unet(1, width=4, stride=16)
    for student in (other, larger):
        drawn = student.classifier.weight.clone()
        stem = student.stem[0][0].weight.clone()
        slice_from(student, teacher)
        assert torch.equal(student.classifier.weight, drawn)
        assert not torch.equal(student.stem[0][0].weight, stem)
    assert torch.isin(larger.decoder[0][1][0].weight, teacher.decoder[0][1][0].weight).all()


def test_the_normalisation_goes_along() -> None:
    teacher, student = trained(0), unet(1)
    teacher.mean, teacher.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    slice_from(student, teacher)
    assert (student.mean, student.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ({}, {"block": "residual"}, "the student's block is plain, the teacher's residual; make them agree"),
        ({"depth": 2}, {}, "the student's depth is 2, the teacher's 3; make them agree"),
        ({"stride": 2}, {}, "the student's stem's stride is 2, the teacher's 4; make them agree"),
        (
            {"stride": 8},
            {"stride": 16},
            "the student's stride is 8, the teacher's 16; give it that one or a larger",
        ),
        (
            {"channels": [4, 8, 17, 20]},
            {"channels": [8, 8, 16, 20]},
            "the student has 17 channels at level 2, the teacher 16; make it no wider",
        ),
        (
            {"channels": [4, 8, 16, 16], "block": "residual"},
            {"channels": [4, 8, 16, 20], "block": "residual"},
            "only one of the two has equal channels in and out of bottleneck, and so its shortcut; "
            "give the student other channels",
        ),
        (
            {"channels": [4, 8, 12, 16], "block": "inverted"},
            {"channels": [4, 8, 16, 16], "block": "inverted"},
            "only one of the two has equal channels in and out of bottleneck, and so its shortcut; "
            "give the student other channels",
        ),
    ],
)
def test_what_is_no_slice(student: dict[str, Any], teacher: dict[str, Any], said: str) -> None:
    narrow, wide = unet(0, **student), unet(1, **teacher)
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    assert said_by(slice_from, narrow, wide) == f"student.slice_from: {said}"
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())
    assert said_by(slice_from, narrow, nn.Identity(), "model.slice_from").startswith(
        "model.slice_from: the teacher is no UNet"
    )
