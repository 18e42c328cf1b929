"""As many guard bits as an audit asks for: before the first step, and where a rebuild failed."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.fixed_point import FixedPoint
from bdia_jax.nnx import BDIAStack
from train.config import Config
from train.devices.mesh import open_mesh
from train.devices.shards import place
from train.loop.gamma import gamma_at, set_gamma, stacks_of
from train.loop.rebuild import Failure
from train.loop.step_inputs import StepInputs
from train.tasks.task import Task

# An audit keeps all states, training does not: audit fewer examples if they would take more.
_AUDIT_BYTES = 2**31


def choose(
    config: Config, task: Task, model: Any, step: int = 0, at_least: int = 1
) -> dict[str, Any]:
    """The guard bits that every stack of the model needs, and what else was found, for the log.

    The stacks are audited on what they get in a training step, or on a part of that batch: as many
    examples as a block sees at once (`batch_chunks`), fewer if all their states are beyond 2 GiB.
    Forward values do not depend on guard bits.

    Args:
        config, task: the run's, with stack "bdia" and backprop "reversible".
        model: of config.seed, with the parameters that step begins with.
        step: which.
        at_least: fewest guard bits to take.

    Raises:
        ValueError: no number of guard bits is enough for a stack.
    """
    set_gamma(model, float(gamma_at(config, step)))
    inputs, stacks = stack_inputs(config, task, model, step), stacks_of(model)
    counts = [
        _audited_examples(inputs[path][0], stack, config.batch_chunks)
        for path, stack in stacks.items()
    ]
    if min(counts) < config.batch_size:
        inputs = stack_inputs(config, task, model, step, min(counts))
    audits = []
    for path, stack in stacks.items():
        x, consts = inputs[path]
        stack.train()
        stack.batch_chunks = 1
        try:
            rngs = nnx.Rngs(config.seed)
            audits.append(stack.choose_guard_bits(x, *consts, at_least=at_least, rngs=rngs))
        except ValueError as error:
            name = ".".join(map(str, path))
            raise ValueError(f"no guard_bits can be chosen: {name}: {error}") from error
    return {
        "guard_bits": max(audit.fixed_point.guard_bits for audit in audits),
        "max_drift": max(audit.max_drift for audit in audits),
        "audited": sum(audit.elements * len(audit.mismatches) for audit in audits),
        "largest": max(audit.largest for audit in audits),
    }


def described(config: Config, facts: dict[str, Any]) -> str:
    """What `choose` found, in words, and whether states are near the end of their format."""
    return (
        f"guard bits: {facts['guard_bits']}, chosen by an audit of {facts['audited']:,} rebuilt "
        f"elements: all exact, largest drift {facts['max_drift']:.3g} quanta"
        f"{FixedPoint(config.frac_bits).narrow(facts['largest'])}"
    )


def with_guard_bits(task: Task, guard_bits: int) -> Task:
    """The task, its model with so many guard bits in every stack."""

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        model = task.make_model(rngs)
        for stack in stacks_of(model).values():
            stack.fixed_point = dataclasses.replace(stack.fixed_point, guard_bits=guard_bits)
        return model

    return task._replace(make_model=make_model)


def mend(config: Config, task: Task, models: list[Any], failure: Failure) -> dict[str, Any]:
    """`choose` for the step whose rebuild failed: more guard bits than it had.

    Args:
        config, task: as of `choose`. models: one a seed.
        failure: on the host.

    Raises:
        ValueError: no more are to be had, or none is enough.
    """
    model = models[failure.seed]
    config = dataclasses.replace(config, seed=config.seed + failure.seed)
    formats = [stack.fixed_point for stack in stacks_of(model).values()]
    guard_bits = 1 + max(each.guard_bits for each in formats)
    most = 8 - max(each.gamma_bits for each in formats)
    remedy = "lower frac_bits, or take backprop=remat, in a new --workdir"
    if guard_bits > most:
        raise ValueError(f"{failure}, with {most} guard bits, the most there can be; {remedy}")
    try:
        return choose(config, task, model, int(failure.step), guard_bits)
    except ValueError as error:
        raise ValueError(f"{failure}: {error}; {remedy}") from error


def stack_inputs(
    config: Config, task: Task, model: Any, step: int = 0, count: int | None = None
) -> dict[Any, tuple[jax.Array, tuple]]:
    """Path of each stack in the model -> (x, consts) it is called with in a step.

    With `count` the model sees so many of its examples. (Of what a stack is called with they could
    not be taken: which of its arguments are of samples only its block knows.)
    """
    mesh = open_mesh(config.mesh)
    inputs = StepInputs(config, task, mesh)
    groups = place(task.train_groups, task.train_sizes, mesh)
    examples = inputs.on_host(config.seed, step, groups)
    graphdef, state = nnx.split(model)

    @jax.jit
    def record(state, examples):
        copy = nnx.merge(graphdef, state)
        copy.train()
        stacks = stacks_of(copy)
        for stack in stacks.values():
            stack.__class__ = Recorded
        batch, key = inputs.drawn(jnp.int32(config.seed), step, examples)
        batch = jax.tree.map(lambda array: array[:count], batch)
        task.metrics(copy, batch, nnx.Rngs(key))
        return [stack.inputs for stack in stacks.values()]

    return dict(zip(stacks_of(model), record(state, examples), strict=True))


class Recorded(BDIAStack):
    """A stack that notes what it is called with."""

    def __call__(self, x, *consts, rngs=None):
        self.inputs = nnx.data((x, consts))
        return super().__call__(x, *consts, rngs=rngs)


def _audited_examples(x: jax.Array, stack: BDIAStack, batch_chunks: int) -> int:
    """As many examples as a block sees at once, fewer if their states are too large."""
    per_example = 8 * stack.depth * math.prod(x.shape[1:])  # a state, and its value before rounding
    return max(1, min(len(x) // batch_chunks, _AUDIT_BYTES // per_example))
