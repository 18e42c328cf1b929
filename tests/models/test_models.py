from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from toy import GRAD_TOLERANCE, assert_grads_close, assert_same_bits, relative_error

from bdia_jax import FixedPoint
from bdia_jax.baselines import MidpointStack, RevStack
from bdia_jax.models.blocks import MLP, Attention, PreNormBlock
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.vit import ViT
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
F32 = GRAD_TOLERANCE[jnp.dtype(jnp.float32)]
X = jax.random.normal(jax.random.key(0), (2, 6, 8))
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
TOKENS = jax.random.normal(jax.random.key(2), (3, 5, 16))
PLAIN = partial(BDIAStack, magnitude=0, fixed_point=None, backprop="store")
SMALL = {"image_shape": (8, 8, 3), "width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24}


def small_vit(seed=0, **options):
    return ViT(**(SMALL | options), rngs=nnx.Rngs(seed))


def evaluated(model):
    model.eval()
    return model


# --- blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: Attention(8, 2, **kw),
        lambda **kw: MLP(8, 12, **kw),
        lambda **kw: PreNormBlock(8, 2, 12, **kw),
    ],
    ids=["attention", "mlp", "block"],
)
def test_every_part_returns_float32_of_the_shape_of_x(make, dtype):
    h = make(dtype=dtype, rngs=nnx.Rngs(0))(X)
    assert h.shape == X.shape and h.dtype == jnp.float32
    reference = make(dtype=jnp.float32, rngs=nnx.Rngs(0))(X)
    error = relative_error(h, reference)
    assert error == 0 if dtype == jnp.float32 else 0 < error < 2e-2


def test_the_block_is_h_of_the_pre_norm_transformer():
    block = PreNormBlock(8, 2, 12, rngs=nnx.Rngs(0))
    x = X + block.attention(block.attention_norm(X))
    x = x + block.mlp(block.mlp_norm(x))
    np.testing.assert_allclose(X + block(X), x, atol=1e-6)


def test_attention_is_softmax_of_scaled_products():
    attention = Attention(8, 2, rngs=nnx.Rngs(0))
    q, k, v = (
        np.moveaxis(np.asarray(X @ linear.kernel[...]).reshape(2, 6, 2, 4), 2, 1)  # [B, H, T, 4]
        for linear in (attention.query, attention.key, attention.value)
    )
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0)
    joined = np.moveaxis(np.asarray(weights) @ v, 1, 2).reshape(2, 6, 8)
    expected = joined @ np.asarray(attention.out.kernel[...]) + np.asarray(attention.out.bias[...])
    np.testing.assert_allclose(attention(X), expected, atol=1e-5)


def changed_tokens(block, at, **kwargs):
    """Which outputs move when token `at` moves."""
    moved = X.at[:, at].add(1.0)
    return np.any(np.asarray(block(X, **kwargs) != block(moved, **kwargs)), axis=(0, 2))


def test_a_causal_block_does_not_look_ahead():
    block = PreNormBlock(8, 2, 12, attention=partial(Attention, is_causal=True), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(changed_tokens(block, 3), np.arange(6) >= 3)
    free = PreNormBlock(8, 2, 12, rngs=nnx.Rngs(0))
    assert changed_tokens(free, 3).all()


def test_a_masked_token_is_not_seen():
    block = PreNormBlock(8, 2, 12, rngs=nnx.Rngs(0))
    mask = (jnp.arange(6) != 3)[None, None, None]
    np.testing.assert_array_equal(changed_tokens(block, 3, mask=mask), np.arange(6) == 3)


def test_dropout_reaches_attention_and_mlp():
    for part in (Attention(8, 2, dropout_rate=0.5, rngs=nnx.Rngs(0)),
                 MLP(8, 12, dropout_rate=0.5, rngs=nnx.Rngs(0))):  # fmt: skip
        assert 0.3 < np.mean(np.asarray(part(X)) == 0) < 0.7
        part.eval()
        assert np.mean(np.asarray(part(X)) == 0) == 0


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 8 is not divisible by num_heads 3"):
        Attention(8, 3, rngs=nnx.Rngs(0))


# --- ViT -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_have_one_column_a_class(dtype):
    logits = small_vit(dtype=dtype, num_classes=7)(IMAGES)
    assert logits.shape == (3, 7) and logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))


