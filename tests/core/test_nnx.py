import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error

from bdia_jax import FixedPoint
from bdia_jax.nnx import BDIAStack, stacked_params

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
X = 2 * jax.random.normal(jax.random.key(3), (4, 5, 13))


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(13, 13, rngs=rngs)

    def __call__(self, x, mask=None):
        h = nnx.tanh(self.dense(x))
        return h if mask is None else jnp.where(mask, h, 0.0)


class Dropout(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(13, 13, rngs=rngs)
        self.first = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.dense(self.first(x))))


class Ones(nnx.Module):
    """h is the dropout mask itself."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        h = self.dropout(jnp.ones_like(x)) * self.scale[...]
        return h, h


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(13, 13, rngs=rngs)
        self.norm = nnx.BatchNorm(13, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.dense(x)))


def make(block, depth=5, seed=0, **options):
    return BDIAStack(block, depth, rngs=nnx.Rngs(seed), **options)


def gradient(stack, *consts, seed=1):
    """(loss, gradient by parameter) with the same rngs whatever the backprop."""

    @nnx.jit
    def value_and_grad(stack):
        def loss(stack):
            return jnp.sum(jnp.sin(stack(X, *consts, rngs=nnx.Rngs(seed))))

        return nnx.value_and_grad(loss)(stack)

    value, grads = value_and_grad(stack)
    return value, jax.tree.leaves(grads)


def masks(stack, rngs=None):
    """bool [K, B, T, D]: which elements each block kept."""
    return np.asarray(stack(X, rngs=rngs)[1]) > 0


# --- gradients and exactness ---------------------------------------------------------


@pytest.mark.full
@pytest.mark.claim("gradients equal store's")
@pytest.mark.parametrize("block", [Dropout, Norm])
def test_reversible_and_remat_equal_store(block, optimized):
    stacks = {b: make(block, backprop=b) for b in ("store", "reversible", "remat")}
    value, expected = gradient(stacks["store"])
    for backprop in ("reversible", "remat"):
        same_value, actual = gradient(stacks[backprop])
        np.testing.assert_allclose(same_value, value, rtol=1e-6)
        if block is Norm:  # the bias before a BatchNorm has no gradient but rounding
            actual, expected_ = drop_smallest(actual, expected)
            assert_grads_close(actual, expected_, F32)
        else:
            assert_grads_close(actual, expected, F32)


def drop_smallest(actual, expected):
    keep = [float(jnp.linalg.norm(e)) > 1e-3 for e in expected]
    assert sum(keep) == len(keep) - 1
    return tuple([leaf for leaf, k in zip(g, keep, strict=True) if k] for g in (actual, expected))


@pytest.mark.claim("rebuild is exact")
@pytest.mark.full
@pytest.mark.parametrize("block", [Dense, Dropout, Norm])
def test_the_audit_of_a_stack_is_exact(block, optimized):
    stack = make(block, depth=9)
    audit = stack.audit(X)
    assert audit.exact and len(audit.mismatches) == 8, audit


@pytest.mark.full
def test_the_audit_of_a_stack_in_parts_is_exact(optimized):
    audit = make(Dropout, depth=9, batch_chunks=2).audit(X)
    assert audit.exact and audit.elements == X.size and len(audit.mismatches) == 8, audit


@pytest.mark.full
@pytest.mark.parametrize("gamma_bits", [2, 3])
def test_other_magnitudes(gamma_bits):
    fp = FixedPoint(gamma_bits=gamma_bits)
    options = {"magnitude": 2.0**-gamma_bits, "fixed_point": fp}
    assert make(Dense, **options).audit(X).exact
    _, expected = gradient(make(Dense, **options, backprop="store"))
    assert_grads_close(gradient(make(Dense, **options))[1], expected, F32)


@pytest.mark.full
def test_consts_reach_the_blocks_and_are_differentiated():
    mask = jnp.arange(13) % 2 == 0
    y = make(Dense)(X, mask, rngs=nnx.Rngs(1))
    assert np.any(y != make(Dense)(X, rngs=nnx.Rngs(1)))
    untouched = np.asarray(make(Dense)(X, jnp.zeros(13, bool), rngs=nnx.Rngs(1)))
    np.testing.assert_allclose(untouched, untouched.round(9), atol=1e-6)
    for backprop in ("store", "reversible"):
        assert len(gradient(make(Dense, backprop=backprop), mask)[1]) == 2
    _, expected = gradient(make(Dense, backprop="store"), mask)
    assert_grads_close(gradient(make(Dense), mask)[1], expected, F32)


# --- dropout -------------------------------------------------------------------------


def test_masks_differ_by_block_by_call_and_within_the_batch():
    stack = make(Ones, has_aux=True)
    first, second = masks(stack), masks(stack)
    for a, b in [(first[0], first[1]), (first, second), (first[:, 0], first[:, 1])]:
        assert 0.3 < np.mean(a != b) < 0.7


def test_every_dropout_inside_a_block_has_a_mask_of_its_own():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs.fork()) for _ in range(2)])
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            kept = [d(jnp.ones_like(x)) for d in self.dropouts]
            return self.scale[...] * kept[0], jnp.stack(kept)

    _, kept = make(Two, has_aux=True)(X)
    assert 0.3 < np.mean(np.asarray(kept[:, 0]) != np.asarray(kept[:, 1])) < 0.7


def test_equal_rngs_give_equal_results_and_override_the_stacks_own():
    stack = make(Dropout)
    same = [np.asarray(stack(X, rngs=nnx.Rngs(7))) for _ in range(2)]
    assert_same_bits(*same)
    assert np.any(same[0] != stack(X, rngs=nnx.Rngs(8)))
    own = [np.asarray(stack(X)) for _ in range(2)]
    assert np.any(own[0] != own[1])
    fresh = make(Dropout)
    assert_same_bits(np.asarray(fresh(X)), own[0])  # a stack is a function of its seed


def test_streams_may_be_given_one_by_one():
    stack = make(Ones, has_aux=True)
    a = masks(stack, nnx.Rngs(gamma=1, dropout=2))
    b = masks(stack, nnx.Rngs(gamma=5, dropout=2))
    c = masks(stack, nnx.Rngs(gamma=1, dropout=3))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)


@pytest.mark.parametrize("missing", ["gamma", "dropout"])
def test_a_missing_stream_is_named(missing):
    have = {"gamma": 1, "dropout": 1}
    del have[missing]
    with pytest.raises(ValueError, match=f"no stream '{missing}' and no default.*nnx.Rngs"):
        make(Dropout)(X, rngs=nnx.Rngs(**have))


def test_a_block_without_dropout_needs_no_dropout_stream():
    assert np.all(np.isfinite(make(Dense)(X, rngs=nnx.Rngs(gamma=1))))


# --- train and eval ------------------------------------------------------------------


@pytest.mark.parametrize("block", [Dense, Dropout])
def test_eval_is_the_plain_loop_and_train_is_not(block):
    stack = make(block, fixed_point=None, backprop="store")
    trained = stack(X)
    stack.eval()
    graphdef, state = nnx.split(stack.blocks)

    def loop(x):
        for k in range(stack.depth):
            x = x + nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state))(x)
        return x

    assert relative_error(stack(X), jax.jit(loop)(X)) < 1e-6
    assert relative_error(trained, loop(X)) > 1e-2


def test_train_and_eval_of_an_enclosing_module_switch_the_stack():
    class Model(nnx.Module):
        def __init__(self):
            self.stack = make(Dropout)

    model = Model()
    model.eval()
    assert model.stack.deterministic
    assert_same_bits(model.stack(X), model.stack(X))
    model.train()
    assert np.any(model.stack(X) != model.stack(X))


@pytest.mark.full
def test_eval_is_the_same_bits_for_every_backprop(optimized):
    outputs = []
    for backprop in ("reversible", "store", "remat"):
        stack = make(Dropout, backprop=backprop)
        stack.eval()
        outputs.append(nnx.jit(lambda stack: stack(X))(stack))
    assert_same_bits(outputs[0], outputs[1])
    assert_same_bits(outputs[0], outputs[2])


@pytest.mark.full
def test_backprop_may_be_switched_on_a_living_stack():
    stack = make(Dense)
    _, reversible = gradient(stack)
    stack.backprop = "store"
    assert_grads_close(reversible, gradient(stack)[1], F32)


# --- another constant gamma at inference ---------------------------------------------


def inference(gamma, **options):
    stack = make(Dropout, **options)
    stack.eval()
    stack.inference_gamma = gamma
    return stack, nnx.jit(lambda stack: stack(X))(stack)


def test_inference_gamma_zero_is_the_unchanged_transformer():
    plain = make(Dropout)
    plain.eval()
    assert_same_bits(inference(0.0)[1], nnx.jit(lambda stack: stack(X))(plain))
    assert relative_error(inference(-0.5)[1], plain(X)) > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("gamma", [-0.5, 0.3])
def test_inference_gamma_is_the_constant_of_eq_10(gamma):
    stack, y = inference(gamma)
    graphdef, state = nnx.split(stack.blocks)

    @jax.jit
    def loop(x):
        x_prev = x
        for k in range(stack.depth):
            h = nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state))(x)
            g = gamma if k else 0.0
            x_prev, x = x, g * x_prev + (1 - g) * x + (1 + g) * h
        return x

    # two roundings a block, of half a quantum each, that later blocks amplify
    np.testing.assert_allclose(y, loop(X), atol=20 * 2.0**-9)
    assert np.max(np.abs(y - loop(X))) > 0
    exact = inference(gamma, fixed_point=None, backprop="store")[1]
    np.testing.assert_allclose(exact, loop(X), atol=2e-5)


@pytest.mark.full
def test_inference_gamma_is_the_same_bits_for_every_backprop_and_not_used_in_training(optimized):
    outputs = [inference(0.25, backprop=b)[1] for b in ("reversible", "store", "remat")]
    assert_same_bits(outputs[0], outputs[1])
    assert_same_bits(outputs[0], outputs[2])
    stack = make(Dropout, inference_gamma=0.25)
    assert stack.inference_gamma == 0.25
    assert_same_bits(stack(X, rngs=nnx.Rngs(1)), make(Dropout)(X, rngs=nnx.Rngs(1)))


def test_an_inference_gamma_beyond_one_half_is_refused():
    with pytest.raises(ValueError, match=r"inference_gamma is 0.6, expected .* -0.5 to 0.5"):
        make(Dense, inference_gamma=0.6)
    stack = make(Dense)
    with pytest.raises(ValueError, match="inference_gamma is nan"):
        stack.inference_gamma = float("nan")


# --- state and aux -------------------------------------------------------------------


def statistics_after(backprop, calls=2):
    stack = make(Norm, backprop=backprop)

    train_step = nnx.jit(nnx.grad(lambda s: jnp.sum(s(X) ** 2)))
    for _ in range(calls):
        train_step(stack)
    return stack, jax.tree.leaves(nnx.state(stack.blocks, nnx.BatchStat))


@pytest.mark.full
def test_batch_statistics_are_updated_once_a_call_and_equally_by_every_backprop():
    stack, expected = statistics_after("store")
    assert all(leaf.shape == (5, 13) for leaf in expected)
    for backprop in ("reversible", "remat"):
        for a, e in zip(statistics_after(backprop)[1], expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
    # block 0 sees X itself (on the grid): one update after another, of momentum 0.9
    dense = jax.tree.map(lambda leaf: leaf[0], nnx.state(stack.blocks.dense, nnx.Param))
    grid = np.rint(np.asarray(X) * 2**9) / 2**9
    seen = (grid @ np.asarray(dense["kernel"][...]) + np.asarray(dense["bias"][...])).reshape(
        -1, 13
    )
    mean = np.asarray(stack.blocks.norm.mean[...][0])
    np.testing.assert_allclose(mean, 0.1 * (1 + 0.9) * seen.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_eval_uses_the_statistics_and_leaves_them():
    stack, before = statistics_after("reversible")
    stack.eval()
    assert_same_bits(stack(X), stack(X))
    for a, b in zip(jax.tree.leaves(nnx.state(stack.blocks, nnx.BatchStat)), before, strict=True):
        assert_same_bits(a, b)


@pytest.mark.full
def test_aux_is_stacked_and_differentiable():
    class WithAux(Dense):
        def __call__(self, x):
            h = super().__call__(x)
            return h, {"power": jnp.mean(h**2)}

    def grads(backprop):
        def loss(stack):
            y, aux = stack(X, rngs=nnx.Rngs(1))
            assert aux["power"].shape == (5,)
            return jnp.sum(aux["power"]) + 0.01 * jnp.sum(y)

        return jax.tree.leaves(nnx.grad(loss)(make(WithAux, has_aux=True, backprop=backprop)))

    assert_grads_close(grads("reversible"), grads("store"), F32)


# --- refusals ------------------------------------------------------------------------


def test_a_magnitude_that_does_not_match_is_refused_before_tracing():
    with pytest.raises(
        ValueError, match=r"magnitude is 0.25.*gamma_bits=1 needs 0.5.*gamma_bits=p"
    ):
        make(Dense, magnitude=0.25)(X)
    assert np.all(np.isfinite(make(Dense, magnitude=0.6, backprop="remat")(X)))


def test_audit_in_eval_mode_or_without_a_format_is_refused():
    stack = make(Dense)
    stack.eval()
    with pytest.raises(ValueError, match=r"deterministic is True.*call train\(\)"):
        stack.audit(X)
    with pytest.raises(ValueError, match=r"fixed_point None.*set a FixedPoint"):
        make(Dense, fixed_point=None, backprop="store").audit(X)


def test_a_stack_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match="depth is 0"):
        make(Dense, depth=0)


# --- stacked parameters --------------------------------------------------------------


def test_blocks_start_different_and_are_stacked():
    kernel = make(Dense).blocks.dense.kernel[...]
    assert kernel.shape == (5, 13, 13)
    assert len({float(k[0, 0]) for k in kernel}) == 5


def test_stacked_params_marks_the_blocks_and_nothing_else():
    class Model(nnx.Module):
        def __init__(self):
            self.stack = make(Dense)
            self.blocks = nnx.Linear(13, 2, rngs=nnx.Rngs(0))  # a name that is no stack

    names = nnx.to_flat_state(stacked_params(Model()))
    assert {path[:-1]: name.get_value() for path, name in names} == {
        ("blocks",): "",
        ("stack", "blocks", "dense"): "stack.blocks",
    }
