"""Rotary position embedding (RoPE, arXiv 2104.09864), its long contexts, and attention with it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.models.attention import Attention

_NEEDED = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model is made to see further than it was pre-trained for. Names as in config.json.

    "linear" divides every frequency by `factor`. "llama3" does so for wavelengths above
    original_max_position_embeddings / low_freq_factor, leaves those below
    original_max_position_embeddings / high_freq_factor, and interpolates between.

    Raises:
        ValueError: another rope_type; a factor below 1; a setting that is missing, or one that
            the rope_type does not have.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        if self.rope_type not in _NEEDED:
            raise ValueError(
                f"rope_type is {self.rope_type!r}, which is not implemented; expected "
                f"{' or '.join(map(repr, _NEEDED))}, or no scaling"
            )
        if self.factor < 1:
            raise ValueError(f"factor of RoPE is {self.factor}, expected a number from 1 on")
        for name in _NEEDED["llama3"]:
            value, is_needed = getattr(self, name), name in _NEEDED[self.rope_type]
            if (value is not None) != is_needed:
                raise ValueError(
                    f"{name} of RoPE is {value}, but rope_type {self.rope_type!r} "
                    f"{'needs one' if is_needed else 'has none'}"
                )
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # pyright: ignore
            raise ValueError(
                f"low_freq_factor of RoPE is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; expected the second to be greater"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position, float32 [head_dim / 2]: theta^(-2i / head_dim), scaled.

    They are constants of the program, computed by NumPy. Parameters they are not, and a block
    with other variables could not be evaluated in parts.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    if scaling is None:
        return frequencies
    slow = frequencies / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return slow
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    turns = np.float32(length) * frequencies / np.float32(2 * math.pi)  # in the old context
    share = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)  # pyright: ignore
    return (1 - share) * slow + share * frequencies


def angles_of(positions: jax.Array, frequencies: np.ndarray | jax.Array) -> jax.Array:
    """positions [...] times frequencies [F], float32 [..., F]."""
    return jnp.multiply.outer(positions.astype(jnp.float32), frequencies)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """x turned by its positions, float32, element i with i + d/2 as one plane.

    Args:
        x: [B, T, H, d] of any float dtype; the angles are float32 in any case, since bfloat16
            cannot tell position 1000 from 1001.
        positions: int32, broadcastable to [B, T].
        frequencies: [d / 2], of `rope_frequencies`.
    """
    angles = angles_of(positions, frequencies)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class RotaryAttention(Attention):
    """Causal self-attention with rotary positions and a float32 output.

    Args:
        rope_theta, rope_scaling: the frequencies of the positions, see `rope_frequencies`.
        Others as in `Attention`, without a bias by default. head_dim is even.

    Raises:
        ValueError: as `Attention`; an odd head_dim.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rope_theta: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        out_bias: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(width, num_heads, is_causal=True, out_bias=out_bias, rngs=rngs, **options)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number")
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, D] -> float32 [B, T, D].

        Args:
            x: with a `Cache` it continues the tokens of earlier calls and sees them too. Keys are
                kept as they are after turning.
            mask: bool, broadcastable to [B, H, T, T], True = see; of the earlier tokens only.
            positions: int32, broadcastable to [B, T]; those that follow by default.

        Raises:
            ValueError: a mask with a `Cache`, which brings its own.
        """
        q, k, v = self._project(x)
        if positions is None:
            positions = self._used() + jnp.arange(x.shape[1])[None]
        frequencies = rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
        q, k = (rotate(heads, positions, frequencies) for heads in (q, k))
        return self._attend(q, k, v, mask)
