"""The chunked cross-entropy against optax on all logits: values, gradients, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from toy import assert_grads_close, assert_same_bits, relative_error
from toy_models import BF16, F32, SOURCE, TARGET, TOKENS, small, without_key_bias

from bdia_jax.losses import logits, softmax_cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compile")


def optax_loss(every, labels, smoothing=0.0):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, every.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(every, targets)


def full(features, table, labels, *, chunk_size=None, label_smoothing=0.0, **options):
    every = logits(features, table, **options)
    if label_smoothing:
        return optax_loss(every, labels, label_smoothing)
    return optax.losses.softmax_cross_entropy_with_integer_labels(every, labels)


def draw(shape, vocab_size, width, *, seed=0, scale=1.0, dtype=jnp.float32, with_bias=False):
    """(features, table, bias or None), labels, weights of the losses, every third one 0."""
    generator = np.random.default_rng(seed)  # jax.random would compile for every shape
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)  # noqa: E731
    features, table = scale * normal(*shape, width), normal(vocab_size, width)
    bias = jnp.asarray(normal(vocab_size)) if with_bias else None
    labels = generator.integers(vocab_size, size=shape, dtype=np.int32)
    weights = normal(*shape) * (np.arange(labels.size) % 3 != 2).reshape(shape)
    arrays = jnp.asarray(features, dtype), jnp.asarray(table, dtype), bias
    return arrays, jnp.asarray(labels), jnp.asarray(weights, jnp.float32)


STATIC = ("vocab_axis", "dtype", "chunk_size", "label_smoothing")


@functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
def loss_and_gradients(loss_fns, arrays, labels, weights, **options):
    """(losses, gradients) by each of loss_fns; compiled together, which is quicker."""

    def weighted(arrays, loss_fn):
        features, table, bias = arrays
        loss = loss_fn(features, table, labels, bias=bias, **options)
        return jnp.sum(loss * weights), loss

    results = [jax.grad(weighted, has_aux=True)(arrays, loss_fn) for loss_fn in loss_fns]
    return [(loss, gradients) for gradients, loss in results]


BOTH = (softmax_cross_entropy, full)


def ours(*args, **options):
    return loss_and_gradients((softmax_cross_entropy,), *args, **options)[0]


def compare(arrays, labels, weights, tolerance, **options):
    actual, expected = loss_and_gradients(BOTH, arrays, labels, weights, **options)
    assert actual[0].shape == labels.shape and actual[0].dtype == jnp.float32
    assert relative_error(actual[0], expected[0]) < F32  # the same products, whatever the dtype
    assert_grads_close(actual[1], expected[1], tolerance)


# --- values and gradients ------------------------------------------------------------


@pytest.mark.claim("the chunked loss is that of all logits")
@pytest.mark.parametrize(
    "shape, vocab_size, chunk_size, options",
    [
        ((2, 5), 23, 8, {"with_bias": True}),  # the last chunk starts early
        ((7,), 23, 22, {}),  # and has all but one class in common with the first
        ((1,), 23, 8, {}),
        ((), 23, 8, {"with_bias": True}),
        ((2, 1, 3), 5, 100, {}),
        ((4,), 6, 1, {}),
    ],
)
def test_it_is_the_cross_entropy_of_all_logits(shape, vocab_size, chunk_size, options):
    drawn = draw(shape, vocab_size, 6, **options)
    compare(*drawn, F32, chunk_size=chunk_size)


@pytest.mark.control("the chunked loss is that of all logits")
def test_control_classes_counted_twice_would_show():
    (features, table, _), labels, weights = draw((7,), 23, 6)
    twice = jnp.concatenate([table, table[15:16]])  # 24 = 3 chunks of 8
    actual = ours((features, twice, None), labels, weights, chunk_size=8)
    expected = ours((features, table, None), labels, weights, chunk_size=8)
    assert relative_error(actual[0], expected[0]) > 100 * F32
    assert relative_error(actual[1][0], expected[1][0]) > 100 * F32


@pytest.mark.parametrize("chunk_size", [8, 100])
def test_label_smoothing_is_the_loss_of_a_smoothed_target(chunk_size):
    drawn = draw((9,), 23, 6, with_bias=True)
    compare(*drawn, F32, chunk_size=chunk_size, label_smoothing=0.1)
    (smoothed, gradients), (plain, others) = (
        ours(*drawn, chunk_size=chunk_size, label_smoothing=smoothing) for smoothing in (0.1, 0.0)
    )
    for a, b in zip((smoothed, *gradients), (plain, *others), strict=True):
        assert relative_error(a, b) > 1e-2


def test_of_one_class_or_no_token_there_is_nothing_to_learn():
    for tokens, vocab_size in ((4, 1), (0, 5)):
        arrays, labels, weights = draw((tokens,), vocab_size, 6, with_bias=True)
        result = ours(arrays, labels, weights)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))
        assert result[0].shape == (tokens,)


@pytest.mark.full
@settings(max_examples=6)
@given(
    tokens=st.integers(2, 9),
    vocab_size=st.integers(2, 40),
    width=st.integers(1, 9),
    chunk_size=st.integers(1, 45),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_at_any_size(tokens, vocab_size, width, chunk_size, with_bias, seed):
    drawn = draw((tokens,), vocab_size, width, with_bias=with_bias, seed=seed)
    compare(*drawn, F32, chunk_size=chunk_size)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_kernel_is_a_table_whose_classes_are_the_last_axis(smoothing):
    (features, table, bias), labels, weights = draw((9,), 23, 6, with_bias=True)
    options = {"chunk_size": 8, "label_smoothing": smoothing}
    expected = ours((features, table, bias), labels, weights, **options)
    loss, gradients = ours((features, table.T, bias), labels, weights, vocab_axis=1, **options)
    assert_grads_close((loss, (gradients[0], gradients[1].T, gradients[2])), expected, F32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["of float32", "of bfloat16"])
def test_products_in_bfloat16(dtype):
    arrays, labels, weights = draw((40,), 23, 16, dtype=dtype, with_bias=True)
    compare(arrays, labels, weights, BF16, chunk_size=8, dtype=jnp.bfloat16)
    loss, gradients = ours(arrays, labels, weights, chunk_size=8, dtype=jnp.bfloat16)
    assert [leaf.dtype for leaf in gradients] == [dtype, dtype, jnp.float32]
    if dtype == jnp.float32:
        exact, _ = ours(arrays, labels, weights, chunk_size=8)
        assert 1e-4 < relative_error(loss, exact) < BF16


def test_operands_are_rounded_to_dtype_and_sums_are_not():
    features, table = jnp.ones((4001, 2)), jnp.zeros((3, 2))
    labels = jnp.zeros(4001, jnp.int32)

    def gradient(dtype):
        total = lambda w: jnp.sum(softmax_cross_entropy(features, w, labels, dtype=dtype))  # noqa: E731
        return jax.jit(jax.grad(total))(table)[:, 0]

    exact = np.array([-2, 1, 1], np.float32) / 3
    rounded = exact.astype(jnp.bfloat16).astype(np.float32)
    for dtype, one_token in ((jnp.bfloat16, rounded), (jnp.float32, exact)):
        np.testing.assert_allclose(gradient(dtype), 4001 * one_token, rtol=F32)


def test_four_products_of_bfloat16_give_float32():
    # looked up, since XLA on a CPU may keep more than a result's dtype says
    arrays, labels, weights = draw((9,), 23, 6, dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda *args: ours(*args))(arrays, labels, weights))
    assert re.findall(r":(\w+)\[[\d,]*\] = dot_general", text) == ["f32"] * 4


# --- labels and logits of all kinds --------------------------------------------------


def test_a_label_out_of_range_gives_nan_to_its_token_and_no_other():
    arrays, labels, weights = draw((8,), 23, 6)
    bad = labels.at[jnp.array([1, 3, 4, 6])].set(jnp.array([-1, 23, -100, 2**31 - 1]))
    loss, gradients = ours(arrays, bad, weights, chunk_size=8)
    good, _ = ours(arrays, labels, weights, chunk_size=8)
    assert_same_bits(loss[jnp.array([0, 2, 5, 7])], good[jnp.array([0, 2, 5, 7])])
    assert np.all(np.isnan(loss[jnp.array([1, 3, 4, 6])]))
    assert all(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(gradients))


def test_padding_may_have_any_label_if_its_loss_is_not_used():
    arrays, labels, _ = draw((8,), 23, 6)
    real = jnp.arange(8) % 3 > 0

    def masked(loss_fn, labels):
        def total(arrays):
            features, table, _ = arrays
            return jnp.sum(jnp.where(real, loss_fn(features, table, labels), 0.0))

        return jax.jit(jax.value_and_grad(total))(arrays)

    actual = masked(chunked, jnp.where(real, labels, -100))
    assert_grads_close(actual, masked(full, labels), F32)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_labels_of_other_integers(dtype):
    (features, table, _), labels, _ = draw((9,), 300, 6)
    narrow = np.asarray(labels % 200).astype(dtype)
    labels = narrow if dtype == np.int64 else jnp.asarray(narrow)  # jnp has none of 64 bits
    actual = softmax_cross_entropy(features, table, labels)
    assert relative_error(actual, full(features, table, jnp.asarray(narrow, jnp.int32))) < F32


def test_logits_of_ten_thousand_do_not_overflow():
    arrays, labels, weights = draw((9,), 23, 6, scale=1e4)
    every = logits(*arrays[:2])
    assert np.max(every) > 1e4 and np.min(every) < -1e4
    likeliest = labels.at[:4].set(jnp.argmax(every, axis=-1)[:4])
    compare(arrays, likeliest, weights, F32, chunk_size=8)
    loss = softmax_cross_entropy(*arrays[:2], likeliest, chunk_size=8)
    np.testing.assert_array_equal(loss[:4], 0)  # not even the rounding of 1e4
    naive = jnp.log(jnp.sum(jnp.exp(every), axis=-1))
    assert np.all(np.isinf(naive))


def test_a_bias_may_rule_out_a_whole_chunk():
    (features, table, _), labels, weights = draw((9,), 23, 6)
    bias = jnp.zeros(23).at[:8].set(-jnp.inf)
    labels = jnp.maximum(labels, 8)
    compare((features, table, bias), labels, weights, F32, chunk_size=8)
    ruled_out = softmax_cross_entropy(features, table, labels.at[0].set(3), bias=bias, chunk_size=4)
    assert np.isinf(ruled_out[0]) and np.all(np.isfinite(ruled_out[1:]))


# --- transformations -----------------------------------------------------------------

chunked = functools.partial(softmax_cross_entropy, chunk_size=8)


def vmapped(loss_fn, labels):
    return lambda x, w: jax.vmap(loss_fn)(x, w, labels)


def checkpointed(loss_fn, labels):
    return jax.checkpoint(lambda x, w: loss_fn(x, w, labels))


@pytest.mark.parametrize("transform", [vmapped, checkpointed])
def test_it_transforms(transform):
    (features, table, _), labels, _ = draw((3, 4), 23, 6)
    if transform is vmapped:
        table = jnp.stack([table, 2 * table, -table])

    def gradients(loss_fn):
        total = lambda x, w: jnp.sum(jnp.sin(transform(loss_fn, labels)(x, w)))  # noqa: E731
        return jax.jit(jax.grad(total, (0, 1)))(features, table)

    assert_grads_close(gradients(chunked), gradients(full), F32)


@pytest.mark.full
def test_second_derivatives_are_right_and_forward_mode_is_refused_by_jax():
    (features, table, _), labels, _ = draw((2,), 5, 2)

    def hessian(loss_fn):
        total = lambda x, w: jnp.sum(jnp.sin(loss_fn(x, w, labels)))  # noqa: E731
        return jax.jit(jax.jacrev(jax.grad(total, (0, 1)), (0, 1)))(features, table)

    few = functools.partial(softmax_cross_entropy, chunk_size=2)
    assert_grads_close(hessian(few), hessian(full), F32)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: few(x, table, labels), (features,), (features,))


def test_sharded_over_tokens_equals_unsharded():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    (features, table, _), labels, weights = draw((8,), 23, 6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    split = jax.device_put((features, labels, weights), sharding)
    whole = jax.device_put(table, NamedSharding(mesh, PartitionSpec()))
    expected = ours((features, table, None), labels, weights, chunk_size=8)
    actual = ours((split[0], whole, None), split[1], split[2], chunk_size=8)
    assert actual[0].sharding.is_equivalent_to(sharding, 1)
    assert_grads_close(actual, expected, F32)


# --- memory --------------------------------------------------------------------------

ROWS, WIDTH, VOCAB = 256, 64, 8193


@functools.cache
def temp_bytes(loss_fn, vocab_size=VOCAB, vocab_axis=0, gradient=True) -> int:
    shape = (vocab_size, WIDTH) if vocab_axis == 0 else (WIDTH, vocab_size)
    arrays = (
        jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    )

    def total(features, table, labels):
        return jnp.sum(loss_fn(features, table, labels, vocab_axis=vocab_axis))

    program = jax.jit(jax.value_and_grad(total, (0, 1)) if gradient else total)
    return program.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


in_chunks = functools.partial(softmax_cross_entropy, chunk_size=128)
CHUNK_BYTES = 4 * ROWS * 128  # of logits


@pytest.mark.claim("the loss needs the memory of a chunk")
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_its_memory_is_that_of_a_chunk(vocab_axis):
    few, many = (temp_bytes(in_chunks, size, vocab_axis) for size in (VOCAB, 2 * VOCAB))
    assert CHUNK_BYTES <= few < 4 * CHUNK_BYTES  # less than the table, so there is no copy
    assert 4 * CHUNK_BYTES < 4 * VOCAB * WIDTH
    assert abs(many - few) < 1024  # whatever V
    assert temp_bytes(in_chunks, VOCAB, vocab_axis, gradient=False) < 4 * CHUNK_BYTES


@pytest.mark.control("the loss needs the memory of a chunk")
def test_control_all_logits_at_once_take_all_their_memory():
    assert temp_bytes(full) >= 4 * ROWS * VOCAB
    assert temp_bytes(full, 2 * VOCAB) > 1.9 * temp_bytes(full)
    assert temp_bytes(full, gradient=False) >= 4 * ROWS * VOCAB


def test_label_smoothing_needs_no_more_than_a_chunk_more():
    smoothed = functools.partial(in_chunks, label_smoothing=0.1)
    assert temp_bytes(smoothed) <= temp_bytes(in_chunks) + CHUNK_BYTES


@pytest.mark.control("the loss needs the memory of a chunk")
def test_control_the_transpose_of_a_kernel_is_a_copy():
    def of_transpose(features, kernel, labels, vocab_axis):
        return in_chunks(features, kernel.T, labels)

    assert temp_bytes(of_transpose, vocab_axis=1) > 4 * VOCAB * WIDTH


def test_what_waits_for_the_backward_pass_is_a_number_a_token():
    (features, table, _), labels, _ = draw((9,), 23, 6)
    loss = lambda x, w: chunked(x, w, labels)  # noqa: E731
    residuals = jax.eval_shape(lambda x, w: jax.vjp(loss, x, w)[1], features, table)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(residuals))
    assert sizes == sorted([features.size, table.size, 9, 9])  # and the labels


# --- the models ----------------------------------------------------------------------


@pytest.mark.full
def test_the_gradients_of_gpt2_are_those_of_its_logits():
    model = small("gpt2", depth=1, vocab_size=2100)
    labels = jnp.asarray(np.random.default_rng(0).integers(2100, size=TOKENS.shape), jnp.int32)

    def chunked(model):
        return model.loss(model.features(TOKENS, rngs=nnx.Rngs(1)), labels)

    def full(model):
        return optax_loss(model(TOKENS, rngs=nnx.Rngs(1)), labels)

    @nnx.jit
    def run(model):
        def total(model, loss_fn):
            loss = loss_fn(model)
            return jnp.sum(jnp.sin(loss)), loss

        return [nnx.grad(total, has_aux=True)(model, loss_fn) for loss_fn in (chunked, full)]

    (gradients, loss), (expected_gradients, expected) = run(model)
    assert relative_error(loss, expected) < F32
    gradients, expected_gradients = map(without_key_bias, (gradients, expected_gradients))
    assert_grads_close(gradients, expected_gradients, F32)  # of the tied table, too


def test_a_models_loss_is_of_its_own_logits_and_dtype():
    model = small("transformer", encoder_depth=1, decoder_depth=1, dtype=jnp.bfloat16)
    model.eval()

    @nnx.jit
    def run(model):
        memory = model.encode(SOURCE)
        features = model.features(SOURCE, TARGET)
        in_float32 = logits(features, model.embedding[...])
        decoded = model.decode(TARGET, memory, SOURCE != 0)
        losses = [model.loss(features, TARGET, smoothing) for smoothing in (0.0, 0.2)]
        return losses, model(SOURCE, TARGET), decoded, in_float32

    (loss, smoothed), every, decoded, in_float32 = run(model)
    assert relative_error(loss, optax_loss(every, TARGET)) < F32
    assert relative_error(smoothed, optax_loss(every, TARGET, 0.2)) < F32
    assert relative_error(smoothed, loss) > 1e-3
    assert relative_error(decoded, every) < F32
    assert relative_error(loss, optax_loss(in_float32, TARGET)) > 10 * F32


# --- refusals ------------------------------------------------------------------------

X, TABLE, LABELS = jnp.ones((2, 3, 4)), jnp.ones((7, 4)), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    "change, value, remedy",
    [
        ({"features": X.astype(jnp.float16)}, "float16", "features.astype(jnp.float32)"),
        ({"features": jnp.float32(0)}, "features ()", "[..., D]"),
        ({"table": TABLE.astype(int)}, "int32", "table.astype(jnp.float32)"),
        ({"table": TABLE.T}, "table has shape (4, 7)", "vocab_axis=1"),
        ({"vocab_axis": 1}, "table has shape (7, 4)", "vocab_axis=0"),
        ({"table": TABLE[0]}, "table has shape (4,)", "[V, D]"),
        ({"table": TABLE[:0]}, "table has shape (0, 4)", "[V, D]"),
        ({"vocab_axis": 2}, "vocab_axis is 2", "expected 0"),
        ({"labels": LABELS.astype(jnp.float32)}, "float32", "labels.astype(jnp.int32)"),
        ({"labels": LABELS > 0}, "bool", "labels.astype(jnp.int32)"),
        ({"labels": LABELS[:, :2]}, "shape (2, 2)", "expected (2, 3)"),
        ({"bias": jnp.ones(4)}, "shape (4,)", "[V] = (7,)"),
        ({"bias": jnp.ones(7, int)}, "bias has dtype int32", "bias.astype(jnp.float32)"),
        ({"chunk_size": 0}, "chunk_size is 0", "at least 1"),
        ({"chunk_size": 4.0}, "chunk_size is 4.0", "an int"),
        ({"chunk_size": True}, "chunk_size is True", "an int"),
        ({"dtype": jnp.int32}, "dtype is int32", "jnp.bfloat16"),
        ({"dtype": bool}, "dtype is bool", "None"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1", "below 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0", "below 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan", "below 1"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_refusal(change, value, remedy):
    options = {"features": X, "table": TABLE, "labels": LABELS} | change
    with pytest.raises(ValueError, match=re.escape(value)) as error:
        jax.eval_shape(lambda: softmax_cross_entropy(**options))
    assert remedy in str(error.value)


def test_logits_of_integers_are_refused_too():
    with pytest.raises(ValueError, match="dtype is int32, expected a float dtype"):
        jax.eval_shape(lambda: logits(X, TABLE, dtype=jnp.int32))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"chunk_size": 4}])
def test_the_same_arguments_otherwise_are_accepted(options):
    loss = jax.eval_shape(lambda: softmax_cross_entropy(X, TABLE, LABELS, **options))
    assert loss.shape == (2, 3)
