"""Teachers beside, before and within the training: what they answer, whom they hear, and when they are asked."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.loop import at_resolution, train_step
from engine.player import Learner, Player, TrainConfig, resolution
from engine.run import start_accelerator
from engine.teachers import (
    Answer,
    LiveTeacher,
    OwnTeacher,
    PeerTeacher,
    TeacherConfig,
    average,
    consult,
    in_eval_mode,
    perturbed,
)
from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.features import FitnetConfig
from losses.logits import KDConfig
from models.unet import UNet

CLASSES = ["a", "b", "c"]
CPU = torch.device("cpu")


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 24, generator=generator)
    return Batch(images, torch.randint(0, 3, (2, 16, 24), generator=generator))


def unet(seed: int, width: int = 4) -> UNet:
    torch.manual_seed(seed)
    model = UNet(CLASSES, width, 1, 4)
    nn.init.normal_(model.classifier.weight)
    return model


def live(*models: nn.Module, **config: Any) -> LiveTeacher:
    return LiveTeacher(models, CPU, nullcontext, TeacherConfig(run="runs/teacher", **config))


def learner(model: UNet, teacher_taps: Any, losses: LossConfig | None = None, **options: Any) -> Learner:
    losses = losses or LossConfig(kd=KDConfig())
    return Learner(model, DistillationLoss(losses, model.taps, teacher_taps, total_steps=8), **options)


def run_of(accelerator: Any) -> Any:
    return SimpleNamespace(accelerator=accelerator, seed=0, terminated=False)


# ------------------------------------------------------------------------------------------------ averaging


def test_average_is_of_probabilities() -> None:
    one, other = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).float()
    expected = (one.softmax(1) + other.softmax(1)) / 2
    torch.testing.assert_close(average([one, other + 7.0], "mean").softmax(1), expected)
    torch.testing.assert_close(average([one, other], "mean").logsumexp(1), torch.zeros(2, 4, 5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("averaging", ["entropy", "agreement"])
def test_weights_of_an_average(averaging: str) -> None:
    """By hand at one pixel: exp of minus the entropy, or of minus the divergence from the mean."""
    ps = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    mean = ps.mean(0)
    doubts = [-(p * p.log()).sum() if averaging == "entropy" else (p * (p / mean).log()).sum() for p in ps]
    weights = torch.stack([(-doubt).exp() for doubt in doubts])
    weights = weights / weights.sum()
    expected = (weights[:, None] * ps).sum(0)
    assert not torch.allclose(expected, mean, atol=1e-3)
    found = average([p.log().float().view(1, 3, 1, 1) for p in ps], averaging).softmax(1).flatten()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_mean_of_fellows_has_the_gradient_of_mutual_learning() -> None:
    """KL from the mean of fellows and the mean of their KLs (Zhang et al. 2018, eq. 7) pull alike at T = 1."""
    student = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    fellows = [torch.randn(1, 3, 2, 2, dtype=torch.float64) for _ in range(3)]
    log_p = student.log_softmax(1)
    one = F.kl_div(log_p, sum(f.softmax(1) for f in fellows) / 3, reduction="sum")
    several = sum(F.kl_div(log_p, f.softmax(1), reduction="sum") for f in fellows) / 3
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (one, several)]
    torch.testing.assert_close(*gradients)
    found = average([f.float() for f in fellows], "mean").softmax(1)
    torch.testing.assert_close(found.double(), sum(f.softmax(1) for f in fellows) / 3, atol=1e-6, rtol=0)


def test_views_are_averaged() -> None:
    """Of an image and its mirror image, at two sizes, by two models; features are those of the first alone."""
    models, images = [unet(1).eval(), unet(2, 6).eval()], batch().images
    plain = live(models[0]).answer(images, ["bottleneck"])
    assert torch.equal(plain.logits, models[0](images).logits)

    mirrored = live(models[0], flip=True).answer(images, ["bottleneck"])
    back = models[0](images.flip(-1)).logits.flip(-1)
    expected = (plain.logits.softmax(1) + back.softmax(1)) / 2
    torch.testing.assert_close(mirrored.logits.softmax(1), expected)
    assert torch.equal(mirrored.features["bottleneck"], plain.features["bottleneck"])
    again = live(models[0], flip=True).answer(images.flip(-1), []).logits.flip(-1)
    torch.testing.assert_close(again.softmax(1), expected)

    large = F.interpolate(images, (32, 48), mode="bilinear")
    far = F.interpolate(models[1](large).logits, (4, 6), mode="bilinear", antialias=True).softmax(1)
    near = models[1](images).logits.softmax(1)
    theirs = F.interpolate(models[0](large).logits, (4, 6), mode="bilinear", antialias=True).softmax(1)
    answer = live(*models, scales=[1.0, 2.0]).answer(images, [])
    torch.testing.assert_close(answer.logits.softmax(1), (plain.logits.softmax(1) + theirs + near + far) / 4)
    assert consult(models[:1], images, [], TeacherConfig(scales=[2.0])).logits.shape[-2:] == (4, 6)


# ------------------------------------------------------------------------------------------- own and fellow


def test_the_average_teaches() -> None:
    """By the averaged weights, in eval mode; the learner's own mode stays."""
    accelerator = start_accelerator(TrainConfig(threads=1))
    model = unet(1)
    teacher = OwnTeacher(nullcontext, TeacherConfig(source="average"))
    player = Player(learner(model, model.taps, teacher=teacher), TrainConfig(ema=0.5, threads=1), accelerator)
    assert player.ema is not None
    with torch.no_grad():
        for parameter in player.ema.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    player.wrapped.train()
    answer = teacher(batch(), [])
    assert torch.equal(answer.logits, player.ema.module.eval()(batch().images).logits)
    assert not torch.equal(answer.logits, model.eval()(batch().images).logits)
    itself = OwnTeacher(nullcontext, TeacherConfig(source="itself"))
    itself.player = player
    model.train()
    assert torch.equal(itself(batch(), []).logits, model.eval()(batch().images).logits)


