"""Translating with a Transformer: beam search, each token evaluated once."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.cache import Cache, MemoryCache
from bdia_jax.models.transformer import PAD, Transformer
from bdia_jax.text.decode import beam_search
from bdia_jax.text.step import at_inference, beam_step, cached_step


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
        ValueError: max_len outside 1 .. model.max_len, bos or eos 0; as `beam_search`.
    """
    if not 1 <= max_len <= model.max_len:
        raise ValueError(f"max_len is {max_len}, expected 1 to the model's {model.max_len}")
    if PAD in (bos, eos):
        raise ValueError(f"bos is {bos} and eos {eos}, expected other tokens than padding, {PAD}")
    graphdef, state = nnx.split(model)
    arrays = source, length_penalty
    tokens, scores = _translate(graphdef, state, *arrays, max_len, beam_size, bos, eos)
    return tokens[:, 0], scores[:, 0]


@partial(jax.jit, static_argnames=("graphdef", "max_len", "beam_size", "bos", "eos"))
def _translate(graphdef, state, source, length_penalty, max_len, beam_size, bos, eos):
    model = at_inference(graphdef, state)
    memory = jnp.repeat(model.encode(source), beam_size, axis=0)
    source_mask = jnp.repeat(source != PAD, beam_size, axis=0)
    blocks = model.decoder.blocks
    blocks.cross_attention.cache = MemoryCache(blocks.cross_attention, memory)
    blocks.attention.cache = Cache(blocks.attention, len(memory), max_len)

    def evaluate(model, tokens, index):
        return model.decode(tokens, memory, source_mask, positions=jnp.full((1, 1), index))

    step, cache = cached_step(model, evaluate)
    return beam_search(
        beam_step(step, beam_size),
        cache,
        len(source),
        max_len,
        beam_size=beam_size,
        length_penalty=length_penalty,
        bos=bos,
        eos=eos,
        pad=PAD,
        early_stopping=beam_size == 1,
    )
