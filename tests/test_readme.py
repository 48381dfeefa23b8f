"""The README's examples run as they stand, each in under 20 lines; links and commands of all pages hold."""

import re
import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import compress
import distill
import evaluate
import inspect_data
import predict
import profile_latency
import search_student
import train_teacher
from deploy.exported import RUNTIMES
from engine.config import list_keys, parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PARADIGMS = (ROOT / "docs/paradigms.md").read_text()
SCRIPTS = {
    "train_teacher": (train_teacher, None),
    "distill": (distill, "teacher.run"),
    "evaluate": (evaluate, "runs"),
    "inspect_data": (inspect_data, None),
    "compress": (compress, "model"),
    "search_student": (search_student, "teacher.run"),
    "profile_latency": (profile_latency, "runs"),
    "predict": (predict, "run"),
}
FILES = (".yaml", *RUNTIMES)  # that a command names among the runs


def example(heading: str) -> dict[str, Any]:
    """The names that the example under a heading defines."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(lines) < 20
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, heading, "exec"), names)
    return names


def anchors(page: Path) -> set[str]:
    """What a link to a part of a page may name: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_is_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands() -> list[str]:
    """The commands in the pages' blocks, and those by which configurations say how they are used."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    heads = [path.read_text() for path in sorted(ROOT.glob("configs/**/*.yaml"))]
    lines = [line.removeprefix("#").strip() for text in (*blocks, *heads) for line in text.splitlines()]
    return sorted(
        {line for line in lines if re.match(rf"python ({'|'.join(SCRIPTS)})\.py ", line) and "…" not in line}
    )


def test_commands_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is there, and every key and value is one; the runs that are named need not be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    found = commands()
    assert len(found) > 30
    for command in found:
        _, script, *arguments = shlex.split(command, comments=True)
        for named in (tmp_path / argument for argument in arguments if argument.startswith("runs/")):
            if named.suffix in FILES:
                named.parent.mkdir(parents=True, exist_ok=True)
                named.write_text("{}")
            else:
                (named / "best").mkdir(parents=True, exist_ok=True)
        module, runs = SCRIPTS[script.removesuffix(".py")]
        parse(module.Config, arguments, runs=runs, files=tuple(RUNTIMES))


def test_paradigms_have_their_commands() -> None:
    """Each file of configs/paradigms/ is named, each command has its own run, each key of the table is one."""
    for path in (ROOT / "configs/paradigms").glob("*.yaml"):
        assert f"configs/paradigms/{path.name}" in PARADIGMS, path.name
    runs = re.findall(r"run_dir=(\S+)", PARADIGMS)
    assert len(runs) == len(set(runs)) > 15
    keys = {key.name for key in list_keys(distill.Config)}
    for row in re.findall(r"^\| \[.*", PARADIGMS, flags=re.MULTILINE):
        for word in re.findall(r"`([^`]+)`", row.split("|")[2]):
            name = word.partition("=")[0].removeprefix(".")
            assert any(key == name or key.endswith(f".{name}") for key in keys), word


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
    assert torch.allclose(after - before, 0.1 * expected, atol=1e-6)  # both are near 1, in float32
