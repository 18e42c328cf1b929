"""Parts of the batch or the tokens, one after the other, each overwriting its own in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bdia_jax._split import Split

PyTree = Any
BATCH, TOKENS = 0, 1  # axes of [B, T, ..., D]


def loop(count: int, body: Callable[[jax.Array, PyTree], PyTree], carry: PyTree) -> PyTree:
    """carry = body(index, carry) for index 0 .. count-1. Can be differentiated."""

    def one(carry, index):
        return body(index, carry), None

    return jax.lax.scan(one, carry, jnp.arange(count))[0]


def cut(array: jax.Array, index, count: int, axis: int) -> jax.Array:
    """Part `index` of `count` of an axis that count divides: every count-th, from index on.

    So of a batch sharded over n devices every device has its share of each part, as long as n
    divides the part.
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


def fold(split: Split, index) -> Split:
    """The leaves for one part: typed PRNG keys become others, so that parts draw differently."""
    return Split(split.diff, [_fold(leaf, index) if _is_key(leaf) else leaf for leaf in split.data])


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _fold(keys, index):
    folded = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys.reshape(-1))
    return folded.reshape(keys.shape)


# --- consts, of which a part of the batch sees its own -----------------------------------


def is_own(leaf, batch: int) -> bool:
    """Whether every sample has its own of this leaf of consts."""
    return leaf.ndim > 0 and leaf.shape[0] == batch


def cut_consts(consts: Split, index, count: int, batch: int) -> Split:
    """The leaves for part `index` of the batch; of what all samples share, keys are folded."""

    def choose(leaf, shared):
        return cut(leaf, index, count, BATCH) if is_own(leaf, batch) else shared

    return jax.tree.map(choose, consts, fold(consts, index))


def add_consts(totals: list, parts: list, index, count: int, batch: int) -> list:
    """totals + parts, where parts are cotangents of `cut_consts`."""
    return [
        put(total, cut(total, index, count, BATCH) + part, index, BATCH)
        if is_own(total, batch)
        else total + part
        for total, part in zip(totals, parts, strict=True)
    ]
