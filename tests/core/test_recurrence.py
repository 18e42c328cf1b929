"""`step` against eq. 21 in whole-number arithmetic, and `inverse_step` against `step`."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdia_jax import FixedPoint, sample_gamma
from bdia_jax.fixed_point import dequantize
from bdia_jax.recurrence import (
    inverse_step,
    mix,
    plain_step,
    rounded_mix,
    step,
    step_any_gamma,
)

INVALID = -(2**31)
step_jit = jax.jit(step, static_argnums=4)
inverse_jit = jax.jit(inverse_step, static_argnums=5)


def random_states(seed, size, reach=2**20):
    """(n_prev, n, h, sigma)."""
    rng = np.random.default_rng(seed)
    n_prev, n = rng.integers(-reach, reach, size=(2, size)).astype(np.int32)
    h = rng.normal(scale=3, size=size).astype(np.float32)
    return n_prev, n, h, rng.choice([-1, 1], size=size).astype(np.float32)


def all_formats(max_guard=3):
    return [FixedPoint(gamma_bits=p, guard_bits=g) for p in (1, 2, 3) for g in range(max_guard + 1)]


# --- gamma ---------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [0.0, 0.125, 0.5, 0.6, 1.0])
def test_sample_gamma_is_plus_or_minus_the_magnitude_with_row_zero_zero(key, magnitude):
    gamma = np.asarray(sample_gamma(key, 40, 50, magnitude))
    assert gamma.dtype == np.float32 and gamma.shape == (40, 50)
    assert np.all(gamma[0] == 0)
    assert np.all(np.abs(gamma[1:]) == np.float32(magnitude))


def test_signs_are_fair_and_independent_by_block_and_sample(key):
    signs = np.sign(np.asarray(sample_gamma(key, 101, 100)))[1:]
    assert abs(signs.mean()) < 0.05
    assert abs(np.mean(signs[1:] * signs[:-1])) < 0.05
    assert abs(np.mean(signs[:, 1:] * signs[:, :-1])) < 0.05


def test_sample_gamma_is_a_function_of_its_key(key):
    same, other = sample_gamma(key, 5, 9), sample_gamma(jax.random.key(1), 5, 9)
    np.testing.assert_array_equal(sample_gamma(key, 5, 9), same)
    assert np.any(np.asarray(other) != np.asarray(same))


@pytest.mark.parametrize(
    "args, message",
    [
        ((0, 4), "depth is 0"),
        ((4, -1), "batch_size -1"),
        ((4, 4, -0.5), "magnitude is -0.5, expected a number from 0 to 1"),
        ((4, 4, 2.0), "magnitude is 2.0"),
    ],
)
def test_sample_gamma_refuses(key, args, message):
    with pytest.raises(ValueError, match=message):
        sample_gamma(key, *args)


# --- step ----------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_point", all_formats(max_guard=1), ids=str)
def test_step_is_eq_21_in_whole_numbers(fixed_point):
    p, bits = fixed_point.gamma_bits, fixed_point.side_bits
    n_prev, n, h, sigma = random_states(p, 999)
    gamma = sigma * np.float32(2.0**-p)
    n_next, side, rounding = step_jit(n_prev, n, h, gamma, fixed_point)
    for i in range(n.size):
        e = -int(n_prev[i]) % 2**p  # eq. 20
        assert (int(n_prev[i]) + e) % 2**p == 0
        q = int(rounding.q[i])
        assert int(n_next[i]) == int(sigma[i]) * ((int(n_prev[i]) + e) // 2**p) + q
        assert int(side[i]) == int(n_prev[i]) % 2**bits
    np.testing.assert_array_equal(rounding.q, np.rint(exact_mix(n, h, gamma)))


def exact_mix(n, h, gamma):
    """(1 - gamma) x + (1 + gamma) h in quanta of 2^-9, in float64: exact."""
    n, h, gamma = (np.asarray(each, np.float64) for each in (n, h * 2.0**9, gamma))
    return (1 - gamma) * n + (1 + gamma) * h


def value_of(rounding):
    return np.float64(rounding.q) + np.float64(rounding.rest)


@pytest.mark.claim("what is rounded is exact")
@pytest.mark.control("what is rounded is exact")
@pytest.mark.parametrize("sizes", [(20, 2), (26, 8), (29, 20), (2, 29)], ids=str)
@pytest.mark.parametrize("gamma_bits", [1, 3])
def test_what_is_rounded_is_exact_at_every_magnitude(gamma_bits, sizes):
    """log2 of the quanta that n and h reach; ties, of which whole h makes many, go to even."""
    rng = np.random.default_rng(0)
    n, whole = (rng.integers(-(2**s), 2**s, size=20000).astype(np.int32) for s in sizes)
    quanta = np.float32(whole + rng.choice([0, 0.5, 0.123], size=whole.size))
    gamma = rng.choice([-1, 0, 1], size=n.size).astype(np.float32) * np.float32(2.0**-gamma_bits)
    fixed_point = FixedPoint(gamma_bits=gamma_bits)
    rounding = jax.jit(rounded_mix, static_argnums=3)(n, quanta / 512, gamma, fixed_point)
    exact = exact_mix(n, quanta / 512, gamma)
    assert np.abs(value_of(rounding) - exact).max() < 2.0**-22
    assert np.abs(rounding.rest).max() <= 0.5
    near_tie = np.abs(np.abs(rounding.rest) - 0.5) < 2.0**-22
    is_tie = exact - np.floor(exact) == 0.5
    sure = ~near_tie | is_tie
    np.testing.assert_array_equal(np.asarray(rounding.q)[sure], np.rint(exact)[sure])
    assert is_tie.sum() > 500 and sure.mean() > 0.99
    # the control: the same sum in float32, which is off by a whole quantum where n or h is large
    in_floats = jax.jit(mix)(n.astype(np.float32), quanta, gamma)
    assert (np.abs(in_floats - exact).max() > 0.9) == (max(sizes) > 24)


def test_the_first_block_is_the_plain_step_and_forgets_n_prev():
    n_prev, n, h, _ = random_states(0, 999)
    fp = FixedPoint()
    n_next, _, _ = step_jit(n_prev, n, h, np.float32(0), fp)
    np.testing.assert_array_equal(n_next, np.rint(n + h * 2.0**9))
    np.testing.assert_array_equal(n_next, jax.jit(plain_step, static_argnums=2)(n, h, fp))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**22])
def test_a_block_that_returns_no_number_marks_its_element_and_no_other(bad):
    n_prev, n, h, sigma = random_states(0, 8)
    expected, _, _ = step_jit(n_prev, n, h, 0.5 * sigma, FixedPoint())
    h_bad = np.where(np.arange(8) == 3, np.float32(bad), h)
    n_next, _, _ = step_jit(n_prev, n, h_bad, 0.5 * sigma, FixedPoint())
    assert n_next[3] == INVALID and np.isnan(dequantize(n_next, FixedPoint())[3])
    others = np.arange(8) != 3
    np.testing.assert_array_equal(np.asarray(n_next)[others], np.asarray(expected)[others])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_state_that_leaves_int32_is_marked_though_every_term_fits(sign):
    fp = FixedPoint()
    n_prev, n = (np.array([sign * (2**31 - 2**8)], np.int32),) * 2
    h = np.array([sign * 2.0**21], np.float32)  # 1.5 h + 0.5 x + 0.5 x_prev > 2^22
    n_next, _, rounding = step_jit(n_prev, n * 0, h, np.float32([0.5]), fp)
    assert abs(float(rounding.q[0])) < 2**31 - 1
    assert n_next[0] == INVALID


# --- the inverse ---------------------------------------------------------------------


@pytest.mark.claim("a step is undone to the bit")
@pytest.mark.parametrize("fixed_point", all_formats(), ids=str)
@pytest.mark.parametrize("reach", [2**10, 2**28])
def test_inverse_step_undoes_step(fixed_point, reach):
    n_prev, n, h, sigma = random_states(1, 4096, reach)
    gamma = sigma * np.float32(2.0**-fixed_point.gamma_bits)
    n_next, side, rounding = step_jit(n_prev, n, h, gamma, fixed_point)
    rebuilt, correction, again = inverse_jit(n_next, n, h, gamma, side, fixed_point)
    np.testing.assert_array_equal(rebuilt, n_prev)
    np.testing.assert_array_equal(value_of(again), value_of(rounding))
    assert not np.any(correction)


@pytest.mark.control("a step is undone to the bit")
@pytest.mark.parametrize("fixed_point", all_formats(), ids=str)
def test_without_the_side_bits_step_cannot_be_undone(fixed_point):
    n_prev, n, h, sigma = random_states(2, 4096)
    gamma = sigma * np.float32(2.0**-fixed_point.gamma_bits)
    n_next, side, _ = step_jit(n_prev, n, h, gamma, fixed_point)
    rebuilt, _, _ = inverse_jit(n_next, n, h, gamma, 0 * side, fixed_point)
    # right only where the low bits happened to be zero
    right = np.asarray(rebuilt) == n_prev
    np.testing.assert_array_equal(right, np.asarray(side) == 0)
    assert right.mean() < 0.6


@pytest.mark.control("a step is undone to the bit")
@pytest.mark.parametrize("magnitude", [0.5, 0.25])
def test_plain_floats_cannot_be_undone(magnitude):
    rng = np.random.default_rng(3)
    x_prev, x, h = rng.normal(size=(3, 4096)).astype(np.float32)
    gamma = rng.choice([-magnitude, magnitude], size=4096).astype(np.float32)
    x_next = gamma * x_prev + mix(x, h, gamma)
    rebuilt = (x_next - mix(x, h, gamma)) / gamma  # eq. 10 solved for x_{k-1}
    np.testing.assert_allclose(rebuilt, x_prev, atol=1e-5)
    assert np.mean(rebuilt != x_prev) > 0.2


def test_two_hundred_random_steps_are_undone_and_one_flipped_side_bit_is_not():
    fp, size = FixedPoint(), 257
    rng = np.random.default_rng(4)
    h = rng.normal(size=(200, size)).astype(np.float32)
    gamma = rng.choice([-0.5, 0.5], size=(200, size)).astype(np.float32)
    start = tuple(rng.integers(-(2**12), 2**12, size=(2, size)).astype(np.int32))

    def forward(carry, inputs):
        n_next, side, _ = step(*carry, *inputs, fp)
        return (carry[1], n_next), side

    def back(carry, inputs):
        n, n_next = carry
        return (inverse_step(n_next, n, *inputs, fp)[0], n), None

    last, side = jax.jit(lambda: jax.lax.scan(forward, start, (h, gamma)))()
    undo = jax.jit(lambda side: jax.lax.scan(back, last, (h, gamma, side), reverse=True)[0])
    np.testing.assert_array_equal(undo(side), start)
    assert np.any(np.asarray(undo(side.at[100, 5].set(side[100, 5] ^ 1)))[:, 5] != start[1][5])


# --- the guard -----------------------------------------------------------------------


def drifted_rebuild(fixed_point, drift, seed=5, size=20000, reach=2**11):
    """(wrong, correction, roundings that flipped) when h comes back off by `drift` quanta."""
    n_prev, n, h, sigma = random_states(seed, size, reach)
    gamma = sigma * np.float32(2.0**-fixed_point.gamma_bits)
    n_next, side, rounding = step_jit(n_prev, n, h, gamma, fixed_point)
    direction = np.random.default_rng(seed).choice([-1.0, 1.0], size=size)
    h_again = h + (direction * drift / (1 + gamma) * 2.0**-fixed_point.frac_bits).astype(np.float32)
    rebuilt, correction, again = inverse_jit(n_next, n, h_again, gamma, side, fixed_point)
    np.testing.assert_allclose(np.abs(value_of(again) - value_of(rounding)), drift, atol=0.01)
    flips = np.asarray(rounding.q) - again.q
    return np.asarray(rebuilt) != n_prev, np.asarray(correction), flips


@pytest.mark.claim("the guard absorbs a drift below its bound")
@pytest.mark.control("the guard absorbs a drift below its bound")
@pytest.mark.parametrize("gamma_bits", [1, 2, 3])
@pytest.mark.parametrize("guard_bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "reach",
    [2**11, 2**29, *(pytest.param(each, marks=pytest.mark.full) for each in (2**20, 2**25))],
    ids="{:.0e}".format,
)
def test_the_guard_is_exact_up_to_its_bound_and_fails_above_it(guard_bits, gamma_bits, reach):
    fp = FixedPoint(guard_bits=guard_bits, gamma_bits=gamma_bits)
    wrong, correction, flips = drifted_rebuild(fp, fp.drift_bound - 0.02, reach=reach)
    assert not wrong.any()
    np.testing.assert_array_equal(correction, flips)  # it put back every flip, and only those
    assert flips.any()
    wrong, _, _ = drifted_rebuild(fp, fp.drift_bound + 0.05, reach=reach)
    assert wrong.any()


@pytest.mark.parametrize("gamma_bits", [1, 2])
def test_without_guard_bits_a_tiny_drift_corrupts(gamma_bits):
    wrong, correction, flips = drifted_rebuild(FixedPoint(guard_bits=0, gamma_bits=gamma_bits), 0.1)
    np.testing.assert_array_equal(wrong, flips != 0)
    assert 0.05 < wrong.mean() < 0.15
    assert not correction.any()


@pytest.mark.full
@settings(max_examples=15)
@given(
    gamma_bits=st.integers(1, 3),
    guard_bits=st.integers(1, 5),
    share=st.floats(0, 0.95),
    seed=st.integers(0, 2**16),
)
def test_any_drift_below_the_bound_is_absorbed(gamma_bits, guard_bits, share, seed):
    fp = FixedPoint(gamma_bits=gamma_bits, guard_bits=guard_bits)
    wrong, _, _ = drifted_rebuild(fp, share * fp.drift_bound, seed, size=512)
    assert not wrong.any()


# --- gamma of any magnitude ----------------------------------------------------------


@pytest.mark.parametrize("gamma_bits", [1, 2, 3])
def test_step_any_gamma_is_step_for_a_magnitude_that_can_be_undone(gamma_bits):
    fp = FixedPoint(gamma_bits=gamma_bits)
    n_prev, n, h, sigma = random_states(6, 999)
    gamma = np.where(np.arange(999) < 99, 0, sigma * 2.0**-gamma_bits).astype(np.float32)
    any_jit = jax.jit(step_any_gamma, static_argnums=4)
    np.testing.assert_array_equal(
        any_jit(n_prev, n, h, gamma, fp), step_jit(n_prev, n, h, gamma, fp)[0]
    )


def test_step_any_gamma_rounds_the_history_for_any_other():
    fp = FixedPoint()
    n_prev, n, h, sigma = random_states(7, 999, reach=2**12)
    gamma = (0.6 * sigma).astype(np.float32)
    n_next = jax.jit(step_any_gamma, static_argnums=4)(n_prev, n, h, gamma, fp)
    exact = gamma * np.float64(n_prev) + 2.0**9 * mix(n * 2.0**-9, np.float64(h), gamma)
    assert np.max(np.abs(n_next - exact)) <= 1.01  # two roundings


@pytest.mark.parametrize("n_prev, h", [(100, 2.0**-14), (-100, -(2.0**-14))])
def test_step_any_gamma_marks_a_history_that_overflows(n_prev, h):
    # gamma n_{k-1} alone leaves int32 (4 x 100 > 2^7), the other term has the same sign
    fp = FixedPoint(frac_bits=24)
    n_prev = np.array([n_prev * 2**24], np.int32)
    n_next = step_any_gamma(n_prev, n_prev * 0, np.float32([h]), np.float32([4.0]), fp)
    assert n_next[0] == INVALID
