"""BDIAStack for Flax NNX: K copies of any user block, trained reversibly."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._flax import (
    WHOLE,
    Draw,
    branch_names,
    check_branches_agree,
    check_inference_gamma,
    check_trains,
    choose_evaluation,
    choose_guard_bits,
    draw_gamma,
    verification,
)
from bdia_jax._stack import (
    BranchedBlock,
    Pure,
    RebuildFailures,
    Stack,
    call_branch,
    call_whole,
    draw,
    finish,
    pure_blocks,
    refuse_named,
    stacked_params,
    state_names,
)
from bdia_jax.audit import Audit, audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.scan import bdia_scan
from bdia_jax.sharding import constrain

__all__ = ["BDIAStack", "BranchedBlock", "RebuildFailures", "Stack", "stacked_params"]


class BDIAStack(Stack):
    """A stack of K residual blocks that keeps side bits instead of activations.

    `y = stack(x)` is the whole loop `for block in blocks: x = x + block(x)`. In training
    mode it draws gamma and runs eq. 21 of arXiv 2407.09093 (see `bdia_jax.bdia_scan` for what
    is exact); after `model.eval()` gamma is 0, which is the loop above on fixed-point states.

    Args:
        make_block: (rngs) -> nnx.Module; the module maps (x, *consts) to h, all that the
            block adds to x (so without the residual itself), or to (h, aux) with `has_aux`.
            x arrives in float32, or in `dtype`; h may be of any float dtype, float32 is best
            (let the last projection return it).
        depth: K, the number of blocks.
        rngs: initializes the blocks, one key a block, and seeds the stack's own streams
            "gamma" and "dropout".
        magnitude: |gamma| in training, a number or one for each block; to be reversible 1/2, 1/4
            and so on down to 2^-fixed_point.gamma_bits, 0 for the plain stack. May be set later
            too (`stack.magnitude = 0.25`), under jit to a traced number: a schedule compiles once.
        fixed_point, backprop, has_aux: as in `bdia_scan`; the first two may be set later too
            (`stack.backprop = "store"`).
        by_branch, batch_chunks, token_chunks: evaluate less than a block at a time, to hold
            less: see below. May be set later too (`stack.batch_chunks = 4`).
        inference_gamma: the constant gamma_1 .. gamma_{K-1} of eq. 10 at inference, from
            -0.5 to 0.5: another solver of the same ODE, as in Fig. 1 of the paper. 0 is the
            unchanged transformer. May be set later too (`stack.inference_gamma = 0.2`).
        dtype: what the blocks compute in (jnp.bfloat16), None if they decide: see below. May be
            set later too (`stack.dtype = None`).
        verify: whether the backward pass of "reversible" proves every rebuilt state, as in
            `bdia_scan`: a gradient that depends on a wrong one is NaN. May be set later too.
        mesh: of `bdia_jax.sharding.make_mesh`, to split x, and with it states and side bits, over
            many devices; parameters are the caller's to split (`param_shardings`). None: x stays
            as it comes. May be set later too.

    Attributes:
        blocks: one block module whose variables are stacked on a leading axis K.
        deterministic: True at inference; `train()` and `eval()` of this or any enclosing
            module set it.
        failures: None, or set it to `RebuildFailures(jnp.zeros(depth))` and differentiate it too
            (`nnx.DiffState(0, nnx.Any(nnx.Param, RebuildFailures))`): its gradient says in which
            blocks the rebuild failed, as in `bdia_scan`.

    Raises:
        ValueError: a depth below 1, inference_gamma outside [-0.5, 0.5], or a dtype that is no
            float type.

    What a deep stack still needs is the backward pass of one block. Three arguments make that of
    "reversible" smaller; `block_fn`, `batch_chunks` and `token_chunks` of `bdia_scan` say how:

        batch_chunks=n: a block is evaluated n times, each on a chunk of the batch. Costs nothing
            but smaller matrix products. If it takes consts, its class attribute `per_sample` says
            which each sample has its own of: `per_sample = (True, False)`, or one bool for all.
        by_branch=True: the residuals of one branch at a time, for one more evaluation of all
            branches but the last. The block names them in a class attribute, methods
            (x, *consts) -> r: `branches = ("f", "g")` is h = f(x) + g(x + f(x)). A `BranchedBlock`
            has no other call; of any other class `audit` compares the two.
        token_chunks=n: by_branch, and those branches the block also names in `per_token`, such as
            an MLP, are evaluated n times, each on a chunk of axis 1.

    They are for blocks that change no state but their random streams; at inference a block with
    state is evaluated whole. Dropout draws another mask with them, the same in every backprop.

    Dropout inside a block draws from a key of its own per block and call, the same in the
    forward and the backward pass. Variables that are neither parameters nor random state
    (batch statistics) are updated once per call, by the forward pass, if the block changes them;
    what it sows inside `nnx.capture` comes out stacked [K, ...]. Both are differentiable.

    With dtype, as of a Flax layer, parameters stay float32: each block gets its own, x and the
    float consts cast to it, one block at a time and alike in the forward and the backward pass,
    and float32 gradients come back. The states, gamma, x_K and aux are as without. Layers that
    name a dtype of their own keep it (the blocks of `bdia_jax.models` do: set the model's). A
    LayerNorm takes its statistics in float32 and returns dtype. State is never cast; a BatchNorm
    of NNX that names no dtype thus returns the float32 of its statistics.
    A block that ends in bfloat16 returns h in steps of 2^-6 at magnitude 4, eight quanta: one
    rounding that comes out different is more than a guard bit absorbs. `pin_rounding` makes
    every one come out the same on a CPU; elsewhere `choose_guard_bits` measures what is needed.

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

    failures: RebuildFailures | None = None

    def __init__(
        self,
        make_block: Callable[..., nnx.Module],
        depth: int,
        *,
        rngs: nnx.Rngs,
        magnitude: float | Sequence[float] = 0.5,
        fixed_point: FixedPoint | None = FixedPoint(),
        backprop: str = "reversible",
        has_aux: bool = False,
        by_branch: bool = False,
        batch_chunks: int = 1,
        token_chunks: int = 1,
        inference_gamma: float = 0.0,
        verify: bool = True,
        dtype: Any = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        options = {"backprop": backprop, "has_aux": has_aux, "dtype": dtype, "mesh": mesh}
        super().__init__(make_block, depth, rngs=rngs, **options)
        self.magnitude = tuple(magnitude) if isinstance(magnitude, Sequence) else magnitude
        self.fixed_point = fixed_point
        self.by_branch = by_branch
        self.batch_chunks = batch_chunks
        self.token_chunks = token_chunks
        self.inference_gamma = inference_gamma
        self.verify = verify

    @property
    def inference_gamma(self) -> float:
        """gamma_1 .. gamma_{K-1} at inference."""
        return self._inference_gamma

    @inference_gamma.setter
    def inference_gamma(self, gamma: float) -> None:
        self._inference_gamma = check_inference_gamma(gamma)

    def __call__(
        self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None, **by_name: Any
    ) -> Any:
        """x_K, float32 [B, ..., D]; or (x_K, aux stacked [K, ...]) with `has_aux`.

        Args:
            x: float32 or bfloat16 [B, ..., D].
            *consts: pytrees of arrays every block is called with, differentiated.
            rngs: streams "gamma" and "dropout" (or a default) for this call, in place of the
                stack's own.

        Raises:
            ValueError: as `bdia_scan`, and as `bdia_jax.sharding.state_sharding` with a mesh.
            TypeError: an argument of the block that is given by name.
        """
        refuse_named(by_name)
        rngs = self.rngs if rngs is None else rngs
        x = constrain(x, self.mesh)
        gamma, backprop = self._draw(x, rngs)
        pure, block_fn, chunks = self._functions(x, rngs)
        options = {"fixed_point": self.fixed_point, "backprop": backprop, "has_aux": True}
        failures = None if self.failures is None else self.failures[...]
        options |= verification(self, backprop, failures)
        out, aux = bdia_scan(block_fn, pure.params, x, gamma, *consts, **options, **chunks)
        if isinstance(block_fn, tuple):  # branches have no state, and aux each
            aux = (tuple(aux_i for aux_i, _ in aux), nnx.State({}))
        return finish(self, out, aux)

    def audit(
        self, x: jax.Array, *consts: Any, rngs: nnx.Rngs | None = None, **by_name: Any
    ) -> Audit:
        """`bdia_jax.audit` of this stack in training mode: is its rebuild exact here?

        Args:
            x, consts, rngs: as in a call. Not under jit; all K states must fit in memory.
        """
        refuse_named(by_name, "stack.audit")
        check_trains(self, deterministic=self.deterministic)
        rngs = self.rngs if rngs is None else rngs
        x = constrain(x, self.mesh)
        self._check_branches(x, consts)
        gamma, _ = self._draw(x, rngs)
        pure, block_fn, chunks = self._functions(x, rngs)
        options = {"fixed_point": self.fixed_point, "has_aux": True}
        return audit(block_fn, pure.params, x, gamma, *consts, **options, **chunks)

    def choose_guard_bits(
        self,
        x: jax.Array,
        *consts: Any,
        at_least: int = 1,
        draws: int = 3,
        rngs: nnx.Rngs | None = None,
        **by_name: Any,
    ) -> Audit:
        """Sets `fixed_point.guard_bits` to what audits suggest, and returns the audit of it.

        Guard bits change what is kept and what is rebuilt, never a forward value, so they may be
        chosen anew at any time, on another device for example. What is promised is that these
        draws of gamma and dropout were exact, with room for twice the drift. Another batch may need
        more: its gradient is then NaN (`verify`), never a wrong number.

        Args:
            x, consts, rngs: as in `audit`. Drift grows with the blocks' magnitude: take real inputs
                and, if there are any, trained parameters.
            at_least: fewest guard bits to take. One is an insurance: that no rounding came out
                different here does not promise it of the next batch. For several batches, call
                with each in turn and with what was chosen before.
            draws: of gamma and dropout that are audited, each compiled anew.

        Returns:
            An exact `Audit` with the number chosen, which is in `fixed_point`.

        Raises:
            ValueError: as `audit`; no number of guard bits is enough, or states are not finite.
        """
        refuse_named(by_name, "stack.choose_guard_bits")
        check_trains(self, deterministic=self.deterministic)
        before: Any = self.fixed_point

        def audit_with(fixed_point):
            self.fixed_point = fixed_point
            return self.audit(x, *consts, rngs=rngs)

        try:
            found = choose_guard_bits(audit_with, before, at_least, draws)
        except BaseException:
            self.fixed_point = before
            raise
        return found

    def _draw(self, x: jax.Array, rngs: nnx.Rngs) -> Draw:
        key = partial(draw, rngs, "gamma")
        return draw_gamma(self, x.shape[0], key, deterministic=self.deterministic)

    def _functions(self, x: jax.Array, rngs: nnx.Rngs) -> tuple[Pure, Any, dict[str, Any]]:
        """(Pure, block_fn of `bdia_scan`, its arguments about chunks)."""
        evaluation = choose_evaluation(
            self,
            self.blocks,
            x.shape,
            has_state=bool(state_names(self)),
            deterministic=self.deterministic,
        )
        branches = map(call_branch, evaluation.branches)
        pure = pure_blocks(self, rngs, *branches, is_in_parts=evaluation != WHOLE)
        block_fn = pure.block_fns if evaluation.branches else pure.block_fns[0]
        return pure, block_fn, evaluation.chunks

    def _check_branches(self, x: jax.Array, consts: tuple[Any, ...]) -> None:
        """Raises ValueError if the block is not the sum of the branches it names."""
        block = self.blocks
        if not getattr(block, "branches", ()) or not callable(block):
            return
        if type(block).__call__ is BranchedBlock.__call__:
            return
        still = nnx.clone(self)
        still.eval()
        pure = pure_blocks(still, still.rngs, call_whole, *map(call_branch, branch_names(block)))
        whole, *branches = (lambda *args, fn=fn: fn(*args)[0] for fn in pure.block_fns)
        name = type(block).__name__
        check_branches_agree(name, whole, branches, pure.params, x.astype(jnp.float32), consts)
