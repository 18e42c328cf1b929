"""Whole groups of examples: totals, a training step on each group, several seeds.

The model is linear and a batch is a whole group, so NumPy says what every number must be.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import vit_digits
from train.devices.totals import group_totals
from train.loop.program import make_program
from train.tasks import open_config
from train.tasks.task import Task

pytestmark = pytest.mark.usefixtures("quick_compile")
VALUES = vit_digits.get_config("smoke")
VALUES.update(optimizer="adamw", schedule="constant", warmup_steps=0, grad_clip_norm=0.0)
VALUES.update(batch_size=8, num_seeds=2, seed=5)
CONFIG = open_config(VALUES)
SHIFT = 3.0  # what `prepare` adds to y


class Linear(nnx.Module):
    """The sum over x [B, T, 3] @ w, in B numbers; counts its calls, at inference too."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3,)))
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros([], jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return jnp.sum(x @ self.w[...], axis=-1)


def make_group(size, length, seed):
    draw = np.random.default_rng(seed).normal
    weight = np.exp(draw(size=size))
    group = {"x": draw(size=(size, length, 3)), "y": draw(size=size), "weight": weight}
    return {name: array.astype(np.float32) for name, array in group.items()}


GROUPS = (make_group(7, 2, 0), make_group(5, 1, 1), make_group(8, 3, 2))


def metrics(model, batch, rngs):
    del rngs
    error = model(batch["x"]) - batch["y"]
    return {
        "loss": (error**2 * batch["weight"], batch["weight"]),
        "error": (error, jnp.ones_like(error)),
        "training": (jnp.full_like(error, not model.dropout.deterministic), jnp.ones_like(error)),
    }


def errors(w, group):
    """[N], in float64."""
    return np.sum(group["x"] @ np.asarray(w, np.float64), axis=-1) - group["y"]


def mean_loss(w, groups):
    total = sum(np.sum(errors(w, group) ** 2 * group["weight"]) for group in groups)
    return total / sum(np.sum(group["weight"]) for group in groups)


# --- group_totals --------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 7, 50])  # 7 examples: incomplete, one, too few
def test_totals_count_every_example_once(batch_size):
    group, model = GROUPS[0], Linear(nnx.Rngs(0))
    model.eval()
    totals = group_totals(model, metrics, jax.tree.map(jnp.asarray, group), batch_size)
    error, weight = errors(model.w[...], group), group["weight"]
    expected = {
        "loss": (np.sum(error**2 * weight), np.sum(weight)),
        "error": (np.sum(error), 7),
        "training": (0, 7),
    }
    assert totals.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(totals[name], expected[name], rtol=1e-5)
    assert int(model.calls[...]) == 0  # what the batches wrote is gone


# --- Program -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_seeds(quick_compile):
    groups = tuple(jax.tree.map(jnp.asarray, group) for group in GROUPS)

    def prepare(key, batch):
        del key
        return batch | {"y": batch["y"] + SHIFT}

    task = Task(groups, groups, Linear, metrics, prepare=prepare)
    return make_program(CONFIG, task), groups


def direct_gradient(w, group):
    """Of the loss of a whole group, as `prepare` has left it."""
    weight, inputs = group["weight"], np.sum(group["x"], axis=1)
    return 2 * (weight * (errors(w, group) - SHIFT)) @ inputs / np.sum(weight)


def test_an_epoch_trains_every_group_by_its_own_gradient(two_seeds):
    program, groups = two_seeds
    assert program.steps_per_epoch == 3
    trained = []
    for step in range(3):  # each from the first parameters
        state = program.init()
        before = np.asarray(state["params"]["w"])
        state = state | {"step": jnp.asarray(step, jnp.int32)}
        after, logged = program.train_steps(state, groups, jnp.asarray(1, jnp.int32))
        moment = np.asarray(optax.tree.get(after["opt_state"], "mu")["w"])
        gradients = moment / (1 - 0.9)  # of a first step of Adam
        expected = np.array([[direct_gradient(w, group) for w in before] for group in GROUPS])
        off = np.abs(gradients - expected).max(axis=(1, 2))  # [groups], both seeds
        trained.append(int(np.argmin(off)))
        np.testing.assert_allclose(gradients, expected[trained[-1]], rtol=1e-4)
        norms = np.linalg.norm(expected[trained[-1]], axis=-1)
        np.testing.assert_allclose(logged["grad_norm"], norms, rtol=1e-4)
        assert int(after["step"]) == step + 1
        np.testing.assert_array_equal(logged["training"], [1, 1])
        np.testing.assert_array_equal(after["stats"]["calls"], [1, 1])
        # Adam's first step is of one learning rate, against the gradient
        moved = (np.asarray(after["params"]["w"]) - before) / CONFIG.learning_rate
        np.testing.assert_allclose(moved, -np.sign(gradients), atol=1e-2)
    assert sorted(trained) == [0, 1, 2]


def test_evaluation_is_the_mean_over_all_groups_without_preparation(two_seeds):
    program, groups = two_seeds
    state = program.init()
    values = program.evaluate(state, groups)
    expected = [mean_loss(w, GROUPS) for w in np.asarray(state["params"]["w"])]
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    np.testing.assert_array_equal(values["training"], [0, 0])
    means_of_means = np.mean([[mean_loss(w, [g]) for g in GROUPS] for w in state["params"]["w"]], 1)
    assert np.all(np.abs(means_of_means / expected - 1) > 1e-2)  # the two can be told apart


def test_state_and_models_have_the_seeds_in_order_and_one_has_no_axis(two_seeds):
    program, groups = two_seeds
    state = program.init()
    assert state["step"].shape == () and state["step"].dtype == jnp.int32
    np.testing.assert_array_equal(state["seed"], [5, 6])
    for name in ("params", "stats", "opt_state"):
        assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state[name])), name
    w = np.asarray(state["params"]["w"])
    assert np.all(w[0] != w[1])
    state["stats"]["calls"] = jnp.array([3, 4], jnp.int32)
    models = program.models(state)
    assert len(models) == 2
    for model, own, calls in zip(models, w, (3, 4), strict=True):
        np.testing.assert_array_equal(model.w[...], own)
        assert int(model.calls[...]) == calls
        assert model.dropout.deterministic
    alone = make_program(
        replace(CONFIG, seed=6, num_seeds=1), Task(groups, groups, Linear, metrics)
    )
    second = alone.init()
    assert second["seed"].shape == () and int(second["seed"]) == 6
    (model,) = alone.models(second)
    for own in (second["params"]["w"], model.w[...]):
        np.testing.assert_array_equal(own, w[1])
