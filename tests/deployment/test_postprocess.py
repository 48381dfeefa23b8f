"""Labels from native logits: equal to upsampling and argmax on anything, and without the map of all classes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deploy.postprocess as postprocess
from deploy.postprocess import native_argmax
from deploy.profiling import peak_allocation

SIZES = [  # classes, logits, labels
    (19, (32, 64), (128, 256)),
    (19, (16, 33), (128, 264)),
    (11, (45, 60), (360, 480)),
    (5, (9, 70), (288, 140)),  # a factor of 32 and one of 2
    (4, (5, 4), (80, 128)),
    (30, (12, 15), (180, 240)),  # stride 16, which does not divide the height
    (7, (30, 61), (91, 183)),  # odd
    (7, (40, 50), (33, 147)),  # smaller in one direction
    (6, (100, 150), (50, 75)),  # half
    (6, (60, 80), (60, 80)),  # the same
    (3, (1, 50), (4, 200)),  # a single row
    (3, (50, 1), (200, 4)),
    (8, (1, 1), (128, 128)),
    (2, (8, 8), (32, 32)),  # small: another kernel of PyTorch
    (1, (32, 32), (128, 128)),
]


def whole(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def smooth(shape: tuple[int, ...]) -> Tensor:
    """Regions, as of a trained model."""
    height, width = shape[-2:]
    return 9 * F.avg_pool2d(noise((*shape[:-2], height + 8, width + 8)), 9, 1)


def nearly_equal(shape: tuple[int, ...]) -> Tensor:
    """Two classes whose every value differs from the other's by some units in the last place, or not at all."""
    logits = smooth(shape)
    units = torch.randint(-3, 4, logits.shape[:1] + logits.shape[2:], generator=torch.Generator().manual_seed(1))
    logits[:, -1] = logits[:, 0] * (1 + units * 2.0**-23)
    return logits


def twins(shape: tuple[int, ...]) -> Tensor:
    """Every class twice."""
    half = smooth((shape[0], -(-shape[1] // 2), *shape[2:]))
    return torch.cat([half, half], 1)[:, : shape[1]]


CONTENTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "noise": noise,
    "smooth": smooth,
    "nearly equal": nearly_equal,
    "twins": twins,
    "few levels": lambda shape: (3 * smooth(shape)).round() / 7,
}
OTHER_CONTENTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "constant": lambda shape: torch.full(shape, 0.1),
    "bfloat16": lambda shape: smooth(shape).bfloat16(),
    "float16": lambda shape: smooth(shape).half(),
    "tiny": lambda shape: noise(shape) * 1e-41,
    "huge": lambda shape: noise(shape) * 1e37,
    "one outlier": lambda shape: noise(shape).index_fill(3, torch.tensor([0]), 1e6),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("classes", "known", "size"), SIZES)
def test_labels_are_those_of_upsampling_and_argmax(
    classes: int, known: tuple[int, int], size: tuple[int, int], content: str, memory: torch.memory_format
) -> None:
    logits = CONTENTS[content]((2, classes, *known)).contiguous(memory_format=memory)
    assert torch.equal(native_argmax(logits, size), whole(logits, size))


@pytest.mark.parametrize("content", OTHER_CONTENTS)
@pytest.mark.parametrize("size", [(128, 256), (130, 255)])
def test_labels_of_other_numbers(size: tuple[int, int], content: str) -> None:
    logits = OTHER_CONTENTS[content]((1, 5, 32, 64))
    assert torch.equal(native_argmax(logits, size), whole(logits, size))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("content", ["noise", "nearly equal", "twins", "few levels"])
def test_ties_are_broken_as_pytorch_breaks_them(
    content: str, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are: none is left to the way that is taken where they are too many."""
    monkeypatch.setattr(postprocess, "MOST_TIES", 10**6)
    monkeypatch.delattr(postprocess, "_label_by_class")
    for factor in (4, 8):
        logits = CONTENTS[content]((1, 6, 64 // factor, 128 // factor)).contiguous(memory_format=memory)
        assert torch.equal(native_argmax(logits, (64, 128)), whole(logits, (64, 128)))


def test_some_pixels_are_too_close_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the exact way for ties, rounding would decide otherwise than PyTorch's."""
    logits, called = nearly_equal((1, 6, 64, 64)), []
    exactly = postprocess._label_exactly
    monkeypatch.setattr(postprocess, "MOST_TIES", 10**6)
    monkeypatch.setattr(postprocess, "_label_exactly", lambda *a: called.append(len(a[1])) or exactly(*a))
    assert torch.equal(native_argmax(logits, (256, 256)), whole(logits, (256, 256)))
    assert sum(called) > 100
    monkeypatch.setattr(postprocess, "NEAR", 0.0)  # what is not equal to the last bit is not near
    assert not torch.equal(native_argmax(logits, (256, 256)), whole(logits, (256, 256)))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(wrong: float) -> None:
    logits = noise((1, 5, 40, 40))
    logits[0, 3, 7, 9] = wrong
    labels = native_argmax(logits, (160, 160))
    assert torch.equal(labels, whole(logits, (160, 160)))
    assert (labels[0, 28:32, 36:40] == 3).all() == (wrong != -math.inf)


def test_arrays_and_single_images() -> None:
    logits = smooth((2, 4, 20, 40))
    labels = native_argmax(logits, (80, 160))
    assert labels.dtype == torch.uint8
    assert torch.equal(native_argmax(logits[1], (80, 160)), labels[1])
    found = native_argmax(logits.numpy(), (80, 160))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, labels.numpy())
    assert native_argmax(logits[:0], (80, 160)).shape == (0, 80, 160)


@pytest.mark.parametrize("shape", [(20, 40), (1, 256, 4, 4), (1, 0, 4, 4)])
def test_what_are_no_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits of shape"):
        native_argmax(torch.zeros(shape), (64, 64))


@pytest.mark.parametrize(("content", "most"), [("smooth", 0.25), ("noise", 0.25), ("twins", 0.25)])
def test_memory_is_a_fraction_of_the_upsampled_logits(content: str, most: float) -> None:
    logits, size = CONTENTS[content]((1, 19, 128, 256)), (512, 1024)
    allocated = peak_allocation(lambda: native_argmax(logits, size), torch.device("cpu"))
    assert allocated < most * 4 * 19 * size[0] * size[1]
