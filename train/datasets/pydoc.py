"""Python's language reference: real English prose and code, no download."""

import platform

import tensorflow_datasets as tfds


class Pydoc(tfds.core.GeneratorBasedBuilder):
    """The topics of Python's `help()`, in order of name; every tenth one is for validation.

    They are chapters of the Python Language Reference and come with CPython as
    pydoc_data/topics.py, about 0.5 MB. Their text changes a little with the version of Python.
    Source: https://docs.python.org/3/reference/. Licence: Python Software Foundation License 2.
    """

    VERSION = tfds.core.Version("1.0.0")

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

        documents = [topics[name] for name in sorted(topics)]
        held_out = documents[9::10]
        train = [text for index, text in enumerate(documents) if index % 10 != 9]
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(held_out),
        }

    def _generate_examples(self, documents):
        for index, text in enumerate(documents):
            yield index, {"text": text}
