"""Seconds to trace and to compile one training gradient, against depth.

A scan compiles one block, whatever the depth; `loop`, per-block `jax.checkpoint` in a Python
loop, compiles every block, and is left out where that would take minutes.
"""

import statistics
import sys
import time
from pathlib import Path

import jax

from benchmarks import lines, record
from benchmarks.alternatives import LoopStack
from benchmarks.stack import LABELS, VARIANTS, Maker, Shape, lower_gradient, sized

NAMES = ["plain", "remat", "remat_sqrt", "bdia_guard1"]


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
    labels = LABELS | {"loop": "jax.checkpoint in a Python loop"}
    medians = {name: total(row) for name, row in rows.items()}
    panel = lines.Panel(f"D={shape.width}", "depth K (blocks)", medians, labels)
    title = f"Tracing and compiling one training gradient, on {record.device_name()}"
    lines.draw(title, "seconds", [panel], path)


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape = sized(args)
    depths = [2, 4] if args.toy else [8, 64, 512]
    loop_depths = [2] if args.toy else [8, 64]
    names, repeats = (["bdia_guard1"], 1) if args.toy else (NAMES, 3)
    results = measure(shape, names, depths, loop_depths, repeats)
    config = {"shape": shape, "repeats": repeats}
    path = record.write("compile_time", results, config, argv=argv, args=args)
    draw(results, shape, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
