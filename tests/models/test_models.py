"""What all models are: the networks of their papers at inference, reversible in training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_grads_close, assert_same_bits, relative_error
from toy_models import (
    F32,
    IMAGES,
    PLAIN,
    SMALL,
    SOURCE,
    STORE,
    TARGET,
    TOKENS,
    count_parameters,
    drifting_stack,
    gradient,
    loop,
    run,
    small,
    without_key_bias,
)

from bdia_jax import FixedPoint
from bdia_jax.baselines import MidpointStack, RevStack
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.llama import Llama
from bdia_jax.models.resnet import ResNet
from bdia_jax.models.transformer import Transformer
from bdia_jax.models.vit import ViT
from bdia_jax.nnx import BDIAStack

pytestmark = pytest.mark.usefixtures("quick_compile")  # tests of exactness ask for `optimized`
FULL = pytest.mark.full

# --- the network ---------------------------------------------------------------------


def dense(inputs, outputs, bias=True):
    return inputs * outputs + bias * outputs


def block(width, mlp_dim, attentions=1):
    attention = 3 * dense(width, width, bias=False) + dense(width, width)
    norms = (attentions + 1) * 2 * width
    return norms + attentions * attention + dense(width, mlp_dim) + dense(mlp_dim, width)


def conv_block(before, after):
    """Two batch norms and two 3x3 convolutions."""
    return 2 * before + 9 * before * after + 2 * after + 9 * after * after


@pytest.mark.parametrize(
    "make, expected",
    [
        (ViT, dense(48, 512) + (1 + 65) * 512 + 6 * block(512, 512) + 2 * 512 + dense(512, 10)),
        (ViT, 9_523_722),
        (GPT2, 124_439_808),
        (Llama, 6_738_415_616),
        (partial(Llama, tie_embeddings=True), 6_738_415_616 - 32000 * 4096),
        (
            partial(Transformer, 1000, 64),
            1000 * 512 + 6 * (block(512, 2048) + block(512, 2048, attentions=2)) + 2 * 2 * 512,
        ),
        (
            ResNet,
            9 * 3 * 64
            + (5 * conv_block(64, 64) + 4 * conv_block(128, 128) + 4 * conv_block(256, 256))
            + (conv_block(64, 128) + 64 * 128 + conv_block(128, 256) + 128 * 256)
            + (2 * 256 + dense(256, 10)),
        ),
        (ResNet, 7_427_146),
    ],
)
def test_the_default_has_the_parameters_of_its_paper(make, expected):
    assert count_parameters(lambda: make(rngs=nnx.Rngs(0))) == expected


@nnx.jit
def vit_by_hand(model):
    kernel, bias = model.patches.kernel[...], model.patches.bias[...]
    patches = IMAGES.reshape(3, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 4, 48)
    class_token = jnp.tile(model.class_token[...], (3, 1, 1))
    x = jnp.concatenate([class_token, patches @ kernel.reshape(48, 16) + bias], 1)
    return model.head(model.norm(loop(model.stack, x + model.positions[...])[:, 0]))


@nnx.jit
def transformer_by_hand(model):
    table, see_source, see_target = (
        model.embedding[...],
        *((tokens != 0)[:, None, None] for tokens in (SOURCE, TARGET)),
    )

    def embed(tokens):
        angle = np.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-np.arange(8) / 8)
        return 4.0 * table[tokens] + np.concatenate([np.sin(angle), np.cos(angle)], 1)

    memory = model.encoder_norm(loop(model.encoder, embed(SOURCE), see_source))
    x = loop(model.decoder, embed(TARGET), see_target, memory, see_source)
    return model.decoder_norm(x) @ table.T


@pytest.mark.full
@pytest.mark.parametrize(
    "name, by_hand", [("vit", vit_by_hand), ("transformer", transformer_by_hand)]
)
def test_the_plain_model_is_the_loop_over_its_blocks(name, by_hand):
    model = small(name, PLAIN)
    assert relative_error(run(model, *SMALL[name].inputs), by_hand(model)) < 2e-6


def gpt2_by_hand(model, gelu):
    """GPT-2 in NumPy, after its published description."""
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def attention(x, p, heads=2):
        batch, length, width = x.shape
        q, k, v = (
            np.moveaxis(linear(x, p[name]).reshape(batch, length, heads, -1), 2, 1)
            for name in ("query", "key", "value")
        )
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)
        weights = np.exp(np.where(np.tri(length, dtype=bool), logits, -np.inf))
        attended = weights / weights.sum(-1, keepdims=True) @ v
        return linear(np.moveaxis(attended, 1, 2).reshape(x.shape), p["out"])

    x = state["embedding"][np.asarray(TOKENS)] + state["positions"][: TOKENS.shape[1]]
    for k in range(3):
        p = jax.tree.map(lambda leaf, k=k: leaf[k], state["stack"]["blocks"])
        x = x + attention(norm(x, p["attention_norm"]), p["attention"])
        hidden = gelu(linear(norm(x, p["mlp_norm"]), p["mlp"]["hidden"]))
        x = x + linear(hidden, p["mlp"]["out"])
    return norm(x, state["norm"]) @ state["embedding"].T


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_the_plain_model_is_gpt2():
    model = small("gpt2", PLAIN)
    actual = run(model, TOKENS)
    assert relative_error(actual, gpt2_by_hand(model, tanh_gelu)) < 5e-6
    exact_gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=False))  # noqa: E731
    assert relative_error(actual, gpt2_by_hand(model, exact_gelu)) > 1e-5


def test_projections_that_end_a_branch_start_smaller():
    model = GPT2(200, 50, width=64, depth=8, num_heads=2, mlp_dim=96, rngs=nnx.Rngs(0))
    attention, mlp = model.stack.blocks.attention, model.stack.blocks.mlp
    inner = (attention.query.kernel, attention.value.kernel, mlp.hidden.kernel)
    for kernel in (model.embedding, model.positions, *inner):
        assert np.std(kernel[...]) == pytest.approx(0.02, rel=0.05)
    for kernel in (attention.out.kernel, mlp.out.kernel):
        assert np.std(kernel[...]) == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        *(pytest.param(name, marks=FULL) for name in ("vit", "llama", "transformer")),
    ],
)
def test_bfloat16_is_close_and_returns_float32(name):
    inputs = SMALL[name].inputs
    whole, half = (run(small(name, dtype=dtype), *inputs) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.shape == whole.shape and half.dtype == whole.dtype == jnp.float32
    assert 1e-4 < relative_error(half, whole) < 5e-2


def test_at_inference_it_is_the_plain_model_up_to_rounding():
    plain, coarse, fine = (
        small("vit", stack)
        for stack in (PLAIN, BDIAStack, partial(BDIAStack, fixed_point=FixedPoint(frac_bits=16)))
    )
    for model in (plain, coarse, fine):
        model.eval()
    expected = run(plain, IMAGES)
    assert 0 < np.max(np.abs(run(coarse, IMAGES) - expected)) < 0.05
    assert np.max(np.abs(run(fine, IMAGES) - expected)) < 5e-4
    np.testing.assert_allclose(run(coarse, IMAGES[:1]), run(coarse, IMAGES)[:1], atol=1e-5)


@pytest.mark.full
def test_rngs_decide_dropout_and_gamma_and_inference_needs_none():
    model = small("vit", dropout_rate=0.1)
    draw = nnx.jit(lambda model, rngs: model(IMAGES, rngs=rngs))
    assert_same_bits(draw(model, nnx.Rngs(5)), draw(model, nnx.Rngs(5)))
    assert np.any(draw(model, nnx.Rngs(5)) != draw(model, nnx.Rngs(6)))
    own = nnx.jit(lambda model: model(IMAGES))
    assert np.any(own(model) != own(model))
    model.eval()
    assert_same_bits(own(model), own(model))


@pytest.mark.parametrize("stack, features", [(RevStack, 32), (MidpointStack, 16)])
def test_a_vit_is_as_wide_as_its_stack_says(stack, features):
    model = small("vit", stack, num_classes=7)
    assert model.head.kernel.shape == (features, 7) and model.norm.scale.shape == (features,)
    assert nnx.eval_shape(lambda model: model(IMAGES), model).shape == (3, 7)


class Wide(BDIAStack):
    def out_features(self, width):
        return 2 * width


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gpt2", {"stack": Wide}, "the stack returns 32 features, but .* takes 16"),
        ("llama", {"stack": Wide}, "the stack returns 32 features, but .* takes 16"),
        ("vit", {"patch_size": 5}, "patch_size 5 does not divide"),
        ("transformer", {"width": 15}, "width is 15"),
        ("llama", {"head_dim": 5}, "head_dim is 5, expected an even number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, **options)


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("vit", (IMAGES[..., 0],), r"\(3, 8, 8\).*\(8, 8, 3\)"),
        ("gpt2", (jnp.zeros((1, 13), int),), r"\(1, 13\).*max_len 12"),
        ("llama", (jnp.zeros((1, 13), int),), r"\(1, 13\).*max_len 12"),
        ("transformer", (jnp.ones((2, 10), int), TARGET), r"\(2, 10\).*max_len 9"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        small(name)(*inputs)


# --- training ------------------------------------------------------------------------


IN_PARTS = {"batch_chunks": 2, "by_branch": True, "token_chunks": 2}


@pytest.mark.full
@pytest.mark.claim("gradients equal store's")
@pytest.mark.parametrize(
    "name, options, stack_options",
    [
        ("gpt2", {}, {}),
        ("linformer", {"dropout_rate": 0.1}, {}),
        # a grid so fine that a rounding which depends on the parts does not matter
        ("llama", {"qk_norm": True, "sliding_window": 5}, IN_PARTS),
        ("transformer", {}, {}),
    ],
)
def test_reversible_gradients_equal_stored_ones(name, options, stack_options):
    fine = {"fixed_point": FixedPoint(20, guard_bits=4)} if stack_options else {}
    stacks = partial(BDIAStack, **fine, **stack_options), partial(STORE, **fine)
    actual, expected = (gradient(small(name, s, **options), *SMALL[name].inputs) for s in stacks)
    if name == "gpt2":
        actual, expected = map(without_key_bias, (actual, expected))
    assert_grads_close(actual, expected, F32)


@pytest.mark.control("gradients equal store's")
def test_control_a_block_that_drifts_has_other_gradients():
    unverified = partial(drifting_stack, verify=False)
    actual, expected = (gradient(small("gpt2", s), TOKENS) for s in (unverified, STORE))
    error = relative_error(actual["embedding"][...], expected["embedding"][...])
    assert error > 1e-3


def stack_inputs(name, model):
    """(the stack, what it is called with)."""
    if name == "transformer":
        see_source, see_target = ((tokens != 0)[:, None, None] for tokens in (SOURCE, TARGET))
        y, memory = model.embedding[...][TARGET], model.embedding[...][SOURCE]
        return model.decoder, (y, see_target, memory, see_source)
    if name == "linformer":
        return model.stack, (model.positions[...] + jnp.linspace(-2, 2, 16) * IMAGES[:, :5, 0, :1],)
    places = (jnp.arange(TOKENS.shape[1])[None],) if name == "llama" else ()
    return model.stack, (model.embedding[...][TOKENS], None, *places)


def audit(name, stack=BDIAStack, **options):
    stack, inputs = stack_inputs(name, small(name, stack, **options))
    return stack.audit(*inputs)


@pytest.mark.claim("rebuild is exact")
@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt2", {"depth": 5}),
        pytest.param("llama", {"dtype": jnp.bfloat16}, marks=FULL),
        pytest.param("transformer", {"decoder_depth": 5}, marks=FULL),
    ],
)
def test_the_rebuild_is_exact(name, options, optimized):
    assert audit(name, **options).exact


@pytest.mark.control("rebuild is exact")
def test_control_the_audit_sees_a_block_that_drifts():
    assert not audit("gpt2", drifting_stack).exact
