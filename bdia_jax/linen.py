"""BDIAStack for Flax Linen: K copies of any user block, trained reversibly."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bdia_jax._checks import check_count
from bdia_jax._flax import (
    WHOLE,
    branch_names,
    check_branches_agree,
    check_dtype,
    check_trains,
    choose_evaluation,
    choose_guard_bits,
    draw_gamma,
    sum_of_branches,
    verification,
)
from bdia_jax._linen import PureBlock, changeable, check_block, takes_deterministic
from bdia_jax.audit import Audit, audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.scan import bdia_scan
from bdia_jax.sharding import constrain

__all__ = ["BDIAStack", "BranchedBlock"]


class BranchedBlock(nn.Module):
    """A block that is the sum of its branches, as `bdia_jax.nnx.BranchedBlock`.

    Subclasses write `setup` and the branches, methods (x, *consts) -> r, and name them in
    `branches`; the call follows from them.
    """

    branches = ()  # without annotations: class attributes, not fields
    per_token = ()
    per_sample = None

    def __call__(self, x: jax.Array, *consts: Any, **options: Any) -> jax.Array:
        """h, float32 [B, ..., D], of x [B, ..., D]; options (`train=True`) go to every branch."""
        return sum_of_branches(self, x, *consts, **options)


class BDIAStack(nn.Module):
    """A stack of K residual blocks that keeps side bits instead of activations.

    The whole loop `for block in blocks: x = x + block(x)`. In training it runs eq. 21 of
    arXiv 2407.09093 with gamma drawn from the rng "gamma" (see `bdia_jax.bdia_scan` for
    what is exact); when deterministic, gamma is 0, which is the loop above on fixed-point
    states.

    Attributes:
        block: a Linen module; called with (x, *consts) it returns h, all that the block adds
            to x (so without the residual itself), or (h, aux) with `has_aux`. x arrives in
            float32, or in `dtype`. It is a template: every block has parameters of its own.
        depth: K, the number of blocks.
        magnitude: |gamma| in training, a number or one for each block; to be reversible 1/2, 1/4
            and so on down to 2^-fixed_point.gamma_bits, 0 for the plain stack.
        fixed_point, backprop, has_aux: as in `bdia_scan`.
        inference_gamma, verify, mesh: as in `bdia_jax.nnx.BDIAStack`.
        by_branch, batch_chunks, token_chunks: to hold less than a block's backward pass at a
            time, as in `bdia_jax.nnx.BDIAStack`; the block's `branches` and `per_token` name
            methods (of a block written with `setup`) that are called as the block is.
        deterministic: True at inference; may be given at the call instead.
        dtype: what the blocks compute in, None if they decide; as in `bdia_jax.nnx.BDIAStack`.
            The collection "params" is cast for the blocks, no other.

    Every collection lives under the name "blocks" with a leading axis K. Every rng the
    caller passes other than "params" and "gamma" reaches the blocks, split by block, so a
    dropout mask is the same in the forward and the backward pass. Mutable collections
    (batch statistics) are updated once per call, by the forward pass, and what blocks sow or the
    caller captures comes out stacked; both are differentiable. If there is a collection
    "failures", {"blocks": jnp.zeros(K)}, its gradient is that of failures of `bdia_scan`.

    Example:
        >>> class Block(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))
        >>> stack = BDIAStack(Block(), depth=4)
        >>> x = jax.numpy.ones((2, 8))
        >>> variables = stack.init(jax.random.key(0), x, deterministic=True)
        >>> stack.apply(
        ...     variables, x, deterministic=False, rngs={"gamma": jax.random.key(1)}
        ... ).shape
        (2, 8)
    """

    block: nn.Module
    depth: int
    magnitude: float | Sequence[float] = 0.5
    fixed_point: FixedPoint | None = FixedPoint()
    backprop: str = "reversible"
    has_aux: bool = False
    by_branch: bool = False
    batch_chunks: int = 1
    token_chunks: int = 1
    inference_gamma: float = 0.0
    verify: bool = True
    deterministic: bool | None = None
    dtype: Any = None
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self):
        check_block(self.block)
        check_count("depth", self.depth)
        super().__post_init__()

    def __call__(
        self, x: jax.Array, *consts: Any, deterministic: bool | None = None, **block_kwargs: Any
    ) -> Any:
        """x_K, float32 [B, ..., D]; or (x_K, aux stacked [K, ...]) with `has_aux`.

        Args:
            x: float32 or bfloat16 [B, ..., D].
            *consts: pytrees of arrays every block is called with, differentiated.
            deterministic: see the attribute; also handed to the block if its call takes it.
            **block_kwargs: static values every block is called with (`train=True`).

        Raises:
            ValueError: as `bdia_scan`; deterministic given neither here nor as attribute.
        """
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        return self._run(bdia_scan, x, consts, deterministic, block_kwargs)

    @nn.nowrap
    def audit(
        self,
        variables: Any,
        x: jax.Array,
        *consts: Any,
        rngs: Any = None,
        **block_kwargs: Any,
    ) -> Audit:
        """`bdia_jax.audit` of this stack in training mode: is its rebuild exact here?

        Args:
            variables, rngs: as of `apply`, with the rng "gamma".
            x, consts, block_kwargs: as in a call. Not under jit; all K states must fit in memory.
        """
        check_trains(self, deterministic=bool(self.deterministic))
        run = {"method": BDIAStack._audited, "rngs": rngs, "mutable": [*variables]}
        return self.apply(variables, x, consts, block_kwargs, **run)[0]

    @nn.nowrap
    def choose_guard_bits(
        self,
        variables: Any,
        x: jax.Array,
        *consts: Any,
        at_least: int = 1,
        draws: int = 3,
        rngs: Any = None,
        **block_kwargs: Any,
    ) -> tuple["BDIAStack", Audit]:
        """(this stack with as many guard bits as an audit asks for, the exact audit of it).

        The variables are those of this stack: guard bits change none.

        Args and errors: as of `audit`, and of `bdia_jax.nnx.BDIAStack.choose_guard_bits`.
        """
        check_trains(self, deterministic=bool(self.deterministic))

        number = itertools.count()

        def audit_with(fixed_point):
            stack, draw = self.clone(fixed_point=fixed_point), next(number)
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, draw), rngs)
            return stack.audit(variables, x, *consts, rngs=keys, **block_kwargs)

        assert self.fixed_point is not None  # check_trains
        found = choose_guard_bits(audit_with, self.fixed_point, at_least, draws)
        return self.clone(fixed_point=found.fixed_point), found

    def _audited(self, x: jax.Array, consts: tuple[Any, ...], block_kwargs: dict[str, Any]):
        def run(*args, backprop, verify, failures, **options):
            del backprop, verify, failures  # "reversible" is audited, which looks for itself
            return audit(*args, **options)

        return self._run(run, x, consts, False, block_kwargs)

    @nn.compact
    def _run(
        self,
        run: Callable[..., Any],
        x: jax.Array,
        consts: tuple[Any, ...],
        deterministic: bool,
        block_kwargs: dict[str, Any],
    ) -> Any:
        """What `run`, that is `bdia_scan` or an audit, makes of the blocks."""
        dtype = check_dtype(self.dtype)
        block = self.block.clone(parent=None, name=None)
        if takes_deterministic(type(block)):
            block_kwargs = block_kwargs | {"deterministic": deterministic}
        x = constrain(x, self.mesh)
        variables = self._stacked_variables(block, x, consts, block_kwargs)
        # what blocks may change, and what they sow
        mutable = changeable(self.scope)
        is_still = deterministic or self.is_initializing()
        drawn = [] if deterministic else self._block_streams()
        keys = {stream: self._block_keys(stream) for stream in drawn}
        evaluation = choose_evaluation(
            self, self.block, x.shape, has_state=[*variables] != ["params"], deterministic=is_still
        )

        def pure_method(method: str | None, index: int = 0):
            items = tuple(sorted(block_kwargs.items()))
            in_parts = evaluation != WHOLE
            return PureBlock(block, method, index, mutable, dtype, self.has_aux, in_parts, items)

        if run is not bdia_scan:
            self._check_branches(pure_method, (variables, keys), x, consts)
        gamma, backprop = draw_gamma(
            self, x.shape[0], lambda: self.make_rng("gamma"), deterministic=is_still
        )
        branches = tuple(pure_method(name, i) for i, name in enumerate(evaluation.branches))
        found = run(
            branches or pure_method(None),
            (variables, keys),
            x,
            gamma,
            *consts,
            fixed_point=self.fixed_point,
            backprop=backprop,
            has_aux=True,
            **evaluation.chunks,
            **verification(self, backprop, self.get_variable("failures", "blocks")),
        )
        if isinstance(found, Audit):
            return found
        out, aux = found
        if branches:  # they have no state, and aux each
            aux = (tuple(aux_i for aux_i, _ in aux), {})
        aux, changed = aux
        if not self.is_initializing():
            for col, value in changed.items():
                self.put_variable(col, "blocks", value)
        return (out, aux) if self.has_aux else out

    def _check_branches(self, pure_method, params, x, consts) -> None:
        """Raises ValueError if the block is not the sum of the branches it names."""
        if not getattr(self.block, "branches", ()) or not callable(self.block):
            return
        if type(self.block).__call__ is BranchedBlock.__call__:
            return
        # with the same keys, so that all draw the same masks
        whole, *branches = (
            lambda *args, fn=pure_method(name): fn(*args)[0]
            for name in (None, *branch_names(self.block))
        )
        name = type(self.block).__name__
        check_branches_agree(name, whole, branches, params, x.astype(jnp.float32), consts)

    def _stacked_variables(self, block, x, consts, block_kwargs):
        """Every collection of K blocks, stacked; initialized from one key a block."""

        if not self.is_initializing():
            known = (col for col in self.variables if self.has_variable(col, "blocks"))
            found = {col: self.get_variable(col, "blocks") for col in known if col != "failures"}
            return nn.meta.unbox(found)

        def init_one(key):
            streams = ("params", *self._block_streams())
            keys = {stream: jax.random.fold_in(key, i) for i, stream in enumerate(streams)}
            return block.init(keys, x, *consts, **block_kwargs)

        def init(key, col):
            stacked = jax.vmap(init_one)(jax.random.split(key, self.depth))[col]
            return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: None})

        variables = {}
        for col in jax.eval_shape(init_one, jax.random.key(0)):
            if col == "params":
                variables[col] = self.param("blocks", init, col)
            else:
                variables[col] = self.variable(
                    col, "blocks", lambda c=col: init(self.make_rng("params"), c)
                ).value
        return variables

    def _block_keys(self, stream: str) -> jax.Array:
        """[K], typed so that the chunks of a batch can have their own."""
        key = self.make_rng(stream)
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return jax.random.split(key if is_typed else jax.random.wrap_key_data(key), self.depth)

    def _block_streams(self) -> list[str]:
        scope = self.scope
        return sorted(set(scope.rngs) - {"params", "gamma"}) if scope is not None else []
