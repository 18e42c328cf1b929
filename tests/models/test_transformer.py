from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error
from toy_models import filled

from bdia_jax.models.transformer import DecoderBlock, Transformer
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
STORE = partial(BDIAStack, backprop="store")
SMALL = {"vocab_size": 17, "max_len": 9, "width": 16, "encoder_depth": 3, "decoder_depth": 3,
         "num_heads": 2, "mlp_dim": 24, "dropout_rate": 0.0}  # fmt: skip
SOURCE = jnp.array([[3, 4, 5, 2, 0, 0], [6, 7, 8, 9, 10, 2]])
TARGET = jnp.array([[1, 11, 12, 0, 0], [1, 13, 14, 15, 16]])


def small_transformer(stack=BDIAStack, **options):
    return filled(lambda: Transformer(**(SMALL | options), stack=stack, rngs=nnx.Rngs(0)))


@nnx.jit
def run(model, source=SOURCE, target=TARGET):
    return model(source, target, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module", params=["train", "eval"])
def model(request):
    """In training mode `run` draws the same gamma in every call."""
    model = small_transformer()
    getattr(model, request.param)()
    return model


# --- the architecture ----------------------------------------------------------------


def test_the_default_has_the_parameters_its_dimensions_say():
    model = nnx.eval_shape(lambda: Transformer(1000, 64, rngs=nnx.Rngs(0)))
    d, mlp = 512, 2048
    norm, attention = 2 * d, 4 * d * d + d
    feed_forward = (d * mlp + mlp) + (mlp * d + d)
    encoder = 6 * (2 * norm + attention + feed_forward) + norm
    decoder = 6 * (3 * norm + 2 * attention + feed_forward) + norm
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert counted == 1000 * d + encoder + decoder


def test_the_decoder_block_is_h_of_the_pre_norm_decoder():
    block = filled(lambda: DecoderBlock(8, 2, 12, rngs=nnx.Rngs(0)))
    x0, memory = jax.random.normal(jax.random.key(0), (2, 2, 5, 8))
    mask = (jnp.arange(5) < 3)[None, None, None]

    @nnx.jit
    def sublayers(block):
        x = x0 + block.attention(block.attention_norm(x0))
        x = x + block.cross_attention(block.cross_norm(x), memory, mask)
        return x + block.mlp(block.mlp_norm(x))

    h = nnx.jit(lambda block, mask: block(x0, None, memory, mask))
    np.testing.assert_allclose(x0 + h(block, mask), sublayers(block), atol=1e-5)
    seen = jnp.ones_like(mask)
    assert np.max(np.abs(x0 + h(block, seen) - sublayers(block))) > 1e-2


def test_the_plain_model_is_the_loop_over_its_blocks():
    model = small_transformer(partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store"))
    table = np.asarray(model.embedding[...])
    frequency = 10_000.0 ** (-np.arange(8) / 8)

    def embed(tokens):
        angle = np.arange(tokens.shape[1])[:, None] * frequency
        return 4.0 * table[tokens] + np.concatenate([np.sin(angle), np.cos(angle)], 1)

    def loop(stack, x, *consts):
        graphdef, state = nnx.split(stack.blocks)
        for k in range(3):
            x = x + nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state))(x, *consts)
        return x

    @nnx.jit
    def logits(model):
        see_source, see_target = ((t != 0)[:, None, None] for t in (SOURCE, TARGET))
        memory = model.encoder_norm(loop(model.encoder, embed(SOURCE), see_source))
        x = loop(model.decoder, embed(TARGET), see_target, memory, see_source)
        return model.decoder_norm(x) @ table.T

    assert relative_error(run(model), logits(model)) < 1e-6


def test_bfloat16_is_close_and_returns_float32():
    logits = run(small_transformer(dtype=jnp.bfloat16))
    assert logits.shape == (2, 5, 17) and logits.dtype == jnp.float32
    assert 1e-4 < relative_error(logits, run(small_transformer())) < 5e-2


