"""Memory of a training step of the runs in `configs`, as the compiler has planned it."""

from collections.abc import Callable
from typing import Any

import jax

from bdia_jax import memory_report
from train.config import Config
from train.loop.program import Program, compile_steps, make_program
from train.tasks.task import Task

Rows = dict[str, tuple[str, dict[str, Any]]]  # row of a table: (run of a config, changes of it)


def step_bytes(config: Config, task: Task) -> tuple[dict[str, int], list[Any]]:
    """What a training step needs beside its data, and the shapes of what it trains.

    temp_bytes: temporaries. state_bytes: parameters and optimizer state. total_bytes: both.
    """
    program = make_program(config, task)
    report = memory_report(compile_steps(program))
    state = report.arguments - sum(leaf.nbytes for leaf in jax.tree.leaves(task.train_groups))
    sizes = {"temp_bytes": report.temporaries, "state_bytes": state}
    return sizes | {"total_bytes": report.temporaries + state}, trained(program)


def trained(program: Program) -> list[Any]:
    """Shapes of the trained parameters; their gradients have the same."""
    return jax.tree.leaves(jax.eval_shape(program.init)["params"])


def table(
    rows: Rows, measure: Callable[[str, dict[str, Any]], dict], line: Callable[[str, dict], str]
) -> dict[str, dict]:
    """`measure(run, changes)` and the ratio to "plain" of every row, each printed as a `line`."""
    results: dict[str, dict] = {}
    for name, (run, changes) in rows.items():
        row = results[name] = measure(run, changes)
        row["ratio_to_plain"] = row["total_bytes"] / results["plain"]["total_bytes"]
        print(line(name, row), flush=True)
    return results
