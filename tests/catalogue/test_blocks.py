"""Sums over pixels by blocks of rows, against the same function of logits that are upsampled whole."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import VOID
from plain import logits_and_labels
from torch import Tensor

from losses import blocks
from losses.blocks import blocked_mean, blocked_sum, upsampled_blocks
from losses.supervised import dice
from losses.upsampled import upsampled_loss

SIZES = [
    ((4, 6), (16, 24), (8, 12)),
    ((5, 7), (19, 25), (3, 4)),
    ((3, 3), (3, 3), (3, 3)),  # nothing to interpolate
    ((3, 3), (3, 3), (2, 1)),
    ((6, 4), (6, 9), (6, 9)),
    ((9, 11), (5, 4), (12, 2)),
    ((1, 1), (7, 5), (1, 3)),
]


def enlarged(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def squares(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """A scalar, in which student, teacher and labels all matter."""
    return ((student.softmax(1) - teacher.tanh()).square().sum(1) * (labels != VOID)).sum()


def moments(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """[3, B, C]: sums of which a loss is no sum."""
    return torch.stack([(student * teacher).sum((2, 3)), student.square().sum((2, 3)), teacher.exp().sum((2, 3))])


def ratio(total: Tensor) -> Tensor:
    return (total[0] / (1 + total[1] * total[2]).sqrt()).sum().square()


def spread(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Of sorted pixels: not a sum over blocks of rows, but one over images."""
    ordered = (student + teacher).flatten(1).sort(1).values
    return (ordered * torch.linspace(-1, 1, ordered.shape[1], dtype=ordered.dtype)).sum().sin()


