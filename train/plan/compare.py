"""The plans of one run for every way of training its stack, side by side."""

import dataclasses
from collections.abc import Callable

from train.config import Config
from train.plan.estimate import Plan, make_plan
from train.tasks import abstract_task
from train.tasks.task import Task

BACKPROPS = ("reversible", "remat", "store")
_KEPT = {"reversible": "side bits", "remat": "states", "store": "residuals"}
_ROWS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "kept": "kept by all blocks",
    "states": "last states, cotangents",
    "block": "one block's backward pass",
    "data": "batch",
    "rest": "rest",
}


def make_plans(
    config: Config,
    make_task: Callable[[Config], Task] = abstract_task,
    device: str = "gpu",
    backprops: tuple[str, ...] = BACKPROPS,
) -> dict[str, Plan]:
    """backprop -> its plan, for those of `backprops` that this config can have.

    Args:
        config: the run's; its own backprop does not matter.
        make_task: what `make_plan` takes as its task, of a config.
        device: as in `make_plan`.

    Raises:
        ValueError: as `make_plan`.
    """
    plans = {}
    for backprop in backprops:
        try:
            changed = dataclasses.replace(config, backprop=backprop)
        except ValueError:  # a gamma that is not reversible; a baseline without remat
            continue
        plans[backprop] = make_plan(changed, make_task(changed), device)
    return plans


def first_depth(reversible: Plan, remat: Plan, depth: int) -> int | None:
    """The depth from which on "reversible" needs less than "remat", all else unchanged.

    Of a block, the one keeps side bits and the other a float32 state; beside these "reversible"
    carries the last two integer states and has a state to rebuild. None: the fullest moment is not
    in the stack.
    """
    if not reversible.block or not remat.block:
        return None
    saved = (remat.kept - reversible.kept) / depth
    extra = reversible.beside_kept - remat.beside_kept
    return max(1, int(extra // saved) + 1) if saved > 0 else None


def table(config: Config, plans: dict[str, Plan]) -> str:
    """The plans, a column each, in MiB, and what follows from them."""
    lines = [_line("MiB on each device", list(plans))]
    for name, label in _ROWS.items():
        lines.append(_line(label, [_mib(getattr(plan, name)) for plan in plans.values()]))
    lines.insert(5, _line("  which are", [_KEPT[backprop] for backprop in plans]))
    lines.append(_line("total", [_mib(plan.total) for plan in plans.values()]))
    lines.append(
        _line("at another moment, in all", [_mib(plan.elsewhere) for plan in plans.values()])
    )
    ranked = sorted(plans, key=lambda backprop: plans[backprop].total)
    if len(ranked) > 1:
        best, second = (plans[backprop].total for backprop in ranked[:2])
        lines.append(
            f"smallest: {ranked[0]}, {_mib(second - best)} MiB ({1 - best / second:.1%}) below "
            f"{ranked[1]}"
        )
    depth = getattr(config.model, "depth", 0)
    if depth and {"reversible", "remat"} <= plans.keys():
        first = first_depth(plans["reversible"], plans["remat"], depth)
        lines.append(
            f"of these widths, reversible is below remat from depth {first} on (here {depth})"
            if first
            else "the stack's backward pass is not the fullest moment, so depth matters little"
        )
    return "\n".join(lines)


def _line(label: str, cells: list[str]) -> str:
    return f"{label:28}" + "".join(f"{cell:>14}" for cell in cells)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
