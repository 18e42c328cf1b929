"""Two blocks in a loop's body, as on a GPU, are as one."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from toy import assert_grads_close, assert_same_bits

import bdia_jax as bdia
from bdia_jax._loop import scan_blocks
from bdia_jax.compiled import targets


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if it were: what the loop asks before it is traced."""

    def become():
        monkeypatch.setattr(targets, "default_device", lambda: SimpleNamespace(platform="gpu"))

    return become


def raw(tree):
    """With keys as their numbers."""
    is_key = partial(jnp.issubdtype, arg2=jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x.dtype) else x, tree)


def rotating(carry, inputs):
    (a, b), (x, key) = carry, inputs
    drawn = jax.random.uniform(key, b.shape)
    return (b, a + x * b), {"seen": b + drawn, "key": key, "sign": b > 0}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_it_is_lax_scan(on_a_gpu, depth, reverse):
    xs = jnp.arange(1.0, depth + 1), jax.random.split(jax.random.key(0), depth)
    init = jnp.ones(3), jnp.full(3, 2.0)
    expected = jax.jit(partial(jax.lax.scan, rotating, reverse=reverse))(init, xs)
    on_a_gpu()
    found = jax.jit(partial(scan_blocks, rotating, reverse=reverse))(init, xs)
    jax.tree.map(assert_same_bits, raw(found), raw(expected))


@pytest.mark.full
@pytest.mark.claim("a loop of two blocks changes no bit")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"verify": False},
        {"batch_chunks": 2},
        {"batch_chunks": 2, "verify": False},
        {"token_chunks": 2, "failures": jnp.zeros(5)},
    ],
)
def test_the_value_is_the_same_bits_and_gradients_are_but_for_sums(on_a_gpu, options):
    (grads, x), (expected, x_of_one) = outcomes(on_a_gpu, options)
    assert_same_bits(x, x_of_one)
    assert_grads_close(grads, expected, 1e-6)


@pytest.mark.full
@pytest.mark.control("a loop of two blocks changes no bit")
def test_control_another_gamma_changes_them(on_a_gpu):
    (grads, x), (expected, x_of_one) = outcomes(on_a_gpu, {}, seeds=(2, 3))
    with pytest.raises(AssertionError):
        assert_same_bits(x, x_of_one)
    with pytest.raises(AssertionError):
        assert_grads_close(grads, expected, 1e-6)


def outcomes(on_a_gpu, options, seeds=(2, 2)):
    """(gradients, x_K) with one block in the loop, and with two."""
    w = 0.1 * jax.random.normal(jax.random.key(0), (5, 16, 16))
    x0 = jax.random.normal(jax.random.key(1), (4, 6, 16))
    shift = jax.random.normal(jax.random.key(4), (16,))

    def run(seed):
        gamma = bdia.sample_gamma(jax.random.key(seed), depth=5, batch_size=4)

        def loss(w, x0, shift):
            # another function each time: a trace is kept for each
            block = partial(lambda w, x, shift: jnp.tanh(x @ w + shift))
            x = bdia.bdia_scan(block, w, x0, gamma, shift, **options)
            return jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))), x

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(w, x0, shift)

    one = run(seeds[0])
    on_a_gpu()
    return one, run(seeds[1])
