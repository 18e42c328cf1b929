"""What the stacks of both Flax APIs share: how a block is evaluated, gamma, guard bits, dtype."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax._checks import check_count, check_magnitude, is_zero
from bdia_jax.audit import Audit
from bdia_jax.fixed_point import FixedPoint
from bdia_jax.recurrence import sample_gamma

# --- a block by its branches, in chunks ---------------------------------------------------


class Evaluation(NamedTuple):
    """How `bdia_scan` is to evaluate the block of a stack.

    branches: the methods whose sum is h; empty for the block as a whole.
    chunks: the arguments batch_chunks, token_chunks and per_sample.
    """

    branches: tuple[str, ...]
    chunks: dict[str, Any]


WHOLE = Evaluation((), {})


def choose_evaluation(
    stack: Any, block: Any, shape: Sequence[int], *, has_state: bool, deterministic: bool
) -> Evaluation:
    """What a stack's by_branch, batch_chunks and token_chunks ask of its block for x of `shape`.

    At inference as many chunks as divide it.

    Args:
        block: says what it consists of by `branches` and `per_token`, names of its methods, and
            by `per_sample` which of its arguments are cut with the batch.
        has_state: whether it has variables that are neither parameters nor random state.

    Raises:
        ValueError: a block that does not say it.
    """
    batch_chunks, token_chunks = stack.batch_chunks, stack.token_chunks
    check_count("batch_chunks", batch_chunks)
    check_count("token_chunks", token_chunks)
    if token_chunks == 1 and batch_chunks == 1 and not stack.by_branch:
        return WHOLE
    if has_state and deterministic:
        return WHOLE
    names = branch_names(block) if stack.by_branch or token_chunks > 1 else ()
    per_token = getattr(block, "per_token", ())
    if wrong := [name for name in per_token if names and name not in names]:
        raise ValueError(
            f"{type(block).__name__}.per_token names {wrong[0]!r}, which is none of its branches "
            f"{names}"
        )
    if token_chunks > 1 and not per_token:
        raise ValueError(
            f"token_chunks is {token_chunks}, but {type(block).__name__} names no branch that "
            'treats tokens alike; give it the class attribute per_token = ("g",), or take '
            "token_chunks=1"
        )
    if deterministic:
        batch_chunks = math.gcd(batch_chunks, shape[0])
        token_chunks = math.gcd(token_chunks, shape[1]) if len(shape) > 2 else 1
    counts = tuple(token_chunks if name in per_token else 1 for name in names)
    chunks = {"batch_chunks": batch_chunks, "token_chunks": counts or 1}
    return Evaluation(names, chunks | {"per_sample": getattr(block, "per_sample", None)})


def refuse_state(names: Iterable[str]) -> NoReturn:
    """Raises ValueError: a block that is evaluated in parts changed these variables."""
    raise ValueError(
        f"the block changes its state ({', '.join(names)}), which its chunks and branches would "
        "each do; take by_branch=False, batch_chunks=1 and token_chunks=1"
    )


def branch_names(block: Any) -> tuple[str, ...]:
    """The block's `branches`: methods (x, *consts) -> r whose sum is h."""
    names = getattr(block, "branches", ())
    if not names:
        raise ValueError(
            f"{type(block).__name__} does not say what its branches are; give it the class "
            'attribute branches = ("f", "g") for h = f(x) + g(x + f(x)), naming methods '
            "(x, *consts) -> r"
        )
    if isinstance(names, str) or not all(hasattr(block, name) for name in names):
        raise ValueError(
            f"{type(block).__name__}.branches is {names!r}, expected a tuple of the names of its "
            'methods, as in ("f", "g")'
        )
    return tuple(names)


def sum_of_branches(block: Any, x: jax.Array, *consts: Any, **options: Any) -> jax.Array:
    """h = r_1 + .. + r_m of a block whose `branches` name methods r_i = f_i(y_i, *consts).

    y_1 = x and y_{i+1} = y_i + r_i: for branches ("f", "g") this is h = f(x) + g(x + f(x)).
    """
    y, h = x, None
    for name in branch_names(block):
        r = getattr(block, name)(y, *consts, **options)
        y, h = y + r, r if h is None else h + r
    return h  # pyright: ignore[reportReturnType]


def check_branches_agree(
    name: str,
    whole: Callable[..., jax.Array],
    branches: Sequence[Callable[..., jax.Array]],
    params: Any,
    x: jax.Array,
    consts: tuple[Any, ...],
) -> None:
    """Raises ValueError if a block is not the sum of its branches, on these values.

    Args:
        name: of the block's class.
        whole, branches: (params_k, x, *consts) -> h, or a branch of it, without randomness.
        params: stacked [K, ...]. x: float32 [B, ..., D].
    """

    @jax.jit
    def compare(params, x, consts):
        def one_block(params_k):
            h, y = whole(params_k, x, *consts), x
            for branch in branches:
                y = y + branch(params_k, y, *consts)
            difference = h - (y - x)
            return jnp.linalg.norm(difference), jnp.linalg.norm(h), jnp.max(jnp.abs(difference))

        return jax.lax.map(one_block, params)

    difference, size, largest = map(np.asarray, compare(params, x, consts))
    wrong = difference > 0.01 * size  # far more than rounding, in bfloat16 too
    if wrong.any():
        k = int(wrong.argmax())
        raise ValueError(
            f"{name} contradicts itself: its call and the sum of its branches differ by up to "
            f"{largest[k]:.3g} in block {k}, so by_branch and token_chunks train another network; "
            "make it a BranchedBlock, whose call follows from its branches, or correct `branches`"
        )


