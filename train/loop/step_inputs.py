"""What a step sees and draws: a function of (seed, step) alone, so resuming needs no state of it.

Training asks here, and so do the audit that chooses guard bits and the dump of a bad step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from train.config import Config
from train.data.batches import Batches
from train.devices.shards import take, to_host
from train.tasks.task import Arrays, Task


class StepInputs:
    """The examples of each step, and the random streams of its augmentation and its model.

    Args:
        config, task: the run's.
        mesh: over which the groups of examples are placed, None for one device.

    Attributes:
        batches: the order of the examples.
    """

    def __init__(self, config: Config, task: Task, mesh: Mesh | None):
        self.batches = Batches(task.train_sizes, config.batch_size)
        self._prepare = task.prepare
        self._mesh = mesh

    def examples(
        self, seed: jax.Array, groups: Sequence[Arrays], epoch: Any, group: int, position: Any
    ) -> Arrays:
        """The batch as the data set has it; epoch, group, position: as `Batches.locate` says."""
        index = self.batches.examples(keys(seed)[1], group, epoch, position)
        return take(groups[group], index, self._mesh)

    def drawn(self, seed: jax.Array, step: Any, examples: Arrays) -> tuple[Arrays, jax.Array]:
        """(the batch as the model sees it, the key of what the model draws)."""
        prepare_key, model_key = jax.random.split(jax.random.fold_in(keys(seed)[2], step))
        return self._prepare(prepare_key, examples), model_key

    def on_host(self, seed: int, step: int, groups: Sequence[Arrays]) -> Arrays:
        """`examples` of a step, whole. With several processes all have to call it."""
        epoch, group, position = self.batches.locate(jnp.int32(step))
        return to_host(self.examples(jnp.int32(seed), groups, epoch, int(group), position))


def keys(seed: jax.Array) -> jax.Array:
    """Keys of initialization, of the order of examples, and of what a step draws."""
    return jax.random.split(jax.random.key(seed), 3)
