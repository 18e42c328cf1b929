"""How every program starts and ends: what is wrong is told in one line, not by a traceback."""

import argparse
import contextlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict


def run(main: Callable[[list[str]], Any]) -> None:
    """absl's app.run(main), with `told` around flags and main.

    A valid command line does what it does under app.run. Of a bad one, a config file that cannot
    be loaded or a field it has not, the reason is told.

    Args:
        main: (arguments that are no flags, the program's name first) -> exit status or None.
    """

    def guarded(arguments: list[str]) -> Any:
        with told():
            return main(arguments)

    app.run(guarded, flags_parser=parse_flags)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """An error of ours inside ends the program with "error: ..." and status 1.

    Ours are ValueError and OSError themselves and FileNotFoundError and its like, not other
    kinds of ValueError: a library's are a bug, and keep their traceback. A device without enough
    memory is told, too.
    """
    try:
        yield
    except OSError as error:
        sys.exit(f"error: {_of_system(error)}")
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"error: the device has too little memory ({str(error).splitlines()[0]}); take a "
            "smaller config.batch_size, more config.batch_chunks, or more devices by config.mesh"
        )


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses absl's flags; returns what is left of the arguments, the program's name first.

    Raises:
        SystemExit: with the reason, if they are bad.
    """
    try:
        left = flags.FLAGS(arguments)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            _check_loaded(flags.FLAGS["config"].value)
        return left
    except Exception as error:  # of the config file, too, which is a program of its own
        sys.exit(f"error: {_reason(error)}")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """parser.parse_args(argv), which refuses what no program can work with.

    That is text that is none, and a value "--", of which Python makes an empty list.
    """
    for argument in sys.argv[1:] if argv is None else argv:
        if argument.endswith("=--"):
            parser.error(f"{argument}: -- is no value")
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in argument):
            parser.error(f"{argument!r} is not UTF-8 text")
    return parser.parse_args(argv)


def _check_loaded(config: Any) -> None:
    if not isinstance(config, ConfigDict):
        getattr(config, "keys", None)  # of a file that could not be read: raises why
        raise ValueError(f"get_config() returned a {type(config).__name__}, expected a ConfigDict")


def _reason(error: BaseException) -> str:
    """What was wrong first: the libraries above it wrap errors in other errors."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    if isinstance(first, flags.Error):
        return f"{first} (--helpshort lists the flags)"
    if isinstance(first, OSError):
        reason = str(first).splitlines()[-1].strip() if str(first) else "it cannot be read"
        return f"--config: {reason}; name a file such as configs/vit_digits.py"
    if isinstance(error, flags.Error) and "as a ConfigDict" in str(error):
        given = str(error).partition(":")[0].removeprefix("flag ")
        return f"{given}: this is a group of fields; give one, {given.partition('=')[0]}.NAME=VALUE"
    if isinstance(error, flags.Error) and not _is_of_config_file(first):
        text = str(error)  # "flag --config.batch_size=abc: ...", or with a whole traceback
        return f"--config: {first}" if "\n" in text else text
    if type(first) is ValueError:
        return str(first)
    if isinstance(first, SyntaxError):
        return f"--config: {first.filename}, line {first.lineno} is no Python: {first.msg}"
    if isinstance(first, AttributeError) and str(first).endswith("attribute 'get_config'"):
        return (
            f"--config: {_config_file()} has no function get_config, as configs/vit_digits.py has"
        )
    if isinstance(first, AttributeError | KeyError) and not _is_of_config_file(first):
        name = first.args[0] if first.args else first
        near = re.search(r'Did you mean "(\w+)"', str(error))  # of ml_collections
        return f"--config: no such field: {name}" + (f"; did you mean {near[1]}?" if near else "")
    where = traceback.extract_tb(first.__traceback__)
    place = f" ({where[-1].filename}, line {where[-1].lineno})" if where else ""
    return f"{type(first).__name__}: {first}{place}"


def _config_file() -> str:
    """What --config names, without what follows a colon."""
    given = " ".join(sys.argv).replace("--config ", "--config=").rpartition("--config=")[2]
    return re.split("[: ]", given)[0] or "the file"


def _is_of_config_file(error: BaseException) -> bool:
    """Whether it was raised in get_config, or by loading the file."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "get_config" or frame.name == "<module>" for frame in frames[1:])


def _of_system(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)  # a message of ours
    return f"{Path(str(error.filename))}: {error.strerror}; name another file or folder"
