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

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bdia_jax import memory_report
from bdia_jax.nnx import BDIAStack
from benchmarks import memory, record
from benchmarks.digits import GPU, TOY, Size, beyond, digits_task, make_config
from benchmarks.stack import LABELS, MIB, VARIANTS, Maker, color
from benchmarks.step_time import is_out_of_memory
from train.config import Config
from train.loop.program import Program, compile_steps, make_program
from train.tasks.images import normalize
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


def audit(program: Program, state: Any, task: Task, size: Size) -> dict[str, Any]:
    """Whether the states of one part of the batch, rebuilt in training mode, are exact."""
    model: Any = program.models(state)[0]
    stack = model.stack
    images = task.train_groups[0].images[: size.batch // size.parts]
    x = _before_the_stack(model, normalize(images))
    stack.train()
    stack.batch_chunks = 1  # the blocks see in it what they see in training
    found = stack.audit(x, rngs=nnx.Rngs(0))
    print(found, flush=True)
    return {
        "exact": found.exact,
        "states": len(found.mismatches),
        "elements": found.elements * len(found.mismatches),
        "mismatches": int(found.mismatches.sum()),
        "x0_mismatches": found.x0_mismatches,
        "invalid": found.invalid,
        "corrections": int(found.corrections.sum()),
        "max_drift": found.max_drift,
        "suggested_guard_bits": found.suggested_guard_bits,
        "largest_output": float(jnp.abs(_output(stack, x)).max()),
    }


def _before_the_stack(model: Any, images: jax.Array) -> jax.Array:
    """x_0 of these images."""
    seen = []

    class Keep(nnx.Module):
        def __call__(self, x, rngs=None):
            seen.append(x)
            return x

    stack, model.stack = model.stack, Keep()
    model(images)
    model.stack = stack
    return seen[0]


@nnx.jit
def _output(stack, x):
    return stack(x, rngs=nnx.Rngs(0))


def plan(config: Config, make_stack: Maker, limit: int | None) -> dict[str, Any]:
    """Bytes of a whole training step, and whether it fits the device's memory.

    rest_bytes: beside parameters, optimizer state and gradients.
    """
    try:
        task = digits_task(config, make_stack)
        program = make_program(config, task)
        return _planned(program, compile_steps(program), limit)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"fits": False, "error": str(error).splitlines()[0]}


def _planned(program: Program, train_steps: Any, limit: int | None) -> dict[str, Any]:
    report = memory_report(train_steps)
    parameters = jax.tree.leaves(jax.eval_shape(program.init)["params"])
    gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in parameters)
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
    stack = memory.against_depth(["remat", "bdia_guard1"], size.shape, depths)
    results: dict[str, Any] = {"planned": plans, "stack": stack, "audits": {}}
    state = program.init()
    results["audits"]["start"] = audit(program, state, task, size)
    state, results["scaled"] = steps(train_steps, state, task, size.steps)
    results["audits"]["end"] = audit(program, state, task, size)
    scores = program.evaluate(state, task.eval_groups)
    results["held_out"] = {name: float(scores[name]) for name in SCORES}
    print(f"{size.steps} steps, held out: {results['held_out']}", flush=True)
    if unscaled:
        usual = make_program(config, digits_task(config, make_bdia, scaled=False))
        _, results["unscaled"] = steps(train_steps, usual.init(), task, size.steps)
    return results


def draw(results: dict[str, Any], size: Size, path: Path) -> None:
    """Loss by step, and the memory of a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2), dpi=160, layout="constrained")
    labels = {"scaled": "branches start 1 / sqrt(2 K) as large", "unscaled": "as usual"}
    for name, line in (("unscaled", "0.55"), ("scaled", color("bdia"))):
        if name not in results:
            continue
        losses = _smooth(results[name]["loss"])
        left.plot(range(1, len(losses) + 1), losses, color=line, label=labels[name])
    left.axhline(math.log(10), color="0.8", linewidth=1, zorder=0)
    left.set(xlabel="step", ylim=(0, None))
    left.set_title("training loss, mean of 5 steps (line: chance)", loc="left", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    rows = results["planned"]
    for y, (name, row) in enumerate(rows.items()):
        rest = max(row.get("rest_bytes", 0) / MIB, 0.1)
        right.plot(rest, y, "o", color=color(name))
        place: Any = {
            "xytext": (8, 0),
            "textcoords": "offset points",
            "va": "center",
            "fontsize": 8,
        }
        right.annotate(_words(row), (rest, y), **place)
    right.set_yticks(range(len(rows)), [LABELS.get(name, "BDIA") for name in rows], fontsize=8)
    right.set(xscale="log", ylim=(-0.6, len(rows) - 0.4))
    right.set_xlim(right=12 * right.get_xlim()[1])  # room for the words
    right.invert_yaxis()
    right.minorticks_off()
    right.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    right.grid(axis="x", color="0.92")
    right.set_title(
        "MiB of a training step, parameters, Adam\nand gradients aside (with them)",
        loc="left",
        fontsize=9,
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(
        f"ViT of {size.depth:,} blocks on digits, {size.dtype}, B={size.batch} "
        f"T={size.shape.tokens} D={size.width}, on {record.device_name()}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)
    plt.close(figure)


def _words(row: dict[str, Any]) -> str:
    """What the plan says."""
    if "error" in row:
        return row["error"]
    words = f"{row['rest_bytes'] / MIB:,.1f} ({row['total_bytes'] / MIB:,.0f})"
    return words if row["fits"] else f"{words}, does not fit"


def _smooth(losses: list[float]) -> list[float]:
    return [float(np.mean(losses[max(0, i - 4) : i + 1])) for i in range(len(losses))]


def main(argv: list[str]) -> dict:
    """Trains, draws and records."""
    args = record.parse(record.parser(__doc__), argv)
    limit = memory.device_bytes()
    size, names = (TOY, ["remat"]) if args.toy else (Size(), COMPARED)
    depths = [size.depth // 2, size.depth]
    if args.gpu:
        size, names = beyond(limit or 2**34, GPU), ["remat", "remat_sqrt"]
        depths = [size.depth // 16, size.depth // 8]  # per-block checkpointing fits
    results = run(size, names, depths, limit, unscaled=not (args.toy or args.gpu))
    config = {
        "size": dataclasses.asdict(size),
        "shape": dataclasses.asdict(size.shape),
        "depths": depths,
        "bytes_limit": limit,
        "learning_rate": make_config(size).learning_rate,
    }
    path = record.write("deep", results, config, argv=argv, args=args)
    draw(results, size, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
