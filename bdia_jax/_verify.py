"""Is a rebuilt state the forward's? Each has a checksum, and what fails is NaN from there on.

The forward pass keeps 4 bytes for every sample and block. In the backward pass, once a rebuilt x_k
has another checksum, the cotangents that come from it are NaN: all of block k's parameters and of
those below, of consts, and of x_0 of that sample. Those of the blocks above are right and stay.
"""

from typing import Any, NamedTuple

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


class Proof(NamedTuple):
    """What is known, in the backward pass, of the states rebuilt so far.

    sound: bool [B, parts], whether each was the forward's. verdict: float32 [], 0 if all were, else
    NaN; a sum, so that devices add it up as they do gradients.
    """

    sound: jax.Array
    verdict: jax.Array

    @classmethod
    def begin(cls, batch: int, parts: int) -> "Proof":
        """Of no state yet."""
        return cls(jnp.ones((batch, parts), bool), jnp.zeros([], jnp.float32))

    def after(self, is_right: jax.Array) -> "Proof":
        """When one more is rebuilt; is_right: bool [B, parts]."""
        sound = self.sound & is_right
        return Proof(sound, jnp.sum(jnp.where(sound, 0.0, jnp.nan), dtype=jnp.float32))

    @property
    def holds(self) -> jax.Array:
        """bool []: whether every state was right."""
        return self.verdict == 0

    def of_samples(self, x: jax.Array) -> jax.Array:
        """x [B, ...], NaN in the parts that are not sound."""
        sound, (batch, parts) = self.sound, self.sound.shape
        if parts > 1:
            sound = jnp.repeat(sound, x.shape[1] // parts, axis=1)
        return nan_unless(sound.reshape(batch, *sound.shape[1 : x.ndim], *(1,) * (x.ndim - 2)), x)


def nan_unless(is_right: jax.Array, tree: Any) -> Any:
    """The arrays of a pytree, NaN where it does not hold; it broadcasts to them."""
    return jax.tree.map(lambda x: jnp.where(is_right, x, jnp.asarray(jnp.nan, x.dtype)), tree)
