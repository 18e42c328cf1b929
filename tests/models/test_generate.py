"""Generated tokens, against recomputing all of them, searching everything, and transformers."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits
from toy_models import PLAIN, at_inference, small

from bdia_jax.nnx import BDIAStack
from bdia_jax.text.generate import generate, generate_beam

pytestmark = pytest.mark.usefixtures("quick_compile")
FULL = pytest.mark.full

PROMPT = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
KEY = jax.random.key(0)
VOCAB, NEW = 12, 5


def small_gpt2(stack=PLAIN, seed=2, **options):
    """By default the two likeliest tokens are never close."""
    sizes = {"vocab_size": VOCAB, "max_len": 10, "depth": 2, "dropout_rate": 0.3}
    return small("gpt2", stack, seed=seed, **(sizes | options))


def small_llama(**options):
    sizes = {"vocab_size": VOCAB, "max_len": 16, "depth": 2, "head_dim": 6, "rope_theta": 10000.0}
    return small("llama", PLAIN, seed=2, **(sizes | options))


@pytest.fixture(scope="module")
def gpt2():
    return small_gpt2()


def logits_of(model, tokens):
    """By one program for all lengths."""
    padded = jnp.pad(tokens, ((0, 0), (0, 10 - tokens.shape[1])))
    return np.asarray(at_inference(model, padded)[:, : tokens.shape[1]])


# --- generate ------------------------------------------------------------------------


@pytest.mark.claim("decoding with a cache is the model's own")
@pytest.mark.parametrize(
    "make", [partial(small_gpt2, BDIAStack), small_llama, pytest.param(small_gpt2, marks=FULL)]
)
def test_greedy_tokens_are_those_of_full_recomputation_and_the_model_stays(make):
    model = make()
    before = nnx.split(nnx.clone(model))
    actual = generate(model, PROMPT, NEW, temperature=0)
    tokens = PROMPT
    for _ in range(NEW):
        best = np.argmax(logits_of(model, tokens)[:, -1], axis=-1)
        tokens = jnp.concatenate([tokens, best[:, None]], axis=1)
    np.testing.assert_array_equal(actual, tokens)
    assert len(np.unique(np.asarray(tokens)[:, 4:])) > 2  # not one token over and over
    after = nnx.split(model)
    assert before[0] == after[0]
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    for a, b in zip(*(jax.tree.leaves(state) for _, state in (before, after)), strict=True):
        assert_same_bits(*(jax.random.key_data(k) if is_key(k) else k for k in (a, b)))


@pytest.mark.full
def test_draws_follow_the_key_the_temperature_and_top_k(gpt2):
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


def test_draws_have_the_probabilities_of_the_softmax(gpt2):
    prompt = jnp.tile(PROMPT[:1], (4000, 1))
    drawn = np.asarray(generate(gpt2, prompt, 1, key=KEY, temperature=2.0))[:, -1]
    expected = jax.nn.softmax(logits_of(gpt2, PROMPT[:1])[0, -1] / 2.0)
    frequency = np.bincount(drawn, minlength=VOCAB) / 4000
    np.testing.assert_allclose(frequency, expected, atol=0.03)
    assert 0.1 < np.max(expected) < 0.9


def test_after_the_end_token_there_is_nothing_else(gpt2):
    draw = partial(generate, gpt2, PROMPT, NEW, key=KEY, temperature=2.0)
    free = np.asarray(draw())
    ends = [int(free[0, 5]), int(free[1, 4])]  # of which the first fills
    stopped = np.asarray(draw(end_token=ends))
    for a, b in zip(free[:, 4:], stopped[:, 4:], strict=True):
        is_end = np.isin(a, ends)
        behind = np.cumsum(is_end) - is_end > 0
        np.testing.assert_array_equal(b, np.where(behind, ends[0], a))
    assert np.any(free != stopped) and ends[1] in stopped[1]


@pytest.mark.full
def test_no_samples_and_no_tokens(gpt2):
    none = jnp.zeros((0, 4), jnp.int32)
    assert generate(gpt2, none, 3, key=KEY).shape == (0, 7)
    assert at_inference(gpt2, none).shape[:2] == (0, 4)
    assert at_inference(gpt2, none.T).shape[:2] == (4, 0)
    with pytest.raises(ValueError, match=r"prompt has shape \(4, 0\), expected a token"):
        generate(gpt2, none.T, 3)


@pytest.mark.parametrize(
    "num_tokens, options, message",
    [
        (7, {"key": KEY}, "num_tokens is 7, expected 1 to 6"),
        (1, {}, "temperature is 1.0 and key None"),
        (1, {"key": KEY, "temperature": -1}, "temperature is -1"),
        (1, {"key": KEY, "top_k": 13}, "top_k is 13, expected 1 to .*12"),
    ],
)
def test_generate_refuses(gpt2, num_tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt2, PROMPT, num_tokens, **options)


# --- left padding --------------------------------------------------------------------

END = 8  # token 0 is a token like any other
LONG, SHORT = [3, 1, 4, 1, 5], [2, 6]
LENGTHS = jnp.array([5, 2])
PADDED = jnp.array([LONG, [7, 7, 7, *SHORT]])


def beam_gpt2(vocab_size=9):
    return small_gpt2(seed=3, vocab_size=vocab_size, max_len=16, dropout_rate=0.0)


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["gpt2", pytest.param("llama", marks=FULL)], ids=["greedy", "beam"]
)
def test_a_padded_batch_continues_each_prompt_as_if_alone(name):
    if name == "gpt2":
        run = partial(generate, beam_gpt2(), num_tokens=5, temperature=0)
        find = lambda *args, **lengths: (run(*args, **lengths)[:, -5:], jnp.zeros(2))  # noqa: E731
    else:
        model = small_llama(vocab_size=9)
        search = {"num_tokens": 5, "beam_size": 3, "end_token": END, "no_repeat_ngram": 2}
        find = partial(generate_beam, model, **search)
    tokens, scores = find(PADDED, prompt_lengths=LENGTHS)
    for i, prompt in enumerate((LONG, SHORT)):
        alone, score_alone = find(jnp.array([prompt]))
        np.testing.assert_array_equal(tokens[i], alone[0])
        np.testing.assert_allclose(scores[i], score_alone[0], atol=1e-4)
    seen, _ = find(PADDED, prompt_lengths=jnp.array([5, 5]))  # padding taken for tokens
    np.testing.assert_array_equal(seen[0], tokens[0])
    assert np.any(seen[1] != tokens[1])


# --- beam search ---------------------------------------------------------------------


def score(model, prompt, tokens, end, alpha):
    """Log-probability / n^alpha of each of tokens [N, T] behind the prompt, evaluated at once."""
    whole = jnp.concatenate([jnp.tile(jnp.array(prompt), (len(tokens), 1)), tokens], axis=1)
    after = jax.nn.log_softmax(at_inference(model, whole))[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(np.asarray(after), np.asarray(tokens)[..., None], axis=-1)[..., 0]
    ended = np.cumsum(tokens == end, axis=1) - (tokens == end) > 0
    return np.sum(chosen * ~ended, axis=1) / np.sum(~ended, axis=1) ** alpha


def repeats(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


def every_sequence(vocab_size, end, length):
    """All that a search may return: those that end, filled with `end`, and the longest."""
    found = set()
    for tokens in itertools.product(range(vocab_size), repeat=length):
        stop = tokens.index(end) + 1 if end in tokens else length
        found.add(tokens[:stop] + (end,) * (length - stop))
    return sorted(found)


@pytest.mark.full
@pytest.mark.parametrize(
    ("n", "of_prompt"), [(2, True), pytest.param(0, True, marks=FULL), (1, False)]
)
def test_a_full_beam_finds_the_best_of_all_sequences(n, of_prompt):
    model, prompt, end = beam_gpt2(vocab_size=5), [2, 0, 2], 4
    every = every_sequence(5, end, 3)
    assert len(every) == 1 + 4 + 16 * 5
    real = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in every]
    before = prompt if of_prompt else []  # whose n-grams count
    allowed = [not n or not repeats([*before, *tokens], n) for tokens in real]
    assert sum(allowed) > 0 and (sum(allowed) < len(every)) == (n > 0)
    options = {"beam_size": 25, "end_token": end, "early_stopping": "never"}
    ngrams = {"no_repeat_ngram": n, "ngrams_of_prompt": of_prompt}
    found = []
    for alpha in (0.0, 0.9, 4.0):
        scores = np.where(allowed, score(model, prompt, np.array(every), end, alpha), -np.inf)
        tokens, found_score = generate_beam(
            model, jnp.array([prompt]), 3, length_penalty=alpha, **options, **ngrams
        )
        assert tuple(tokens[0].tolist()) == every[np.argmax(scores)]
        np.testing.assert_allclose(found_score[0], scores.max(), atol=1e-4)
        found.append(tuple(tokens[0].tolist()))
    assert len(set(found)) > 1  # the length penalty matters


@pytest.mark.full
@pytest.mark.parametrize(
    ("early_stopping", "ends"), [(False, [END]), (True, [END]), (False, [END, 3]), (True, [2, END])]
)
def test_tokens_and_scores_are_those_of_transformers(early_stopping, ends, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    from bdia_jax import interop

    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    config = transformers.GPT2Config(**sizes, **special, initializer_range=0.4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = interop.load(tmp_path, stack=PLAIN, rngs=nnx.Rngs(0))
    lengths = np.array([5, 2, 3, 4, 1])
    seen = np.arange(5) >= 5 - lengths[:, None]
    prompt = np.where(seen, np.random.default_rng(0).integers(8, size=(5, 5)), END)
    lengths_found = set()
    for alpha in (-1.0, 0.9, 3.0):
        expected = theirs.generate(
            torch.tensor(prompt),
            attention_mask=torch.tensor(seen),
            max_new_tokens=6,
            num_beams=3,
            length_penalty=alpha,
            no_repeat_ngram_size=2,
            early_stopping=early_stopping,
            eos_token_id=ends,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens, scores = generate_beam(
            ours,
            jnp.asarray(prompt),
            6,
            prompt_lengths=jnp.asarray(lengths),
            beam_size=3,
            length_penalty=alpha,
            no_repeat_ngram=2,
            end_token=ends,
            early_stopping=early_stopping,
        )
        theirs_new = expected.sequences[:, 5:].numpy()
        # behind the end they have their padding, and we the first end
        stopped = np.cumsum(np.isin(theirs_new, ends), axis=1) - np.isin(theirs_new, ends) > 0
        theirs_new = np.where(stopped, ends[0], theirs_new)
        missing = ((0, 0), (0, 6 - theirs_new.shape[1]))
        theirs_new = np.pad(theirs_new, missing, constant_values=ends[0])
        np.testing.assert_array_equal(tokens, theirs_new)
        np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), atol=1e-4)
        lengths_found |= set(np.sum(~np.isin(theirs_new, ends), axis=1).tolist())
    assert len(lengths_found) > 2


@pytest.mark.parametrize(
    "num_tokens, options, message",
    [
        (12, {}, "num_tokens is 12, expected 1 to 11"),
        (1, {"prompt_lengths": jnp.array([5, 2, 1])}, r"shape \(3,\), expected \(2,\)"),
        (1, {"prompt_lengths": jnp.array([0, 6])}, "prompt_lengths are 0 to 6, expected 1 to 5"),
        (1, {"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        (1, {"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ],
)
def test_generate_beam_refuses(num_tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate_beam(beam_gpt2(), PADDED, num_tokens, beam_size=2, end_token=END, **options)
