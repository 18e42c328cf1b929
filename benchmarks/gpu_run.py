"""What `benchmarks.gpu_plan` plans, run on the GPU that is here: planned beside measured.

A training step of the stack (gradient and SGD, parameters donated), each way in a process of its
own, so that the most memory it ever had in use is its own. A bound of time is there for GPUs that
`bdia_jax.compiled.targets` describes. On a CPU, where JAX does not say how much memory is in use,
only time is measured (--toy).
"""

import argparse
import json
import subprocess
import sys
from statistics import median
from typing import Any

import jax
from flax import nnx

from bdia_jax import memory_report
from bdia_jax.compiled.hlo import read
from bdia_jax.compiled.targets import TARGETS
from bdia_jax.compiled.traffic import total, work
from bdia_jax.nnx import BDIAStack
from benchmarks import record
from benchmarks.gpt2_memory import MEDIUM_GPU
from benchmarks.gpu_plan import NAMES, WAYS
from benchmarks.measure import audit_row
from benchmarks.stack import (
    MIB,
    TOY,
    Shape,
    add_variants,
    lower_step,
    make_stack,
    xla_options,
)
from benchmarks.step_time import make_stepper


def sizes(args: argparse.Namespace) -> tuple[Shape, int, int]:
    """Of the stack: its shape, its blocks; and rounds of three steps."""
    return (TOY, 2, 2) if args.toy else (MEDIUM_GPU, 24, 20)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One way: bytes and seconds as planned and as measured; an audit where states are rebuilt."""
    shape, depth, rounds = sizes(args)
    make, device = WAYS[name], jax.devices()[0]
    compiled = lower_step(shape, depth, make).compile(compiler_options=xla_options(name))
    report = memory_report(compiled)
    stepper = make_stepper(shape, depth, make, compiled=compiled)
    seconds = [stepper.seconds(3) for _ in range(rounds)]
    row: dict[str, Any] = {
        "planned_bytes": report.total,
        "measured_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "temp_bytes": report.temporaries,
        "bound_seconds": None,
        "seconds": median(seconds),
        "all_seconds": seconds,
    }
    for target in TARGETS.values():
        if target.kind == device.device_kind:
            kernels = work(read(compiled.as_text() or ""))
            row["bound_seconds"] = total(kernels, target).seconds
    stack = make_stack(shape, depth, make)
    if isinstance(stack, BDIAStack) and stack.backprop == "reversible":
        x = jax.random.normal(jax.random.key(1), (stack.batch_chunks, shape.tokens, shape.width))
        row["audit"] = audit_row(stack.audit(x, rngs=nnx.Rngs(2)))
    return row


def main(argv: list[str]) -> dict:
    """Runs every way in its own process and records."""
    options = add_variants(record.parser(__doc__), WAYS)
    options.add_argument("--one", choices=list(WAYS), help="this way, here; prints its row")
    args = record.parse(options, argv)
    if args.one:
        row = run(args.one, args)
        print(json.dumps(row))
        return row
    rows: dict[str, Any] = {}
    for name in args.variants or (["bdia_chunked"] if args.toy else NAMES):
        command = [sys.executable, "-m", "benchmarks.gpu_run", "--one", name]
        command += ["--toy", "--out", str(args.out)] if args.toy else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed, as said above", flush=True)
            rows[name] = None
            continue
        rows[name] = row = json.loads(done.stdout.splitlines()[-1])
        print(_line(name, row), flush=True)
    config: dict[str, Any] = dict(zip(("shape", "depth", "rounds"), sizes(args), strict=True))
    record.write("gpu_run", rows, config, argv=argv, args=args)
    return rows


def _line(name: str, row: dict[str, Any]) -> str:
    measured = row["measured_bytes"]
    held = f"{measured / MIB:.0f} MiB held" if measured else "held: not known"
    bound = row["bound_seconds"]
    least = f"at least {1e3 * bound:.1f} ms" if bound else "no bound"
    exact = {None: "", True: "; exact", False: "; NOT EXACT"}[row.get("audit", {}).get("exact")]
    return (
        f"{name:14s} planned {row['planned_bytes'] / MIB:.0f} MiB, {held}; {least}, took "
        f"{1e3 * row['seconds']:.1f} ms{exact}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
