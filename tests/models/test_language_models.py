"""GPT2 and Llama: what a token sees, packed documents, caches; the rotations of Llama."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import PLAIN, TOKENS, VOCAB, run, small

from bdia_jax.models.cache import Cache
from bdia_jax.models.rope import RopeScaling, RotaryAttention, rope_frequencies, rotate
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTH = TOKENS.shape[1]  # as long as the batch: positions must not be taken for one of each sample
LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 32)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def plain(request):
    return small(request.param, PLAIN)


@pytest.fixture(scope="module")
def llama():
    return small("llama", PLAIN)


# --- what a token sees ---------------------------------------------------------------


def changed(model):
    """Which tokens' logits move with token 2."""
    moved = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % VOCAB)
    return np.any(np.asarray(run(model, TOKENS) != run(model, moved)), axis=(0, 2))


def test_no_token_sees_a_later_one(plain):
    np.testing.assert_array_equal(changed(plain), np.arange(LENGTH) >= 2)


def test_nor_one_behind_the_window():
    windowed = small("llama", PLAIN, depth=1, sliding_window=3)
    np.testing.assert_array_equal(changed(windowed), np.isin(np.arange(LENGTH), (2, 3, 4)))


def test_a_window_adds_to_a_mask(llama):
    seen = np.random.default_rng(0).random((LENGTH, 1, LENGTH, LENGTH)) < 0.5
    seen = jnp.asarray(seen | np.eye(LENGTH, dtype=bool))
    query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    expected = run(llama, TOKENS, mask=seen & (query - key < 3))
    windowed = run(small("llama", PLAIN, sliding_window=3), TOKENS, mask=seen)
    np.testing.assert_allclose(windowed, expected, atol=1e-5)
    assert np.max(np.abs(run(llama, TOKENS, mask=seen) - expected)) > 0.1


def test_packed_documents_are_what_they_are_alone(plain):
    document = jnp.array([0, 0, 0, 1, 1, 1, 1, 1])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    mask = (document[:, None] == document)[None, None]
    alone = run(plain, TOKENS[:, 3:])
    packed = partial(run, plain, TOKENS)
    np.testing.assert_allclose(packed(positions=positions, mask=mask)[:, 3:], alone, atol=1e-5)
    for wrong in ({"mask": jnp.ones_like(mask)}, {"positions": 2 * positions}):
        logits = packed(**({"positions": positions, "mask": mask} | wrong))
        assert np.max(np.abs(logits[:, 3:] - alone)) > 0.1


def test_only_differences_of_positions_matter_to_llama(llama):
    later = run(llama, TOKENS, positions=3 + jnp.arange(LENGTH))
    np.testing.assert_allclose(later, run(llama, TOKENS), atol=1e-4)


def test_a_token_outside_the_vocabulary_gives_nan(plain):
    for token in (VOCAB, -1):
        logits = run(plain, TOKENS.at[1, 3].set(token))
        assert np.all(np.isnan(logits[1, 3:])) and np.all(np.isfinite(logits[::2]))


