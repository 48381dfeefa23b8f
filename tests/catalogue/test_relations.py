"""Distillation of relations, value by value."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.profiling import peak_allocation
from errors import ConfigurationError
from losses import relations
from losses.relations import (
    CIRKDMiniBatchConfig,
    IFVDConfig,
    PairwiseConfig,
    affinity,
    cirkd_mini_batch,
    ifvd,
    pairwise,
    row_divergence,
)


def direct_affinity(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """The N×N form, image by image, with the masked positions cut out."""
    losses = []
    for i in range(len(student)):
        maps = [features[i].flatten(1) for features in (student, teacher)]
        if mask is not None:
            maps = [features[:, mask[i].flatten()] for features in maps]
        cosines = [F.normalize(features, dim=0).T @ F.normalize(features, dim=0) for features in maps]
        losses.append((cosines[0] - cosines[1]).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("size", "channels"), [((8, 12), (3, 6)), ((8, 12), (6, 3)), ((3, 3), (16, 20)), ((3, 4), (8, 40))]
)
def test_affinity_against_the_direct_form(size: tuple[int, int], channels: tuple[int, int], masked: bool) -> None:
    """More positions than channels, by Gram matrices, and fewer, directly."""
    torch.manual_seed(0)
    student = torch.randn(2, channels[0], *size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, channels[1], *size, dtype=torch.float64)
    mask = torch.rand(2, *size) < 0.7 if masked else None
    expected = direct_affinity(student, teacher, mask)
    found = affinity(student, teacher, mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0],
        torch.autograd.grad(expected, student)[0],
        rtol=1e-10,
        atol=1e-14,
    )


def test_affinity_near_a_perfect_student() -> None:
    """The three norms cancel; what is left is right to float32's precision of the norms, and never NaN."""
    torch.manual_seed(0)
    teacher = torch.randn(1, 8, 16, 16)
    student = (teacher + 1e-3 * torch.randn(teacher.shape)).requires_grad_()
    expected = direct_affinity(student.double(), teacher.double(), None)
    found = affinity(student, teacher)
    assert float(found) == pytest.approx(float(expected), abs=1e-7)
    assert torch.isfinite(torch.autograd.grad(found, student)[0]).all()


def test_affinity_of_positions_that_are_zero() -> None:
    """They are similar to nothing, and get no NaN; nor does a channel that is zero everywhere."""
    torch.manual_seed(0)
    student = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    student[:, :, 2] = 0
    student[:, 1] = 0
    student.requires_grad_()
    teacher = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    loss = affinity(student, teacher)
    torch.testing.assert_close(loss, direct_affinity(student, teacher, None))
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


# ---------------------------------------------------------------------------------------------- pairs of regions


def direct_pairwise(student: Tensor, teacher: Tensor, mask: Tensor | None, cells: tuple[int, int]) -> Tensor:
    """Region by region, by slices."""

    def nodes(features: Tensor, counted: Tensor | None) -> Tensor:
        high, wide = features.shape[1] // cells[0], features.shape[2] // cells[1]
        found = []
        for i in range(cells[0]):
            for j in range(cells[1]):
                place = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
                region = features[(slice(None), *place)].flatten(1)
                if counted is not None:
                    region = region[:, counted[place].flatten()]
                if region.shape[1]:
                    found.append(region.max(1).values)
        return torch.stack(found, 1)

    losses = []
    for i in range(len(student)):
        counted = None if mask is None else mask[i]
        ours, theirs = (F.normalize(nodes(x[i], counted), dim=0) for x in (student, teacher))
        losses.append((ours.T @ ours - theirs.T @ theirs).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("scale", "cells"), [(0.5, (2, 2)), (0.25, (4, 4))])
def test_pairwise_against_the_direct_form(scale: float, cells: tuple[int, int], masked: bool) -> None:
    """More regions than channels and fewer; one region has no labelled position at all."""
    torch.manual_seed(0)
    student = torch.randn(2, 5, 8, 12, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 7, 8, 12, dtype=torch.float64)
    mask = torch.rand(2, 8, 12) < 0.6 if masked else None
    if mask is not None:
        mask[0, :4, :6] = False
    agree(
        pairwise(student, teacher, mask=mask, scale=scale), direct_pairwise(student, teacher, mask, cells), student
    )


