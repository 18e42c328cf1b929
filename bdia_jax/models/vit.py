"""ViT: the vision transformer of the paper's CIFAR experiments, over any stack of blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._stack import Stack
from bdia_jax.models.attention import Attention
from bdia_jax.models.blocks import MLP, PreNormBlock
from bdia_jax.models.locality import LocalityAttention, ShiftedPatches
from bdia_jax.nnx import BDIAStack


class ViT(nnx.Module):
    """Vision transformer with a class token and learned positions.

    The defaults are the paper's CIFAR model: patch 4, width 512, depth 6, 8 heads, mlp 512,
    dropout 0.1. The plain ViT is
    `stack=partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store")`.

    Args:
        image_shape: (height, width, channels); the patch size divides the first two.
        num_classes: size of the output.
        patch_size, width, depth, num_heads, mlp_dim, dropout_rate: the architecture; dropout
            also follows the position embedding.
        dtype: of the matrix products (float32 or bfloat16). Parameters, residual stream
            and logits are float32.
        shifted_patches: whether patches are `ShiftedPatches`, which have five times the features.
        locality_attention: whether `attention` is `LocalityAttention`.
        attention, mlp: of every block, see `PreNormBlock`. Most published ViTs have
            `partial(Attention, qkv_bias=True)`.
        epsilon: of all LayerNorms; some published ViTs have 1e-12.
        stack: (make_block, depth, rngs=rngs) -> what runs the blocks: `BDIAStack` or one of
            `bdia_jax.baselines`, its options set by `functools.partial`. The last norm and
            the head are as wide as its output (`out_features`).
        rngs: initializes parameters; seeds dropout and gamma.

    Raises:
        ValueError: a patch size that does not divide the image, heads that do not divide width,
            locality_attention beside another attention.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        patch_size: int = 4,
        width: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        mlp_dim: int = 512,
        dropout_rate: float = 0.1,
        dtype=jnp.float32,
        shifted_patches: bool = False,
        locality_attention: bool = False,
        attention: Callable[..., nnx.Module] = Attention,
        mlp: Callable[..., nnx.Module] = MLP,
        epsilon: float = 1e-5,
        stack: Callable[..., Stack] = BDIAStack,
        rngs: nnx.Rngs,
    ):
        height, image_width, channels = image_shape
        if height % patch_size or image_width % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide the image {image_shape}")
        if locality_attention and attention is not Attention:
            raise ValueError(
                f"locality_attention=True with attention={attention}; take one of them, or "
                "attention=partial(LocalityAttention, ...)"
            )
        attention = LocalityAttention if locality_attention else attention
        norm = partial(nnx.LayerNorm, epsilon=epsilon)
        self.image_shape = tuple(image_shape)
        tokens = (height // patch_size) * (image_width // patch_size) + 1
        patch = (patch_size, patch_size)
        self.patches: Any
        if shifted_patches:
            self.patches = ShiftedPatches(
                channels, width, patch_size=patch_size, dtype=dtype, norm=norm, rngs=rngs
            )
        else:
            self.patches = nnx.Conv(
                channels, width, patch, strides=patch, padding="VALID", dtype=dtype, rngs=rngs
            )
        self.class_token = nnx.Param(rngs.params.normal((1, 1, width), jnp.float32))
        self.positions = nnx.Param(rngs.params.normal((1, tokens, width), jnp.float32))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

        def make_block(rngs):
            return PreNormBlock(
                width,
                num_heads,
                mlp_dim,
                dropout_rate=dropout_rate,
                dtype=dtype,
                attention=attention,
                mlp=mlp,
                norm=norm,
                rngs=rngs,
            )

        self.stack = stack(make_block, depth, rngs=rngs)
        features = self.stack.out_features(width)
        self.norm = norm(features, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits, float32 [B, num_classes].

        Args:
            images: float [B, height, width, channels], normalized by the caller.
            rngs: streams "dropout" and "gamma" for this call, in place of the model's own.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {images.shape}, expected [B, *{self.image_shape}]")
        patches = self.patches(images).astype(jnp.float32)
        batch, height, width, features = patches.shape
        tokens = patches.reshape(batch, height * width, features)
        class_token = jnp.zeros_like(tokens[:, :1]) + self.class_token[...]
        x = jnp.concatenate([class_token, tokens], axis=1) + self.positions[...]
        x = self.stack(self.dropout(x, rngs=rngs), rngs=rngs)
        return self.head(self.norm(x[:, 0]))
