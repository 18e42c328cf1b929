"""Sampling and beam search, over any step function that keeps its own cache."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
EARLY_STOPPING = (True, False, "never")

# (log-probabilities [B, beam, V], tokens int32 [B, beam, max_len], i) -> log-probabilities of the
# i-th token, -inf for one that must not follow the first i tokens
Constrain = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def sample(
    step: Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, jax.Array]],
    state: PyTree,
    logits: jax.Array,
    num_tokens: int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    end_token: int | Sequence[int] | None = None,
) -> jax.Array:
    """Tokens chosen one after another, int32 [B, num_tokens]; stops when all have ended.

    Args:
        step: (state, tokens int32 [B], i) -> (state, logits [B, V]): takes in the i-th new
            token and predicts the one after it.
        state: what step keeps, with the prompt taken in.
        logits: [B, V], of the first new token.
        num_tokens: at least one.
        choose: (logits [B, V], i) -> int32 [B], the i-th new token.
        end_token: as in `generate`.
    """

    ends = end_tokens(end_token)

    def pick(logits, index, ended):
        tokens = choose(logits, index)
        if not ends:
            return tokens, ended
        tokens = jnp.where(ended, ends[0], tokens)
        return tokens, is_end(tokens, ends)

    def going(carry):
        index, *_, ended, _ = carry
        return (index < num_tokens) & ~jnp.all(ended)

    def body(carry):
        index, state, tokens, ended, out = carry
        state, logits = step(state, tokens, index - 1)
        tokens, ended = pick(logits, index, ended)
        return index + 1, state, tokens, ended, out.at[:, index].set(tokens)

    tokens, ended = pick(logits, jnp.int32(0), jnp.zeros(len(logits), bool))
    fill = ends[0] if ends else 0
    out = jnp.full((len(logits), num_tokens), fill, jnp.int32).at[:, 0].set(tokens)
    return jax.lax.while_loop(going, body, (jnp.int32(1), state, tokens, ended, out))[-1]


def end_tokens(given: int | Sequence[int] | None) -> tuple[int, ...]:
    """One, several or none, as a tuple; each of them once."""
    return () if given is None else tuple(dict.fromkeys(np.atleast_1d(given).tolist()))


def is_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """bool, of the tokens' shape."""
    return jnp.isin(tokens, jnp.asarray(ends, jnp.int32))


