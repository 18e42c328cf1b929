"""Cross-entropy over a large vocabulary, in chunks of it: the logits [N, V] never exist."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdia_jax._mesh import alike, explicit_sharding, zeros_like


def logits(
    features: jax.Array,
    table: jax.Array,
    *,
    bias: jax.Array | None = None,
    vocab_axis: int = 0,
    dtype: Any = None,
) -> jax.Array:
    """features table^T + bias, float32 [..., V]: what `softmax_cross_entropy` is the loss of.

    Args, Raises: as there.
    """
    dtype = _product_dtype(features, table, dtype)
    kernel = table.astype(dtype) if vocab_axis == 1 else table.astype(dtype).T
    product = jnp.matmul(features.astype(dtype), kernel, preferred_element_type=jnp.float32)
    return product if bias is None else product + bias.astype(jnp.float32)


def softmax_cross_entropy(
    features: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    vocab_axis: int = 0,
    dtype: Any = None,
    chunk_size: int = 2048,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The loss of every token, -log softmax(features table^T + bias)[label], in nats.

    To float32 rounding it is `optax.softmax_cross_entropy_with_integer_labels` of `logits`, and
    so are the gradients for features, table and bias. But no more than [N, chunk_size] of the
    logits exist at a time, for N tokens: the forward pass sums exponentials chunk by chunk; the
    backward pass computes each chunk's logits once more, which makes four matrix products of
    three. The table's gradient is written in place and the table is not copied.

    Args:
        features: float32 or bfloat16 [..., D].
        table: float32 or bfloat16 [V, D], a row a class: the embedding, if it is tied. If it is
            split over devices, then along D: split along V, each chunk would gather all of it.
        labels: integers [...]. One outside 0 .. V-1 cannot raise under jit: its loss is NaN, and
            so are the gradients if that loss is used. If it is not, they are as without the
            token; padding may have any label: `jnp.where(labels >= 0, loss, 0)`.
        bias: float32 or bfloat16 [V], or None.
        vocab_axis: 1 for a table [D, V], the kernel of a dense layer; its transpose would be
            a copy.
        dtype: of the operands of all matrix products; by default what features and table
            promote to. Sums are float32.
        chunk_size: classes at once. Working memory is 4 to 8 bytes a token and class of a
            chunk; smaller chunks make smaller matrix products.
        label_smoothing: s in [0, 1): the target is 1 - s on the label and s / V on every class,
            the label too, as of `optax.smooth_labels`. The mean over all V logits is summed
            chunk by chunk, like the rest.

    Returns:
        float32 [...], as labels. The gradients follow whatever weighs and sums it.

    Raises:
        ValueError: shapes or dtypes that do not fit, a chunk_size that is no int from 1 on, a
            label_smoothing outside [0, 1).
        TypeError: in forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`), from JAX, since the
            backward pass is given by hand; `jax.grad` of `jax.grad` works.

    Example:
        >>> table = jax.random.normal(jax.random.key(0), (50257, 8))
        >>> features, labels = jnp.ones((2, 3, 8)), jnp.zeros((2, 3), jnp.int32)
        >>> softmax_cross_entropy(features, table, labels).shape
        (2, 3)
    """
    _check(features, table, labels, bias, vocab_axis, chunk_size, label_smoothing)
    vocab_size = table.shape[vocab_axis]
    if labels.dtype.itemsize < 4:  # may be too narrow to hold V
        labels = labels.astype(jnp.int32)
    labels = jnp.where((labels >= 0) & (labels < vocab_size), labels, -1).astype(jnp.int32)
    config = _Config(
        vocab_axis,
        _product_dtype(features, table, dtype),
        min(chunk_size, vocab_size),
        label_smoothing,
    )
    features, table, bias, labels = alike(features, table, bias, labels)
    flat_features = features.reshape(labels.size, features.shape[-1])
    loss: Any = _jitted_loss(config, flat_features, table, bias, labels.reshape(-1))
    return loss.reshape(labels.shape)


class _Config(NamedTuple):
    vocab_axis: int
    dtype: Any
    size: int  # of a chunk: C
    smoothing: float


class _Chunk(NamedTuple):
    """C classes of the table, from `start` on, and their logits [N, C].

    V is rarely a multiple of C, and to pad the table is to copy it. So the last chunk starts
    early, and is_new [C] is false for the classes that the chunk before it has had.
    """

    start: jax.Array
    is_new: jax.Array
    table: jax.Array
    logits: jax.Array


def _chunk(config: _Config, x, table, bias, first) -> _Chunk:
    axis, size = config.vocab_axis, config.size
    start = jnp.minimum(first, table.shape[axis] - size)
    part = jax.lax.dynamic_slice_in_dim(table, start, size, axis).astype(config.dtype)
    if bias is not None:
        bias = jax.lax.dynamic_slice_in_dim(bias, start, size)
    is_new = start + jnp.arange(size, dtype=jnp.int32) >= first
    return _Chunk(start, is_new, part, logits(x, part, bias=bias, vocab_axis=axis))


