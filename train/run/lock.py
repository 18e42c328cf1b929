"""One program at a time trains in a workdir."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

FILE = "lock"  # in a workdir; it stays there, and says nothing once its program has ended


class Lock:
    """Held from `take` to the end of the block, or of the process, however that ends.

    It is the system's lock on a file, not the file: a killed run leaves nothing to be removed, and
    no process number is looked up, which another container counts anew. On NFS the server keeps
    it, for all hosts.

    Args:
        workdir: of the run; reading it takes no lock.
    """

    def __init__(self, workdir: Path):
        self._path = Path(workdir) / FILE
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Takes it, unless it is held by this object already. The workdir has to exist.

        Raises:
            ValueError: another program trains in this workdir; or the file cannot be written.
        """
        if self._file is not None:
            return
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{self._path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise ValueError(
                    f"{self._path.parent} is being trained by {_holder(file)}; wait for its end, "
                    "stop it, or take another --workdir"
                ) from None
        except OSError as error:  # a file system without locks
            print(
                f"{self._path} cannot be locked ({error.strerror}): see to it yourself that no "
                "other program trains in this workdir",
                flush=True,
            )
        self._file = file
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        with contextlib.suppress(OSError):  # a full disk: it is locked all the same
            file.truncate(0)
            file.write(json.dumps(holder) + "\n")
            file.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written above
                self._file.close()
            self._file = None


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        found = json.loads(file.read(1000))
        return f"process {found['pid']} on {found['host']} since {found['since']}"[:300]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another program"
