"""Derivatives of half-precision blocks: the same values, with less to hold and to move."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import assert_grads_close

from bdia_jax import bdia_scan, pin_rounding, residual_bytes, sample_gamma
from bdia_jax._block import make_block
from bdia_jax._derivatives import is_activation, with_activations
from bdia_jax._jaxprs import equations

pytestmark = pytest.mark.usefixtures("quick_compile")

GENERATOR = np.random.default_rng(0)
X, W = (jnp.asarray(GENERATOR.normal(size=shape), jnp.bfloat16) for shape in ((16, 8), (8, 8)))
gelu = partial(jax.nn.gelu, approximate=False)


def project(x, w):
    """As a projection that ends a residual branch."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def loss_of(fn):
    return lambda *args: jnp.sum(jnp.sin(fn(*args).astype(jnp.float32)))


def dtypes_of_products(fn, *args):
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(fn), argnums=(0, 1)))(*args).jaxpr
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    return [[str(jnp.dtype(var.aval.dtype)) for var in eqn.invars] for eqn in products]  # pyright: ignore


@pytest.mark.claim("products of gradients are as wide as those forward")
def test_a_wide_result_makes_no_wide_products():
    assert dtypes_of_products(pin_rounding(project), X, W) == [["bfloat16"] * 2] * 3


@pytest.mark.control("products of gradients are as wide as those forward")
def test_control_autodiff_takes_wide_ones():
    assert ["float32", "bfloat16"] in dtypes_of_products(project, X, W)


def test_the_gradient_of_a_wide_result_is_that_of_its_rounded_cotangent():
    pinned = pin_rounding(project)
    assert (pinned(X, W) == project(X, W)).all()
    ct = jnp.cos(project(X, W)).astype(jnp.bfloat16)
    by_hand = (ct @ W.T, X.T @ ct)
    for actual, expected in zip(jax.grad(loss_of(pinned), (0, 1))(X, W), by_hand, strict=True):
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_array_equal(actual.astype(jnp.float32), expected.astype(jnp.float32))


ACTIVATIONS = [gelu, jax.nn.gelu, jax.nn.silu, lambda x: x * jnp.tanh(jnp.exp(x) + 1)]


@pytest.mark.claim("an activation is held by its input")
@pytest.mark.parametrize("fn", ACTIVATIONS)
def test_an_activation_keeps_its_value_and_holds_its_input(fn):
    pinned = pin_rounding(fn)
    assert (jax.jit(pinned)(X) == fn(X)).all()  # op by op, every operation rounds
    in_float32 = jax.vmap(jax.vmap(jax.grad(fn)))(X.astype(jnp.float32))
    actual = jax.grad(lambda x: jnp.sum(pinned(x).astype(jnp.float32)))(X)
    np.testing.assert_allclose(actual.astype(jnp.float32), in_float32, atol=0.01)
    assert not residual_bytes(pinned, X)  # but its argument


@pytest.mark.parametrize(
    "inside", [jax.jit, jax.checkpoint, lambda fn: lambda x: jax.lax.map(fn, x)]
)
def test_an_activation_inside_another_transformation_is_one(inside):
    pinned = pin_rounding(inside(lambda x: gelu(x)))
    products = jax.make_jaxpr(jax.grad(loss_of(pinned)))(X).jaxpr
    in_float32 = [e for e in equations(products) if e.primitive.name == "erfc"]
    assert any(eqn.invars[0].aval.dtype == jnp.float32 for eqn in in_float32)  # pyright: ignore
    assert (pinned(X) == gelu(X)).all()


@pytest.mark.control("an activation is held by its input")
def test_control_autodiff_holds_more():
    assert sum(residual_bytes(gelu, X).values()) > 2 * X.size


def count_activations(fn, *args):
    eqns = with_activations(jax.make_jaxpr(fn)(*args)).jaxpr.eqns
    return sum(map(is_activation, eqns))


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (gelu, 1),
        (lambda x: gelu(gelu(x) @ W), 2),
        (lambda x: gelu(x) * X, 1),
        (lambda x: (gelu(x), jnp.tanh(x)), 1),
        (lambda x: (gelu(x), x.astype(jnp.float32).mean()), 1),
        (lambda x: -x * 2, 0),  # autodiff holds nothing of it
        (lambda x: gelu(x.astype(jnp.float32)), 0),
        (lambda x: x - x.mean(axis=1, keepdims=True), 0),
        (lambda x: jnp.cumsum(x, axis=0), 0),
    ],
)
def test_what_is_an_activation(fn, count):
    assert count_activations(fn, X) == count
    for actual, expected in zip(
        jax.tree.leaves(pin_rounding(fn)(X)), jax.tree.leaves(fn(X)), strict=True
    ):
        np.testing.assert_array_equal(actual.astype(jnp.float32), expected.astype(jnp.float32))


def test_they_can_be_mapped_and_differentiated_forward_and_twice():
    pinned = pin_rounding(lambda x, w: project(gelu(x), w))
    mapped = jax.vmap(pinned, (0, None))(X[:, None], W)
    assert (mapped[:, 0] == pinned(X, W)).all()
    _, tangent = jax.jvp(pinned, (X, W), (jnp.ones_like(X), jnp.zeros_like(W)))
    assert tangent.dtype == jnp.float32 and jnp.isfinite(tangent).all()
    twice = jax.grad(lambda x: jnp.sum(jax.grad(loss_of(pinned))(x, W).astype(jnp.float32)))(X)
    assert jnp.isfinite(twice.astype(jnp.float32)).all()


# --- chunks of a batch -------------------------------------------------------------------


def half(w, x):
    return (x.astype(jnp.bfloat16) @ w["kernel"].astype(jnp.bfloat16)).astype(jnp.float32) + w["b"]


def twice(w, x):
    return half(w, x) + x @ w["kernel"]


@pytest.mark.parametrize(
    ("block_fn", "cast"),
    [
        (half, [None, jnp.bfloat16]),
        (twice, [None, None]),
        ((half, half), [None, jnp.bfloat16]),
        ((half, lambda w, x: x * w["b"][:1]), [None, jnp.bfloat16]),
        ((half, twice), [None, None]),
    ],
)
def test_what_every_chunk_would_cast_is_cast_once(block_fn, cast):
    params = {"b": jnp.zeros((3, 8)), "kernel": jnp.asarray(GENERATOR.normal(size=(3, 8, 8)) / 3)}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    x, gamma = jnp.cos(X.astype(jnp.float32)), sample_gamma(jax.random.key(0), 3, len(X))
    options = {"has_aux": False, "token_chunks": 1, "per_sample": None, "is_inference": False}
    block, _ = make_block(block_fn, params, x, (), batch_chunks=4, **options)
    assert [*block.cast] == cast

    def gradient(**options):
        return jax.jit(
            jax.value_and_grad(
                lambda w: jnp.sum(jnp.sin(bdia_scan(block_fn, w, x, gamma, **options)))
            )
        )(params)

    (value, chunked), (of_store, expected) = gradient(batch_chunks=4), gradient(backprop="store")
    assert value == of_store
    assert_grads_close(chunked, expected, 0.01)
