"""Models with parameters from NumPy: their own initialization takes seconds to compile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def filled(make: Callable[[], nnx.Module], seed: int = 0, scale: float = 0.3):
    """make(), every parameter N(0, scale^2), biases too; LayerNorm scales around 1."""
    graphdef, params, keys, rest = nnx.split(nnx.eval_shape(make), nnx.Param, nnx.RngKey, ...)
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = float(any(getattr(part, "key", None) == "scale" for part in path))
        return jnp.asarray(generator.normal(mean, scale, leaf.shape), leaf.dtype)

    def draw_key(leaf):
        data = generator.integers(2**32, size=(*leaf.shape, 2), dtype=np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(data))

    params = jax.tree_util.tree_map_with_path(draw, params)
    keys = jax.tree.map(draw_key, keys)
    counts = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return nnx.merge(graphdef, params, keys, counts)


def without_key_bias(grads: nnx.State) -> dict:
    """All gradients but that of the keys' bias, which is rounding alone.

    The bias adds the same to all logits of a query, and the softmax does not see it.
    """
    kept = nnx.to_pure_dict(grads)
    attention = kept["stack"]["blocks"]["attention"]
    of_keys, of_queries = attention["key"].pop("bias"), attention["query"]["bias"]
    assert np.linalg.norm(of_keys) < 1e-4 * np.linalg.norm(of_queries)
    return kept
