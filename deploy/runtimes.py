"""Runtimes measured in turn, each in a process of its own.

Thread pools of two runtimes in one process fight over the cores. So a *worker* is a process with one pool of
threads: PyTorch has one for its process, and its worker holds all models that PyTorch runs; each exported file has
a worker of its own. The parent asks and a worker answers, one line of JSON each, over its standard input and
output: `load` a model, run a `turn` of passes, time the `parts` of a frame, tell the `memory`.

A pool spins for some milliseconds after a pass, waiting for the next one, and takes the cores from whoever is
measured then: with ONNX Runtime's default, OpenVINO's first pass after it took 2.5 times as long. Not every
runtime can be told not to spin. So a worker that is not asked is stopped (SIGSTOP) and goes on when it is
(SIGCONT). Its first pass then meets cold caches, which that of a camera's next frame does not: each turn begins
with one pass that does not count.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from deploy.exported import normalise, open_exported
from deploy.postprocess import native_argmax
from errors import ConfigurationError, UserError

ROOT = Path(__file__).resolve().parents[1]

PRECISIONS = {
    "eager": ("fp32", "bf16", "fp16"),
    "channels_last": ("fp32", "bf16", "fp16"),
    "compile": ("fp32", "bf16", "fp16"),
    "graphs": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "executorch": ("fp32", "int8"),
    "tensorrt": ("fp32", "fp16"),
}
"""The backends and the precisions that a run can be brought to in each; the first is the default."""
PYTORCH = ("eager", "channels_last", "compile", "graphs")
ARITHMETIC = {("openvino", "bf16"), ("tensorrt", "fp16")}
"""What is computed in a precision that is not that of the file, which is fp32."""
IMPORTS = {
    "pytorch": "models",
    "executorch": "executorch.runtime",
    "coreml": "coremltools",
}
"""What a worker imports at its start, where that is not called like its runtime."""
PARTS = ("decode", "resize", "normalise", "network", "upsample + argmax", "colours")
LINUX_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class BackendUnavailable(Exception):
    """A backend that can't run here; the message says why, in one line."""


@dataclass(frozen=True)
class Work:
    """A model in one backend, precision and batch size.

    Args:
        run: whose model it is: a run, or an exported file that stands for itself.
        path: folder of the model for PyTorch's backends, else the exported file.
        size: (height, width) of the images.
        device: "cpu" or "cuda", of PyTorch's backends.
    """

    run: str
    backend: str
    precision: str
    batch: int
    path: str
    size: tuple[int, int]
    device: str = "cpu"

    @property
    def worker(self) -> str:
        """Runtime of its process."""
        return "pytorch" if self.backend in PYTORCH else self.backend

    def __str__(self) -> str:
        return f"{self.run} {self.backend}:{self.precision}"


@dataclass
class Measured:
    """What was seen of one work.

    Args:
        times_ms: of each counted pass.
        start_ms: from the start of the process until its imports were done.
        load_ms: reading the file and making the network.
        first_ms: the first pass, with what a backend puts off until then; of PyTorch with compilation.
        peak_memory_bytes: for PyTorch's backends weights, input and what a pass allocates; for the others what
            their process grew by since its imports. None where the system does not tell.
        joules_per_image: of processor and GPU as a whole, idle power included; None where no counter can be read.
        parts_ms: median of each part of a frame from end to end, if it was asked for.
    """

    start_ms: float
    load_ms: float
    first_ms: float
    times_ms: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    joules_per_image: float | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)


def parse_backend(text: str) -> tuple[str, str]:
    """ "openvino:int8" -> ("openvino", "int8"), "eager" -> ("eager", "fp32").

    Raises:
        ConfigurationError: there is no such backend, or it has not this precision.
    """
    backend, _, precision = text.partition(":")
    if backend not in PRECISIONS:
        raise ConfigurationError(f"backends: {text!r} is not possible; give some of {', '.join(PRECISIONS)}")
    known = PRECISIONS[backend]
    if precision and precision not in known:
        raise ConfigurationError(f"backends: {text!r} is not possible; {backend} has {', '.join(known)}")
    return backend, precision or known[0]


