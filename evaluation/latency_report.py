"""Tables of what models cost, and their CSV files, which say in their name what was measured where.

A row is a mapping with the keys of COLUMNS: one run in one backend, precision and batch size.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import ConfigurationError, DamagedFileError
from evaluation.report import ABSENT, quantity, significant, table

Row = dict[str, Any]

COLUMNS: dict[str, type] = {
    "run": str,
    "backend": str,
    "precision": str,
    "batch": int,
    "height": int,
    "width": int,
    "threads": int,
    "device": str,
    "version": str,  # of the backend's package
    "median_ms": float,
    "p95_ms": float,
    "fastest_ms": float,  # what other processes on the machine disturb least
    "images_per_second": float,
    "speedup": float,  # of the median, over eager fp32 of the same run and batch size
    "peak_memory_bytes": int,
    "peak_memory_of": str,  # "tensors" or "process"
    "start_ms": float,  # of a cold start: interpreter and imports,
    "load_ms": float,  # reading the model
    "first_ms": float,  # and the first pass
    "joules_per_image": float,
    "parameters": int,
    "flops": int,
    "miou": float,
}
"""The columns of the CSV and their types; what is not known is empty there and None in a row."""


def latency_table(rows: Sequence[Row]) -> str:
    """One line for each row; a column of which nothing is known is left out."""
    lines = []
    for row in rows:
        line = {
            "run": row["run"],
            "params": quantity(row["parameters"]),
            "FLOPs": quantity(row["flops"]),
            "backend": row["backend"],
            "precision": row["precision"],
            "batch": row["batch"],
            "median ms": significant(row["median_ms"]),
            "p95 ms": significant(row["p95_ms"]),
            "images/s": significant(row["images_per_second"]),
            "speed ×": known(row["speedup"], "{:.2f}"),
            "peak memory": mebibytes(row["peak_memory_bytes"]),
            "cold start ms": significant(row["start_ms"] + row["load_ms"] + row["first_ms"]),
            "load ms": significant(row["load_ms"]),
            "J/image": known(row["joules_per_image"], "{:.3g}"),
        }
        lines.append(line)
    empty = [name for name in ("speed ×", "J/image") if all(line[name] == ABSENT for line in lines)]
    return table([{name: value for name, value in line.items() if name not in empty} for line in lines])


def parts_table(parts: Sequence[tuple[str, str, dict[str, float]]]) -> str:
    """Milliseconds of the parts of a frame and of all together: (run, backend, milliseconds by part) a line."""
    lines = []
    for run, backend, times in parts:
        whole = sum(times.values())
        line = {"run": run, "backend": backend} | {name: f"{time:.2f}" for name, time in times.items()}
        lines.append(line | {"all": f"{whole:.2f}", "frames/s": significant(1000 / whole)})
    return table(lines)


def comparison_table(files: Sequence[Sequence[Row]]) -> str:
    """The medians of several CSV files side by side, each with its ratio to the first file's.

    A row is found again by run, backend, precision and batch size; the columns are numbered by file, from 1.
    """
    keys = ("run", "backend", "precision", "batch")
    found = [{tuple(row[key] for key in keys): row["median_ms"] for row in rows} for rows in files]
    lines = []
    for which in dict.fromkeys(which for medians in found for which in medians):
        line: dict[str, Any] = dict(zip(keys, which, strict=True))
        first = found[0].get(which)
        for number, medians in enumerate(found, 1):
            value = medians.get(which)
            line[f"{number}: ms"] = ABSENT if value is None else significant(value)
            if number > 1:
                ratio = None if value is None or first is None else value / first
                line[f"{number}: ×"] = known(ratio, "{:.2f}")
        lines.append(line)
    return table(lines)


def known(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def mebibytes(value: int | None) -> str:
    return ABSENT if value is None else f"{significant(value / 2**20)} MiB"


def backend_name(backend: str, precision: str) -> str:
    """The backend as it is written on the command line: "eager", "openvino:int8"."""
    return backend if precision == "fp32" else f"{backend}:{precision}"


# ---------------------------------------------------------------------------------------------- CSV files


def file_name(rows: Sequence[Row]) -> str:
    """What the rows have in common, as the name of a file without its ending.

    DEVICE_BACKENDS_HxW_batchN_threadsN, say
    intel-xeon-processor_eager-fp32+onnxruntime-fp32-int8_256x512_batch1_threads2.
    """
    backends: dict[str, list[str]] = {}
    for row in rows:
        precisions = backends.setdefault(row["backend"], [])
        if row["precision"] not in precisions:
            precisions.append(row["precision"])
    first = rows[0]
    device = slug(re.sub(r"\((R|TM|C)\)", "", first["device"]))
    ways = "+".join("-".join([backend, *precisions]) for backend, precisions in backends.items())
    batches = "-".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in rows))
    return f"{device}_{ways}_{first['height']}x{first['width']}_batch{batches}_threads{first['threads']}"


def slug(text: str) -> str:
    """Small letters and digits, the rest as dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file with these columns.

    Raises:
        ConfigurationError: there is no such file.
        DamagedFileError: it lacks a column or a value can't be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        rows = [
            {name: None if line[name] == "" else kind(line[name]) for name, kind in COLUMNS.items()}
            for line in lines
        ]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigurationError(f"compare: {path}: no such file; check the path") from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DamagedFileError(f"{path}: not a table of latencies ({error!r}); measure it again") from error
    if not rows:
        raise DamagedFileError(f"{path}: has no rows; measure it again")
    return rows
