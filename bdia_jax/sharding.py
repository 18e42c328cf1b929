"""Many devices: which axis of states, side bits and parameters is split over which mesh axis.

Nothing in the recurrence knows of devices. Given x0 and parameters in these shardings, XLA splits
the scans alike: states, side bits and cotangents stay where they are, and all that moves is what
moves for a standard transformer under per-block checkpointing (benchmarks/communication.py).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdia_jax._stack import Stack, stacked_params

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both; fsdp splits the parameters too

# path of a parameter -> its axis over "tensor" and over "fsdp", counted from the end
_COLUMNS = r"\.(query|key|value|hidden|gate|up)"
_RULES: tuple[tuple[str, int | None, int | None], ...] = (
    (rf"{_COLUMNS}\.kernel$", -1, -2),
    (rf"{_COLUMNS}\.(bias|lora_b)$", -1, None),
    (r"\.out\.kernel$", -2, -1),
    (r"\.out\.lora_a$", -2, None),
    # width, not the classes, which the loss cuts into chunks: each would gather the whole table
    (r"(^|\.)head\.kernel$", None, -2),
    (r"(^|\.)(head|\w*(embedding|positions))$", None, -1),
)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of data * fsdp * tensor * sequence devices, with axes of these names.

    Args:
        data: parts of the batch; parameters are whole on each.
        fsdp: further parts of the batch; of parameters, gradients and optimizer state too.
        tensor: parts of heads and hidden features, as of Megatron.
        sequence: parts of the tokens of states and side bits.
        devices: the first so many of `jax.devices()` by default.

    Raises:
        ValueError: a size below 1, or more devices than there are.

    Example:
        >>> dict(make_mesh(data=1, devices=jax.devices()).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}
    """
    sizes = (data, fsdp, tensor, sequence)
    named = ", ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
    if min(sizes) < 1:
        raise ValueError(f"the mesh has {named}; every size must be at least 1")
    devices = jax.devices() if devices is None else devices
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(
            f"the mesh has {named}: {count} devices, but there are {len(devices)}; make it smaller "
            "(on CPUs, XLA_FLAGS=--xla_force_host_platform_device_count makes more)"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=list(devices)[:count])


def shard(model: nnx.Module, mesh: Mesh) -> None:
    """Splits the parameters of a model, and whatever its stacks will be called with, in place.

    Args:
        model: with arrays. One too large for a device is made abstract (`nnx.eval_shape`), and its
            parameters then under `jax.jit(..., out_shardings=nnx.as_pure(param_shardings(...)))`.
        mesh: of `make_mesh`.

    Example:
        >>> from bdia_jax.nnx import BDIAStack
        >>> stack = BDIAStack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 3, rngs=nnx.Rngs(0))
        >>> shard(stack, make_mesh(fsdp=1))
        >>> stack.blocks.kernel.sharding.spec
        P(None, None, None)
    """
    set_mesh(model, mesh)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.device_put(params, nnx.as_pure(param_shardings(model, mesh))))


def set_mesh(model: nnx.Module, mesh: Mesh | None) -> None:
    """Tells every stack of a model, which may be abstract, how to split what it is called with.

    Where tokens are split, attentions that would choose it leave cuDNN's, which cannot do that.
    """
    splits_tokens = mesh is not None and mesh.shape["sequence"] > 1
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Stack):
            module.mesh = mesh
        if splits_tokens and getattr(module, "implementation", "") is None:
            module.implementation = "xla"  # pyright: ignore[reportAttributeAccessIssue]


def state_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """How x [B, T, ..., D] is split: B over data and fsdp, T over sequence.

    So are the stack's integer states, cotangents and packed side bits [K, B, bits, T, ..., D / 8].
    A batch that data * fsdp does not divide (the last of an evaluation) is whole on every device.

    Raises:
        ValueError: sequence does not divide T, or there are no tokens.
    """
    (batch, *_), parts = (*batch_sharding(mesh, shape[0]).spec, None), mesh.shape["sequence"]
    if parts == 1:
        return NamedSharding(mesh, PartitionSpec(batch))
    if len(shape) < 3 or shape[1] % parts:
        raise ValueError(
            f"x has shape {tuple(shape)}, but the mesh splits axis 1 of [B, T, ..., D] into "
            f"{parts} parts; take a length that {parts} divides, or sequence=1"
        )
    return NamedSharding(mesh, PartitionSpec(batch, "sequence"))


def constrain(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x in its `state_sharding`; as it is without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, state_sharding(mesh, x.shape))


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Leading axis over data and fsdp; whole on every device if they do not divide it."""
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    return NamedSharding(mesh, PartitionSpec() if batch_size % parts else PartitionSpec(BATCH_AXES))


def param_shardings(model: nnx.Module, mesh: Mesh) -> nnx.State:
    """How the parameters of a model are split: a State of `NamedSharding`s.

    A matrix is split over fsdp along one of its axes, never along the one that counts blocks. Over
    tensor, the projections called query, key, value, hidden, gate and up are split by what they
    return, those called out by what they take, so that a device computes whole heads. Vectors, and
    what the mesh does not divide, are whole on each device. Split the optimizer's state alike
    (`optax.tree_map_params`).

    Args:
        model: may be abstract (`nnx.eval_shape`).
        mesh: of `make_mesh`.

    Returns:
        A State like `nnx.state(model, nnx.Param)`.
    """
    stacked = dict(nnx.to_flat_state(stacked_params(model)))

    def sharding(path, variable):
        spec = _spec(
            ".".join(map(str, path)), variable.shape, bool(stacked[path].get_value()), mesh
        )
        return variable.replace(NamedSharding(mesh, spec))

    return nnx.map_state(sharding, nnx.state(model, nnx.Param))


def _spec(path: str, shape: Sequence[int], is_stacked: bool, mesh: Mesh) -> PartitionSpec:
    own = range(-len(shape) + is_stacked, 0)  # axes of one block, from the end
    rules = [axes for pattern, *axes in _RULES if re.search(pattern, path)]
    if rules:
        over_tensor, over_fsdp = rules[0]
    else:  # a matrix of the user's: its largest axis
        divided = [axis for axis in own if shape[axis] % mesh.shape["fsdp"] == 0]
        over_tensor = None
        over_fsdp = max(divided, key=lambda axis: shape[axis], default=None)
        over_fsdp = over_fsdp if len(own) > 1 else None
    spec: list[str | None] = [None] * len(shape)
    for axis, name in ((over_tensor, "tensor"), (over_fsdp, "fsdp")):
        parts = mesh.shape[name]
        if axis is not None and axis in own and parts > 1 and shape[axis] % parts == 0:
            spec[axis] = name
    return PartitionSpec(*spec)
