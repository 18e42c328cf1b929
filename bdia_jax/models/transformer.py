"""Transformer: the encoder-decoder of the paper's translation experiment, as two BDIA stacks."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._stack import Stack
from bdia_jax.models.attention import Attention, CrossAttention
from bdia_jax.models.blocks import MLP, PreNormBlock
from bdia_jax.models.language_model import TokenModel
from bdia_jax.models.rope import angles_of
from bdia_jax.nnx import BDIAStack

PAD = 0


class DecoderBlock(PreNormBlock):
    """A pre-norm decoder block as the h of eq. 4: h = f(x) + c(x + f, memory) + g(x + f + c).

    f is causal self-attention, c attention to the memory, g the MLP, each behind a norm. It is
    called with x float32 [B, T, D]; mask, bool, broadcastable to [B, H, T, T], besides the causal
    one, or None; memory float32 [B, S, D]; memory_mask, bool, broadcastable to [B, H, T, S], or
    None.

    Args: as in `PreNormBlock`.
    """

    branches = ("f", "c", "g")

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        attention: Callable[..., Any] = partial(Attention, is_causal=True),
        cross_attention: Callable[..., Any] = CrossAttention,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        parts = {"attention": attention, "cross_attention": cross_attention}
        super().__init__(width, num_heads, mlp_dim, **parts, **options, rngs=rngs)

    def f(self, x: jax.Array, *consts: Any) -> jax.Array:
        """The self-attention alone, which sees the mask."""
        return super().f(x, *consts[:1])

    def c(self, x: jax.Array, _: Any, memory: jax.Array, memory_mask: Any) -> jax.Array:
        """The attention to the memory alone."""
        return self.cross_attention(self.cross_norm(x), memory, memory_mask)


class Transformer(TokenModel):
    """Encoder-decoder for translation, one vocabulary and one embedding for both languages.

    Pre-norm with a LayerNorm after each stack, ReLU, sinusoidal positions. The embedding,
    times sqrt(width), embeds source and target and is the output projection. Token 0 is
    padding, which nothing sees: it belongs after the sentence.

    Every decoder block receives the encoder's memory, so its gradient is the sum over all of
    them; it reaches the encoder in reversible training as in plain training.

    Args:
        vocab_size: V, padding included.
        max_len: most tokens of a source or a target.
        width, encoder_depth, decoder_depth, num_heads, mlp_dim: the architecture; width is even.
        dropout_rate: of the embeddings, the attentions' outputs and in the MLPs.
        dtype: of the matrix products (float32 or bfloat16). Parameters, residual streams,
            memory and logits are float32.
        stack: (make_block, depth, rngs=) -> a stack, called for the encoder and the decoder;
            `functools.partial(BDIAStack, ...)` sets its options. It must be one that takes
            any block, since a decoder block has three parts, and keeps the width.
        rngs: initializes parameters; seeds dropout and gamma.

    Raises:
        ValueError: an odd width; heads that do not divide width.
    """

    def __init__(
        self,
        vocab_size: int,
        max_len: int,
        *,
        width: int = 512,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        dropout_rate: float = 0.1,
        dtype=jnp.float32,
        stack: Callable[..., Stack] = BDIAStack,
        rngs: nnx.Rngs,
    ):
        if width % 2:
            raise ValueError(f"width is {width}; sinusoidal positions need an even one")
        self.max_len = max_len
        self.dtype = dtype
        # of variance 1 once scaled by sqrt(width), as are the logits of a normalized x
        init = nnx.initializers.normal(1 / math.sqrt(width))
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, width), jnp.float32))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

        def make(block, rngs):
            return block(
                width,
                num_heads,
                mlp_dim,
                dropout_rate=dropout_rate,
                dtype=dtype,
                mlp=partial(MLP, activation=jax.nn.relu),
                rngs=rngs,
            )

        self.encoder = stack(partial(make, PreNormBlock), encoder_depth, rngs=rngs)
        self.encoder_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.decoder = stack(partial(make, DecoderBlock), decoder_depth, rngs=rngs)
        self.decoder_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(
        self, source: jax.Array, target_in: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Logits of the token after each of target_in, float32 [B, T, V].

        Args:
            source: int32 [B, S], padded with 0 at the end.
            target_in: int32 [B, T], the target behind its begin token, padded with 0.
            rngs: streams "dropout" and "gamma" for this call, in place of the model's own.

        Raises:
            ValueError: S or T greater than max_len.
        """
        return self.logits(self.features(source, target_in, rngs))

    def features(
        self, source: jax.Array, target_in: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """What `logits` and `loss` take, float32 [B, T, D]. Args: as in a call."""
        memory = self.encode(source, rngs)
        return self._decode(target_in, memory, source != PAD, None, rngs)

    def encode(self, source: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The memory, float32 [B, S, D], of source int32 [B, S]; meaningless at padding."""
        x = self._place(source, None, rngs)
        mask = (source != PAD)[:, None, None]
        return self.encoder_norm(self.encoder(x, mask, rngs=rngs))

    def decode(
        self,
        target: jax.Array,
        memory: jax.Array,
        source_mask: jax.Array,
        *,
        positions: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Logits of the token after each of target, float32 [B, T, V].

        Args:
            target: int32 [B, T].
            memory: float32 [B, S, D] from `encode`.
            source_mask: bool [B, S], source != 0.
            positions: int32, broadcastable to [B, T]; 0 .. T-1 by default. With a `Cache` in
                the decoder, where target continues earlier calls.
            rngs: as in a call.
        """
        return self.logits(self._decode(target, memory, source_mask, positions, rngs))

    def _decode(self, target, memory, source_mask, positions, rngs):
        x = self._place(target, positions, rngs)
        # a cache brings its own mask, and is for sentences that have not ended
        blocks: Any = self.decoder.blocks
        cached = blocks.attention.cache is not None
        mask = None if cached else (target != PAD)[:, None, None]
        x = self.decoder(x, mask, memory, source_mask[:, None, None], rngs=rngs)
        return self.decoder_norm(x)

    def _place(self, tokens, positions, rngs):
        """The tokens embedded at their positions, by default 0 .. T-1."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        x = self._embed(tokens)
        x = math.sqrt(x.shape[-1]) * x + _sinusoids(positions, x.shape[-1])
        return self.dropout(x, rngs=rngs)


def _sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """[..., T] -> float32 [..., T, D]: sines, then cosines, of wavelengths 2 pi to 20000 pi."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = angles_of(positions, frequency)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
