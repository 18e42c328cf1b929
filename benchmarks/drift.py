"""Is the rebuild exact? Drift of training-mode stacks between forward and backward, by dtype.

Stacks of the paper's CIFAR blocks with dropout 0.1, audited for 0 to 4 guard bits. `scale`
multiplies the input and the last projection of both branches, so that h grows with it: 1 is
initialization. Drift is in quanta of 2^-9, null if not even 7 guard bits could bear it.

The negative control is bfloat16-unpinned: the same blocks whose roundings XLA may leave out
(`benchmarks.faults.unpinned`).
"""

import dataclasses
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.nnx import BDIAStack
from benchmarks import record
from benchmarks.faults import unpinned
from benchmarks.measure import audit_row
from benchmarks.stack import Shape, make_block

CIFAR = Shape(batch=8, tokens=65, width=512, num_heads=8, mlp_dim=512, dropout_rate=0.1)
TOY = Shape(batch=2, tokens=9, width=32, num_heads=2, mlp_dim=32)
# name: (dtype of the matrix products, matmul precision, dtype the block's h is rounded to)
NUMERICS = {
    "float32": ("float32", None, jnp.float32),
    "float32-highest": ("float32", "highest", jnp.float32),
    "bfloat16": ("bfloat16", None, jnp.float32),
    "bfloat16-h": ("bfloat16", None, jnp.bfloat16),
    "bfloat16-unpinned": ("bfloat16", None, jnp.float32),
}
SAFETY = 2.0  # room for twice the drift seen


class Block(nnx.Module):
    """The library's block, its float32 h rounded to h_dtype; aux, if asked for: largest |h|."""

    def __init__(self, shape: Shape, h_dtype, with_size: bool, rngs: nnx.Rngs):
        self.block = make_block(shape, rngs)
        self.h_dtype = h_dtype
        self.with_size = with_size

    def __call__(self, x):
        h = self.block(x).astype(self.h_dtype)
        return (h, jnp.max(jnp.abs(h)).astype(jnp.float32)) if self.with_size else h


def make_stack(shape: Shape, depth: int, scale: float, h_dtype, with_size=False) -> BDIAStack:
    """The stack, in training mode, with its last projections scaled."""

    def make(rngs: nnx.Rngs) -> Block:
        block = Block(shape, h_dtype, with_size, rngs)
        for last in (block.block.attention.out, block.block.mlp.out):
            last.kernel[...] = last.kernel[...] * scale
        return block

    return BDIAStack(make, depth, rngs=nnx.Rngs(0), has_aux=with_size)


def largest_h(stack: BDIAStack, x: jax.Array) -> float:
    """max |h| over all blocks of one training forward of a stack made with_size."""
    _, sizes = nnx.jit(lambda stack, x: stack(x, rngs=nnx.Rngs(2)))(stack, x)
    return float(sizes.max())


def audit_case(name: str, shape: Shape, depth: int, scale: float, guards: range) -> list[dict]:
    """One row per guard_bits, and one at what the audit suggests if none of them is enough."""
    dtype, precision, h_dtype = NUMERICS[name]
    shape = dataclasses.replace(shape, dtype=dtype)
    x = scale * jax.random.normal(jax.random.key(1), (shape.batch, shape.tokens, shape.width))
    stack = make_stack(shape, depth, scale, h_dtype)
    rows = []
    with (
        jax.default_matmul_precision(precision) if precision else nullcontext(),
        unpinned() if name.endswith("unpinned") else nullcontext(),
    ):
        h_max = largest_h(make_stack(shape, depth, scale, h_dtype, with_size=True), x)
        case = {"numerics": name, "depth": depth, "scale": scale, "h_max": h_max}
        for guard_bits in guards:
            rows.append(case | _audit(stack, x, guard_bits))
        suggested = rows[-1]["suggested_guard_bits"]
        if suggested is not None and suggested not in guards:
            rows.append(case | _audit(stack, x, suggested))
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _audit(stack: BDIAStack, x: jax.Array, guard_bits: int) -> dict:
    stack.fixed_point = FixedPoint(guard_bits=guard_bits)
    return audit_row(stack.audit(x, rngs=nnx.Rngs(2)))


def enough(rows: list[dict]) -> int | None:
    """The fewest guard bits of one case that were exact with room for twice the drift."""
    for row in sorted(rows, key=lambda row: row["guard_bits"]):
        bound = FixedPoint(guard_bits=row["guard_bits"]).drift_bound
        if row["exact"] and SAFETY * row["max_drift"] <= bound:
            return row["guard_bits"]
    return None


def largest(found: list[int | None]) -> int | None:
    """What is enough in every case; None if something is not."""
    return None if None in found else max(bits for bits in found if bits is not None)


COLUMNS = ("guard_bits", "exact", "mismatches", "elements", "corrections", "max_drift")


def _line(row: dict) -> str:
    cells = row | {"exact": "yes" if row["exact"] else "NO"}
    drift = row["max_drift"]
    cells["max_drift"] = "too large" if drift is None else f"{drift:.3g}"
    case = f"{row['numerics']:17s}  {row['depth']:5d}  {row['scale']:5g}  {row['h_max']:6.1f}"
    return "  ".join([case, *(f"{cells[name]:>11}" for name in COLUMNS)])


def _header() -> str:
    case = f"{'numerics':17s}  {'depth':>5s}  {'scale':>5s}  {'h_max':>6s}"
    return "  ".join([case, *(f"{name:>11s}" for name in COLUMNS)])


def main(argv: list[str]) -> dict:
    """Audits, prints the table and records it."""
    options = record.parser(__doc__)
    options.add_argument("--numerics", nargs="+", choices=NUMERICS, default=list(NUMERICS))
    args = record.parse(options, argv)
    shape = TOY if args.toy else dataclasses.replace(CIFAR, batch=128) if args.gpu else CIFAR
    cases = [(2, 1.0)] if args.toy else [(6, 1.0), (24, 4.0)]
    guards = range(1 if args.toy else 5)
    names = ["bfloat16-h"] if args.toy else args.numerics
    print(_header())
    rows, needed = [], {name: [] for name in names}
    for depth, scale in cases:
        for name in names:
            rows += (case := audit_case(name, shape, depth, scale, guards))
            needed[name].append(enough(case))
    needed.pop("bfloat16-unpinned", None)
    by_numerics = {name: largest(found) for name, found in needed.items()}
    results = {
        "rows": rows,
        "guard_bits_needed": largest(list(by_numerics.values())),
        "guard_bits_needed_by_numerics": by_numerics,
    }
    config = {"shape": shape, "cases": cases, "safety": SAFETY}
    record.write("drift", results, config, argv=argv, args=args)
    print(verdict(results))
    return results


def verdict(results: dict) -> str:
    """The answer in one line."""
    each = ", ".join(f"{k}: {v}" for k, v in results["guard_bits_needed_by_numerics"].items())
    return (
        f"smallest guard_bits exact with {SAFETY:g}x margin in every case: "
        f"{results['guard_bits_needed']} ({each}; None: not even 7)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
