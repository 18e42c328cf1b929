import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy import (
    BLOCKS,
    GRAD_TOLERANCE,
    assert_grads_close,
    assert_same_bits,
    dropout_block,
    float_part,
    forward_states,
    keep_mask,
    make_case,
    make_params,
    relative_error,
    round_trip_mismatches,
    tanh_block,
)

import bdia_jax as bdia
from bdia_jax import FixedPoint, bdia_scan
from bdia_jax.fixed_point import dequantize

F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
full = functools.partial(pytest.param, marks=pytest.mark.full)


@functools.cache  # so that equal shapes share a program
def run(backprop, block_fn=tanh_block, fixed_point=FixedPoint()):
    """Jitted (params, x0, gamma) -> x_K."""
    options = {"fixed_point": fixed_point, "backprop": backprop}
    return jax.jit(lambda p, x0, gamma: bdia_scan(block_fn, p, x0, gamma, **options))


def grads(backprop, block_fn, params, x0, gamma, fixed_point=FixedPoint()):
    """Of a loss that weighs every element of x_K differently: (float params, x0)."""
    return gradient(backprop, block_fn, fixed_point)(float_part(params), x0, params, gamma)


@functools.cache
def gradient(backprop, block_fn, fixed_point):
    def loss(floats, x0, params, gamma):
        x_last = bdia_scan(
            block_fn, params | floats, x0, gamma, fixed_point=fixed_point, backprop=backprop
        )
        return jnp.sum(weights_of(x0) * x_last + 0.1 * x_last**2)

    return jax.jit(jax.grad(loss, (0, 1)))


def weights_of(x0):
    return np.cos(np.arange(x0.size, dtype=np.float32)).reshape(x0.shape)


# --- every bit comes back ------------------------------------------------------------


@pytest.mark.claim("rebuild is exact")
@pytest.mark.control("rebuild is exact")
@pytest.mark.parametrize(
    "kind, depth, shape, gamma_bits, guard_bits",
    [
        ("float32", 64, (3, 13), 1, 1),
        ("bfloat16", 7, (2, 3, 5), 2, 4),
        ("dropout", 3, (9,), 3, 5),
        full("float32", 2, (5, 3), 1, 0),
        full("float32", 7, (2, 2, 3, 8), 3, 0),
        full("float32", 256, (2, 5), 2, 2),
        full("bfloat16", 2, (2, 3, 7), 3, 2),
        full("bfloat16", 3, (3, 16), 1, 2),
        full("bfloat16", 256, (3, 13), 1, 7),
        full("dropout", 64, (2, 2, 3, 8), 1, 3),
        full("dropout", 256, (2, 13), 2, 1),
    ],
)
def test_the_rebuild_is_bit_equal_and_needs_the_side_bits(
    kind, depth, shape, gamma_bits, guard_bits
):
    fp = FixedPoint(gamma_bits=gamma_bits, guard_bits=guard_bits)
    case = make_case(depth, shape, magnitude=2.0**-gamma_bits)
    audit = bdia.audit(BLOCKS[kind], *case, fixed_point=fp)
    assert audit.exact and audit.mismatches.shape == (depth - 1,), audit
    assert not np.any(round_trip_mismatches(BLOCKS[kind], *case, fp))
    # control: the same scans with zeros for side bits
    assert round_trip_mismatches(BLOCKS[kind], *case, fp, 0)[0] > 0


