"""One user's block: leaves with a gradient apart from those without, checked, rounding pinned.

Nothing here runs a block: it is traced on abstract values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal

from bdia_jax._checks import check_chunks, check_per_sample
from bdia_jax._derivatives import HALF
from bdia_jax.rounding import has_half_precision, pin_rounding

PyTree = Any


class Leaves(NamedTuple):
    """A pytree's leaves: `diff` have a gradient, `data` (integers, booleans, keys) have none."""

    diff: Any
    data: Any


# (params_k, x, consts) -> (h in float32, aux)
LeafFn = Callable[[Leaves, jax.Array, Leaves], tuple[jax.Array, Leaves]]


class Branch(NamedTuple):
    """fn: the branch over leaves; token_chunks: chunks of the tokens it is evaluated in.

    epsilon: the spacing of the dtype of its value, at 1.
    """

    fn: LeafFn
    token_chunks: int
    epsilon: float = 0.0


class Block(NamedTuple):
    """How a block is evaluated: h is the sum of its branches, on chunks of the batch in turn.

    is_per_sample: a bool for each leaf of consts, whether it is cut with the batch.
    cast: for each leaf of params with a gradient, the half-precision type that all branches cast
        it to before anything else; None if they do not.
    """

    branches: tuple[Branch, ...]
    batch_chunks: int
    is_per_sample: Leaves
    cast: tuple[Any, ...]


def partition(tree: PyTree) -> tuple[Leaves, Callable[[Any, Any], PyTree]]:
    """(the leaves of a pytree, the function that puts such leaves back into it)."""
    leaves, treedef = jax.tree.flatten(tree)
    is_diff = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def merge(diff, data) -> PyTree:
        diff_leaves, data_leaves = iter(diff), iter(data)
        return treedef.unflatten([next(diff_leaves if d else data_leaves) for d in is_diff])

    return _select(leaves, is_diff), merge


def _select(leaves, is_diff) -> Leaves:
    pairs = [*zip(leaves, is_diff, strict=True)]
    return Leaves(tuple(x for x, d in pairs if d), tuple(x for x, d in pairs if not d))


