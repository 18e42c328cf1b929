"""An optimizer for every block by itself, and whether it is one that can be used so."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdia_jax._jaxprs import run
from bdia_jax._updating import scaled, squares

PyTree = Any
REST = "rest"  # the name of the parameters outside of stacks


def per_block(
    tx: optax.GradientTransformation, stacked: PyTree = True, max_norm: float | None = None
) -> optax.GradientTransformation:
    """tx for every block by itself, and for the parameters outside of stacks: the ordinary path.

    What tx does per parameter, such as the factors of Adafactor, the trust ratio of LAMB or the
    sums of `bdia_jax.optim.set_adam`, it then does per parameter of a block. The state of Adam has
    the same shapes as without.

    Args:
        tx: any that makes the update of a parameter from the gradient of this parameter alone.
        stacked: pytree prefix over the parameters: the name of a stack, or True for the only one,
            where the leading axis counts its blocks; False or "" elsewhere
            (`bdia_jax.nnx.stacked_params` makes it).
        max_norm: clips the gradient of all parameters by its global norm before; None: not.

    Returns:
        An optax transformation. Its state is that of `update_in_backward`: a step may be made by
        either.

    Raises:
        ValueError: a stack named "rest"; and, as tx is initialized, if it makes an update from
            other gradients too, or has gradients in a state that is no float.
    """
    names = {_name(leaf) for leaf in jax.tree.leaves(stacked)} | {REST}
    each: dict[Any, Any] = {
        name: tx if name == REST else _over_blocks(tx) for name in sorted(names)
    }
    partition = optax.partition(each, partial(labels, stacked))

    def update(updates, state, params=None):
        if max_norm is not None:
            norm = jnp.sqrt(sum(map(squares, jax.tree.leaves(updates))))
            updates = scaled(clipping(max_norm, norm), updates)
        return partition.update(updates, state, params)

    return optax.GradientTransformation(partition.init, update)


def _over_blocks(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """tx on every slice of the leading axis. What no gradient is in, as a count, is there once."""

    def init(params):
        state = jax.vmap(tx.init)(params)
        split = Split.of(state, is_own(tx, params))
        return split._replace(shared=jax.tree.map(lambda leaf: leaf[0], split.shared)).merged

    def update(updates, state, params=None):
        axes = Split.of(state, is_own(tx, params)).axes
        return jax.vmap(tx.update, (0, axes, 0), (0, axes))(updates, state, params)

    return optax.GradientTransformation(init, update)


def _name(stack: Any) -> str:
    if stack == REST:
        raise ValueError(f"a stack is named {REST!r} in `stacked`, as what no stack has; rename it")
    return stack if isinstance(stack, str) and stack else "blocks" if stack else REST


def labels(stacked: PyTree, params: PyTree) -> PyTree:
    """For each parameter the name of its stack, or of the rest."""
    return jax.tree.broadcast(jax.tree.map(_name, stacked), params)


def clipping(max_norm: float, norm: jax.Array) -> jax.Array:
    """What clipping multiplies gradients by."""
    return max_norm / jnp.maximum(norm, max_norm)


class Split(NamedTuple):
    """The leaves of an optimizer's state: each block's own, and those that are shared."""

    own: tuple[Any, ...]
    shared: tuple[Any, ...]
    is_own: tuple[bool, ...]
    treedef: Any

    @classmethod
    def of(cls, state: Any, is_own: tuple[bool, ...]) -> "Split":
        leaves, treedef = jax.tree.flatten(state)
        pairs = [*zip(leaves, is_own, strict=True)]
        own, shared = (tuple(x for x, own in pairs if own == which) for which in (True, False))
        return cls(own, shared, is_own, treedef)

    @property
    def merged(self) -> Any:
        """The state."""
        own, shared = iter(self.own), iter(self.shared)
        return self.treedef.unflatten([next(own if each else shared) for each in self.is_own])

    @property
    def axes(self) -> Any:
        """Of the state, for `jax.vmap` over blocks."""
        return self.treedef.unflatten([0 if each else None for each in self.is_own])


# --- does an optimizer keep parameters apart? ---------------------------------------------


def is_own(tx: Any, params: PyTree) -> tuple[bool, ...]:
    """For each leaf of tx's state whether a block has its own: gradients are in it.

    Args:
        params: stacked.

    Raises:
        ValueError: an update is made from another parameter's gradient, or there are gradients in
            a leaf that is no float.
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    if len(jax.tree.leaves(one)) == 1:
        _check_apart(tx, (one, one))  # of two blocks, where no other parameter tells
    return tuple(map(bool, _check_apart(tx, one)))


def _check_apart(tx: Any, params: PyTree) -> list[frozenset]:
    """For each leaf of tx's state the numbers of the gradients in it, for params of such shapes."""
    named = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in named]
    state = jax.eval_shape(tx.init, params)
    made, changed = _influences(tx, params, state)
    for index, own in enumerate(made):
        if others := own - {index}:
            raise ValueError(
                f"the optimizer makes the update of {names[index]} from the gradient of "
                f"{names[min(others)]} too, as clipping by a global norm does, but the gradients "
                "of all blocks are never there together. Take max_norm= for clipping, if_finite= "
                "for steps to leave out, and else an optimizer that treats parameters by themselves"
            )
    for leaf, own in zip(jax.tree.leaves(state), changed, strict=True):
        if own and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"the optimizer's state has {leaf.dtype}{list(leaf.shape)} that depends on "
                "gradients, and only floats can come out of a backward pass; take another optimizer"
            )
    return changed


def _influences(tx: Any, params: PyTree, state: Any) -> tuple[list[frozenset], list[frozenset]]:
    """Which gradients are in each update, and in each array of the state, after many steps."""
    count = len(jax.tree.leaves(params))

    def update(grads, state, params):
        return tx.update(grads, state, params)

    closed = jax.make_jaxpr(update)(params, state, params)
    own = [frozenset({index}) for index in range(count)]
    in_state = [frozenset()] * len(jax.tree.leaves(state))
    while True:
        made = _sets(run(_visit, closed, *own, *in_state, *own))
        after = [new | old for new, old in zip(made[count:], in_state, strict=True)]
        if after == in_state:
            return made[:count], in_state
        in_state = after


def _visit(eqn: Any, *inputs: Any) -> list[frozenset]:
    """An equation's results, of sets in the place of arrays: the union, or what is inside says."""
    sets = _sets(inputs)
    inner = [each for each in (eqn.params.get("jaxpr"), eqn.params.get("call_jaxpr")) if each]
    if eqn.primitive.name == "cond":
        made = [_sets(run(_visit, each, *sets[1:])) for each in eqn.params["branches"]]
        return [sets[0].union(*each) for each in zip(*made, strict=True)]
    if eqn.primitive.name in ("jit", "pjit", "custom_jvp_call") and inner:
        return _sets(run(_visit, inner[0], *sets))
    return [frozenset().union(*sets)] * len(eqn.outvars)


def _sets(values: Any) -> list[frozenset]:
    """Arrays, which are constants, have no gradient in them."""
    return [value if isinstance(value, frozenset) else frozenset() for value in values]
