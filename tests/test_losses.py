"""The terms of the objective: one contract for all, each value and gradient against its plain form."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig, upsampled
from losses.distillation import CrossEntropyConfig, KDConfig
from losses.features import AttentionTransferConfig, FitnetConfig, attention_transfer, fitnet
from losses.logits import kl_divergence
from losses.relations import AffinityConfig, affinity
from losses.term import TermConfig
from losses.upsampled import upsampled_loss

VOID = 255
CLASSES = 5
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25])


@dataclass
class Shape:
    """A tap as a model publishes it."""

    channels: int
    stride: int


@dataclass
class Answer:
    """A model's output."""

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


STUDENT_TAPS = {"a": Shape(3, 2), "b": Shape(4, 4)}
TEACHER_TAPS = {"a": Shape(6, 2), "b": Shape(7, 4)}

CONFIGS: dict[str, Callable[..., TermConfig]] = {
    "cross_entropy": CrossEntropyConfig,
    "kd": KDConfig,
    "attention_transfer": AttentionTransferConfig,
    "fitnet": FitnetConfig,
    "affinity": AffinityConfig,
}
FEATURE_TERMS = ("attention_transfer", "fitnet", "affinity")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cross_entropy": ("cross_entropy", {}),
    "cross_entropy, weighted and smoothed": (
        "cross_entropy",
        {"class_weights": "median", "label_smoothing": 0.1},
    ),
    "kd": ("kd", {"temperature": 2.0}),
    "kd, weighted": ("kd", {"class_weights": "median"}),
} | {
    f"{name}{', labelled' if labelled else ''}": (name, {"taps": ["a", "b"], "labelled_only": labelled})
    for name in FEATURE_TERMS
    for labelled in (False, True)
}
variants = pytest.mark.parametrize("variant", VARIANTS)
masked_variants = pytest.mark.parametrize(
    "variant", [v for v, (name, _) in VARIANTS.items() if name not in FEATURE_TERMS or "labelled" in v]
)


def objective(variant: str, student: Any = STUDENT_TAPS, teacher: Any = TEACHER_TAPS) -> DistillationLoss:
    """The objective of one term of weight 1."""
    name, options = VARIANTS[variant]
    config = LossConfig(**({"cross_entropy": None} | {name: CONFIGS[name](weight=1.0, **options)}))
    torch.manual_seed(0)
    return DistillationLoss(config, student, teacher, class_weights=lambda scheme: WEIGHTS)


