"""What a checkpoint says of itself: of which step it is, how good, with which checksums."""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from train.run.checksum import by_path


class Damaged(Exception):
    """A checkpoint is not what was saved. The message says how that was noticed."""


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        record = json.loads((folder / "record" / "metadata").read_text("utf-8"))
        checksum = record.pop("crc32")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"its record cannot be read, {reason_of(error)}") from error
    if checksum != _crc32(record):
        raise Damaged("its record is not equal to its checksum")
    return record


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own checksum, as it is to be written."""
    return record | {"crc32": _crc32(record)}


def described(tree: Any, sums: Mapping[str, int] | None = None) -> dict[str, list]:
    """[dtype, shape, checksum if given] of each array, by its path, as JSON has it."""
    return {
        name: [str(leaf.dtype), list(leaf.shape), *([] if sums is None else [sums[name]])]
        for name, leaf in by_path(tree).items()
    }


def score_of(metrics: Mapping[str, Any]) -> float | None:
    """Higher is better; the mean over the seeds. None for no evaluation, or one that is nan."""
    for name, sign in (("accuracy", 1), ("loss", -1)):
        if name in metrics:
            value = sign * float(np.mean(metrics[name]))
            return value if np.isfinite(value) else None
    return None


class PreserveBest(PreservationPolicy):
    """Preserves the `count` checkpoints with the highest score (-inf: none), of equal the newest.

    Unlike Orbax's BestN it reads the score itself, and survives a record that is damaged.
    """

    def __init__(self, count: int, score: Callable[[int], float]):
        self._count = count
        self._score = score

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        scored = sorted(((self._score(info.step), info.step) for info in checkpoints), reverse=True)
        best = {step for score, step in scored[: self._count] if score > -math.inf}
        return [info.step in best for info in checkpoints]


def reason_of(error: BaseException) -> str:
    """What the operating system says, else the end of a library's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    number = re.search(r"os_error_code='(\d+)'", text)  # of TensorStore
    if number:
        return os.strerror(int(number[1]))
    text = (text.split("[tensorstore_spec")[0].strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: " + (text if len(text) < 200 else f"... {text[-200:]}")


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
