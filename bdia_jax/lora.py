"""LoRA (Hu et al., arXiv 2106.09685): low-rank adapters of linear layers, stacked ones too.

`add` is a transformation of a model's parameters that leaves its function as it is, `merge` its
inverse: the model that comes back has its old parameters, W + (alpha / rank) A B in place of W.
Between the two only the adapters need gradients. It composes with whatever else is done to the
model: a `BDIAStack` draws gamma, rebuilds its states and cuts its blocks into parts as before.
"""

import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.attention import CrossAttention


class LoRALinear(nnx.Linear):
    """y = x W + bias + (alpha / rank) x A B, with parameters where those of `nnx.Linear` are.

    `add` makes it. Its further parameters are `nnx.LoRAParam`s.

    Attributes:
        lora_a: [.., in, rank], float32.
        lora_b: [.., rank, out], zero at first.
    """

    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam
    lora_dropout: nnx.Dropout
    scale: float

    def __call__(self, x: jax.Array, out_sharding=None) -> jax.Array:
        """[..., in] -> [..., out], dtype as without the adapter."""
        y = super().__call__(x, out_sharding=out_sharding)
        x, a, b = self.promote_dtype(
            (self.lora_dropout(x), self.lora_a[...], self.scale * self.lora_b[...]),
            dtype=self.dtype,
        )
        matmul = partial(jnp.matmul, precision=self.precision)
        return y + matmul(matmul(x, a), b, preferred_element_type=y.dtype)

    def delta(self) -> jax.Array:
        """(alpha / rank) A B, float32 [.., in, out]: what `merge` adds to the kernel."""
        # the highest precision: once, for good
        return jnp.matmul(self.lora_a[...], self.scale * self.lora_b[...], precision="highest")


def query_and_value(model: nnx.Module) -> tuple[str, ...]:
    """The targets that the paper adapts: `query` and `value` of every self-attention.

    Args:
        model: its attentions have layers of these names; a `CrossAttention` is left out.

    Raises:
        ValueError: it has none.
    """
    paths = [
        ".".join(map(str, (*path, name)))
        for path, attention in nnx.iter_modules(model)
        if not isinstance(attention, CrossAttention)
        for name in ("query", "value")
        if isinstance(getattr(attention, name, None), nnx.Linear)
    ]
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no linear layers query and value; name the targets"
        )
    return tuple(f"^{re.escape(path)}$" for path in paths)


def add(
    model: nnx.Module,
    targets: tuple[str, ...],
    *,
    rank: int,
    alpha: float,
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs,
) -> None:
    """Gives every targeted linear layer of a model adapters, in place.

    The function stays as it is, since B is zero. Then train the `nnx.LoRAParam`s alone, as in
    `nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)`. XLA drops the other
    parameters' gradients, those of a stack's blocks too.

    Args:
        model: holds `nnx.Linear`s, stacked in a `Stack` or not.
        targets: which of them: regular expressions, each found in the dotted path of one or more,
            "stack.blocks.attention.query".
        rank: of A B.
        alpha: A B is scaled by alpha / rank.
        dropout_rate: of the adapters' input; like all dropout on until `eval()`.
        rngs: draws A, He-uniform as in the paper's code; seeds dropout.

    Raises:
        ValueError: a rank below 1, a target that no layer fits, a layer that has adapters already.

    Example:
        >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        >>> add(model, ("",), rank=2, alpha=4, rngs=nnx.Rngs(1))
        >>> model.lora_a.shape, model.lora_b.shape
        ((8, 2), (2, 6))
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    linears = dict(_linears(model))
    for target in targets:
        if not any(re.search(target, path) for path in linears):
            raise ValueError(
                f"no linear layer fits the target {target!r}; there are {', '.join(linears)}"
            )
    chosen = {
        path: linear
        for path, linear in linears.items()
        if any(re.search(target, path) for target in targets)
    }
    for path, linear in chosen.items():
        if isinstance(linear, LoRALinear):
            raise ValueError(f"{path} has adapters already; merge the model first")
    for linear in chosen.values():
        _adapt(linear, rank, alpha / rank, dropout_rate, rngs)


def merge(model: nnx.Module) -> None:
    """Adds every adapter to its kernel and removes it, in place: the plain model is back."""
    for _, linear in list(_linears(model)):
        if isinstance(linear, LoRALinear):
            kernel = linear.kernel[...]
            linear.kernel[...] = (kernel + linear.delta()).astype(kernel.dtype)
            for name in ("lora_a", "lora_b", "lora_dropout", "scale"):
                delattr(linear, name)
            _set_class(linear, nnx.Linear)


def _linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    for path, module in nnx.iter_modules(model):
        # of no other subclass: it would lose its own __call__
        if isinstance(module, nnx.Linear) and type(module) in (nnx.Linear, LoRALinear):
            yield ".".join(map(str, path)), module


def _adapt(linear, rank: int, scale: float, dropout_rate: float, rngs) -> None:
    *lead, in_features, out_features = linear.kernel.shape  # lead: the blocks of a stack
    initial = nnx.initializers.he_uniform(batch_axis=tuple(range(len(lead))))
    # the same object, so that its place in the model and its parameters' names stay
    _set_class(linear, LoRALinear)
    linear.scale = scale
    linear.lora_a = nnx.LoRAParam(initial(rngs.params(), (*lead, in_features, rank), jnp.float32))
    linear.lora_b = nnx.LoRAParam(jnp.zeros((*lead, rank, out_features), jnp.float32))
    linear.lora_dropout = _dropout(dropout_rate, tuple(lead), rngs)


def _set_class(linear: nnx.Linear, cls: type[nnx.Linear]) -> None:
    object.__setattr__(linear, "__class__", cls)  # or NNX takes it for an attribute of the graph


def _dropout(rate: float, lead: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Dropout:
    if not lead:
        return nnx.Dropout(rate, rngs=rngs)
    make = nnx.vmap(lambda block_rngs: nnx.Dropout(rate, rngs=block_rngs))
    return make(rngs.split(*lead))
