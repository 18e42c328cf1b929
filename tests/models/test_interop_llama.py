"""The Llama family's folders against transformers, on small random checkpoints it makes."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bdia_jax import FixedPoint, interop
from bdia_jax.interop import llama
from bdia_jax.models.llama import Llama
from bdia_jax.models.rope import RopeScaling
from bdia_jax.nnx import BDIAStack
from bdia_jax.text.generate import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quick_compile")

UNQUANTIZED = partial(BDIAStack, fixed_point=None, backprop="store")
TOKENS = np.random.default_rng(0).integers(3, 31, (3, 12))
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
    "rms_norm_eps": 1e-2,  # large enough to be noticed
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3 | {"rope_theta": 100.0}
    ),
    "mistral": transformers.MistralConfig(
        **SIZES, head_dim=6, sliding_window=5, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """name -> (their model, its folder)."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, config in CONFIGS.items():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                mean = float(parameter.ndim == 1 and path.endswith("weight"))  # of a norm
                parameter.normal_(mean, 0.3, generator=generator)
        folder = tmp_path_factory.mktemp("theirs") / name
        model.save_pretrained(folder)
        made[name] = model, folder
    return made


@nnx.jit
def run(model, tokens):
    return model(tokens)


def loaded(folder, stack=UNQUANTIZED, **overrides):
    model = interop.load(folder, rngs=nnx.Rngs(0), stack=stack, **overrides)
    model.eval()
    return model


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@EVERY
def test_their_checkpoint_computes_the_same_here_and_saved_there(theirs, name, tmp_path):
    model, folder = theirs[name]
    expected = their_logits(model)
    assert np.std(expected) > 0.3
    ours = loaded(folder)
    np.testing.assert_allclose(run(ours, TOKENS), expected, atol=1e-4, rtol=0)
    interop.save(ours, tmp_path / "ours")  # without a source: all its settings are the model's
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(back) is type(model)
    np.testing.assert_array_equal(their_logits(back.eval()), expected)


def test_a_wrong_rotation_would_be_seen(theirs):
    model, folder = theirs["qwen2"]
    wrong = run(loaded(folder, rope_scaling=None), TOKENS)
    assert np.max(np.abs(wrong - their_logits(model))) > 0.1


@EVERY
def test_their_folder_comes_back_as_it_was(theirs, name, tmp_path):
    _, source = theirs[name]
    interop.save(loaded(source), tmp_path / "back", source=source)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    )
    assert not {key for key in before if before[key] != after[key]}
    # the older names, and what Qwen2 has from the other two sizes
    assert after.keys() - before.keys() <= {"rope_theta", "rope_scaling", "head_dim"}
    first, second = (
        interop.read_architecture(folder).arguments | {"head_dim": None}
        for folder in (source, tmp_path / "back")
    )
    assert first == second


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generated_tokens_are_equal(theirs, name):
    model, folder = theirs[name]
    prompt = torch.from_numpy(TOKENS[:, :7])  # more than mistral's window
    # the mask: the padding is a word here
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert len(np.unique(expected.numpy()[:, 7:])) >= 4
    ours = loaded(folder, partial(BDIAStack, fixed_point=FixedPoint(frac_bits=16)))
    actual = generate(ours, jnp.asarray(TOKENS[:, :7]), 12, temperature=0)
    np.testing.assert_array_equal(actual, expected.numpy())


# --- settings -----------------------------------------------------------------------------


OLD = {
    "model_type": "llama", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
    "hidden_act": "silu",
}  # fmt: skip


def arguments(**settings):
    return llama.arguments(OLD | settings)


def test_older_names_of_the_rotation_are_read():
    theta = {"rope_theta": 500.0}
    expected = RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
    for settings in (
        theta | {"rope_scaling": LLAMA3},
        {"rope_parameters": theta | LLAMA3},
        theta | {"rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": None}},
    ):
        found = arguments(**settings)
        assert (found["rope_theta"], found["rope_scaling"]) == (500.0, expected)
    linear = arguments(rope_scaling={"type": "linear", "factor": 2.0})
    assert (linear["rope_theta"], linear["rope_scaling"]) == (10000.0, RopeScaling("linear", 2.0))
    assert arguments(rope_scaling=None)["rope_scaling"] is None


def test_settings_left_out_are_those_of_the_model_type():
    assert arguments()["num_kv_heads"] is None
    mistral = arguments(model_type="mistral")
    assert (mistral["num_kv_heads"], mistral["sliding_window"]) == (8, 4096)
    assert arguments(model_type="mistral", sliding_window=None)["sliding_window"] is None
    assert arguments(model_type="qwen3")["head_dim"] == 128
    qwen = partial(arguments, model_type="qwen2", sliding_window=7, max_window_layers=0)
    assert qwen()["sliding_window"] is None
    assert qwen(use_sliding_window=True)["sliding_window"] == 7


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = .*'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters = .*'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor': 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "without the factor that a 'linear' needs"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "sliding_window = 4096 in some layers only .* max_window_layers = 1",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            r"sliding_window = 4096 in some layers only .*layer_types = \['full",
        ),
    ],
)
def test_what_is_not_implemented_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "llama"),
        ({"sliding_window": 3}, "mistral"),
        ({"qkv_bias": True, "sliding_window": 3}, "qwen2"),
        ({"qk_norm": True, "sliding_window": 3}, "qwen3"),
        ({"qk_norm": True, "mlp_bias": True}, None),
        ({"qkv_bias": True, "out_bias": True, "sliding_window": 3}, None),
    ],
)
def test_a_model_is_saved_as_the_type_that_can_say_it(options, expected):
    sizes = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 8}
    model = nnx.eval_shape(lambda: Llama(9, 4, **sizes, **options, rngs=nnx.Rngs(0)))
    if expected is None:
        with pytest.raises(ValueError, match="no model_type has qkv_bias, out_bias = "):
            llama.config(model, {})
        return
    written = llama.config(model, {"model_type": "llama"})
    assert written["model_type"] == expected
    read = llama.arguments(written)
    again = nnx.eval_shape(lambda: Llama(**read, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
    assert read["sliding_window"] == options.get("sliding_window")