# --- what a token sees ---------------------------------------------------------------


def changed(model, source=SOURCE, target=TARGET):
    """bool [B, T]: whose logits move."""
    return np.any(np.asarray(run(model) != run(model, source, target)), axis=-1)


def test_no_target_token_sees_a_later_one(model):
    moved = changed(model, target=TARGET.at[:, 2].set(5))
    np.testing.assert_array_equal(moved[1], np.arange(5) >= 2)


def test_every_target_token_sees_every_source_token(model):
    for at in (0, 3):
        assert changed(model, source=SOURCE.at[:, at].set(11)).all()


def test_what_padding_contains_changes_no_bit(model):
    graphdef, state = nnx.split(model)
    other = nnx.merge(graphdef, state, copy=True)
    other.embedding[...] = other.embedding[...].at[0].set(5.0)  # the vector of padding
    before, after = run(model), run(other)
    for sentence, length in ((0, 3), (1, 5)):  # logit 0 is padding's own
        assert_same_bits(before[sentence, :length, 1:], after[sentence, :length, 1:])
    assert np.max(np.abs(before[0, 3:, 1:] - after[0, 3:, 1:])) > 1e-2


def test_how_long_padding_is_changes_nothing(model):
    longer = run(model, jnp.pad(SOURCE, ((0, 0), (0, 3))), jnp.pad(TARGET, ((0, 0), (0, 4))))
    for sentence, length in ((0, 3), (1, 5)):
        expected = run(model)[sentence, :length]
        # a longer sum may be added up in another order: equal to float32 rounding
        np.testing.assert_allclose(longer[sentence, :length], expected, atol=1e-5)


def test_refusals():
    model = small_transformer()
    with pytest.raises(ValueError, match=r"\(2, 10\).*max_len 9"):
        model(jnp.ones((2, 10), jnp.int32), TARGET)
    with pytest.raises(ValueError, match="width is 15"):
        small_transformer(width=15)


def test_a_token_outside_the_vocabulary_gives_nan(model):
    for token in (17, -1):
        logits = run(model, SOURCE.at[0, 1].set(token))
        assert np.all(np.isnan(logits[0])) and np.all(np.isfinite(logits[1]))


# --- training ------------------------------------------------------------------------


def gradient(stack):
    def loss(model):
        logits = model(SOURCE, TARGET, rngs=nnx.Rngs(1))
        return jnp.mean(jnp.sin(logits) * (TARGET != 0)[..., None])

    grads = nnx.jit(nnx.grad(loss))(small_transformer(stack))
    assert {"encoder", "decoder"} < set(grads)
    return jax.tree.leaves(grads)


def test_reversible_gradients_equal_stored_ones_through_both_stacks():
    assert_grads_close(gradient(BDIAStack), gradient(STORE), F32)


def test_every_decoder_block_sends_a_gradient_to_the_memory():
    model = small_transformer()
    x, memory = jax.random.normal(jax.random.key(0), (2, 2, 5, 16))

    @nnx.jit
    def memory_gradient(model, on):
        """With the cross-attention of only some of the blocks switched on."""
        out = model.decoder.blocks.cross_attention.out
        out.kernel[...] = out.kernel[...] * on[:, None, None]

        def loss(memory):
            return jnp.sum(jnp.sin(model.decoder(x, None, memory, None, rngs=nnx.Rngs(1))))

        return jnp.linalg.norm(jax.grad(loss)(memory))

    def norm(on):
        return memory_gradient(nnx.clone(model), jnp.array(on, jnp.float32))

    for block in np.eye(3):
        assert norm(block) > 1e-2
    assert norm(np.zeros(3)) == 0


def test_the_rebuild_of_the_decoder_is_exact(optimized):
    model = small_transformer(decoder_depth=5)
    see_source, see_target = ((t != 0)[:, None, None] for t in (SOURCE, TARGET))
    y, memory = model.embedding[...][TARGET], model.embedding[...][SOURCE]
    assert model.decoder.audit(y, see_target, memory, see_source).exact
