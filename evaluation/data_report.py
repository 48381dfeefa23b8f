"""What a data set holds, as CSV files, pictures and one HTML page that needs nothing beside it.

Rows are mappings from column to value, as data/survey.py makes them; shares are 0..1.
"""

import base64
import csv
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.pictures import Colours, heat_map, overlay
from evaluation.report import ABSENT, quantity, significant

Row = Mapping[str, Any]

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
DOTS = 110  # an inch
INK = (0.13, 0.13, 0.13)


# ------------------------------------------------------------------------------------------------- tables


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """A row a line under the columns' names; by default those of the first row. A NaN is empty."""
    text = io.StringIO()
    names = list(columns or (rows[0] if rows else []))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if _is_nan(row[name]) else row[name] for name in names})
    write_whole(path, text.getvalue().encode())


def matrix_rows(names: Sequence[str], matrix: np.ndarray) -> list[dict[str, Any]]:
    """A matrix [C, C] as rows, each class's name first."""
    return [
        {"class": name} | dict(zip(names, line.tolist(), strict=True))
        for name, line in zip(names, matrix, strict=True)
    ]


def split_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The splits, ready for `report.table` and `html_table`."""
    return [
        {
            "split": row["split"],
            "images": row["images"],
            "size": row["size"],
            "void %": share(row["void_share"]),
            "boundary %": share(row["boundary_share"]),
            "imbalance": quantity(round(row["imbalance"])),
            "instances": row["instances"],
            "brightness": f"{row['brightness']:.0f}",
            "contrast": f"{row['contrast']:.0f}",
            "day %": share(row["day_share"]),
            "dusk %": share(row["dusk_share"]),
            "night %": share(row["night_share"]),
        }
        for row in rows
    ]


def class_table(rows: Sequence[Row], instances: Sequence[Row]) -> list[dict[str, Any]]:
    """The classes of a split; areas as per cent of the image."""
    return [
        {
            "class": row["class"],
            "pixels %": share(row["pixel_share"]),
            "images %": share(row["image_share"]),
            "boundary %": share(row["boundary_share"]),
            "instances": found["instances"],
            "median area %": share(found["area_median"]),
            "small %": share(found["small_share"]),
        }
        for row, found in zip(rows, instances, strict=True)
    ]


def weight_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Pixels, effective number and weights of the classes of a split."""
    return [
        {
            "class": row["class"],
            "pixels": quantity(row["pixels"]),
            "images": row["images"],
            "median pixels of an image": _or_dash(quantity, row["pixels_per_image_median"]),
            "effective number": quantity(row["effective_number"]),
        }
        | {key.removeprefix("weight_"): significant(row[key]) for key in row if key.startswith("weight_")}
        for row in rows
    ]


def area_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The objects of a split; areas as per cent of the image."""
    areas = {"area_p5": "5 %", "area_p25": "25 %", "area_median": "median", "area_p75": "75 %", "area_p95": "95 %"}
    return [
        {
            "class": row["class"],
            "instances": row["instances"],
            "per image that shows it": significant(row["per_image_that_shows_it"]),
        }
        | {title: share(row[key]) for key, title in areas.items()}
        | {f"{word} %": share(row[f"{word}_share"]) for word in ("small", "medium", "large")}
        for row in rows
    ]


def shift_table(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class: what moved, as factors, with a star where it is marked; divergences in bits."""
    found = {(row["measure"], row["class"]): row for row in rows}
    titles = {"pixels": "pixels ×", "images": "images ×", "size": "median area ×", "place": "place, bits"}
    return [
        {"class": name} | {title: _moved(found[measure, name]) for measure, title in titles.items()}
        for name in names
    ]


def _moved(row: Row) -> str:
    value = row["shift"]
    if math.isnan(value):
        return ABSENT
    if row["measure"] == "place":
        text = f"{value:.3f}"
    elif math.isinf(value):
        text = "∞" if value > 0 else "0"
    else:
        text = significant(2.0**value)
    return text + (" *" if row["marked"] else "")


