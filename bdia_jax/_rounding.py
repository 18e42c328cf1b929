"""pin_rounding: makes a bfloat16 or float16 block round where its program says it rounds.

XLA may keep a bfloat16 intermediate in float32 when it fuses its neighbours
(`xla_allow_excess_precision`, on by default), and it fuses the forward pass and the backward
pass differently. The same block then returns values that differ by several quanta, more than
guard bits can absorb. `lax.reduce_precision` is a rounding that XLA must keep.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

# dtype -> (exponent bits, mantissa bits)
_FORMATS = {jnp.dtype(jnp.bfloat16): (8, 7), jnp.dtype(jnp.float16): (5, 10)}

# These move values that are rounded already.
_MOVES = frozenset(
    {"broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "dynamic_update_slice"}
    | {"expand_dims", "gather", "optimization_barrier", "reshape", "rev", "select_n", "slice"}
    | {"squeeze", "stop_gradient", "transpose"}
)

# Their derivative rule computes the value anew, out of our sight: left as they are inside.
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


def pin_rounding(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn with every half-precision intermediate rounded explicitly. Values and types are fn's.

    Loops, conditionals, `jit` and `jax.checkpoint` inside fn are entered; functions with custom
    derivatives are not, their results are rounded.
    """

    def pinned(*args):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        flat = _run(closed, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out_shape), flat)

    return pinned


def has_half_precision(jaxpr: Jaxpr) -> bool:
    """Whether any value in jaxpr, at any depth, is bfloat16 or float16."""
    for eqn in jaxpr.eqns:
        if any(getattr(var.aval, "dtype", None) in _FORMATS for var in eqn.outvars):
            return True
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr) and has_half_precision(inner):
                return True
    return False


def _run(closed: ClosedJaxpr, *args):
    """Evaluates a jaxpr equation by equation, rounding each half-precision result."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(var):
        return var.val if isinstance(var, Literal) else env[var]

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name not in _CUSTOM:
            eqn = eqn.replace(params={key: _pin_param(v) for key, v in eqn.params.items()})
        inputs = list(dict.fromkeys(var for var in eqn.invars if not isinstance(var, Literal)))
        alone = Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
        results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*map(read, inputs))
        if name not in _MOVES:
            results = [_round(result) for result in results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _round(value):
    bits = _FORMATS.get(getattr(value, "dtype", None))  # pyright: ignore[reportArgumentType]
    if bits is None:
        return value
    # through float32: a reduction to the operand's own format would be dropped as a no-op
    wide = jax.lax.convert_element_type(value, jnp.float32)
    return jax.lax.convert_element_type(jax.lax.reduce_precision(wide, *bits), value.dtype)


def _pin_param(value):
    """An equation's parameter, with jaxprs in it replaced by ones that round."""
    if isinstance(value, tuple) and any(_is_jaxpr(item) for item in value):
        return tuple(_pin_param(item) for item in value)
    if isinstance(value, Jaxpr):
        if value.constvars or not has_half_precision(value):
            return value
        return _pin_closed(ClosedJaxpr(value, ())).jaxpr
    if isinstance(value, ClosedJaxpr) and has_half_precision(value.jaxpr):
        return _pin_closed(value)
    return value


def _pin_closed(closed: ClosedJaxpr) -> ClosedJaxpr:
    inputs = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
        if hasattr(aval, "weak_type")
        else jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        for aval in closed.in_avals
    ]
    return jax.make_jaxpr(partial(_run, closed))(*inputs)


def _is_jaxpr(value) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
