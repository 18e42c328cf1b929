"""How far rebuilt states are off, block by block: Fig. 2 of arXiv 2407.09093.

Stacks of the paper's CIFAR blocks at initialization, one forward and one backward pass, in
float32. Float BDIA (eq. 16), RevViT and the midpoint rule rebuild in floating point; BDIA in
fixed point with the paper's parity bit alone (0 guard bits) and with one guard bit more. Once
as compiled here, and once with a block whose second evaluation is off by 1e-6, as that of
another kernel might be.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.baselines import FloatBDIAStack, MidpointStack, RevStack
from bdia_jax.nnx import BDIAStack
from benchmarks import record
from benchmarks.drift import CIFAR, TOY
from benchmarks.stack import Shape, make_block

OFF_BY = 1e-6
LABELS = {
    "float_bdia": "float BDIA (eq. 16)",
    "revnet": "RevViT, float",
    "midpoint": "midpoint, float",
    "bdia_guard0": "BDIA, parity bit only",
    "bdia_guard1": "BDIA, 1 guard bit",
}


@jax.custom_vjp
def _off_in_backward(h: jax.Array) -> jax.Array:
    """h; but off by +-OFF_BY where it is evaluated to be differentiated, so in the backward."""
    return h


def _off_fwd(h):
    return h + OFF_BY * jax.random.rademacher(jax.random.key(7), h.shape, h.dtype), None


_off_in_backward.defvjp(_off_fwd, lambda _, ct: (ct,))


class _OffBlock(nnx.Module):
    """A block that is not quite deterministic."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.block = make_block(shape, rngs)

    def __call__(self, x):
        return _off_in_backward(self.block(x))

    def f(self, x):
        return _off_in_backward(self.block.f(x))

    def g(self, x):
        return _off_in_backward(self.block.g(x))


def errors(name: str, shape: Shape, depth: int, off: bool) -> list[float]:
    """Largest |rebuilt - forward| of x_0 .. x_{K-2}, in units of x."""
    x = jax.random.normal(jax.random.key(1), (shape.batch, shape.tokens, shape.width))

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return _OffBlock(shape, rngs) if off else make_block(shape, rngs)

    floats = {"float_bdia": FloatBDIAStack, "revnet": RevStack, "midpoint": MidpointStack}
    if name in floats:
        stack = floats[name](make, depth, rngs=nnx.Rngs(0))
        values = np.asarray(stack.rebuild_errors(x, rngs=nnx.Rngs(2)))[: depth - 1]
    else:
        fixed_point = FixedPoint(guard_bits=int(name[-1]))
        bdia = BDIAStack(make, depth, rngs=nnx.Rngs(0), fixed_point=fixed_point)
        values = bdia.audit(x, rngs=nnx.Rngs(2)).errors * 2.0**-fixed_point.frac_bits
    return [float(value) for value in values]


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Error against block; an exact rebuild, which a logarithmic axis cannot show, at the floor."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True, layout="constrained")
    floor = 1e-8
    titles = {"as_compiled": "as compiled here", "off": f"second evaluation off by {OFF_BY:g}"}
    for axis, (case, title) in zip(panels, titles.items(), strict=True):
        for name, values in results[case].items():
            axis.plot(
                range(len(values)),
                np.maximum(values, floor),
                label=LABELS[name] + (" (exact: 0)" if not any(values) else ""),
            )
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("block (rebuilt from right to left)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("largest error of a rebuilt state")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape, depth = (TOY, 4) if args.toy else (CIFAR, 24)
    results = {
        case: {name: errors(name, shape, depth, off) for name in LABELS}
        for case, off in (("as_compiled", False), ("off", True))
    }
    config = {"shape": dataclasses.asdict(shape), "depth": depth, "off_by": OFF_BY}
    path = record.write("rebuild_error", results, config, argv=argv, args=args)
    draw(results, path.with_suffix(".png"))
    for case, rows in results.items():
        for name, values in rows.items():
            print(f"{case:12s} {LABELS[name]:24s} largest error {max(values):.3g}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