@pytest.mark.full
@settings(max_examples=5)
@given(
    kind=st.sampled_from(sorted(BLOCKS)),
    depth=st.integers(2, 12),
    shape=st.tuples(st.integers(2, 4), st.integers(1, 5), st.integers(1, 9)),
    frac_bits=st.integers(4, 12),
    gamma_bits=st.integers(1, 3),
    guard_bits=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_the_rebuild_is_bit_equal_for_any_shape_and_format(
    kind, depth, shape, frac_bits, gamma_bits, guard_bits, seed
):
    fp = FixedPoint(frac_bits, guard_bits, gamma_bits)
    case = make_case(depth, shape, seed, magnitude=2.0**-gamma_bits)
    assert not np.any(round_trip_mismatches(BLOCKS[kind], *case, fp))


@pytest.mark.control("rebuild is exact")
@pytest.mark.parametrize("depth", [3, 24])
def test_plain_floats_are_not_rebuilt(depth):
    params, x0, gamma = make_case(depth, (4, 5, 13))
    per_sample = gamma[:, :, None, None]

    def forward(carry, inputs):
        x_prev, x = carry
        params_k, g = inputs
        x_next = g * x_prev + (1 - g) * x + (1 + g) * tanh_block(params_k, x)
        return (x, x_next), x_prev

    def reverse(carry, inputs):
        x, x_next = carry
        params_k, g = inputs
        x_prev = (x_next - (1 - g) * x - (1 + g) * tanh_block(params_k, x)) / g  # eq. 10
        return (x_prev, x), x_prev

    last, states = jax.jit(lambda: jax.lax.scan(forward, (x0, x0), (params, per_sample)))()
    inputs = jax.tree.map(lambda leaf: leaf[1:], (params, per_sample))
    _, rebuilt = jax.jit(lambda: jax.lax.scan(reverse, last, inputs, reverse=True))()
    wrong = np.mean(np.asarray(rebuilt[0]) != np.asarray(states[1]))  # both are x_0
    assert wrong > 0.2


def elementwise_block(params, x):
    """No matrix product: the compiler may fuse all of it into the step."""
    return jnp.tanh(params["b"] * x + 0.3)


@pytest.mark.full
@pytest.mark.claim("rebuild is exact")
@pytest.mark.parametrize(
    "block_fn, shape", [full(tanh_block, (8, 16, 13)), (elementwise_block, (16, 64, 13))]
)
@pytest.mark.parametrize("magnitude", [2.0**11, 2.0**18])
def test_states_of_any_magnitude_are_rebuilt(block_fn, shape, magnitude):
    gamma = bdia.sample_gamma(jax.random.key(2), 12, shape[0])
    params = make_params(12, shape if block_fn is tanh_block else (1,))
    x0 = magnitude * 2.0 * jax.random.normal(jax.random.key(1), shape)
    if magnitude == 2.0**18:
        assert np.max(np.abs(x0)) > 2.0**20  # int32 holds up to 2^22
    audit = bdia.audit(block_fn, params, x0, gamma)
    assert audit.exact, audit


# --- the forward pass ----------------------------------------------------------------


@pytest.mark.claim("forward bits are the same whatever the backprop")
@pytest.mark.parametrize(
    "kind, gamma_bits",
    [
        ("float32", None),
        ("float32", 1),
        full("float32", 3),
        full("bfloat16", None),
        ("bfloat16", 2),
        full("dropout", 1),
    ],
)
def test_the_forward_is_the_same_bits_whatever_the_backprop(kind, gamma_bits):
    fp = FixedPoint(gamma_bits=gamma_bits or 1)
    params, x0, gamma = make_case(7, (3, 5, 13), magnitude=2.0 ** -(gamma_bits or 1))
    gamma = gamma if gamma_bits else None
    expected = run("reversible", BLOCKS[kind], fp)(params, x0, gamma)
    assert expected.dtype == jnp.float32
    for backprop in ("store", "remat"):
        assert_same_bits(run(backprop, BLOCKS[kind], fp)(params, x0, gamma), expected)
    if gamma is None:
        gamma = jnp.zeros((7, 3))
    last = jax.jit(forward_states, static_argnums=(0, 4))(BLOCKS[kind], params, x0, gamma, fp)[-1]
    assert_same_bits(expected, dequantize(last, fp))


@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
def test_the_value_under_differentiation_is_that_of_the_forward(backprop):
    params, x0, gamma = make_case(5, (3, 13))
    loss = lambda w: (lambda x: (jnp.sum(x), x))(  # noqa: E731
        bdia_scan(tanh_block, params | {"w": w}, x0, gamma, backprop=backprop)
    )
    (_, x_last), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params["w"])
    assert_same_bits(x_last, run(backprop)(params, x0, gamma))


@pytest.mark.parametrize("magnitude", [0.0, 0.6])
def test_store_and_remat_take_gamma_of_any_magnitude(magnitude):
    params, x0, gamma = make_case(5, (3, 13), magnitude=magnitude)
    stored, remat = (run(b)(params, x0, gamma) for b in ("store", "remat"))
    assert_same_bits(stored, remat)
    x_prev, x = x0, x0
    for k in range(5):
        h = tanh_block(jax.tree.map(lambda leaf, k=k: leaf[k], params), x)
        g = gamma[k][:, None]
        x_prev, x = x, g * x_prev + (1 - g) * x + (1 + g) * h
    assert 0 < np.max(np.abs(stored - x)) < 0.02  # quanta of 2^-9, K times


