"""What the tests of the losses run in several processes."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import CLASSES, STUDENT_TAPS, TEACHER_TAPS, VOID, answers

from losses.contrast import CIRKDMemory, CIRKDMemoryConfig
from losses.term import Context


def remember(output: str) -> None:
    """Saves what each process has in its memory after two steps, each with images of its own."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    config = CIRKDMemoryConfig(taps=["b"], pixel_memory=9, region_memory=9)
    term = CIRKDMemory(config, Context(STUDENT_TAPS, TEACHER_TAPS, CLASSES)).double()
    for step in range(2):
        student, teacher, labels = answers(1 + rank, seed=10 * step + rank)  # unequal numbers
        if step == 1 and rank == 1:
            labels[:] = VOID
        torch.manual_seed(100 * step + rank)
        term(student, teacher, labels, torch.tensor(3.0, dtype=torch.float64)).backward()
    state = {name: value for name, value in term.state_dict().items() if "head" not in name}
    torch.save(state, Path(output, f"{rank}.pt"))
    torch.distributed.destroy_process_group()
