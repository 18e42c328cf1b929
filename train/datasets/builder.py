"""What the builders of our own data sets share."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

Example = dict[str, Any]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder that needs no TensorFlow; its docstring is the description of the set.

    A subclass says what its examples are: `features` and `examples`.
    """

    def features(self) -> dict[str, Any]:
        """TFDS features by name."""
        raise NotImplementedError

    def examples(self) -> Mapping[str, Iterable[tuple[Any, Example]]]:
        """(key, example) of every split. TFDS writes them in the order of a hash of their key."""
        raise NotImplementedError

    def homepage(self) -> str | None:
        """Where the data come from, if that is a page."""
        return None

    def note(self) -> str:
        """What the description says of this preparation."""
        return ""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(inspect.getdoc(type(self)) or "") + self.note(),
            features=tfds.features.FeaturesDict(self.features()),
            homepage=self.homepage(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            split: self._generate_examples(split, found) for split, found in self.examples().items()
        }

    def _generate_examples(self, split, examples) -> Iterator[tuple[Any, Example]]:
        key = None
        for key, example in examples:
            # a PIL image is encoded without TensorFlow, an array is not
            yield (
                key,
                {
                    name: Image.fromarray(value) if isinstance(value, np.ndarray) else value
                    for name, value in example.items()
                },
            )
        if key is None:
            raise ValueError(
                f"data set {self.name} has no example for split {split!r}; correct what "
                f"{type(self).__name__}.examples reads: a relative folder is one of {Path.cwd()}"
            )
