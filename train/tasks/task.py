"""What a task is: by itself (`TaskKind`), and loaded, with its examples (`Task`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from train.config import Config, Input, ModelConfig
from train.data.tokens import Tokenizer

Arrays = Any  # a pytree of arrays with a common leading axis: the examples of a group

# name -> (sum, weight), each float32 [B]: the metric is sum of sums over sum of weights
Metrics = dict[str, tuple[jax.Array, jax.Array]]
MetricsFn = Callable[[Any, Arrays, nnx.Rngs | None], Metrics]


def as_it_is(key: jax.Array, batch: Arrays) -> Arrays:
    """The `prepare` of a task without augmentation."""
    del key
    return batch


def no_end(models: list[Any], workdir: Path) -> dict[str, list[float]]:
    """The `finish` of a task that measures nothing more."""
    del models, workdir
    return {}


class Task(NamedTuple):
    """A task with its examples, as `TaskKind.load` reads them.

    train_groups, eval_groups: the examples, one pytree of arrays for each shape.
    make_model: (rngs) -> model.
    metrics: (model, batch, rngs) -> Metrics; "loss" is what training descends. rngs is None
        in evaluation.
    describe: what the examples are, for the first line printed.
    prepare: (key, batch) -> batch, inside the training step: augmentation.
    finish: (models, workdir) -> final metrics, a value for each model: what to measure and
        write once training has ended. A model for each seed, in evaluation mode.
    tokenizer: of a text; a byte-pair encoding is saved in the workdir.
    train_counts: examples in each training group, if this process has only its share of them.
    """

    train_groups: tuple[Arrays, ...]
    eval_groups: tuple[Arrays, ...]
    make_model: Callable[[nnx.Rngs], nnx.Module]
    metrics: MetricsFn
    describe: str = ""
    prepare: Callable[[jax.Array, Arrays], Arrays] = as_it_is
    finish: Callable[[list[Any], Path], dict[str, list[float]]] = no_end
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


class TaskKind(NamedTuple):
    """A task before any data is read: an entry of `train.tasks.TASKS`.

    input: the class of `config.input`.
    models: `config.model.name` -> the class of `config.model`.
    load: config -> the task. It reads the data.
    abstract: (config, tokenizer of the run or None) -> the task, but for its examples: a batch of
        `jax.ShapeDtypeStruct`s. No example is read; sizes that only the data tells, such as that of
        a learned vocabulary, are those it can have at most. For plans, and to open a trained run.
    head: a filter of the parameters that are trained beside adapters (`config.lora`).
    ends_prompts: whether the end of text comes behind what a model is given to go on from.
    """

    input: type[Input]
    models: Mapping[str, type[ModelConfig]]
    load: Callable[[Config], Task]
    abstract: Callable[[Config, Tokenizer | None], Task]
    head: Any = False
    ends_prompts: bool = False


def group_size(group: Arrays) -> int:
    """Examples in a group."""
    return len(jax.tree.leaves(group)[0])
