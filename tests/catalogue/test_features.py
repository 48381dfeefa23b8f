"""Distillation of feature maps, value by value."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Answer, Shape
from plain import logits_and_labels
from torch import Tensor

from losses import DistillationLoss, LossConfig
from losses.features import FitnetConfig, attention_transfer, fitnet
from losses.logits import kl_divergence
from losses.relations import affinity


@pytest.mark.parametrize("function", [kl_divergence, affinity, attention_transfer, fitnet])
def test_functions_give_the_teacher_no_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    ours, theirs, _ = logits_and_labels((4, 4), (4, 4))
    function(ours, theirs.requires_grad_()).backward()
    assert ours.grad is not None
    assert theirs.grad is None


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
