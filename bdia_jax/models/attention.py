"""Attention of tokens to each other and to a memory, and the choice of the kernel that runs it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.compiled.targets import default_device

IMPLEMENTATIONS = (None, "xla", "cudnn")

# A projection that ends a residual branch accumulates into float32 and returns it: rounded
# to bfloat16 at magnitude 4, h would move in steps of eight quanta (frac_bits 9), far more
# than a guard bit absorbs.
residual_linear = partial(nnx.Linear, preferred_element_type=jnp.float32)
lecun = nnx.initializers.lecun_normal()


class Attention(nnx.Module):
    """Multi-head self-attention with a float32 output.

    Args:
        width: D.
        num_heads: H, of the queries.
        num_kv_heads: G, of keys and values, divides H: each serves H / G queries. None: H.
        head_dim: d; None: D / H.
        dropout_rate: of the output.
        dtype: of the matrix products; parameters stay float32.
        qkv_bias, out_bias: whether the input projections, and the output one, have a bias.
        qk_norm: (d, rngs=) -> what normalizes queries and keys, each head by itself; None: nothing.
        is_causal: whether a token sees only itself and those before it.
        sliding_window: how many tokens it sees of these, itself among them; None: all.
        kernel_init, out_init: of the input and the output projections.
        implementation: "xla", "cudnn" (flash attention), or None: cuDNN where it can be used. A
            window smaller than T is a mask, which is for "xla".

    Attributes:
        cache: None, or the `Cache` of tokens that x continues.

    Raises:
        ValueError: heads that do not divide, a window below 1, an unknown implementation.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        qkv_bias: bool = False,
        out_bias: bool = True,
        qk_norm: Callable[..., nnx.Module] | None = None,
        is_causal: bool = False,
        sliding_window: int | None = None,
        kernel_init: Callable = lecun,
        out_init: Callable = lecun,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(width, num_heads, num_kv_heads, head_dim, sliding_window)
        check_implementation(implementation)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.is_causal, self.sliding_window = is_causal, sliding_window
        self.implementation = implementation
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        options = {"dtype": dtype, "use_bias": qkv_bias, "kernel_init": kernel_init, "rngs": rngs}
        self.query = nnx.Linear(width, inner, **options)
        self.key = nnx.Linear(width, kv_inner, **options)
        self.value = nnx.Linear(width, kv_inner, **options)
        self.q_norm: Any = nnx.data(None)
        self.k_norm: Any = nnx.data(None)
        if qk_norm is not None:
            self.q_norm = qk_norm(self.head_dim, rngs=rngs)
            self.k_norm = qk_norm(self.head_dim, rngs=rngs)
        self.out = residual_linear(
            inner, width, dtype=dtype, use_bias=out_bias, kernel_init=out_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.cache: Any = nnx.data(None)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D]. mask: bool, broadcastable to [B, H, T, T], True = see.

        With a `Cache`, x continues the tokens of earlier calls and sees them too.

        Raises:
            ValueError: a mask with a `Cache`, which brings its own.
        """
        return self._attend(*self._project(x), mask)

    def _project(self, x):
        """q [B, T, H, d], k and v [B, T, G, d]."""
        q, k, v = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:-1], y.shape[-1] // self.head_dim, self.head_dim)

    def _used(self) -> jax.Array | int:
        """How many tokens are in the cache."""
        return 0 if self.cache is None else self.cache.used[...]

    def _attend(self, q, k, v, mask):
        q, k = q.astype(v.dtype), k.astype(v.dtype)
        is_causal, implementation, used = self.is_causal, self.implementation, self._used()
        if self.cache is not None:
            if mask is not None:
                raise ValueError(f"mask of shape {mask.shape} with a cache; decode without a mask")
            k, v, mask = self.cache.extend(k, v)
            is_causal, implementation = False, "xla"
        if self.sliding_window is not None and k.shape[1] > self.sliding_window:
            query, key = used + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
            window = (query - key < self.sliding_window)[None, None]
            mask = window if mask is None else mask & window
        return self._output(
            attend(q, k, v, mask, is_causal=is_causal, implementation=implementation)
        )

    def _output(self, attended):
        """[B, T, H, d] -> float32 [B, T, D]."""
        *lead, heads, head_dim = attended.shape
        return self.dropout(self.out(attended.reshape(*lead, heads * head_dim)))


class CrossAttention(Attention):
    """Multi-head attention of x to a memory, with a float32 output. Args: as in `Attention`.

    Attributes:
        cache: None, or the `MemoryCache` of the memory.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        common = {"dropout_rate": dropout_rate, "dtype": dtype, "implementation": implementation}
        super().__init__(width, num_heads, **common, rngs=rngs)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D], memory [B, S, D] -> float32 [B, T, D]. mask: as bool [B, H, T, S].

        With a `MemoryCache` the memory is the one it was made of.
        """
        q, implementation = self._heads(self.query(x)), self.implementation
        if self.cache is None:
            k, v = self.project(memory)
        else:
            k, v, implementation = self.cache.key[...], self.cache.value[...], "xla"
        return self._output(attend(q, k, v, mask, implementation=implementation))

    def project(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The memory's keys and values, each [B, S, H, D/H]."""
        return self._heads(self.key(memory)), self._heads(self.value(memory))


