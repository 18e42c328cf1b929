"""Python's language reference: real English prose and code, no download."""

import platform

import tensorflow_datasets as tfds

from train.datasets.builder import Builder
from train.datasets.splits import connected


def split_topics(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, validation): no line of 40 or more characters, without indent, is in both.

    Topics that share such a line stay together. Of these groups, the largest first, every fifth is
    for validation, from the fifth on: small ones and large ones, but never the largest.
    """
    groups = connected([_long_lines(text) for text in documents])
    groups.sort(key=lambda group: -sum(len(documents[index]) for index in group))
    held_out = {index for group in groups[4::5] for index in group}
    train = [text for index, text in enumerate(documents) if index not in held_out]
    return train, [documents[index] for index in sorted(held_out)]


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


class Pydoc(Builder):
    """The topics of Python's `help()`; those with about 8 % of the text are for validation.

    They are chapters of the Python Language Reference and come with CPython as
    pydoc_data/topics.py, about 0.5 MB. Their text changes a little with the version of Python.
    Topics quote and contain each other; a validation topic shares no long line with a training
    topic (see `split_topics`), as it did in version 1.0.0.
    Source: https://docs.python.org/3/reference/. Licence: Python Software Foundation License 2.
    """

    VERSION = tfds.core.Version("2.0.0")

    def features(self):
        return {"text": tfds.features.Text()}

    def homepage(self) -> str:
        return "https://docs.python.org/3/reference/"

    def note(self) -> str:
        return f"\nPrepared by Python {platform.python_version()}."

    def examples(self):
        from pydoc_data.topics import topics  # half a megabyte, needed only here

        splits = split_topics([topics[name] for name in sorted(topics)])
        return {
            split: enumerate({"text": text} for text in documents)
            for split, documents in zip(("train", "validation"), splits, strict=True)
        }