def share(value: float) -> str:
    """A share in per cent with three significant digits; a dash for NaN."""
    return ABSENT if math.isnan(value) else significant(100 * value) if value else "0"


def _or_dash(form: Any, value: float) -> str:
    return ABSENT if math.isnan(value) else form(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


# ----------------------------------------------------------------------------------------------- pictures


def draw_shares(path: Path, names: Sequence[str], colours: Colours, shares: Mapping[str, np.ndarray]) -> None:
    """Each class's share of the labelled pixels as bars on a logarithmic scale, the splits below one another.

    shares: by split [C]; the classes are sorted by the first.
    """
    splits = list(shares)
    order = np.argsort(shares[splits[0]])
    values = 100 * np.array([shares[split][order] for split in splits])
    lowest = 10 ** math.floor(math.log10(values[values > 0].min()) - 0.2)
    high = 0.8 / len(splits)
    with rc_context(STYLE):
        figure, (axes,) = _figure(9, 1.1 + len(names) * (0.12 + 0.16 * len(splits)), 1)
        for k, split in enumerate(splits):
            at = np.arange(len(names)) + 0.4 - high * (k + 0.5)
            axes.barh(
                at,
                np.maximum(values[k] - lowest, 0),
                height=0.9 * high,
                left=lowest,
                color=[_colour(colours[c]) for c in order],
                edgecolor=INK,
                linewidth=0.5,
                alpha=1 - 0.55 * k / max(1, len(splits) - 1),
            )
            for y, value in zip(at, values[k], strict=True):
                text = f"{significant(value)} %" if value else "none"
                axes.text(max(value, lowest) * 1.08, y, f"{text}  {split}", va="center", fontsize=7, color=INK)
        axes.set_xscale("log")
        axes.set_xlim(lowest, 300)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(names)), [names[c] for c in order])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("share of the labelled pixels, %")
        axes.grid(axis="x", alpha=0.3)
        _save(path, figure)


