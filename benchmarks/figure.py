"""What all figures share: panels side by side under a title, saved and closed; their style."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# a text beside its point, which the caller gives
BESIDE: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points"}
BESIDE |= {"va": "center", "fontsize": 8}


@contextmanager
def panels(
    path: Path, title: str, size: tuple[float, float], count: int = 2, **options: Any
) -> Iterator[Any]:
    """The axes of `count` panels; the figure is written to `path` at the end.

    Args:
        path: of the PNG.
        title: of the whole.
        size: in inches.
        count: of panels.
        **options: of `plt.subplots`.
    """
    options |= {"figsize": size, "dpi": 160, "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, count, **options)
    yield axes[0]
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)


def caption(axis: Any, title: str, *, grid: str = "both") -> None:
    """A panel's own title, above its left corner, and lines behind what it shows."""
    axis.set_title(title, loc="left", fontsize=9)
    axis.grid(axis=grid, color="0.92")
