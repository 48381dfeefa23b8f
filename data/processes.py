"""The same work on many files, spread over processes, with a bar that shows how far it is."""

import multiprocessing
import os
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
    function: Callable[[A], R], items: Sequence[A], *, workers: int = 0, desc: str = "", unit: str = "file"
) -> Iterator[R]:
    """The results in order, under a bar; the first exception is raised, and what has not begun is dropped.

    Args:
        function: of a module's top level, as are its arguments; it runs in forks of this process with one OpenCV
            thread each.
        workers: processes; 0 takes as many as there are cores for this one, 1 works in this process.

    Raises:
        MachineError: a worker was killed.
    """
    number = min(workers or len(os.sched_getaffinity(0)), len(items))
    bar = {"total": len(items), "desc": desc, "unit": unit, "dynamic_ncols": True, "disable": not desc}
    if number <= 1:
        yield from tqdm(map(function, items), **bar)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(number, mp_context=context, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        try:
            chunk = max(1, min(16, len(items) // (4 * number)))
            yield from tqdm(pool.map(function, items, chunksize=chunk), **bar)
        except BrokenProcessPool as error:
            raise MachineError(f"workers: one of {number} was killed; out of memory? give fewer") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
