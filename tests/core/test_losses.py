"""The chunked cross-entropy against optax on all logits: values, gradients, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from optax.losses import softmax_cross_entropy_with_integer_labels as optax_loss
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error
from toy_models import filled, without_key_bias

from bdia_jax.losses import logits, softmax_cross_entropy
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compile")

F32, BF16 = (GRAD_TOLERANCE[jnp.dtype(dtype)] for dtype in (jnp.float32, jnp.bfloat16))


def full(features, table, labels, *, chunk_size=None, **options):
    return optax_loss(logits(features, table, **options), labels)


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


@functools.partial(jax.jit, static_argnums=0, static_argnames=("vocab_axis", "dtype", "chunk_size"))
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


def test_of_one_class_or_no_token_there_is_nothing_to_learn():
    for tokens, vocab_size in ((4, 1), (0, 5)):
        arrays, labels, weights = draw((tokens,), vocab_size, 6, with_bias=True)
        result = ours(arrays, labels, weights)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))
        assert result[0].shape == (tokens,)


@settings(max_examples=8)
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


def test_a_kernel_is_a_table_whose_classes_are_the_last_axis():
    (features, table, bias), labels, weights = draw((9,), 23, 6, with_bias=True)
    by_row, by_column = (
        ours(each, labels, weights, vocab_axis=axis,
                           chunk_size=8)
        for axis, each in ((0, (features, table, bias)), (1, (features, table.T, bias)))
    )  # fmt: skip
    transposed = (by_column[1][0], by_column[1][1].T, by_column[1][2])
    assert_grads_close((by_column[0], transposed), by_row, F32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["of float32", "of bfloat16"])
def test_products_in_bfloat16(dtype):
    arrays, labels, weights = draw((40,), 23, 16, dtype=dtype, with_bias=True)
    compare(arrays, labels, weights, BF16, chunk_size=8, dtype=jnp.bfloat16)
    _, gradients = ours(arrays, labels, weights)
    assert [leaf.dtype for leaf in gradients] == [dtype, dtype, jnp.float32]


def test_control_products_in_bfloat16_are_not_those_of_float32():
    drawn = draw((40,), 23, 16)
    loss, exact = (ours(*drawn, dtype=dtype)[0] for dtype in (jnp.bfloat16, jnp.float32))
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


def test_control_classes_counted_twice_would_show():
    (features, table, _), labels, weights = draw((7,), 23, 6)
    twice = jnp.concatenate([table, table[15:16]])  # 24 = 3 chunks of 8
    actual = ours((features, twice, None), labels, weights, chunk_size=8)
    expected = ours((features, table, None), labels, weights, chunk_size=8)
    assert relative_error(actual[0], expected[0]) > 100 * F32
    assert relative_error(actual[1][0], expected[1][0]) > 100 * F32


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

    chunked = functools.partial(softmax_cross_entropy, chunk_size=8)
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
    drawn = (features, table, bias), labels, weights
    compare(*drawn, F32, chunk_size=8)
    ruled_out = softmax_cross_entropy(features, table, labels.at[0].set(3), bias=bias, chunk_size=4)
    assert np.isinf(ruled_out[0]) and np.all(np.isfinite(ruled_out[1:]))


# --- transformations -----------------------------------------------------------------

chunked = functools.partial(softmax_cross_entropy, chunk_size=8)


def test_it_transforms():
    (features, table, _), labels, _ = draw((3, 4), 23, 6)
    tables = jnp.stack([table, 2 * table, -table])

    def gradients(loss_fn, wrap):
        total = lambda x, w: jnp.sum(jnp.sin(wrap(loss_fn)(x, w)))  # noqa: E731
        return jax.jit(jax.grad(total, (0, 1)))

    def vmapped(loss_fn):
        return lambda x, w: jax.vmap(loss_fn)(x, w, labels)

    def checkpointed(loss_fn):
        return jax.checkpoint(lambda x, w: loss_fn(x, w, labels))

    for wrap, weights in ((vmapped, tables), (checkpointed, table)):
        actual, expected = (gradients(f, wrap)(features, weights) for f in (chunked, full))
        assert_grads_close(actual, expected, F32)


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

TOKENS, WIDTH, VOCAB = 256, 64, 8193


@functools.cache
def temp_bytes(loss_fn, vocab_size=VOCAB, vocab_axis=0, gradient=True) -> int:
    shape = (vocab_size, WIDTH) if vocab_axis == 0 else (WIDTH, vocab_size)
    arrays = (
        jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    )

    def total(features, table, labels):
        return jnp.sum(loss_fn(features, table, labels, vocab_axis=vocab_axis))

    program = jax.jit(jax.value_and_grad(total, (0, 1)) if gradient else total)
    return program.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


in_chunks = functools.partial(softmax_cross_entropy, chunk_size=128)
CHUNK_BYTES = 4 * TOKENS * 128  # of logits


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_its_memory_is_that_of_a_chunk(vocab_axis):
    few, many = (temp_bytes(in_chunks, size, vocab_axis) for size in (VOCAB, 2 * VOCAB))
    assert CHUNK_BYTES <= few < 4 * CHUNK_BYTES  # less than the table, so there is no copy
    assert 4 * CHUNK_BYTES < 4 * VOCAB * WIDTH
    assert abs(many - few) < 1024  # whatever V
    assert temp_bytes(in_chunks, VOCAB, vocab_axis, gradient=False) < 4 * CHUNK_BYTES


def test_control_all_logits_at_once_take_all_their_memory():
    assert temp_bytes(full) >= 4 * TOKENS * VOCAB
    assert temp_bytes(full, 2 * VOCAB) > 1.9 * temp_bytes(full)
    assert temp_bytes(full, gradient=False) >= 4 * TOKENS * VOCAB


def test_control_the_transpose_of_a_kernel_is_a_copy():
    def of_transpose(features, kernel, labels, vocab_axis):
        return in_chunks(features, kernel.T, labels)

    assert temp_bytes(of_transpose, vocab_axis=1) > 4 * VOCAB * WIDTH


def test_what_waits_for_the_backward_pass_is_a_number_a_token():
    (features, table, _), labels, _ = draw((9,), 23, 6)
    residuals = jax.eval_shape(lambda x, w: jax.vjp(lambda *a: chunked(*a, labels), x, w)[1],
                               features, table)  # fmt: skip
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(residuals))
    assert sizes == sorted([features.size, table.size, 9, 9])  # and the labels


# --- the models ----------------------------------------------------------------------

TOY = {"width": 8, "num_heads": 2, "mlp_dim": 8, "dropout_rate": 0.0}


def test_gpt2_has_the_loss_of_its_logits():
    model = filled(lambda: GPT2(2100, 8, depth=1, **TOY, rngs=nnx.Rngs(0)))
    tokens, labels = jax.random.randint(jax.random.key(0), (2, 2, 5), 0, 2100)

    def chunked(model):
        return model.loss(model.features(tokens, rngs=nnx.Rngs(1)), labels)

    def full(model):
        return optax_loss(model(tokens, rngs=nnx.Rngs(1)), labels)

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


def test_the_transformer_has_the_loss_of_its_logits():
    def make():
        options = {"encoder_depth": 1, "decoder_depth": 1, "dtype": jnp.bfloat16}
        return Transformer(50, 8, **options, **TOY, rngs=nnx.Rngs(0))

    model = filled(make)
    model.eval()
    source, target, labels = jax.random.randint(jax.random.key(0), (3, 2, 5), 1, 50)

    @nnx.jit
    def run(model):
        memory = model.encode(source)
        features = model.features(source, target)
        in_float32 = logits(features, model.embedding[...])
        decoded = model.decode(target, memory, source != 0)
        return model.loss(features, labels), model(source, target), decoded, in_float32

    loss, every, decoded, in_float32 = run(model)
    assert relative_error(loss, optax_loss(every, labels)) < F32
    assert relative_error(decoded, every) < F32
    assert relative_error(loss, optax_loss(in_float32, labels)) > 10 * F32  # its own dtype


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
