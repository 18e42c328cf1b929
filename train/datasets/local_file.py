"""Builders that are fed from a file the user has downloaded, and how such a file is read."""

import csv
import io
from typing import ClassVar, NamedTuple

from train.datasets.builder import Builder, Example

MAX_LINES = 2_000_000  # of a file of text or pairs; Python takes about a KiB for each


class Source(NamedTuple):
    """What a builder is prepared from.

    splits: its examples; label_names: of the ClassLabel features; note: file, sha256, verified or
    not, a line that ends up in the description of the prepared set.
    """

    splits: dict[str, list[Example]]
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


class LocalFileBuilder(Builder, skip_registration=True):
    """A builder that is prepared once by `python -m train.prepare NAME --from FILE`.

    A subclass says which file it wants (KNOWN) and how to read it (features, parse).
    """

    KNOWN: ClassVar[KnownFile]

    def __init__(self, *, source: Source | None = None, **kwargs):
        # before super(): it asks for _info
        self.source = source
        super().__init__(**kwargs)

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, list[Example]]:
        """The examples of every split. Raises ValueError if a file is not what it should be."""
        raise NotImplementedError

    @classmethod
    def label_names(cls, files: dict[str, bytes]) -> dict[str, list[str]]:
        """The names of the labels, if the files have them."""
        del files
        return {}

    def homepage(self) -> str:
        return self.KNOWN.url

    def note(self) -> str:
        return f"\n\n{self.source.note}" if self.source else ""

    def examples(self):
        if self.source is None:
            raise ValueError(f"run `python -m train.prepare {self.name} --from FILE` instead")
        return {split: enumerate(examples) for split, examples in self.source.splits.items()}


def decode(name: str, content: bytes) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises ValueError if not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8 text") from None


def check_count(name: str, lines: int) -> None:
    """Raises ValueError for more than MAX_LINES."""
    if lines > MAX_LINES:
        raise ValueError(f"{name} has more than {MAX_LINES:,} lines, the most that is read")


def read_csv(name: str, content: bytes, header: list[str]) -> list[list[str]]:
    """The rows below the header. Raises ValueError for another header or a row of other length."""
    reader = csv.reader(io.StringIO(decode(name, content), newline=""), strict=True)
    rows = []
    try:
        first = next(reader, [])
        if first != header:
            raise ValueError(f"{name}: columns are {str(first)[:200]}, expected {header}")
        for row in reader:
            if len(row) != len(header) or not all(row):
                raise ValueError(
                    f"{name}, line {reader.line_num}: {len(row)} columns {str(row)[:200]}, "
                    f"expected {len(header)}, none of them empty"
                )
            rows.append(row)
            check_count(name, len(rows))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from None
    return rows
