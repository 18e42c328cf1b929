"""A model that keeps keys and values, as the step of `sample` and of `beam_search`."""

from typing import Any

import jax
from flax import nnx

PyTree = Any


def at_inference(graphdef, state) -> Any:
    model = nnx.merge(graphdef, state)
    model.eval()
    return model


def cached_step(model, evaluate):
    """(step of `sample`, its first state): `evaluate` again and again, the cache carried along.

    Args:
        evaluate: (model, tokens [B, 1], i) -> logits [B, 1, V].
    """
    graphdef, cache, rest = nnx.split(model, nnx.Cache, ...)

    def step(cache, tokens, index):
        # a copy: variables from outside the loop must not be written inside it
        model = nnx.merge(graphdef, cache, rest, copy=True)
        logits = evaluate(model, tokens[:, None], index)
        return nnx.state(model, nnx.Cache), logits[:, 0]

    return step, cache


def beam_step(step, beam_size: int):
    """The step of `beam_search`: that of `sample`, with the rows in another order."""

    def step_rows(cache, rows, tokens, index):
        return step(of_rows(cache, rows) if beam_size > 1 else cache, tokens, index)

    return step_rows


def of_rows(cache: PyTree, rows: jax.Array) -> PyTree:
    """The cache of a batch of these rows: keys and values are [K, B, ...], their number [K]."""
    return jax.tree.map(lambda leaf: leaf[:, rows] if leaf.ndim > 1 else leaf, cache)
