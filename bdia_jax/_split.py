"""Leaves with a gradient apart from those without, and a user's block over such splits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._checks import check_block
from bdia_jax._rounding import has_half_precision, pin_rounding

PyTree = Any


class Split(NamedTuple):
    """A pytree's leaves, those with a gradient apart from those without."""

    diff: Any
    data: Any


Block = Callable[[Split, jax.Array, Split], tuple[jax.Array, Split]]


def split(tree: PyTree) -> tuple[Split, Callable[[list, list], PyTree]]:
    """(Split of the leaves, the function that puts such a split back into the tree)."""
    leaves, treedef = jax.tree.flatten(tree)
    is_diff = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    parts = Split(
        [leaf for leaf, diff in zip(leaves, is_diff, strict=True) if diff],
        [leaf for leaf, diff in zip(leaves, is_diff, strict=True) if not diff],
    )

    def merge(diff: list, data: list) -> PyTree:
        diff_leaves, data_leaves = iter(diff), iter(data)
        return treedef.unflatten([next(diff_leaves if d else data_leaves) for d in is_diff])

    return parts, merge


def split_block(block_fn, params, x0, consts, has_aux) -> tuple[Block, PyTree]:
    """block_fn over splits, and the shapes of its aux.

    The block returns (h in float32, Split of aux). What `check_block` refuses is refused, and
    every half-precision rounding is made explicit.
    """
    _, merge_params = split(params)
    _, merge_consts = split(consts)
    jaxpr, aux_shape = check_block(block_fn, params, x0, consts, has_aux)
    if has_half_precision(jaxpr.jaxpr):
        block_fn = pin_rounding(block_fn)

    def block(params_k: Split, x: jax.Array, shared: Split):
        out = block_fn(merge_params(*params_k), x, *merge_consts(*shared))
        h, aux = out if has_aux else (out, None)
        return h.astype(jnp.float32), split(aux)[0]

    return block, aux_shape


def per_sample(gamma_k: jax.Array, x: jax.Array) -> jax.Array:
    """[B] or [1] -> [B, 1, ..., 1], to multiply x [B, ..., D]."""
    return gamma_k.reshape(gamma_k.shape + (1,) * (x.ndim - 1))
