"""No gradient that depends on a wrongly rebuilt state is a number, and who failed is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from toy import bits, make_case, perturb, relative_error, tanh_block
from toy_models import drifting, drifting_stack

import bdia_jax.linen
from bdia_jax import FixedPoint, bdia_scan
from bdia_jax._verify import checksum, nan_unless, per_part, zero_or_nan
from bdia_jax.nnx import BDIAStack, RebuildFailures

DEPTH, SHAPE = 6, (4, 8, 16)
BOUND = FixedPoint().drift_bound * 2.0**-9 / 1.5  # of h, at gamma = 1/2
check = jax.jit(checksum, static_argnums=(1, 2))

# --- the checksum --------------------------------------------------------------------


def states(seed=0, shape=(5, 6, 7)):
    return np.random.default_rng(seed).integers(-(2**20), 2**20, size=shape).astype(np.int32)


@pytest.mark.claim("one wrong element is always seen")
@pytest.mark.parametrize("parts", [1, 3])
def test_any_single_wrong_element_changes_the_sum_of_its_part_and_no_other(parts):
    n, rng = states(), np.random.default_rng(1)
    before = np.asarray(check(n, 2, parts))
    assert before.shape == (5, parts) and before.dtype == np.uint32
    for _ in range(200):
        b, t, d = (rng.integers(size) for size in n.shape)
        wrong = n.copy()
        wrong[b, t, d] ^= np.int32(rng.integers(1, 2**29)) << 2
        changed = np.asarray(check(wrong, 2, parts)) != before
        assert changed[b, t * parts // 6] and changed.sum() == 1


@pytest.mark.control("one wrong element is always seen")
def test_the_bits_that_are_kept_are_not_looked_at():
    n = states()
    np.testing.assert_array_equal(check(n ^ 3, 2, 1), check(n, 2, 1))
    assert (np.asarray(check(n ^ 4, 2, 1)) != np.asarray(check(n, 2, 1))).all()


def test_wrong_elements_that_would_cancel_in_a_plain_sum_are_seen():
    n, rng = states(shape=(400, 64)), np.random.default_rng(2)
    wrong = n.copy()
    for row in wrong:  # +d, -d, -d, +d at equal distances, which equal weights in a row would miss
        start, step, d = rng.integers(16), rng.integers(1, 16), rng.integers(1, 9) * 4
        row[start + step * np.arange(4)] += np.int32([d, -d, -d, d])
    assert (np.asarray(check(wrong, 2, 1)) != np.asarray(check(n, 2, 1))).all()


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5), (3, 4, 2, 5)])
def test_states_of_any_rank(shape):
    n = states(shape=shape)
    sums = check(n, 1, 1)
    wrong = n.copy()
    wrong.reshape(3, -1)[1, -1] += 2
    sound = check(wrong, 1, 1) == sums
    assert sound.tolist() == [[True], [False], [True]] and np.isnan(zero_or_nan(sound))
    x = np.asarray(nan_unless(per_part(sound, jnp.ones(shape)), jnp.ones(shape)))
    assert np.isnan(x[1]).all() and (x[[0, 2]] == 1).all()
    assert zero_or_nan(sums == sums) == 0


# --- the gradient --------------------------------------------------------------------


def gradient_fn():
    """jitted (params with eps, x0, gamma) -> (gradients of w, b and x0, of failures)."""

    def loss(floats, x0, failures, params, gamma):
        out = bdia_scan(perturb(tanh_block), params | floats, x0, gamma, failures=failures)
        return jnp.sum(jnp.sin(out))

    def gradients(params, x0, gamma):
        floats = {name: params[name] for name in ("w", "b")}
        *found, failed = jax.grad(loss, (0, 1, 2))(floats, x0, jnp.zeros(DEPTH), params, gamma)
        return found, failed

    return jax.jit(gradients)


@functools.cache
def case():
    return make_case(DEPTH, SHAPE)


def trial(fn, eps):
    params, x, gamma = case()
    return fn(params | {"eps": jnp.asarray(eps, jnp.float32)}, x, gamma)


def test_the_block_and_the_number_of_samples_are_told():
    fn = gradient_fn()
    _, failed = trial(fn, np.where(np.arange(DEPTH) == 4, 50 * BOUND, 0.0))
    # undoing block 4 rebuilds x_3; what comes after a wrong one is wrong
    np.testing.assert_array_equal(failed, [4, 4, 4, 4, 0, 0])


def test_other_samples_and_the_blocks_above_keep_their_gradients():
    fn = gradient_fn()
    right, _ = trial(fn, np.zeros((DEPTH, 4, 1, 1)))
    eps = np.zeros((DEPTH, 4, 1, 1))
    eps[3, 1] = 50 * BOUND  # undoing block 3 of sample 1 rebuilds its x_2
    ((ct_params, ct_x0), failed) = trial(fn, eps)
    np.testing.assert_array_equal(failed, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(np.isnan(ct_x0).any((1, 2)), np.arange(4) == 1)
    assert (bits(ct_x0)[[0, 2, 3]] == bits(right[1])[[0, 2, 3]]).all()
    for name, leaf in ct_params.items():
        assert np.isnan(leaf[:3]).all(), name
        assert (bits(leaf[3:]) == bits(right[0][name])[3:]).all()


@pytest.mark.full
def test_under_vmap_each_seed_fails_alone():
    params, x0, gamma = case()
    eps = jnp.zeros((3, DEPTH)).at[1, 3].set(50 * BOUND)
    fn = jax.vmap(lambda eps: gradient_fn()(params | {"eps": eps}, x0, gamma))
    found, failed = fn(eps)
    assert np.asarray(failed).any(1).tolist() == [False, True, False]
    assert [bool(np.isfinite(leaf).all()) for leaf in found[1]] == [True, False, True]


def test_off_there_is_nothing_of_it_in_the_program():
    params, x0, gamma = case()

    def is_verified(**options):
        loss = lambda w: jnp.sum(bdia_scan(tanh_block, params | {"w": w}, x0, gamma, **options))  # noqa: E731
        return "ui32" in jax.jit(jax.grad(loss)).lower(params["w"]).as_text()

    assert is_verified() and not is_verified(verify=False)
    assert not is_verified(backprop="remat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": 3}, r"verify is 3 for x of shape \(4, 8, 16\).*parts of axis 1"),
        ({"verify": "yes"}, "verify is 'yes'"),
        (
            {"failures": jnp.zeros(2)},
            r"float32 of shape \(2,\), expected jnp.zeros\(6\)",
        ),
        ({"failures": jnp.zeros(DEPTH), "verify": False}, "verify=False.*nothing is verified"),
        ({"failures": jnp.zeros(DEPTH), "backprop": "store"}, "backprop='store'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bdia_scan(tanh_block, *case(), **options)


@pytest.mark.claim("a bad gamma has no gradient")
@pytest.mark.control("a bad gamma has no gradient")
@pytest.mark.parametrize(
    "backprop",
    ["reversible", *(pytest.param(each, marks=pytest.mark.full) for each in ("store", "remat"))],
)
def test_a_bad_traced_gamma_makes_the_gradient_nan_and_a_good_one_does_not(backprop):
    params, x0, gamma = case()

    @jax.jit
    def run(x0, gamma):
        return jax.value_and_grad(
            lambda x0: jnp.sum(bdia_scan(tanh_block, params, x0, gamma, backprop=backprop))
        )(x0)

    assert np.isfinite(np.concatenate([np.ravel(a) for a in run(x0, gamma)])).all()
    bad = [gamma.at[0].set(0.5), gamma.at[2, 1].set(jnp.nan)]
    for each in bad + [gamma.at[3].set(0.3)] * (backprop == "reversible"):
        assert all(np.isnan(a).all() for a in run(x0, each))


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


@pytest.mark.full
@pytest.mark.claim("no wrong gradient is finite")
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_massive_activations_are_right_or_nan_and_the_audit_has_the_remedy(size):
    """h reaches `size` and cancels in the next block; at 1e4 its last bit is half a quantum."""
    w = jax.random.normal(jax.random.key(1), (12, 32, 32)) / 32**0.5
    x0 = jax.random.normal(jax.random.key(2), (4, 8, 32))
    gamma = bdia_jax.sample_gamma(jax.random.key(3), 12, 4)
    params = w, jnp.where(jnp.arange(12) % 2 == 0, size, -size)

    def block(params, x):
        w, amplitude = params
        return jnp.tanh(normed(x) @ w) * amplitude

    def gradient(**options):
        def loss(w):
            return jnp.mean(normed(bdia_scan(block, (w, params[1]), x0, gamma, **options)) ** 3)

        return np.asarray(jax.jit(jax.grad(loss))(w))

    expected = gradient(backprop="store")
    found = gradient()
    assert np.isnan(found[0]).all() or relative_error(found, expected) < 1e-4
    audit = bdia_jax.audit(block, params, x0, gamma)
    assert audit.exact == bool(np.isfinite(found).all()) and audit.suggested_guard_bits is not None
    enough = FixedPoint(guard_bits=max(1, audit.suggested_guard_bits))
    assert relative_error(gradient(fixed_point=enough), expected) < 1e-4


# --- the stacks ----------------------------------------------------------------------


@pytest.mark.claim("no wrong gradient is finite")
@pytest.mark.parametrize("make", [drifting_stack, pytest.param(BDIAStack, marks=pytest.mark.full)])
def test_a_stack_tells_where_its_rebuild_failed(make):
    stack = make(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 5, rngs=nnx.Rngs(0))
    stack.failures = RebuildFailures(jnp.zeros(5))
    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, RebuildFailures))
    loss = lambda stack: jnp.sum(stack(jnp.ones((3, 4)), rngs=nnx.Rngs(1)) ** 2)  # noqa: E731
    grads = nnx.grad(loss, argnums=wrt)(stack)
    drifts = make is drifting_stack
    assert grads["failures"][...].tolist() == [3.0 * drifts] * 4 + [0.0]
    assert drifts != all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    stack.eval()
    assert jnp.isfinite(stack(jnp.ones((3, 4)))).all()
    stack.train()
    stack.backprop = "remat"
    assert not nnx.grad(loss, argnums=wrt)(stack)["failures"][...].any()


class Drifting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return drifting(nn.Dense(4)(x))


@pytest.mark.claim("no wrong gradient is finite")
@pytest.mark.full
@pytest.mark.parametrize("block", [Drifting(), nn.Dense(4)])
def test_so_does_linens(block):
    stack = bdia_jax.linen.BDIAStack(block, 5, deterministic=False)
    x, rngs = jnp.ones((3, 4)), {"gamma": jax.random.key(1)}
    variables = stack.init(rngs | {"params": jax.random.key(0)}, x)
    assert "failures" not in variables
    variables |= {"failures": {"blocks": jnp.zeros(5)}}
    grads = jax.grad(lambda v: jnp.sum(stack.apply(v, x, rngs=rngs) ** 2))(variables)
    drifts = isinstance(block, Drifting)
    assert grads["failures"]["blocks"].tolist() == [3.0 * drifts] * 4 + [0.0]
    assert drifts != all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@pytest.mark.control("no wrong gradient is finite")
def test_a_stack_that_does_not_verify_lets_wrong_ones_out():
    def gradient(**options):
        make_block = lambda rngs: nnx.Linear(4, 4, rngs=rngs)  # noqa: E731
        stack = drifting_stack(make_block, 5, rngs=nnx.Rngs(0), **options)
        return nnx.grad(lambda s: jnp.sum(s(jnp.ones((3, 4)), rngs=nnx.Rngs(1)) ** 2))(stack)

    wrong, right = (gradient(**options) for options in ({"verify": False}, {"backprop": "store"}))
    kernels = (grads["blocks"]["block"]["kernel"][...] for grads in (wrong, right))
    assert relative_error(*kernels) > 1e-3  # a NaN is not


# --- many devices --------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.claim("no wrong gradient is finite")
def test_in_shard_map_as_it_is_by_default_all_devices_share_the_verdict():
    """With check_vma the gradient of what all devices share is summed inside."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    params, x0, gamma = case()
    whole, over, rows = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")

    def loss(w, x0, gamma, eps):
        block = perturb(tanh_block), params | {"w": w, "eps": eps}
        return jnp.sum(jnp.sin(bdia_scan(*block, x0, gamma)))

    def gradient(w, x0, gamma, eps):
        return jax.grad(loss, (0, 1))(w, x0, gamma, eps)

    specs = {"in_specs": (whole, over, rows, rows), "out_specs": (whole, over)}
    fn = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))
    eps = np.zeros((DEPTH, 4, 1, 1), np.float32)
    found = fn(params["w"], x0, gamma, eps)
    for ours, alone in zip(found, jax.jit(gradient)(params["w"], x0, gamma, eps), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-5)
    eps[3, 1] = 50 * BOUND  # one sample, so one device
    ct_w, ct_x0 = fn(params["w"], x0, gamma, eps)
    assert np.isnan(ct_w[:3]).all() and np.isfinite(ct_w[3:]).all()
    np.testing.assert_array_equal(np.isnan(ct_x0).any((1, 2)), np.arange(4) == 1)
