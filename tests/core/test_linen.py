import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error

import bdia_jax
from bdia_jax import FixedPoint
from bdia_jax.linen import BDIAStack
from bdia_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
X = 2 * jax.random.normal(jax.random.key(3), (4, 5, 13))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        h = nn.tanh(nn.Dense(13)(x))
        return h if mask is None else jnp.where(mask, h, 0.0)


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Dropout(0.3)(x, deterministic=deterministic)
        return nn.Dropout(0.3)(nn.tanh(nn.Dense(13)(x)), deterministic=deterministic)


class Ones(nn.Module):
    """h is the dropout mask itself."""

    @nn.compact
    def __call__(self, x, deterministic):
        scale = self.param("scale", nn.initializers.ones, ())
        h = nn.Dropout(0.5)(jnp.ones_like(x), deterministic=deterministic) * scale
        return h, h


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(13)(x))
        return nn.tanh(h)


def init(stack, **kwargs):
    return stack.init({"params": jax.random.key(0)}, X, deterministic=True, **kwargs)


def rngs(seed=1, **keys):
    root = jax.random.key(seed)
    return {"gamma": jax.random.fold_in(root, 0), "dropout": jax.random.fold_in(root, 1)} | keys


def gradient(block, backprop, *consts, **kwargs):
    options = {k: kwargs.pop(k) for k in ("magnitude", "fixed_point") if k in kwargs}
    stack = BDIAStack(block, depth=5, backprop=backprop, **options)
    variables = init(stack, **kwargs)
    state = {col: v for col, v in variables.items() if col != "params"}

    def loss(params):
        y, new_state = stack.apply(
            {"params": params, **state},
            X,
            *consts,
            deterministic=False,
            rngs=rngs(),
            mutable=list(state),
            **kwargs,
        )
        return jnp.sum(jnp.sin(y)), new_state

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("block", "backprop"),
    [
        (Dropout(), "reversible"),
        *(pytest.param(Dense(), b, marks=pytest.mark.full) for b in ("reversible", "remat")),
    ],
)
def test_reversible_and_remat_equal_store(block, backprop):
    assert_grads_close(gradient(block, backprop)[0], gradient(block, "store")[0], F32)


@pytest.mark.full
def test_other_magnitudes():
    options = {"magnitude": 0.25, "fixed_point": FixedPoint(gamma_bits=2)}
    actual = gradient(Dense(), "reversible", **options)[0]
    assert_grads_close(actual, gradient(Dense(), "store", **options)[0], F32)


@pytest.mark.full
def test_consts_reach_the_blocks():
    mask = jnp.arange(13) % 2 == 0
    masked = gradient(Dense(), "reversible", mask)[0]
    assert_grads_close(masked, gradient(Dense(), "store", mask)[0], F32)
    full = gradient(Dense(), "store")[0]
    assert relative_error(jax.tree.leaves(masked)[1], jax.tree.leaves(full)[1]) > 0.1


@pytest.mark.full
def test_the_masks_are_the_same_in_the_rebuild(optimized):
    # the stack's block as bdia_scan sees it: one key a block
    variables = init(BDIAStack(Dropout(), depth=9))
    keys = jax.random.split(jax.random.key(5), 9)

    def block_fn(params_k, x):
        variables_k, key = params_k
        return Dropout().apply(variables_k, x, deterministic=False, rngs={"dropout": key})

    params = {"params": variables["params"]["blocks"]}, keys
    gamma = bdia_jax.sample_gamma(jax.random.key(6), 9, 4)
    assert bdia_jax.audit(block_fn, params, X, gamma).exact


# --- dropout -------------------------------------------------------------------------


def masks(**keys):
    stack = BDIAStack(Ones(), depth=5, has_aux=True)
    out = stack.apply(init(stack), X, deterministic=False, rngs=rngs(**keys))
    return np.asarray(out[1]) > 0


def test_masks_differ_by_block_and_by_key_and_within_the_batch():
    first, second = masks(seed=1), masks(seed=2)
    for a, b in [(first[0], first[1]), (first, second), (first[:, 0], first[:, 1])]:
        assert 0.3 < np.mean(a != b) < 0.7
    np.testing.assert_array_equal(first, masks(seed=1))


