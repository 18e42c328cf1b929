"""The workdir: the config it belongs to, and Orbax checkpoints of the training state."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from train.config import Config

# What may differ between a run and its resumption without making it another run.
_FREE_FIELDS = ("data_dir", "log_every_steps", "eval_every_steps", "checkpoint_every_steps")


def open_workdir(workdir: str, config: Config) -> Path:
    """Creates the workdir, or checks that an existing one is of the same run.

    Raises:
        ValueError: it cannot be written, holds something else, or holds a run of another
            config; the changed fields are named. Nothing is touched then.
    """
    path = Path(workdir).absolute()
    file = path / "config.json"
    values = json.loads(json.dumps(_flat(dataclasses.asdict(config))))  # as it will be read
    try:
        path.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _check_same(json.loads(file.read_text()), values, path)
        elif any(path.iterdir()):
            raise ValueError(
                f"workdir {path} has files but no config.json, so it is no run to resume"
            )
        else:
            file.write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"workdir {path} cannot be used: {error.strerror}") from error
    return path


def read_config(workdir: Path) -> Config:
    """The config of a run, from its workdir."""
    nested: dict[str, Any] = {}
    for name, value in json.loads((workdir / "config.json").read_text()).items():
        *where, field = name.split(".")
        place = nested.setdefault(where[0], {}) if where else nested
        place[field] = tuple(value) if isinstance(value, list) else value
    return Config.from_config_dict(ConfigDict(nested))


def _check_same(old: dict, new: dict, path: Path) -> None:
    changed = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _FREE_FIELDS
    ]
    if changed:
        raise ValueError(
            f"workdir {path} holds a run of another config: {'; '.join(changed)}. "
            "Set them back to resume it, or take another --workdir"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


class Checkpoints:
    """The newest two states in workdir/checkpoints, written while training goes on."""

    def __init__(self, workdir: Path):
        self._manager = ocp.CheckpointManager(
            workdir / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def restore_or(self, init: Callable[..., Any], *arguments: Any) -> Any:
        """The newest saved state, in the layout of init(); init(*arguments) if there is none."""
        if self._manager.latest_step() is None:
            return init(*arguments)
        return self.restore(init)

    def restore(self, init: Callable[[], Any]) -> Any:
        """The newest saved state, in the layout of init().

        Raises:
            FileNotFoundError: there is none.
        """
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"{self._manager.directory} has no checkpoint yet; train it further"
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was saved
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            jax.eval_shape(init),
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, step: int, state: Any) -> None:
        """Saves unless this step is there already. Returns before the files are complete."""
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._manager.wait_until_finished()
        self._manager.close()
