"""Sampling and beam search over steps that are no models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax.text.decode import beam_search, forbid_ngrams, sample

pytestmark = pytest.mark.usefixtures("quick_compile")

BOS, EOS = 1, 2


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
    find = partial(beam_search, beam_size=beam_size, length_penalty=0.0, bos=BOS, eos=EOS)
    tokens, scores = find(partial(memory_step, follow), start, 2, 4)
    assert np.all(np.diff(scores) <= 0)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    return tuple(tokens[0, 0].tolist()), float(jnp.exp(scores[0, 0]))


@pytest.mark.full
def test_beam_search_finds_what_greedy_misses_and_never_pads():
    assert search(1) == ((_A, EOS, 0, 0), pytest.approx(0.3 * 0.4))
    assert search(2) == ((_B, _A, _A, _A), pytest.approx(0.2 * 0.9**3))
    assert search(2, follow=False) != search(2)


@pytest.mark.parametrize("alpha, is_longer", [(0.0, False), (5.0, True)])
def test_longer_sequences_gain_from_the_length_penalty(alpha, is_longer):
    table = np.log([[0.2] * 4, [1e-9, 1e-9, 0.5, 0.5], [0.25] * 4, [1e-9, 1e-9, 0.8, 0.2]])

    def step(state, rows, tokens, index):
        return state, jnp.asarray(table, jnp.float32)[tokens]

    find = partial(beam_search, beam_size=8, length_penalty=alpha, bos=BOS, eos=EOS)
    tokens, scores = find(step, None, 1, 4)
    n = int(jnp.sum(tokens[0, 0] != 0))
    assert (n > 1) == is_longer
    total = np.log(0.5) + (np.log(0.2) * (n - 2) + np.log(0.8)) * is_longer
    np.testing.assert_allclose(scores[0, 0], total / ((5 + n) / 6) ** alpha, rtol=1e-5)


def test_fewer_tokens_than_an_ngram_may_be_any():
    log_probs, tokens = jnp.zeros((1, 2, 5)), jnp.zeros((1, 2, 2), jnp.int32)
    for n, allowed in ((4, True), (1, False)):
        constrain = forbid_ngrams(n, jnp.zeros((1, 0), jnp.int32))
        assert bool(jnp.all(constrain(log_probs, tokens, 1) == log_probs)) == allowed
