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
from train.data.tokens import SMALLEST_BPE, Tokenizer, largest_tokenizer, open_tokenizer
from train.fields import Amount, checked
from train.tasks.causal_lm import MODELS, TokensInput, abstract_tokens, make_causal_lm
from train.tasks.task import Metrics, MetricsFn, Task, TaskKind


@checked
class TextInput(TokensInput):
    """tokenizer: as `TokensInput`; a "bpe" has at most vocab_size tokens, for the others it is 0.
    length: tokens a sequence is packed to.

    isolate_documents: positions start at 0 in every document, and a token sees its own document
    only. This takes a mask, and with one attention is not cuDNN's (`choose_implementation` in
    `bdia_jax.models.attention`): it writes weights [B, H, T, T]. False: positions run on, and a
    token sees all before it in the window, as GPT-2 and nanoGPT are trained; no mask, so flash
    attention where the device has it.
    """

    vocab_size: Amount
    isolate_documents: bool

    @property
    def masks_attention(self) -> bool:
        return self.isolate_documents

    def check(self, config: Config) -> None:
        super().check(config)
        if self.tokenizer == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise ValueError(
                f"input.vocab_size is {self.vocab_size}, expected at least {SMALLEST_BPE} for the "
                "tokenizer 'bpe'"
            )


class Sequences(NamedTuple):
    """tokens: int32 [N, length + 1], each a window of the packed documents."""

    tokens: Any


def load(config: Config) -> Task:
    """The task of a config whose input is a `TextInput`."""
    options: TextInput = config.input
    texts = (
        text for (text,) in read_texts(config.dataset, config.train_split, config.data_dir, "text")
    )
    tokenizer = open_tokenizer(options.tokenizer, config.init_from, texts, options.vocab_size)
    train, held_out = (
        load_text(config.dataset, split, config.data_dir, tokenizer, options.length)
        for split in (config.train_split, config.eval_split)
    )
    return _make_task(config, tokenizer, train, held_out)


def abstract(config: Config, tokenizer: Tokenizer | None = None) -> Task:
    """The task by its shapes."""
    tokens = abstract_tokens(config)
    return _make_task(config, tokenizer or largest_tokenizer(config), tokens, tokens)


def _make_task(config: Config, tokenizer: Tokenizer, train: Any, held_out: Any) -> Task:
    options: TextInput = config.input

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
        train_groups=(Sequences(train),),
        eval_groups=(Sequences(held_out),),
        make_model=make_causal_lm(config, tokenizer.vocab_size, options.length),
        metrics=text_metrics(tokenizer.end_of_text if options.isolate_documents else None),
        describe=f"{len(train):,} sequences of {options.length} tokens of {config.dataset}",
        finish=finish,
        tokenizer=tokenizer,
    )


def text_metrics(end_of_text: int | None) -> MetricsFn:
    """Of `Sequences`: the loss in nats a token; every token is a target.

    Args:
        end_of_text: the id that separates documents which do not see each other; None: they do.
    """

    def metrics(model: Any, batch: Sequences, rngs: nnx.Rngs | None) -> Metrics:
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        mask = place = None
        if end_of_text is not None:
            mask = attention_mask(segments(inputs, end_of_text))
            place = positions(inputs, end_of_text)
        loss = model.loss(model.features(inputs, positions=place, mask=mask, rngs=rngs), targets)
        return {"loss": (loss.sum(-1), jnp.full(len(loss), loss.shape[1], jnp.float32))}

    return metrics


KIND = TaskKind(TextInput, MODELS, load, abstract)
