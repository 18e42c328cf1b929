"""GPT-2 in Hugging Face's format: GPT2LMHeadModel."""

from collections.abc import Mapping
from typing import Any

from bdia_jax.interop.fields import (
    COMMON,
    COUNT,
    NOT_NEGATIVE,
    SHARE,
    check_divides,
    implemented,
    read_fields,
)
from bdia_jax.interop.layout import Entry, Format, Table, linear, norm, tensor
from bdia_jax.models.gpt2 import GPT2

_FIELDS = COMMON | {
    "vocab_size": COUNT,
    "n_positions": COUNT,
    "n_embd": COUNT,
    "n_layer": COUNT,
    "n_head": COUNT,
    "n_inner": COUNT.or_null(),
    "layer_norm_epsilon": NOT_NEGATIVE.by_default(1e-5),
    "resid_pdrop": SHARE.by_default(0.1),
    "embd_pdrop": SHARE.by_default(0.1),
    "attn_pdrop": SHARE.by_default(0.1),
    "activation_function": implemented("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": implemented(True),
    "scale_attn_by_inverse_layer_idx": implemented(False),
    "reorder_and_upcast_attn": implemented(False),
    "add_cross_attention": implemented(False),
    "tie_word_embeddings": implemented(True),
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `GPT2`. dropout_rate is resid_pdrop; attn_pdrop, of weights, is not used."""
    read = read_fields(config, _FIELDS)
    width = read["n_embd"]
    check_divides("n_embd", width, "n_head", read["n_head"])
    return {
        "vocab_size": read["vocab_size"],
        "max_len": read["n_positions"],
        "width": width,
        "depth": read["n_layer"],
        "num_heads": read["n_head"],
        "mlp_dim": read["n_inner"] or 4 * width,
        "epsilon": read["layer_norm_epsilon"],
        "dropout_rate": read["resid_pdrop"],
    }


def config(model: GPT2, source: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a model."""
    blocks: Any = model.stack.blocks
    vocab_size, width = model.embedding.shape
    rate = model.dropout.rate
    end = 50256 if vocab_size > 50256 else None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size,
        "n_positions": model.max_len,
        "n_embd": width,
        "n_layer": model.stack.depth,
        "n_head": blocks.attention.num_heads,
        "n_inner": blocks.mlp.hidden.bias.shape[-1],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm.epsilon,
        "resid_pdrop": rate,
        "embd_pdrop": rate,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        # 50256 where absent, which a smaller vocabulary does not have
        **{name: source.get(name, end) for name in ("bos_token_id", "eos_token_id")},
    }


def table(model: GPT2) -> Table:
    """All tensors of a GPT2LMHeadModel."""
    h, blocks = "transformer.h.{}", "stack.blocks"
    qkv = [f"{blocks}.attention.{name}" for name in ("query", "key", "value")]
    return Table(
        entries=(
            *tensor("embedding", "transformer.wte.weight"),
            *tensor("positions", "transformer.wpe.weight"),
            *norm(f"{blocks}.attention_norm", f"{h}.ln_1"),
            # Conv1D of transformers: weights are [in, out]; q, k, v are one
            Entry(tuple(f"{path}.kernel" for path in qkv), f"{h}.attn.c_attn.weight"),
            Entry(tuple(f"{path}.bias" for path in qkv), f"{h}.attn.c_attn.bias"),
            *linear(f"{blocks}.attention.out", f"{h}.attn.c_proj", out_first=False),
            *norm(f"{blocks}.mlp_norm", f"{h}.ln_2"),
            *linear(f"{blocks}.mlp.hidden", f"{h}.mlp.c_fc", out_first=False),
            *linear(f"{blocks}.mlp.out", f"{h}.mlp.c_proj", out_first=False),
            *norm("norm", "transformer.ln_f"),
        ),
        prefix="transformer.",
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # masks that older files hold
        tied={"lm_head.weight": "transformer.wte.weight"},
        depth="n_layer",
    )


FORMAT = Format(GPT2, arguments, config, table)
