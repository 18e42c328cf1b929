"""Beam search and left-padded prompts, against searching everything and against transformers."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import filled

from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.llama import Llama
from bdia_jax.nnx import BDIAStack
from bdia_jax.text.decode import forbid_ngrams
from bdia_jax.text.generate import generate, generate_beam

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAIN = partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store")
END = 8  # token 0 is a token like any other
LONG, SHORT = [3, 1, 4, 1, 5], [2, 6]
LENGTHS = jnp.array([5, 2])
PADDED = jnp.array([LONG, [7, 7, 7, *SHORT]])


def small_gpt2(vocab_size=9):
    return filled(
        lambda: GPT2(vocab_size, 16, width=16, depth=2, num_heads=2, mlp_dim=24, stack=PLAIN,
                     rngs=nnx.Rngs(0)),
        seed=3,
    )  # fmt: skip


def small_llama():
    return filled(
        lambda: Llama(9, 16, width=16, depth=2, num_heads=4, num_kv_heads=2, head_dim=6,
                      mlp_dim=24, stack=PLAIN, rngs=nnx.Rngs(0)),
        seed=2,
    )  # fmt: skip


@nnx.jit
def evaluate(model, tokens):
    model.eval()
    return jax.nn.log_softmax(model(tokens))


def score(model, prompt, tokens, end, alpha):
    """Log-probability / n^alpha of each of tokens [N, T] behind the prompt, evaluated at once."""
    whole = jnp.concatenate([jnp.tile(jnp.array(prompt), (len(tokens), 1)), tokens], axis=1)
    after = evaluate(nnx.clone(model), whole)[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(np.asarray(after), np.asarray(tokens)[..., None], axis=-1)[..., 0]
    ended = np.cumsum(tokens == end, axis=1) - (tokens == end) > 0
    return np.sum(chosen * ~ended, axis=1) / np.sum(~ended, axis=1) ** alpha


# --- left padding --------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_a_padded_batch_continues_each_prompt_as_if_alone(make):
    model = make()
    if make is small_gpt2:
        run = partial(generate, model, num_tokens=5, temperature=0)
        find = lambda *args, **lengths: (run(*args, **lengths)[:, -5:], jnp.zeros(2))  # noqa: E731
    else:
        find = partial(generate_beam, model, num_tokens=5, beam_size=3, end_token=END,
                       no_repeat_ngram=2)  # fmt: skip
    tokens, scores = find(PADDED, prompt_lengths=LENGTHS)
    for i, prompt in enumerate((LONG, SHORT)):
        alone, its_score = find(jnp.array([prompt]))
        np.testing.assert_array_equal(tokens[i], alone[0])
        np.testing.assert_allclose(scores[i], its_score[0], atol=1e-4)
    seen, _ = find(PADDED, prompt_lengths=jnp.array([5, 5]))  # padding taken for tokens
    np.testing.assert_array_equal(seen[0], tokens[0])
    assert np.any(seen[1] != tokens[1])


def test_greedy_tokens_of_grouped_query_attention_are_those_of_full_recomputation():
    model = small_llama()
    tokens = generate(model, PADDED, 5, prompt_lengths=jnp.array([5, 5]), temperature=0)
    best = np.argmax(evaluate(nnx.clone(model), tokens), axis=-1)
    np.testing.assert_array_equal(tokens[:, 5:], best[:, 4:-1])
    assert len(np.unique(np.asarray(tokens)[:, 5:])) > 2  # not one token over and over


# --- beam search ---------------------------------------------------------------------


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


@pytest.mark.parametrize(("n", "of_prompt"), [(0, True), (2, True), (1, False)])
def test_a_full_beam_finds_the_best_of_all_sequences(n, of_prompt):
    model, prompt, end = small_gpt2(vocab_size=5), [2, 0, 2], 4
    every = every_sequence(5, end, 3)
    assert len(every) == 1 + 4 + 16 * 5
    real = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in every]
    before = prompt if of_prompt else []  # whose n-grams count
    allowed = [not n or not repeats([*before, *tokens], n) for tokens in real]
    assert sum(allowed) > 0 and (sum(allowed) < len(every)) == (n > 0)
    found = []
    for alpha in (0.0, 0.9, 4.0):
        scores = np.where(allowed, score(model, prompt, np.array(every), end, alpha), -np.inf)
        tokens, its_score = generate_beam(
            model, jnp.array([prompt]), 3, beam_size=25, length_penalty=alpha, no_repeat_ngram=n,
            ngrams_of_prompt=of_prompt, end_token=end, early_stopping="never",
        )  # fmt: skip
        assert tuple(tokens[0].tolist()) == every[np.argmax(scores)]
        np.testing.assert_allclose(its_score[0], scores.max(), atol=1e-4)
        found.append(tuple(tokens[0].tolist()))
    assert len(set(found)) > 1  # the length penalty matters


@pytest.mark.parametrize("early_stopping", [False, True])
def test_tokens_and_scores_are_those_of_transformers(early_stopping, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    from bdia_jax import interop

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
        bos_token_id=END, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = interop.load(tmp_path, stack=PLAIN, rngs=nnx.Rngs(0))
    lengths = np.array([5, 2, 3, 4, 1])
    seen = np.arange(5) >= 5 - lengths[:, None]
    prompt = np.where(seen, np.random.default_rng(0).integers(8, size=(5, 5)), END)
    lengths_found = set()
    for alpha in (-1.0, 0.9, 3.0):
        expected = theirs.generate(
            torch.tensor(prompt), attention_mask=torch.tensor(seen), max_new_tokens=6, num_beams=3,
            length_penalty=alpha, no_repeat_ngram_size=2, early_stopping=early_stopping,
            do_sample=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        tokens, scores = generate_beam(
            ours, jnp.asarray(prompt), 6, prompt_lengths=jnp.asarray(lengths), beam_size=3,
            length_penalty=alpha, no_repeat_ngram=2, end_token=END, early_stopping=early_stopping,
        )  # fmt: skip
        theirs_new = expected.sequences[:, 5:].numpy()
        theirs_new = np.pad(theirs_new, ((0, 0), (0, 6 - theirs_new.shape[1])), constant_values=END)
        np.testing.assert_array_equal(tokens, theirs_new)
        np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), atol=1e-4)
        lengths_found |= set(np.sum(theirs_new != END, axis=1).tolist())
    assert len(lengths_found) > 2


def test_fewer_tokens_than_an_ngram_may_be_any():
    log_probs, tokens = jnp.zeros((1, 2, 5)), jnp.zeros((1, 2, 2), jnp.int32)
    for n, allowed in ((4, True), (1, False)):
        constrain = forbid_ngrams(n, jnp.zeros((1, 0), jnp.int32))
        assert bool(jnp.all(constrain(log_probs, tokens, 1) == log_probs)) == allowed


def test_generate_beam_refuses():
    model = small_gpt2()
    search = partial(generate_beam, model, PADDED, beam_size=2, end_token=END)
    with pytest.raises(ValueError, match="num_tokens is 12, expected 1 to 11"):
        search(12)
    with pytest.raises(ValueError, match=r"prompt_lengths has shape \(3,\), expected \(2,\)"):
        search(1, prompt_lengths=jnp.array([5, 2, 1]))
    with pytest.raises(ValueError, match="prompt_lengths are 0 to 6, expected 1 to 5"):
        search(1, prompt_lengths=jnp.array([0, 6]))
    with pytest.raises(ValueError, match="no_repeat_ngram is -1"):
        search(1, no_repeat_ngram=-1)
    with pytest.raises(ValueError, match="early_stopping is 'soon'"):
        search(1, early_stopping="soon")