def check_installed(backend: str) -> None:
    """Raises ConfigurationError, naming the package, if a backend's runtime is not installed."""
    if backend not in PYTORCH and find_spec(backend) is None:
        raise ConfigurationError(f"backends: {backend} is not installed; pip install {backend}, or leave it out")


# --------------------------------------------------------------------------------------------- the parent


def measure(
    works: Sequence[Work],
    *,
    threads: int,
    rounds: int,
    passes: int = 3,
    warmup: int = 2,
    frame: str = "",
    progress: Callable[[str], Any] = lambda text: None,
) -> tuple[dict[Work, Measured], dict[Work, str]]:
    """Each work in rounds, in which all take their turn; so what else the machine does meets all of them alike.

    All works are in memory at once, in workers that live as long as this call.

    Args:
        threads: of every runtime.
        rounds: turns of each work.
        passes: counted passes of a turn, after one that is not counted.
        warmup: passes of each before the rounds.
        frame: path of an image file to bring from bytes to coloured classes, part by part, in turns of its own.
        progress: is told what was done, once a work and round; `len(works) * (rounds + 1)` times, or less if some
            fail.

    Returns:
        What was measured, and why each of the others could not be.
    """
    energy = Energy()
    with Workers(threads) as workers:
        measured, failed = {}, {}
        for work in works:
            try:
                measured[work] = workers.load(work, warmup)
            except BackendUnavailable as error:
                failed[work] = str(error)
            progress(f"load {work}")
        joules: dict[Work, list[float | None]] = {work: [] for work in works}
        parts: dict[Work, list[dict[str, float]]] = {work: [] for work in works}
        for number in range(rounds):
            for work in [work for work in measured if work not in failed]:
                try:
                    with energy.measure() as spent:
                        times = workers.ask(work, "turn", passes=passes)["times_ms"]
                    measured[work].times_ms += times[1:]
                    joules[work].append(spent.joules)
                    if frame:
                        parts[work].append(workers.ask(work, "parts", frame=frame, threads=threads)["parts_ms"])
                    if number == rounds - 1:
                        measured[work].peak_memory_bytes = workers.ask(work, "memory")["bytes"]
                except BackendUnavailable as error:
                    failed[work] = str(error)
                progress(f"round {number + 1} {work}")
    for work in failed:
        measured.pop(work, None)
    for work, seen in measured.items():
        if frame:
            seen.parts_ms = {name: float(np.median([times[name] for times in parts[work]])) for name in PARTS}
        known = [value for value in joules[work] if value is not None]
        seen.joules_per_image = sum(known) / (len(known) * (passes + 1) * work.batch) if known else None
    return measured, failed


