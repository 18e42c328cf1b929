"""BDIAStack for Flax NNX: K copies of any user block, trained reversibly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._checks import check_magnitude
from bdia_jax.audit import Audit, audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.recurrence import sample_gamma
from bdia_jax.scan import bdia_scan
from bdia_jax.stacked import Stack, call_whole, draw, stacked_params

__all__ = ["BDIAStack", "stacked_params"]


class BDIAStack(Stack):
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
        inference_gamma: the constant gamma_1 .. gamma_{K-1} of eq. 10 at inference, from
            -0.5 to 0.5: another solver of the same ODE, as in Fig. 1 of the paper. 0 is the
            unchanged transformer. May be set later too (`stack.inference_gamma = 0.2`).

    Attributes:
        blocks: one block module whose variables are stacked on a leading axis K.
        deterministic: True at inference; `train()` and `eval()` of this or any enclosing
            module set it.

    Raises:
        ValueError: a depth below 1, or inference_gamma outside [-0.5, 0.5].

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
        inference_gamma: float = 0.0,
    ):
        super().__init__(make_block, depth, rngs=rngs, backprop=backprop, has_aux=has_aux)
        self.magnitude = magnitude
        self.fixed_point = fixed_point
        self.inference_gamma = inference_gamma

    @property
    def inference_gamma(self) -> float:
        """gamma_1 .. gamma_{K-1} at inference."""
        return self._inference_gamma

    @inference_gamma.setter
    def inference_gamma(self, gamma: float) -> None:
        if not -0.5 <= gamma <= 0.5:
            raise ValueError(f"inference_gamma is {gamma}, expected a number from -0.5 to 0.5")
        self._inference_gamma = float(gamma)

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
        rngs = self.rngs if rngs is None else rngs
        gamma = self._gamma(x.shape[0], rngs)
        pure = self.pure(rngs, call_whole)
        backprop = self.backprop
        if self.deterministic and gamma is not None and backprop == "reversible":
            backprop = "store"  # the same forward bits, for gamma of any magnitude
        out, aux = bdia_scan(
            pure.block_fns[0],
            pure.params,
            x,
            gamma,
            *consts,
            fixed_point=self.fixed_point,
            backprop=backprop,
            has_aux=True,
        )
        return self.finish(out, aux, pure.has_state)

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
        rngs = self.rngs if rngs is None else rngs
        gamma = self._gamma(x.shape[0], rngs)
        pure = self.pure(rngs, call_whole)
        return audit(
            pure.block_fns[0],
            pure.params,
            x,
            gamma,
            *consts,
            fixed_point=self.fixed_point,
            has_aux=True,
        )

    def _gamma(self, batch_size: int, rngs: nnx.Rngs) -> jax.Array | None:
        """[K, B] drawn in training; [K, 1] constant, or None for zero, at inference."""
        check_magnitude(self.magnitude, self.fixed_point, self.backprop)
        if self.deterministic:
            if self.inference_gamma == 0:
                return None
            return jnp.full((self.depth, 1), self.inference_gamma, jnp.float32).at[0].set(0.0)
        if self.magnitude == 0:
            return None
        return sample_gamma(draw(rngs, "gamma"), self.depth, batch_size, self.magnitude)
