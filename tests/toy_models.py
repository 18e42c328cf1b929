"""Small models with parameters from NumPy: their own initialization takes seconds to compile."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from toy import GRAD_TOLERANCE

from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.llama import Llama
from bdia_jax.models.transformer import Transformer
from bdia_jax.models.vit import ViT
from bdia_jax.nnx import BDIAStack

F32, BF16 = (GRAD_TOLERANCE[jnp.dtype(dtype)] for dtype in (jnp.float32, jnp.bfloat16))
STORE = partial(BDIAStack, backprop="store")
UNQUANTIZED = partial(STORE, fixed_point=None)
PLAIN = partial(UNQUANTIZED, magnitude=0)

VOCAB = 23
_generator = np.random.default_rng(0)  # jax.random would have to be compiled
TOKENS = jnp.asarray(_generator.integers(VOCAB, size=(8, 8)), jnp.int32)
IMAGES = jnp.asarray(_generator.normal(size=(3, 8, 8, 3)), jnp.float32)
SOURCE = jnp.array([[3, 4, 5, 2, 0, 0], [6, 7, 8, 9, 10, 2]])
TARGET = jnp.array([[1, 11, 12, 0, 0], [1, 13, 14, 15, 16]])


class Small(NamedTuple):
    """A model and its arguments; inputs: what it is called with."""

    model: type[nnx.Module]
    arguments: dict[str, Any]
    inputs: tuple[jax.Array, ...]


_PARTS = {"width": 16, "num_heads": 2, "mlp_dim": 24, "dropout_rate": 0.0}
_VIT = _PARTS | {"depth": 3, "image_shape": (8, 8, 3)}
_TOKENS = _PARTS | {"depth": 3, "vocab_size": VOCAB, "max_len": 12}
SMALL = {
    "vit": Small(ViT, _VIT, (IMAGES,)),
    "linformer": Small(
        ViT,
        _VIT | {"attention": partial(LinformerAttention, num_tokens=5, projected=3)},
        (IMAGES,),
    ),
    "gpt2": Small(GPT2, _TOKENS, (TOKENS,)),
    "llama": Small(
        Llama, _TOKENS | {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0}, (TOKENS,)
    ),
    "transformer": Small(
        Transformer,
        _PARTS | {"vocab_size": VOCAB, "max_len": 9, "encoder_depth": 3, "decoder_depth": 3},
        (SOURCE, TARGET),
    ),
}


def small(name: str, stack=BDIAStack, *, seed: int = 0, scale: float = 0.3, **options) -> Any:
    """The model of that name, always the same but for `options` and its stack."""
    model, arguments, _ = SMALL[name]
    make = lambda: model(**(arguments | options), stack=stack, rngs=nnx.Rngs(0))  # noqa: E731
    return filled(make, seed, scale)


@nnx.jit
def run(model, *inputs, **options):
    """The model's output, by the same gamma in every call."""
    return model(*inputs, rngs=nnx.Rngs(1), **options)


@nnx.jit
def _at_inference(model, *inputs):
    model.eval()
    return model(*inputs)


def at_inference(model, *inputs):
    """What the model returns at inference; it stays in its mode."""
    return _at_inference(nnx.clone(model), *inputs)


@nnx.jit
def gradient(model, *inputs):
    """Of the mean sine of the outputs, for all parameters."""
    return nnx.grad(lambda model: jnp.mean(jnp.sin(model(*inputs, rngs=nnx.Rngs(1)))))(model)


def count_parameters(make: Callable[[], nnx.Module]) -> int:
    """Elements of all of them; the model is not made."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))


def block_of(stack: Any, k: int) -> Any:
    """The stack's k-th block."""
    graphdef, state = nnx.split(stack.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[k], state))


def loop(stack: Any, x: jax.Array, *consts: Any) -> jax.Array:
    """The plain network of the stack's blocks: x = x + block(x), one after another."""
    for k in range(stack.depth):
        x = x + block_of(stack, k)(x, *consts)
    return x


@jax.custom_vjp
def drifting(h, size=0.01):
    """h, off by `size` in the backward pass; by default of five quanta."""
    del size
    return h


def _drifting_bwd(size, ct):
    return ct, jnp.zeros_like(size)


drifting.defvjp(lambda h, size: (h + size, jnp.asarray(size)), _drifting_bwd)


class _Drifting(nnx.Module):
    per_sample = True

    def __init__(self, block):
        self.block = block

    def __call__(self, x, *consts):
        return drifting(self.block(x, *consts))


def drifting_stack(make_block, depth, *, rngs, **options):
    """A BDIAStack whose blocks come back different in the backward pass, for controls."""
    return BDIAStack(lambda rngs: _Drifting(make_block(rngs)), depth, rngs=rngs, **options)


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


def without_key_bias(grads: Any) -> dict:
    """All gradients but that of the keys' bias, which is rounding alone.

    The bias adds the same to all logits of a query, and the softmax does not see it.
    """
    kept = nnx.to_pure_dict(grads)
    attention = kept["stack"]["blocks"]["attention"]
    of_keys, of_queries = attention["key"].pop("bias"), attention["query"]["bias"]
    assert np.linalg.norm(of_keys) < 1e-4 * np.linalg.norm(of_queries)
    return kept
