"""How far inference in fixed point is from inference in floating point: metrics and states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import FixedPoint, bdia_scan
from bdia_jax.fixed_point import dequantize, quantize
from bdia_jax.nnx import BDIAStack, Stack
from train.tasks.task import Arrays, MetricsFn, group_size


class Gap(NamedTuple):
    """A distance of states in quanta 2^-frac_bits: the largest, and the root of the mean square."""

    largest: float
    rms: float


class Agreement(NamedTuple):
    """The two inference paths of a model, on the same examples.

    quantized, unquantized: metrics by name.
    last_state: for each stack, x_K of the one against x_K of the other. Roundings of all blocks
        add up here, and blocks carry them on.
    one_block: for each stack, a block of the one against the same block of the other, given the
        same state on the grid; all blocks, all states the quantised path comes through. At most
        1/2: one rounding is all that is between them.
    """

    quantized: dict[str, float]
    unquantized: dict[str, float]
    last_state: dict[str, Gap]
    one_block: dict[str, Gap]


def compare(
    model: Any,
    metrics: MetricsFn,
    groups: tuple[Arrays, ...],
    batch_size: int,
    fixed_point: FixedPoint,
) -> Agreement:
    """Evaluates examples in both ways, batch by batch.

    Args:
        model: in evaluation mode; its stacks are `BDIAStack`s. Stays as it is.
        metrics, groups: as in `train.tasks.task.Task`.
        batch_size: examples at once.
        fixed_point: of the quantised path.

    Raises:
        ValueError: no stack, or one of another kind.
    """
    _check_stacks(model)
    graphdef, state = nnx.split(model)

    @jax.jit
    def measure(state, batch):
        ends, totals, one_block = [], [], {}
        for path_format in (fixed_point, None):
            here = nnx.merge(graphdef, state, copy=True)
            last: dict[str, jax.Array] = {}
            _watch(here, path_format, last, one_block)
            totals.append(jax.tree.map(jnp.sum, metrics(here, batch, None)))
            ends.append(last)
        distances = {name: _distance(x, ends[1][name], fixed_point) for name, x in ends[0].items()}
        return totals, distances, one_block

    sums: Any = None
    gaps: list[dict[str, list[Any]]] = [{}, {}]
    for group in groups:
        for first in range(0, group_size(group), batch_size):
            batch = jax.tree.map(lambda a, first=first: a[first : first + batch_size], group)
            totals, *distances = jax.device_get(measure(state, batch))
            totals = jax.tree.map(np.float64, totals)
            sums = totals if sums is None else jax.tree.map(np.add, sums, totals)
            for seen, found in zip(gaps, distances, strict=True):
                for name, distance in found.items():
                    seen.setdefault(name, []).append(distance)
    quantized, unquantized = (
        {name: float(total / weight) for name, (total, weight) in each.items()} for each in sums
    )
    last_state, one_block = ({name: _gap(d) for name, d in seen.items()} for seen in gaps)
    return Agreement(quantized, unquantized, last_state, one_block)


class _Watched(nnx.Module):
    """A stack that tells what it is called with and what it returns."""

    def __init__(self, stack: BDIAStack, tell: Any):
        self.stack, self.tell = stack, tell

    @property
    def blocks(self) -> Any:
        return self.stack.blocks

    def __call__(self, x, *consts, rngs=None):
        out = self.stack(x, *consts, rngs=rngs)
        self.tell(x, consts, out[0] if self.stack.has_aux else out)
        return out


def _watch(model: Any, fixed_point, last: dict, one_block: dict) -> None:
    """Sets the format of every stack, and has last[name] and one_block[name] filled."""
    modules = dict(nnx.iter_modules(model))
    for path, stack in modules.items():
        if not isinstance(stack, BDIAStack):
            continue
        name = ".".join(map(str, path))
        stack.fixed_point, stack.backprop = fixed_point, "store"

        def tell(x, consts, out, name=name, stack=stack):
            last[name] = out
            if fixed_point is not None:
                one_block[name] = _block_distance(stack, x, consts, fixed_point)

        setattr(modules[path[:-1]], str(path[-1]), _Watched(stack, tell))


def _block_distance(stack: BDIAStack, x, consts, fixed_point):
    """`_distance` of what each block makes of x_k, k = 0 .. K-1, in the two formats."""
    pure = stack.pure(stack.rngs)
    formats = (fixed_point, None)

    def body(x, params_k):
        alone = jax.tree.map(lambda leaf: leaf[None], params_k)  # a stack of this one block
        quantized, exact = (
            bdia_scan(
                pure.block_fns[0], alone, x, None, *consts,
                fixed_point=each, backprop="store", has_aux=True,
            )[0]
            for each in formats
        )  # fmt: skip
        return quantized, _distance(quantized, exact, fixed_point)

    on_grid = dequantize(quantize(x, fixed_point), fixed_point)
    return jax.lax.scan(body, on_grid, pure.params)[1]


def _distance(a, b, fixed_point):
    """(largest, mean square) of a - b in quanta, and the number of elements."""
    quanta = jnp.abs(a - b) * 2.0**fixed_point.frac_bits
    return jnp.max(quanta), jnp.mean(quanta**2), jnp.float32(quanta.size)


def _gap(distances: list[Any]) -> Gap:
    largest, square, count = (
        np.concatenate([np.atleast_1d(np.float64(part)) for part in parts])
        for parts in zip(*distances, strict=True)
    )
    return Gap(float(largest.max()), float(np.sqrt(np.sum(square * count) / np.sum(count))))


def _check_stacks(model: Any) -> None:
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    wrong = [type(stack).__name__ for stack in stacks if not isinstance(stack, BDIAStack)]
    if wrong or not stacks:
        raise ValueError(
            f"the model's stacks are {', '.join(wrong) or 'none'}; only a BDIAStack has an "
            "inference in fixed point"
        )
