"""Tiny blocks, and comparison by bits, shared by the tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax.fixed_point import dequantize, pack_bits, quantize, unpack_bits
from bdia_jax.recurrence import inverse_step, step

# relative error of a whole leaf; never relaxed to pass
GRAD_TOLERANCE = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 2e-2}


# --- comparison ----------------------------------------------------------------------


def bits(x) -> np.ndarray:
    """The bit pattern, so that 0.0 and -0.0 differ and NaN equals itself."""
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.itemsize])


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wrong = int(np.sum(bits(actual) != bits(expected)))
    assert wrong == 0, f"{wrong} of {actual.size} elements differ in bits"


def relative_error(actual, expected) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_grads_close(actual, expected, tolerance):
    """Every leaf by relative norm; a leaf without a gradient must be an empty float0."""
    actual = jax.tree_util.tree_leaves_with_path(actual)
    expected = jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for (path, a), e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, path
        if a.dtype == jax.dtypes.float0:
            continue
        assert np.linalg.norm(np.asarray(e, np.float64)) > 0, f"{path}: nothing to compare"
        error = relative_error(a, e)
        assert error < tolerance, f"{path}: relative error {error:.2e}"


# --- blocks over x of any shape [B, ...] ---------------------------------------------


def _mix_features(x, w, **kwargs):
    rows = x.reshape(x.shape[0], -1)
    return jax.lax.dot(rows, w.astype(rows.dtype), **kwargs).reshape(x.shape)


def tanh_block(params, x):
    return jnp.tanh(_mix_features(x, params["w"]) + params["b"])


def bf16_block(params, x):
    """bfloat16 operands and intermediate, float32 out of the last product."""
    hidden = jnp.tanh(_mix_features(x.astype(jnp.bfloat16), params["w"]))
    return _mix_features(hidden, params["w2"], preferred_element_type=jnp.float32)


def keep_mask(key, rate, shape):
    """As jax.random.bernoulli, which takes a second to compile; `test_nnx.py` has the real one."""
    low, high = jax.random.key_data(key)
    n = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    n = (n * np.uint32(0x9E3779B9) + low) ^ high
    n = (n ^ (n >> 16)) * np.uint32(0x85EBCA6B)
    n = (n ^ (n >> 13)) * np.uint32(0xC2B2AE35)
    return n ^ (n >> 16) < np.uint32(rate * 2**32)


def dropout_block(params, x):
    mask = keep_mask(params["key"], 0.7, x.shape)
    return jnp.where(mask, tanh_block(params, x) / 0.7, 0.0)


BLOCKS = {"float32": tanh_block, "bfloat16": bf16_block, "dropout": dropout_block}


def make_params(depth, shape, seed=0, scale=0.7):
    """Parameters of any of BLOCKS: floats, and a PRNG key a block."""
    width = int(np.prod(shape[1:]))
    generator = np.random.default_rng(seed)  # jax.random would compile for every shape
    w, w2 = generator.normal(scale=scale / np.sqrt(width), size=(2, depth, width, width))
    b = 0.1 * np.cos(np.arange(depth))
    key = jax.random.wrap_key_data(generator.integers(2**32, size=(depth, 2), dtype=np.uint32))
    return {n: jnp.asarray(a, jnp.float32) for n, a in {"w": w, "w2": w2, "b": b}.items()} | {
        "key": key
    }


def make_case(depth, shape, seed=0, magnitude=0.5, scale=0.7):
    """(params, x0, gamma)."""
    generator = np.random.default_rng(seed + 100)
    x0 = generator.normal(scale=2.0, size=shape)
    gamma = generator.choice([-magnitude, magnitude], size=(depth, shape[0]))
    gamma[0] = 0.0
    x0, gamma = (jnp.asarray(array, jnp.float32) for array in (x0, gamma))
    return make_params(depth, shape, seed, scale), x0, gamma


def float_part(params):
    return {name: leaf for name, leaf in params.items() if name != "key"}


# --- an independent round trip, from `step` and `inverse_step` alone ------------------


def perturb(block_fn):
    """`block_fn` whose value under differentiation, as in the backward pass, is off by +-eps.

    eps is params["eps"], [K], so that one compiled program serves every eps.
    """

    @jax.custom_vjp
    def block(params, x):
        return block_fn(params, x)

    def fwd(params, x):
        h, vjp = jax.vjp(block_fn, params, x)
        sign = np.random.default_rng(7).choice([-1, 1], size=h.shape).astype(np.float32)
        return h + params["eps"] * sign, vjp

    def bwd(vjp, ct):
        return vjp(ct)

    block.defvjp(fwd, bwd)
    return block


@functools.partial(jax.jit, static_argnums=(0, 4))
def round_trip_mismatches(block_fn, params, x0, gamma, fixed_point, keep_side=1):
    """[K-1]: wrong elements of the rebuilt x_0 .. x_{K-2}; `keep_side=0` stores zeros."""
    per_sample = gamma.reshape(gamma.shape + (1,) * (x0.ndim - 1))

    def forward(carry, inputs):
        n_prev, n = carry
        params_k, gamma_k = inputs
        h = block_fn(params_k, dequantize(n, fixed_point))
        n_next, side, _ = step(n_prev, n, h, gamma_k, fixed_point)
        packed = pack_bits(side * keep_side, fixed_point.side_bits)
        return (n, n_next), (n_prev, packed)

    def reverse(carry, inputs):
        n, n_next = carry
        params_k, gamma_k, packed = inputs
        h = block_fn(params_k, dequantize(n, fixed_point))
        side = unpack_bits(packed, fixed_point.side_bits, n.shape)
        n_prev, _, _ = inverse_step(n_next, n, h, gamma_k, side, fixed_point)
        return (n_prev, n), n_prev

    n0 = quantize(x0, fixed_point)
    last, (states, packed) = jax.lax.scan(forward, (n0, n0), (params, per_sample))
    _, rebuilt = jax.lax.scan(reverse, last, (params, per_sample, packed), reverse=True)
    return jnp.sum(rebuilt[1:] != states[1:], axis=tuple(range(1, states.ndim)))


def forward_states(block_fn, params, x0, gamma, fixed_point):
    """int32 [K+1, B, ...]: n_0 .. n_K, step by step."""
    per_sample = gamma.reshape(gamma.shape + (1,) * (x0.ndim - 1))

    def forward(carry, inputs):
        n_prev, n = carry
        params_k, gamma_k = inputs
        h = block_fn(params_k, dequantize(n, fixed_point))
        n_next, _, _ = step(n_prev, n, h, gamma_k, fixed_point)
        return (n, n_next), n_next

    n0 = quantize(x0, fixed_point)
    _, states = jax.lax.scan(forward, (n0, n0), (params, per_sample))
    return jnp.concatenate([n0[None], states])
