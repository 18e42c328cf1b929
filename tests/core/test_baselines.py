"""Stacks that rebuild in floating point: other networks, nearly right gradients, drift."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_grads_close, assert_same_bits, relative_error
from toy_models import block_of

from bdia_jax.baselines import FloatBDIAStack, MidpointStack, RevStack
from bdia_jax.nnx import BDIAStack, BranchedBlock, stacked_params

# tests of exactness ask for `optimized`
pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]
# rebuilt inexactly by nature: gradients agree for shallow stacks (see test_float_scan.py)
SHALLOW = 1e-3
X = jnp.asarray(np.random.default_rng(3).normal(size=(4, 5, 13)), jnp.float32)
STACKS = [RevStack, MidpointStack, FloatBDIAStack]
EVERY = pytest.mark.parametrize("stack", STACKS)


class Block(BranchedBlock):
    branches = ("f", "g")

    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(13, 13, rngs=rngs)
        self.second = nnx.Linear(13, 13, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def f(self, x, shift=None):
        h = self.dropout(nnx.tanh(self.first(x)))
        return h if shift is None else h + shift

    def g(self, x, shift=None):
        return nnx.tanh(self.second(x))


Dropout = partial(Block, rate=0.3)


class Norm(Block):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(13, momentum=0.9, rngs=rngs)

    def f(self, x, shift=None):
        return self.norm(super().f(x)) + shift


@cache
def initialized(stack, block, depth):
    return nnx.split(stack(block, depth, rngs=nnx.Rngs(0)))


def make(stack, block=Block, depth=4, **attributes):
    """The same initial stack every time, with these attributes."""
    stack = nnx.merge(*initialized(stack, block, depth), copy=True)
    for name, value in attributes.items():
        setattr(stack, name, value)
    return stack


@cache
def gradient(stack_type, block, backprop):
    """(leaves of the gradient, with that of a shared input last; the stack afterwards)."""
    stack = make(stack_type, block, backprop=backprop)

    @nnx.jit
    def grad(stack, shift):
        loss = lambda s, shift: jnp.sum(jnp.sin(s(X, shift, rngs=nnx.Rngs(1))))  # noqa: E731
        return nnx.grad(loss, argnums=(0, 1))(stack, shift)

    return jax.tree.leaves(grad(stack, jnp.linspace(-0.1, 0.1, 13))), stack


# --- the networks --------------------------------------------------------------------


def test_rev_stack_is_two_streams_that_start_equal_and_end_side_by_side():
    stack = make(RevStack)
    x1 = x2 = X
    for k in range(4):
        block = block_of(stack, k)
        x1 = x1 + block.f(x2)
        x2 = x2 + block.g(x1)
    np.testing.assert_allclose(stack(X), jnp.concatenate([x1, x2], axis=-1), atol=1e-5)
    assert stack.out_features(13) == 26 and make(MidpointStack).out_features(13) == 13


def test_midpoint_is_its_loop_in_training_and_at_inference():
    stack = make(MidpointStack)
    x_prev, x = X, X + block_of(stack, 0)(X)
    for k in range(1, 4):
        x_prev, x = x, x_prev + 2 * block_of(stack, k)(x)
    np.testing.assert_allclose(stack(X), x, atol=1e-5)
    stack.eval()
    np.testing.assert_allclose(stack(X), x, atol=1e-5)


def test_float_bdia_is_bdia_without_fixed_point():
    stack = make(FloatBDIAStack)
    reference = make(BDIAStack, fixed_point=None, backprop="store")
    trained, expected = stack(X, rngs=nnx.Rngs(1)), reference(X, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(trained, expected, atol=1e-5)
    stack.eval()
    reference.eval()
    np.testing.assert_allclose(stack(X), reference(X), atol=1e-5)
    assert relative_error(trained, stack(X)) > 1e-2


# --- gradients, dropout, state -------------------------------------------------------


@pytest.mark.claim("shallow float stacks have nearly store's gradients")
@EVERY
def test_reversible_gradients_are_close_to_store(stack):
    (reversible, _), (stored, _) = (gradient(stack, Dropout, b) for b in ("reversible", "store"))
    assert len(reversible) == 5  # two kernels, two biases, the shared input
    assert_grads_close(reversible, stored, SHALLOW)


@EVERY
def test_dropout_differs_by_call_and_follows_rngs(stack):
    stack = make(stack, Dropout, depth=2)
    run = nnx.jit(lambda stack, rngs: stack(X, rngs=rngs))
    assert_same_bits(run(stack, nnx.Rngs(1)), run(stack, nnx.Rngs(1)))
    assert relative_error(run(stack, nnx.Rngs(1)), run(stack, nnx.Rngs(2))) > 0.01


def test_batch_statistics_are_updated_once_a_step_and_equally_by_store():
    (reversible, stack), (stored, other) = (
        gradient(MidpointStack, Norm, b) for b in ("reversible", "store")
    )
    assert_grads_close(reversible, stored, SHALLOW)
    forward = make(MidpointStack, Norm)
    forward(X, jnp.linspace(-0.1, 0.1, 13))
    for name in ("mean", "var"):
        after = [getattr(s.blocks.norm, name)[...] for s in (stack, other, forward)]
        assert after[0].shape == (4, 13)
        np.testing.assert_allclose(after[0], after[1], atol=1e-6)
        np.testing.assert_allclose(after[0], after[2], atol=1e-6)
        assert relative_error(after[0], getattr(make(MidpointStack, Norm).blocks.norm, name)) > 0.01


def test_aux_is_stacked():
    class WithAux(Block):
        def __call__(self, x):
            h = super().__call__(x)
            return h, jnp.mean(h**2)

    _, power = make(MidpointStack, WithAux, has_aux=True)(X)
    assert power.shape == (4,) and np.all(power > 0)


def test_float_bdia_at_inference_is_differentiated_by_store():
    stack = make(FloatBDIAStack, depth=2)
    stack.eval()
    grads = nnx.grad(lambda s: jnp.sum(s(X)))(stack)
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in jax.tree.leaves(grads))


# --- drift, and the rest -------------------------------------------------------------


def test_rebuild_errors_of_the_stacks():
    rev, bdia = (
        np.asarray(make(s, depth=24).rebuild_errors(X)) for s in (RevStack, FloatBDIAStack)
    )
    assert rev.shape == bdia.shape == (24,)
    assert bdia[0] > 100 * bdia[12] > 0 and bdia[0] > 10 * rev[0] > 0


@EVERY
def test_their_parameters_are_marked_as_stacked(stack):
    assert all(jax.tree.leaves(stacked_params(make(stack))))


def test_what_cannot_be_rebuilt_is_refused():
    with pytest.raises(ValueError, match=r"state \(norm.mean, norm.var\).*MidpointStack"):
        make(RevStack, Norm)
    with pytest.raises(ValueError, match=r"magnitude is 0.*backprop='store'"):
        make(FloatBDIAStack, magnitude=0)(X)
    with pytest.raises(ValueError, match="backprop is 'remat'"):
        make(RevStack, backprop="remat")(X)
