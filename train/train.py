"""The training loop: data, model, optimizer, step, restore, loop."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bdia_jax.models.vit import ViT
from bdia_jax.nnx import stacked_params
from bdia_jax.optim import scale_by_set_adam
from train.checkpoint import Checkpoints, open_workdir
from train.config import Config
from train.data import ImageSet, augment, batch_indices, load_images, normalize
from train.log import Log, draw_curve, format_bytes

State = dict[str, Any]  # step: int32 [], params and opt_state: pytrees


def train(config: Config, workdir: str) -> float:
    """Trains a ViT on an image set and returns the final evaluation accuracy.

    Everything random is a function of (seed, step), so a run that is stopped and started
    again on its workdir ends with the same bits as one that was not.

    Args:
        config: the experiment.
        workdir: gets config.json, metrics.jsonl, curve.png and checkpoints/.

    Raises:
        FileNotFoundError: the data set is not prepared.
        ValueError: bad configuration or workdir, or a loss that is not finite; checkpoints
            saved until then stay.
    """
    data = load_images(config.dataset, config.train_split, config.data_dir)
    eval_data = load_images(config.dataset, config.eval_split, config.data_dir)
    if config.batch_size > len(data.images):
        raise ValueError(f"batch_size {config.batch_size} exceeds the {len(data.images)} images")
    path = open_workdir(workdir, config)
    schedule = make_schedule(config)
    state, train_step, eval_step = make_program(config, data, schedule)
    step_memory = planned_memory(train_step)

    with Checkpoints(path) as checkpoints:
        state = checkpoints.restore_or(state)
        start = int(state["step"])
        print(
            f"{'resuming' if start else 'training'} {parameter_count(state):,} parameters on "
            f"{len(data.images):,} images of {config.dataset}, {jax.devices()[0].device_kind}, "
            f"from step {start} to {config.num_steps}",
            flush=True,
        )
        total_bytes = step_memory.temp_size_in_bytes + step_memory.argument_size_in_bytes
        log = Log(path, start, config.num_steps, total_bytes)
        accuracy = 0.0
        pending = None  # metrics of a step dispatched, read only after the next one is too

        for step in range(start, config.num_steps + 1):  # step: how many are done
            last = step == config.num_steps
            evaluates = last or (step > 0 and step % config.eval_every_steps == 0)
            saves = step > start and (last or step % config.checkpoint_every_steps == 0)
            if pending and (evaluates or saves):
                _log_train(log, *pending, config.batch_size)
                pending = None
            if saves:
                checkpoints.save(step, state)
            if evaluates:
                accuracy = evaluate(eval_step, state, eval_data, log)
            if last:
                break
            state, metrics = train_step(state, data.images, data.labels)
            if pending:
                _log_train(log, *pending, config.batch_size)
            logs = (step + 1) % config.log_every_steps == 0
            logs |= step + 1 == config.num_steps or (step + 1) % config.checkpoint_every_steps == 0
            pending = (step + 1, metrics) if logs else None
    draw_curve(path)
    print(f"curve in {path / 'curve.png'}")
    print(_memory_line(config, data, schedule, step_memory.temp_size_in_bytes, accuracy))
    return accuracy


def make_schedule(config: Config) -> optax.Schedule:
    """Linear warmup, then constant or cosine to zero."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.num_steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup]
    )


