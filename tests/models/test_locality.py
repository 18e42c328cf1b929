"""Shifted patches and locality self-attention, against their equations in NumPy, and in a ViT."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_grads_close, relative_error
from toy_models import F32, IMAGES, STORE, count_parameters, filled, gradient, run, small

from bdia_jax.baselines import RevStack
from bdia_jax.models.attention import Attention
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.locality import LocalityAttention, ShiftedPatches
from bdia_jax.models.vit import ViT
from bdia_jax.nnx import BDIAStack
from configs import vit_digits
from train.tasks import open_config

pytestmark = pytest.mark.usefixtures("quick_compile")

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
BOTH = {"shifted_patches": True, "locality_attention": True}


def make(cls, *sizes, **options):
    return filled(lambda: cls(*sizes, **options, rngs=nnx.Rngs(0)))


# --- shifted patches -----------------------------------------------------------------


def moved(images, down, right):
    """The images moved by so many pixels, zeros moving in."""
    out = np.zeros_like(images)
    _, height, width, _ = images.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                out[:, y, x] = images[:, y - down, x - right]
    return out


@pytest.mark.parametrize("shape, size, half", [((8, 4, 3), 4, 2), ((6, 9, 1), 3, 1)])
def test_patches_are_of_the_image_and_four_that_moved_by_half_a_patch(shape, size, half):
    images = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    patches = make(ShiftedPatches, shape[-1], 5, patch_size=size)
    # the order only decides which row of the kernel is whose
    diagonals = ((half, half), (half, -half), (-half, half), (-half, -half))
    everything = np.concatenate([images, *(moved(images, *each) for each in diagonals)], -1)
    actual = patches(jnp.asarray(images))
    assert actual.shape == (2, shape[0] // size, shape[1] // size, 5)
    scale, shift = patches.norm.scale[...], patches.norm.bias[...]
    for row, column in np.ndindex(actual.shape[1:3]):
        area = everything[:, row * size :][:, :size, column * size :][:, :, :size].reshape(2, -1)
        normal = (area - area.mean(-1, keepdims=True)) / np.sqrt(area.var(-1, keepdims=True) + 1e-6)
        expected = (normal * scale + shift) @ patches.linear.kernel[...] + patches.linear.bias[...]
        np.testing.assert_allclose(actual[:, row, column], expected, atol=2e-5)


def test_half_a_pixel_is_no_shift():
    with pytest.raises(ValueError, match="patch_size 1 has no half to shift by, expected 2"):
        ShiftedPatches(3, 8, patch_size=1, rngs=nnx.Rngs(0))


# --- locality self-attention ---------------------------------------------------------


def by_equation(attention, mask):
    """softmax(q k^T / tau) v of X in NumPy, where the mask lets a token see."""
    linears = (attention.query, attention.key, attention.value)
    q, k, v = (np.asarray(X @ linear.kernel[...]).reshape(2, 6, 2, 4) for linear in linears)
    q, k, v = (np.moveaxis(y, 2, 1) for y in (q, k, v))
    tau = np.exp(float(attention.log_temperature[...]))
    weights = np.exp(np.where(mask, q @ k.swapaxes(-1, -2) / tau, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    joined = np.moveaxis(weights @ v, 1, 2).reshape(2, 6, 8)
    return joined @ np.asarray(attention.out.kernel[...]) + np.asarray(attention.out.bias[...])


def test_it_is_softmax_over_the_other_tokens_as_sharp_as_the_temperature_says():
    attention, others = make(LocalityAttention, 8, 2), ~np.eye(6, dtype=bool)
    attention.log_temperature[...] = jnp.float32(-0.7)
    np.testing.assert_allclose(attention(X), by_equation(attention, others), atol=1e-4)
    assert np.max(np.abs(attention(X) - by_equation(attention, True))) > 1e-2
    seen = np.arange(6) < 4
    actual = attention(X, jnp.asarray(seen)[None, None, None])
    np.testing.assert_allclose(actual, by_equation(attention, others & seen), atol=1e-4)


def test_it_starts_as_attention_to_the_others():
    locality, plain = (cls(8, 2, rngs=nnx.Rngs(0)) for cls in (LocalityAttention, Attention))
    expected = plain(X, ~jnp.eye(6, dtype=bool)[None, None])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_allclose(locality(X), expected, atol=1e-6)


def seen_values(attention):
    """[T, T] of bools: whether output i changes with the value of token j alone."""
    q, k, v = attention._project(X)
    outputs = lambda v: attention._attend(q, k, v, None)  # noqa: E731
    moved = [outputs(v.at[:, j].add(1.0)) != outputs(v) for j in range(6)]
    return np.stack([np.any(np.asarray(each), axis=(0, 2)) for each in moved], axis=1)


def test_a_token_does_not_see_its_own_value_and_of_attention_it_does():
    np.testing.assert_array_equal(
        seen_values(make(LocalityAttention, 8, 2)), ~np.eye(6, dtype=bool)
    )
    assert seen_values(make(Attention, 8, 2)).all()


def test_the_temperature_has_a_gradient():
    attention = make(LocalityAttention, 8, 2)

    def loss(attention):
        return jnp.sum(jnp.sin(attention(X)))

    def loss_at(log_temperature):
        attention.log_temperature[...] = jnp.float32(log_temperature)
        return loss(attention)

    difference = (loss_at(0.45) - loss_at(0.35)) / 0.1
    loss_at(0.4)
    slope = nnx.grad(loss)(attention).log_temperature[...]
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(slope, difference, rtol=2e-2)


def test_in_bfloat16_it_is_close_and_float32():
    half = make(LocalityAttention, 8, 2, dtype=jnp.bfloat16)(X)
    assert half.dtype == jnp.float32
    assert 1e-4 < relative_error(half, make(LocalityAttention, 8, 2)(X)) < 5e-2


def test_one_token_has_no_other():
    with pytest.raises(ValueError, match=r"x has 1 token and none beside it"):
        make(LocalityAttention, 8, 2)(X[:, :1])


# --- in a ViT ------------------------------------------------------------------------


def test_they_add_these_parameters_to_the_papers_vit():
    plain, both = (
        count_parameters(lambda options=options: ViT(**options, rngs=nnx.Rngs(0)))
        for options in ({}, BOTH)
    )
    features = 5 * 4 * 4 * 3
    assert both - plain == (features - 48) * 512 + 2 * features + 6


@pytest.mark.full
@pytest.mark.claim("rebuild is exact")
def test_the_rebuild_of_a_vit_with_both_is_exact(optimized):
    model = small("vit", **BOTH)
    tokens = model.positions[...] + jnp.linspace(-2, 2, 16) * IMAGES[:, :5, 0, :1]
    assert model.stack.audit(tokens).exact


@pytest.mark.full
@pytest.mark.claim("gradients equal store's")
def test_reversible_gradients_of_a_vit_with_both_equal_stored_ones():
    actual, expected = (gradient(small("vit", s, **BOTH), IMAGES) for s in (BDIAStack, STORE))
    assert np.all(np.abs(actual.stack.blocks.attention.log_temperature[...]) > 0)
    assert_grads_close(actual, expected, F32)


def test_a_revvit_takes_both():
    model = small("vit", RevStack, num_classes=7, **BOTH)
    logits = run(model, IMAGES)
    assert logits.shape == (3, 7) and np.isfinite(logits).all()


@pytest.mark.parametrize(
    "attention", [partial(LinformerAttention, num_tokens=5, projected=3), LocalityAttention]
)
def test_two_kinds_of_attention_are_refused(attention):
    named = f"locality_attention=True with attention={re.escape(str(attention))}"
    with pytest.raises(ValueError, match=named):
        small("vit", locality_attention=True, attention=attention)


def test_a_config_with_two_kinds_of_attention_is_refused():
    config = vit_digits.get_config()
    config.model.update(locality_attention=True, linformer_dim=4)
    with pytest.raises(ValueError, match=r"linformer_dim is 4 with model\.locality_attention=True"):
        open_config(config)
