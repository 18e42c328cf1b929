"""pin_rounding: makes a bfloat16 or float16 function round where its program says it rounds.

XLA may keep a bfloat16 intermediate in float32 when it fuses its neighbours
(`xla_allow_excess_precision`, on by default), and it fuses the forward pass and the backward
pass differently. What `jax.checkpoint` evaluates again then differs from what it was, by more than
guard bits can absorb. `lax.reduce_precision` is a rounding that XLA must keep.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.extend.source_info_util import register_exclusion

from bdia_jax._derivatives import (
    HALF,
    activation,
    is_activation,
    product,
    widens,
    with_activations,
)
from bdia_jax._jaxprs import enter, equations, evaluate, run

register_exclusion(__file__)  # the line that JAX tells of an equation is the user's

# These move values that are rounded already.
_MOVES = frozenset(
    {"broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "dynamic_update_slice"}
    | {"expand_dims", "gather", "name", "optimization_barrier", "reshape", "rev", "select_n"}
    | {"slice", "squeeze", "stop_gradient", "transpose"}
)

# Others that hold a jaxpr are left as they are inside: kernels, whose arguments are no arrays,
# and what has a derivative rule of its own, which computes the value anew, out of our sight.
_ENTERED = frozenset({"jit", "closed_call", "remat2", "scan", "while", "cond"})


def pin_rounding(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn, rounding to bfloat16 or float16 wherever its program says so, however it is compiled.

    By default XLA may leave such a rounding out between operations that it fuses. What is
    evaluated twice, as under `jax.checkpoint`, then differs: near a tie a token is routed to
    another expert, and gradients are those of other activations. The function returned rounds
    every bfloat16 and float16 intermediate explicitly, the first time and again. float32 is left
    alone, and nothing more is kept. `audit_remat` says whether it was enough.

    Derivatives are leaner than autodiff's: those of a product that is wider than its operands have
    the operands' type, as have other products'; those of an activation (gelu, silu, any function of
    one half-precision array by its elements) are taken anew from its input, in float32.

    `jit`, `jax.checkpoint`, `scan`, loops and conditionals inside fn are entered. Functions with a
    derivative rule of their own (`jax.custom_jvp`, `jax.custom_vjp`), kernels and `shard_map` are
    not: their results are rounded, what is inside stays XLA's business. Pin the whole loss rather
    than the function under `jax.checkpoint`: the value that enters it has to be rounded too.

    Args:
        fn: any function of arrays that JAX can trace. A method of an NNX module updates no
            state; pin a function of its split state.

    Returns:
        A function of the same values and types. It takes pytrees of arrays, by position or by
        name; what is static (a flag, a string) is bound first, with `functools.partial` or a
        lambda. Transform it as you like: jit, grad, vmap, checkpoint. It traces fn at each call, so
        call it under `jax.jit`.

    Raises:
        ValueError: when called with an argument that is no array, named with its value.

    Example:
        >>> x = jnp.linspace(0, 1, 64, dtype=jnp.bfloat16)
        >>> fn = lambda x: (x * 3).astype(jnp.float32) + 1  # x * 3 is bfloat16
        >>> step_by_step = fn(x)
        >>> bool((jax.jit(pin_rounding(fn))(x) == step_by_step).all())
        True
    """

    @wraps(fn)
    def pinned(*args, **kwargs):
        for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
            _check(leaf, path)
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        flat = _run(closed, *jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(out_shape), flat)

    return pinned


def has_half_precision(jaxpr: Jaxpr) -> bool:
    """Whether any value in jaxpr, at any depth, is bfloat16 or float16."""
    return any(
        getattr(var.aval, "dtype", None) in HALF for eqn in equations(jaxpr) for var in eqn.outvars
    )


def _check(leaf, path):
    try:
        jax.typeof(leaf)
    except TypeError:
        where = ("args", "kwargs")[path[0].idx] + jax.tree_util.keystr(path[1:])
        raise ValueError(
            f"{where} is {leaf!r} of type {type(leaf).__name__}, which is not an array; bind "
            "static values first: pin_rounding(functools.partial(fn, name=value))"
        ) from None


def _run(closed, *args):
    return run(_pin, with_activations(closed), *args)


def _pin(eqn, *inputs):
    name = eqn.primitive.name
    if widens(eqn):
        return [product(eqn, *inputs)]
    if is_activation(eqn):
        entered = enter(partial(run, _pin), eqn)
        return [activation(eqn, lambda x: _round(*evaluate(entered, x)), *inputs)]
    results = evaluate(enter(_run, eqn) if name in _ENTERED else eqn, *inputs)
    return results if name in _MOVES else [_round(result) for result in results]


def _round(value):
    return _rounded(value) if getattr(value, "dtype", None) in HALF else value


@jax.custom_jvp
def _rounded(value):
    # through float32: a reduction to the operand's own format would be dropped as a no-op
    wide = jax.lax.convert_element_type(value, jnp.float32)
    rounded = jax.lax.reduce_precision(wide, *HALF[value.dtype])
    return jax.lax.convert_element_type(rounded, value.dtype)


@_rounded.defjvp
def _rounded_jvp(primals, tangents):
    """Its own rounding is no operation of the program: nothing to differentiate."""
    return _rounded(*primals), tangents[0]
