"""What the benchmarks share: the project on the path, memory in a process of its own, where and when it was."""

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy.profiling import peak_allocation
from engine.run import cpu_name


def peak_resident() -> int:
    """Bytes of the process's peak resident memory on Linux; ru_maxrss would begin with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def print_memory(small: Callable[[], Any], work: Callable[[], Any]) -> None:
    """Prints the memory of `work` in this process as JSON, after `small`, which loads the libraries."""
    small()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_resident()
    work()
    resident = max(4096, peak_resident() - before)  # a page, where all fitted into what was there
    print(json.dumps({"resident": resident, "allocated": peak_allocation(work, torch.device("cpu"))}))


def measure_memory(form: str) -> dict[str, int]:
    """Bytes of one form, from a process of its own that is told what this one was told, and memory_of."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], f"memory_of={form}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def publish(text: str, output: str, machine: str = "") -> None:
    """Prints a benchmark's text and writes it to `output`, with the machine, the date and the command below it."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text += (
        f"\n{machine or cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()};\n`{command}`\n"
    )
    print(text)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
