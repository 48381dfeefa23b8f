"""Distillation of relations, value by value."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.relations import affinity


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