def answers(
    batch: int = 2, height: int = 8, width: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Answer, Answer, Tensor]:
    """Student and teacher on random maps, logits at label size, a fifth of the labels void, all with gradients."""
    torch.manual_seed(seed)

    def answer(taps: dict[str, Shape]) -> Answer:
        features = {
            name: torch.randn(batch, tap.channels, -(-height // tap.stride), -(-width // tap.stride), dtype=dtype)
            for name, tap in taps.items()
        }
        logits = torch.randn(batch, CLASSES, height, width, dtype=dtype)
        return Answer(logits.requires_grad_(), {k: v.requires_grad_() for k, v in features.items()})

    labels = torch.randint(0, CLASSES, (batch, height, width))
    labels[torch.rand(labels.shape) < 0.2] = VOID
    return answer(STUDENT_TAPS), answer(TEACHER_TAPS), labels


def changed(answer: Answer, change: Callable[[Tensor], Tensor]) -> Answer:
    """The answer with every tensor changed, as new leaves."""
    return Answer(
        change(answer.logits.detach()).requires_grad_(),
        {name: change(value.detach()).requires_grad_() for name, value in answer.features.items()},
    )


def leaves(answer: Answer) -> list[Tensor]:
    return [answer.logits, *answer.features.values()]


def gradients(loss: Tensor, answer: Answer) -> list[Tensor]:
    """The gradient with respect to each tensor of the answer, zero where there is none."""
    found = torch.autograd.grad(loss, leaves(answer), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves(answer), found, strict=True)]


# ------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "smoothed" not in v])  # which costs its entropy
def test_perfect_student_costs_nothing(variant: str) -> None:
    """A divergence, not a soft cross-entropy, whose gradient is the same but whose value is an entropy."""
    term = objective(variant, TEACHER_TAPS, TEACHER_TAPS).double()
    _, teacher, labels = answers()
    student = changed(teacher, torch.clone)
    if "cross_entropy" in variant:
        one_hot = F.one_hot(torch.where(labels == VOID, 0, labels), CLASSES).movedim(-1, 1)
        student = Answer((1000.0 * one_hot).double().requires_grad_())
    for adapter in term.modules():
        if isinstance(adapter, torch.nn.Conv2d):
            torch.nn.init.dirac_(adapter.weight)
            torch.nn.init.zeros_(adapter.bias)  # type: ignore[arg-type]
    loss, _ = term(student, teacher, labels)
    assert abs(float(loss.detach())) < 1e-12
    assert max(float(g.abs().max()) for g in gradients(loss, student)) < 1e-7


@variants
def test_doubling_the_batch_changes_nothing(variant: str) -> None:
    term = objective(variant).double()
    student, teacher, labels = answers()
    once, _ = term(student, teacher, labels)
    twice = [changed(answer, lambda x: torch.cat([x, x])) for answer in (student, teacher)]
    doubled, _ = term(*twice, torch.cat([labels, labels]))
    torch.testing.assert_close(doubled, once, rtol=1e-12, atol=0)


@variants
def test_tiling_the_image_changes_nothing(variant: str) -> None:
    """Also the test of `batchmean` on maps, which sums over pixels. Attention transfer is not invariant."""
    term = objective(variant).double()
    student, teacher, labels = answers()
    once, _ = term(student, teacher, labels)
    tiled = [changed(answer, lambda x: x.repeat(1, 1, 2, 3)) for answer in (student, teacher)]
    repeated, _ = term(*tiled, labels.repeat(1, 2, 3))
    if "attention" in variant:
        once = once / 6  # its maps have unit norm over space: the paper's
    torch.testing.assert_close(repeated, once, rtol=1e-10, atol=0)


@masked_variants
def test_void_pixels_are_left_out(variant: str) -> None:
    """Whatever stands at unlabelled places, the loss is the same and no gradient goes there.

    The feature terms take the whole map unless they are told otherwise, as their papers do.
    """
    term = objective(variant).double()
    student, teacher, labels = answers()
    labels[:, :4] = VOID  # rows of blocks, so that they stay void at each tap's stride
    labels[:, 4:] = labels[:, 4:].clamp(max=CLASSES - 1)
    once, _ = term(student, teacher, labels)

    def disturb(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, : x.shape[2] // 2] += 7 * torch.randn(x[:, :, : x.shape[2] // 2].shape, dtype=x.dtype)
        return x

    student, teacher = changed(student, disturb), changed(teacher, disturb)
    disturbed, _ = term(student, teacher, labels)
    torch.testing.assert_close(disturbed, once, rtol=1e-12, atol=0)
    for gradient in gradients(disturbed, student):
        assert not gradient[:, :, : gradient.shape[2] // 2].any()


def special(case: str) -> tuple[Answer, Answer, Tensor]:
    student, teacher, labels = answers(dtype=torch.float32)
    if case == "all void":
        labels = torch.full_like(labels, VOID)
    elif case == "batch of 1":
        student, teacher, labels = answers(1, dtype=torch.float32)
    elif case == "1x1 map":
        student, teacher, labels = answers(2, 1, 1, dtype=torch.float32)
        labels[0], labels[1] = 1, VOID
    elif case in ("constant", "zero"):
        student, teacher = (
            changed(a, lambda x: torch.full_like(x, float(case == "constant"))) for a in (student, teacher)
        )
    elif case == "one channel zero":
        student, teacher = (
            changed(a, lambda x: x * (torch.arange(x.shape[1]) > 0)[:, None, None]) for a in (student, teacher)
        )
    elif case == "huge":
        student, teacher = (changed(a, lambda x: 1e4 * x) for a in (student, teacher))
    return student, teacher, labels


@variants
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", ["plain", "all void", "batch of 1", "1x1 map", "constant", "zero", "one channel zero", "huge"]
)
def test_finite(variant: str, case: str, precision: torch.dtype) -> None:
    """Value and gradient, in the arithmetic of a mixed-precision training."""
    term = objective(variant)
    student, teacher, labels = special(case)
    if precision is not torch.float32:
        student, teacher = (changed(answer, lambda x: x.to(precision)) for answer in (student, teacher))
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        loss, values = term(student, teacher, labels)
    found = gradients(loss, student)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in values.values())
    assert all(torch.isfinite(g).all() for g in found)
    if case == "all void" and (VARIANTS[variant][0] not in FEATURE_TERMS or "labelled" in variant):
        assert loss == 0
        assert not any(g.any() for g in found)


@variants
def test_mixed_precision_costs_no_precision(variant: str) -> None:
    """On the same numbers the terms compute in float32 under autocast; only adapters follow the autocast."""
    student, teacher, labels = (x for x in special("plain"))
    student, teacher = (changed(answer, lambda x: x.bfloat16().float()) for answer in (student, teacher))
    term = objective(variant)
    expected, _ = term(student, teacher, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = term(student, teacher, labels)
    tolerance = 1e-2 if "fitnet" in variant else 1e-6
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)


@variants
def test_gradient_reaches_student_and_adapters_alone(variant: str) -> None:
    name, options = VARIANTS[variant]
    term = objective(variant).double()
    student, teacher, labels = answers()
    loss, values = term(student, teacher, labels)
    loss.backward()
    assert set(values) == {name}
    assert not values[name].requires_grad
    for tap in options.get("taps", []):
        assert student.features[tap].grad.abs().sum() > 0  # type: ignore[union-attr]
    if name in FEATURE_TERMS:
        assert not student.logits.grad.any()  # type: ignore[union-attr]
    else:
        assert student.logits.grad.abs().sum() > 0  # type: ignore[union-attr]
    adapters = list(term.parameters())
    assert len(adapters) == (4 if name == "fitnet" else 0)
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters)  # type: ignore[union-attr]
    assert all(x.grad is None for x in leaves(teacher))


