import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import assert_same_bits

from bdia_jax import FixedPoint
from bdia_jax.fixed_point import (
    add_or_invalid,
    dequantize,
    pack_bits,
    quantize,
    round_to_int,
    straight_through,
    unpack_bits,
)

INVALID = -(2**31)
pack_jit = jax.jit(pack_bits, static_argnums=1)
unpack_jit = jax.jit(unpack_bits, static_argnums=(1, 2))


# --- the format ----------------------------------------------------------------------


def test_the_default_is_the_papers_l_with_one_guard_bit():
    fp = FixedPoint()
    assert (fp.frac_bits, fp.guard_bits, fp.gamma_bits, fp.side_bits) == (9, 1, 1, 2)


@pytest.mark.parametrize("guard_bits, bound", [(0, 0), (1, 0.5), (2, 1.5), (3, 3.5), (4, 7.5)])
def test_drift_bound_is_half_the_residue_range_less_half_a_quantum(guard_bits, bound):
    assert FixedPoint(guard_bits=guard_bits).drift_bound == bound


@pytest.mark.parametrize(
    "field, value",
    [
        ("frac_bits", 25),
        ("frac_bits", -17),
        ("guard_bits", -1),
        ("gamma_bits", 0),
        ("gamma_bits", 1.0),
        ("guard_bits", True),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}, expected an int from"):
        FixedPoint(**{field: value})


def test_more_than_eight_side_bits_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"3 \+ 6 = 9.*take guard_bits <= 5"):
        FixedPoint(gamma_bits=3, guard_bits=6)
    assert FixedPoint(gamma_bits=3, guard_bits=5).side_bits == 8


# --- quantize, dequantize ------------------------------------------------------------


@pytest.mark.parametrize("frac_bits", [-2, 0, 5, 9, 14])
def test_quantize_is_the_nearest_integer_ties_to_even(frac_bits):
    x = np.random.default_rng(0).normal(scale=30, size=999).astype(np.float32)
    n = jax.jit(quantize, static_argnums=1)(x, FixedPoint(frac_bits=frac_bits))
    np.testing.assert_array_equal(n, np.rint(x.astype(np.float64) * 2.0**frac_bits))


def test_ties_round_to_even():
    quanta = jnp.array([-1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(round_to_int(quanta), [-2, 0, 0, 2, 2])


@pytest.mark.parametrize("frac_bits", [-2, 0, 9])
def test_states_up_to_24_bits_survive_the_float_view(frac_bits):
    fp = FixedPoint(frac_bits=frac_bits)
    n = jnp.array([-(2**24), -12345, -1, 0, 1, 77, 2**24], jnp.int32)
    x = dequantize(n, fp)
    np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(n) * 2.0**-frac_bits)
    np.testing.assert_array_equal(quantize(x, fp), n)


@pytest.mark.parametrize("frac_bits", [0, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "limit", "-limit"])
def test_what_is_no_number_or_does_not_fit_comes_back_as_nan(frac_bits, bad):
    fp = FixedPoint(frac_bits=frac_bits)
    limit = 2.0 ** (31 - frac_bits)
    bad = {"limit": limit, "-limit": -limit}.get(bad, bad)
    n = quantize(jnp.array([1.0, bad, np.nextafter(np.float32(limit), np.float32(0))]), fp)
    assert n[1] == INVALID and n[2] == 2**31 - 128
    np.testing.assert_array_equal(np.isnan(dequantize(n, fp)), [False, True, False])


def test_a_sum_that_overflows_is_marked_and_every_other_is_exact():
    rng = np.random.default_rng(1)
    a, b = rng.integers(-(2**31), 2**31, size=(2, 4096)).astype(np.int32)
    a[:4], b[:4] = [2**31 - 1, 2**31 - 1, -(2**31) + 1, 5], [0, 1, -1, INVALID]
    true_sum = a.astype(np.int64) + b
    fits = (np.abs(true_sum) < 2**31) & (b != INVALID)
    assert 0 < fits.sum() < fits.size
    np.testing.assert_array_equal(add_or_invalid(a, b), np.where(fits, true_sum, INVALID))


def test_straight_through_has_the_value_of_one_and_the_derivative_of_the_other():
    y, value = jnp.array([0.3, 1.7]), jnp.array([0.0, 2.0])
    out, tangent = jax.jvp(straight_through, (y, value), (jnp.array([3.0, 4.0]), jnp.ones(2)))
    np.testing.assert_array_equal(out, value)
    np.testing.assert_array_equal(tangent, [3.0, 4.0])
    grads = jax.grad(lambda y, v: jnp.sum(straight_through(y, v)), (0, 1))(y, value)
    np.testing.assert_array_equal(grads, [[1, 1], [0, 0]])


# --- side bits -----------------------------------------------------------------------


SHAPES = [(4,), (1, 1), (3, 5), (2, 16), (2, 3, 7), (2, 2, 3, 8), (2, 0)]


@pytest.mark.parametrize(
    "num_bits, shape", [(n, (2, 3, 7)) for n in range(1, 9)] + [(3, shape) for shape in SHAPES]
)
def test_packing_loses_nothing_and_takes_exactly_the_bits_it_must(num_bits, shape):
    values = np.random.default_rng(num_bits).integers(-(2**31), 2**31, size=shape)
    values = values.astype(np.int32)
    packed = pack_jit(values, num_bits)
    per_sample = int(np.prod(shape[1:]))
    assert packed.dtype == jnp.uint8
    assert packed.size == shape[0] * num_bits * -(-per_sample // 8)
    unpacked = unpack_jit(packed, num_bits, shape)
    assert unpacked.dtype == jnp.int32
    np.testing.assert_array_equal(unpacked, values % 2**num_bits)


@pytest.mark.control("packed bits come back")
def test_packing_one_bit_too_few_loses_something():
    values = jnp.arange(64, dtype=jnp.int32).reshape(2, 32) % 8
    assert np.any(unpack_bits(pack_bits(values, 2), 2, values.shape) != values)


def test_packed_bits_are_laid_out_like_the_state_where_eight_divides_its_width():
    assert pack_bits(jnp.zeros((4, 6, 16), jnp.int32), 3).shape == (4, 3, 6, 2)
    assert pack_bits(jnp.zeros((4, 6, 5), jnp.int32), 3).shape == (4, 3, 4)


@pytest.mark.claim("packed bits come back")
@settings(max_examples=15)
@given(st.integers(1, 8), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_packing_round_trips_for_any_shape(num_bits, shape, seed):
    values = np.random.default_rng(seed).integers(0, 2**num_bits, size=shape).astype(np.int32)
    packed = pack_jit(values, num_bits)
    assert_same_bits(unpack_jit(packed, num_bits, tuple(shape)), values)
