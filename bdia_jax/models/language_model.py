"""What transformers over tokens share: embeddings, logits and loss; how a causal one is called."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from bdia_jax import losses
from bdia_jax._mesh import explicit_sharding
from bdia_jax._stack import Stack


class TokenModel(nnx.Module):
    """A transformer over the tokens of one vocabulary; a subclass has these attributes.

    Attributes:
        max_len: most tokens at once.
        dtype: of the matrix products.
        embedding: [V, D].
        head: the output projection [V, D], or None if it is the embedding.
    """

    max_len: int
    dtype: Any
    embedding: nnx.Param
    head: nnx.Param | None = None

    def logits(self, features: jax.Array) -> jax.Array:
        """float32 [B, T, D] -> float32 [B, T, V]."""
        return losses.logits(features, self._table(), dtype=self.dtype)

    def loss(
        self, features: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
    ) -> jax.Array:
        """Cross-entropy of every token, float32 [B, T], without ever holding its logits.

        Args:
            features: float32 [B, T, D].
            labels: int32 [B, T], the next tokens. Padding is a label as any other: give its loss
                no weight. The loss of one outside the vocabulary is NaN.
            label_smoothing: share of the target that is spread over the vocabulary.
        """
        return losses.softmax_cross_entropy(
            features, self._table(), labels, dtype=self.dtype, label_smoothing=label_smoothing
        )

    def _table(self) -> jax.Array:
        return (self.embedding if self.head is None else self.head)[...]

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding; an id outside it cannot raise under jit, and gives NaN."""
        if tokens.shape[1] > self.max_len:
            raise ValueError(
                f"tokens have shape {tokens.shape}, more than max_len {self.max_len} of them; "
                "shorten them or make the model with a greater max_len"
            )
        return take_rows(self.embedding[...], tokens)


class LanguageModel(TokenModel):
    """A causal transformer; a subclass has `features`."""

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
        raise NotImplementedError


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], NaN for an index outside, negative ones too."""
    sharding = explicit_sharding(index)
    if sharding is not None:  # as the index is, and the table's rows
        row = jax.typeof(table).sharding.spec[1:]
        sharding = sharding.update(spec=PartitionSpec(*sharding.spec, *row))
    options = {"fill_value": jnp.nan, "wrap_negative_indices": False, "out_sharding": sharding}
    return table.at[index].get(mode="fill", **options)


def initializers(depth: int) -> dict[str, Callable]:
    """As GPT-2's: N(0, 0.02), and 1 / sqrt(2 depth) of that where a residual branch ends."""
    normal = nnx.initializers.normal
    return {"kernel_init": normal(0.02), "out_init": normal(0.02 / math.sqrt(2 * depth))}


def make_stack(
    stack: Callable[..., Stack], make_block: Callable, depth: int, width: int, rngs: nnx.Rngs
) -> Stack:
    """stack(make_block, depth), if what it returns is `width` wide; ValueError if not."""
    made = stack(make_block, depth, rngs=rngs)
    features = made.out_features(width)
    if features != width:
        raise ValueError(
            f"the stack returns {features} features, but the output projection takes {width}; "
            "take a stack that keeps the width"
        )
    return made
