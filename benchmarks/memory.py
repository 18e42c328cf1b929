"""Compiled temporary memory of one training gradient against depth.

Read from the compiled program; nothing is executed. Temporary memory is what the program
allocates beside its arguments (parameters, x) and its outputs (their gradients), which are
the same for every variant and not counted.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import record
from benchmarks.stack import (
    BDIA_GUARD_0,
    BDIA_GUARD_1,
    GPU,
    PLAIN,
    PLAIN_REMAT,
    TOY,
    Shape,
    lower_gradient,
)

MIB = 2**20
VARIANTS = {
    "plain": PLAIN,
    "remat": PLAIN_REMAT,
    "bdia_guard0": BDIA_GUARD_0,
    "bdia_guard1": BDIA_GUARD_1,
}
# label and Okabe-Ito colour of each line
STYLES = {
    "plain": ("plain autodiff", "#D55E00"),
    "remat": ("per-block jax.checkpoint", "#E69F00"),
    "bdia_guard1": ("BDIA, 1 guard bit (default)", "#0072B2"),
    "bdia_guard0": ("BDIA, 0 guard bits", "#56B4E9"),
}


def measure(shape: Shape, depths: list[int]) -> dict[str, dict]:
    """Per variant: temporary bytes by depth, bytes per added block, and what was expected."""
    rows = {}
    for name, variant in VARIANTS.items():
        sizes = []
        for depth in depths:
            analysis = lower_gradient(shape, depth, variant).compile().memory_analysis()
            sizes.append(analysis.temp_size_in_bytes)
        rows[name] = {
            "temp_bytes": dict(zip(map(str, depths), sizes, strict=True)),
            "bytes_per_block": (sizes[-1] - sizes[0]) / (depths[-1] - depths[0]),
        }
        fixed_point = variant["fixed_point"]
        if fixed_point is not None:
            elements = shape.batch * shape.tokens * shape.width
            rows[name]["packed_bytes_per_block"] = elements * fixed_point.side_bits // 8
        cells = "  ".join(f"{size / MIB:9.1f}" for size in sizes)
        slope = rows[name]["bytes_per_block"] / MIB
        print(f"{name:12s} {cells}   MiB   {slope:.4g} MiB per block", flush=True)
    return rows


def compile_seconds(shape: Shape, depths: list[int], repeats: int) -> dict:
    """Median seconds to trace and compile the reversible gradient, by depth."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(repeats):
        for depth in depths:
            jax.clear_caches()
            start = time.perf_counter()
            lower_gradient(shape, depth, BDIA_GUARD_1).compile()
            seconds[depth].append(time.perf_counter() - start)
    medians = {depth: statistics.median(values) for depth, values in seconds.items()}
    ratio = medians[depths[-1]] / medians[depths[0]]
    print("compile  ", {f"K={k}": f"{s:.2f} s" for k, s in medians.items()}, f"ratio {ratio:.2f}")
    return {"seconds": {str(k): v for k, v in seconds.items()}, "ratio_of_medians": ratio}


def draw(rows: dict[str, dict], shape: Shape, path: Path) -> None:
    """Temporary memory against depth on a log axis, one labelled line a variant."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=200)
    for name, (label, color) in STYLES.items():
        depths = [int(depth) for depth in rows[name]["temp_bytes"]]
        sizes = [size / MIB for size in rows[name]["temp_bytes"].values()]
        slope = rows[name]["bytes_per_block"] / MIB
        axes.plot(depths, sizes, "o-", color=color, linewidth=2, markersize=5, label=label)
        lift = {"bdia_guard1": 7, "bdia_guard0": -7}.get(name, 0)  # nearly the same line
        axes.annotate(
            f"{label}\n+{slope:.2g} MiB a block",
            (depths[-1], sizes[-1]),
            xytext=(8, 2 * lift),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
        )
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("depth K (blocks)")
    axes.set_ylabel("temporary memory (MiB)")
    axes.set_title(
        f"One training gradient, B={shape.batch} T={shape.tokens} D={shape.width} {shape.dtype}, "
        f"on {record.device_name()}",
        fontsize=10,
        loc="left",
    )
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape = TOY if args.toy else GPU if args.gpu else Shape()
    depths = [2, 4] if args.toy else [6, 12, 24, 48]
    compile_depths = [2, 4] if args.toy else [8, 512]
    repeats = 1 if args.toy else 3
    results = {
        "variants": measure(shape, depths),
        "compile": compile_seconds(shape, compile_depths, repeats),
        "excluded": "arguments (parameters, x) and outputs (their gradients)",
    }
    config = {"shape": dataclasses.asdict(shape), "depths": depths}
    path = record.write("memory", results, config, argv=argv, args=args)
    draw(results["variants"], shape, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
