from functools import cache

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

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
# The states are rebuilt inexactly by nature, so gradients agree for shallow stacks only:
# `test_gradients_are_lost_in_a_deep_stack` is the other side of it.
SHALLOW = 1e-3
SCHEMES = ["midpoint", "two_stream", "float_bdia"]


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
    """(params, x_prev, x, consts)."""
    keys = jax.random.split(jax.random.key(depth), 5)
    params = {
        "w": jax.random.normal(keys[0], (depth, 7, 7)) / 7**0.5,
        "v": jax.random.normal(keys[1], (depth, 7, 7)) / 7**0.5,
        "key": jax.random.split(keys[2], depth),
        "layer": jnp.arange(depth),
    }
    x_prev, x = jax.random.normal(keys[3], (2, batch, 5, 7))
    return params, x_prev, x, ({"s": jnp.linspace(-1.0, 1.0, 7)}, jnp.arange(7) % 2 == 0)


def coefficients(scheme, depth, batch=3):
    if scheme == "float_bdia":
        return float_bdia(bdia.sample_gamma(jax.random.key(9), depth, batch))
    return {"midpoint": midpoint, "two_stream": two_stream}[scheme](depth)


def drop_aux(block_fn):
    return lambda *args: block_fn(*args)[0]


# --- forward -------------------------------------------------------------------------


def by_hand(scheme, depth):
    params, x_prev, x, consts = case(depth)
    params_of = [jax.tree.map(lambda leaf, k=k: leaf[k], params) for k in range(depth)]
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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_forward_is_the_recurrence_written_out(scheme):
    params, x_prev, x, consts = case(4)

    @jax.jit
    def both():
        run = lambda backprop: float_scan(  # noqa: E731
            functions(scheme), params, x_prev, x, coefficients(scheme, 4), *consts,
            backprop=backprop, has_aux=True,
        )  # fmt: skip
        return run("reversible"), run("store"), by_hand(scheme, 4)

    (states, aux), (stored, _), expected = both()
    for actual, other, e in zip(states, stored, expected, strict=True):
        np.testing.assert_allclose(actual, e, atol=1e-5)
        np.testing.assert_allclose(other, e, atol=1e-5)
    assert len(aux) == len(functions(scheme))
    np.testing.assert_array_equal(aux[-1]["layer"], np.arange(4))


# --- gradients -----------------------------------------------------------------------


def gradient(scheme, backprop, depth):
    """By w, v, x_prev, x and shift, of a loss that sees both states and all aux."""
    params, x_prev, x, (shift, mask) = case(depth)

    def loss(floats, x_prev, x, shift):
        states, aux = float_scan(
            functions(scheme), params | floats, x_prev, x, coefficients(scheme, depth),
            shift, mask, backprop=backprop, has_aux=True,
        )  # fmt: skip
        weights = jnp.cos(jnp.arange(depth))
        powers = sum(jnp.sum(weights * a["power"]) for a in aux)
        return jnp.sum(jnp.sin(states[0])) + jnp.sum(jnp.cos(states[1])) + powers

    used = {"w": params["w"], "v": params["v"]} if scheme == "two_stream" else {"w": params["w"]}
    ct_floats, ct_x_prev, *rest = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(used, x_prev, x, shift)
    if scheme == "two_stream":
        return ct_floats, ct_x_prev, *rest
    assert not np.any(ct_x_prev)  # a_0 = 0: nothing comes from x_{-1}
    return ct_floats, *rest


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_gradient_is_close_to_plain_autodiff(scheme):
    assert_grads_close(gradient(scheme, "reversible", 4), gradient(scheme, "store", 4), SHALLOW)


def test_gradients_are_lost_in_a_deep_stack():
    exact, rebuilt = (gradient("float_bdia", b, 40)[0]["w"] for b in ("store", "reversible"))
    assert relative_error(rebuilt[-4:], exact[-4:]) < SHALLOW
    assert not relative_error(rebuilt[:4], exact[:4]) < 0.1


def test_a_first_step_without_history_divides_by_nothing():
    params, x_prev, x, _ = case(4)

    def loss(w, scheme):
        return jnp.sum(float_scan((lambda w, x: jnp.tanh(x @ w),), w, x_prev, x, scheme)[1])

    broken = jax.tree.map(jnp.asarray, midpoint(4))
    broken = broken._replace(a=broken.a.at[2].set(0.0))
    with jax.debug_infs(True):  # not under jit, which drops the unused x_{-1}
        assert np.all(np.isfinite(jax.grad(loss)(params["w"], midpoint(4))))
    assert not np.any(np.isfinite(jax.jit(jax.grad(loss))(params["w"], broken)[0]))


def test_leaves_without_gradient_get_float0_and_bfloat16_its_own():
    params, x_prev, x, consts = case(3)

    def loss(params, x, consts):
        scheme = two_stream(3)
        return float_scan((drop_aux(block),), params, x_prev, x, scheme, *consts)[1].sum()

    with pytest.raises(ValueError, match=r"a has shape \(6, 1\), expected \[3, 3\] or \[3, 1\]"):
        loss(params, x, consts)

    def loss(params, x, consts):
        ones = Coefficients(*np.ones((3, 3, 1), np.float32))
        return float_scan((drop_aux(block),), params, x_prev, x, ones, *consts)[1].sum()

    params_ = {name: leaf for name, leaf in params.items() if name != "key"}
    grad = jax.grad(lambda p, *rest: loss(p | {"key": params["key"]}, *rest), (0, 1, 2),
                    allow_int=True)  # fmt: skip
    ct_params, ct_x, ct_consts = grad(params_, x.astype(jnp.bfloat16), consts)
    assert ct_params["layer"].dtype == ct_consts[1].dtype == jax.dtypes.float0
    assert ct_x.dtype == jnp.bfloat16 and np.any(ct_params["w"]) and np.any(ct_consts[0]["s"])


