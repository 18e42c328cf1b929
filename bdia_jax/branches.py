"""A block's h and its vjp, branch after branch and part after part, to hold less at a time.

h = r_1 + .. + r_m with r_i = f_i(y_i), y_1 = x, y_{i+1} = y_i + r_i: for the pre-norm
transformer f_1 is attention and f_2 the MLP. A block given whole is one branch.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._checks import check_chunks
from bdia_jax.chunks import cut, fold_keys, loop, put
from bdia_jax.split import Block, Split, split, split_block

_TOKENS = 1  # the axis of [B, T, ..., D] that token chunks cut


class Branch(NamedTuple):
    """block: as `split_block` returns it; token_chunks: parts of the tokens it is evaluated in."""

    block: Block
    token_chunks: int


class Blocks(NamedTuple):
    """How a block is evaluated: its branches, and in how many parts of the batch."""

    branches: tuple[Branch, ...]
    batch_chunks: int


def make_blocks(block_fn, params, x0, consts, has_aux, batch_chunks, token_chunks):
    """(Blocks, the function that merges a split of their aux). Checks every branch."""
    fns = block_fn if isinstance(block_fn, tuple) else (block_fn,)
    token_chunks = check_chunks(len(fns), x0, batch_chunks, token_chunks)
    batch, *rest = x0.shape

    def part_of(leaf):
        if batch_chunks == 1 or not _has(leaf, batch):
            return leaf
        return jax.ShapeDtypeStruct((batch // batch_chunks, *leaf.shape[1:]), leaf.dtype)

    here = jax.tree.map(part_of, consts)
    branches, merges = [], []
    for fn, count in zip(fns, token_chunks, strict=True):
        tokens = rest if count == 1 else [rest[0] // count, *rest[1:]]
        x = jax.ShapeDtypeStruct((batch // batch_chunks, *tokens), jnp.float32)
        try:
            block, aux_shape = split_block(fn, params, x, here, has_aux)
        except (TypeError, ValueError) as error:
            if any(map(operator.is_not, jax.tree.leaves(here), jax.tree.leaves(consts))):
                error.add_note(
                    f"batch_chunks={batch_chunks} cuts the leaves of consts with a leading axis "
                    f"of the batch's {batch}; give one that all samples share a leading axis of 1"
                )
            raise
        if batch_chunks * count > 1 and jax.tree.leaves(aux_shape):
            raise ValueError(
                f"block_fn returns aux {aux_shape} with batch_chunks={batch_chunks} and "
                f"token_chunks={count}: every part would have its own; evaluate it whole"
            )
        branches.append(Branch(block, count))
        merges.append(split(aux_shape)[1])

    def merge_aux(diff, data):
        merged = tuple(merge(*aux) for merge, *aux in zip(merges, diff, data, strict=True))
        return merged if isinstance(block_fn, tuple) else merged[0]

    return Blocks(tuple(branches), batch_chunks), merge_aux


def value(blocks: Blocks, params: Split, x, consts: Split) -> tuple[jax.Array, Split]:
    """(h, aux of all branches). Autodiff gives its derivatives."""
    count, batch = blocks.batch_chunks, x.shape[0]
    if count == 1:
        return _value(blocks.branches, params, x, consts)

    def body(index, h):
        here = Split(*(cut_consts(leaves, index, count, batch) for leaves in consts))
        part, _ = _value(blocks.branches, fold(params, index), cut(x, index, count, 0), here)
        return put(h, part, index, 0)

    return loop(count, body, jnp.zeros_like(x)), _no_aux(blocks.branches)


def value_and_vjp(branches, params: Split, x, consts: Split, ct_h, ct_aux):
    """(h, cotangents of (params.diff, x, consts.diff)), with one branch's residuals at a time.

    The last branch is evaluated once, for its value and its vjp; each before it twice, for
    the value that those after it need and for the vjp: that is the price.
    """
    ys, h = [x], None
    for branch in branches[:-1]:
        r, _ = _branch_value(branch, params, ys[-1], consts)
        h = r if h is None else h + r
        ys.append(ys[-1] + r)
    r, (ct_params, ct_y, ct_consts) = _branch_vjp(
        branches[-1], params, ys.pop(), consts, ct_h, ct_aux[-1]
    )
    h = r if h is None else h + r
    for branch, ct_aux_i in zip(branches[-2::-1], ct_aux[-2::-1], strict=True):
        y = _after(ct_y, ys.pop())
        _, cotangents = _branch_vjp(branch, params, y, consts, ct_h + ct_y, ct_aux_i)
        ct_params, ct_y, ct_consts = jax.tree.map(jnp.add, (ct_params, ct_y, ct_consts), cotangents)
    return h, (ct_params, ct_y, ct_consts)


def _after(ct: jax.Array, y: jax.Array) -> jax.Array:
    """y, for XLA another value that is known only after ct.

    Else it would find that a branch is evaluated twice, do so once and hold all residuals.
    `optimization_barrier`, which jax.checkpoint relies on, is dropped too early on a CPU. Not
    bit-equal to y (-0.0), which only gradients see.
    """
    first = ct[(0,) * ct.ndim]
    return y + jnp.minimum(first * first, 0.0)


def _value(branches, params, x, consts):
    y, h, auxes = x, None, []
    for branch in branches:
        r, aux = _branch_value(branch, params, y, consts)
        auxes.append(aux)
        h = r if h is None else h + r
        y = y + r
    return h, Split(tuple(aux.diff for aux in auxes), tuple(aux.data for aux in auxes))


def _no_aux(branches) -> Split:
    return Split(tuple([] for _ in branches), tuple([] for _ in branches))


def _branch_value(branch: Branch, params, y, consts):
    count = branch.token_chunks
    if count == 1:
        return branch.block(params, y, consts)

    def body(index, r):
        part, _ = branch.block(fold(params, index), cut(y, index, count, _TOKENS), consts)
        return put(r, part, index, _TOKENS)

    return loop(count, body, jnp.zeros_like(y)), Split([], [])


def _branch_vjp(branch: Branch, params, y, consts, ct_r, ct_aux):
    """(r, cotangents of (params.diff, y, consts.diff))."""
    count = branch.token_chunks
    if count == 1:
        return _vjp(branch.block, params, y, consts, ct_r, ct_aux)

    def body(index, carry):
        r, ct, ct_params, ct_consts = carry  # at first y and ct_r, overwritten part by part
        part, (ct_params_i, ct_part, ct_consts_i) = _vjp(
            branch.block,
            fold(params, index),
            cut(r, index, count, _TOKENS),
            consts,
            cut(ct, index, count, _TOKENS),
            ct_aux,
        )
        r, ct = put(r, part, index, _TOKENS), put(ct, ct_part, index, _TOKENS)
        sums = jax.tree.map(jnp.add, (ct_params, ct_consts), (ct_params_i, ct_consts_i))
        return (r, ct, *sums)

    zeros = jax.tree.map(jnp.zeros_like, (params.diff, consts.diff))
    r, ct_y, ct_params, ct_consts = loop(count, body, (y, ct_r, *zeros))
    return r, (ct_params, ct_y, ct_consts)


def _vjp(block: Block, params, y, consts, ct_r, ct_aux):
    def differentiable(diff, y, diff_consts):
        r, aux = block(Split(diff, params.data), y, Split(diff_consts, consts.data))
        return r, aux.diff

    (r, _), vjp = jax.vjp(differentiable, params.diff, y, consts.diff)
    return r, vjp((ct_r, ct_aux))


def fold(params: Split, index) -> Split:
    """params for one part: its keys draw otherwise than those of the other parts."""
    return Split(params.diff, fold_keys(params.data, index))


# --- consts: a part of the batch sees its own --------------------------------------------


def cut_consts(consts: list, index, count: int, batch: int) -> list:
    """The leaves, those with a leading axis of `batch` cut to one part of it."""
    return [cut(leaf, index, count, 0) if _has(leaf, batch) else leaf for leaf in consts]


def add_consts(totals: list, parts: list, index, count: int, batch: int) -> list:
    """totals + parts, where parts are cotangents of `cut_consts`."""
    return [
        put(total, cut(total, index, count, 0) + part, index, 0)
        if _has(total, batch)
        else total + part
        for total, part in zip(totals, parts, strict=True)
    ]


def _has(leaf, batch: int) -> bool:
    return leaf.ndim > 0 and leaf.shape[0] == batch