def _firsts(config: _Config, table) -> jax.Array:
    return jnp.arange(0, table.shape[config.vocab_axis], config.size, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(config: _Config, features, table, bias, labels):
    return _loss_fwd(config, features, table, bias, labels)[0]


def _loss_fwd(config: _Config, features, table, bias, labels):
    """log sum exp(logits) - logit of the label, or of the smoothed target."""
    x = features.astype(config.dtype)

    def body(carry, first):
        top, total, own, all_logits = carry  # so far, sum exp(logits) = exp(top) total
        chunk = _chunk(config, x, table, bias, first)
        place = jnp.clip(labels - chunk.start, 0, config.size - 1)[:, None]
        is_here = (labels >= first) & (labels < first + config.size)
        own = jnp.where(is_here, jnp.take_along_axis(chunk.logits, place, 1)[:, 0], own)
        new = jnp.where(chunk.is_new, chunk.logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(new, axis=1))
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(new - new_top[:, None]), axis=1)
        if config.smoothing:
            all_logits = all_logits + jnp.sum(jnp.where(chunk.is_new, chunk.logits, 0), axis=1)
        return (new_top, total, own, all_logits), None

    # top starts finite, for a bias may rule out a whole chunk by -inf
    start = (jnp.finfo(jnp.float32).min, 0.0, 0.0, 0.0)
    carry = tuple(jnp.full_like(labels, value, jnp.float32) for value in start)
    (top, total, own, all_logits), _ = jax.lax.scan(body, carry, _firsts(config, table))
    log_sum = top + jnp.log(total)
    if config.smoothing:
        mean = all_logits / table.shape[config.vocab_axis]
        own = (1 - config.smoothing) * own + config.smoothing * mean
    loss = jnp.where(labels >= 0, log_sum - own, jnp.nan)
    return loss, (features, table, bias, labels, log_sum)


def _loss_bwd(config: _Config, residuals, ct):
    """The cotangent of the logits, (softmax - target) ct, a chunk at a time."""
    features, table, bias, labels, log_sum = residuals
    x = features.astype(config.dtype)
    axis = config.vocab_axis
    ct = jnp.where((labels >= 0) | (ct == 0), ct, jnp.nan)[:, None]

    def body(carry, first):
        ct_x, ct_table, ct_bias = carry
        chunk = _chunk(config, x, table, bias, first)
        classes = chunk.start + jnp.arange(config.size, dtype=jnp.int32)
        target = (classes[None] == labels[:, None]).astype(jnp.float32)
        if config.smoothing:
            target = (1 - config.smoothing) * target + config.smoothing / table.shape[axis]
        ct_logits = (jnp.exp(chunk.logits - log_sum[:, None]) - target) * ct

        def write(buffer, values, axis):  # once more what the chunk before has had
            values = values.astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, values, chunk.start, axis)

        if ct_bias is not None:
            ct_bias = write(ct_bias, jnp.sum(ct_logits, axis=0), 0)
        ct_logits = ct_logits.astype(config.dtype)
        operands = (x, ct_logits) if axis == 1 else (ct_logits, x)
        part = _sum_products(*operands, 0, 0, explicit_sharding(chunk.table))
        ct_table = write(ct_table, part, axis)
        new = jnp.where(jnp.expand_dims(chunk.is_new, 1 - axis), chunk.table, 0)
        ct_x = ct_x + _sum_products(ct_logits, new, 1, axis)
        return (ct_x, ct_table, ct_bias), None

    ct_bias = None if bias is None else zeros_like(bias)
    carry = (zeros_like(x, jnp.float32), zeros_like(table), ct_bias)
    (ct_x, ct_table, ct_bias), _ = jax.lax.scan(body, carry, _firsts(config, table))
    return ct_x.astype(features.dtype), ct_table, ct_bias, None


_loss.defvjp(_loss_fwd, _loss_bwd)
_jitted_loss = jax.jit(_loss, static_argnums=0, inline=True)  # outside jit, compiled once


def _sum_products(a, b, axis_a, axis_b, out_sharding=None):
    """The matrix product of a and b over an axis of each, in float32."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    options = {"preferred_element_type": jnp.float32, "out_sharding": out_sharding}
    return jax.lax.dot_general(a, b, axes, **options)


def _product_dtype(features, table, dtype) -> Any:
    """Of the operands of matrix products: an integer one would cut features off to integers."""
    dtype = jnp.dtype(dtype or jnp.promote_types(features.dtype, table.dtype))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype is {dtype}, expected a float dtype such as jnp.bfloat16, or None for what "
            "features and table promote to"
        )
    return dtype


def _check(features, table, labels, bias, vocab_axis, chunk_size, label_smoothing) -> None:
    given = {"features": features, "table": table} | ({} if bias is None else {"bias": bias})
    for name, array in given.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"{name} has dtype {array.dtype}, expected float32 or bfloat16; "
                f"cast it with {name}.astype(jnp.float32)"
            )
    if vocab_axis not in (0, 1):
        raise ValueError(f"vocab_axis is {vocab_axis}, expected 0 (table [V, D]) or 1 ([D, V])")
    if (
        table.ndim != 2
        or features.ndim < 1
        or features.shape[-1] != table.shape[1 - vocab_axis]
        or table.shape[vocab_axis] < 1
    ):
        expected = "[V, D]" if vocab_axis == 0 else "[D, V]"
        raise ValueError(
            f"table has shape {table.shape} for features {features.shape}, expected {expected} "
            f"for [..., D]; a table of the other orientation takes vocab_axis={1 - vocab_axis}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels have dtype {labels.dtype}, expected integers; cast them with "
            "labels.astype(jnp.int32)"
        )
    if labels.shape != features.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}, expected {features.shape[:-1]}, a label for "
            f"each of the features {features.shape}"
        )
    if bias is not None and bias.shape != (table.shape[vocab_axis],):
        raise ValueError(
            f"bias has shape {bias.shape}, expected [V] = ({table.shape[vocab_axis]},)"
        )
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(
            f"chunk_size is {chunk_size!r}, expected an int of at least 1; 2048 is the default, "
            "any size from V on makes one chunk"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, expected from 0, for none, to below 1"
        )
