"""The plans of one run for every way of training its stack, side by side."""

from collections.abc import Callable, Mapping
from typing import Any

from bdia_jax.compiled.targets import Target
from train.plan.compiled import Plan

_MIB, _GIB = 2**20, 2**30
_MEMORY: dict[str, Callable[[Plan], int]] = {
    "parameters": lambda plan: plan.parameters,
    "optimizer state": lambda plan: plan.optimizer,
    "batch": lambda plan: plan.batch,
    "temporaries": lambda plan: plan.temporaries,
    "  gradients, counted": lambda plan: plan.parts.gradients,
    "  kept by blocks, counted": lambda plan: plan.parts.kept,
    "total": lambda plan: plan.total,
}
_SENT: dict[str, Callable[[Plan], str]] = {
    "collectives": lambda plan: f"{plan.collectives:,}",
    "GiB sent": lambda plan: f"{plan.sent / _GIB:,.2f}",
}
_WORK: dict[str, Callable[[Any], str]] = {
    "kernels": lambda work: f"{work.kernels:,}",
    "GiB moved": lambda work: f"{work.bytes / _GIB:,.1f}",
    "TFLOP": lambda work: f"{work.flops / 1e12:,.2f}",
    "at least, in ms": lambda work: f"{1e3 * work.seconds:,.1f}",
}


def table(plans: Mapping[str, Plan]) -> str:
    """The plans, a column each: memory in MiB, and the work of a step."""
    every = plans.values()
    lines = [_line("MiB on each device", [*plans])]
    lines += [_line(n, [f"{of(plan) / _MIB:,.1f}" for plan in every]) for n, of in _MEMORY.items()]
    lines += ["in a step, each device"]
    lines += [_line(name, [of(plan) for plan in every]) for name, of in _SENT.items()]
    if all(plan.work for plan in every):
        lines += [_line(name, [of(plan.work) for plan in every]) for name, of in _WORK.items()]
        lines += ["the time is roofline's, a bound and no forecast; sending is not in it"]
    return "\n".join(lines)


def fits(plans: Mapping[str, Plan], target: Target) -> str:
    """Which of them a GPU has room for."""
    limit = target.usable
    room = f"the {limit / _GIB:.1f} of {target.memory / _GIB:.1f} GiB that a program can use"
    yes = ", ".join(name for name, plan in plans.items() if plan.total <= limit)
    no = ", ".join(name for name, plan in plans.items() if plan.total > limit)
    told = [f"within {room}: {yes or 'none'}"]
    return "; ".join(told + ([f"too large: {no}"] if no else []))


def _line(label: str, cells: list[str]) -> str:
    return f"{label:26}" + "".join(f"{cell:>14}" for cell in cells)
