"""Llama: rotations, shared key/value heads, windows, caches; exact as a BDIA stack."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from toy import GRAD_TOLERANCE, assert_grads_close, relative_error
from toy_models import filled

from bdia_jax import FixedPoint
from bdia_jax.models import attention, llama
from bdia_jax.models.blocks import Cache
from bdia_jax.models.llama import Llama
from bdia_jax.models.llama_blocks import LlamaBlock, RotaryAttention
from bdia_jax.models.rope import RopeScaling, rope_frequencies, rotate
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
PLAIN = partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store")
LENGTH = 8  # as long as the batch: positions must not be taken for one of each sample
SMALL = {
    "vocab_size": 23, "max_len": 12, "width": 16, "depth": 3, "num_heads": 4, "num_kv_heads": 2,
    "mlp_dim": 24, "rope_theta": 100.0,
}  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (LENGTH, LENGTH), 0, 23)
LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 32)


def small_llama(stack=PLAIN, **options):
    return filled(lambda: Llama(**(SMALL | options), stack=stack, rngs=nnx.Rngs(0)))


@nnx.jit
def run(model, tokens, positions=None, mask=None):
    return model(tokens, positions=positions, mask=mask)


@pytest.fixture(scope="module")
def plain():
    return small_llama()


def window_mask(size, length=LENGTH):
    query, key = np.arange(length)[:, None], np.arange(length)
    return jnp.asarray(query - key < size)[None, None]


# --- exactness --------------------------------------------------------------------------


def gradient(**options):
    def loss(model):
        # of one axis, and of two, that are no batch, though as long
        places = {"positions": jnp.arange(LENGTH), "mask": jnp.tri(LENGTH, dtype=bool)}
        features = model.features(TOKENS, rngs=nnx.Rngs(1), **places)
        return jnp.mean(model.loss(features, TOKENS))

    # a grid so fine that a rounding which depends on the parts does not matter
    stack = partial(BDIAStack, fixed_point=FixedPoint(20, guard_bits=4), **options)
    model = small_llama(stack, qk_norm=True, sliding_window=5)
    return jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))


def test_reversible_gradients_in_parts_equal_stored_ones():
    expected = gradient(backprop="store")
    assert_grads_close(gradient(batch_chunks=2, by_branch=True, token_chunks=2), expected, F32)


def audit_of(dtype):
    model = small_llama(BDIAStack, dtype=dtype)
    return model.stack.audit(model.embedding[...][TOKENS], jnp.arange(LENGTH)[None], None)


def test_the_rebuild_is_exact(optimized):
    assert audit_of(jnp.bfloat16).exact


@jax.custom_vjp
def drifting(h):
    """h, off by five quanta in the backward pass."""
    return h


drifting.defvjp(lambda h: (h + 0.01, None), lambda _, ct: (ct,))


class Drifting(LlamaBlock):
    def f(self, x, positions, mask=None):
        return drifting(super().f(x, positions, mask))


def test_control_the_audit_would_see_if_not(monkeypatch):
    monkeypatch.setattr(llama, "LlamaBlock", Drifting)
    assert not audit_of(jnp.float32).exact


# --- the architecture -------------------------------------------------------------------


def test_the_default_is_llama_2_of_7_billion_parameters():
    count = lambda model: sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))  # noqa: E731
    model = nnx.eval_shape(lambda: Llama(rngs=nnx.Rngs(0)))
    assert count(model) == 6_738_415_616
    tied = nnx.eval_shape(lambda: Llama(tie_embeddings=True, rngs=nnx.Rngs(0)))
    assert count(tied) == 6_738_415_616 - 32000 * 4096


def test_a_shared_head_is_as_many_equal_ones(plain):
    alone = small_llama(num_kv_heads=4)
    params = nnx.state(plain, nnx.Param)
    attention = params["stack"]["blocks"]["attention"]
    shared = {name: attention[name]["kernel"][...] for name in ("key", "value")}

    def logits(repeat):
        for name, kernel in shared.items():
            heads = repeat(kernel.reshape(3, 16, 2, 4))
            attention[name]["kernel"] = nnx.Param(heads.reshape(3, 16, 16))
        nnx.update(alone, params)
        return run(alone, TOKENS)

    expected = run(plain, TOKENS)
    same = logits(lambda heads: jnp.repeat(heads, 2, axis=2))
    np.testing.assert_allclose(same, expected, atol=1e-5)
    interleaved = logits(lambda heads: jnp.tile(heads, (2, 1)))
    assert np.max(np.abs(interleaved - expected)) > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_the_loss_is_that_of_the_logits(tied):
    model = small_llama(tie_embeddings=tied)
    features = jax.random.normal(jax.random.key(1), (2, 3, 16))
    labels = TOKENS[:2, :3]
    expected = jnp.take_along_axis(
        -jax.nn.log_softmax(model.logits(features)), labels[..., None], -1
    )
    np.testing.assert_allclose(model.loss(features, labels), expected[..., 0], rtol=1e-5)
    table = model.embedding if tied else model.head
    assert (model.head is None) == tied
    np.testing.assert_allclose(model.logits(features), features @ table[...].T, atol=1e-5)


def test_bfloat16_is_close_and_returns_float32(plain):
    half = run(small_llama(dtype=jnp.bfloat16), TOKENS)
    assert half.dtype == jnp.float32
    assert 1e-4 < relative_error(half, run(plain, TOKENS)) < 5e-2


def test_dropout_is_of_both_branches_and_off_at_inference(plain):
    model = small_llama(dropout_rate=0.5)
    blocks = model.stack.blocks
    assert blocks.attention.dropout.rate == blocks.mlp.dropout.rate == 0.5
    expected = run(plain, TOKENS)
    assert np.max(np.abs(run(model, TOKENS) - expected)) > 0.1
    model.eval()
    np.testing.assert_allclose(run(model, TOKENS), expected, atol=1e-6)


# --- what a token sees ------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_no_token_sees_a_later_one_nor_one_behind_the_window(window):
    model = small_llama(depth=1, sliding_window=window)
    moved = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 23)
    changed = np.any(np.asarray(run(model, TOKENS) != run(model, moved)), axis=(0, 2))
    last = LENGTH if window is None else 2 + window
    np.testing.assert_array_equal(changed, (np.arange(LENGTH) >= 2) & (np.arange(LENGTH) < last))


def test_a_window_adds_to_a_mask(plain):
    model = small_llama(sliding_window=3)
    seen = np.random.default_rng(0).random((LENGTH, 1, LENGTH, LENGTH)) < 0.5
    seen = jnp.asarray(seen | np.eye(LENGTH, dtype=bool))
    expected = run(plain, TOKENS, None, seen & window_mask(3))
    np.testing.assert_allclose(run(model, TOKENS, None, seen), expected, atol=1e-5)
    assert np.max(np.abs(run(plain, TOKENS, None, seen) - expected)) > 0.1


def test_packed_documents_are_what_they_are_alone(plain):
    document = jnp.array([0, 0, 0, 1, 1, 1, 1, 1])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    mask = (document[:, None] == document)[None, None]
    alone = run(plain, TOKENS[:, 3:])
    packed = partial(run, plain, TOKENS)
    np.testing.assert_allclose(packed(positions, mask)[:, 3:], alone, atol=1e-5)
    # only differences of positions matter, so those of the whole do as well
    whole = jnp.arange(LENGTH)
    np.testing.assert_allclose(packed(whole, mask)[:, 3:], alone, atol=1e-4)
    for wrong in (packed(positions, jnp.ones_like(mask)), packed(2 * positions, mask)):
        assert np.max(np.abs(wrong[:, 3:] - alone)) > 0.1


def test_a_token_outside_the_vocabulary_gives_nan(plain):
    for token in (23, -1):
        logits = run(plain, TOKENS.at[1, 3].set(token))
        assert np.all(np.isnan(logits[1, 3:])) and np.all(np.isfinite(logits[::2]))


def test_logits_with_a_cache_are_those_without():
    model = small_llama(sliding_window=3)
    model.eval()
    expected = run(model, TOKENS)
    padding = 2  # of the second sample, on the left: its first tokens, moved
    tokens = TOKENS.at[1].set(jnp.roll(TOKENS[1], padding))
    first = jnp.zeros((LENGTH, 1), jnp.int32).at[1].set(padding)
    positions = jnp.maximum(jnp.arange(LENGTH) - first, 0)
    heads = model.stack.blocks.attention
    heads.cache = Cache(heads, LENGTH, LENGTH, start=first[:, 0])
    assert heads.cache.key.shape == (3, LENGTH, LENGTH, 2, 4)
    parts = [run(model, tokens[:, :5], positions[:, :5])]
    parts += [run(model, tokens[:, i : i + 1], positions[:, i : i + 1]) for i in range(5, 8)]
    actual = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(actual[::2], expected[::2], atol=1e-5)
    np.testing.assert_allclose(actual[1, padding:], expected[1, :-padding], atol=1e-5)
    heads.cache = Cache(heads, LENGTH, LENGTH)  # one that has seen nothing
    forgot = run(model, tokens[:, 7:], positions[:, 7:])
    assert np.max(np.abs(forgot[::2, 0] - expected[::2, 7])) > 0.1


# --- rotation ---------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), LLAMA3], ids=str)
def test_rotation_turns_pairs_as_complex_numbers(scaling):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 16)).astype(np.float32)
    positions = np.array([[0, 5, 100_000], [1, 2, 3]])
    theta = 100.0
    frequencies = [theta ** (-2 * i / 16) for i in range(8)]
    if scaling is not None:
        for i, frequency in enumerate(frequencies):
            wavelength, share = 2 * np.pi / frequency, 0.0
            if scaling is LLAMA3:  # 1 below 8, 0 above 32
                share = min(max((32 / wavelength - 1) / 3, 0), 1)
            frequencies[i] = (1 - share) * frequency / 4 + share * frequency
    actual = rope_frequencies(16, theta, scaling)
    np.testing.assert_allclose(actual, frequencies, rtol=1e-6)
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * positions[..., None, None] * actual)
    # an angle of 1e5 has a float32 step of 2^-7
    steps = np.abs(positions)[..., None, None] * 2.0**-24 + 1e-5
    result = np.asarray(jax.jit(rotate)(jnp.asarray(x), jnp.asarray(positions), actual))
    error = np.abs(result[..., :8] + 1j * result[..., 8:] - turned)
    assert np.all(error <= steps * 2 * np.abs(turned))
    half = jax.jit(rotate)(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions), actual)
    assert half.dtype == jnp.float32
    assert np.max(np.abs(half - result)) < 0.05  # x is rounded, angles are not


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"num_heads": 3, "num_kv_heads": 3}, "width 16 is not divisible by num_heads 3"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"sliding_window": 0}, "sliding_window is 0, expected None or at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Llama(**(SMALL | options), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (("yarn", 4.0), "rope_type is 'yarn', which is not implemented"),
        (("linear", 0.5), r"factor of RoPE is 0\.5"),
        (("linear", 2.0, 1.0), r"low_freq_factor of RoPE is 1\.0, but rope_type 'linear' has none"),
        (("llama3", 2.0, 1.0), "high_freq_factor of RoPE is None, but rope_type 'llama3' needs"),
        (("llama3", 2.0, 4.0, 4.0, 32), "expected the second to be greater"),
    ],
)
def test_a_scaling_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*settings)


def test_more_tokens_than_positions_are_refused(plain):
    with pytest.raises(ValueError, match=r"\(1, 13\).*max_len 12"):
        plain(jnp.zeros((1, 13), jnp.int32))


def test_a_mask_with_a_cache_is_refused():
    def masked(x):
        one = RotaryAttention(8, 2, rngs=nnx.Rngs(0))
        one.cache = nnx.data(object())
        return one(x, jnp.arange(2), jnp.ones((2, 2), bool))

    with pytest.raises(ValueError, match=r"mask of shape \(2, 2\) with a cache"):
        jax.eval_shape(masked, jnp.zeros((1, 2, 8)))


# --- flash attention --------------------------------------------------------------------


@pytest.mark.parametrize("window, is_flash", [(None, True), (8, True), (7, False)])
def test_shared_heads_are_for_cudnn_and_so_is_a_window_that_sees_all(monkeypatch, window, is_flash):
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(attention, "default_device", lambda: gpu)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91800)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda needed: needed <= "8.0")
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    options = {"head_dim": 16, "sliding_window": window, "dtype": jnp.bfloat16}
    make = lambda: Llama(**(SMALL | options), rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def loss(params, rest):
        return jnp.mean(nnx.merge(graphdef, params, rest)(TOKENS, rngs=nnx.Rngs(1)))

    traced = jax.jit(jax.grad(loss)).trace(params, rest)
    calls = re.findall(r"__cudnn\$\w+", traced.lower(lowering_platforms=("cuda",)).as_text())
    flash = ["__cudnn$fmhaSoftmax"] * 2 + ["__cudnn$fmhaSoftmaxBackward"]
    assert calls == (flash if is_flash else [])
