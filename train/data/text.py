"""Text for training: documents packed into windows, sentence pairs sorted into buckets by length.

Host-side NumPy, the same for every run; what depends on tokens alone (positions, masks) is
computed from them in JAX.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.data.tokens import BOS, EOS, PAD, Bpe, Tokenizer
from train.datasets.registry import in_chunks, open_split


class PackedText(NamedTuple):
    """tokens: int32 [N, length + 1]; inputs are tokens[:, :-1], targets tokens[:, 1:].

    left_over: tokens at the end that did not fill a window.
    """

    tokens: np.ndarray
    left_over: int


class PairBucket(NamedTuple):
    """Sentence pairs of about one length: each field int32 [N, S], padded at the end.

    source: its tokens and EOS. target_in: BOS and the target's tokens, for the decoder.
    target_out: the target's tokens and EOS, which the decoder has to predict.
    """

    source: np.ndarray
    target_in: np.ndarray
    target_out: np.ndarray


def pack_documents(documents: Iterable[Sequence[int]], length: int, end_of_text: int) -> PackedText:
    """All documents one after the other, each preceded by end_of_text, cut into windows.

    A window's last token is the next one's first: every token but the very first one is a target
    once.

    Args:
        documents: the ids of each document.
        length: tokens a model sees at once.
        end_of_text: the id that no document has.

    Raises:
        ValueError: fewer than length + 1 tokens altogether.
    """
    stream = np.concatenate(
        [np.asarray([end_of_text, *document], np.int32) for document in documents]
        or [np.zeros(0, np.int32)]
    )
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(
            f"all documents have {len(stream)} tokens, a window needs {length + 1}; take a "
            "smaller length, or a larger split"
        )
    starts = np.arange(count)[:, None] * length
    return PackedText(stream[starts + np.arange(length + 1)], len(stream) - 1 - count * length)


def segments(tokens: jax.Array, end_of_text: int) -> jax.Array:
    """int32 [B, T] -> int32 [B, T]: the document of each token, counted within its window.

    end_of_text is the first token of its document.
    """
    return jnp.cumsum(tokens == end_of_text, axis=-1, dtype=jnp.int32)


def positions(tokens: jax.Array, end_of_text: int) -> jax.Array:
    """int32 [B, T] -> int32 [B, T]: each token's place in its document, from 0.

    A document that started in an earlier window counts from this window's first token.
    """
    place = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    starts = jnp.where(tokens == end_of_text, place, 0)
    return place - jax.lax.cummax(starts, axis=starts.ndim - 1)


def attention_mask(segments: jax.Array) -> jax.Array:
    """int32 [B, T] -> bool [B, 1, T, T]: whether two tokens are of one document.

    It is symmetric; that no token sees a later one is the model's own business.
    """
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def bucket_pairs(
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    boundaries: Sequence[int],
    pad: int = PAD,
    bos: int = BOS,
    eos: int = EOS,
) -> tuple[list[PairBucket], int]:
    """Pairs by length: each in the smallest boundary S that holds source + EOS and BOS + target.

    Few shapes, so few compilations, and little padding. The order within a bucket is the given
    one. A bucket without pairs is left out.

    Args:
        source, target: ids, without special ones, of as many sentences.
        boundaries: lengths S, rising.
        pad, bos, eos: special ids.

    Returns:
        (buckets, dropped): the number of pairs that no boundary holds.

    Raises:
        ValueError: no pair that fits.
    """
    pairs: list[list[tuple[Sequence[int], Sequence[int]]]] = [[] for _ in boundaries]
    dropped = 0
    for s, t in zip(source, target, strict=True):
        index = int(np.searchsorted(boundaries, max(len(s), len(t)) + 1))
        if index < len(boundaries):
            pairs[index].append((s, t))
        else:
            dropped += 1
    if not any(pairs):
        raise ValueError(
            f"none of {dropped} pairs fits into {boundaries[-1]} tokens; take larger boundaries"
        )

    def rows(sentences, size):
        padded = np.full((len(sentences), size), pad, np.int32)
        for row, sentence in zip(padded, sentences, strict=True):
            row[: len(sentence)] = sentence
        return padded

    buckets = [
        PairBucket(
            rows([[*s, eos] for s, _ in group], size),
            rows([[bos, *t] for _, t in group], size),
            rows([[*t, eos] for _, t in group], size),
        )
        for group, size in zip(pairs, boundaries, strict=True)
        if group
    ]
    return buckets, dropped


def read_texts(name: str, split: str, data_dir: str, *features: str) -> Iterator[tuple[str, ...]]:
    """The texts of each example of a data set, in its order.

    Args:
        name, data_dir: as `train.datasets.registry.open_split` takes them.
        split: a TFDS split, slices such as "train[:90%]" included.
        features: the features to read, such as "text", or "english", "french".

    Raises:
        FileNotFoundError, ValueError: as `open_split`.
    """
    examples, _ = open_split(name, split, data_dir, *features)
    return (tuple(_as_str(example[f]) for f in features) for example in in_chunks(examples))


def _as_str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def load_text(
    name: str, split: str, data_dir: str, tokenizer: Tokenizer, length: int
) -> PackedText:
    """A split of a data set with the feature "text", packed: see `pack_documents`."""
    documents = (tokenizer.encode(text) for (text,) in read_texts(name, split, data_dir, "text"))
    return pack_documents(documents, length, tokenizer.end_of_text)


def encode_pairs(
    pairs: Iterable[Sequence[str]], tokenizer: Bpe, boundaries: Sequence[int]
) -> tuple[list[PairBucket], int]:
    """(source, target) sentences, by length: see `bucket_pairs`."""
    encoded = [(tokenizer.encode(source), tokenizer.encode(target)) for source, target in pairs]
    return bucket_pairs([s for s, _ in encoded], [t for _, t in encoded], boundaries)
