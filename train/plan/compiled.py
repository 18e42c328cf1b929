"""A run's training program, compiled for devices that need not be there, and added up."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from bdia_jax import memory_report
from bdia_jax.compiled import targets
from bdia_jax.compiled.collectives import collectives, sent_bytes
from bdia_jax.compiled.hlo import read
from bdia_jax.compiled.traffic import Total, total, work
from bdia_jax.sharding import BATCH_AXES
from train.config import Config
from train.loop.program import lower_steps, make_program
from train.plan.closed_form import Parts, mesh_sizes, parts
from train.tasks.task import Task

CHUNKS = 4  # of the batch, for the last of `ways`


class Where(NamedTuple):
    """What is compiled for.

    devices: so many as the mesh has.
    target: the GPU, None for a CPU.
    told: why it is not what was asked for, "" if it is.
    """

    devices: Sequence[Any]
    target: targets.Target | None
    told: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device needs, and does in a step.

    Attributes:
        parameters, optimizer: bytes, as of `Parts`.
        batch: bytes of a step's examples. In a run all training examples are on the devices.
        temporaries: bytes of all else that the compiler plans for.
        parts: those of the same run by arithmetic.
        collectives: how many run in a step.
        sent: bytes sent in them (`bdia_jax.compiled.collectives`).
        work: kernels, bytes moved, FLOPs and the bound of time; None on a CPU.
    """

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    parts: Parts
    collectives: int
    sent: float
    work: Total | None

    @property
    def total(self) -> int:
        """`memory_report(compiled).total`, with one batch in place of all examples."""
        return self.parameters + self.optimizer + self.batch + self.temporaries


def open_devices(name: str, count: int) -> Where:
    """Devices to compile for; those of a CPU if this machine cannot compile for that GPU.

    To be called before JAX has started, which it keeps to the CPU: nothing is run.

    Args:
        name: of `targets.TARGETS`, or "cpu".
        count: how many.

    Raises:
        ValueError: an unknown name.
    """
    if name not in (*targets.TARGETS, "cpu"):
        raise ValueError(f"device is {name!r}, expected cpu, {', '.join(targets.TARGETS)}")
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # it has started: with as many as there are
        jax.config.update("jax_num_cpu_devices", count)
    told = ""
    if name != "cpu":
        try:
            return Where(targets.devices(name, count), targets.TARGETS[name])
        except ValueError as error:
            told = f"compiled for a CPU, whose memory is another: {error}"
    return Where(jax.local_devices(backend="cpu"), None, told)


def ways(config: Config) -> dict[str, Config]:
    """Name -> the config with another way of training its stack, for those that it can have."""
    chunked = f"in {CHUNKS} chunks"
    changes: dict[str, dict[str, Any]] = {name: {"backprop": name} for name in ("store", "remat")}
    changes["reversible"] = {"backprop": "reversible"}
    changes[chunked] = {"backprop": "reversible", "batch_chunks": CHUNKS}
    sizes = mesh_sizes(config.mesh)
    found: dict[str, Config] = {}
    for name, fields in changes.items():
        try:
            changed = dataclasses.replace(config, **fields)
        except ValueError:  # a gamma that is not reversible; a batch that has no such chunks
            continue
        shares = math.prod(sizes[axis] for axis in BATCH_AXES)
        if changed not in found.values() and (
            name != chunked or config.batch_size // CHUNKS % shares == 0
        ):
            found[name] = changed
    return found


def compile_steps(config: Config, task: Task, where: Where) -> jax.stages.Compiled:
    """The program of a run for these devices. No array is made on them.

    Raises:
        ValueError: as `make_program`.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        program = make_program(config, task, where.devices)
    with jax.default_device(where.devices[0]):
        lowered = lower_steps(program)
        return targets.compile(lowered, **program.options()) if where.target else lowered.compile()


def make_plan(config: Config, task: Task, where: Where) -> Plan:
    """The plan of a run.

    Args:
        config: the run's.
        task: of `train.tasks.abstract_task`: a batch, no data.
        where: of `open_devices`.

    Raises:
        ValueError: as `make_program`; a mesh with data=-1.
    """
    counted = parts(config, task, where.devices[0])
    compiled = compile_steps(config, task, where)
    program = read(compiled.as_text() or "")
    sends = [each for each in collectives(program, unknown=1) if each.group_size > 1]
    held = {"parameters": counted.parameters, "optimizer": counted.optimizer}
    held["batch"] = counted.batch
    return Plan(
        **held,
        temporaries=memory_report(compiled).total - sum(held.values()),
        parts=counted,
        collectives=sum(each.times for each in sends),
        sent=sent_bytes(sends)["total"],
        work=total(work(program), where.target) if where.target else None,
    )
