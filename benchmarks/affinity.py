"""The affinity loss by Gram matrices against the direct form with its N×N matrices: python benchmarks/affinity.py

Forward and backward on one image's features, 64×128 positions, 128 student and 256 teacher channels by default.
Time: both forms in turn in every round, in one process. Memory: each form in a process of its own, the growth of
the process's peak resident memory (VmHWM) over its features and a first small call; and, apart, the peak of what
PyTorch allocated. Gradient: float32 against the direct form in float64, ‖g - g₆₄‖ / ‖g₆₄‖.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from common import measure_memory, print_memory, publish
from torch import Tensor

from deploy.profiling import measure_latency
from engine.config import run_script
from evaluation.report import significant, table
from losses.relations import affinity

GOALS = {"faster": 20.0, "smaller": 10.0, "gradient": 1e-5}


@dataclass
class Config:
    """What benchmarks/affinity.py can be told."""

    size: list[int] = field(default_factory=lambda: [64, 128])
    """[height, width] of the feature maps."""
    student_channels: int = 128
    """Channels of the student."""
    teacher_channels: int = 256
    """Channels of the teacher."""
    rounds: int = 3
    """Timed rounds."""
    threads: int = 1
    """CPU threads."""
    output: str = "results/affinity.md"
    """Where the table is written."""
    memory_of: str = ""
    """Measures the memory of this form alone (direct or Gram) and prints it as JSON: what the benchmark runs."""


def direct(student: Tensor, teacher: Tensor) -> Tensor:
    """He et al. 2019, eq. 4, as it is written: two matrices of similarities [B, N, N] and their difference."""
    unit_BSN = torch.nn.functional.normalize(student.flatten(2), dim=1)
    unit_BTN = torch.nn.functional.normalize(teacher.flatten(2), dim=1)
    difference_BNN = unit_BSN.mT @ unit_BSN - unit_BTN.mT @ unit_BTN
    return difference_BNN.square().sum((1, 2)).mean() / difference_BNN.shape[-1] ** 2


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"direct": direct, "Gram": affinity}


def gradient(form: str, student: Tensor, teacher: Tensor) -> Tensor:
    """One forward and backward; the gradient of the student's features."""
    student = student.detach().requires_grad_()
    FORMS[form](student, teacher).backward()
    assert student.grad is not None
    return student.grad


def features(config: Config) -> tuple[Tensor, Tensor]:
    """Features as after a ReLU, the student's related to the teacher's."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, config.teacher_channels, *config.size, generator=generator)
    mixing = torch.randn(config.student_channels, config.teacher_channels, generator=generator)
    student = torch.einsum("st,bthw->bshw", mixing / config.teacher_channels**0.5, teacher.relu())
    student = student + torch.randn(student.shape, generator=generator)
    return student.relu(), teacher.relu()


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    student, teacher = features(config)

    def small(form: str) -> Tensor:
        return gradient(form, student[..., :8, :8], teacher[..., :8, :8])

    if config.memory_of:
        form = config.memory_of
        print_memory(lambda: small(form), lambda: gradient(form, student, teacher))
        return
    memory = {form: measure_memory(form) for form in FORMS}
    for form in FORMS:
        small(form)
    passes = {form: partial(gradient, form, student, teacher) for form in FORMS}
    measured = measure_latency(passes, rounds=config.rounds, warmup=0)
    times = {form: statistics.median(values) for form, values in measured.items()}
    exact = gradient("direct", student.double(), teacher.double())
    errors = {
        form: float((gradient(form, student, teacher).double() - exact).norm() / exact.norm()) for form in FORMS
    }

    faster = times["direct"] / times["Gram"]
    smaller = {key: memory["direct"][key] / memory["Gram"][key] for key in ("resident", "allocated")}
    rows = [
        {
            "form": form,
            "ms": significant(times[form]),
            "resident MiB": significant(memory[form]["resident"] / 2**20),
            "allocated MiB": significant(memory[form]["allocated"] / 2**20),
            "gradient error": f"{errors[form]:.1e}",
        }
        for form in FORMS
    ]
    rows.append(
        {
            "form": "direct / Gram",
            "ms": f"{significant(faster)} ×",
            "resident MiB": f"{significant(smaller['resident'])} ×",
            "allocated MiB": f"{significant(smaller['allocated'])} ×",
        }
    )
    reached = (
        faster >= GOALS["faster"]
        and min(smaller.values()) >= GOALS["smaller"]
        and errors["Gram"] <= GOALS["gradient"]
    )
    height, width = config.size
    text = f"""# Affinity by Gram matrices against the direct form

Forward and backward, float32, one image of {height}×{width} positions, {config.student_channels} student and
{config.teacher_channels} teacher channels; median of {config.rounds} rounds in which both forms took turns.

{table(rows)}

Resident: growth of the peak resident memory of a process that runs this form alone. Allocated: peak of what
PyTorch allocated. Gradient error: relative to the direct form in float64.

Goal: {GOALS["faster"]:g} times faster, memory at most 1/{GOALS["smaller"]:g}, gradient error at most \
{GOALS["gradient"]:g}: {"reached" if reached else "missed"}.
"""
    publish(text, config.output)


if __name__ == "__main__":
    run_script(main, Config)
