"""Hugging Face folders against transformers, on small random checkpoints it makes."""

import json
import shutil
from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import assert_same_bits
from toy_models import UNQUANTIZED, at_inference

from bdia_jax import FixedPoint, interop
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.vit import ViT
from bdia_jax.nnx import BDIAStack
from bdia_jax.text.generate import generate

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]

TOKENS = np.random.default_rng(0).integers(3, 31, (3, 12))
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 12, 3)).astype(np.float32)

# no setting is a default of ours, and the epsilons are large enough to be noticed
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [8, 12],
    "patch_size": 4,
}
LLAMA = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
SETTINGS = {  # name of the configuration's class and its arguments
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 31, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 2}
        | {"n_inner": 40, "layer_norm_epsilon": 1e-2, "resid_pdrop": 0.3, **NO_ENDS},
    ),
    "vit": ("ViTConfig", VIT | {"layer_norm_eps": 1e-2, "num_labels": 5}),
    "vit without bias": ("ViTConfig", VIT | {"qkv_bias": False, "hidden_act": "relu"}),
    "llama": (
        "LlamaConfig",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE},
    ),
    "mistral": (
        "MistralConfig",
        LLAMA | {"head_dim": 6, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2Config", LLAMA | {"rope_parameters": LINEAR}),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 6, "tie_word_embeddings": True}),
}
EVERY = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """name -> (their model, its folder). Here, since importing torch takes seconds."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))

    @cache
    def make(name):
        config_class, settings = SETTINGS[name]
        config = getattr(transformers, config_class)(**settings)
        model = auto_class(name).from_config(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                mean = float(parameter.ndim == 1 and path.endswith("weight"))  # of a norm
                parameter.normal_(mean, 0.3, generator=generator)
        folder = tmp_path_factory.mktemp("theirs") / name
        model.save_pretrained(folder)
        return model, folder

    return make


def auto_class(name):
    import transformers

    if name.startswith("vit"):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForCausalLM


def loaded(folder, stack=UNQUANTIZED, **overrides):
    return interop.load(folder, rngs=nnx.Rngs(0), stack=stack, **overrides)


def loaded_there(name, folder):
    model, info = auto_class(name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def our_logits(model):
    return np.asarray(at_inference(model, IMAGES if isinstance(model, ViT) else TOKENS))


def their_logits(model):
    import torch

    is_vit = model.config.model_type == "vit"
    with torch.no_grad():
        batch = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2) if is_vit else TOKENS)
        return model(batch).logits.numpy()


# --- theirs, here --------------------------------------------------------------------


@EVERY
@pytest.mark.claim("a standard checkpoint is handed back")
def test_their_checkpoint_computes_the_same_here(theirs, name):
    model, folder = theirs(name)
    expected = their_logits(model)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(our_logits(loaded(folder)), expected, atol=1e-4, rtol=0)


@pytest.mark.control("a standard checkpoint is handed back")
def test_control_two_norms_swapped_would_be_seen(theirs):
    model, folder = theirs("gpt2")
    ours = loaded(folder)
    blocks = ours.stack.blocks
    blocks.attention_norm, blocks.mlp_norm = blocks.mlp_norm, blocks.attention_norm
    assert np.max(np.abs(our_logits(ours) - their_logits(model))) > 0.1


@pytest.mark.full
@pytest.mark.control("a standard checkpoint is handed back")
def test_control_a_wrong_rotation_would_be_seen(theirs):
    model, folder = theirs("qwen2")
    wrong = our_logits(loaded(folder, rope_scaling=None))
    assert np.max(np.abs(wrong - their_logits(model))) > 0.1


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_in_fixed_point_it_differs_by_what_rounding_states_does(theirs, name):
    # Each block rounds the state to a multiple of 2^-frac_bits: half a quantum an element at
    # most, which the last norm and the head enlarge a few times. So 128 times finer states
    # are about 128 times closer.
    model, folder = theirs(name)
    expected = their_logits(model)
    coarse, fine = (
        np.max(np.abs(our_logits(loaded(folder, partial(BDIAStack, fixed_point=fp))) - expected))
        for fp in (FixedPoint(frac_bits=9), FixedPoint(frac_bits=16))
    )
    assert 1e-3 < coarse < 40 * 2.0**-9 and fine < 40 * 2.0**-16 + 1e-5


@pytest.mark.full
@pytest.mark.parametrize(
    "name, stack",
    [("gpt2", UNQUANTIZED)]
    + [
        (name, partial(BDIAStack, fixed_point=FixedPoint(frac_bits=16)))
        for name in ("gpt2", "llama", "mistral")
    ],
)
def test_generated_tokens_are_equal(theirs, name, stack):
    import torch

    model, folder = theirs(name)
    prompt = torch.from_numpy(TOKENS[:, :7])  # more than mistral's window
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    # the mask: the padding is a word here
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert len(np.unique(expected.numpy()[:, 7:])) > 2  # not one token over and over
    actual = generate(loaded(folder, stack), jnp.asarray(TOKENS[:, :7]), 12, temperature=0)
    np.testing.assert_array_equal(actual, expected.numpy())


def test_settings_become_arguments(theirs):
    _, folder = theirs("gpt2")
    architecture = interop.read_architecture(folder)
    assert architecture.model is GPT2
    sizes = {"vocab_size": 31, "max_len": 24, "width": 16, "depth": 3, "num_heads": 2}
    others = {"mlp_dim": 40, "epsilon": 1e-2, "dropout_rate": 0.3}
    assert architecture.arguments == sizes | others
    assert loaded(folder, dropout_rate=0.0).dropout.rate == 0.0


# written, but not read here
UNREAD = {"transformers_version", "model_type", "architectures", "dtype", "encoder_stride"}
UNREAD |= {"pooler_act", "pooler_output_size", "summary_activation", "summary_first_dropout"}
UNREAD |= {"summary_type", "summary_proj_to_labels", "summary_use_proj"}


@EVERY
def test_what_they_refuse_in_a_field_is_refused_here(theirs, name, tmp_path):
    import transformers

    _, folder = theirs(name)
    config, refused = json.loads((folder / "config.json").read_text()), 0
    for field in config.keys() - UNREAD:
        for value in (None, True, 2.5, "2", [1], {"a": 1}):
            (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
            try:
                auto_class(name).from_config(transformers.AutoConfig.from_pretrained(tmp_path))
            except Exception as error:
                if (field, value) == ("attention_dropout", None):  # which Llama's may be
                    continue
                refused += 1
                with pytest.raises(ValueError, match=r"config\.json: "):
                    interop.read_architecture(tmp_path)
                    pytest.fail(f"{field} = {value!r} is accepted; there: {error}")
    assert refused > 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    interop.read_architecture(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sharded", "bfloat16", "without the head"])
def test_other_ways_to_save_are_read(theirs, tmp_path, kind):
    import torch

    model, folder = theirs("gpt2")
    if kind == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        assert not (tmp_path / "model.safetensors").exists()
    elif kind == "bfloat16":
        model = auto_class("gpt2").from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        model = model.float()
    else:
        model.transformer.save_pretrained(tmp_path)  # its names have no prefix
    ours = loaded(tmp_path)
    assert ours.embedding.dtype == jnp.float32
    np.testing.assert_allclose(our_logits(ours), their_logits(model.eval()), atol=1e-4, rtol=0)


@pytest.mark.full
def test_a_vit_without_classifier_needs_a_head_of_its_own(theirs, tmp_path):
    import transformers

    model, folder = theirs("vit")
    body = transformers.ViTModel(model.config)
    body.load_state_dict(model.vit.state_dict(), strict=False)  # all but the pooler
    body.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight is missing.*keep=\('head.kernel',\)"):
        loaded(tmp_path)
    ours = loaded(tmp_path, keep=("head",), num_classes=7)
    assert our_logits(ours).shape == (3, 7) and np.std(ours.head.kernel[...]) > 0.1
    assert_same_bits(ours.norm.scale[...], jnp.asarray(model.vit.layernorm.weight.detach().numpy()))
    assert np.any(ours.head.kernel[...] != loaded(folder).head.kernel[...][:, :1])


# --- ours, there ---------------------------------------------------------------------


@EVERY
@pytest.mark.claim("a standard checkpoint is handed back")
def test_saved_without_a_source_it_computes_the_same_there_and_comes_back(theirs, name, tmp_path):
    model, source = theirs(name)
    ours, folder = loaded(source), tmp_path / "ours"
    interop.save(ours, folder, max_shard_bytes=8_000 if name == "vit" else 10**9)
    back = loaded_there(name, folder)
    assert type(back) is type(model)
    np.testing.assert_array_equal(their_logits(back), their_logits(model))
    states = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (ours, loaded(folder)))
    for a, b in zip(*states, strict=True):
        assert a[0] == b[0]
        assert_same_bits(a[1][...], b[1][...])


@EVERY
def test_their_folder_comes_back_as_it_was(theirs, name, tmp_path):
    model, source = theirs(name)
    folder = tmp_path / "back"
    interop.save(loaded(source), folder, source=source)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    dropouts = {"embd_pdrop", "attn_pdrop"}  # of which there is one here
    assert dropouts >= {key for key in before if before[key] != after[key]}
    if not name.startswith(("gpt2", "vit")):
        # the older names, and what Qwen2 has from the other two sizes
        assert after.keys() - before.keys() <= {"rope_theta", "rope_scaling", "head_dim"}
    head = {} if name.startswith(("gpt2", "vit")) else {"head_dim": None}
    first, second = (str(interop.read_architecture(f).arguments | head) for f in (source, folder))
    assert first == second
    back = loaded_there(name, folder).state_dict()
    for path, value in model.state_dict().items():
        assert value.equal(back[path]), path


def test_what_prepares_images_there_is_handed_on(theirs, tmp_path):
    import transformers

    _, source = theirs("vit")
    # the one that needs no torchvision, as the newer ones do
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    processor = kind(size={"height": 8, "width": 12})
    shutil.copytree(source, tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    interop.save(loaded(source), tmp_path / "new", source=tmp_path / "source")
    again = kind.from_pretrained(tmp_path / "new")
    assert again.to_dict() == processor.to_dict() and again.size["width"] == 12
