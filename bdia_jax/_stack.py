"""K copies of an NNX block: one module with stacked variables, and pure functions of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._checks import check_count
from bdia_jax._constructor import check_rngs, maker
from bdia_jax._flax import cast_floats, check_dtype, refuse_state, sum_of_branches

_IS_STATE = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))


class BranchedBlock(nnx.Module):
    """A block that is the sum of its branches: h = f(x) + g(x + f(x)) with `branches = ("f", "g")`.

    Subclasses write the branches, methods (x, *consts) -> r, and name them in order; the block's
    own call follows from them, so the two cannot disagree. `BDIAStack(by_branch=True)` evaluates
    one branch at a time.

    Attributes:
        branches: names of the methods, each seeing x plus all branches before it.
        per_token: those of them that treat tokens alike, for `BDIAStack(token_chunks=)`.
        per_sample: which consts each sample has its own of, for `BDIAStack(batch_chunks=)`: a
            bool, or a tuple with one for each, as in `bdia_scan`.
    """

    branches: tuple[str, ...] = ()
    per_token: tuple[str, ...] = ()
    per_sample: Any = None

    def __call__(self, x: jax.Array, *consts: Any) -> jax.Array:
        """h, float32 [B, ..., D], of x [B, ..., D]."""
        return sum_of_branches(self, x, *consts)


class RebuildFailures(nnx.Variable):
    """float32 [K] of zeros, whose gradient is where the rebuild failed: `BDIAStack.failures`."""


class Stack(nnx.Module):
    """What all stacks of K residual blocks share; `bdia_jax.nnx` and `.baselines` have them.

    Args:
        make_block: (rngs) -> nnx.Module; a class is one, too, also if its rngs are keyword-only.
        depth: K, the number of blocks.
        rngs: initializes the blocks, one key a block, and seeds the stack's own streams
            "gamma" and "dropout".
        backprop, has_aux, dtype, mesh: as in the stack.

    Attributes:
        blocks: one block module whose variables are stacked on a leading axis K.
        deterministic: True at inference; `train()` and `eval()` of this or any enclosing
            module set it.
    """

    def __init__(
        self,
        make_block: Callable[..., nnx.Module],
        depth: int,
        *,
        rngs: nnx.Rngs,
        backprop: str = "reversible",
        has_aux: bool = False,
        dtype: Any = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        depth = check_count("depth", depth)
        make_one = maker(make_block)
        stacked_init = nnx.vmap(make_one, transform_metadata={nnx.PARTITION_NAME: None})
        self.blocks = stacked_init(check_rngs(rngs).split(depth))
        self.rngs = nnx.Rngs(gamma=draw(rngs, "gamma"), dropout=draw(rngs, "dropout"))
        self.depth = depth
        self.backprop = backprop
        self.has_aux = has_aux
        self.deterministic = False
        self.dtype = dtype
        self.mesh = mesh

    @property
    def dtype(self) -> Any:
        """What the blocks compute in; None if they decide."""
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: Any) -> None:
        self._dtype = check_dtype(dtype)

    def out_features(self, width: int) -> int:
        """The last axis of what the stack returns for x [B, ..., width]."""
        return width


# --- what stacks do with their blocks; no methods, whose calls `nnx.tabulate` would list ------


def pure_blocks(
    stack: Stack, rngs: nnx.Rngs, *calls: Callable[..., Any], is_in_parts: bool = False
) -> "Pure":
    """The blocks as pure functions, one for each `call(block, x, *consts)`; their own by default.

    In training mode every random stream inside the blocks gets new keys from the stream
    "dropout" of rngs, one a block, and others in each function but the first. With `dtype`
    they cast parameters, x and consts; state and keys stay as they are. If it `is_in_parts`,
    each sees a part of a call only, and none may change the block's state.
    """
    calls = calls or (call_whole,)
    graphdef, weights, keys, counts, state = nnx.split(
        stack.blocks, nnx.Param, nnx.RngKey, nnx.RngCount, ...
    )
    if not stack.deterministic and jax.tree.leaves(keys):
        keys = _reseed(keys, draw(rngs, "dropout"), stack.depth)

    options = (stack.dtype, stack.has_aux, is_in_parts)
    block_fns = (PureBlock(graphdef, call, i, *options) for i, call in enumerate(calls))
    return Pure(tuple(block_fns), (weights, keys, counts, state))


def state_names(stack: Stack) -> list[str]:
    """The blocks' variables that are neither parameters nor random state (batch statistics)."""
    paths = nnx.to_flat_state(nnx.state(stack.blocks, _IS_STATE))
    return [".".join(map(str, path)) for path, _ in paths]


