"""Result tables: Markdown with aligned columns, which reads well in a terminal and pastes into a paper."""

import math
import os
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ABSENT = "–"  # a value that does not exist, or a NaN

Result = Mapping[str, Any]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None = None) -> str:
    """Markdown table of `rows`, each a mapping from key to value.

    `columns` are the keys to show, or key -> heading; by default every key in the order of first appearance.
    Text goes to the left, a column of numbers to the right; None and NaN are a dash.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    cells = [[_cell(row.get(key)) for key in headings] for row in rows]
    to_right = [_is_numeric([row.get(key) for row in rows]) for key in headings]
    titles = [_cell(heading) for heading in headings.values()]
    widths = [max([3, *(_width(line[i]) for line in [titles, *cells])]) for i in range(len(titles))]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, to_right, strict=True)]
    lines = [[_pad(*cell) for cell in zip(line, widths, to_right, strict=True)] for line in [titles, *cells]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def per_class_table(results: Sequence[Result], classes: Sequence[str] | None = None) -> str:
    """IoU in percent of every class (rows) in every run (columns), with the mean last.

    Each result is a `results.json` with the keys run, iou {class: value or None} and miou. A dash is a class
    that is neither labelled nor predicted.
    """
    if classes is None:
        classes = list(dict.fromkeys(name for result in results for name in result["iou"]))
    runs = dict(zip(_run_names(results), results, strict=True))
    rows = [{"class": name} | {run: percent(r["iou"].get(name)) for run, r in runs.items()} for name in classes]
    rows.append({"class": "mean"} | {run: percent(r.get("miou")) for run, r in runs.items()})
    return table(rows, ["class", *runs])


def compare_runs(results: Sequence[Result]) -> str:
    """One row for each run with its accuracy and cost, and how it stands to the first run.

    Each result is a `results.json`: run, parameters, flops, miou, pixel_accuracy, class_accuracy (0..1),
    latency_ms (median), train_seconds; a key that no run has is left out. The ratios (columns ending in ×) and
    the difference Δ, in points, are to the first run, and left out where there is only one.
    """
    shown: list[tuple[str, str, Callable[[Any], str], str | None]] = [
        ("parameters", "params", quantity, "params ×"),
        ("flops", "FLOPs", quantity, "FLOPs ×"),
        ("miou", "mIoU %", percent, "mIoU Δ"),
        ("pixel_accuracy", "pixel acc. %", percent, None),
        ("class_accuracy", "class acc. %", percent, None),
        ("latency_ms", "latency ms", significant, "latency ×"),
        ("train_seconds", "training", duration, None),
    ]
    rows: list[dict[str, str]] = [{"run": run} for run in _run_names(results)]
    for key, heading, form, relative in shown:
        values = [result.get(key) for result in results]
        if all(_is_absent(value) for value in values):
            continue
        for row, value in zip(rows, values, strict=True):
            row[heading] = ABSENT if _is_absent(value) else form(value)
            if relative is not None and len(results) > 1:
                row[relative] = _relative(value, values[0], relative)
    return table(rows)


def seeds_table(results: Sequence[Result]) -> str:
    """One row for each method: its costs, the mean over its seeds and their spread; "" where no method has two.

    The method of a result is its key `method`: equal for runs that differ in their seed alone. ± is the standard
    deviation over the seeds (n - 1). A method is named by what the names of its runs begin with, or by its first
    run where that is nothing or not its alone.
    """
    methods = by_method(results)
    if max(map(len, methods)) < 2:
        return ""
    shown = {"miou": "mIoU %", "pixel_accuracy": "pixel acc. %", "class_accuracy": "class acc. %"}
    rows = []
    for name, runs in zip(_method_names(methods), methods, strict=True):
        row: dict[str, Any] = {"method": name}
        row["seeds"] = len(runs)
        for key, heading in {"parameters": "params", "flops": "FLOPs"}.items():
            row[heading] = quantity(runs[0][key]) if key in runs[0] else ABSENT  # the same for every seed
        for key, heading in shown.items():
            values = [100 * run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            row[heading] = f"{statistics.mean(values):.2f}{spread}"
        latencies = [run["latency_ms"] for run in runs if run.get("latency_ms")]
        row["latency ms"] = significant(statistics.mean(latencies)) if latencies else ABSENT
        times = [run["train_seconds"] for run in runs if run.get("train_seconds")]
        row["training"] = duration(statistics.mean(times)) if times else ABSENT
        rows.append(row)
    return table(rows)


def seeds_by_class(results: Sequence[Result], classes: Sequence[str]) -> str:
    """IoU in percent of every class (rows) by every method (columns), mean ± standard deviation over its seeds.

    Methods are told apart and named as in `seeds_table`; "" where no method has two seeds.
    """
    methods = by_method(results)
    if max(map(len, methods)) < 2:
        return ""

    def spread(values: list[Any]) -> str:
        if any(_is_absent(value) for value in values):
            return ABSENT
        shown = f"{100 * statistics.mean(values):.1f}"
        return f"{shown} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else shown

    columns = dict(zip(_method_names(methods), methods, strict=True))
    rows = [
        {"class": c} | {m: spread([run["iou"][c] for run in runs]) for m, runs in columns.items()} for c in classes
    ]
    rows.append({"class": "mean"} | {m: spread([run["miou"] for run in runs]) for m, runs in columns.items()})
    return table(rows, ["class", *columns])


def by_method(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each method, by their key `method`."""
    methods: dict[Any, list[Result]] = {}
    for result in results:
        methods.setdefault(result.get("method"), []).append(result)
    return list(methods.values())


