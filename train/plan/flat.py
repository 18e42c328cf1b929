"""A jaxpr as a flat list of equations, calls inlined, whose values know how they are split."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

# the mesh axes each axis of an array is split over
Split = tuple[tuple[str, ...], ...]

# inlined; scans are not
_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
    | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array of the program, whole: `split` says what of it a device holds."""

    shape: tuple[int, ...]
    dtype: Any
    split: Split

    def local_bytes(self, sizes: dict[str, int]) -> int:
        """Bytes on one device of a mesh with axes of these sizes."""
        lengths = (
            -(-length // parts(axes, sizes))
            for length, axes in zip(self.shape, self.split, strict=True)
        )
        return math.prod(lengths) * _itemsize(self.dtype)


@dataclasses.dataclass(eq=False)
class Equation:
    """outs = name(*ins). inner: bytes a scan's body needs at most, beside ins and outs."""

    name: str
    ins: list[Value]
    outs: list[Value]
    params: dict[str, Any]
    inner: int = 0


def parts(axes: Sequence[str], sizes: dict[str, int]) -> int:
    """Into how many parts an axis is split."""
    return math.prod(sizes[axis] for axis in axes)


def whole(ndim: int) -> Split:
    """Of an array that every device has all of."""
    return ((),) * ndim


def split_of(array: Any) -> Split:
    """Of a `ShapeDtypeStruct` with a NamedSharding, or without."""
    spec = tuple(array.sharding.spec) if getattr(array, "sharding", None) is not None else ()
    return as_split(spec, array.ndim)


def as_split(spec: Sequence[Any], ndim: int) -> Split:
    """A `PartitionSpec` for an array of so many axes."""
    named = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return (*named, *whole(ndim - len(named)))


def flatten(
    jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Value]
) -> tuple[list[Equation], list[Value]]:
    """(equations, results). The splits of all but the arguments are empty as yet."""
    equations: list[Equation] = []

    def run(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {
            var: _plain(np.shape(const), jnp.result_type(const))
            for var, const in zip(jaxpr.constvars, consts, strict=True)
        }

        def read(var: Any) -> Value:
            return _plain(np.shape(var.val), var.aval.dtype) if _is_literal(var) else known[var]

        for eqn in jaxpr.eqns:
            ins = [read(var) for var in eqn.invars]
            inner = _called(eqn)
            if inner is None:
                avals: list[Any] = [var.aval for var in eqn.outvars]
                outs = [_plain(aval.shape, aval.dtype) for aval in avals]
                params = _scan_params(eqn.params) if eqn.primitive.name == "scan" else eqn.params
                equations.append(Equation(eqn.primitive.name, ins, outs, params))
            else:
                outs = run(*inner, ins)
            known |= zip(eqn.outvars, outs, strict=True)
        return [read(var) for var in jaxpr.outvars]

    return equations, run(jaxpr, consts, arguments)


def alive(equations: Sequence[Equation], results: Sequence[Value]) -> list[Equation]:
    """The equations that results need, and of scans only what they need of it."""
    needed, kept = set(results), []
    for equation in reversed(equations):
        if any(out in needed for out in equation.outs):
            if equation.name == "scan":
                equation = _needed_of_scan(equation, [out in needed for out in equation.outs])
            needed |= set(equation.ins)
            kept.append(equation)
    return kept[::-1]


def _needed_of_scan(equation: Equation, used: list[bool]) -> Equation:
    params, (body, consts) = equation.params, equation.params["body"]
    first, num_carry = params["num_consts"], params["num_carry"]
    num_rows = len(equation.ins) - first - num_carry
    while True:
        must = [False] * first + used[:num_carry] + [False] * num_rows
        jaxpr, used_ins = dce_jaxpr(body, used, instantiate=must)
        carry = used_ins[first : first + num_carry]
        if carry == used[:num_carry]:
            break
        used = [*carry, *used[num_carry:]]
    changed: dict[str, Any] = {"body": (jaxpr, consts)}
    changed |= {"num_consts": sum(used_ins[:first]), "num_carry": sum(carry)}
    ins = list(itertools.compress(equation.ins, used_ins))
    outs = list(itertools.compress(equation.outs, used))
    return dataclasses.replace(equation, ins=ins, outs=outs, params=params | changed)


def _called(eqn: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The (jaxpr, consts) of a call."""
    found = [_open(p) for p in eqn.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    return found[0] if eqn.primitive.name in _CALLS and found else None


def _open(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _scan_params(params: dict[str, Any]) -> dict[str, Any]:
    """length, num_consts, num_carry, and body: (jaxpr, consts)."""
    if "ft_in" in params:  # from JAX 0.11 on
        groups = params["ft_in"].unpack()
        num_consts, num_carry = len(groups[0]), len(groups[1])
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    known = {"length": params["length"], "num_consts": num_consts, "num_carry": num_carry}
    return known | {"body": _open(params["jaxpr"])}


def _plain(shape: Sequence[int], dtype: Any) -> Value:
    return Value(tuple(shape), dtype, whole(len(shape)))


def _is_literal(var: Any) -> bool:
    return isinstance(var, Literal)


def _itemsize(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return np.dtype(dtype).itemsize
