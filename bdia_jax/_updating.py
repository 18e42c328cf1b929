"""Blocks that the backward pass updates one by one, as `bdia_scan` meets them.

A stacked parameter that is to be updated is `Held`: no array, so that nothing but one `bdia_scan`
can read it. That scan has it in the carry of its backward pass, where block k's slice is replaced
as soon as its gradient is known. The new values come out as cotangents, which nobody but
`bdia_jax.in_backward` sees.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._block import Leaves
from bdia_jax.compiled import targets

PyTree = Any

# (params, grads, state, shared=..) -> (params, state), of a block
Apply = Callable[..., tuple[Any, Any]]


class Slots(NamedTuple):
    """The arrays of an update.

    state: the optimizer's of each block, floats [K, ...], whose cotangents are the new values.
    shared: the rest of it, the same for all blocks.
    squares: float32 [K, parameters], whose cotangent is the sum of squares of each gradient.
    failures: float32 [K], whose cotangent is that of `bdia_scan`.
    ticket: float32 [], whose cotangent is how often the update was made.
    scale: float32 [], by which gradients are multiplied, or None. take: bool [], whether new
    values take the place of the old ones, or None.
    """

    state: tuple[jax.Array, ...]
    shared: Any
    squares: jax.Array
    failures: jax.Array
    ticket: jax.Array
    scale: Any = None
    take: Any = None


class Held:
    """A stacked parameter [K, ...] in the hands of an update: `bdia_scan` reads it, nobody else.

    shape, dtype, ndim: as of the array. group: of the parameters updated with it. index: of it
    among them.
    """

    def __init__(self, value: jax.Array, group: "Group", index: int):
        self.value, self.group, self.index = value, group, index
        self.shape, self.dtype, self.ndim = value.shape, value.dtype, value.ndim

    def __repr__(self) -> str:
        return f"Held({self.group.name!r}, {self.dtype}{list(self.shape)})"


class Group:
    """The parameters that one stack updates in one step, while it is traced.

    name: of the stack. apply: the optimizer's; None to only measure gradients. slots: of the step.
    uses: how many calls of `bdia_scan` have had them.
    """

    def __init__(self, name: str, size: int, apply: Apply | None, slots: Slots):
        self.name, self.size, self.apply, self.slots = name, size, apply, slots
        self.uses = 0


class Update(NamedTuple):
    """What is static of an update.

    places: where in `Leaves.diff` each of the group's parameters is; the others are not held.
    """

    places: tuple[int, ...]
    apply: Apply | None

    def carry(self, params: Leaves, slots: Slots) -> Any:
        """What the backward pass replaces in place: (held parameters, the optimizer's state)."""
        return (self._held(params.diff), slots.state) if self.apply else ()

    def inputs(self, params: Leaves, slots: Slots) -> tuple[Leaves, Any]:
        """(params without those in `carry`, the number of each block)."""
        if self.apply:
            params = params._replace(diff=self._not_held(params.diff))
        return params, jnp.arange(len(slots.squares))

    def read(self, carry: Any, params_k: Leaves, k: jax.Array) -> Leaves:
        """Block k's parameters, of `inputs` and of `carry`."""
        if not self.apply:
            return params_k
        return params_k._replace(diff=self._with([_at(p, k) for p in carry[0]], params_k.diff))

    def block(
        self, carry: Any, params_k: Leaves, grads: Any, k: jax.Array, slots: Slots
    ) -> tuple[Any, Any, jax.Array]:
        """Updates block k: (carry, gradients of what is not held, squares [parameters])."""
        held, others = self._held(grads), self._not_held(grads)
        sums = jnp.stack([squares(g) for g in held])
        if not self.apply:
            return carry, others, sums
        held = scaled(slots.scale, held)
        old, state = self._held(params_k.diff), tuple(_at(each, k) for each in carry[1])
        which = jnp.isfinite(jnp.sum(sums))
        which = which if slots.take is None else which & slots.take
        new = update_if(which, partial(self.apply, shared=slots.shared), old, held, state)
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda all, one: put(all, one, k, 0), carry, new), others, sums

    def cotangents(
        self, carry: Any, others: Any, squares: jax.Array, failed: Any, slots: Slots
    ) -> tuple[Any, Slots]:
        """Of `Leaves.diff` and of the slots: new values, where there are."""
        held, state = carry or ((None,) * len(self.places), None)
        ticket = jnp.where(squares[0, 0] < 0, 1.0, 1.0)  # no constant: `jax.vmap` would not sum it
        made = Slots(state, None, squares, failed, ticket)  # pyright: ignore[reportArgumentType]
        return self._with(held, others), made

    def _held(self, diff: Any) -> tuple[Any, ...]:
        """Of the leaves those that are, as the group orders them."""
        return tuple(diff[at] for at in self.places)

    def _not_held(self, diff: Any) -> tuple[Any, ...]:
        return tuple(None if at in self.places else leaf for at, leaf in enumerate(diff))

    def _with(self, held: Any, others: Any) -> tuple[Any, ...]:
        values = dict(zip(self.places, held, strict=True))
        return tuple(values.get(at, leaf) for at, leaf in enumerate(others))


