"""The compiled program of a run: initial state, training steps, evaluation."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from train.config import Config
from train.data.batches import Batches
from train.devices.mesh import check_batch, open_mesh
from train.devices.shards import abstract, place, take, to_host
from train.loop import non_finite
from train.loop.evaluation import group_totals
from train.loop.non_finite import Note
from train.loop.optimizer import make_schedule
from train.loop.state import State, Training, keys, weights
from train.tasks.task import Arrays, Task


class Program(NamedTuple):
    """What a run executes. With num_seeds > 1 every state and metric has that leading axis.

    init: (pretrained or None) -> State, before the first step; as `Training.init`.
    place: (groups, sizes) of a task -> the groups on the devices of the mesh.
    train_steps: jitted (state, groups, count) -> (state, metrics averaged over `count` steps, and
        under "non_finite" a `Note`); the state is donated. A step that is not finite leaves the
        state as it was; it is the last one, unless config.non_finite is "skip".
    evaluate: jitted (state, groups) -> metrics.
    batch: (seed, groups, step) -> the examples this step sees, on the host.
    models: state -> the trained models, one a seed, in evaluation mode, on one device.
    abstract: the model, shapes only, without adapters.
    abstract_state: the state's shapes, dtypes and shardings.
    abstract_groups: likewise of the training groups.
    steps_per_epoch: batches in an epoch.
    """

    init: Callable[..., State]
    place: Callable[[tuple[Arrays, ...], tuple[int, ...]], tuple[Arrays, ...]]
    train_steps: Any
    evaluate: Any
    batch: Callable[[int, tuple[Arrays, ...], int], Arrays]
    models: Callable[[State], list[nnx.Module]]
    abstract: nnx.Module
    abstract_state: State
    abstract_groups: tuple[Arrays, ...]
    steps_per_epoch: int


def make_program(config: Config, task: Task) -> Program:
    """What a run needs, no step traced yet (`lower_steps` does) and no parameter made."""
    mesh = open_mesh(config.mesh)
    check_batch(config, mesh)
    batches = Batches(task.train_sizes, config.batch_size)
    schedule = make_schedule(config)
    skips = config.non_finite == "skip"
    training = Training(config, task.make_model, mesh)

    def gradient_of(group: int):
        def gradient(state: State, examples: Any, epoch, position, key):
            _, data_key, _ = keys(state["seed"])
            index = batches.examples(data_key, group, epoch, position)
            prepare_key, model_key = jax.random.split(key)
            batch = take(examples[group], index, mesh)
            batch = task.prepare(prepare_key, batch)

            def loss_fn(params):
                model = training.merge(state | {"params": params})
                model.train()
                metrics = _ratios(task.metrics(model, batch, nnx.Rngs(model_key)))
                return metrics["loss"], (metrics, training.stats(model))

            grads, (metrics, stats) = jax.grad(loss_fn, has_aux=True)(state["params"])
            return grads, metrics, stats

        return gradient

    branches = [gradient_of(group) for group in range(len(batches.sizes))]

    def gradient_step(state: State, step: jax.Array, examples: Any):
        epoch, group, position = batches.locate(step)
        key = jax.random.fold_in(keys(state["seed"])[2], step)
        operands = (state, examples, epoch, position, key)
        if len(branches) == 1:
            grads, metrics, stats = branches[0](*operands)
        else:
            grads, metrics, stats = jax.lax.switch(group, branches, *operands)
        metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(step)}
        return (grads, stats), metrics, non_finite.norms(grads)

    def update_step(state: State, grads: Any, stats: Any) -> State:
        updates, opt_state = training.tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "stats": stats, "opt_state": opt_state}

    def train_steps(state: State, examples: Any, count: jax.Array):
        """`count` steps in one dispatch; one program for every count."""
        step, state = state["step"], {k: v for k, v in state.items() if k != "step"}
        gradient, update = over_seeds(gradient_step, (0, None, None)), over_seeds(update_step, 0)
        _, shapes, leaf_norms = jax.eval_shape(gradient, state, step, examples)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        none = Note.none(shapes["loss"].shape, leaf_norms.shape[-1])

        def goes_on(carry):
            index, *_, note = carry
            return (index < count) & (skips | (note.step < 0).all())

        def one(carry):
            index, state, sums, note = carry
            found, metrics, leaf_norms = gradient(state, step + index, examples)
            kept = non_finite.is_finite(metrics)
            note = note.after(step + index, metrics, leaf_norms)
            sums = non_finite.select(kept, jax.tree.map(jnp.add, sums, metrics), sums)
            if skips and config.num_seeds > 1:
                state = non_finite.select(kept, update(state, *found), state)
            else:  # a branch, which needs no copy of the state as a selection would
                state = jax.lax.cond(kept.all(), update, lambda state, *_: state, state, *found)
            return index + (skips | kept.all()), state, sums, note

        carry = (jnp.zeros([], jnp.int32), state, zeros, none)
        done, state, sums, note = jax.lax.while_loop(goes_on, one, carry)
        steps = done - note.skipped if skips else done
        metrics = jax.tree.map(lambda sum: sum / steps, sums)
        return state | {"step": step + done}, metrics | {"non_finite": note}

    def evaluate_one(values: State, examples: Any):
        model = training.merge(values)
        model.eval()
        totals = [
            group_totals(model, task.metrics, group, config.batch_size, count, mesh)
            for group, count in zip(examples, task.eval_sizes, strict=True)
        ]
        totals = jax.tree.map(lambda *parts: sum(parts), *totals)
        return {name: total / weight for name, (total, weight) in totals.items()}

    def batch(seed: int, groups: tuple[Arrays, ...], step: int) -> Arrays:
        epoch, group, position = batches.locate(jnp.int32(step))
        index = batches.examples(keys(jnp.int32(seed))[1], int(group), epoch, position)
        return to_host(take(groups[int(group)], index, mesh))

    def over_seeds(function, in_axes):
        return function if config.num_seeds == 1 else jax.vmap(function, in_axes=in_axes)

    def evaluate(state: State, examples: Any):
        return over_seeds(evaluate_one, (0, None))(weights(state), examples)

    def on_mesh(function):
        return lambda groups, sizes: tuple(
            function(group, size, mesh) for group, size in zip(groups, sizes, strict=True)
        )

    return Program(
        init=training.init,
        place=on_mesh(place),
        train_steps=jax.jit(
            train_steps, donate_argnums=0, out_shardings=training.out_shardings(True)
        ),
        evaluate=jax.jit(evaluate, out_shardings=training.out_shardings(False)),
        batch=batch,
        models=training.models,
        abstract=training.abstract,
        abstract_state=training.abstract_state,
        abstract_groups=on_mesh(abstract)(task.train_groups, task.train_sizes),
        steps_per_epoch=batches.steps_per_epoch,
    )


def check_fits(program: Program) -> None:
    """Refuses a training state that the devices' memory cannot hold, before any of it is made."""
    sharding = jax.tree.leaves(program.abstract_groups)[0].sharding
    devices = 1 if sharding is None else len(sharding.device_set)
    needed = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.abstract_state)
    )
    statistics = jax.local_devices()[0].memory_stats() or {}
    here = statistics.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed > here * devices:
        raise ValueError(
            f"parameters and optimizer state take {needed / 2**30:,.0f} GiB, the {devices} devices "
            f"of this run have {here * devices / 2**30:,.0f} GiB; take a smaller model, fewer "
            "num_seeds, or more devices by config.mesh"
        )


def lower_steps(program: Program) -> jax.stages.Lowered:
    """`train_steps` for any count, traced: sizes that do not fit raise here, and nothing is run."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return program.train_steps.lower(program.abstract_state, program.abstract_groups, count)


def compile_steps(program: Program) -> jax.stages.Compiled:
    """The compiled `train_steps`, for any count."""
    return lower_steps(program).compile()


def _ratios(metrics) -> dict[str, jax.Array]:
    return {name: jnp.sum(total) / jnp.sum(weight) for name, (total, weight) in metrics.items()}
