"""The Triton kernel against the form by blocks, on a GPU or in Triton's interpreter.

Without a GPU: pip install triton, then TRITON_INTERPRET=1 python -m pytest tests/catalogue/test_triton.py
"""

import importlib.util
import os
from typing import Any

import pytest
import torch

from losses import upsampled
from losses.upsampled import upsampled_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25])
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, and TRITON_INTERPRET is not 1"
    ),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 0.7, "kl_weight": 1.3, "temperature": 2.0},
        {"ce_weight": 0.0, "kl_weight": 1.0},
        {"label_smoothing": 0.1, "class_weights": WEIGHTS, "kl_weight": 0.5, "kl_class_weights": WEIGHTS},
    ],
    ids=str,
)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("native", "size", "teacher"),
    [
        ((5, 7), (20, 28), (5, 7)),
        ((5, 7), (17, 150), (9, 4)),
        ((6, 40), (24, 160), (3, 20)),
        ((1, 1), (3, 5), (2, 2)),
    ],
)
def test_same_as_by_blocks(
    monkeypatch: pytest.MonkeyPatch,
    native: tuple[int, int],
    size: tuple[int, int],
    teacher: tuple[int, int],
    align_corners: bool,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, *native).to(DEVICE), torch.randn(2, 5, *teacher).to(DEVICE)
    labels = torch.randint(0, 5, (2, *size)).to(DEVICE)
    labels[torch.rand(labels.shape) < 0.2] = 255
    moved = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    found = []
    for in_one_kernel in (False, True):
        monkeypatch.setattr(upsampled, "TRITON", in_one_kernel)
        assert upsampled.in_one_kernel(ours) == in_one_kernel
        leaf = ours.clone().requires_grad_()
        loss, values = upsampled_loss(leaf, labels, theirs, align_corners=align_corners, **moved)
        found.append((loss, values, torch.autograd.grad(loss, leaf)[0]))
    (loss, values, gradient), (kernel_loss, kernel_values, kernel_gradient) = found
    torch.testing.assert_close(kernel_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernel_values, values, rtol=1e-5, atol=1e-6)
    assert float((kernel_gradient - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())


def test_not_where_sums_must_be_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsampled, "TRITON", True)
    logits = torch.zeros(1, 2, 3, 3, device=DEVICE)
    assert upsampled.in_one_kernel(logits)
    assert not upsampled.in_one_kernel(logits.double())
    torch.use_deterministic_algorithms(True)
    try:
        assert not upsampled.in_one_kernel(logits)
    finally:
        torch.use_deterministic_algorithms(False)
