"""What every loss promises; a new one in `cases.CASES` is put to all of it."""

import json
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    CLASSES,
    CONFIGS,
    STUDENT_TAPS,
    TEACHER_TAPS,
    VOID,
    WEIGHTS,
    Answer,
    answers,
    changed,
    gradients,
    leaves,
    names,
    objective,
    stepped,
)
from golden import GOLDEN, measure
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig

variants = pytest.mark.parametrize("variant", CASES)


@pytest.mark.parametrize("variant", names("perfect"))
def test_perfect_student_costs_nothing(variant: str) -> None:
    """A divergence, not a soft cross-entropy, whose gradient is the same but whose value is an entropy."""
    term = objective(variant, TEACHER_TAPS, TEACHER_TAPS).double()
    _, teacher, labels = answers()
    student = changed(teacher, torch.clone)
    if CASES[variant].supervised:
        one_hot = F.one_hot(torch.where(labels == VOID, 0, labels), CLASSES).movedim(-1, 1)
        student = Answer((1000.0 * one_hot).double().requires_grad_())
    for adapter in term.modules():
        if isinstance(adapter, torch.nn.Conv2d):
            torch.nn.init.dirac_(adapter.weight)
            if adapter.bias is not None:
                torch.nn.init.zeros_(adapter.bias)
    loss, _ = term(student, teacher, labels)
    assert abs(float(loss.detach())) < 1e-12
    assert max(float(g.abs().max()) for g in gradients(loss, student)) < 1e-7


@pytest.mark.parametrize("variant", names("doubling"))
def test_doubling_the_batch_changes_nothing(variant: str) -> None:
    term = objective(variant).double()
    student, teacher, labels = answers()
    once, _ = term(student, teacher, labels)
    twice = [changed(answer, lambda x: torch.cat([x, x])) for answer in (student, teacher)]
    doubled, _ = term(*twice, torch.cat([labels, labels]))
    torch.testing.assert_close(doubled, once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", names("tiling"))
def test_tiling_the_image_changes_nothing(variant: str) -> None:
    """Also the test of `batchmean` on maps, which sums over pixels. Some terms change by a known factor."""
    term = objective(variant).double()
    student, teacher, labels = answers()
    once, _ = term(student, teacher, labels)
    tiled = [changed(answer, lambda x: x.repeat(1, 1, 2, 3)) for answer in (student, teacher)]
    repeated, _ = term(*tiled, labels.repeat(1, 2, 3))
    torch.testing.assert_close(repeated, once * CASES[variant].tiling, rtol=1e-10, atol=0)


@pytest.mark.parametrize("variant", [name for name in names("void") if CASES[name].void])
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
    if case == "all void" and CASES[variant].void:
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
    tolerance = 1e-2 if list(term.parameters()) else 1e-6
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)


@variants
def test_gradient_reaches_student_and_adapters_alone(variant: str) -> None:
    term = objective(variant).double()
    student, teacher, labels = answers()
    loss, values = term(student, teacher, labels)
    loss.backward()
    assert set(values) == {CASES[variant].name}
    assert not values[CASES[variant].name].requires_grad
    for place, tensor in {"logits": student.logits, **student.features}.items():
        reached = tensor.grad is not None and bool(tensor.grad.any())
        assert reached == (place in CASES[variant].reaches), place
    for parameter in term.parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad
    assert all(x.grad is None for x in leaves(teacher))


@pytest.mark.parametrize("variant", names("parts"))
def test_parts_of_a_batch_add_up_to_the_batch(variant: str) -> None:
    """Parts of unequal numbers of void pixels, given the whole batch's denominators: a mean of means is not it."""
    term = objective(variant).double().eval()
    student, teacher, labels = answers(4)
    labels[0] = VOID
    labels[1, 2:] = VOID
    whole, values = term(student, teacher, labels)
    expected = gradients(whole, student)
    name = CASES[variant].name

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


@pytest.mark.parametrize("variant", CASES)
def test_outside_its_window_a_term_only_touches_its_parameters(variant: str) -> None:
    """DDP waits for the gradient of each parameter at each step, so it gets one, of zeros; no teacher is asked."""
    case = CASES[variant]
    options = {**case.options, "start": 2, "until": 4}
    config = LossConfig(**({"cross_entropy": None} | {case.name: CONFIGS[case.name](weight=1.0, **options)}))
    made = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, classes=CLASSES, class_weights=lambda _: WEIGHTS)
    term = stepped(made)
    student, teacher, labels = answers()
    for step, inside in ((1, False), (2, True), (3, True), (4, False)):
        asked = term.needs_teacher(step)
        assert asked == (inside and not case.supervised)
        assert term.teacher_taps_at(step) == (term.teacher_taps if inside else [])
        loss, values = term.double()(student, teacher if asked else None, labels, step=step)
        assert (set(values) == {case.name}) == inside
        assert (float(loss) != 0) == inside
        for parameter in (p for p in term.parameters() if p.requires_grad):
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            assert gradient.any() == inside
        torch.autograd.grad(loss, student.logits)  # reaches the classifier at every step


@pytest.mark.parametrize("variant", [name for name, case in CASES.items() if not case.supervised])
def test_a_term_without_a_teacher(variant: str) -> None:
    case = CASES[variant]
    config = LossConfig(**{case.name: CONFIGS[case.name](**case.options)})
    with pytest.raises(
        ConfigurationError, match=f"losses.{case.name}: compares with a teacher, and there is none"
    ):
        DistillationLoss(config, STUDENT_TAPS, classes=CLASSES, class_weights=lambda _: WEIGHTS)


@pytest.mark.parametrize("variant", CASES)
def test_golden(variant: str) -> None:
    """Value and gradient norm on a stored input, so that no change of the arithmetic goes unnoticed."""
    stored = json.loads(GOLDEN.read_text())
    assert variant in stored, f"not in {GOLDEN.name}; python tests/catalogue/golden.py adds it"
    found = measure(variant)
    for key, value in stored[variant].items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-15), key


def test_golden_holds_the_catalogue() -> None:
    assert set(json.loads(GOLDEN.read_text())) == set(CASES)


def test_every_term_is_in_the_catalogue() -> None:
    optional = {field.name for field in fields(LossConfig)} & set(CONFIGS)
    assert optional == set(CONFIGS)
    assert {case.name for case in CASES.values()} == set(CONFIGS)
