"""Hugging Face folders in and out: GPT-2, ViT and the Llama family, without torch."""

from bdia_jax.interop.architectures import Architecture, read_architecture
from bdia_jax.interop.beside import copy_beside
from bdia_jax.interop.generation import read_end_tokens, read_tokens
from bdia_jax.interop.reading import CHECKPOINT_GAMMA, load, read_params
from bdia_jax.interop.writing import save

__all__ = [
    "CHECKPOINT_GAMMA",
    "Architecture",
    "copy_beside",
    "load",
    "read_architecture",
    "read_end_tokens",
    "read_params",
    "read_tokens",
    "save",
]
