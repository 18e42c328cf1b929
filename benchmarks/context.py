"""The longest context at which the blocks of a Llama 3 8B train on 8 GPUs that need not be there.

32 blocks in bfloat16 with float32 parameters and AdamW, split over the GPUs (fsdp), a sequence on
each: parameters, gradients, moments and all that XLA plans for the gradient of the stack. Lengths
are multiples of 8,192. Nothing runs. Takes the extra `gpu-plan`, but for --toy.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import memory_report
from bdia_jax.compiled import targets
from bdia_jax.nnx import BDIAStack
from bdia_jax.sharding import make_mesh, param_shardings, set_mesh, state_sharding
from benchmarks import record
from benchmarks.gpu_loops import llama
from benchmarks.plan import most
from benchmarks.stack import LABELS, VARIANTS, Maker, Shape, gradient_of

GPUS = 8
LLAMA = Shape(batch=GPUS, width=4096, num_heads=32, mlp_dim=14336, dtype="bfloat16")
DEPTH, SHARED = 32, 4  # blocks; heads of queries to one of keys
UNIT = 8192  # tokens
LENGTHS = (8192, 131072)

# name: (what it is called, what makes the stack)
WAYS: dict[str, tuple[str, Maker]] = {
    name: (LABELS[name], VARIANTS[name]) for name in ("remat", "offload", "revnet", "bdia_guard1")
}
WAYS["bdia_by_branch"] = ("BDIA, by branch", partial(BDIAStack, by_branch=True))
WAYS["bdia_token_chunks"] = (
    "BDIA, by branch, MLP in 8 parts",
    partial(BDIAStack, by_branch=True, token_chunks=8),
)


def device_bytes(make: Maker, shape: Shape, depth: int, devices: Any) -> dict[str, int]:
    """What each of the devices needs, as compiled for them.

    Args:
        make: of the stack.
        shape, depth: of its input and blocks; a sequence for each device.
        devices: of `targets.devices`, or of this machine.

    Returns:
        temporaries and total, with AdamW's two moments, which the compiled gradient has not.
    """
    mesh = make_mesh(fsdp=len(devices), devices=devices)

    block = partial(llama, shape, jnp.dtype(shape.dtype), shared=SHARED)
    stack = nnx.eval_shape(lambda: make(block, depth, rngs=nnx.Rngs(0)))
    set_mesh(stack, mesh)
    gradient, (params, rest, x, key) = gradient_of(stack, shape)
    shardings = nnx.as_pure(param_shardings(stack, mesh))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shaped(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    pure_params = jax.tree.map(shaped, nnx.as_pure(params), shardings)
    rest = jax.tree.map(lambda leaf: shaped(leaf, whole), nnx.as_pure(rest))
    x = shaped(x, state_sharding(mesh, x.shape))
    out = (whole, (shardings, x.sharding))
    jitted = jax.jit(gradient, out_shardings=out, donate_argnames="x")
    with jax.default_device(devices[0]):
        lowered = jitted.lower(pure_params, rest, x, key)
        is_gpu = devices[0].platform == "gpu"
        compiled = (
            targets.compile(lowered, **targets.run_options()) if is_gpu else lowered.compile()
        )
    report = memory_report(compiled)
    moments = 2 * sum(
        leaf.dtype.itemsize * jax.typeof(leaf).size // len(devices)
        for leaf in jax.tree.leaves(pure_params)
    )
    return {"temporaries": report.temporaries, "total": report.total + moments}


def longest(of_length: Callable[[int], int], usable: int, unit: int) -> int:
    """The longest context that fits, in tokens."""
    return unit * most(lambda count: of_length(unit * count), usable, of_length(unit))


def main(argv: list[str]) -> dict:
    """Compiles and records."""
    options = record.parser(__doc__)
    options.add_argument("--target", default="h100", choices=list(targets.TARGETS))
    options.add_argument("--ways", nargs="+", choices=list(WAYS))
    args = record.parse(options, argv)
    if args.toy:
        record.cpu_devices(2)
        devices, usable = jax.devices()[:2], 10**6
    else:
        devices, usable = targets.devices(args.target, GPUS), targets.TARGETS[args.target].usable
    shape, depth, lengths, unit = LLAMA, DEPTH, LENGTHS, UNIT
    if args.toy:
        shape = Shape(batch=2, width=32, num_heads=4, mlp_dim=64)
        depth, lengths, unit = 4, (64,), 64
    config = {"blocks": shape, "depth": depth, "shared": SHARED, "usable": usable, "unit": unit}
    rows: dict[str, Any] = {}
    for name in args.ways or (["bdia_token_chunks"] if args.toy else WAYS):
        label, make = WAYS[name]

        @cache
        def of(length: int, make=make) -> dict[str, int]:
            return device_bytes(make, replace(shape, tokens=length), depth, devices)

        rows[name] = {"way": label}
        rows[name] |= {str(length): of(length) for length in lengths}
        rows[name]["longest"] = longest(lambda length, of=of: of(length)["total"], usable, unit)
        print(f"{label}: {rows[name]}", flush=True)
        record.write("context", rows, config, argv=argv, args=args)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
