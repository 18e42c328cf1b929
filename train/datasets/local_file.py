"""Builders that are fed from a file the user has downloaded, and what such a file must be."""

import inspect
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import tensorflow_datasets as tfds

Examples = list[dict[str, Any]]


class Source(NamedTuple):
    """What a builder is prepared from.

    splits: its examples; label_names: of the ClassLabel features; note: file, sha256, verified or
    not, a line that ends up in the description of the prepared set.
    """

    splits: dict[str, Examples]
    label_names: dict[str, list[str]]
    note: str


class KnownFile(NamedTuple):
    """The file a builder is made for.

    url: where to download it; files: the names in it (one, or those of an archive) with their
    sha256, or md5 where only that is known; counts: how many examples each split has.
    """

    url: str
    files: dict[str, str]
    counts: dict[str, int]


class LocalFileBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder that is prepared once by `python -m train.prepare NAME --from FILE`.

    A subclass says which file it wants (KNOWN) and how to read it (features, parse).
    """

    KNOWN: ClassVar[KnownFile]

    def __init__(self, *, source: Source | None = None, **kwargs):
        # before super(): it asks for _info
        self._source = source
        super().__init__(**kwargs)

    @classmethod
    @abstractmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, Examples]:
        """The examples of every split. Raises ValueError if a file is not what it should be."""

    @classmethod
    def label_names(cls, files: dict[str, bytes]) -> dict[str, list[str]]:
        """The names of the labels, if the files have them."""
        del files
        return {}

    @classmethod
    @abstractmethod
    def features(cls) -> dict[str, Any]:
        """TFDS features by name."""

    def _info(self) -> tfds.core.DatasetInfo:
        description = inspect.getdoc(type(self)) or ""
        features = self.features()
        if self._source is not None:
            description += f"\n\n{self._source.note}"
            for feature, names in self._source.label_names.items():
                features[feature].names = names
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(features),
            homepage=self.KNOWN.url,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        if self._source is None:
            raise ValueError(f"run `python -m train.prepare {self.name} --from FILE` instead")
        # TFDS writes examples in the order of a hash of their key, here their number
        return {
            split: self._generate_examples(examples)
            for split, examples in self._source.splits.items()
        }

    def _generate_examples(self, examples: Examples) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(examples)
