"""The encoder-decoder: what a target token sees, padding, and the memory's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits
from toy_models import SOURCE, TARGET, VOCAB, run, small

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module", params=[pytest.param("train", marks=pytest.mark.full), "eval"])
def model(request):
    """In training mode `run` draws the same gamma in every call."""
    model = small("transformer")
    getattr(model, request.param)()
    return model


def changed(model, source=SOURCE, target=TARGET):
    """bool [B, T]: whose logits move."""
    return np.any(np.asarray(run(model, SOURCE, TARGET) != run(model, source, target)), axis=-1)


def test_a_target_token_sees_all_of_the_source_and_no_later_target(model):
    moved = changed(model, target=TARGET.at[:, 2].set(5))
    np.testing.assert_array_equal(moved[1], np.arange(5) >= 2)
    for at in (0, 3):
        assert changed(model, source=SOURCE.at[:, at].set(11)).all()


def test_what_padding_contains_changes_no_bit(model):
    graphdef, state = nnx.split(model)
    other = nnx.merge(graphdef, state, copy=True)
    other.embedding[...] = other.embedding[...].at[0].set(5.0)  # the vector of padding
    before, after = (run(each, SOURCE, TARGET) for each in (model, other))
    for sentence, length in ((0, 3), (1, 5)):  # logit 0 is padding's own
        assert_same_bits(before[sentence, :length, 1:], after[sentence, :length, 1:])
    assert np.max(np.abs(before[0, 3:, 1:] - after[0, 3:, 1:])) > 1e-2


def test_how_long_padding_is_changes_nothing(model):
    longer = run(model, jnp.pad(SOURCE, ((0, 0), (0, 3))), jnp.pad(TARGET, ((0, 0), (0, 4))))
    expected = run(model, SOURCE, TARGET)
    for sentence, length in ((0, 3), (1, 5)):
        # a longer sum may be added up in another order: equal to float32 rounding
        np.testing.assert_allclose(
            longer[sentence, :length], expected[sentence, :length], atol=1e-5
        )


def test_a_token_outside_the_vocabulary_gives_nan(model):
    for token in (VOCAB, -1):
        logits = run(model, SOURCE.at[0, 1].set(token), TARGET)
        assert np.all(np.isnan(logits[0])) and np.all(np.isfinite(logits[1]))


@pytest.mark.full
def test_every_decoder_block_sends_a_gradient_to_the_memory():
    model = small("transformer")
    x, memory = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5, 16)), jnp.float32)

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
