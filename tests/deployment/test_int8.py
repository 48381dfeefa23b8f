"""int8: exact arithmetic, ranges, what is rounded where, training through it, and the graph that runtimes get."""

import collections
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploy.int8 import Histogram, Int8Config, Logits, find_sensitive, make_plan, push_up, quantise
from errors import ConfigurationError, DamagedFileError
from models import SegmentationModel, load_model
from models.dabnet import DABNet
from models.deeplabv3plus import DeepLabV3Plus
from models.quantised import Quantiser, freeze, quantised_layers, quantisers_of
from models.unet import BLOCKS, UNet

CLASSES = ["road", "car", "sky"]


def settled(model: SegmentationModel) -> SegmentationModel:
    """In eval mode, with the statistics of a few random images and a classifier that says something."""
    with torch.no_grad():
        for _ in range(4):
            model.train()(images(2))
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == len(CLASSES):
                module.weight.normal_(std=0.3)
    return model.eval()


def images(count: int, size: tuple[int, int] = (64, 96)) -> Tensor:
    """Smooth random images, as pictures are."""
    coarse = torch.randn(count, 3, size[0] // 8, size[1] // 8)
    return nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unet() -> SegmentationModel:
    return settled(UNet(CLASSES, width=8, depth=2))


MODELS = {
    **{f"unet-{block}": lambda block=block: UNet(CLASSES, width=8, depth=2, block=block) for block in BLOCKS},
    "unet-stride-1": lambda: UNet(CLASSES, width=8, depth=2, stride=1),
    "unet-stride-16": lambda: UNet(CLASSES, width=8, depth=2, stride=16),
    "dabnet": lambda: DABNet(CLASSES),
    "deeplabv3plus": lambda: DeepLabV3Plus(CLASSES, "mobilenetv2", 16, 16, 8),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_says_what_the_model_says(name: str) -> None:
    model = settled(MODELS[name]())
    given = images(4)
    quantised = quantise(model, list(given), Int8Config(ranges="minmax"))
    with torch.no_grad():
        truth, answer = model(given).logits, quantised(given).logits
    assert answer.shape == truth.shape
    assert not torch.equal(answer, truth)
    assert (answer - truth).norm() < 0.15 * truth.norm()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(quantised_layers(quantised)) == len(convolutions)


@torch.no_grad()
def test_what_is_simulated_is_whole_number_arithmetic(unet: SegmentationModel) -> None:
    """The bottleneck's second convolution by hand: uint8 times int8, summed in int32, scaled once."""
    given = images(2)
    quantised = quantise(unet, list(given))
    layer = quantised_layers(quantised)["bottleneck.1.0"]
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, answer: seen.extend([inputs[0].clone(), answer.clone()]))
    quantised(given)
    quantiser = quantisers_of(quantised)[quantised.changes["quantised"]["inputs"]["bottleneck.1.0"]]
    scale, zero = float(quantiser.scale), int(quantiser.zero_point)
    stored = (seen[0].double() / scale + zero).round().long()
    assert ((stored.double() - zero) * scale - seen[0].double()).abs().max() < 1e-5  # it was rounded before
    assert stored.min() >= 0
    assert stored.max() <= 255
    weight_scale = layer.weight.abs().amax((1, 2, 3)) / 127
    whole = (layer.weight / weight_scale.view(-1, 1, 1, 1)).round().long()
    assert whole.abs().max() == 127
    sums = nn.functional.conv2d((stored - zero).double(), whole.double(), padding=1)
    assert layer.bias is not None
    expected = sums * (scale * weight_scale.double()).view(1, -1, 1, 1) + layer.bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(seen[1].double(), expected, rtol=1e-4, atol=1e-4)


def test_maps_that_are_joined_share_their_scale_and_chains_are_rounded_once() -> None:
    model = settled(UNet(CLASSES, width=8, depth=2))
    plan = make_plan(model, (64, 96))
    # The skip connection of level 1, its pooled copy, the upsampled bottleneck and their concatenation.
    level1 = plan.outputs["encoder.1.1.2"]
    assert (
        plan.inputs["bottleneck.0.0"] == plan.inputs["decoder.0.0.0"] == plan.outputs["bottleneck.1.2"] == level1
    )
    assert plan.inputs["encoder.0.1.0"] == plan.outputs["encoder.0.0.2"] != level1
    assert "encoder.0.1.0" in plan.direct
    assert "decoder.0.0.0" not in plan.direct
    assert plan.norms["stem.0.0"] == "stem.0.1"
    assert "classifier" not in plan.outputs  # logits are not rounded
    assert plan.exact == ["classifier"]
    assert set(plan.inputs) == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def test_a_shortcut_is_rounded_at_the_convolution_where_no_relu_module_follows() -> None:
    plan = make_plan(settled(UNet(CLASSES, width=8, depth=2, block="residual")), (64, 96))
    assert {"encoder.1.second.0", "encoder.1.shortcut.0"} <= set(plan.outputs)
    assert plan.norms["encoder.1.second.0"] == "encoder.1.second.1"


@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same(unet: SegmentationModel, tmp_path: Path) -> None:
    given = images(2)
    quantised = quantise(unet, list(given), Int8Config(keep=["stem"]))
    quantised.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.precision == "int8"
    assert torch.equal(again(given).logits, quantised.eval()(given).logits)
    assert quantised_layers(again)["stem.0.0"].exact
    assert not quantised_layers(again)["bottleneck.0.0"].exact
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["changes"]["quantised"]["inputs"]["classifier"]
    config["changes"]["quantised"]["norms"]["nowhere"] = "else"
    path.write_text(json.dumps(config))
    with pytest.raises(DamagedFileError, match=r"config.json: not the configuration of a model"):
        load_model(tmp_path / "model")


def test_it_learns_through_the_rounding_and_gives_its_taps(unet: SegmentationModel) -> None:
    """Fitting the model that it was made of, it undoes a disturbance of its weights."""
    given = images(4)
    quantised = quantise(unet, list(given))
    with torch.no_grad():
        for layer in quantised_layers(quantised).values():
            layer.weight += 0.3 * layer.weight.std() * torch.randn_like(layer.weight)
    quantised.train()
    with torch.no_grad():
        wanted = unet(given).logits
    optimizer = torch.optim.Adam(quantised.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        output = quantised(given, taps=["bottleneck", "decoder.0"])
        assert output.features["bottleneck"].shape[1] == quantised.taps["bottleneck"].channels
        loss = nn.functional.mse_loss(output.logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in quantised.named_parameters():
        assert parameter.grad is not None, name


def test_no_gradient_passes_where_a_value_is_clipped() -> None:
    quantiser = Quantiser()
    quantiser.set_range(0.0, 1.0)
    x = torch.tensor([-0.5, 0.3, 2.0], requires_grad=True)
    quantiser(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


@torch.no_grad()
def test_a_kept_layer_is_exact(unet: SegmentationModel) -> None:
    given = images(2)
    kept = quantise(unet, list(given), Int8Config(keep=["stem", "encoder", "bottleneck", "decoder", "classifier"]))
    assert kept.changes["quantised"]["exact"] == sorted(quantised_layers(kept))
    for quantiser in quantisers_of(kept).values():  # what is left of rounding: the answers
        quantiser.observe = lambda x: None
    torch.testing.assert_close(kept(given).logits, unet(given).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_most_sensitive_layer_is_found_and_kept(unet: SegmentationModel) -> None:
    """Huge weights of a channel that is always 0 change no answer, and leave nothing of the others in int8."""
    unet.get_parameter("encoder.1.0.1.weight")[0] = 0
    unet.get_parameter("encoder.1.0.1.bias")[0] = 0
    weight = unet.get_parameter("encoder.1.1.0.weight")
    weight[:, 0] = 300 * weight.abs().amax()
    given = images(3)
    quantised = quantise(unet, list(given))
    found = find_sensitive(unet, quantised, list(given))
    assert max(found, key=lambda name: found[name]) == "encoder.1.1.0"
    assert set(found) == set(quantised_layers(quantised)) - {"classifier"}
    again = quantise(unet, list(given), Int8Config(sensitive=1))
    assert again.changes["quantised"]["exact"] == ["classifier", "encoder.1.1.0"]
    truth = unet(given).logits
    assert (again(given).logits - truth).norm() < 0.5 * (quantised(given).logits - truth).norm()


def test_ranges_are_those_of_their_definitions() -> None:
    values = torch.cat([torch.rand(100_000) * 2, torch.tensor([50.0])])  # after a ReLU, with an outlier
    histogram = Histogram()
    for part in values.split(20_000):
        histogram.see_extremes(part)
    for part in values.split(20_000):
        histogram.see_counts(part)
    assert histogram.ends(Int8Config(ranges="minmax")) == (float(values.min()), 50.0)
    lowest, highest = histogram.ends(Int8Config(ranges="percentile", percentile=99.0))
    assert lowest == float(values.min())
    assert highest == pytest.approx(np.percentile(values.numpy(), 99.0), abs=50 / 2048)

    def error(end: float) -> float:
        quantiser = Quantiser()
        quantiser.set_range(0.0, end)
        return float((quantiser(values) - values).double().square().sum())

    best = histogram.ends(Int8Config(ranges="mse"))[1]
    tried = [error(50 * share) for share in np.arange(1, 101) / 100]
    assert error(best) <= 1.01 * min(tried)


def test_a_range_without_zero_is_widened_to_it() -> None:
    quantiser = Quantiser()
    quantiser.set_range(2.0, 4.0)
    assert float(quantiser(torch.zeros(1))) == 0.0
    assert float(quantiser.scale) == pytest.approx(4 / 255)
    quantiser.set_range(-3.0, 1.0)
    assert float(quantiser(torch.zeros(1))) == 0.0


@torch.no_grad()
def test_frozen_for_export_it_is_the_same_in_either_sign(unet: SegmentationModel) -> None:
    given = images(2)
    quantised = quantise(unet, list(given)).eval()
    truth = quantised(given).logits
    assert torch.equal(freeze(quantised)(given).logits, truth)
    signed = freeze(quantised, signed=True)
    assert torch.equal(signed(given).logits, truth)
    assert quantised_layers(signed)["stem.0.0"].weight.dtype == torch.int8
    assert quantised_layers(quantised)["stem.0.0"].weight.dtype == torch.float32  # it stays as it was


@torch.no_grad()
def test_rounding_moved_before_the_concatenation_changes_no_number(unet: SegmentationModel) -> None:
    given = images(1)
    frozen = freeze(quantise(unet, list(given)))
    program = torch.export.export(Logits(frozen), (given,))
    before = program.module()(given)
    count = str(program.graph).count("quantize_per_tensor")
    push_up(program)
    assert str(program.graph).count("quantize_per_tensor") > count
    assert torch.equal(program.module()(given), before)


@torch.no_grad()
def test_onnx_runtime_computes_it_in_whole_numbers(unet: SegmentationModel, tmp_path: Path) -> None:
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    given = images(1)
    quantised = quantise(unet, list(images(4)))
    program = torch.export.export(Logits(freeze(quantised)), (given,))
    push_up(program)
    path = tmp_path / "int8.onnx"
    torch.onnx.export(program, (given,), path, dynamo=True, opset_version=20, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    truth = quantised.eval()(given).logits
    assert (torch.from_numpy(answer).argmax(1) == truth.argmax(1)).float().mean() > 0.98
    assert (torch.from_numpy(answer) - truth).norm() < 0.05 * truth.norm()
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["QLinearConv"] == len(quantised_layers(quantised)) - 1  # all but the classifier
    assert kinds["Concat"] == 0


def test_what_cannot_be_quantised_is_one_line(unet: SegmentationModel) -> None:
    given = list(images(1))
    with pytest.raises(
        ConfigurationError, match=r"int8.keep: no convolution is called 'head'; there are stem.0.0"
    ):
        quantise(unet, given, Int8Config(keep=["head"]))
    with pytest.raises(ConfigurationError, match=r"int8.images: no image"):
        quantise(unet, [])
    with pytest.raises(ConfigurationError, match=r"quantised already"):
        quantise(quantise(unet, given), given)
    with pytest.raises(ConfigurationError, match=r"int8.percentile: 101"):
        Int8Config(percentile=101.0)
    with pytest.raises(ConfigurationError, match=r"int8.images: 0 is too small"):
        Int8Config(images=0)
    hub = copy.copy(unet)
    hub.architecture = "hub"
    with pytest.raises(ConfigurationError, match=r"transformers"):
        quantise(hub, given)
