"""Derivatives of half-precision operations that hold and move less than autodiff's own.

Each takes an equation that JAX has traced, and gives the same value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from bdia_jax._jaxprs import evaluate, run

# dtype -> (exponent bits, mantissa bits)
HALF = {jnp.dtype(jnp.bfloat16): (8, 7), jnp.dtype(jnp.float16): (5, 10)}

_ELEMENTWISE = frozenset(
    {"abs", "add", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "cos", "div"}
    | {"erf", "erfc", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "max"}
    | {"min", "mul", "neg", "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub"}
    | {"eq", "ne", "ge", "gt", "le", "lt", "tanh"}
)


def _dtype(var: Any) -> Any:
    return getattr(var.aval, "dtype", None)


# --- a product whose result is wider than its operands -------------------------------------


def widens(eqn: JaxprEqn) -> bool:
    """Whether it is a product of half-precision operands that is not in half precision."""
    if eqn.primitive.name != "dot_general":
        return False
    return all(_dtype(var) in HALF for var in eqn.invars) and _dtype(eqn.outvars[0]) not in HALF


def product(eqn: JaxprEqn, left: jax.Array, right: jax.Array) -> jax.Array:
    """The product; its derivative has the precision of the operands.

    A projection that ends a residual branch returns float32. So would be its cotangent, and the
    products with that: slower by half or more on a GPU, with more to move.
    """
    narrow = eqn.params | {"preferred_element_type": left.dtype}
    derivative = partial(jax.lax.dot_general_p.bind, **narrow)

    @jax.custom_jvp
    def value(left, right):
        (result,) = evaluate(eqn, left, right)
        return result

    @value.defjvp
    def _(primals, tangents):
        (left, right), (left_dot, right_dot) = primals, tangents
        result_dot = derivative(left_dot, right) + derivative(left, right_dot)
        result = value(left, right)
        return result, result_dot.astype(result.dtype)

    return value(left, right)


# --- activations ---------------------------------------------------------------------------


def with_activations(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, in which what makes one array of another by its elements is one equation.

    Of half precision, and from three operations on: gelu, as JAX traces it. For `is_activation`.
    """
    jaxpr = closed.jaxpr
    made_by = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if len(eqn.outvars) == 1}
    readers: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        for var in _arrays(eqn):
            readers.setdefault(var, []).append(eqn)
    for var in jaxpr.outvars:
        if not isinstance(var, Literal):
            readers.setdefault(var, []).append(None)
    root_of: dict[Any, Any] = {}  # of what is made by elements of one array alone
    for eqn in jaxpr.eqns:
        roots = {root_of.get(var, var) for var in _arrays(eqn)}
        if eqn.primitive.name in _ELEMENTWISE and len(roots) == 1:
            (root,), (out,) = roots, eqn.outvars
            shapes = {var.aval.shape for var in (out, *_arrays(eqn))}
            if _dtype(root) in HALF and shapes == {root.aval.shape}:
                root_of[out] = root
    replaced: dict[int, JaxprEqn | None] = {}
    for out, root in root_of.items():
        if all(_is_of(reader, root, root_of) for reader in readers.get(out, ())):
            continue  # on the way to another, or read by none
        group = _makers(out, root, made_by)
        is_whole = all(
            reader is not None and id(reader) in group
            for eqn in group.values()
            for reader in readers[eqn.outvars[0]]
            if eqn.outvars[0] is not out
        )
        if len(group) >= 3 and is_whole and _dtype(out) in HALF:
            one = _as_one([*group.values()], root, out)
            replaced |= dict.fromkeys(group) | {id(made_by[out]): one}
    eqns = [replaced.get(id(eqn), eqn) for eqn in jaxpr.eqns]
    kept = [eqn for eqn in eqns if eqn is not None]
    return ClosedJaxpr(jaxpr.replace(eqns=kept), closed.consts)


def _is_of(eqn: JaxprEqn | None, root: Any, root_of: dict[Any, Any]) -> bool:
    return eqn is not None and any(root_of.get(out) is root for out in eqn.outvars)


def _arrays(eqn: JaxprEqn) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, Literal)]


def _makers(out: Any, root: Any, made_by: dict[Any, JaxprEqn]) -> dict[int, JaxprEqn]:
    """The equations that make out of root, in order, by their id."""
    found: dict[int, JaxprEqn] = {}

    def visit(var):
        if var is not root and id(made_by[var]) not in found:
            for each in _arrays(made_by[var]):
                visit(each)
            found[id(made_by[var])] = made_by[var]

    visit(out)
    return found


def _as_one(eqns: list[JaxprEqn], root: Any, out: Any) -> JaxprEqn:
    """A call of `jax.jit` that takes root and gives out."""
    fn = jaxpr_as_fun(ClosedJaxpr(Jaxpr((), [root], [out], eqns), ()))
    shape = jax.ShapeDtypeStruct(root.aval.shape, root.aval.dtype)
    (call,) = jax.make_jaxpr(jax.jit(lambda x: fn(x)[0]))(shape).eqns
    return call.replace(invars=[root], outvars=[out])


def is_activation(eqn: JaxprEqn) -> bool:
    """Whether it is a function of JAX (gelu, silu) of one half-precision array, by its elements."""
    inner = eqn.params.get("jaxpr")
    if eqn.primitive.name not in ("jit", "pjit") or not isinstance(inner, ClosedJaxpr):
        return False
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1 or inner.consts:
        return False
    x, y = (getattr(var.aval, "shape", ()) for var in (*eqn.invars, *eqn.outvars))
    dtypes = [_dtype(var) for var in (*eqn.invars, *eqn.outvars)]
    alike = x == y and dtypes[0] in HALF and dtypes[0] == dtypes[1]
    return alike and all(each.primitive.name in _ELEMENTWISE for each in inner.jaxpr.eqns)


def activation(eqn: JaxprEqn, forward: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """forward(x), the value of the equation; its derivative is taken anew from x, in float32.

    Autodiff would hold, beside x, what the value and its derivative have in common.
    """

    @jax.custom_jvp
    def value(x):
        return forward(x)

    @value.defjvp
    def _(primals, tangents):
        (x,), (x_dot,) = primals, tangents

        def in_float32(x):
            return run(_widened, eqn.params["jaxpr"], x)[0]

        # nothing is held but x; XLA may still see what is computed twice
        @partial(jax.checkpoint, prevent_cse=False)
        def derivative(x, x_dot):
            wide, wide_dot = (each.astype(jnp.float32) for each in (x, x_dot))
            return jax.jvp(in_float32, (wide,), (wide_dot,))[1].astype(x.dtype)

        return value(x), derivative(x, x_dot)

    return value(x)


def _widened(eqn: JaxprEqn, *inputs: Any) -> list[Any]:
    """An elementwise equation in float32 in place of half precision."""
    wide = [each.astype(jnp.float32) if each.dtype in HALF else each for each in inputs]
    params = dict(eqn.params)
    if eqn.primitive.name == "convert_element_type" and params["new_dtype"] in HALF:
        params["new_dtype"] = jnp.dtype(jnp.float32)
    return [eqn.primitive.bind(*wide, **params)]