class Workers:
    """The workers of one measurement, started when a work needs them; leaving the context ends them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.of: dict[Work, Worker] = {}
        self.pytorch: Worker | None = None
        self.stack = ExitStack()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def load(self, work: Work, warmup: int) -> Measured:
        """Loads a work into its worker; raises BackendUnavailable if that is not possible."""
        worker = self.pytorch if work.worker == "pytorch" else None
        if worker is None:
            worker = Worker(work.worker, self.threads)
            self.stack.callback(worker.close)
        if work.worker == "pytorch":
            self.pytorch = worker
        self.of[work] = worker
        seen = self.ask(work, "load", warmup=warmup)
        return Measured(worker.start_ms, seen["load_ms"], seen["first_ms"])

    def ask(self, work: Work, what: str, **options: Any) -> dict[str, Any]:
        return self.of[work].ask({"what": what, "work": asdict(work), "options": options})


class Worker:
    """A process for one runtime, seen from the parent; stopped while nothing is asked of it."""

    def __init__(self, runtime: str, threads: int) -> None:
        start = time.perf_counter()
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from deploy.runtimes import serve; serve()",
                runtime,
                str(threads),
                str(os.getpid()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=os.environ | {name: str(threads) for name in names} | {"PYTHONPATH": path},
        )
        try:
            self.read()
        except BackendUnavailable:
            self.close()
            raise
        self.start_ms = 1000 * (time.perf_counter() - start)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer; raises BackendUnavailable if it has none or has died."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise BackendUnavailable(self.reason()) from error
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BackendUnavailable(self.reason())
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise BackendUnavailable(answer["error"])
        return answer

    def reason(self) -> str:
        """Why the worker is dead, in one line."""
        code = self.process.wait()
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended by {name}" + (", out of memory perhaps" if name == "SIGKILL" else "")
        return f"its process ended with {code}: {lines[-1] if lines else 'it said nothing'}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.said):
            assert file is not None
            try:
                file.close()
            except BrokenPipeError:  # what was not read by a worker that died
                continue


# --------------------------------------------------------------------------------------------- the worker


def serve() -> None:
    """The process of a worker: its arguments are RUNTIME THREADS PARENT; a request a line until the input ends."""
    runtime, threads, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with(parent)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import_module(IMPORTS.get(runtime, runtime))
    if runtime == "pytorch":
        set_torch_threads(threads)
    before = reset_peak()
    print(json.dumps({}), file=answers, flush=True)

    networks: dict[Work, Network] = {}
    for line in sys.stdin:
        request = json.loads(line)
        given = request["work"]
        work = Work(**given | {"size": tuple(given["size"])})
        try:
            if request["what"] == "load":
                networks[work] = (
                    PyTorchNetwork(work) if runtime == "pytorch" else FileNetwork(work, threads, before)
                )
                answer = warm_up(networks[work], **request["options"])
            else:
                answer = ANSWERS[request["what"]](networks[work], **request["options"])
        except (UserError, BackendUnavailable, RuntimeError) as error:
            answer = {"error": " ".join(str(error).split())}
        print(json.dumps(answer), file=answers, flush=True)


def die_with(parent: int) -> None:
    """Has the kernel end this process when its parent ends; a stopped process would not notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LINUX_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the parent is dead")


def set_torch_threads(threads: int) -> None:
    """The size of PyTorch's pool; it is started here, so that no model's first pass pays for it."""
    torch.set_num_threads(threads)
    torch.nn.functional.conv2d(torch.ones(1, 8, 32, 32), torch.ones(8, 8, 3, 3))


class PyTorchNetwork:
    """A model in one of PyTorch's backends."""

    def __init__(self, work: Work) -> None:
        from deploy.profiling import prepare  # PyTorch's compiler, which no other runtime's worker should import
        from models import load_model

        start = time.perf_counter()
        model = load_model(work.path)
        self.load_ms = 1000 * (time.perf_counter() - start)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[work.precision]
        images = torch.randn(work.batch, 3, *work.size, device=work.device, dtype=dtype)
        start = time.perf_counter()
        self.prepared = prepare(model, images, work.backend)
        self.first_ms = 1000 * (time.perf_counter() - start)
        self.mean, self.std, self.size = model.mean, model.std, work.size
        self.colours = np.zeros((len(model.class_names), 3), np.uint8)  # the time does not depend on them

    def run(self) -> None:
        self.prepared()

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return normalise(images, self.mean, self.std)

    @torch.inference_mode()
    def answer(self, images: np.ndarray) -> np.ndarray:
        given = self.prepared.images
        layout = torch.contiguous_format if given.is_contiguous() else torch.channels_last
        tensor = torch.from_numpy(images).to(given.device, given.dtype, memory_format=layout)
        return self.prepared.run(tensor).logits.float().contiguous().cpu().numpy()

    def finish(self, answer: np.ndarray) -> np.ndarray:
        return native_argmax(answer, self.size)

    def peak_memory(self) -> int:
        from deploy.profiling import peak_memory

        return peak_memory(self.prepared)


