"""Compiled temporary memory of one training gradient against depth.

Read from the compiled program; nothing is executed. Temporary memory is what the program
allocates beside its arguments (parameters, x) and its outputs (their gradients), which are
the same for every variant and not counted.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import record
from benchmarks.stack import GPU, MIB, TOY, VARIANTS, Shape, lower_gradient

# label, Okabe-Ito colour, vertical offset of the label in points, marker
STYLES = {
    "plain": ("plain autodiff", "#D55E00", 0, "o"),
    "remat": ("per-block jax.checkpoint", "#9A6A00", 0, "D"),
    "bdia_guard1": ("BDIA, 1 guard bit (default)", "#0072B2", 12, "o"),
    "bdia_guard0": ("BDIA, 0 guard bits", "#009E73", -16, "s"),
}


def measure(shape: Shape, depths: list[int]) -> dict[str, dict]:
    """Per variant: temporary bytes by depth, bytes per added block, and what was expected."""
    rows = {}
    for name in STYLES:
        variant = VARIANTS[name]
        sizes = []
        for depth in depths:
            analysis = lower_gradient(shape, depth, variant).compile().memory_analysis()
            if analysis is None:
                raise RuntimeError(f"{jax.default_backend()} does not analyse memory")
            sizes.append(analysis.temp_size_in_bytes)
        rows[name] = {
            "temp_bytes": dict(zip(map(str, depths), sizes, strict=True)),
            "bytes_per_block": (sizes[-1] - sizes[0]) / (depths[-1] - depths[0]),
        }
        fixed_point = getattr(variant, "keywords", {}).get("fixed_point")
        if fixed_point is not None:
            elements = shape.batch * shape.tokens * shape.width
            rows[name]["packed_bytes_per_block"] = elements * fixed_point.side_bits // 8
        cells = "  ".join(f"{size / MIB:9.1f}" for size in sizes)
        slope = rows[name]["bytes_per_block"] / MIB
        print(f"{name:12s} {cells}   MiB   {slope:.4g} MiB per block", flush=True)
    return rows


def draw(rows: dict[str, dict], shape: Shape, path: Path) -> None:
    """Temporary memory against depth: all variants, and beside it those that remat or rebuild."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), dpi=160, layout="constrained")
    _draw_panel(panels[0], rows, STYLES)
    _draw_panel(panels[1], rows, {name: STYLES[name] for name in STYLES if name != "plain"})
    panels[0].set_ylabel("temporary memory (MiB)")
    panels[0].set_title("all variants", loc="left", fontsize=10)
    panels[1].set_title("the same without plain autodiff", loc="left", fontsize=10)
    figure.suptitle(
        f"One training gradient of K transformer blocks, {shape.dtype}, B={shape.batch} "
        f"T={shape.tokens} D={shape.width}, on {record.device_name()}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)
    plt.close(figure)


def _draw_panel(axes, rows, styles) -> None:
    depths, sizes = [], []
    for name, (label, color, offset, marker) in styles.items():
        depths = [int(depth) for depth in rows[name]["temp_bytes"]]
        sizes = [size / MIB for size in rows[name]["temp_bytes"].values()]
        axes.plot(depths, sizes, marker + "-", color=color, linewidth=2, markersize=5)
        axes.set_xticks(depths)
        if len(styles) == len(rows) and name.startswith(("bdia", "remat")):
            continue  # indistinguishable in the panel of all: one label for the three, below
        text = f"{label}\n+{rows[name]['bytes_per_block'] / MIB:.3g} MiB per block"
        _label(axes, text, depths[-1], sizes[-1], offset, color)
    if len(styles) == len(rows):
        _label(axes, "jax.checkpoint, BDIA\n(see right)", depths[-1], sizes[-1], 8, "0.35")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("depth K (blocks)")


def _label(axes, text, x, y, offset, color) -> None:
    place = {"xytext": (7, offset), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, y), color=color, fontsize=9, annotation_clip=False, **place)


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape = TOY if args.toy else GPU if args.gpu else Shape()
    depths = [2, 4] if args.toy else [6, 12, 24, 48]
    results = {
        "variants": measure(shape, depths),
        "excluded": "arguments (parameters, x) and outputs (their gradients)",
    }
    config = {"shape": dataclasses.asdict(shape), "depths": depths}
    path = record.write("memory", results, config, argv=argv, args=args)
    draw(results["variants"], shape, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
