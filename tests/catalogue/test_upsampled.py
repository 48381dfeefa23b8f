"""Cross-entropy and KD from native-stride logits, by blocks of rows, against their plain form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, VOID, WEIGHTS, Answer
from plain import eager, logits_and_labels
from torch import Tensor

from losses import DistillationLoss, LossConfig, blocks
from losses.logits import KDConfig
from losses.upsampled import native_divergence, upsampled_loss


def assert_same_as_eager(ours: Tensor, theirs: Tensor, labels: Tensor, **options: Any) -> None:
    expected = eager(ours, labels, theirs, **options)
    loss, values = upsampled_loss(ours, labels, theirs, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(3 * expected, ours)
    (found,) = torch.autograd.grad(3 * loss, ours)
    assert float((found - gradient).abs().max()) <= 1e-10 * max(1.0, float(gradient.abs().max()))
    total = options.get("ce_weight", 1.0) * values["ce"] + options.get("kl_weight", 0.0) * values["kl"]
    torch.testing.assert_close(loss.detach(), total)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weights": WEIGHTS},
        {"label_smoothing": 0.1},
        {"class_weights": WEIGHTS, "label_smoothing": 0.3},
        {"kl_weight": 0.7},
        {"kl_weight": 0.7, "temperature": 4.0, "ce_weight": 0.0},
        {"kl_weight": 2.0, "temperature": 0.5, "kl_class_weights": WEIGHTS},
        {
            "kl_weight": 0.5,
            "ce_weight": 3.0,
            "temperature": 3.0,
            "class_weights": WEIGHTS,
            "label_smoothing": 0.1,
            "kl_class_weights": WEIGHTS.flip(0),
        },
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampled_options(options: dict[str, Any], align_corners: bool) -> None:
    ours, theirs, labels = logits_and_labels((4, 6), (16, 24))
    assert_same_as_eager(ours, theirs, labels, align_corners=align_corners, **options)


@pytest.mark.parametrize("block", [1, 200, 1500, 10**9])
@pytest.mark.parametrize(
    ("native", "size", "teacher"),
    [
        ((4, 6), (16, 24), (8, 12)),
        ((5, 7), (19, 25), (3, 4)),
        ((3, 3), (3, 3), (2, 1)),
        ((9, 11), (5, 4), (12, 2)),  # labels smaller than the logits
        ((1, 1), (7, 5), (1, 3)),
        ((6, 1), (1, 6), (1, 1)),
    ],
)
@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampled_sizes_and_blocks(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    native: tuple[int, int],
    size: tuple[int, int],
    teacher: tuple[int, int],
    align_corners: bool,
) -> None:
    """Odd sizes, a teacher of another stride, and blocks from one row to everything."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
    ours, theirs, labels = logits_and_labels(native, size, teacher)
    labels[0, 0, 0] = 1
    assert_same_as_eager(
        ours, theirs, labels, kl_weight=0.6, temperature=2.0, class_weights=WEIGHTS, align_corners=align_corners
    )


def test_upsampled_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 300)
    ours, theirs, labels = logits_and_labels((2, 3), (7, 9), (4, 4), batch=1)
    assert torch.autograd.gradcheck(
        lambda logits: upsampled_loss(
            logits, labels, theirs, kl_weight=2.0, temperature=3.0, class_weights=WEIGHTS, label_smoothing=0.1
        )[0],
        (ours,),
    )


def test_upsampled_denominators_take_the_place_of_counts() -> None:
    ours, theirs, labels = logits_and_labels((4, 4), (8, 8))
    count = float((labels != VOID).sum())
    _, alone = upsampled_loss(ours, labels, theirs, kl_weight=1.0)
    _, part = upsampled_loss(
        ours, labels, theirs, kl_weight=1.0, ce_denominator=3 * count, kl_denominator=torch.tensor(5 * count)
    )
    torch.testing.assert_close(3 * part["ce"], alone["ce"])
    torch.testing.assert_close(5 * part["kl"], alone["kl"])


def test_upsampled_without_a_gradient() -> None:
    ours, theirs, labels = logits_and_labels((4, 4), (8, 8))
    with torch.no_grad():
        loss, _ = upsampled_loss(ours, labels, theirs, kl_weight=1.0)
    torch.testing.assert_close(loss, eager(ours, labels, theirs, kl_weight=1.0).detach())
    with pytest.raises(ValueError, match="teacher_logits"):
        upsampled_loss(ours, labels, kl_weight=1.0)


