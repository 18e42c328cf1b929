"""BDIAStack for Flax NNX: K copies of any user block, trained reversibly."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from bdia_jax._checks import check_magnitude
from bdia_jax.audit import Audit, audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.recurrence import sample_gamma
from bdia_jax.scan import bdia_scan


class BDIAStack(nnx.Module):
    """A stack of K residual blocks that keeps side bits instead of activations.

    `y = stack(x)` is the whole loop `for block in blocks: x = x + block(x)`. In training
    mode it draws gamma and runs eq. 21 of arXiv 2407.09093 (see `bdia_jax.bdia_scan` for what
    is exact); after `model.eval()` gamma is 0, which is the loop above on fixed-point states.

    Args:
        make_block: (rngs) -> nnx.Module; the module maps (x, *consts) to h, all that the
            block adds to x (so without the residual itself), or to (h, aux) with `has_aux`.
            x arrives in float32; h may be of any float dtype, float32 is best (let the last
            projection return it).
        depth: K, the number of blocks.
        rngs: initializes the blocks, one key a block, and seeds the stack's own streams
            "gamma" and "dropout".
        magnitude: |gamma| in training; 2^-fixed_point.gamma_bits to be reversible,
            0 for the plain stack.
        fixed_point, backprop, has_aux: as in `bdia_scan`; the first two may be set later too
            (`stack.backprop = "store"`).

    Attributes:
        blocks: one block module whose variables are stacked on a leading axis K.
        deterministic: True at inference; `train()` and `eval()` of this or any enclosing
            module set it.

    Dropout inside a block draws from a key of its own per block and call, the same in the
    forward and the backward pass. Variables that are neither parameters nor random state
    (batch statistics) are updated once per call, by the forward pass.

    Example:
        >>> class Block(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.norm, self.dense = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        ...     def __call__(self, x):
        ...         return nnx.gelu(self.dense(self.norm(x)))
        >>> stack = BDIAStack(Block, depth=4, rngs=nnx.Rngs(0))
        >>> stack(jax.numpy.ones((2, 8))).shape
        (2, 8)
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        rngs: nnx.Rngs,
        magnitude: float = 0.5,
        fixed_point: FixedPoint | None = FixedPoint(),
        backprop: str = "reversible",
        has_aux: bool = False,
    ):
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least one block")
        stacked_init = nnx.vmap(lambda block_rngs: make_block(block_rngs))
        self.blocks = stacked_init(rngs.split(depth))
        self.rngs = nnx.Rngs(gamma=_draw(rngs, "gamma"), dropout=_draw(rngs, "dropout"))
        self.depth = depth
        self.magnitude = magnitude
        self.fixed_point = fixed_point
        self.backprop = backprop
        self.has_aux = has_aux
        self.deterministic = False

    def __call__(self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None) -> Any:
        """x_K, float32 [B, ..., D]; or (x_K, aux stacked [K, ...]) with `has_aux`.

        Args:
            x: float32 or bfloat16 [B, ..., D].
            *consts: pytrees of arrays every block is called with, differentiated.
            rngs: streams "gamma" and "dropout" (or a default) for this call, in place of the
                stack's own.

        Raises:
            ValueError: as `bdia_scan`.
        """
        block_fn, params, gamma, updated = self._functional(x, rngs)
        out, (aux, new_state) = bdia_scan(
            block_fn,
            params,
            x,
            gamma,
            *consts,
            fixed_point=self.fixed_point,
            backprop=self.backprop,
            has_aux=True,
        )
        if updated:
            nnx.update(self.blocks, new_state)
        return (out, aux) if self.has_aux else out

    def audit(self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None) -> Audit:
        """`bdia_jax.audit` of this stack in training mode: is its rebuild exact here?

        Args:
            x, consts, rngs: as in a call. Not under jit; all K states must fit in memory.
        """
        if self.deterministic or self.fixed_point is None:
            raise ValueError(
                f"deterministic is {self.deterministic} and fixed_point {self.fixed_point}, so "
                "nothing is rebuilt; call train() and set a FixedPoint"
            )
        block_fn, params, gamma, _ = self._functional(x, rngs)
        return audit(
            block_fn, params, x, gamma, *consts, fixed_point=self.fixed_point, has_aux=True
        )

    def _functional(self, x, rngs):
        """The stack as (block_fn, params, gamma) for `bdia_scan`, and whether it has state."""
        rngs = self.rngs if rngs is None else rngs
        graphdef, weights, keys, counts, state = nnx.split(
            self.blocks, nnx.Param, nnx.RngKey, nnx.RngCount, ...
        )
        has_state = bool(jax.tree.leaves(state))
        check_magnitude(self.magnitude, self.fixed_point, self.backprop)
        gamma = None
        if not self.deterministic:
            if self.magnitude:
                gamma_key = _draw(rngs, "gamma")
                gamma = sample_gamma(gamma_key, self.depth, x.shape[0], self.magnitude)
            if jax.tree.leaves(keys):
                keys = _reseed(keys, _draw(rngs, "dropout"), self.depth)

        def block_fn(params_k, x, *consts):
            block = nnx.merge(graphdef, *params_k)
            out = block(x, *consts)
            h, aux = out if self.has_aux else (out, None)
            new_state = nnx.split(block, nnx.Param, nnx.RngState, ...)[3] if has_state else None
            return h, (aux, jax.lax.stop_gradient(new_state))

        return block_fn, (weights, keys, counts, state), gamma, has_state


def stacked_params(model: nnx.Module) -> nnx.State:
    """Which parameters of `model` belong to a BDIAStack, for optimizers that work per layer.

    Returns:
        A State like `nnx.state(model, nnx.Param)` with a bool in place of each array: True
        where the leading axis counts blocks. Hand it to `bdia_jax.optim.set_adam`.
    """
    prefixes = [
        (*path, "blocks")
        for path, module in nnx.iter_modules(model)
        if isinstance(module, BDIAStack)
    ]

    def is_stacked(path, _):
        return any(path[: len(prefix)] == prefix for prefix in prefixes)

    return nnx.map_state(
        lambda path, variable: variable.replace(is_stacked(path, variable)),
        nnx.state(model, nnx.Param),
    )


def _draw(rngs: nnx.Rngs, stream: str) -> jax.Array:
    # not rngs.gamma(): that is jax.random.gamma when there is no such stream
    try:
        return rngs[stream]()
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
