"""Is a rebuilt state the forward's? Each has a checksum, and what fails is NaN from there on.

The forward pass keeps 4 bytes for every sample and block. In the backward pass a sample whose
rebuilt x_k has another checksum sees NaN for x_k and for its cotangent: no gradient that depends
on the wrong state is a number, and those of the blocks after it, which do not, stay as they are.
"""

import jax
import jax.numpy as jnp


def checksum(n: jax.Array, side_bits: int, parts: int) -> jax.Array:
    """Of every sample, or of each of `parts` equal parts of its axis 1.

    The sum of n >> side_bits (the bits below are kept, and cannot be wrong), each times an odd
    number of its place, modulo 2^32: one wrong element always changes it, and of several that are
    wrong one in 2^31 goes unnoticed.

    Args:
        n: int32 [B, ...]; with parts > 1, which divides T, [B, T, ...].

    Returns:
        uint32 [B, parts].
    """
    first, *others = n.shape[1:] or (1,)
    rows = n.reshape(len(n), parts, first // parts, *others)
    values = jax.lax.bitcast_convert_type(rows >> side_bits, jnp.uint32)
    return jnp.sum(values * _weights(rows.shape[2:]), tuple(range(2, rows.ndim)), jnp.uint32)


def _weights(shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: odd, and as if drawn at random."""
    place = jnp.uint32(0)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    mixed = place * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    return (mixed ^ (mixed >> 13)) | jnp.uint32(1)


def nan_unless(sound: jax.Array | None, x: jax.Array) -> jax.Array:
    """x [B, ...], and NaN in the parts [B, parts] that are not sound; x itself for None."""
    if sound is None:
        return x
    batch, parts = sound.shape
    if parts > 1:
        sound = jnp.repeat(sound, x.shape[1] // parts, axis=1)
    shape = (batch, sound.shape[1], *(1,) * (x.ndim - 2)) if x.ndim > 1 else (batch,)
    return jnp.where(sound.reshape(shape), x, jnp.float32(jnp.nan))
