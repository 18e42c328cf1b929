"""SET-Adam against its definition (arXiv 2302.01029) in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdia_jax.optim import scale_by_set_adam, set_adam

pytestmark = pytest.mark.full


def reference_updates(gradients, lr=1e-4, b1=0.9, b2=0.999, eps=1e-18, tau=0.5):
    """The update of every step, for one layer."""
    m = v = 0.0
    updates = []
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        v_tilde = v * np.sum(v) ** 2 / (v.size * np.sum(v**2))
        w = np.sqrt(v_tilde / (1 - b2**t) + eps)
        updates.append(-lr * m / ((1 - b1**t) * (w - tau * np.min(w))))
    return updates


def run(tx, params, gradients):
    """The updates of every step, jitted."""
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for g in gradients:
        u, state = update(g, state, params)
        updates.append(u)
    return updates


def gradients_of(shape, steps=5, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    uneven = np.exp(rng.normal(size=shape))
    return (scale * uneven * rng.normal(size=(steps, *shape))).astype(np.float32)


@pytest.mark.claim("SET-Adam is its definition")
@pytest.mark.parametrize(
    "shape, options",
    [
        ((7, 5), {}),
        ((3,), {"b1": 0.8, "b2": 0.95, "tau": 0.9}),
        ((1,), {"tau": 0.0, "eps": 1e-8}),
        ((), {}),
    ],
)
def test_it_is_the_definition(shape, options):
    gradients = gradients_of(shape)
    updates = run(set_adam(1e-4, **options), jnp.zeros(shape), gradients)
    for actual, expected in zip(updates, reference_updates(gradients, **options), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.control("SET-Adam is its definition")
def test_it_is_not_adam():
    gradients = gradients_of((7, 5))
    ours, adam = (run(tx(1e-4), jnp.zeros((7, 5)), gradients)[-1] for tx in (set_adam, optax.adam))
    assert np.max(np.abs(ours / adam - 1)) > 0.1


def test_stacked_blocks_are_layers_of_their_own():
    gradients = gradients_of((4, 3, 5)) * np.array([1e-3, 1.0, 10.0, 0.1])[:, None, None]
    gradients = gradients.astype(np.float32)
    stacked = run(set_adam(1e-2, stacked=True), jnp.zeros((4, 3, 5)), gradients)
    whole = run(set_adam(1e-2), jnp.zeros((4, 3, 5)), gradients)
    for k in range(4):
        alone = run(set_adam(1e-2), jnp.zeros((3, 5)), gradients[:, k])
        np.testing.assert_allclose([u[k] for u in stacked], alone, rtol=1e-6)
    assert np.max(np.abs(stacked[-1] / whole[-1] - 1)) > 0.1


def test_stacked_may_be_given_per_leaf_or_as_a_prefix():
    params = {"blocks": {"w": jnp.zeros((4, 3)), "b": jnp.zeros((4, 2))}, "head": jnp.zeros(3)}
    gradients = [
        jax.tree.map(lambda p, t=t: jnp.cos(jnp.arange(p.size) + t).reshape(p.shape), params)
        for t in range(3)
    ]
    prefix = run(set_adam(1e-2, stacked={"blocks": True, "head": False}), params, gradients)
    leaves = {"blocks": {"w": True, "b": True}, "head": False}
    per_leaf = run(set_adam(1e-2, stacked=leaves), params, gradients)
    none = run(set_adam(1e-2), params, gradients)
    for a, b in zip(jax.tree.leaves(prefix), jax.tree.leaves(per_leaf), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(prefix[-1]["head"], none[-1]["head"])
    assert np.any(prefix[-1]["blocks"]["w"] != none[-1]["blocks"]["w"])


def test_a_leaf_or_a_block_without_gradient_stays_where_it_is():
    none = run(set_adam(1e-2), jnp.zeros((4, 3)), np.zeros((3, 4, 3)))
    np.testing.assert_array_equal(none, np.zeros((3, 4, 3)))
    gradients = gradients_of((4, 3))
    gradients[:, 2] = 0
    updates = np.stack(run(set_adam(1e-2, stacked=True), jnp.zeros((4, 3)), gradients))
    assert np.all(np.isfinite(updates)) and not updates[:, 2].any() and updates[:, 1].all()


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e18])
def test_tiny_and_huge_gradients_give_finite_updates(scale):
    gradients = gradients_of((7, 5), scale=scale)
    updates = np.stack(run(set_adam(1e-2), jnp.zeros((7, 5)), gradients))
    assert np.all(np.isfinite(updates)) and np.max(np.abs(updates)) < 1
    if scale >= 1e-10 and scale <= 1e10:
        np.testing.assert_allclose(updates, reference_updates(gradients, lr=1e-2), rtol=1e-4)


def test_with_a_schedule_and_clipping():
    gradients = gradients_of((7, 5))
    schedule = optax.linear_schedule(1e-2, 0.0, 5)
    tx = optax.chain(optax.clip_by_global_norm(1.0), set_adam(schedule))
    clipped = [g / max(1.0, np.linalg.norm(g)) for g in gradients]
    assert np.linalg.norm(gradients[0]) > 1
    expected = reference_updates(clipped, lr=1.0)
    for t, (actual, e) in enumerate(
        zip(run(tx, jnp.zeros((7, 5)), gradients), expected, strict=True)
    ):
        np.testing.assert_allclose(actual, e * 1e-2 * (1 - t / 5), rtol=1e-4, atol=1e-9)


def test_it_minimizes():
    target = jnp.array([3.0, -1.0, 0.5])
    tx, params = set_adam(0.1), jnp.zeros(3)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state):
        updates, state = tx.update(params - target, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = train_step(params, state)
    np.testing.assert_allclose(params, target, atol=0.05)


def test_the_state_is_float32_and_counts_steps():
    tx = scale_by_set_adam()
    state = tx.init(jnp.zeros(3, jnp.bfloat16))
    updates, state = tx.update(jnp.ones(3, jnp.bfloat16), state)
    assert state.mu.dtype == state.nu.dtype == jnp.float32
    assert int(state.count) == 1 and np.all(np.isfinite(np.asarray(updates, np.float32)))


@pytest.mark.parametrize("name, value", [("tau", 1.0), ("b1", -0.1), ("b2", 1.0)])
def test_a_hyperparameter_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected 0 <= {name} < 1"):
        set_adam(1e-3, **{name: value})