class FileNetwork:
    """An exported file in its runtime."""

    def __init__(self, work: Work, threads: int, memory_before: int | None) -> None:
        arithmetic = work.precision if (work.backend, work.precision) in ARITHMETIC else ""
        start = time.perf_counter()
        self.file = open_exported(work.path, runtime=work.backend, threads=threads, arithmetic=arithmetic)
        self.load_ms = 1000 * (time.perf_counter() - start)
        known = self.file.metadata
        self.size, self.memory_before = work.size, memory_before
        self.colours = np.array(known.colours, np.uint8)
        noise = np.random.default_rng(0).integers(0, 256, (work.batch, *work.size, 3), dtype=np.uint8)
        self.images = self.prepare(noise)
        start = time.perf_counter()
        self.run()
        self.first_ms = 1000 * (time.perf_counter() - start)

    def run(self) -> None:
        self.file(self.images)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return self.file.prepare(images)

    def answer(self, images: np.ndarray) -> np.ndarray:
        return self.file(images)

    def finish(self, answer: np.ndarray) -> np.ndarray:
        return self.file.finish(answer, self.size)

    def peak_memory(self) -> int | None:
        peak = read_status("VmHWM")
        return None if peak is None or self.memory_before is None else peak - self.memory_before


Network = PyTorchNetwork | FileNetwork


def warm_up(network: Network, warmup: int) -> dict[str, Any]:
    for _ in range(warmup):
        network.run()
    return {"load_ms": network.load_ms, "first_ms": network.first_ms}


def take_turn(network: Network, passes: int) -> dict[str, Any]:
    """Milliseconds of each pass; the first one meets cold caches."""
    times = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        network.run()
        times.append(1000 * (time.perf_counter() - start))
    return {"times_ms": times}


def tell_memory(network: Network) -> dict[str, Any]:
    return {"bytes": network.peak_memory()}


def time_parts(network: Network, frame: str, threads: int) -> dict[str, Any]:
    """Milliseconds of each part of a frame, from the file's bytes to coloured classes at the network's size.

    A part that an exported file does itself is next to nothing here and in the network's time.
    """
    cv2.setNumThreads(threads)
    data = np.fromfile(frame, np.uint8)
    height, width = network.size
    clock = [time.perf_counter()]
    image: Any = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
    clock.append(time.perf_counter())
    if image.shape[:2] != network.size:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    clock.append(time.perf_counter())
    images = network.prepare(image[None])
    clock.append(time.perf_counter())
    answer = network.answer(images)
    clock.append(time.perf_counter())
    labels = network.finish(answer)
    clock.append(time.perf_counter())
    network.colours[labels]
    clock.append(time.perf_counter())
    return {"parts_ms": dict(zip(PARTS, (1000 * np.diff(clock)).tolist(), strict=True))}


ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "turn": take_turn,
    "parts": time_parts,
    "memory": tell_memory,
}


# ------------------------------------------------------------------------------------- memory and energy


def read_status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status: VmRSS is what is resident now, VmHWM the most that was."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def reset_peak() -> int | None:
    """Resident bytes now, to which the peak is set back where the system lets a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return read_status("VmHWM")
    return read_status("VmRSS")


class Spent:
    """Joules spent in a stretch of time, None where no counter can be read."""

    joules: float | None = None


class Energy:
    """The counters of energy that can be read: Intel's and AMD's packages (RAPL), NVIDIA's GPUs (NVML)."""

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        zones = [zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1]  # whole packages
        self.zones = {zone: read_number(zone / "max_energy_range_uj") or 0.0 for zone in sorted(zones)}
        self.gpus = find_gpus()

    def read(self) -> list[float | None]:
        """Joules of each counter since a moment of its own."""
        microjoules = [read_number(zone / "energy_uj") for zone in self.zones]
        joules = [None if value is None else value / 1e6 for value in microjoules]
        return [*joules, *(gpu() for gpu in self.gpus)]

    @contextmanager
    def measure(self) -> Iterator[Spent]:
        """Fills what is spent within the context."""
        spent, before = Spent(), self.read()
        yield spent
        ranges = [*(most / 1e6 for most in self.zones.values()), *(0.0 for _ in self.gpus)]
        for start, end, most in zip(before, self.read(), ranges, strict=True):
            if start is not None and end is not None:
                spent.joules = (spent.joules or 0.0) + (end - start if end >= start else end - start + most)


def read_number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # RAPL is for the administrator alone on most systems
        return None


def find_gpus() -> list[Callable[[], float]]:
    """A function for each NVIDIA GPU that tells its joules; none without the package nvidia-ml-py."""
    if find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return []
    return [lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in handles]  # type: ignore[misc]