def agree(found: Tensor, expected: Tensor, student: Tensor) -> None:
    """Value and gradient, in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


def test_pairwise_makes_four_regions_of_any_map() -> None:
    """Also of odd sizes, where a strip that is left over would be regions of its own."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 5, 7), torch.randn(1, 3, 5, 7)
    parts = [(slice(None, 3), slice(3, None)), (slice(None, 4), slice(4, None))]
    nodes = [
        torch.stack([x[0, :, rows, columns].amax((1, 2)) for rows in parts[0] for columns in parts[1]], 1)
        for x in (student, teacher)
    ]
    ours, theirs = (F.normalize(x, dim=0) for x in nodes)
    torch.testing.assert_close(pairwise(student, teacher), (ours.T @ ours - theirs.T @ theirs).square().mean())


# -------------------------------------------------------------------------------------- positions and their class


def direct_ifvd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Class by class with a map of centres, labels at the features' size."""
    losses = []
    for i in range(len(student)):
        similarity = []
        for features in (student[i], teacher[i]):
            centres = features.clone()
            for label in labels[i].unique():
                if label != 255:
                    inside = labels[i] == label
                    centres[:, inside] = features[:, inside].mean(1, keepdim=True).expand(-1, int(inside.sum()))
            similarity.append(F.cosine_similarity(features, centres, dim=0))
        squared = (similarity[0] - similarity[1]).square()[labels[i] != 255]
        losses.append(squared.mean() if squared.numel() else squared.sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("classes", [None, 9])
def test_ifvd_against_a_map_of_centres(classes: int | None) -> None:
    """The gradient through the means is in it; one image has no label; labels are reduced by nearest neighbour."""
    torch.manual_seed(0)
    student = torch.randn(3, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, 6, 8, dtype=torch.float64)
    labels = torch.randint(0, 4, (3, 12, 16))
    labels[torch.rand(labels.shape) < 0.2] = 255
    labels[1] = 255
    expected = direct_ifvd(student, teacher, labels[:, ::2, ::2])
    agree(ifvd(student, teacher, labels, classes=classes), expected, student)


def test_ifvd_of_a_mean_that_is_zero() -> None:
    """Features of a class that cancel have no direction in common: similarity 0, and a finite gradient."""
    student = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2).repeat(1, 3, 1, 1).requires_grad_()
    teacher = torch.ones(1, 2, 1, 2)
    loss = ifvd(student, teacher, torch.zeros(1, 1, 2, dtype=torch.int64))
    assert float(loss.detach()) == pytest.approx(1.0)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


