"""Several processes, one program: joining them, and what only the first of them does."""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(distributed: bool, coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the other processes; alone (False, "", 0, -1) it does nothing.

    Has to come before anything else of JAX. Processes other than the first print nothing.

    Args:
        distributed: whether the job manager (SLURM, MPI, Kubernetes) says the rest.
        coordinator, num_processes, process_id: else HOST:PORT of the first process, how many they
            are, and which this is.

    Raises:
        ValueError: arguments that do not fit, or processes that do not answer.
    """
    if not distributed and (coordinator, num_processes, process_id) == ("", 0, -1):
        return
    if not distributed and not (":" in coordinator and 0 <= process_id < num_processes):
        raise ValueError(
            f"--coordinator={coordinator!r} --num_processes={num_processes} "
            f"--process_id={process_id}: give all three, HOST:PORT, how many, and which from 0; or "
            "--distributed in a SLURM, MPI or Kubernetes job"
        )
    try:
        if distributed:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the processes could not be joined: {error}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this process writes the files and says what happens."""
    return jax.process_index() == 0


def first_does(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in the first process; the others wait, and return None.

    Raises:
        ValueError: in all of them, if it raises one in the first.
    """
    if jax.process_count() == 1:
        return function(*arguments)
    result = error = None
    if is_first():
        try:
            result = function(*arguments)
        except (ValueError, FileNotFoundError) as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise ValueError("process 0 has stopped; it says why")
    return result
