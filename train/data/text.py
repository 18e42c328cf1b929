"""Text for training: documents packed into windows, sentence pairs sorted into buckets by length.

Host-side NumPy, the same for every run; what depends on tokens alone (positions, masks) is
computed from them in JAX.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.data.tokens import BOS, EOS, PAD, Bpe, Tokenizer
from train.datasets.registry import in_chunks, open_split


class PairBucket(NamedTuple):
    """Sentence pairs of about one length: each field int32 [N, S], padded at the end.

    source: its tokens and EOS. target_in: BOS and the target's tokens, for the decoder.
    target_out: the target's tokens and EOS, which the decoder has to predict.
    """

    source: np.ndarray
    target_in: np.ndarray
    target_out: np.ndarray


def pack_documents(documents: Iterable[Sequence[int]], length: int, end_of_text: int) -> np.ndarray:
    """All documents one after the other, each preceded by end_of_text, cut into windows.

    A window's last token is the next one's first: every token but the very first one is a target
    once, and what does not fill a window at the end is left out.

    Args:
        documents: the ids of each document.
        length: tokens a model sees at once.
        end_of_text: the id that no document has.

    Returns:
        int32 [N, length + 1]: inputs are [:, :-1], targets [:, 1:].

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
    return stream[starts + np.arange(length + 1)]


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
    pairs: Iterable[Sequence[str]], tokenizer: Bpe, boundaries: Sequence[int]
) -> tuple[list[PairBucket], int]:
    """Sentences by length: each pair in the first boundary S that holds source + EOS, BOS + target.

    Few shapes, so few compilations, and little padding. The order within a bucket is the given
    one. A bucket without pairs is left out.

    Args:
        pairs: (source, target) texts.
        tokenizer: of both languages.
        boundaries: lengths S, rising.

    Returns:
        (buckets, dropped): the number of pairs that no boundary holds.

    Raises:
        ValueError: no pair that fits.
    """
    groups: list[list[tuple[list[int], list[int]]]] = [[] for _ in (*boundaries, "too long")]
    for pair in pairs:
        source, target = map(tokenizer.encode, pair)
        index = int(np.searchsorted(boundaries, max(len(source), len(target)) + 1))
        groups[index].append((source, target))
    dropped = len(groups.pop())
    if not any(groups):
        raise ValueError(
            f"none of {dropped} pairs fits into {boundaries[-1]} tokens; take larger boundaries"
        )
    buckets = [
        PairBucket(
            pad_right([[*s, EOS] for s, _ in group], size),
            pad_right([[BOS, *t] for _, t in group], size),
            pad_right([[*t, EOS] for _, t in group], size),
        )
        for group, size in zip(groups, boundaries, strict=True)
        if group
    ]
    return buckets, dropped


def pad_right(sentences: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """int32 [N, size]: each sentence, and PAD behind it."""
    rows = np.full((len(sentences), size), PAD, np.int32)
    for row, sentence in zip(rows, sentences, strict=True):
        row[: len(sentence)] = sentence
    return rows


def pad_left(prompts: Sequence[Sequence[int]], filler: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [N, longest], int32 [N]): each prompt behind filler, and its length."""
    lengths = np.asarray([len(each) for each in prompts], np.int32)
    rows = np.full((len(prompts), lengths.max(initial=0)), filler, np.int32)
    for row, each in zip(rows, prompts, strict=True):
        row[len(row) - len(each) :] = each
    return rows, lengths


def in_batches(function: Callable[..., Any], batch_size: int, *arrays: np.ndarray) -> np.ndarray:
    """function(rows of each array), for all rows, in batches of one shape: so of one program."""
    count = len(arrays[0])
    size = min(batch_size, count)
    parts = []
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)  # the last one again
        parts.append(function(*(jnp.asarray(array[rows]) for array in arrays)))
    return np.concatenate(parts)[:count]


def by_first(pairs: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """first -> its seconds: a sentence may have several translations, a meaning several texts."""
    groups: dict[str, list[str]] = {}
    for first, second in pairs:
        groups.setdefault(first, []).append(second)
    return groups


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
) -> np.ndarray:
    """A split of a data set with the feature "text", packed: see `pack_documents`."""
    end = tokenizer.end_of_text
    documents = (  # a checkpoint's tokenizer may put the end around a text, too
        [token for token in tokenizer.encode(text) if token != end]
        for (text,) in read_texts(name, split, data_dir, "text")
    )
    return pack_documents(documents, length, end)