def test_gamma_and_dropout_are_streams_of_their_own():
    np.testing.assert_array_equal(masks(), masks(gamma=jax.random.key(99)))
    assert np.any(masks() != masks(dropout=jax.random.key(99)))


@pytest.mark.parametrize("missing", ["gamma", "dropout"])
def test_a_missing_stream_is_named(missing):
    stack = BDIAStack(Dropout(), depth=3)
    have = {name: key for name, key in rngs().items() if name != missing}
    with pytest.raises(Exception, match=missing):
        stack.apply(init(stack), X, deterministic=False, rngs=have)


# --- deterministic -------------------------------------------------------------------


@pytest.mark.parametrize("block", [Dense(), Dropout()], ids=["dense", "dropout"])
def test_deterministic_is_the_plain_loop_and_training_is_not(block):
    stack = BDIAStack(block, depth=5, fixed_point=None, backprop="store")
    variables = init(stack)
    kwargs = {"deterministic": True} if isinstance(block, Dropout) else {}
    x = X
    for k in range(5):
        params = jax.tree.map(lambda leaf, k=k: leaf[k], variables["params"]["blocks"])
        x = x + block.apply({"params": params}, x, **kwargs)
    assert relative_error(stack.apply(variables, X, deterministic=True), x) < 1e-6
    trained = stack.apply(variables, X, deterministic=False, rngs=rngs())
    assert relative_error(trained, x) > 1e-2


def test_deterministic_may_be_an_attribute_and_must_be_given():
    variables = init(BDIAStack(Dense(), depth=3))
    as_attribute = BDIAStack(Dense(), depth=3, deterministic=True).apply(variables, X)
    at_call = BDIAStack(Dense(), depth=3).apply(variables, X, deterministic=True)
    assert_same_bits(as_attribute, at_call)
    with pytest.raises(ValueError, match="deterministic"):
        BDIAStack(Dense(), depth=3).apply(variables, X)


@pytest.mark.full
def test_inference_is_the_same_bits_for_every_backprop(optimized):
    stacks = [BDIAStack(Dense(), depth=5, backprop=b) for b in ("reversible", "store", "remat")]
    variables = init(stacks[0])
    out = [jax.jit(lambda v, s=s: s.apply(v, X, deterministic=True))(variables) for s in stacks]
    assert_same_bits(out[0], out[1])
    assert_same_bits(out[0], out[2])


