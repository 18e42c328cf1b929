"""ViT in Hugging Face's format: ViTForImageClassification."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from bdia_jax.interop.layout import Format, Table, check_settings, linear, norm, tensor
from bdia_jax.models.attention import Attention
from bdia_jax.models.blocks import MLP, gelu
from bdia_jax.models.vit import ViT

_ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ViT`.

    dropout_rate is hidden_dropout_prob; attention_probs_dropout_prob, of weights, is not used.
    """
    check_settings(config, {"hidden_act": tuple(_ACTIVATIONS)})
    height, width = _pair(config["image_size"])
    patch_size, patch_width = _pair(config["patch_size"])
    if patch_size != patch_width:
        raise ValueError(
            f"config.json has patch_size = {config['patch_size']}; only square patches are "
            "implemented"
        )
    labels = config.get("id2label") or range(config.get("num_labels", 2))
    return {
        "image_shape": (height, width, config.get("num_channels", 3)),
        "num_classes": len(labels),
        "patch_size": patch_size,
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "epsilon": config.get("layer_norm_eps", 1e-12),
        "dropout_rate": config.get("hidden_dropout_prob", 0.0),
        "attention": partial(Attention, qkv_bias=config.get("qkv_bias", True)),
        "mlp": partial(MLP, activation=_ACTIVATIONS[config.get("hidden_act", "gelu")]),
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
        "label2id": {label: int(index) for index, label in labels.items()},
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
