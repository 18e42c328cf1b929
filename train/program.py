"""The compiled program of a run: initial state, training steps, evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from train.batches import Batches
from train.config import Config
from train.evaluation import group_totals
from train.optimizer import make_schedule
from train.state import State, Training, keys, weights
from train.task import Task, group_size


class Program(NamedTuple):
    """What a run executes. With num_seeds > 1 every state and metric has that leading axis.

    init: (pretrained or None) -> State, before the first step; as `Training.init`.
    train_steps: jitted (state, groups, count) -> (state, metrics averaged over `count` steps);
        the state is donated.
    evaluate: jitted (state, groups) -> metrics.
    models: state -> the trained models, one a seed, in evaluation mode.
    abstract: the model, shapes only, without adapters.
    steps_per_epoch: batches in an epoch.
    """

    init: Callable[..., State]
    train_steps: Any
    evaluate: Any
    models: Callable[[State], list[nnx.Module]]
    abstract: nnx.Module
    steps_per_epoch: int


def make_program(config: Config, task: Task) -> Program:
    """What a run needs, no step traced yet (`lower_steps` does) and no parameter made."""
    sizes = [group_size(group) for group in task.train_groups]
    batches = Batches(sizes, config.batch_size)
    schedule = make_schedule(config)
    training = Training(config, task.make_model)

    def gradient_of(group: int):
        def gradient(state: State, examples: Any, epoch, position, key):
            _, data_key, _ = keys(state["seed"])
            index = batches.examples(data_key, group, epoch, position)
            prepare_key, model_key = jax.random.split(key)
            batch = jax.tree.map(lambda array: array[index], examples[group])
            batch = task.prepare(prepare_key, batch)

            def loss_fn(params):
                model = training.merge(state | {"params": params})
                model.train()
                metrics = _ratios(task.metrics(model, batch, nnx.Rngs(model_key)))
                return metrics["loss"], (metrics, training.stats(model))

            grads, (metrics, stats) = jax.grad(loss_fn, has_aux=True)(state["params"])
            return grads, metrics, stats

        return gradient

    branches = [gradient_of(group) for group in range(len(sizes))]

    def train_step(state: State, step: jax.Array, examples: Any):
        epoch, group, position = batches.locate(step)
        key = jax.random.fold_in(keys(state["seed"])[2], step)
        operands = (state, examples, epoch, position, key)
        if len(branches) == 1:
            grads, metrics, stats = branches[0](*operands)
        else:
            grads, metrics, stats = jax.lax.switch(group, branches, *operands)
        updates, opt_state = training.tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(step)}
        state = state | {"params": params, "stats": stats, "opt_state": opt_state}
        return state, metrics

    def train_steps(state: State, examples: Any, count: jax.Array):
        """`count` steps in one dispatch; one program for every count."""
        step, state = state["step"], {k: v for k, v in state.items() if k != "step"}
        body = over_seeds(train_step, (0, None, None))
        shapes = jax.eval_shape(body, state, step, examples)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def one(index, carry):
            state, sums = carry
            state, metrics = body(state, step + index, examples)
            return state, jax.tree.map(jnp.add, sums, metrics)

        state, sums = jax.lax.fori_loop(0, count, one, (state, zeros))
        return state | {"step": step + count}, jax.tree.map(lambda sum: sum / count, sums)

    def evaluate_one(values: State, examples: Any):
        model = training.merge(values)
        model.eval()
        totals = [group_totals(model, task.metrics, group, config.batch_size) for group in examples]
        totals = jax.tree.map(lambda *parts: sum(parts), *totals)
        return {name: total / weight for name, (total, weight) in totals.items()}

    def over_seeds(function, in_axes):
        return function if config.num_seeds == 1 else jax.vmap(function, in_axes=in_axes)

    def evaluate(state: State, examples: Any):
        return over_seeds(evaluate_one, (0, None))(weights(state), examples)

    jitted = jax.jit(train_steps, donate_argnums=0)
    return Program(
        *(training.init, jitted, jax.jit(evaluate), training.models, training.abstract),
        batches.steps_per_epoch,
    )


def lower_steps(program: Program, task: Task) -> jax.stages.Lowered:
    """`train_steps` for any count, traced: sizes that do not fit raise here, and nothing is run."""
    operands = (jax.eval_shape(program.init), task.train_groups, jnp.ones([], jnp.int32))
    return program.train_steps.lower(*operands)


def compile_steps(program: Program, task: Task) -> jax.stages.Compiled:
    """The compiled `train_steps`, for any count."""
    return lower_steps(program, task).compile()


def _ratios(metrics) -> dict[str, jax.Array]:
    return {name: jnp.sum(total) / jnp.sum(weight) for name, (total, weight) in metrics.items()}
