"""Examples over the devices of a mesh: every process holds its rows of them, every device its own.

Which examples a step sees does not depend on the mesh (`train.data.batches`). So a batch has rows
of every device, and is exchanged between them: few bytes, as examples are pixels and token ids.

A group of examples is a pytree of arrays with a common leading axis.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdia_jax.sharding import BATCH_AXES, batch_sharding

_SPEC = PartitionSpec(BATCH_AXES)


def local_rows(count: int, mesh: Mesh | None) -> np.ndarray:
    """int64: which of `count` examples the devices of this process hold, in rising order."""
    if mesh is None:
        return np.arange(count)
    sharding, size = NamedSharding(mesh, _SPEC), _padded(count, mesh)
    indices = sharding.addressable_devices_indices_map((size,)).values()
    ranges = {(index[0].start or 0, index[0].stop or size) for index in indices if index}
    rows = np.concatenate([np.arange(*each) for each in sorted(ranges)])
    return rows[rows < count]


def place(groups: Sequence[Any], counts: Sequence[int], mesh: Mesh | None) -> tuple[Any, ...]:
    """The examples on their devices, [count rounded up, ...], split over data and fsdp.

    Args:
        groups: each with arrays of all `count` examples, or of the `local_rows` alone.
        counts: examples of all processes, of each group.
        mesh: None: on the default device.
    """

    def split(array, count):
        if mesh is None:
            return jnp.asarray(array)
        array, size = np.asarray(array), _padded(count, mesh)
        rows = np.arange(count) if len(array) == count else local_rows(count, mesh)

        def part(index):
            start, stop = index[0].start or 0, index[0].stop or size
            first = int(np.searchsorted(rows, start))
            own = array[first : first + min(stop, count) - start]
            return np.pad(own, ((0, stop - start - len(own)), *((0, 0),) * (array.ndim - 1)))

        shape = (size, *array.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, _SPEC), part)

    return _map(split, groups, counts)


def abstract(groups: Sequence[Any], counts: Sequence[int], mesh: Mesh | None) -> tuple[Any, ...]:
    """Shapes, dtypes and shardings of `place(groups, counts, mesh)`."""
    sharding = None if mesh is None else NamedSharding(mesh, _SPEC)

    def shape(array, count):
        size = count if mesh is None else _padded(count, mesh)
        return jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype, sharding=sharding)

    return _map(shape, groups, counts)


def _map(function: Any, groups: Sequence[Any], counts: Sequence[int]) -> tuple[Any, ...]:
    return tuple(
        jax.tree.map(lambda array, count=count: function(array, count), group)
        for group, count in zip(groups, counts, strict=True)
    )


def take(group: Any, index: jax.Array, mesh: Mesh | None) -> Any:
    """The examples of `index` [B], out of a placed group; split over data and fsdp.

    Every device sends what it has of them, zeros for the rest, and the sum is the batch.
    """
    if mesh is None:
        return jax.tree.map(lambda array: array[index], group)
    whole = batch_sharding(mesh, len(index)).spec == PartitionSpec()

    def own(group, index):
        def rows(array):
            place = index - jax.lax.axis_index(BATCH_AXES) * len(array)
            is_here = (place >= 0) & (place < len(array))
            got = array[jnp.clip(place, 0, len(array) - 1)]
            got = jnp.where(is_here.reshape(-1, *(1,) * (got.ndim - 1)), got, jnp.zeros_like(got))
            if whole:
                return jax.lax.psum(got, BATCH_AXES)
            return jax.lax.psum_scatter(got, BATCH_AXES, tiled=True)

        return jax.tree.map(rows, group)

    out = PartitionSpec() if whole else _SPEC
    return jax.shard_map(own, mesh=mesh, in_specs=(_SPEC, PartitionSpec()), out_specs=out)(
        group, index
    )


def to_host(tree: Any) -> Any:
    """The arrays of a state, whole, as NumPy arrays of this process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _padded(count: int, mesh: Mesh) -> int:
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    return -(-count // parts) * parts