# --- gamma, and the bits that make the rebuild exact --------------------------------------


class Draw(NamedTuple):
    """gamma [K, B] or [K, 1] or None, and the backprop that takes it."""

    gamma: jax.Array | None
    backprop: str


def draw_gamma(
    stack: Any, batch_size: int, key: Callable[[], jax.Array], *, deterministic: bool
) -> Draw:
    """[K, B] drawn in training; [K, 1] of `inference_gamma`, or None for zero, at inference.

    Raises:
        ValueError: a magnitude or inference_gamma that does not fit.
    """
    check_magnitude(stack.magnitude, stack.fixed_point, stack.backprop)
    inference_gamma = check_inference_gamma(stack.inference_gamma)
    if not deterministic:
        gamma = None
        if not is_zero(stack.magnitude):
            gamma = sample_gamma(key(), stack.depth, batch_size, stack.magnitude)
        return Draw(gamma, stack.backprop)
    if inference_gamma == 0:
        return Draw(None, stack.backprop)
    gamma = jnp.full((stack.depth, 1), inference_gamma, jnp.float32).at[0].set(0.0)
    # the same forward bits, for gamma of any magnitude
    return Draw(gamma, "store" if stack.backprop == "reversible" else stack.backprop)


def check_inference_gamma(gamma: float) -> float:
    """gamma, if it is a number from -0.5 to 0.5."""
    if not -0.5 <= gamma <= 0.5:
        raise ValueError(f"inference_gamma is {gamma}, expected a number from -0.5 to 0.5")
    return float(gamma)


def check_trains(stack: Any, *, deterministic: bool) -> None:
    """Raises ValueError if there is nothing for an audit to rebuild."""
    if deterministic or stack.fixed_point is None:
        raise ValueError(
            f"deterministic is {deterministic} and fixed_point {stack.fixed_point}, so nothing is "
            "rebuilt; call train() (in Linen deterministic=False) and set a FixedPoint"
        )


def verification(stack: Any, backprop: str, failures: jax.Array | None) -> dict[str, Any]:
    """The arguments of `bdia_scan` about it; the tokens of each device are verified apart."""
    parts = 1 if stack.mesh is None else stack.mesh.shape["sequence"]
    verify = parts if stack.verify else 0
    return {"verify": verify, "failures": failures if verify and backprop == "reversible" else None}


def choose_guard_bits(
    audit_with: Callable[[FixedPoint], Audit], fixed_point: FixedPoint, at_least: int, draws: int
) -> Audit:
    """An exact audit, with the most guard bits that `draws` of `audit_with(fixed_point)` ask for.

    Raises:
        ValueError: no number of guard bits is enough, or states are not finite.
    """
    check_count("draws", draws)
    audits = [audit_with(fixed_point) for _ in range(draws)]
    # None is most of all
    found = max(audits, key=lambda each: (each.suggested_guard_bits is None, each.max_drift))
    suggested = [each.suggested_guard_bits for each in audits]
    if found.invalid:
        bits = fixed_point.frac_bits
        raise ValueError(
            f"{found.invalid} elements of the states are NaN or beyond int32, so no guard bits "
            f"can be chosen; check x and the parameters, or lower frac_bits={bits}, which has room "
            f"up to {fixed_point.limit:.3g}"
        )
    if found.suggested_guard_bits is not None:
        chosen = max(at_least, *(each for each in suggested if each is not None))
        if chosen != fixed_point.guard_bits:
            found = audit_with(dataclasses.replace(fixed_point, guard_bits=chosen))
    if found.suggested_guard_bits is None or not found.exact:
        raise ValueError(
            f"no number of guard bits is enough for a drift of {found.max_drift:.3g} quanta; "
            "let the block return h in float32, lower frac_bits, or take backprop='remat'"
        )
    return found


# --- what a block computes in --------------------------------------------------------------


def check_dtype(dtype: Any) -> Any:
    """dtype as a jnp.dtype, or None.

    Raises:
        ValueError: it is no float type.
    """
    if dtype is None:
        return None
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise ValueError(
            f"dtype is {dtype!r}, expected a float type such as jnp.bfloat16, or None to leave it "
            "to the block"
        )
    return known


def cast_floats(tree: Any, dtype: Any) -> Any:
    """The pytree with its float arrays in dtype; None leaves all as they are.

    Integers, booleans and PRNG keys are never cast. Gradients come back in the dtype the arrays
    had, for the derivative of a cast is a cast.
    """
    if dtype is None:
        return tree

    def cast(leaf):
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, dtype) if is_float else leaf

    return jax.tree.map(cast, tree)
