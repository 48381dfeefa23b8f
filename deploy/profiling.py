"""What a model costs: parameters, FLOPs, latency and peak memory, across the ways to run it."""

import copy
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.exc
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deploy.runtimes import PYTORCH, BackendUnavailable

COMPILE_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._inductor.exc.CppCompileError,
    torch._inductor.exc.InvalidCxxCompiler,
)

Name = TypeVar("Name", bound=Hashable)

ROOF_SECONDS = 0.5  # for which each of a machine's two roofs is measured


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once, buffers don't count."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, size: Sequence[int]) -> int:
    """Floating-point operations of one forward pass over one image of `size` (height, width).

    A multiply-add counts as 2, so this is twice the MACs that some papers call FLOPs. Convolutions and matrix
    products count; normalisation, activations and resizing, which cost little, do not. On a CPU attention is
    computed by its two matrix products for this, since PyTorch's counter does not know its fused kernel there.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
    was_training = model.training
    model.eval()
    known = sdpa_kernel(SDPBackend.MATH) if image.device.type == "cpu" else nullcontext()
    with torch.no_grad(), known, FlopCounterMode(display=False) as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops()


@dataclass
class Prepared:
    """A model made ready to run in one way, with its input; calling it is one forward pass.

    Args:
        run: the model as it is called: itself or its compiled form.
        model: the copy whose weights are in use.
        images: [B, 3, H, W].
    """

    run: Callable[[Tensor], Any]
    model: nn.Module
    images: Tensor

    @torch.inference_mode()
    def __call__(self) -> None:
        self.run(self.images)
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)


def prepare(model: nn.Module, images: Tensor, backend: str) -> Prepared:
    """A copy of `model` in eval mode with the dtype and device of `images`, run once in the way of `backend`.

    - eager: as PyTorch runs it.
    - channels_last: eager, with weights and images in that memory format.
    - compile: `torch.compile` for exactly this input size, in channels_last too.
    - graphs: channels_last as a CUDA graph, whose kernels are launched by one call.

    Raises:
        BackendUnavailable: there is no compiler, or it fails on this model; there is no GPU for a CUDA graph.
    """
    if backend not in PYTORCH:
        raise ValueError(f"no backend {backend!r}; there are {', '.join(PYTORCH)}")
    if backend == "graphs" and images.device.type != "cuda":
        raise BackendUnavailable("CUDA graphs need a CUDA GPU")
    model = copy.deepcopy(model).eval().requires_grad_(False).to(images.device, images.dtype)
    if backend != "eager":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if backend != "compile":
        run = capture_graph(model, images) if backend == "graphs" else model
        prepared = Prepared(run, model, images)
        prepared()
        return prepared

    if images.device.type == "cpu":
        compiler = torch._inductor.config.cpp.cxx[-1]
        if shutil.which(compiler) is None:
            raise BackendUnavailable(f"there is no C++ compiler ({compiler}) on this machine")
    # Isolated: the models of a table share their code, and after some recompilations of the same code
    # torch.compile would run the others eagerly, silently.
    compiled = torch.compile(model, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
    prepared = Prepared(compiled, model, images)
    try:
        prepared()
    except COMPILE_ERRORS as error:
        raise BackendUnavailable(f"torch.compile fails: {_reason(error)}") from error
    return prepared


@torch.inference_mode()
def capture_graph(model: nn.Module, images: Tensor) -> Callable[[Tensor], Any]:
    """The forward pass as a CUDA graph; each call overwrites the answer of the one before."""
    current, side = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # what libraries set up at their first call must not be in the graph
        for _ in range(3):
            model(images)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = model(images)

    def replay(given: Tensor) -> Any:
        if given is not images:
            images.copy_(given)
        graph.replay()
        return answer

    return replay


def _reason(error: BaseException) -> str:
    """The line of a compilation error that says something: the first, or the second if the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.endswith("raised:")]
    return (told or lines or [type(error).__name__])[0]