def make_block(
    block_fn,
    params: PyTree,
    x0: jax.Array,
    consts: tuple[PyTree, ...],
    *,
    has_aux: bool,
    batch_chunks: int,
    token_chunks: int | tuple[int, ...],
    per_sample: PyTree,
    is_inference: bool,
) -> tuple[Block, Callable[[Any, Any], PyTree]]:
    """(the block, the function that merges the leaves of its aux). Checks every branch.

    Raises:
        ValueError: what `check_block` refuses; chunks that do not fit, or of a block with aux; a
            const of which it is not known whether each sample has its own. At inference the batch
            is then left whole, as nothing depends on it but memory.
    """
    fns = tuple(block_fn) if isinstance(block_fn, (tuple, list)) else (block_fn,)
    if wrong := [fn for fn in fns if not callable(fn)]:
        raise ValueError(
            f"block_fn is or has {wrong[0]!r} of type {type(wrong[0]).__name__}, expected a "
            "callable (params_k, x, *consts) -> h, or a tuple of them, its branches"
        )
    token_chunks = check_chunks(len(fns), x0, batch_chunks, token_chunks)
    batch = x0.shape[0]
    cut, unknown = check_per_sample(per_sample, consts, batch)
    if unknown and batch_chunks > 1:
        if not is_inference:
            raise ValueError(
                f"{unknown} has a leading axis of {batch}, as the batch, and batch_chunks="
                f"{batch_chunks} has to know whether each sample has its own: give per_sample, "
                "True for such an argument of the block and False for one that all samples share, "
                "as in per_sample=(True, False); a stack's block says it by a class attribute"
            )
        batch_chunks = 1
    chunk = batch // batch_chunks
    leaves, treedef = jax.tree.flatten(consts)
    abstract_consts = treedef.unflatten(
        [_with_leading(leaf, chunk) if c else leaf for leaf, c in zip(leaves, cut, strict=True)]
    )
    branches, merges, casts = [], [], []
    for fn, count in zip(fns, token_chunks, strict=True):
        tokens = () if count == 1 else (x0.shape[1] // count,)
        x = jax.ShapeDtypeStruct((chunk, *tokens, *x0.shape[1 + len(tokens) :]), jnp.float32)
        try:
            leaf_fn, aux_shape, dtype, uses = over_leaves(fn, params, x, abstract_consts, has_aux)
        except (TypeError, ValueError) as error:
            if batch_chunks * count > 1:
                error.add_note(
                    f"The block got x of shape {x.shape} (batch_chunks={batch_chunks}, token_chunks"
                    f"={count}). Of consts, those that per_sample names are cut like the batch; "
                    "nothing in them is cut like the tokens."
                )
            raise
        if batch_chunks * count > 1 and jax.tree.leaves(aux_shape):
            raise ValueError(
                f"block_fn returns aux {aux_shape} with batch_chunks={batch_chunks} and "
                f"token_chunks={count}: every chunk would have its own; set both to 1 for it"
            )
        branches.append(Branch(leaf_fn, count, float(jnp.finfo(dtype).eps)))
        merges.append(partition(aux_shape)[1])
        casts.append(uses)

    def merge_aux(diff, data):
        merged = tuple(merge(*aux) for merge, *aux in zip(merges, diff, data, strict=True))
        return merged[0] if callable(block_fn) else merged

    is_diff = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    cast = tuple(map(_common_cast, zip(*casts, strict=True)))
    return Block(tuple(branches), batch_chunks, _select(cut, is_diff), cast), merge_aux


def _common_cast(uses: tuple[set[Any], ...]) -> Any:
    """The one type of all uses of a parameter, in every branch."""
    found = set().union(*uses)
    return found.pop() if len(found) == 1 else None


def _uses(jaxpr: Jaxpr, params: PyTree) -> list[set[Any]]:
    """Of each leaf of params with a gradient: the half-precision types it is cast to.

    None stands for any other use.
    """
    found: dict[Any, set[Any]] = {var: set() for var in jaxpr.invars}
    for eqn in jaxpr.eqns:
        to = eqn.params["new_dtype"] if eqn.primitive.name == "convert_element_type" else None
        for var in eqn.invars:
            if not isinstance(var, Literal) and var in found:
                found[var].add(to if to in HALF else None)
    for var in jaxpr.outvars:
        if not isinstance(var, Literal) and var in found:
            found[var].add(None)
    leaves = jax.tree.leaves(params)
    of_params = zip(leaves, jaxpr.invars[: len(leaves)], strict=True)
    return [found[var] for leaf, var in of_params if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def over_leaves(fn, params, x, consts, has_aux) -> tuple[LeafFn, PyTree, Any, list[set[Any]]]:
    """(fn over `Leaves`, every half-precision rounding explicit; the shapes of its aux; h's dtype;
    what each leaf of params with a gradient is cast to, None for any other use of it).

    Args:
        fn: (params_k, x, *consts) -> h, or (h, aux) with `has_aux`.
        params, x, consts: of which only shapes are read; params are stacked [K, ...].

    Raises:
        ValueError: as `check_block`.
    """
    _, merge_params = partition(params)
    _, merge_consts = partition(consts)
    jaxpr, aux_shape, dtype = check_block(fn, params, x, consts, has_aux)
    if has_half_precision(jaxpr.jaxpr):
        fn = pin_rounding(fn)

    def leaf_fn(params_k: Leaves, x: jax.Array, consts: Leaves):
        out = fn(merge_params(*params_k), x, *merge_consts(*consts))
        h, aux = out if has_aux else (out, None)
        return h.astype(jnp.float32), partition(aux)[0]

    return leaf_fn, aux_shape, dtype, _uses(jaxpr.jaxpr, params)


def check_block(block_fn, params, x, consts, has_aux):
    """Traces block_fn once on abstract values: its jaxpr, the shapes of its aux, h's dtype."""
    params_k = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    x = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    jaxpr, out = jax.make_jaxpr(block_fn, return_shape=True)(params_k, x, *consts)
    traced = [const for const in jaxpr.consts if isinstance(const, Tracer)]
    if traced:
        raise ValueError(
            f"block_fn closes over {len(traced)} traced value(s), the first of "
            f"{traced[0].aval}: their gradient would be lost. Pass what differs per block in "
            "params and what all blocks share as an extra argument: "
            "bdia_scan(block_fn, params, x0, gamma, value)"
        )
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"has_aux=True, but block_fn returned {out}, expected (h, aux)")
    h, aux = out if has_aux else (out, None)
    if not isinstance(h, jax.ShapeDtypeStruct):
        raise ValueError(
            f"block_fn returned {type(h).__name__}, expected the array h; "
            "set has_aux=True if it returns (h, aux)"
        )
    if h.shape != x.shape or not jnp.issubdtype(h.dtype, jnp.floating):
        raise ValueError(
            f"block_fn returned h of shape {h.shape} and dtype {h.dtype} for x of shape "
            f"{x.shape}; h is added to x, so it must be a float array of that shape"
        )
    return jaxpr, aux, h.dtype


def _with_leading(leaf, size: int):
    return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
