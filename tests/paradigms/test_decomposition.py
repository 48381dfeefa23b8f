"""Bias and variance: constructed distributions with a known answer, identities, regions, sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.stats import entropy

from evaluation.decomposition import (
    Decomposition,
    Parts,
    decompose,
    decompose_image,
    near_boundary,
    wsl_weights,
)
from evaluation.pictures import colour_scale, heat_map
from losses.logits import kl_divergence, wsl


def pixel(distributions: list[list[float]], target: torch.Tensor) -> dict[str, float]:
    logits = torch.tensor(distributions, dtype=torch.float64).log()
    return {name: float(value) for name, value in decompose(logits, target)._asdict().items()}


def test_runs_that_agree_have_no_variance() -> None:
    parts = pixel([[0.7, 0.2, 0.1]] * 3, torch.tensor(0))
    assert parts == pytest.approx({"loss": -math.log(0.7), "noise": 0, "bias": -math.log(0.7), "variance": 0})


def test_two_opposite_runs_are_all_variance_but_for_a_guess() -> None:
    """Their geometric mean is even: the bias is log 2, and Z = 2 sqrt(0.9 * 0.1) = 0.6."""
    parts = pixel([[0.9, 0.1], [0.1, 0.9]], torch.tensor(1))
    assert parts["bias"] == pytest.approx(math.log(2), abs=1e-12)
    assert parts["variance"] == pytest.approx(-math.log(0.6), abs=1e-12)
    assert parts["loss"] == pytest.approx(-(math.log(0.9) + math.log(0.1)) / 2, abs=1e-12)


def test_known_parts_of_noise_bias_and_variance() -> None:
    """Distributions made from their mean: log p_k = log p ± d - log Z_k, so that the mean is p itself."""
    t, p = [0.5, 0.3, 0.2], [0.6, 0.1, 0.3]
    shift = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64)
    base = torch.tensor(p, dtype=torch.float64).log()
    runs = [base + shift, base - shift]
    parts = decompose(torch.stack(runs), torch.tensor(t, dtype=torch.float64))
    assert float(parts.noise) == pytest.approx(entropy(t), abs=1e-12)
    assert float(parts.bias) == pytest.approx(entropy(t, p), abs=1e-12)
    spread = [float(entropy(p, run.softmax(0).numpy())) for run in runs]
    assert float(parts.variance) == pytest.approx(sum(spread) / 2, abs=1e-12)
    loss = -sum(float((torch.tensor(t) * run.log_softmax(0)).sum()) for run in runs) / 2
    assert float(parts.loss) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_parts_add_up_to_the_loss(soft: bool, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(4, 7, 20, 30, generator=generator)
    labels = torch.randint(0, 7, (20, 30), generator=generator)
    target = torch.randn(7, 20, 30, generator=generator).double().softmax(0) if soft else labels
    parts = decompose(logits, target)
    runs = [F.cross_entropy(one[None].double(), target[None], reduction="none")[0] for one in logits]
    measured = torch.stack(runs).mean(0)
    torch.testing.assert_close(parts.loss, measured, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.noise + parts.bias + parts.variance, measured, rtol=0, atol=1e-9)
    assert min(float(part.min()) for part in parts) > -1e-9
    hard = F.one_hot(labels, 7).movedim(-1, 0).double()
    if not soft:
        for one, other in zip(decompose(logits, hard), parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def example() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Runs of different strides, and labels in blots with void beside them."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(9, 12), (18, 24), (9, 12)]
    logits = [3 * torch.randn(4, *size, generator=generator) for size in sizes]
    blots = torch.randint(0, 3, (1, 1, 6, 8), generator=generator).float()
    labels = F.interpolate(blots, (36, 48))[0, 0].long()
    labels[:9, 10:20] = 255
    return logits, labels


def test_maps_are_those_of_the_upsampled_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.calibration.BLOCK_ELEMENTS", 5 * 4 * 48)
    logits, labels = example()
    maps = decompose_image(logits, labels)
    whole = [F.interpolate(one[None].double(), (36, 48), mode="bilinear")[0] for one in logits]
    expected = decompose(torch.stack(whole), labels.where(labels != 255, 0))
    for got, wanted in zip(maps, expected, strict=True):
        assert torch.equal(got.isnan(), labels == 255)
        torch.testing.assert_close(got[labels != 255], wanted[labels != 255], rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [1, 3])
def test_region_at_boundaries(width: int) -> None:
    _, labels = example()
    known = labels != 255
    square = ndimage.generate_binary_structure(2, 2)
    expected = torch.zeros_like(known)
    for c in range(3):
        others = ndimage.binary_dilation((known & (labels != c)).numpy(), square, iterations=width)
        expected |= (labels == c) & torch.from_numpy(others)
    found = near_boundary(labels, width)
    assert torch.equal(found, expected)
    assert 0 < int(found.sum()) < int(known.sum())
    only_void = torch.where(torch.arange(12)[None] < 6, 2, 255).expand(8, 12)
    assert not near_boundary(only_void, width).any()


def test_sums_by_class_and_region() -> None:
    logits, labels = example()
    names = ["a", "b", "c", "nowhere"]
    sums = Decomposition(4, width=2)
    empty = sums.summarise(names)
    assert math.isnan(empty["bias"])
    sums.update(logits, labels)
    summary = sums.summarise(names)
    maps, border, known = decompose_image(logits, labels), near_boundary(labels, 2), labels != 255
    places = {"boundary": border, "interior": known & ~border}
    for name in Parts._fields:
        values = getattr(maps, name)
        assert summary[name] == pytest.approx(float(values[known].mean()))
        for region, mask in places.items():
            assert summary["regions"][region][name] == pytest.approx(float(values[mask].mean()))
        for c in range(3):
            assert summary["classes"][names[c]][name] == pytest.approx(float(values[labels == c].mean()))
    assert summary["classes"]["nowhere"]["pixels"] == 0
    assert math.isnan(summary["classes"]["nowhere"]["variance"])
    assert summary["pixels"] == int(known.sum())
    assert abs(summary["difference"]) < 1e-12
    sums.update(logits, labels)
    assert sums.summarise(names)["variance"] == pytest.approx(summary["variance"])


def test_difference_tells_a_loss_that_does_not_add_up() -> None:
    sums = Decomposition(4)
    sums.update(*example())
    sums.sums[0] *= 1.01
    assert sums.summarise(["a", "b", "c", "d"])["difference"] > 1e-3


def test_weights_are_those_of_the_loss() -> None:
    """WSL is the divergence times its weights: with a divergence that is everywhere the same, their mean."""
    logits, labels = example()
    student, teacher = logits[0].double(), logits[2].double()
    weights = wsl_weights([student], teacher, labels)
    assert torch.equal(weights.isnan(), labels == 255)
    whole = [F.interpolate(one[None], (36, 48), mode="bilinear") for one in (student, teacher)]
    total = float(wsl(*whole, labels[None], temperature=2.0)) * int((labels != 255).sum())
    each = 0.0
    for row, column in (labels != 255).nonzero().tolist():
        ours, theirs = (one[:, :, row, column][..., None, None] for one in whole)
        each += float(weights[row, column]) * float(kl_divergence(ours, theirs, temperature=2.0))
    assert each == pytest.approx(total, rel=1e-9)
    two = wsl_weights([student, logits[1]], teacher, labels)
    mean = (weights + wsl_weights([logits[1]], teacher, labels)) / 2
    torch.testing.assert_close(two, mean, equal_nan=True)


def test_colours_of_a_map_are_those_of_its_scale() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, 9.0, -1.0, math.nan]])
    colours = heat_map(values, 2.0)[0].tolist()
    scale = colour_scale(257, 2.0, "nats")
    assert scale.shape == (32, 257, 3)
    assert [scale[0, 0].tolist(), scale[0, 128].tolist(), scale[0, 256].tolist()] == colours[:3]
    assert colours[3:5] == [colours[2], colours[0]]
    assert colours[5] == [255, 255, 255]
    assert sum(colours[0]) < sum(colours[1]) < sum(colours[2]) < 3 * 255
