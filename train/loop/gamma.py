"""|gamma| of the stacks from step to step: `config.gamma`, then as `config.gamma_changes` says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.interop import CHECKPOINT_GAMMA
from bdia_jax.nnx import BDIAStack
from train.config import Config

MOST_AT_START = 0.1  # nats that |gamma| may add to the loss of a checkpoint, before it is told


def gamma_at(config: Config, step: Any) -> jax.Array:
    """float32 []: |gamma| of a step. One program for all: step may be traced."""
    gamma = jnp.float32(config.gamma)
    for first, changed in config.gamma_changes:
        gamma = jnp.where(step >= first, jnp.float32(changed), gamma)
    return gamma


def loss_at_start(loss: Callable[[float], Any], gamma: float) -> tuple[dict[str, Any], str]:
    """What |gamma| does to a checkpoint that never saw one: for the log, and in words.

    Args:
        loss: |gamma| -> of the first batch, a number or one a seed.
        gamma: of the run.
    """
    losses = {each: float(np.mean(jax.device_get(loss(each)))) for each in (0.0, gamma)}
    cost = losses[gamma] - losses[0.0]
    said = f"loss of the first batch: {losses[0.0]:.4f} at gamma 0, {losses[gamma]:.4f} at {gamma}"
    if not cost <= MOST_AT_START:  # or NaN
        said += (
            f"; the checkpoint loses by so large a gamma. --config.gamma={CHECKPOINT_GAMMA} leaves "
            "it whole, and 0 with --config.quantize=False --config.backprop=remat is plain"
        )
    return {"loss_at_gamma": {str(each): value for each, value in losses.items()}}, said


def stacks_of(model: Any) -> dict[Any, Any]:
    """Path -> `BDIAStack`."""
    found = nnx.iter_modules(model)
    return {path: module for path, module in found if isinstance(module, BDIAStack)}


def set_gamma(model: Any, gamma: Any) -> None:
    """In every stack of the model."""
    for stack in stacks_of(model).values():
        stack.magnitude = gamma