def beam_search(
    step: Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, jax.Array]],
    state: PyTree,
    batch_size: int,
    max_len: int,
    *,
    beam_size: int,
    length_penalty: float | jax.Array | Callable[[Any], Any] = 0.6,
    bos: int | jax.Array,
    eos: int | Sequence[int],
    pad: int = 0,
    early_stopping: bool | str = False,
    constrain: Constrain | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(tokens int32 [B, beam, max_len], scores float32 [B, beam]), the best first.

    The algorithm of Hugging Face's `generate(num_beams=)`. beam_size sequences are alive, those of
    greatest log-probability. Of the 2 beam_size likeliest continuations, (1 + n) beam_size with n
    tokens that end one, those that do not end live on; those among the first beam_size that do
    end, or have max_len tokens, are results. The beam_size results of best score are kept, the
    score being log-probability / penalty(tokens), eos included. A beam of V^(max_len - 1) is
    exhaustive, with early_stopping "never"; one of 1 is greedy, with early_stopping True.

    Args:
        step: (state, rows int32 [B * beam], tokens int32 [B * beam], i) -> (state, logits
            [B * beam, V]). Row r now continues what was row rows[r], by tokens[r] at position i.
        state: what step keeps, before bos.
        batch_size: B.
        max_len: most tokens.
        beam_size: at least one.
        length_penalty: a number alpha is Wu et al.'s ((5 + n) / 6)^alpha (arXiv 1609.08144,
            eq. 14, without coverage). A function is any other penalty(n), rising or falling;
            `length_power(alpha)` is Hugging Face's. 0 ranks by log-probability, which favours
            short sequences.
        bos: token a sequence starts with, not returned; one for all or int32 [B].
        eos: token that ends it, or several of which each does.
        pad: what comes after eos. Never chosen itself, unless it is an eos.
        early_stopping: when a search ends before max_len. True: with beam_size results. False:
            once the likeliest living sequence, scored as it is, would not be among these.
            "never": once it cannot come among them with any number of tokens to max_len.
        constrain: what a token may not be, such as `forbid_ngrams`.

    Raises:
        ValueError: a beam of less than one, pad as a bos, an unknown early_stopping.
    """
    ends = end_tokens(eos)
    _check(beam_size, bos, ends, pad, early_stopping)
    penalty = length_penalty if callable(length_penalty) else gnmt_penalty(length_penalty)
    first_row = beam_size * jnp.arange(batch_size)[:, None]
    shape = (batch_size, beam_size)

    def going(beam: _Beam):
        return (beam.length < max_len) & ~jnp.all(beam.done)

    def body(beam: _Beam) -> _Beam:
        state, logits = step(
            beam.state, beam.rows.reshape(-1), beam.tokens.reshape(-1), beam.length
        )
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(*shape, -1)
        if pad not in ends:
            is_pad = jnp.arange(log_probs.shape[-1]) == pad
            log_probs = jnp.where(is_pad, -jnp.inf, log_probs)
        if constrain is not None:
            log_probs = constrain(log_probs, beam.alive, beam.length)

        # each sequence ends in so many ways only, so beam_size of these go on
        candidates = (beam.total[..., None] + log_probs).reshape(batch_size, -1)
        count = beam_size * min(max(2, 1 + len(ends)), log_probs.shape[-1])
        total, best = jax.lax.top_k(candidates, count)
        parent, tokens = jnp.divmod(best, log_probs.shape[-1])
        alive = _take(beam.alive, parent).at[:, :, beam.length].set(tokens)
        length = beam.length + 1
        stops = is_end(tokens, ends) | (length == max_len)

        is_result = stops & (jnp.arange(count) < beam_size) & ~beam.done[:, None]
        score = jnp.where(is_result, total / penalty(length), -jnp.inf)
        scores, kept = jax.lax.top_k(jnp.concatenate([beam.scores, score], axis=1), beam_size)
        results = _take(jnp.concatenate([beam.results, alive], axis=1), kept)

        total, on = jax.lax.top_k(jnp.where(stops, -jnp.inf, total), beam_size)
        return _Beam(
            length=length,
            state=state,
            rows=first_row + _take(parent, on),
            tokens=_take(tokens, on),
            total=total,
            alive=_take(alive, on),
            scores=scores,
            results=results,
            done=beam.done | (can_reach(total[:, 0], length) <= scores[:, -1]),
        )

    def can_reach(total, length):
        """The best score a sequence of this log-probability is still hoped to have."""
        if early_stopping is True:  # any, as long as there is room
            return jnp.where(jnp.isneginf(total), total, -jnp.finfo(jnp.float32).max)
        now = total / penalty(length)
        return now if not early_stopping else jnp.maximum(now, total / penalty(max_len))

    blank = jnp.full((*shape, max_len), pad, jnp.int32)
    start = _Beam(
        length=jnp.int32(0),
        state=state,
        rows=first_row + jnp.arange(beam_size),
        tokens=jnp.broadcast_to(jnp.reshape(jnp.asarray(bos, jnp.int32), (-1, 1)), shape),
        # all rows of a sentence start equal: only the first may be continued
        total=jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf) + jnp.zeros(shape, jnp.float32),
        alive=blank,
        scores=jnp.full(shape, -jnp.inf, jnp.float32),
        results=blank,
        done=jnp.zeros(batch_size, bool),
    )
    end = jax.lax.while_loop(going, body, start)
    return end.results, end.scores


class _Beam(NamedTuple):
    """What `beam_search` knows after `length` tokens: [B, beam], but for done and length.

    Row by row the living sequences, best first: the row each continues, its last token, its
    log-probability, its tokens. And the best results with their scores, and whether a sentence is
    through.
    """

    length: Any
    state: PyTree
    rows: jax.Array
    tokens: jax.Array
    total: jax.Array
    alive: jax.Array
    scores: jax.Array
    results: jax.Array
    done: jax.Array


def gnmt_penalty(alpha: float | jax.Array) -> Callable[[Any], Any]:
    """n -> ((5 + n) / 6)^alpha, by Wu et al. (arXiv 1609.08144, eq. 14)."""
    return lambda length: ((5.0 + length) / 6.0) ** alpha


def length_power(alpha: float | jax.Array) -> Callable[[Any], Any]:
    """n -> n^alpha: `length_penalty` of Hugging Face's `generate`, and of LoRA's programs."""
    return lambda length: jnp.asarray(length, jnp.float32) ** alpha


def forbid_ngrams(n: int, prompt: jax.Array, prompt_lengths: jax.Array | None = None) -> Constrain:
    """For `beam_search(constrain=)`: no n tokens in a row that the sequence has had before.

    The prompt counts as part of the sequence, its padding does not.

    Args:
        n: at least one.
        prompt: int32 [B, T0], what the sequences continue; on the left of a shorter one is padding.
            With T0 = 0 only what is new counts.
        prompt_lengths: int32 [B], tokens of each that are not padding.
    """
    batch_size, prompt_len = prompt.shape
    start = jnp.zeros(batch_size, jnp.int32)
    if prompt_lengths is not None:
        start = prompt_len - jnp.asarray(prompt_lengths, jnp.int32)

    def constrain(log_probs, tokens, index):
        beam_size = tokens.shape[1]
        before = jnp.broadcast_to(prompt[:, None], (batch_size, beam_size, prompt_len))
        text = jnp.concatenate([before, tokens], axis=-1)
        if text.shape[-1] < n:
            return log_probs
        length = prompt_len + index
        # the n - 1 tokens at the end, against those at every place
        first = jnp.arange(text.shape[-1] - n + 1)
        end = jax.lax.dynamic_slice_in_dim(text, length - n + 1, n - 1, axis=-1)
        repeats = (first + n <= length) & (first >= start[:, None, None])
        for i in range(n - 1):
            repeats &= text[..., i : i + len(first)] == end[..., i : i + 1]
        place = jnp.ogrid[:batch_size, :beam_size]
        banned = jnp.zeros(log_probs.shape, bool)
        repeats = jnp.broadcast_to(repeats, (batch_size, beam_size, len(first)))
        next_token = text[..., n - 1 : n - 1 + len(first)]
        banned = banned.at[place[0][..., None], place[1][..., None], next_token].max(repeats)
        return jnp.where(banned, -jnp.inf, log_probs)

    return constrain


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[b, index[b]]: sequences of a beam, in another order."""
    index = index.reshape(*index.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def _check(beam_size, bos, ends, pad, early_stopping) -> None:
    starts_with_pad = pad not in ends and isinstance(bos, int) and bos == pad
    if beam_size < 1 or starts_with_pad:
        raise ValueError(
            f"beam_size is {beam_size}, bos {bos}, eos {ends}; expected a beam of at least 1 and "
            f"a bos other than the padding {pad}"
        )
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(f"early_stopping is {early_stopping!r}, expected one of {EARLY_STOPPING}")