def finish(stack: Stack, out: Any, aux: tuple[Any, nnx.State]) -> Any:
    """The result of a call, after the blocks' state is updated from the scan's aux."""
    aux, changed = aux
    if changed:
        nnx.update(stack.blocks, changed)
    return (out, aux) if stack.has_aux else out


class Pure(NamedTuple):
    """Blocks as functions (params_k, x, *consts) -> (h, (aux, the state that they changed))."""

    block_fns: tuple["PureBlock", ...]
    params: Any


@dataclass(frozen=True)
class PureBlock:
    """A block as a function; two of the same block and call are equal, and compile once.

    graphdef: the block without its variables. call: (block, x, *consts) -> h, or (h, aux).
    index: of this call among those of a block. The others are as of `pure_blocks`.
    """

    graphdef: Any
    call: Callable[..., Any]
    index: int
    dtype: Any
    has_aux: bool
    is_in_parts: bool

    def __call__(self, params_k: Any, x: jax.Array, *consts: Any) -> tuple[jax.Array, Any]:
        weights, keys, counts, state = params_k
        if self.index:  # streams start anew in every function
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, self.index), keys)
        weights, x, consts = cast_floats((weights, x, consts), self.dtype)
        before = {path: jax.tree.leaves(var) for path, var in nnx.to_flat_state(state)}
        block = nnx.merge(self.graphdef, weights, keys, counts, state)
        out = self.call(block, x, *consts)
        h, aux = out if self.has_aux else (out, None)
        aux = cast_floats(aux, None if self.dtype is None else jnp.float32)
        changed = _changed(before, nnx.state(block, _IS_STATE))
        if changed and self.is_in_parts:
            refuse_state(".".join(map(str, path)) for path, _ in nnx.to_flat_state(changed))
        return h, (aux, changed)


def _changed(before: dict[Any, list[Any]], after: nnx.State) -> nnx.State:
    """The variables of `after` that hold other arrays than those before, or are new."""

    def is_old(path, variable):
        leaves, own = before.get(path), jax.tree.leaves(variable)
        return leaves is not None and len(own) == len(leaves) and all(map(is_, own, leaves))

    flat = nnx.to_flat_state(after)
    return nnx.from_flat_state([(path, var) for path, var in flat if not is_old(path, var)])


def call_whole(block: Any, x: jax.Array, *consts: Any) -> Any:
    """The block's own h."""
    return block(x, *consts)


@cache
def call_branch(name: str) -> Callable[..., Any]:
    """One branch of h, the block's method of that name."""

    def call(block: Any, x: jax.Array, *consts: Any) -> Any:
        return getattr(block, name)(x, *consts)

    return call


def stacked_params(model: nnx.Module) -> nnx.State:
    """Which parameters of `model` belong to a stack, for optimizers that work per layer.

    Returns:
        A State like `nnx.state(model, nnx.Param)` with a str in place of each array: where the
        leading axis counts blocks the path of the stack's blocks ("encoder.blocks"), else "". Hand
        it to `bdia_jax.optim.set_adam` or `bdia_jax.in_backward.per_block`.
    """
    prefixes = [
        (*path, "blocks") for path, module in nnx.iter_modules(model) if isinstance(module, Stack)
    ]

    def name(path):
        stacks = (prefix for prefix in prefixes if path[: len(prefix)] == prefix)
        return ".".join(map(str, next(stacks, ())))

    return nnx.map_state(
        lambda path, variable: variable.replace(name(path)), nnx.state(model, nnx.Param)
    )


def refuse_named(by_name: dict[str, Any], call: str = "stack") -> None:
    """Raises TypeError for a const that is given by name to `call` of a stack."""
    for name in by_name:
        raise TypeError(
            f"{name}= is given by name; what blocks are called with is given by position, in "
            f"the order of the block's call: {call}(x, {name})"
        )


def draw(rngs: nnx.Rngs, stream: str) -> jax.Array:
    """The next key of a stream, or of the default one."""
    # not rngs.gamma(): that is jax.random.gamma when there is no such stream
    try:
        return check_rngs(rngs)[stream]()
    except KeyError:
        raise ValueError(
            f"rngs has no stream {stream!r} and no default; make it with nnx.Rngs(seed) or "
            f"nnx.Rngs(params=..., {stream}=...)"
        ) from None


def _reseed(keys: nnx.State, key: jax.Array, depth: int) -> nnx.State:
    """New keys [K] for every random stream inside the blocks, so that masks differ by call."""
    leaves, treedef = jax.tree.flatten(keys)
    fresh = [
        jax.random.split(jax.random.fold_in(key, index), depth).reshape(leaf.shape)
        for index, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(fresh)
