"""audit_remat: does the backward pass, under `jax.checkpoint`, recompute the forward's bits?"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr
from jax.extend.source_info_util import register_exclusion

from bdia_jax._jaxprs import equations, run
from bdia_jax._recompute import Place, gradient, look, marking, pairs, without_checkpoint

register_exclusion(__file__)  # the line that JAX tells of an equation is the user's


class Recomputed(NamedTuple):
    """An array that the backward pass recomputes.

    primitive: that makes it, such as "exp"; type: such as "bfloat16[8, 64]", in a loop that of one
    iteration; source: file, line and function (of a jitted function, as many of jnp are, where it
    was traced first); mismatches: elements whose bits differ from the forward's, of `elements`;
    max_error: the largest |recomputed - forward|.
    """

    primitive: str
    type: str
    source: str
    elements: int
    mismatches: int
    max_error: float


@dataclasses.dataclass(frozen=True)
class RematAudit:
    """What `audit_remat` found.

    Attributes:
        recomputed: what the backward pass recomputes, in the order of the function; in a loop,
            by the first iteration that differs. Of a loop's values all iterations are counted.
        gradient_elements: elements of the gradients of all arguments.
        gradient_mismatches: those whose bits differ from the gradients without `jax.checkpoint`,
            both compiled without anything else being looked at.
        gradient_max_error: the largest |with - without| of the gradients.
        disturbed: gradient elements that differ if the recomputed arrays are looked at. If any
            do, the compiler made another program of it, and `recomputed` is of that one: a
            difference there, with no gradient mismatch, may not be in training.
    """

    recomputed: tuple[Recomputed, ...]
    gradient_elements: int
    gradient_mismatches: int
    gradient_max_error: float
    disturbed: int

    @property
    def exact(self) -> bool:
        """Whether no recomputed bit differs, and no bit of the gradients."""
        return not (self.differing or self.gradient_mismatches)

    @property
    def differing(self) -> tuple[Recomputed, ...]:
        """Those of `recomputed` with a mismatch; the first is where to look."""
        return tuple(each for each in self.recomputed if each.mismatches)

    def __str__(self) -> str:
        total = sum(each.elements for each in self.recomputed)
        wrong = sum(each.mismatches for each in self.differing)
        first = ""
        if self.differing:
            primitive, kind, source, elements, mismatches, error = self.differing[0]
            first = (
                f", first {primitive} of {kind} at {source}, "
                f"in {mismatches} of {elements} by up to {error:.3g}"
            )
        elif self.gradient_mismatches:
            first = " where they are looked at"
        seen = (
            f"{wrong} of {total} recomputed elements "
            f"differ in {len(self.differing)} of {len(self.recomputed)} arrays{first}"
            if self.recomputed
            else "no recomputed value can be looked at"
        )
        return (
            f"{'exact' if self.exact else 'NOT EXACT'}: {seen}; "
            f"{self.gradient_mismatches} of {self.gradient_elements} gradient elements differ from "
            f"those without jax.checkpoint by up to {self.gradient_max_error:.3g}; "
            f"{self.disturbed} differ by being looked at"
        )


def audit_remat(fn: Callable[..., Any], *args: Any) -> RematAudit:
    """Compares what the backward pass of fn recomputes with what the forward pass computed.

    Three programs are compiled, for these shapes and this device. The first is fn's value and
    gradient as training has them; the second has the `jax.checkpoint` taken out. Nothing else is
    looked at, so gradients that differ prove that training differs, but not where. Equal ones do
    not prove that all was recomputed right: what is wrong may not have mattered here.
    The third is the first one, and also returns every recomputed value and the forward's. It says
    which differ and which is first, but a value that is returned is rounded, and may be fused
    otherwise: `disturbed` says whether it is still the program of training. `exact` asks that
    nothing differs in either comparison.

    Gradients may differ with every recomputed value right, in float32 too: XLA fuses the backward
    pass itself otherwise. Then nothing is in `differing`, and the difference is of rounding. What
    makes bfloat16 and float16 recompute the same bits is `pin_rounding`.

    Args:
        fn: a loss or a layer: arrays to arrays, with `jax.checkpoint` (`jax.remat`, `nnx.remat`) on
            parts of it. A function without any is audited as `jax.checkpoint(fn)`.
        *args: pytrees of arrays. Gradients are those of all float leaves, for a cotangent of one
            if fn returns one number, else of fixed numbers about one. Bind what is static with
            `functools.partial`. All recomputed values are kept twice: take a batch for which they
            fit. Results of `while` loops, kernels and functions with a derivative rule of their own
            are seen, what is inside is not.

    Returns:
        A `RematAudit`; print it, or test `audit_remat(...).exact`.

    Raises:
        ValueError: an argument that is no array, nothing to differentiate, or a call under jit.

    Example:
        >>> import bdia_jax as bdia
        >>> x = jnp.linspace(0, 1, 64, dtype=jnp.bfloat16)
        >>> loss = lambda x: jax.checkpoint(lambda y: jnp.sin(y.astype(jnp.float32)))(x + 1).sum()
        >>> audit = audit_remat(loss, x)
        >>> audit.exact, audit.differing[0].primitive
        (False, 'convert_element_type')
        >>> audit_remat(bdia.pin_rounding(loss), x).exact
        True
    """
    leaves, treedef = jax.tree.flatten(_checked(args))

    def flat_fn(*leaves):
        results = [jnp.asarray(each) for each in jax.tree.leaves(fn(*treedef.unflatten(leaves)))]
        return [each for each in results if jnp.issubdtype(each.dtype, jnp.inexact)]

    closed = jax.make_jaxpr(flat_fn)(*leaves)
    if not _has_checkpoint(closed):
        flat_fn = jax.checkpoint(flat_fn)
        closed = jax.make_jaxpr(flat_fn)(*leaves)
    _check_traced(closed)
    inputs = leaves, [_cotangent(aval) for aval in closed.out_avals]
    places: list[Place] = []

    def looked_at(*inputs):
        program = gradient(lambda *leaves: run(marking(places), closed, *leaves))
        results, seen = look(jax.make_jaxpr(program)(*inputs), False, *jax.tree.leaves(inputs))
        return (results[: len(closed.out_avals)], results[len(closed.out_avals) :]), pairs(seen)

    without = gradient(lambda *leaves: run(without_checkpoint, closed, *leaves))
    programs = gradient(flat_fn), without, looked_at
    found = [jax.device_get(jax.jit(program)(*inputs)) for program in programs]
    (_, gradients), (_, plain), ((_, disturbed), values) = found
    recomputed = []
    for at, pair in ((at, pair) for at, several in values.items() for pair in several):
        wrong, error = _compare(*pair)
        primitive, kind, source, loops = places[at]
        numbers = wrong.size, int(wrong.sum()), error
        recomputed.append((_when(at, loops, wrong), Recomputed(primitive, kind, source, *numbers)))
    wrong, errors = zip(*map(_compare, plain, gradients), strict=True)
    return RematAudit(
        recomputed=tuple(each for _, each in sorted(recomputed)),
        gradient_elements=sum(each.size for each in wrong),
        gradient_mismatches=sum(int(each.sum()) for each in wrong),
        gradient_max_error=max(errors),
        disturbed=sum(
            int(_compare(*pair)[0].sum()) for pair in zip(gradients, disturbed, strict=True)
        ),
    )


# --- what is refused -----------------------------------------------------------------


def _checked(args):
    """args, if they are arrays, one of them of floats, and have values."""
    with_paths = jax.tree_util.tree_leaves_with_path(args)
    for path, leaf in with_paths:
        where = "args" + jax.tree_util.keystr(path)
        if isinstance(leaf, Tracer):
            raise ValueError(
                f"{where} is traced, {leaf.aval}: audit_remat returns numbers and compiles for "
                "itself; call it outside jit, grad and vmap"
            )
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise ValueError(
                f"{where} is {leaf!r} of type {type(leaf).__name__}, which is not an array; "
                "make it one with jnp.asarray, or bind it with functools.partial(fn, name=value)"
            )
    if not any(jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in with_paths):
        kinds = ", ".join(str(leaf.dtype) for _, leaf in with_paths) or "nothing"
        raise ValueError(f"args are {kinds}: no gradient to compare; pass float arrays")
    return args


def _check_traced(closed: ClosedJaxpr) -> None:
    if not _has_checkpoint(closed):
        raise ValueError(
            "jax.checkpoint made no remat2 equation: jax_remat3 is on, whose recomputation cannot "
            "be looked at; jax.config.update('jax_remat3', False)"
        )
    if any(isinstance(const, Tracer) for const in closed.consts):
        raise ValueError(
            "fn closes over a traced value: audit_remat returns numbers and compiles for itself; "
            "call it outside jit, grad and vmap"
        )
    if not closed.out_avals:
        raise ValueError("fn returned no float array; return a loss, or the output of a layer")


def _has_checkpoint(closed: ClosedJaxpr) -> bool:
    return any(eqn.primitive.name == "remat2" for eqn in equations(closed.jaxpr))


def _cotangent(aval) -> jax.Array:
    """Ones for a number, else numbers about one that do not cancel each other."""
    size = int(np.prod(aval.shape))
    values = 1 + 0.5 * np.cos(np.arange(size)) if size > 1 else np.ones(size)
    return jnp.asarray(values.reshape(aval.shape), aval.dtype)


def _when(at: int, loops, wrong: np.ndarray) -> list[tuple[int, int]]:
    """Sorts values by when they first differ, in a loop by the iteration."""
    backwards = tuple(axis for axis, (_, reverse) in enumerate(loops) if reverse)
    wrong = np.flip(wrong, backwards)
    first = np.unravel_index(wrong.argmax(), wrong.shape) if wrong.any() else [0] * wrong.ndim
    starts = [start for start, _ in loops]
    return [*zip(starts, map(int, first), strict=False), (at, 0)]


def _compare(forward, again) -> tuple[np.ndarray, float]:
    """(bool, which elements differ in any bit; the largest difference)."""
    forward, again = np.broadcast_arrays(forward, again)  # a loop may compute a constant once
    bits = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (forward, again)]
    wrong = (bits[0] != bits[1]).reshape(*forward.shape, forward.itemsize).any(axis=-1)
    wide = np.complex128 if np.iscomplexobj(forward) else np.float64
    error = np.abs(forward[wrong].astype(wide) - again[wrong].astype(wide))
    error[np.isnan(error)] = np.inf
    return wrong, float(error.max(initial=0.0))
