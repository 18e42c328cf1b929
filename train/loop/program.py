"""The compiled program of a run: initial state, training steps, evaluation."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bdia_jax.compiled.targets import default_device, run_options
from train.config import Config
from train.devices.mesh import check_shares, open_mesh
from train.devices.shards import abstract, place
from train.devices.totals import group_totals
from train.loop import non_finite
from train.loop.gamma import gamma_at, set_gamma
from train.loop.non_finite import Note
from train.loop.optimizer import make_schedule
from train.loop.rebuild import Failure, counted, zero_counts
from train.loop.state import State, Training, weights
from train.loop.step_inputs import StepInputs
from train.tasks.task import Arrays, Task


class Program(NamedTuple):
    """What a run executes. With num_seeds > 1 every state and metric has that leading axis.

    init: (pretrained or None) -> State, before the first step; as `Training.init`.
    place: (groups, sizes) of a task -> the groups on the devices of the mesh.
    train_steps: jitted (state, groups, count) -> (state, metrics averaged over `count` steps, and
        under "non_finite" a `Note`, under "rebuild" a `Failure`); the state is donated. A step that
        is not finite leaves the state as it was; it is the last one, unless config.non_finite is
        "skip". A step whose rebuild failed always is, and is not counted: it is to be made again.
    evaluate: jitted (state, groups) -> metrics.
    start_loss: (state, groups, gamma) -> the loss of the first step's batch in training mode, with
        this |gamma| in every stack.
    batch: (seed, step, groups) -> the examples this step sees, on the host.
    models: state -> the trained models, one a seed, in evaluation mode, on one device.
    abstract: the model, shapes only, without adapters.
    abstract_state: the state's shapes, dtypes and shardings.
    abstract_groups: likewise of the training groups.
    steps_per_epoch: batches in an epoch.
    options: () -> the compiler's for train_steps, on the default device.
    """

    init: Callable[..., State]
    place: Callable[[tuple[Arrays, ...], tuple[int, ...]], tuple[Arrays, ...]]
    train_steps: Any
    evaluate: Any
    start_loss: Callable[[State, tuple[Arrays, ...], float], Any]
    batch: Callable[[int, int, tuple[Arrays, ...]], Arrays]
    models: Callable[[State], list[nnx.Module]]
    abstract: nnx.Module
    abstract_state: State
    abstract_groups: tuple[Arrays, ...]
    steps_per_epoch: int
    options: Callable[[], dict[str, Any]]


def make_program(config: Config, task: Task, devices: Sequence[Any] | None = None) -> Program:
    """What a run needs, no step traced yet (`lower_steps` does) and no parameter made.

    Args:
        config, task: the run's.
        devices: others than `jax.devices()` for the mesh, to compile for.
    """
    mesh = open_mesh(config.mesh, devices)
    check_shares(config, mesh)
    inputs = StepInputs(config, task, mesh)
    batches = inputs.batches
    schedule = make_schedule(config)
    skips = config.non_finite == "skip"
    training = Training(config, task.make_model, mesh)

    def gradient(group: int, state: State, step, groups: Any, epoch, position):
        examples = inputs.examples(state["seed"], groups, epoch, group, position)
        batch, key = inputs.drawn(state["seed"], step, examples)

        def loss_fn(params, counts):
            model = training.merge(state | {"params": params})
            model.train()
            if config.gamma_changes:
                set_gamma(model, gamma_at(config, step))
            with counted(model, counts):
                metrics = _ratios(task.metrics(model, batch, nnx.Rngs(key)))
            return metrics["loss"], (metrics, training.stats(model))

        of_both = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
        (grads, counts), (metrics, stats) = of_both(state["params"], zero_counts(training.abstract))
        return grads, counts, metrics, stats

    def gradient_step(state: State, step: jax.Array, groups: Any):
        epoch, group, position = batches.locate(step)
        branches = [partial(gradient, each) for each in range(len(batches.sizes))]
        operands = (state, step, groups, epoch, position)
        grads, counts, metrics, stats = jax.lax.switch(group, branches, *operands)
        metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(step)}
        if config.gamma_changes:
            metrics["gamma"] = gamma_at(config, step)
        return (grads, stats), metrics, non_finite.norms(grads), counts

    def update_step(state: State, grads: Any, stats: Any) -> State:
        updates, opt_state = training.tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "stats": stats, "opt_state": opt_state}

    def train_steps(state: State, examples: Any, count: jax.Array):
        """`count` steps in one dispatch; one program for every count."""
        # XLA replaces a state in place in a branch only on a CPU, by a selection only on a GPU
        selects = default_device().platform != "cpu"
        step, state = state["step"], {k: v for k, v in state.items() if k != "step"}
        step_of, update = over_seeds(gradient_step, (0, None, None)), over_seeds(update_step, 0)
        _, *shapes = jax.eval_shape(step_of, state, step, examples)
        zeros, leaf_norms, counts = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        none = Note.none(zeros["loss"].shape, leaf_norms.shape[-1])

        def goes_on(carry):
            index, *_, note, failure = carry
            return (index < count) & (skips | (note.step < 0).all()) & (failure.step < 0)

        def one(carry):
            index, state, sums, note, failure = carry
            found, metrics, leaf_norms, counts = step_of(state, step + index, examples)
            failure = failure.after(step + index, counts, metrics["loss"])
            is_sound = failure.step < 0
            kept = non_finite.is_finite(metrics) & is_sound
            after = note.after(step + index, metrics, leaf_norms)
            note = jax.tree.map(lambda new, old: jnp.where(is_sound, new, old), after, note)
            sums = non_finite.select(kept, jax.tree.map(jnp.add, sums, metrics), sums)
            which = kept if skips else kept.all()
            if which.ndim or selects:
                state = non_finite.select(which, update(state, *found), state)
            else:
                state = jax.lax.cond(which, update, lambda state, *_: state, state, *found)
            return index + (is_sound & (skips | kept.all())), state, sums, note, failure

        carry = (jnp.zeros([], jnp.int32), state, zeros, none, Failure(jnp.int32(-1), counts))
        done, state, sums, note, failure = jax.lax.while_loop(goes_on, one, carry)
        steps = done - note.skipped if skips else done
        metrics = jax.tree.map(lambda sum: sum / steps, sums)
        return state | {"step": step + done}, metrics | {"non_finite": note, "rebuild": failure}

    def evaluate_one(values: State, examples: Any):
        model = training.merge(values)
        model.eval()
        totals = [
            group_totals(model, task.metrics, group, config.batch_size, count, mesh)
            for group, count in zip(examples, task.eval_sizes, strict=True)
        ]
        totals = jax.tree.map(lambda *parts: sum(parts), *totals)
        return {name: total / weight for name, (total, weight) in totals.items()}

    def start_loss(state: State, examples: Any, gamma: float):
        epoch, group, position = batches.locate(jnp.int32(0))

        def one(values, examples):
            seed = values["seed"]
            found = inputs.examples(seed, examples, epoch, int(group), position)
            batch, key = inputs.drawn(seed, 0, found)
            model = training.merge(values)
            model.train()
            set_gamma(model, gamma)
            return _ratios(task.metrics(model, batch, nnx.Rngs(key)))["loss"]

        values = {name: state[name] for name in state if name not in ("step", "opt_state")}
        out_shardings = training.out_shardings(False)
        return jax.jit(over_seeds(one, (0, None)), out_shardings=out_shardings)(values, examples)

    def over_seeds(function, in_axes):
        return function if config.num_seeds == 1 else jax.vmap(function, in_axes=in_axes)

    def evaluate(state: State, examples: Any):
        return over_seeds(evaluate_one, (0, None))(weights(state), examples)

    return Program(
        init=training.init,
        place=partial(place, mesh=mesh),
        train_steps=jax.jit(
            train_steps, donate_argnums=0, out_shardings=training.out_shardings(True)
        ),
        evaluate=jax.jit(evaluate, out_shardings=training.out_shardings(False)),
        start_loss=start_loss,
        batch=inputs.on_host,
        models=training.models,
        abstract=training.abstract,
        abstract_state=training.abstract_state,
        abstract_groups=abstract(task.train_groups, task.train_sizes, mesh),
        steps_per_epoch=batches.steps_per_epoch,
        options=run_options if config.backprop == "reversible" else dict,
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
    return lower_steps(program).compile(compiler_options=program.options())


def _ratios(metrics) -> dict[str, jax.Array]:
    return {name: jnp.sum(total) / jnp.sum(weight) for name, (total, weight) in metrics.items()}
