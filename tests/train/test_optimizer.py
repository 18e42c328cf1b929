"""The learning-rate schedule and the optimizer of a config, against their definitions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_runs import tiny

from bdia_jax.optim import set_adam
from train.loop.optimizer import make_optimizer, make_schedule

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = tiny("", num_steps=20, learning_rate=0.02, b2=0.95, warmup_steps=0, schedule="constant")
CONFIG = replace(CONFIG, optimizer="adamw", weight_decay=0.0, grad_clip_norm=0.0)
# what a model with a stack of four blocks has
SHAPES = {"embedding": (5, 3), "kernel": (4, 3, 3), "bias": (4, 3), "scale": (3,)}
STACKED = {"embedding": False, "kernel": True, "bias": True, "scale": False}
MATRICES = {"embedding": True, "kernel": True, "bias": False, "scale": False}


def draw(seed, scale=1.0):
    normal = np.random.default_rng(seed).normal
    return {name: (scale * normal(size=shape)).astype("f4") for name, shape in SHAPES.items()}


GRADIENTS = [draw(1, 3.0), draw(2, 0.01), draw(3, 1.0)]  # norms of about 25, 0.08 and 8


def run(tx, gradients=GRADIENTS):
    """The parameters' change of every step; the parameters stay draw(0)."""
    params = draw(0)
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        change, state = update(gradient, state, params)
        updates.append(change)
    return updates


def run_config(gradients=GRADIENTS, **changes):
    return run(make_optimizer(replace(CONFIG, **changes), STACKED), gradients)


def assert_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("warmup_steps", [0, 5])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedule_warms_up_then_stays_or_falls_to_zero(schedule, warmup_steps):
    steps = np.arange(21)
    fraction = np.clip((steps - warmup_steps) / (20 - warmup_steps), 0, 1)
    expected = 0.02 * (
        (1 + np.cos(np.pi * fraction)) / 2 if schedule == "cosine" else 1 + 0 * steps
    )
    expected[:warmup_steps] = 0.02 * steps[:warmup_steps] / max(1, warmup_steps)
    actual = make_schedule(replace(CONFIG, schedule=schedule, warmup_steps=warmup_steps))(steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-8)


def test_the_optimizer_follows_the_schedule():
    gradients = [draw(1)] * 4
    changes = zip(run_config(gradients), run_config(gradients, warmup_steps=10), strict=True)
    for step, (steady, change) in enumerate(changes):
        assert_close(change, jax.tree.map(lambda leaf, step=step: leaf * step / 10, steady))


@pytest.mark.parametrize("optimizer", ["set_adam", "adamw"])
def test_decay_is_of_matrices_alone_stacked_or_not(optimizer):
    nothing = jax.tree.map(np.zeros_like, draw(0))
    (change,) = run_config([nothing], optimizer=optimizer, weight_decay=0.1)
    for name, decays in MATRICES.items():
        np.testing.assert_allclose(change[name], -0.02 * 0.1 * draw(0)[name] * decays, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_is_that_of_optax_on_clipped_gradients(clip_norm):
    def expected(norm):
        adamw = optax.adamw(0.02, b2=0.95, weight_decay=0.1, mask=MATRICES)
        return run(optax.chain(optax.clip_by_global_norm(norm), adamw))

    actual = run_config(weight_decay=0.1, grad_clip_norm=clip_norm)
    assert_close(actual, expected(clip_norm or jnp.inf))
    with pytest.raises(AssertionError):  # clipping matters here
        assert_close(actual, expected(jnp.inf if clip_norm else 1.0))


def test_set_adam_takes_b2_and_each_block_as_a_layer():
    actual = run_config(optimizer="set_adam")
    assert_close(actual, run(set_adam(0.02, b2=0.95, stacked=STACKED)))
    others = [run(set_adam(0.02, b2=0.999, stacked=STACKED)), run(set_adam(0.02, b2=0.95))]
    for other in (*others, run_config()):
        with pytest.raises(AssertionError):
            assert_close(actual, other)
