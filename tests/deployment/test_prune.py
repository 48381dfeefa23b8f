"""Pruned models compute what is left of their parents, hit their targets, and are saved and loaded as they are."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deploy.profiling import count_flops, count_parameters
from deploy.prune import (
    PruneConfig,
    Unit,
    dependency_graph,
    fewest_channels,
    narrowed_shapes,
    prune,
    prune_order,
    take_out,
    written,
)
from errors import ConfigurationError, DamagedFileError
from losses import DistillationLoss, LossConfig
from losses.features import FitnetConfig
from models import SegmentationModel, load_model
from models.dabnet import DABNet
from models.deeplabv3plus import DeepLabV3Plus
from models.mobilenetv2 import MobileNetV2
from models.pruned import layer_shapes
from models.segformer import SegFormer
from models.slicing import slice_from
from models.unet import UNet

pytest.importorskip("torch_pruning")

CLASSES = ["road", "car", "sky"]
SIZE = [48, 64]

MODELS: dict[str, Callable[[], SegmentationModel]] = {
    "plain": lambda: UNet(CLASSES, width=8, depth=2),
    "plain-stride-8": lambda: UNet(CLASSES, width=8, depth=2, stride=8),
    "separable": lambda: UNet(CLASSES, width=8, depth=2, stride=1, block="separable"),
    "residual": lambda: UNet(CLASSES, width=8, depth=2, stride=2, block="residual"),
    "residual-equal": lambda: UNet(CLASSES, channels=[8, 8, 16, 16], block="residual"),
    "inverted": lambda: UNet(CLASSES, width=8, depth=2, block="inverted"),
    "inverted-equal": lambda: UNet(CLASSES, channels=[8, 8, 16], depth=2, block="inverted"),
    "dabnet": lambda: DABNet(CLASSES, [1, 3]),
    "mobilenetv2": lambda: MobileNetV2(CLASSES, 0.35, 16),
    "deeplabv3plus": lambda: DeepLabV3Plus(CLASSES, "mobilenetv2", aspp_channels=16, low_level_channels=8),
    "deeplabv3plus-resnet18": lambda: DeepLabV3Plus(CLASSES, "resnet18", aspp_channels=16),
}


def lively(make: Callable[[], SegmentationModel]) -> SegmentationModel:
    """A model whose batch normalisations are not those of a fresh one."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def silenced(model: SegmentationModel, units: list[Unit]) -> SegmentationModel:
    """A copy in its parent's shape in which the units' channels are 0 wherever they are written."""
    model = copy.deepcopy(model)
    graph, groups = dependency_graph(model)
    for unit in units:
        for item in groups[unit.layer]:
            layer = item.dep.target.module
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and graph.is_out_channel_pruning_fn(
                item.dep.handler
            ):
                gone = [i for i, root in zip(item.idxs, item.root_idxs, strict=True) if root in unit.channels]
                layer.weight.data[gone] = 0
                if layer.bias is not None:
                    layer.bias.data[gone] = 0
    return model


@torch.no_grad()
def logits(model: SegmentationModel) -> torch.Tensor:
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return model(images).logits


