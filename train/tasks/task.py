"""What the training program needs to know of a task: examples, model, loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from train.data.tokens import Tokenizer

Arrays = Any  # a pytree of arrays with a common leading axis: the examples of a group

# name -> (sum, weight), each float32 [B]: the metric is sum of sums over sum of weights
Metrics = dict[str, tuple[jax.Array, jax.Array]]
MetricsFn = Callable[[Any, Arrays, nnx.Rngs | None], Metrics]


class Task(NamedTuple):
    """A task, as the other modules of `train.tasks` load it.

    train_groups, eval_groups: the examples, one pytree of arrays for each shape.
    make_model: (rngs) -> model.
    prepare: (key, batch) -> batch, inside the training step: augmentation.
    metrics: (model, batch, rngs) -> Metrics; "loss" is what training descends. rngs is None
        in evaluation.
    describe: what the examples are, for the first line printed.
    finish: (models, workdir) -> final metrics, a value for each model: what to measure and
        write once training has ended. A model for each seed, in evaluation mode.
    tokenizer: of a text; a byte-pair encoding is saved in the workdir.
    train_counts: examples in each training group, if this process has only its share of them.
    """

    train_groups: tuple[Arrays, ...]
    eval_groups: tuple[Arrays, ...]
    make_model: Callable[[nnx.Rngs], nnx.Module]
    prepare: Callable[[jax.Array, Arrays], Arrays]
    metrics: MetricsFn
    describe: str
    finish: Callable[[list[Any], Path], dict[str, list[float]]]
    tokenizer: Tokenizer | None = None
    train_counts: tuple[int, ...] | None = None

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Examples in each training group, those of all processes."""
        return self.train_counts or tuple(map(group_size, self.train_groups))

    @property
    def eval_sizes(self) -> tuple[int, ...]:
        """Examples in each evaluation group; every process has them all."""
        return tuple(map(group_size, self.eval_groups))


def group_size(group: Arrays) -> int:
    """Examples in a group."""
    return len(jax.tree.leaves(group)[0])
