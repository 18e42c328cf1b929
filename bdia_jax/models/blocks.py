"""The parts models are built from. A block returns what it adds to the residual stream."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# A projection that ends a residual branch accumulates into float32 and returns it: rounded
# to bfloat16 at magnitude 4, h would move in steps of eight quanta (frac_bits 9), far more
# than a guard bit absorbs.
_residual_linear = partial(nnx.Linear, preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """Multi-head self-attention with a float32 output.

    Args:
        width: D.
        num_heads: H, divides width.
        dtype: of the matrix products; parameters stay float32.
        qkv_bias: bias of the input projection.
        is_causal: whether a token sees only those before it.
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
        rngs: nnx.Rngs,
    ):
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, use_bias=qkv_bias, rngs=rngs)
        self.out = _residual_linear(width, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]. mask: bool, broadcastable to [B, H, T, T], True = see."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=self.is_causal)
        return self.dropout(self.out(attended.reshape(x.shape)))


class MLP(nnx.Module):
    """Linear, GELU, Linear with a float32 output. Args: as `Attention`; mlp_dim: hidden width."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.hidden = nnx.Linear(width, mlp_dim, dtype=dtype, rngs=rngs)
        self.out = _residual_linear(mlp_dim, width, dtype=dtype, rngs=rngs)
        self.hidden_dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]."""
        hidden = jax.nn.gelu(self.hidden(x), approximate=False)
        return self.dropout(self.out(self.hidden_dropout(hidden)))


class PreNormBlock(nnx.Module):
    """The pre-norm transformer block as the h of eq. 4: h = f(x) + g(x + f(x)).

    f is attention and g the MLP, each behind a LayerNorm. x + h is the usual block.
    Args: as `Attention` and `MLP`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        is_causal: bool = False,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(width, num_heads, is_causal=is_causal, **common)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.mlp = MLP(width, mlp_dim, **common)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """float32 [B, T, D] -> float32 h [B, T, D]."""
        f = self.attention(self.attention_norm(x), mask)
        return f + self.mlp(self.mlp_norm(x + f))
