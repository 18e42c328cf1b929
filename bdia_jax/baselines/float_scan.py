"""float_scan: reversible residual stacks in floating point, which rebuild states inexactly.

The baselines of BDIA share one recurrence, x_{k+1} = a_k x_{k-1} + b_k x_k + c_k h_k(x_k),
undone by solving for x_{k-1}. No side bits are kept, so every rebuild adds rounding errors,
and the next one builds on them. (It is over 300 lines because the two are read together.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bdia_jax import _checks
from bdia_jax._block import Branch, LeafFn, Leaves, over_leaves, partition
from bdia_jax._call import compiled_once
from bdia_jax._parts import value_and_vjp
from bdia_jax.recurrence import per_element

PyTree = Any


class Coefficients(NamedTuple):
    """a_k, b_k, c_k for every step k: float32 [S, B] or [S, 1] each."""

    a: Any
    b: Any
    c: Any


def midpoint(depth: int) -> Coefficients:
    """x_{k+1} = x_{k-1} + 2 h_k(x_k) after one Euler step x_1 = x_0 + h_0(x_0)."""
    a = np.ones((depth, 1), np.float32)
    b, c = 0 * a, 2 * a
    a[0], b[0], c[0] = 0, 1, 1
    return Coefficients(a, b, c)


def two_stream(depth: int) -> Coefficients:
    """y_1 = x_1 + f(x_2), y_2 = x_2 + g(y_1): two steps a block, x_{k+1} = x_{k-1} + h_k(x_k)."""
    ones = np.ones((2 * depth, 1), np.float32)
    return Coefficients(ones, 0 * ones, ones)


def float_bdia(gamma: jax.Array) -> Coefficients:
    """Eq. 10, which eq. 16 of arXiv 2407.09093 undoes. gamma: [K, B] from `sample_gamma`."""
    return Coefficients(gamma, 1 - gamma, 1 + gamma)


def float_scan(
    block_fns: tuple[Callable[..., Any], ...],
    params: PyTree,
    x_prev: jax.Array,
    x: jax.Array,
    coefficients: Coefficients,
    *consts: PyTree,
    backprop: str = "reversible",
    has_aux: bool = False,
) -> Any:
    """Runs x_{k+1} = a_k x_{k-1} + b_k x_k + c_k h_k(x_k) and returns the last two states.

    The backward pass of "reversible" starts from these two alone and solves each step for
    x_{k-1} in float32. That is inexact: gradients agree with "store" as far as the rebuilt
    states agree with the forward's, which `rebuild_errors` measures. Each function is
    evaluated once per block on the way back, for the rebuild and the vjp together.

    Args:
        block_fns: the functions of one block, called in turn, one step each:
            (params_k, x, *consts) -> h, or (h, aux) with `has_aux`. All get the whole
            params_k. As in `bdia_scan` otherwise.
        params: pytree of arrays stacked on a leading axis K, as in `bdia_scan`.
        x_prev, x: x_{-1} and x_0, float32 or bfloat16 [B, ..., D].
        coefficients: S = K len(block_fns) steps. a_k may be 0 in the first step alone, whose
            x_{-1} is then lost; anywhere else it makes the gradients of "reversible" infinite
            or NaN where it cannot be refused (inside jit). No gradient flows into them.
        *consts: pytrees handed to every function, as in `bdia_scan`.
        backprop: "reversible", or "store": autodiff of the same forward, the reference.
        has_aux: whether the functions return (h, aux).

    Returns:
        (x_{S-1}, x_S), float32; with `has_aux` ((x_{S-1}, x_S), aux), aux being a tuple with
        the stacked [K, ...] aux of every function.

    Raises:
        ValueError: at trace time, with the offending value and the remedy.

    Example:
        >>> w = 0.1 * jax.random.normal(jax.random.key(0), (12, 16, 16))
        >>> x = jax.random.normal(jax.random.key(1), (4, 16))
        >>> blocks = (lambda w, x: jnp.tanh(x @ w),)
        >>> loss = lambda w: jnp.sum(float_scan(blocks, w, x, x, midpoint(12))[1])
        >>> jax.grad(loss)(w).shape
        (12, 16, 16)
    """
    if backprop not in ("reversible", "store"):
        raise ValueError(f"backprop is {backprop!r}, expected one of reversible, store")
    arrays = _check(len(block_fns), params, (x_prev, x), coefficients, consts, backprop)
    options = {"block_fns": tuple(block_fns), "has_aux": has_aux, "backprop": backprop}
    return compiled_once(_run, **options)(arrays=arrays)


def _run(block_fns, arrays, has_aux, backprop) -> Any:
    call = _separate(block_fns, has_aux, *arrays)
    if backprop == "reversible":
        result: Any = _reversible(call.blocks, call.operands)
        states, aux = result
    else:
        states, (aux, _) = _forward(call.blocks, call.operands)
    if not has_aux:
        return states
    return states, tuple(merge(*a) for merge, a in zip(call.merge_aux, aux, strict=True))


def rebuild_errors(
    block_fns: tuple[Callable[..., Any], ...],
    params: PyTree,
    x_prev: jax.Array,
    x: jax.Array,
    coefficients: Coefficients,
    *consts: PyTree,
    has_aux: bool = False,
) -> jax.Array:
    """How far each rebuilt state is from the forward's: the drift of the paper's Fig. 2.

    One compiled forward and backward pass, gradients included, as training runs them.

    Args:
        As `float_scan`. All states must fit in memory.

    Returns:
        float32 [K]: entry k is the largest |rebuilt - forward| of the states at which the
        backward pass evaluates block k. The last of all states is kept, so with one
        function per block the last entry is 0.
    """
    states = (x_prev, x)
    arrays = _check(len(block_fns), params, states, coefficients, consts, "reversible")
    call = _separate(block_fns, has_aux, *arrays)

    @jax.jit
    def measure(operands):
        last, (aux, kept) = _forward(call.blocks, operands, keep_states=True)
        ct_aux = [jax.tree.map(jnp.ones_like, a.diff) for a in aux]
        # the gradients of |x_S|^2 / 2 are returned lest they be optimized away
        ct_states = jnp.zeros_like(last[0]), last[1]
        return _reverse(call.blocks, operands._replace(states=last), ct_states, ct_aux, kept)

    _, errors = measure(call.operands)
    return errors


class _Operands(NamedTuple):
    """What is traced. states: two of them, float32; coefficients: [K, functions, B or 1] each."""

    params: Leaves
    states: tuple[Any, Any]
    coefficients: Any
    consts: Leaves


class _Call(NamedTuple):
    """blocks: the functions of one block; merge_aux: what puts the leaves of their aux together."""

    blocks: tuple[LeafFn, ...]
    merge_aux: tuple[Callable[[list, list], PyTree], ...]
    operands: _Operands


def _check(functions, params, states, coefficients, consts, backprop) -> tuple[Any, ...]:
    """(params, states, coefficients, consts) as arrays; coefficients [K, functions, B or 1]."""
    if not functions:
        raise ValueError("block_fns is empty, expected at least one function")
    params = _checks.as_arrays(params, "params")
    consts = _checks.as_arrays(consts, "consts")
    x_prev, x = map(_checks.check_x0, states)
    if x_prev.shape != x.shape:
        raise ValueError(f"x_prev has shape {x_prev.shape} and x {x.shape}; they must be equal")
    depth = _checks.check_depth(params)
    _check_coefficients(coefficients, depth, functions, x.shape[0], backprop)

    def by_block(given):
        given = jax.lax.stop_gradient(jnp.asarray(given, jnp.float32))
        return given.reshape(depth, functions, given.shape[1])

    states = (x_prev.astype(jnp.float32), x.astype(jnp.float32))
    return params, states, Coefficients(*map(by_block, coefficients)), consts


def _separate(block_fns, has_aux, params, states, coefficients, consts) -> _Call:
    """What is differentiated, apart from what is not."""
    prepared = [over_leaves(fn, params, states[0], consts, has_aux) for fn in block_fns]
    blocks, aux_shapes, *_ = zip(*prepared, strict=True)
    operands = _Operands(partition(params)[0], states, coefficients, partition(consts)[0])
    return _Call(blocks, tuple(partition(shape)[1] for shape in aux_shapes), operands)


def _check_coefficients(coefficients, depth, functions, batch, backprop) -> None:
    steps = depth * functions
    for name, given in zip("abc", coefficients, strict=True):
        if given.ndim != 2 or given.shape[0] != steps or given.shape[1] not in (1, batch):
            raise ValueError(
                f"coefficient {name} has shape {given.shape}, expected [{steps}, {batch}] or "
                f"[{steps}, 1]: one row for each of {functions} function(s) of {depth} block(s)"
            )
    a = coefficients[0]
    if backprop == "reversible" and not isinstance(a, Tracer) and not np.all(a[1:]):
        raise ValueError(
            f"coefficient a is 0 in step {1 + int(np.argwhere(a[1:] == 0)[0, 0])}, so that step "
            "cannot be undone; only the first may have a = 0, or use backprop='store'"
        )


# --- forward, and the way back -------------------------------------------------------


def _step(x_prev, x, h, at: Coefficients):
    """x_{k+1}."""
    return at.a * x_prev + at.b * x + at.c * h


def _inverse_step(x_next, x, h, at: Coefficients):
    """x_{k-1}, up to rounding errors, of which a small a_k makes large ones."""
    return (x_next - at.b * x - at.c * h) / at.a


def _of_step(coefficients: Coefficients, i: int, x: jax.Array) -> Coefficients:
    """Of the i-th function of a block, to multiply x."""
    return Coefficients(*(per_element(each[i], x) for each in coefficients))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reversible(blocks, operands: _Operands):
    states, (aux, _) = _forward(blocks, operands)
    return states, aux


def _forward(blocks, operands: _Operands, keep_states=False):
    """((x_{S-1}, x_S), (aux of every function [K, ...], every x_k if they are kept))."""

    def body(states, block_inputs):
        x_prev, x = states
        params_k, coefficients_k = block_inputs
        auxes, kept = [], []
        for i, block in enumerate(blocks):
            h, aux = block(params_k, x, operands.consts)
            auxes.append(aux)
            kept.append(x)
            x_prev, x = x, _step(x_prev, x, h, _of_step(coefficients_k, i, x))
        return (x_prev, x), (auxes, kept if keep_states else None)

    return jax.lax.scan(body, operands.states, (operands.params, operands.coefficients))


def _reversible_fwd(blocks, operands: _Operands):
    states, (aux, _) = _forward(blocks, operands)
    return (states, aux), operands._replace(states=states)


def _reversible_bwd(blocks, last: _Operands, cotangents):
    ct_states, ct_aux = cotangents
    ct, _ = _reverse(blocks, last, ct_states, [aux.diff for aux in ct_aux])
    return (ct,)


def _reverse(blocks, last: _Operands, ct_states, ct_aux, kept=None):
    """Rebuilds every state from the last two, and accumulates cotangents on the way.

    With u the cotangent of x_{k+1}: x_{k-1} gets a_k u; x_k gets b_k u + J_h^T c_k u;
    params_k and consts get their vjp under c_k u. `kept` are the forward's states x_k; with
    them the largest error of each block comes back [K].
    """
    params, states, coefficients, consts = last
    # a_0 may be 0, and x_{-1} is not needed
    divisors = coefficients._replace(a=coefficients.a.at[0, 0].set(1.0))

    def body(carry, block_inputs):
        x, x_next, u_here, u, ct_consts = carry
        params_k, coefficients_k, divisors_k, ct_aux_k, kept_k = block_inputs
        ct_params_k, errors = jax.tree.map(jnp.zeros_like, params_k.diff), []
        for i in reversed(range(len(blocks))):
            at = _of_step(coefficients_k, i, x)
            undo = functools.partial(_inverse_step, x_next, x, at=_of_step(divisors_k, i, x))
            x_prev, ct = value_and_vjp(
                (Branch(blocks[i], 1),),
                params=params_k,
                x=x,
                consts=consts,
                scale=at.c,
                ct=u,
                ct_aux=(ct_aux_k[i],),
                use=undo,
            )
            if kept_k is not None:
                errors.append(jnp.max(jnp.abs(x - kept_k[i])))
            x, x_next = x_prev, x
            u_here, u = at.a * u, u_here + at.b * u + ct.x
            ct_params_k = jax.tree.map(jnp.add, ct_params_k, ct.params)
            ct_consts = jax.tree.map(jnp.add, ct_consts, ct.consts)
        largest = jnp.max(jnp.stack(errors)) if errors else None
        return (x, x_next, u_here, u, ct_consts), (ct_params_k, largest)

    init = (*states, *ct_states, jax.tree.map(jnp.zeros_like, consts.diff))
    (*_, ct_x_prev, ct_x, ct_consts), (ct_params, errors) = jax.lax.scan(
        body, init, (params, coefficients, divisors, ct_aux, kept), reverse=True
    )
    ct = _Operands(Leaves(ct_params, None), (ct_x_prev, ct_x), None, Leaves(ct_consts, None))
    return ct, errors


_reversible.defvjp(_reversible_fwd, _reversible_bwd)
