"""The task of a config by its shapes alone: no data set is read."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import interop
from bdia_jax.models.transformer import Transformer
from train.config import Config
from train.data.text import PairBucket, attention_mask, positions, segments
from train.datasets.registry import open_builder
from train.inputs import DataToTextInput, ImageInput, PairInput, TextInput
from train.tasks import images
from train.tasks.causal_lm import make_causal_lm
from train.tasks.data_to_text import Sentences
from train.tasks.images import Images
from train.tasks.language import Sequences
from train.tasks.task import Metrics, Task

_VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}


def abstract_task(config: Config) -> Task:
    """What `load_task` makes, but for its examples: one batch of `jax.ShapeDtypeStruct`s.

    Sizes that only the data tells are those it can have at most: a learned vocabulary has
    input.vocab_size tokens, sentence pairs have the last of input.boundaries.

    Raises:
        FileNotFoundError, ValueError: images whose data set is not prepared: it alone knows their
            shape and classes; a config that does not fit.
    """
    options = config.input
    if isinstance(options, ImageInput):
        features = open_builder(config.dataset, config.data_dir).info.features
        shape, num_classes = features["image"].shape, features["label"].num_classes
        return image_task(config, shape, num_classes)
    if isinstance(options, PairInput):
        return _pair_task(config, options)
    return text_task(config, options, _vocab_size(config, options))


def image_task(config: Config, shape: tuple[int, ...], num_classes: int) -> Task:
    """Of images of a shape (height, width, channels)."""
    size = config.batch_size
    batch = Images(_array(size, *shape, dtype=jnp.uint8), _array(size))
    return images.make_task(config, batch, batch, num_classes)


def text_task(config: Config, options: TextInput | DataToTextInput, vocab_size: int) -> Task:
    """Of sequences of options.length tokens."""
    size, length = config.batch_size, options.length

    def metrics(model: Any, batch: Any, rngs: nnx.Rngs | None) -> Metrics:
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        mask = place = None
        if isinstance(options, TextInput) and options.isolate_documents:
            mask, place = attention_mask(segments(inputs, 0)), positions(inputs, 0)
        features = model.features(inputs, positions=place, mask=mask, rngs=rngs)
        smoothing = getattr(options, "label_smoothing", 0.0)
        loss = model.loss(features, targets, smoothing)
        return {"loss": (loss.sum(-1), jnp.full(len(loss), loss.shape[1], jnp.float32))}

    tokens = _array(size, length + 1)
    is_sentences = isinstance(options, DataToTextInput)
    batch = Sentences(tokens, _array(size), _array(size)) if is_sentences else Sequences(tokens)
    return _task(batch, make_causal_lm(config, vocab_size, length), metrics)


def _pair_task(config: Config, options: PairInput) -> Task:
    longest = options.boundaries[-1]

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        return Transformer(options.vocab_size, longest, **config.model_arguments, rngs=rngs)

    def metrics(model: Any, batch: PairBucket, rngs: nnx.Rngs | None) -> Metrics:
        features = model.features(batch.source, batch.target_in, rngs=rngs)
        loss = model.loss(features, batch.target_out)
        return {"loss": (loss.sum(-1), jnp.ones(len(loss), jnp.float32))}

    sides: list[Any] = [_array(config.batch_size, longest) for _ in range(3)]
    return _task(PairBucket(*sides), make_model, metrics)


def _vocab_size(config: Config, options: TextInput | DataToTextInput) -> int:
    if options.tokenizer == "checkpoint":
        return interop.read_architecture(config.init_from).arguments["vocab_size"]
    size = _VOCAB_SIZES.get(options.tokenizer) or getattr(options, "vocab_size", 0)
    if not size:
        raise ValueError(
            f"input.tokenizer is {options.tokenizer!r}, expected 'gpt2', 'bytes', 'checkpoint', or "
            f"'bpe' with input.vocab_size > 0"
        )
    return size


def _task(batch: Any, make_model: Any, metrics: Any) -> Task:
    return Task(
        *((batch,), (batch,), make_model, lambda key, batch: batch, metrics, "", lambda *_: {})
    )


def _array(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
