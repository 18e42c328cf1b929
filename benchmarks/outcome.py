"""What a call that may be given anything did: accept it, refuse it in a line of ours, or fail."""

import contextlib
import io
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).parent.parent
_SECONDS = 60  # more for one case is a failure, too
_MORE_BYTES = 8 * 2**30
ACCEPTED, REFUSED, USAGE, FAILED = "accepted", "refused", "usage", "failed"


class Outcome(NamedTuple):
    """kind: one of the four; message: what the program said."""

    kind: str
    message: str


def outcome_of(call: Callable[[], Any]) -> Outcome:
    """What a call says and does, within a minute and some memory."""
    said = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            _in_memory(),
            _in_time(),
        ):
            call()
    except SystemExit as stop:
        return _of_exit(stop, said.getvalue())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(FAILED, f"{_described(error)}")
    return Outcome(ACCEPTED, "")


def _of_exit(stop: SystemExit, said: str) -> Outcome:
    if stop.code in (0, None):
        return Outcome(ACCEPTED, said)
    if isinstance(stop.code, str):
        cause = stop.__context__
        bad = "Traceback" in stop.code or not stop.code.startswith("error: ")
        if bad or (cause is not None and not _is_ours(cause)):
            return Outcome(FAILED, f"{stop.code[:500]}\n{cause and _described(cause)}")
        return Outcome(REFUSED, stop.code)
    if "Traceback" in said or "usage:" not in said:
        return Outcome(FAILED, f"status {stop.code}: {said[-500:]}")
    return Outcome(USAGE, said)


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of this repository, or is told by `cli.parse_flags`."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) and error.filename is not None:
        return True  # names the file
    if any(frame.name == "parse_flags" for frame in frames):
        return True
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_HERE)


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(_HERE)][-2:]
    lines = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*ours, *frames[-1:]]]
    return f"{type(error).__name__}: {str(error)[:300]} [{' < '.join(reversed(lines))}]"


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(number, frame):
        raise TimeoutError(f"took more than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _in_memory() -> Iterator[None]:
    """Asking for much more than there is in use now is a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
