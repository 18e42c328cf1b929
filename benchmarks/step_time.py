"""Seconds per training step: gradient and SGD update, parameters donated.

The variants take turns, round after round, so that a slow minute of the machine falls on
all of them; ratios are taken within a round. Model-FLOP utilization is the step's FLOPs without
any recomputation (`benchmarks.flops`), per second, over what the fastest of a few large matrix
products of the same dtype reached here just before. Temporary memory is the compiler's plan.
"""

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from bdia_jax import memory_report
from benchmarks import dots, record, stack
from benchmarks.flops import model_flops, peak_flops
from benchmarks.measure import Stepper, in_turns, unless_too_large
from benchmarks.stack import MIB, Maker, Shape

TOY_NAMES = ["remat", "bdia_guard1"]


def make_stepper(
    shape: Shape,
    depth: int,
    variant: Maker,
    options: dict[str, Any] | None = None,
    compiled: Any = None,
) -> Stepper:
    """A step that ran once.

    Args:
        shape, depth, variant: of the stack.
        options: of XLA.
        compiled: `lower_step(shape, depth, variant).compile()`, if it has been made already.
    """
    _, params, rest = nnx.split(stack.make_stack(shape, depth, variant), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (shape.batch, shape.tokens, shape.width))
    step = compiled or stack.lower_step(shape, depth, variant).compile(compiler_options=options)
    stepper = Stepper(step, params, rest, x, jax.random.key(2))
    stepper.seconds(1)
    return stepper


def measure(
    shape: Shape, depth: int, makers: dict[str, Maker], rounds: int, steps: int, peak: float
) -> dict[str, dict | None]:
    """Per variant the seconds of every round and what follows; None if it is out of memory."""
    steppers: dict[str, Stepper] = {}
    for name, make in makers.items():
        options = stack.xla_options(name)
        if stepper := unless_too_large(partial(make_stepper, shape, depth, make, options)):
            steppers[name] = stepper
        else:
            print(f"{name:12s} out of memory")
    seconds = in_turns(steppers, rounds, steps)
    rows: dict[str, dict | None] = dict.fromkeys(makers)
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {"median": median, "quartiles": [low, high], "seconds": values}
        row["tokens_per_second"] = shape.batch * shape.tokens / median
        row["utilization"] = model_flops(shape, depth) / median / peak
        row["temp_bytes"] = memory_report(steppers[name].step).temporaries
        for base in ("plain", "remat"):
            if base in seconds:
                ratios = [a / b for a, b in zip(values, seconds[base], strict=True)]
                row[f"ratios_to_{base}"] = ratios
                row[f"ratio_to_{base}"] = statistics.median(ratios)
        rows[name] = row
        print(_line(name, row), flush=True)
    return rows


def _line(name: str, row: dict) -> str:
    low, high = row["quartiles"]
    ratios = [
        f"{row[f'ratio_to_{base}']:.3f} x {base}"
        for base in ("plain", "remat")
        if f"ratio_to_{base}" in row
    ]
    return (
        f"{name:12s} {row['median']:9.4f} s  [{low:.4f}, {high:.4f}]  {'  '.join(ratios)}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  {100 * row['utilization']:.1f} % of peak  "
        f"{row['temp_bytes'] / MIB:.1f} MiB"
    )


def draw(rows: dict[str, dict | None], shape: Shape, depth: int, path: Path) -> None:
    """Time against plain autodiff, throughput and memory of every variant."""

    def column(key: str, scale: float = 1.0) -> dict[str, float | None]:
        return {n: row[key] * scale if row and row[key] else None for n, row in rows.items()}

    base = next((base for base in ("plain", "remat") if rows.get(base)), None)
    if base:
        found = {name: row[f"ratios_to_{base}"] for name, row in rows.items() if row}
        spans = {name: statistics.quantiles(values, n=4)[::2] for name, values in found.items()}
        time_panel = dots.Panel(f"time of a step, x {base}", column(f"ratio_to_{base}"), spans)
    else:
        spans = {name: row["quartiles"] for name, row in rows.items() if row}
        time_panel = dots.Panel("seconds a step", column("median"), spans)
    panels = [
        time_panel,
        dots.Panel("tokens/s", column("tokens_per_second")),
        dots.Panel("model FLOPs, % of peak", column("utilization", 100)),
        dots.Panel("temporary memory, MiB", column("temp_bytes", 1 / MIB)),
    ]
    title = (
        f"One training step of {depth} transformer blocks, {shape.dtype}, B={shape.batch} "
        f"T={shape.tokens} D={shape.width}, on {record.device_name()}"
    )
    dots.draw(title, panels, path)


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    options = record.parser(__doc__)
    options.add_argument("--rounds", type=int, default=None, help="turns of each variant, >= 7")
    args = record.parse(stack.add_variants(options), argv)
    shape = stack.sized(args)
    depth = 2 if args.toy else 24 if args.gpu else 12
    rounds = args.rounds or (7 if args.toy else 15 if args.gpu else 9)
    steps = 3 if args.gpu else 1
    sizes = (256,) if args.toy else (4096, 8192, 16384) if args.gpu else (1024, 2048, 4096)
    peak = peak_flops(shape.dtype, sizes)
    print(f"peak {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s, n = {peak['matmul_size']}")
    makers = stack.variants(args.variants or (TOY_NAMES if args.toy else None))
    rows = measure(shape, depth, makers, rounds, steps, peak["flops_per_second"])
    config = {
        "shape": shape,
        "depth": depth,
        "rounds": rounds,
        "steps_per_round": steps,
        "model_flops": model_flops(shape, depth),
        "peak": peak,
    }
    path = record.write("step_time", rows, config, argv=argv, args=args)
    draw(rows, shape, depth, path.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
