"""The Llama family in Hugging Face's format: LlamaForCausalLM, Mistral, Qwen2 and Qwen3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from bdia_jax.interop.layout import Format, Table, check_settings, linear, norm, tensor
from bdia_jax.models.llama import Llama
from bdia_jax.models.rope import RopeScaling

# model_type -> what its settings are where config.json leaves them out
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128},
}
_IMPLEMENTED = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Llama`. attention_dropout, of weights, is not used."""
    check_settings(config, _IMPLEMENTED)
    model_type = config["model_type"]
    config = _DEFAULTS[model_type] | dict(config)
    theta, scaling = _rope(config)
    attention_bias = model_type in ("llama", "qwen3") and config.get("attention_bias", False)
    return {
        "vocab_size": config["vocab_size"],
        "max_len": config["max_position_embeddings"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "mlp_dim": config["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": attention_bias or model_type == "qwen2",
        "out_bias": attention_bias,
        "qk_norm": model_type == "qwen3",
        "sliding_window": _window(config),
        "mlp_bias": model_type == "llama" and config.get("mlp_bias", False),
        "epsilon": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def config(model: Llama, source: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a model: of the source's model_type, where that can say it.

    RoPE is written twice, for transformers from 5 on and for whatever reads the older names.
    """
    blocks: Any = model.stack.blocks
    attention, traits = blocks.attention, _traits(model)
    model_type = _model_type(traits, source.get("model_type"))
    scaling = attention.rope_scaling
    if scaling is not None:
        scaling = {name: v for name, v in dataclasses.asdict(scaling).items() if v is not None}
    vocab_size, width = model.embedding.shape
    written = {
        "model_type": model_type,
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "vocab_size": vocab_size,
        "max_position_embeddings": model.max_len,
        "hidden_size": width,
        "num_hidden_layers": model.stack.depth,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": blocks.mlp.out.kernel.shape[-2],
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": model.head is None,
        "attention_dropout": 0.0,
        "rope_theta": attention.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta}
        | (scaling or {}),
    }
    if model_type in ("llama", "qwen3"):
        written["attention_bias"] = traits.qkv_bias
    if model_type == "llama":
        written["mlp_bias"] = traits.mlp_bias
        written["pretraining_tp"] = 1
    else:
        written["sliding_window"] = traits.sliding_window
    if model_type.startswith("qwen"):
        is_sliding, depth = traits.sliding_window is not None, model.stack.depth
        written["use_sliding_window"] = is_sliding
        written["max_window_layers"] = 0 if is_sliding else source.get("max_window_layers", depth)
        written["layer_types"] = [_SLIDING if is_sliding else _FULL] * depth
    # 1 and 2 where absent, which may be anything in this vocabulary
    ends = {name: source.get(name) for name in ("bos_token_id", "eos_token_id")}
    return written | ends


def table(model: Llama) -> Table:
    """All tensors of a LlamaForCausalLM, and of the others."""
    traits = _traits(model)
    layer, ours = "model.layers.{}", "stack.blocks"
    entries = (
        *tensor("embedding", "model.embed_tokens.weight"),
        *norm(f"{ours}.attention_norm", f"{layer}.input_layernorm", bias=False),
        *linear(f"{ours}.attention.query", f"{layer}.self_attn.q_proj", bias=traits.qkv_bias),
        *linear(f"{ours}.attention.key", f"{layer}.self_attn.k_proj", bias=traits.qkv_bias),
        *linear(f"{ours}.attention.value", f"{layer}.self_attn.v_proj", bias=traits.qkv_bias),
        *linear(f"{ours}.attention.out", f"{layer}.self_attn.o_proj", bias=traits.out_bias),
        *norm(f"{ours}.mlp_norm", f"{layer}.post_attention_layernorm", bias=False),
        *linear(f"{ours}.mlp.gate", f"{layer}.mlp.gate_proj", bias=traits.mlp_bias),
        *linear(f"{ours}.mlp.up", f"{layer}.mlp.up_proj", bias=traits.mlp_bias),
        *linear(f"{ours}.mlp.out", f"{layer}.mlp.down_proj", bias=traits.mlp_bias),
        *norm("norm", "model.norm", bias=False),
    )
    if traits.qk_norm:
        entries += norm(f"{ours}.attention.q_norm", f"{layer}.self_attn.q_norm", bias=False)
        entries += norm(f"{ours}.attention.k_norm", f"{layer}.self_attn.k_norm", bias=False)
    head, tied = "lm_head.weight", {}
    if model.head is None:
        tied[head] = "model.embed_tokens.weight"
    else:
        entries += tensor("head", head)
    ignored = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # tables that older files hold
    return Table(entries=entries, prefix="model.", ignored=ignored, tied=tied)


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of rope_theta and rope_scaling, or of the newer rope_parameters."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    settings = dict(config.get(key) or {})
    theta = settings.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    rope_type = settings.pop("rope_type", None) or settings.get("type", "default")
    settings.pop("type", None)
    if rope_type not in ("default", "linear", "llama3") or settings.get(
        "partial_rotary_factor", 1
    ) not in (1, None):
        raise ValueError(
            f"config.json has {key} = {config[key]!r}, which is not implemented; expected "
            "rope_type 'default', 'linear' or 'llama3', of the whole head"
        )
    if rope_type == "default":
        return theta, None
    settings["original_max_position_embeddings"] = config.get(
        "original_max_position_embeddings",
        settings.get("original_max_position_embeddings", config["max_position_embeddings"]),
    )
    names = ["factor"]
    if rope_type == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if missing := [name for name in names if settings.get(name) is None]:
        raise ValueError(
            f"config.json has {key} = {config[key]!r}, without the {missing[0]} that a "
            f"{rope_type!r} needs"
        )
    return theta, RopeScaling(rope_type, **{name: settings[name] for name in names})


def _window(config: Mapping[str, Any]) -> int | None:
    """The sliding window that all blocks have, or None."""
    if config["model_type"] == "llama":
        return None
    if config["model_type"] == "mistral":
        kinds = set(config.get("layer_types") or [])
        window = config["sliding_window"]
    else:
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        depth, first = config["num_hidden_layers"], config["max_window_layers"]
        layers = [_SLIDING if window is not None and k >= first else _FULL for k in range(depth)]
        kinds = set(config.get("layer_types") or layers)
    if len(kinds) > 1 or not kinds <= {_FULL, _SLIDING}:
        raise ValueError(
            f"config.json has sliding_window = {window!r} in some layers only (layer_types = "
            f"{config.get('layer_types')!r}, max_window_layers = "
            f"{config.get('max_window_layers')!r}), which is not implemented; all blocks are alike"
        )
    return None if kinds == {_FULL} else window


class _Traits(NamedTuple):
    """What the model_types differ in."""

    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None


def _traits(model: Llama) -> _Traits:
    blocks: Any = model.stack.blocks
    attention, mlp = blocks.attention, blocks.mlp
    return _Traits(
        qkv_bias=attention.query.bias is not None,
        out_bias=attention.out.bias is not None,
        mlp_bias=mlp.out.bias is not None,
        qk_norm=attention.q_norm is not None,
        sliding_window=attention.sliding_window,
    )


def _model_type(traits: _Traits, wanted: str | None) -> str:
    """The model_type that says all a model is; `wanted` if that does.

    Raises:
        ValueError: none does.
    """
    biases = traits.qkv_bias, traits.out_bias
    all_or_none = biases in ((False, False), (True, True))
    plain, plain_mlp = not traits.qk_norm, not traits.mlp_bias
    fits = {
        "llama": plain and all_or_none and traits.sliding_window is None,
        "mistral": plain and biases == (False, False) and plain_mlp,
        "qwen2": plain and biases == (True, False) and plain_mlp,
        "qwen3": traits.qk_norm and all_or_none and plain_mlp,
    }
    for model_type in (wanted, *fits):
        if model_type and fits.get(model_type):
            return model_type
    raise ValueError(f"no model_type has {traits._asdict()}; known are {', '.join(fits)}")


FORMAT = Format(Llama, arguments, config, table)
MODEL_TYPES = tuple(_DEFAULTS)
