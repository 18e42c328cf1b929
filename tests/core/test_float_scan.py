"""Reversible scans in floating point: the recurrence, its gradients, memory, and drift."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import assert_grads_close, relative_error

import bdia_jax as bdia
from bdia_jax.baselines.float_scan import (
    Coefficients,
    float_bdia,
    float_scan,
    midpoint,
    rebuild_errors,
    two_stream,
)

# tests of exactness ask for `optimized`
pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]
# The states are rebuilt inexactly by nature, so gradients agree for shallow stacks only:
# `test_control_gradients_are_lost_in_a_deep_stack` is the other side of it.
SHALLOW = 1e-3
SCHEMES = ["midpoint", "two_stream", "float_bdia"]
EVERY = pytest.mark.parametrize("scheme", SCHEMES)


def block(params, x, shift, mask):
    h = jnp.tanh(x @ params["w"] + shift["s"])
    bits = jax.random.key_data(params["key"])[-1]  # cheaper to compile than a random mask
    h = jnp.where(mask, h, 0.5 * h) * jnp.where(bits % 2 == 0, 1.0, 0.8)
    return h, {"power": jnp.mean(h**2), "layer": params["layer"]}


def second(params, x, shift, mask):
    h, aux = block(params | {"w": params["v"]}, x, shift, mask)
    return 0.5 * h, aux


def functions(scheme):
    return (block, second) if scheme == "two_stream" else (block,)


@cache
def case(depth, batch=3):
    """(floats, other params, x_prev, x, consts)."""
    generator = np.random.default_rng(depth)  # jax.random would compile for every shape
    normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    floats = {"w": normal(depth, 7, 7) / 7**0.5, "v": normal(depth, 7, 7) / 7**0.5}
    keys = generator.integers(2**32, size=(depth, 2), dtype=np.uint32)
    others = {"key": jax.random.wrap_key_data(jnp.asarray(keys)), "layer": jnp.arange(depth)}
    consts = {"s": jnp.linspace(-1.0, 1.0, 7)}, jnp.arange(7) % 2 == 0
    return floats, others, normal(batch, 5, 7), normal(batch, 5, 7), consts


def coefficients(scheme, depth, batch=3):
    if scheme == "float_bdia":
        return float_bdia(bdia.sample_gamma(jax.random.key(9), depth, batch))
    return {"midpoint": midpoint, "two_stream": two_stream}[scheme](depth)


def scan(scheme, floats, x_prev, x, shift, scan=float_scan, **options):
    """(states, aux) of the case as deep as floats."""
    depth = len(floats["w"])
    _, others, _, _, (_, mask) = case(depth)
    scheme_ = coefficients(scheme, depth)
    params = floats | others
    return scan(functions(scheme), params, x_prev, x, scheme_, shift, mask, has_aux=True, **options)


# --- forward -------------------------------------------------------------------------


def by_hand(scheme, depth):
    floats, others, x_prev, x, consts = case(depth)
    params_of = [jax.tree.map(lambda leaf, k=k: leaf[k], floats | others) for k in range(depth)]
    f, g = (lambda k, x, fn=fn: fn(params_of[k], x, *consts)[0] for fn in (block, second))
    if scheme == "two_stream":
        x1, x2 = x_prev, x
        for k in range(depth):
            x1 = x1 + f(k, x2)
            x2 = x2 + g(k, x1)
        return x1, x2
    if scheme == "midpoint":
        x_prev, x = x, x + f(0, x)
        for k in range(1, depth):
            x_prev, x = x, x_prev + 2 * f(k, x)
        return x_prev, x
    gamma = bdia.sample_gamma(jax.random.key(9), depth, 3)[:, :, None, None]
    for k in range(depth):
        x_prev, x = x, gamma[k] * x_prev + (1 - gamma[k]) * x + (1 + gamma[k]) * f(k, x)
    return x_prev, x


@EVERY
def test_the_forward_is_the_recurrence_written_out(scheme):
    floats, _, x_prev, x, (shift, _) = case(4)
    run = partial(scan, scheme, floats, x_prev, x, shift)
    both = jax.jit(lambda: (run(), run(backprop="store"), by_hand(scheme, 4)))
    (states, aux), (stored, _), expected = both()
    for actual, other, e in zip(states, stored, expected, strict=True):
        np.testing.assert_allclose(actual, e, atol=1e-5)
        np.testing.assert_allclose(other, e, atol=1e-5)
    assert len(aux) == len(functions(scheme))
    np.testing.assert_array_equal(aux[-1]["layer"], np.arange(4))


# --- gradients -----------------------------------------------------------------------


def gradient(scheme, backprop, depth):
    """By w, v, x_prev, x and shift, of a loss that sees both states and all aux."""
    floats, _, x_prev, x, (shift, _) = case(depth)

    def loss(used, x_prev, x, shift):
        states, aux = scan(scheme, floats | used, x_prev, x, shift, backprop=backprop)
        weights = jnp.cos(jnp.arange(depth))
        powers = sum(jnp.sum(weights * a["power"]) for a in aux)
        return jnp.sum(jnp.sin(states[0])) + jnp.sum(jnp.cos(states[1])) + powers

    used = floats if scheme == "two_stream" else {"w": floats["w"]}
    ct_floats, ct_x_prev, *rest = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(used, x_prev, x, shift)
    if scheme == "two_stream":
        return ct_floats, ct_x_prev, *rest
    assert not np.any(ct_x_prev)  # a_0 = 0: nothing comes from x_{-1}
    return ct_floats, *rest


@pytest.mark.claim("shallow float stacks have nearly store's gradients")
@EVERY
def test_every_gradient_is_close_to_plain_autodiff(scheme):
    assert_grads_close(gradient(scheme, "reversible", 4), gradient(scheme, "store", 4), SHALLOW)


@pytest.mark.control("shallow float stacks have nearly store's gradients")
def test_control_gradients_are_lost_in_a_deep_stack():
    exact, rebuilt = (gradient("float_bdia", b, 40)[0]["w"] for b in ("store", "reversible"))
    assert relative_error(rebuilt[-4:], exact[-4:]) < SHALLOW
    assert not relative_error(rebuilt[:4], exact[:4]) < 0.1


def tanh_layer(w, x):
    return jnp.tanh(x @ w)


def test_a_first_step_without_history_divides_by_nothing():
    floats, _, x_prev, x, _ = case(4)

    def gradient(scheme):
        loss = lambda w: jnp.sum(float_scan((tanh_layer,), w, x_prev, x, scheme)[1])  # noqa: E731
        return jax.grad(loss)(floats["w"])

    broken = jax.tree.map(jnp.asarray, midpoint(4))
    broken = broken._replace(a=broken.a.at[2].set(0.0))
    with jax.debug_infs(True):  # not under jit, which drops the unused x_{-1}
        assert np.all(np.isfinite(gradient(midpoint(4))))
    assert not np.any(np.isfinite(jax.jit(gradient)(broken)[0]))


def test_leaves_without_gradient_get_float0_and_bfloat16_its_own():
    floats, others, x_prev, x, consts = case(3)
    ones = Coefficients(*np.ones((3, 3, 1), np.float32))

    def loss(params, x, consts):
        params = params | {"key": others["key"]}
        whole = lambda *args: block(*args)[0]  # noqa: E731
        return float_scan((whole,), params, x_prev, x, ones, *consts)[1].sum()

    params = floats | {"layer": others["layer"]}
    grad = jax.grad(loss, (0, 1, 2), allow_int=True)
    ct_params, ct_x, ct_consts = grad(params, x.astype(jnp.bfloat16), consts)
    assert ct_params["layer"].dtype == ct_consts[1].dtype == jax.dtypes.float0
    assert ct_x.dtype == jnp.bfloat16 and np.any(ct_params["w"]) and np.any(ct_consts[0]["s"])


@pytest.mark.parametrize("backprop", ["reversible", "store"])
def test_no_gradient_flows_into_the_coefficients(backprop):
    floats, _, x_prev, x, _ = case(3)

    def loss(gamma):
        scheme = float_bdia(gamma)
        return jnp.sum(
            float_scan((tanh_layer,), floats["w"], x_prev, x, scheme, backprop=backprop)[1]
        )

    assert not np.any(jax.grad(loss)(bdia.sample_gamma(jax.random.key(0), 3, 3)))


@EVERY
def test_each_function_is_evaluated_once_on_the_way_back(scheme):
    floats, _, x_prev, x, (shift, _) = case(3)

    def tanhs(backprop):
        def loss(w):
            states, _ = scan(scheme, floats | {"w": w}, x_prev, x, shift, backprop=backprop)
            return jnp.sum(states[1])

        return str(jax.make_jaxpr(jax.grad(loss))(floats["w"])).count("= tanh ")

    assert tanhs("reversible") == 2 * len(functions(scheme))
    assert tanhs("store") == len(functions(scheme))


# --- memory --------------------------------------------------------------------------


@pytest.mark.claim("float stacks keep two states")
@pytest.mark.control("float stacks keep two states")
@EVERY
def test_the_residuals_do_not_grow_by_states(scheme):
    def held(backprop, depth):
        floats, _, _, x, (shift, _) = case(depth)
        loss = lambda floats, x: scan(scheme, floats, x, x, shift, backprop=backprop)[0]  # noqa: E731
        return sum(bdia.residual_bytes(loss, floats, x).values())

    state = 4 * 3 * 5 * 7
    growth = held("reversible", 24) - held("reversible", 8)
    # coefficients, the key and the layer of a block, and nothing of a state's size
    assert 0 < growth / 16 < state / 4
    stored = held("store", 24) - held("store", 8)
    assert stored / 16 > state


# --- drift ---------------------------------------------------------------------------


@cache
def errors_of(scheme, depth=24):
    floats, _, x_prev, x, (shift, _) = case(depth)
    return np.asarray(scan(scheme, floats, x_prev, x, shift, scan=rebuild_errors))


@pytest.mark.control("rebuild is exact")
def test_float_bdia_drifts_and_fixed_point_does_not(optimized):
    errors = errors_of("float_bdia")
    assert errors.shape == (24,) and errors[-1] == 0
    assert np.all(errors[:-1] > 0)
    # gamma = +-1/2 doubles it with every block: measured over runs of five, on the way down
    assert np.all(errors[:20:5] > 4 * errors[4:24:5])
    floats, others, _, x, consts = case(24)
    gamma = bdia.sample_gamma(jax.random.key(9), 24, 3)
    audit = bdia.audit(block, floats | others, x, gamma, *consts, has_aux=True)
    assert audit.exact and not audit.mismatches.any()


@pytest.mark.parametrize("scheme", ["midpoint", "two_stream"])
def test_the_others_drift_less_but_do(scheme, optimized):
    errors = errors_of(scheme)
    assert np.sum(errors > 0) > 20
    assert errors.max() < 1e-3 < errors_of("float_bdia").max()


@pytest.mark.parametrize("scheme", ["midpoint", "two_stream"])
def test_there_is_no_drift_where_float_arithmetic_is_exact(scheme):
    floats, _, _, x, _ = case(24)
    steps = lambda p, x: jnp.round(3 * jnp.sin(x))  # noqa: E731
    fns = (steps,) * len(functions(scheme))
    x = jnp.round(4 * x)
    assert not np.any(rebuild_errors(fns, floats, x, x, coefficients(scheme, 24)))


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backprop": "remat"}, "backprop is 'remat', expected one of reversible, store"),
        ({"block_fns": ()}, "block_fns is empty"),
        ({"x_prev": jnp.ones((2, 7))}, r"x_prev has shape \(2, 7\) and x \(3, 5, 7\)"),
        ({"coefficients": midpoint(4)}, r"a has shape \(4, 1\), expected \[3, 3\] or \[3, 1\]"),
        ({"coefficients": float_bdia(np.zeros((3, 1), np.float32))}, "a is 0 in step 1.*'store'"),
    ],
)
def test_what_cannot_be_run_is_refused(change, message):
    floats, _, x_prev, x, _ = case(3)
    arguments = {"block_fns": (tanh_layer,), "params": floats["w"], "x_prev": x_prev, "x": x}
    with pytest.raises(ValueError, match=message):
        float_scan(**({"coefficients": midpoint(3)} | arguments | change))


def test_store_takes_coefficients_that_cannot_be_undone():
    floats, _, x_prev, x, _ = case(3)
    euler = float_bdia(np.zeros((3, 1), np.float32))
    _, y = float_scan((lambda p, x: 0 * x,), floats, x_prev, x, euler, backprop="store")
    np.testing.assert_array_equal(y, x)
