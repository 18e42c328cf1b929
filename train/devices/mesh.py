"""The devices of a run: `config.mesh`, and what of the training state is split how over them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdia_jax.sharding import BATCH_AXES, make_mesh, param_shardings
from train.config import Config, MeshConfig


def open_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of all devices of all processes; None for one device alone.

    Args:
        config: its sizes.
        devices: others than `jax.devices()`, to compile for.

    Raises:
        ValueError: more devices than there are; with several processes, also fewer.
    """
    sizes = dataclasses.asdict(config)
    devices = jax.devices() if devices is None else devices
    if config.data == -1:
        others = config.fsdp * config.tensor * config.sequence
        sizes["data"] = len(devices) // others
        if len(devices) % others:
            raise ValueError(
                f"mesh.data is -1, but {others} (fsdp * tensor * sequence) does not divide the "
                f"{len(devices)} devices"
            )
    count = math.prod(sizes.values())
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f"the mesh has {count} devices, the {jax.process_count()} processes have "
            f"{len(devices)}; set --config.mesh.data=-1, or sizes whose product is {len(devices)}"
        )
    return None if count == 1 and jax.process_count() == 1 else make_mesh(**sizes, devices=devices)


def check_shares(config: Config, mesh: Mesh | None) -> None:
    """Raises ValueError unless every device has its share of each part of a batch, of one seed."""
    if mesh is None:
        return
    if config.num_seeds > 1:
        raise ValueError(
            f"num_seeds is {config.num_seeds} with a mesh of several devices; train one seed at a "
            "time there, or all of them on one device"
        )
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if config.batch_size // config.batch_chunks % parts:
        raise ValueError(
            f"batch_size {config.batch_size} in batch_chunks {config.batch_chunks} is "
            f"{config.batch_size // config.batch_chunks} examples at a time, which mesh.data * "
            f"mesh.fsdp = {parts} devices cannot share; take a multiple of {parts}"
        )


def state_shardings(state: Any, model: nnx.Module, tx: optax.GradientTransformation, mesh: Mesh):
    """The sharding of each leaf of a training state: parameters, moments like them, the rest whole.

    Args:
        state: abstract, as of `Training.init`.
        model: abstract, of which `state` has the parameters.
        tx: the optimizer.
        mesh: of `open_mesh`.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    of_model = nnx.to_pure_dict(param_shardings(model, mesh))
    shardings = jax.tree.map(lambda leaf: whole, state)
    for name in ("params", "frozen"):
        if name in state:
            shardings[name] = _like(state[name], of_model)
    shardings["opt_state"] = optax.tree_map_params(
        tx,
        lambda leaf, sharding: sharding,
        state["opt_state"],
        shardings["params"],
        transform_non_params=lambda leaf: whole,
    )
    return shardings


def _like(tree: Any, shardings: Any) -> Any:
    """The shardings of what is in the tree, which may be part of the model."""
    if not isinstance(tree, dict):
        return shardings
    return {key: _like(value, shardings[key]) for key, value in tree.items()}
