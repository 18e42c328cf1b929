"""Kaggle "English to French": the translation set of the paper."""

import tensorflow_datasets as tfds

from train.datasets.builder import Example
from train.datasets.local_file import KnownFile, LocalFileBuilder, read_csv
from train.datasets.splits import bucket, connected


def split_key(sentence: str) -> str:
    """What makes sentences the same: their letters and digits, so "Run!" and "run." are one."""
    return "".join(c for c in sentence.casefold() if c.isalnum()) or sentence


class KaggleEnfr(LocalFileBuilder):
    """175,621 English-French sentence pairs of tatoeba.org, collected by manythings.org/anki.

    The file is sorted by length and has many sentences twice, one translation a line. Pairs with
    the same English or the same French sentence, directly or through other pairs ("I'm" and "I am"
    share their French), form groups of at most 96 pairs. A group belongs to train, validation or
    test (about 96/2/2 %) by a hash of its first English sentence: no English and no French sentence
    is in two splits, not even with other punctuation. Version 1.0.0 looked at the English side
    only. The order is hashed too.
    Source: https://www.kaggle.com/datasets/devicharith/language-translation-englishfrench, file
    eng_-french.csv. Licence: CC BY 2.0 FR (tatoeba.org).
    """

    VERSION = tfds.core.Version("2.0.0")
    KNOWN = KnownFile(
        url="https://www.kaggle.com/datasets/devicharith/language-translation-englishfrench",
        files={
            "eng_-french.csv": "4f3dc818dc6da409b119c0f67f091d688378d65588c10acc440eeeecd7556e3d"
        },
        counts={"train": 168_421, "validation": 3_442, "test": 3_758},
    )

    def features(self):
        return {"english": tfds.features.Text(), "french": tfds.features.Text()}

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, list[Example]]:
        [(name, content)] = files.items()
        splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
        header = ["English words/sentences", "French words/sentences"]
        rows = read_csv(name, content, header)
        keys = [(split_key(english), split_key(french)) for english, french in rows]
        # with the side: a word of both languages links nothing
        for group in connected([[(0, english), (1, french)] for english, french in keys]):
            # by alphabet, not by row: the same in a file of another order
            representative = min(keys[row][0] for row in group)
            chosen = {48: "validation", 49: "test"}.get(bucket(representative, 50), "train")
            for row in group:
                english, french = rows[row]
                splits[chosen].append({"english": english, "french": french})
        return splits
