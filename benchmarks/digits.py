"""A ViT of any depth on scikit-learn's handwritten digits: no file, no download."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

from bdia_jax.models.vit import ViT
from benchmarks.stack import Maker, Shape
from configs import vit_digits
from train.config import Config
from train.loop.guard_bits import stack_inputs
from train.tasks import open_config
from train.tasks.images import Images, make_task
from train.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a run. parts: of the batch, in which a block is evaluated; one of them is audited."""

    depth: int = 1024
    width: int = 32
    num_heads: int = 2
    patch_size: int = 2
    batch: int = 16
    parts: int = 1
    steps: int = 100
    dtype: str = "float32"

    @property
    def shape(self) -> Shape:
        """Of the stack."""
        tokens = (8 // self.patch_size) ** 2 + 1
        mlp_dim = 2 * self.width
        return Shape(
            self.batch, tokens, self.width, self.num_heads, mlp_dim=mlp_dim, dtype=self.dtype
        )


TOY = Size(depth=64, patch_size=4, steps=25)
GPU = Size(width=512, num_heads=8, patch_size=1, parts=8, steps=40, dtype="bfloat16")


def beyond(limit: int, size: Size) -> Size:
    """`size` with the smallest batch whose K float32 states are more than `limit` bytes."""
    per_sample = 4 * size.depth * size.shape.tokens * size.width
    batch = size.parts * (limit // (per_sample * size.parts) + 1)
    return dataclasses.replace(size, batch=batch)


def stack_to_audit(config: Config, task: Task, model: Any) -> tuple[Any, jax.Array]:
    """(the model's stack in training mode, its x of one part of the first step's batch)."""
    x, _ = stack_inputs(config, task, model)["stack",]
    model.stack.train()
    model.stack.batch_chunks = 1  # the blocks see in one part what they see in training
    return model.stack, x[: len(x) // config.batch_chunks]


def make_config(size: Size) -> Config:
    """configs/vit_digits.py at this size."""
    config = vit_digits.get_config().unlock()
    model = {"depth": size.depth, "width": size.width, "num_heads": size.num_heads}
    model |= {"mlp_dim": size.shape.mlp_dim, "patch_size": size.patch_size, "dtype": size.dtype}
    config.update({"model": model | {"dropout_rate": 0.0}, "optimizer": "adamw"})
    config.update({"schedule": "constant", "learning_rate": 0.0032 / size.width})
    config.update({"warmup_steps": min(10, size.steps - 1), "num_steps": size.steps})
    config.update({"batch_size": size.batch, "batch_chunks": size.parts})
    return open_config(config.lock())


def digits_task(config: Config, make_stack: Maker, *, scaled: bool = True) -> Task:
    """Every fifth digit held out, and a ViT over `make_stack`.

    scaled: whether the projections that end a branch start 1 / sqrt(2 K) as large as usual.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    held_out = np.arange(len(images)) % 5 == 4
    train, rest = (
        Images(jnp.asarray(images[chosen]), jnp.asarray(labels[chosen], jnp.int32))
        for chosen in (~held_out, held_out)
    )
    arguments: dict[str, Any] = config.model_arguments | {"stack": make_stack}
    del arguments["linformer_dim"]

    def make_model(rngs: nnx.Rngs) -> ViT:
        model = ViT((8, 8, 1), 10, **arguments, rngs=rngs)
        blocks: Any = model.stack.blocks
        for last in (blocks.attention.out, blocks.mlp.out) if scaled else ():
            last.kernel[...] *= (2 * config.model_arguments["depth"]) ** -0.5
        return model

    return make_task(config, train, rest, num_classes=10)._replace(make_model=make_model)
