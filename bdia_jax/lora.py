"""LoRA (Hu et al., arXiv 2106.09685): low-rank adapters of linear layers, stacked ones too.

`add` is a transformation of a model's parameters that leaves its function as it is, `merge` its
inverse: the model that comes back has its old parameters, W + (alpha / rank) A B in place of W.
Between the two only the adapters need gradients. It composes with whatever else is done to the
model: a `BDIAStack` draws gamma, rebuilds its states and cuts its blocks into parts as before.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Target(NamedTuple):
    """Which linear layers get an adapter.

    path: regular expression, found in the dotted path of an `nnx.Linear`,
        "stack.blocks.attention.qkv".
    sizes: of the parts its outputs consist of, (D, D, D) for queries, keys and values; () for one.
    adapted: which of these get an adapter, each its own; the others stay as they are.
    """

    path: str
    sizes: tuple[int, ...] = ()
    adapted: tuple[int, ...] = (0,)


class LoRALinear(nnx.Linear):
    """y = x W + bias + (alpha / rank) x A B, with parameters where those of `nnx.Linear` are.

    `add` makes it. Its further parameters are `nnx.LoRAParam`s.

    Attributes:
        lora_a: [.., in, rank] for each adapted part, float32.
        lora_b: [.., rank, size of the part], zero at first.
    """

    lora_a: Any
    lora_b: Any
    lora_dropout: nnx.Dropout
    target: Target
    scale: float

    def __call__(self, x: jax.Array, out_sharding=None) -> jax.Array:
        """[..., in] -> [..., out], dtype as without the adapter."""
        y = super().__call__(x, out_sharding=out_sharding)
        x = self.lora_dropout(x)
        matmul = partial(jnp.matmul, precision=self.precision)

        def low_rank(a, b):
            its_x, a, b = self.promote_dtype((x, a, self.scale * b), dtype=self.dtype)
            return matmul(matmul(its_x, a), b, preferred_element_type=y.dtype)

        return y + self._parts(low_rank, y.shape[:-1], y.dtype)

    def delta(self) -> jax.Array:
        """(alpha / rank) A B, float32 [.., in, out]: what `merge` adds to the kernel."""
        matmul = partial(jnp.matmul, precision="highest")  # once, for good
        return self._parts(
            lambda a, b: matmul(a, self.scale * b), self.kernel.shape[:-1], jnp.float32
        )

    def _parts(self, low_rank, shape: tuple[int, ...], dtype) -> jax.Array:
        """low_rank(a, b) of every adapted part, zero elsewhere, side by side."""
        adapters = zip(self.target.adapted, self.lora_a, self.lora_b, strict=True)
        parts = {part: low_rank(a[...], b[...]) for part, a, b in adapters}
        sizes = self.target.sizes or (self.out_features,)
        return jnp.concatenate(
            [
                parts[i] if i in parts else jnp.zeros((*shape, size), dtype)
                for i, size in enumerate(sizes)
            ],
            axis=-1,
        )


def query_and_value(model: nnx.Module) -> tuple[Target, ...]:
    """Queries and values of every fused `qkv` projection, what the paper adapts.

    Args:
        model: its attentions have `qkv` and `num_heads`, and `num_kv_heads` if that is another.

    Raises:
        ValueError: it has none.
    """
    targets = []
    for path, attention in nnx.iter_modules(model):
        if isinstance(qkv := getattr(attention, "qkv", None), nnx.Linear):
            heads: Any = getattr(attention, "num_heads")  # noqa: B009
            kv_heads = getattr(attention, "num_kv_heads", heads)
            head_dim = qkv.out_features // (heads + 2 * kv_heads)
            sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
            name = re.escape(".".join(map(str, (*path, "qkv"))))
            targets.append(Target(f"^{name}$", sizes, (0, 2)))
    if not targets:
        raise ValueError(f"{type(model).__name__} has no fused qkv projection; name the targets")
    return tuple(targets)


def add(
    model: nnx.Module,
    targets: tuple[Target, ...],
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
        targets: which of them; the first that fits counts.
        rank: of A B.
        alpha: A B is scaled by alpha / rank.
        dropout_rate: of the adapters' input; like all dropout on until `eval()`.
        rngs: draws A, He-uniform as in the paper's code; seeds dropout.

    Raises:
        ValueError: a rank below 1, a target that no layer fits, or of other sizes than its
            layer, a layer that has adapters already.

    Example:
        >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        >>> add(model, (Target("", (2, 2, 2), (0, 2)),), rank=2, alpha=4, rngs=nnx.Rngs(1))
        >>> [a.shape for a in model.lora_a]
        [(8, 2), (8, 2)]
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    chosen = [
        (path, linear, target)
        for path, linear in _linears(model)
        if (target := next((t for t in targets if re.search(t.path, path)), None))
    ]
    for target in targets:
        if not any(target is its for _, _, its in chosen):
            paths = ", ".join(path for path, _ in _linears(model))
            raise ValueError(f"no linear layer fits the target {target.path!r}; there are {paths}")
    for path, linear, target in chosen:
        if isinstance(linear, LoRALinear):
            raise ValueError(f"{path} has adapters already; merge the model first")
        sizes = target.sizes or (linear.out_features,)
        if sum(sizes) != linear.out_features or not {*target.adapted} <= {*range(len(sizes))}:
            raise ValueError(
                f"{path} has {linear.out_features} outputs, which {target} does not fit: its sizes "
                "have to add up to them, and adapted to name parts"
            )
    for _, linear, target in chosen:
        _adapt(linear, target, rank, alpha / rank, dropout_rate, rngs)


def merge(model: nnx.Module) -> None:
    """Adds every adapter to its kernel and removes it, in place: the plain model is back."""
    for _, linear in list(_linears(model)):
        if isinstance(linear, LoRALinear):
            kernel = linear.kernel[...]
            linear.kernel[...] = (kernel + linear.delta()).astype(kernel.dtype)
            for name in ("lora_a", "lora_b", "lora_dropout", "target", "scale"):
                delattr(linear, name)
            _set_class(linear, nnx.Linear)


def _linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    for path, module in nnx.iter_modules(model):
        # of no other subclass: it would lose its own __call__
        if isinstance(module, nnx.Linear) and type(module) in (nnx.Linear, LoRALinear):
            yield ".".join(map(str, path)), module


def _adapt(linear, target: Target, rank: int, scale: float, dropout_rate: float, rngs) -> None:
    *lead, in_features, out_features = linear.kernel.shape  # lead: the blocks of a stack
    initial = nnx.initializers.he_uniform(batch_axis=tuple(range(len(lead))))
    sizes = target.sizes or (out_features,)
    # the same object, so that its place in the model and its parameters' names stay
    _set_class(linear, LoRALinear)
    linear.target, linear.scale = target, scale
    linear.lora_a = nnx.List(
        nnx.LoRAParam(initial(rngs.params(), (*lead, in_features, rank))) for _ in target.adapted
    )
    linear.lora_b = nnx.List(
        nnx.LoRAParam(jnp.zeros((*lead, rank, sizes[part]))) for part in target.adapted
    )
    linear.lora_dropout = _dropout(dropout_rate, tuple(lead), rngs)


def _set_class(linear: nnx.Linear, cls: type[nnx.Linear]) -> None:
    object.__setattr__(linear, "__class__", cls)  # or NNX takes it for an attribute of the graph


def _dropout(rate: float, lead: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Dropout:
    if not lead:
        return nnx.Dropout(rate, rngs=rngs)
    make = nnx.vmap(lambda block_rngs: nnx.Dropout(rate, rngs=block_rngs))
    return make(rngs.split(*lead))
