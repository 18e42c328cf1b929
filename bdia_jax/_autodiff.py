"""The forward of `bdia_scan` in a form JAX differentiates: backprop "store" and "remat"."""

from typing import Any

import jax
import jax.numpy as jnp

from bdia_jax._block import Block, Leaves
from bdia_jax._parts import value
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
    """(x_K, aux [K, ...]): the recurrence, where `x` shadows `n` to carry gradients."""

    def exact_body(carry, inputs):
        (n_prev, x_prev), (n, x) = carry
        params_k, gamma_k = inputs
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

    def float_body(carry, inputs):
        x_prev, x = carry
        params_k, gamma_k = inputs
        h, aux = value(block, params_k, x, consts)
        if gamma_k is None:
            return (x, x + h), aux
        gamma_x = per_element(gamma_k, x)
        return (x, gamma_x * x_prev + mix(x, h, gamma_x)), aux

    x0 = x0.astype(jnp.float32)
    if fixed_point is None:
        body, state = float_body, x0
    else:
        n0 = quantize(x0, fixed_point)
        body, state = exact_body, (n0, straight_through(x0, dequantize(n0, fixed_point)))
    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    (_, last), aux = jax.lax.scan(body, (state, state), (params, gamma))
    return (last if fixed_point is None else last[1]), aux