@pytest.mark.parametrize("name", ["ifvd", "cirkd_mini_batch"])
def test_memory_is_a_fraction_of_the_plain_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth at most of the peak of the plain form above, value and gradient together."""
    torch.manual_seed(0)
    monkeypatch.setitem(relations.BLOCK_ELEMENTS, "cpu", 1 << 16)  # as large as for a large map
    size, classes = (24, 40), 10
    student, teacher = torch.randn(2, 128, *size, requires_grad=True), torch.randn(2, 128, *size)
    labels = torch.randint(0, classes, (2, *size))
    functions = {
        "ifvd": (
            lambda: ifvd(student, teacher, labels, classes=classes),
            lambda: whole_map_ifvd(student, teacher, labels),
        ),
        "cirkd_mini_batch": (
            lambda: cirkd_mini_batch(student, teacher),
            lambda: direct_mini_batch(student, teacher),
        ),
    }[name]
    peaks = [
        peak_allocation(lambda make=make: torch.autograd.grad(make(), student), torch.device("cpu"))
        for make in functions
    ]
    assert peaks[0] * 5 <= peaks[1], peaks


def whole_map_ifvd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """A map of centres filled class by class by a mask of every channel, as is common."""
    similarity = []
    for features in (student, teacher):
        centres = features
        for label in range(int(labels.max()) + 1):
            inside = (labels == label)[:, None].expand_as(features).to(features)
            mean = (features * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True)
            centres = (1 - inside) * centres + inside * mean
        similarity.append(F.cosine_similarity(features, centres))
    return (similarity[0] - similarity[1]).square().mean()


# --------------------------------------------------------------------------------------------- images of a batch


def direct_mini_batch(student: Tensor, teacher: Tensor, mask: Tensor | None = None, tau: float = 0.1) -> Tensor:
    """Pair of images by pair of images."""
    ours, theirs = ([F.normalize(x.flatten(1), dim=0) for x in features] for features in (student, teacher))
    if mask is not None:
        ours, theirs = ([x[:, m.flatten()] for x, m in zip(maps, mask, strict=True)] for maps in (ours, theirs))
    total = torch.zeros((), dtype=student.dtype)
    for i in range(len(student)):
        for j in range(len(student)):
            if ours[i].numel() and ours[j].numel():
                logs = [F.log_softmax(maps[i].T @ maps[j] / tau, 1) for maps in (ours, theirs)]
                total = total + F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)
    return total / len(student) ** 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_mini_batch_against_all_pairs(rows: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of rows a block has; one image has no label."""
    torch.manual_seed(0)
    student = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, 4, 6, dtype=torch.float64)
    mask = torch.rand(3, 4, 6) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False
    monkeypatch.setitem(relations.BLOCK_ELEMENTS, "cpu", rows * 3 * 24)
    found = cirkd_mini_batch(student, teacher, mask=mask, temperature=0.2)
    agree(found, direct_mini_batch(student, teacher, mask, 0.2), student)


@pytest.mark.parametrize("groups", [1, 3])
def test_row_divergence_by_gradcheck(groups: int) -> None:
    """With respect to rows and keys, a row of weight 0 and a key that takes no part."""
    torch.manual_seed(0)
    rows, keys = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    their_rows, their_keys = (torch.randn(n, 3, dtype=torch.float64) for n in (5, 6))
    weight = torch.tensor([0.5, 0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    counted = torch.tensor([True, True, False, True, True, True])

    def loss(rows: Tensor, keys: Tensor) -> Tensor:
        return row_divergence(
            rows, their_rows, keys, their_keys, weight=weight, counted=counted, groups=groups, temperature=0.7
        )

    assert torch.autograd.gradcheck(loss, (rows, keys))
    gradient = torch.autograd.grad(loss(rows, keys), (rows, keys))
    assert not gradient[0][1].any()
    assert not gradient[1][2].any()


def test_mini_batch_pools_large_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 4 from 256 positions a side on; what is masked stays out of the means."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(1, 2, 256, 256, dtype=torch.float64) for _ in range(2))
    seen: list[Tensor] = []

    def spy(rows: Tensor, *others: Tensor, **options: Tensor) -> Tensor:
        seen.extend([rows, options["counted"]])
        return rows.sum()

    monkeypatch.setattr(relations, "row_divergence", spy)
    mask = torch.ones(1, 256, 256, dtype=torch.bool)
    mask[:, :4, :4] = False
    mask[:, :2, 4:8] = False
    cirkd_mini_batch(student, teacher, mask=mask)
    rows, counted = seen
    assert rows.shape == (64 * 64, 2)
    assert not counted[0]
    assert counted[1:].all()
    torch.testing.assert_close(rows[1], F.normalize(student[0, :, 2:4, 4:8].mean((1, 2)), dim=0))
    torch.testing.assert_close(rows[2], F.normalize(student[0, :, :4, 8:12].mean((1, 2)), dim=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairwiseConfig(scale=0.0), "losses.pairwise.scale: 0.0 is no share"),
        (lambda: PairwiseConfig(scale=1.0), "losses.pairwise.scale: 1.0 is no share"),
        (lambda: IFVDConfig(taps=[]), "losses.ifvd.taps: empty"),
        (
            lambda: CIRKDMiniBatchConfig(temperature=0.0),
            "losses.cirkd_mini_batch.temperature: 0.0 is not positive",
        ),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
