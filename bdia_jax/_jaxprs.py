"""Evaluating a traced function equation by equation, for those who see or change each."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.extend.source_info_util import register_exclusion

register_exclusion(__file__)  # the line that JAX tells of an equation is the user's

# (eqn, *inputs) -> its results
Visit = Callable[..., Sequence[Any]]


def run(visit: Visit, closed: ClosedJaxpr, *args) -> list[Any]:
    """The results of a jaxpr, each of whose equations is evaluated by `visit`."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(var):
        if not isinstance(var, Literal):
            return env[var]
        aval: Any = var.aval
        return jnp.asarray(var.val, aval.dtype)

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, visit(eqn, *map(read, eqn.invars)), strict=True))
    return [read(var) for var in jaxpr.outvars]


def evaluate(eqn: JaxprEqn, *inputs) -> Sequence[Any]:
    """The equation's results, as they are."""
    bound = {
        var: value
        for var, value in zip(eqn.invars, inputs, strict=True)
        if not isinstance(var, Literal)
    }
    alone = Jaxpr((), [*bound], eqn.outvars, [eqn], eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*bound.values())


def enter(evaluated: Callable[..., Any], eqn: JaxprEqn) -> JaxprEqn:
    """The equation whose inner jaxprs, a loop's body or a branch, are `evaluated(jaxpr, *args)`."""
    params = {key: _entered(evaluated, value) for key, value in eqn.params.items()}
    return eqn.replace(params=params)


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                yield from equations(inner)


def _entered(evaluated: Callable[..., Any], value: Any) -> Any:
    if isinstance(value, tuple) and any(_is_jaxpr(item) for item in value):
        return tuple(_entered(evaluated, item) for item in value)
    if isinstance(value, ClosedJaxpr):
        inputs = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
            if hasattr(aval, "weak_type")
            else jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            for aval in value.in_avals
        ]
        return jax.make_jaxpr(partial(evaluated, value))(*inputs)
    if isinstance(value, Jaxpr) and not value.constvars:
        return _entered(evaluated, ClosedJaxpr(value, ())).jaxpr
    return value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
