"""What bdia_scan refuses, each with the value and the remedy."""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bdia_jax.fixed_point import FixedPoint

_BACKPROPS = ("reversible", "store", "remat")


def check_choices(fixed_point, backprop) -> None:
    if backprop not in _BACKPROPS:
        raise ValueError(f"backprop is {backprop!r}, expected one of {', '.join(_BACKPROPS)}")
    if fixed_point is not None and not isinstance(fixed_point, FixedPoint):
        raise ValueError(
            f"fixed_point is {fixed_point!r}, expected a FixedPoint, for example "
            "FixedPoint(frac_bits=9, guard_bits=1), or None"
        )
    if backprop == "reversible" and fixed_point is None:
        raise ValueError(
            "backprop='reversible' with fixed_point=None: floating-point states cannot be "
            "rebuilt exactly; pass a FixedPoint, or backprop='store' or 'remat'"
        )


def as_arrays(tree, name):
    """Every leaf as an array; anything else is named."""

    def convert(path, leaf):
        try:
            return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        except TypeError:
            where = name + jax.tree_util.keystr(path)
            raise ValueError(
                f"{where} is {leaf!r} of type {type(leaf).__name__}, which is not an array; "
                "bind static values to block_fn with functools.partial"
            ) from None

    return jax.tree_util.tree_map_with_path(convert, tree)


def check_x0(x0) -> jax.Array:
    x0 = jnp.asarray(x0)
    if x0.ndim < 1 or x0.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"x0 is {x0.dtype} of shape {x0.shape}, expected float32 or bfloat16 [B, ..., D]; "
            "cast it with x0.astype(jnp.float32)"
        )
    return x0


def check_stacked(params, gamma) -> None:
    """Raises ValueError if params is a list or dict with an entry for each block, by all signs."""
    if not isinstance(params, list | tuple | dict) or gamma is None:
        return
    depth = jnp.shape(gamma)[:1]
    layers, given = params, "*params"
    if isinstance(params, dict):
        layers, given = params.values(), "*params.values()"
        if any(jax.tree_util.treedef_is_leaf(jax.tree.structure(each)) for each in layers):
            return  # parameters by their names
    alike = len({jax.tree.structure(each) for each in layers}) == 1
    if (
        alike
        and depth == (len(params),)
        and any(jnp.shape(leaf)[:1] != depth for leaf in jax.tree.leaves(params))
    ):
        raise ValueError(
            f"params is a {type(params).__name__} of {len(params)}, as if one for each block; "
            f"stack them: params = jax.tree.map(lambda *leaves: jnp.stack(leaves), {given})"
        )


def check_depth(params) -> int:
    """K, the leading axis common to all leaves of params."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params has no array, so the number of blocks is unknown")
    shapes = {f"params{jax.tree_util.keystr(path)}": jnp.shape(leaf) for path, leaf in leaves}
    first_name, first = next(iter(shapes.items()))
    if all(shape[:1] == (0,) for shape in shapes.values()):
        raise ValueError(f"params has K = 0 blocks ({first_name} has shape {first}); one is needed")
    for name, shape in shapes.items():
        if not shape or not first or shape[0] != first[0] or shape[0] < 1:
            raise ValueError(
                f"params need a common leading axis K (one slice a block), but {first_name} "
                f"has shape {first} and {name} has shape {shape}; stack the blocks, for "
                "example with jax.vmap of the init function over K keys"
            )
    return first[0]


def check_gamma(gamma, depth: int, batch: int, reversible_format: FixedPoint | None):
    """gamma as float32 [K, B or 1], or None.

    Values are checked now if they are known. Else NaN takes the place of all of them where one is
    bad: then neither x_K nor a gradient is a number.
    """
    if gamma is None:
        return None
    given = gamma if isinstance(gamma, Tracer) else np.asarray(gamma)
    if given.ndim != 2 or given.shape[0] != depth or given.shape[1] not in (1, batch):
        raise ValueError(
            f"gamma has shape {given.shape}, expected [K, B] = [{depth}, {batch}] (or "
            f"[{depth}, 1]) with row 0 zero; use sample_gamma(key, {depth}, {batch})"
        )
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(f"gamma has dtype {given.dtype}, expected float32; use sample_gamma")
    numpy: Any = jnp if isinstance(given, Tracer) else np
    first_ok = given[0] == 0
    rest_ok = numpy.isfinite(given[1:])
    if reversible_format is not None:
        rest_ok = reversible_format.reverses(given[1:])
    gamma = jax.lax.stop_gradient(jnp.asarray(gamma).astype(jnp.float32))
    if isinstance(given, Tracer):
        return jnp.where(jnp.all(first_ok) & jnp.all(rest_ok), gamma, jnp.nan)
    if not first_ok.all():
        raise ValueError(
            f"gamma[0] contains {given[0][~first_ok][0]}, expected 0: the first block "
            "has no x_(-1) (eq. 6); use sample_gamma"
        )
    if not rest_ok.all():
        bad = given[1:][~rest_ok][0]
        if reversible_format is None:
            raise ValueError(f"gamma contains {bad}, expected finite numbers; use sample_gamma")
        raise ValueError(
            f"gamma contains {bad}, but backprop='reversible' with "
            f"{_needed(reversible_format, '+-')} in every row after the first; use "
            f"sample_gamma(..., magnitude={2.0**-reversible_format.gamma_bits}), "
            "FixedPoint(gamma_bits=p) for magnitude 2^-p, or backprop='store' or "
            "'remat' for any other"
        )
    return gamma


def check_verify(verify, failures, depth: int, x0, backprop: str) -> int:
    """In how many parts of a sample a rebuilt state is verified; 0 if it is not."""
    parts = int(verify) if isinstance(verify, (bool, int)) else -1
    if parts < 0 or (parts > 1 and (x0.ndim < 3 or x0.shape[1] % parts)):
        raise ValueError(
            f"verify is {verify!r} for x of shape {x0.shape}, expected True or False, or a number "
            "of equal parts of axis 1 of x [B, T, ..., D], to verify each"
        )
    if failures is None:
        return parts
    if not parts or backprop != "reversible":
        raise ValueError(
            f"failures with verify={verify!r} and backprop={backprop!r}: nothing is verified, so "
            "nothing counted; leave it out, or take verify=True and backprop='reversible'"
        )
    is_float = jnp.issubdtype(jnp.result_type(failures), jnp.floating)
    if jnp.shape(failures) != (depth,) or not is_float:
        raise ValueError(
            f"failures is {jnp.result_type(failures)} of shape {jnp.shape(failures)}, expected "
            f"jnp.zeros({depth}), one for each block"
        )
    return parts


def check_magnitude(magnitude: Any, fixed_point, backprop: str) -> None:
    """For stacks, which know |gamma| before tracing. 0 stands for gamma None."""
    check_choices(fixed_point, backprop)
    if backprop != "reversible" or isinstance(magnitude, Tracer) or is_zero(magnitude):
        return
    values = np.asarray(magnitude, np.float32)
    if fixed_point.reverses(values[1:] if values.ndim else values).all():
        return
    raise ValueError(
        f"magnitude is {magnitude}, but backprop='reversible' with "
        f"{_needed(fixed_point)}; use FixedPoint(gamma_bits=p) for magnitude 2^-p, "
        "or backprop='store' or 'remat' for any other"
    )


def is_zero(magnitude: Any) -> bool:
    """Whether a stack's magnitude is the number 0: no gamma is drawn."""
    return isinstance(magnitude, (int, float)) and magnitude == 0


