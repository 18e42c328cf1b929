"""|gamma| of the stacks from step to step: `config.gamma`, then as `config.gamma_changes` says."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.nnx import BDIAStack
from train.config import Config


def gamma_at(config: Config, step: Any) -> jax.Array:
    """float32 []: |gamma| of a step. One program for all: step may be traced."""
    gamma = jnp.float32(config.gamma)
    for first, changed in config.gamma_changes:
        gamma = jnp.where(step >= first, jnp.float32(changed), gamma)
    return gamma


def stacks_of(model: Any) -> dict[Any, Any]:
    """Path -> `BDIAStack`."""
    found = nnx.iter_modules(model)
    return {path: module for path, module in found if isinstance(module, BDIAStack)}


def set_gamma(model: Any, gamma: Any) -> None:
    """In every stack of the model."""
    for stack in stacks_of(model).values():
        stack.magnitude = gamma
