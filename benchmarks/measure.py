"""How the benchmarks measure: bytes as the compiler plans them, audits, and seconds in turns."""

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from bdia_jax import Audit, memory_report

_T = TypeVar("_T")


# --- memory ------------------------------------------------------------------------------


def unless_too_large(run: Callable[[], _T]) -> _T | None:
    """run(), or None if it fails for want of memory."""
    try:
        return run()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def device_bytes() -> int | None:
    """What JAX may use of the device's memory; None where it does not say (on a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def temp_bytes(lowered: jax.stages.Lowered) -> int | None:
    """Of a program; None if it does not fit on the device, arguments and outputs included.

    Beyond that XLA on a GPU changes the program to make it fit, and its plan says nothing.
    """
    report = unless_too_large(lambda: memory_report(lowered.compile()))
    if report is None or report.total > (device_bytes() or math.inf):
        return None
    return report.temporaries


def size_in_bytes(tree: Any) -> int:
    """Of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- exactness ---------------------------------------------------------------------------


def audit_row(found: Audit) -> dict[str, Any]:
    """What an audit found, for JSON; max_drift is None if no guard bits could bear it."""
    return {
        "guard_bits": found.fixed_point.guard_bits,
        "states": len(found.mismatches),
        "elements": found.elements * len(found.mismatches),
        "mismatches": int(found.mismatches.sum()),
        "x0_mismatches": found.x0_mismatches,
        "invalid": found.invalid,
        "corrections": int(found.corrections.sum()),
        "max_drift": found.max_drift if math.isfinite(found.max_drift) else None,
        "exact": found.exact,
        "suggested_guard_bits": found.suggested_guard_bits,
    }


# --- time --------------------------------------------------------------------------------


class Stepper:
    """A compiled training step and what it is called with.

    Args:
        step: (params, *rest) -> (params, loss, ...), params donated.
        params, rest: its first arguments; parameters move on from call to call.
    """

    def __init__(self, step: Callable[..., Any], params: Any, *rest: Any):
        self.step, self.params, self.rest = step, params, rest

    def seconds(self, steps: int) -> float:
        """Mean seconds of a step over `steps` steps in a row."""
        start = time.perf_counter()
        out: tuple = ()
        for _ in range(steps):
            out = self.step(self.params, *self.rest)
            self.params = out[0]
            if len(out[1].devices()) > 1:  # they must not queue up on few cores
                out[1].block_until_ready()
        jax.block_until_ready(out)
        seconds = (time.perf_counter() - start) / steps
        if not jnp.isfinite(out[1]):
            raise RuntimeError(f"loss is {out[1]}; a diverged step is not worth timing")
        return seconds


def in_turns(steppers: dict[str, Stepper], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step, round after round: a slow minute of the machine falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            seconds[name].append(stepper.seconds(steps))
    return seconds
