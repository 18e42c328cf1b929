"""A loop over parts of an axis that overwrites its arrays in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def loop(count: int, body: Callable[[jax.Array, PyTree], PyTree], carry: PyTree) -> PyTree:
    """carry = body(index, carry) for index 0 .. count-1. Can be differentiated."""

    def one(carry, index):
        return body(index, carry), None

    return jax.lax.scan(one, carry, jnp.arange(count))[0]


def cut(array: jax.Array, index, count: int, axis: int) -> jax.Array:
    """Part `index` of `count` of an axis that count divides: every count-th, from index on.

    So an axis sharded over devices gives every device its share of each part.
    """
    return jax.lax.dynamic_index_in_dim(_split(array, count, axis), index, axis + 1, keepdims=False)


def put(array: jax.Array, part: jax.Array, index, axis: int) -> jax.Array:
    """`array` with its part `index` replaced; in place where XLA owns it."""
    count = array.shape[axis] // part.shape[axis]
    split = _split(array, count, axis)
    return jax.lax.dynamic_update_index_in_dim(split, part, index, axis + 1).reshape(array.shape)


def _split(array: jax.Array, count: int, axis: int) -> jax.Array:
    """[.., N, ..] -> [.., N / count, count, ..]"""
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])


def fold_keys(leaves: list[jax.Array], index) -> list[jax.Array]:
    """Every typed PRNG key among the leaves made that of a part: parts draw differently."""
    return [_fold(leaf, index) if _is_key(leaf) else leaf for leaf in leaves]


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _fold(keys, index):
    folded = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys.reshape(-1))
    return folded.reshape(keys.shape)
