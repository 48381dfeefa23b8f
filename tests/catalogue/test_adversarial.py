"""The critic and the student that it judges."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, STUDENT_TAPS, TEACHER_TAPS, Answer, answers, changed
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.adversarial import Critic, CriticLearner, Holistic, HolisticConfig, gradient_penalty
from losses.term import Context


def players(total_steps: int = 10, **options: Any) -> tuple[DistillationLoss, CriticLearner]:
    """The objective with a critic whose attention is switched on, and the critic's learner."""
    torch.manual_seed(0)
    config = LossConfig(cross_entropy=None, holistic=HolisticConfig(critic_width=4, **options))
    objective = DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, classes=CLASSES, total_steps=total_steps)
    (learner,) = objective.make_opponents()
    assert isinstance(learner, CriticLearner)
    torch.nn.init.constant_(learner.model.attention.gain, 0.5)
    return objective.double(), learner.double()


def seen(batch: int = 2) -> tuple[Answer, Answer, Tensor, Tensor]:
    student, teacher, labels = answers(batch)
    return student, teacher, labels, torch.randn(batch, 3, *labels.shape[1:], dtype=torch.float64)


def direct(learner: CriticLearner, images: Tensor, student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """WGAN-GP as it is written down, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    shares = torch.rand(len(images), 1, 1, 1, dtype=torch.float64)
    for i in range(len(images)):
        one = slice(i, i + 1)
        ours, theirs = student[one].softmax(1), teacher[one].softmax(1)
        between = (shares[i] * theirs + (1 - shares[i]) * ours).detach().requires_grad_()
        (slope,) = torch.autograd.grad(learner.model(images[one], between).sum(), between, create_graph=True)
        total = total + weight * (slope.norm() - 1) ** 2
        total = total + (learner.model(images[one], ours) - learner.model(images[one], theirs)).sum()
    return total / len(images)


def test_the_critics_loss() -> None:
    """Value, gradient with respect to the critic, and the same from parts of the batch."""
    objective, learner = players(gradient_penalty=7.0)
    student, teacher, labels, images = seen(4)
    parameters = list(learner.parameters())
    objective(student, teacher, labels, images=images)
    torch.manual_seed(3)
    loss, values = learner(images, labels, None, 0, learner.counts(labels))
    torch.manual_seed(3)
    expected = direct(learner, images, student.logits.detach(), teacher.logits.detach(), 7.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, parameters)
    for ours, theirs in zip(found, torch.autograd.grad(expected, parameters, materialize_grads=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.detach(), 7.0 * values["penalty"] - values["distance"])

    shares = iter(
        torch.rand(4, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).split((1, 3))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: next(shares))
        total = torch.zeros((), dtype=torch.float64)
        parts = (slice(0, 1), slice(1, 4))
        for part in parts:  # the student's parts first, then the critic's, as the loop does
            ours, theirs = (changed(answer, lambda x, part=part: x[part]) for answer in (student, teacher))
            objective(ours, theirs, labels[part], images=images[part], denominators=objective.counts(labels))
        for part in parts:
            total = total + learner(images[part], labels[part], None, 0, learner.counts(labels))[0]
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    assert not objective.terms["holistic"].parts


def test_who_moves_whom() -> None:
    """The student's loss gives the critic no gradient, the critic's gives the student none."""
    objective, learner = players()
    student, teacher, labels, images = seen()
    assert not list(objective.parameters())
    assert not [name for name in objective.state_dict() if "critic" in name or "hidden" in name]
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    loss, _ = objective(student, teacher, labels, images=images)
    loss.backward()
    assert student.logits.grad is not None
    assert student.logits.grad.any()
    assert all(parameter.grad is None for parameter in learner.parameters())
    student.logits.grad = None
    loss, _ = learner(images, labels, None, 0, learner.counts(labels))
    loss.backward()
    assert student.logits.grad is None
    assert teacher.logits.grad is None
    assert all(parameter.grad is not None for parameter in learner.parameters())
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_student_sees_the_critic_as_it_is_now() -> None:
    """A step of the critic changes the term's value; the value is minus its mean score."""
    objective, learner = players()
    student, teacher, labels, images = seen()
    for _ in range(2):
        loss, _ = objective(student, teacher, labels, images=images)
        torch.testing.assert_close(loss, -0.1 * learner.model(images, student.logits.softmax(1)).mean())
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_a_critic_learns_to_tell_them_apart() -> None:
    """With its own optimizer's options; then the student's gradient leads to maps it takes for the teacher's."""
    objective, learner = players()
    student, teacher, labels, images = seen(4)
    assert set(learner.options) == {"optimizer", "lr", "betas", "weight_decay", "clip", "ema"}
    optimizer = torch.optim.AdamW(learner.parameters(), 5e-3, betas=learner.options["betas"], weight_decay=0.0)
    distances = []
    for _ in range(40):
        objective(student, teacher, labels, images=images)
        loss, values = learner(images, labels, None, 0, learner.counts(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(float(values["distance"]))
    assert distances[-1] > max(0.05, 5 * abs(distances[0]))
    loss, _ = objective(student, teacher, labels, images=images)
    (gradient,) = torch.autograd.grad(loss, student.logits)
    moved = Answer((student.logits - 1e-2 * gradient / gradient.abs().max()).detach())
    assert objective(moved, teacher, labels, images=images)[0] < loss


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True] * 10),
        ({"weight": 0.0}, [False] * 10),
        ({"start": 0.3, "until": 7}, [False] * 3 + [True] * 4 + [False] * 3),
    ],
)
def test_a_critic_out_of_force_does_not_learn(options: dict[str, Any], expected: list[bool]) -> None:
    """Nor is anything remembered for it."""
    objective, learner = players(**options)
    student, teacher, labels, images = seen()
    assert [learner.active(step) for step in range(10)] == expected
    for step in range(10):
        objective(student, teacher, labels, images=images, step=step)
    assert len(objective.terms["holistic"].parts) == sum(expected)


