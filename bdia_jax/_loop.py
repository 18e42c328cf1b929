"""The loop over blocks of a stack in which two states change roles from block to block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bdia_jax._mesh import explicit_sharding, varying
from bdia_jax.compiled import targets

PyTree = Any


def scan_blocks(
    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    init: PyTree,
    xs: PyTree,
    *,
    reverse: bool = False,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, on a GPU with two blocks in the loop's body.

    A carry (a, b) that becomes (b, f(a)) is copied by a loop with one block in its body, since each
    has a place of its own; after two blocks both are back in theirs. What the second needs is read
    once the first is done, and what the first made is in its place by then.

    Args, Returns: as `jax.lax.scan`; xs has at least one array. Has no derivative in reverse mode
        that saves memory: for use inside a `jax.custom_vjp`.
    """
    depth = len(jax.tree.leaves(xs)[0])
    if depth == 1 or targets.default_device().platform != "gpu" or _is_split_in_types(init):
        return jax.lax.scan(body, init, xs, reverse=reverse)

    def inputs(k):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), xs)

    def one(state, i):
        k = depth - 1 - i if reverse else i
        k, (carry, stacked) = jax.lax.optimization_barrier((k, state))
        carry, made = body(carry, inputs(k))
        put = jax.lax.dynamic_update_index_in_dim
        return carry, jax.tree.map(lambda all, own: put(all, own, k, 0), stacked, made)

    def two(state, i):
        return one(one(state, i), i + 1), None

    _, made = jax.eval_shape(body, init, inputs(0))
    stacked = jax.tree.map(lambda own: jax.lax.full((depth, *own.shape), 0, own.dtype), made)
    state, _ = jax.lax.scan(two, (init, stacked), 2 * jnp.arange(depth // 2))
    return one(state, depth - 1) if depth % 2 else state


def _is_split_in_types(tree: PyTree) -> bool:
    """Inside `jax.shard_map` or on an explicit mesh, where types say how arrays are split."""
    leaves = jax.tree.leaves(tree)
    return any(varying(x) or explicit_sharding(x) is not None for x in leaves)