def test_the_papers_model_has_the_parameters_its_dimensions_say():
    model = nnx.eval_shape(lambda: ViT(rngs=nnx.Rngs(0)))
    width, mlp, depth, classes, patch, tokens = 512, 512, 6, 10, 4 * 4 * 3, 8 * 8 + 1
    norm = 2 * width
    attention = 3 * width * width + (width * width + width)
    feed_forward = (width * mlp + mlp) + (mlp * width + width)
    expected = (
        (patch * width + width)  # patches
        + width  # class token
        + tokens * width
        + depth * (2 * norm + attention + feed_forward)
        + norm
        + (width * classes + classes)
    )
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert counted == expected == 9_523_722


def test_eval_is_deterministic_and_train_is_not():
    model = small_vit()
    assert np.any(model(IMAGES) != model(IMAGES))
    model.eval()
    assert_same_bits(model(IMAGES), model(IMAGES))


def test_rngs_decide_dropout_and_gamma():
    model = small_vit()
    assert_same_bits(model(IMAGES, rngs=nnx.Rngs(5)), model(IMAGES, rngs=nnx.Rngs(5)))
    assert np.any(model(IMAGES, rngs=nnx.Rngs(5)) != model(IMAGES, rngs=nnx.Rngs(6)))


def test_a_sample_does_not_depend_on_its_batch_at_inference():
    model = evaluated(small_vit())
    np.testing.assert_allclose(model(IMAGES[:1]), model(IMAGES)[:1], atol=1e-5)


def test_the_plain_vit_is_the_loop_over_its_blocks():
    model = evaluated(small_vit(stack=PLAIN))
    kernel, bias = model.patches.kernel[...], model.patches.bias[...]
    patches = IMAGES.reshape(3, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 4, 48)
    tokens = patches @ kernel.reshape(48, 16) + bias
    class_token = jnp.tile(model.class_token[...], (3, 1, 1))
    x = jnp.concatenate([class_token, tokens], 1) + model.positions[...]
    graphdef, state = nnx.split(model.stack.blocks)
    for k in range(3):
        x = x + nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state))(x)
    expected = model.head(model.norm(x[:, 0]))
    np.testing.assert_allclose(model(IMAGES), expected, atol=2e-5)


def test_quantized_inference_is_close_to_unquantized():
    quantized = evaluated(small_vit())(IMAGES)
    plain = evaluated(small_vit(stack=PLAIN))(IMAGES)
    assert 0 < np.max(np.abs(quantized - plain)) < 0.02
    fine_stack = partial(BDIAStack, fixed_point=FixedPoint(frac_bits=16))
    fine = evaluated(small_vit(stack=fine_stack))(IMAGES)
    assert np.max(np.abs(fine - plain)) < 2e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains_reversibly(dtype):
    def gradient(backprop):
        model = small_vit(stack=partial(BDIAStack, backprop=backprop), dtype=dtype)
        loss = lambda m: jnp.sum(jnp.sin(m(IMAGES, rngs=nnx.Rngs(1))))  # noqa: E731
        return jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))

    assert_grads_close(gradient("reversible"), gradient("store"), GRAD_TOLERANCE[jnp.dtype(dtype)])


@pytest.mark.parametrize(
    "dtype, guard_bits, dropout_rate", [(jnp.float32, 1, 0.1), (jnp.bfloat16, 5, 0.0)]
)
def test_its_blocks_are_rebuilt_exactly(dtype, guard_bits, dropout_rate, optimized):
    stack = partial(BDIAStack, fixed_point=FixedPoint(guard_bits=guard_bits))
    model = small_vit(dtype=dtype, stack=stack, depth=9, dropout_rate=dropout_rate)
    assert model.stack.audit(TOKENS).exact


