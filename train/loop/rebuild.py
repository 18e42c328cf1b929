"""A step whose rebuild failed: who failed is counted, and the step is kept out of the state."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.nnx import BDIAStack, RebuildFailures

Counts = dict[str, jax.Array]


class RebuildFailed(Exception):
    """Ends a loop of dispatches at a step that has to be made again.

    Attributes:
        state: of before that step.
        failure: what is known of it, on the host.
    """

    def __init__(self, state: Any, failure: "Failure"):
        super().__init__(str(failure))
        self.state, self.failure = state, failure


class Failure(NamedTuple):
    """The first step of a dispatch whose rebuild failed.

    step: int32 [], -1 for none. counts: for each reversible stack, by its path in the model,
    float32 [K], or [num_seeds, K]: samples whose rebuilt x_k was wrong (`bdia_jax.bdia_scan`).
    """

    step: jax.Array
    counts: Counts

    def after(self, step: jax.Array, counts: Counts, loss: jax.Array) -> "Failure":
        """When this step has been made. Where the loss is no number there is nothing to rebuild."""
        failed = jnp.zeros([], bool)
        for each in counts.values():
            failed |= jnp.any((each.sum(-1) > 0) & jnp.isfinite(loss))
        here = Failure(jnp.where(failed, step, -1), counts)
        return jax.tree.map(lambda new, old: jnp.where(self.step < 0, new, old), here, self)

    @property
    def seed(self) -> int:
        """Of counts on the host: which of the seeds side by side failed first, 0 for one alone."""
        of_seeds = sum(np.atleast_2d(counts).sum(-1) for counts in self.counts.values())
        return int(np.argmax(of_seeds > 0))

    def __str__(self) -> str:
        """Where, in words, of counts on the host."""
        said = []
        for name, counts in self.counts.items():
            rows = np.atleast_2d(counts)
            if rows.any():  # a block is undone after those above it: the last one failed first
                block = int(np.nonzero(rows.any(0))[0].max())
                wrong = int(rows[:, block].sum())
                said.append(f"x_{block} of {name} came out wrong in {wrong} samples")
        return f"the rebuild of step {int(self.step)} failed: {', '.join(said)}"


def zero_counts(model: Any) -> Counts:
    """What `counted` takes: of every stack that verifies what it rebuilds."""
    return {
        ".".join(map(str, path)): jnp.zeros(stack.depth)
        for path, stack in nnx.iter_modules(model)
        if isinstance(stack, BDIAStack) and stack.backprop == "reversible" and stack.verify
    }


@contextlib.contextmanager
def counted(model: Any, counts: Counts) -> Iterator[None]:
    """Inside, the gradient of counts is the number of failures in every stack of the model."""
    modules: dict[str, Any] = {".".join(map(str, path)): m for path, m in nnx.iter_modules(model)}
    for name, zeros in counts.items():
        modules[name].failures = RebuildFailures(zeros)
    try:
        yield
    finally:
        for name in counts:
            del modules[name].failures
