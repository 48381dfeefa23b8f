"""What a step of offline distillation costs, against a plain step and a teacher's forward pass added up.

python benchmarks/step_time.py [precision=bf16] [key=value ...]

Three things take turns in every round, in one process, made of the parts that distill.py is made of: a step with
cross-entropy alone, the teacher's answer alone, a step with cross-entropy and KD of a live teacher. The data is
random and loaded already, so what is compared is the work of a step.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any, Literal

import torch
from accelerate.utils import tqdm
from common import publish

from data import CAMVID
from deploy.profiling import measure_latency
from engine.config import run_script
from engine.loop import train_step
from engine.player import Learner, Player, TrainConfig
from engine.run import start_accelerator
from engine.teachers import LiveTeacher, TeacherConfig
from evaluation.report import significant, table
from losses import DistillationLoss, LossConfig
from losses.logits import KDConfig
from models import ModelConfig, build_model

GOAL = 1.10


@dataclass
class Config:
    """What benchmarks/step_time.py can be told."""

    teacher: ModelConfig = field(default_factory=lambda: ModelConfig(width=48))
    """The teacher."""
    student: ModelConfig = field(default_factory=lambda: ModelConfig(width=16))
    """The student."""
    batch: int = 8
    """Images of a step."""
    size: list[int] = field(default_factory=lambda: [240, 320])
    """[height, width] of the images."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic, as in train.precision."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    rounds: int = 15
    """Timed rounds."""
    warmup: int = 2
    """Rounds before them that are not counted."""
    output: str = "results/step_time.md"
    """Where the table is written."""


def make_batch(config: Config, classes: int, device: torch.device) -> Any:
    """Random images and labels, a tenth of the pixels void."""
    shape = (config.batch, *config.size)
    labels = torch.randint(classes, shape)
    labels[torch.rand(shape) < 0.1] = 255
    images = torch.randn(config.batch, 3, *config.size).contiguous(memory_format=torch.channels_last)
    return SimpleNamespace(images=images.to(device), labels=labels.to(device))


def main(config: Config) -> None:
    torch.manual_seed(0)
    train = TrainConfig(precision=config.precision, threads=config.threads)
    accelerator = start_accelerator(train)
    device = accelerator.device
    run: Any = SimpleNamespace(accelerator=accelerator, seed=0, terminated=False)
    batch = make_batch(config, len(CAMVID), device)
    teacher = build_model(config.teacher, CAMVID)

    live = LiveTeacher([teacher], device, accelerator.autocast, TeacherConfig())

    def player(losses: LossConfig) -> Player:
        student = build_model(config.student, CAMVID)
        objective = DistillationLoss(losses, student.taps, teacher.taps)
        return Player(Learner(student, objective, live), train, accelerator)

    plain, distilled = player(LossConfig()), player(LossConfig(kd=KDConfig(temperature=2.0)))
    total = config.warmup + config.rounds

    def steps(player: Player) -> Callable[[], None]:
        step = count()
        return lambda: wait(train_step(run, player, [batch], next(step), total))

    def wait(done: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    parts = {
        "plain step": steps(plain),
        "teacher forward": lambda: wait(live.answer(batch.images, ())),
        "KD step": steps(distilled),
    }
    with tqdm(total=total, unit="round", dynamic_ncols=True) as bar:
        times = measure_latency(parts, rounds=config.rounds, warmup=config.warmup, progress=bar.update)

    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["KD step"] / (medians["plain step"] + medians["teacher forward"])
    by_round = statistics.median(kd / (one + two) for one, two, kd in zip(*times.values(), strict=True))
    rows = [
        {"part": name, "median ms": significant(medians[name]), "least ms": significant(min(values))}
        for name, values in times.items()
    ]
    text = f"""# Step time of offline distillation

Teacher of width {config.teacher.width}, student of width {config.student.width}, batch {config.batch} of \
{config.size[0]}×{config.size[1]}, {config.precision}; {config.rounds} rounds in which the three took turns.

{table(rows)}

KD step / (plain step + teacher forward): {ratio:.3f} of the medians, {by_round:.3f} as the median over rounds.
Goal: at most {GOAL:.2f}: {"reached" if ratio <= GOAL else "missed"}.
"""
    publish(text, config.output, torch.cuda.get_device_name(device) if device.type == "cuda" else "")


if __name__ == "__main__":
    run_script(main, Config)
