"""audit against blocks whose second evaluation is off by a known amount."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import (
    GRAD_TOLERANCE,
    assert_grads_close,
    make_case,
    perturb,
    round_trip_mismatches,
    tanh_block,
)

import bdia_jax as bdia
from bdia_jax import FixedPoint
from bdia_jax.audit import _suggest

full = functools.partial(pytest.param, marks=pytest.mark.full)


def eps_for(drift, fixed_point):
    """The error of h that moves the value before rounding by `drift` quanta where sigma = 1."""
    return drift / (1 + 2.0**-fixed_point.gamma_bits) * 2.0**-fixed_point.frac_bits


def audit_drifting(fixed_point, drift, depth=4, shape=(8, 16, 13)):
    params, x0, gamma = make_case(depth, shape, magnitude=2.0**-fixed_point.gamma_bits)
    params["eps"] = jnp.full(depth, eps_for(drift, fixed_point))
    return bdia.audit(perturb(tanh_block), params, x0, gamma, fixed_point=fixed_point)


@pytest.mark.claim("an inexact rebuild is seen by audit")
@pytest.mark.parametrize(
    ("guard_bits", "gamma_bits"),
    [(1, 1), *(full(*bits) for bits in ((2, 1), (2, 2), (3, 1), (3, 2), (4, 2)))],
)
def test_exact_just_below_the_bound_and_not_above(guard_bits, gamma_bits):
    fp = FixedPoint(guard_bits=guard_bits, gamma_bits=gamma_bits)
    below = audit_drifting(fp, fp.drift_bound - 0.02)
    assert below.exact, below
    assert below.corrections.sum() > 0
    np.testing.assert_allclose(below.drift, fp.drift_bound - 0.02, atol=0.01)
    assert np.all(below.margin > 0)
    above = audit_drifting(fp, fp.drift_bound + 0.2)
    assert not above.exact and above.mismatches[0] > 0 and above.x0_mismatches > 0
    assert abs(above.max_drift - (fp.drift_bound + 0.2)) < 0.01  # of a sound rebuild
    assert above.suggested_guard_bits > guard_bits


@pytest.mark.full
@pytest.mark.parametrize("gamma_bits", [1, 2])
def test_without_guard_bits_the_drift_that_one_absorbs_corrupts(gamma_bits):
    fp = FixedPoint(guard_bits=0, gamma_bits=gamma_bits)
    audit = audit_drifting(fp, 0.45)
    assert not audit.exact and not audit.corrections.any()
    assert audit.mismatches[-1] > 100
    assert "NOT EXACT" in str(audit)
    assert audit.suggested_guard_bits == 2
    assert audit_drifting(FixedPoint(guard_bits=1, gamma_bits=gamma_bits), 0.45).exact


@pytest.mark.full
def test_errors_multiply_on_the_way_down():
    audit = audit_drifting(FixedPoint(guard_bits=0), 0.1, depth=24)
    wrong = audit.mismatches / audit.elements
    assert wrong[-1] < 0.2 and wrong[0] > 0.9  # entry 0 is x_0, rebuilt last


@pytest.mark.parametrize("frac_bits", [full(0), 12])
def test_drift_is_measured_in_quanta(frac_bits):
    audit = audit_drifting(FixedPoint(frac_bits=frac_bits, guard_bits=3), 1.25)
    assert audit.exact
    np.testing.assert_allclose(audit.drift, 1.25, atol=0.05)
    assert audit.max_drift == audit.drift.max()
    assert audit.suggested_guard_bits == 3


@pytest.mark.parametrize("drift, suggested", [(0.2, 1), (0.45, 2), (30.0, 7)])
def test_suggested_guard_bits_leave_room_for_twice_the_drift(drift, suggested):
    audit = audit_drifting(FixedPoint(guard_bits=7), drift)
    assert audit.suggested_guard_bits == suggested
    assert FixedPoint(guard_bits=suggested).drift_bound >= 2 * drift
    assert FixedPoint(guard_bits=suggested - 1).drift_bound < 2 * drift


def test_no_number_of_guard_bits_is_suggested_if_none_fits():
    audit = audit_drifting(FixedPoint(guard_bits=1), 300.0)
    assert not audit.exact and audit.suggested_guard_bits is None
    assert "none fits" in str(audit)


@pytest.mark.control("an inexact rebuild is seen by audit")
def test_a_sound_block_shows_no_drift_and_needs_no_guard():
    case = make_case(6, (4, 5, 13))
    audit = bdia.audit(tanh_block, *case)
    assert audit.exact and audit.max_drift == 0 and audit.suggested_guard_bits == 0
    assert not audit.corrections.any()
    assert audit.elements == 4 * 5 * 13
    assert str(audit).startswith("exact with FixedPoint")


def test_states_that_are_no_numbers_are_counted_and_not_exact():
    params, x0, gamma = make_case(6, (4, 5))
    audit = bdia.audit(tanh_block, params, x0.at[1, 2].set(np.nan), gamma)
    assert not audit.exact and audit.invalid >= 1


@pytest.mark.full
@pytest.mark.claim("gradients equal store's")
@pytest.mark.control("gradients equal store's")
def test_the_audit_agrees_with_training_about_the_gradients():
    # reversible gradients use the rebuilt states: with a drift below the bound they are
    # those of the undisturbed block, above it they are not
    params, x0, gamma = make_case(12, (4, 5, 13))
    params = {name: params[name] for name in ("w", "b")}

    def gradient(eps, guard_bits, backprop="reversible"):
        fp = FixedPoint(guard_bits=guard_bits)
        block, own = perturb(tanh_block) if eps else tanh_block, params | {"eps": jnp.full(12, eps)}
        loss = lambda x0: jnp.sum(  # noqa: E731
            jnp.sin(bdia.bdia_scan(block, own, x0, gamma, fixed_point=fp, backprop=backprop))
        )
        return jax.jit(jax.grad(loss))(x0)

    eps = eps_for(1.3, FixedPoint())
    expected = gradient(0.0, 2, "store")
    assert_grads_close(gradient(eps, 2), expected, GRAD_TOLERANCE[jnp.dtype(jnp.float32)])
    with pytest.raises(AssertionError, match="relative error"):
        assert_grads_close(gradient(eps, 0), expected, GRAD_TOLERANCE[jnp.dtype(jnp.float32)])


def test_audit_of_aux_and_consts():
    params, x0, gamma = make_case(5, (4, 13))

    def block(params, x, shift, mask):
        h = jnp.where(mask, tanh_block(params, x) + shift, 0.0)
        return h, {"norm": jnp.sum(h**2, -1), "count": jnp.sum(mask)}

    consts = (jnp.ones(13), jnp.arange(13) > 3)
    assert bdia.audit(block, params, x0, gamma, *consts, has_aux=True).exact


def test_without_gamma_there_is_nothing_to_audit():
    params, x0, _ = make_case(3, (4, 5))
    with pytest.raises(ValueError, match=r"gamma is None.*sample_gamma"):
        bdia.audit(tanh_block, params, x0, None)


def test_audit_under_a_transformation_is_refused():
    params, x0, gamma = make_case(3, (4, 5))
    measure = lambda x0: bdia.audit(tanh_block, params, x0, gamma).max_drift  # noqa: E731
    for call in (lambda: jax.jit(measure)(x0), lambda: jax.vmap(measure)(x0[None])):
        with pytest.raises(ValueError, match="outside jit"):
            call()


def test_the_audit_of_one_block_finds_nothing_wrong():
    audit = bdia.audit(tanh_block, *make_case(1, (4, 5)))
    assert audit.exact and audit.mismatches.shape == (0,) and audit.max_drift == 0


def test_the_perturbed_block_is_undisturbed_outside_differentiation():
    # what the tests above rest on: two plain evaluations agree
    params, x0, gamma = make_case(4, (4, 5, 13))
    params["eps"] = jnp.full(4, 0.1)
    fp = FixedPoint(guard_bits=0)
    assert not np.any(round_trip_mismatches(perturb(tanh_block), params, x0, gamma, fp))


@pytest.mark.parametrize(
    ("max_drift", "h_spacing", "guard_bits"),
    [(0.0, 4.0, 0), (0.001, 0.001, 1), (0.001, 4.0, 4), (10.0, 0.0, 6), (100.0, 0.0, None)],
)
def test_room_for_twice_the_drift_and_for_one_rounding_of_h(max_drift, h_spacing, guard_bits):
    """(1 + |gamma|) 4 quanta are within the bound of four guard bits, 7.5, not of three, 3.5."""
    assert _suggest(max_drift, h_spacing, FixedPoint()) == guard_bits


@pytest.mark.parametrize("dtype", [full(jnp.float32), jnp.bfloat16])
def test_the_spacing_of_h_is_that_of_its_dtype_at_its_largest(dtype):
    block = lambda params, x: jnp.clip(x, -0.75, 0.75).astype(dtype)  # noqa: E731
    found = bdia.audit(block, *make_case(3, (4, 8)))
    assert found.h_spacing == 0.5 * float(jnp.finfo(dtype).eps) * 2**9


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_states_near_the_end_of_the_format_are_told(scale):
    params, x0, gamma = make_case(3, (2, 4))
    found = bdia.audit(tanh_block, params, x0.at[0, 0].set(scale * 2.0**20), gamma)
    assert found.exact and found.largest == pytest.approx(scale * 2.0**20, rel=0.01)
    said = "frac_bits=9 has room for states up to 4.19e+06, and they reach 1.05e+06"
    assert (said in str(found)) == (scale == 1)
    beyond = bdia.audit(tanh_block, params, x0.at[0, 0].set(5e6), gamma)
    assert "they are NaN or beyond that: lower frac_bits" in str(beyond)
    assert "return h in float32" not in str(beyond)
