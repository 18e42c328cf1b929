"""The frozen form of an experiment's config, checked once at the door."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from bdia_jax import FixedPoint

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of the ViT: the arguments of `bdia_jax.models.vit.ViT` of the same names."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float
    dtype: str


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Lengths are in steps.

    dataset is a TFDS name, data_dir its folder ("" for the TFDS default), train_split and
    eval_split TFDS splits. gamma is |gamma| in training, 0 for the plain transformer;
    quantize=False keeps floating-point states. crop_padding and flip are the augmentation.
    optimizer is "set_adam" or "adamw"; schedule, after warmup_steps, "constant" or "cosine".
    """

    seed: int
    dataset: str
    data_dir: str
    train_split: str
    eval_split: str
    crop_padding: int
    flip: bool
    model: ModelConfig
    gamma: float
    quantize: bool
    frac_bits: int
    guard_bits: int
    backprop: str
    optimizer: str
    schedule: str
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip_norm: float
    batch_size: int
    num_steps: int
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int

    def __post_init__(self):
        choices = {
            "backprop": ("reversible", "store", "remat"),
            "optimizer": ("set_adam", "adamw"),
            "schedule": ("constant", "cosine"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")
        if self.model.dtype not in _DTYPES:
            raise ValueError(f"model.dtype is {self.model.dtype!r}, expected one of {(*_DTYPES,)}")
        positive = ("batch_size", "num_steps", "learning_rate", "log_every_steps")
        for name in (*positive, "eval_every_steps", "checkpoint_every_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves nothing of num_steps {self.num_steps}"
            )
        if self.backprop == "reversible" and not (self.quantize and _is_power(self.gamma)):
            raise ValueError(
                f"backprop='reversible' with gamma={self.gamma} and quantize={self.quantize}: it "
                "needs gamma 0.5, 0.25 or 0.125 and quantize=True; "
                "take --config.backprop=store or remat"
            )

    @classmethod
    def from_config_dict(cls, config: Any) -> "Config":
        """From the ml_collections.ConfigDict that a file in configs/ returns."""
        values = config.to_dict()
        return cls(**{**values, "model": ModelConfig(**values["model"])})

    @property
    def vit_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ViT, the stack's included."""
        fixed_point = None
        if self.quantize:
            gamma_bits = round(-math.log2(self.gamma)) if _is_power(self.gamma) else 1
            fixed_point = FixedPoint(self.frac_bits, self.guard_bits, gamma_bits)
        return dataclasses.asdict(self.model) | {
            "dtype": _DTYPES[self.model.dtype],
            "magnitude": self.gamma,
            "fixed_point": fixed_point,
            "backprop": self.backprop,
        }


def _is_power(gamma: float) -> bool:
    return gamma > 0 and math.log2(gamma) in (-1, -2, -3)
