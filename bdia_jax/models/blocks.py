"""The parts models are built from. A block returns what it adds to the residual stream."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import attend, check_implementation

# A projection that ends a residual branch accumulates into float32 and returns it: rounded
# to bfloat16 at magnitude 4, h would move in steps of eight quanta (frac_bits 9), far more
# than a guard bit absorbs.
_residual_linear = partial(nnx.Linear, preferred_element_type=jnp.float32)
_lecun = nnx.initializers.lecun_normal()
# one object, so that an activation can be recognized
gelu = partial(jax.nn.gelu, approximate=False)


class Attention(nnx.Module):
    """Multi-head self-attention with a float32 output.

    Args:
        width: D.
        num_heads: H, divides width.
        dropout_rate: of the output.
        dtype: of the matrix products; parameters stay float32.
        qkv_bias: whether the three input projections have a bias.
        is_causal: whether a token sees only itself and those before it.
        kernel_init, out_init: of the input and the output projections.
        implementation: "xla", "cudnn" (flash attention), or None: cuDNN where it can be used.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        qkv_bias: bool = False,
        is_causal: bool = False,
        kernel_init: Callable = _lecun,
        out_init: Callable = _lecun,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check_heads(width, num_heads)
        check_implementation(implementation)
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.implementation = implementation
        options = {"dtype": dtype, "use_bias": qkv_bias, "kernel_init": kernel_init, "rngs": rngs}
        self.query = nnx.Linear(width, width, **options)
        self.key = nnx.Linear(width, width, **options)
        self.value = nnx.Linear(width, width, **options)
        self.out = _residual_linear(width, width, dtype=dtype, kernel_init=out_init, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.cache: Cache | None = nnx.data(None)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]. mask: bool, broadcastable to [B, H, T, T], True = see.

        With a `Cache`, x continues the tokens of earlier calls and sees them too.

        Raises:
            ValueError: a mask with a `Cache`, which brings its own.
        """
        q, k, v = (_heads(y, self.num_heads) for y in (self.query(x), self.key(x), self.value(x)))
        is_causal, implementation = self.is_causal, self.implementation
        if self.cache is not None:
            if mask is not None:
                raise ValueError(f"mask of shape {mask.shape} with a cache; decode without a mask")
            k, v, mask = self.cache.extend(k, v)
            is_causal, implementation = False, "xla"
        attended = attend(q, k, v, mask, is_causal=is_causal, implementation=implementation)
        return self.dropout(self.out(attended.reshape(x.shape)))


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


class CrossAttention(nnx.Module):
    """Multi-head attention of x to a memory, with a float32 output. Args: as `Attention`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check_heads(width, num_heads)
        check_implementation(implementation)
        self.num_heads = num_heads
        self.implementation = implementation
        options = {"dtype": dtype, "use_bias": False, "rngs": rngs}
        self.query = nnx.Linear(width, width, **options)
        self.key = nnx.Linear(width, width, **options)
        self.value = nnx.Linear(width, width, **options)
        self.out = _residual_linear(width, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.cache: MemoryCache | None = nnx.data(None)

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], memory [B, S, D] -> float32 [B, T, D]. mask: as bool [B, H, T, S].

        With a `MemoryCache` the memory is the one it was made of.
        """
        q, implementation = _heads(self.query(x), self.num_heads), self.implementation
        if self.cache is None:
            k, v = self.project(memory)
        else:
            k, v, implementation = self.cache.key[...], self.cache.value[...], "xla"
        attended = attend(q, k, v, mask, implementation=implementation)
        return self.dropout(self.out(attended.reshape(x.shape)))

    def project(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The memory's keys and values, each [B, S, H, D/H]."""
        return _heads(self.key(memory), self.num_heads), _heads(self.value(memory), self.num_heads)


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


class MLP(nnx.Module):
    """Linear, activation, Linear with a float32 output.

    Args:
        width: D.
        mlp_dim: the hidden width.
        dropout_rate: of the hidden activations and of the output.
        dtype: of the matrix products; parameters stay float32.
        activation: GELU by default.
        kernel_init, out_init: of the first and the second Linear.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        activation: Callable[[jax.Array], jax.Array] = gelu,
        kernel_init: Callable = _lecun,
        out_init: Callable = _lecun,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.hidden = nnx.Linear(width, mlp_dim, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.out = _residual_linear(mlp_dim, width, dtype=dtype, kernel_init=out_init, rngs=rngs)
        self.hidden_dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]."""
        return self.dropout(self.out(self.hidden_dropout(self.activation(self.hidden(x)))))


class PreNormBlock(nnx.Module):
    """The pre-norm transformer block as the h of eq. 4: h = f(x) + g(x + f(x)).

    f is attention and g the MLP, each behind a LayerNorm. x + h is the usual block. `branches`
    and `per_token` are for `BDIAStack(by_branch=, token_chunks=)`.

    Args:
        width, num_heads, mlp_dim, dropout_rate, dtype: as in `Attention` and `MLP`.
        attention, mlp: what makes the two parts; `functools.partial` sets their options.
        epsilon: of the LayerNorms.
    """

    branches = ("f", "g")
    per_token = ("g",)
    per_sample = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        attention: Callable[..., Any] = Attention,
        mlp: Callable[..., Any] = MLP,
        epsilon: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention = attention(width, num_heads, **common)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = mlp(width, mlp_dim, **common)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """float32 [B, T, D] -> float32 h [B, T, D]."""
        f = self.f(x, mask)
        return f + self.g(x + f)

    def f(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The attention branch alone, without the residual."""
        return self.attention(self.attention_norm(x), mask)

    def g(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The MLP branch alone, without the residual; no token sees another, mask or not."""
        return self.mlp(self.mlp_norm(x))


def _heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, D] -> [B, T, H, D / H]."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