@pytest.mark.full
def test_gamma_may_be_shared_by_the_batch():
    params, x0, _ = make_case(5, (3, 13))
    column = bdia.sample_gamma(jax.random.key(5), 5, 1)
    spread = jnp.broadcast_to(column, (5, 3))
    assert_same_bits(run("reversible")(params, x0, column), run("reversible")(params, x0, spread))
    assert_grads_close(
        grads("reversible", tanh_block, params | {"w2": params["w"]}, x0, column)[1],
        grads("store", tanh_block, params, x0, spread)[1],
        F32,
    )


def plain_loop(block_fn, params, x):
    for k in range(params["b"].shape[0]):
        x = x + block_fn(jax.tree.map(lambda leaf: leaf[k], params), x)  # noqa: B023
    return x


@pytest.mark.parametrize("backprop", ["store", "remat"])
def test_without_gamma_and_quantization_it_is_the_plain_transformer(backprop):
    params, x0, _ = make_case(4, (3, 5, 13))
    scanned = run(backprop, fixed_point=None)(params, x0, None)
    unrolled = jax.jit(functools.partial(plain_loop, tanh_block))(params, x0)
    assert relative_error(scanned, unrolled) < 1e-6
    actual = grads(backprop, tanh_block, params, x0, None, fixed_point=None)

    def loss(floats, x0):
        x_last = plain_loop(tanh_block, params | floats, x0)
        return jnp.sum(weights_of(x0) * x_last + 0.1 * x_last**2)

    expected = jax.jit(jax.grad(loss, (0, 1)))(float_part(params), x0)
    for name in ("w", "b"):
        assert_grads_close(actual[0][name], expected[0][name], F32)
    assert_grads_close(actual[1], expected[1], F32)


@pytest.mark.control("forward bits are the same whatever the backprop")
def test_quantized_inference_is_close_to_the_plain_transformer_and_not_equal():
    params, x0, _ = make_case(4, (3, 5, 13))
    quantized = run("reversible")(params, x0, None)
    plain = run("store", fixed_point=None)(params, x0, None)
    assert 0 < np.max(np.abs(quantized - plain)) < 0.02
    np.testing.assert_array_equal(quantized * 2**9, np.rint(quantized * 2**9))


# --- gradients -----------------------------------------------------------------------


def used(params, kind):
    """The parameters that the block reads."""
    names = {"float32": "wb", "dropout": ["w", "b", "key"], "bfloat16": ["w", "w2"]}[kind]
    return {name: params[name] for name in names}


@pytest.mark.claim("gradients equal store's")
@pytest.mark.parametrize(
    "kind, gamma_bits, shape",
    [
        ("float32", 1, (3, 5, 13)),
        full("float32", 3, (6,)),
        full("bfloat16", 1, (3, 5, 13)),
        ("bfloat16", 2, (4, 5)),
        full("dropout", 2, (4, 5)),
        full("dropout", 3, (6,)),
    ],
)
def test_every_gradient_equals_plain_autodiff(kind, gamma_bits, shape):
    fp = FixedPoint(gamma_bits=gamma_bits)
    params, x0, gamma = make_case(7, shape, magnitude=2.0**-gamma_bits)
    params = used(params, kind)
    tolerance = GRAD_TOLERANCE[jnp.dtype(jnp.bfloat16 if kind == "bfloat16" else jnp.float32)]
    expected = grads("store", BLOCKS[kind], params, x0, gamma, fp)
    for backprop in ("reversible", "remat"):
        actual = grads(backprop, BLOCKS[kind], params, x0, gamma, fp)
        assert_grads_close(actual, expected, tolerance)