# --- state, aux, parameters ----------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("backprop", ["store", "reversible", "remat"])
def test_batch_statistics_are_updated_once_a_call(backprop):
    _, state = gradient(Norm(), backprop, train=True)
    stack = BDIAStack(Norm(), depth=5)
    dense = init(stack, train=True)["params"]["blocks"]["Dense_0"]
    stats = state["batch_stats"]["blocks"]["BatchNorm_0"]
    assert stats["mean"].shape == (5, 13)
    grid = np.rint(np.asarray(X) * 2**9) / 2**9
    seen = (grid @ np.asarray(dense["kernel"][0]) + np.asarray(dense["bias"][0])).reshape(-1, 13)
    np.testing.assert_allclose(stats["mean"][0], 0.1 * seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"][0], 0.9 + 0.1 * seen.var(0), rtol=1e-4)
    _, stored = gradient(Norm(), "store", train=True)
    for a, e in zip(jax.tree.leaves(state), jax.tree.leaves(stored), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_inference_leaves_the_statistics():
    stack = BDIAStack(Norm(), depth=3)
    variables = init(stack, train=False)
    _, state = stack.apply(variables, X, deterministic=True, train=False, mutable=["batch_stats"])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(variables["batch_stats"]), strict=True):
        assert_same_bits(a, b)


def test_aux_is_stacked():
    stack = BDIAStack(Ones(), depth=5, has_aux=True)
    _, aux = stack.apply(init(stack), X, deterministic=True)
    assert aux.shape == (5, *X.shape)


def test_blocks_start_different_and_are_stacked():
    kernel = init(BDIAStack(Dense(), depth=5))["params"]["blocks"]["Dense_0"]["kernel"]
    assert kernel.shape == (5, 13, 13)
    assert len({float(k[0, 0]) for k in kernel}) == 5


@pytest.mark.full
def test_inside_a_larger_module():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(13)(x)
            x = BDIAStack(Dropout(), depth=3, name="stack")(x, deterministic=not train)
            return nn.Dense(2)(x)

    variables = Model().init(jax.random.key(0), X, train=False)
    assert set(variables["params"]) == {"Dense_0", "stack", "Dense_1"}
    grad = jax.jit(jax.grad(lambda v: Model().apply(v, X, train=True, rngs=rngs()).sum()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grad(variables)):
        assert np.any(leaf), path


def test_a_magnitude_that_does_not_match_is_refused():
    stack = BDIAStack(Dense(), depth=3, magnitude=0.25)
    with pytest.raises(ValueError, match=r"magnitude is 0.25.*gamma_bits=1 needs 0.5"):
        init(stack)


# --- what the stack for NNX has, too --------------------------------------------------


@pytest.mark.full
@pytest.mark.claim("rebuild is exact")
def test_audit_is_of_the_training_that_these_keys_give(optimized):
    stack = BDIAStack(Dropout(), depth=5)
    variables = init(stack)
    report = stack.audit(variables, X, rngs=rngs())
    assert report.exact and report.elements == X.size and len(report.mismatches) == 4
    with pytest.raises(ValueError, match="deterministic is True"):
        stack.clone(deterministic=True).audit(variables, X, rngs=rngs())
    with pytest.raises(ValueError, match="fixed_point None"):
        stack.clone(fixed_point=None, backprop="store").audit(variables, X, rngs=rngs())


@pytest.mark.full
def test_choose_guard_bits_returns_a_stack_with_as_many_as_are_needed(optimized):
    class Drifting(nn.Module):
        """Off by 0.9 quanta where it is differentiated, as in the backward pass."""

        @nn.compact
        def __call__(self, x):
            off = jax.custom_jvp(lambda x: jnp.zeros_like(x))
            off.defjvp(lambda x, t: (jnp.full_like(x[0], 0.9 * 2.0**-9), jnp.zeros_like(t[0])))
            return nn.tanh(nn.Dense(13)(x)) + off(x)

    stack = BDIAStack(Drifting(), depth=5)
    variables = init(stack)
    assert not stack.audit(variables, X, rngs=rngs()).exact  # control: one guard bit is too few
    chosen, found = stack.choose_guard_bits(variables, X, rngs=rngs())
    assert found.exact and chosen.fixed_point == found.fixed_point
    assert chosen.fixed_point.guard_bits > stack.fixed_point.guard_bits
    run = lambda s: s.apply(variables, X, deterministic=False, rngs=rngs())  # noqa: E731
    assert_same_bits(run(chosen), run(stack))


def test_inference_gamma_is_that_of_nnx():
    weights = jax.random.normal(jax.random.key(0), (3, 13, 13)) / 4

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.tanh(x @ self.param("w", nn.initializers.zeros, (13, 13)))

    class Same(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.zeros((13, 13)))

        def __call__(self, x):
            return jnp.tanh(x @ self.w[...])

    other = bdia_jax.nnx.BDIAStack(Same, 3, rngs=nnx.Rngs(0), inference_gamma=0.25)
    other.blocks.w[...] = weights
    other.eval()
    variables = {"params": {"blocks": {"w": weights}}}
    run = lambda gamma: BDIAStack(Linear(), 3, inference_gamma=gamma).apply(  # noqa: E731
        variables, X, deterministic=True
    )
    assert_same_bits(run(0.25), other(X))
    assert relative_error(run(0.0), other(X)) > 0.01
    with pytest.raises(ValueError, match=r"inference_gamma is 0.6, expected .* -0.5 to 0.5"):
        run(0.6)


@pytest.mark.full
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_mesh_splits_the_states():
    x = jnp.concatenate([X, X])
    stack = BDIAStack(Dense(), depth=3)
    variables = init(stack)
    sharded = stack.clone(mesh=make_mesh(data=4))
    run = lambda s: jax.jit(  # noqa: E731
        lambda v: s.apply(v, x, deterministic=False, rngs=rngs())
    )(variables)
    assert len(run(sharded).sharding.device_set) == 4
    np.testing.assert_allclose(run(sharded), run(stack), atol=2 * 2.0**-9)
