"""Llama, and what is built like it (Mistral, Qwen2, Qwen3), as a BDIA stack."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import losses
from bdia_jax.models.llama_blocks import LlamaBlock, RotaryAttention, SwiGLU
from bdia_jax.models.rope import RopeScaling
from bdia_jax.nnx import BDIAStack
from bdia_jax.stacked import Stack

_STD = 0.02


class Llama(nnx.Module):
    """Causal transformer over tokens with RMSNorm, rotary positions, and SwiGLU (arXiv 2302.13971).

    The defaults are Llama 2 7B. Mistral adds `sliding_window`, Qwen2 `qkv_bias`, Qwen3
    `qk_norm`; most others have fewer `num_kv_heads`. Weights start as N(0, 0.02), those of the
    projections that end a residual branch as N(0, 0.02 / sqrt(2 depth)).

    Args:
        vocab_size: V.
        max_len: most positions. The network has no parameters of them.
        width, depth, num_heads, mlp_dim: the architecture.
        num_kv_heads, head_dim, rope_theta, rope_scaling, qkv_bias, out_bias, qk_norm,
            sliding_window: of the attention, see `RotaryAttention`.
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

    Attributes:
        embedding: [V, D].
        head: the output projection [V, D], or None if it is the embedding.

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
        normal = nnx.initializers.normal(_STD)
        init = {
            "kernel_init": normal,
            "out_init": nnx.initializers.normal(_STD / math.sqrt(2 * depth)),
        }
        attention = partial(
            RotaryAttention,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            sliding_window=sliding_window,
            **init,
        )

        def make_block(rngs):
            return LlamaBlock(
                width,
                num_heads,
                mlp_dim,
                epsilon=epsilon,
                dropout_rate=dropout_rate,
                dtype=dtype,
                attention=attention,
                mlp=partial(SwiGLU, use_bias=mlp_bias, **init),
                rngs=rngs,
            )

        self.embedding = nnx.Param(normal(rngs.params(), (vocab_size, width)))
        self.stack = stack(make_block, depth, rngs=rngs)
        features = self.stack.out_features(width)
        if features != width:
            raise ValueError(
                f"the stack returns {features} features, but the norm and the output projection "
                f"take {width}; take a stack that keeps the width"
            )
        self.norm = nnx.RMSNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
        self.head: nnx.Param | None = nnx.data(None)
        if not tie_embeddings:
            self.head = nnx.Param(normal(rngs.params(), (vocab_size, width)))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, T, V].

        Args:
            tokens: int32 [B, T]. An id outside the vocabulary cannot raise under jit; it makes
                the logits of its sequence NaN.
            positions: int32, broadcastable to [B, T]; 0 .. T-1 by default. Packed documents
                each start at 0 again.
            mask: bool, broadcastable to [B, 1, T, T], True = see; tokens never see later ones
                whatever it says. Packed documents do not see each other.
            rngs: streams "dropout" and "gamma" for this call, in place of the model's own.

        Raises:
            ValueError: T greater than max_len.
        """
        return self.logits(self.features(tokens, positions=positions, mask=mask, rngs=rngs))

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """What `logits` and `loss` take, float32 [B, T, D]. Args: as in a call."""
        length = tokens.shape[1]
        if length > self.max_len:
            raise ValueError(
                f"tokens have shape {tokens.shape}, more than max_len {self.max_len} of them; "
                "shorten them or make the model with a greater max_len"
            )
        if positions is None:
            positions = jnp.arange(length)
        # All axes are there: the stack's batch_chunks would take one of length B for the batch.
        # Not broadcast to [B, T], though: cosines are computed once for all samples.
        positions = jnp.atleast_2d(positions)
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        # NaN for an id outside, negative ones too
        x = (
            self.embedding[...]
            .at[tokens]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return self.norm(self.stack(x, positions, mask, rngs=rngs))

    def logits(self, features: jax.Array) -> jax.Array:
        """float32 [B, T, D] -> float32 [B, T, V]."""
        return losses.logits(features, self._table(), dtype=self.dtype)

    def loss(
        self, features: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
    ) -> jax.Array:
        """Cross-entropy of every token, float32 [B, T], without ever holding its logits.

        Args:
            features: float32 [B, T, D].
            labels: int32 [B, T], the next tokens. The loss of one outside the vocabulary is NaN.
            label_smoothing: share of the target that is spread over the vocabulary.
        """
        return losses.softmax_cross_entropy(
            features, self._table(), labels, dtype=self.dtype, label_smoothing=label_smoothing
        )

    def _table(self) -> jax.Array:
        return (self.embedding if self.head is None else self.head)[...]
