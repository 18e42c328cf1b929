"""A training step of GPT-2 medium that updates in the backward pass: bytes planned, and seconds.

All parameters are trained on batches of 8 x 256 tokens, E2E's largest, with dropout, BDIA at
|gamma| = 1/16 in 8 parts and by branch. "ordinary" is jax.grad and the optimizer's update. Bytes
are as the compiler has planned them: on this CPU, and with --target for a GPU that need not be
there (the extra `gpu-plan`). Seconds are of a smaller model, on this device, the two in turns.
"""

import statistics
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bdia_jax import FixedPoint, in_backward, memory_report
from bdia_jax.compiled import targets
from bdia_jax.compiled.hlo import read
from bdia_jax.compiled.traffic import total, work
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.nnx import BDIAStack
from benchmarks import record
from benchmarks.measure import Stepper, in_turns
from benchmarks.stack import MIB

BDIA = dict(magnitude=2**-4, fixed_point=FixedPoint(gamma_bits=4), batch_chunks=8, by_branch=True)
STACKS = {
    "plain": dict(magnitude=0.0, fixed_point=None, backprop="store"),
    "remat": dict(magnitude=0.0, fixed_point=None, backprop="remat"),
    "bdia": BDIA,
}
OPTIMIZERS = {"adamw": optax.adamw, "sgd": optax.sgd, "adafactor": optax.adafactor}

# stack, optimizer, whether it updates in the backward pass, type of the parameters
ROWS: dict[str, tuple[str, str, bool, str]] = {
    "plain": ("plain", "adamw", False, "float32"),
    "remat": ("remat", "adamw", False, "float32"),
    "remat_in_backward": ("remat", "adamw", True, "float32"),
    "ordinary": ("bdia", "adamw", False, "float32"),
    "in_backward": ("bdia", "adamw", True, "float32"),
    "in_backward_sgd": ("bdia", "sgd", True, "float32"),
    "ordinary_adafactor": ("bdia", "adafactor", False, "float32"),
    "in_backward_adafactor": ("bdia", "adafactor", True, "float32"),
    "in_backward_adafactor_bfloat16": ("bdia", "adafactor", True, "bfloat16"),
}
MEDIUM = dict(vocab_size=50_257, width=1024, depth=24, num_heads=16, mlp_dim=4096)
SMALL = dict(vocab_size=1024, width=256, depth=8, num_heads=4, mlp_dim=1024)
TOY = dict(vocab_size=300, width=16, depth=2, num_heads=2, mlp_dim=32)
BATCH, LENGTH = 8, 256


def make_step(sizes: dict[str, Any], row: tuple[str, str, bool, str]):
    """(() -> state, (state, tokens [B, T + 1]) -> (state, loss)) of a row."""
    stack, optimizer, updates, dtype = row

    def make():
        options = {"max_len": LENGTH, "dropout_rate": 0.1, "rngs": nnx.Rngs(0)}
        model = GPT2(**sizes, **options, stack=partial(BDIAStack, **STACKS[stack]))
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(model, nnx.Param))
        nnx.update(model, cast)
        return model, in_backward.Optimizer(model, OPTIMIZERS[optimizer](1e-4), wrt=nnx.Param)

    graphdef = nnx.split(nnx.eval_shape(make))[0]

    def loss_fn(model, tokens):
        return jnp.mean(model.loss(model.features(tokens[:, :-1]), tokens[:, 1:]))

    def step(state, tokens):
        model, tx = nnx.merge(graphdef, state)
        if updates:
            loss = tx.train_step(model, loss_fn, tokens).loss
        else:
            loss, grads = nnx.value_and_grad(loss_fn)(model, tokens)
            tx.update(model, grads)
        return nnx.state((model, tx)), loss

    return lambda: nnx.state(make()), step


def planned(sizes: dict[str, Any], row: tuple[str, str, bool, str], target: str | None) -> dict:
    """Bytes of a step; for a target also those that its kernels move, and the bound in seconds."""
    make, step = make_step(sizes, row)
    device = targets.devices(target)[0] if target else jax.local_devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    args = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (jax.eval_shape(make), tokens),
    )
    with jax.default_device(device):
        lowered = jax.jit(step, donate_argnums=0).lower(*args)
        compiled = targets.compile(lowered) if target else lowered.compile()
    memory = memory_report(compiled)
    found = {"total_bytes": memory.total, "temp_bytes": memory.temporaries}
    if target:
        everything = total(work(read(compiled.as_text() or "")), targets.TARGETS[target])
        found |= {"moved_bytes": everything.bytes, "bound_seconds": everything.seconds}
    return found


def timed(sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of a step, both ways, and their ratio within each round."""
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, sizes["vocab_size"])
    steppers = {}
    for name in ("ordinary", "in_backward"):
        make, step = make_step(sizes, ROWS[name])
        steppers[name] = Stepper(jax.jit(step, donate_argnums=0), jax.jit(make)(), tokens)
        steppers[name].seconds(1)
    seconds = in_turns(steppers, rounds, 1)
    pairs = zip(seconds["in_backward"], seconds["ordinary"], strict=True)
    ratios = [own / base for own, base in pairs]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"seconds": seconds, "ratio": median, "quartiles": [low, high]}


def main(argv: list[str]) -> dict:
    """Compiles, times and records."""
    options = record.parser(__doc__)
    options.add_argument("--target", choices=list(targets.TARGETS), help="compile for it, too")
    args = record.parse(options, argv)
    sizes, small = (TOY, TOY) if args.toy else (MEDIUM, SMALL)
    names = ["ordinary", "in_backward"] if args.toy else list(ROWS)
    results: dict[str, Any] = {}
    for target in (None, *([args.target] if args.target else [])):
        rows = results[target or "here"] = {}
        for name in names:
            rows[name] = planned(sizes, ROWS[name], target)
            values = "  ".join(f"{key} {value / MIB:,.1f}" for key, value in rows[name].items())
            print(f"{target or 'here':8s} {name:32s} {values}", flush=True)
    results["step_time"] = timed(small, 2 if args.toy else 15)
    print(f"step time of in_backward: {results['step_time']['ratio']:.3f} x ordinary", flush=True)
    config = {"sizes": sizes, "timed": small, "batch": BATCH, "length": LENGTH, "rows": ROWS}
    record.write("in_backward", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
