"""Pixels per class: counted once and kept on disk, and the class weights made of them."""

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from errors import ConfigurationError

Scheme = Literal["uniform", "inverse", "median", "enet", "effective"]

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$SEGDISTILL_CACHE, or $XDG_CACHE_HOME/segdistill, or ~/.cache/segdistill."""
    own = os.environ.get("SEGDISTILL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "segdistill"


def load_counts(key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The counts stored under `key`, or None where there are none or the file is damaged."""
    path = cache_folder() / f"label-counts-{key}.bin"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s); the labels are counted again", path, error.strerror)
        return None
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() == digest:
        counts = np.load(io.BytesIO(body), allow_pickle=False)
        if counts.shape == shape and counts.dtype == np.int64:
            return counts
    log.warning("%s: is damaged; the labels are counted again", path)
    return None


def store_counts(key: str, counts: np.ndarray) -> None:
    """Write the counts under `key`: SHA-256, then the array; atomically, so that processes may race.

    A folder that cannot be written costs only time: a warning is logged and the counts are not kept.
    """
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    body = buffer.getvalue()
    folder = cache_folder()
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, folder / f"label-counts-{key}.bin")
    except OSError as error:
        log.warning("%s: cannot be written (%s); the label counts are not kept", folder, error.strerror)
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def gather_counts(rows: Iterable[np.ndarray], images: int, what: str) -> np.ndarray:
    """int64 [N, C+1] of the rows, with a progress bar (on the first process) where there are many."""
    hidden = images <= 500 or os.environ.get("RANK", "0") != "0"
    return np.stack(list(tqdm(rows, desc=f"labels of {what}", total=images, unit="image", disable=hidden)))


def class_weights(counts: np.ndarray, scheme: Scheme, *, beta: float | None = None) -> np.ndarray:
    """float32 [C], the weight of each class in the cross-entropy.

    `counts` is int64 [N, C+1]: pixels per image and class, in the last column those without a class, which take
    no part except in `median`'s totals. With n_c the pixels of class c, P their sum, f_c = n_c / P:

    uniform    1
    inverse    1 / f_c
    median     median over classes of freq / freq_c, freq_c = n_c / (all pixels, unlabelled ones included, of the
               images that show c) (Eigen & Fergus 2015)
    enet       1 / ln(1.02 + f_c), as published (Paszke et al. 2016), not normalised: about 1.4 to 50.5
    effective  (1 − β) / (1 − β^n_c) (Cui et al. 2019); β = 1 − 1/N as there, where N, the number beyond which more
               pixels tell little, is the mean of n_c over the classes that occur unless `beta` is given

    All but enet are divided by their mean over the classes that occur. A class that does not occur weighs 1, or
    what the formula gives under enet, 1 / ln(1.02). Raises ConfigurationError if no pixel has a class.
    """
    pixels = counts[:, :-1].sum(0).astype(np.float64)
    total = pixels.sum()
    if total == 0:
        raise ConfigurationError("data: no pixel of the split has a class; check the labels")
    occurs = pixels > 0
    n = pixels[occurs]
    weights = np.ones(len(pixels))
    if scheme == "uniform":
        return weights.astype(np.float32)
    if scheme == "enet":
        return (1 / np.log(1.02 + pixels / total)).astype(np.float32)
    if scheme == "inverse":
        raw = total / n
    elif scheme == "median":
        shown = (counts[:, :-1] > 0).T.astype(np.float64) @ counts.sum(1)
        frequency = n / shown[occurs]
        raw = np.median(frequency) / frequency
    elif scheme == "effective":
        # log1p and expm1: β is so near 1 that 1 − β^n would lose its digits
        log_beta = np.log1p(-1 / max(n.mean(), 2)) if beta is None else np.log(beta)
        raw = np.expm1(log_beta) / np.expm1(log_beta * n)
    else:
        raise ConfigurationError(
            f"class_weights: {scheme!r} is unknown; choose uniform, inverse, median, enet or effective"
        )
    weights[occurs] = raw / raw.mean()
    return weights.astype(np.float32)
