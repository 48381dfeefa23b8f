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

BACKENDS = ("eager", "channels_last", "compile")
COMPILE_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._inductor.exc.CppCompileError,
    torch._inductor.exc.InvalidCxxCompiler,
)

Name = TypeVar("Name", bound=Hashable)


class BackendUnavailable(Exception):
    """A backend that can't run here; the message says why, in one line."""


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

    Raises:
        BackendUnavailable: there is no compiler, or it fails on this model.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    model = copy.deepcopy(model).eval().requires_grad_(False).to(images.device, images.dtype)
    if backend != "eager":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if backend != "compile":
        prepared = Prepared(model, model, images)
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