def test_eval_mode_is_left_as_it_was() -> None:
    model = unet(1).train()
    model.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {False, True}


def fellows(simultaneous: bool, accelerate: int = 1) -> tuple[list[Player], Any, list[Batch]]:
    """A student and its teacher, which learns beside it."""
    accelerator = start_accelerator(TrainConfig(threads=1))
    student, fellow = unet(1), unet(2)
    losses = LossConfig(kd=KDConfig(), fitnet=FitnetConfig(taps=["bottleneck"]))
    teacher = learner(fellow, student.taps, LossConfig(), name="teacher")
    pupil = learner(student, fellow.taps, losses, teacher=PeerTeacher([teacher], nullcontext, TeacherConfig()))
    if simultaneous:
        teacher.tells = pupil.objective.teacher_taps
    config = TrainConfig(threads=1, lr=0.1, warmup=0, accumulate=accelerate)
    players = [Player(one, config, accelerator) for one in (teacher, pupil)]
    return players, run_of(accelerator), [batch(seed) for seed in range(accelerate)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_student_hears_what_its_fellow_said_before_it_changed(
    monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """In train mode, of each part; and the fellow is not run again."""
    (teacher, student), run, parts = fellows(True, accumulate)
    before = unet(2).train()
    expected = [before(part.images, ["bottleneck"]) for part in parts]
    train_step(run, teacher, parts, 0, 8)
    changed = [teacher.learner.model.classifier.weight, before.classifier.weight]
    assert not torch.equal(*changed)
    heard: list[Answer] = []
    genuine = student.learner.teacher

    def listen(part: Any, taps: Any) -> Answer:
        heard.append(genuine(part, taps))
        return heard[-1]

    student.learner.teacher = listen
    monkeypatch.setattr(teacher.learner.model, "forward", None)  # would raise if it were asked again
    train_step(run, student, parts, 0, 8)
    assert len(heard) == accumulate
    for answer, reference in zip(heard, expected, strict=True):
        torch.testing.assert_close(answer.logits, reference.logits)
        torch.testing.assert_close(answer.features["bottleneck"], reference.features["bottleneck"])
        assert not answer.logits.requires_grad


def test_a_fellow_that_has_not_stepped_answers_as_it_stands() -> None:
    """In eval mode, with its statistics untouched, also where it stepped on another batch before."""
    (teacher, student), run, parts = fellows(True)
    train_step(run, teacher, [batch(7)], 0, 8)
    model = teacher.learner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.training
    answer = student.learner.teacher(parts[0], ["bottleneck"])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(answer.logits, model.eval()(parts[0].images).logits)


def test_a_step_moves_one_learner_alone() -> None:
    (teacher, student), run, parts = fellows(True)
    for player, other in ((teacher, student), (student, teacher)):
        before = [[p.clone() for p in one.learner.parameters()] for one in (player, other)]
        train_step(run, player, parts, 0, 8)
        now = [list(one.learner.parameters()) for one in (player, other)]
        assert any(not torch.equal(a, b) for a, b in zip(before[0], now[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before[1], now[1], strict=True))


def test_a_teacher_is_asked_only_where_a_term_needs_it() -> None:
    """With the taps of the terms in force, and not at all outside their windows."""
    accelerator = start_accelerator(TrainConfig(threads=1))
    student, frozen = unet(1), unet(2)
    asked: list[list[str]] = []

    def teacher(part: Any, taps: Any) -> Any:
        asked.append(list(taps))
        return frozen(part.images, taps)

    losses = LossConfig(kd=KDConfig(start=2, until=6), fitnet=FitnetConfig(taps=["bottleneck"], start=4))
    player = Player(learner(student, frozen.taps, losses, teacher=teacher), TrainConfig(threads=1), accelerator)
    answers = []
    for step in range(8):
        train_step(run_of(accelerator), player, [batch(step)], step, 8)
        answers.append(asked.pop() if asked else None)
    assert answers == [None, None, [], [], *([["bottleneck"]] * 4)]


# ------------------------------------------------------------------------------------------------ the images


def test_perturbed_images() -> None:
    images = batch().images
    torch.testing.assert_close(perturbed(images, 0.0), images)
    torch.manual_seed(3)
    one = perturbed(images, 0.8)
    torch.manual_seed(3)
    assert torch.equal(perturbed(images, 0.8), one)
    assert not torch.equal(perturbed(images, 0.8), one)
    blank = (one == 0).all(1)
    shares = blank.float().mean((1, 2))
    assert (shares > 0).any()
    assert (shares <= 0.16 + 0.05).all()
    for image in blank[shares > 0]:  # a rectangle
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image, rows[:, None] & columns)


def test_resolution_rises_in_equal_shares() -> None:
    config = TrainConfig(resolution=[0.5, 0.75, 1.0])
    assert [resolution(step, 7, config) for step in range(7)] == [0.5, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    parts = [batch()]
    assert at_resolution(parts, 1.0) is parts
    (part,) = at_resolution(parts, 0.5)
    assert part.images.shape == (2, 3, 8, 12)
    labels = torch.arange(16)[:, None].expand(2, 16, 24) * 10 + torch.arange(24) % 10
    (part,) = at_resolution([Batch(batch().images, labels)], 0.5)
    assert part.labels.dtype == torch.int64
    assert torch.equal(part.labels, labels[:, 1::2, 1::2])
    with pytest.raises(ConfigurationError, match=r"train\.resolution: \[0\.5, 2\.0\]"):
        TrainConfig(resolution=[0.5, 2.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "average", "run": "x"}, "teacher.run: does nothing with teacher.source=average"),
        ({"source": "itself", "precision": "bf16"}, "teacher.precision: does nothing with teacher.source=itself"),
        ({"perturb": 0.5}, "teacher.perturb: is for teacher.source=average or itself"),
        ({"perturb": 2.0}, "teacher.perturb: 2.0 is no strength"),
        ({"size": [2, 3]}, "teacher.size: is for teacher.source=cache"),
        ({"scales": []}, "teacher.scales: "),
        ({"stream": True, "source": "cache"}, "teacher.stream: is for teacher.source=live"),
        ({"run": "x", "hub": "y"}, "teacher.hub: teacher.run is given too"),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TeacherConfig(**options)
    assert str(caught.value).startswith(said)
