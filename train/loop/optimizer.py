"""The learning-rate schedule and the optimizer of a config."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdia_jax.optim import scale_by_set_adam
from train.config import Config


def make_schedule(config: Config) -> optax.Schedule:
    """Linear warmup, then constant, or linear or cosine to zero."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.num_steps)
    rest = optax.constant_schedule(peak)
    if config.schedule == "linear":
        rest = optax.linear_schedule(peak, 0.0, config.num_steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


def make_optimizer(config: Config, stacked: Any) -> optax.GradientTransformation:
    """Clipping, then SET-Adam (the paper's) or Adam, decay of matrices, and learning rate.

    Args:
        stacked: of `bdia_jax.nnx.stacked_params`, as a pytree. A vector, that is a bias or the
            scale of a norm, does not decay, be it stacked or not.
    """
    moments = scale_by_set_adam(b2=config.b2, stacked=stacked)
    if config.optimizer == "adamw":
        moments = optax.scale_by_adam(b2=config.b2)
    clip = optax.identity()
    if config.grad_clip_norm:
        clip = _clip_by_global_norm(config.grad_clip_norm)

    def is_matrix(params):
        return jax.tree.map(lambda p, stack: p.ndim - bool(stack) >= 2, params, stacked)

    return optax.chain(
        clip,
        moments,
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(make_schedule(config)),
    )


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one product with a number.

    optax divides by the norm. XLA computes a quotient once, for both moments, and so keeps a second
    copy of all gradients; a product it computes where it is used.
    """

    def clip(updates, params=None):
        del params
        scale = max_norm / jnp.maximum(optax.global_norm(updates), max_norm)
        return jax.tree.map(lambda g: g * scale, updates)

    return optax.stateless(clip)
