"""The same work on many files, spread over processes, with a bar that shows how far it is."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2
from tqdm import tqdm

from errors import MachineError

A = TypeVar("A")
R = TypeVar("R")


def map_processes(
    function: Callable[[A], R],
    items: Sequence[A],
    *,
    workers: int = 0,
    chunk: int = 16,
    desc: str = "",
    unit: str = "file",
) -> Iterator[R]:
    """The results in order, under a bar; the first exception is raised, and what has not begun is dropped.

    Args:
        function: of a module's top level, as are its arguments; it runs in forks of this process with one OpenCV
            thread each.
        workers: processes; 0 takes as many as there are cores for this one, 1 works in this process.
        chunk: most items that are given to a process at a time.

    Raises:
        MachineError: a worker was killed.
    """
    number = min(workers or len(os.sched_getaffinity(0)), len(items))
    bar = {"total": len(items), "desc": desc, "unit": unit, "dynamic_ncols": True, "disable": not desc}
    if number <= 1:
        yield from tqdm(map(function, items), **bar)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(number, mp_context=context, initializer=_start, initargs=(os.getpid(),)) as pool:
        try:
            size = max(1, min(chunk, len(items) // (4 * number)))
            yield from tqdm(pool.map(function, items, chunksize=size), **bar)
        except BrokenProcessPool as error:
            raise MachineError(f"workers: one of {number} was killed; out of memory? give fewer") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    """A worker's start: one thread, and an end with the process that it works for, be that killed or not."""
    cv2.setNumThreads(0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