@variants
def test_parts_of_a_batch_add_up_to_the_batch(variant: str) -> None:
    """Parts of unequal numbers of void pixels, given the whole batch's denominators: a mean of means is not it."""
    term = objective(variant).double()
    student, teacher, labels = answers(4)
    labels[0] = VOID
    labels[1, 2:] = VOID
    whole, values = term(student, teacher, labels)
    expected = gradients(whole, student)
    name = VARIANTS[variant][0]

    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    denominators = torch.stack([term.counts(labels[part]) for part in parts]).sum(0)
    torch.testing.assert_close(denominators, term.counts(labels))
    loss, value, found = 0.0, 0.0, [torch.zeros_like(g) for g in expected]
    for part in parts:
        ours, theirs = (changed(answer, lambda x, part=part: x[part]) for answer in (student, teacher))
        piece, named = term(ours, theirs, labels[part], denominators=denominators)
        loss, value = loss + float(piece.detach()), value + float(named[name])
        for total, gradient in zip(found, gradients(piece, ours), strict=True):
            total[part] += gradient
    assert loss == pytest.approx(float(whole.detach()), rel=1e-12)
    assert value == pytest.approx(float(values[name]), rel=1e-12)
    for gradient, total in zip(expected, found, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-14)


# ------------------------------------------------------------------------- cross-entropy and KD, upsampled


def eager(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    kl_class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """The plain form: everything at full size, PyTorch's own losses."""

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, labels.shape[-2:], mode="bilinear", align_corners=align_corners)

    ours = enlarged(student)
    weights = None if class_weights is None else class_weights.to(ours)
    loss = ce_weight * F.cross_entropy(ours, labels, weights, ignore_index=VOID, label_smoothing=label_smoothing)
    if kl_weight:
        assert teacher is not None
        theirs = F.softmax(enlarged(teacher) / temperature, 1)
        pixels = F.kl_div(F.log_softmax(ours / temperature, 1), theirs, reduction="none").sum(1)
        share = (labels != VOID).to(ours)
        if kl_class_weights is not None:
            share = share * kl_class_weights.to(ours)[torch.where(labels == VOID, 0, labels)]
        loss = loss + kl_weight * temperature**2 * (pixels * share).sum() / share.sum()
    return loss