def make_optimizer(
    config: Config, schedule: optax.Schedule, stacked: Any
) -> optax.GradientTransformation:
    """Clipping, then SET-Adam (the paper's) or Adam, decay and learning rate."""
    moments = scale_by_set_adam(stacked=stacked)
    if config.optimizer == "adamw":
        moments = optax.scale_by_adam()
    clip = (
        optax.clip_by_global_norm(config.grad_clip_norm)
        if config.grad_clip_norm
        else optax.identity()
    )
    return optax.chain(
        clip,
        moments,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def make_program(config: Config, data: ImageSet, schedule: optax.Schedule):
    """(initial state, compiled train step, jitted eval step).

    train_step(state, images, labels) -> (state, metrics) takes a whole image set, picks the
    batch of state["step"], and donates the state. eval_step(params, images, labels) -> sums
    of loss and correct answers over a whole image set.
    """
    init_key, data_key, step_key = jax.random.split(jax.random.key(config.seed), 3)
    _, height, width, channels = data.images.shape
    model = ViT(
        (height, width, channels), data.num_classes, **config.vit_arguments, rngs=nnx.Rngs(init_key)
    )
    stacked = nnx.to_pure_dict(stacked_params(model))
    tx = make_optimizer(config, schedule, stacked)
    graphdef, params, rng_state = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    state = {"step": jnp.zeros([], jnp.int32), "params": params, "opt_state": tx.init(params)}

    def train_step(state: State, images: jax.Array, labels: jax.Array):
        step = state["step"]
        key, augment_key = jax.random.split(jax.random.fold_in(step_key, step))
        batch = batch_indices(data_key, step, len(images), config.batch_size)
        batch_images = augment(augment_key, images[batch], config.crop_padding, config.flip)

        def loss_fn(params):
            model = nnx.merge(graphdef, params, rng_state)
            model.train()
            logits = model(normalize(batch_images), rngs=nnx.Rngs(key))
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
            return loss.mean(), (logits.argmax(-1) == labels[batch]).mean()

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        state = {"step": step + 1, "params": params, "opt_state": opt_state}
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": schedule(step),
        }
        return state, metrics

    @jax.jit
    def eval_step(params: Any, images: jax.Array, labels: jax.Array):
        model = nnx.merge(graphdef, params, rng_state)
        model.eval()
        size = min(config.batch_size, len(images))

        def batch_sums(first):
            index = first + jnp.arange(size)
            inside = index < len(images)  # the last batch may reach beyond
            index = jnp.minimum(index, len(images) - 1)
            logits = model(normalize(images[index]))
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[index])
            return jnp.sum(loss * inside), jnp.sum((logits.argmax(-1) == labels[index]) & inside)

        sums = jax.lax.map(batch_sums, jnp.arange(0, len(images), size))
        return jax.tree.map(jnp.sum, sums)

    lowered = jax.jit(train_step, donate_argnums=0).lower(state, data.images, data.labels)
    return state, lowered.compile(), eval_step


def evaluate(eval_step: Callable[..., Any], state: State, data: ImageSet, log: Log) -> float:
    """Accuracy over a whole image set with gamma = 0; logs it."""
    begin = time.monotonic()
    loss, correct = eval_step(state["params"], data.images, data.labels)
    accuracy = float(correct) / len(data.images)
    seconds = time.monotonic() - begin
    log.evaluation(
        int(state["step"]), seconds, loss=float(loss) / len(data.images), accuracy=accuracy
    )
    return accuracy


def _log_train(log: Log, step: int, metrics: dict[str, jax.Array], batch_size: int) -> None:
    """Logs a step, or stops the run before a state that is not finite is saved."""
    values = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise ValueError(
                f"{name} is {values[name]} at step {step}; try a lower learning_rate or "
                "grad_clip_norm > 0. The checkpoints in the workdir are from before"
            )
    log.train(step, batch_size, **values)


def parameter_count(state: State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state["params"]))


def planned_memory(compiled: jax.stages.Compiled):
    """What the compiler has planned: temporaries, arguments, results, in bytes."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError(f"{jax.default_backend()} reports no memory analysis")
    return analysis


def _memory_line(config, data, schedule, temp_bytes, accuracy) -> str:
    """The last line: accuracy, and the step's working memory next to the plain ViT's."""
    result = f"final accuracy {accuracy:.4f} on {config.eval_split}"
    plain = dataclasses.replace(config, gamma=0.0, quantize=False, backprop="store")
    if config == plain:
        return f"{result}; a step needs {format_bytes(temp_bytes)} beyond parameters and data"
    _, plain_step, _ = make_program(plain, data, schedule)
    plain_bytes = planned_memory(plain_step).temp_size_in_bytes
    return (
        f"{result}; a step needs {format_bytes(temp_bytes)} beyond parameters and data, "
        f"the plain ViT {format_bytes(plain_bytes)}: {temp_bytes / plain_bytes:.2f} of it"
    )
