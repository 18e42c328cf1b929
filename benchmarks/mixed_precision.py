"""Does bfloat16 train as float32 does, and is its rebuild exact? ViTs on scikit-learn's digits.

Three ways to compute the blocks of the same BDIA-ViT, five seeds each, side by side: in float32;
with the model's dtype=bfloat16, whose layers name it and whose branches end in float32; and with
the stack's dtype=bfloat16 around blocks whose layers name none, so that all of a block is
bfloat16, h too. Parameters, optimizer and states are float32 or fixed point everywhere; the seeds
begin with the same parameters and see the same examples. The training
loss of the last 50 steps and the final loss on held-out digits are compared with their standard
deviation over the seeds in float32. Of the trained parameters of the first seed, the stack is
audited in training mode.
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.nnx import BDIAStack
from benchmarks import figure, record
from benchmarks.digits import Size, digits_task, make_config, stack_to_audit
from benchmarks.measure import audit_row
from train.config import Config
from train.loop.program import make_program
from train.tasks.task import Task

LABELS = {
    "float32": "float32",
    "model_bfloat16": "the model's dtype is bfloat16",
    "stack_bfloat16": "the stack's dtype is bfloat16",
}
SIZE = Size(depth=6, width=32, num_heads=2, batch=32, steps=300)
TOY = Size(depth=2, width=8, num_heads=1, patch_size=4, batch=8, steps=4)
EVERY = 10  # steps between two points of the curve
LAST = 5  # points whose mean is the final training loss


class PlainBlock(PreNormBlock):
    """The block as plain Flax layers would have it: all of it in the dtype of its input."""

    def __call__(self, x, *consts):
        f = self.f(x, *consts).astype(x.dtype)
        return f + self.g(x + f).astype(x.dtype)


def plain_stack(make_block: Any, depth: int, *, rngs: nnx.Rngs, **options: Any) -> BDIAStack:
    """A stack of the same blocks, whose layers name no dtype."""

    def make(rngs: nnx.Rngs) -> PlainBlock:
        block = make_block(rngs)
        block.__class__ = PlainBlock
        for _, module in nnx.iter_modules(block):
            if isinstance(module, nnx.Linear):
                module.dtype = None
        return block

    return BDIAStack(make, depth, rngs=rngs, **options)


def prepare(name: str, size: Size, seeds: int) -> tuple[Config, Task]:
    """The run of LABELS of that name."""
    dtype = "bfloat16" if name == "model_bfloat16" else "float32"
    config = make_config(dataclasses.replace(size, dtype=dtype))
    config = dataclasses.replace(config, num_seeds=seeds, learning_rate=1e-3, schedule="cosine")
    make_stack: Any = BDIAStack
    if name == "stack_bfloat16":
        make_stack = partial(plain_stack, dtype=jnp.bfloat16)
    return config, digits_task(config, make_stack)


def run(name: str, size: Size, seeds: int, every: int) -> dict[str, Any]:
    """Trains, and audits the first seed's stack on the first batch; losses are [point][seed]."""
    config, task = prepare(name, size, seeds)
    program = make_program(config, task)
    state = program.init()
    losses = []
    start = time.perf_counter()
    for step in range(0, size.steps, every):
        count = jnp.int32(min(every, size.steps - step))
        state, metrics = program.train_steps(state, task.train_groups, count)
        losses.append(np.atleast_1d(metrics["loss"]).tolist())
        print(f"{name:14s} step {step + int(count)}  loss {np.mean(losses[-1]):.4f}", flush=True)
    seconds = time.perf_counter() - start
    final = program.evaluate(state, task.eval_groups)
    held_out = {key: np.atleast_1d(value).tolist() for key, value in final.items()}
    return {
        "train_loss": losses,
        "held_out": held_out,
        "seconds_per_step": seconds / size.steps,  # the compiler's included
        "audit": _audit(*stack_to_audit(config, task, program.models(state)[0])),
    }


def _audit(stack: BDIAStack, x: jax.Array) -> dict[str, Any]:
    """With no guard bits, so that every rounding that came out different shows."""
    stack.fixed_point = FixedPoint(guard_bits=0)
    found = stack.audit(x, rngs=nnx.Rngs(0))
    print(found, flush=True)
    return audit_row(found)


def compare(rows: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each run and score: mean, difference from float32, and what noise is.

    scatter: standard deviation over the seeds in float32. standard_error: of the difference,
    from its standard deviation over the seeds, which are the same in all runs.
    """
    table = {name: _scores(row) for name, row in rows.items()}
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, scores in table.items():
        result[name] = {}
        for score, values in scores.items():
            reference = table["float32"][score]
            difference, scatter = values - reference, float(np.std(reference, ddof=1))
            result[name][score] = {
                "mean": float(values.mean()),
                "std": float(np.std(values, ddof=1)),
                "difference": float(difference.mean()),
                "standard_error": float(np.std(difference, ddof=1) / len(difference) ** 0.5),
                "scatter": scatter,
                "difference_in_scatters": float(difference.mean()) / scatter,
            }
    return result


def _scores(row: dict) -> dict[str, np.ndarray]:
    held_out = {f"held_out_{key}": np.asarray(value) for key, value in row["held_out"].items()}
    return {"train_loss": np.asarray(row["train_loss"])[-LAST:].mean(0), **held_out}


def draw(rows: dict[str, dict], every: int, path: Path) -> None:
    """Mean and standard deviation over the seeds, and the difference of each seed from float32."""
    reference = np.asarray(rows["float32"]["train_loss"])
    steps = every * (1 + np.arange(len(reference)))
    band = {"alpha": 0.15, "lw": 0}
    title = f"BDIA-ViT on digits, {reference.shape[1]} seeds"
    with figure.panels(path, title, (9.6, 3.6)) as (left, right):
        for index, (name, row) in enumerate(rows.items()):
            losses, style = np.asarray(row["train_loss"]), {"color": f"C{index}"}
            mean, std = losses.mean(1), losses.std(1, ddof=1)
            left.plot(steps, mean, label=LABELS[name], linewidth=1.2, **style)
            left.fill_between(steps, mean - std, mean + std, **style, **band)
            if name != "float32":
                difference = (losses - reference).mean(1)
                right.plot(steps, difference, label=LABELS[name], linewidth=1.2, **style)
        std = reference.std(1, ddof=1)
        label = "standard deviation of float32"
        right.fill_between(steps, -std, std, color="C0", label=label, **band)
        for axis, what in ((left, "training loss"), (right, "training loss less float32's")):
            figure.caption(axis, what)
            axis.set_xlabel("step")
            axis.legend(frameon=False, fontsize=8)


def main(argv: list[str]) -> dict:
    """Trains all, compares, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    size, seeds, every = (TOY, 2, 2) if args.toy else (SIZE, 5, EVERY)
    names = ["float32", "stack_bfloat16"] if args.toy else [*LABELS]
    rows = {name: run(name, size, seeds, every) for name in names}
    results = {"compared": compare(rows), "runs": rows}
    config = {"size": size, "seeds": seeds, "every": every}
    path = record.write("mixed_precision", results, config, argv=argv, args=args)
    draw(rows, every, path.with_suffix(".png"))
    for name, scores in results["compared"].items():
        for score, found in scores.items():
            print(
                f"{LABELS[name]:30s} {score:18s} {found['mean']:.4f} +- {found['std']:.4f}  "
                f"difference {found['difference']:+.4f} +- {found['standard_error']:.4f}, "
                f"{found['difference_in_scatters']:+.2f} of the scatter"
            )
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
