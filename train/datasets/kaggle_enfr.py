"""Kaggle "English to French": the translation set of the paper."""

import tensorflow_datasets as tfds

from train.datasets.hash_split import bucket
from train.datasets.local_file import Examples, KnownFile, LocalFileBuilder
from train.datasets.text_file import read_csv


def split_key(sentence: str) -> str:
    """What decides a sentence's split: its letters and digits, so "Run!" and "run." are one."""
    return "".join(c for c in sentence.casefold() if c.isalnum()) or sentence


class KaggleEnfr(LocalFileBuilder):
    """175,621 English-French sentence pairs of tatoeba.org, collected by manythings.org/anki.

    The file is sorted by length and repeats English sentences, one translation a line. So a pair
    belongs to train, validation or test (about 96/2/2 %) by a hash of its English letters: no
    English sentence is in two splits, not even with other punctuation. The order is hashed too.
    Source: https://www.kaggle.com/datasets/devicharith/language-translation-englishfrench, file
    eng_-french.csv. Licence: CC BY 2.0 FR (tatoeba.org).
    """

    VERSION = tfds.core.Version("1.0.0")
    KNOWN = KnownFile(
        url="https://www.kaggle.com/datasets/devicharith/language-translation-englishfrench",
        files={
            "eng_-french.csv": "4f3dc818dc6da409b119c0f67f091d688378d65588c10acc440eeeecd7556e3d"
        },
        counts={"train": 168_479, "validation": 3_505, "test": 3_637},
    )

    @classmethod
    def features(cls):
        return {"english": tfds.features.Text(), "french": tfds.features.Text()}

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, Examples]:
        [(name, content)] = files.items()
        splits: dict[str, Examples] = {"train": [], "validation": [], "test": []}
        header = ["English words/sentences", "French words/sentences"]
        for english, french in read_csv(name, content, header):
            chosen = {48: "validation", 49: "test"}.get(bucket(split_key(english), 50), "train")
            splits[chosen].append({"english": english, "french": french})
        return splits
