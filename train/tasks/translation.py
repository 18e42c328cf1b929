"""Translation of bucketed, masked sentence pairs."""

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import sacrebleu
from flax import nnx
from pydantic import Field

from bdia_jax.models.transformer import Transformer
from bdia_jax.text.translate import translate
from train.config import Config, Input, ModelConfig
from train.data.text import PairBucket, bucket_pairs, by_first, in_batches, pad_right, read_texts
from train.data.tokens import EOS, PAD, SMALLEST_BPE, Bpe, Tokenizer, largest_tokenizer
from train.fields import LIST, Amount, Count, Int, Share, checked
from train.tasks.task import Metrics, Task, TaskKind


@checked
class PairInput(Input):
    """vocab_size of the BPE trained on both languages; boundaries: the buckets' lengths.

    beam_size and eval_translations: how, and how many sentences, the BLEU score is made of.
    """

    vocab_size: Annotated[Int, Field(ge=SMALLEST_BPE)]
    boundaries: Annotated[tuple[Int, ...], LIST]
    beam_size: Count
    eval_translations: Amount

    def __post_init__(self):
        if not (self.boundaries and [0, *self.boundaries] == sorted({0, *self.boundaries})):
            raise ValueError(
                f"input.boundaries are {self.boundaries}, expected rising positive lengths"
            )

    @property
    def tokenizer_name(self) -> str:
        return "bpe"


@checked
class TransformerConfig(ModelConfig):
    """The arguments of `bdia_jax.models.transformer.Transformer`."""

    width: Count
    encoder_depth: Count
    decoder_depth: Count
    num_heads: Count
    mlp_dim: Count
    dropout_rate: Share


def load(config: Config) -> Task:
    """The task of a config whose input is a `PairInput`; its BPE comes from the training split."""
    options: PairInput = config.input
    languages = ("english", "french")
    train_texts, eval_texts = (
        list(read_texts(config.dataset, split, config.data_dir, *languages))
        for split in (config.train_split, config.eval_split)
    )
    tokenizer = Bpe.train(chain.from_iterable(train_texts), options.vocab_size)
    (train, train_dropped), (held_out, eval_dropped) = (
        bucket_pairs(texts, tokenizer, options.boundaries) for texts in (train_texts, eval_texts)
    )

    def finish(models: list[Any], workdir: Path) -> dict[str, list[float]]:
        """BLEU of each model on the first held-out pairs; translations.txt by the first."""
        if not options.eval_translations:
            return {}
        references = by_first(eval_texts[: options.eval_translations])
        longest, beam_size = options.boundaries[-1], options.beam_size
        outputs = [
            translate_texts(model, tokenizer, [*references], longest, beam_size=beam_size)
            for model in models
        ]
        streams: Any = [*zip_longest(*references.values())]
        lines = [
            f"en:   {source}\nfr:   {' / '.join(reference)}\nours: {output}\n"
            for (source, reference), output in zip(references.items(), outputs[0], strict=True)
        ]
        (workdir / "translations.txt").write_text("\n".join(lines), "utf-8")
        return {"bleu": [sacrebleu.corpus_bleu(output, streams).score for output in outputs]}

    count = sum(len(bucket.source) for bucket in train)
    note = f" (too long and left out: {train_dropped}, and {eval_dropped} held-out ones)"
    return _make_task(config, tokenizer, train, held_out)._replace(
        describe=f"{count:,} sentence pairs of {config.dataset}{note}", finish=finish
    )


def abstract(config: Config, tokenizer: Tokenizer | None = None) -> Task:
    """The task by its shapes: all pairs are of the longest bucket."""
    side: Any = jax.ShapeDtypeStruct((config.batch_size, config.input.boundaries[-1]), jnp.int32)
    pairs = [PairBucket(side, side, side)]
    return _make_task(config, tokenizer or largest_tokenizer(config), pairs, pairs)


def _make_task(config: Config, tokenizer: Any, train: Any, held_out: Any) -> Task:
    arguments = config.model_arguments
    sizes = (tokenizer.vocab_size, config.input.boundaries[-1])
    return Task(
        train_groups=tuple(train),
        eval_groups=tuple(held_out),
        make_model=lambda rngs: Transformer(*sizes, **arguments, rngs=rngs),
        metrics=_metrics,
        tokenizer=tokenizer,
    )


def _metrics(model: Any, batch: PairBucket, rngs: nnx.Rngs | None) -> Metrics:
    """Loss in nats a target token; padding counts nothing."""
    features = model.features(batch.source, batch.target_in, rngs=rngs)
    loss = model.loss(features, batch.target_out)
    real = (batch.target_out != PAD).astype(jnp.float32)
    return {"loss": ((loss * real).sum(-1), real.sum(-1))}


def translate_texts(
    model: Any, tokenizer: Tokenizer, sources: Sequence[str], num_tokens: int, **options: Any
) -> list[str]:
    """The translation of each sentence; what is beyond the model's max_len tokens is cut off.

    Args:
        model: a `Transformer`.
        num_tokens, options: max_len and others of `bdia_jax.text.generate.translate`.
    """
    ids = [[*tokenizer.encode(source)[: model.max_len - 1], EOS] for source in sources]
    rows = in_batches(
        lambda rows: translate(model, rows, num_tokens, **options)[0],
        100,
        pad_right(ids, model.max_len),
    )
    return [tokenizer.decode(row) for row in rows.tolist()]


KIND = TaskKind(PairInput, {"transformer": TransformerConfig}, load, abstract)
