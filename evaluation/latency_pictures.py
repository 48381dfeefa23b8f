"""Pictures of what models cost: mIoU against latency with its Pareto front, and the roofline of the layers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from evaluation.data_report import write_whole

FONT_SIZE = 9
STYLE: Any = {"font.size": FONT_SIZE, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
DOTS = 150  # an inch
MARKERS = "osD^vPX*<>hp"
PLACES = [(side, up) for up in (0.0, 1.0, -1.0, 2.2, -2.2, 3.4, -3.4, 4.6, -4.6) for side in (1, -1)]
"""Where a label may stand: right or left of its point, so many lines above; the first place that is free."""


@dataclass
class Point:
    """A model in one way to run it.

    Args:
        group: what shares a colour and a marker, a backend say.
    """

    label: str
    group: str
    milliseconds: float
    miou: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both, the fastest first; of equal ones all."""
    ordered = sorted(points, key=lambda point: (point.milliseconds, -point.miou))
    front: list[Point] = []
    for point in ordered:
        last = front[-1] if front else None
        same = last is not None and (point.milliseconds, point.miou) == (last.milliseconds, last.miou)
        if last is None or same or point.miou > last.miou:
            front.append(point)
    return front


def draw_pareto(points: Sequence[Point], path: Path, title: str = "") -> None:
    """mIoU in per cent against milliseconds (logarithmic), the front joined by a line and named in bold.

    Args:
        points: one or more.
        path: of the PNG.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.5), dpi=DOTS, layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="latency in ms", ylabel="mIoU in %", title=title)
        axes.grid(color="0.9", which="both")
        groups = list(dict.fromkeys(point.group for point in points))
        for number, group in enumerate(groups):
            own = [point for point in points if point.group == group]
            axes.scatter(
                [point.milliseconds for point in own],
                [100 * point.miou for point in own],
                color=f"C{number % 10}",
                marker=MARKERS[number % len(MARKERS)],
                label=group,
                zorder=3,
            )
        front = pareto_front(points)
        axes.plot(
            [point.milliseconds for point in front],
            [100 * point.miou for point in front],
            color="0.5",
            linewidth=1,
        )
        axes.margins(x=0.15, y=0.12)
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        readable_ticks(axes.xaxis)
        place_labels(
            axes,
            [(point.milliseconds, 100 * point.miou) for point in points],
            [point.label for point in points],
            [point in front for point in points],
        )
        save(figure, path)


@dataclass
class LayerPoint:
    """A layer in the roofline: FLOPs a byte, FLOP/s, and its share of the pass's time."""

    label: str
    kind: str
    intensity: float
    flops_per_second: float
    share: float


def draw_roofline(
    layers: Sequence[LayerPoint], roofs: tuple[float, float], path: Path, title: str = "", labels: int = 8
) -> None:
    """Each layer's FLOP/s against its FLOPs a byte, under the machine's roofs (Williams et al. 2009).

    A layer left of the ridge waits for memory, one right of it for arithmetic. Maps that stay in the cache let a
    layer stand above the sloping roof, which is that of the main memory.

    Args:
        layers: with FLOPs; the area of a point is the layer's share of the time.
        roofs: FLOP/s and bytes/s.
        labels: so many of the slowest layers are named.
    """
    flops, bandwidth = roofs
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.5), dpi=DOTS, layout="constrained")
        axes = figure.add_subplot(
            xscale="log",
            yscale="log",
            xlabel="arithmetic intensity in FLOPs a byte",
            ylabel="GFLOP/s",
            title=title,
        )
        axes.grid(color="0.9", which="both")
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        for number, kind in enumerate(kinds):
            own = [layer for layer in layers if layer.kind == kind]
            axes.scatter(
                [layer.intensity for layer in own],
                [layer.flops_per_second / 1e9 for layer in own],
                s=[20 + 1500 * layer.share for layer in own],
                color=f"C{number % 10}",
                alpha=0.6,
                linewidths=0,
                label=kind,
                zorder=3,
            )
        ridge = flops / bandwidth
        x = np.geomspace(
            min([layer.intensity for layer in layers] + [ridge]) / 2,
            max([layer.intensity for layer in layers] + [ridge]) * 2,
            200,
        )
        axes.plot(x, np.minimum(flops, bandwidth * x) / 1e9, color="0.3", linewidth=1.2, zorder=2)
        axes.set_xlim(x[0], x[-1])
        roof = f"roofs: {flops / 1e9:.0f} GFLOP/s (matrix product), {bandwidth / 1e9:.1f} GB/s (copy)"
        axes.text(0.99, 0.01, roof, transform=axes.transAxes, ha="right", va="bottom", color="0.3")
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        readable_ticks(axes.xaxis)
        readable_ticks(axes.yaxis)
        slowest = sorted(layers, key=lambda layer: -layer.share)[:labels]
        place_labels(
            axes,
            [(layer.intensity, layer.flops_per_second / 1e9) for layer in layers],
            [f"{layer.label} {layer.share:.0%}" if layer in slowest else "" for layer in layers],
            [False] * len(layers),
        )
        save(figure, path)


# ------------------------------------------------------------------------------------------------ labels


def readable_ticks(axis: Axis) -> None:
    """Plain numbers, 5, 10, 20, along a logarithmic axis of few decades, where powers of ten say too little."""
    low, high = axis.get_view_interval()
    if high / low < 1000:
        ticks = [base * 10.0**power for power in range(-4, 7) for base in (1, 2, 5)]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
        axis.set_view_interval(low, high, ignore=True)


def place_labels(
    axes: Axes, places: Sequence[tuple[float, float]], labels: Sequence[str], bold: Sequence[bool]
) -> list[Text]:
    """Writes a label beside each point where it covers neither a point nor another label, nor leaves the axes.

    The bold ones are placed first, then from top to bottom; an empty label, or one for which no place is free, is
    left out.
    """
    canvas = FigureCanvasAgg(axes.get_figure(root=True))
    canvas.draw()  # so that the layout, and with it every pixel position, is settled
    renderer = canvas.get_renderer()
    line = 1.25 * FONT_SIZE
    centres = axes.transData.transform(places) if len(places) else np.zeros((0, 2))
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centres]
    written: list[Text] = []
    named = [number for number, label in enumerate(labels) if label]
    for number in sorted(named, key=lambda number: (not bold[number], -centres[number][1])):
        for side, up in PLACES:
            text = axes.annotate(
                labels[number],
                places[number],
                xytext=(7 * side, up * line),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=7.5,
                fontweight="bold" if bold[number] else "normal",
                arrowprops=line_to(side) if up else None,
                zorder=4,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # an annotation's own has its arrow in it
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            inside = inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                written.append(text)
                break
            text.remove()
    return written


def line_to(side: int) -> dict[str, Any]:
    """The line from a point to its label: to the end of the label that is next to it."""
    end = (0.0 if side > 0 else 1.0, 0.5)
    return {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "relpos": end, "shrinkA": 0, "shrinkB": 3}


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