@pytest.mark.parametrize("stack, features", [(RevStack, 32), (MidpointStack, 16)])
def test_it_is_as_wide_as_its_stack_says(stack, features):
    model = small_vit(stack=stack, num_classes=7)
    assert model.head.kernel.shape == (features, 7) and model.norm.scale.shape == (features,)
    assert model(IMAGES).shape == (3, 7)


def test_images_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(8, 8, 3\)"):
        small_vit()(IMAGES[..., 0])
    with pytest.raises(ValueError, match=r"patch_size 5 does not divide"):
        small_vit(patch_size=5)


# --- Linformer -----------------------------------------------------------------------


def linformer(num_tokens=6, projected=3):
    return LinformerAttention(8, 2, num_tokens=num_tokens, projected=projected, rngs=nnx.Rngs(0))


def test_linformer_attends_to_mixtures_that_all_heads_share():
    attention = linformer()
    q, k, v = (
        np.asarray(X @ linear.kernel[...])
        for linear in (attention.query, attention.key, attention.value)
    )
    assert attention.project_keys.shape == attention.project_values.shape == (3, 6)
    keys = np.asarray(attention.project_keys[...]) @ k  # [B, 3, D]
    values = np.asarray(attention.project_values[...]) @ v
    q, keys, values = (np.moveaxis(y.reshape(2, -1, 2, 4), 2, 1) for y in (q, keys, values))
    weights = np.asarray(jax.nn.softmax(q @ keys.swapaxes(-1, -2) / 2.0))
    joined = np.moveaxis(weights @ values, 1, 2).reshape(2, 6, 8)
    expected = joined @ np.asarray(attention.out.kernel[...]) + np.asarray(attention.out.bias[...])
    np.testing.assert_allclose(attention(X), expected, atol=1e-5)


def test_linformer_starts_within_one_over_root_k_and_differs_by_block():
    matrix = np.asarray(linformer(projected=16, num_tokens=500).project_keys[...])
    assert 0.24 < matrix.max() <= 0.25 and -0.25 <= matrix.min() < -0.24
    model = small_vit(attention=partial(LinformerAttention, num_tokens=5, projected=3))
    stacked = model.stack.blocks.attention.project_keys[...]
    assert stacked.shape == (3, 3, 5) and np.all(stacked[0] != stacked[1])


def shapes_in(jaxpr):
    """The shape of every value in a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from shapes_in(inner)


def test_linformer_costs_no_tokens_by_tokens_array():
    tokens = 37  # no other dimension here
    x = jnp.ones((2, tokens, 8))

    def has_square(attention):
        graphdef, state = nnx.split(attention)
        loss = lambda state: jnp.sum(nnx.merge(graphdef, state)(x))  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, allow_int=True))(state)
        return any(shape.count(tokens) > 1 for shape in shapes_in(jaxpr.jaxpr))

    assert not has_square(linformer(tokens))
    assert has_square(Attention(8, 2, rngs=nnx.Rngs(0)))


def linformer_vit(**options):
    attention = partial(LinformerAttention, num_tokens=5, projected=3)
    return small_vit(attention=attention, dropout_rate=0.0, **options)


def test_a_linformer_vit_trains_reversibly():
    def gradient(backprop):
        model = linformer_vit(stack=partial(BDIAStack, backprop=backprop))
        loss = lambda m: jnp.sum(jnp.sin(m(IMAGES, rngs=nnx.Rngs(1))))  # noqa: E731
        return jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))

    assert_grads_close(gradient("reversible"), gradient("store"), F32)


def test_the_blocks_of_a_linformer_vit_are_rebuilt_exactly(optimized):
    assert linformer_vit(depth=9).stack.audit(TOKENS).exact


def test_linformer_refuses_other_lengths_and_masks():
    with pytest.raises(ValueError, match=r"\(2, 6, 8\), expected num_tokens = 5"):
        linformer(num_tokens=5)(X)
    with pytest.raises(ValueError, match=r"mask given.*use Attention"):
        linformer()(X, jnp.ones((1, 1, 6, 6), bool))
