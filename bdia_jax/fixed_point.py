"""Fixed-point activations and the packed side information.

A state x is kept as the int32 number n = x 2^l of quanta (arXiv 2407.09093, section 4).
Everything here is elementwise or a bit operation; nothing knows about blocks.
"""

import dataclasses
import math
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp

# A state that is not a number, or does not fit. int32 has one value more below zero
# than above; it marks such elements, so that they come back as NaN and never as an
# innocent integer.
INVALID = -(2**31)


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """The number format of the states and of the bits kept to undo a step.

    Args:
        frac_bits: the paper's l; a quantum is 2^-l, a state reaches +-2^(31-l). The paper
            trains with 9 and also tries 5, 0 and -2.
        guard_bits: g, extra bits per activation that absorb a difference between the
            forward's and the backward's evaluation of a block. The rebuild is exact
            while the value before rounding moves by less than `drift_bound` quanta. 0 is
            the paper's format: exact only if no rounding flips.
        gamma_bits: of the smallest |gamma|, 2^-gamma_bits. 1 is the paper's 1/2 (eq. 20), 2 takes
            1/4 too (Remark 2), 3 takes 1/8. A larger gamma then has more guard bits.

    Raises:
        ValueError: a field out of range, or gamma_bits + guard_bits above 8.

    Example:
        >>> FixedPoint().side_bits, FixedPoint(guard_bits=3).drift_bound
        (2, 3.5)
    """

    frac_bits: int = 9
    guard_bits: int = 1
    gamma_bits: int = 1

    def __post_init__(self):
        for name, low, high in (
            ("frac_bits", -16, 24),
            ("guard_bits", 0, 7),
            ("gamma_bits", 1, 8),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}, expected an int from {low} to {high}")
        if self.side_bits > 8:
            raise ValueError(
                f"gamma_bits + guard_bits is {self.gamma_bits} + {self.guard_bits} = "
                f"{self.side_bits}, but at most 8 bits per activation are kept; "
                f"take guard_bits <= {8 - self.gamma_bits}"
            )

    @property
    def limit(self) -> float:
        """|x| that a state cannot reach, 2^(31-l): what does is NaN."""
        return 2.0 ** (31 - self.frac_bits)

    def reverses(self, gamma: Any) -> Any:
        """Where |gamma| is 2^-p, p from 1 to gamma_bits: bools, of a NumPy array NumPy's."""
        return reduce(or_, (abs(gamma) == 2.0**-p for p in range(1, self.gamma_bits + 1)))

    def narrow(self, largest: float) -> str:
        """What to say of states that reach `largest`; "" with room for eight times as much."""
        if 8 * largest < self.limit:
            return ""
        reach = f"reach {largest:.3g}" if largest < self.limit else "are NaN or beyond that"
        return (
            f"; frac_bits={self.frac_bits} has room for states up to {self.limit:.3g}, and they "
            f"{reach}: lower frac_bits, or scale x down"
        )

    @property
    def side_bits(self) -> int:
        """Bits kept per activation and block, p + g."""
        return self.gamma_bits + self.guard_bits

    @property
    def drift_bound(self) -> float:
        """Quanta by which the value before rounding may differ between forward and rebuild.

        2^(g-1) - 1/2 for g >= 1. With g = 0 nothing is promised: any difference may
        flip a rounding.
        """
        return max(0.0, 2.0 ** (self.guard_bits - 1) - 0.5)


def to_quanta(x: jax.Array, fixed_point: FixedPoint) -> jax.Array:
    """x * 2^frac_bits in float32, before rounding. Exact short of overflow."""
    return x.astype(jnp.float32) * jnp.float32(2.0**fixed_point.frac_bits)


def round_to_int(quanta: jax.Array) -> jax.Array:
    """The nearest int32, ties to even; NaN, infinities and overflow become `INVALID`."""
    fits = jnp.abs(quanta) < jnp.float32(2.0**31)
    return jnp.where(fits, jnp.round(quanta), jnp.float32(INVALID)).astype(jnp.int32)


def add_or_invalid(a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b in int32; `INVALID` where the sum overflows or a or b is `INVALID`."""
    total = a + b
    overflows = ((a ^ total) & (b ^ total)) < 0
    invalid = overflows | (a == INVALID) | (b == INVALID)
    return jnp.where(invalid, jnp.int32(INVALID), total)


def quantize(x: jax.Array, fixed_point: FixedPoint) -> jax.Array:
    """n = round(x 2^l), the paper's Q_l.

    Args:
        x: float array of any shape.
        fixed_point: the format.

    Returns:
        int32, same shape. Elements that are not finite or reach 2^(31-l) are marked
        invalid and come back from `dequantize` as NaN.
    """
    return round_to_int(to_quanta(x, fixed_point))


def dequantize(n: jax.Array, fixed_point: FixedPoint) -> jax.Array:
    """x = n 2^-l in float32: exact for |n| <= 2^24, to float32 rounding above; NaN if invalid."""
    x = n.astype(jnp.float32) * jnp.float32(2.0**-fixed_point.frac_bits)
    return jnp.where(n == INVALID, jnp.nan, x)


def straight_through(y: jax.Array, value: jax.Array) -> jax.Array:
    """`value` going forward, the derivative of `y` going back: d round(y)/dy = 1."""
    return jax.lax.stop_gradient(value) + (y - jax.lax.stop_gradient(y))


def pack_bits(values: jax.Array, num_bits: int) -> jax.Array:
    """The low `num_bits` bits of every element, 8 elements to `num_bits` bytes.

    The last axis is packed where 8 divides it, so that the result is laid out (and can
    be sharded) like the state; otherwise all axes but the first are flattened and padded.

    Args:
        values: integers [B, ...], any trailing shape.
        num_bits: 1 to 8.

    Returns:
        uint8 [B, num_bits, ..., D / 8], or [B, num_bits, ceil(N / 8)] when flattened. (Bits not
        last but one: a TPU's tiles would pad them there.)
    """
    rows = _as_rows(values)
    lanes = rows.reshape(*rows.shape[:-1], 8, rows.shape[-1] // 8)[:, None]
    planes = _along(1, num_bits, values.dtype, lanes.ndim)
    position = _along(lanes.ndim - 2, 8, values.dtype, lanes.ndim)
    bits = ((lanes >> planes) & 1) << position
    return jnp.sum(bits, axis=-2, dtype=values.dtype).astype(jnp.uint8)


def unpack_bits(packed: jax.Array, num_bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack_bits`: int32 of the given shape, values from 0 to 2^num_bits - 1."""
    ndim = packed.ndim + 1
    position = _along(ndim - 2, 8, jnp.uint8, ndim)
    bits = ((packed[..., None, :] >> position) & 1).astype(jnp.int32)
    planes = _along(1, num_bits, jnp.int32, ndim)
    lanes = jnp.sum(bits << planes, axis=1, dtype=jnp.int32)
    rows = lanes.reshape(*lanes.shape[:-2], lanes.shape[-2] * lanes.shape[-1])
    if rows.shape == shape:
        return rows
    return rows[:, : math.prod(shape[1:])].reshape(shape)


def _along(axis: int, size: int, dtype: Any, ndim: int) -> jax.Array:
    """0 .. size-1 along `axis` of `ndim` axes."""
    return jnp.arange(size, dtype=dtype).reshape([size if i == axis else 1 for i in range(ndim)])


def _as_rows(values: jax.Array) -> jax.Array:
    """`values` with a last axis divisible by 8: as it is, or flattened per sample and padded."""
    if values.ndim > 1 and values.shape[-1] % 8 == 0:
        return values
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    return jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % 8)))
