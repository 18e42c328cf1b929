"""Fields of a Hugging Face folder's JSON: which values are taken, and what is said of others."""

import json

import pytest

from bdia_jax import interop

GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 2}
GPT2["n_head"] = 2
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VIT = SIZES | {"model_type": "vit", "image_size": 8, "intermediate_size": 8}
SMALL_VIT["patch_size"] = 4
SMALL_LLAMA = SIZES | {"model_type": "llama", "vocab_size": 11, "intermediate_size": 8}
SMALL_LLAMA["max_position_embeddings"] = 6


def write(folder, change):
    """config.json of a small GPT-2, or of whatever the change is of."""
    base = {} if "model_type" in change else GPT2
    (folder / "config.json").write_text(json.dumps(base | change))


@pytest.mark.parametrize(
    "setting",
    [
        {"activation_function": "gelu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        SMALL_VIT | {"patch_size": [4, 2]},
        SMALL_VIT | {"hidden_act": "quick_gelu"},
    ],
    ids=lambda setting: list(setting)[-1],
)
def test_a_setting_that_is_not_implemented_is_named(tmp_path, setting):
    write(tmp_path, setting)
    name = list(setting)[-1]
    with pytest.raises(ValueError, match=rf"{name} is .*expected .*implemented"):
        interop.read_architecture(tmp_path)


INT = "expected a whole number from"
NUMBER = "expected a number"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 2.0}, f"n_layer is 2.0, {INT} 1"),
        ({"n_layer": "2"}, f"n_layer is '2', {INT} 1"),
        ({"n_layer": None}, f"n_layer is None, {INT} 1"),
        ({"n_layer": True}, f"n_layer is True, {INT} 1"),
        ({"n_layer": -5}, f"n_layer is -5, {INT} 1"),
        ({"n_layer": 10**12}, f"n_layer is 1000000000000, {INT} 1 to 2147483647"),
        ({"n_layer": 10**4000}, rf"n_layer is 10+\.\.\.0+, {INT}"),
        ({"vocab_size": ["x" * 9999]}, rf"vocab_size is \['x+\.\.\.x+'\], {INT}"),
        ({"n_inner": 0}, f"n_inner is 0, {INT} 1 to 2147483647, or null"),
        ({"n_head": 3}, "n_embd is 8, which n_head = 3 does not divide"),
        ({"layer_norm_epsilon": float("nan")}, f"layer_norm_epsilon is nan, {NUMBER} from 0 on"),
        ({"layer_norm_epsilon": -1e-5}, f"layer_norm_epsilon is -1e-05, {NUMBER}"),
        ({"resid_pdrop": 1.5}, f"resid_pdrop is 1.5, {NUMBER} from 0 to 1"),
        ({"attn_pdrop": float("inf")}, f"attn_pdrop is inf, {NUMBER}"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1, expected True; nothing else"),
        ({"use_cache": "yes"}, "use_cache is 'yes', expected true or false"),
        (
            SMALL_VIT | {"image_size": [8, 8.0]},
            r"image_size is \[8, 8.0\], expected .*\[height",
        ),
        (SMALL_VIT | {"image_size": [8]}, r"image_size is \[8\], expected"),
        (SMALL_VIT | {"image_size": [8, 6]}, "image_size is 6, which patch_size = 4 does not"),
        (SMALL_VIT | {"qkv_bias": None}, "qkv_bias is None, expected true or false"),
        (SMALL_VIT | {"num_labels": "3"}, f"num_labels is '3', {INT} 1"),
        (SMALL_LLAMA | {"rms_norm_eps": "1e-06"}, f"rms_norm_eps is '1e-06', {NUMBER}"),
        (SMALL_LLAMA | {"rope_theta": "10000"}, f"rope_theta is '10000', {NUMBER} greater than 0"),
        (SMALL_LLAMA | {"rope_theta": None}, f"rope_theta is None, {NUMBER}"),
        (SMALL_LLAMA | {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            SMALL_LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}},
            f"rope_scaling.factor is '2', {NUMBER} from 1 on",
        ),
        (
            SMALL_LLAMA | {"rope_parameters": {"rope_theta": 0}},
            f"rope_parameters.rope_theta is 0, {NUMBER} greater than 0",
        ),
        (SMALL_LLAMA | {"head_dim": 3}, "head_dim is 3, expected an even number"),
        (SMALL_LLAMA | {"num_key_value_heads": 4}, "num_attention_heads is 2, which num_key_value"),
        (
            SMALL_LLAMA | {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "num_attention_heads is 2, which num_key_value_heads = 32",
        ),
        (
            SMALL_LLAMA
            | {"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["full_attention"]},
            "layer_types are 1, but num_hidden_layers is 2",
        ),
        (
            SMALL_LLAMA | {"model_type": "mistral", "num_key_value_heads": None},
            f"num_key_value_heads is None, {INT} 1",
        ),
    ],
    ids=lambda each: str([*each.items()][-1])[:40] if isinstance(each, dict) else "",
)
def test_a_field_of_a_wrong_type_or_range_is_named_in_one_line(tmp_path, change, message):
    write(tmp_path, change)
    with pytest.raises(ValueError, match=rf"config\.json: {message}") as error:
        interop.read_architecture(tmp_path)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (7, None, (7,)),
        (7, 9, (9,)),
        ([7, 8], None, (7, 8)),
        (7, [9, 7, 9], (9, 7, 9)),
        (None, 9, (9,)),
        (7, "none", ()),  # there is a file, that says nothing
        (None, None, ()),
        (7, "9", "generation_config.json: eos_token_id is '9', expected"),
        ([7, True], None, r"[^_]config.json: eos_token_id is \[7, True\], expected"),
        (-1, None, "eos_token_id is -1, expected a whole number from 0"),
    ],
)
def test_end_tokens_are_those_of_transformers(tmp_path, config, generation, ends):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        said = {} if generation == "none" else {"eos_token_id": generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    if isinstance(ends, tuple):
        assert interop.read_end_tokens(tmp_path) == ends
    else:
        with pytest.raises(ValueError, match=ends):
            interop.read_end_tokens(tmp_path)