# --- the kernel ---------------------------------------------------------------------------


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for every head.

    cuDNN never writes the weights [B, H, T, S] to memory, in neither pass. Its forward kernel is
    deterministic, and both passes of a reversible stack call the same one, so that the rebuild
    sees the same bits. Its gradients are deterministic only with
    XLA_FLAGS=--xla_gpu_deterministic_ops=true. It cannot split tokens over devices.

    Args:
        q: [B, T, H, d].
        k, v: [B, S, H, d], dtype as q.
        mask: bool, broadcastable to [B, H, T, S], True = see. With one, implementation None is
            "xla": packed documents that do not see each other are not for flash attention.
        is_causal: whether a token sees only itself and those before it; needs no mask.
        implementation: "xla", "cudnn", or None for what `choose_implementation` says.

    Returns:
        [B, T, H, d], dtype as q.

    Raises:
        ValueError: an unknown implementation.
    """
    check_implementation(implementation)
    if implementation is None:
        implementation = choose_implementation(q, mask, default_device())
    if implementation == "xla":
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=is_causal, implementation="xla"
        )
    if mask is not None:  # cuDNN broadcasts over batch and heads only
        batch_and_heads = (1, 1, 1, 1, *mask.shape)[-4:-2]
        mask = jnp.broadcast_to(mask, (*batch_and_heads, q.shape[1], k.shape[1]))
    return _cudnn(q, k, v, mask, is_causal)


def _cudnn(q, k, v, mask, is_causal):
    """cuDNN's attention. JAX has its gradient for even lengths: others get a token to ignore."""
    lengths: dict[str, Any] = {}
    (batch, tokens), keys = q.shape[:2], k.shape[1]
    if tokens % 2 or keys % 2:
        q, k, v = _even(q, 1), _even(k, 1), _even(v, 1)
        lengths = {"query_seq_lengths": tokens, "key_value_seq_lengths": keys}
        lengths = {name: jnp.full(batch, size, jnp.int32) for name, size in lengths.items()}
        if mask is not None:
            mask = _even(_even(mask, 2), 3)
    # The residual is for the backward pass. Asked for in the forward pass too, so that both
    # passes run one kernel; without it the forward pass would run the one for inference.
    attended, _ = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        implementation="cudnn",
        return_residual=True,
        **lengths,
    )
    return attended[:, :tokens]


def _even(array: jax.Array, axis: int) -> jax.Array:
    """Of an odd length, with one more, of zeros."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, array.shape[axis] % 2)
    return jnp.pad(array, padding)


def choose_implementation(q: Any, mask: Any, device: Any) -> str:
    """ "cudnn" or "xla", for q [B, T, H, d] on a device.

    cuDNN needs an NVIDIA GPU from Ampere on, bfloat16 or float16, and d a multiple of 8 up to
    128, from Hopper on 256. A mask would be turned into a bias [., ., T, S] with a gradient of
    its own, in half precision: what flash attention is there to avoid. Causal needs no mask.
    """
    # an AMD GPU has a name like gfx90a here
    version = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    architecture = int(version[1]) if version and device.platform == "gpu" else 0
    if architecture < 8 or mask is not None:
        return "xla"
    head_dim = q.shape[-1]
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    if is_half and head_dim % 8 == 0 and head_dim <= (256 if architecture >= 9 else 128):
        return "cudnn"
    return "xla"


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a word `attend` does not know."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, expected 'xla', 'cudnn', or None to choose"
        )


def _check_sizes(width, num_heads, num_kv_heads, head_dim, sliding_window) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}")
    if head_dim is None and width % num_heads:
        raise ValueError(f"width {width} is not divisible by num_heads {num_heads}; give head_dim")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}, expected None or at least 1")
