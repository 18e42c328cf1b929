"""The stack every benchmark measures: K pre-norm transformer blocks and nothing around them."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.nnx import BDIAStack

_PLAIN = {"magnitude": 0.0, "fixed_point": None}

# What is compared: how the stack is trained, as arguments of BDIAStack.
PLAIN = {**_PLAIN, "backprop": "store"}
PLAIN_REMAT = {**_PLAIN, "backprop": "remat"}
BDIA_REMAT = {"fixed_point": FixedPoint(), "backprop": "remat"}
BDIA_GUARD_0 = {"fixed_point": FixedPoint(guard_bits=0)}
BDIA_GUARD_1 = {"fixed_point": FixedPoint(guard_bits=1)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the input [B, T, D] and of a block; dtype is that of its matrix products."""

    batch: int = 16
    tokens: int = 128
    width: int = 256
    num_heads: int = 4
    mlp_dim: int = 1024
    dropout_rate: float = 0.0
    dtype: str = "float32"


TOY = Shape(batch=2, tokens=64, width=64, num_heads=2, mlp_dim=128)
GPU = Shape(batch=32, tokens=512, width=1024, num_heads=16, mlp_dim=4096, dtype="bfloat16")


def make_block(shape: Shape, rngs: nnx.Rngs) -> PreNormBlock:
    """One block of the given sizes."""
    return PreNormBlock(
        shape.width,
        shape.num_heads,
        shape.mlp_dim,
        dropout_rate=shape.dropout_rate,
        dtype=jnp.dtype(shape.dtype),
        rngs=rngs,
    )


def make_stack(shape: Shape, depth: int, variant: dict[str, Any]) -> BDIAStack:
    """K blocks in training mode."""
    return BDIAStack(partial(make_block, shape), depth, rngs=nnx.Rngs(0), **variant)


def gradient_fn(graphdef):
    """(params, rest, x, key) -> (loss, (gradients of params, gradient of x)), loss = mean(x_K^2).

    x has a gradient too, because an embedding stands before the stack in training.
    """

    def loss_fn(params, x, rest, key):
        stack = nnx.merge(graphdef, params, rest)
        return jnp.mean(stack(x, rngs=nnx.Rngs(key)) ** 2)

    gradient = jax.value_and_grad(loss_fn, argnums=(0, 1))
    return lambda params, rest, x, key: gradient(params, x, rest, key)


def lower_gradient(shape: Shape, depth: int, variant: dict[str, Any]) -> jax.stages.Lowered:
    """The gradient of one training step, lowered from shapes alone: no array is made."""
    abstract = nnx.eval_shape(lambda: make_stack(shape, depth, variant))
    graphdef, params, rest = nnx.split(abstract, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.width), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(gradient_fn(graphdef)).lower(params, rest, x, key)
