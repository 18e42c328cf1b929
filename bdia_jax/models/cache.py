"""Keys and values that decoding keeps from call to call: of the tokens so far, and of a memory."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import CrossAttention


class Cache(nnx.Module):
    """Keys and values of the tokens a stack of K causal attentions has seen.

    The state of one attention in a `BDIAStack`, stacked like its parameters. The stack
    carries it from call to call.

    Args:
        attention: the stacked module (`stack.blocks.attention`); its `cache` is to be this. Its
            `out` is the Linear behind H = `num_heads` heads; G = `num_kv_heads` of keys and
            values where it has that attribute, else H.
        batch_size: B.
        length: the most tokens it can hold; further ones overwrite the last.
        start: int32 [B], tokens at the beginning that are padding, which none behind them sees;
            None for none.
    """

    def __init__(
        self, attention: Any, batch_size: int, length: int, start: jax.Array | None = None
    ):
        depth, inner, _ = attention.out.kernel.shape
        heads = getattr(attention, "num_kv_heads", attention.num_heads)
        shape = (depth, batch_size, length, heads, inner // attention.num_heads)
        dtype = attention.out.dtype or jnp.float32
        self.key = nnx.Cache(jnp.zeros(shape, dtype))
        self.value = nnx.Cache(jnp.zeros(shape, dtype))
        self.used = nnx.Cache(jnp.zeros(depth, jnp.int32))
        self.start: nnx.Cache | None = nnx.data(None)
        if start is not None:
            start = jnp.asarray(start, jnp.int32)
            self.start = nnx.Cache(jnp.broadcast_to(start, (depth, batch_size)))

    def extend(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Appends k, v [B, T, G, d]; all keys, all values, and a mask [1 or B, 1, T, length]."""
        used = self.used[...]
        at = (0, used, 0, 0)
        self.key[...] = jax.lax.dynamic_update_slice(self.key[...], k, at)
        self.value[...] = jax.lax.dynamic_update_slice(self.value[...], v, at)
        self.used[...] = used + k.shape[1]
        token = jnp.arange(self.key.shape[1])
        query = used + jnp.arange(k.shape[1])
        seen = (token <= query[:, None])[None, None]
        if self.start is not None:
            seen = seen & (token >= self.start[...][:, None, None, None])
        return self.key[...], self.value[...], seen


class MemoryCache(nnx.Module):
    """Keys and values of one memory for a stack of K cross-attentions, computed once.

    Args:
        attention: the stacked module (`stack.blocks.cross_attention`); its `cache` is to be this.
        memory: float [B, S, D].
    """

    def __init__(self, attention: CrossAttention, memory: jax.Array):
        key, value = nnx.vmap(lambda one: one.project(memory))(attention)
        # no nnx.Cache: unlike a `Cache` it stays the same from token to token
        self.key, self.value = nnx.Variable(key), nnx.Variable(value)
