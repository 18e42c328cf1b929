"""Compiled temporary memory of one training gradient of GPT-2 medium: K=24, T=1024, batch 8.

Of the stack of blocks alone, and of the whole model with embedding and loss. Nothing is executed;
arguments and outputs (parameters and their gradients) are not counted. All models have the
loss that never holds the logits of the vocabulary (`bdia_jax.losses`); what that is worth,
`bdia_lean_full_logits` says. RevViT doubles the width, so it has no whole model.

`remat_accumulated` is what else divides a batch in 4: the gradients of 4 smaller batches, summed.
The sum needs a second copy of all gradients; `batch_chunks` of `BDIAStack` sums a block's only.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bdia_jax.models.gpt2 import GPT2
from bdia_jax.nnx import BDIAStack
from benchmarks import record
from benchmarks.measure import size_in_bytes, temp_bytes
from benchmarks.stack import MIB, TOY, VARIANTS, Maker, Shape, lower_gradient

MEDIUM = Shape(batch=8, tokens=1024, width=1024, num_heads=16, mlp_dim=4096)
MEDIUM_GPU = dataclasses.replace(MEDIUM, dtype="bfloat16")

NAMES = ["plain", "remat", "remat_sqrt", "revnet", "bdia_guard1", "bdia_chunked", "bdia_lean"]
MORE = {"bdia_chunked_8": partial(BDIAStack, batch_chunks=8)}
PARTS = 4  # of the batch, for remat_accumulated


def lower_model(
    shape: Shape, depth: int, vocab_size: int, make: Maker, *, full_logits=False, parts=1
) -> jax.stages.Lowered:
    """Loss and gradient of GPT-2, lowered from shapes alone.

    Args:
        shape, depth, make: of the stack.
        full_logits: cross-entropy of logits [B, T, V] in place of `GPT2.loss`.
        parts: of the batch, whose gradients are computed in turn and summed.
    """

    def make_model() -> GPT2:
        return GPT2(
            vocab_size,
            shape.tokens,
            width=shape.width,
            depth=depth,
            num_heads=shape.num_heads,
            mlp_dim=shape.mlp_dim,
            dtype=jnp.dtype(shape.dtype),
            stack=make,
            rngs=nnx.Rngs(0),
        )

    graphdef, params, rest = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)

    def loss_fn(params, rest, tokens, key):
        model = nnx.merge(graphdef, params, rest)
        features = model.features(tokens[:, :-1], rngs=nnx.Rngs(key))
        labels = tokens[:, 1:]
        if not full_logits:
            return model.loss(features, labels).mean()
        logits = model.logits(features)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = accumulated(jax.value_and_grad(loss_fn), parts)
    tokens = jax.ShapeDtypeStruct((shape.batch, shape.tokens + 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(gradient).lower(params, rest, tokens, key)


def accumulated(gradient: Callable, parts: int) -> Callable:
    """The mean of `gradient` over parts of the batch, one after the other."""
    if parts == 1:
        return gradient

    def mean(params, rest, tokens, key):
        def add(total, operands):
            return jax.tree.map(jnp.add, total, gradient(params, rest, *operands)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        operands = tokens.reshape(parts, -1, tokens.shape[1]), jax.random.split(key, parts)
        total, _ = jax.lax.scan(add, zeros, operands)
        return jax.tree.map(lambda sum: sum / parts, total)

    return mean


def measure(
    shape: Shape, depth: int, vocab_size: int, makers: dict[str, Maker]
) -> dict[str, dict[str, dict]]:
    """For "stack" and "model": a row a variant, temp_bytes (None: too much) and ratio_to_remat."""
    stack = {name: partial(lower_gradient, shape, depth, make) for name, make in makers.items()}
    lower = partial(lower_model, shape, depth, vocab_size)
    model = {name: partial(lower, make) for name, make in makers.items() if name != "revnet"}
    model["remat_accumulated"] = partial(lower, makers["remat"], parts=PARTS)
    model["bdia_lean_full_logits"] = partial(lower, makers["bdia_lean"], full_logits=True)
    results: dict[str, dict[str, dict]] = {}
    for what, cases in {"stack": stack, "model": model}.items():
        rows = results[what] = {name: {"temp_bytes": temp_bytes(f())} for name, f in cases.items()}
        base = rows["remat"]["temp_bytes"]
        for name, row in rows.items():
            size = row["temp_bytes"]
            row["ratio_to_remat"] = size / base if size and base else None
            cells = f"{size / MIB:9.1f} MiB" if size else "does not fit"
            ratio = f"{row['ratio_to_remat']:.3f} of remat" if row["ratio_to_remat"] else ""
            print(f"{what} {name:22s} {cells}  {ratio}", flush=True)
    return results


def main(argv: list[str]) -> dict:
    """Measures and records."""
    args = record.parse(record.parser(__doc__), argv)
    shape = TOY if args.toy else MEDIUM_GPU if args.gpu else MEDIUM
    depth, vocab_size = (2, 4096) if args.toy else (24, 50257)
    names = ["remat", "bdia_lean"] if args.toy else NAMES
    makers = {name: VARIANTS[name] for name in names}
    if not args.toy:
        makers |= MORE
    results = measure(shape, depth, vocab_size, makers)
    _, gradients = lower_model(shape, depth, vocab_size, VARIANTS["remat"]).out_info
    config = {
        "shape": shape,
        "depth": depth,
        "vocab_size": vocab_size,
        "parameter_bytes": size_in_bytes(gradients),
        "excluded": "arguments (parameters, tokens) and outputs (gradients)",
    }
    record.write("gpt2_memory", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
