import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits
from toy_models import filled

from bdia_jax.models.blocks import Cache
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.transformer import Transformer
from bdia_jax.nnx import BDIAStack
from bdia_jax.text.generate import beam_search, generate, sample, translate

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAIN = partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store")
PROMPT = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
KEY = jax.random.key(0)
VOCAB, NEW = 12, 5
SOURCE = jnp.array([[3, 4, 5, 2, 0], [5, 3, 4, 3, 2], [4, 2, 0, 0, 0]])
BOS, EOS = 1, 2


def small_gpt2(stack):
    return filled(
        lambda: GPT2(VOCAB, 10, width=16, depth=2, num_heads=2, mlp_dim=24, stack=stack,
                     dropout_rate=0.3, rngs=nnx.Rngs(0)),
        seed=2,  # the two likeliest tokens are never close
    )  # fmt: skip


@pytest.fixture(scope="module", params=[PLAIN, BDIAStack], ids=["plain", "bdia"])
def gpt2(request):
    return small_gpt2(request.param)


@nnx.jit
def evaluate(model, tokens):
    """Logits [B, 10, V] of tokens padded to a length of 10, without a cache, at inference."""
    model.eval()
    return model(tokens)


def logits_of(model, tokens):
    padded = jnp.pad(tokens, ((0, 0), (0, 10 - tokens.shape[1])))
    return np.asarray(evaluate(nnx.clone(model), padded)[:, : tokens.shape[1]])


# --- generate ------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_full_recomputation_and_the_model_stays(gpt2):
    before = nnx.split(nnx.clone(gpt2))
    actual = generate(gpt2, PROMPT, NEW, temperature=0)
    tokens = PROMPT
    for _ in range(NEW):
        best = np.argmax(logits_of(gpt2, tokens)[:, -1], axis=-1)
        tokens = jnp.concatenate([tokens, best[:, None]], axis=1)
    np.testing.assert_array_equal(actual, tokens)
    assert len(np.unique(np.asarray(tokens)[:, 4:])) > 2  # not one token over and over
    after = nnx.split(gpt2)
    assert before[0] == after[0]
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    for a, b in zip(*(jax.tree.leaves(state) for _, state in (before, after)), strict=True):
        assert_same_bits(*(jax.random.key_data(k) if is_key(k) else k for k in (a, b)))


def test_logits_with_a_cache_are_those_without(gpt2):
    tokens = jax.random.randint(KEY, (3, 9), 0, VOCAB)
    expected = logits_of(gpt2, tokens)
    model = nnx.clone(gpt2)
    model.eval()
    attention = model.stack.blocks.attention
    attention.cache = Cache(attention, 3, 10)
    continued = nnx.jit(lambda model, t, p: model(t, positions=p[None]))
    parts = [continued(model, tokens[:, :4], jnp.arange(4))]
    parts += [continued(model, tokens[:, i : i + 1], jnp.array([i])) for i in range(4, 9)]
    # states on the grid of 2^-9 may fall on another point of it
    tolerance = 1e-5 if gpt2.stack.fixed_point is None else 0.05
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=tolerance)
    attention.cache = Cache(attention, 3, 10)  # one that has seen nothing
    forgot = continued(model, tokens[:, 8:], jnp.array([8]))
    assert np.max(np.abs(forgot[:, 0] - expected[:, 8])) > 0.3


def test_draws_follow_the_key_the_temperature_and_top_k():
    gpt2 = small_gpt2(PLAIN)
    draw = partial(generate, gpt2, PROMPT, NEW)
    free = draw(key=KEY)
    np.testing.assert_array_equal(free, draw(key=KEY))
    assert np.any(free != draw(key=jax.random.key(1)))
    np.testing.assert_array_equal(draw(key=KEY, temperature=1e-4), draw(temperature=0))

    def rank(tokens):
        """How many tokens were likelier than the one drawn."""
        logits = logits_of(gpt2, tokens)[:, 3:-1]
        drawn = np.take_along_axis(logits, np.asarray(tokens)[:, 4:, None], axis=-1)
        return np.sum(logits > drawn, axis=-1)

    limited = [rank(draw(key=jax.random.key(i), temperature=3.0, top_k=3)) for i in range(4)]
    assert set(np.unique(limited)) == {0, 1, 2}
    assert np.max(rank(draw(key=KEY, temperature=3.0))) > 2


