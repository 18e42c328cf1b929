"""Transformer: the encoder-decoder of the paper's translation experiment, as two BDIA stacks."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import losses
from bdia_jax._stack import Stack
from bdia_jax.models.blocks import MLP, Attention, CrossAttention, PreNormBlock
from bdia_jax.nnx import BDIAStack

PAD = 0


class DecoderBlock(nnx.Module):
    """A pre-norm decoder block as the h of eq. 4: h = f(x) + c(x + f, memory) + g(x + f + c).

    f is causal self-attention, c attention to the memory, g the MLP, each behind a LayerNorm.

    Args: as in `PreNormBlock`.
    """

    branches = ("f", "c", "g")
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
        attention: Callable[..., nnx.Module] = partial(Attention, is_causal=True),
        mlp: Callable[..., nnx.Module] = MLP,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = attention(width, num_heads, **common)
        self.cross_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.cross_attention = CrossAttention(width, num_heads, **common)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.mlp = mlp(width, mlp_dim, **common)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        memory: jax.Array,
        memory_mask: jax.Array | None,
    ) -> jax.Array:
        """float32 h [B, T, D].

        Args:
            x: float32 [B, T, D].
            mask: bool, broadcastable to [B, H, T, T], besides the causal one.
            memory: float32 [B, S, D].
            memory_mask: bool, broadcastable to [B, H, T, S].
        """
        f = self.f(x, mask)
        c = self.c(x + f, mask, memory, memory_mask)
        return f + c + self.g(x + f + c)

    def f(self, x: jax.Array, mask: jax.Array | None, *_: Any) -> jax.Array:
        """Self-attention alone."""
        return self.attention(self.attention_norm(x), mask)

    def c(
        self, x: jax.Array, _: Any, memory: jax.Array, memory_mask: jax.Array | None
    ) -> jax.Array:
        """Attention to the memory alone."""
        return self.cross_attention(self.cross_norm(x), memory, memory_mask)

    def g(self, x: jax.Array, *_: Any) -> jax.Array:
        """The MLP alone."""
        return self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
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
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, width)))
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

    def logits(self, features: jax.Array) -> jax.Array:
        """float32 [B, T, D] -> float32 [B, T, V]."""
        return losses.logits(features, self.embedding[...], dtype=self.dtype)

    def loss(self, features: jax.Array, labels: jax.Array) -> jax.Array:
        """Cross-entropy of every token, float32 [B, T], without ever holding its logits.

        Args:
            features: float32 [B, T, D].
            labels: int32 [B, T], the tokens after each of target_in. Padding is a label as any
                other: give its loss no weight. The loss of one outside the vocabulary is NaN.
        """
        return losses.softmax_cross_entropy(features, self.embedding[...], labels, dtype=self.dtype)

    def encode(self, source: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The memory, float32 [B, S, D], of source int32 [B, S]; meaningless at padding."""
        x = self._embed(source, None, rngs)
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
        x = self._embed(target, positions, rngs)
        # a cache brings its own mask, and is for sentences that have not ended
        blocks: Any = self.decoder.blocks
        cached = blocks.attention.cache is not None
        mask = None if cached else (target != PAD)[:, None, None]
        x = self.decoder(x, mask, memory, source_mask[:, None, None], rngs=rngs)
        return self.decoder_norm(x)

    def _embed(self, tokens, positions, rngs):
        length = tokens.shape[1]
        if length > self.max_len:
            raise ValueError(
                f"tokens have shape {tokens.shape}, more than max_len {self.max_len} of them; "
                "shorten them or make the model with a greater max_len"
            )
        if positions is None:
            positions = jnp.arange(length)[None]
        table = self.embedding[...]
        width = table.shape[1]
        # an id outside the vocabulary cannot raise under jit; it becomes NaN
        x = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = math.sqrt(width) * x + _sinusoids(positions, width)
        return self.dropout(x, rngs=rngs)


def _sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """[..., T] -> float32 [..., T, D]: sines, then cosines, of wavelengths 2 pi to 20000 pi."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2) / (width // 2))
    angle = positions[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
