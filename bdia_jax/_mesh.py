"""What the types of arrays say of devices: inside `jax.shard_map`, and on explicit meshes."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def varying(x: jax.Array) -> frozenset:
    """The axes along which x differs; empty outside `jax.shard_map`."""
    aval = jax.typeof(x)
    axes = getattr(aval, "manual_axis_type", None)  # called vma before
    return axes.varying if axes is not None else getattr(aval, "vma", frozenset())


def alike(*arrays: Any) -> tuple[Any, ...]:
    """The arrays (or None), all differing where any of them does, as scans ask of a carry.

    The derivative sums over the devices what comes back to an array that was the same on all.
    """
    axes = frozenset().union(*(varying(x) for x in arrays if x is not None))

    def cast(x):
        missing = None if x is None else axes - varying(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return tuple(map(cast, arrays))


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """How the type of x says that it is split; None where types do not say it."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def zeros_like(x: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros that are split as x is, of which `jnp.zeros_like` is not sure for a constant of jit."""
    return jax.lax.full_like(x, 0, dtype, sharding=explicit_sharding(x))
