"""A Linen block as a function of its variables, for the scan over blocks."""

import inspect
from dataclasses import dataclass
from operator import is_
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, nnx
from flax import linen as nn
from flax.core.scope import subtract_filters

from bdia_jax._flax import cast_floats, refuse_state


@dataclass(frozen=True)
class PureBlock:
    """A block as a function; two of the same block and options are equal, and compile once.

    block: the template. method: of it, None for its call. index: of this method among those of a
    block. mutable: the filter of collections that it may change. kwargs: of the call.
    """

    block: nn.Module
    method: str | None
    index: int
    mutable: Any
    dtype: Any
    has_aux: bool
    is_in_parts: bool
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, params_k: Any, x: jax.Array, *consts: Any) -> tuple[jax.Array, Any]:
        """(h, (aux, the collections that it changed or sowed))."""
        variables, keys = params_k
        if self.index:  # streams start anew in every branch
            keys = {stream: jax.random.fold_in(key, self.index) for stream, key in keys.items()}
        weights, x, consts = cast_floats((variables.get("params"), x, consts), self.dtype)
        if weights is not None:
            variables = variables | {"params": weights}

        def call(scope):  # not `Module.apply`, which hides what the caller wants captured
            method = getattr(self.block.clone(parent=scope), self.method or "__call__")
            return method(x, *consts, **dict(self.kwargs))

        out, mutated = core.apply(call, mutable=self.mutable)(variables, rngs=keys)
        h, aux = out if self.has_aux else (out, None)
        aux = cast_floats(aux, None if self.dtype is None else jnp.float32)
        changed = {
            col: value
            for col, value in mutated.items()
            if jax.tree.structure(value) != jax.tree.structure(variables.get(col))
            or not all(map(is_, jax.tree.leaves(value), jax.tree.leaves(variables[col])))
        }
        if changed and self.is_in_parts:
            refuse_state(changed)
        return h, (aux, changed)


def check_block(block: Any) -> None:
    """Raises ValueError if it is no Linen module."""
    if isinstance(block, nn.Module):
        return
    remedy = "give one module, the template of all blocks: BDIAStack(Block(...), depth)"
    if isinstance(block, nnx.Module):
        remedy = "for modules of NNX there is bdia_jax.nnx.BDIAStack"
    raise ValueError(f"block is {block!r:.60}, expected a module of Linen; {remedy}")


def changeable(scope: Any) -> Any:
    """The filter, hashable, of the collections that a stack's blocks may change or sow."""
    return _hashable(subtract_filters(scope.mutable, ["params", "failures"]))


def _hashable(collections: Any) -> Any:
    """A filter of collections as it is, but for the type of what it names."""
    if isinstance(collections, core.DenyList):
        return core.DenyList(_hashable(collections.deny))
    return collections if isinstance(collections, (bool, str)) else tuple(sorted(collections))


def takes_deterministic(block: type) -> bool:
    """Whether the block's call, or that of a branch, has this parameter."""
    methods = ("__call__", *getattr(block, "branches", ()))
    calls = (getattr(block, name) for name in methods if hasattr(block, name))
    return any("deterministic" in inspect.signature(call).parameters for call in calls)
