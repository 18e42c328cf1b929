"""One BDIA step, and the step undone. Equation numbers are those of arXiv 2407.09093.

Notation: x_prev, x, x_next are x_{k-1}, x_k, x_{k+1}; n is the int32 state x 2^l; g, l are
`guard_bits`, `frac_bits` of the `FixedPoint`. gamma is +-2^-p, and p may differ from block to block
and from sample to sample, up to its `gamma_bits`: of a larger gamma's side bits more are guards.
`step` and `inverse_step` stand line against line: read them together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from bdia_jax.fixed_point import (
    INVALID,
    FixedPoint,
    add_or_invalid,
    dequantize,
    round_to_int,
    to_quanta,
)

_FITS = 2.0**31 - 2.0**10  # quanta; float32 sums there are right to 2^9


def sample_gamma(
    key: jax.Array, depth: int, batch_size: int, magnitude: ArrayLike = 0.5
) -> jax.Array:
    """gamma_k in {+magnitude, -magnitude} per block and sample; row 0 is zero.

    Eq. 10 trains with gamma_k drawn independently for every sample and block; the first
    block has no x_{-1}, which is gamma_0 = 0 (eq. 6).

    Args:
        key: typed PRNG key.
        depth: K, the number of blocks.
        batch_size: B.
        magnitude: 1/2 in the paper; 1/4, 1/8, ... need `FixedPoint(gamma_bits=2, 3, ...)`, or
            more; any other value trains with backprop "store" or "remat". One for all blocks, or
            [K], one for each, of which the first is not used. May be traced: a schedule.

    Returns:
        float32 [K, B].

    Raises:
        ValueError: depth or batch_size below 1, or magnitude of another shape or outside [0, 1].

    Example:
        >>> gamma = sample_gamma(jax.random.key(0), depth=3, batch_size=4)
        >>> gamma.shape, float(abs(gamma[0]).max()), float(abs(gamma[1:]).min())
        ((3, 4), 0.0, 0.5)
    """
    if depth < 1 or batch_size < 1:
        raise ValueError(f"depth is {depth} and batch_size {batch_size}; both must be at least 1")
    shape = np.shape(magnitude)
    if shape not in ((), (depth,)):
        raise ValueError(
            f"magnitude has shape {shape}, expected a number, or one for each of {depth} blocks"
        )
    values = np.zeros(()) if isinstance(magnitude, Tracer) else np.asarray(magnitude)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"magnitude is {magnitude}, expected a number from 0 to 1")
    sign = jax.random.rademacher(key, (depth, batch_size), jnp.float32)
    each = jnp.broadcast_to(jnp.asarray(magnitude, jnp.float32), (depth,))
    return (sign * each[:, None]).at[0].set(0.0)


def per_element(gamma_k: jax.Array, x: jax.Array) -> jax.Array:
    """gamma_k [B] or [1] -> [B, 1, ..., 1], to multiply x [B, ..., D]."""
    return gamma_k.reshape(gamma_k.shape + (1,) * (x.ndim - 1))


def mix(x: jax.Array, h: jax.Array, gamma: jax.Array) -> jax.Array:
    """(1 - gamma_k) x_k + (1 + gamma_k) h_k: what eq. 10 adds to gamma_k x_{k-1}.

    Written so that the product is exact for gamma = +-2^-p: the compiler may fuse it into a
    multiply-add in one pass and not in the other, and the bits must not depend on that.
    """
    return (x + h) + gamma * (h - x)


def exponent(gamma: jax.Array, fixed_point: FixedPoint) -> jax.Array:
    """int32: p of gamma = +-2^-p, read from its bits; `gamma_bits` where gamma is 0."""
    bits = jax.lax.bitcast_convert_type(gamma, jnp.int32)
    return jnp.clip(127 - ((bits >> 23) & 255), 1, fixed_point.gamma_bits)


class Rounding(NamedTuple):
    """A value in quanta, as the nearest integer and the rest: q int32, rest float32 in +-1/2."""

    q: jax.Array
    rest: jax.Array


def rounded_mix(n, h, gamma, fixed_point: FixedPoint) -> Rounding:
    """`mix` in quanta, rounded (Q of eq. 21), ties to even; q is invalid where it does not fit.

    With H = h 2^l = i + f, i its nearest integer, and gamma = s 2^-p the value is

        n + i + s ((i >> p) - (n >> p))  +  gamma (i mod 2^p - n mod 2^p) + (1 + gamma) f:

    an integer, and a number below 2 whose float32 is right to 2^-23. So it is as exact for large
    states as for small ones, where float32 has lost the quanta, and the products are exact: the
    bits do not depend on what the compiler fuses.

    Args:
        n: int32 [B, ..., D]. h: float32, the same shape.
        gamma: float32, broadcastable to h, of values 0 or +-2^-p.
        fixed_point: the format.
    """
    p = exponent(gamma, fixed_point)
    quanta = to_quanta(h, fixed_point)
    i = round_to_int(quanta)
    f = quanta - jnp.round(quanta)
    sigma = jnp.sign(gamma).astype(jnp.int32)
    whole = n + i + sigma * ((i >> p) - (n >> p))
    low = (1 << p) - 1
    rest = gamma * ((i & low) - (n & low)).astype(jnp.float32) + (f + gamma * f)
    floor = jnp.floor(rest)
    q = whole + floor.astype(jnp.int32)
    rest = rest - floor
    up = (rest > 0.5) | ((rest == 0.5) & ((q & 1) == 1))
    q, rest = q + up.astype(jnp.int32), jnp.where(up, rest - 1.0, rest)
    # sums above wrap around: right where the value fits, of which float32 knows enough
    x = n.astype(jnp.float32)
    fits = (jnp.abs(mix(x, quanta, gamma)) < _FITS) & (jnp.abs(quanta) < _FITS) & (n != INVALID)
    return Rounding(jnp.where(fits, q, jnp.int32(INVALID)), rest)


def step(n_prev, n, h, gamma, fixed_point: FixedPoint):
    """n_{k+1} from n_{k-1}, n_k and h_k(x_k), and the bits that undo it (eq. 21).

    Args:
        n_prev, n: int32 [B, ..., D].
        h: float32 [B, ..., D], the block's output at `dequantize(n)`.
        gamma: float32, broadcastable to h, of values 0 or +-2^-p.
        fixed_point: the format.

    Returns:
        n_next: int32; marked invalid (NaN) where h is not finite or the state overflows.
        side: int32: n_{k-1} mod 2^b, b = `side_bits`, p + g for the smallest gamma.
        rounding: what was rounded.
    """
    p = exponent(gamma, fixed_point)
    sigma = jnp.sign(gamma).astype(jnp.int32)
    side = n_prev & (2**fixed_point.side_bits - 1)
    rounding = rounded_mix(n, h, gamma, fixed_point)
    # (n_prev + e) / 2^p with e = (-n_prev) mod 2^p is a division that rounds up (eq. 20)
    ratio = -((-n_prev) >> p)
    n_next = add_or_invalid(sigma * ratio, rounding.q)
    return n_next, side, rounding


def plain_step(n, h, fixed_point: FixedPoint):
    """n_{k+1} of inference, where gamma is 0: x_{k+1} = Q[x_k + h_k(x_k)] (eq. 11)."""
    return rounded_mix(n, h, jnp.float32(0), fixed_point).q


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
        rounding: what was rounded, recomputed.
    """
    p = exponent(gamma, fixed_point)
    guards = fixed_point.side_bits - p  # g or more
    sigma = jnp.sign(gamma).astype(jnp.int32)
    e = -side & ((1 << p) - 1)
    rounding = q, rest = rounded_mix(n, h, gamma, fixed_point)
    ratio_low = (side + e) >> p  # equals the forward's ratio modulo 2^guards
    residue = (n_next - sigma * ratio_low - q) & ((1 << guards) - 1)
    # of the integers q + residue and 2^guards less the one nearer to q + rest
    above = residue.astype(jnp.float32) - rest > 0.5 * (1 << guards).astype(jnp.float32)
    correction = residue - jnp.where(above, 1 << guards, 0)
    n_prev = sigma * ((n_next - (q + correction)) << p) - e
    return n_prev, correction, rounding


def step_any_gamma(n_prev, n, h, gamma, fixed_point: FixedPoint):
    """`step` for gamma of any magnitude, not invertible (Remark 1): gamma n_{k-1} is rounded.

    Bit-equal to `step` where gamma is 0 or +-2^-p, so that "store", "remat" and "reversible"
    compute the same forward.
    """
    exact, *_ = step(n_prev, n, h, gamma, fixed_point)
    x_prev, x = (dequantize(each, fixed_point) for each in (n_prev, n))
    history, new = (to_quanta(each, fixed_point) for each in (gamma * x_prev, mix(x, h, gamma)))
    rounded = add_or_invalid(round_to_int(history), round_to_int(new))
    invertible = (gamma == 0) | fixed_point.reverses(gamma)
    return jnp.where(invertible, exact, rounded)
