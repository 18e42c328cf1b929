"""ResNet: a pre-activation residual network whose stages are stacks of blocks."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax._stack import Stack
from bdia_jax.nnx import BDIAStack

_he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_conv = partial(nnx.Conv, use_bias=False, kernel_init=_he)
# float32 out for what is added to the residual stream (see blocks.py)
_residual_conv = partial(_conv, preferred_element_type=jnp.float32)
_batch_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class BasicBlock(nnx.Module):
    """h of a pre-activation block: batch norm, ReLU, 3x3 convolution, twice (arXiv 1603.05027).

    Nothing follows the sum x + h, as BDIA needs it.

    Args:
        width: channels of x and h.
        dtype: of the convolutions; parameters and statistics stay float32.
    """

    def __init__(self, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.norm1 = _batch_norm(width, rngs=rngs)
        self.conv1 = _conv(width, width, (3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = _batch_norm(width, rngs=rngs)
        self.conv2 = _residual_conv(width, width, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, height, width, C] -> float32 h of that shape."""
        x = self.conv1(nnx.relu(self.norm1(x)))
        return self.conv2(nnx.relu(self.norm2(x)))


class Transition(nnx.Module):
    """A block that halves height and width, shortcut included: x_{k+1}, not h.

    The shortcut is a 1x1 convolution of stride 2 of the normalized input.

    Args:
        in_width, width: channels before and after.
        dtype: as in `BasicBlock`.
    """

    def __init__(self, in_width: int, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = _batch_norm(in_width, rngs=rngs)
        self.shortcut = _residual_conv(in_width, width, (1, 1), strides=(2, 2), **options)
        self.conv1 = _conv(in_width, width, (3, 3), strides=(2, 2), **options)
        self.norm2 = _batch_norm(width, rngs=rngs)
        self.conv2 = _residual_conv(width, width, (3, 3), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, height, width, C] -> float32 [B, height / 2, width / 2, C']."""
        x = nnx.relu(self.norm1(x))
        return self.shortcut(x) + self.conv2(nnx.relu(self.norm2(self.conv1(x))))


class ResNet(nnx.Module):
    """Residual network for small images; the defaults have 15 blocks ("ResNet-15").

    Each stage is one reversible stack of `BasicBlock`s. Stages after the first begin with a
    `Transition`, which changes the shape of x and so cannot be undone; its input is kept and
    the rest evaluated again (`nnx.remat`).

    Args:
        image_shape: (height, width, channels); the first two divisible by 2 per transition.
        num_classes: size of the output.
        widths: channels of each stage.
        depths: blocks of each stage, its transition included.
        dtype: of the convolutions (float32 or bfloat16). Parameters, statistics, residual
            stream and logits are float32.
        stack: (make_block, depth, rngs=rngs) -> what runs the blocks of a stage; `BDIAStack`
            with options set by `functools.partial`.
        rngs: initializes parameters; seeds gamma.

    Batch norm takes the statistics of the batch in training and running ones, updated once a
    step (momentum 0.9), after `eval()`.

    Raises:
        ValueError: widths and depths of different length, a stage without a block for its
            stack, or an image that cannot be halved that often.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        widths: tuple[int, ...] = (64, 128, 256),
        depths: tuple[int, ...] = (5, 5, 5),
        dtype=jnp.float32,
        stack: Callable[..., Stack] = BDIAStack,
        rngs: nnx.Rngs,
    ):
        _check(image_shape, widths, depths)
        self.image_shape = tuple(image_shape)
        self.stem = _residual_conv(image_shape[-1], widths[0], (3, 3), dtype=dtype, rngs=rngs)
        self.transitions = nnx.List(
            Transition(before, after, dtype=dtype, rngs=rngs) for before, after in pairwise(widths)
        )
        self.stacks = nnx.List(
            stack(partial(_make_block, width, dtype), depth - (stage > 0), rngs=rngs)
            for stage, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        self.norm = _batch_norm(widths[-1], rngs=rngs)
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits, float32 [B, num_classes].

        Args:
            images: float [B, height, width, channels], normalized by the caller.
            rngs: stream "gamma" for this call, in place of the model's own.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {images.shape}, expected [B, *{self.image_shape}]")
        x = self.stacks[0](self.stem(images), rngs=rngs)
        for transition, stack in zip(self.transitions, self.stacks[1:], strict=True):
            x = stack(nnx.remat(_call)(transition, x), rngs=rngs)
        x = nnx.relu(self.norm(x))
        return self.head(jnp.mean(x, axis=(1, 2)))


def _call(module, x):
    return module(x)


def _make_block(width, dtype, rngs):
    return BasicBlock(width, dtype=dtype, rngs=rngs)


def _check(image_shape, widths, depths):
    if len(widths) != len(depths) or not widths:
        raise ValueError(f"widths is {widths} and depths {depths}; give one of each per stage")
    for stage, depth in enumerate(depths):
        if depth < 1 + (stage > 0):
            raise ValueError(
                f"depths is {depths}, but stage {stage} needs at least {1 + (stage > 0)}: "
                "a transition in all but the first, and a block for the stack"
            )
    halvings = 2 ** (len(widths) - 1)
    if image_shape[0] % halvings or image_shape[1] % halvings:
        raise ValueError(
            f"image_shape is {image_shape}, but {len(widths)} stages need height and width "
            f"divisible by {halvings}"
        )
