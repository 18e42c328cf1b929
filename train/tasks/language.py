"""Language modelling on packed documents."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.text.generate import generate
from train.config import Config
from train.data.text import attention_mask, load_text, positions, read_texts, segments
from train.data.tokens import open_tokenizer
from train.inputs import TextInput
from train.tasks.causal_lm import make_causal_lm
from train.tasks.task import Metrics, Task


class Sequences(NamedTuple):
    """tokens: int32 [N, length + 1], each a window of the packed documents."""

    tokens: Any


def load(config: Config) -> Task:
    """The task of a config whose input is a `TextInput`."""
    assert isinstance(config.input, TextInput)
    options = config.input
    texts = (
        text for (text,) in read_texts(config.dataset, config.train_split, config.data_dir, "text")
    )
    tokenizer = open_tokenizer(options.tokenizer, config.init_from, texts, options.vocab_size)
    train, held_out = (
        load_text(config.dataset, split, config.data_dir, tokenizer, options.length).tokens
        for split in (config.train_split, config.eval_split)
    )

    def metrics(model: Any, batch: Sequences, rngs: nnx.Rngs | None) -> Metrics:
        """Loss in nats a token; every token is a target."""
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        mask = place = None
        if options.isolate_documents:
            mask = attention_mask(segments(inputs, tokenizer.end_of_text))
            place = positions(inputs, tokenizer.end_of_text)
        features = model.features(inputs, positions=place, mask=mask, rngs=rngs)
        loss = model.loss(features, targets)
        return {"loss": (loss.sum(-1), jnp.full(len(loss), loss.shape[1], jnp.float32))}

    def finish(models: list[Any], workdir: Path) -> dict[str, list[float]]:
        """Samples: the beginnings of four held-out sequences, continued by the first model."""
        start = options.length // 4
        prompts = held_out[:, :start]
        of_one_document = (prompts[:, 1:] != tokenizer.end_of_text).all(-1)  # no mask here
        prompt = prompts[np.argsort(~of_one_document, stable=True)[:4]]
        key = jax.random.key(config.seed)
        tokens = generate(
            models[0], jnp.asarray(prompt), options.length - start, key=key, temperature=0.8
        )
        samples = [
            f"{tokenizer.decode(row[:start])}\n--- continued:\n{tokenizer.decode(row[start:])}\n"
            for row in tokens.tolist()
        ]
        (workdir / "samples.txt").write_text("\n==========\n".join(samples), "utf-8")
        return {}

    return Task(
        (Sequences(train),),
        (Sequences(held_out),),
        make_causal_lm(config, tokenizer.vocab_size, options.length),
        lambda key, batch: batch,
        metrics,
        f"{len(train):,} sequences of {options.length} tokens of {config.dataset}",
        finish,
        tokenizer,
    )