def test_draws_have_the_probabilities_of_the_softmax():
    model = small_gpt2(PLAIN)
    prompt = jnp.tile(PROMPT[:1], (4000, 1))
    drawn = np.asarray(generate(model, prompt, 1, key=KEY, temperature=2.0))[:, -1]
    expected = jax.nn.softmax(logits_of(model, PROMPT[:1])[0, -1] / 2.0)
    frequency = np.bincount(drawn, minlength=VOCAB) / 4000
    np.testing.assert_allclose(frequency, expected, atol=0.03)
    assert 0.1 < np.max(expected) < 0.9


def test_after_the_end_token_there_is_nothing_else():
    gpt2 = small_gpt2(PLAIN)
    free = np.asarray(generate(gpt2, PROMPT, NEW, key=KEY, temperature=2.0))
    end = int(free[0, 5])
    stopped = np.asarray(generate(gpt2, PROMPT, NEW, key=KEY, temperature=2.0, end_token=end))
    for a, b in zip(free[:, 4:], stopped[:, 4:], strict=True):
        ended = np.cumsum(a == end) > 0
        np.testing.assert_array_equal(b, np.where(ended, end, a))
    assert np.any(free != stopped)


def test_sampling_stops_once_all_have_ended():
    """The step counts its calls; sequence b ends with its token 9 at index b + 1."""
    calls = []

    def step(state, tokens, index):
        jax.debug.callback(lambda i: calls.append(int(i)), index)
        return state, jnp.zeros((2, 10))

    def choose(logits, index):
        return jnp.where(index == jnp.arange(2) + 1, 9, index)

    run = jax.jit(partial(sample, step, None, jnp.zeros((2, 10)), 6, choose, 9))
    tokens = run()
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens, [[0, 9, 9, 9, 9, 9], [0, 1, 9, 9, 9, 9]])
    assert sorted(calls) == [0, 1]


def test_generate_refuses():
    model = small_gpt2(PLAIN)
    with pytest.raises(ValueError, match=r"num_tokens is 7, expected 1 to 6"):
        generate(model, PROMPT, 7, key=KEY)
    with pytest.raises(ValueError, match=r"temperature is 1.0 and key None"):
        generate(model, PROMPT, 1)
    with pytest.raises(ValueError, match=r"temperature is -1"):
        generate(model, PROMPT, 1, key=KEY, temperature=-1)
    with pytest.raises(ValueError, match=r"top_k is 13, expected 1 to .*12"):
        generate(model, PROMPT, 1, key=KEY, top_k=13)


# --- translate -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "bdia in bfloat16"])
def transformer(request):
    options = {"plain": {"stack": PLAIN}}.get(request.param, {"dtype": jnp.bfloat16})
    return filled(
        lambda: Transformer(6, 8, width=16, encoder_depth=2, decoder_depth=2, num_heads=2,
                            mlp_dim=24, rngs=nnx.Rngs(0), **options),
        seed=60, scale=0.2,  # greedy misses the best, and not every translation ends
    )  # fmt: skip


@nnx.jit
def log_probs_of(model, source, target):
    model.eval()
    return jax.nn.log_softmax(model(source, target))


def score_all(model, tokens, alpha):
    """Score of each of tokens [N, max_len] for each source, by full recomputation: [B, N]."""
    target_in = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]
    scores = []
    for source in SOURCE:
        repeated = jnp.tile(source, (len(tokens), 1))
        log_probs = log_probs_of(nnx.clone(model), repeated, target_in)
        chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        total = jnp.sum(chosen * (tokens != 0), axis=1)
        scores.append(total / ((5 + jnp.sum(tokens != 0, axis=1)) / 6) ** alpha)
    return np.asarray(jnp.stack(scores))


def score_tolerance(model):
    """With the cache, sums are in another order: another bfloat16, another point of the grid."""
    return 1e-4 if model.dtype == jnp.float32 else 0.1


def every_sequence(max_len):
    """All token sequences a search may return, padded: those that end, and the longest."""
    found = set()
    for tokens in itertools.product(range(1, 6), repeat=max_len):
        end = tokens.index(EOS) + 1 if EOS in tokens else max_len
        found.add(tokens[:end] + (0,) * (max_len - end))
    return jnp.array(sorted(found))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_full_beam_finds_the_best_of_all_sequences_and_greedy_does_not(transformer, alpha):
    sequences = every_sequence(3)
    assert len(sequences) == 1 + 4 + 16 * 5
    scores = score_all(transformer, sequences, alpha)
    best = np.argmax(scores, axis=1)
    find = partial(translate, transformer, SOURCE, 3, length_penalty=alpha)
    tokens, found = find(beam_size=36)
    np.testing.assert_array_equal(tokens, sequences[best])
    np.testing.assert_allclose(found, scores.max(axis=1), atol=score_tolerance(transformer))
    _, greedy = find(beam_size=1)
    assert np.max(found - greedy) > 0.5


