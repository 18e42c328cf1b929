"""The parts models are built from. A block returns what it adds to the residual stream."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import Attention, lecun, residual_linear
from bdia_jax.nnx import BranchedBlock

# one object, so that an activation can be recognized
gelu = partial(jax.nn.gelu, approximate=False)


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
        kernel_init: Callable = lecun,
        out_init: Callable = lecun,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.hidden = nnx.Linear(width, mlp_dim, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.out = residual_linear(mlp_dim, width, dtype=dtype, kernel_init=out_init, rngs=rngs)
        self.hidden_dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]."""
        return self.dropout(self.out(self.hidden_dropout(self.activation(self.hidden(x)))))


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
        kernel_init: Callable = lecun,
        out_init: Callable = lecun,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "use_bias": use_bias, "rngs": rngs}
        self.gate = nnx.Linear(width, mlp_dim, kernel_init=kernel_init, **options)
        self.up = nnx.Linear(width, mlp_dim, kernel_init=kernel_init, **options)
        self.out = residual_linear(mlp_dim, width, kernel_init=out_init, **options)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]."""
        return self.dropout(self.out(jax.nn.silu(self.gate(x)) * self.up(x)))


class PreNormBlock(BranchedBlock):
    """The pre-norm transformer block as the h of eq. 4: h = f(x) + g(x + f(x)).

    f is attention and g the MLP, each behind a norm. x + h is the usual block.

    Args:
        width, num_heads, mlp_dim, dropout_rate, dtype: as in `Attention` and `MLP`.
        attention, mlp: what makes the two parts; `functools.partial` sets their options. The block
            is called with x and what the attention takes beside it.
        norm: (width, rngs=) -> the norm before each part.
        cross_attention: makes the third part of a `DecoderBlock`.
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
        norm: Callable[..., Any] = partial(nnx.LayerNorm, epsilon=1e-5),
        cross_attention: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}
        self.attention_norm = norm(width, rngs=rngs)
        self.attention = attention(width, num_heads, **common)
        if cross_attention is not None:
            self.cross_norm = norm(width, rngs=rngs)
            self.cross_attention = cross_attention(width, num_heads, **common)
        self.mlp_norm = norm(width, rngs=rngs)
        self.mlp = mlp(width, mlp_dim, **common)

    def f(self, x: jax.Array, *consts: Any) -> jax.Array:
        """The attention alone, without the residual: float32 [B, T, D], as x."""
        return self.attention(self.attention_norm(x), *consts)

    def g(self, x: jax.Array, *_: Any) -> jax.Array:
        """The MLP alone, without the residual; no token sees another."""
        return self.mlp(self.mlp_norm(x))
