"""ViT in Hugging Face's format: ViTForImageClassification."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from bdia_jax.interop.fields import (
    COMMON,
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    SHARE,
    Field,
    check_divides,
    either,
    implemented,
    read_fields,
    several,
)
from bdia_jax.interop.layout import Format, Table, linear, norm, tensor
from bdia_jax.models.attention import Attention
from bdia_jax.models.blocks import MLP, gelu
from bdia_jax.models.vit import ViT

_ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


_PAIR = Field("[height, width]", lambda value: several(COUNT, "").fits(value) and len(value) == 2)
_FIELDS = COMMON | {
    "image_size": either(COUNT, _PAIR),
    "patch_size": either(COUNT, _PAIR),
    "num_channels": COUNT.by_default(3),
    "num_labels": COUNT.by_default(None),
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "intermediate_size": COUNT,
    "layer_norm_eps": NOT_NEGATIVE.by_default(1e-12),
    "hidden_dropout_prob": SHARE.by_default(0.0),
    "attention_probs_dropout_prob": SHARE.by_default(0.0),
    "qkv_bias": FLAG.by_default(True),
    "hidden_act": implemented(*_ACTIVATIONS),
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ViT`.

    dropout_rate is hidden_dropout_prob; attention_probs_dropout_prob, of weights, is not used.
    """
    read = read_fields(config, _FIELDS)
    height, image_width = _pair(read["image_size"])
    patch_size, patch_width = _pair(read["patch_size"])
    if patch_size != patch_width:
        raise ValueError(
            f"patch_size is {read['patch_size']}, expected height and width to be equal; "
            "nothing else is implemented"
        )
    for side in (height, image_width):
        check_divides("image_size", side, "patch_size", patch_size)
    width, num_heads = read["hidden_size"], read["num_attention_heads"]
    check_divides("hidden_size", width, "num_attention_heads", num_heads)
    return {
        "image_shape": (height, image_width, read["num_channels"]),
        "num_classes": read["num_labels"] or len(read["id2label"] or range(2)),
        "patch_size": patch_size,
        "width": width,
        "depth": read["num_hidden_layers"],
        "num_heads": num_heads,
        "mlp_dim": read["intermediate_size"],
        "epsilon": read["layer_norm_eps"],
        "dropout_rate": read["hidden_dropout_prob"],
        "attention": partial(Attention, qkv_bias=read["qkv_bias"]),
        "mlp": partial(MLP, activation=_ACTIVATIONS[read["hidden_act"]]),
    }


def config(model: ViT, source: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a model."""
    blocks: Any = model.stack.blocks
    height, image_width, channels = model.image_shape
    patch_size, _, _, width = model.patches.kernel.shape
    num_classes = model.head.kernel.shape[-1]
    labels = source.get("id2label") or {}
    if len(labels) != num_classes:  # those of another data set
        labels = {str(index): f"LABEL_{index}" for index in range(num_classes)}
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "id2label": labels,
        "label2id": {str(label): int(index) for index, label in labels.items()},
        "image_size": height if height == image_width else [height, image_width],
        "num_channels": channels,
        "patch_size": patch_size,
        "hidden_size": width,
        "num_hidden_layers": model.stack.depth,
        "num_attention_heads": blocks.attention.num_heads,
        "intermediate_size": blocks.mlp.hidden.bias.shape[-1],
        "hidden_act": _name(blocks.mlp.activation),
        "layer_norm_eps": model.norm.epsilon,
        "hidden_dropout_prob": model.dropout.rate,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": blocks.attention.query.bias is not None,
    }


def table(model: ViT) -> Table:
    """All tensors of a ViTForImageClassification."""
    layer, blocks = "vit.encoder.layer.{}", "stack.blocks"
    attention = f"{layer}.attention"
    ours: Any = model.stack.blocks
    has_bias, embeddings = ours.attention.query.bias is not None, "vit.embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    return Table(
        entries=(
            *tensor("class_token", f"{embeddings}.cls_token"),
            *tensor("positions", f"{embeddings}.position_embeddings"),
            # ours [height, width, in, out], theirs [out, in, height, width]
            *tensor("patches.kernel", f"{projection}.weight", axes=(3, 2, 0, 1)),
            *tensor("patches.bias", f"{projection}.bias"),
            *norm(f"{blocks}.attention_norm", f"{layer}.layernorm_before"),
            *linear(f"{blocks}.attention.query", f"{attention}.attention.query", bias=has_bias),
            *linear(f"{blocks}.attention.key", f"{attention}.attention.key", bias=has_bias),
            *linear(f"{blocks}.attention.value", f"{attention}.attention.value", bias=has_bias),
            *linear(f"{blocks}.attention.out", f"{attention}.output.dense"),
            *norm(f"{blocks}.mlp_norm", f"{layer}.layernorm_after"),
            *linear(f"{blocks}.mlp.hidden", f"{layer}.intermediate.dense"),
            *linear(f"{blocks}.mlp.out", f"{layer}.output.dense"),
            *norm("norm", "vit.layernorm"),
            *linear("head", "classifier"),
        ),
        prefix="vit.",
        ignored=(r"pooler\.dense\.(weight|bias)",),  # after the last norm, not used to classify
    )


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _name(activation: Any) -> str:
    for name, known in _ACTIVATIONS.items():
        if known is activation:
            return name
    raise ValueError(
        f"the MLP's activation is {activation}, which config.json has no name for; known are "
        f"{', '.join(_ACTIVATIONS)}"
    )


FORMAT = Format(ViT, arguments, config, table)
