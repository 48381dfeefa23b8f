"""The README's examples run as they stand, each in under 20 lines of code."""

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def example(heading: str) -> dict[str, Any]:
    """The names that the example under a heading defines."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(lines) < 20
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, heading, "exec"), names)
    return names


def test_what_is_linked_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_own_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    for i in range(3):
        image = np.full((80, 96, 3), 40 * i, np.uint8)
        mask = np.full((80, 96), i % 2, np.uint8)
        mask[0] = 255
        cv2.imwrite(str(tmp_path / "images" / "train" / f"{i}.png"), image)
        cv2.imwrite(str(tmp_path / "masks" / "train" / f"{i}.png"), mask)
    data = example("Your own data set")["my_data"](tmp_path, "train")
    assert data.label_counts()[:, -1].tolist() == [96, 96, 96]
    batch = next(iter(data.train_loader(batch_size=2, seed=0, start_step=0, steps=1)))
    assert batch.images.shape == (2, 3, 64, 64)


def test_own_model(tmp_path: Path) -> None:
    tiny = example("Your own model")["Tiny"]
    model = tiny(["road", "other"], width=4)
    output = model(torch.randn(2, 3, 32, 48), taps=["encoder.0"])
    assert output.logits.shape == (2, 2, 8, 12)
    assert output.features["encoder.0"].shape == (2, 4, 8, 12)
    model.save_pretrained(tmp_path)
    again = tiny.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images).logits, model(images).logits)


def test_own_loss() -> None:
    names = example("Your own loss")
    model = example("Your own model")["Tiny"](["road", "other"])
    objective = names["objective"](model.taps)
    labels = torch.randint(0, 2, (2, 32, 32))
    output = model(torch.randn(2, 3, 32, 32))
    before, early = objective(output, None, labels, step=0)
    after, late = objective(output, None, labels, step=500)
    assert set(early) == {"cross_entropy"}
    assert set(late) == {"cross_entropy", "smoothness"}
    expected = output.logits.diff(dim=-1).abs().mean()
    assert torch.allclose(late["smoothness"], expected)
    assert torch.allclose(after - before, 0.1 * expected)
