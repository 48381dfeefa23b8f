"""Distillation of logits, value by value."""

import pytest
import torch
import torch.nn.functional as F
from cases import VOID
from plain import logits_and_labels

from losses.features import attention_transfer, fitnet
from losses.logits import kl_divergence
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
