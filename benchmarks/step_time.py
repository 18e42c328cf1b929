"""Seconds per training step: gradient and SGD update, parameters donated.

The variants take turns, round after round, so that a slow minute of the machine falls on
all of them; ratios are taken within a round.
"""

import dataclasses
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import record
from benchmarks.stack import (
    BDIA_GUARD_0,
    BDIA_GUARD_1,
    BDIA_REMAT,
    GPU,
    PLAIN,
    PLAIN_REMAT,
    TOY,
    Shape,
    gradient_fn,
    make_stack,
)

VARIANTS = {
    "plain": PLAIN,
    "remat": PLAIN_REMAT,
    "bdia_remat": BDIA_REMAT,
    "bdia_guard0": BDIA_GUARD_0,
    "bdia_guard1": BDIA_GUARD_1,
}


class Stepper:
    """A compiled training step and the parameters it moves."""

    def __init__(self, shape: Shape, depth: int, variant: dict):
        self.x = jax.random.normal(jax.random.key(1), (shape.batch, shape.tokens, shape.width))
        self.key = jax.random.key(2)
        graphdef, self.params, self.rest = nnx.split(
            make_stack(shape, depth, variant), nnx.Param, ...
        )
        gradient = gradient_fn(graphdef)

        def step(params, rest, x, key):
            loss, (grads, grad_x) = gradient(params, rest, x, key)
            params = jax.tree.map(lambda w, g: w - 1e-4 * g, params, grads)
            return params, loss, grad_x  # grad_x is what an embedding would receive

        self.step = jax.jit(step, donate_argnums=0)

    def seconds(self, steps: int) -> float:
        """Mean seconds of a step over `steps` steps in a row."""
        start = time.perf_counter()
        loss = grad_x = jnp.zeros(())
        for _ in range(steps):
            self.params, loss, grad_x = self.step(self.params, self.rest, self.x, self.key)
        jax.block_until_ready((self.params, loss, grad_x))
        seconds = (time.perf_counter() - start) / steps
        if not jnp.isfinite(loss):
            raise RuntimeError(f"loss is {loss}; a diverged step is not worth timing")
        return seconds


def start(shape: Shape, depth: int) -> dict[str, Stepper]:
    """Steppers that ran once; a variant that does not fit in memory is left out."""
    steppers = {}
    for name, variant in VARIANTS.items():
        try:
            stepper = Stepper(shape, depth, variant)
            stepper.seconds(1)
            steppers[name] = stepper
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name:12s} out of memory")
    return steppers


def measure(shape: Shape, depth: int, rounds: int, steps: int) -> dict[str, dict | None]:
    """Per variant the seconds of every round, their median and spread, and the ratio to remat."""
    steppers = start(shape, depth)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            seconds[name].append(stepper.seconds(steps))
    rows: dict[str, dict | None] = dict.fromkeys(VARIANTS)
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {"median": median, "quartiles": [low, high], "seconds": values}
        if "remat" in seconds:
            pairs = zip(values, seconds["remat"], strict=True)
            row["ratio_to_remat"] = statistics.median(ours / remat for ours, remat in pairs)
        rows[name] = row
        ratio = row.get("ratio_to_remat", float("nan"))
        print(f"{name:12s} {median:9.4f} s  [{low:.4f}, {high:.4f}]  {ratio:.3f} x remat")
    return rows


def main(argv: list[str]) -> dict:
    """Measures and records."""
    options = record.parser(__doc__)
    options.add_argument("--rounds", type=int, default=None, help="turns of each variant, >= 7")
    args = record.parse(options, argv)
    shape = TOY if args.toy else GPU if args.gpu else Shape()
    depth = 2 if args.toy else 24 if args.gpu else 12
    rounds = args.rounds or (7 if args.toy else 15 if args.gpu else 9)
    steps = 3 if args.gpu else 1
    rows = measure(shape, depth, rounds, steps)
    config = {
        "shape": dataclasses.asdict(shape),
        "depth": depth,
        "rounds": rounds,
        "steps_per_round": steps,
    }
    record.write("step_time", rows, config, argv=argv, args=args)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
