"""Silence about what Orbax leaves behind when a read or a write fails."""

import logging
import sys
import warnings
from typing import Any


def silence() -> None:
    """From now on nothing is printed of the tasks Orbax drops when one of them fails.

    It runs one for each array, raises the error of the first to fail, and closes their event
    loop. Python then tells of each of the others at length, some much later, from other threads.
    Other complaints are printed as before.
    """
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
        logging.getLogger("asyncio").addFilter(
            lambda record: "tensorstore" not in record.getMessage().lower()
        )
        warnings.filterwarnings("ignore", "coroutine '_read_array_index", RuntimeWarning)


class _Hook:
    def __init__(self, before: Any):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        is_of_orbax = code is not None and "orbax" in code.co_filename
        if not is_of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)
