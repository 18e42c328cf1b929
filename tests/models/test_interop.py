"""Hugging Face folders against transformers, on small random checkpoints it makes."""

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits
from toy_models import filled

from bdia_jax import FixedPoint, interop
from bdia_jax.models.blocks import Attention
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.vit import ViT
from bdia_jax.nnx import BDIAStack
from bdia_jax.text.generate import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quick_compile")

UNQUANTIZED = partial(BDIAStack, fixed_point=None, backprop="store")
TOKENS = np.random.default_rng(0).integers(0, 31, (3, 7))
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 12, 3)).astype(np.float32)

# no setting is a default of ours, and the epsilons are large enough to be noticed
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=31, n_positions=24, n_embd=16, n_layer=3, n_head=2, n_inner=40,
        layer_norm_epsilon=1e-2, resid_pdrop=0.3, bos_token_id=None, eos_token_id=None,
    ),
    "vit": transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=[8, 12], patch_size=4, layer_norm_eps=1e-2, num_labels=5,
    ),
    "vit without bias": transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=[8, 12], patch_size=4, qkv_bias=False, hidden_act="relu",
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CONFIGS)


def their_class(name):
    return {
        "gpt2": transformers.GPT2LMHeadModel,
        "vit": transformers.ViTForImageClassification,
    }[CONFIGS[name].model_type]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """name -> (their model, its folder)."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, config in CONFIGS.items():
        model = their_class(name)(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                mean = float(parameter.ndim == 1 and path.endswith("weight"))  # of a norm
                parameter.normal_(mean, 0.3, generator=generator)
        folder = tmp_path_factory.mktemp("theirs") / name
        model.save_pretrained(folder)
        made[name] = model, folder
    return made


@nnx.jit
def run(model, batch):
    return model(batch)


def our_logits(model):
    model.eval()
    return np.asarray(run(model, TOKENS if isinstance(model, GPT2) else IMAGES))


def their_logits(model):
    if model.config.model_type == "gpt2":
        batch = torch.from_numpy(TOKENS)
    else:
        batch = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))
    with torch.no_grad():
        return model.eval()(batch).logits.numpy()


def loaded(folder, stack=UNQUANTIZED, **overrides):
    return interop.load(folder, rngs=nnx.Rngs(0), stack=stack, **overrides)


# --- theirs, here --------------------------------------------------------------------


@EVERY
def test_their_checkpoint_computes_the_same_here(theirs, name):
    model, folder = theirs[name]
    expected = their_logits(model)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(our_logits(loaded(folder)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_in_fixed_point_it_differs_by_what_rounding_states_does(theirs, name):
    # Each block rounds the state to a multiple of 2^-frac_bits: half a quantum an element at
    # most, which the last norm and the head enlarge a few times. So 128 times finer states
    # are about 128 times closer.
    model, folder = theirs[name]
    expected = their_logits(model)
    coarse, fine = (
        np.max(np.abs(our_logits(loaded(folder, partial(BDIAStack, fixed_point=fp))) - expected))
        for fp in (FixedPoint(frac_bits=9), FixedPoint(frac_bits=16))
    )
    assert 1e-3 < coarse < 40 * 2.0**-9 and fine < 40 * 2.0**-16 + 1e-5


def test_two_norms_swapped_would_be_seen(theirs):
    model, folder = theirs["gpt2"]
    ours = loaded(folder)
    blocks = ours.stack.blocks
    blocks.attention_norm, blocks.mlp_norm = blocks.mlp_norm, blocks.attention_norm
    assert np.max(np.abs(our_logits(ours) - their_logits(model))) > 0.1


def test_generated_tokens_are_equal(theirs):
    model, folder = theirs["gpt2"]
    prompt = torch.from_numpy(TOKENS[:, :4])
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    # the mask: token 0 is a word here, no padding
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert len(np.unique(expected.numpy()[:, 4:])) >= 4
    for stack in (UNQUANTIZED, partial(BDIAStack, fixed_point=FixedPoint(frac_bits=16))):
        actual = generate(loaded(folder, stack), jnp.asarray(TOKENS[:, :4]), 16, temperature=0)
        np.testing.assert_array_equal(actual, expected.numpy())


def test_settings_become_arguments(theirs):
    architecture = interop.read_architecture(theirs["gpt2"][1])
    assert architecture.model is GPT2
    assert architecture.arguments == {
        "vocab_size": 31, "max_len": 24, "width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 40,
        "epsilon": 1e-2, "dropout_rate": 0.3,
    }  # fmt: skip
    assert loaded(theirs["gpt2"][1], dropout_rate=0.0).dropout.rate == 0.0


@pytest.mark.parametrize("kind", ["sharded", "bfloat16", "without the head"])
def test_other_ways_to_save_are_read(theirs, tmp_path, kind):
    model, _ = theirs["gpt2"]
    if kind == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        assert not (tmp_path / "model.safetensors").exists()
    elif kind == "bfloat16":
        model = their_class("gpt2").from_pretrained(theirs["gpt2"][1], dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        model = model.float()
    else:
        model.transformer.save_pretrained(tmp_path)  # its names have no prefix
    ours = loaded(tmp_path)
    assert ours.embedding.dtype == jnp.float32
    np.testing.assert_allclose(our_logits(ours), their_logits(model), atol=1e-4, rtol=0)


def test_a_vit_without_classifier_needs_a_head_of_its_own(theirs, tmp_path):
    model, _ = theirs["vit"]
    body = transformers.ViTModel(CONFIGS["vit"])
    body.load_state_dict(model.vit.state_dict(), strict=False)  # all but the pooler
    body.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight is missing.*keep=\('head.kernel',\)"):
        loaded(tmp_path)
    ours = loaded(tmp_path, keep=("head",), num_classes=7)
    assert our_logits(ours).shape == (3, 7) and np.std(ours.head.kernel[...]) > 0.1
    assert_same_bits(ours.norm.scale[...], jnp.asarray(model.vit.layernorm.weight.detach().numpy()))
    assert np.any(ours.head.kernel[...] != loaded(theirs["vit"][1]).head.kernel[...][:, :1])


# --- ours, there ---------------------------------------------------------------------


def our_model(name):
    if name == "gpt2":
        options = {"vocab_size": 31, "max_len": 9, "width": 16, "depth": 2, "num_heads": 4}
        make = lambda: GPT2(**options, mlp_dim=24, epsilon=1e-2, rngs=nnx.Rngs(0))  # noqa: E731
    else:
        attention = partial(Attention, qkv_bias=name == "vit")
        options = {"image_shape": (8, 12, 3), "width": 16, "depth": 2, "num_heads": 4}
        make = lambda: ViT(**options, mlp_dim=24, attention=attention, rngs=nnx.Rngs(0))  # noqa: E731
    return filled(make)


@EVERY
def test_our_model_computes_the_same_there_and_comes_back_with_the_same_bits(name, tmp_path):
    ours, folder = our_model(name), tmp_path / "ours"
    max_shard_bytes = 8_000 if name == "vit" else 10**9
    interop.save(ours, folder, max_shard_bytes=max_shard_bytes)
    model, info = their_class(name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = their_logits(model)
    assert np.std(expected) > 0.3
    ours.stack.fixed_point, ours.stack.backprop = None, "store"
    np.testing.assert_allclose(our_logits(ours), expected, atol=1e-4, rtol=0)
    again = loaded(folder)
    for a, b in zip(*(nnx.state(m, nnx.Param).flat_state() for m in (ours, again)), strict=True):
        assert a[0] == b[0]
        assert_same_bits(a[1][...], b[1][...])


@EVERY
def test_their_folder_comes_back_as_it_was(theirs, name, tmp_path):
    model, source = theirs[name]
    interop.save(loaded(source), tmp_path / "back", source=source)
    back, info = their_class(name).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    )
    dropouts = {"embd_pdrop", "attn_pdrop"}  # of which there is one here
    assert dropouts >= {key for key in before if before[key] != after[key]}
    for name, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
