"""What language models have in common: inputs of tokens, the model, and its loss."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from bdia_jax import interop
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.llama import Llama
from train.config import Config, Input, PretrainedConfig, StandardConfig
from train.fields import Int, checked

MODELS = {"gpt2": StandardConfig, "pretrained": PretrainedConfig}


@checked
class TokensInput(Input):
    """tokenizer: "gpt2", "bytes", "bpe" (learned from the training split) or "checkpoint" (that of
    `config.init_from`); length: tokens the model sees.
    """

    tokenizer: Literal["gpt2", "bytes", "bpe", "checkpoint"]
    length: Annotated[Int, Field(ge=4)]  # samples are continued from a quarter of it

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer

    def check(self, config: Config) -> None:
        if self.tokenizer == "checkpoint" and not config.init_from:
            raise ValueError(
                "input.tokenizer is 'checkpoint', but there is no init_from; set "
                "--config.init_from=DIR, or take the tokenizer 'gpt2', 'bytes' or 'bpe'"
            )


def abstract_tokens(config: Config) -> Any:
    """A batch of tokens by its shape: inputs, and one more as the last target."""
    return jax.ShapeDtypeStruct((config.batch_size, config.input.length + 1), jnp.int32)


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
    model, described = interop.read_architecture(config.init_from)
    if model not in (GPT2, Llama):
        raise ValueError(
            f"init_from {config.init_from} is a {model.__name__}, which models no text; take a "
            "GPT-2 or a Llama"
        )
    for name, needed, what in (
        ("vocab_size", vocab_size, f"the tokenizer {config.input.tokenizer_name!r} has"),
        ("max_len", length, "input.length asks for"),
    ):
        if described[name] < needed:
            raise ValueError(
                f"init_from {config.init_from} has {name} {described[name]}, but {what} {needed}; "
                "take a tokenizer and a length that fit the checkpoint"
            )
    return lambda rngs: model(**described | arguments, rngs=rngs)
