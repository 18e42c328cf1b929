"""Which examples a run was trained on, in 16 digits: others are not resumed on."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.devices.shards import local_rows
from train.tasks.task import Task


def data_fingerprint(task: Task, mesh: Mesh | None) -> str:
    """A hash of all examples, the same however many processes hold them.

    Args:
        task: its training examples may be this process's share.
        mesh: which tells the share.
    """
    total = 0
    for number, (group, count) in enumerate(zip(task.train_groups, task.train_sizes, strict=True)):
        arrays = [np.asarray(array) for array in jax.tree.leaves(group)]
        rows = local_rows(count, mesh)
        held = range(len(rows)) if len(arrays[0]) == len(rows) else rows
        for row, place in zip(rows, held, strict=True):
            total += _hash(number, row, *(array[place].tobytes() for array in arrays))
    if jax.process_count() > 1:
        halves = np.asarray([total >> 32 & 0xFFFFFFFF, total & 0xFFFFFFFF], np.uint32)
        gathered = multihost_utils.process_allgather(halves).astype(object).reshape(-1, 2)
        total = sum((int(high) << 32) + int(low) for high, low in gathered)
    held_out = (np.asarray(array).tobytes() for array in jax.tree.leaves(task.eval_groups))
    return f"{(total + _hash(*held_out)) % 2**64:016x}"


def _hash(*parts: Any) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
    return int.from_bytes(digest.digest()[:8], "little")
