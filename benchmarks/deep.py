"""1,024 blocks trained: every state rebuilt exactly, the loss falls, and what memory it takes.

A ViT on scikit-learn's digits, whose class token sees the image only through the blocks. Every
rebuilt state is audited, before the first step and after the last. The memory of the whole
training step is the compiler's plan, for other ways of training it too; that of an added block
is the difference between two stacks of such blocks.

Such a depth needs a smaller beginning: the projections that end a branch start 1 / sqrt(2 K) as
large, as in GPT-2, and Adam's rate falls with the width. `unscaled` is the run without the
former: gamma is drawn anew in every block, and 1,024 large random steps drown the image.

With --gpu the batch is the smallest for which the K states of per-block `jax.checkpoint` alone are
more than the device's memory; parts of it are audited, for all K states must then fit.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import memory_report
from bdia_jax.nnx import BDIAStack
from benchmarks import figure, memory, record, runs
from benchmarks.digits import GPU, TOY, Size, beyond, digits_task, make_config, stack_to_audit
from benchmarks.measure import audit_row, device_bytes, size_in_bytes, unless_too_large
from benchmarks.stack import LABELS, MIB, VARIANTS, Maker, color
from train.config import Config
from train.loop.program import Program, compile_steps, make_program
from train.tasks.task import Task

COMPARED = ["plain", "remat", "remat_sqrt"]  # planned only
SCORES = ("loss", "accuracy")


def steps(train_steps: Callable, state: Any, task: Task, count: int) -> tuple[Any, dict]:
    """(state after so many steps, loss and accuracy of every one, seconds of a step)."""
    records: dict[str, list[float]] = {name: [] for name in SCORES}
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = train_steps(state, task.train_groups, jnp.ones([], jnp.int32))
        for name, values in records.items():
            values.append(float(metrics[name]))
    return state, records | {"seconds_per_step": (time.perf_counter() - start) / count}


def audit(config: Config, task: Task, model: Any) -> dict[str, Any]:
    """Whether the states of one part of the batch, rebuilt in training mode, are exact."""
    stack, x = stack_to_audit(config, task, model)
    found = stack.audit(x, rngs=nnx.Rngs(0))
    print(found, flush=True)
    output = nnx.jit(lambda stack, x: stack(x, rngs=nnx.Rngs(0)))(stack, x)
    return audit_row(found) | {"largest_output": float(jnp.abs(output).max())}


def plan(config: Config, make_stack: Maker, limit: int | None) -> dict[str, Any]:
    """Bytes of a whole training step, and whether it fits the device's memory.

    rest_bytes: beside parameters, optimizer state and gradients.
    """
    program = make_program(config, digits_task(config, make_stack))
    train_steps = unless_too_large(lambda: compile_steps(program))
    if train_steps is None:
        return {"fits": False, "error": "out of memory"}
    return _planned(program, train_steps, limit)


def _planned(program: Program, train_steps: Any, limit: int | None) -> dict[str, Any]:
    report = memory_report(train_steps)
    gradients = size_in_bytes(runs.trained(program))
    return {
        "temp_bytes": report.temporaries,
        "state_bytes": report.arguments,
        "total_bytes": report.total,
        "rest_bytes": report.total - report.arguments - gradients,
        "fits": limit is None or report.total <= limit,
    }


def run(
    size: Size, names: list[str], depths: list[int], limit: int | None, *, unscaled: bool
) -> dict[str, Any]:
    """Everything that is measured.

    Args:
        size: of the run.
        names: variants of `benchmarks.stack` whose training step is planned, not run.
        depths: of the two stacks an added block is measured by.
        limit: bytes of the device's memory, None if it does not say.
        unscaled: whether to train from the usual initialization too.
    """
    config = make_config(size)
    make_bdia = partial(BDIAStack, batch_chunks=size.parts)
    task = digits_task(config, make_bdia)
    program = make_program(config, task)
    train_steps = compile_steps(program)
    plans = {"bdia": _planned(program, train_steps, limit)}
    plans |= {name: plan(config, VARIANTS[name], limit) for name in names}
    for name, row in plans.items():
        print(f"{name:11s} {_words(row)}", flush=True)
    remat = ["remat"] if "remat" in names else []
    stack = memory.against_depth([*remat, "bdia_guard1"], size.shape, depths)
    results: dict[str, Any] = {"planned": plans, "stack": stack, "audits": {}}
    state = program.init()
    results["audits"]["start"] = audit(config, task, program.models(state)[0])
    state, results["scaled"] = steps(train_steps, state, task, size.steps)
    results["audits"]["end"] = audit(config, task, program.models(state)[0])
    scores = program.evaluate(state, task.eval_groups)
    results["held_out"] = {name: float(scores[name]) for name in SCORES}
    print(f"{size.steps} steps, held out: {results['held_out']}", flush=True)
    if unscaled:
        usual = make_program(config, digits_task(config, make_bdia, scaled=False))
        _, results["unscaled"] = steps(train_steps, usual.init(), task, size.steps)
    return results


def draw(results: dict[str, Any], size: Size, path: Path) -> None:
    """Loss by step, and the memory of a step."""
    labels = {"scaled": "branches start 1 / sqrt(2 K) as large", "unscaled": "as usual"}
    colors = {"unscaled": "0.55", "scaled": color("bdia")}
    rows = results["planned"]
    title = (
        f"ViT of {size.depth:,} blocks on digits, {size.dtype}, B={size.batch} "
        f"T={size.shape.tokens} D={size.width}, on {record.device_name()}"
    )
    with figure.panels(path, title, (9.6, 3.2)) as (left, right):
        for name in (name for name in colors if name in results):
            losses = results[name]["loss"]
            means = [np.mean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
            left.plot(range(1, len(losses) + 1), means, color=colors[name], label=labels[name])
        left.axhline(math.log(10), color="0.8", linewidth=1, zorder=0)
        left.set(xlabel="step", ylim=(0, None))
        figure.caption(left, "training loss, mean of 5 steps (line: chance)")
        left.legend(frameon=False, fontsize=8)
        for y, (name, row) in enumerate(rows.items()):
            rest = max(row.get("rest_bytes", 0) / MIB, 0.1)
            right.plot(rest, y, "o", color=color(name))
            right.annotate(_words(row), (rest, y), **figure.BESIDE)
        right.set_yticks(range(len(rows)), [LABELS.get(name, "BDIA") for name in rows])
        right.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
        right.set_xlim(right=12 * right.get_xlim()[1])  # room for the words
        right.minorticks_off()
        right.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        what = "MiB of a training step, parameters, Adam\nand gradients aside (with them)"
        figure.caption(right, what, grid="x")


def _words(row: dict[str, Any]) -> str:
    """What the plan says."""
    if "error" in row:
        return row["error"]
    words = f"{row['rest_bytes'] / MIB:,.1f} ({row['total_bytes'] / MIB:,.0f})"
    return words if row["fits"] else f"{words}, does not fit"


def main(argv: list[str]) -> dict:
    """Trains, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    limit = device_bytes()
    size, names = (TOY, []) if args.toy else (Size(), COMPARED)
    depths = [size.depth // 2, size.depth]
    if args.gpu:
        size, names = beyond(limit or 2**34, GPU), ["remat", "remat_sqrt"]
        depths = [size.depth // 16, size.depth // 8]  # per-block checkpointing fits
    results = run(size, names, depths, limit, unscaled=not (args.toy or args.gpu))
    config = {
        "size": size,
        "shape": size.shape,
        "depths": depths,
        "bytes_limit": limit,
        "learning_rate": make_config(size).learning_rate,
    }
    path = record.write("deep", results, config, argv=argv, args=args)
    draw(results, size, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
