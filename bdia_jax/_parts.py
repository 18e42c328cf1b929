"""A block by branch, and in chunks of the batch or the tokens, to hold less at a time.

h = r_1 + .. + r_m with r_i = f_i(y_i), y_1 = x, y_{i+1} = y_i + r_i: for the pre-norm
transformer f_1 is attention and f_2 the MLP. A block given whole is one branch. Chunks are
evaluated one after the other, each overwriting its own in place.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._block import Block, Branch, LeafFn, Leaves
from bdia_jax._verify import nan_by

PyTree = Any
BATCH, TOKENS = 0, 1  # axes of [B, T, ..., D]


class Cotangents(NamedTuple):
    """Of a block's inputs: params and consts as their `Leaves.diff`, x [B, ..., D]."""

    params: Any
    x: jax.Array
    consts: Any


# --- by branch ---------------------------------------------------------------------------


def value(block: Block, params: Leaves, x: jax.Array, consts: Leaves) -> tuple[jax.Array, Leaves]:
    """(h, aux of all branches). Autodiff gives its derivatives."""
    count = block.batch_chunks
    if count == 1:
        return branches_value(block.branches, params, x, consts)

    def one_chunk(index, h):
        chunk, _ = branches_value(
            block.branches,
            fold_keys(params, index),
            cut(x, index, count, BATCH),
            _chunk_of_consts(block, consts, index),
        )
        return put(h, chunk, index, BATCH)

    return _loop(count, one_chunk, jnp.zeros_like(x)), no_aux(block)


def no_aux(block: Block) -> Leaves:
    """The aux of a block that has none."""
    return Leaves(((),) * len(block.branches), ((),) * len(block.branches))


def value_and_vjp(
    branches: tuple[Branch, ...],
    *,
    params: Leaves,
    x: jax.Array,
    consts: Leaves,
    scale: jax.Array,
    ct: jax.Array,
    ct_aux: tuple[Any, ...],
    use: Callable[[jax.Array], PyTree],
) -> tuple[PyTree, Cotangents]:
    """(use(h), cotangents of the block's inputs), with one branch's residuals at a time.

    The cotangent of h is scale * ct. The last branch is evaluated once, for its value and its vjp;
    each before it twice, for the value that those after it need and for the vjp: that is the price.
    What h is used for is done before the vjp, so that neither h nor its terms are held through it.
    """
    ys, rs = [x], []
    for branch in branches[:-1]:
        r, _ = _branch_value(branch, params, ys[-1], consts)
        rs.append(r)
        ys.append(ys[-1] + r)

    def use_sum(r):
        return use(reduce(jnp.add, [*rs, r]))

    last = branches[-1], params, ys.pop(), consts
    used, found = _branch_vjp(*last, scale, ct, ct_aux[-1], use_sum)
    for branch, ct_aux_i in zip(branches[-2::-1], ct_aux[-2::-1], strict=True):
        y = _after(found.x, ys.pop())
        _, more = _branch_vjp(branch, params, y, consts, 1.0, scale * ct + found.x, ct_aux_i)
        found = jax.tree.map(jnp.add, found, more)
    return used, found


def _after(ct: jax.Array, y: jax.Array) -> jax.Array:
    """y, for XLA another value that is known only after ct.

    Else it would find that a branch is evaluated twice, do so once and hold all residuals.
    `optimization_barrier`, which jax.checkpoint relies on, is dropped too early on a CPU. Not
    bit-equal to y (-0.0), which only gradients see.
    """
    return y + jnp.minimum(ct * ct, 0.0)


def branches_value(branches, params, x, consts):
    y, rs, auxes = x, [], []
    for branch in branches:
        r, aux = _branch_value(branch, params, y, consts)
        rs.append(r)
        auxes.append(aux)
        y = y + r
    return reduce(jnp.add, rs), Leaves(
        tuple(aux.diff for aux in auxes), tuple(aux.data for aux in auxes)
    )


def _branch_value(branch: Branch, params, y, consts):
    count = branch.token_chunks
    if count == 1:
        return branch.fn(params, y, consts)

    def one_chunk(index, r):
        y_chunk = cut(y, index, count, TOKENS)
        chunk, _ = branch.fn(fold_keys(params, index), y_chunk, fold_keys(consts, index))
        return put(r, chunk, index, TOKENS)

    return _loop(count, one_chunk, jnp.zeros_like(y)), Leaves((), ())


def _branch_vjp(
    branch: Branch, params, y, consts, scale, ct, ct_aux, use=lambda r: r
) -> tuple[PyTree, Cotangents]:
    """(use(r), cotangents of the branch's inputs under scale * ct)."""
    count = branch.token_chunks
    if count == 1:
        return _vjp(branch.fn, params, y, consts, scale, ct, ct_aux, use)

    def one_chunk(index, carry):
        r, found = carry  # at first y, and ct in the place of found.x, overwritten chunk by chunk
        chunk, own = _vjp(
            branch.fn,
            fold_keys(params, index),
            cut(r, index, count, TOKENS),
            fold_keys(consts, index),
            scale,
            cut(found.x, index, count, TOKENS),
            ct_aux,
        )
        ct_x = put(found.x, own.x, index, TOKENS)
        ct_params = jax.tree.map(jnp.add, found.params, own.params)
        ct_consts = jax.tree.map(jnp.add, found.consts, own.consts)
        return put(r, chunk, index, TOKENS), Cotangents(ct_params, ct_x, ct_consts)

    zeros = jax.tree.map(jnp.zeros_like, (params.diff, consts.diff))
    r, found = _loop(count, one_chunk, (y, Cotangents(zeros[0], ct, zeros[1])))
    return use(r), found