def take_held(params: PyTree) -> tuple[PyTree, Group | None, list[int | None]]:
    """(params with arrays in the place of `Held`, whose they are, the number of each leaf in it).

    Raises:
        ValueError: parameters of several stacks, not all of one, or of one that is used before.
    """
    leaves, treedef = jax.tree.flatten(params)
    held = [leaf for leaf in leaves if isinstance(leaf, Held)]
    if not held:
        return params, None, []
    group = held[0].group
    names = sorted({leaf.group.name for leaf in held})
    if len(names) > 1:
        raise ValueError(
            f"one bdia_scan has parameters of {', '.join(map(repr, names))}, which are updated as "
            "stacks of their own; give them one name in `stacked`"
        )
    if len(held) != group.size:
        raise ValueError(
            f"a bdia_scan has {len(held)} of the {group.size} parameters of {group.name!r}, which "
            "are updated together; name in `stacked` which belong to which stack, and leave out "
            "what no stack uses"
        )
    if group.uses:
        raise ValueError(
            f"the parameters of {group.name!r} are used by two calls of bdia_scan in one step: the "
            "gradient is the sum of both, and not known when the first is undone. Take the "
            "ordinary path (jax.grad and the optimizer's update) for blocks that are shared"
        )
    group.uses += 1
    arrays = [leaf.value if isinstance(leaf, Held) else leaf for leaf in leaves]
    numbers = [leaf.index if isinstance(leaf, Held) else None for leaf in leaves]
    return treedef.unflatten(arrays), group, numbers


def make_update(group: Group, numbers: list[int | None], params: PyTree) -> Update:
    """Of params as arrays, and the numbers of its leaves in the group."""
    pairs = zip(jax.tree.leaves(params), numbers, strict=True)
    floats = [number for leaf, number in pairs if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return Update(tuple(floats.index(number) for number in range(group.size)), group.apply)


def scaled(scale: Any, grads: PyTree) -> PyTree:
    """Gradients times a number, or as they are if it is None."""
    return grads if scale is None else jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def squares(grad: jax.Array) -> jax.Array:
    """Their sum, float32 []."""
    return jnp.sum(jnp.square(grad.astype(jnp.float32)))


def update_if(
    which: jax.Array, apply: Callable[..., Any], params: Any, grads: Any, state: Any
) -> Any:
    """apply(params, grads, state) if `which` holds, else (params, state).

    As arrays of their own: else XLA would compute the new state wherever it is needed, and have
    to copy all blocks' old one for it.
    """
    if targets.default_device().platform == "cpu":  # where barriers are dropped before that
        keep = lambda params, _, state: (params, state)  # noqa: E731
        return jax.lax.cond(which, apply, keep, params, grads, state)
    made = apply(params, grads, state), (params, state)
    return jax.lax.optimization_barrier(jax.tree.map(partial(jnp.where, which), *made))


def _at(array: jax.Array, k: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, k, keepdims=False)
