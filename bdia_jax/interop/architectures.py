"""The architectures that can be exchanged, and config.json as arguments of a model here."""

from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from bdia_jax.interop import gpt2, llama, vit
from bdia_jax.interop.fields import REQUIRED, implemented, read_fields, told_of
from bdia_jax.interop.files import CONFIG, read_json
from bdia_jax.interop.layout import Format

# model_type of config.json -> how it is read and written
FORMATS: dict[str, Format] = {
    "gpt2": gpt2.FORMAT,
    "vit": vit.FORMAT,
    **dict.fromkeys(llama.MODEL_TYPES, llama.FORMAT),
}


_MODEL_TYPE = {"model_type": implemented(*sorted(FORMATS))._replace(default=REQUIRED)}


class Architecture(NamedTuple):
    """A model of a config.json: `model(**arguments, rngs=...)` builds it."""

    model: type[nnx.Module]
    arguments: dict[str, Any]


def read_architecture(folder: str | Path) -> Architecture:
    """The model class and its arguments, from config.json alone.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not JSON, of an unknown model_type, lacks a field, or has one of a wrong
            type or range, or with a value that is not implemented here.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    with told_of(path):
        chosen = FORMATS[read_fields(config, _MODEL_TYPE)["model_type"]]
        return Architecture(chosen.model, chosen.arguments(config))


def format_of(model: nnx.Module) -> Format:
    """How a model is read and written.

    Raises:
        ValueError: it is of no class that can be.
    """
    for chosen in FORMATS.values():
        if chosen.model is type(model):
            return chosen
    known = sorted({chosen.model.__name__ for chosen in FORMATS.values()})
    raise ValueError(
        f"a {type(model).__name__} has no Hugging Face format here, only {', '.join(known)}"
    )