def _vjp(
    fn: LeafFn, params, y, consts, scale, ct, ct_aux, use=lambda r: r
) -> tuple[PyTree, Cotangents]:
    def differentiable(diff, y, diff_consts):
        r, aux = fn(Leaves(diff, params.data), y, Leaves(diff_consts, consts.data))
        return r, aux.diff

    (r, _), vjp = jax.vjp(differentiable, params.diff, y, consts.diff)
    used, ct = jax.lax.optimization_barrier((use(r), ct))
    return used, Cotangents(*vjp((scale * ct, ct_aux)))


def narrowed(block: Block, params: Leaves) -> Leaves:
    """params for chunks of the batch: what each of them would cast to half precision, is cast."""
    if block.batch_chunks == 1:
        return params
    pairs = zip(params.diff, block.cast, strict=True)
    return Leaves(tuple(p if to is None else p.astype(to) for p, to in pairs), params.data)


# --- in chunks of the batch --------------------------------------------------------------


def over_batch_chunks(
    block: Block,
    one: Callable[[Leaves, Leaves, PyTree, PyTree], tuple[PyTree, Any, Any]],
    params: Leaves,
    consts: Leaves,
    *,
    known: PyTree,
    states: PyTree,
    ct_consts: Any = None,
    start: jax.Array | None = None,
) -> tuple[PyTree, Any, Any]:
    """`one` on every chunk of the batch in turn: each overwrites its own of `states`.

    Args:
        one: (params_k, consts, known, states) -> (states, ct of params, ct of consts); without
            ct_consts, cotangents are ignored.
        known: arrays [B, ...] that are read, or [1, ...] for all samples.
        states: arrays [B, ...] that come back in the same shapes and dtypes.
        ct_consts: the cotangents of consts are added to it.
        start: [], 0 or NaN: sums of chunks start from it. A constant 0 would be kept from block to
            block, as an array of each gradient's size.

    Returns:
        As `one`, of the whole batch.
    """
    count = block.batch_chunks
    if count == 1:
        states, ct_params, ct_consts_k = one(params, consts, known, states)
        if ct_consts is not None:
            ct_consts = jax.tree.map(jnp.add, ct_consts, ct_consts_k)
        return states, ct_params, ct_consts

    def cut_all(tree, index):
        return jax.tree.map(lambda a: a if len(a) == 1 else cut(a, index, count, BATCH), tree)

    def put_all(tree, chunk, index):
        return jax.tree.map(lambda array, own: put(array, own, index, BATCH), tree, chunk)

    def add_consts(total, chunk, is_per_sample, index):
        if not is_per_sample:
            return total + chunk
        return put(total, cut(total, index, count, BATCH) + chunk, index, BATCH)

    narrow = narrowed(block, params)

    def one_chunk(index, carry):
        states, ct_params, ct_consts = carry
        own, ct_params_i, ct_consts_i = one(
            fold_keys(narrow, index),
            _chunk_of_consts(block, consts, index),
            cut_all(known, index),
            cut_all(states, index),
        )
        states = put_all(states, own, index)
        if ct_consts is None:
            return states, None, None
        ct_consts = tuple(
            add_consts(*each, index)
            for each in zip(ct_consts, ct_consts_i, block.is_per_sample.diff, strict=True)
        )
        ct_params = jax.tree.map(lambda a, own: a + own.astype(a.dtype), ct_params, ct_params_i)
        return states, ct_params, ct_consts

    ct_params = None if ct_consts is None else jax.tree.map(jnp.zeros_like, params.diff)
    if start is not None:
        ct_params = nan_by(start, ct_params)
    return _loop(count, one_chunk, (states, ct_params, ct_consts))


def _chunk_of_consts(block: Block, consts: Leaves, index) -> Leaves:
    """consts as chunk `index` sees them; of what all samples share, keys are folded."""

    def choose(is_per_sample, leaf, shared):
        return cut(leaf, index, block.batch_chunks, BATCH) if is_per_sample else shared

    return jax.tree.map(choose, block.is_per_sample, consts, fold_keys(consts, index))


# --- chunks of an array ------------------------------------------------------------------


def cut(array: jax.Array, index, count: int, axis: int) -> jax.Array:
    """Chunk `index` of `count` of an axis that count divides: every count-th, from index on.

    So of a batch sharded over n devices every device has its share of each chunk, as long as n
    divides the chunk.
    """
    rows = _in_rows(array, count, axis)
    return jax.lax.dynamic_index_in_dim(rows, index, axis + 1, keepdims=False)


def put(array: jax.Array, chunk: jax.Array, index, axis: int) -> jax.Array:
    """`array` with its chunk `index` replaced; in place where XLA owns it."""
    rows = _in_rows(array, array.shape[axis] // chunk.shape[axis], axis)
    return jax.lax.dynamic_update_index_in_dim(rows, chunk, index, axis + 1).reshape(array.shape)


def _in_rows(array: jax.Array, count: int, axis: int) -> jax.Array:
    """[.., N, ..] -> [.., N / count, count, ..]"""
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])


def fold_keys(leaves: Leaves, index) -> Leaves:
    """The leaves for one chunk: typed PRNG keys become others, so that chunks draw differently."""

    def fold(leaf):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        folded = jax.vmap(lambda key: jax.random.fold_in(key, index))(leaf.reshape(-1))
        return folded.reshape(leaf.shape)

    return Leaves(leaves.diff, tuple(fold(leaf) for leaf in leaves.data))


def _loop(count: int, body: Callable[[jax.Array, PyTree], PyTree], carry: PyTree) -> PyTree:
    """carry = body(index, carry) for index 0 .. count-1. Can be differentiated."""

    def one(carry, index):
        return body(index, carry), None

    return jax.lax.scan(one, carry, jnp.arange(count))[0]
