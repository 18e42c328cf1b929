"""The smoothed loss against optax on all logits and one smoothed target a token."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import GRAD_TOLERANCE, assert_grads_close, relative_error
from toy_models import filled

from bdia_jax.losses import logits, softmax_cross_entropy
from bdia_jax.models.gpt2 import GPT2

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
VOCAB = 23


def reference(every, labels, smoothing):
    """The cross-entropy of logits with optax's smoothed labels."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, every.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(every, targets)


@functools.partial(jax.jit, static_argnames=("vocab_axis", "chunk_size"))
def results(features, table, bias, labels, weights, vocab_axis, chunk_size):
    """(loss, gradients): ours, optax's, and ours with another share."""

    def ours(smoothing, features, table, bias):
        return softmax_cross_entropy(
            features,
            table,
            labels,
            bias=bias,
            vocab_axis=vocab_axis,
            chunk_size=chunk_size,
            label_smoothing=smoothing,
        )

    def theirs(features, table, bias):
        every = logits(features, table, bias=bias, vocab_axis=vocab_axis)
        return reference(every, labels, 0.1)

    def both(loss_fn):
        weighted = lambda *args: jnp.sum(weights * loss_fn(*args))  # noqa: E731
        arguments = features, table, bias
        return loss_fn(*arguments), jax.grad(weighted, (0, 1, 2))(*arguments)

    partial = functools.partial
    return both(partial(ours, 0.1)), both(theirs), both(partial(ours, 0.0))


@pytest.mark.parametrize("vocab_axis, chunk_size", [(0, 8), (1, 8), (0, 100)])
def test_it_is_the_loss_of_a_smoothed_target(vocab_axis, chunk_size):
    """In chunks of which the last two overlap, in a whole one, and of a table the other way."""
    normal = np.random.default_rng(0).normal
    features, bias, weights = normal(size=(9, 6)), normal(size=VOCAB), normal(size=9)
    table = normal(size=(VOCAB, 6) if vocab_axis == 0 else (6, VOCAB))
    labels = np.arange(9, dtype=np.int32) * 2
    arrays = (jnp.asarray(x, jnp.float32) for x in (features, table, bias))
    ours, theirs, unsmoothed = results(
        *arrays, labels, weights.astype(np.float32), vocab_axis=vocab_axis, chunk_size=chunk_size
    )
    assert relative_error(ours[0], theirs[0]) < F32
    assert_grads_close(ours[1], theirs[1], F32)
    for mine, other in zip(jax.tree.leaves(unsmoothed), jax.tree.leaves(theirs), strict=True):
        assert relative_error(mine, other) > 1e-2


def test_it_needs_no_more_memory():
    """A loss and a gradient of 256 tokens and 8,193 classes, in chunks of 128 of them."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 64), (8193, 64))]
    labels = jax.ShapeDtypeStruct((256,), jnp.int32)

    def temp_bytes(loss_fn):
        total = lambda x, w, labels: jnp.sum(loss_fn(x, w, labels))  # noqa: E731
        program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*shapes, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    def by_optax(x, w, labels):
        return reference(logits(x, w), labels, 0.1)

    chunked = functools.partial(softmax_cross_entropy, chunk_size=128)
    without, smoothed = temp_bytes(chunked), temp_bytes(
        functools.partial(chunked, label_smoothing=0.1)
    )  # fmt: skip
    assert smoothed <= without + 4 * 256 * 128  # at most one more chunk of logits
    assert temp_bytes(by_optax) > 4 * 256 * 8193  # the control holds them all


def test_gpt2_passes_it_on():
    model = filled(
        lambda: GPT2(VOCAB, 8, depth=1, width=8, num_heads=2, mlp_dim=8, rngs=nnx.Rngs(0))
    )
    model.eval()
    tokens, labels = jax.random.randint(jax.random.key(0), (2, 2, 5), 0, VOCAB)

    @nnx.jit
    def run(model):
        features = model.features(tokens)
        smoothed, plain = (model.loss(features, labels, smoothing) for smoothing in (0.2, 0.0))
        return smoothed, plain, model.logits(features)

    smoothed, plain, every = run(model)
    assert relative_error(smoothed, reference(every, labels, 0.2)) < F32
    assert relative_error(smoothed, plain) > 1e-3


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(smoothing):
    features, table, labels = jnp.ones((2, 4)), jnp.ones((7, 4)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=re.escape(f"label_smoothing is {smoothing}")):
        softmax_cross_entropy(features, table, labels, label_smoothing=smoothing)
