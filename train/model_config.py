"""What a config says of the model: `config.model`, one class for each `config.model.name`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The arguments of `bdia_jax.models.vit.ViT`; linformer_dim > 0 makes attention linear."""

    name: str
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float
    linformer_dim: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The arguments of `bdia_jax.models.resnet.ResNet`."""

    name: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The arguments of `bdia_jax.models.gpt2.GPT2`."""

    name: str
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The arguments of `bdia_jax.models.transformer.Transformer`."""

    name: str
    width: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """The model of `config.init_from`: its config.json has the architecture."""

    name: str
    dropout_rate: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters of query and value projections (`bdia_jax.lora`); rank 0 for none.

    Only they are trained then, and the head of an image classifier; all else is frozen.
    """

    rank: int
    alpha: float
    dropout_rate: float
