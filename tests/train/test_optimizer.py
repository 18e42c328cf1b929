"""The learning-rate schedule and the optimizer of a config, against NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax.optim import set_adam
from configs import vit_digits
from train.loop.optimizer import make_optimizer, make_schedule
from train.tasks import open_config

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = replace(
    open_config(vit_digits.get_config("smoke")),
    **{"num_steps": 20, "learning_rate": 0.02, "b2": 0.95},
    **{"warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0, "grad_clip_norm": 0.0},
)
# what a model with a stack of four blocks has
SHAPES = {"embedding": (5, 3), "kernel": (4, 3, 3), "bias": (4, 3), "scale": (3,)}
STACKED = {"embedding": False, "kernel": True, "bias": True, "scale": False}


def draw(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return {
        name: (scale * generator.normal(size=shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


GRADIENTS = [draw(1, 3.0), draw(2, 0.01), draw(3, 1.0)]  # norms of about 25, 0.08 and 8


def run(tx, gradients=GRADIENTS):
    """The parameters' change of every step; the parameters stay draw(0)."""
    params = draw(0)
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        change, state = update(gradient, state, params)
        updates.append(change)
    return updates


def clipped(gradients, norm):
    """Each as it is, or scaled to `norm` if all its leaves together are longer."""
    for gradient in gradients:
        length = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in gradient.values()))
        factor = min(1.0, norm / length)
        yield {name: np.float64(leaf) * factor for name, leaf in gradient.items()}


def reference_adamw(config, gradients):
    """The updates of AdamW in float64, decay on what a block or the model has as a matrix."""
    m, v, updates = dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0), []
    decay = {"embedding": config.weight_decay, "kernel": config.weight_decay, "bias": 0, "scale": 0}
    for t, gradient in enumerate(gradients, start=1):
        change = {}
        for name, g in gradient.items():
            m[name] = 0.9 * m[name] + 0.1 * np.float64(g)
            v[name] = config.b2 * v[name] + (1 - config.b2) * np.float64(g) ** 2
            adam = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - config.b2**t)) + 1e-8)
            change[name] = -config.learning_rate * (adam + decay[name] * draw(0)[name])
        updates.append(change)
    return updates


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(a[name], e[name], rtol=1e-3, atol=1e-7, err_msg=name)


# --- schedule ------------------------------------------------------------------------


def reference_schedule(config, step):
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    return peak * (1 + np.cos(np.pi * (step - warmup) / (config.num_steps - warmup))) / 2


@pytest.mark.parametrize("warmup_steps", [0, 5])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedule_warms_up_then_stays_or_falls_to_zero(schedule, warmup_steps):
    config = replace(CONFIG, schedule=schedule, warmup_steps=warmup_steps)
    expected = [reference_schedule(config, step) for step in range(21)]
    actual = make_schedule(config)(jnp.arange(21))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-8)
    assert np.argmax(actual) == warmup_steps
    np.testing.assert_allclose(actual[20], 0.02 if schedule == "constant" else 0.0, atol=1e-8)


def test_the_optimizer_follows_the_schedule():
    config = replace(CONFIG, warmup_steps=10, optimizer="adamw")
    gradients = [draw(1)] * 4
    steady = run(make_optimizer(replace(config, warmup_steps=0), STACKED), gradients)
    for step, change in enumerate(run(make_optimizer(config, STACKED), gradients)):
        expected = {name: leaf * (step / 10) for name, leaf in steady[step].items()}
        assert_close([change], [expected])


# --- optimizer -----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["set_adam", "adamw"])
def test_decay_is_of_matrices_alone_stacked_or_not(optimizer):
    config = replace(CONFIG, optimizer=optimizer, weight_decay=0.1)
    nothing = jax.tree.map(np.zeros_like, draw(0))
    (change,) = run(make_optimizer(config, STACKED), [nothing])
    for name in ("embedding", "kernel"):
        np.testing.assert_allclose(change[name], -0.02 * 0.1 * draw(0)[name], rtol=1e-5)
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(change[name], 0.0)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_is_its_definition_on_clipped_gradients(clip_norm):
    config = replace(CONFIG, optimizer="adamw", weight_decay=0.1, grad_clip_norm=clip_norm)
    actual = run(make_optimizer(config, STACKED))
    assert_close(actual, reference_adamw(config, clipped(GRADIENTS, clip_norm or np.inf)))
    other = reference_adamw(config, clipped(GRADIENTS, np.inf if clip_norm else 1.0))
    with pytest.raises(AssertionError):  # clipping matters here
        assert_close(actual, other)


def test_set_adam_takes_b2_and_each_block_as_a_layer():
    actual = run(make_optimizer(CONFIG, STACKED))
    assert_close(actual, run(set_adam(0.02, b2=0.95, stacked=STACKED)))
    for other in ({"b2": 0.999, "stacked": STACKED}, {"b2": 0.95, "stacked": False}):
        with pytest.raises(AssertionError):
            assert_close(actual, run(set_adam(0.02, **other)))
    with pytest.raises(AssertionError):
        assert_close(actual, run(make_optimizer(replace(CONFIG, optimizer="adamw"), STACKED)))
