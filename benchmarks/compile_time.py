"""Seconds to trace and to compile one training gradient, against depth.

A scan compiles one block, whatever the depth; `loop`, per-block `jax.checkpoint` in a Python
loop, compiles every block, and is left out where that would take minutes.
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
from matplotlib.ticker import LogLocator

from benchmarks import record
from benchmarks.alternatives import LoopStack
from benchmarks.stack import GPU, LABELS, TOY, VARIANTS, Maker, Shape, color, lower_gradient

NAMES = ["plain", "remat", "remat_sqrt", "bdia_guard1"]
LOOP_LABEL = "jax.checkpoint in a Python loop"


def seconds(shape: Shape, depth: int, make: Maker) -> tuple[float, float]:
    """(tracing and lowering, compiling), nothing remembered from before."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = lower_gradient(shape, depth, make)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def measure(
    shape: Shape, names: list[str], depths: list[int], loop_depths: list[int], repeats: int
) -> dict[str, dict]:
    """Per variant: seconds by depth, and the deepest stack's total over the shallowest's."""
    if cache := jax.config.values["jax_compilation_cache_dir"]:
        raise RuntimeError(
            f"nothing is compiled twice with a compilation cache, which is in {cache}; unset "
            "JAX_COMPILATION_CACHE_DIR"
        )
    cases = {name: (VARIANTS[name], depths) for name in names} | {"loop": (LoopStack, loop_depths)}
    rows: dict[str, dict] = {
        name: {"trace": {str(k): [] for k in ks}, "compile": {str(k): [] for k in ks}}
        for name, (_, ks) in cases.items()
    }
    for _ in range(repeats):
        for name, (make, ks) in cases.items():
            for depth in ks:
                traced, compiled = seconds(shape, depth, make)
                rows[name]["trace"][str(depth)].append(traced)
                rows[name]["compile"][str(depth)].append(compiled)
    for name, row in rows.items():
        totals = [*total(row).values()]
        row["ratio_of_medians"] = totals[-1] / totals[0]
        cells = "  ".join(f"K={k} {s:.2f} s" for k, s in total(row).items())
        print(f"{name:12s} {cells}  ratio {row['ratio_of_medians']:.2f}", flush=True)
    return rows


def total(row: dict) -> dict[int, float]:
    """Median seconds of tracing and compiling together, by depth."""
    return {
        int(depth): statistics.median(map(sum, zip(row["trace"][depth], compiled, strict=True)))
        for depth, compiled in row["compile"].items()
    }


def draw(rows: dict[str, dict], shape: Shape, path: Path) -> None:
    """Total seconds against depth."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), dpi=160, layout="constrained")
    markers = dict(zip(rows, "oDs^x", strict=False))
    for name, row in rows.items():
        medians = total(row)
        label = LABELS.get(name, LOOP_LABEL)
        line = color(name) if name in LABELS else "0.35"
        axis.plot(*zip(*medians.items(), strict=True), markers[name] + "-", color=line, label=label)
    axis.set(xscale="log", yscale="log", xlabel="depth K (blocks)", ylabel="seconds")
    depths = sorted({depth for row in rows.values() for depth in total(row)})
    axis.set_xticks(depths, list(map(str, depths)))
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(
        f"Tracing and compiling one training gradient, D={shape.width}, on {record.device_name()}",
        loc="left",
        fontsize=9,
    )
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape = TOY if args.toy else GPU if args.gpu else Shape()
    depths = [2, 4] if args.toy else [8, 64, 512]
    loop_depths = [2] if args.toy else [8, 64]
    names, repeats = (["bdia_guard1"], 1) if args.toy else (NAMES, 3)
    results = measure(shape, names, depths, loop_depths, repeats)
    config = {"shape": dataclasses.asdict(shape), "repeats": repeats}
    path = record.write("compile_time", results, config, argv=argv, args=args)
    draw(results, shape, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