@pytest.mark.claim("decoding with a cache is the model's own")
@pytest.mark.control("decoding with a cache is the model's own")
@pytest.mark.parametrize(
    "name, stack, tolerance",
    [
        # states on the grid of 2^-9 may fall on another point of it
        ("gpt2", BDIAStack, 0.05),
        pytest.param("gpt2", PLAIN, 1e-5, marks=pytest.mark.full),
        pytest.param("llama", PLAIN, 1e-5, marks=pytest.mark.full),
    ],
)
def test_logits_with_a_cache_are_those_without(name, stack, tolerance):
    model = small(name, stack, **({"sliding_window": 3} if name == "llama" else {}))
    model.eval()
    expected = run(model, TOKENS)
    padding = 2  # of the second sample, on the left: its first tokens, moved
    tokens = TOKENS.at[1].set(jnp.roll(TOKENS[1], padding))
    first = jnp.zeros((LENGTH, 1), jnp.int32).at[1].set(padding)
    positions = jnp.maximum(jnp.arange(LENGTH) - first, 0)
    attention = model.stack.blocks.attention
    attention.cache = Cache(attention, LENGTH, LENGTH, start=first[:, 0])
    heads = (2, 4) if name == "llama" else (2, 8)
    assert attention.cache.key.shape == (3, LENGTH, LENGTH, *heads)
    parts = [
        run(model, tokens[:, i:j], positions=positions[:, i:j])
        for i, j in ((0, 5), (5, 6), (6, 7), (7, 8))
    ]
    actual = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(actual[::2], expected[::2], atol=tolerance)
    np.testing.assert_allclose(actual[1, padding:], expected[1, :-padding], atol=tolerance)
    attention.cache = Cache(attention, LENGTH, LENGTH)  # one that has seen nothing
    forgot = run(model, tokens[:, 7:], positions=positions[:, 7:])
    assert np.max(np.abs(forgot[::2, 0] - expected[::2, 7])) > 0.1


def test_a_mask_with_a_cache_is_refused(plain):
    model = nnx.clone(plain)
    attention = model.stack.blocks.attention
    attention.cache = Cache(attention, 1, LENGTH)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 8, 8\) with a cache"):
        model(TOKENS[:1], mask=jnp.ones((1, 1, 8, 8), bool))


# --- heads and heads of the vocabulary -------------------------------------------------


def test_a_shared_head_is_as_many_equal_ones(llama):
    alone = small("llama", PLAIN, num_kv_heads=4)
    params = nnx.state(llama, nnx.Param)
    attention = params["stack"]["blocks"]["attention"]
    shared = {name: attention[name]["kernel"][...] for name in ("key", "value")}

    def logits(repeat):
        for name, kernel in shared.items():
            heads = repeat(kernel.reshape(3, 16, 2, 4))
            attention[name]["kernel"] = nnx.Param(heads.reshape(3, 16, 16))
        nnx.update(alone, params)
        return run(alone, TOKENS)

    expected = run(llama, TOKENS)
    same = logits(lambda heads: jnp.repeat(heads, 2, axis=2))
    np.testing.assert_allclose(same, expected, atol=1e-5)
    interleaved = logits(lambda heads: jnp.tile(heads, (2, 1)))
    assert np.max(np.abs(interleaved - expected)) > 0.1


@pytest.mark.parametrize("name, tied", [("gpt2", True), ("llama", True), ("llama", False)])
def test_the_loss_is_that_of_the_logits(name, tied):
    options = {"tie_embeddings": tied} if name == "llama" else {}
    model = small(name, **options)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    labels = TOKENS[:2, :3]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(model.logits(features)), labels[..., None], -1)
    np.testing.assert_allclose(model.loss(features, labels), -chosen[..., 0], rtol=1e-5)
    assert (model.head is None) == tied
    table = model.embedding if tied else model.head
    np.testing.assert_allclose(model.logits(features), features @ table[...].T, atol=1e-5)


def test_dropout_of_llama_is_of_both_branches_and_off_at_inference(llama):
    model = small("llama", PLAIN, dropout_rate=0.5)
    blocks = model.stack.blocks
    assert blocks.attention.dropout.rate == blocks.mlp.dropout.rate == 0.5
    expected = run(llama, TOKENS)
    assert np.max(np.abs(run(model, TOKENS) - expected)) > 0.1
    model.eval()
    np.testing.assert_allclose(run(model, TOKENS), expected, atol=1e-6)


# --- rotation ------------------------------------------------------------------------


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


def test_positions_follow_those_in_the_cache():
    stack = PLAIN(lambda rngs: RotaryAttention(8, 2, rngs=rngs), 1, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    expected = stack(x)
    stack.blocks.cache = Cache(stack.blocks, 2, 5)
    parts = [stack(x[:, :3]), stack(x[:, 3:])]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-5)


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
