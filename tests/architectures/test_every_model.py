"""What every architecture promises; a new one in `zoo.ZOO` is put to all of it."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import CHECKPOINTING, CLASSES, EXCUSED, ZOO

from deploy.profiling import count_flops
from errors import ConfigurationError
from models import Output, SegmentationModel, load_model

ODD, EVEN = (33, 47), (64, 96)


@pytest.fixture(scope="module", params=ZOO)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(name: str) -> SegmentationModel:
    """The model in eval mode, with the batch-norm statistics of a batch."""
    torch.manual_seed(0)
    model = ZOO[name]().train()
    for norm in norms(model):
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, *EVEN))
    for norm in norms(model):
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture(autouse=True)
def excuse(request: pytest.FixtureRequest) -> None:
    if "name" in request.fixturenames:
        test = request.node.originalname.removeprefix("test_")
        reason = EXCUSED.get((test, request.getfixturevalue("name")))
        if reason:
            pytest.skip(reason)


@pytest.fixture
def model(made: SegmentationModel) -> Iterator[SegmentationModel]:
    """The model as it was made; a test that changes its weights or its mode spoils those after it."""
    before = checksum(made)
    yield made
    assert not made.training
    assert checksum(made) == before
    assert all(p.grad is None for p in made.parameters())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, *ODD, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def answer(made: SegmentationModel, images: Tensor) -> Output:
    """What the model says of the images, with every tap."""
    return run(made, images)


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def checksum(model: nn.Module) -> float:
    return float(sum(value.double().sum() for value in model.state_dict().values()))


@torch.no_grad()
def run(model: Callable[..., Output], images: Tensor, taps: list[str] | None = None) -> Output:
    if taps is None:
        taps = list(getattr(model, "taps", []))
    return model(images, taps=taps)


def assert_same(found: Output, expected: Output, rtol: float = 1e-4) -> None:
    """The same maps but for rounding, which is measured on the scale of the map."""
    assert list(found.features) == list(expected.features)
    maps = maps_of(found)
    for what, other in maps_of(expected).items():
        assert maps[what].shape == other.shape, what
        assert (maps[what] - other).abs().max() <= rtol * other.abs().max() + 1e-7, what


def maps_of(output: Output) -> dict[str, Tensor]:
    return {"logits": output.logits} | output.features


# ------------------------------------------------------------------------------------------ shapes and taps


@pytest.mark.parametrize("size", [ODD, EVEN, (5, 61), (1, 1)])
def test_maps_are_as_published(model: SegmentationModel, size: tuple[int, int]) -> None:
    output = run(model, torch.randn(2, 3, *size))
    expected = {"logits": (2, len(CLASSES), *native(size, model.stride))}
    expected |= {name: (2, tap.channels, *native(size, tap.stride)) for name, tap in model.taps.items()}
    found = maps_of(output)
    assert {name: tuple(map_.shape) for name, map_ in found.items()} == expected
    assert all(map_.isfinite().all() and map_.dtype == torch.float32 for map_ in found.values())


def native(size: tuple[int, int], stride: int) -> tuple[int, ...]:
    return tuple(-(-side // stride) for side in size)


def test_vocabulary_of_taps(model: SegmentationModel) -> None:
    """encoder.0 … from fine to coarse, bottleneck, decoder.0 … from coarse to fine, in this order."""
    taps = list(model.taps)
    encoder = [tap for tap in taps if tap.startswith("encoder")]
    decoder = [tap for tap in taps if tap.startswith("decoder")]
    expected = [f"encoder.{i}" for i in range(len(encoder))] + ["bottleneck"]
    assert taps == expected + [f"decoder.{i}" for i in range(len(decoder))]
    strides = [model.taps[tap].stride for tap in taps]
    turn = len(encoder)
    assert strides[: turn + 1] == sorted(strides[: turn + 1])
    assert strides[turn:] == sorted(strides[turn:], reverse=True)


def test_only_the_taps_that_are_asked_for(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    assert list(answer.features) == list(model.taps)
    none = run(model, images, [])
    assert none.features == {}
    assert torch.equal(none.logits, answer.logits)
    asked = list(reversed(model.taps))[::2]
    some = run(model, images, asked)
    assert list(some.features) == asked
    assert torch.equal(some.logits, answer.logits)
    assert all(torch.equal(some.features[tap], answer.features[tap]) for tap in asked)


def test_unknown_tap_lists_the_known_ones(model: SegmentationModel, images: Tensor) -> None:
    known = ", ".join(model.taps)
    with pytest.raises(ConfigurationError) as caught:
        model(images, taps=["bottleneck", "neck"])
    assert str(caught.value) == f"taps: {model.architecture} has no tap 'neck'; it has {known}"


def test_same_answer_again_and_image_by_image(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    again = run(model, images)
    assert torch.equal(again.logits, answer.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    alone = run(model, images[1:])
    second = Output(answer.logits[1:], {tap: map_[1:] for tap, map_ in answer.features.items()})
    assert_same(alone, second)


# ------------------------------------------------------------------------------------ the ways to run a model


def test_compiled_in_one_graph(name: str, model: SegmentationModel, images: Tensor, answer: Output) -> None:
    """With all taps; without any, one model of each architecture."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same(run(compiled, images, list(model.taps)), answer, 1e-5)
    if "-" not in name:
        assert_same(run(compiled, images, []), Output(answer.logits), 1e-5)


