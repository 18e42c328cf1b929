"""The memory of a run by arithmetic: what grows with depth, and with it a plan of any depth.

A compiler's plan says how much is needed, not for what. These are the parts that a formula has:
every parameter with its moments and its gradient, and what the forward pass keeps of each block
(BDIA's side bits, the states of `jax.checkpoint`). The rest is the same at any depth: the last two
states with their cotangents, one block at work, embeddings and loss. So a shallow model, compiled,
tells the memory of deep ones (`at_depth`), and compiled deep ones tell whether that is so
(benchmarks/plan.py).
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from bdia_jax import residual_bytes
from bdia_jax.nnx import Stack
from bdia_jax.sharding import AXES
from train.config import Config, MeshConfig
from train.devices.mesh import check_shares
from train.devices.shards import abstract
from train.loop.state import Training
from train.tasks.task import Task


class Parts(NamedTuple):
    """Bytes on one device.

    parameters: trained and frozen ones, batch statistics.
    optimizer: its state.
    batch: the examples of a step.
    gradients: of all trained parameters, at once.
    kept: by all blocks from the forward pass: side bits of "reversible", states of "remat", and
        the residuals of "store", before a compiler fuses some of them away.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    kept: int


def parts(config: Config, task: Task, device: Any = None) -> Parts:
    """Of a run. Nothing is compiled.

    Args:
        config: the run's.
        task: of `train.tasks.abstract_task`.
        device: whose attention "store" has residuals of; None for the default one.

    Raises:
        ValueError: a mesh with data=-1; a batch that its devices cannot share.
    """
    sizes = mesh_sizes(config.mesh)
    is_split = math.prod(sizes.values()) > 1
    types = (AxisType.Auto,) * len(sizes)
    mesh: Any = AbstractMesh(tuple(sizes.values()), AXES, axis_types=types) if is_split else None
    check_shares(config, mesh)
    state = Training(config, task.make_model, mesh).abstract_state
    return Parts(
        parameters=local_bytes([state.get(name, ()) for name in ("params", "frozen", "stats")]),
        optimizer=local_bytes(state["opt_state"]),
        batch=local_bytes(abstract(task.train_groups, task.train_sizes, mesh)),
        gradients=local_bytes(state["params"]),
        kept=_kept(config, task, device) * config.num_seeds // math.prod(sizes[n] for n in _SPLIT),
    )


def at_depth(shallow: int, of_shallow: Parts, of_deep: Parts) -> int:
    """Bytes a device needs for a deep model, from what it needs for a shallow one.

    Args:
        shallow: compiled, of a model that differs in its number of blocks alone.
        of_shallow, of_deep: their parts.
    """
    return shallow + sum(of_deep) - sum(of_shallow)


def mesh_sizes(config: MeshConfig) -> dict[str, int]:
    """Axis -> devices.

    Raises:
        ValueError: data=-1.
    """
    if config.data == -1:
        raise ValueError("mesh.data is -1, all other devices there are; say how many to plan for")
    return {name: getattr(config, name) for name in AXES}


def local_bytes(tree: Any) -> int:
    """Of the arrays of a tree, those of one device."""

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


_SPLIT = ("data", "fsdp", "sequence")  # axes that split states, and what is kept of them


def _kept(config: Config, task: Task, device: Any) -> int:
    """Bytes of one seed on all devices: what goes from a gradient's first half to its second for
    every block."""
    alone = MeshConfig(data=1, fsdp=1, tensor=1, sequence=1)
    training = Training(dataclasses.replace(config, num_seeds=1, mesh=alone), task.make_model)
    modules = nnx.iter_modules(training.abstract)
    depths = {module.depth for _, module in modules if isinstance(module, Stack)}

    def loss(state: Any, batch: Any, key: jax.Array) -> jax.Array:
        model = training.merge(state)
        model.train()
        prepare_key, model_key = jax.random.split(key)
        metrics = task.metrics(model, task.prepare(prepare_key, batch), nnx.Rngs(model_key))
        return jnp.sum(metrics["loss"][0])

    state = {name: leaf for name, leaf in training.abstract_state.items() if name != "opt_state"}
    (batch,) = abstract(task.train_groups[-1:], [config.batch_size], None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.default_device(device):
        found = residual_bytes(loss, state, batch, key)
    leading = {name: re.search(r"\[(\d+),", name) for name in found}
    return sum(size for name, size in found.items() if (n := leading[name]) and int(n[1]) in depths)
