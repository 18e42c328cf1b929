"""E2E NLG: restaurant descriptions from attribute lists."""

import tensorflow_datasets as tfds

from train.datasets.builder import Example
from train.datasets.local_file import KnownFile, LocalFileBuilder, read_csv

_SHA256 = {
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}


class E2e(LocalFileBuilder):
    """The E2E NLG Challenge: 51,426 restaurant descriptions, each with what it has to say.

    42,061 / 4,672 / 4,693 rows; a meaning representation has several references. Splits as given.
    Source: https://github.com/tuetschek/e2e-dataset (Novikova, Dusek and Rieser 2017,
    arXiv 1706.09254). Licence: CC BY-SA 4.0.
    """

    VERSION = tfds.core.Version("1.0.0")
    KNOWN = KnownFile(
        url="https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip",
        files=_SHA256,
        counts={"train": 42_061, "validation": 4_672, "test": 4_693},
    )

    def features(self):
        return {
            "meaning_representation": tfds.features.Text(),
            "reference": tfds.features.Text(),
        }

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, list[Example]]:
        return {
            split: [
                {"meaning_representation": meaning, "reference": reference}
                for meaning, reference in read_csv(name, content, ["mr", "ref"])
            ]
            for split, (name, content) in zip(cls.KNOWN.counts, files.items(), strict=True)
        }
