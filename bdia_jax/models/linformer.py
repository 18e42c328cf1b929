"""LinformerAttention: self-attention whose cost is linear in the number of tokens."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import Attention, attend


class LinformerAttention(Attention):
    """Attention to k mixtures of the tokens in place of all T (arXiv 2006.04768, eq. 7).

    softmax(Q (E K)^T / sqrt(d)) (F V), where learned matrices E and F [k, T] mix keys and
    values along the tokens. As in github.com/lucidrains/linformer, a block has one E and one
    F, shared by its heads and not by other blocks, uniform in +-1/sqrt(k) at first.

    Args:
        num_tokens: T, fixed by the shape of E and F; a ViT has one more than patches.
        projected: k.
        Others as in `Attention`.

    Example:
        >>> attention = LinformerAttention(8, 2, num_tokens=65, projected=16, rngs=nnx.Rngs(0))
        >>> attention(jnp.ones((2, 65, 8))).shape
        (2, 65, 8)
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_tokens: int,
        projected: int,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "implementation": implementation}
        super().__init__(width, num_heads, **common, rngs=rngs)
        bound = 1 / math.sqrt(projected)
        shape = (projected, num_tokens)
        options = {"dtype": jnp.float32, "minval": -bound, "maxval": bound}
        self.project_keys = nnx.Param(rngs.params.uniform(shape, **options))
        self.project_values = nnx.Param(rngs.params.uniform(shape, **options))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D].

        Raises:
            ValueError: another T than num_tokens, or a mask: mixtures of tokens have none.
        """
        num_tokens = self.project_keys.shape[1]
        if x.shape[1] != num_tokens:
            raise ValueError(f"x has shape {x.shape}, expected num_tokens = {num_tokens} tokens")
        if mask is not None:
            raise ValueError("mask given, but tokens are mixed before attention; use Attention")
        q = self.query(x)
        k = _mix_tokens(self.project_keys[...], self.key(x))
        v = _mix_tokens(self.project_values[...], self.value(x))
        q, k, v = map(self._heads, (q, k, v))
        return self._output(attend(q, k, v, implementation=self.implementation))


def _mix_tokens(matrix: jax.Array, y: jax.Array) -> jax.Array:
    """[k, T] and [B, T, D] -> [B, k, D]."""
    return jnp.einsum("kt,btd->bkd", matrix.astype(y.dtype), y)
