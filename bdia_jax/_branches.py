"""A block's h and its vjp, branch after branch and part after part, to hold less at a time.

h = r_1 + .. + r_m with r_i = f_i(y_i), y_1 = x, y_{i+1} = y_i + r_i: for the pre-norm
transformer f_1 is attention and f_2 the MLP. A block given whole is one branch.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from bdia_jax._block import Blocks, Branch
from bdia_jax._chunks import BATCH, TOKENS, cut, cut_consts, fold, loop, put
from bdia_jax._split import Block, Split


def value(blocks: Blocks, params: Split, x, consts: Split) -> tuple[jax.Array, Split]:
    """(h, aux of all branches). Autodiff gives its derivatives."""
    count, batch = blocks.batch_chunks, x.shape[0]
    if count == 1:
        return _value(blocks.branches, params, x, consts)

    def body(index, h):
        here = cut_consts(consts, index, count, batch)
        part, _ = _value(blocks.branches, fold(params, index), cut(x, index, count, BATCH), here)
        return put(h, part, index, BATCH)

    return loop(count, body, jnp.zeros_like(x)), _no_aux(blocks.branches)


def value_and_vjp(branches, params: Split, x, consts: Split, ct_h, ct_aux):
    """(h, cotangents of (params.diff, x, consts.diff)), with one branch's residuals at a time.

    The last branch is evaluated once, for its value and its vjp; each before it twice, for
    the value that those after it need and for the vjp: that is the price.
    """
    ys, rs = [x], []
    for branch in branches[:-1]:
        r, _ = _branch_value(branch, params, ys[-1], consts)
        rs.append(r)
        ys.append(ys[-1] + r)
    r, (ct_params, ct_y, ct_consts) = _branch_vjp(
        branches[-1], params, ys.pop(), consts, ct_h, ct_aux[-1]
    )
    rs.append(r)
    for branch, ct_aux_i in zip(branches[-2::-1], ct_aux[-2::-1], strict=True):
        y = _after(ct_y, ys.pop())
        _, cotangents = _branch_vjp(branch, params, y, consts, ct_h + ct_y, ct_aux_i)
        ct_params, ct_y, ct_consts = jax.tree.map(jnp.add, (ct_params, ct_y, ct_consts), cotangents)
    return reduce(jnp.add, rs), (ct_params, ct_y, ct_consts)


def _after(ct: jax.Array, y: jax.Array) -> jax.Array:
    """y, for XLA another value that is known only after ct.

    Else it would find that a branch is evaluated twice, do so once and hold all residuals.
    `optimization_barrier`, which jax.checkpoint relies on, is dropped too early on a CPU. Not
    bit-equal to y (-0.0), which only gradients see.
    """
    return y + jnp.minimum(ct * ct, 0.0)


def _value(branches, params, x, consts):
    y, rs, auxes = x, [], []
    for branch in branches:
        r, aux = _branch_value(branch, params, y, consts)
        rs.append(r)
        auxes.append(aux)
        y = y + r
    return reduce(jnp.add, rs), Split(
        tuple(aux.diff for aux in auxes), tuple(aux.data for aux in auxes)
    )


def _no_aux(branches) -> Split:
    return Split(tuple([] for _ in branches), tuple([] for _ in branches))


def _branch_value(branch: Branch, params, y, consts):
    count = branch.token_chunks
    if count == 1:
        return branch.block(params, y, consts)

    def body(index, r):
        inputs = fold(params, index), cut(y, index, count, TOKENS), fold(consts, index)
        part, _ = branch.block(*inputs)
        return put(r, part, index, TOKENS)

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
            cut(r, index, count, TOKENS),
            fold(consts, index),
            cut(ct, index, count, TOKENS),
            ct_aux,
        )
        r, ct = put(r, part, index, TOKENS), put(ct, ct_part, index, TOKENS)
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
