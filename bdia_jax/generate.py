"""Generating tokens with a GPT2 or a Transformer, each token evaluated once.

`sample` and `beam_search` are the algorithms, over any step function that keeps its own cache;
`generate` and `translate` run them with a model of this library, the whole loop in one jit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.blocks import Cache, MemoryCache
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.transformer import PAD, Transformer

PyTree = Any


def generate(
    model: GPT2,
    prompt: jax.Array,
    num_tokens: int,
    *,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    end_token: int | None = None,
) -> jax.Array:
    """The prompt and the tokens the model continues it with, int32 [B, T0 + num_tokens].

    The network is the one of inference, as after `eval()`: no dropout, gamma 0 and states in the
    stack's fixed point, as it is configured. The model stays as it was, and may be in training
    mode. Keys and values of earlier tokens are kept. Compiled once for each shape, num_tokens,
    top_k and end_token.

    Args:
        model: its stack's blocks hold one causal `attention`.
        prompt: int32 [B, T0], of one length, without padding.
        num_tokens: how many to add, at least one.
        key: of the draws; only temperature 0 needs none.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: draw among that many likeliest tokens; None: among all.
        end_token: once drawn, every further token of that sequence is this one.

    Raises:
        ValueError: more tokens than model.max_len, a negative temperature, draws without key,
            top_k outside 1 .. V.

    Example:
        >>> model = GPT2(50, 16, width=8, depth=2, num_heads=2, mlp_dim=32, rngs=nnx.Rngs(0))
        >>> generate(model, jnp.ones((3, 2), jnp.int32), 5, key=jax.random.key(0)).shape
        (3, 7)
    """
    total = prompt.shape[1] + num_tokens
    if num_tokens < 1 or total > model.max_len:
        raise ValueError(
            f"num_tokens is {num_tokens}, expected 1 to {model.max_len - prompt.shape[1]}: "
            f"max_len {model.max_len} without the prompt {prompt.shape}"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(
            f"temperature is {temperature} and key {key}; pass key=jax.random.key(seed) to "
            "draw, or temperature=0 for the likeliest token"
        )
    vocab_size = model.embedding.shape[0]
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k}, expected 1 to the vocabulary size {vocab_size}")
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef, state, prompt, key, temperature or None, num_tokens, top_k, end_token
    )


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(graphdef, state, prompt, key, temperature, num_tokens, top_k, end_token):
    model = nnx.merge(graphdef, state)
    model.eval()
    batch_size, prompt_len = prompt.shape
    attention = model.stack.blocks.attention
    attention.cache = Cache(attention, batch_size, prompt_len + num_tokens)
    logits = model.logits(model.features(prompt)[:, -1:])[:, 0]
    graphdef, cache, rest = nnx.split(model, nnx.Cache, ...)

    def step(cache, tokens, index):
        # a copy: variables from outside the loop must not be written inside it
        model = nnx.merge(graphdef, cache, rest, copy=True)
        logits = model(tokens[:, None], positions=jnp.full((1, 1), prompt_len + index))
        return nnx.state(model, nnx.Cache), logits[:, 0]

    def choose(logits, index):
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(jax.random.fold_in(key, index), logits).astype(jnp.int32)

    new = sample(step, cache, logits, num_tokens, choose, end_token)
    return jnp.concatenate([prompt.astype(jnp.int32), new], axis=1)


def sample(
    step: Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, jax.Array]],
    state: PyTree,
    logits: jax.Array,
    num_tokens: int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    end_token: int | None = None,
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

    def pick(logits, index, ended):
        tokens = choose(logits, index)
        if end_token is None:
            return tokens, ended
        tokens = jnp.where(ended, end_token, tokens)
        return tokens, tokens == end_token

    def going(carry):
        index, *_, ended, _ = carry
        return (index < num_tokens) & ~jnp.all(ended)

    def body(carry):
        index, state, tokens, ended, out = carry
        state, logits = step(state, tokens, index - 1)
        tokens, ended = pick(logits, index, ended)
        return index + 1, state, tokens, ended, out.at[:, index].set(tokens)

    tokens, ended = pick(logits, jnp.int32(0), jnp.zeros(len(logits), bool))
    fill = 0 if end_token is None else end_token
    out = jnp.full((len(logits), num_tokens), fill, jnp.int32).at[:, 0].set(tokens)
    return jax.lax.while_loop(going, body, (jnp.int32(1), state, tokens, ended, out))[-1]


def translate(
    model: Transformer,
    source: jax.Array,
    max_len: int,
    *,
    beam_size: int = 1,
    length_penalty: float = 0.6,
    bos: int = 1,
    eos: int = 2,
) -> tuple[jax.Array, jax.Array]:
    """(tokens int32 [B, max_len], scores float32 [B]): the best translation found.

    The network is the one of inference, as in `generate`; keys and values of the memory and of
    earlier tokens are kept. `beam_search` says what is searched. Compiled once for each shape,
    max_len, beam_size, bos and eos.

    Args:
        model: left as it was, whatever its mode.
        source: int32 [B, S], padded with 0 at the end.
        max_len: most tokens of a translation, eos included, bos not.
        beam_size: 1 is greedy.
        length_penalty, bos, eos: as in `beam_search`.

    Returns:
        The tokens behind bos, up to and with eos, then 0; and their score.

    Raises:
        ValueError: max_len outside 1 .. model.max_len; as `beam_search`.
    """
    if not 1 <= max_len <= model.max_len:
        raise ValueError(f"max_len is {max_len}, expected 1 to the model's {model.max_len}")
    graphdef, state = nnx.split(model)
    tokens, scores = _translate(
        graphdef, state, source, length_penalty, max_len, beam_size, bos, eos
    )
    return tokens[:, 0], scores[:, 0]


@partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _translate(graphdef, state, source, length_penalty, max_len, beam_size, bos, eos):
    model = nnx.merge(graphdef, state)
    model.eval()
    batch_size = len(source)
    memory = jnp.repeat(model.encode(source), beam_size, axis=0)
    source_mask = jnp.repeat(source != PAD, beam_size, axis=0)
    blocks = model.decoder.blocks
    blocks.cross_attention.cache = MemoryCache(blocks.cross_attention, memory)
    blocks.attention.cache = Cache(blocks.attention, batch_size * beam_size, max_len)
    graphdef, cache, rest = nnx.split(model, nnx.Cache, ...)

    def step(cache, rows, tokens, index):
        if beam_size > 1:  # keys and values are [K, B * beam, ...], the number of them [K]
            cache = jax.tree.map(lambda leaf: leaf[:, rows] if leaf.ndim > 1 else leaf, cache)
        model = nnx.merge(graphdef, cache, rest, copy=True)
        positions = jnp.full((1, 1), index)
        logits = model.decode(tokens[:, None], memory, source_mask, positions=positions)
        return nnx.state(model, nnx.Cache), logits[:, 0]

    return beam_search(
        step, cache, batch_size, max_len,
        beam_size=beam_size, length_penalty=length_penalty, bos=bos, eos=eos,
    )  # fmt: skip


def beam_search(
    step: Callable[[PyTree, jax.Array, jax.Array, jax.Array], tuple[PyTree, jax.Array]],
    state: PyTree,
    batch_size: int,
    max_len: int,
    *,
    beam_size: int,
    length_penalty: float | jax.Array = 0.6,
    bos: int,
    eos: int,
) -> tuple[jax.Array, jax.Array]:
    """(tokens int32 [B, beam, max_len], scores float32 [B, beam]), the best first.

    The score of n tokens, eos included, is that of Wu et al. (arXiv 1609.08144, eq. 14, without
    coverage): their log-probability / ((5 + n) / 6)^length_penalty. The beam holds the
    beam_size sequences of best score, ended or not; an ended one stays as it is. The search
    stops when all have ended or have max_len tokens. Token 0, padding, is never chosen.
    A beam of 1 is greedy, one of V^(max_len - 1) exhaustive.

    Args:
        step: (state, rows int32 [B * beam], tokens int32 [B * beam], i) -> (state, logits
            [B * beam, V]). Row r now continues what was row rows[r], by tokens[r] at position i.
        state: what step keeps, before bos.
        batch_size: B.
        max_len: most tokens.
        beam_size: at least one.
        length_penalty: 0 ranks by log-probability, which favours short sequences.
        bos: token a sequence starts with, not returned.
        eos: token that ends it. After it comes 0.

    Raises:
        ValueError: a beam of less than one, eos or bos that is 0.
    """
    if beam_size < 1 or PAD in (bos, eos):
        raise ValueError(
            f"beam_size is {beam_size}, bos {bos}, eos {eos}; expected a beam of at least 1 and "
            f"tokens other than the padding {PAD}"
        )
    first_row = beam_size * jnp.arange(batch_size)[:, None]

    def going(carry):
        index, *_, total, ended, _ = carry
        return (index < max_len) & ~jnp.all(ended | jnp.isneginf(total))

    def body(carry):
        index, state, rows, tokens, length, total, ended, out = carry
        state, logits = step(state, rows.reshape(-1), tokens.reshape(-1), index)
        log_probs = jax.nn.log_softmax(logits).reshape(batch_size, beam_size, -1)
        is_pad = jnp.arange(log_probs.shape[-1]) == PAD
        # an ended sequence continues by padding, for sure; any other never does
        stay = jnp.where(is_pad, 0.0, -jnp.inf)
        log_probs = jnp.where(ended[..., None], stay, jnp.where(is_pad, -jnp.inf, log_probs))
        length = length + ~ended
        ranked = (total[..., None] + log_probs) / _penalty(length)[..., None]
        _, best = jax.lax.top_k(ranked.reshape(batch_size, -1), beam_size)
        parent, tokens = best // is_pad.size, (best % is_pad.size).astype(jnp.int32)

        pick = lambda leaf: jnp.take_along_axis(leaf, parent, axis=1)  # noqa: E731
        total = jnp.take_along_axis((total[..., None] + log_probs).reshape(batch_size, -1), best, 1)
        ended = pick(ended) | (tokens == eos)
        out = jnp.take_along_axis(out, parent[..., None], axis=1).at[:, :, index].set(tokens)
        return index + 1, state, first_row + parent, tokens, pick(length), total, ended, out

    def _penalty(length):
        return ((5.0 + length) / 6.0) ** length_penalty

    shape = (batch_size, beam_size)
    # all rows of a sentence start equal: only the first may be continued
    total = jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf) + jnp.zeros(shape)
    carry = (
        jnp.int32(0), state, first_row + jnp.arange(beam_size), jnp.full(shape, bos, jnp.int32),
        jnp.zeros(shape, jnp.int32), total, jnp.zeros(shape, bool),
        jnp.zeros((*shape, max_len), jnp.int32),
    )  # fmt: skip
    *_, length, total, _, out = jax.lax.while_loop(going, body, carry)
    return out, total / _penalty(length)