def straight_line(params, x0, gamma, frac_bits=9):
    """Eq. 21 written out, with its straight-through derivative; p = 1."""
    scale = 2.0**frac_bits

    def carry_gradient(y, n):
        return y + jax.lax.stop_gradient(n / scale - y)

    n_prev = n = jnp.round(x0 * scale)
    x_prev = x = carry_gradient(x0, n)
    for k in range(gamma.shape[0]):
        g = gamma[k].reshape(-1, 1, 1)
        h = tanh_block(jax.tree.map(lambda leaf: leaf[k], params), x)  # noqa: B023
        y = (1 - g) * x + (1 + g) * h
        e = n_prev % 2  # the parity bit, eq. 20
        n_next = jnp.sign(g) * (n_prev + e) / 2 + jnp.round(y * scale)
        x_prev, x = x, carry_gradient(g * x_prev + y, n_next)
        n_prev, n = n, n_next
    return x


@pytest.mark.claim("gradients equal store's")
@pytest.mark.control("gradients equal store's")
def test_store_is_the_straight_through_derivative_of_the_recurrence_written_out():
    params, x0, gamma = make_case(4, (3, 5, 13), seed=1)
    params = used(params, "float32")

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def written_out(floats, x0):
        x_last = straight_line(floats, x0, gamma)
        return jnp.sum(weights_of(x0) * x_last + 0.1 * x_last**2)

    expected = written_out(params, x0)
    assert_grads_close(grads("store", tanh_block, params, x0, gamma), expected, F32)
    without_history = written_out(params, x0 + 1)  # a control: not a constant
    assert relative_error(without_history[1], expected[1]) > 100 * F32


def rich_block(params, x, memory, mask, offset):
    """Every kind of leaf in params, consts and aux."""
    keep = keep_mask(params["key"], 0.8, x.shape)
    h = jnp.tanh(x @ params["w"] + memory["m"]) * keep + offset["i"] * 0.01
    h = jnp.where(mask, h, 0.0) * jnp.where(params["flag"], 1.0, 0.5)
    aux = {"power": jnp.mean(h**2, axis=-1), "layer": params["layer"], "on": params["flag"]}
    return h + 0.05 * jax.nn.one_hot(params["layer"] % x.shape[-1], x.shape[-1]), aux


def rich_case():
    depth, shape = 5, (3, 4, 13)
    base, x0, gamma = make_case(depth, shape)
    params = {
        "w": base["w"][:, :13, :13] * 3,
        "key": base["key"],
        "layer": jnp.arange(depth),
        "flag": jnp.arange(depth) % 2 == 0,
    }
    consts = (
        {"m": jnp.sin(jnp.arange(52.0)).reshape(4, 13)},
        jnp.arange(13) % 3 > 0,
        {"i": jnp.int32(2)},
    )
    return params, x0, gamma, consts


@pytest.mark.full
@pytest.mark.parametrize("backprop", ["reversible", "remat"])
def test_consts_aux_and_leaves_without_gradient(backprop):
    params, x0, gamma, (memory, mask, offset) = rich_case()

    def loss(backprop, w, x0, memory):
        x_last, aux = bdia_scan(
            rich_block,
            params | {"w": w},
            x0,
            gamma,
            memory,
            mask,
            offset,
            backprop=backprop,
            has_aux=True,
        )
        scale = jnp.arange(1.0, 6.0)[:, None, None]
        return jnp.sum(jnp.sin(x_last)) + jnp.sum(scale * aux["power"]), (x_last, aux)

    grad = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    actual, (x_last, aux) = grad(backprop, params["w"], x0, memory)
    expected, (x_stored, aux_stored) = grad("store", params["w"], x0, memory)
    assert_grads_close(actual, expected, F32)
    assert_same_bits(x_last, x_stored)
    np.testing.assert_array_equal(aux["layer"], np.arange(5))
    np.testing.assert_array_equal(aux["on"], aux_stored["on"])
    assert aux["power"].shape == (5, 3, 4)
    np.testing.assert_allclose(aux["power"], aux_stored["power"], rtol=1e-6)

    no_aux = jax.jit(jax.grad(lambda w: loss("store", w, x0, memory)[1][0].sum()))(params["w"])
    assert relative_error(no_aux, expected[0]) > 0.01  # so aux did contribute


def test_leaves_without_gradient_get_float0():
    params, x0, gamma, consts = rich_case()
    loss = lambda p, c: bdia_scan(rich_block, p, x0, gamma, *c, has_aux=True)[0].sum()  # noqa: E731
    ct_params, ct_consts = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(params, consts)
    assert ct_params["layer"].dtype == ct_params["flag"].dtype == jax.dtypes.float0
    assert ct_consts[1].dtype == ct_consts[2]["i"].dtype == jax.dtypes.float0
    assert np.any(ct_params["w"]) and np.any(ct_consts[0]["m"])


