"""One step that updates in the backward pass: parameters and optimizer's state, stack by stack."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdia_jax._updating import Group, Held, Slots, scaled, squares, update_if
from bdia_jax.per_block import REST, Split, is_own, labels

PyTree = Any


class Updated(NamedTuple):
    """What a step of `update_in_backward` makes.

    loss: float32 []; NaN, too, if a stack was not used exactly once. aux: what loss_fn returned
    beside it, or None. params, opt_state: the new ones. norms: float32, like params, of each
    gradient: [] or [K]. failures: for each stack float32 [K], where the rebuild failed, as in
    `bdia_scan`. taken: bool [], whether loss and gradient were finite. If not, with `if_finite`
    nothing has changed; without, blocks whose gradient was finite have, and only they.
    """

    loss: jax.Array
    aux: Any
    params: PyTree
    opt_state: PyTree
    norms: PyTree
    failures: dict[str, jax.Array]
    taken: jax.Array


class Pass(NamedTuple):
    """What a backward pass gave: gradients of the rest, new values and slots of each stack."""

    loss: jax.Array
    aux: Any
    rest: list[jax.Array]
    new: dict[str, list[jax.Array]]
    slots: dict[str, Slots]

    def sum_of_squares(self) -> jax.Array:
        """Of all gradients, float32 []."""
        stacks = [jnp.sum(slots.squares) for slots in self.slots.values()]
        return sum([*map(squares, self.rest), *stacks], jnp.float32(0))


class Parts:
    """Parameters and the optimizer's state of a step, apart: each stack, and the rest."""

    def __init__(self, tx: Any, stacked: PyTree, params: PyTree, opt_state: Any):
        leaves, self._treedef = jax.tree.flatten(params)
        self._names: list[str] = jax.tree.leaves(labels(stacked, params))
        self._tx = tx
        names = sorted({REST, *self._names})
        if sorted(getattr(opt_state, "inner_states", ())) != names:
            raise ValueError(
                f"opt_state is {type(opt_state).__name__}, expected the state of these parameters, "
                f"with parts {', '.join(map(repr, names))}: per_block(tx, stacked).init(params)"
            )
        self._states = {name: of.inner_state for name, of in opt_state.inner_states.items()}
        self._params: dict[str, list[jax.Array]] = {name: [] for name in self._states}
        for leaf, name in zip(leaves, self._names, strict=True):
            self._params[name].append(leaf)
        self._stacks = [name for name in self._states if name != REST]
        self._is_own = {
            name: is_own(tx, self._masked(name, self._params[name])) for name in self._stacks
        }

    def backward(
        self, loss_fn: Any, args: Any, has_aux: bool, scale: Any, take: Any, *, updates: bool
    ) -> Pass:
        """The loss, and a backward pass that updates the stacks or, else, measures gradients."""
        states = {name: self._split(name, self._states[name]) for name in self._stacks}

        def empty(name: str) -> Slots:
            depth, count = len(self._params[name][0]), len(self._params[name])
            zeros = jnp.zeros((depth, count)), jnp.zeros(depth), jnp.zeros([])
            return Slots(states[name].own if updates else (), (), *zeros)

        def loss_of(rest: Any, slots: dict[str, Slots], held: dict[str, Any]):
            groups = {}
            for name in self._stacks:
                own = slots[name]._replace(shared=states[name].shared, scale=scale, take=take)
                apply = partial(self._of_block, name) if updates else None
                groups[name] = Group(name, len(held[name]), apply, own)
            values = {
                name: [Held(p, group, index) for index, p in enumerate(held[name])]
                for name, group in groups.items()
            }
            try:
                out = loss_fn(self._whole(values | {REST: rest}), *args)
            except TypeError as error:
                if Held.__name__ not in str(error):
                    raise
                raise ValueError(
                    "a parameter that is updated in the backward pass is read by something else "
                    "than its stack, as by a penalty on it; the gradient of that would come too "
                    "late. Take the optimizer's weight decay for a penalty, and else the ordinary "
                    "path, jax.grad and the optimizer's update"
                ) from error
            for name, group in groups.items():
                if not group.uses:
                    raise ValueError(
                        f"the parameters of the stack {name!r} are used by no bdia_scan; `stacked` "
                        "names only those of stacks that the loss depends on"
                    )
            return out if has_aux else (out, None)

        inputs = [self._params[REST], {name: empty(name) for name in self._stacks}]
        inputs.append({name: self._params[name] for name in self._stacks})
        gradient = jax.value_and_grad(loss_of, (0, 1, 2) if updates else (0, 1), has_aux=True)
        (loss, aux), (rest, slots, *new) = gradient(*inputs)
        return Pass(loss, aux, rest, new[0] if updates else {}, slots)

    def updated(self, done: Pass, scale: Any) -> Updated:
        """The result of a step."""
        is_once = [slots.ticket == 1 for slots in done.slots.values()]
        loss = jnp.where(jnp.all(jnp.stack([jnp.bool_(True), *is_once])), done.loss, jnp.nan)
        take = jnp.isfinite(loss) & jnp.isfinite(done.sum_of_squares())
        old, state = self._params[REST], self._states[REST]
        grads = scaled(scale, done.rest)
        rest, state = update_if(take, partial(self._update, REST), old, grads, state)
        states = {REST: state}
        for name in self._stacks:
            before = self._split(name, self._states[name])
            first = [p[0] for p in self._params[name]]  # as gradients, which are in nothing shared
            own = tuple(leaf[0] for leaf in before.own)
            after = self._update(name, first, first, before._replace(own=own).merged)[1]
            pair = self._split(name, after).shared, before.shared
            shared = jax.tree.map(partial(jnp.where, take), *pair)
            states[name] = before._replace(own=done.slots[name].state, shared=shared).merged
        norms = {name: [*jnp.sqrt(slots.squares).T] for name, slots in done.slots.items()}
        return Updated(
            loss=loss,
            aux=done.aux,
            params=self._whole(done.new | {REST: rest}),
            opt_state=optax.transforms.PartitionState(
                {name: optax.MaskedState(inner) for name, inner in states.items()}
            ),
            norms=self._whole(norms | {REST: [jnp.sqrt(squares(g)) for g in done.rest]}),
            failures={name: slots.failures for name, slots in done.slots.items()},
            taken=take,
        )

    def _of_block(self, name: str, params: Any, grads: Any, own: Any, shared: Any):
        """`Group.apply` of a stack."""
        state = self._split(name, self._states[name])._replace(own=own, shared=shared).merged
        new, state = self._update(name, params, grads, state)
        return tuple(new), self._split(name, state).own

    def _split(self, name: str, state: Any) -> Split:
        return Split.of(state, self._is_own[name])

    def _update(self, name: str, params: Any, grads: Any, state: Any) -> tuple[list[Any], Any]:
        """(new parameters, state) of a stack's block, or of the rest."""
        tree = self._masked(name, params)
        changes, state = self._tx.update(self._masked(name, grads), state, tree)
        return jax.tree.leaves(optax.apply_updates(tree, changes)), state

    def _masked(self, name: str, leaves: Any) -> PyTree:
        """The pytree of all parameters with these leaves of one stack; optax masks others so."""
        own = iter(leaves)
        return self._treedef.unflatten(
            [next(own) if each == name else optax.MaskedNode() for each in self._names]
        )

    def _whole(self, values: dict[str, Any]) -> PyTree:
        """The pytree of all parameters, out of the leaves of each stack and of the rest."""
        own = {name: iter(leaves) for name, leaves in values.items()}
        return self._treedef.unflatten([next(own[name]) for name in self._names])
