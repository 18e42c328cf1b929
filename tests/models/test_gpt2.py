from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error
from toy_models import filled, without_key_bias

from bdia_jax.models.gpt2 import GPT2
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
PLAIN = partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store")
SMALL = {"vocab_size": 23, "max_len": 8, "width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24}
TOKENS = jax.random.randint(jax.random.key(0), (3, 7), 0, 23)


def small_gpt2(stack=BDIAStack, **options):
    return filled(lambda: GPT2(**(SMALL | options), stack=stack, rngs=nnx.Rngs(0)))


@nnx.jit
def run(model, tokens, positions=None, mask=None):
    return model(tokens, positions=positions, mask=mask, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def plain():
    return small_gpt2(PLAIN)


# --- the architecture ----------------------------------------------------------------


def test_the_default_is_the_model_of_124_million_parameters():
    model = nnx.eval_shape(lambda: GPT2(rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 124_439_808


def reference_logits(model, tokens, gelu):
    """GPT-2 in NumPy, after its published description."""
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    blocks = state["stack"]["blocks"]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def attention(x, p, heads=2):
        batch, length, width = x.shape
        q, k, v = (
            np.moveaxis(linear(x, p[name]).reshape(batch, length, heads, -1), 2, 1)
            for name in ("query", "key", "value")
        )
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)
        weights = np.exp(np.where(np.tri(length, dtype=bool), logits, -np.inf))
        attended = weights / weights.sum(-1, keepdims=True) @ v
        return linear(np.moveaxis(attended, 1, 2).reshape(x.shape), p["out"])

    x = state["embedding"][tokens] + state["positions"][: tokens.shape[1]]
    for k in range(3):
        p = jax.tree.map(lambda leaf, k=k: leaf[k], blocks)
        x = x + attention(norm(x, p["attention_norm"]), p["attention"])
        hidden = gelu(linear(norm(x, p["mlp_norm"]), p["mlp"]["hidden"]))
        x = x + linear(hidden, p["mlp"]["out"])
    return norm(x, state["norm"]) @ state["embedding"].T


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_the_plain_model_is_gpt2(plain):
    actual = run(plain, TOKENS)
    tokens = np.asarray(TOKENS)
    assert relative_error(actual, reference_logits(plain, tokens, tanh_gelu)) < 5e-6
    exact_gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=False))  # noqa: E731
    assert relative_error(actual, reference_logits(plain, tokens, exact_gelu)) > 1e-5


def test_projections_that_end_a_branch_start_smaller():
    model = GPT2(200, 50, width=64, depth=8, num_heads=2, mlp_dim=96, rngs=nnx.Rngs(0))
    block = model.stack.blocks
    for kernel in (model.embedding, model.positions, block.attention.query.kernel,
                   block.attention.value.kernel, block.mlp.hidden.kernel):  # fmt: skip
        assert np.std(kernel[...]) == pytest.approx(0.02, rel=0.05)
    for kernel in (block.attention.out.kernel, block.mlp.out.kernel):
        assert np.std(kernel[...]) == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("stack", [PLAIN, BDIAStack], ids=["plain", "bdia"])
def test_bfloat16_is_close_and_returns_float32(stack):
    logits = {d: run(small_gpt2(stack, dtype=d), TOKENS) for d in (jnp.float32, jnp.bfloat16)}
    assert all(value.dtype == jnp.float32 for value in logits.values())
    error = relative_error(logits[jnp.bfloat16], logits[jnp.float32])
    assert 1e-4 < error < 3e-2


# --- what a token sees ---------------------------------------------------------------


def test_no_token_sees_a_later_one(plain):
    moved = TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 23)
    changed = np.any(np.asarray(run(plain, TOKENS) != run(plain, moved)), axis=(0, 2))
    np.testing.assert_array_equal(changed, np.arange(7) >= 4)


def test_packed_documents_are_what_they_are_alone(plain):
    document = jnp.array([0, 0, 0, 1, 1, 1, 1])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3]])
    mask = (document[:, None] == document)[None, None]
    alone = run(plain, TOKENS[:, 3:])
    np.testing.assert_allclose(run(plain, TOKENS, positions, mask)[:, 3:], alone, atol=1e-5)
    ordinary = jnp.arange(7)[None]
    for p, m in ((ordinary, mask), (positions, jnp.ones_like(mask))):
        assert np.max(np.abs(run(plain, TOKENS, p, m)[:, 3:] - alone)) > 0.1


def test_a_token_outside_the_vocabulary_gives_nan(plain):
    for token in (23, -1):
        logits = run(plain, TOKENS.at[1, 3].set(token))
        assert np.all(np.isnan(logits[1])) and np.all(np.isfinite(logits[::2]))


def test_more_tokens_than_positions_are_refused(plain):
    with pytest.raises(ValueError, match=r"\(1, 9\).*max_len 8"):
        plain(jnp.zeros((1, 9), jnp.int32))


def test_a_stack_that_widens_is_refused():
    class Wide(BDIAStack):
        def out_features(self, width):
            return 2 * width

    with pytest.raises(ValueError, match=r"returns 32 features.*embedding has 16"):
        small_gpt2(Wide)


# --- training ------------------------------------------------------------------------


def gradient(stack):
    def loss(model):
        return jnp.mean(jnp.sin(model(TOKENS, rngs=nnx.Rngs(1))))

    return without_key_bias(nnx.jit(nnx.grad(loss))(small_gpt2(stack)))


def test_reversible_gradients_equal_stored_ones():
    assert_grads_close(gradient(BDIAStack), gradient(partial(BDIAStack, backprop="store")), F32)


@jax.custom_vjp
def drifting(h):
    """h, off by five quanta in the backward pass."""
    return h


drifting.defvjp(lambda h: (h + 0.01, None), lambda _, ct: (ct,))


class Drifting(nnx.Module):
    def __init__(self, block):
        self.block = block

    def __call__(self, x, mask=None):
        return drifting(self.block(x, mask))


def test_the_rebuild_is_exact_and_the_audit_would_see_if_not(optimized):
    model = small_gpt2(depth=5)
    x = model.embedding[...][TOKENS]
    assert model.stack.audit(x, None).exact

    def drifting_stack(make_block, depth, rngs):
        return BDIAStack(lambda rngs: Drifting(make_block(rngs)), depth, rngs=rngs)

    assert not small_gpt2(drifting_stack, depth=5).stack.audit(x, None).exact


def test_rngs_decide_gamma_and_eval_needs_none():
    model = small_gpt2()
    assert_same_bits(run(model, TOKENS), run(model, TOKENS))
    assert np.any(run(model, TOKENS) != model(TOKENS, rngs=nnx.Rngs(2)))
    model.eval()
    assert_same_bits(run(model, TOKENS), run(model, TOKENS))
    plain = small_gpt2(PLAIN)
    error = relative_error(run(model, TOKENS), run(plain, TOKENS))
    assert 0 < error < 1e-2
