"""Shifted patches and locality self-attention, for a ViT of few images (arXiv 2112.13492)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import Attention


class ShiftedPatches(nnx.Module):
    """Patches of an image beside those of its shifts, which see over the edges of a patch.

    Linear(norm(P([x, x_1, .., x_4]))): x_1 to x_4 are x moved by half a patch along the four
    diagonals, zeros moving in, beside it on the channels, and P cuts patches.

    Args:
        channels: of the image.
        width: D.
        patch_size: p; an odd one moves by (p - 1) / 2.
        dtype: of the matrix product; parameters stay float32.
        norm: (features, rngs=) -> the norm of a patch.
        rngs: initializes parameters.

    Raises:
        ValueError: a patch of one pixel, half of which is none.

    Example:
        >>> patches = ShiftedPatches(3, 8, patch_size=4, rngs=nnx.Rngs(0))
        >>> patches(jnp.ones((2, 32, 32, 3))).shape
        (2, 8, 8, 8)
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        patch_size: int,
        dtype=jnp.float32,
        norm: Callable[..., nnx.Module] = nnx.LayerNorm,
        rngs: nnx.Rngs,
    ):
        if patch_size < 2:
            raise ValueError(f"patch_size {patch_size} has no half to shift by, expected 2 or more")
        self.patch_size = patch_size
        features = 5 * channels * patch_size**2
        self.norm = norm(features, rngs=rngs)
        self.linear = nnx.Linear(features, width, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, height, width, C] -> [B, height / p, width / p, D]."""
        size, shift = self.patch_size, self.patch_size // 2
        batch, height, width, _ = images.shape
        padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        shifted = [
            padded[:, down : down + height, right : right + width]
            for down in (0, 2 * shift)
            for right in (0, 2 * shift)
        ]
        rows, columns = height // size, width // size
        patches = jnp.concatenate([images, *shifted], axis=-1)
        patches = patches.reshape(batch, rows, size, columns, size, -1).swapaxes(2, 3)
        return self.linear(self.norm(patches.reshape(batch, rows, columns, -1)))


class LocalityAttention(Attention):
    """Attention to the other tokens, as sharp as it learns to be.

    softmax(Q K^T / tau) V, the diagonal of Q K^T masked. tau = exp(log_temperature), a number of
    each block, is sqrt(d) at first, that of `Attention`; as a logarithm it stays positive.

    Args:
        As in `Attention`.

    Raises:
        ValueError: when called, one token alone, which has no other to see.

    Example:
        >>> attention = LocalityAttention(8, 2, rngs=nnx.Rngs(0))
        >>> attention(jnp.ones((2, 65, 8))).shape
        (2, 65, 8)
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        qkv_bias: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "implementation": implementation}
        super().__init__(width, num_heads, qkv_bias=qkv_bias, **common, rngs=rngs)
        self.log_temperature = nnx.Param(jnp.float32(0.5 * math.log(self.head_dim)))

    def _attend(self, q, k, v, mask):
        tokens = q.shape[1]
        if tokens == 1:
            raise ValueError(f"x has 1 token and none beside it to see, q being {q.shape}")
        others = ~jnp.eye(tokens, dtype=bool)[None, None]
        # `attend` divides by sqrt(d)
        sharpness = math.sqrt(self.head_dim) * jnp.exp(-self.log_temperature[...])
        q = q.astype(jnp.float32) * sharpness
        return super()._attend(q, k, v, others if mask is None else others & mask)
