"""SIGTERM and Ctrl-C: noticed, and obeyed once the run is saved."""

import contextlib
import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(SystemExit):
    """The run was asked to stop, and is saved. Ends the program with status 0 if nobody minds."""


class Interrupt:
    """Inside `with Interrupt() as interrupt`, the first SIGTERM or SIGINT only sets a flag.

    The second does what it did before, so that a run that does not stop can be ended. Signals that
    were ignored, as under nohup or in the background of a script, are taken, too: to save and stop
    is safe, and who sends them means it; the second ends the process. In a thread that is not the
    main one nothing is changed: Python lets only the main one take signals.
    """

    def __init__(self):
        self._number = 0
        self._before: dict[int, Any] = {}

    def requested(self) -> str:
        """The name of the signal, "" for none. With several processes of any of them.

        All have to ask at the same step, and wait for each other; so all get the same answer.
        """
        number = self._number
        if jax.process_count() > 1:
            number = int(np.max(multihost_utils.process_allgather(np.int32(number))))
        return signal.Signals(number).name if number else ""

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *exc_info):
        for number, handler in self._before.items():  # None: it was set outside of Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._number = number
        for each, handler in self._before.items():
            signal.signal(each, handler if callable(handler) else signal.SIG_DFL)
