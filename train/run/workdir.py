"""The workdir: which run it holds, and what may change when it is resumed."""

import contextlib
import dataclasses
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.config import Config
from train.tasks import open_config

# What may differ between a run and its resumption without making it another run.
_FREE_FIELDS = (
    *("data_dir", "log_every_steps", "eval_every_steps", "checkpoint_every_steps"),
    *("keep_last", "keep_best", "mesh.*", "non_finite"),
)
_NO_CONTENT = {"config.tmp", "lost+found"}  # left by a kill; in the root of a file system


def open_workdir(workdir: str, config: Config) -> Path:
    """Creates the workdir, or checks that an existing one is of the same run.

    Raises:
        ValueError: it cannot be written, holds something else, or holds a run of another
            config; the changed fields are named. Nothing is touched then.
    """
    path = _absolute(workdir)
    file = path / "config.json"
    values = json.loads(json.dumps(_flat(dataclasses.asdict(config))))  # as it will be read
    with _usable(path):
        path.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _check_same(_read_values(file), values, path)
        elif {entry.name for entry in path.iterdir()} - _NO_CONTENT:
            raise ValueError(
                f"workdir {path} has files but no config.json, so it is no run to resume"
            )
        else:
            written = file.with_suffix(".tmp")
            written.write_text(json.dumps(values, indent=1) + "\n")
            written.replace(file)  # in one go: a kill leaves all of it or none
    return path


def holds_run(workdir: str) -> bool:
    """Whether there is a run to resume.

    Raises:
        ValueError: no folder can have this name.
    """
    path = _absolute(workdir)
    with _usable(path):
        return (path / "config.json").exists()


def read_config(workdir: Path) -> Config:
    """The config of a run, from its workdir.

    Raises:
        ValueError: the file is damaged, or of another version of this program.
    """
    file = workdir / "config.json"
    nested: dict[str, Any] = {}
    for name, value in _read_values(file).items():
        *where, field = name.split(".")
        place = nested.setdefault(where[0], {}) if where else nested
        place[field] = tuple(value) if isinstance(value, list) else value
    try:
        return open_config(ConfigDict(nested))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_damaged(file, f"{type(error).__name__}: {error}")) from error


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """A file that cannot be written inside ends the run with a ValueError that says so."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{error.filename or 'a file'} in {workdir} could not be written: {error.strerror}; "
            "the checkpoints stay, and the same command resumes from the newest"
        ) from error


def _absolute(workdir: str) -> Path:
    if not str(workdir).strip():
        raise ValueError(f"workdir is {workdir!r}; name a folder, as in --workdir=runs/digits")
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in str(workdir)):
        raise ValueError(f"workdir {workdir!r} has a zero byte or is no text; take another name")
    return Path(workdir).absolute()


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"workdir {path} cannot be used: {error.strerror}") from error


def _read_values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise ValueError(_damaged(file, str(error))) from error
    if not isinstance(values, dict):
        raise ValueError(_damaged(file, f"a {type(values).__name__} instead of fields"))
    return values


def _damaged(file: Path, reason: str) -> str:
    return (
        f"{file} is damaged, or of another version of this program ({reason}). Start the same "
        "command on a new --workdir, and copy the config.json from there"
    )


def _check_same(old: dict, new: dict, path: Path) -> None:
    changed = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]
    if changed:
        raise ValueError(
            f"workdir {path} holds a run of another config: {'; '.join(changed)}. "
            "Set them back to resume it, or take another --workdir"
        )


def _is_free(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _FREE_FIELDS)


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
