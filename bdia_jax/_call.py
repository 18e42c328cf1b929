"""A call of `bdia_scan`, checked: what is known at trace time, and the arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax import _checks
from bdia_jax._block import Block, Leaves, make_block, partition
from bdia_jax._updating import Update
from bdia_jax.fixed_point import FixedPoint

PyTree = Any
BlockFn = Callable[..., Any] | Sequence[Callable[..., Any]]


class Static(NamedTuple):
    """What is known at trace time: the block over leaves, and the format of the states."""

    block: Block
    fixed_point: Any  # FixedPoint; None only on the way to autodiff_scan
    merge_aux: Callable[[Any, Any], PyTree]
    verify: int  # parts of a sample with a checksum each; 0: none
    update: Update | None = None  # of parameters that the backward pass updates


class Operands(NamedTuple):
    """The arrays: params stacked [K, ...], x0 [B, ..., D], gamma [K, B or 1] or None.

    failures: float32 [K] of zeros, whose cotangent is a count (see `bdia_scan`), or None.
    slots: `Slots` of `Static.update`, or None.
    """

    params: Leaves
    x0: jax.Array
    gamma: Any
    consts: Leaves
    failures: Any
    slots: Any = None


@dataclass(frozen=True)
class _Bound:
    """A block with those of its consts that are no arrays, each with its type."""

    fn: Callable[..., Any]
    treedef: Any
    values: tuple[Any, ...]

    def __call__(self, params_k: PyTree, x: jax.Array, *consts: PyTree) -> Any:
        arrays = self.treedef.flatten_up_to(consts)
        pairs = zip(arrays, self.values, strict=True)
        leaves = [array if value is None else value[1] for array, value in pairs]
        return self.fn(params_k, x, *self.treedef.unflatten(leaves))


def bind_static(block_fn: BlockFn, consts: tuple[PyTree, ...]) -> tuple[BlockFn, Any]:
    """(block_fn, consts) with what Python decides by, a bool or str, moved from consts to it."""
    leaves, treedef = jax.tree.flatten(consts)
    values = [(type(v), v) if isinstance(v, bool | str | np.bool_) else None for v in leaves]
    if not any(values) or not (callable(block_fn) or isinstance(block_fn, list | tuple)):
        return block_fn, consts
    arrays = [leaf if value is None else None for leaf, value in zip(leaves, values, strict=True)]

    def bound(fn):
        return _Bound(fn, treedef, tuple(values))

    is_one = callable(block_fn)
    return bound(block_fn) if is_one else tuple(map(bound, block_fn)), treedef.unflatten(arrays)


class Arrays(NamedTuple):
    """The arrays of a call as they were given, checked."""

    params: PyTree
    x0: jax.Array
    gamma: Any
    consts: tuple[PyTree, ...]
    failures: Any


def prepare(block_fn: BlockFn, params, x0, gamma, consts, **options: Any):
    """(Static, Operands), all checked. The options are those of `check` and `separate`."""
    names = ("fixed_point", "backprop", "verify", "failures")
    of_check = {name: options.pop(name) for name in names if name in options}
    block_fn, consts = bind_static(block_fn, consts)
    arrays, parts = check(params, x0, gamma, consts, **of_check)
    options |= {"fixed_point": of_check["fixed_point"], "verify": parts}
    return separate(block_fn, arrays, **options)


def check(
    params: PyTree,
    x0: jax.Array,
    gamma: jax.Array | None,
    consts: tuple[PyTree, ...],
    *,
    fixed_point: FixedPoint | None,
    backprop: str,
    verify: bool | int = True,
    failures: Any = None,
) -> tuple[Arrays, int]:
    """(the arrays, in how many parts a sample is verified) of arguments as `bdia_scan` has them."""
    _checks.check_choices(fixed_point, backprop)
    params = _checks.as_arrays(params, "params")
    consts = _checks.as_arrays(consts, "consts")
    x0 = _checks.check_x0(x0)
    _checks.check_stacked(params, gamma)
    depth = _checks.check_depth(params)
    reversible_format = fixed_point if backprop == "reversible" else None
    gamma = _checks.check_gamma(gamma, depth, x0.shape[0], reversible_format)
    parts = _checks.check_verify(verify, failures, depth, x0, backprop)
    if failures is not None:
        failures = jnp.asarray(failures, jnp.float32)
    return Arrays(params, x0, gamma, consts, failures), parts


def separate(
    block_fn: BlockFn,
    arrays: Arrays,
    *,
    fixed_point: FixedPoint | None,
    verify: int,
    has_aux: bool,
    **chunks: Any,
) -> tuple[Static, Operands]:
    """Takes what is differentiated apart from what is not, and checks the block.

    Args:
        verify: parts of a sample. chunks: batch_chunks, token_chunks, per_sample of `bdia_scan`.
    """
    params, x0, gamma, consts, failures = arrays
    block, merge_aux = make_block(
        block_fn, params, x0, consts, has_aux=has_aux, is_inference=gamma is None, **chunks
    )
    operands = Operands(partition(params)[0], x0, gamma, partition(consts)[0], failures)
    return Static(block, fixed_point, merge_aux, verify), operands


# --- outside jit -----------------------------------------------------------------------


def compiled_once(fn: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """fn with these arguments, jitted: where all are equal, another call compiles nothing.

    Inside jit it is as if it were not. What cannot be hashed is compiled in every call.
    """
    try:
        return _jitted(fn, **static)
    except TypeError:
        return partial(fn, **static)


@lru_cache(maxsize=64, typed=True)  # of each, a program is kept
def _jitted(fn: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    return jax.jit(partial(fn, **static), inline=True)


class Frozen(NamedTuple):
    """A pytree of hashable leaves, hashable."""

    leaves: tuple[Any, ...]
    treedef: Any

    @classmethod
    def of(cls, tree: PyTree) -> "Frozen":
        """None is a leaf."""
        leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
        return cls(tuple(leaves), treedef)

    def thawed(self) -> PyTree:
        """The pytree."""
        return self.treedef.unflatten(self.leaves)
