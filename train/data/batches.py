"""Which examples a step sees: a function of (key, step) alone, so resuming needs no state.

Examples of one shape form a group: an image set is one group, sentence pairs one for each
length. Every epoch visits all full batches of all groups once, in a new order.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Batches:
    """The order of batches over groups of examples.

    Args:
        sizes: examples in each group.
        batch_size: B; a smaller group makes one smaller batch.

    Attributes:
        batch_sizes: of each group.
        steps_per_epoch: batches in an epoch.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int):
        self.sizes = tuple(sizes)
        self.batch_sizes = tuple(min(batch_size, size) for size in sizes)
        counts = [size // batch for size, batch in zip(sizes, self.batch_sizes, strict=True)]
        self._groups = np.repeat(np.arange(len(sizes)), counts).astype(np.int32)
        self._positions = np.concatenate([np.arange(count) for count in counts]).astype(np.int32)
        self.steps_per_epoch = len(self._groups)

    def locate(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(epoch, group, position of the batch in its group), int32 []."""
        epoch, index = jnp.divmod(step, self.steps_per_epoch)
        if len(self.sizes) > 1:  # not a function of the seed, so that vmap keeps one branch
            index = jax.random.permutation(jax.random.key(epoch), self.steps_per_epoch)[index]
        return epoch, jnp.asarray(self._groups)[index], jnp.asarray(self._positions)[index]

    def examples(
        self, key: jax.Array, group: int, epoch: jax.Array, position: jax.Array
    ) -> jax.Array:
        """int32 [B]: the examples of a batch, out of the group's permutation of this epoch."""
        size, batch = self.sizes[group], self.batch_sizes[group]
        key = jax.random.fold_in(jax.random.fold_in(key, group), epoch)
        order = jax.random.permutation(key, size)
        return jax.lax.dynamic_slice(order, (position * batch,), (batch,))
