"""A step whose loss or gradient is not finite: kept out of the state, noted, and written down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config import Config
from train.devices.processes import first_does

FOLDER = "non_finite"  # in a workdir


class Note(NamedTuple):
    """The first step of a dispatch that was not finite; with several seeds, of each seed.

    step: int32 [], -1 for none. loss, grad_norm: float32 []. leaf_norms: float32 [leaves], of the
    gradient of each parameter, as `jax.tree.leaves` orders them. skipped: int32 [], how many
    steps left the state as it was.
    """

    step: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    leaf_norms: jax.Array
    skipped: jax.Array

    @classmethod
    def none(cls, shape: tuple[int, ...], leaves: int) -> "Note":
        """Of no step yet. shape: () or (num_seeds,)."""
        zeros, ints = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
        return cls(ints - 1, zeros, zeros, jnp.zeros((*shape, leaves), jnp.float32), ints)

    def after(self, step: jax.Array, metrics: Any, leaf_norms: jax.Array) -> "Note":
        """The note when this step has been made."""
        bad = ~is_finite(metrics)
        here = Note(
            jnp.broadcast_to(step, bad.shape),
            metrics["loss"].astype(jnp.float32),
            metrics["grad_norm"].astype(jnp.float32),
            leaf_norms,
            self.skipped + bad,
        )
        chosen = select(bad & (self.step < 0), here, self)
        return chosen._replace(skipped=here.skipped)


def is_finite(metrics: Any) -> jax.Array:
    """bool [] or [num_seeds]: whether a step may change the state."""
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


def norms(grads: Any) -> jax.Array:
    """float32 [leaves]: the norm of each array."""
    squares = [jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(grads)]
    return jnp.sqrt(jnp.stack(squares).astype(jnp.float32))


def select(which: jax.Array, new: Any, old: Any) -> Any:
    """new where it holds, else old. which: bool [] or [num_seeds], a leading axis of all leaves."""

    def leaf(new, old):
        return jnp.where(which.reshape(which.shape + (1,) * (new.ndim - which.ndim)), new, old)

    return jax.tree.map(leaf, new, old)


def report(workdir: Path, config: Config, note: Note, state: Any, batch: Callable[..., Any]) -> str:
    """What the first bad step was, in words; all it saw goes to workdir/non_finite/step_N.npz.

    Of the skipped ones that is the first in the workdir only. All processes have to call it.

    Args:
        workdir: of the run.
        config: the run's.
        note: of the dispatch, on the host; some step was not finite.
        state: for the names of the parameters.
        batch: of `Program`, without the groups: (seed, step) -> the examples.
    """
    steps = np.atleast_1d(note.step)
    index = int(np.where(steps >= 0, steps, np.iinfo(np.int32).max).argmin())
    first = Note(*(each[index] for each in note)) if note.step.ndim else note
    seed, at = config.seed + index, int(first.step)
    of_seed = f" of seed {seed}" if config.num_seeds > 1 else ""
    said = (
        f"step {at}{of_seed} is not finite: loss is {first.loss}, grad_norm is {first.grad_norm}; "
        f"{worst(first, state['params'])}"
    )
    folder = workdir / FOLDER
    if config.non_finite == "skip" and first_does(_has_one, folder):
        return said
    examples = batch(seed, at)
    first_does(dump, folder, seed, first, state["params"], examples)
    return f"{said}. {folder / f'step_{at}.npz'} has its batch and the norm of each gradient"


def dump(folder: Path, seed: int, note: Note, params: Any, batch: Any) -> Path:
    """Writes step_N.npz: step, seed, loss, grad_norm, grad_norm/PARAMETER and batch/FIELD.

    Args:
        folder: workdir / FOLDER.
        seed: of the run.
        note: of this seed, on the host.
        params: for the names of the parameters.
        batch: the examples of the step as the data set has them. What the step draws, such as
            augmentation, is a function of seed and step (`train.loop.program`).
    """
    values = {"step": note.step, "seed": np.int32(seed), "loss": note.loss}
    values["grad_norm"] = note.grad_norm
    for (path, _), norm in zip(jax.tree.leaves_with_path(params), note.leaf_norms, strict=True):
        values[f"grad_norm/{_name(path)}"] = norm
    for path, array in jax.tree.leaves_with_path(batch):
        values[f"batch/{_name(path)}"] = array
    folder.mkdir(exist_ok=True)
    file = folder / f"step_{int(note.step)}.npz"
    written = file.with_suffix(".tmp")
    with written.open("wb") as out:
        np.savez(out, **values)
    written.replace(file)
    return file


def worst(note: Note, params: Any) -> str:
    """Which gradients are not finite, in words."""
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    bad = [name for name, norm in zip(names, note.leaf_norms, strict=True) if not np.isfinite(norm)]
    if not bad:
        return "the gradient of every parameter is finite"
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"not finite is the gradient of {bad[0]}{more} of {len(names)} parameters"


def _has_one(folder: Path) -> bool:
    return folder.exists() and any(folder.glob("step_*.npz"))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
