"""Largest batch and longest sequence of a training step that fit a memory budget; tokens/s there.

A size fits if the compiler's plan of the whole step does: temporaries, arguments (parameters, x)
and results, less what the results take over from donated arguments. Nothing is executed to
find the limit; the step is then run at it. The variants do not take turns, so compare their
tokens/s only roughly; `benchmarks.step_time` compares them at one size. The batch is that of
one gradient: summed over several smaller ones, a batch of any size fits. Sizes are found to
1/16. On a GPU the budget is 95 % of what JAX may use of it, unless --budget-gib says less.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from bdia_jax import memory_report
from benchmarks import dots, record
from benchmarks.measure import device_bytes, unless_too_large
from benchmarks.stack import MIB, TOY, Maker, Shape, add_variants, lower_step, variants
from benchmarks.step_time import make_stepper

# narrow and deep, so that a step at the limit takes seconds on a CPU; GPT-2 medium's blocks
CPU = Shape(batch=4, tokens=64, width=128, num_heads=4, mlp_dim=512)
GPU = Shape(batch=8, tokens=1024, width=1024, num_heads=16, mlp_dim=4096, dtype="bfloat16")
UNITS = {"batch": 4, "tokens": 64}  # multiples that variants in parts can cut
# by default; each of the others needs nearly the memory of one of these
NAMES = ["plain", "remat", "remat_sqrt", "offload", "revnet", "midpoint"]
NAMES += ["bdia_guard1", "bdia_chunked", "bdia_lean"]


def largest(fits: Callable[[int], bool], start: int, unit: int) -> int:
    """A multiple of unit that fits while one at most 1/16 (or a unit) larger does not; 0: none.

    Doubles from start, or halves the way down, then bisects. What it returns has been tried.
    """
    low, high, size = 0, None, start
    while high is None or high - low > max(unit, low // 16 // unit * unit):
        if fits(size):
            low = size
        else:
            high = size
        size = 2 * low if high is None else (low + high) // 2 // unit * unit
    return low


def search(shape: Shape, depth: int, make: Maker, axis: str, budget: float, unit: int) -> dict:
    """The largest size of one variant along one axis: its plan in bytes, and tokens/s there.

    Args:
        shape, depth, make: of the stack; shape's `axis` is where the search begins.
        axis: "batch" or "tokens".
        budget: bytes.
        unit: multiples of it are tried.
    """
    began, tried = time.perf_counter(), []
    best: tuple[Shape, jax.stages.Compiled] | None = None  # the last that fitted

    def fits(size: int) -> bool:
        nonlocal best
        tried.append(size)
        larger = dataclasses.replace(shape, **{axis: size})
        compiled = unless_too_large(lower_step(larger, depth, make).compile)
        if compiled is None or memory_report(compiled).total > budget:
            return False
        best = larger, compiled
        return True

    row: dict = {"size": largest(fits, getattr(shape, axis), unit)}
    row |= {"planned_bytes": None, "tokens_per_second": None}
    if best:
        row["planned_bytes"] = memory_report(best[1]).total
        row["tokens_per_second"] = unless_too_large(partial(tokens_per_second, *best, depth, make))
    speed = row["tokens_per_second"]
    words = f"{speed:,.0f} tokens/s" if speed else "did not run"
    print(
        f"{row['size']:7d}  {(row['planned_bytes'] or 0) / MIB:9.1f} MiB  {words}  "
        f"({len(tried)} compiled, {time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    return row


def tokens_per_second(
    shape: Shape, compiled: jax.stages.Compiled, depth: int, make: Maker, seconds: float = 2.0
) -> float:
    """Of a compiled step, over about so many seconds."""
    stepper = make_stepper(shape, depth, make, compiled=compiled)
    steps = max(1, round(seconds / stepper.seconds(1)))
    return shape.batch * shape.tokens / stepper.seconds(steps)


def measure(
    shape: Shape, depth: int, makers: dict[str, Maker], budget: float, units: dict[str, int]
) -> dict[str, dict[str, dict]]:
    """A `search` per axis and variant, each beginning where the one before ended."""
    results: dict[str, dict[str, dict]] = {axis: {} for axis in units}
    for axis, rows in results.items():
        begin = shape
        for name, make in makers.items():
            print(f"{axis:6s} {name:12s}", end=" ")
            rows[name] = search(begin, depth, make, axis, budget, units[axis])
            if rows[name]["size"]:
                begin = dataclasses.replace(shape, **{axis: rows[name]["size"]})
    return results


def draw(results: dict, shape: Shape, depth: int, budget: float, path: Path) -> None:
    """Both limits of every variant and its throughput there."""
    panels = []
    titles = {"batch": f"largest batch (T={shape.tokens})"}
    titles["tokens"] = f"longest sequence (B={shape.batch})"
    for axis, rows in results.items():
        sizes = {name: float(row["size"]) or None for name, row in rows.items()}
        speeds = {name: row["tokens_per_second"] for name, row in rows.items()}
        panels += [dots.Panel(titles[axis], sizes), dots.Panel("tokens/s there", speeds)]
    title = (
        f"One training step of {depth} transformer blocks, {shape.dtype}, D={shape.width}, "
        f"in {budget / 2**30:.3g} GiB, on {record.device_name()}"
    )
    dots.draw(title, panels, path)


def main(argv: list[str]) -> dict:
    """Searches, runs, draws and records."""
    options = record.parser(__doc__)
    options.add_argument("--budget-gib", type=float, help="0.25 on a CPU; a GPU's own, less 5 %%")
    args = record.parse(add_variants(options), argv)
    shape, depth = (TOY, 2) if args.toy else (GPU, 24) if args.gpu else (CPU, 32)
    units = {axis: min(unit, getattr(shape, axis)) for axis, unit in UNITS.items()}
    # in the toy's the size it starts from fits, twice it does not
    budget = 4.5 * MIB if args.toy else 0.95 * (device_bytes() or 0) or 2.0**30 / 4
    budget = 2.0**30 * args.budget_gib if args.budget_gib else budget
    names = ["remat"] if args.toy else [n for n in NAMES if n in variants()]
    makers = variants(args.variants or names)
    results = measure(shape, depth, makers, budget, units)
    config = {"shape": shape, "depth": depth, "budget_bytes": int(budget), "units": units}
    path = record.write("limits", results, config, argv=argv, args=args)
    draw(results, shape, depth, budget, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
