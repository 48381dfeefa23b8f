"""Runs of the scripts in forked processes, and what can happen to them.

Python, PyTorch and the rest are started once, in a server that does nothing else; every run is a fork of it and
costs its training alone. A fork of the tests' own process would inherit its threads' locks.
"""

import builtins
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    """Exit code (negative: the signal that ended it) and all that was printed."""

    code: int
    text: str


class Forks:
    """The server, as the tests see it."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def call(self, name: str, *arguments: Any, ranks: int = 1, timeout: int = 120, **event: Any) -> list[Outcome]:
        """Calls `module:function` with the arguments in one process or in several that know of each other."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"call": name, "arguments": arguments, "ranks": ranks, "timeout": timeout, "event": event}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server of forks has ended"
        return [Outcome(*outcome) for outcome in json.loads(answer)]

    def script(self, name: str, *arguments: str, timeout: int = 120, **event: Any) -> Outcome:
        """Runs a script of the project; `event` is one of the functions below and its argument."""
        return self.call("forks:run_script_file", name, *arguments, timeout=timeout, **event)[0]


# ---------------------------------------------------------------------------------------------- the server


def serve() -> None:
    """A job a line, until the input ends. What every run imports or draws first is here already."""
    for name in ("train_teacher", "distill", "torch._dynamo", "torch.distributed"):
        importlib.import_module(name)
    import cv2

    from data import DataConfig, build_dataset

    cv2.setNumThreads(0)  # threads do not survive a fork
    for split in ("train", "val"):
        scenes = build_dataset(DataConfig(size=[32, 64], scenes=8), split)  # type: ignore[arg-type]
        for index in range(len(scenes)):
            scenes.read(index)
    for line in sys.stdin:
        print(json.dumps(work_off(json.loads(line))), flush=True)


def work_off(job: dict[str, Any]) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(job["ranks"]):
            output = Path(folder, str(rank))
            child = os.fork()
            if child == 0:
                if job["ranks"] > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                be_child(job, output)
            children.append((child, output))
        return [
            (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()) for child, output in children
        ]


def be_child(job: dict[str, Any], output: Path) -> None:
    """Does the job and ends the process as Python would, never to return."""
    signal.alarm(job["timeout"])
    os.setpgid(0, 0)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.close(0)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    code: Any = 1
    try:
        for event, argument in job["event"].items():
            globals()[event](argument)
        module, _, function = job["call"].partition(":")
        getattr(importlib.import_module(module), function)(*job["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_script_file(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / name), run_name="__main__")


# --------------------------------------------------------------------------------- what can happen to a run


def kill_in_step(step: int, number: int = signal.SIGKILL) -> None:
    """A signal in the middle of a training step (from 0)."""
    import engine.loop

    genuine = engine.loop.learning_rate

    def learning_rate(now: int, *others: Any) -> float:
        if now == step:
            os.kill(os.getpid(), number)
        return genuine(now, *others)

    engine.loop.learning_rate = learning_rate


def kill_in_link(point: list[Any]) -> None:
    """SIGKILL in the middle of a training step of one run of a chain: [folder, step]."""
    import engine.loop

    folder, step = point
    genuine = engine.loop.train_step

    def train_step(run: Any, player: Any, parts: Any, now: int, *others: Any) -> Any:
        if str(run.folder) == folder and now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(run, player, parts, now, *others)

    engine.loop.train_step = train_step


def set_offline(_: Any) -> None:
    """As with HF_HUB_OFFLINE in the environment."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def terminate_in_step(step: int) -> None:
    kill_in_step(step, signal.SIGTERM)


def terminate_rank_in_step(where: list[int]) -> None:
    """SIGTERM to one of several processes: [rank, step]."""
    if int(os.environ["RANK"]) == where[0]:
        terminate_in_step(where[1])


def terminate_group_after_step(step: int) -> None:
    """SIGTERM from without to the whole process group, as schedulers send it: to the loader's workers too."""
    import engine.loop

    genuine = engine.loop.train_step

    def train_step(run: Any, player: Any, parts: Any, now: int, *others: Any) -> Any:
        answer = genuine(run, player, parts, now, *others)
        if now == step:
            command = f"import os, signal; os.killpg({os.getpgid(0)}, signal.SIGTERM)"
            subprocess.run([sys.executable, "-c", command], start_new_session=True, check=True)
        return answer

    engine.loop.train_step = train_step


def kill_at(point: list[Any]) -> None:
    """SIGKILL right before the n-th operation on files, or in the middle of it if it writes: [folder, n]."""
    folder, number = point
    operations: list[str] = []

    def reached(name: str, path: Any) -> bool:
        operations.append(f"{name} {Path(path).name}")
        return len(operations) - 1 == number

    watch_files(Path(folder), reached)


def kill_at_operation(point: list[Any]) -> None:
    """SIGKILL at the n-th operation of a name, say `replace .best.tmp`: [folder, operation, file, n]."""
    folder, *names, number = point
    seen = 0

    def reached(name: str, path: Any) -> bool:
        nonlocal seen
        seen += [name, Path(path).name] == names
        return seen == number + 1

    watch_files(Path(folder), reached)


def list_operations(point: list[str]) -> None:
    """Writes the operations on files below a folder, one a line: [folder, file]."""
    folder, file = point
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def reached(name: str, path: Any) -> bool:
        os.write(log, f"{name} {Path(path).name}\n".encode())
        return False

    watch_files(Path(folder), reached)


def watch_files(folder: Path, reached: Callable[[str, Any], bool]) -> None:
    """Asks `reached` before every write, sync, rename and deletion below `folder`, and dies where it says so."""
    import safetensors.torch

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def path_of(target: Any, dir_fd: int | None = None) -> Path:
        if isinstance(target, int):
            return Path(os.readlink(f"/proc/self/fd/{target}"))
        return Path(os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else "", os.fspath(target))

    def watched(path: Path) -> bool:
        return Path(os.path.abspath(path)).is_relative_to(folder)

    def wrap(name: str) -> None:
        genuine = getattr(os, name)

        def operation(target: Any, *arguments: Any, **options: Any) -> Any:
            path = path_of(target, options.get("dir_fd"))
            if watched(path) and reached(name, path):
                die()
            return genuine(target, *arguments, **options)

        setattr(os, name, operation)

    for name in ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
        wrap(name)

    class Writer:
        """A file whose write can be cut off in the middle."""

        def __init__(self, file: Any, path: Path) -> None:
            self.file, self.path = file, path

        def write(self, data: Any) -> int:
            if reached("write", self.path):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

        def writelines(self, lines: list[str]) -> None:
            self.write("".join(lines))

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    genuine_open, genuine_serialize = io.open, safetensors.torch.serialize_file

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = genuine_open(file, mode, *arguments, **options)
        if not isinstance(file, int) and set(mode) & set("wax") and watched(Path(file)):
            return Writer(opened, Path(file))
        return opened

    def serialize_file(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
        cut = watched(Path(path)) and reached("write", path)
        genuine_serialize(tensors, path, *arguments, **options)
        if cut:
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    io.open = builtins.open = open_file  # type: ignore[assignment]
    safetensors.torch.serialize_file = serialize_file


def first_on_path(folder: str) -> None:
    """Modules of this folder take precedence."""
    assert "wandb" not in sys.modules
    sys.path.insert(0, folder)


if __name__ == "__main__":
    serve()
