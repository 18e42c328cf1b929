"""One BDIA step, and the step undone. Equation numbers are those of arXiv 2407.09093.

Notation: x_prev, x, x_next are x_{k-1}, x_k, x_{k+1}; n is the int32 state x 2^l;
p, g, l are `gamma_bits`, `guard_bits`, `frac_bits` of the `FixedPoint`.
`step` and `inverse_step` stand line against line: read them together.
"""

import jax
import jax.numpy as jnp

from bdia_jax.fixed_point import (
    FixedPoint,
    add_or_invalid,
    dequantize,
    round_to_int,
    to_quanta,
)


def sample_gamma(key: jax.Array, depth: int, batch_size: int, magnitude: float = 0.5) -> jax.Array:
    """gamma_k in {+magnitude, -magnitude} per block and sample; row 0 is zero.

    Eq. 10 trains with gamma_k drawn independently for every sample and block; the first
    block has no x_{-1}, which is gamma_0 = 0 (eq. 6).

    Args:
        key: typed PRNG key.
        depth: K, the number of blocks.
        batch_size: B.
        magnitude: 1/2 in the paper; 1/4, 1/8, ... need `FixedPoint(gamma_bits=2, 3, ...)`;
            any other value trains with backprop "store" or "remat".

    Returns:
        float32 [K, B].

    Raises:
        ValueError: depth or batch_size below 1, or magnitude outside [0, 1].

    Example:
        >>> gamma = sample_gamma(jax.random.key(0), depth=3, batch_size=4)
        >>> gamma.shape, float(abs(gamma[0]).max()), float(abs(gamma[1:]).min())
        ((3, 4), 0.0, 0.5)
    """
    if depth < 1 or batch_size < 1:
        raise ValueError(f"depth is {depth} and batch_size {batch_size}; both must be at least 1")
    if not 0 <= magnitude <= 1:
        raise ValueError(f"magnitude is {magnitude}, expected a number from 0 to 1")
    sign = jax.random.rademacher(key, (depth, batch_size), jnp.float32)
    return (sign * jnp.float32(magnitude)).at[0].set(0.0)


def per_element(gamma_k: jax.Array, x: jax.Array) -> jax.Array:
    """gamma_k [B] or [1] -> [B, 1, ..., 1], to multiply x [B, ..., D]."""
    return gamma_k.reshape(gamma_k.shape + (1,) * (x.ndim - 1))


def mix(x: jax.Array, h: jax.Array, gamma: jax.Array) -> jax.Array:
    """(1 - gamma_k) x_k + (1 + gamma_k) h_k: what eq. 10 adds to gamma_k x_{k-1}.

    Written so that the product is exact for gamma = +-2^-p: the compiler may fuse it into a
    multiply-add in one pass and not in the other, and the bits must not depend on that.
    """
    return (x + h) + gamma * (h - x)


def step(n_prev, n, h, gamma, fixed_point: FixedPoint):
    """n_{k+1} from n_{k-1}, n_k and h_k(x_k), and the bits that undo it (eq. 21).

    Args:
        n_prev, n: int32 [B, ..., D].
        h: float32 [B, ..., D], the block's output at `dequantize(n)`.
        gamma: float32, broadcastable to h, of values 0 or +-2^-p.
        fixed_point: the format.

    Returns:
        n_next: int32; marked invalid (NaN) where h is not finite or the state overflows.
        side: int32 in [0, 2^(p+g)): n_{k-1} mod 2^(p+g).
        pre_round: float32, the value that was rounded, in quanta.
    """
    p = fixed_point.gamma_bits
    sigma = jnp.sign(gamma).astype(jnp.int32)
    side = n_prev & (2**fixed_point.side_bits - 1)
    pre_round = to_quanta(mix(dequantize(n, fixed_point), h, gamma), fixed_point)
    q = round_to_int(pre_round)
    # (n_prev + e) / 2^p with e = (-n_prev) mod 2^p is a division that rounds up (eq. 20)
    ratio = -((-n_prev) >> p)
    n_next = add_or_invalid(sigma * ratio, q)
    return n_next, side, pre_round


def inverse_step(n_next, n, h, gamma, side, fixed_point: FixedPoint):
    """n_{k-1} from n_{k+1}, n_k, h_k(x_k) and the side bits (eq. 24, with guard bits).

    Exact whenever the recomputed h is so close to the forward's that the value before
    rounding moves by less than `fixed_point.drift_bound` quanta: n_{k+1} and the low
    bits of n_{k-1} give q_k mod 2^g, and q_k is the integer of that residue nearest to
    the recomputed value. Where gamma is 0 there is no n_{k-1} to find and the result
    has no meaning.

    Args: as `step`, with n_next and side as it returned them.

    Returns:
        n_prev: int32.
        correction: int32, by how much the guard moved the recomputed rounding.
        pre_round: float32, the recomputed value before rounding, in quanta.
    """
    p, g = fixed_point.gamma_bits, fixed_point.guard_bits
    sigma = jnp.sign(gamma).astype(jnp.int32)
    e = -side & (2**p - 1)
    pre_round = to_quanta(mix(dequantize(n, fixed_point), h, gamma), fixed_point)
    q = round_to_int(pre_round)
    ratio_low = (side + e) >> p  # equals the forward's ratio modulo 2^g
    residue = (n_next - sigma * ratio_low - q) & (2**g - 1)
    fraction = pre_round - jnp.round(pre_round)
    above = residue.astype(jnp.float32) - fraction > 2.0 ** (g - 1)
    correction = residue - jnp.where(above, jnp.int32(2**g), jnp.int32(0))
    n_prev = sigma * ((n_next - (q + correction)) << p) - e
    return n_prev, correction, pre_round


def step_any_gamma(n_prev, n, h, gamma, fixed_point: FixedPoint):
    """`step` for gamma of any magnitude, not invertible (Remark 1): gamma n_{k-1} is rounded.

    Bit-equal to `step` where |gamma| is 0 or 2^-p, so that "store", "remat" and
    "reversible" compute the same forward.
    """
    exact, _, pre_round = step(n_prev, n, h, gamma, fixed_point)
    history = to_quanta(gamma * dequantize(n_prev, fixed_point), fixed_point)
    rounded = add_or_invalid(round_to_int(history), round_to_int(pre_round))
    magnitude = jnp.abs(gamma)
    invertible = (magnitude == 0) | (magnitude == 2.0**-fixed_point.gamma_bits)
    return jnp.where(invertible, exact, rounded)
