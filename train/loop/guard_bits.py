"""config.guard_bits = -1: as many guard bits as an audit asks for, before the first step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.nnx import BDIAStack
from train.config import Config
from train.devices.mesh import open_mesh
from train.devices.shards import place
from train.loop.step_inputs import StepInputs
from train.tasks.task import Task

# An audit keeps all states, training does not: audit fewer examples if they would take more.
_AUDIT_BYTES = 2**31


def choose(config: Config, task: Task, model: Any) -> tuple[Config, dict[str, Any]]:
    """The config with the guard bits that every stack of the model needs, and what was found.

    The stacks are audited on what they get in the first training step, or on a part of that
    batch: as many examples as a block sees at once (`batch_chunks`), fewer if all their states
    are beyond 2 GiB. At least one guard bit is taken. Forward values do not depend on it.

    Args:
        config, task: the run's, with stack "bdia" and backprop "reversible".
        model: of one seed, with the parameters training starts from.

    Returns:
        (config, facts for the log).

    Raises:
        ValueError: no number of guard bits is enough for a stack.
    """
    inputs, stacks = stack_inputs(config, task, model), _stacks(model)
    counts = [
        _audited_examples(inputs[path][0], stack, config.batch_chunks)
        for path, stack in stacks.items()
    ]
    if min(counts) < config.batch_size:
        inputs = stack_inputs(config, task, model, min(counts))
    audits = []
    for path, stack in stacks.items():
        x, consts = inputs[path]
        stack.train()
        stack.batch_chunks = 1
        try:
            audits.append(stack.choose_guard_bits(x, *consts, rngs=nnx.Rngs(config.seed)))
        except ValueError as error:
            name = ".".join(map(str, path))
            raise ValueError(f"guard_bits is -1, but {name}: {error}") from error
    facts = {
        "guard_bits": max(audit.fixed_point.guard_bits for audit in audits),
        "max_drift": max(audit.max_drift for audit in audits),
        "audited": sum(audit.elements * len(audit.mismatches) for audit in audits),
    }
    print(
        f"guard bits: {facts['guard_bits']}, chosen by an audit of {facts['audited']:,} rebuilt "
        f"elements: all exact, largest drift {facts['max_drift']:.3g} quanta",
        flush=True,
    )
    return dataclasses.replace(config, guard_bits=facts["guard_bits"]), facts


def stack_inputs(
    config: Config, task: Task, model: Any, count: int | None = None
) -> dict[Any, tuple[jax.Array, tuple]]:
    """Path of each stack in the model -> (x, consts) it is called with in the first step.

    With `count` the model sees so many of its examples. (Of what a stack is called with they could
    not be taken: which of its arguments are of samples only its block knows.)
    """
    mesh = open_mesh(config.mesh)
    inputs = StepInputs(config, task, mesh)
    groups = place(task.train_groups, task.train_sizes, mesh)
    examples = inputs.on_host(config.seed, 0, groups)
    graphdef, state = nnx.split(model)

    @jax.jit
    def record(state, examples):
        copy = nnx.merge(graphdef, state)
        copy.train()
        stacks = _stacks(copy)
        for stack in stacks.values():
            stack.__class__ = _Recorded
        batch, key = inputs.drawn(jnp.int32(config.seed), 0, examples)
        batch = jax.tree.map(lambda array: array[:count], batch)
        task.metrics(copy, batch, nnx.Rngs(key))
        return [stack.inputs for stack in stacks.values()]

    return dict(zip(_stacks(model), record(state, examples), strict=True))


def _stacks(model: Any) -> dict[Any, Any]:
    """Path -> stack."""
    return {path: each for path, each in nnx.iter_modules(model) if isinstance(each, BDIAStack)}


class _Recorded(BDIAStack):
    """A stack that notes what it is called with."""

    def __call__(self, x, *consts, rngs=None):
        self.inputs = nnx.data((x, consts))
        return super().__call__(x, *consts, rngs=rngs)


def _audited_examples(x: jax.Array, stack: BDIAStack, batch_chunks: int) -> int:
    """As many examples as a block sees at once, fewer if their states are too large."""
    per_example = 8 * stack.depth * math.prod(x.shape[1:])  # a state, and its value before rounding
    return max(1, min(len(x) // batch_chunks, _AUDIT_BYTES // per_example))