def test_exported(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    """As tensors in, tensors out, which is what a file of an exported model can hold."""
    taps = list(model.taps)
    program = torch.export.export(Maps(model, taps), (images,))
    with torch.no_grad():
        logits, *maps = program.module()(images)
    assert_same(Output(logits, dict(zip(taps, maps, strict=True))), answer, 1e-5)


class Maps(nn.Module):
    """A model whose answer is a tuple of the logits and the features."""

    def __init__(self, model: SegmentationModel, taps: list[str]) -> None:
        super().__init__()
        self.model, self.taps = model, taps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.model(images, taps=self.taps)
        return (output.logits, *output.features.values())


def test_bf16_autocast(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    """Finite, and not much further off than rounding the weights alone puts it: an untrained net can be very
    sensitive."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = maps_of(run(model, images))
    allowed, exact = maps_of(run(rounded, images)), maps_of(answer)
    for what, map_ in exact.items():
        assert found[what].isfinite().all(), what
        error, unavoidable = ((other[what].float() - map_).norm() / map_.norm() for other in (found, allowed))
        assert error < 0.02 + 4 * unavoidable, what


def test_channels_last(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_same(run(model, images.contiguous(memory_format=torch.channels_last)), answer)


def test_flops_are_counted(model: SegmentationModel) -> None:
    small, large = count_flops(model, (64, 64)), count_flops(model, (128, 128))
    assert small > 0
    assert 3.5 < large / small < 5


# -------------------------------------------------------------------------------------------------- training


def step(model: SegmentationModel, images: Tensor) -> dict[str, Tensor]:
    """One forward and backward pass in train mode: every parameter's gradient."""
    torch.manual_seed(0)
    model.train().zero_grad()
    model(images).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_reaches_every_parameter(model: SegmentationModel, images: Tensor) -> None:
    """With one image too: DDP waits for all of them, and a batch can have one left over."""
    model = copy.deepcopy(model)
    gradients = step(model, images[:1])
    assert [name for name, _ in model.named_parameters() if name not in gradients] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert all(map_.requires_grad for map_ in model(images[:1], taps=list(model.taps)).features.values())


def test_gradient_checkpointing(name: str, model: SegmentationModel, images: Tensor) -> None:
    """The same gradients and batch-norm statistics out of fewer saved activations; nothing in eval mode."""
    plain, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    if name not in CHECKPOINTING:
        with pytest.raises(ConfigurationError, match=f"^gradient_checkpointing: {model.architecture} has"):
            checkpointed.enable_gradient_checkpointing()
        return
    checkpointed.enable_gradient_checkpointing()
    assert torch.equal(run(checkpointed, images).logits, run(plain, images).logits)
    expected, found = step(plain, images), step(checkpointed, images)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6 + 1e-4 * gradient.abs().max())
    for buffer, value in plain.named_buffers():
        torch.testing.assert_close(checkpointed.get_buffer(buffer), value, msg=buffer)
    assert saved_bytes(checkpointed, images) < 0.9 * saved_bytes(plain, images)


def saved_bytes(model: SegmentationModel, images: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters left out."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x too, or its address is given away again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.train()(images)
    return sum(size for size, _ in kept.values())


def test_same_seed_same_weights(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(ZOO[name]().state_dict())
    first, again, other = states
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


# ----------------------------------------------------------------------------------------- saved and copied


def test_loaded_as_it_was_saved(model: SegmentationModel, images: Tensor, answer: Output, tmp_path: Path) -> None:
    model = copy.deepcopy(model)
    model.mean, model.std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
    model.save_pretrained(tmp_path / "one")
    loaded = load_model(tmp_path / "one").eval()
    assert type(loaded) is type(model)
    assert (loaded.mean, loaded.std) == (model.mean, model.std)
    assert (loaded.class_names, loaded.stride, loaded.taps) == (CLASSES, model.stride, model.taps)
    assert torch.equal(run(loaded, images, []).logits, answer.logits)
    assert json.loads((tmp_path / "one/config.json").read_text())["name"] == model.architecture

    loaded.save_pretrained(tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_images_of_another_normalisation(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    model = copy.deepcopy(model)
    own, given = ((model.mean, model.std), ((0.4, 0.5, 0.6), (0.3, 0.2, 0.25)))
    (mean, std), (other_mean, other_std) = (torch.tensor(pair)[:, :, None, None] for pair in (own, given))
    model.take_images(*given)
    assert_same(run(model, (images * std + mean - other_mean) / other_std), answer)
    assert (model.mean, model.std) == own
    model.take_images(*own)
    assert torch.equal(run(model, images, []).logits, answer.logits)


def test_copies(model: SegmentationModel, images: Tensor, answer: Output) -> None:
    """A deep copy, and what a spawned process gets."""
    for copied in (copy.deepcopy(model), ForkingPickler.loads(ForkingPickler.dumps(model))):
        assert torch.equal(run(copied, images, []).logits, answer.logits)
        assert copied.taps == model.taps


# --------------------------------------------------------------------------------------------------- the zoo


def test_excuses_are_of_tests_and_models_that_exist() -> None:
    tests = {key.removeprefix("test_") for key in globals() if key.startswith("test_")}
    assert {test for test, _ in EXCUSED} <= tests
    assert {model for _, model in EXCUSED} | set(CHECKPOINTING) <= set(ZOO)
    assert all(re.match(r"[A-Za-z].{20,}", reason) for reason in EXCUSED.values())
