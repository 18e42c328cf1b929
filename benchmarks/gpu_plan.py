"""Memory and traffic of a training gradient as XLA compiles it for a GPU that need not be there.

The stack of GPT-2 medium (K=24, T=1024, batch 8) in bfloat16, each way of training it; the paper's
ViT, a whole training step. Nothing runs: these are the compiler's plan, the bytes its kernels
move, and a bound of time (`bdia_jax.compiled.traffic`). Matrix products are cuBLAS's, attention
is cuDNN's where `bdia_jax.models.attention` takes it. Takes the extra `gpu-plan`.
"""

import sys
from functools import partial
from typing import Any

import jax

from bdia_jax import FixedPoint, memory_report
from bdia_jax.compiled import targets
from bdia_jax.compiled.hlo import read
from bdia_jax.compiled.traffic import total, work
from bdia_jax.nnx import BDIAStack
from benchmarks import record, vit_memory
from benchmarks.gpt2_memory import MEDIUM_GPU
from benchmarks.stack import MIB, TOY, VARIANTS, add_variants, lower_gradient, xla_options
from train.loop.program import lower_steps, make_program

NAMES = ["plain", "remat", "bdia_remat", "revnet", "bdia_guard0", "bdia_guard1"]
NAMES += ["bdia_sixteenth", "bdia_by_branch", "bdia_halves", "bdia_chunked", "bdia_lean"]
WAYS = VARIANTS | {
    "bdia_sixteenth": partial(BDIAStack, magnitude=2**-4, fixed_point=FixedPoint(gamma_bits=4)),
    "bdia_by_branch": partial(BDIAStack, by_branch=True),
    "bdia_halves": partial(BDIAStack, batch_chunks=2),
}
VIT_NAMES = ["plain", "remat", "revnet", "bdia", "bdia_chunked", "bdia_lean"]


def planned(lowered: jax.stages.Lowered, target: str, **options: Any) -> dict[str, Any]:
    """What the program for this GPU takes: bytes, kernels, FLOPs, and the bound in seconds."""
    compiled = targets.compile(lowered, **options)
    memory = memory_report(compiled)
    everything = total(work(read(compiled.as_text() or "")), targets.TARGETS[target])
    return {
        "temp_bytes": memory.temporaries,
        "total_bytes": memory.total,
        "moved_bytes": everything.bytes,
        "kernels": everything.kernels,
        "flops": everything.flops,
        "bound_seconds": everything.seconds,
    }


def measure(cases: dict[str, Any], target: str) -> dict[str, dict]:
    """A row for each of `name -> () -> Lowered`, with its ratios to "remat"."""
    rows: dict[str, dict] = {}
    for name, lower in cases.items():
        with jax.default_device(targets.devices(target)[0]):
            rows[name] = planned(lower(), target, **xla_options(name))
    for name, row in rows.items():
        keys = rows["remat"].keys() - {"of_remat"} if "remat" in rows else ()
        row["of_remat"] = {key: row[key] / rows["remat"][key] for key in sorted(keys)}
        print(_line(name, row), flush=True)
    return rows


def _line(name: str, row: dict) -> str:
    ratios = " ".join(f"{key} {value:.3f}" for key, value in row["of_remat"].items() if value)
    return (
        f"{name:14s} temporaries {row['temp_bytes'] / MIB:9.1f} MiB, total "
        f"{row['total_bytes'] / MIB:9.1f}, moved {row['moved_bytes'] / 2**30:7.1f} GiB, "
        f"{row['flops'] / 1e12:6.2f} TFLOP, at least {row['bound_seconds'] * 1e3:6.1f} ms; {ratios}"
    )


def lower_vit(name: str, changes: dict[str, Any]) -> jax.stages.Lowered:
    """A training step of a row of `vit_memory`, changed."""
    run, own = vit_memory.ROWS[name]
    with jax.default_device(jax.local_devices()[0]):  # which can make an array
        program = make_program(*vit_memory.opened(run, own | changes))
    return lower_steps(program)


def main(argv: list[str]) -> dict:
    """Compiles and records."""
    options = add_variants(record.parser(__doc__), WAYS)
    options.add_argument("--target", default="h100", choices=list(targets.TARGETS))
    options.add_argument("--only", choices=["stack", "vit"], help="one of the two parts")
    args = record.parse(options, argv)
    shape, depth = (TOY, 2) if args.toy else (MEDIUM_GPU, 24)
    model = {"dtype": "bfloat16"}
    changes: dict[str, Any] = {"model": model}
    if args.toy:
        model |= {"width": 32, "depth": 2, "mlp_dim": 32}
        changes |= {"batch_size": 16, "input": {"rand_augment_ops": 0}}
    variants = args.variants or (["remat", "bdia_chunked"] if args.toy else NAMES)
    vits = ["remat", "bdia"] if args.toy else VIT_NAMES
    parts: dict[str, dict[str, Any]] = {
        "stack": {name: partial(lower_gradient, shape, depth, WAYS[name]) for name in variants},
        "vit": {name: partial(lower_vit, name, changes) for name in vits},
    }
    results = {}
    for part, cases in parts.items():
        if args.only in (None, part):
            print(f"{part}, as compiled for {targets.TARGETS[args.target].kind}", flush=True)
            results[part] = measure(cases, args.target)
    config = {"shape": shape, "depth": depth, "vit": {"config": "configs/vit_cifar10.py"} | changes}
    record.write("gpu_plan", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
