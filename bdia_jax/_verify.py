"""Is a rebuilt state the forward's? Each has a checksum, and what fails is NaN from there on.

The forward pass keeps 4 bytes for every sample and block. In the backward pass, once a rebuilt x_k
has another checksum, the cotangents that come from it are NaN: all of block k's parameters and of
those below, of consts, and of x_0 of that sample. Those of the blocks above are right and stay.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax._mesh import varying


def checksum(n: jax.Array, side_bits: int, parts: int) -> jax.Array:
    """Of every sample, or of each of `parts` equal parts of its axis 1.

    The sum of n >> side_bits (the bits below are kept, and cannot be wrong), each times an odd
    number, modulo 2^32. So one wrong element always changes it; several go unnoticed only if what
    they change it by adds up to 0. The number is a product of one for each axis, as if drawn at
    random, so that no array of their size is needed.

    Args:
        n: int32 [B, ...]; with parts > 1, which divides T, [B, T, ...].

    Returns:
        uint32 [B, parts].
    """
    first, *others = n.shape[1:] or (1,)
    rows = n.reshape(len(n), parts, first // parts, *others)
    sums = jax.lax.bitcast_convert_type(rows >> side_bits, jnp.uint32)
    for axis in reversed(range(2, rows.ndim)):
        weights = _weights(rows.shape[axis], axis).reshape((1,) * axis + (-1,))
        sums = jnp.sum(sums * weights, axis=-1, dtype=jnp.uint32)
    return sums


def _weights(size: int, axis: int) -> np.ndarray:
    """uint32 [size], odd."""
    return np.random.default_rng(axis).integers(2**31, size=size, dtype=np.uint32) * 2 + 1


def zero_or_nan(sound: jax.Array) -> jax.Array:
    """float32 []: 0 if all is sound, else NaN. A sum, so that devices add it up with gradients."""
    return jnp.sum(jnp.where(sound, 0.0, jnp.nan), dtype=jnp.float32)


def per_part(sound: jax.Array, x: jax.Array) -> jax.Array:
    """sound [B, parts] as an array that broadcasts to x [B, ...]."""
    if sound.shape[1] > 1:
        sound = jnp.repeat(sound, x.shape[1] // sound.shape[1], axis=1)
    return sound.reshape(len(x), *sound.shape[1 : x.ndim], *(1,) * (x.ndim - 2))


def nan_unless(is_right: jax.Array, x: jax.Array) -> jax.Array:
    """x, NaN where it does not hold; it broadcasts to x."""
    return jnp.where(is_right, x, np.asarray(np.nan, x.dtype))


def nan_by(verdict: jax.Array, tree: Any) -> Any:
    """The arrays of a pytree, all NaN if `zero_or_nan` said so.

    Inside `jax.shard_map` an array that is the same on all devices takes the verdict of all.
    """

    def judged(x):
        own = varying(verdict) - varying(x)
        everybodys = jax.lax.psum(verdict, tuple(own)) if own else verdict
        return nan_unless(everybodys == 0, x)

    return jax.tree.map(judged, tree)
