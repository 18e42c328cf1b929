"""Every refusal names the offending value and the remedy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import make_case, tanh_block

from bdia_jax import FixedPoint, audit, bdia_scan

pytestmark = pytest.mark.usefixtures("quick_compile")
PARAMS, X0, GAMMA = make_case(3, (4, 5))


@pytest.mark.parametrize(
    "change, value, remedy",
    [
        ({"backprop": "revers"}, "'revers'", "reversible, store, remat"),
        ({"fixed_point": 9}, "fixed_point is 9", "FixedPoint(frac_bits=9"),
        ({"fixed_point": None}, "fixed_point=None", "backprop='store' or 'remat'"),
        ({"x0": X0.astype(jnp.float16)}, "float16", "x0.astype(jnp.float32)"),
        ({"x0": jnp.zeros((4, 5), int)}, "int32", "x0.astype(jnp.float32)"),
        ({"x0": jnp.float32(0)}, "shape ()", "[B, ..., D]"),
        ({"block_fn": None, "consts": (True,)}, "NoneType", "callable"),
        ({"params": {}}, "no array", "number of blocks is unknown"),
        ({"params": jax.tree.map(lambda leaf: leaf[:0], PARAMS)}, "K = 0", "one is needed"),
        ({"params": [{"w": jnp.ones((5, 5))}] * 3}, "a list of 3", "jnp.stack(leaves), *params"),
        ({"params": {k: {"w": jnp.ones((5, 5))} for k in "abc"}}, "a dict of 3", "*params.values"),
        ({"params": PARAMS | {"b": jnp.zeros(2)}}, "shape (2,)", "jax.vmap of the init"),
        ({"params": PARAMS | {"b": jnp.zeros(())}}, "shape ()", "jax.vmap of the init"),
        ({"params": PARAMS | {"act": "relu"}}, "params['act'] is 'relu'", "functools.partial"),
        ({"consts": (len,)}, "consts[0] is <built-in", "functools.partial"),
        ({"gamma": GAMMA[:, 0]}, "shape (3,)", "sample_gamma(key, 3, 4)"),
        ({"gamma": GAMMA[:2]}, "shape (2, 4)", "[K, B] = [3, 4]"),
        ({"gamma": GAMMA[:, :2]}, "shape (3, 2)", "[3, 1]"),
        ({"gamma": jnp.zeros((3, 4), int)}, "dtype int32", "use sample_gamma"),
        ({"gamma": GAMMA.at[0, 2].set(0.5)}, "gamma[0] contains 0.5", "use sample_gamma"),
        ({"gamma": GAMMA.at[2, 2].set(0.25)}, "contains 0.25", "FixedPoint(gamma_bits=p)"),
        ({"gamma": GAMMA.at[2, 2].set(0.0)}, "contains 0.0", "magnitude=0.5"),
        ({"gamma": GAMMA.at[1, 0].set(np.nan)}, "contains nan", "use sample_gamma"),
        ({"gamma": GAMMA.at[1, 0].set(np.inf), "backprop": "store"}, "contains inf", "finite"),
        ({"block_fn": lambda p, x: x[:, :2]}, "shape (4, 2)", "float array of that shape"),
        ({"block_fn": lambda p, x: x > 0}, "dtype bool", "float array of that shape"),
        ({"block_fn": lambda p, x: (x, x)}, "returned tuple", "has_aux=True"),
        ({"block_fn": lambda p, x: x, "has_aux": True}, "ShapeDtypeStruct", "expected (h, aux)"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
@pytest.mark.parametrize("jitted", [False, True])
def test_refusal(change, value, remedy, jitted):
    options = {"block_fn": tanh_block, "params": PARAMS, "x0": X0, "gamma": GAMMA, "consts": ()}
    options |= change
    args = [options.pop(name) for name in ("block_fn", "params", "x0", "gamma")]
    consts = options.pop("consts")
    call = lambda: bdia_scan(*args, *consts, **options)  # noqa: E731
    call = jax.jit(call) if jitted else call
    with pytest.raises(ValueError, match=re.escape(value)) as error:
        call()
    assert remedy in str(error.value)


def test_the_same_arguments_unchanged_are_accepted():
    assert jax.eval_shape(lambda: bdia_scan(tanh_block, PARAMS, X0, GAMMA)).shape == X0.shape


# --- closed-over values --------------------------------------------------------------


def scan_with(scale, **options):
    def block(params, x):
        return scale * tanh_block(params, x)

    return jnp.sum(bdia_scan(block, PARAMS, X0, GAMMA, **options))


@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda f: jax.jit(jax.grad(f))])
def test_a_closed_over_tracer_is_refused_with_its_type(transform, backprop):
    with pytest.raises(ValueError, match=r"closes over 1 traced value.*float32") as error:
        transform(lambda scale: scan_with(scale, backprop=backprop))(0.5)
    assert "bdia_scan(block_fn, params, x0, gamma, value)" in str(error.value)


def test_a_closed_over_tracer_in_an_inner_jit_or_vmap_is_refused():
    def inside(scale):
        block = jax.jit(lambda params, x: jax.vmap(lambda row: row * scale)(x))
        return jnp.sum(bdia_scan(block, PARAMS, X0, GAMMA))

    with pytest.raises(ValueError, match="closes over 1 traced value"):
        jax.grad(inside)(0.5)
    with pytest.raises(ValueError, match="closes over 1 traced value"):
        jax.vmap(inside)(jnp.ones(2))


def test_closed_over_concrete_arrays_are_fine_and_so_are_traced_consts():
    scale = jnp.full(X0.shape, 0.5)
    closed = jax.jit(lambda: scan_with(scale))()

    def passed(scale):
        block = lambda params, x, scale: scale * tanh_block(params, x)  # noqa: E731
        return jnp.sum(bdia_scan(block, PARAMS, X0, GAMMA, scale))

    value, ct = jax.jit(jax.value_and_grad(passed))(scale)
    np.testing.assert_allclose(value, closed, rtol=1e-6)
    assert np.any(ct)


# --- derivatives that do not exist ---------------------------------------------------


def loss_of_b(b, backprop, fixed_point=FixedPoint()):
    block = lambda b, x: jnp.tanh(x * (1 + b))  # noqa: E731
    options = {"backprop": backprop, "fixed_point": fixed_point}
    return jnp.sum(jnp.sin(bdia_scan(block, b, X0, GAMMA, **options)))


@pytest.mark.parametrize(
    "derivative",
    [lambda f, b: jax.jvp(f, (b,), (b,)), lambda f, b: jax.jacfwd(f)(b)],
    ids=["jvp", "jacfwd"],
)
def test_forward_mode_is_refused_and_store_has_it(derivative):
    b = PARAMS["b"]
    with pytest.raises(ValueError, match=r"forward-mode.*use backprop='store'"):
        derivative(functools.partial(loss_of_b, backprop="reversible"), b)
    derivative(functools.partial(loss_of_b, backprop="store"), b)
    # under an outer jit JAX itself refuses, after bdia_scan has returned
    with pytest.raises((TypeError, ValueError), match="forward-mode"):
        jax.jit(lambda b: derivative(lambda b: loss_of_b(b, "reversible"), b))(b)


@pytest.mark.parametrize(
    "second_derivative", [jax.hessian, lambda f: jax.jacrev(jax.grad(f))], ids=["fwd", "rev"]
)
def test_second_derivatives_of_reversible_are_refused(second_derivative):
    # they would treat the rebuilt integer states as constants
    with pytest.raises((TypeError, ValueError), match="backprop='store'"):
        second_derivative(functools.partial(loss_of_b, backprop="reversible"))(PARAMS["b"])


def test_second_derivatives_of_store_are_those_of_the_unquantized_recurrence():
    fine = FixedPoint(frac_bits=20)
    actual = jax.hessian(lambda b: loss_of_b(b, "store", fine))(PARAMS["b"])
    expected = jax.hessian(lambda b: loss_of_b(b, "store", None))(PARAMS["b"])
    assert np.linalg.norm(actual - expected) < 0.01 * np.linalg.norm(expected)


def test_a_type_error_of_the_block_is_not_mistaken_for_it():
    def block(params, x):
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match="my own mistake"):
        bdia_scan(block, PARAMS, X0, GAMMA)


def test_reversible_gradients_need_gamma():
    def loss(w, backprop):
        return jnp.sum(bdia_scan(tanh_block, PARAMS | {"w": w}, X0, None, backprop=backprop))

    with pytest.raises(ValueError, match=r"gamma=None.*sample_gamma.*'store' or 'remat'"):
        jax.grad(loss)(PARAMS["w"], "reversible")
    assert np.any(jax.grad(loss)(PARAMS["w"], "store"))


def test_frac_bits_beyond_the_format_are_refused_before_any_scan():
    with pytest.raises(ValueError, match="frac_bits is 40"):
        bdia_scan(tanh_block, PARAMS, X0, GAMMA, fixed_point=FixedPoint(frac_bits=40))


# --- what Python decides by -----------------------------------------------------------------


def of_flags(params, x, is_on, options, scale):
    h = tanh_block(params, x)
    return scale * (h if is_on and options["act"] == "tanh" else 0 * h)


@pytest.mark.parametrize("options", [{}, {"batch_chunks": 2, "per_sample": False}])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_bool_or_str_among_consts_is_the_blocks_to_decide_by(is_on, options):
    consts = (is_on, {"act": "tanh", "none": None}, 2)
    expected = bdia_scan(lambda p, x: 2 * is_on * tanh_block(p, x), PARAMS, X0, GAMMA)
    actual = bdia_scan(of_flags, PARAMS, X0, GAMMA, *consts, **options)
    np.testing.assert_array_equal(actual, expected)
    audit(of_flags, PARAMS, X0, GAMMA, *consts)


def test_true_is_not_taken_for_1():
    def block(params, x, flag):
        return jnp.zeros_like(x) if flag is True else tanh_block(params, x)

    on, off = (bdia_scan(block, PARAMS, X0, GAMMA, flag) for flag in (True, 1))  # a leaf
    assert (on != off).any()


def test_branches_see_them_too():
    branches = (of_flags, of_flags)
    consts = (True, {"act": "tanh"}, 1)
    expected = bdia_scan((tanh_block, tanh_block), PARAMS, X0, GAMMA)
    np.testing.assert_array_equal(bdia_scan(branches, PARAMS, X0, GAMMA, *consts), expected)


# --- nothing to do --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_nothing_to_audit_is_said(shape):
    x0, gamma = jnp.zeros(shape), GAMMA[:, : shape[0]]
    block = lambda params, x: jnp.tanh(x)  # noqa: E731
    assert bdia_scan(block, PARAMS, x0, gamma).shape == shape
    with pytest.raises(
        ValueError, match=rf"x0 has shape {re.escape(str(shape))}.*nothing to audit"
    ):
        audit(block, PARAMS, x0, gamma)