@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
def test_no_gradient_flows_into_gamma(backprop):
    params, x0, gamma = make_case(3, (2, 5))
    grad = jax.grad(lambda g: bdia_scan(tanh_block, params, x0, g, backprop=backprop).sum())
    assert not np.any(jax.jit(grad)(gamma))


@pytest.mark.full
@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
def test_x0_in_bfloat16_gets_its_cotangent_in_bfloat16(backprop):
    params, x0, gamma = make_case(5, (3, 13))
    params = used(params, "float32")
    _, ct_x0 = grads(backprop, tanh_block, params, x0.astype(jnp.bfloat16), gamma)
    assert ct_x0.dtype == jnp.bfloat16
    rounded = x0.astype(jnp.bfloat16).astype(jnp.float32)
    _, expected = grads("store", tanh_block, params, rounded, gamma)
    assert relative_error(ct_x0, expected) < GRAD_TOLERANCE[jnp.dtype(jnp.bfloat16)]


def test_one_block_has_nothing_to_rebuild_and_still_trains():
    params, x0, gamma = make_case(1, (3, 13))
    params = used(params, "float32")
    assert_grads_close(
        grads("reversible", tanh_block, params, x0, gamma),
        grads("store", tanh_block, params, x0, gamma),
        F32,
    )


# --- transformations -----------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("backprop", ["reversible", "store"])
def test_vmap_over_seeds_equals_the_loop(backprop):
    params, x0, _ = make_case(4, (3, 5))
    params = used(params, "dropout")

    def grad(seed):
        gamma = bdia.sample_gamma(jax.random.key(seed), 4, 3)
        key = jax.random.split(jax.random.key(seed), 4)
        return grads(backprop, dropout_block, params | {"key": key}, x0, gamma)

    mapped = jax.vmap(grad)(jnp.arange(3))
    for seed in range(3):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], mapped)
        assert_grads_close(one, grad(seed), F32)
    assert relative_error(mapped[1][0], mapped[1][1]) > 0.01


@pytest.mark.full
def test_inside_a_larger_checkpoint():
    params, x0, gamma = make_case(4, (3, 5))

    def loss(backprop, checkpoint, w, x0):
        def inner(w, x0):
            x = bdia_scan(tanh_block, params | {"w": w}, jnp.sin(x0), gamma, backprop=backprop)
            return x @ w[0]

        inner = jax.checkpoint(inner) if checkpoint else inner
        return jnp.sum(jnp.tanh(inner(w, x0)))

    grad = jax.jit(jax.grad(loss, (2, 3)), static_argnums=(0, 1))
    actual = grad("reversible", True, params["w"], x0)
    assert_grads_close(actual, grad("store", False, params["w"], x0), F32)


@pytest.mark.full
def test_with_donated_buffers():
    params, x0, gamma = make_case(4, (3, 5))
    w = params["w"]

    def train_step(w, x0):
        loss = lambda w: jnp.sum(  # noqa: E731
            bdia_scan(tanh_block, params | {"w": w}, x0, gamma) ** 2
        )
        return w - 0.1 * jax.grad(loss)(w)

    expected = jax.jit(train_step)(w, x0)
    donated = jnp.array(w)
    actual = jax.jit(train_step, donate_argnums=0)(donated, x0)
    assert donated.is_deleted()
    assert_same_bits(actual, expected)


@pytest.mark.full
def test_with_64_bit_mode_on():
    params, x0, gamma = make_case(4, (3, 5))
    params = used(params, "float32")
    expected = grads("reversible", tanh_block, params, x0, gamma)
    value = run("reversible")(params, x0, gamma)
    with jax.enable_x64(True):
        assert jnp.arange(3).dtype == jnp.int64
        assert_same_bits(run("reversible")(params, x0, gamma), value)
        assert_grads_close(grads("reversible", tanh_block, params, x0, gamma), expected, F32)
        assert bdia.audit(tanh_block, params, x0, gamma).exact