def logits_and_labels(
    native: tuple[int, int], size: tuple[int, int], teacher: tuple[int, int] | None = None, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ours = torch.randn(batch, CLASSES, *native, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(batch, CLASSES, *(teacher or native), dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (batch, *size))
    labels[torch.rand(labels.shape) < 0.2] = VOID
    return ours, theirs, labels


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
    monkeypatch.setitem(upsampled.BLOCK_ELEMENTS, "cpu", block)
    ours, theirs, labels = logits_and_labels(native, size, teacher)
    labels[0, 0, 0] = 1
    assert_same_as_eager(
        ours, theirs, labels, kl_weight=0.6, temperature=2.0, class_weights=WEIGHTS, align_corners=align_corners
    )


def test_upsampled_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(upsampled.BLOCK_ELEMENTS, "cpu", 300)
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


def test_many_pixels_are_added_up_precisely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of blocks added one after the other in float32 would lose digits."""
    monkeypatch.setitem(upsampled.BLOCK_ELEMENTS, "cpu", 1)
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 64, 64)
    labels = torch.randint(0, 2, (1, 2048, 512))
    loss, _ = upsampled_loss(logits, labels)
    torch.testing.assert_close(loss.double(), eager(logits.double(), labels), rtol=2e-7, atol=0)


# ---------------------------------------------------------------------------------------------- kd on maps


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_kl_divergence_against_torch(temperature: float, masked: bool) -> None:
    """Also of T²: without it the temperature would change the weight."""
    ours, theirs, labels = logits_and_labels((6, 6), (6, 6))
    mask = labels != VOID if masked else None
    pixels = F.kl_div(
        F.log_softmax(ours / temperature, 1), F.softmax(theirs / temperature, 1), reduction="none"
    ).sum(1)
    expected = temperature**2 * (pixels if mask is None else pixels[mask]).mean()
    found = kl_divergence(ours, theirs, mask=mask, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, ours)[0], torch.autograd.grad(expected, ours)[0], rtol=1e-10, atol=1e-14
    )


def test_temperature_keeps_the_weight() -> None:
    """With T² the gradient at high temperature tends to a constant; without it, it would fall as 1/T²."""
    ours, theirs, labels = logits_and_labels((6, 6), (6, 6))
    norms = []
    for temperature in (20.0, 40.0):
        for loss in (
            kl_divergence(ours, theirs, temperature=temperature),
            upsampled_loss(ours, labels, theirs, ce_weight=0.0, kl_weight=1.0, temperature=temperature)[0],
        ):
            norms.append(float(torch.autograd.grad(loss, ours)[0].norm()))
    assert norms[2] == pytest.approx(norms[0], rel=0.05)
    assert norms[3] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kl_divergence_of_extreme_logits(dtype: torch.dtype) -> None:
    """`softmax(...).log()` is -inf here."""
    ours = torch.tensor([40.0, -40.0, 0.0], dtype=dtype).view(1, 3, 1, 1).requires_grad_()
    theirs = torch.tensor([-40.0, 40.0, 0.0], dtype=dtype).view(1, 3, 1, 1)
    mapped, _ = upsampled_loss(ours, torch.zeros(1, 2, 2, dtype=torch.int64), theirs, ce_weight=0.0, kl_weight=1.0)
    for loss in (kl_divergence(ours, theirs), mapped):
        assert float(loss.detach()) == pytest.approx(80, rel=1e-3)
        assert torch.isfinite(torch.autograd.grad(loss, ours)[0]).all()


def test_nothing_valid_is_zero() -> None:
    ours, theirs, _ = logits_and_labels((4, 4), (4, 4))
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    for function in (kl_divergence, affinity, attention_transfer, fitnet):
        loss = function(ours, theirs, mask=nothing)
        (gradient,) = torch.autograd.grad(loss, ours)
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("function", [kl_divergence, affinity, attention_transfer, fitnet])
def test_functions_give_the_teacher_no_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    ours, theirs, _ = logits_and_labels((4, 4), (4, 4))
    function(ours, theirs.requires_grad_()).backward()
    assert ours.grad is not None
    assert theirs.grad is None


# ----------------------------------------------------------------------------------------------- features


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


@pytest.mark.parametrize("masked", [False, True])
def test_fitnet_and_attention_transfer_by_hand(masked: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5) < 0.7 if masked else torch.ones(2, 4, 5, dtype=torch.bool)
    hints, attentions = [], []
    for s, t, m in zip(ours, theirs, mask, strict=True):
        hints.append((s[:, m] - t[:, m]).square().mean())
        a, b = (F.normalize(x[:, m].square().mean(0), dim=0) for x in (s, t))
        attentions.append((a - b).square().mean())
    given = mask if masked else None
    torch.testing.assert_close(fitnet(ours, theirs, mask=given), torch.stack(hints).mean())
    torch.testing.assert_close(attention_transfer(ours, theirs, mask=given), torch.stack(attentions).mean())


def test_teacher_of_another_resolution() -> None:
    """Its map is brought to the student's, by area where it shrinks."""
    taps = {"a": Shape(3, 4)}
    config = LossConfig(cross_entropy=None, fitnet=FitnetConfig(weight=1.0, taps=["a"]))
    term = DistillationLoss(config, taps, taps).double()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.zero_()
    teacher = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    student = Answer(torch.zeros(2, 2, 4, 4, dtype=torch.float64), {"a": torch.zeros(2, 3, 4, 4).double()})
    loss, _ = term(student, Answer(student.logits, {"a": teacher}), torch.zeros(2, 16, 16, dtype=torch.int64))
    torch.testing.assert_close(loss, F.avg_pool2d(teacher, 2).square().mean())


# ------------------------------------------------------------------------------------------ the objective


def test_objective_is_the_weighted_sum() -> None:
    student, teacher, labels = answers()
    config = LossConfig(
        cross_entropy=CrossEntropyConfig(weight=0.5, class_weights="median"),
        kd=KDConfig(weight=2.0, temperature=3.0),
        attention_transfer=AttentionTransferConfig(weight=100.0, taps=["a", "b"]),
        affinity=AffinityConfig(taps=["b:a"]),
    )
    total = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, class_weights=lambda scheme: WEIGHTS)
    assert total.student_taps == ["a", "b"]
    assert total.teacher_taps == ["a", "b"]
    loss, values = total(student, teacher, labels)
    weights = {"cross_entropy": 0.5, "kd": 2.0, "attention_transfer": 100.0, "affinity": 1.0}
    assert set(values) == set(weights)
    torch.testing.assert_close(loss.detach(), sum(weights[name] * value for name, value in values.items()))
    torch.testing.assert_close(values["cross_entropy"], eager(student.logits, labels, class_weights=WEIGHTS))
    pairs = [attention_transfer(student.features[tap], teacher.features[tap]) for tap in ("a", "b")]
    torch.testing.assert_close(values["attention_transfer"], sum(pairs) / 2)
    lines = total.describe()
    assert len(lines) == 4
    assert lines[3] == "affinity: weight 1, b:a"


def test_pixel_terms_alone_and_together_are_the_same() -> None:
    """They share one pass over the logits."""
    student, teacher, labels = answers()
    kd = KDConfig(weight=2.0, temperature=3.0, class_weights="median")
    found = []
    for config in (LossConfig(), LossConfig(cross_entropy=None, kd=kd), LossConfig(kd=kd)):
        term = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, class_weights=lambda scheme: WEIGHTS)
        loss, values = term(student, teacher, labels)
        found.append((loss, values, torch.autograd.grad(loss, student.logits)[0]))
    (ce, ce_values, ce_gradient), (kl, kl_values, kl_gradient), (both, values, gradient) = found
    torch.testing.assert_close(both, ce + kl)
    torch.testing.assert_close(gradient, ce_gradient + kl_gradient)
    torch.testing.assert_close(values, ce_values | kl_values)
    expected = eager(
        student.logits,
        labels,
        teacher.logits,
        ce_weight=0.0,
        kl_weight=1.0,
        temperature=3.0,
        kl_class_weights=WEIGHTS,
    )
    torch.testing.assert_close(values["kd"], expected.detach())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ({"start": 2, "until": 4}, [0, 0, 2, 2, 0, 0, 0, 0]),
        ({"start": 0.25, "until": 0.5}, [0, 0, 2, 2, 0, 0, 0, 0]),
        ({"start": 1, "until": 1.0}, [0, 2, 2, 2, 2, 2, 2, 2]),
        ({"until": 1}, [2, 0, 0, 0, 0, 0, 0, 0]),
        ({"start": 1.0}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"ramp": 3}, [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        ({"start": 2, "ramp": 0.375}, [0, 0, 0.5, 1, 1.5, 2, 2, 2]),
    ],
    ids=str,
)
def test_schedule(options: dict[str, Any], expected: list[float]) -> None:
    """An integer is steps, a float a fraction: 1 is the second step, 1.0 the end."""
    config = TermConfig(weight=2.0, **options)
    assert [config.factor(step, 8) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_outside_its_window_a_term_only_touches_its_parameters(name: str) -> None:
    """DDP waits for the gradient of each parameter at each step, so it gets one, of zeros."""
    options: dict[str, Any] = {"taps": ["a"]} if name in FEATURE_TERMS else {}
    config = LossConfig(
        **({"cross_entropy": None} | {name: CONFIGS[name](weight=1.0, start=2, until=4, **options)})
    )
    term = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS).double()
    student, teacher, labels = answers()
    for step, inside in ((1, False), (2, True), (3, True), (4, False)):
        loss, values = term(student, teacher, labels, step=step)
        assert (set(values) == {name}) == inside
        assert (float(loss) > 0) == inside
        for parameter in term.parameters():
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            assert gradient.any() == inside
        torch.autograd.grad(loss, student.logits)  # reaches the classifier at every step


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: LossConfig(fitnet=FitnetConfig(taps=["a", "neck"])),
            "losses.fitnet.taps: the student has no tap 'neck'; it has a, b",
        ),
        (
            lambda: LossConfig(affinity=AffinityConfig(taps=["a:neck"])),
            "losses.affinity.taps: the teacher has no tap 'neck'; it has a, b",
        ),
        (
            lambda: LossConfig(attention_transfer=AttentionTransferConfig(taps=[])),
            "losses.attention_transfer.taps: empty; name at least one tap",
        ),
        (lambda: LossConfig(kd=KDConfig(temperature=0)), "losses.kd.temperature: 0 is not positive"),
        (lambda: LossConfig(kd=KDConfig(weight=-1)), "losses.kd.weight: -1 is negative; give 0 or more"),
        (
            lambda: LossConfig(kd=KDConfig(start=1.5)),
            "losses.kd.start: 1.5 is out of range; give steps as an integer",
        ),
        (
            lambda: LossConfig(cross_entropy=CrossEntropyConfig(label_smoothing=1.0)),
            "losses.cross_entropy.label_smoothing: 1.0 is not in [0, 1)",
        ),
        (lambda: LossConfig(cross_entropy=None), "losses: no term is configured"),
        (
            lambda: LossConfig(cross_entropy=CrossEntropyConfig(class_weights="enet")),
            "losses: class_weights=enet needs a data set's label counts",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], LossConfig], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DistillationLoss(make(), STUDENT_TAPS, TEACHER_TAPS)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "cross_entropy"])
def test_a_term_without_a_teacher(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"losses.{name}: compares with a teacher, and there is none"):
        DistillationLoss(LossConfig(**{name: CONFIGS[name]()}), STUDENT_TAPS)