def measure_latency(
    passes: Mapping[Name, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int,
    progress: Callable[[], Any] = lambda: None,
) -> dict[Name, list[float]]:
    """Milliseconds of each pass in each round.

    Every round runs each pass once, in turn, so that what else the machine does meets all of them alike. The
    passes wait for their device themselves, as `Prepared` does.

    Args:
        warmup: rounds that are run first and not counted.
        progress: called after every round, those of the warm-up included.
    """
    times: dict[Name, list[float]] = {name: [] for name in passes}
    for number in range(warmup + rounds):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                times[name].append(1000 * (time.perf_counter() - start))
        progress()
    return times


def summarise(times_ms: Sequence[float], batch: int) -> dict[str, float]:
    """Median and 95th percentile of a pass in milliseconds, and the images per second of the median."""
    median = statistics.median(times_ms)
    p95 = float(np.percentile(times_ms, 95))
    return {"median_ms": median, "p95_ms": p95, "images_per_second": 1000 * batch / median}


def peak_memory(prepared: Prepared) -> int:
    """Bytes of tensors at the worst moment of a forward pass: weights, buffers, input and what the pass allocates.

    What PyTorch's allocators hand out is counted, on CPU and GPU alike; the interpreter, the libraries and the
    memory that an allocator keeps for later are not in it.
    """
    state = [*prepared.model.parameters(), *prepared.model.buffers(), prepared.images]
    return sum(t.numel() * t.element_size() for t in state) + peak_allocation(prepared, prepared.images.device)


def peak_allocation(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that `work()` has allocated at any moment, above those that were allocated before it.

    On CUDA by `max_memory_allocated`, on CPU by adding up the allocations and frees in the profiler's trace.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    work()
    with _silent_stderr():
        profiler.stop()
    events: list[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(max(np.cumsum([0, *(size for _, size in changes)])))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Sends the process's standard error elsewhere: the profiler's library announces its start and stop there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as elsewhere:
        os.dup2(elsewhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


# ------------------------------------------------------------------------------------------ layer by layer


@dataclass
class Layer:
    """What one layer of a model costs in a forward pass.

    Args:
        kind: its class, "Conv2d" say.
        flops: of convolutions and matrix products, two for a multiply-add.
        bytes: of its input, answer, weights and buffers, each moved once.
        milliseconds: median.
    """

    name: str
    kind: str
    parameters: int
    flops: int
    bytes: int
    milliseconds: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / max(self.bytes, 1)


def profile_layers(model: nn.Module, images: Tensor, *, rounds: int, warmup: int) -> list[Layer]:
    """Every layer, a module without modules inside, in the order in which they run, and what is between them.

    Timed by hooks in eager mode, which cost some microseconds a layer. The last row, "between the layers", is what
    is left of the whole pass: resizing, concatenation, padding and sums that are no modules.

    Args:
        images: [B, 3, H, W] on the CPU.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images)
    leaves = {module: name for name, module in model.named_modules() if not list(module.children())}
    starts: dict[nn.Module, float] = {}
    times: dict[nn.Module, float] = {}
    moved: dict[nn.Module, int] = {}

    def before(module: nn.Module, _: Any) -> None:
        starts[module] = time.perf_counter()

    def after(module: nn.Module, given: Any, answer: Any) -> None:
        times[module] = times.get(module, 0.0) + time.perf_counter() - starts[module]
        tensors = [*given, answer, *module.parameters(), *module.buffers()]
        moved[module] = moved.get(module, 0) + sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    for module in leaves:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    rows: list[dict[nn.Module, float]] = []
    wholes: list[float] = []
    with torch.inference_mode():
        for _ in range(warmup + rounds):
            times.clear()
            moved.clear()
            start = time.perf_counter()
            model(images)
            wholes.append(time.perf_counter() - start)
            rows.append(dict(times))
    flops = {name.partition(".")[2]: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    layers = [
        Layer(
            name=leaves[module],
            kind=type(module).__name__,
            parameters=count_parameters(module),
            flops=flops.get(leaves[module], 0),
            bytes=moved[module],
            milliseconds=1000 * statistics.median(row[module] for row in rows[warmup:]),
        )
        for module in rows[-1]
    ]
    outside = [whole - sum(row.values()) for whole, row in zip(wholes, rows, strict=True)][warmup:]
    rest = counter.get_total_flops() - sum(layer.flops for layer in layers)
    return [*layers, Layer("between the layers", "", 0, rest, 0, 1000 * statistics.median(outside))]


def measure_roofs() -> tuple[float, float]:
    """FLOP/s of a large fp32 matrix product, and bytes/s of a large copy (read and written), on PyTorch's threads.

    The two roofs of the roofline model (Williams et al. 2009, doi 10.1145/1498765.1498785). Of some rounds the
    best one is taken: a roof is what the machine can do.
    """
    side, length = 1536, 2**25
    a, b = torch.randn(side, side), torch.randn(side, side)
    source, target = torch.zeros(length), torch.zeros(length)

    def best_seconds(work: Callable[[], Any]) -> float:
        work()
        times: list[float] = []
        end = time.perf_counter() + ROOF_SECONDS
        while time.perf_counter() < end or len(times) < 3:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        flops = 2 * side**3 / best_seconds(lambda: torch.mm(a, b))
        bandwidth = 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
    return flops, bandwidth
