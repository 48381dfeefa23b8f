"""A data set and a teacher without any network, for tests of the cache; and its writing in forked processes."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cache import CachedTeacher, open_cache
from engine.player import TrainConfig
from engine.run import start_accelerator
from engine.teachers import Answer, CacheConfig
from errors import ConfigurationError

KEY = {"teacher": "a" * 64, "images": "mean 0.5", "data": "b" * 64, "precision": "fp32", "classes": "road, sky"}
TAP = "decoder.1"


class Pictures:
    """Images that hold nothing but their index, half of their labels void."""

    def __init__(self, count: int, size: tuple[int, int], odd: int | None = None, damaged: int | None = None):
        self.names = [f"picture_{index}" for index in range(count)]
        self.size, self.odd, self.damaged = size, odd, damaged

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, key: tuple[int, int, int], *, seed: int) -> Any:
        epoch, _, index = key
        assert (epoch, seed) == (-1, 0)
        if index == self.damaged:
            raise ConfigurationError(f"{self.names[index]}: cannot be decoded; copy it again")
        height, width = self.size
        images = torch.full((3, height + (index == self.odd), width), float(index))
        labels = torch.zeros(height, width, dtype=torch.int64)
        labels[height // 2 :] = 255
        return SimpleNamespace(images=images, labels=labels)


class Table:
    """A teacher that knows its answers by heart: logits [N, C, h, w] and one feature map."""

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, features
        self.asked: list[int] = []

    def answer(self, images: Tensor, taps: Sequence[str]) -> Answer:
        index = int(images[0, 0, 0, 0])
        self.asked.append(index)
        features = self.features[index : index + 1]
        return Answer(self.logits[index : index + 1], dict.fromkeys(taps, features))


def learned(count: int, size: tuple[int, int] = (6, 8), classes: int = 4, spread: float = 4.0) -> Table:
    """Logits and features at random; those of an image do not depend on the number of images."""
    rng = [np.random.default_rng(index) for index in range(count)]
    logits = np.stack([spread * one.standard_normal((classes, *size)) for one in rng])
    features = np.stack([one.standard_normal((3, size[0] // 2, size[1] // 2)) for one in rng])
    return Table(torch.from_numpy(logits).float(), torch.from_numpy(features).float())


def fill(
    folder: Path,
    teacher: Table,
    data: Pictures,
    key: dict[str, str] | None = None,
    taps: Sequence[str] = (TAP,),
    said: list[str] | None = None,
    terminated: bool = False,
    **config: Any,
) -> CachedTeacher:
    """Writes, checks and opens a cache with shards of 3 images."""
    accelerator = start_accelerator(TrainConfig(threads=1))
    say = (said if said is not None else []).append
    run: Any = SimpleNamespace(accelerator=accelerator, say=say, terminated=terminated)
    return open_cache(run, teacher, data, folder, key or KEY, taps, CacheConfig(**({"shard": 3} | config)))


def in_process(folder: str, options: dict[str, Any]) -> None:
    """A cache of 7 images, as the forks' server calls it.

    Options: `limit`, the largest file in bytes; `terminated`, after a signal; `rank`, the one process that either
    meets; `damaged`, an image that can't be read.
    """
    ours = options.get("rank") in (None, int(os.environ.get("RANK", "0")))
    if "limit" in options and ours:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["limit"], resource.RLIM_INFINITY))
    data = Pictures(7, (24, 32), damaged=options.get("damaged"))
    terminated = bool(options.get("terminated")) and ours
    try:
        cached = fill(Path(folder), learned(7), data, terminated=terminated)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(f"opened {len(cached.maps)} shards")
