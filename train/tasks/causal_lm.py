"""The language model of a config: from random parameters, or of a checkpoint's architecture."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from bdia_jax import interop
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.llama import Llama
from train.config import Config


def make_causal_lm(
    config: Config, vocab_size: int, length: int
) -> Callable[[nnx.Rngs], nnx.Module]:
    """(rngs) -> a decoder-only model for `length` tokens out of `vocab_size`.

    With `config.init_from` it has the architecture of that checkpoint, whose parameters
    `train.run.pretrained` reads.

    Raises:
        FileNotFoundError, ValueError: as `interop.read_architecture`; a checkpoint of another kind,
            with fewer tokens than the tokenizer has, or for shorter texts.
    """
    arguments: dict[str, Any] = config.model_arguments
    if not config.init_from:
        return lambda rngs: GPT2(vocab_size, length, **arguments, rngs=rngs)
    model, its = interop.read_architecture(config.init_from)
    if model not in (GPT2, Llama):
        raise ValueError(
            f"init_from {config.init_from} is a {model.__name__}, which models no text; take a "
            "GPT-2 or a Llama"
        )
    for name, needed, what in (
        ("vocab_size", vocab_size, f"the tokenizer {config.input.tokenizer!r} has"),  # pyright: ignore
        ("max_len", length, "input.length asks for"),
    ):
        if its[name] < needed:
            raise ValueError(
                f"init_from {config.init_from} has {name} {its[name]}, but {what} {needed}; take "
                "a tokenizer and a length that fit the checkpoint"
            )
    return lambda rngs: model(**its | arguments, rngs=rngs)