def _needed(fixed_point: FixedPoint, sign: str = "") -> str:
    p = fixed_point.gamma_bits
    greater = f" (or {sign}{2.0 ** (1 - p)}, .. {sign}0.5)" if p > 1 else ""
    return f"gamma_bits={p} needs {sign}{2.0**-p}{greater}"


def check_chunks(functions: int, x0, batch_chunks, token_chunks) -> tuple[int, ...]:
    """token_chunks, a number for each function."""
    counts = token_chunks
    if not isinstance(token_chunks, tuple):
        counts = (token_chunks,) * functions
    if len(counts) != functions:
        raise ValueError(
            f"token_chunks is {token_chunks}, expected an int or one for each of {functions} "
            "function(s) of the block"
        )
    if not functions:
        raise ValueError("block_fn is empty, expected a function or a tuple of its branches")
    check_count("batch_chunks", batch_chunks)
    for count in counts:
        check_count("token_chunks", count)
    if batch_chunks > 1 and (x0.shape[0] == 0 or x0.shape[0] % batch_chunks):
        raise ValueError(
            f"batch_chunks={batch_chunks} does not divide the batch of x of shape {x0.shape}; "
            f"take a divisor of {x0.shape[0]}"
        )
    for count in counts:
        if count > 1 and (x0.ndim < 3 or x0.shape[1] % count):
            raise ValueError(
                f"token_chunks={count} needs x of shape [B, T, ..., D] with T divisible by it, "
                f"but x has shape {x0.shape}; take a divisor of T, or 1"
            )
    return counts


def check_count(name: str, count) -> int:
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name} is {count!r}, expected a positive int")
    return int(count)


def check_per_sample(per_sample, consts, batch: int) -> tuple[list[bool], str]:
    """(for each leaf of consts whether it is cut with the batch, the name of one that is unknown).

    A leaf of leading axis 1 serves every sample, cut or not; so does, unasked, one of another
    leading axis than the batch. The name is "" if all are known.
    """
    named = jax.tree_util.tree_leaves_with_path(consts)
    names = [f"consts{jax.tree_util.keystr(path)}" for path, _ in named]
    leaves = [leaf for _, leaf in named]
    fits = [leaf.ndim > 0 and leaf.shape[0] == batch for leaf in leaves]
    if per_sample is None:
        unknown = [name for name, fit in zip(names, fits, strict=True) if fit and batch > 1]
        return [False] * len(leaves), unknown[0] if unknown else ""
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(per_sample, consts))
        wrong = [flag for flag in flags if not isinstance(flag, bool)]
    except ValueError:
        flags, wrong = [], [per_sample]
    if wrong:
        raise ValueError(
            f"per_sample is {per_sample!r}, expected a bool for all of consts, or a tuple with one "
            "for each (or a pytree of them that is a prefix of consts)"
        )
    for name, leaf, flag, fit in zip(names, leaves, flags, fits, strict=True):
        if flag and not fit and leaf.shape[:1] != (1,):
            raise ValueError(
                f"{name} has shape {leaf.shape}, but per_sample says that each of {batch} samples "
                "has its own; give it a leading axis of the batch's size or of 1, or say False"
            )
    return [flag and fit for flag, fit in zip(flags, fits, strict=True)], ""
