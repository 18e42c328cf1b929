"""What every benchmark measures: one stack of transformer blocks, trained in several ways.

A new way to train it is one line in `_TABLE`.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import FixedPoint
from bdia_jax.baselines import FloatBDIAStack, MidpointStack, RevStack
from bdia_jax.compiled.targets import run_options
from bdia_jax.models.blocks import PreNormBlock
from bdia_jax.nnx import BDIAStack, Stack
from benchmarks.alternatives import OffloadStack, ScanStack, TwoLevelStack

Maker = Callable[..., Stack]  # (make_block, depth, rngs=...)

MIB = 2**20
# name: (label in tables and figures, what makes the stack)
_TABLE: dict[str, tuple[str, Maker]] = {
    "plain": ("plain autodiff", partial(ScanStack, backprop="store")),
    "remat": ("per-block jax.checkpoint", partial(ScanStack, backprop="remat")),
    "remat_sqrt": ("two-level jax.checkpoint", TwoLevelStack),
    "offload": ("per-block jax.checkpoint, states on host", OffloadStack),
    "revnet": ("RevViT, float", RevStack),
    "midpoint": ("midpoint, float", MidpointStack),
    "float_bdia": ("float BDIA", FloatBDIAStack),
    "bdia_remat": ("BDIA network, jax.checkpoint", partial(BDIAStack, backprop="remat")),
    "bdia_guard0": ("BDIA, 0 guard bits", partial(BDIAStack, fixed_point=FixedPoint(guard_bits=0))),
    "bdia_guard1": (
        "BDIA, 1 guard bit (default)",
        partial(BDIAStack, fixed_point=FixedPoint(guard_bits=1)),
    ),
    "bdia_chunked": ("BDIA, batch in 4 parts", partial(BDIAStack, batch_chunks=4)),
    "bdia_lean": (
        "BDIA, batch in 4 parts, by branch",
        partial(BDIAStack, by_branch=True, batch_chunks=4),
    ),
}
VARIANTS = {name: make for name, (_, make) in _TABLE.items()}
LABELS = {name: label for name, (label, _) in _TABLE.items()}


def variants(names: list[str] | None = None) -> dict[str, Maker]:
    """The named ones; by default all that differ here: offload is remat where host is device."""
    if names is None:
        names = [n for n in VARIANTS if n != "offload" or jax.default_backend() != "cpu"]
    return {name: VARIANTS[name] for name in names}


def add_variants(
    options: argparse.ArgumentParser, names: Iterable[str] = VARIANTS
) -> argparse.ArgumentParser:
    """With --variants NAME ..., for `variants(args.variants)`."""
    options.add_argument("--variants", nargs="+", choices=list(names), metavar="NAME")
    return options


def xla_options(name: str) -> dict[str, Any]:
    """With which a GPU's program of this way is at its best."""
    return {} if name in ("plain", "remat") else run_options()


def color(name: str) -> str:
    """Okabe-Ito blue for BDIA, orange for plain autodiff, green for float, brown for remat."""
    if name.startswith("bdia"):
        return "#0072B2"
    floats = dict.fromkeys(("revnet", "midpoint", "float_bdia"), "#009E73")
    return (floats | {"plain": "#D55E00", "loop": "0.35"}).get(name, "#9A6A00")


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


TOY = Shape(batch=4, tokens=64, width=64, num_heads=2, mlp_dim=128)
GPU = Shape(batch=32, tokens=512, width=1024, num_heads=16, mlp_dim=4096, dtype="bfloat16")


def sized(args: argparse.Namespace) -> Shape:
    """The sizes --toy or --gpu ask for."""
    return TOY if args.toy else GPU if args.gpu else Shape()


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


def make_stack(shape: Shape, depth: int, variant: Maker) -> Stack:
    """K blocks in training mode."""
    return variant(partial(make_block, shape), depth, rngs=nnx.Rngs(0))


def lower_gradient(shape: Shape, depth: int, variant: Maker) -> jax.stages.Lowered:
    """(params, rest, x, key) -> (loss, (gradients of params, gradient of x)), from shapes alone.

    loss = mean(y^2); y is x_K, and both streams of RevViT. x has a gradient too, because an
    embedding stands before the stack in training.
    """
    gradient, arguments = _gradient(shape, depth, variant)
    return jax.jit(gradient).lower(*arguments)


def lower_step(shape: Shape, depth: int, variant: Maker) -> jax.stages.Lowered:
    """(params, rest, x, key) -> (new params, loss, gradient of x) after SGD; params donated."""
    gradient, arguments = _gradient(shape, depth, variant)

    def step(params, rest, x, key):
        loss, (grads, grad_x) = gradient(params, rest, x, key)
        params = jax.tree.map(lambda w, g: w - 1e-4 * g, params, grads)
        return params, loss, grad_x  # which an embedding would receive

    return jax.jit(step, donate_argnums=0).lower(*arguments)


def _gradient(shape: Shape, depth: int, variant: Maker):
    return gradient_of(nnx.eval_shape(lambda: make_stack(shape, depth, variant)), shape)


def gradient_of(abstract: Stack, shape: Shape):
    """(the gradient of one training step, the shapes of what it takes): no array is made."""
    graphdef, params, rest = nnx.split(abstract, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.width), jnp.float32)

    def loss_fn(params, x, rest, key):
        stack = nnx.merge(graphdef, params, rest)
        return jnp.mean(stack(x, rngs=nnx.Rngs(key)) ** 2)

    def gradient(params, rest, x, key):
        return jax.value_and_grad(loss_fn, argnums=(0, 1))(params, x, rest, key)

    return gradient, (params, rest, x, jax.eval_shape(lambda: jax.random.key(0)))
