"""SET-Adam, the optimizer of the paper's ViT experiments, as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SetAdamState(NamedTuple):
    """count: steps taken; mu, nu: first and second moments, shaped like the parameters."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any


def set_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-18,
    tau: float = 0.5,
    stacked: Any = False,
) -> optax.GradientTransformation:
    """SET-Adam (arXiv 2302.01029): Adam with the range of its step sizes suppressed.

    -learning_rate times `scale_by_set_adam`; the defaults are those of the paper's
    ViT runs, with learning_rate 1e-4.

    Example:
        >>> tx = set_adam(1e-2)
        >>> params = {"w": jnp.array([1.0, -2.0])}
        >>> updates, _ = tx.update({"w": jnp.array([3.0, 0.5])}, tx.init(params))
        >>> bool(jnp.all(jnp.sign(updates["w"]) == -1))
        True
    """
    return optax.chain(
        scale_by_set_adam(b1, b2, eps, tau, stacked), optax.scale_by_learning_rate(learning_rate)
    )


def scale_by_set_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-18,
    tau: float = 0.5,
    stacked: Any = False,
) -> optax.GradientTransformation:
    """m / ((1 - b1^t) w~), with w~ made from Adam's second moment v layer by layer.

        v~ = v (sum v)^2 / (d sum v^2)        scaled down, the more so the less even v is
        w  = sqrt(v~ / (1 - b2^t) + eps)      embedded epsilon
        w~ = w - tau min(w)                   translated down

    with sums and minimum over the d elements of a layer.

    Args:
        b1, b2: decay of the first and second moment.
        eps: added inside the root; the only floor under the denominator.
        tau: share of the smallest denominator taken off, 0 <= tau < 1.
        stacked: pytree prefix over the parameters: True, or a name, where the leading axis counts
            layers, else False or "" (`bdia_jax.nnx.stacked_params` makes it). Those are treated
            slice by slice: a stack of K blocks is K layers.

    Returns:
        An optax transformation whose state has one mu and one nu per parameter, float32.

    Raises:
        ValueError: tau outside [0, 1), or b1, b2 outside [0, 1).
    """
    for name, value in (("b1", b1), ("b2", b2), ("tau", tau)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, expected 0 <= {name} < 1")

    def init(params):
        def zeros(p):
            return jnp.zeros(p.shape, jnp.float32)

        return SetAdamState(
            jnp.zeros([], jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params)
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        debias1, debias2 = (1 - jnp.power(b, jnp.float32(count)) for b in (b1, b2))

        def direction(m, v, is_stacked):
            axes = tuple(range(1 if is_stacked else 0, v.ndim))
            evenness = _evenness(v, axes)

            def denominator(v):
                return jnp.sqrt(v * evenness / debias2 + eps)

            # it grows with v: the smallest w is that of the smallest v, and w need not be kept
            smallest = denominator(jnp.min(v, axis=axes, keepdims=True))
            return m / debias1 / (denominator(v) - tau * smallest)

        flags = jax.tree.broadcast(stacked, updates)
        return jax.tree.map(direction, mu, nu, flags), SetAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _evenness(v, axes):
    """(sum v)^2 / (d sum v^2) in (0, 1]; 1 for a layer of zeros. Safe from underflow of v^2."""
    top = jnp.max(v, axis=axes, keepdims=True)
    is_zero, top = top == 0, jnp.where(top > 0, top, 1.0)
    # two expressions, since XLA would compute and keep one they share
    mean = jnp.mean(v, axis=axes, keepdims=True) / top
    square = jnp.mean(jnp.square(v / top), axis=axes, keepdims=True)
    return jnp.where(is_zero, 1.0, mean**2 / jnp.where(is_zero, 1.0, square))