def method_name(runs: Sequence[str]) -> str:
    """What the names of a method's runs begin with; of fellows, RUN/teacher, with that."""
    fellow = os.path.commonprefix([run[::-1] for run in runs])[::-1].rpartition("/")[2] if len(runs) > 1 else ""
    start = os.path.commonprefix(list(runs)).rstrip("-_./")
    return f"{start}/{fellow}" if fellow and all(run.endswith(f"/{fellow}") for run in runs) else start


def _method_names(methods: Sequence[Sequence[Result]]) -> list[str]:
    """A name for each method, all different: `method_name`, or that of its first run."""
    names = [method_name([str(run["run"]) for run in runs]) for runs in methods]
    named = [
        {"run": name if name and names.count(name) == 1 else runs[0]["run"]}
        for name, runs in zip(names, methods, strict=True)
    ]
    return _run_names(named)


def calibration_table(results: Sequence[Result]) -> str:
    """One row for each run: entropy and cross-entropy in nats, calibration error, inter-class correlation.

    The keys are those of `Calibration.summarise`.
    """
    rows = [
        {
            "run": name,
            "entropy": _nats(result["entropy"]),
            "NLL": _nats(result["nll"]),
            "ECE %": percent(result["ece"]),
            "class corr.": _nats(result["class_correlation"]),
        }
        for name, result in zip(_run_names(results), results, strict=True)
    ]
    return table(rows)


def decomposition_table(results: Sequence[Result]) -> str:
    """One row for each method: its expected loss and the parts of it, in nats, over all pixels and by region.

    Each result is a method's `Decomposition.summarise`, with its `method` and `runs`.
    """
    rows = []
    for result in results:
        row = {"method": result["method"], "seeds": len(result["runs"])}
        row |= {name: _nats(result[name]) for name in ("loss", "noise", "bias", "variance")}
        row["variance %"] = percent(_part(result["variance"], result["loss"]))
        for region, parts in result["regions"].items():
            row |= {f"{region} {name}": _nats(parts[name]) for name in ("bias", "variance")}
        row["off by"] = f"{abs(result['difference']):.0e}"
        rows.append(row)
    return table(rows)


def decomposition_by_class(results: Sequence[Result]) -> str:
    """Bias + variance of every true class (rows) with every method (columns), in nats."""
    rows = []
    for name in results[0]["classes"]:
        row = {"class": name}
        for result in results:
            parts = result["classes"][name]
            known = parts["pixels"] > 0
            row[result["method"]] = f"{parts['bias']:.3f} + {parts['variance']:.3f}" if known else ABSENT
        rows.append(row)
    return table(rows)


def _nats(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.4f}"


def _part(value: float, whole: float) -> float:
    return value / whole if whole > 0 else math.nan


def percent(share: float | None) -> str:
    """0.4567 -> 45.67."""
    return ABSENT if share is None or math.isnan(share) else f"{100 * share:.2f}"


def quantity(count: float) -> str:
    """A count with three significant digits and a unit: 491 000 -> 491 k, 4.4e6 -> 4.40 M."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{count:.0f}" if unit == "" and count == int(count) else significant(count) + unit
        count /= 1000
    return significant(count) + " T"


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.1234 -> 0.123, 12.34 -> 12.3, 1234.5 -> 1234."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(float(f'{value:.2e}')))))}f}"


def duration(seconds: float) -> str:
    """42 -> 42 s, 754 -> 12.6 min, 7200 -> 2.00 h."""
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min")):
        if seconds < limit:
            return f"{significant(seconds / divisor)} {unit}"
    return f"{significant(seconds / 3600)} h"


def _run_names(results: Sequence[Result]) -> list[str]:
    """The runs' names, numbered where several have the same."""
    names = [str(result.get("run") or f"run {number}") for number, result in enumerate(results, 1)]
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]


def _relative(value: Any, first: Any, heading: str) -> str:
    if _is_absent(value) or _is_absent(first):
        return ABSENT
    if heading.endswith("Δ"):
        return f"{100 * (value - first):+.2f}"
    return significant(value / first) if first else ABSENT


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers: as such, or as text that begins with one; a dash is neither."""
    known = [value for value in values if not _is_absent(value) and value != ABSENT]
    return bool(known) and all(
        not isinstance(value, bool) and (isinstance(value, int | float) or _begins_with_number(str(value)))
        for value in known
    )


def _begins_with_number(text: str) -> bool:
    """Whether a text is a number, with a unit or without: `12.3`, `+1.20`, `4.40 M`; `2024-01-run` is none."""
    try:
        float(text.partition(" ")[0])
    except ValueError:
        return False
    return True


def _cell(value: Any) -> str:
    """A value as a table shows it, safe inside Markdown."""
    if _is_absent(value):
        return ABSENT
    if isinstance(value, float):
        return str(int(value)) if value == int(min(abs(value), 1e15)) and abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split())


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: two for a wide character, none for a combining one."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
