"""Training steps that update each block in the backward pass, so that its gradient is not kept.

`jax.grad` returns the gradients of all blocks, and only then an optimizer sees them. Here block k
is updated as soon as the backward pass leaves it: its gradient is complete, and its old parameters
are read by nobody any more. The parameters that come out are those of the ordinary path.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bdia_jax._update_step import Parts, Updated
from bdia_jax.nnx import BDIAStack, Stack, stacked_params
from bdia_jax.per_block import clipping, per_block

__all__ = ["Optimizer", "Updated", "per_block", "update_in_backward"]

PyTree = Any


def update_in_backward(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    stacked: PyTree = True,
    *,
    has_aux: bool = False,
    max_norm: float | None = None,
    if_finite: bool = False,
) -> Callable[..., Updated]:
    """A training step in which gradients of all blocks never exist together.

    The same numbers as `jax.value_and_grad(loss_fn)` and `per_block(tx, stacked)`, with
    `backprop="reversible"` or "remat", at the memory of one block's gradient. Donate params and
    opt_state (`jax.jit(step, donate_argnums=(0, 1))`): they are replaced in place.

    Args:
        loss_fn: (params, *args) -> loss, or (loss, aux) with `has_aux`. Each stack is handed to
            `bdia_scan` (or a `BDIAStack`) once; its parameters are no arrays here, and any other
            use of them raises.
        tx, stacked: as of `per_block`.
        max_norm: clips the gradient by its global norm, which is known only when all of it is: a
            first backward pass measures it, a second updates. None: not clipped.
        if_finite: changes nothing in a step whose loss or gradient is not finite, by the same two
            passes. Without, some blocks have changed when that is known (`Updated.taken`), and the
            state is to be thrown away.

    Returns:
        (params, opt_state, *args) -> `Updated`; opt_state is first `per_block(tx, stacked).init`.

    Raises:
        ValueError: a stack with backprop "store", or "reversible" and gamma None, one that is used
            twice or read otherwise; tx as of `per_block`.

    Example:
        >>> import bdia_jax as bdia
        >>> from bdia_jax.in_backward import per_block, update_in_backward
        >>> params = {"w": 0.1 * jax.random.normal(jax.random.key(0), (12, 16, 16))}
        >>> x0 = jax.random.normal(jax.random.key(1), (4, 16))
        >>> gamma = bdia.sample_gamma(jax.random.key(2), depth=12, batch_size=4)
        >>> block = lambda params, x: jnp.tanh(x @ params["w"])
        >>> loss_fn = lambda params: jnp.mean(bdia.bdia_scan(block, params, x0, gamma) ** 2)
        >>> tx = optax.adamw(1e-3)
        >>> step = jax.jit(update_in_backward(loss_fn, tx), donate_argnums=(0, 1))
        >>> done = step(params, per_block(tx).init(params))
        >>> done.params["w"].shape, bool(done.taken)
        ((12, 16, 16), True)
    """

    def step(params: PyTree, opt_state: PyTree, *args: Any) -> Updated:
        parts = Parts(tx, stacked, params, opt_state)
        backward = partial(parts.backward, loss_fn, args, has_aux)
        scale = take = None
        if max_norm is not None or if_finite:
            first = backward(None, None, updates=False)
            norm = jnp.sqrt(first.sum_of_squares())
            if max_norm is not None:
                scale = clipping(max_norm, norm)
            if if_finite:
                take = jnp.isfinite(first.loss) & jnp.isfinite(norm)
        return parts.updated(backward(scale, take, updates=True), scale)

    return step


class Optimizer(nnx.Optimizer):
    """`flax.nnx.Optimizer` whose steps may update blocks in the backward pass.

    Args:
        model: every `BDIAStack` in it is updated so.
        tx: as of `per_block`.
        wrt: which variables are trained.
        max_norm, if_finite: as of `update_in_backward`.

    `update(model, grads)` is the ordinary path, and makes the same parameters.

    Example:
        >>> from bdia_jax import in_backward
        >>> from bdia_jax.nnx import BDIAStack
        >>> make = lambda rngs: nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.gelu)
        >>> stack = BDIAStack(make, depth=4, rngs=nnx.Rngs(0))
        >>> optimizer = in_backward.Optimizer(stack, optax.adamw(1e-3), wrt=nnx.Param)
        >>> @nnx.jit(donate_argnums=(0, 1))
        ... def train_step(stack, optimizer, x):
        ...     return optimizer.train_step(stack, lambda stack, x: jnp.mean(stack(x) ** 2), x)
        >>> bool(train_step(stack, optimizer, jnp.ones((2, 8))).taken)
        True
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        wrt: Any,
        max_norm: float | None = None,
        if_finite: bool = False,
    ):
        stacked = nnx.as_pure(nnx.filter_state(stacked_params(model), wrt))
        # a State's parameters are Variables, and those of `update` are not
        tx_of_model = per_block(tx, stacked, max_norm)
        pure = optax.GradientTransformation(
            lambda params: tx_of_model.init(nnx.as_pure(params)), tx_of_model.update
        )
        super().__init__(model, pure, wrt=wrt)
        self.each, self.max_norm, self.if_finite = tx, max_norm, if_finite

    def train_step(
        self, model: nnx.Module, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False
    ) -> Updated:
        """Changes the model and this optimizer by one step.

        Args:
            loss_fn: (model, *args) -> loss, or (loss, aux) with `has_aux`. What else it changes in
                the model, random streams and batch statistics, is changed.

        Returns:
            `Updated`, without params and opt_state, which are in model and optimizer.

        Raises:
            ValueError: as `update_in_backward`; a stack of `bdia_jax.baselines`.
        """
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Stack) and not isinstance(module, BDIAStack):
                raise ValueError(
                    f"the model has a {type(module).__name__}, and only a BDIAStack is updated in "
                    "its backward pass; take nnx.value_and_grad and this optimizer's update"
                )
        graphdef, params, others = nnx.split(model, self.wrt, ...)
        treedef = jax.tree.structure(params)

        def loss_of(pure: PyTree, others: Any, *args: Any):
            fresh = jax.tree.map(lambda array: array, others)  # Variables that may change here
            own = nnx.merge(graphdef, treedef.unflatten(jax.tree.leaves(pure)), fresh)
            out = loss_fn(own, *args)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, nnx.state(own, nnx.Not(self.wrt)))

        stacked = nnx.as_pure(nnx.filter_state(stacked_params(model), self.wrt))
        options = {"max_norm": self.max_norm, "if_finite": self.if_finite, "has_aux": True}
        step = update_in_backward(loss_of, self.each, stacked, **options)
        done = step(nnx.as_pure(params), nnx.as_pure(self.opt_state), others, *args)
        aux, changed = done.aux
        nnx.update(model, treedef.unflatten(jax.tree.leaves(done.params)), changed)
        nnx.update(self.opt_state, nnx.state(done.opt_state))
        self.step[...] += done.taken
        return done._replace(aux=aux, params=None, opt_state=None)