def draw_cooccurrence(path: Path, names: Sequence[str], matrix: np.ndarray) -> None:
    """Of the images that show the row's class, the per cent that show the column's. matrix: [C, C], 0..1."""
    size = 2.2 + 0.36 * len(names)
    with rc_context(STYLE):
        figure, (axes,) = _figure(size + 0.8, size, 1)
        shown = axes.imshow(100 * matrix, vmin=0, vmax=100, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set_title("of the images that show the row's class, % that show the column's", fontsize=9)
        for i, j in np.ndindex(*matrix.shape) if len(names) <= 40 else ():
            if not math.isnan(matrix[i, j]):
                colour = "white" if matrix[i, j] < 0.6 else "black"
                text = f"{100 * matrix[i, j]:.0f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour, in_layout=False)
        figure.colorbar(shown, ax=axes, fraction=0.04)
        _save(path, figure)


def draw_priors(path: Path, names: Sequence[str], priors: np.ndarray, aspect: float) -> None:
    """Where each class is found, each on a scale of its own from dark blue to yellow, whose end its title tells.

    priors: [C, rows, columns], the share of images that show the class there; aspect: height by width of images.
    """
    ends = priors.max((1, 2))
    titles = [
        f"{name}, {f'up to {_per_cent(end)}' if end else 'nowhere'}" for name, end in zip(names, ends, strict=True)
    ]
    size = (320, max(1, round(320 * aspect)))
    maps = [
        cv2.resize(heat_map(prior, end or 1), size, interpolation=cv2.INTER_NEAREST)
        for prior, end in zip(priors, ends, strict=True)
    ]
    _save_sheet(path, list(zip(titles, maps, strict=True)), columns=5, inches=2.3)


def draw_areas(
    path: Path,
    names: Sequence[str],
    colours: Colours,
    areas: Mapping[str, Sequence[np.ndarray]],
    limits: tuple[float, float],
) -> None:
    """Histograms of the areas of each class's objects, on a logarithmic scale, each of its own height.

    areas: by split, for each class its objects' shares of the image; limits: of small and of large ones.
    """
    edges = np.geomspace(min([1e-4, *(a.min() for found in areas.values() for a in found if len(a))]), 1, 41)
    middles = 100 * np.sqrt(edges[1:] * edges[:-1])
    with rc_context(STYLE):
        figure, axes = _figure(1.6 + 3.4 * len(areas), 1.2 + 0.36 * len(names), 1, len(areas), share_y=True)
        for place, (split, found) in zip(axes, areas.items(), strict=True):
            for c, area in enumerate(found):
                base = len(names) - 1 - c
                counts = np.histogram(area, edges)[0]
                heights = base + 0.85 * counts / max(counts.max(), 1)
                place.fill_between(middles, base, heights, step="mid", color=_colour(colours[c]), alpha=0.85)
                place.step(middles, heights, where="mid", color=INK, linewidth=0.6)
                if len(area):
                    median = 100 * np.median(area)
                    place.plot([median, median], [base, base + 0.85], color="black", linewidth=1.4)
                place.text(100, base + 0.3, f"{len(area)}", ha="right", fontsize=7, color=INK)
            ends = [edges[0], *limits, 1]
            for left, right, name in zip(ends, ends[1:], ("small", "medium", "large"), strict=False):
                place.axvline(100 * left, color="grey", linestyle=":", linewidth=1)
                middle = 100 * math.sqrt(left * right)
                place.text(middle, len(names) + 0.05, name, ha="center", fontsize=7, color="dimgrey")
            place.set_xscale("log")
            place.set_xlim(100 * edges[0], 115)
            place.xaxis.set_major_formatter("{x:g}")
            place.set_ylim(-0.1, len(names) + 0.5)
            place.set_title(split, pad=4)
            place.set_xlabel("area of an object, % of the image")
            place.set_yticks(np.arange(len(names)) + 0.3, names[::-1])
            place.tick_params(axis="y", length=0)
        _save(path, figure)


def draw_brightness(
    path: Path,
    brightness: Mapping[str, np.ndarray],
    limits: tuple[float, float],
    examples: Mapping[str, Sequence[tuple[float, np.ndarray]]],
) -> None:
    """How bright the images of each split are, and examples from dark to bright.

    brightness: by split [N], mean luma 0..255; limits: of night and of day; examples: by split (luma, image).
    """
    columns = max(len(row) for row in examples.values())
    cells = [
        cell
        for split, row in examples.items()
        for cell in [(f"{split}  {luma:.0f}", image) for luma, image in row] + [None] * (columns - len(row))
    ]
    width, inches = 10.5, 10 / columns
    with rc_context(STYLE):
        heights = [2.6, _sheet_height(cells, columns, inches)]
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        axes, sheet = figure.subplots(2, 1, height_ratios=heights)
        bins = list(range(0, 257, 8))
        for split, values in brightness.items():
            axes.hist(values, bins, weights=np.full(len(values), 100 / len(values)), alpha=0.45, label=split)
        for limit in limits:
            axes.axvline(limit, color="grey", linestyle=":", linewidth=1)
        bottom, top = axes.get_ylim()
        for at, name in zip((limits[0] / 2, sum(limits) / 2, 162), ("night", "dusk", "day"), strict=True):
            axes.text(at, top * 1.03, name, ha="center", fontsize=8, color="dimgrey")
        axes.set_ylim(bottom, top * 1.12)
        axes.set_xlim(0, 256)
        axes.set_xlabel("mean luma of the image")
        axes.set_ylabel("images, %")
        axes.legend(frameon=False)
        _fill_sheet(sheet, cells, columns, inches, 7)
        _save(path, figure)


def draw_shift(path: Path, names: Sequence[str], colours: Colours, rows: Sequence[Row], a: str, b: str) -> None:
    """What moved from split a to split b by class, with what chance explains in grey; marked shifts are filled."""
    titles = {
        "pixels": "share of the pixels",
        "images": "share of the images",
        "size": "median area of objects",
        "place": "where it is",
    }
    found = {(row["measure"], row["class"]): row for row in rows}
    with rc_context(STYLE):
        figure, axes = _figure(11.5, 1.3 + 0.26 * len(names), 1, len(titles), share_y=True)
        for place, (measure, title) in zip(axes, titles.items(), strict=True):
            mine = [found[measure, name] for name in names]
            ratio = measure != "place"
            finite = [abs(row[key]) for row in mine for key in ("shift", "chance") if math.isfinite(row[key])]
            end = 1.1 * max([0.02, *finite])
            for c, row in enumerate(mine):
                y = len(names) - 1 - c
                chance = min(row["chance"], end)
                if not math.isnan(row["shift"]):
                    left = -chance if ratio else 0
                    place.barh(y, chance - left, left=left, height=0.7, color="0.85")
                    at = max(-end, min(end, row["shift"]))
                    shape = "o" if math.isfinite(row["shift"]) else ">" if row["shift"] > 0 else "<"
                    face = _colour(colours[c]) if row["marked"] else "white"
                    place.plot(
                        at, y, shape, markersize=6, markerfacecolor=face, markeredgecolor=INK, clip_on=False
                    )
            place.set_xlim(-end if ratio else 0, end)
            place.set_ylim(-0.6, len(names) - 0.4)
            place.set_title(title, fontsize=9)
            place.set_yticks(range(len(names)), list(names)[::-1])
            place.grid(alpha=0.3)
            if ratio:
                place.axvline(0, color="grey", linewidth=0.8)
                place.set_xlabel(f"{b} by {a}, log2")
            else:
                place.set_xlabel("divergence, bits")
        _save(path, figure)


def draw_samples(path: Path, cells: Sequence[tuple[str, np.ndarray]]) -> None:
    """Pictures [H, W, 3] under their titles, three in a row."""
    _save_sheet(path, cells, columns=3, inches=3.7)


Cells = Sequence[tuple[str, np.ndarray] | None]
TITLE = 0.22  # inches above a picture


def _save_sheet(path: Path, cells: Cells, columns: int, inches: float) -> None:
    """A picture of pictures, each `inches` wide."""
    columns = min(columns, len(cells))
    with rc_context(STYLE):
        figure = Figure(figsize=(columns * inches, _sheet_height(cells, columns, inches)))
        _fill_sheet(figure.add_axes((0, 0, 1, 1)), cells, columns, inches, 8)
        _save(path, figure, cut=None)


def _sheet_height(cells: Cells, columns: int, inches: float) -> float:
    return -(-len(cells) // columns) * (inches * _aspect(cells) + TITLE)


def _aspect(cells: Cells) -> float:
    """Height by width of the highest picture."""
    return max(cell[1].shape[0] / cell[1].shape[1] for cell in cells if cell is not None)


def _fill_sheet(axes: Axes, cells: Cells, columns: int, inches: float, font: float) -> None:
    """Pictures under their titles in one plot, whose unit is an inch; plots of their own would be slow."""
    high = inches * _aspect(cells) + TITLE
    for k, cell in enumerate(cells):
        if cell is None:
            continue
        title, image = cell
        left, top = k % columns * inches, k // columns * high
        wide = inches - 0.06
        bottom = top + TITLE + wide * image.shape[0] / image.shape[1]
        axes.imshow(image, extent=(left, left + wide, bottom, top + TITLE))
        axes.text(left + wide / 2, top + TITLE - 0.04, title, ha="center", va="bottom", fontsize=font, color=INK)
    axes.axis("off")
    axes.set_xlim(0, columns * inches)
    axes.set_ylim(-(-len(cells) // columns) * high, 0)
    axes.set_aspect("equal")


def outlined(image: np.ndarray, label: np.ndarray, colours: Colours, c: int, width: int = 480) -> np.ndarray:
    """The image [H, W, 3] with its classes over it and class c in a white outline, at most `width` wide."""
    height = max(1, round(image.shape[0] * min(1.0, width / image.shape[1])))
    size = (min(width, image.shape[1]), height)
    mask = cv2.resize((label == c).astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    drawn = overlay(small, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST), colours, 0.45)
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = cv2.drawContours(np.ascontiguousarray(drawn), lines, -1, (0, 0, 0), 3)
    return cv2.drawContours(drawn, lines, -1, (255, 255, 255), 1)


def shrink(image: np.ndarray, width: int) -> np.ndarray:
    """The image [H, W, 3] at most `width` wide."""
    if image.shape[1] <= width:
        return image
    size = (width, max(1, round(image.shape[0] * width / image.shape[1])))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _figure(
    width: float, height: float, rows: int, columns: int = 1, *, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    return figure, list(axes.ravel())


def _colour(colour: Sequence[int]) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


def _per_cent(value: float) -> str:
    return f"{significant(100 * float(f'{value:.2g}'))} %"


def _save(path: Path, figure: Figure, cut: str | None = "tight") -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS, bbox_inches=cut, pad_inches=0.08)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """The file, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------- page

CSS = """
:root { color-scheme: light dark;
  --ink: #1c1c1e; --paper: #fff; --line: #d8d8dc; --soft: #f3f3f6; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --paper: #17171a; --line: #3a3a40; --soft: #222227; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1180px;
  margin: 0 auto; padding: 16px 20px 60px; }
h1 { font-size: 26px; margin: 12px 0 4px; }
h2 { font-size: 20px; margin: 38px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
h3 { font-size: 16px; margin: 22px 0 6px; }
nav a { margin-right: 14px; }
a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 6px 0 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 7px; border: 1px solid var(--line);
  vertical-align: -1px; }
figure { margin: 10px 0 18px; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption, .note { font-size: 13px; opacity: 0.8; max-width: 90ch; }
li { max-width: 100ch; }
.bad { color: var(--bad); font-weight: 600; }
"""


def html_page(title: str, subtitle: str, sections: Mapping[str, Sequence[str]]) -> str:
    """A page of headed sections of HTML. It refers to nothing outside, and tells browsers to allow none."""
    contents = " ".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in sections)
    body = "\n".join(
        f'<h2 id="{_anchor(name)}">{html.escape(name)}</h2>\n' + "\n".join(parts)
        for name, parts in sections.items()
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{html_note(subtitle)}\n<nav>{contents}</nav>\n{body}\n</body>\n</html>\n"
    )


def html_table(
    rows: Sequence[Row], colours: Mapping[str, Sequence[int]] | None = None, *, text: bool = False
) -> str:
    """Rows as a table; a first cell that `colours` names has that colour before it. text: to the left, broken."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["".join(f"<th>{html.escape(column)}</th>" for column in columns)]
    for row in rows:
        cells = [html.escape(str(row.get(column, ""))) for column in columns]
        colour = (colours or {}).get(str(row[columns[0]]))
        if colour is not None:
            red, green, blue = colour
            cells[0] = f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>{cells[0]}'
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table{" class=text" if text else ""}>\n{body}</table></div>'


def html_picture(path: Path, caption: str) -> str:
    """A PNG file, held in the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    words = html.escape(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines).replace(" %", "&nbsp;%") + "</ul>"


def html_note(text: str, *, bad: bool = False) -> str:
    return f'<p class="{"bad" if bad else "note"}">{html.escape(text)}</p>'


def html_heading(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>"


def html_details(summary: str, content: str) -> str:
    """What opens by a click."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{content}</details>"


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
