"""What a backward pass recomputes: programs that return it beside the gradient, or do without.

A value is marked where the function makes it. The mark goes through differentiation and partial
evaluation with it, and so is met twice: in the forward pass, and where `jax.checkpoint` recomputes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.extend.source_info_util import summarize
from jax.interpreters import ad, mlir

from bdia_jax._jaxprs import Visit, enter, evaluate, run

# (number of a value, whether it is recomputed) -> the value, each time it is made
Seen = dict[tuple[int, bool], list[jax.Array]]

# What values are seen in. The others' results are seen, if they make new values.
_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr"}
_ENTERED = frozenset({*_CALLS, "scan", "cond"})
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "name",
        "reshape",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)

_mark = Primitive("mark")  # the identity
_mark.def_abstract_eval(lambda x, **_: x)
ad.primitive_jvps[_mark] = lambda primals, tangents, **at: (_mark.bind(*primals, **at), *tangents)
mlir.register_lowering(_mark, lambda _, x, **at: [x])  # where nobody looks

# An equation whose results are marked, from number `first` on. Marks after it would not do: many
# a derivative, as that of exp, is made of the equation's own result.
_marked = Primitive("marked")
_marked.multiple_results = True
_marked.def_abstract_eval(lambda *_, eqn, first: [var.aval for var in eqn.outvars])


def _marked_jvp(primals, tangents, *, eqn, first):
    """The equation's own rule, with its results marked where the rule has made them."""
    moving = [at for at, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    zeros = []

    def jvp(primals, moved):
        all_tangents = list(tangents)
        for at, tangent in zip(moving, moved, strict=True):
            all_tangents[at] = tangent
        with eqn.ctx.manager:
            rule = ad.primitive_jvps[eqn.primitive]
            results, changes = rule(primals, all_tangents, **eqn.params)
        if not eqn.primitive.multiple_results:
            results, changes = [results], [changes]
        zeros[:] = [change if isinstance(change, ad.Zero) else None for change in changes]
        return list(results), [change for change in changes if not isinstance(change, ad.Zero)]

    closed = jax.make_jaxpr(jvp)(list(primals), [tangents[at] for at in moving])
    count = len(eqn.outvars)
    numbers = {id(var): first + at for at, var in enumerate(closed.jaxpr.outvars[:count])}

    def visit(inner, *inputs):
        return [
            _mark.bind(value, at=numbers[id(var)]) if id(var) in numbers else value
            for var, value in zip(inner.outvars, evaluate(inner, *inputs), strict=True)
        ]

    flat = run(visit, closed, *primals, *(tangents[at] for at in moving))
    results, changes = flat[:count], iter(flat[count:])
    return results, [next(changes) if zero is None else zero for zero in zeros]


ad.primitive_jvps[_marked] = _marked_jvp


# --- the programs --------------------------------------------------------------------


def gradient(flat_fn: Callable[..., Any]) -> Callable[..., Any]:
    """(leaves, cotangents) -> (results, gradients of the float leaves), as training has them."""

    def program(leaves, cotangents):
        is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def of_floats(floats):
            floats = iter(floats)
            return flat_fn(
                *(next(floats) if f else leaf for leaf, f in zip(leaves, is_float, strict=True))
            )

        floats = [leaf for leaf, f in zip(leaves, is_float, strict=True) if f]
        results, vjp = jax.vjp(of_floats, floats)
        return results, *vjp(cotangents)

    return program


def without_checkpoint(eqn, *inputs):
    """Evaluates an equation, with what is under `jax.checkpoint` as if it were not."""
    if eqn.primitive.name == "remat2":
        return run(without_checkpoint, ClosedJaxpr(eqn.params["jaxpr"], ()), *inputs)
    if eqn.primitive.name in _ENTERED:
        eqn = enter(partial(run, without_checkpoint), eqn)
    return evaluate(eqn, *inputs)


class Place(NamedTuple):
    """Where a value is made. loops: of each scan around it, the number of the first value in it,
    and whether it runs in reverse; the value then has an axis in front."""

    primitive: str
    type: str
    source: str
    loops: tuple[tuple[int, bool], ...]


def marking(places: list[Place], loops: tuple[tuple[int, bool], ...] = ()) -> Visit:
    """Marks the values that equations make by their numbers, and lists their places."""

    def visit(eqn, *inputs):
        if eqn.primitive.name == "scan":
            body = marking(places, (*loops, (len(places), eqn.params["reverse"])))
            return evaluate(enter(partial(run, body), eqn), *inputs)
        if eqn.primitive.name in _ENTERED:
            return evaluate(enter(partial(run, visit), eqn), *inputs)
        if eqn.primitive.name in _MOVES:
            return evaluate(eqn, *inputs)
        first = len(places)
        for kind in (var.aval for var in eqn.outvars):
            name = f"{kind.dtype}{list(kind.shape)}"
            places.append(Place(eqn.primitive.name, name, summarize(eqn.source_info), loops))
        if eqn.primitive in ad.primitive_jvps:
            return _marked.bind(*inputs, eqn=eqn, first=first)
        return [_mark.bind(x, at=first + at) for at, x in enumerate(evaluate(eqn, *inputs))]

    return visit


# --- looking -------------------------------------------------------------------------


def look(closed: ClosedJaxpr, again: bool, *args) -> tuple[list[Any], Seen]:
    """The results of a jaxpr, and the marked values in it; `again` if it is the recomputation."""
    seen: Seen = {}

    def visit(eqn, *inputs):
        name, params = eqn.primitive.name, eqn.params
        if eqn.primitive in (_mark, _marked):
            is_one = eqn.primitive is _mark
            results = inputs if is_one else evaluate(params["eqn"], *inputs)
            for at, value in enumerate(results, params["at"] if is_one else params["first"]):
                is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
                value = jax.random.key_data(value) if is_key else value
                seen.setdefault((at, again), []).append(value)
            return results
        if name in _CALLS:
            called = params[_CALLS[name]]
            called = called if isinstance(called, ClosedJaxpr) else ClosedJaxpr(called, ())
            recomputes = params.get("differentiated", False)
            if recomputes:
                inputs = _barred(params["prevent_cse"], inputs)
            results, inner = look(called, again or recomputes, *inputs)
        elif name == "scan":
            results, inner = _look_scan(params, again, inputs)
        elif name == "cond":
            results, inner = _look_cond(params["branches"], again, *inputs)
        else:
            return evaluate(eqn, *inputs)
        _add(seen, inner)
        return results

    return run(visit, closed, *args), seen


def _barred(prevent_cse, inputs):
    """As `jax.checkpoint` is lowered: it keeps the compiler from taking the forward's values."""
    if isinstance(prevent_cse, bool):
        prevent_cse = [prevent_cse] * len(inputs)
    which = [at for at, prevent in enumerate(prevent_cse) if prevent]
    inputs = list(inputs)
    barred = jax.lax.optimization_barrier([inputs[at] for at in which])
    for at, value in zip(which, barred, strict=True):
        inputs[at] = value
    return inputs


def _look_scan(params, again: bool, inputs):
    end = params["num_consts"] + params["num_carry"]
    consts, carry = inputs[: params["num_consts"]], inputs[params["num_consts"] : end]

    def body(carry, xs):
        results, seen = look(params["jaxpr"], again, *consts, *carry, *xs)
        return tuple(results[: len(carry)]), (results[len(carry) :], seen)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, seen) = jax.lax.scan(body, carry, inputs[end:], **options)
    return [*carry, *ys], seen


def _look_cond(branches, again: bool, index, *inputs):
    looks = [partial(look, branch, again) for branch in branches]
    shapes = [jax.eval_shape(look, *inputs)[1] for look in looks]

    def taken(number):
        def branch(*inputs):
            # of a branch not taken: zeros
            several = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
            results, several[number] = looks[number](*inputs)
            return results, several

        return branch

    results, several = jax.lax.switch(index, [*map(taken, range(len(looks)))], *inputs)
    seen: Seen = {}
    for each in several:
        _add(seen, each)
    return results, seen


def _add(seen: Seen, more: Seen) -> None:
    for key, values in more.items():
        seen.setdefault(key, []).extend(values)


def pairs(seen: Seen) -> dict[int, list[tuple[jax.Array, jax.Array]]]:
    """number of a value -> (forward's, recomputed), each time it is recomputed."""
    return {
        at: [(seen[at, False][0], value) for value in values]
        for (at, again), values in seen.items()
        if again and (at, False) in seen
    }
