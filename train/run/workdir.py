"""The workdir: which run it holds, and what may change when it is resumed."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from train.config import Config
from train.run import lock
from train.run.missing import is_bereft, no_config
from train.tasks import open_config

# What may differ between a run and its resumption without making it another run.
_FREE = re.compile(
    r"data_dir|(log|eval|checkpoint)_every_steps|keep_(last|best)|mesh\..*|non_finite"
)
# left by a kill; in the root of a file system
_NO_CONTENT = {"config.tmp", lock.FILE, "lost+found"}


def open_workdir(workdir: str, config: Config) -> Path:
    """Creates the workdir, or checks that an existing one is of the same run.

    Raises:
        ValueError: it cannot be written, holds something else, or holds a run of another
            config; the changed fields are named. Nothing is touched then.
    """
    path = _absolute(workdir)
    file = path / "config.json"
    values = flatten_dict(dataclasses.asdict(config), sep=".")
    values = json.loads(json.dumps(values))  # as it will be read
    with usable(path):
        path.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _check_same(read_fields(file), values, path)
        elif is_bereft(path):
            raise ValueError(no_config(path))
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
    with usable(path):
        return (path / "config.json").exists()


def read_values(workdir: Path) -> dict[str, Any]:
    """The fields of a run's config as they were written, {"model.width": 32}, of any version.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    if is_bereft(workdir):
        raise ValueError(no_config(workdir))
    return read_fields(workdir / "config.json")


def read_config(workdir: Path) -> Config:
    """The config of a run, from its workdir.

    Raises:
        ValueError: the file is damaged, or of another version of this program.
    """
    file = workdir / "config.json"
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in read_values(workdir).items()}
    try:
        return open_config(ConfigDict(unflatten_dict(values, sep=".")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(damaged(file, f"{type(error).__name__}: {error}")) from error


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
def usable(path: Path) -> Iterator[None]:
    """An error of the system inside is a ValueError that says so of the workdir."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"workdir {path} cannot be used: {error.strerror}") from error


def read_fields(file: Path) -> dict[str, Any]:
    """The dict in a JSON file. Raises ValueError if it is damaged."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise ValueError(damaged(file, str(error))) from error
    if not isinstance(values, dict):
        raise ValueError(damaged(file, f"a {type(values).__name__} instead of fields"))
    return values


def damaged(file: Path, reason: str) -> str:
    """What to say of such a file, with the remedy."""
    return (
        f"{file} is damaged, or of another version of this program ({reason}). Start the same "
        f"command on a new --workdir, and copy the {file.name} from there"
    )


def _check_same(old: dict, new: dict, path: Path) -> None:
    changed = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _FREE.fullmatch(name)
    ]
    if changed:
        raise ValueError(
            f"workdir {path} holds a run of another config: {'; '.join(changed)}. "
            "Set them back to resume it, or take another --workdir"
        )
