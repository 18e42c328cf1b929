"""Compiled temporary memory of one training gradient, against depth and against sequence length.

Read from the compiled program; nothing is executed. Temporary memory is what the program
allocates beside its arguments (parameters, x) and its outputs (their gradients), which are
the same for every variant and not counted.
"""

import dataclasses
import sys
from pathlib import Path

from flax import nnx

from bdia_jax.nnx import BDIAStack
from benchmarks import lines, record, stack
from benchmarks.measure import temp_bytes
from benchmarks.stack import LABELS, MIB, VARIANTS, Shape

NAMES = ["plain", "remat", "remat_sqrt", "revnet"]
NAMES += ["bdia_guard0", "bdia_guard1", "bdia_chunked", "bdia_lean"]
TOY_NAMES = ["plain", "remat", "bdia_guard1"]
HIDDEN = {"bdia_guard0", "bdia_chunked"}  # in the figure they would lie on their neighbours


def against_depth(names: list[str], shape: Shape, depths: list[int]) -> dict[str, dict]:
    """Per variant: temporary bytes by depth, bytes per added block, and what was expected."""
    rows = {}
    for name in names:
        sizes = _sizes(name, {depth: (shape, depth) for depth in depths})
        row = {"temp_bytes": sizes, "bytes_per_block": slope(sizes)}
        rows[name] = row | side_bytes(name, shape)
        print(f"{name:12s} {row['bytes_per_block'] / MIB:.4g} MiB per block", flush=True)
    for row in rows.values():
        if "remat" in rows:
            base = rows["remat"]["bytes_per_block"]
            row["bytes_per_block_of_remat"] = row["bytes_per_block"] / base
    return rows


def against_length(
    names: list[str], shape: Shape, depth: int, lengths: list[int]
) -> dict[str, dict]:
    """Per variant: temporary bytes by sequence length."""
    at = {length: (dataclasses.replace(shape, tokens=length), depth) for length in lengths}
    return {name: {"temp_bytes": _sizes(name, at)} for name in names}


def _sizes(name: str, at: dict[int, tuple[Shape, int]]) -> dict[str, int]:
    """Temporary bytes by size, as far as it fits."""
    sizes: dict[str, int] = {}
    for size, (shape, depth) in at.items():
        found = temp_bytes(stack.lower_gradient(shape, depth, VARIANTS[name]))
        if found is None:
            break
        sizes[str(size)] = found
    print(f"{name:12s} " + "  ".join(f"{k}: {v / MIB:,.1f} MiB" for k, v in sizes.items()))
    return sizes


def slope(sizes: dict[str, int]) -> float:
    """Bytes per added block, from the shallowest stack to the deepest."""
    (low, first), *_, (high, last) = sizes.items()
    return (last - first) / (int(high) - int(low))


def side_bytes(name: str, shape: Shape) -> dict[str, int]:
    """What a block of a reversible BDIA stack keeps: packed bits; gamma and checksums, [B] each."""
    made = nnx.eval_shape(lambda: stack.make_stack(shape, 1, VARIANTS[name]))
    if not isinstance(made, BDIAStack) or made.backprop != "reversible":
        return {}
    assert made.fixed_point is not None
    elements = shape.batch * shape.tokens * shape.width
    packed = elements * made.fixed_point.side_bits // 8
    rows = {"gamma": 4 * shape.batch, "checksum": 4 * shape.batch * made.verify}
    named = {f"{name}_bytes_per_block": count for name, count in rows.items()}
    return {"packed_bytes_per_block": packed} | named


def draw(results: dict, shape: Shape, length_shape: Shape, length_depth: int, path: Path) -> None:
    """Both, on logarithmic axes."""
    by_depth = _in_mib(results["variants"])
    labels = {name: _with_slope(name, results["variants"][name]) for name in by_depth}
    by_length = _in_mib(results["by_length"])
    fixed = f"B={shape.batch} T={shape.tokens}", f"B={length_shape.batch} K={length_depth}"
    panels = [
        lines.Panel(fixed[0], "depth K (blocks)", by_depth, labels),
        lines.Panel(fixed[1], "sequence length T (tokens)", by_length, LABELS),
    ]
    title = (
        f"One training gradient of K transformer blocks, {shape.dtype}, D={shape.width}, "
        f"on {record.device_name()}"
    )
    lines.draw(title, "temporary memory (MiB)", panels, path)


def _with_slope(name: str, row: dict) -> str:
    """The label, and what an added block costs; of two-level remat it is no constant."""
    cost = f"\n+{round(row['bytes_per_block'] / MIB, 4):.3g} MiB a block"
    return LABELS[name] + ("" if name == "remat_sqrt" else cost)


def _in_mib(rows: dict[str, dict]) -> dict[str, dict[int, float]]:
    return {
        name: {int(size): value / MIB for size, value in row["temp_bytes"].items()}
        for name, row in rows.items()
        if name not in HIDDEN
    }


def main(argv: list[str]) -> dict:
    """Measures, draws and records."""
    args = record.parse(stack.add_variants(record.parser(__doc__)), argv)
    shape = stack.sized(args)
    depths = [2, 4] if args.toy else [6, 12, 24, 48, 96, 192, 384, 768]
    length_shape = dataclasses.replace(shape, batch=4)
    length_depth = 2 if args.toy else 24
    lengths = [32, 64] if args.toy else [128, 256, 512, 1024, 2048, 4096]
    if args.gpu:
        lengths = [8 * length for length in lengths]
    names = args.variants or (TOY_NAMES if args.toy else NAMES)
    results = {"variants": against_depth(names, shape, depths)}
    names = names[-1:] if args.toy else [n for n in names if n != "bdia_guard0"]
    results["by_length"] = against_length(names, length_shape, length_depth, lengths)
    config = {
        "shape": shape,
        "depths": depths,
        "length_shape": length_shape,
        "length_depth": length_depth,
        "lengths": lengths,
        "excluded": "arguments (parameters, x) and outputs (their gradients)",
    }
    path = record.write("memory", results, config, argv=argv, args=args)
    draw(results, shape, length_shape, length_depth, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