@pytest.mark.parametrize(
    "backprop, x0_dtype",
    [
        ("reversible", jnp.float32),
        ("reversible", jnp.bfloat16),
        ("store", jnp.bfloat16),
        ("remat", jnp.float32),
    ],
)
def test_under_strict_dtype_promotion(backprop, x0_dtype):
    params, x0, gamma = make_case(4, (3, 5))
    block = lambda p, x: jnp.tanh(x * p["b"])  # noqa: E731
    with jax.numpy_dtype_promotion("strict"):
        loss = lambda b, x0: jnp.sum(  # noqa: E731
            bdia_scan(block, {"b": b}, x0, gamma, backprop=backprop)
        )
        ct_b, ct_x0 = jax.jit(jax.grad(loss, (0, 1)))(params["b"], x0.astype(x0_dtype))
    assert np.any(ct_b) and ct_x0.dtype == x0_dtype


@pytest.mark.full
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_sharded_over_the_batch_equals_unsharded():
    params, x0, gamma = make_case(6, (8, 5, 16))
    params = used(params | {"w": params["w"][:, :16, :16]}, "float32")
    block = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])  # noqa: E731
    expected = grads("reversible", block, params, x0, gamma)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x0_sharded = jax.device_put(x0, NamedSharding(mesh, PartitionSpec("data")))
    gamma_sharded = jax.device_put(gamma, NamedSharding(mesh, PartitionSpec(None, "data")))
    actual = grads("reversible", block, params, x0_sharded, gamma_sharded)
    assert len(actual[1].sharding.device_set) == 4
    assert_grads_close(actual, expected, F32)
    assert bdia.audit(block, params, x0_sharded, gamma_sharded).exact


# --- what is no number stays no number -----------------------------------------------


def bad_block(params, x):
    """A sample whose first element is above 50 gets what params["bad"] says."""
    flag = (x[:, :1] > 50) & (params["layer"] == 2)
    return jnp.where(flag, params["bad"], jnp.tanh(x))


@pytest.mark.claim("what is no number stays none")
@pytest.mark.control("what is no number stays none")
@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**23, -(2.0**23)])
def test_a_bad_block_output_makes_its_sample_nan_and_no_other(backprop, bad):
    _, x0, gamma = make_case(6, (4, 5))
    x0 = x0.at[1].set(200.0)
    params = {"layer": np.arange(6), "bad": np.full(6, bad, np.float32)}
    x_last = run(backprop, bad_block)(params, x0, gamma)
    expected = run(backprop, bad_block)(params | {"layer": np.zeros(6, int)}, x0, gamma)
    assert np.all(np.isnan(x_last[1])) and np.all(np.isfinite(expected))
    others = np.array([0, 2, 3])
    assert_same_bits(x_last[others], expected[others])


@pytest.mark.full
@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_a_state_that_grows_past_int32_is_nan(backprop, with_gamma):
    _, x0, gamma = make_case(40, (2, 5))
    x0 = x0.at[0].set(1.0).at[1].set(0.0)
    double = lambda p, x: p["s"] * x  # noqa: E731
    gamma = gamma if with_gamma else None
    x_last = run(backprop, double)({"s": np.ones(40, np.float32)}, x0, gamma)
    assert np.all(np.isnan(x_last[0])) and np.all(x_last[1] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**22])
def test_an_input_that_does_not_fit_is_nan(bad):
    params, x0, gamma = make_case(4, (3, 5))
    block = lambda p, x: jnp.tanh(p["b"] * x)  # noqa: E731
    x_last = run("reversible", block)(params, x0.at[1, 2].set(bad), gamma)
    expected = np.zeros((3, 5), bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(np.isnan(x_last), expected)


@pytest.mark.parametrize("backprop", ["reversible", "store", "remat"])
def test_a_bad_gamma_that_is_traced_makes_everything_nan(backprop):
    params, x0, gamma = make_case(4, (3, 5))
    assert np.all(np.isfinite(run(backprop)(params, x0, gamma)))
    assert np.all(np.isnan(run(backprop)(params, x0, gamma.at[0, 1].set(0.5))))
    assert np.all(np.isnan(run(backprop)(params, x0, gamma.at[2, 1].set(np.nan))))
    other_magnitude = run(backprop)(params, x0, gamma.at[2, 1].set(0.25))
    assert np.all(np.isnan(other_magnitude)) == (backprop == "reversible")
