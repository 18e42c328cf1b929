"""The forward of `bdia_scan` in a form JAX differentiates: backprop "store" and "remat"."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bdia_jax._block import Block, Leaves
from bdia_jax._parts import value
from bdia_jax._updating import Slots, Update
from bdia_jax.fixed_point import dequantize, quantize, straight_through
from bdia_jax.recurrence import mix, per_element, plain_step, step_any_gamma


def autodiff_scan(
    block: Block,
    fixed_point: Any,  # FixedPoint or None
    params: Leaves,
    x0: jax.Array,
    gamma: jax.Array | None,
    consts: Leaves,
    *,
    remat: bool,
) -> tuple[Any, Leaves]:
    """(x_K, aux [K, ...])."""
    body, state = _recurrence(block, fixed_point, x0)

    def one(carry, inputs):
        return body(carry, *inputs, consts)

    if remat:
        one = jax.checkpoint(one, prevent_cse=False)
    (_, last), aux = jax.lax.scan(one, (state, state), (params, gamma))
    return (last if fixed_point is None else last[1]), aux


def _recurrence(block: Block, fixed_point: Any, x0: jax.Array) -> tuple[Any, Any]:
    """((carry, params_k, gamma_k, consts) -> (carry, aux), the state of x_0).

    A carry is the states of two blocks: x, or (n, x), where `x` shadows `n` to carry gradients.
    """

    def exact_body(carry, params_k, gamma_k, consts):
        (n_prev, x_prev), (n, x) = carry
        h, aux = value(block, params_k, x, consts)
        if gamma_k is None:
            y = x + h
            n_next = plain_step(n, jax.lax.stop_gradient(h), fixed_point)
        else:
            gamma_x = per_element(gamma_k, n)
            y = gamma_x * x_prev + mix(x, h, gamma_x)
            n_next = step_any_gamma(n_prev, n, jax.lax.stop_gradient(h), gamma_x, fixed_point)
        x_next = straight_through(y, dequantize(n_next, fixed_point))
        return ((n, x), (n_next, x_next)), aux

    def float_body(carry, params_k, gamma_k, consts):
        x_prev, x = carry
        h, aux = value(block, params_k, x, consts)
        if gamma_k is None:
            return (x, x + h), aux
        gamma_x = per_element(gamma_k, x)
        return (x, gamma_x * x_prev + mix(x, h, gamma_x)), aux

    x0 = x0.astype(jnp.float32)
    if fixed_point is None:
        return float_body, x0
    n0 = quantize(x0, fixed_point)
    return exact_body, (n0, straight_through(x0, dequantize(n0, fixed_point)))


# --- "remat", and blocks updated in the backward pass ------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def updating_scan(
    block: Block,
    fixed_point: Any,
    update: Update,
    params: Leaves,
    x0: jax.Array,
    gamma: jax.Array | None,
    consts: Leaves,
    slots: Slots,
) -> tuple[Any, Leaves]:
    """`autodiff_scan` with remat, whose backward pass updates what `update` says."""
    del update, slots
    return autodiff_scan(block, fixed_point, params, x0, gamma, consts, remat=False)


def _updating_fwd(block, fixed_point, update, params, x0, gamma, consts, slots):
    body, state = _recurrence(block, fixed_point, x0)

    def one(carry, inputs):
        made, aux = body(carry, *inputs, consts)
        return made, (aux, carry[1] if fixed_point is None else carry[1][0])

    (_, last), (aux, kept) = jax.lax.scan(one, (state, state), (params, gamma))
    result = (last if fixed_point is None else last[1]), aux
    x0_dtype = jnp.zeros((0,), x0.dtype)  # all of x0 that is needed
    return result, (params, gamma, consts, slots, kept, x0_dtype)


def _updating_bwd(block, fixed_point, update, residuals, cotangents):
    params, gamma, consts, slots, kept, x0_dtype = residuals
    ct_x_last, ct_aux = cotangents
    body, _ = _recurrence(block, fixed_point, ct_x_last)

    def state(k):
        n = jax.lax.dynamic_index_in_dim(kept, jnp.maximum(k, 0), keepdims=False)
        return n if fixed_point is None else (n, dequantize(n, fixed_point))

    def one(carry, inputs):
        (ct_before, ct), ct_consts, updated = carry
        params_k, gamma_k, ct_aux_k, k = inputs
        params_k = update.read(updated, params_k, k)

        def differentiable(diff, xs, diff_consts):
            pair = xs if ns is None else tuple(zip(ns, xs, strict=True))
            leaves = Leaves(diff, params_k.data), gamma_k, Leaves(diff_consts, consts.data)
            made, aux = body(pair, *leaves)
            return (made if ns is None else tuple(x for _, x in made)), aux.diff

        pair: Any = state(k - 1), state(k)
        ns, xs = (None, pair) if fixed_point is None else zip(*pair, strict=True)
        _, vjp = jax.vjp(differentiable, params_k.diff, tuple(xs), consts.diff)
        ct_params_k, ct_pair, more = vjp(((ct_before, ct), ct_aux_k))
        updated, rest, squares = update.block(updated, params_k, ct_params_k, k, slots)
        ct_consts = jax.tree.map(jnp.add, ct_consts, more)
        return (ct_pair, ct_consts, updated), (rest, squares)

    others, numbers = update.inputs(params, slots)
    zeros = jax.tree.map(jnp.zeros_like, (ct_x_last, consts.diff))
    init = ((zeros[0], ct_x_last), zeros[1], update.carry(params, slots))
    inputs = (others, gamma, ct_aux.diff, numbers)
    last, (rest, squares) = jax.lax.scan(one, init, inputs, reverse=True)
    (ct_before, ct), ct_consts, updated = last
    diff, ct_slots = update.cotangents(updated, rest, squares, None, slots)
    ct_x0 = (ct_before + ct).astype(x0_dtype.dtype)
    return Leaves(diff, None), ct_x0, None, Leaves(ct_consts, None), ct_slots


updating_scan.defvjp(_updating_fwd, _updating_bwd)
