"""SegFormer: as large as published, equal to transformers' own, and filled from either kind of checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SegformerForImageClassification, SegformerForSemanticSegmentation

from deploy.profiling import count_flops, count_parameters
from errors import ConfigurationError, DamagedFileError
from models import load_model
from models.hub import config_of
from models.interface import IMAGENET_MEAN, Tap
from models.segformer import VARIANTS, SegFormer

NAMES = ["road", "car", "sky"]
TINY: dict[str, Any] = {"hidden_sizes": [4, 8, 10, 16], "depths": [1, 2, 1, 1], "decoder_channels": 12}


def tiny(names: list[str] = NAMES, seed: int = 0, **changes: Any) -> SegFormer:
    torch.manual_seed(seed)
    return SegFormer(names, **(TINY | changes)).eval()


def configuration(names: list[str], **changes: Any) -> Any:
    shape = {"model_type": "segformer", "hidden_sizes": TINY["hidden_sizes"], "depths": TINY["depths"]}
    return config_of(shape | {"decoder_hidden_size": 12} | changes, names)


def segmenter(names: list[str], **changes: Any) -> Any:
    torch.manual_seed(1)
    network = SegformerForSemanticSegmentation(configuration(names, **changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        network.decode_head.batch_norm.running_mean.normal_()
    return network


def write(folder: Path, network: Any, processor: bool = True) -> str:
    network.save_pretrained(folder)
    if processor:
        settings = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


# Millions of parameters with ADE20K's 150 classes: table 1a of the paper.
PUBLISHED = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_parameters_as_published(variant: str) -> None:
    with torch.device("meta"):
        model = SegFormer([str(i) for i in range(150)], variant)
    assert round(count_parameters(model) / 1e6, 1) == pytest.approx(PUBLISHED[variant], abs=0.051)
    assert sorted(VARIANTS) == sorted(PUBLISHED)


def test_b0_is_as_transformers_has_it() -> None:
    """transformers' defaults are B0's; 19 classes as Cityscapes."""
    names = [str(i) for i in range(19)]
    with torch.device("meta"):
        model = SegFormer(names, "b0")
        network = SegformerForSemanticSegmentation(config_of({"model_type": "segformer"}, names))
    theirs, ours = network.state_dict(), model.net.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {n: value.shape for n, value in theirs.items()}
    assert count_parameters(model) == 3_719_027
    rates = [block.drop_path.drop_prob for stage in model.net.segformer.stages for block in list(stage.blocks)[1:]]
    assert max(rates) == pytest.approx(0.1)


def test_taps() -> None:
    model = tiny()
    assert model.taps == {
        "encoder.0": Tap(4, 4),
        "encoder.1": Tap(8, 8),
        "encoder.2": Tap(10, 16),
        "encoder.3": Tap(16, 32),
        "bottleneck": Tap(16, 32),
        "decoder.0": Tap(12, 4),
    }
    output = model(torch.randn(2, 3, 33, 70), taps=list(model.taps))
    assert output.logits.shape == (2, 3, 9, 18)
    assert torch.equal(output.features["bottleneck"], output.features["encoder.3"])
    torch.testing.assert_close(model.net.decode_head.classifier(output.features["decoder.0"]), output.logits)


@torch.no_grad()
def test_logits_and_stages_are_those_of_transformers() -> None:
    network, model = segmenter(NAMES), tiny()
    model.net.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 96)
    expected = network(images, output_hidden_states=True)
    output = model(images, taps=[f"encoder.{i}" for i in range(4)])
    torch.testing.assert_close(output.logits, expected.logits)
    for map_, state in zip(output.features.values(), expected.hidden_states, strict=True):
        torch.testing.assert_close(map_, state)


def test_flops_are_counted() -> None:
    model = tiny()
    assert count_flops(model, (64, 128)) == pytest.approx(2 * count_flops(model, (64, 64)), rel=0.05)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, images = tiny(), torch.randn(1, 3, 40, 50)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).eval()
    assert isinstance(again, SegFormer)
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "segformer"
    assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "b6"}, "^model.variant: 'b6' is no SegFormer"),
        ({"hidden_sizes": [4, 8, 12, 16]}, "^model.hidden_sizes"),
        ({"hidden_sizes": [4, 8, 10]}, "^model.hidden_sizes"),
        ({"depths": [1, 1, 0, 1]}, "^model.depths"),
    ],
)
def test_shapes_that_are_none(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        tiny(**change)


# ------------------------------------------------------------------------------------------------------- weights


def parts(model: SegFormer) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """State of the encoder, of the decoder and of its classifier."""
    found: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for name, value in model.net.state_dict().items():
        where = 2 if "classifier" in name else 1 if "decode_head" in name else 0
        found[where][name] = value.clone()
    return found[0], found[1], found[2]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_image_classifier_gives_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = SegformerForImageClassification(configuration([f"class {i}" for i in range(7)]))
    model = tiny()
    before = parts(model)
    model.load_weights(write(tmp_path, classifier))
    after = parts(model)
    assert same(after[0], {n: v for n, v in classifier.state_dict().items() if n.startswith("segformer")})
    assert same(after[1], before[1])
    assert same(after[2], before[2])
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def test_a_segmenter_of_the_same_classes_gives_all(tmp_path: Path) -> None:
    network, model = segmenter(NAMES), tiny()
    model.load_weights(write(tmp_path, network, processor=False))
    assert same(dict(model.net.state_dict()), dict(network.state_dict()))
    assert model.mean == IMAGENET_MEAN


@torch.no_grad()
def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    network, model = segmenter(["sky", "road", "car"]), tiny()
    model.load_weights(write(tmp_path, network))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images).logits, network(images).logits[:, [1, 2, 0]])


@pytest.mark.parametrize("names", [["road", "car", "tree"], ["road", "car"]])
def test_a_segmenter_of_other_classes_gives_all_but_the_classifier(names: list[str], tmp_path: Path) -> None:
    network, model = segmenter(names), tiny()
    before = parts(model)
    theirs = dict(network.state_dict())
    model.load_weights(write(tmp_path, network))
    after = parts(model)
    assert same(after[0] | after[1], {name: value for name, value in theirs.items() if "classifier" not in name})
    assert same(after[2], before[2])


def test_old_names_of_weights_are_known(tmp_path: Path) -> None:
    """The published files have the names of transformers before its version 5."""
    network, model = segmenter(NAMES), tiny()
    folder = Path(write(tmp_path, network))
    names = set(load_file(folder / "model.safetensors"))
    assert "segformer.encoder.block.0.0.attention.self.query.weight" in names
    assert "decode_head.linear_c.0.proj.weight" in names
    model.load_weights(str(folder))
    assert same(dict(model.net.state_dict()), dict(network.state_dict()))


def test_weights_fit_or_are_refused(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "a", segmenter(NAMES)))
    state = load_file(folder / "model.safetensors")
    name = next(iter(name for name in state if name.startswith("segformer")))
    kept = state.pop(name)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedFileError, match="1 weights .* missing segformer"):
        tiny().load_weights(str(folder))
    save_file(state | {name: kept, "more": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedFileError, match="superfluous more"):
        tiny().load_weights(str(folder))
    wider = write(tmp_path / "b", segmenter(NAMES, hidden_sizes=[4, 8, 20, 16]))
    with pytest.raises(DamagedFileError, match=r"weights of another SegFormer: .* and \d+ more; check") as caught:
        tiny().load_weights(wider)
    assert "\n" not in str(caught.value)
    deeper = write(tmp_path / "c", segmenter(NAMES, depths=[1, 2, 1, 2]))
    before = parts(tiny())
    model = tiny()
    with pytest.raises(DamagedFileError, match="superfluous"):
        model.load_weights(deeper)
    assert all(same(one, other) for one, other in zip(parts(model), before, strict=True))


def test_a_bare_encoder(tmp_path: Path) -> None:
    whole = segmenter(NAMES)
    whole.segformer.save_pretrained(tmp_path)
    model = tiny()
    model.load_weights(str(tmp_path))
    for name, value in model.net.segformer.state_dict().items():
        assert torch.equal(value, whole.segformer.state_dict()[name]), name


def test_only_segformers(tmp_path: Path) -> None:
    folder = Path(write(tmp_path, segmenter(NAMES)))
    found = json.loads((folder / "config.json").read_text())
    for changes in ({"model_type": "beit"}, {"architectures": ["BeitModel"]}, {"architectures": []}):
        (folder / "config.json").write_text(json.dumps(found | changes))
        with pytest.raises(ConfigurationError, match="^model.weights: .*not a SegFormer"):
            tiny().load_weights(str(folder))
    with pytest.raises(ConfigurationError, match="^student.weights: .* is no folder"):
        tiny().load_weights("runs/nothing/here", "student.weights")
