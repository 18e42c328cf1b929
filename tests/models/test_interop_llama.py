"""config.json of the Llama family: settings of all ages, and what none of them can say."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from bdia_jax import interop
from bdia_jax.interop import llama
from bdia_jax.models.llama import Llama
from bdia_jax.models.rope import RopeScaling

pytestmark = pytest.mark.full

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLD = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 40,
    "hidden_act": "silu",
}


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
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type is 'dynamic'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
        ({"rope_scaling": {"type": "linear"}}, "no field rope_scaling.factor, expected a number"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "sliding_window is 4096 in some layers only .* max_window_layers = 1",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window is 4096 in some layers only .*layer_types",
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
        with pytest.raises(ValueError, match=r"no model_type has .*qkv_bias"):
            llama.config(model, {})
        return
    written = llama.config(model, {"model_type": "llama"})
    assert written["model_type"] == expected
    read = llama.arguments(written)
    again = nnx.eval_shape(lambda: Llama(**read, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
    assert read["sliding_window"] == options.get("sliding_window")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",  # as a model without a head has it
    ],
)
def test_tables_of_frequencies_are_not_read(tmp_path, name):
    sizes = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 8}
    interop.save(Llama(9, 4, **sizes, rngs=nnx.Rngs(0)), tmp_path / "llama")
    file, values = tmp_path / "llama" / "model.safetensors", np.ones(2, np.float32)
    save_file(load_file(file) | {name: values}, file)
    interop.load(tmp_path / "llama", rngs=nnx.Rngs(0))
    save_file(load_file(file) | {f"{name}s": values}, file)
    with pytest.raises(ValueError, match=r"inv_freqs in .* is no tensor of this model"):
        interop.load(tmp_path / "llama", rngs=nnx.Rngs(0))
