"""The forward of `bdia_scan` in a form JAX differentiates: backprop "store" and "remat"."""

import jax
import jax.numpy as jnp

from bdia_jax._branches import Blocks, value
from bdia_jax._split import Split, per_sample
from bdia_jax.fixed_point import dequantize, quantize, straight_through
from bdia_jax.recurrence import mix, step_any_gamma


def autodiff_scan(
    blocks: Blocks, fixed_point, params: Split, x0, gamma, consts: Split, remat: bool
):
    """The recurrence in a form JAX differentiates; `x` shadows `n` to carry gradients."""

    def exact_body(carry, block_inputs):
        (n_prev, x_prev), (n, x) = carry
        params_k, gamma_k = block_inputs
        h, aux = value(blocks, params_k, x, consts)
        if gamma_k is None:
            y = x + h
            n_next = quantize(y, fixed_point)
        else:
            gamma_x = per_sample(gamma_k, n)
            y = gamma_x * x_prev + mix(x, h, gamma_x)
            n_next = step_any_gamma(n_prev, n, jax.lax.stop_gradient(h), gamma_x, fixed_point)
        x_next = straight_through(y, dequantize(n_next, fixed_point))
        return ((n, x), (n_next, x_next)), aux

    def float_body(carry, block_inputs):
        x_prev, x = carry
        params_k, gamma_k = block_inputs
        h, aux = value(blocks, params_k, x, consts)
        if gamma_k is None:
            return (x, x + h), aux
        gamma_x = per_sample(gamma_k, x)
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
