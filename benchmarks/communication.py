"""What a training step sends between devices, reversible against per-block jax.checkpoint.

A small GPT-2 (gradient and SGD update) on meshes of eight CPU devices, compiled from shapes alone:
bytes of collectives per device and step by the ring algorithms (`benchmarks.collectives`), in all,
by kind, and within the scans over blocks. `remat` is the same BDIA network with jax.checkpoint
around every block, `plain_remat` the standard transformer with it. `integers` lists collectives of
integers in loops: states are s32, packed side bits u8, and none of them may be there.

With tensor > 1 reversible sends one [B, T, D] more per block than remat: undoing a block takes its
h, so also the all-reduce behind its last projection, while jax.checkpoint's backward pass needs
only the projection's input. On the other meshes there is no difference.

Weak scaling: seconds per step on 1, 2, 4, 8 devices in data parallel, the batch growing with
them. The devices share the cores of one CPU, so time grows with their number whatever the program;
what counts is reversible over remat on the same mesh, taken in turns.
"""

import dataclasses
import statistics
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdia_jax.compiled.collectives import collectives, of_integers, sent_bytes
from bdia_jax.compiled.hlo import read
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.nnx import BDIAStack
from bdia_jax.sharding import make_mesh, param_shardings, state_sharding
from benchmarks import record
from benchmarks.measure import Stepper, in_turns

MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "tensor": 4},
    {"data": 2, "sequence": 4},
    {"fsdp": 4, "sequence": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
)
VARIANTS: dict[str, dict[str, Any]] = {
    "reversible": {"backprop": "reversible"},
    "remat": {"backprop": "remat"},
    "plain_remat": {"backprop": "remat", "magnitude": 0.0, "fixed_point": None},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the model; batch is the whole batch where bytes are counted."""

    depth: int = 8
    width: int = 128
    num_heads: int = 4
    mlp_dim: int = 512
    vocab_size: int = 512
    tokens: int = 64
    batch: int = 16


TOY = Size(depth=3, width=16, mlp_dim=32, vocab_size=32, tokens=8, batch=8)


def make_model(size: Size, options: dict[str, Any], mesh: Mesh) -> GPT2:
    """The model in training mode; its parameters are not placed yet."""
    return GPT2(
        size.vocab_size,
        size.tokens,
        width=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_dim=size.mlp_dim,
        stack=partial(BDIAStack, mesh=mesh, **options),
        rngs=nnx.Rngs(0),
    )


def compile_step(size: Size, options: dict[str, Any], mesh: Mesh) -> tuple[Any, Any]:
    """(the step (params, rest, tokens, key) -> (params, loss), compiled; its arguments' shapes)."""
    model = nnx.eval_shape(lambda: make_model(size, options, mesh))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    whole = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((size.batch, size.tokens), jnp.int32)
    # of [B, T, D]; the tokens' own last axis is T
    placed = NamedSharding(mesh, state_sharding(mesh, (*tokens.shape, size.width)).spec)
    shardings = (param_shardings(model, mesh), jax.tree.map(lambda _: whole, rest), placed, whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (params, rest, tokens, key),
        shardings,
    )

    def step(params, rest, tokens, key):
        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest)
            features = model.features(tokens, rngs=nnx.Rngs(key))
            return jnp.mean(model.loss(features, jnp.roll(tokens, -1, axis=1)))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, params, grads), loss

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings[0], whole))
    return jitted.lower(*arguments).compile(), arguments


# --- bytes -------------------------------------------------------------------------------


def count(size: Size, options: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Bytes a device sends in a step, and what is integer in the scans."""
    step, _ = compile_step(size, options, mesh)
    found = collectives(read(step.as_text()))
    integers = [
        {"kind": c.kind, "of": [f"{a.dtype}{list(a.shape)}" for a in c.results]}
        | {"times": c.times, "source": c.source}
        for c in of_integers(found)
    ]
    in_scans = sent_bytes([c for c in found if c.in_loop])
    return {"bytes": sent_bytes(found), "bytes_in_scans": in_scans, "integers": integers}


def compare(size: Size, sizes: dict[str, Any]) -> dict[str, Any]:
    """All variants on one mesh, and reversible's bytes over those of the others."""
    mesh = make_mesh(**sizes)
    rows: dict[str, Any] = {name: count(size, each, mesh) for name, each in VARIANTS.items()}
    totals = {name: row["bytes"]["total"] for name, row in rows.items()}
    ours = totals["reversible"]
    over = {f"ratio_to_{name}": ours / totals[name] for name in ("remat", "plain_remat")}
    words = {name: f"{total / 2**20:.3f} MiB" for name, total in totals.items()}
    integers = len(rows["reversible"]["integers"])
    ratio = f"{over['ratio_to_remat']:.4f} x remat"
    print(f"{sizes}: {words}, {ratio}, {integers} of integers", flush=True)
    return {"mesh": sizes, **rows, **over}


# --- time --------------------------------------------------------------------------------


def make_stepper(size: Size, options: dict[str, Any], mesh: Mesh) -> Stepper:
    """A step that ran once."""
    step, shapes = compile_step(size, options, mesh)
    _, params, rest = nnx.split(make_model(size, options, mesh), nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(1), shapes[2].shape, 0, size.vocab_size)
    values = (params, rest, tokens, jax.random.key(2))
    stepper = Stepper(step, *jax.device_put(values, jax.tree.map(lambda s: s.sharding, shapes)))
    stepper.seconds(1)
    return stepper


def weak_scaling(size: Size, devices: tuple[int, ...], rounds: int, steps: int) -> list[dict]:
    """One row per number of devices; size.batch is that of one device."""
    rows = []
    for number in devices:
        mesh = make_mesh(data=number)
        grown = dataclasses.replace(size, batch=size.batch * number)
        steppers = {name: make_stepper(grown, each, mesh) for name, each in VARIANTS.items()}
        seconds = in_turns(steppers, rounds, steps)
        row: dict[str, Any] = {"devices": number, "batch": grown.batch, "seconds": seconds}
        for name in ("remat", "plain_remat"):
            pairs = zip(seconds["reversible"], seconds[name], strict=True)
            row[f"ratio_to_{name}"] = statistics.median(ours / other for ours, other in pairs)
        rows.append(row)
        medians = {name: f"{statistics.median(values):.4f} s" for name, values in seconds.items()}
        print(f"{number} devices: {medians}, {row['ratio_to_remat']:.3f} x remat", flush=True)
    return rows


def main(argv: list[str]) -> dict:
    """Counts, times and records."""
    options = record.parser(__doc__)
    options.add_argument("--bytes_only", action="store_true", help="no weak scaling")
    args = record.parse(options, argv)
    record.cpu_devices(8)
    size, meshes, devices, rounds = Size(), MESHES, (1, 2, 4, 8), 9
    if args.toy:
        size, meshes, devices, rounds = TOY, ({"tensor": 4},), (2,), 2
    results: dict[str, Any] = {"bytes": [compare(size, sizes) for sizes in meshes]}
    config: dict[str, Any] = {"size": size}
    if not args.bytes_only:
        per_device = dataclasses.replace(size, batch=size.batch // 4)
        results["weak_scaling"] = weak_scaling(per_device, devices, rounds, 1 if args.toy else 3)
        config |= {"batch_per_device": per_device.batch, "rounds": rounds}
    record.write("communication", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
