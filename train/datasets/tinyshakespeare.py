"""Tiny Shakespeare: a megabyte of plays, cut into documents between two speeches."""

import tensorflow_datasets as tfds

from train.datasets.builder import Example
from train.datasets.local_file import KnownFile, LocalFileBuilder, check_count, decode

_LENGTH = 4_000  # characters: a document is closed after the speech that reaches it


class Tinyshakespeare(LocalFileBuilder):
    """Some 40,000 lines of Shakespeare's plays; the last tenth is for validation, as in nanoGPT.

    Any text file is taken with --unverified; a blank line ends a speech, or a paragraph.
    Source: https://github.com/karpathy/char-rnn (Karpathy 2015). Licence: public domain.
    """

    VERSION = tfds.core.Version("1.0.0")
    KNOWN = KnownFile(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        files={
            "tinyshakespeare.txt": (
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
            )
        },
        counts={"train": 238, "validation": 28},
    )

    def features(self):
        return {"text": tfds.features.Text()}

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, list[Example]]:
        [(name, content)] = files.items()
        check_count(name, content.count(b"\n"))
        text = decode(name, content)
        end = text.rfind("\n\n", 0, 9 * len(text) // 10) + 2  # of the last speech in nine tenths
        parts = {"train": text[:end], "validation": text[end:]}
        return {
            split: [{"text": each} for each in _documents(part)] for split, part in parts.items()
        }


def _documents(text: str) -> list[str]:
    """Whole speeches of at least _LENGTH characters; what is left at the end, too."""
    documents, current = [], ""
    for speech in filter(None, (part.strip("\n") for part in text.split("\n\n"))):
        current += speech + "\n\n"
        if len(current) >= _LENGTH:
            documents.append(current)
            current = ""
    return [*documents, current] if current else documents