def test_nothing_is_remembered_without_a_learner() -> None:
    """Nor in eval mode: what nobody takes would pile up."""
    student, teacher, labels, images = seen()
    term = Holistic(HolisticConfig(critic_width=4), Context(STUDENT_TAPS, TEACHER_TAPS, CLASSES))
    term(student, teacher, labels, torch.tensor(2.0), images=images)
    term.opponent(HolisticConfig(critic_width=4), 10)
    term.eval()(student, teacher, labels, torch.tensor(2.0), images=images)
    assert not term.parts


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (33, 16)])
def test_critic_of_any_size(size: tuple[int, int]) -> None:
    """Finite, its penalty's gradient too, in float32 under autocast; all three maps of another size."""
    torch.manual_seed(0)
    term = Holistic(HolisticConfig(critic_width=4), Context(STUDENT_TAPS, TEACHER_TAPS, CLASSES))
    learner = term.opponent(HolisticConfig(critic_width=4), 10)
    logits = torch.randn(2, CLASSES, *size, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(2, CLASSES, 2 * size[0], size[1])
    images, labels = torch.randn(2, 3, 4 * size[0], 4 * size[1]), torch.zeros(2, 4, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(Answer(logits), Answer(teacher), labels, torch.tensor(2.0), images=images)
        critics, _ = learner(images, labels, None, 0, learner.counts(labels))
    assert loss.dtype == critics.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    for found in torch.autograd.grad(critics, list(learner.parameters())):
        assert torch.isfinite(found).all()


def test_penalty_of_a_flat_critic() -> None:
    """A slope of 0 costs 1, and its root gives no NaN."""
    critic = Critic(CLASSES, 2)
    for parameter in critic.parameters():
        torch.nn.init.zeros_(parameter)
    student, teacher = (torch.rand(3, CLASSES, 4, 4) for _ in range(2))
    penalty = gradient_penalty(critic, torch.rand(3, 3, 4, 4), student, teacher)
    torch.testing.assert_close(penalty, torch.ones(3))
    for gradient in torch.autograd.grad(penalty.sum(), list(critic.parameters()), materialize_grads=True):
        assert torch.isfinite(gradient).all()


def test_attention_is_that_of_torch() -> None:
    """Each position's value is the mean of all values by its query's likeness to their keys."""
    torch.manual_seed(0)
    attention = Critic(CLASSES, 2).attention.double()
    torch.nn.init.constant_(attention.gain, 0.7)
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    query, key, value = (make(x).flatten(2).mT for make in (attention.query, attention.key, attention.value))
    taken = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    torch.testing.assert_close(attention(x), x + 0.7 * taken.mT.reshape(x.shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HolisticConfig(gradient_penalty=-1.0), "losses.holistic.gradient_penalty: -1.0 is negative"),
        (lambda: HolisticConfig(critic_width=0), "losses.holistic.critic_width: 0 is too small"),
        (lambda: HolisticConfig(critic_lr=0.0), "losses.holistic.critic_lr: 0.0 is not positive"),
        (lambda: HolisticConfig(critic_betas=[0.9]), "losses.holistic.critic_betas: .* is not two decays"),
        (
            lambda: DistillationLoss(LossConfig(holistic=HolisticConfig()), STUDENT_TAPS, TEACHER_TAPS),
            "losses.holistic: needs the number of classes",
        ),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
