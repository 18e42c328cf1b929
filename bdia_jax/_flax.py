"""What the stacks of both Flax APIs share: a block by its branches, and what it computes in."""

from typing import Any

import jax
import jax.numpy as jnp


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


def sum_of_branches(block: Any, x: jax.Array, *consts: Any) -> jax.Array:
    """h = r_1 + .. + r_m of a block whose `branches` name methods r_i = f_i(y_i, *consts).

    y_1 = x and y_{i+1} = y_i + r_i: for branches ("f", "g") this is h = f(x) + g(x + f(x)).
    """
    y, h = x, None
    for name in block.branches:
        r = getattr(block, name)(y, *consts)
        y, h = y + r, r if h is None else h + r
    return h
