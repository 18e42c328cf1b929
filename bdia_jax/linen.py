"""BDIAStack for Flax Linen: K copies of any user block, trained reversibly."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bdia_jax._checks import check_magnitude
from bdia_jax._flax import cast_floats, check_dtype
from bdia_jax._parts import choose_parts
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.recurrence import sample_gamma
from bdia_jax.scan import bdia_scan


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
        magnitude: |gamma| in training; 2^-fixed_point.gamma_bits to be reversible,
            0 for the plain stack.
        fixed_point, backprop, has_aux: as in `bdia_scan`.
        by_branch, batch_chunks, token_chunks: to hold less than a block's backward pass at a
            time, as in `bdia_jax.nnx.BDIAStack`; the block's `branches` and `per_token` name
            methods (of a block written with `setup`) that are called as the block is.
        deterministic: True at inference; may be given at the call instead.
        dtype: what the blocks compute in, None if they decide; as in `bdia_jax.nnx.BDIAStack`.
            The collection "params" is cast for the blocks, no other.

    Every collection lives under the name "blocks" with a leading axis K. Every rng the
    caller passes other than "params" and "gamma" reaches the blocks, split by block, so a
    dropout mask is the same in the forward and the backward pass. Mutable collections
    (batch statistics) are updated once per call, by the forward pass.

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
    magnitude: float = 0.5
    fixed_point: FixedPoint | None = FixedPoint()
    backprop: str = "reversible"
    has_aux: bool = False
    by_branch: bool = False
    batch_chunks: int = 1
    token_chunks: int = 1
    deterministic: bool | None = None
    dtype: Any = None

    @nn.compact
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
        dtype = check_dtype(self.dtype)
        block = self.block.clone(parent=None, name=None)
        if "deterministic" in inspect.signature(type(block).__call__).parameters:
            block_kwargs["deterministic"] = deterministic
        variables = self._stacked_variables(block, x, consts, block_kwargs)
        state = {col: v for col, v in variables.items() if col != "params"}
        mutable = [col for col in state if self.is_mutable_collection(col)]
        drawn = [] if deterministic else self._block_streams()
        keys = {stream: self._block_keys(stream) for stream in drawn}

        parts = choose_parts(
            self.block,
            x.shape,
            by_branch=self.by_branch,
            batch_chunks=self.batch_chunks,
            token_chunks=self.token_chunks,
            state=[*state],
            deterministic=deterministic or self.is_initializing(),
        )

        def pure_method(index: int, method: str | None):
            def block_fn(params_k, x, *consts):
                variables_k, keys_k = params_k
                if index:  # streams start anew in every branch
                    keys_k = {s: jax.random.fold_in(key, index) for s, key in keys_k.items()}
                weights, x, consts = cast_floats((variables_k.get("params"), x, consts), dtype)
                if weights is not None:
                    variables_k = variables_k | {"params": weights}
                options = {"rngs": keys_k, "mutable": mutable, "method": method}
                out, new_state = block.apply(variables_k, x, *consts, **options, **block_kwargs)
                h, aux = out if self.has_aux else (out, None)
                aux = cast_floats(aux, None if dtype is None else jnp.float32)
                return h, (aux, jax.lax.stop_gradient(new_state))

            return block_fn

        check_magnitude(self.magnitude, self.fixed_point, self.backprop)
        gamma = None
        if self.magnitude and not deterministic and not self.is_initializing():
            gamma = sample_gamma(self.make_rng("gamma"), self.depth, x.shape[0], self.magnitude)
        branches = tuple(pure_method(i, method) for i, method in enumerate(parts.branches))
        out, aux = bdia_scan(
            branches or pure_method(0, None),
            (variables, keys),
            x,
            gamma,
            *consts,
            fixed_point=self.fixed_point,
            backprop=self.backprop,
            has_aux=True,
            **parts.chunks,
        )
        if branches:  # they have no state, and aux each
            aux = (tuple(aux_i for aux_i, _ in aux), {})
        aux, new_state = aux
        if not self.is_initializing():
            for col, value in new_state.items():
                self.put_variable(col, "blocks", value)
        return (out, aux) if self.has_aux else out

    def _stacked_variables(self, block, x, consts, block_kwargs):
        """Every collection of K blocks, stacked; initialized from one key a block."""

        def init_one(key):
            streams = ("params", *self._block_streams())
            keys = {stream: jax.random.fold_in(key, i) for i, stream in enumerate(streams)}
            return block.init(keys, x, *consts, **block_kwargs)

        def init(key, col):
            return jax.vmap(init_one)(jax.random.split(key, self.depth))[col]

        variables = {}
        for col in jax.eval_shape(init_one, jax.random.key(0)):
            if col == "params":
                variables[col] = self.param("blocks", init, col)
            elif self.is_initializing() or self.has_variable(col, "blocks"):
                variables[col] = self.variable(
                    col, "blocks", lambda c=col: init(self.make_rng("params"), c)
                ).value
        return variables

    def _block_keys(self, stream: str) -> jax.Array:
        """[K], typed so that the parts of a batch can have their own."""
        key = self.make_rng(stream)
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return jax.random.split(key if is_typed else jax.random.wrap_key_data(key), self.depth)

    def _block_streams(self) -> list[str]:
        scope = self.scope
        return sorted(set(scope.rngs) - {"params", "gamma"}) if scope is not None else []
