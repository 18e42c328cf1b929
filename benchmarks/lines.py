"""One figure of lines on logarithmic axes, each named at its end instead of in a legend."""

import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator

from benchmarks import figure
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
    with figure.panels(path, title, (5.6 * len(panels), 4.3), len(panels)) as axes:
        texts = [_draw_panel(axis, panel) for axis, panel in zip(axes, panels, strict=True)]
        axes[0].set_ylabel(ylabel)
        axes[0].figure.canvas.draw()  # the layout, which the labels' distances depend on
        for axis, annotations in zip(axes, texts, strict=True):
            _spread(axis, annotations)


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
    axis.yaxis.set_major_locator(LogLocator(numticks=10))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.caption(axis, panel.title)
    return texts


def _label(axis, text: str, end: tuple[int, float], color: str):
    """The text right of the line's end, and a thin line to it."""
    text = re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", text)  # broken after commas only
    parts = [textwrap.fill(part, 27, break_on_hyphens=False) for part in text.split("\n")]
    leader = {"arrowstyle": "-", "color": color, "alpha": 0.4, "shrinkA": 0, "relpos": (0, 0.5)}
    style: dict[str, Any] = figure.BESIDE | {"xytext": (16, 0), "fontsize": _FONT_SIZE}
    style |= {"color": color, "annotation_clip": False, "arrowprops": leader}
    return axis.annotate("\n".join(parts), end, **style)


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
    rows: list[tuple[float, list[int]]] = []  # (where it starts, its labels)
    for index, (centre, height) in enumerate(zip(wanted, heights, strict=True)):
        rows.append((centre - height / 2, [index]))
        while len(rows) > 1 and rows[-2][0] + _sum(heights, rows[-2][1]) > rows[-1][0]:
            row = rows.pop(-2)[1] + rows.pop()[1]
            middle = _sum(wanted, row) / len(row)
            rows.append((middle - _sum(heights, row) / 2, row))
    centres = []
    for start, row in rows:
        for index in row:
            centres.append(start + heights[index] / 2)
            start += heights[index]
    return centres


def _sum(values: list[float], indices: list[int]) -> float:
    return sum(values[index] for index in indices)
