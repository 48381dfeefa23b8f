"""Distillation of logits, value by value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, STUDENT_TAPS, TEACHER_TAPS, VOID, WEIGHTS, Shape, answers, changed
from plain import logits_and_labels
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig, blocks
from losses.features import attention_transfer, fitnet
from losses.logits import (
    BPKDConfig,
    CWDConfig,
    DISTConfig,
    DKDConfig,
    LogitStdConfig,
    WSLConfig,
    bpkd,
    channel_wise,
    dist,
    dkd,
    kl_divergence,
    logit_std,
    wsl,
)
from losses.relations import affinity
from losses.upsampled import upsampled_loss


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
    ours = torch.tensor([60.0, -60.0, 0.0], dtype=dtype).view(1, 3, 1, 1).requires_grad_()
    theirs = torch.tensor([-60.0, 60.0, 0.0], dtype=dtype).view(1, 3, 1, 1)
    mapped, _ = upsampled_loss(ours, torch.zeros(1, 2, 2, dtype=torch.int64), theirs, ce_weight=0.0, kl_weight=1.0)
    for loss in (kl_divergence(ours, theirs), mapped):
        assert float(loss.detach()) == pytest.approx(120, rel=1e-3)
        assert torch.isfinite(torch.autograd.grad(loss, ours)[0]).all()


def test_nothing_valid_is_zero() -> None:
    ours, theirs, _ = logits_and_labels((4, 4), (4, 4))
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    for function in (kl_divergence, channel_wise, dist, logit_std, affinity, attention_transfer, fitnet):
        loss = function(ours, theirs, mask=nothing)
        (gradient,) = torch.autograd.grad(loss, ours)
        assert loss == 0
        assert not gradient.any()
    void = torch.full((2, 4, 4), VOID)
    for function in (wsl, dkd, bpkd):
        loss = function(ours, theirs, void)
        assert loss == 0
        assert not torch.autograd.grad(loss, ours)[0].any()


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Between two vectors of logits."""
    p, q = teacher.softmax(0), student.softmax(0)
    return (p * (p / q).log()).sum()


def images(student: Tensor, teacher: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each image's labelled pixels as vectors: student [C, P], teacher [C, P], labels [P]."""
    found = []
    for ours, theirs, truth in zip(student, teacher, labels, strict=True):
        counted = truth != VOID
        found.append((ours[:, counted], theirs[:, counted], truth[counted]))
    return found


def plain_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    pixels = [
        4 * kl(t[:, i] / 2, s[:, i] / 2) for s, t, y in images(student, teacher, labels) for i in range(len(y))
    ]
    return torch.stack(pixels).mean()


def plain_cwd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    channels = [9 * kl(t[c] / 3, s[c] / 3) for s, t, _ in images(student, teacher, labels) for c in range(CLASSES)]
    return torch.stack(channels).mean()


def plain_dist(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    total = []
    for s, t, _ in images(student, teacher, labels):
        p, q = (s / 2).softmax(0), (t / 2).softmax(0)
        inter = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)])
        intra = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)])
        total.append(4 * (0.5 * inter.mean() + 3 * intra.mean()))
    return torch.stack(total).mean()


def plain_wsl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    pixels = []
    for s, t, y in images(student, teacher, labels):
        for i, truth in enumerate(y):
            hard = [-x[:, i].detach().softmax(0)[truth].log() for x in (s, t)]
            pixels.append((1 - (-hard[0] / (hard[1] + 1e-7)).exp()) * 9 * kl(t[:, i] / 3, s[:, i] / 3))
    return torch.stack(pixels).mean()


def plain_dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    pixels = []
    for s, t, y in images(student, teacher, labels):
        for i, truth in enumerate(y):
            p, q = (t[:, i] / 3).softmax(0), (s[:, i] / 3).softmax(0)
            pair = [torch.stack([x[truth], 1 - x[truth]]).log() for x in (p, q)]
            rest = [torch.cat([x[:truth], x[truth + 1 :]]) for x in (p.log(), q.log())]
            pixels.append(9 * (2 * kl(*pair) + 5 * kl(*rest)))
    return torch.stack(pixels).mean()


