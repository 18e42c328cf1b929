"""Tiny training runs: digits, as a config says, or a linear model that compiles in a second."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from toy import bits

from configs import vit_digits
from train.loop import train as training
from train.loop.log import read_records
from train.tasks import open_config
from train.tasks.task import Task


def tiny(data_dir, run="bdia", **changes):
    """Six steps of configs/vit_digits.py; each is logged, every second evaluated and saved."""
    config = vit_digits.get_config(f"{run},smoke").unlock()
    config.update({"data_dir": data_dir, "num_steps": 6, "warmup_steps": 2})
    config.update({"log_every_steps": 1, "eval_every_steps": 2, "checkpoint_every_steps": 2})
    config.update(changes)
    return open_config(config.lock())


class Linear(nnx.Module):
    """[B, 3] @ [3]."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, x):
        return x @ self.w[...]


def points(config=None):
    """The task of fitting 64 points, with noise that each step draws, for any config."""
    del config
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    y = x @ np.float32([1, -2, 3])

    def prepare(key, batch):
        return batch | {"y": batch["y"] + 0.1 * jax.random.normal(key, batch["y"].shape)}

    def metrics(model, batch, rngs):
        out, one = model(batch["x"]), jnp.ones_like(batch["y"])
        if rngs is not None:
            out += 0.1 * jax.random.normal(rngs.dropout(), out.shape)
        right = ((out > 0) == (batch["y"] > 0)).astype(jnp.float32)
        return {"loss": ((out - batch["y"]) ** 2, one), "accuracy": (right, one)}

    def finish(models, workdir):
        return {"accuracy_gamma_0.25": [float(abs(model.w[...]).sum() % 1) for model in models]}

    groups = tuple(({"x": x[part], "y": y[part]},) for part in (slice(64), slice(64, 80)))
    return Task(*groups, Linear, metrics, "points", prepare, finish)


def guard_bits_built(monkeypatch):
    """A list of the guard bits of the model of every program that `train` makes from now on."""
    built, make = [], training.make_program

    def record(config, task):
        program = make(config, task)
        built.append(program.abstract.stack.fixed_point.guard_bits)
        return program

    monkeypatch.setattr(training, "make_program", record)
    return built


def saved_bits(workdir, step):
    """The bits of every array of a checkpoint, as Orbax alone reads it."""
    state = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return [bits(leaf).tolist() for leaf in jax.tree.leaves(state)]


def losses(workdir, *kinds):
    """(step, kind, loss) of all records, or of those kinds."""
    records = [r for r in read_records(workdir) if "loss" in r]
    return [(r["step"], r["kind"], r["loss"]) for r in records if r["kind"] in kinds or not kinds]
