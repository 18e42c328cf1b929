"""Data to text: from attributes, such as E2E's restaurants, to a sentence that says them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from bdia_jax.text.generate import generate_beam
from train.config import Config
from train.data.text import by_first, in_batches, pad_left, read_texts
from train.data.tokens import Tokenizer, largest_tokenizer, open_tokenizer
from train.fields import Amount, Count, Float, NotNegative, checked
from train.tasks.causal_lm import MODELS, TokensInput, abstract_tokens, make_causal_lm
from train.tasks.nlg_metrics import has_meteor, nlg_metrics
from train.tasks.task import Metrics, Task, TaskKind


@checked
class DataToTextInput(TokensInput):
    """tokenizer, length: as in `TokensInput`, the length with padding.

    label_smoothing: share of the training target spread evenly over the vocabulary; the evaluation
    loss is without it. beam_size, length_penalty, no_repeat_ngram (0: none): how the meanings are
    decoded at the end; eval_generations: how many of them at most, 0 for none.
    """

    tokenizer: Literal["gpt2", "bytes", "checkpoint"]
    label_smoothing: Annotated[Float, Field(ge=0, le=0.99)]
    beam_size: Count
    length_penalty: NotNegative
    no_repeat_ngram: Amount
    eval_generations: Amount


class Sentences(NamedTuple):
    """N of them: a meaning, end of text, a reference, end of text, and the same as padding.

    tokens: int32 [N, length + 1]; inputs are tokens[:, :-1], targets tokens[:, 1:].
    start, stop: int32 [N]: the reference and the end of text behind it are tokens[start:stop].
    """

    tokens: Any
    start: Any
    stop: Any


def load(config: Config) -> Task:
    """The task of a config whose input is a `DataToTextInput`.

    Meanings are written as the data set has them. As in LoRA's code the separator is end of
    text, so that no vocabulary has to grow, and a space comes before a reference.
    """
    options: DataToTextInput = config.input
    tokenizer = open_tokenizer(options.tokenizer, config.init_from)
    train_rows, eval_rows = (
        list(read_texts(config.dataset, split, config.data_dir, *_FEATURES))
        for split in (config.train_split, config.eval_split)
    )
    (train, train_dropped), (held_out, eval_dropped) = (
        encode_sentences(rows, tokenizer, options.length) for rows in (train_rows, eval_rows)
    )
    references = dict([*by_first(eval_rows).items()][: options.eval_generations])
    prompts, lengths = encode_prompts([*references], tokenizer, options.length)

    def finish(models: list[Any], workdir: Path) -> dict[str, list[float]]:
        """Scores of each model on the first meanings; generations.txt by the first model."""
        if not references:
            return {}
        outputs = [
            say(each, prompts, lengths, tokenizer, options, config.batch_size) for each in models
        ]
        scores = [nlg_metrics(each, [*references.values()]) for each in outputs]
        if not has_meteor():
            print("METEOR is left out: it needs Java and `pip install pycocoevalcap`", flush=True)
        lines = [
            f"meaning: {meaning}\npeople:  {' / '.join(texts)}\nours:    {output}\n"
            for (meaning, texts), output in zip(references.items(), outputs[0], strict=True)
        ]
        (workdir / "generations.txt").write_text("\n".join(lines), "utf-8")
        return {name: [score[name] for score in scores] for name in scores[0]}

    return _make_task(config, tokenizer, train, held_out)._replace(
        describe=f"{len(train.tokens):,} sentences of {config.dataset} (too long and left out: "
        f"{train_dropped}, and {eval_dropped} held-out ones)",
        finish=finish,
    )


def abstract(config: Config, tokenizer: Tokenizer | None = None) -> Task:
    """The task by its shapes."""
    place = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    batch = Sentences(abstract_tokens(config), place, place)
    return _make_task(config, tokenizer or largest_tokenizer(config), batch, batch)


def _make_task(config: Config, tokenizer: Any, train: Sentences, held_out: Sentences) -> Task:
    options: DataToTextInput = config.input

    def metrics(model: Any, batch: Sentences, rngs: Any) -> Metrics:
        """Loss in nats a token of the reference, its end included; smoothed in training only."""
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        place = jnp.arange(1, batch.tokens.shape[1])
        counts = (place >= batch.start[:, None]) & (place < batch.stop[:, None])
        smoothing = 0.0 if rngs is None else options.label_smoothing
        loss = model.loss(model.features(inputs, rngs=rngs), targets, smoothing)
        return {"loss": (jnp.where(counts, loss, 0).sum(-1), counts.sum(-1).astype(jnp.float32))}

    return Task(
        train_groups=(train,),
        eval_groups=(held_out,),
        make_model=make_causal_lm(config, tokenizer.vocab_size, options.length),
        metrics=metrics,
        tokenizer=tokenizer,
    )


_FEATURES = ("meaning_representation", "reference")


def encode_sentences(
    rows: Sequence[Sequence[str]], tokenizer: Tokenizer, length: int
) -> tuple[Sentences, int]:
    """The (meaning, reference) that fit into length + 1 tokens, and how many do not.

    Raises:
        ValueError: none fits.
    """
    end = tokenizer.end_of_text
    tokens, spans = [], []
    for meaning, reference in rows:
        prompt = [*tokenizer.encode(meaning), end]
        ids = [*prompt, *tokenizer.encode(" " + reference, begins=False), end]
        if len(ids) <= length + 1:
            tokens.append(ids + [end] * (length + 1 - len(ids)))
            spans.append((len(prompt), len(ids)))
    if not tokens:
        raise ValueError(
            f"none of {len(rows)} sentences fits into input.length {length} with its meaning; "
            "take a greater one"
        )
    arrays: Any = np.asarray(tokens, np.int32), *np.asarray(spans, np.int32).T
    return Sentences(*arrays), len(rows) - len(tokens)


def encode_prompts(
    meanings: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [N, T0], int32 [N]): each meaning and end of text, behind padding, and their tokens.

    Raises:
        ValueError: a meaning that leaves no token of `length` for what is to be said.
    """
    rows, lengths = pad_left(
        [[*tokenizer.encode(meaning), tokenizer.end_of_text] for meaning in meanings],
        tokenizer.end_of_text,
    )
    if rows.shape[1] >= length:
        raise ValueError(
            f"input.length is {length}, but the meaning {meanings[int(lengths.argmax())]!r} alone "
            f"has {rows.shape[1]} tokens; take a greater one"
        )
    return rows, lengths


def say(
    model: Any,
    prompts: np.ndarray,
    lengths: np.ndarray,
    tokenizer: Tokenizer,
    options: DataToTextInput,
    batch_size: int,
) -> list[str]:
    """What the model says for each of `encode_prompts`, by beam search, on one line."""

    def continued(rows: jax.Array, lengths: jax.Array) -> jax.Array:
        return generate_beam(
            model,
            rows,
            options.length - rows.shape[1],
            prompt_lengths=lengths,
            beam_size=options.beam_size,
            length_penalty=options.length_penalty,
            no_repeat_ngram=options.no_repeat_ngram,
            ngrams_of_prompt=False,  # as LoRA's programs: a name may be said again
            end_token=tokenizer.end_of_text,
        )[0]

    tokens = in_batches(continued, batch_size, prompts, lengths)
    return [_text(row, tokenizer) for row in tokens.tolist()]


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Up to the end of text, on one line."""
    if tokenizer.end_of_text in ids:
        ids = ids[: ids.index(tokenizer.end_of_text)]
    return " ".join(tokenizer.decode(ids).split())


KIND = TaskKind(DataToTextInput, MODELS, load, abstract, ends_prompts=True)
