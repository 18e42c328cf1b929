"""How far rebuilt states are off, block by block: Fig. 2 of arXiv 2407.09093.

Stacks of the paper's CIFAR blocks at initialization, one forward and one backward pass, in
float32. Float BDIA (eq. 16), RevViT and the midpoint rule rebuild in floating point; BDIA in
fixed point with the paper's parity bit alone (0 guard bits) and with one guard bit more. Once
as compiled here, and once with a block whose second evaluation is off by 1e-6, as that of
another kernel might be.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.nnx import BDIAStack
from benchmarks import figure, record
from benchmarks.drift import CIFAR, TOY
from benchmarks.faults import OffBlock
from benchmarks.stack import VARIANTS, Shape, make_block

OFF_BY = 1e-6
LABELS = {
    "float_bdia": "float BDIA (eq. 16)",
    "revnet": "RevViT, float",
    "midpoint": "midpoint, float",
    "bdia_guard0": "BDIA, parity bit only",
    "bdia_guard1": "BDIA, 1 guard bit",
}


def errors(name: str, shape: Shape, depth: int, off: bool) -> list[float]:
    """Largest |rebuilt - forward| of x_0 .. x_{K-2}, in units of x."""
    x = jax.random.normal(jax.random.key(1), (shape.batch, shape.tokens, shape.width))

    def make(rngs: nnx.Rngs) -> nnx.Module:
        block = make_block(shape, rngs)
        return OffBlock(block, OFF_BY) if off else block

    stack: Any = VARIANTS[name](make, depth, rngs=nnx.Rngs(0))
    if isinstance(stack, BDIAStack):
        values = stack.audit(x, rngs=nnx.Rngs(2)).errors * 2.0 ** -FixedPoint().frac_bits
    else:
        values = np.asarray(stack.rebuild_errors(x, rngs=nnx.Rngs(2)))[: depth - 1]
    return [float(value) for value in values]


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Error against block; an exact rebuild, which a logarithmic axis cannot show, at the floor."""
    floor = 1e-8
    titles = {"as_compiled": "as compiled here", "off": f"second evaluation off by {OFF_BY:g}"}
    title = f"How far rebuilt states are off, on {record.device_name()}"
    with figure.panels(path, title, (9.6, 3.6), len(results), sharey=True) as axes:
        for axis, (case, rows) in zip(axes, results.items(), strict=True):
            for name, values in rows.items():
                label = LABELS[name] + (" (exact: 0)" if not any(values) else "")
                axis.plot(range(len(values)), np.maximum(values, floor), label=label)
            axis.set(yscale="log", xlabel="block (rebuilt from right to left)")
            figure.caption(axis, titles[case])
            axis.legend(frameon=False, fontsize=7)
        axes[0].set_ylabel("largest error of a rebuilt state")


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape, depth, names, cases = CIFAR, 24, [*LABELS], ["as_compiled", "off"]
    if args.toy:
        shape, depth, names, cases = TOY, 64, ["float_bdia", "bdia_guard0", "bdia_guard1"], ["off"]
    results = {
        case: {name: errors(name, shape, depth, off=case == "off") for name in names}
        for case in cases
    }
    config = {"shape": shape, "depth": depth, "off_by": OFF_BY}
    path = record.write("rebuild_error", results, config, argv=argv, args=args)
    draw(results, path.with_suffix(".png"))
    for case, rows in results.items():
        for name, values in rows.items():
            print(f"{case:12s} {LABELS[name]:24s} largest error {max(values):.3g}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
