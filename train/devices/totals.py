"""Metrics over a whole group of examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from train.devices.shards import take


def group_totals(
    model: Any,
    metrics: Callable[[Any, Any, None], dict[str, tuple[jax.Array, jax.Array]]],
    group: Any,
    batch_size: int,
    count: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, weight), float32 [], of every metric over a group, in batches inside one program.

    Args:
        model: in evaluation mode.
        metrics: as in `train.tasks.task.Task`.
        group: the examples.
        batch_size: examples at once; the last batch may reach beyond the end, and counts what
            is inside.
        count: how many examples, if some of the group are padding.
        mesh: over which the group is placed.
    """
    graphdef, state = nnx.split(model)
    count = len(jax.tree.leaves(group)[0]) if count is None else count
    size = min(batch_size, count)

    def batch_totals(first):
        index = first + jnp.arange(size)
        inside = (index < count).astype(jnp.float32)
        batch = take(group, jnp.minimum(index, count - 1), mesh)
        # a copy: a model that writes its state may do so in the loop
        here = nnx.merge(graphdef, state, copy=True)
        return jax.tree.map(lambda values: jnp.sum(values * inside), metrics(here, batch, None))

    totals = jax.lax.map(batch_totals, jnp.arange(0, count, size))
    return jax.tree.map(jnp.sum, totals)
