"""Checksums of arrays, computed on the devices that hold them: the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # 8: two words


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a pytree, by its path.

    With words w_i of 32 bits (fewer for a smaller dtype, two for a larger one),

        sum_i mix(w_i xor mix(i)) mod 2^32,    mix a bijection of the 32-bit numbers.

    So any change of one word changes the sum, in whichever bits; of other changes, words
    exchanged among them, one in 2^32 goes unseen. A sum does not depend on its order, hence not
    on how an array is split over devices.

    Args:
        tree: of arrays of any dtype, PRNG keys among them; with several processes global ones.
    """
    sums = jax.device_get(_checksums(by_path(tree)))
    return {name: int(value) for name, value in sums.items()}


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, as "params.stack.mlp.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # One program: several, that each sum over devices, may run in another order in each process,
    # and then wait for each other for ever.
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    words = _words(array)
    index = jnp.zeros([], jnp.uint32)
    for axis, stride in enumerate(_strides(words.shape)):  # a reshape would gather what is split
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """uint32, in the shape of the array, with an axis more for 8-byte dtypes."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    unsigned = _UNSIGNED[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [int(np.prod(shape[axis + 1 :], dtype=object)) % 2**32 for axis in range(len(shape))]


def _mix(words: jax.Array) -> jax.Array:
    """The last lines of MurmurHash3: bijective, and each bit of the result depends on all."""
    words ^= words >> 16
    words *= jnp.uint32(0x85EBCA6B)
    words ^= words >> 13
    words *= jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
