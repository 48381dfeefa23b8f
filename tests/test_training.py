"""What a step does with a loss that is not finite, with a teacher, and with its learning rate."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from forks import Forks
from torch import nn

from engine.player import TrainConfig, keep_dilated_depthwise_in_full_precision, learning_rate
from engine.teachers import LiveTeacher, TeacherConfig
from models.unet import UNet

TINY = [
    "data.size=[32,64]",
    "data.scenes=8",
    "model.width=4",
    "model.depth=2",
    "train.batch_size=4",
    "train.steps=6",
    "train.log_every=1",
    "train.warmup=0",
]
EXPLODING = [*TINY, "train.lr=1e30", "train.clip=0", "train.ema=0.5"]


def test_gradients_of_dilated_depthwise_convolutions_in_bf16() -> None:
    """As a player sets up a model; PyTorch's own are wrong on CPUs with bf16 units."""
    torch.manual_seed(0)
    images = torch.randn(4, 32, 60, 80).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32),
        nn.Conv2d(32, 32, (1, 3), padding=(0, 4), dilation=4, groups=32),
        nn.Conv2d(32, 8, 3, padding=2, dilation=2),
    ).to(memory_format=torch.channels_last)
    exact = torch.autograd.grad(model(images).square().mean(), list(model.parameters()))
    keep_dilated_depthwise_in_full_precision(model)
    assert [type(part) is nn.Conv2d for part in model] == [False, False, True]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), exact, strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_a_loss_that_is_not_finite_stops_the_run(forks: Forks, tmp_path: Path) -> None:
    outcome = forks.script("train_teacher.py", f"run_dir={tmp_path / 'run'}", *EXPLODING)
    assert outcome.code == 4
    errors = [line for line in outcome.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(
        "error: losses: not finite at step 2 (loss nan, cross_entropy nan, gradient norm nan)"
    )
    assert "Traceback" not in outcome.text


def test_or_is_skipped_and_counted(forks: Forks, tmp_path: Path) -> None:
    """The skipped step leaves nothing behind: no weight, moment, average or batch statistic that is not finite."""
    run = tmp_path / "run"
    outcome = forks.script("train_teacher.py", f"run_dir={run}", *EXPLODING, "train.on_nonfinite=skip")
    assert outcome.code == 0, outcome.text
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if line["split"] == "train"] == [0, 1, 1, 1, 1, 1]
    state = torch.load(run / "checkpoints/step_00000006/state.pt", weights_only=True)["players"][0]
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    for value in [*state["learner"].values(), *state["ema"].values(), *moments]:
        assert torch.isfinite(value).all()
    assert float(state["ema"]["n_averaged"]) == 1


def test_mixed_precision_trains(forks: Forks, tmp_path: Path) -> None:
    """bf16, with all terms, by a teacher that is trained in it too; fp16 needs a GPU and says so."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    outcome = forks.script("train_teacher.py", f"run_dir={teacher}", *TINY, "train.precision=bf16")
    assert outcome.code == 0, outcome.text
    student = [setting.replace("model.", "student.") for setting in TINY]
    terms = ["fitnet.weight=1", "affinity.weight=1", "attention_transfer.weight=10", "kd.temperature=2"]
    settings = [*student, *(f"losses.{term}" for term in terms), "train.precision=bf16"]
    outcome = forks.script("distill.py", str(teacher), f"run_dir={run}", *settings)
    assert outcome.code == 0, outcome.text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[5])
    assert all(math.isfinite(last[name]) for name in ("cross_entropy", "kd", "fitnet", "affinity"))
    if not torch.cuda.is_available():
        outcome = forks.script("train_teacher.py", f"run_dir={tmp_path / 'fp16'}", *TINY, "train.precision=fp16")
        assert outcome.code == 2
        assert "error: train.precision: fp16 needs a CUDA GPU" in outcome.text


def test_live_teacher_is_frozen() -> None:
    """In eval mode whatever it was, without gradients; its batch statistics stay."""
    model = UNet(["a", "b"], 4, 1, 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = LiveTeacher([model], torch.device("cpu"), nullcontext, TeacherConfig())
    answer = teacher.answer(torch.randn(2, 3, 16, 16), ["bottleneck"])
    assert not answer.logits.requires_grad
    assert not answer.features["bottleneck"].requires_grad
    assert not answer.logits.is_inference()  # or a backward pass could not save it
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 0}, {0: 1.0, 50: 0.5**0.9, 99: 0.01**0.9}),
        ({"warmup": 4}, {0: 0.25, 3: 1.0, 4: 1.0, 52: 0.5**0.9}),
        ({"warmup": 0.5}, {0: 0.02, 49: 1.0, 50: 1.0, 75: 0.5**0.9}),
        ({"warmup": 1.0}, {99: 1.0}),
        ({"warmup": 0, "schedule": "cosine"}, {0: 1.0, 50: 0.5, 25: 0.5 + 0.5**1.5}),
        ({"warmup": 0, "power": 2.0}, {50: 0.25}),
    ],
    ids=str,
)
def test_learning_rate(options: dict[str, float], expected: dict[int, float]) -> None:
    config = TrainConfig(lr=2.0, **options)  # type: ignore[arg-type]
    for step, share in expected.items():
        assert learning_rate(step, 100, config) == pytest.approx(2 * share)