# ------------------------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_answers_as_its_parent_with_those_channels_at_zero(name: str, tmp_path: Path) -> None:
    """Skip connections, sums, depthwise convolutions and images beside maps included; and the same from disk."""
    model = lively(MODELS[name])
    order = prune_order(copy.deepcopy(model), PruneConfig())
    units = order[: len(order) // 2]
    pruned = take_out(model, units)
    assert count_parameters(pruned) < 0.9 * count_parameters(model)
    assert layer_shapes(pruned) == narrowed_shapes(layer_shapes(model), units)
    expected = logits(silenced(model, units))
    assert not torch.allclose(expected, logits(model), rtol=1e-2)
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    pruned.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.taps == pruned.taps
    assert torch.equal(logits(loaded), logits(pruned))
    with torch.no_grad():
        answer = loaded(torch.zeros(1, 3, *SIZE), tuple(loaded.taps))
    assert {tap: answer.features[tap].shape[1] for tap in loaded.taps} == {
        name: tap.channels for name, tap in loaded.taps.items()
    }


def test_dead_channels_go_without_a_trace() -> None:
    """Channels that are 0 everywhere go first, and what is left gives the parent's logits."""
    model = lively(MODELS["plain"])
    dead = {"encoder.1.0": [1, 4, 9], "bottleneck.1": [0, 30]}
    for block, channels in dead.items():
        convolution, norm, _ = model.get_submodule(block)  # type: ignore[misc]
        convolution.weight.data[channels] = 0  # type: ignore[union-attr, operator]
        norm.weight.data[channels] = norm.bias.data[channels] = 0  # type: ignore[union-attr, operator]
    first, last = model.get_submodule("encoder.1.1.0"), model.get_submodule("decoder.0.0.0")
    first.weight.data[:, [1, 4, 9]] = 0  # type: ignore[union-attr, operator]
    last.weight.data[:, [16, 46]] = 0  # type: ignore[union-attr, operator]
    units = prune_order(copy.deepcopy(model), PruneConfig())[:5]
    found: dict[str, list[int]] = {}
    for unit in units:
        found.setdefault(unit.layer, []).extend(unit.channels)
    assert {layer: sorted(channels) for layer, channels in found.items()} == {
        f"{block}.0": channels for block, channels in dead.items()
    }
    torch.testing.assert_close(logits(take_out(model, units)), logits(model))


def test_what_goes_first_is_what_importance_says() -> None:
    """By each measure, of one layer: the least first."""
    model = lively(MODELS["plain"])
    convolution, norm = model.get_submodule("decoder.0.0.0"), model.get_submodule("decoder.0.0.1")

    def order(**keys: Any) -> list[int]:
        units = prune_order(
            copy.deepcopy(model), PruneConfig(min_channels=0.01, **keys), losses=keys.pop("l", None)
        )
        return [channel for unit in units if unit.layer == "decoder.0.0.0" for channel in unit.channels]

    with torch.no_grad():
        norm.weight.copy_(torch.linspace(2, 1, 16))  # type: ignore[operator, union-attr]
    assert order(importance="bn_scale") == list(range(15, 0, -1))
    assert order(importance="bn_scale", scope="layer") == list(range(15, 0, -1))
    reader = model.get_submodule("decoder.0.1.0")
    with torch.no_grad():
        for channel in range(16):
            convolution.weight[channel] *= 0.8**channel  # type: ignore[index, operator]
            reader.weight[:, channel] *= 0.8**channel  # type: ignore[index, operator]
        norm.weight.fill_(1)  # type: ignore[operator, union-attr]
    assert order(importance="magnitude")[:8] == list(range(15, 7, -1))
    assert order(importance="magnitude", norm="l1")[:8] == list(range(15, 7, -1))


def test_taylor_is_by_the_loss() -> None:
    """A channel that the loss does not feel goes before the others of its layer, however large its weights."""
    model = lively(MODELS["plain"])
    images, labels = torch.randn(2, 3, *SIZE), torch.randint(0, 3, (2, 12, 16))
    unheard = model.get_submodule("classifier")
    unheard.weight.data[:, 5] = 0  # type: ignore[union-attr, operator]
    model.get_submodule("decoder.1.1.0").weight.data[5] *= 100  # type: ignore[union-attr, operator]

    def losses(candidate: nn.Module) -> Any:
        for i in range(2):
            yield nn.functional.cross_entropy(candidate(images[i : i + 1]).logits, labels[i : i + 1])

    for importance, first in (("taylor", True), ("magnitude", False)):
        config = PruneConfig(importance=importance)  # type: ignore[arg-type]
        order = [
            unit for unit in prune_order(copy.deepcopy(model), config, losses) if unit.layer == "decoder.1.1.0"
        ]
        assert (order[0].channels == [5]) == first
    pruned, _ = prune(model, SIZE, PruneConfig(importance="taylor", iterations=2), losses=losses)
    assert all(parameter.grad is None for parameter in pruned.parameters())
    with pytest.raises(ConfigurationError, match=r"^prune\.importance: taylor needs the loss"):
        prune(model, SIZE, PruneConfig(importance="taylor"))


# ------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("target", ["flops", "parameters"])
@pytest.mark.parametrize("name", ["plain", "separable", "dabnet", "deeplabv3plus"])
def test_targets_are_hit(name: str, target: str) -> None:
    model = lively(MODELS[name])
    before = copy.deepcopy(model.state_dict())
    pruned, report = prune(model, SIZE, PruneConfig(target=target, share=0.6))  # type: ignore[arg-type]
    cost = {"flops": lambda m: count_flops(m, SIZE), "parameters": count_parameters}[target]
    assert cost(pruned) / cost(model) == pytest.approx(0.6, rel=0.02)
    assert report == {
        "target": target,
        "wanted": 0.6,
        "reached": cost(pruned) / cost(model),
        "flops": count_flops(pruned, SIZE),
        "parameters": count_parameters(pruned),
        "note": "",
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # as it was
    assert pruned.classifier.out_channels == len(CLASSES)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["plain", "separable", "residual", "inverted", "mobilenetv2"])
def test_round_to(name: str) -> None:
    """Multiples of 8 wherever there are channels of ours in multiples of 8; what that misses is said."""
    model = lively(MODELS[name])
    pruned, report = prune(model, SIZE, PruneConfig(round_to=8, share=0.7))
    shapes, before = layer_shapes(pruned), layer_shapes(model)
    narrowed = [name for name, shape in shapes.items() if written(shape) < written(before[name])]
    assert narrowed
    assert [(name, shapes[name]) for name in narrowed if written(shapes[name]) % 8] == []
    missed = abs(report["reached"] / 0.7 - 1) > 0.02
    assert report["note"] == ("the nearest that whole channels and prune.round_to=8 allow" if missed else "")


def test_scope() -> None:
    """`layer` takes the same share of every layer, `global` does not; no layer falls below its least."""
    model = lively(lambda: UNet(CLASSES, width=16, depth=2))
    before, shares = layer_shapes(model), {}
    for scope in ("layer", "global"):
        pruned, _ = prune(model, SIZE, PruneConfig(scope=scope, share=0.3))  # type: ignore[arg-type]
        kept = layer_shapes(pruned)
        shares[scope] = [written(kept[name]) / written(before[name]) for name in before if name != "classifier"]
        least = fewest_channels(model, 0.4)
        assert all(least[name] >= 0.4 * written(before[name]) for name in before)
        floored, _ = prune(model, SIZE, PruneConfig(scope=scope, share=0.2, min_channels=0.4))  # type: ignore[arg-type]
        assert [name for name, shape in layer_shapes(floored).items() if written(shape) < least[name]] == []
    assert max(shares["layer"]) - min(shares["layer"]) < 0.07
    assert max(shares["global"]) - min(shares["global"]) > 0.2


def test_iterations_and_a_part_of_the_way() -> None:
    """Both are on the way to the same target; what channels a layer keeps is counted from the whole."""
    model = lively(MODELS["plain"])
    half, report = prune(model, SIZE, PruneConfig(share=0.36), fraction=0.5)
    assert report["wanted"] == pytest.approx(0.6)
    assert count_flops(half, SIZE) / count_flops(model, SIZE) == pytest.approx(0.6, rel=0.02)
    rest, report = prune(half, SIZE, PruneConfig(share=0.36, iterations=3), whole=model)
    assert count_flops(rest, SIZE) / count_flops(model, SIZE) == pytest.approx(0.36, rel=0.02)
    assert report["reached"] == count_flops(rest, SIZE) / count_flops(model, SIZE)
    least = fewest_channels(model, 0.1)
    assert all(written(shape) >= least[name] for name, shape in layer_shapes(rest).items())
    assert set(rest.changes["pruned"]) >= set(half.changes["pruned"])


class Clock:
    """A machine whose time is a known function of the FLOPs: 20 % are there for none, and a first pass takes twice
    as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: SegmentationModel) -> None:
        self.seconds, self.latest = 0.0, -1
        self.whole = count_flops(model, SIZE)
        monkeypatch.setattr("deploy.prune.time", self)

    def perf_counter(self) -> float:
        return self.seconds

    def share(self, model: SegmentationModel) -> float:
        return 0.2 + 0.8 * count_flops(model, SIZE) / self.whole

    def ready(self, model: SegmentationModel) -> Callable[[], None]:
        seconds, name = 0.002 * self.share(model), id(model)

        def run() -> None:
            self.seconds += seconds + (0.002 if name != self.latest else 0)
            self.latest = name

        return run


@pytest.mark.parametrize("keys", [{"share": 0.6}, {"milliseconds": 1.2}, {"share": 0.6, "iterations": 2}], ids=str)
def test_a_latency_is_met(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(MODELS["plain"])
    clock = Clock(monkeypatch, model)
    pruned, report = prune(model, SIZE, PruneConfig(target="latency", **keys), ready=clock.ready)
    share = clock.share(pruned)
    assert share == pytest.approx(0.6, rel=0.05)
    assert report["wanted"] == pytest.approx(0.6)
    assert report["reached"] == pytest.approx(share)
    assert (report["whole_ms"], report["wanted_ms"]) == pytest.approx((2.0, 1.2))
    assert report["reached_ms"] == pytest.approx(2 * share)
    assert report["note"] == ""


def test_a_latency_that_is_missed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(lambda: UNet(CLASSES, channels=[16, 32], depth=1))
    clock = Clock(monkeypatch, model)
    config = PruneConfig(target="latency", share=0.87, round_to=16)
    pruned, report = prune(model, SIZE, config, ready=clock.ready)
    assert abs(clock.share(pruned) / 0.87 - 1) > 0.05
    assert report["note"].startswith("the nearest of ")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"share": 0.05, "min_channels": 0.5}, "prune.share: 0.05 of the flops is out of reach, 0."),
        ({"target": "latency", "share": 0.21}, "prune.share: 0.21 of the latency is out of reach, 0."),
        ({"target": "latency", "milliseconds": 9.0}, "prune.milliseconds: 9 is no less than the "),
    ],
    ids=str,
)
def test_targets_out_of_reach(keys: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(MODELS["plain"])
    clock = Clock(monkeypatch, model)
    with pytest.raises(ConfigurationError) as caught:
        prune(model, SIZE, PruneConfig(**keys), ready=clock.ready)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [{"share": 0.0}, {"share": 1.0}, {"min_channels": 1.5}, {"iterations": 0}, {"round_to": 0}]
    + [{"milliseconds": 3.0}, {"target": "latency", "milliseconds": -1.0}],
    ids=str,
)
def test_wrong_keys(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"^prune\.{list(keys)[-1]}: "):
        PruneConfig(**keys)


# ------------------------------------------------------------------------------------------- refused and damaged


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SegFormer(CLASSES, "b0", [8, 16, 20, 32], [1, 1, 1, 1], 16), "segformer has a LayerNorm"),
        (lambda: DeepLabV3Plus(CLASSES, "convnext_tiny", aspp_channels=16), "deeplabv3plus has a "),
    ],
)
def test_models_that_can_not_be_pruned(make: Callable[[], SegmentationModel], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^prune: {said}"):
        prune(make(), SIZE, PruneConfig())


def saved(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A pruned model's folder and its configuration."""
    pruned, _ = prune(lively(MODELS["plain"]), SIZE, PruneConfig())
    pruned.save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


def test_the_configuration_is_readable(tmp_path: Path) -> None:
    folder, config = saved(tmp_path)
    shapes = config["changes"]["pruned"]
    weights = load_file(folder / "model.safetensors")
    assert (config["name"], config["width"], config["depth"]) == ("unet", 8, 2)
    for name, shape in shapes.items():
        weight = weights[f"{name}.weight"]
        if "num_features" in shape:
            assert shape == {"num_features": len(weight)}
        else:
            assert shape == {"in_channels": weight.shape[1], "out_channels": len(weight), "groups": 1}
    with pytest.raises(ConfigurationError, match=r"pruned.*models\.load_model"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda shapes: shapes.pop("bottleneck.0.0"),
        lambda shapes: shapes["bottleneck.0.0"].update(out_channels=5),
        lambda shapes: shapes["bottleneck.0.1"].update(num_features=5),
        lambda shapes: shapes["bottleneck.0.0"].update(out_channels="7"),
        lambda shapes: shapes["bottleneck.0.0"].update(out_channels=0),
        lambda shapes: shapes["bottleneck.0.0"].update(groups=3),
        lambda shapes: shapes["bottleneck.0.0"].pop("groups"),
        lambda shapes: shapes.update({"bottleneck.9": {"num_features": 4}}),
        lambda shapes: shapes.update({"bottleneck": {"num_features": 4}}),
        lambda shapes: shapes.update({"stem.0.1": [4]}),
    ],
)
def test_damaged_shapes(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    folder, config = saved(tmp_path)
    damage(config["changes"]["pruned"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    """The layers fit together and the weights do not fit them."""
    folder, _ = saved(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"][:, :-1].contiguous()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DamagedFileError, match=r"classifier\.weight is \["):
        load_model(folder)


def test_a_pruned_unet_is_not_sliced() -> None:
    pruned, _ = prune(lively(MODELS["plain"]), SIZE, PruneConfig())
    student = UNet(CLASSES, width=4, depth=2)
    with pytest.raises(ConfigurationError, match=r"^student\.slice_from: the teacher is pruned"):
        slice_from(student, pruned)  # type: ignore[arg-type]


def test_a_pruned_student_takes_an_adapter() -> None:
    """A feature term fits the student's pruned channels to the teacher's."""
    teacher = lively(MODELS["plain"])
    pruned, _ = prune(teacher, SIZE, PruneConfig())
    assert pruned.taps["bottleneck"].channels < teacher.taps["bottleneck"].channels
    objective = DistillationLoss(LossConfig(fitnet=FitnetConfig()), pruned.taps, teacher.taps, classes=3)
    images, labels = torch.randn(2, 3, *SIZE), torch.randint(0, 3, (2, *SIZE))
    pruned.train()
    answers = [model(images, tuple(model.taps)) for model in (pruned, teacher)]
    counts = objective.counts(labels)
    loss, _ = objective(*answers, labels, step=0, denominators=counts, images=images)
    loss.backward()
    assert math.isfinite(float(loss))
    assert all(parameter.grad is not None for parameter in pruned.parameters())
