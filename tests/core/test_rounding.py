"""Half-precision blocks round where they say, so that both passes compute the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits

import bdia_jax as bdia
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.rounding import has_half_precision, pin_rounding


@jax.custom_vjp
def halve(x):
    return x / 2


halve.defvjp(lambda x: (x / 2, None), lambda _, ct: (ct / 2,))


def loop(x):
    return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) * jnp.bfloat16(1.1), x)


def scanned(x):
    return jax.lax.scan(lambda c, y: (c * y, c + y), x[0], x)[1]


def branched(x):
    return jax.lax.cond(x.sum() > 0, lambda x: jnp.exp(x) * x, lambda x: x / 3, x)


def dropped(x):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x / 0.3, 0)


def twice(x):
    inner = jax.checkpoint(lambda x: jnp.sin(x) * x)
    return jax.checkpoint(lambda x: inner(inner(x) + x))(x)


def gradient_inside(x):
    """Of a loop under checkpoint: JAX makes it a closed call."""
    energy = jax.checkpoint(lambda x: scanned(x).astype(jnp.float32).sum())
    return jax.grad(energy)(x)


def mapped(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    return jax.shard_map(lambda x: jnp.tanh(x) * x, mesh=mesh, in_specs=spec, out_specs=spec)(x)


FUNCTIONS = {
    "arithmetic": lambda x: (x * x + x / 3) * jnp.bfloat16(0.7) - x,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "relu": jax.nn.relu,
    "jit": jax.jit(lambda x: jnp.tanh(x) * x),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x) * x),
    "custom_vjp": halve,
    "nested": twice,
    "gradient": gradient_inside,
    "shard_map": mapped,
    "loop": loop,
    "scan": scanned,
    "cond": branched,
    "dropout": dropped,
    "matmul": lambda x: x @ x.T @ x,
}


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_types_and_gradients_are_the_functions(name, dtype):
    fn = FUNCTIONS[name]
    if name in ("arithmetic", "loop") and dtype == jnp.float16:
        pytest.skip("promotes bfloat16 with float16")
    x = jax.random.normal(jax.random.key(1), (8, 16)).astype(dtype)
    # op by op nothing is fused, so the rounding is what the program says
    expected = fn(x)
    got = pin_rounding(fn)(x)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-3
    )
    if name == "loop":
        return  # fori_loop has no reverse derivative here
    for run in (lambda f: f(x), lambda f: jax.jit(f)(x)):
        ours, theirs = (
            run(jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum()))
            for f in (pin_rounding(fn), fn)
        )
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=5e-2, atol=5e-2
        )


@pytest.mark.claim("half precision rounds alike in both passes")
@pytest.mark.control("half precision rounds alike in both passes")
def test_compiled_value_is_the_one_rounded_at_every_step():
    """x * 3 is rounded to bfloat16 before 1 is added; XLA alone may leave that out."""
    x = jax.random.normal(jax.random.key(0), (4096,)).astype(jnp.bfloat16)

    def fn(x):
        return (x * jnp.bfloat16(1.3)).astype(jnp.float32) + 1.0

    step_by_step = (np.asarray(x, np.float32) * np.float32(jnp.bfloat16(1.3))).astype(
        jnp.bfloat16
    ).astype(np.float32) + 1.0
    assert (np.asarray(jax.jit(pin_rounding(fn))(x)) == step_by_step).all()
    assert "reduce_precision" in jax.jit(pin_rounding(fn)).lower(x).as_text()
    assert "reduce_precision" not in jax.jit(fn).lower(x).as_text()


def test_arguments_go_by_name_and_static_ones_are_bound():
    def fn(x, how, *, scale, key):
        noise = jax.random.uniform(key, x.shape, x.dtype)
        return {"y": (x * scale["s"] + noise) if how == "up" else x}

    x, key = jnp.ones((3, 5), jnp.bfloat16) / 3, jax.random.key(0)
    scale = {"s": jnp.bfloat16(1.3)}
    pinned = jax.jit(pin_rounding(functools.partial(fn, how="up")))
    assert_same_bits(pinned(x, key=key, scale=scale)["y"], fn(x, "up", key=key, scale=scale)["y"])
    assert pin_rounding(fn).__name__ == "fn"


def test_finds_half_precision_at_any_depth():
    x32 = jnp.ones((4, 4))
    deep = jax.jit(jax.checkpoint(lambda x: jnp.sin(x.astype(jnp.bfloat16)).astype(jnp.float32)))
    assert has_half_precision(jax.make_jaxpr(deep)(x32).jaxpr)
    assert not has_half_precision(jax.make_jaxpr(jax.jit(jnp.sin))(x32).jaxpr)


@pytest.mark.full
def test_bfloat16_transformer_blocks_are_exact_without_luck():
    """At this size XLA's excess precision makes the two passes differ by ~10 quanta unpinned
    (benchmarks/drift.py, numerics bfloat16-unpinned, measures that)."""
    stack = bdia.nnx.BDIAStack(
        lambda rngs: PreNormBlock(512, 8, 512, dropout_rate=0.1, dtype=jnp.bfloat16, rngs=rngs),
        4,
        rngs=nnx.Rngs(0),
    )
    report = stack.audit(4 * jax.random.normal(jax.random.key(1), (4, 65, 512)))
    assert report.exact, report
    assert report.max_drift < 0.25, report


@pytest.mark.full
def test_flax_attention_in_bfloat16_is_exact():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(256, dtype=jnp.bfloat16, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                4, 256, dtype=jnp.bfloat16, decode=False, rngs=rngs
            )

        def __call__(self, x):
            return nnx.silu(self.attention(self.norm(x)))

    stack = bdia.nnx.BDIAStack(
        Block, 4, rngs=nnx.Rngs(0), fixed_point=bdia.FixedPoint(guard_bits=3)
    )
    report = stack.audit(jax.random.normal(jax.random.key(1), (4, 64, 256)))
    assert report.exact, report