def test_a_beam_of_one_is_greedy(transformer):
    actual, _ = translate(transformer, SOURCE, 6)
    tokens = np.zeros((3, 6), np.int32)
    for i in range(6):
        target_in = np.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]
        log_probs = log_probs_of(nnx.clone(transformer), SOURCE, jnp.asarray(target_in))
        best = 1 + np.argmax(np.asarray(log_probs)[:, i, 1:], axis=-1)
        ended = np.any(tokens == EOS, axis=1)
        tokens[:, i] = np.where(ended, 0, best)
    np.testing.assert_array_equal(actual, tokens)
    assert np.any(tokens == EOS) and np.any(tokens[:, -1] > 0)  # one ends, one does not


def test_the_cache_follows_the_beam(transformer):
    tokens, scores = translate(transformer, SOURCE, 6, beam_size=3)
    expected = np.stack([score_all(transformer, tokens, 0.6)[i, i] for i in range(3)])
    np.testing.assert_allclose(scores, expected, atol=score_tolerance(transformer))


# Probabilities of pad, bos, eos, a, b. What follows depends on the first token alone: after
# "a" it is open, after "b" nearly sure. Padding is the likeliest first token.
_A, _B = 3, 4
_FIRST = jnp.array([0.5, 0.0, 0.0, 0.3, 0.2])
_AFTER = {_A: jnp.array([0.0, 0.0, 0.4, 0.3, 0.3]), _B: jnp.array([0.0, 0.0, 0.05, 0.9, 0.05])}


def memory_step(follow, first, rows, tokens, index):
    """Keeps the first token of every row; `follow` says whether it goes where its row goes."""
    first = jnp.where(index == 1, tokens, first[rows] if follow else first)
    after = jnp.where((first == _A)[:, None], _AFTER[_A], _AFTER[_B])
    return first, jnp.log(jnp.where(index == 0, _FIRST, after))


def search(beam_size, follow=True):
    start = jnp.zeros(2 * beam_size, jnp.int32)
    tokens, scores = beam_search(partial(memory_step, follow), start, 2, 4, beam_size=beam_size,
                                 length_penalty=0.0, bos=BOS, eos=EOS)  # fmt: skip
    assert np.all(np.diff(scores) <= 0)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    return tuple(tokens[0, 0].tolist()), float(jnp.exp(scores[0, 0]))


def test_beam_search_finds_what_greedy_misses_and_never_pads():
    assert search(1) == ((_A, EOS, 0, 0), pytest.approx(0.3 * 0.4))
    assert search(2) == ((_B, _A, _A, _A), pytest.approx(0.2 * 0.9**3))
    assert search(2, follow=False) != search(2)


def test_longer_sequences_gain_from_the_length_penalty():
    table = np.log([[0.2] * 4, [1e-9, 1e-9, 0.5, 0.5], [0.25] * 4, [1e-9, 1e-9, 0.8, 0.2]])

    def step(state, rows, tokens, index):
        return state, jnp.asarray(table, jnp.float32)[tokens]

    lengths = []
    for alpha in (0.0, 5.0):
        tokens, scores = beam_search(step, None, 1, 4, beam_size=8, length_penalty=alpha,
                                     bos=BOS, eos=EOS)  # fmt: skip
        lengths.append(int(jnp.sum(tokens[0, 0] != 0)))
        if alpha:
            n = lengths[-1]
            total = np.log(0.5) + np.log(0.2) * (n - 2) + np.log(0.8)
            np.testing.assert_allclose(scores[0, 0], total / ((5 + n) / 6) ** alpha, rtol=1e-5)
    assert lengths[0] == 1 and lengths[1] > 1


def test_translate_leaves_the_model_and_refuses(transformer):
    graphdef = nnx.split(transformer)[0]
    translate(transformer, SOURCE, 3)
    assert nnx.split(transformer)[0] == graphdef
    assert transformer.decoder.blocks.attention.cache is None
    assert not transformer.decoder.deterministic
    with pytest.raises(ValueError, match="max_len is 9, expected 1 to the model's 8"):
        translate(transformer, SOURCE, 9)
    with pytest.raises(ValueError, match="beam_size is 0"):
        translate(transformer, SOURCE, 3, beam_size=0)
    with pytest.raises(ValueError, match="eos 0"):
        translate(transformer, SOURCE, 3, eos=0)