def test_no_gradient_flows_into_the_coefficients():
    params, x_prev, x, consts = case(3)

    def loss(gamma, backprop):
        return jnp.sum(
            float_scan((drop_aux(block),), params, x_prev, x, float_bdia(gamma), *consts,
                       backprop=backprop)[1]
        )  # fmt: skip

    gamma = bdia.sample_gamma(jax.random.key(0), 3, 3)
    for backprop in ("reversible", "store"):
        assert not np.any(jax.grad(loss)(gamma, backprop))


def tanhs(scheme, backprop):
    params, x_prev, x, consts = case(3)
    fns = tuple(drop_aux(fn) for fn in functions(scheme))
    loss = lambda w: jnp.sum(  # noqa: E731
        float_scan(fns, params | {"w": w}, x_prev, x, coefficients(scheme, 3), *consts,
                   backprop=backprop)[1]
    )  # fmt: skip
    return str(jax.make_jaxpr(jax.grad(loss))(params["w"])).count("= tanh ")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_function_is_evaluated_once_on_the_way_back(scheme):
    assert tanhs(scheme, "reversible") == 2 * len(functions(scheme))
    assert tanhs(scheme, "store") == len(functions(scheme))


# --- memory --------------------------------------------------------------------------


def residual_bytes(scheme, backprop, depth):
    """What jax.vjp holds for the backward pass, beyond the parameters."""
    params, _, x, consts = case(depth)
    fns = tuple(drop_aux(fn) for fn in functions(scheme))

    def vjp(floats, x):
        def forward(floats, x):
            scheme_ = coefficients(scheme, depth)
            return float_scan(fns, params | floats, x, x, scheme_, *consts, backprop=backprop)

        return jax.vjp(forward, floats, x)[1]

    floats = {"w": params["w"], "v": params["v"]}
    leaves = jax.tree.leaves(jax.eval_shape(vjp, floats, x))
    held = jax.tree.leaves(floats)
    return sum(y.size * y.dtype.itemsize for y in leaves) - sum(y.size * 4 for y in held)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_residuals_do_not_grow_by_states(scheme):
    state = 4 * 3 * 5 * 7
    growth = residual_bytes(scheme, "reversible", 24) - residual_bytes(scheme, "reversible", 8)
    # coefficients, the key and the layer of a block, and nothing of a state's size
    assert 0 < growth / 16 < state / 4
    control = residual_bytes(scheme, "store", 24) - residual_bytes(scheme, "store", 8)
    assert control / 16 > state


# --- drift ---------------------------------------------------------------------------


def errors_of(scheme, depth=24):
    params, x_prev, x, consts = case(depth)
    return np.asarray(
        rebuild_errors(
            functions(scheme), params, x_prev, x, coefficients(scheme, depth), *consts,
            has_aux=True,
        )
    )  # fmt: skip


def test_float_bdia_drifts_and_fixed_point_does_not(optimized):
    errors = errors_of("float_bdia")
    assert errors.shape == (24,) and errors[-1] == 0
    assert np.all(errors[:-1] > 0)
    # gamma = +-1/2 doubles it with every block: measured over runs of five, on the way down
    assert np.all(errors[:20:5] > 4 * errors[4:24:5])
    params, _, x, consts = case(24)
    gamma = bdia.sample_gamma(jax.random.key(9), 24, 3)
    audit = bdia.audit(block, params, x, gamma, *consts, has_aux=True)
    assert audit.exact and not audit.mismatches.any()


@pytest.mark.parametrize("scheme", ["midpoint", "two_stream"])
def test_the_others_drift_less_but_do(scheme, optimized):
    errors = errors_of(scheme)
    assert np.sum(errors > 0) > 20
    assert errors.max() < 1e-3 < errors_of("float_bdia").max()


@pytest.mark.parametrize("scheme", ["midpoint", "two_stream"])
def test_there_is_no_drift_where_float_arithmetic_is_exact(scheme):
    params, _, x, _ = case(24)
    steps = lambda p, x: jnp.round(3 * jnp.sin(x))  # noqa: E731
    fns = (steps,) * len(functions(scheme))
    x = jnp.round(4 * x)
    assert not np.any(rebuild_errors(fns, params, x, x, coefficients(scheme, 24)))


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
)  # fmt: skip
def test_what_cannot_be_run_is_refused(change, message):
    params, x_prev, x, _ = case(3)
    options = {"backprop": "reversible"} | change
    arguments = {
        "block_fns": (lambda p, x: x @ p["w"],), "params": params, "x_prev": x_prev, "x": x,
        "coefficients": midpoint(3),
    } | {name: value for name, value in options.items() if name != "backprop"}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        float_scan(*arguments.values(), backprop=options["backprop"])


def test_store_takes_coefficients_that_cannot_be_undone():
    params, x_prev, x, _ = case(3)
    euler = float_bdia(np.zeros((3, 1), np.float32))
    _, y = float_scan((lambda p, x: 0 * x,), params, x_prev, x, euler, backprop="store")
    np.testing.assert_array_equal(y, x)
