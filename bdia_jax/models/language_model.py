"""What the decoder-only language models share: how they are called, their logits and loss."""

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import losses


class LanguageModel(nnx.Module):
    """A causal transformer over tokens; a subclass has `features` and these attributes.

    Attributes:
        max_len: most tokens at once.
        dtype: of the matrix products.
        embedding: [V, D].
        head: the output projection [V, D], or None if it is the embedding.
    """

    max_len: int
    dtype: jnp.dtype
    embedding: nnx.Param
    head: nnx.Param | None

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

    def _check_length(self, tokens: jax.Array) -> None:
        if tokens.shape[1] > self.max_len:
            raise ValueError(
                f"tokens have shape {tokens.shape}, more than max_len {self.max_len} of them; "
                "shorten them or make the model with a greater max_len"
            )


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], NaN for an index outside, negative ones too."""
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