def plain_logit_std(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    def score(x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std() / 3

    pixels = [
        9 * kl(score(t[:, i]), score(s[:, i]))
        for s, t, y in images(student, teacher, labels)
        for i in range(len(y))
    ]
    return torch.stack(pixels).mean()


def plain_edges(labels: Tensor, width: int) -> Tensor:
    """[B, C, H, W], window by window."""
    edges = torch.zeros(len(labels), CLASSES, *labels.shape[1:], dtype=torch.bool)
    reach = width // 2
    for b, i, j in (labels != VOID).nonzero().tolist():
        window = labels[b, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
        near = set(window.flatten().tolist()) - {VOID}
        if len(near) > 1:
            edges[b, sorted(near), i, j] = True
    return edges


def plain_bpkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    share = WEIGHTS.double() / WEIGHTS.double().mean()
    edges, total = plain_edges(labels, 3), torch.zeros((), dtype=torch.float64)
    for b in range(len(labels)):
        for c in range(CLASSES):
            places = edges[b, c].nonzero().tolist()
            for i, j in places:
                kept = edges[b, :, i, j]
                masked = [torch.where(kept, x[b, :, i, j], 0.0) / 3 for x in (teacher, student)]
                total = total + 7 * share[c] / len(places) * 9 * kl(*masked)
            body = (labels[b] != VOID) & ~edges[b, c]
            total = total + 2 * share[c] / CLASSES * 9 * kl(teacher[b, c][body] / 3, student[b, c][body] / 3)
    return total / len(labels)


def masked(function: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda student, teacher, labels: function(student, teacher, mask=labels != VOID, **options)


def labelled(function: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda student, teacher, labels: function(student, teacher, labels, **options)


FORMS = {
    "kl": (masked(kl_divergence, temperature=2.0), plain_kl),
    "cwd": (masked(channel_wise, temperature=3.0), plain_cwd),
    "dist": (masked(dist, temperature=2.0, beta=0.5, gamma=3.0), plain_dist),
    "wsl": (labelled(wsl, temperature=3.0), plain_wsl),
    "dkd": (labelled(dkd, temperature=3.0, alpha=2.0, beta=5.0), plain_dkd),
    "logit_std": (masked(logit_std, temperature=3.0), plain_logit_std),
    "bpkd": (
        labelled(bpkd, temperature=3.0, edge=7.0, body=2.0, edge_width=3, class_weights=WEIGHTS),
        plain_bpkd,
    ),
}


@pytest.mark.parametrize("block", [1, 10**9])
@pytest.mark.parametrize(
    ("native", "size", "taught"), [((6, 8), (6, 8), (6, 8)), ((3, 4), (7, 9), (4, 5)), ((3, 4), (7, 9), (7, 9))]
)
@pytest.mark.parametrize("name", FORMS)
def test_against_the_plain_form(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    native: tuple[int, int],
    size: tuple[int, int],
    taught: tuple[int, int],
    block: int,
) -> None:
    """Value and gradient, everything at the labels' size, pixel by pixel; T² among them."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
    ours, theirs, labels = logits_and_labels(native, size, taught)
    labels[1] = VOID
    labels[1, 2:5, 1:6] = 3
    labels[1, 3, 1] = 0
    found, plain = FORMS[name]
    whole = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (ours, theirs)]
    expected, loss = plain(*whole, labels), found(ours, theirs, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6 if name == "logit_std" else 1e-9, atol=0)
    (gradient,), (pulled,) = torch.autograd.grad(expected, ours), torch.autograd.grad(loss, ours)
    tolerance = 1e-6 if name == "logit_std" else 1e-8  # the deviation has 1e-7 added to it
    assert float((pulled - gradient).abs().max()) <= tolerance * float(gradient.abs().max())


@pytest.mark.parametrize("name", [name for name in FORMS if name != "wsl"])  # its weight has no gradient
def test_gradcheck(name: str) -> None:
    ours, theirs, labels = logits_and_labels((2, 3), (5, 4), (3, 3), batch=1)
    assert torch.autograd.gradcheck(lambda x: FORMS[name][0](x, theirs, labels), (ours,))


@pytest.mark.parametrize("function", [kl_divergence, channel_wise, dist, logit_std])
def test_without_a_mask_all_of_the_students_pixels_count(function: Callable[..., Tensor]) -> None:
    ours, theirs, _ = logits_and_labels((4, 6), (4, 6))
    everything = torch.ones(2, 4, 6, dtype=torch.bool)
    torch.testing.assert_close(function(ours, theirs), function(ours, theirs, mask=everything), rtol=0, atol=0)


@pytest.mark.parametrize("function", [wsl, dkd])
def test_labels_and_a_mask(function: Callable[..., Tensor]) -> None:
    ours, theirs, labels = logits_and_labels((4, 6), (8, 12))
    mask = torch.rand(labels.shape) < 0.5
    found = function(ours, theirs, labels, mask=mask)
    torch.testing.assert_close(found, function(ours, theirs, torch.where(mask, labels, VOID)), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("function", "digits"), [(channel_wise, 2e-7), (dist, 2e-7)])
def test_a_nearly_perfect_student_in_float32(function: Callable[..., Tensor], digits: float, size: float) -> None:
    """The value is a divergence of 0 or more, not a difference of large sums of which nothing is left."""
    torch.manual_seed(0)
    theirs = 10 + 3 * torch.randn(2, 5, 32, 64)
    ours = (theirs + size * torch.randn(theirs.shape)).requires_grad_()
    mask = torch.rand(2, 64, 128) < 0.8
    loss = function(ours, theirs, mask=mask)
    precise = ours.detach().double().requires_grad_()
    expected = function(precise, theirs.double(), mask=mask)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3, abs=16 * digits)
    assert float(loss.detach()) >= 0
    (found,), (gradient,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, precise)
    assert float((found - gradient).abs().max()) < 1e-2 * float(gradient.abs().max())


def test_dist_of_classes_that_never_vary() -> None:
    """Saturated logits give a class the same probability all over: no correlation, no gradient, no NaN."""
    theirs = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    flat = torch.zeros_like(theirs).requires_grad_()
    loss = dist(flat, theirs)  # r is 0 for each pixel and class
    assert float(loss.detach()) == pytest.approx(2.0)
    assert not torch.autograd.grad(loss, flat)[0].any()
    student = theirs.clone().requires_grad_()
    loss = dist(student, torch.zeros_like(theirs))  # a teacher that has nothing to say
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()
    for dtype in (torch.float32, torch.float64):
        never = theirs.to(dtype)
        never[:, 0] = -1e5
        student = (never + torch.rand(never.shape).to(dtype)).requires_grad_()
        loss = dist(student, never)
        expected = dist(student[:, 1:], never[:, 1:], beta=0.0) * 2 / 3 + dist(student, never, gamma=0.0)
        torch.testing.assert_close(loss, expected)
        assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_dist_takes_no_rounding_for_a_variation() -> None:
    """Upsampled equal numbers are equal but for their last digits, whose norm must not be divided by."""
    flat = torch.tensor([0.1, 0.7, 1.9, 3.3])[:, None, None].expand(1, 4, 3, 5).clone().requires_grad_()
    theirs, mask = torch.randn(1, 4, 3, 5), torch.rand(1, 29, 37) < 0.7
    assert F.interpolate(flat, (29, 37), mode="bilinear").softmax(1)[0, 0].unique().numel() > 1
    loss = dist(flat, theirs, mask=mask, beta=0.0)
    assert float(loss.detach()) == 1.0
    assert not torch.autograd.grad(loss, flat)[0].any()


def test_dist_is_of_each_image() -> None:
    """The authors' correlation over the batch would change with its other images."""
    ours, theirs, _ = logits_and_labels((4, 6), (4, 6))
    alone = [dist(ours[i : i + 1], theirs[i : i + 1] * (i + 1)) for i in range(2)]
    both = dist(ours, theirs * torch.tensor([1.0, 2.0])[:, None, None, None])
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_dist_of_tiny_probabilities() -> None:
    """An epsilon beside the product of norms costs a perfect student something."""
    theirs = torch.randn(1, 3, 8, 8)
    theirs[:, 0] -= 30
    student = theirs.clone().requires_grad_()
    loss = dist(student, theirs)
    assert loss == 0
    assert float(torch.autograd.grad(loss, student)[0].abs().max()) < 1e-6
    reversed_ = theirs.clone()
    reversed_[:, 0] = -60 - theirs[:, 0]
    assert float(dist(reversed_, theirs, beta=0.0)) > 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dkd_of_extreme_logits(dtype: torch.dtype) -> None:
    """1000 below is no mask, and 1 - p is 0 long before its logarithm is."""
    ours = torch.tensor([3000.0, -3000.0, 1000.0], dtype=dtype).view(1, 3, 1, 1).requires_grad_()
    theirs = torch.tensor([2000.0, 1000.0, -3000.0], dtype=dtype).view(1, 3, 1, 1)
    loss = dkd(ours, theirs, torch.zeros(1, 1, 1, dtype=torch.int64), temperature=1.0)
    assert float(loss.detach()) == pytest.approx(8 * 4000, rel=1e-2)  # of NCKD; both are sure of the target class
    (gradient,) = torch.autograd.grad(loss, ours)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(gradient.flatten().float(), torch.tensor([0.0, -8.0, 8.0]), rtol=1e-2, atol=1e-6)


def test_dkd_adds_up_to_kd() -> None:
    """With beta = 1 - p of the teacher's target class, at one pixel, the two parts are the KL divergence."""
    ours, theirs, _ = logits_and_labels((1, 1), (1, 1), batch=1)
    label = torch.full((1, 1, 1), 2)
    beta = 1 - float((theirs / 3).softmax(1)[0, 2])
    found = dkd(ours, theirs, label, temperature=3.0, alpha=1.0, beta=beta)
    torch.testing.assert_close(found, kl_divergence(ours, theirs, temperature=3.0), rtol=1e-10, atol=0)


def test_wsl_weight() -> None:
    """0 where the student is right already, near 1 where its teacher is and it is not."""
    theirs = torch.tensor([5.0, 0.0, 0.0]).view(1, 3, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    sure = torch.tensor([50.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    wrong = torch.tensor([0.0, 9.0, 0.0]).view(1, 3, 1, 1)
    assert float(wsl(sure, theirs, label).detach()) < 1e-6
    torch.testing.assert_close(wsl(wrong, theirs, label), kl_divergence(wrong, theirs, temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logit_std_of_constant_logits(dtype: torch.dtype) -> None:
    """A deviation of 0 makes the authors' gradient NaN; rounding must not be taken for one."""
    theirs = torch.randn(1, 3, 2, 2, dtype=dtype)
    for value in (0.0, 0.1, 1e4):
        ours = torch.full_like(theirs, value).requires_grad_()
        loss = logit_std(ours, theirs)
        torch.testing.assert_close(loss, logit_std(torch.zeros_like(theirs), theirs))
        assert not torch.autograd.grad(loss, ours)[0].any()


def test_logit_std_does_not_see_range_or_offset() -> None:
    ours, theirs, _ = logits_and_labels((3, 4), (3, 4))
    torch.testing.assert_close(logit_std(5 * ours + 2, theirs), logit_std(ours, theirs), rtol=1e-6, atol=0)
    assert float(logit_std(3 * theirs - 1, theirs)) < 1e-12


def test_bpkd_edges() -> None:
    """Edges are where classes meet; the border of the image and of what is void is none."""
    labels = torch.zeros(1, 12, 12, dtype=torch.int64)
    labels[:, :, 8:] = VOID
    ours, theirs, _ = logits_and_labels((12, 12), (12, 12), batch=1)
    assert bpkd(ours, theirs, labels, body=0.0) == 0
    expected = channel_wise(ours, theirs, mask=labels != VOID)
    torch.testing.assert_close(bpkd(ours, theirs, labels, body=1.0), expected)
    labels[:, 6:] = 1
    (gradient,) = torch.autograd.grad(bpkd(ours, theirs, labels, body=0.0, edge_width=5), ours)
    reached = gradient.abs().sum((0, 3)) > 0
    assert reached[:2, 4:8].all()  # classes 0 and 1, two rows either side
    assert int(reached.sum()) == 8


def test_cwd_of_features() -> None:
    """Projected to the teacher's width first, the mean over whose channels it is; positions by nearest label."""
    student, teacher, labels = answers()
    config = LossConfig(cross_entropy=None, cwd=CWDConfig(weight=1.0, taps=["b"], temperature=2.0))
    term = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, classes=CLASSES).double()
    loss, _ = term(student, teacher, labels)
    adapter = term.terms["cwd"].adapters[0]
    assert adapter.bias is None
    features, counted = adapter(student.features["b"]), labels[:, ::4, ::4] != VOID
    channels = [
        4 * kl(t[c][m] / 2, s[c][m] / 2) if m.any() else 0 * s.sum()
        for s, t, m in zip(features, teacher.features["b"], counted, strict=True)
        for c in range(TEACHER_TAPS["b"].channels)
    ]
    torch.testing.assert_close(loss, torch.stack(channels).mean())
    assert term.student_taps == ["b"]
    assert term.describe() == ["cwd: weight 1, b, 28 parameters of its own"]


def test_cwd_of_logits_and_features_is_their_mean() -> None:
    student, teacher, labels = answers()
    values = []
    for taps in (["logits"], ["b"], ["logits", "b"]):
        torch.manual_seed(0)
        config = LossConfig(cross_entropy=None, cwd=CWDConfig(weight=1.0, taps=taps))
        term = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, classes=CLASSES).double()
        values.append(term(student, teacher, labels)[0])
    torch.testing.assert_close(values[2], (values[0] + values[1]) / 2)
    assert "logits" in term.describe()[0]


def test_weights_follow_the_classes() -> None:
    """A mean over pixels, each by the weight of its label's class."""
    student, teacher, labels = answers()
    weight = WEIGHTS.double()[torch.where(labels == VOID, 0, labels)] * (labels != VOID)
    for config, function in (
        (WSLConfig(weight=1.0, class_weights="median"), lambda *x: wsl(*x)),
        (DKDConfig(weight=1.0, class_weights="median"), lambda *x: dkd(*x)),
        (LogitStdConfig(weight=1.0, class_weights="median"), lambda s, t, y: logit_std(s, t, mask=y != VOID)),
    ):
        name = type(config).__name__.removesuffix("Config")
        objective = LossConfig(cross_entropy=None, **{"logit_std" if name == "LogitStd" else name.lower(): config})
        term = DistillationLoss(objective, STUDENT_TAPS, TEACHER_TAPS, class_weights=lambda _: WEIGHTS)
        expected = torch.zeros((), dtype=torch.float64)
        for one in range(CLASSES):
            only = torch.where(labels == one, labels, VOID)
            expected += weight[labels == one].sum() * function(student.logits, teacher.logits, only).detach()
        found, _ = term(student, teacher, labels)
        torch.testing.assert_close(found.detach(), expected / weight.sum())


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_logits_mean_over_a_teacher_of_another_stride(weight: float) -> None:
    student, teacher, labels = answers()
    coarse = changed(teacher, lambda x: x[:, :, ::2, ::2])
    config = LossConfig(cross_entropy=None, cwd=CWDConfig(weight=weight), dist=DISTConfig(weight=weight))
    term = DistillationLoss(config, {"a": Shape(3, 2)}, {"a": Shape(6, 2)}, classes=CLASSES)
    loss, values = term(student, coarse, labels)
    torch.testing.assert_close(loss.detach(), weight * (values["cwd"] + values["dist"]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CWDConfig(temperature=0.0), "losses.cwd.temperature: 0.0 is not positive"),
        (lambda: CWDConfig(taps=[]), "losses.cwd.taps: empty"),
        (lambda: DISTConfig(temperature=-1.0), "losses.dist.temperature: -1.0 is not positive"),
        (lambda: DISTConfig(gamma=-1.0), "losses.dist.gamma: -1.0 is negative; give 0 or more"),
        (lambda: WSLConfig(temperature=0.0), "losses.wsl.temperature: 0.0 is not positive"),
        (lambda: DKDConfig(beta=-8.0), "losses.dkd.beta: -8.0 is negative; give 0 or more"),
        (lambda: LogitStdConfig(temperature=0.0), "losses.logit_std.temperature: 0.0 is not positive"),
        (lambda: BPKDConfig(edge_width=4), "losses.bpkd.edge_width: 4 is not an odd number from 3; give say 7"),
        (lambda: BPKDConfig(body=-1.0), "losses.bpkd.body: -1.0 is negative; give 0 or more"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert str(caught.value).startswith(said)


def test_a_tap_that_is_not_there() -> None:
    config = LossConfig(cwd=CWDConfig(taps=["logits", "neck"]))
    with pytest.raises(ConfigurationError, match="losses.cwd.taps: the student has no tap 'neck'; name some"):
        DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS)
