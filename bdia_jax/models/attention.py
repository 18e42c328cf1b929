"""attend: softmax attention, by cuDNN's flash attention where the device has it, else by XLA."""

import re
from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = (None, "xla", "cudnn")


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
    # The residual is for the backward pass. Asked for in the forward pass too, so that both
    # passes run one kernel; without it the forward pass would run the one for inference.
    attended, _ = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=is_causal, implementation="cudnn", return_residual=True
    )
    return attended


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


def default_device() -> Any:
    """What is compiled for, unless arrays are committed elsewhere: then say implementation."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device
