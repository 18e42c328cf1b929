"""One figure of lines on logarithmic axes, each named at its end instead of in a legend."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.stack import color

_STYLES = {"remat_sqrt": "D--", "bdia_chunked": "s--", "bdia_lean": "s--"}  # second of their colour
_FONT_SIZE = 8.5
_LINE_HEIGHT = 1.25 * _FONT_SIZE  # points


class Panel(NamedTuple):
    """A quantity of every variant against one size.

    title: what is held fixed. xlabel: the size, with its unit.
    lines: {variant: {size: value}}.
    labels: {variant: what stands at its line's end}.
    """

    title: str
    xlabel: str
    lines: dict[str, dict[int, float]]
    labels: dict[str, str]


def draw(title: str, ylabel: str, panels: list[Panel], path: Path) -> None:
    """The panels side by side."""
    size = (5.6 * len(panels), 4.3)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, dpi=160, layout="constrained", squeeze=False
    )
    texts = [_draw_panel(axis, panel) for axis, panel in zip(axes[0], panels, strict=True)]
    axes[0][0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    figure.canvas.draw()  # the layout, which the labels' distances depend on
    for axis, annotations in zip(axes[0], texts, strict=True):
        _spread(axis, annotations)
    figure.savefig(path)
    plt.close(figure)


def _draw_panel(axis, panel: Panel) -> list:
    texts = []
    for name, values in panel.lines.items():
        style = _STYLES.get(name, "o-")
        width = 2.2 if name.startswith("bdia") else 1.5
        points = zip(*values.items(), strict=True)
        axis.plot(*points, style, color=color(name), linewidth=width, markersize=4)
        texts.append(_label(axis, panel.labels[name], max(values.items()), color(name)))
    sizes = sorted({size for values in panel.lines.values() for size in values})
    axis.set(xscale="log", yscale="log", xlabel=panel.xlabel)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(numticks=10))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_title(panel.title, loc="left", fontsize=9)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return texts


def _label(axis, text: str, end: tuple[int, float], color: str):
    """The text right of the line's end, and a thin line to it."""
    text = re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", text)  # broken after commas only
    parts = [textwrap.fill(part, 27, break_on_hyphens=False) for part in text.split("\n")]
    leader = {"arrowstyle": "-", "color": color, "alpha": 0.4, "shrinkA": 0, "relpos": (0, 0.5)}
    place = {"xytext": (16, 0), "textcoords": "offset points", "va": "center"}
    style = {"color": color, "fontsize": _FONT_SIZE, "annotation_clip": False}
    return axis.annotate("\n".join(parts), end, arrowprops=leader, **place, **style)


def _spread(axis, texts: list) -> None:
    """Moves labels up and down until none covers another."""
    points = 72 / axis.figure.dpi
    texts = sorted(texts, key=lambda text: text.xy[1])
    ends = [axis.transData.transform(text.xy)[1] * points for text in texts]
    heights = [_LINE_HEIGHT * (1 + text.get_text().count("\n")) for text in texts]
    places = apart(ends, heights)
    for text, place, end in zip(texts, places, ends, strict=True):
        text.set_position((text.get_position()[0], place - end))


def apart(wanted: list[float], heights: list[float]) -> list[float]:
    """Centres near the `wanted`, ascending ones, at which labels of these heights do not overlap.

    Labels that would are moved into a row around the middle of where they were wanted.
    """
    rows: list[list[int]] = []
    starts: list[float] = []
    for index in range(len(wanted)):
        rows.append([index])
        starts.append(wanted[index] - heights[index] / 2)
        while len(rows) > 1 and starts[-2] + _sum(heights, rows[-2]) > starts[-1]:
            last = rows.pop()
            starts.pop()
            rows[-1] += last
            middle = _sum(wanted, rows[-1]) / len(rows[-1])
            starts[-1] = middle - _sum(heights, rows[-1]) / 2
    centres = []
    for row, start in zip(rows, starts, strict=True):
        for index in row:
            centres.append(start + heights[index] / 2)
            start += heights[index]
    return centres


def _sum(values: list[float], indices: list[int]) -> float:
    return sum(values[index] for index in indices)
