"""The Llama family in Hugging Face's format: LlamaForCausalLM, Mistral, Qwen2 and Qwen3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from bdia_jax.interop.fields import (
    AMOUNT,
    COMMON,
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    OBJECT,
    POSITIVE,
    SHARE,
    Field,
    check_divides,
    implemented,
    number,
    read_fields,
    several,
)
from bdia_jax.interop.layout import Format, Table, linear, norm, tensor
from bdia_jax.models.llama import Llama
from bdia_jax.models.rope import RopeScaling

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WHOLE_HEAD = Field("1", lambda value: value in (1, None), None, "nothing else is implemented")
_FIELDS = COMMON | {
    "vocab_size": COUNT,
    "max_position_embeddings": COUNT,
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT.or_null(),
    "head_dim": COUNT.or_null(),
    "intermediate_size": COUNT,
    "rms_norm_eps": NOT_NEGATIVE.by_default(1e-6),
    "tie_word_embeddings": FLAG.by_default(False),
    "attention_dropout": SHARE.or_null(),
    "rope_scaling": OBJECT.or_null(),
    "rope_parameters": OBJECT.or_null(),
    "hidden_act": implemented("silu"),
    "pretraining_tp": implemented(1, None),
    "partial_rotary_factor": _WHOLE_HEAD,
    "attn_logit_softcapping": implemented(None),
    "final_logit_softcapping": implemented(None),
}
_WINDOW = {
    "sliding_window": COUNT.or_null().by_default(4096),
    "layer_types": several(
        implemented(_FULL, _SLIDING), f"a list of {_FULL!r} or {_SLIDING!r}, one a layer"
    ).or_null(),
}
_THETA = {"rope_theta": POSITIVE.by_default(10000.0)}
_ROPE = {
    "rope_type": implemented("default", "linear", "llama3"),
    "partial_rotary_factor": _WHOLE_HEAD,
}
_FACTOR = number("a number from 1 on", lambda value: value >= 1)
_QWEN = _WINDOW | {
    "num_key_value_heads": COUNT.or_null().by_default(32),
    "use_sliding_window": FLAG.by_default(False),
    "max_window_layers": AMOUNT.by_default(28),
}
_BIAS = {"attention_bias": FLAG.by_default(False)}
# model_type -> the fields that others do not have, or with another default
_OF_TYPE: dict[str, dict[str, Field]] = {
    "llama": _BIAS | {"mlp_bias": FLAG.by_default(False)},
    "mistral": _WINDOW | {"num_key_value_heads": COUNT.by_default(8)},
    "qwen2": _QWEN,
    "qwen3": _QWEN | _BIAS | {"head_dim": COUNT.by_default(128)},
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Llama`. attention_dropout, of weights, is not used."""
    model_type = config["model_type"]
    read = read_fields(config, _FIELDS | _OF_TYPE[model_type])
    theta, scaling = _rope(config, read)
    width, num_heads = read["hidden_size"], read["num_attention_heads"]
    num_kv_heads, head_dim = read["num_key_value_heads"], read["head_dim"]
    if head_dim is None:
        check_divides("hidden_size", width, "num_attention_heads", num_heads)
    turned = head_dim or width // num_heads
    if turned % 2:
        raise ValueError(f"head_dim is {turned}, expected an even number: pairs are turned")
    check_divides("num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads or 1)
    attention_bias = read.get("attention_bias", False)
    return {
        "vocab_size": read["vocab_size"],
        "max_len": read["max_position_embeddings"],
        "width": width,
        "depth": read["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": read["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": attention_bias or model_type == "qwen2",
        "out_bias": attention_bias,
        "qk_norm": model_type == "qwen3",
        "sliding_window": _window(model_type, read),
        "mlp_bias": read.get("mlp_bias", False),
        "epsilon": read["rms_norm_eps"],
        "tie_embeddings": read["tie_word_embeddings"],
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
    # tables that older files hold, of each layer or of the model
    ignored = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
    return Table(entries=entries, prefix="model.", ignored=ignored, tied=tied)


def _rope(config: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of rope_theta and rope_scaling, or of the newer rope_parameters."""
    group = "rope_scaling" if read["rope_scaling"] else "rope_parameters"
    settings = dict(read[group] or {})
    if settings.get("rope_type") is None:  # the older name
        settings["rope_type"] = settings.get("type", "default")
    within = f"{group}."
    place = (settings, within) if "rope_theta" in settings else (config, "")
    theta = read_fields(place[0], _THETA, place[1])["rope_theta"]
    rope_type = read_fields(settings, _ROPE, within)["rope_type"]
    if rope_type == "default":
        return theta, None
    names, length = {"factor": _FACTOR}, "original_max_position_embeddings"
    if rope_type == "llama3":
        names |= {"low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE}
        names[length] = COUNT.by_default(read["max_position_embeddings"])
        if length in config:
            settings[length] = config[length]
    return theta, RopeScaling(rope_type, **read_fields(settings, names, within))


def _window(model_type: str, read: Mapping[str, Any]) -> int | None:
    """The sliding window that all blocks have, or None."""
    if model_type == "llama":
        return None
    window, kinds, depth = read["sliding_window"], read["layer_types"], read["num_hidden_layers"]
    if kinds is not None and len(kinds) != depth:
        raise ValueError(
            f"layer_types are {len(kinds)}, but num_hidden_layers is {depth}; correct one of them"
        )
    if model_type != "mistral":
        window = window if read["use_sliding_window"] else None
        first = depth if window is None else min(read["max_window_layers"], depth)
        kinds = kinds or [_FULL] * (first > 0) + [_SLIDING] * (first < depth)
    if len(set(kinds or [])) > 1:
        raise ValueError(
            f"sliding_window is {window} in some layers only (by layer_types, or "
            f"max_window_layers = {read.get('max_window_layers')}), which is not implemented; all "
            "blocks are alike"
        )
    return None if kinds and kinds[0] == _FULL else window


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


def _model_type(traits: _Traits, wanted: Any) -> str:
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
    for model_type in (*(name for name in fits if name == wanted), *fits):
        if fits[model_type]:
            return model_type
    raise ValueError(f"no model_type has {traits._asdict()}; known are {', '.join(fits)}")


FORMAT = Format(Llama, arguments, config, table)
MODEL_TYPES = tuple(_OF_TYPE)
