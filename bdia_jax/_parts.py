"""What a stack's by_branch, batch_chunks and token_chunks ask of its blocks, in any Flax API.

A block is a sum of branches; each is evaluated in parts (chunks) of the batch or the tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bdia_jax._checks import check_count


class Parts(NamedTuple):
    """How `bdia_scan` is to evaluate a block.

    branches: the methods whose sum is h; empty for the block as a whole.
    chunks: the arguments batch_chunks and token_chunks.
    """

    branches: tuple[str, ...]
    chunks: dict[str, Any]


WHOLE = Parts((), {})


def choose_parts(
    block: Any,
    shape: Sequence[int],
    *,
    by_branch: bool,
    batch_chunks: int,
    token_chunks: int,
    state: list[str],
    deterministic: bool,
) -> Parts:
    """The parts for x of `shape`; at inference as many chunks as divide it.

    Args:
        block: says what it consists of by `branches` and `per_token`, names of its methods.
        state: names of its variables that are neither parameters nor random state.

    Raises:
        ValueError: a block that does not say it; in training, a block with state.
    """
    check_count("batch_chunks", batch_chunks)
    check_count("token_chunks", token_chunks)
    if token_chunks == 1 and batch_chunks == 1 and not by_branch:
        return WHOLE
    if state:
        if deterministic:
            return WHOLE
        raise ValueError(
            f"the block has state ({', '.join(state)}), which its parts would each update; take "
            "by_branch=False, batch_chunks=1 and token_chunks=1, or if it is a constant pass it to "
            "the stack's call, which hands it to the block"
        )
    names = branch_names(block) if by_branch or token_chunks > 1 else ()
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
    return Parts(names, {"batch_chunks": batch_chunks, "token_chunks": counts or 1})


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
