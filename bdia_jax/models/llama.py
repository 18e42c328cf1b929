"""Llama, and what is built like it (Mistral, Qwen2, Qwen3), as a BDIA stack."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._stack import Stack
from bdia_jax.models.blocks import PreNormBlock, SwiGLU
from bdia_jax.models.language_model import LanguageModel, initializers, make_stack
from bdia_jax.models.rope import RopeScaling, RotaryAttention
from bdia_jax.nnx import BDIAStack


class Llama(LanguageModel):
    """Causal transformer over tokens with RMSNorm, rotary positions, and SwiGLU (arXiv 2302.13971).

    The defaults are Llama 2 7B. Mistral adds `sliding_window`, Qwen2 `qkv_bias`, Qwen3
    `qk_norm`; most others have fewer `num_kv_heads`. Weights start as N(0, 0.02), those of the
    projections that end a residual branch as N(0, 0.02 / sqrt(2 depth)).

    Args:
        vocab_size: V.
        max_len: most positions. The network has no parameters of them.
        width, depth, num_heads, mlp_dim: the architecture.
        num_kv_heads, head_dim, rope_theta, rope_scaling, qkv_bias, out_bias, sliding_window: of
            the attention, see `RotaryAttention`.
        qk_norm: whether queries and keys are normalized, each head by itself, before they turn.
        mlp_bias: whether the MLP's projections have a bias.
        epsilon: of the RMSNorms.
        tie_embeddings: whether the token embedding is also the output projection.
        dropout_rate: of the outputs of attention and MLP.
        dtype: of the matrix products (float32 or bfloat16). Parameters, residual stream,
            norms, rotations and logits are float32.
        stack: (make_block, depth, rngs=) -> the stack; `functools.partial(BDIAStack, ...)` sets
            its options, magnitude=0, fixed_point=None, backprop="store" for the plain Llama.
            Its output must be as wide as its input.
        rngs: initializes parameters; seeds dropout and gamma.

    Raises:
        ValueError: as `RotaryAttention`; a stack whose output is wider.

    Example:
        >>> model = Llama(
        ...     50, 16, width=8, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=24, rngs=nnx.Rngs(0)
        ... )
        >>> model(jnp.zeros((3, 5), jnp.int32)).shape
        (3, 5, 50)
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        max_len: int = 4096,
        *,
        width: int = 4096,
        depth: int = 32,
        num_heads: int = 32,
        mlp_dim: int = 11008,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        mlp_bias: bool = False,
        epsilon: float = 1e-5,
        tie_embeddings: bool = False,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        stack: Callable[..., Stack] = BDIAStack,
        rngs: nnx.Rngs,
    ):
        self.max_len = max_len
        self.dtype = dtype
        init = initializers(depth)
        normal = init["kernel_init"]
        # like the residual stream: rounded to bfloat16 only where a matrix product begins
        norm = partial(nnx.RMSNorm, epsilon=epsilon, dtype=jnp.float32)
        attention = partial(
            RotaryAttention,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=norm if qk_norm else None,
            sliding_window=sliding_window,
            **init,
        )

        def make_block(rngs):
            return PreNormBlock(
                width,
                num_heads,
                mlp_dim,
                dropout_rate=dropout_rate,
                dtype=dtype,
                attention=attention,
                mlp=partial(SwiGLU, use_bias=mlp_bias, **init),
                norm=norm,
                rngs=rngs,
            )

        self.embedding = nnx.Param(normal(rngs.params(), (vocab_size, width), jnp.float32))
        self.stack = make_stack(stack, make_block, depth, width, rngs)
        self.norm = norm(width, rngs=rngs)
        if not tie_embeddings:
            self.head = nnx.Param(normal(rngs.params(), (vocab_size, width), jnp.float32))

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """As `LanguageModel.features`."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        # All axes are there: the stack's batch_chunks would take one of length B for the batch.
        # Not broadcast to [B, T], though: cosines are computed once for all samples.
        positions = jnp.atleast_2d(positions)
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return self.norm(self.stack(self._embed(tokens), mask, positions, rngs=rngs))
