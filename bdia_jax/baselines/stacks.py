"""Other reversible stacks for Flax NNX, to compare BDIA with: RevViT, midpoint, float BDIA.

They take the blocks `BDIAStack` takes, keep the last two states and nothing else, and rebuild
the rest in floating point (`bdia_jax.baselines.float_scan`): nearly, not exactly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._stack import (
    Pure,
    Stack,
    call_whole,
    draw,
    finish,
    pure_blocks,
    refuse_named,
    state_names,
)
from bdia_jax.baselines.float_scan import (
    Coefficients,
    float_bdia,
    float_scan,
    midpoint,
    rebuild_errors,
    two_stream,
)
from bdia_jax.recurrence import sample_gamma
from bdia_jax.sharding import constrain


class _FloatStack(Stack):
    """A stack run by `float_scan`; the subclass says with which functions and coefficients."""

    _calls: tuple[Callable[..., Any], ...] = (call_whole,)
    _coefficients: Callable[[int, nnx.Rngs], Coefficients]

    def _prepare(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[Pure, Coefficients]:
        rngs = self.rngs if rngs is None else rngs
        coefficients = self._coefficients(x.shape[0], rngs)
        return pure_blocks(self, rngs, *self._calls), coefficients

    def __call__(
        self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None, **by_name: Any
    ) -> Any:
        """x_K, float32 [B, ..., D]; or (x_K, aux stacked [K, ...]) with `has_aux`.

        Args:
            x: float32 or bfloat16 [B, ..., D].
            *consts: pytrees of arrays every block is called with, differentiated.
            rngs: streams "gamma" and "dropout" (or a default) for this call, in place of the
                stack's own.
        """
        refuse_named(by_name)
        x = constrain(x, self.mesh)
        pure, coefficients = self._prepare(x, rngs)
        states, aux = float_scan(
            pure.block_fns,
            pure.params,
            x,
            x,
            coefficients,
            *consts,
            backprop=self._backprop(),
            has_aux=True,
        )
        return finish(self, self._output(states), aux[0])

    def rebuild_errors(self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None) -> jax.Array:
        """float32 [K]: how far the states block k is evaluated at are off in the backward pass.

        Args:
            x, consts, rngs: as in a call. All K states must fit in memory.
        """
        pure, coefficients = self._prepare(x, rngs)
        return rebuild_errors(
            pure.block_fns, pure.params, x, x, coefficients, *consts, has_aux=True
        )

    def _backprop(self) -> str:
        return self.backprop

    def _output(self, states: tuple[jax.Array, jax.Array]) -> jax.Array:
        return states[1]


class RevStack(_FloatStack):
    """RevViT (Mangalam et al., CVPR 2022): y_1 = x_1 + f(x_2), y_2 = x_2 + g(y_1).

    The input goes into both streams, and both come out, side by side: [B, ..., 2 D]. That is
    another network than the transformer of the same blocks.

    Args:
        make_block: (rngs) -> nnx.Module with `f(x, *consts)` and `g(x)`, the two residual
            branches, as `PreNormBlock` has.
        depth, rngs, dtype: as in `BDIAStack`.
        backprop: "reversible", or "store": autodiff of the same forward.

    Raises:
        ValueError: blocks with variables that are neither parameters nor random state (batch
            statistics): f and g would both update them.
    """

    _calls = (lambda block, x, *consts: block.f(x, *consts), lambda block, x, *_: block.g(x))

    def __init__(
        self,
        make_block: Callable[..., nnx.Module],
        depth: int,
        *,
        rngs: nnx.Rngs,
        backprop: str = "reversible",
        dtype: Any = None,
    ):
        super().__init__(make_block, depth, rngs=rngs, backprop=backprop, dtype=dtype)
        if names := state_names(self):
            raise ValueError(
                f"the block has state ({', '.join(names)}), which f and g would both update; "
                "take a block without, or MidpointStack"
            )

    def out_features(self, width: int) -> int:
        """2 width: both streams."""
        return 2 * width

    def _coefficients(self, batch_size, rngs):
        return two_stream(self.depth)

    def _output(self, states):
        return jnp.concatenate(states, axis=-1)


class MidpointStack(_FloatStack):
    """The explicit midpoint rule: x_{k+1} = x_{k-1} + 2 h_k(x_k), with x_1 = x_0 + h_0(x_0).

    Args:
        make_block, depth, rngs, has_aux, dtype: as in `BDIAStack`.
        backprop: "reversible", or "store": autodiff of the same forward.
    """

    def _coefficients(self, batch_size, rngs):
        return midpoint(self.depth)


class FloatBDIAStack(_FloatStack):
    """BDIA without fixed point and side bits: eq. 10, undone by eq. 16 of arXiv 2407.09093.

    Dividing by gamma = +-1/2 doubles every error on the way down, which is the drift of the
    paper's Fig. 2. At inference gamma is 0, the unchanged transformer; a gradient taken
    there is that of "store".

    Args:
        make_block, depth, rngs, has_aux, dtype: as in `BDIAStack`.
        magnitude: |gamma| in training.
        backprop: "reversible", or "store": autodiff of the same forward.

    Raises:
        ValueError: magnitude 0 with "reversible", when called in training mode.
    """

    def __init__(
        self,
        make_block: Callable[..., nnx.Module],
        depth: int,
        *,
        rngs: nnx.Rngs,
        magnitude: float = 0.5,
        backprop: str = "reversible",
        has_aux: bool = False,
        dtype: Any = None,
    ):
        options = {"backprop": backprop, "has_aux": has_aux, "dtype": dtype}
        super().__init__(make_block, depth, rngs=rngs, **options)
        self.magnitude = magnitude

    def _coefficients(self, batch_size, rngs):
        if self.deterministic:
            return float_bdia(jnp.zeros((self.depth, 1)))
        if self.magnitude == 0 and self.backprop == "reversible":
            raise ValueError("magnitude is 0, so nothing can be rebuilt; use backprop='store'")
        gamma = sample_gamma(draw(rngs, "gamma"), self.depth, batch_size, self.magnitude)
        return float_bdia(gamma)

    def _backprop(self):
        return "store" if self.deterministic else self.backprop