def assert_same(found: Tensor, expected: Tensor, student: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    (gradient,) = torch.autograd.grad(3 * expected, student)
    (pulled,) = torch.autograd.grad(3 * found, student)
    assert gradient.any()
    assert float((pulled - gradient).abs().max()) <= 1e-11 * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize("block", [1, 200, 1500, 10**9])
@pytest.mark.parametrize(("native", "size", "taught"), SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_sums(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    native: tuple[int, int],
    size: tuple[int, int],
    taught: tuple[int, int],
    align_corners: bool,
) -> None:
    """A scalar, a function of totals, and one of whole images, from blocks of one row to everything."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
    ours, theirs, labels = logits_and_labels(native, size, taught)
    labels[0, 0, 0] = 1
    whole = [enlarged(x, size, align_corners) for x in (ours, theirs)]
    total = blocked_sum(squares, ours, theirs, [labels], align_corners=align_corners)
    assert_same(total, squares(*whole, labels), ours)
    finished = blocked_sum(moments, ours, theirs, [labels], finish=ratio, align_corners=align_corners)
    assert_same(finished, ratio(moments(*whole, labels)), ours)
    images = blocked_sum(spread, ours, theirs, [labels], whole_images=True, align_corners=align_corners)
    assert_same(images, spread(*(x[:1] for x in whole), labels) + spread(*(x[1:] for x in whole), labels), ours)


@pytest.mark.parametrize("native", [(2, 3), (5, 7)])
@pytest.mark.parametrize(
    "options", [{}, {"finish": ratio}, {"whole_images": True}], ids=["sum", "finish", "whole images"]
)
def test_gradcheck(
    monkeypatch: pytest.MonkeyPatch, native: tuple[int, int], options: dict[str, Callable[[Tensor], Tensor]]
) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 120)
    ours, theirs, labels = logits_and_labels(native, (5, 7), (3, 2), batch=2)
    function = moments if "finish" in options else spread if "whole_images" in options else squares
    assert torch.autograd.gradcheck(lambda x: blocked_sum(function, x, theirs, [labels], **options), (ours,))


def test_equal_sizes_are_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("interpolated")

    monkeypatch.setattr(blocks.F, "interpolate", forbidden)
    monkeypatch.setattr(blocks.F, "linear", forbidden)
    ours, theirs, labels = logits_and_labels((4, 6), (4, 6))
    assert_same(blocked_sum(squares, ours, theirs, [labels]), squares(ours, theirs, labels), ours)
    smaller, _, labels = logits_and_labels((4, 6), (8, 6))
    with pytest.raises(AssertionError, match="interpolated"):
        blocked_sum(squares, smaller, theirs, [labels])


def test_what_goes_in_stays_as_it_is() -> None:
    """Rows that need no interpolation are handed through as views."""
    ours, theirs, labels = logits_and_labels((4, 6), (4, 6))
    before = ours.detach().clone(), theirs.clone()
    theirs.requires_grad_()
    loss = blocked_sum(squares, ours, theirs, [labels])
    loss.backward()
    assert theirs.grad is None
    assert ours.requires_grad
    assert theirs.requires_grad
    torch.testing.assert_close((ours.detach(), theirs.detach()), before, rtol=0, atol=0)


def test_a_function_that_ignores_the_student_has_no_gradient() -> None:
    ours, theirs, labels = logits_and_labels((4, 6), (8, 12))
    for options in ({}, {"finish": torch.sum}):
        loss = blocked_sum(lambda student, teacher, labels: teacher.sum(), ours, theirs, [labels], **options)
        assert not torch.autograd.grad(loss, ours)[0].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("native", [(4, 6), (16, 24)])
def test_mixed_precision_and_layout(layout: torch.memory_format, native: tuple[int, int]) -> None:
    """The loss of half-precision logits is that of their values; its gradient has their type."""
    ours, theirs, labels = logits_and_labels(native, (16, 24))
    half = ours.detach().bfloat16().to(memory_format=layout).requires_grad_()
    single = half.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = blocked_sum(squares, half, theirs.bfloat16(), [labels])
    expected = squares(enlarged(single, (16, 24)), enlarged(theirs.bfloat16().float(), (16, 24)), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (found,), (gradient,) = torch.autograd.grad(loss, half), torch.autograd.grad(expected, single)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("finish", [None, torch.sum])
def test_many_blocks_are_added_up_precisely(
    monkeypatch: pytest.MonkeyPatch, finish: Callable[[Tensor], Tensor] | None
) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 1)
    torch.manual_seed(0)
    logits, labels = torch.rand(1, 2, 64, 64), torch.zeros(1, 4096, 64)
    total = blocked_sum(lambda student, _, labels: student.sum(), logits, None, [labels], finish=finish)
    torch.testing.assert_close(total.double(), enlarged(logits.double(), (4096, 64)).sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("block", [1, 500, 10**9])
def test_upsampled_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """All rows in turn; two in step with one another leave neither autograd nor autocast off."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
    ours, theirs, _ = logits_and_labels((4, 6), (16, 24), (8, 12))
    found = [torch.empty(2, 5, 16, 24, dtype=torch.float64) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        for (rows, one), (_, other) in zip(
            upsampled_blocks(ours, (16, 24)), upsampled_blocks(theirs, (16, 24)), strict=True
        ):
            found[0][:, :, rows], found[1][:, :, rows] = one, other
            assert not one.requires_grad
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    expected = [enlarged(x.detach(), (16, 24)) for x in (ours, theirs)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_mean_over_a_mask() -> None:
    ours, theirs, labels = logits_and_labels((4, 6), (8, 12))

    def pixels(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return (student * teacher).sum(1).square() + labels

    whole = pixels(enlarged(ours, (8, 12)), enlarged(theirs, (8, 12)), labels)
    mask = labels != VOID
    assert_same(blocked_mean(pixels, ours, theirs, mask, labels), whole[mask].mean(), ours)
    native = (ours * theirs).sum(1).square().mean()
    assert_same(blocked_mean(lambda s, t: (s * t).sum(1).square(), ours, theirs, None), native, ours)
    nothing = blocked_mean(pixels, ours, theirs, torch.zeros_like(mask), labels)
    assert nothing == 0
    assert not torch.autograd.grad(nothing, ours)[0].any()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("native", "size"), [((5, 7), (20, 28)), ((3, 4), (7, 9)), ((1, 1), (3, 5)), ((9, 8), (4, 3))]
)
def test_columns_by_a_matrix(native: tuple[int, int], size: tuple[int, int], align_corners: bool) -> None:
    """What a GPU takes when its sums must be in order: the same rows, and the same transpose."""
    torch.manual_seed(0)
    rows = blocks.Rows(torch.randn(2, 3, *native, dtype=torch.float64), size, align_corners)
    under, matrix = rows.block(1, size[0])
    gradient = torch.randn(2, 3, size[0] - 1, size[1], dtype=torch.float64)
    expected = rows.upsample(under, matrix), rows.transpose(gradient, matrix)
    _, rows.columns_WJ = blocks._interpolation(native[1], size[1], 0, size[1], align_corners, rows.native)
    torch.testing.assert_close(rows.upsample(under, matrix), expected[0])
    torch.testing.assert_close(rows.transpose(gradient, matrix), expected[1])


@pytest.mark.parametrize("function", ["upsampled_loss", "dice"])
def test_gradient_of_half_precision_is_scaled_before_it_is_rounded(function: str) -> None:
    """fp16's loss scale begins at 65536, which fp16 can't hold, and the gradients are too small for it without."""
    torch.manual_seed(0)
    exact = torch.randn(1, 4, 8, 8).half().float().requires_grad_()
    half = exact.detach().half().to(memory_format=torch.channels_last).requires_grad_()
    labels = torch.randint(0, 4, (1, 32, 32))

    def loss(logits: Tensor) -> Tensor:
        if function == "dice":
            return dice(logits, labels) * 1e-4
        return upsampled_loss(logits, labels, ce_denominator=1e7)[0]

    (expected,) = torch.autograd.grad(loss(exact) * 65536 * 8, exact)
    (found,) = torch.autograd.grad(loss(half) * 65536 * 8, half)
    assert found.dtype == torch.float16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=1e-6)
