"""Generating tokens with a decoder-only model, each evaluated once.

`generate` and `generate_beam` run `sample` and `beam_search` of `bdia_jax.text.decode` with a
model, the whole loop in one jit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from bdia_jax.models.cache import Cache
from bdia_jax.text.decode import beam_search, end_tokens, forbid_ngrams, length_power, sample
from bdia_jax.text.step import at_inference, beam_step, cached_step, of_rows


class CausalLM(Protocol):
    """A decoder-only NNX model, such as GPT2 and Llama, whose blocks hold one causal `attention`.

    That attention has a `cache`, None in training; with a `Cache` there, it extends its keys and
    values by it and takes its mask.

    Attributes:
        max_len: most tokens of a sequence.
        stack: its blocks' attention is `stack.blocks.attention`.
    """

    max_len: int
    stack: Any

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """float32 [B, T, D] of tokens int32 [B, T], at positions broadcastable to [B, T]."""
        ...

    def logits(self, features: jax.Array) -> jax.Array:
        """float32 [B, T, D] -> float32 [B, T, V], of the next tokens."""
        ...


def generate(
    model: CausalLM,
    prompt: jax.Array,
    num_tokens: int,
    *,
    prompt_lengths: jax.Array | None = None,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    end_token: int | Sequence[int] | None = None,
) -> jax.Array:
    """The prompt and the tokens the model continues it with, int32 [B, T0 + num_tokens].

    The network is the one of inference, as after `eval()`: no dropout, gamma 0 and states in the
    stack's fixed point, as it is configured. The model stays as it was, and may be in training
    mode. Keys and values of earlier tokens are kept. Compiled once for each shape, num_tokens,
    top_k and end_token.

    Args:
        model: any `CausalLM`.
        prompt: int32 [B, T0]; prompts of several lengths have padding, any token, on the left.
        num_tokens: how many to add, at least one.
        prompt_lengths: int32 [B], 1 to T0: tokens of each prompt that are not padding. Positions
            count from the first of them, and padding is never seen. None: no padding.
        key: of the draws; only temperature 0 needs none.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: draw among that many likeliest tokens; None: among all.
        end_token: once drawn, every further token of that sequence is this one. Several: the first
            of them comes behind whichever was drawn.

    Raises:
        ValueError: more tokens than model.max_len, prompt_lengths that do not fit, a negative
            temperature, draws without key, top_k outside 1 .. V.

    Example:
        >>> from bdia_jax.models.gpt2 import GPT2
        >>> model = GPT2(50, 16, width=8, depth=2, num_heads=2, mlp_dim=32, rngs=nnx.Rngs(0))
        >>> generate(model, jnp.ones((3, 2), jnp.int32), 5, key=jax.random.key(0)).shape
        (3, 7)
    """
    _check_lengths(model, prompt, num_tokens, prompt_lengths)
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(
            f"temperature is {temperature} and key {key}; pass key=jax.random.key(seed) to "
            "draw, or temperature=0 for the likeliest token"
        )
    graphdef, state = nnx.split(model)
    arrays = prompt, prompt_lengths, key, temperature or None
    return _generate(graphdef, state, *arrays, num_tokens, top_k, end_tokens(end_token))


@partial(jax.jit, static_argnames=("graphdef", "num_tokens", "top_k", "end_token"))
def _generate(graphdef, state, prompt, lengths, key, temperature, num_tokens, top_k, end_token):
    model = at_inference(graphdef, state)
    prompt, first, place = _open_cache(model, prompt, lengths, num_tokens)
    logits = model.logits(model.features(prompt, positions=first)[:, -1:])[:, 0]
    vocab_size = logits.shape[-1]
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k}, expected 1 to the vocabulary size {vocab_size}")

    def evaluate(model, tokens, index):
        return model.logits(model.features(tokens, positions=place + index))

    def choose(logits, index):
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(jax.random.fold_in(key, index), logits).astype(jnp.int32)

    step, cache = cached_step(model, evaluate)
    new = sample(step, cache, logits, num_tokens, choose, end_token)
    return jnp.concatenate([prompt, new], axis=1)


def _open_cache(model, prompt, lengths, num_tokens):
    """Gives the model an empty cache; (prompt int32, its positions, that of the next token)."""
    batch_size, prompt_len = prompt.shape
    start = None if lengths is None else prompt_len - lengths
    attention = model.stack.blocks.attention
    attention.cache = Cache(attention, batch_size, prompt_len + num_tokens, start)
    first = 0 if start is None else start[:, None]
    positions = jnp.maximum(jnp.arange(prompt_len)[None] - first, 0)
    return prompt.astype(jnp.int32), positions, positions[:, -1:] + 1


def _check_lengths(model, prompt, num_tokens, prompt_lengths) -> None:
    batch_size, prompt_len = prompt.shape
    if not prompt_len:
        raise ValueError(
            f"prompt has shape {prompt.shape}, expected a token at least: to begin with nothing, "
            "take the one that ends texts"
        )
    most = model.max_len - prompt_len
    if not 1 <= num_tokens <= most:
        raise ValueError(
            f"num_tokens is {num_tokens}, expected 1 to {most}: "
            f"max_len {model.max_len} without the prompt {prompt.shape}"
        )
    if prompt_lengths is None:
        return
    if jnp.shape(prompt_lengths) != (batch_size,):
        raise ValueError(
            f"prompt_lengths has shape {jnp.shape(prompt_lengths)}, expected ({batch_size},), a "
            f"length for each of the prompts {prompt.shape}"
        )
    if isinstance(prompt_lengths, Tracer):
        return  # values are not known under jit
    lengths = np.asarray(prompt_lengths)
    if lengths.min() < 1 or lengths.max() > prompt_len:
        raise ValueError(
            f"prompt_lengths are {lengths.min()} to {lengths.max()}, expected 1 to {prompt_len}, "
            f"the width of the prompts {prompt.shape}"
        )


def generate_beam(
    model: CausalLM,
    prompt: jax.Array,
    num_tokens: int,
    *,
    prompt_lengths: jax.Array | None = None,
    beam_size: int,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    ngrams_of_prompt: bool = True,
    end_token: int | Sequence[int],
    early_stopping: bool | str = False,
) -> tuple[jax.Array, jax.Array]:
    """(tokens int32 [B, num_tokens], scores float32 [B]): the best continuation found.

    `beam_search` says what is searched. The arguments mean what they mean for Hugging Face's
    `generate`, whose tokens and scores these are; only that padding of a prompt is no part of
    any n-gram here. The network is as in `generate`. Compiled once for each shape, num_tokens,
    beam_size, no_repeat_ngram, ngrams_of_prompt, end_token and early_stopping.

    Args:
        model, prompt, num_tokens, prompt_lengths: as in `generate`.
        beam_size: at least one.
        length_penalty: alpha; the score of n tokens is their log-probability / n^alpha. LoRA's
            recipe for E2E NLG has 0.9, a beam of 10 and no_repeat_ngram 4.
        no_repeat_ngram: n > 0: no n tokens in a row that prompt and continuation had before.
        ngrams_of_prompt: False: that the continuation alone had before, as in LoRA's programs.
        end_token: ends a continuation, and fills what is behind it. Several: each ends it, the
            first of them fills. None of the vocabulary: no end.
        early_stopping: as in `beam_search`.

    Raises:
        ValueError: as `generate` and `beam_search`; a negative no_repeat_ngram.
    """
    _check_lengths(model, prompt, num_tokens, prompt_lengths)
    if no_repeat_ngram < 0:
        raise ValueError(f"no_repeat_ngram is {no_repeat_ngram}, expected 0 for none, or more")
    ends = end_tokens(end_token) or (-1,)  # nothing is it
    search = _Search(num_tokens, beam_size, no_repeat_ngram, ngrams_of_prompt, ends, early_stopping)
    graphdef, state = nnx.split(model)
    arrays = prompt, prompt_lengths, length_penalty
    tokens, scores = _generate_beam(graphdef, state, *arrays, search)
    return tokens[:, 0], scores[:, 0]


class _Search(NamedTuple):
    """What a beam search is compiled for, as in `generate_beam`."""

    num_tokens: int
    beam_size: int
    no_repeat_ngram: int
    ngrams_of_prompt: bool
    end_token: tuple[int, ...]
    early_stopping: bool | str


@partial(jax.jit, static_argnames=("graphdef", "search"))
def _generate_beam(graphdef, state, prompt, lengths, length_penalty, search: _Search):
    model = at_inference(graphdef, state)
    prompt, first, _ = _open_cache(model, prompt, lengths, search.num_tokens)
    if prompt.shape[1] > 1:  # the last token of each prompt is what its search starts with
        model.features(prompt[:, :-1], positions=first[:, :-1])
    place = jnp.repeat(first[:, -1:], search.beam_size, axis=0) if len(first) > 1 else first[:, -1:]

    def evaluate(model, tokens, index):
        return model.logits(model.features(tokens, positions=place + index))

    constrain = None
    if search.no_repeat_ngram:
        before = (prompt, lengths) if search.ngrams_of_prompt else (prompt[:, :0], None)
        constrain = forbid_ngrams(search.no_repeat_ngram, *before)
    step, cache = cached_step(model, evaluate)
    return beam_search(
        beam_step(step, search.beam_size),
        of_rows(cache, jnp.repeat(jnp.arange(len(prompt)), search.beam_size)),
        len(prompt),
        search.num_tokens,
        beam_size=search.beam_size,
        length_penalty=length_power(length_penalty),
        bos=prompt[:, -1],
        eos=search.end_token,
        pad=search.end_token[0],
        early_stopping=search.early_stopping,
        constrain=constrain,
    )
