"""Translations, against searching everything."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import PLAIN, at_inference, small

from bdia_jax.nnx import BDIAStack
from bdia_jax.text.translate import translate

pytestmark = pytest.mark.usefixtures("quick_compile")

SOURCE = jnp.array([[3, 4, 5, 2, 0], [5, 3, 4, 3, 2], [4, 2, 0, 0, 0]])
BOS, EOS = 1, 2


def make(stack, dtype):
    """Greedy misses the best, and not every translation ends."""
    sizes = {"vocab_size": 6, "max_len": 8, "encoder_depth": 2, "decoder_depth": 2}
    options = {"dropout_rate": 0.1, "dtype": dtype}
    return small("transformer", stack, seed=60, scale=0.2, **sizes, **options)


@pytest.fixture(scope="module")
def transformer():
    return make(PLAIN, jnp.float32)


def log_probs_of(model, source, target):
    return jax.nn.log_softmax(at_inference(model, source, target))


def score_all(model, tokens, alpha):
    """Score of each of tokens [N, max_len] for each source, by full recomputation: [B, N]."""
    target_in = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]
    scores = []
    for source in SOURCE:
        log_probs = log_probs_of(model, jnp.tile(source, (len(tokens), 1)), target_in)
        chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        total = jnp.sum(chosen * (tokens != 0), axis=1)
        scores.append(total / ((5 + jnp.sum(tokens != 0, axis=1)) / 6) ** alpha)
    return np.asarray(jnp.stack(scores))


def every_sequence(max_len):
    """All token sequences a search may return, padded: those that end, and the longest."""
    found = set()
    for tokens in itertools.product(range(1, 6), repeat=max_len):
        end = tokens.index(EOS) + 1 if EOS in tokens else max_len
        found.add(tokens[:end] + (0,) * (max_len - end))
    return jnp.array(sorted(found))


@pytest.mark.full
# with the cache sums are in another order: another bfloat16, another point of the grid
@pytest.mark.parametrize(
    "stack, dtype, tolerance", [(PLAIN, jnp.float32, 1e-4), (BDIAStack, jnp.bfloat16, 0.1)]
)
def test_a_full_beam_finds_the_best_of_all_sequences_and_greedy_does_not(stack, dtype, tolerance):
    model, sequences = make(stack, dtype), every_sequence(3)
    assert len(sequences) == 1 + 4 + 16 * 5
    for alpha in (0.0, 1.0):
        scores = score_all(model, sequences, alpha)
        find = partial(translate, model, SOURCE, 3, length_penalty=alpha)
        tokens, found = find(beam_size=36)
        np.testing.assert_array_equal(tokens, sequences[np.argmax(scores, axis=1)])
        np.testing.assert_allclose(found, scores.max(axis=1), atol=tolerance)
        _, greedy = find(beam_size=1)
        assert np.max(found - greedy) > 0.5


@pytest.mark.full
def test_a_beam_of_one_is_greedy(transformer):
    actual, _ = translate(transformer, SOURCE, 6)
    tokens = np.zeros((3, 6), np.int32)
    for i in range(6):
        target_in = np.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]
        log_probs = log_probs_of(transformer, SOURCE, jnp.asarray(target_in))
        best = 1 + np.argmax(np.asarray(log_probs)[:, i, 1:], axis=-1)
        ended = np.any(tokens == EOS, axis=1)
        tokens[:, i] = np.where(ended, 0, best)
    np.testing.assert_array_equal(actual, tokens)
    assert np.any(tokens == EOS) and np.any(tokens[:, -1] > 0)  # one ends, one does not


@pytest.mark.full
def test_the_cache_follows_the_beam(transformer):
    tokens, scores = translate(transformer, SOURCE, 6, beam_size=3)
    expected = np.stack([score_all(transformer, tokens, 0.6)[i, i] for i in range(3)])
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_translate_leaves_the_model_and_refuses(transformer):
    graphdef = nnx.split(transformer)[0]
    translate(transformer, SOURCE, 3, length_penalty=0.0)
    assert nnx.split(transformer)[0] == graphdef
    assert transformer.decoder.blocks.attention.cache is None
    assert not transformer.decoder.deterministic
    for max_len, options, message in (
        (9, {}, "max_len is 9, expected 1 to the model's 8"),
        (3, {"beam_size": 0}, "beam_size is 0"),
        (3, {"eos": 0}, "eos 0"),
    ):
        with pytest.raises(ValueError, match=message):
            translate(transformer, SOURCE, max_len, **options)
