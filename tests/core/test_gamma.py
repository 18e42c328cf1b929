"""|gamma| = 2^-p, p from 1 to 7: of all blocks, of each block, of each sample, and as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from toy import assert_grads_close, assert_same_bits

import bdia_jax as bdia
from bdia_jax import FixedPoint
from bdia_jax.recurrence import exponent, inverse_step, step

K, B, D = 9, 4, 16
W = 0.3 * jax.random.normal(jax.random.key(0), (K, D, D))
X0 = 2 * jax.random.normal(jax.random.key(1), (B, 5, D))
BY_BLOCK = tuple(2.0 ** -(1 + k % 7) for k in range(K))


def block(w, x):
    return jnp.tanh(x @ w)


def mixed(key=2):
    """Another p for every block and sample."""
    p = jax.random.randint(jax.random.key(key), (K, B), 1, 8)
    sign = jax.random.rademacher(jax.random.key(key + 1), (K, B), jnp.float32)
    return (sign * 2.0**-p).astype(jnp.float32).at[0].set(0.0)


GAMMAS = {f"2^-{p}": bdia.sample_gamma(jax.random.key(3), K, B, 2.0**-p) for p in range(1, 8)}
GAMMAS |= {"blocks": bdia.sample_gamma(jax.random.key(3), K, B, BY_BLOCK), "mixed": mixed()}


def gradients(gamma, fixed_point, **options):
    def loss(w, x0):
        x = bdia.bdia_scan(block, w, x0, gamma, fixed_point=fixed_point, **options)
        return jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))), x

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(W, X0)


def test_the_exponent_is_read_from_the_bits():
    gamma = jnp.float32([0.5, -0.25, 2.0**-7, -(2.0**-7), 0.0, -0.0])
    assert exponent(gamma, FixedPoint(gamma_bits=7)).tolist() == [1, 2, 7, 7, 7, 7]


@pytest.mark.full
@pytest.mark.claim("every gamma is exact")
@pytest.mark.parametrize("name", GAMMAS)
def test_the_rebuild_is_exact(name):
    audit = bdia.audit(block, W, X0, GAMMAS[name], fixed_point=FixedPoint(gamma_bits=7))
    assert audit.exact and audit.invalid == 0


@pytest.mark.full
@pytest.mark.control("every gamma is exact")
def test_control_bits_of_another_gamma_do_not_rebuild_it():
    """p bits are kept for gamma = +-2^-p: fewer do not do, and that is told."""
    fixed_point = FixedPoint(gamma_bits=7)
    n_prev, n, h = jnp.arange(-64, 64), jnp.arange(128) * 1000, jnp.linspace(-3, 3, 128)
    gamma = jnp.float32(2.0**-7)
    n_next, side, _ = step(n_prev, n, h, gamma, fixed_point)
    rebuilt, *_ = inverse_step(n_next, n, h, gamma, side, fixed_point)
    assert_same_bits(rebuilt, n_prev)
    rebuilt, *_ = inverse_step(n_next, n, h, gamma, side & 63, fixed_point)
    assert (rebuilt != n_prev).any()


@pytest.mark.full
@pytest.mark.parametrize("name", ["2^-7", "blocks", "mixed"])
def test_values_and_gradients_are_those_of_store(name):
    fixed_point = FixedPoint(gamma_bits=7)
    expected, x_store = gradients(GAMMAS[name], fixed_point, backprop="store")
    found, x = gradients(GAMMAS[name], fixed_point)
    assert_same_bits(x, x_store)
    assert_grads_close(found, expected, 1e-5)


@pytest.mark.full
def test_more_gamma_bits_change_no_bit_of_the_forward_pass():
    expected = gradients(GAMMAS["2^-2"], FixedPoint(gamma_bits=2))[1]
    for gamma_bits in (3, 7):
        assert_same_bits(gradients(GAMMAS["2^-2"], FixedPoint(gamma_bits=gamma_bits))[1], expected)


def test_a_larger_gamma_has_more_guards():
    """With 7 + 1 bits kept, a gamma of 1/2 has 7 guard bits, and bears a drift of 60 quanta."""
    fixed_point = FixedPoint(gamma_bits=7)
    n_prev, n, h = jnp.arange(-64, 64), jnp.arange(128) * 10, jnp.linspace(-3, 3, 128)
    n_next, side, _ = step(n_prev, n, h, jnp.float32(0.5), fixed_point)
    off = h + 40 * 2.0**-9
    rebuilt, correction, _ = inverse_step(n_next, n, off, jnp.float32(0.5), side, fixed_point)
    assert_same_bits(rebuilt, n_prev)
    assert (correction == -60).all()


@pytest.mark.full
def test_a_schedule_compiles_once():
    traced = 0

    @jax.jit
    def run(magnitude):
        nonlocal traced
        traced += 1
        gamma = bdia.sample_gamma(jax.random.key(3), K, B, magnitude)
        return bdia.bdia_scan(block, W, X0, gamma, fixed_point=FixedPoint(gamma_bits=7))

    for name in ("2^-1", "2^-4", "2^-7"):
        expected = gradients(GAMMAS[name], FixedPoint(gamma_bits=7))[1]
        assert_same_bits(run(jnp.float32(2.0 ** int(name[2:]))), expected)
    assert traced == 1
    assert jnp.isnan(run(jnp.float32(0.3))).all()  # what cannot raise under jit


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


@pytest.mark.full
@pytest.mark.parametrize("magnitude", [list(BY_BLOCK)])
def test_a_stack_takes_a_gamma_for_each_block(magnitude):
    options = {"fixed_point": FixedPoint(gamma_bits=7), "rngs": nnx.Rngs(0)}
    stack = bdia.nnx.BDIAStack(Block, K, magnitude=magnitude, **options)
    assert stack.audit(X0).exact
    options = {"fixed_point": FixedPoint(gamma_bits=7), "deterministic": False}
    of_linen = bdia.linen.BDIAStack(nn.Dense(D), K, magnitude=magnitude, **options)
    keys = dict(zip(("params", "gamma"), jax.random.split(jax.random.key(6)), strict=True))
    params = of_linen.init(keys, X0)
    assert of_linen.audit(params, X0, rngs=keys).exact


@pytest.mark.full
def test_a_stack_takes_a_schedule():
    stack = bdia.nnx.BDIAStack(Block, K, fixed_point=FixedPoint(gamma_bits=7), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(stack)

    @jax.jit
    def run(magnitude):
        stack = nnx.merge(graphdef, state)
        stack.magnitude = magnitude
        return stack(X0, rngs=nnx.Rngs(5))

    stack.magnitude = 2.0**-5
    assert_same_bits(run(jnp.float32(2.0**-5)), jax.jit(lambda: stack(X0, rngs=nnx.Rngs(5)))())


@pytest.mark.parametrize(
    ("magnitude", "gamma_bits", "message"),
    [
        (0.25, 1, "magnitude is 0.25.*gamma_bits=1 needs 0.5;"),
        (0.3, 3, r"magnitude is 0.3.*gamma_bits=3 needs 0.125 \(or 0.25, .. 0.5\)"),
        ((0.5,) * 8 + (2.0**-4,), 3, "gamma_bits=3 needs 0.125"),
        ((0.5, 0.25), 3, r"magnitude has shape \(2,\), .* one for each of 9 blocks"),
    ],
)
def test_a_magnitude_that_does_not_fit_is_refused(magnitude, gamma_bits, message):
    options = {"fixed_point": FixedPoint(gamma_bits=gamma_bits), "rngs": nnx.Rngs(0)}
    stack = bdia.nnx.BDIAStack(Block, K, magnitude=magnitude, **options)
    with pytest.raises(ValueError, match=message):
        stack(X0)


def test_an_unused_first_magnitude_may_be_anything():
    gamma = bdia.sample_gamma(jax.random.key(0), 3, B, (0.7, 0.5, 0.25))
    np.testing.assert_array_equal(jnp.abs(gamma).max(1), [0, 0.5, 0.25])
