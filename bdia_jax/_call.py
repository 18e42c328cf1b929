"""A call of `bdia_scan`, checked: what is known at trace time, and the arrays."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from bdia_jax import _checks
from bdia_jax._block import Block, Leaves, make_block, partition
from bdia_jax.fixed_point import FixedPoint

PyTree = Any
BlockFn = Callable[..., Any] | Sequence[Callable[..., Any]]


class Static(NamedTuple):
    """What is known at trace time: the block over leaves, and the format of the states."""

    block: Block
    fixed_point: Any  # FixedPoint; None only on the way to autodiff_scan
    merge_aux: Callable[[Any, Any], PyTree]
    verify: int  # parts of a sample with a checksum each; 0: none


class Operands(NamedTuple):
    """The arrays: params stacked [K, ...], x0 [B, ..., D], gamma [K, B or 1] or None.

    failures: float32 [K] of zeros, whose cotangent is a count (see `bdia_scan`), or None.
    """

    params: Leaves
    x0: jax.Array
    gamma: Any
    consts: Leaves
    failures: Any


def prepare(
    block_fn: BlockFn,
    params: PyTree,
    x0: jax.Array,
    gamma: jax.Array | None,
    consts: tuple[PyTree, ...],
    *,
    fixed_point: FixedPoint | None,
    backprop: str,
    has_aux: bool,
    verify: bool | int = True,
    failures: Any = None,
    **chunks: Any,
) -> tuple[Static, Operands]:
    """Checks everything, and takes what is differentiated apart from what is not.

    Args: as of `bdia_scan`; chunks: batch_chunks, token_chunks, per_sample.
    """
    _checks.check_choices(fixed_point, backprop)
    params = _checks.as_arrays(params, "params")
    consts = _checks.as_arrays(consts, "consts")
    x0 = _checks.check_x0(x0)
    depth = _checks.check_depth(params)
    reversible_format = fixed_point if backprop == "reversible" else None
    gamma = _checks.check_gamma(gamma, depth, x0.shape[0], reversible_format)
    block, merge_aux = make_block(
        block_fn, params, x0, consts, has_aux=has_aux, is_inference=gamma is None, **chunks
    )
    parts = _checks.check_verify(verify, failures, depth, x0, backprop)
    operands = Operands(partition(params)[0], x0, gamma, partition(consts)[0], failures)
    return Static(block, fixed_point, merge_aux, parts), operands
