"""How far inference in fixed point is from inference in floating point: metrics and states."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import FixedPoint, bdia_scan
from bdia_jax.fixed_point import dequantize, quantize
from bdia_jax.nnx import BDIAStack, Stack, pure_blocks
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
        totals, seen = [], []
        for path_format in (fixed_point, None):
            here = nnx.merge(graphdef, state, copy=True)
            stacks: dict[Any, Any] = {
                path: each for path, each in nnx.iter_modules(here) if isinstance(each, BDIAStack)
            }
            for stack in stacks.values():
                stack.__class__, stack.fixed_point, stack.backprop = _Watched, path_format, "store"
            totals.append(jax.tree.map(jnp.sum, metrics(here, batch, None)))
            seen.append({".".join(map(str, path)): each.seen for path, each in stacks.items()})
        ends = ({name: out for name, (*_, out) in each.items()} for each in seen)
        last_state = jax.tree.map(partial(_distance, fixed_point), *ends)
        one_block = {
            name: _block_distance(stack, x, consts, fixed_point)
            for stack, (name, (x, consts, _)) in zip(stacks.values(), seen[0].items(), strict=True)
        }
        return totals, last_state, one_block

    found = [
        jax.device_get(measure(state, _rows(group, first, batch_size)))
        for group in groups
        for first in range(0, group_size(group), batch_size)
    ]
    # of all batches, and of all blocks
    totals, *gaps = jax.tree.map(lambda *parts: np.hstack(parts).astype(np.float64), *found)
    quantized, unquantized = (
        {name: float(total.sum() / weight.sum()) for name, (total, weight) in each.items()}
        for each in totals
    )
    last_state, one_block = ({name: _gap(*parts) for name, parts in each.items()} for each in gaps)
    return Agreement(quantized, unquantized, last_state, one_block)


def _rows(group: Arrays, first: int, count: int) -> Arrays:
    return jax.tree.map(lambda array: array[first : first + count], group)


class _Watched(BDIAStack):
    """A stack that keeps what it is called with, and what it returns."""

    def __call__(self, x, *consts, rngs=None):
        out = super().__call__(x, *consts, rngs=rngs)
        self.seen = nnx.data((x, consts, out[0] if self.has_aux else out))
        return out


def _block_distance(stack: BDIAStack, x, consts, fixed_point):
    """`_distance` of what each block makes of x_k, k = 0 .. K-1, in the two formats."""
    pure = pure_blocks(stack, stack.rngs)

    def body(x, params_k):
        alone = jax.tree.map(lambda leaf: leaf[None], params_k)  # a stack of this one block
        scan = partial(bdia_scan, pure.block_fns[0], alone, x, None, *consts)
        quantized, exact = (
            scan(fixed_point=each, backprop="store", has_aux=True)[0]
            for each in (fixed_point, None)
        )
        return quantized, _distance(fixed_point, quantized, exact)

    on_grid = dequantize(quantize(x, fixed_point), fixed_point)
    return jax.lax.scan(body, on_grid, pure.params)[1]


def _distance(fixed_point, a, b):
    """(largest, mean square) of a - b in quanta, and the number of elements."""
    quanta = jnp.abs(a - b) * 2.0**fixed_point.frac_bits
    return jnp.max(quanta), jnp.mean(quanta**2), jnp.float32(quanta.size)


def _gap(largest, square, count) -> Gap:
    return Gap(float(largest.max()), float(np.sqrt(np.sum(square * count) / np.sum(count))))


def _check_stacks(model: Any) -> None:
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    wrong = [type(stack).__name__ for stack in stacks if not isinstance(stack, BDIAStack)]
    if wrong or not stacks:
        raise ValueError(
            f"the model's stacks are {', '.join(wrong) or 'none'}; only a BDIAStack has an "
            "inference in fixed point"
        )
