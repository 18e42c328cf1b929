"""One figure for many variants: a row for each, a panel a quantity, a dot a number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from benchmarks import figure
from benchmarks.stack import LABELS, color


class Panel(NamedTuple):
    """A quantity of every variant.

    title: what it is, with its unit.
    values: by variant; None where there is no number.
    spans: (low, high) by variant, drawn as a line behind the dot.
    """

    title: str
    values: dict[str, float | None]
    spans: Mapping[str, Sequence[float]] = MappingProxyType({})


def draw(title: str, panels: list[Panel], path: Path) -> None:
    """The panels side by side, the variants in the order of the first one."""
    names = list(panels[0].values)[::-1]
    size = (3.0 + 2.9 * len(panels), 1.1 + 0.27 * len(names))
    with figure.panels(path, title, size, len(panels), sharey=True) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, names)
        axes[0].set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])


def _draw_panel(axis, panel: Panel, names: list[str]) -> None:
    right = 0.0
    for y, name in enumerate(names):
        value = panel.values[name]
        if not value:
            style = {"va": "center", "fontsize": 8, "color": "0.5"}
            axis.text(0.03, y, "does not fit", transform=axis.get_yaxis_transform(), **style)
            continue
        span = panel.spans.get(name, (value, value))
        axis.plot(span, (y, y), color=color(name), linewidth=2, alpha=0.45)
        axis.plot(value, y, "o", color=color(name), markersize=6)
        axis.annotate(_rounded(value), (max(value, span[1]), y), **figure.BESIDE)
        right = max(right, value, span[1])
    axis.set_xlim(0, 1.3 * right or 1)  # room for the number
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.caption(axis, panel.title)


def _rounded(value: float) -> str:
    """Three digits: 0.123, 12.3, 12,346."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
