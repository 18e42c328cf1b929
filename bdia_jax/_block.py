"""Blocks: how a user's block is evaluated, checked on abstract values before anything runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._checks import abstract_block, check_chunks
from bdia_jax._chunks import is_own
from bdia_jax._split import Block, split, split_block


class Branch(NamedTuple):
    """block: as `split_block` returns it; token_chunks: parts of the tokens it is evaluated in."""

    block: Block
    token_chunks: int


class Blocks(NamedTuple):
    """How a block is evaluated: its branches, and in how many parts of the batch."""

    branches: tuple[Branch, ...]
    batch_chunks: int


def make_blocks(block_fn, params, x0, consts, has_aux, batch_chunks, token_chunks, is_inference):
    """(Blocks, the function that merges a split of their aux). Checks every branch.

    Raises:
        ValueError: chunks that do not fit or a block that has aux; consts of which it cannot be
            told whether a part of the batch sees a part of them. At inference the batch is
            then left whole, as nothing depends on it but memory.
    """
    fns = tuple(block_fn) if isinstance(block_fn, (tuple, list)) else (block_fn,)
    token_chunks = check_chunks(len(fns), x0, batch_chunks, token_chunks)
    batch, *rest = x0.shape
    parts = consts
    if batch_chunks > 1:
        parts = jax.tree.map(lambda leaf: _part(leaf, batch, batch_chunks), consts)

    def x_of(count):
        tokens = rest if count == 1 else [rest[0] // count, *rest[1:]]
        return jax.ShapeDtypeStruct((batch // batch_chunks, *tokens), jnp.float32)

    xs = [x_of(count) for count in token_chunks]
    for fn, x in zip(fns, xs, strict=True):
        if name := _ambiguous(fn, params, x, consts, parts):
            if is_inference:
                options = (block_fn, params, x0, consts, has_aux, 1, token_chunks, True)
                return make_blocks(*options)
            raise ValueError(
                f"{name} has a leading axis of {batch}, as the batch, but the block takes it whole "
                f"as well as in the {batch_chunks} parts of batch_chunks, so it is not known what "
                "is meant; give what all samples share a leading axis of 1, or take batch_chunks=1"
            )
    branches, merges = [], []
    for fn, x, count in zip(fns, xs, token_chunks, strict=True):
        try:
            block, aux_shape = split_block(fn, params, x, parts, has_aux)
        except (TypeError, ValueError) as error:
            if batch_chunks * count > 1:
                error.add_note(
                    f"The block got x of shape {x.shape} (batch_chunks={batch_chunks}, token_chunks"
                    f"={count}). Of consts, leaves with a leading axis of {batch} are cut like the "
                    "batch; what all samples share needs another, 1 for example. Nothing in them "
                    "is cut like the tokens."
                )
            raise
        if batch_chunks * count > 1 and jax.tree.leaves(aux_shape):
            raise ValueError(
                f"block_fn returns aux {aux_shape} with batch_chunks={batch_chunks} and "
                f"token_chunks={count}: every part would have its own; set both to 1 for it"
            )
        branches.append(Branch(block, count))
        merges.append(split(aux_shape)[1])

    def merge_aux(diff, data):
        merged = tuple(merge(*aux) for merge, *aux in zip(merges, diff, data, strict=True))
        return merged[0] if callable(block_fn) else merged

    return Blocks(tuple(branches), batch_chunks), merge_aux


def _part(leaf, batch: int, count: int):
    if not is_own(leaf, batch):
        return leaf
    return jax.ShapeDtypeStruct((batch // count, *leaf.shape[1:]), leaf.dtype)


def _ambiguous(fn: Callable, params, x, consts, parts) -> str | None:
    """The name of a leaf of consts that is cut though the block could use the whole of it.

    Such a leaf has the batch's leading axis by chance, or so it may be; a part would be wrong.
    """
    leaves, treedef = jax.tree.flatten(parts)
    named = jax.tree_util.tree_leaves_with_path(consts)
    for index, ((path, whole), part) in enumerate(zip(named, leaves, strict=True)):
        if whole is part:
            continue
        trial: list[Any] = [*leaves]
        trial[index] = jax.ShapeDtypeStruct(whole.shape, whole.dtype)
        try:
            jaxpr, out = abstract_block(fn, params, x, treedef.unflatten(trial))
        except Exception:
            continue  # as it should be: the shapes do not fit
        variable = jaxpr.jaxpr.invars[index - len(leaves)]
        is_read = any(variable is v for eqn in jaxpr.jaxpr.eqns for v in eqn.invars)
        h = out[0] if isinstance(out, tuple) else out
        if is_read and getattr(h, "shape", None) == x.shape:
            return f"consts{jax.tree_util.keystr(path)}"
    return None
