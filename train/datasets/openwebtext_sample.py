"""A sample of OpenWebText, one JSON document a line."""

import json

import tensorflow_datasets as tfds

from train.datasets.builder import Example
from train.datasets.local_file import KnownFile, LocalFileBuilder, check_count, decode
from train.datasets.splits import bucket


class OpenwebtextSample(LocalFileBuilder):
    """1,426 web pages of OpenWebText; about every twentieth, by hash, is for validation.

    A .jsonl file of objects with the field "text"; other fields are ignored. Our figures are for
    one sample, known by its sha256. Any other file of this form is taken with --unverified.
    Source: https://huggingface.co/datasets/Skylion007/openwebtext (Gokaslan and Cohen 2019).
    Licence: the packaging is CC0; the pages belong to their authors.
    """

    VERSION = tfds.core.Version("1.0.0")
    KNOWN = KnownFile(
        url="https://huggingface.co/datasets/Skylion007/openwebtext",
        files={
            "openwebtext.jsonl": "0a543491654329d819f644cf6d7de8cb17df4aec00f406361b7fa98b0ba329a0"
        },
        counts={"train": 1_341, "validation": 85},
    )

    def features(self):
        return {"text": tfds.features.Text()}

    @classmethod
    def parse(cls, files: dict[str, bytes]) -> dict[str, list[Example]]:
        [(name, content)] = files.items()
        splits: dict[str, list[Example]] = {"train": [], "validation": []}
        # not splitlines(): text may hold other line ends, such as U+2028
        check_count(name, content.count(b"\n"))
        for number, line in enumerate(decode(name, content).split("\n"), 1):
            if line.strip():
                text = _text(f"{name}, line {number}", line)
                chosen = "validation" if bucket(text, 20) == 0 else "train"
                splits[chosen].append({"text": text})
        return splits


def _text(where: str, line: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:  # also for too many digits, or too deep
        raise ValueError(f"{where}: not JSON, {error}") from None
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with a string "text", got {line[:100]}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise ValueError(f"{where}: {error}") from None
    return text
