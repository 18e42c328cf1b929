"""The parts of models, on their own, against their equations in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from toy import relative_error
from toy_models import filled

from bdia_jax.models.attention import Attention
from bdia_jax.models.blocks import MLP, PreNormBlock, SwiGLU
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.transformer import DecoderBlock
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")

X, MEMORY = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 6, 8)), jnp.float32)


def make(cls, *sizes, **options):
    return filled(lambda: cls(*sizes, **options, rngs=nnx.Rngs(0)))


@nnx.jit
def call(module, *inputs):
    return module(*inputs)


# --- blocks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        partial(make, Attention, 8, 2),
        partial(make, MLP, 8, 12),
        partial(make, SwiGLU, 8, 12),
        partial(make, PreNormBlock, 8, 2, 12),
    ],
    ids=["attention", "mlp", "swiglu", "block"],
)
def test_every_part_returns_float32_of_the_shape_of_x(part):
    expected, h = call(part(), X), call(part(dtype=jnp.bfloat16), X)
    assert expected.shape == h.shape == X.shape
    assert expected.dtype == h.dtype == jnp.float32
    assert 1e-4 < relative_error(h, expected) < 5e-2


@pytest.mark.parametrize("cls", [PreNormBlock, DecoderBlock])
def test_a_block_is_h_of_the_pre_norm_transformer(cls):
    block = make(cls, 8, 2, 12)
    seen = (jnp.arange(6) < 3)[None, None, None]

    @nnx.jit
    def sublayers(block):
        x = X + block.attention(block.attention_norm(X))
        if cls is DecoderBlock:
            x = x + block.cross_attention(block.cross_norm(x), MEMORY, seen)
        return x + block.mlp(block.mlp_norm(x))

    def h(seen):
        return call(block, X, *((None, MEMORY, seen) if cls is DecoderBlock else ()))

    np.testing.assert_allclose(X + h(seen), sublayers(block), atol=1e-5)
    if cls is DecoderBlock:
        assert np.max(np.abs(X + h(jnp.ones_like(seen)) - sublayers(block))) > 1e-2


def by_equation(attention, k, v):
    """Of queries of X, in NumPy: softmax(q k^T / sqrt(d)) v for keys and values [B, S, D]."""
    q = np.asarray(X @ attention.query.kernel[...])
    q, k, v = (np.moveaxis(np.asarray(y).reshape(2, -1, 2, 4), 2, 1) for y in (q, k, v))
    weights = np.asarray(jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0))
    joined = np.moveaxis(weights @ v, 1, 2).reshape(2, 6, 8)
    return joined @ np.asarray(attention.out.kernel[...]) + np.asarray(attention.out.bias[...])


def test_attention_is_softmax_of_scaled_products():
    attention = make(Attention, 8, 2)
    k, v = (X @ linear.kernel[...] for linear in (attention.key, attention.value))
    np.testing.assert_allclose(attention(X), by_equation(attention, k, v), atol=1e-4)


def changed_tokens(block, at, *inputs):
    """Which outputs move when token `at` moves."""
    moved = X.at[:, at].add(1.0)
    return np.any(np.asarray(call(block, X, *inputs) != call(block, moved, *inputs)), axis=(0, 2))


def test_a_token_is_seen_by_those_behind_it_if_causal_and_by_none_if_masked():
    free = make(PreNormBlock, 8, 2, 12)
    assert changed_tokens(free, 3).all()
    causal = make(PreNormBlock, 8, 2, 12, attention=partial(Attention, is_causal=True))
    np.testing.assert_array_equal(changed_tokens(causal, 3), np.arange(6) >= 3)
    mask = (jnp.arange(6) != 3)[None, None, None]
    np.testing.assert_array_equal(changed_tokens(free, 3, mask), np.arange(6) == 3)


@pytest.mark.parametrize("cls, sizes", [(Attention, (8, 2)), (MLP, (8, 12)), (SwiGLU, (8, 12))])
def test_dropout_reaches_every_part(cls, sizes):
    part = make(cls, *sizes, dropout_rate=0.5)
    assert 0.3 < np.mean(np.asarray(part(X)) == 0) < 0.7
    part.eval()
    assert np.mean(np.asarray(part(X)) == 0) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "width 8 is not divisible by num_heads 3"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"sliding_window": 0}, "sliding_window is 0, expected None or at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(8, **({"num_heads": 2} | options), rngs=nnx.Rngs(0))


# --- Linformer -----------------------------------------------------------------------


def linformer(num_tokens=6, projected=3):
    return make(LinformerAttention, 8, 2, num_tokens=num_tokens, projected=projected)


def test_linformer_attends_to_mixtures_that_all_heads_share():
    attention = linformer()
    assert attention.project_keys.shape == attention.project_values.shape == (3, 6)
    keys = attention.project_keys[...] @ (X @ attention.key.kernel[...])  # [B, 3, D]
    values = attention.project_values[...] @ (X @ attention.value.kernel[...])
    np.testing.assert_allclose(attention(X), by_equation(attention, keys, values), atol=1e-4)


def test_linformer_starts_within_one_over_root_k_and_differs_by_block():
    attention = partial(LinformerAttention, 8, 2, num_tokens=500, projected=16)
    stack = BDIAStack(lambda rngs: attention(rngs=rngs), 2, rngs=nnx.Rngs(0))
    first, second = np.asarray(stack.blocks.project_keys[...])
    assert 0.24 < first.max() <= 0.25 and -0.25 <= first.min() < -0.24
    assert first.shape == (16, 500) and np.mean(first == second) < 0.01


def shapes_in(jaxpr):
    """The shape of every value in a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from shapes_in(inner)


def test_linformer_costs_no_tokens_by_tokens_array():
    tokens = 37  # no other dimension here
    x = jnp.ones((2, tokens, 8))

    def has_square(attention):
        graphdef, state = nnx.split(attention)
        loss = lambda state: jnp.sum(nnx.merge(graphdef, state)(x))  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, allow_int=True))(state)
        return any(shape.count(tokens) > 1 for shape in shapes_in(jaxpr.jaxpr))

    assert not has_square(linformer(tokens))
    assert has_square(make(Attention, 8, 2))


def test_linformer_refuses_other_lengths_and_masks():
    with pytest.raises(ValueError, match=r"\(2, 6, 8\), expected num_tokens = 5"):
        linformer(num_tokens=5)(X)
    with pytest.raises(ValueError, match=r"mask given.*use Attention"):
        linformer()(X, jnp.ones((1, 1, 6, 6), bool))
