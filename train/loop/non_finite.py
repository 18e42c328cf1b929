"""A step whose loss or gradient is not finite: kept out of the state, noted, and written down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config import Config
from train.devices.processes import first_does
from train.run.checksum import by_path

_FOLDER = "non_finite"  # in a workdir


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

    The file has step, seed, loss, grad_norm, grad_norm/PARAMETER and batch/FIELD, the examples as
    the data set has them: what the step draws, such as augmentation, follows from seed and step
    (`train.loop.step_inputs`). Of the skipped steps it is the first in the workdir only. All
    processes have to call it.

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
    leaf_norms = dict(zip(by_path(state["params"]), first.leaf_norms, strict=True))
    of_seed = f" of seed {seed}" if config.num_seeds > 1 else ""
    said = (
        f"step {at}{of_seed} is not finite: loss is {first.loss}, grad_norm is {first.grad_norm}; "
        f"{_worst(leaf_norms)}"
    )
    folder = workdir / _FOLDER
    if config.non_finite == "skip" and first_does(lambda: any(folder.glob("step_*.npz"))):
        return said
    values = {"step": first.step, "seed": np.int32(seed), "loss": first.loss}
    values["grad_norm"] = first.grad_norm
    values |= {f"grad_norm/{name}": norm for name, norm in leaf_norms.items()}
    values |= {f"batch/{name}": array for name, array in by_path(batch(seed, at)).items()}
    file = folder / f"step_{at}.npz"
    first_does(_write, file, values)
    return f"{said}. {file} has its batch and the norm of each gradient"


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    written = file.with_suffix(".tmp")
    with written.open("wb") as out:
        np.savez(out, **values)
    written.replace(file)


def _worst(leaf_norms: dict[str, Any]) -> str:
    """Which gradients are not finite, in words."""
    bad = [name for name, norm in leaf_norms.items() if not np.isfinite(norm)]
    if not bad:
        return "the gradient of every parameter is finite"
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"not finite is the gradient of {bad[0]}{more} of {len(leaf_norms)} parameters"