def test_upsampled_in_half_precision_is_exact_in_float32() -> None:
    """Logits come in bf16 from a mixed-precision model: the loss is that of their values."""
    ours, theirs, labels = logits_and_labels((4, 6), (16, 24))
    half = ours.detach().bfloat16().requires_grad_()
    single = half.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = upsampled_loss(half, labels, theirs.bfloat16(), kl_weight=1.0)
    expected = eager(single, labels, theirs.bfloat16().float(), kl_weight=1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (found,), (gradient,) = torch.autograd.grad(loss, half), torch.autograd.grad(expected, single)
    torch.testing.assert_close(found.float(), gradient, rtol=2**-8, atol=1e-6)


def test_divergence_at_native_positions() -> None:
    """Each position has the label at its centre, and counts for the label pixels that it covers."""
    ours, theirs, labels = logits_and_labels((4, 5), (16, 15), (8, 10))
    v = torch.where(labels == VOID, 0, WEIGHTS.double()[labels % VOID])
    pooled = F.avg_pool2d(theirs, 2)
    pixels = F.kl_div(F.log_softmax(ours / 3, 1), F.softmax(pooled / 3, 1), reduction="none").sum(1)
    expected = 9 * 12 * (v[:, 2::4, 1::3] * pixels).sum() / v.sum()
    loss, value = native_divergence(ours, labels, theirs, weight=0.5, temperature=3.0, class_weights=WEIGHTS)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(loss, 0.5 * expected)
    (found,), (gradient,) = torch.autograd.grad(loss, ours), torch.autograd.grad(0.5 * expected, ours)
    torch.testing.assert_close(found, gradient)


def test_divergence_at_native_positions_in_the_objective() -> None:
    """Tiled images, parts of a batch and a batch of void change nothing there either."""
    ours, theirs, labels = logits_and_labels((3, 4), (12, 16), batch=3)
    labels[0, 2:] = VOID
    config = LossConfig(kd=KDConfig(weight=0.7, temperature=2.0, at="logits"))
    term = DistillationLoss(config, {}, {}, classes=CLASSES)
    assert term.describe()[1] == "kd: weight 0.7, at the logits' positions"
    loss, values = term(Answer(ours), Answer(theirs), labels)
    torch.testing.assert_close(loss, values["cross_entropy"] + 0.7 * values["kd"])
    torch.testing.assert_close(values["cross_entropy"], eager(ours, labels).detach())
    torch.testing.assert_close(values["kd"], native_divergence(ours, labels, theirs, temperature=2.0)[1])
    shares = term.counts(labels)
    parts = [
        term(Answer(ours[i : i + 1]), Answer(theirs[i : i + 1]), labels[i : i + 1], denominators=shares)[0]
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), loss)
    tiled = [x.repeat(1, 1, 2, 3) for x in (ours, theirs)]
    repeated = native_divergence(tiled[0], labels.repeat(1, 2, 3), tiled[1], temperature=2.0)[1]
    torch.testing.assert_close(repeated, values["kd"])
    nothing, _ = term(Answer(ours), Answer(theirs), torch.full_like(labels, VOID))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, ours)[0].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("height", [30.0, 63.0, 2000.0])
def test_neighbours_that_do_not_agree(height: float, temperature: float) -> None:
    """Between positions of different classes all logits are far below the highest one of either."""
    high = torch.arange(24).view(4, 6) % 5
    student = torch.stack([torch.where(high == c, 0.0, -height + c) for c in range(5)])[None].requires_grad_()
    teacher = student.detach().flip(1)
    labels = high.repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    options = {"kl_weight": 0.5, "temperature": temperature, "label_smoothing": 0.1}
    loss, _ = upsampled_loss(student, labels, teacher, **options)
    exact = student.detach().double().requires_grad_()
    expected = eager(exact, labels, teacher.double(), **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (found,), (gradient,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, exact)
    assert float((found - gradient).abs().max()) <= 2e-6 * float(gradient.abs().max())


def test_many_pixels_are_added_up_precisely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of blocks added one after the other in float32 would lose digits."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 1)
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 64, 64)
    labels = torch.randint(0, 2, (1, 2048, 512))
    loss, _ = upsampled_loss(logits, labels)
    torch.testing.assert_close(loss.double(), eager(logits.double(), labels), rtol=2e-7, atol=0)
