"""Memory on the CPU: temp bytes of the compiled gradient, and residuals of the vjp.

Nothing here runs a block: programs are lowered and compiled for abstract shapes.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from bdia_jax import FixedPoint, bdia_scan

BATCH, TOKENS, WIDTH, HIDDEN = 4, 32, 64, 256
STATE = BATCH * TOKENS * WIDTH


def mlp_block(params, x):
    return jax.nn.gelu(x @ params["w_in"]) @ params["w_out"]


def abstract_inputs(depth):
    """(params, x0, gamma)."""
    params = {"w_in": (depth, WIDTH, HIDDEN), "w_out": (depth, HIDDEN, WIDTH)}
    shapes = params, (BATCH, TOKENS, WIDTH), (depth, BATCH)
    is_shape = lambda leaf: isinstance(leaf, tuple) and isinstance(leaf[0], int)  # noqa: E731
    to_abstract = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return jax.tree.map(to_abstract, shapes, is_leaf=is_shape)


def plain_checkpoint_scan(params, x0, gamma):
    """What a JAX user writes today: x = x + block(x) under jax.checkpoint."""
    del gamma
    body = jax.checkpoint(lambda x, p: (x + mlp_block(p, x), None), prevent_cse=False)
    return jax.lax.scan(body, x0, params)[0]


def bdia(backprop, fixed_point=FixedPoint()):
    return functools.partial(bdia_scan, mlp_block, fixed_point=fixed_point, backprop=backprop)


@functools.cache
def lowered(forward, depth):
    loss = lambda params, x0, gamma: jnp.sum(forward(params, x0, gamma) ** 2)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss)).lower(*abstract_inputs(depth))


@functools.cache
def temp_bytes(forward, depth) -> int:
    return lowered(forward, depth).compile().memory_analysis().temp_size_in_bytes


def bytes_per_block(forward) -> float:
    return (temp_bytes(forward, 24) - temp_bytes(forward, 8)) / 16


# one object each, so that programs are compiled once
REVERSIBLE, REMAT, STORE = bdia("reversible"), bdia("remat"), bdia("store")


@pytest.mark.claim("an added block costs its packed bits")
@pytest.mark.parametrize(
    ("gamma_bits", "guard_bits"),
    [
        (1, 1),
        pytest.param(1, 0, marks=pytest.mark.full),
        pytest.param(2, 3, marks=pytest.mark.full),
        pytest.param(3, 5, marks=pytest.mark.full),
    ],
)
def test_an_added_block_costs_its_side_bits(gamma_bits, guard_bits):
    fp = FixedPoint(gamma_bits=gamma_bits, guard_bits=guard_bits)
    slope = bytes_per_block(REVERSIBLE if fp == FixedPoint() else bdia("reversible", fp))
    kept = STATE * fp.side_bits / 8 + 2 * 4 * BATCH  # and a row of gamma, and of checksums
    assert abs(slope / kept - 1) < 0.02


@pytest.mark.control("an added block costs its packed bits")
@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(REMAT, id="remat"),
        pytest.param(plain_checkpoint_scan, id="plain", marks=pytest.mark.full),
    ],
)
def test_a_block_under_checkpoint_costs_one_float32_state(forward):
    assert abs(bytes_per_block(forward) / (4 * STATE) - 1) < 0.02
    # and beyond a few blocks the reversible program is smaller (at 8 not yet for every XLA)
    assert temp_bytes(REVERSIBLE, 16) < temp_bytes(forward, 16)


@pytest.mark.full
def test_plain_autodiff_costs_many_states_a_block():
    assert bytes_per_block(STORE) > 8 * 4 * STATE


def residual_bytes(forward, depth):
    """What jax.vjp holds for the backward pass, beyond parameters and gamma."""
    params, x0, gamma = abstract_inputs(depth)

    def vjp(params, x0, gamma):
        return jax.vjp(lambda p, x: forward(p, x, gamma), params, x0)[1]

    leaves = jax.tree.leaves(jax.eval_shape(vjp, params, x0, gamma))
    inputs = jax.tree.leaves((params, gamma))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) - 4 * sum(
        leaf.size for leaf in inputs
    )


@pytest.mark.claim("residuals are two states and the side bits")
@pytest.mark.control("residuals are two states and the side bits")
def test_the_residuals_are_two_states_and_the_side_bits():
    side = STATE * 2 // 8 + 4 * BATCH  # with the checksums
    assert residual_bytes(REVERSIBLE, 48) - residual_bytes(REVERSIBLE, 8) == 40 * side
    # and whatever JAX holds for the choice between x_K and NaN: at most one state
    rest = residual_bytes(REVERSIBLE, 48) - 48 * side - 2 * 4 * STATE
    assert 0 <= rest <= 4 * STATE + 64
    store = residual_bytes(STORE, 48) - residual_bytes(STORE, 8)
    assert store > 40 * 8 * 4 * STATE  # the control


@pytest.mark.claim("the program does not grow with depth")
@pytest.mark.parametrize(
    "forward", [REVERSIBLE, REMAT, STORE], ids=["reversible", "remat", "store"]
)
def test_the_program_does_not_grow_with_depth(forward):
    # compile time follows the size of the program; measured in seconds it would be noise
    short, long = (lowered(forward, depth).as_text() for depth in (8, 512))
    assert short.count("\n") == long.count("\n")
    assert abs(len(long) / len(short) - 1) < 0.02  # the digits of K


@pytest.mark.control("the program does not grow with depth")
def test_an_unrolled_loop_grows_with_depth():
    def unrolled(params, x0, gamma):
        for k in range(gamma.shape[0]):
            x0 = x0 + mlp_block(jax.tree.map(lambda leaf: leaf[k], params), x0)  # noqa: B023
        return x0

    short, long = (lowered(unrolled, depth).as_text().count("\n") for depth in (8, 16))
    assert long > 1.7 * short
