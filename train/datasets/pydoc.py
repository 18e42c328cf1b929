"""Python's language reference: real English prose and code, no download."""

import platform

import tensorflow_datasets as tfds

from train.datasets.connected import connected


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


class Pydoc(tfds.core.GeneratorBasedBuilder):
    """The topics of Python's `help()`; those with about 8 % of the text are for validation.

    They are chapters of the Python Language Reference and come with CPython as
    pydoc_data/topics.py, about 0.5 MB. Their text changes a little with the version of Python.
    Topics quote and contain each other; a validation topic shares no long line with a training
    topic (see `split_topics`), as it did in version 1.0.0.
    Source: https://docs.python.org/3/reference/. Licence: Python Software Foundation License 2.
    """

    VERSION = tfds.core.Version("2.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{type(self).__doc__}\nPrepared by Python {platform.python_version()}.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://docs.python.org/3/reference/",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        from pydoc_data.topics import topics  # half a megabyte, needed only here

        train, held_out = split_topics([topics[name] for name in sorted(topics)])
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(held_out),
        }

    def _generate_examples(self, documents):
        for index, text in enumerate(documents):
            yield index, {"text": text}
