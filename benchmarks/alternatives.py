"""What else a JAX user can do against activation memory, over the blocks `BDIAStack` takes.

All run the plain residual stack x_{k+1} = x_k + h_k(x_k) under JAX's own autodiff. `BDIAStack` with
magnitude 0, fixed_point None and backprop "store" or "remat" is the same network, but it makes
the half-precision roundings of its block explicit, which these are free of.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bdia_jax.nnx import Stack, finish, pure_blocks

# inside a scan nothing can be merged across the two passes, so no barriers are needed
_checkpoint = partial(jax.checkpoint, prevent_cse=False)


class _ResidualStack(Stack):
    """x + h_k(x), K times; the subclass says in which loop.

    Args:
        make_block, depth, options: rngs, has_aux, and in a `ScanStack` backprop, as in `BDIAStack`.
    """

    def __init__(self, make_block: Any, depth: int, *, backprop: str = "remat", **options: Any):
        super().__init__(make_block, depth, backprop=backprop, **options)

    def __call__(self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None) -> Any:
        """x_K, float32 [B, ..., D]; or (x_K, aux stacked [K, ...]) with `has_aux`.

        Args:
            x: float32 or bfloat16 [B, ..., D].
            *consts: pytrees of arrays every block is called with, differentiated.
            rngs: stream "dropout" (or a default) for this call, in place of the stack's own.
        """
        pure = pure_blocks(self, self.rngs if rngs is None else rngs)

        def block(x, params_k):
            h, aux = pure.block_fns[0](params_k, x, *consts)
            return x + h, aux

        out, aux = self._loop(block, pure.params, x.astype(jnp.float32))
        return finish(self, out, aux)

    def _loop(self, block: Callable[..., Any], params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        raise NotImplementedError


class ScanStack(_ResidualStack):
    """A scan over the blocks: backprop "store" is plain autodiff, "remat" per-block remat."""

    def _loop(self, block, params, x):
        step = _checkpoint(block) if self.backprop == "remat" else block
        return jax.lax.scan(step, x, params)


class TwoLevelStack(_ResidualStack):
    """Remat on two levels (Chen et al. 2016): K / S segments of S blocks, both checkpointed.

    K / S + S states are alive at a time, least for S = sqrt(K), and each block's forward is
    evaluated three times: in the forward pass, again for its segment, again for itself.

    Args:
        make_block, depth, options: as above.
        segment: S, a divisor of depth; by default `nearest_to_sqrt(depth)`. That of a prime
            depth is 1, and then there is only one level: per-block remat.

    Raises:
        ValueError: segment does not divide depth.
    """

    def __init__(self, make_block: Any, depth: int, *, segment: int | None = None, **options: Any):
        super().__init__(make_block, depth, **options)
        self.segment = nearest_to_sqrt(depth) if segment is None else segment
        if self.segment < 1 or depth % self.segment:
            raise ValueError(f"segment is {segment}, expected a divisor of the depth {depth}")

    def _loop(self, block, params, x):
        step = _checkpoint(block)
        if self.segment in (1, self.depth):
            return jax.lax.scan(step, x, params)

        def run_segment(x, segment_params):
            return jax.lax.scan(step, x, segment_params)

        cut = (self.depth // self.segment, self.segment)
        params = jax.tree.map(lambda leaf: leaf.reshape(*cut, *leaf.shape[1:]), params)
        x, aux = jax.lax.scan(_checkpoint(run_segment), x, params)
        return x, jax.tree.map(lambda leaf: leaf.reshape(self.depth, *leaf.shape[2:]), aux)


def nearest_to_sqrt(depth: int) -> int:
    """The divisor S of depth with the fewest states K / S + S; of two, the smaller one."""
    return max(size for size in range(1, math.isqrt(depth) + 1) if depth % size == 0)


class OffloadStack(_ResidualStack):
    """Per-block remat whose K states wait in the host's memory, not the device's.

    The state is named at the block's entry: what is named at its end is not what the next
    block is differentiated from. On a CPU host and device are the same memory, and XLA
    leaves the copies out: this is then per-block remat.
    """

    def _loop(self, block, params, x):
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["state"],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def named(x, params_k):
            return block(checkpoint_name(x, "state"), params_k)

        return jax.lax.scan(_checkpoint(named, policy=policy), x, params)


class LoopStack(_ResidualStack):
    """Per-block remat in a Python loop instead of a scan: every block is compiled by itself."""

    def _loop(self, block, params, x):
        auxes = []
        for k in range(self.depth):
            x, aux = jax.checkpoint(block)(x, jax.tree.map(lambda leaf, k=k: leaf[k], params))
            auxes.append(aux)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
