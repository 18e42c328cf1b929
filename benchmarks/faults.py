"""Blocks that come out otherwise in the backward pass, on purpose."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import jax
from flax import nnx


class OffBlock(nnx.Module):
    """A block that is not quite deterministic, as if another kernel evaluated it the second time.

    Args:
        block: whose h it is; its branches f and g are as wrong, one by one (RevViT calls them).
        off: by how much h differs, up or down at random, where it is evaluated to be
            differentiated, so in the backward pass.
    """

    def __init__(self, block: nnx.Module, off: float):
        self.block: Any = block
        self.off = off

    def __call__(self, x: jax.Array, *consts: Any) -> jax.Array:
        return _off_in_backward(self.off, self.block(x, *consts))

    def f(self, x: jax.Array) -> jax.Array:
        return _off_in_backward(self.off, self.block.f(x))

    def g(self, x: jax.Array) -> jax.Array:
        return _off_in_backward(self.off, self.block.g(x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _off_in_backward(off: float, h: jax.Array) -> jax.Array:
    return h


def _off_fwd(off, h):
    return h + off * jax.random.rademacher(jax.random.key(7), h.shape, h.dtype), None


_off_in_backward.defvjp(_off_fwd, lambda off, _, ct: (ct,))


def unpinned() -> AbstractContextManager:
    """While programs are traced: bfloat16 without `bdia_jax.pin_rounding`.

    XLA then keeps float32 between two fused bfloat16 operations where it can, and not in the same
    places forward and backward.
    """
    return mock.patch("bdia_jax._block.pin_rounding", lambda fn: fn)
