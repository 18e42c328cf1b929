"""The parts of Llama: attention with rotary positions and shared key/value heads, SwiGLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import attend, check_implementation
from bdia_jax.models.blocks import Cache
from bdia_jax.models.rope import RopeScaling, rope_frequencies, rotate

# returns float32, as the projections that end a branch in `blocks`, for the reason given there
_residual_linear = partial(nnx.Linear, preferred_element_type=jnp.float32)
# like the residual stream: rounded to bfloat16 only where a matrix product begins
_norm = partial(nnx.RMSNorm, dtype=jnp.float32)
_normal = nnx.initializers.normal(0.02)


class RotaryAttention(nnx.Module):
    """Causal self-attention with rotary positions and a float32 output.

    Args:
        width: D.
        num_heads: H, of the queries.
        num_kv_heads: of keys and values, divides H; each serves H / num_kv_heads queries.
        head_dim: d, even; width / H by default.
        rope_theta, rope_scaling: the frequencies of the positions, see `rope_frequencies`.
        qkv_bias, out_bias: whether the input and the output projections have a bias.
        qk_norm: whether queries and keys are normalized, each head by itself, before they turn.
        epsilon: of that normalization.
        sliding_window: a token sees itself and that many less one before it; None: all.
        dropout_rate: of the output.
        dtype: of the matrix products; parameters stay float32.
        kernel_init, out_init: of the input and the output projections.
        implementation: as in `attend`. A window smaller than T is a mask, which is for "xla".

    Raises:
        ValueError: heads that do not divide, an odd head_dim, a window below 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        epsilon: float = 1e-6,
        sliding_window: int | None = None,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        kernel_init: Callable = _normal,
        out_init: Callable = _normal,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check(width, num_heads, num_kv_heads, head_dim, sliding_window)
        check_implementation(implementation)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.sliding_window = sliding_window
        self.implementation = implementation
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        options = {"dtype": dtype, "use_bias": qkv_bias, "kernel_init": kernel_init, "rngs": rngs}
        self.query = nnx.Linear(width, inner, **options)
        self.key = nnx.Linear(width, kv_inner, **options)
        self.value = nnx.Linear(width, kv_inner, **options)
        self.q_norm = self.k_norm = nnx.data(None)
        if qk_norm:
            self.q_norm = _norm(self.head_dim, epsilon=epsilon, rngs=rngs)
            self.k_norm = _norm(self.head_dim, epsilon=epsilon, rngs=rngs)
        self.out = _residual_linear(
            inner, width, dtype=dtype, use_bias=out_bias, kernel_init=out_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.cache: Cache | None = nnx.data(None)

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, T, D] -> float32 [B, T, D].

        With a `Cache`, x continues the tokens of earlier calls and sees them too. Keys are kept
        as they are after turning.

        Args:
            x: [B, T, D].
            positions: int32, broadcastable to [B, T].
            mask: bool, broadcastable to [B, H, T, T], True = see; of the earlier tokens only.

        Raises:
            ValueError: a mask with a `Cache`, which brings its own.
        """
        q, k, v = self._project(x, positions)
        is_causal, implementation, start = True, self.implementation, 0
        if self.cache is not None:
            if mask is not None:
                raise ValueError(f"mask of shape {mask.shape} with a cache; decode without a mask")
            start = self.cache.used[...]
            k, v, mask = self.cache.extend(k, v)
            is_causal, implementation = False, "xla"
        mask = self._limit(mask, start, q.shape[1], k.shape[1])
        attended = attend(q, k, v, mask, is_causal=is_causal, implementation=implementation)
        return self.dropout(self.out(attended.reshape(*x.shape[:-1], -1)))

    def _project(self, x, positions):
        """q [B, T, H, d], k and v [B, T, num_kv_heads, d]; q and k normalized and turned."""
        q, k, v = (
            y.reshape(*x.shape[:-1], -1, self.head_dim)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        frequencies = rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

        def turn(heads, norm):
            heads = heads if norm is None else norm(heads)
            return rotate(heads, positions, frequencies).astype(v.dtype)

        return turn(q, self.q_norm), turn(k, self.k_norm), v

    def _limit(self, mask, start, num_queries, num_keys):
        """The mask, with what has left the sliding window out of sight."""
        if self.sliding_window is None or num_keys <= self.sliding_window:
            return mask
        query, key = start + jnp.arange(num_queries)[:, None], jnp.arange(num_keys)
        window = (query - key < self.sliding_window)[None, None]
        return window if mask is None else mask & window


class SwiGLU(nnx.Module):
    """silu(gate(x)) * up(x), projected back, with a float32 output (arXiv 2002.05202).

    Args:
        width: D.
        mlp_dim: the hidden width.
        use_bias: whether the three projections have a bias.
        dropout_rate: of the output.
        dtype: of the matrix products; parameters stay float32.
        kernel_init, out_init: of the first two projections and of the last.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        kernel_init: Callable = _normal,
        out_init: Callable = _normal,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "use_bias": use_bias, "rngs": rngs}
        self.gate = nnx.Linear(width, mlp_dim, kernel_init=kernel_init, **options)
        self.up = nnx.Linear(width, mlp_dim, kernel_init=kernel_init, **options)
        self.out = _residual_linear(mlp_dim, width, kernel_init=out_init, **options)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]."""
        return self.dropout(self.out(jax.nn.silu(self.gate(x)) * self.up(x)))


class LlamaBlock(nnx.Module):
    """Llama's block as the h of eq. 4: h = f(x) + g(x + f(x)), each branch behind an RMSNorm.

    `branches` and `per_token` are for `BDIAStack(by_branch=, token_chunks=)`.

    Args:
        width, num_heads, mlp_dim, dropout_rate, dtype: as in `RotaryAttention` and `SwiGLU`.
        epsilon: of the RMSNorms.
        attention, mlp: what makes the two parts; `functools.partial` sets their options.
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
        epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        attention: Callable[..., Any] = RotaryAttention,
        mlp: Callable[..., Any] = SwiGLU,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}
        self.attention_norm = _norm(width, epsilon=epsilon, rngs=rngs)
        self.attention = attention(width, num_heads, epsilon=epsilon, **common)
        self.mlp_norm = _norm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = mlp(width, mlp_dim, **common)

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, T, D] -> float32 h [B, T, D]."""
        f = self.f(x, positions, mask)
        return f + self.g(x + f, positions, mask)

    def f(self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The attention branch alone, without the residual."""
        return self.attention(self.attention_norm(x), positions, mask)

    def g(self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The MLP branch alone, without the residual; no token sees another."""
        return self.mlp(self.mlp_norm(x))


def _check(width, num_heads, num_kv_heads, head_dim, sliding_window) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}")
    if head_dim is None and width % num_heads:
        raise ValueError(f"width {width} is not divisible by num_heads {num_heads}; give head_dim")
    if (head_dim or width // num_heads) % 2:
        raise ValueError(f"head_dim is {head_dim or width // num_heads}, expected an even number")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}, expected None or at least 1")
