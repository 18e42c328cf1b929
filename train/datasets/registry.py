"""Data sets by name: which there are, whether they are prepared, and if not, by which command."""

import json
import re
from typing import Any

import tensorflow_datasets as tfds

from train.datasets.cifar import Cifar10, Cifar100
from train.datasets.digits import Digits
from train.datasets.e2e import E2e
from train.datasets.kaggle_enfr import KaggleEnfr
from train.datasets.local_file import LocalFileBuilder
from train.datasets.numbers_enfr import NumbersEnfr
from train.datasets.openwebtext_sample import OpenwebtextSample
from train.datasets.pydoc import Pydoc
from train.datasets.write import write

# They prepare themselves, without a download.
BUNDLED: dict[str, Any] = {"digits": Digits, "pydoc": Pydoc, "numbers_enfr": NumbersEnfr}

# `python -m train.prepare` prepares them from a file. The CIFARs are read as stock TFDS sets.
LOCAL: dict[str, type[LocalFileBuilder]] = {
    "kaggle_enfr": KaggleEnfr,
    "openwebtext_sample": OpenwebtextSample,
    "e2e": E2e,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
}


def open_builder(name: str, data_dir: str = "") -> Any:
    """The TFDS builder of a data set, prepared: `.as_data_source(split)` reads it.

    Args:
        name: one of BUNDLED or LOCAL, or any TFDS name.
        data_dir: where TFDS keeps its data; "" for its default.

    Raises:
        FileNotFoundError: the set is not prepared; the message has the command that does it.
        ValueError: an unknown name; the message lists the choices.
    """
    if name in BUNDLED:
        return _open_bundled(name, data_dir)
    try:
        if name in LOCAL and name not in ("cifar10", "cifar100"):
            builder = LOCAL[name](data_dir=data_dir or None, file_format="array_record")
        else:
            builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        choices = ", ".join([*BUNDLED, *LOCAL])
        raise ValueError(
            f"dataset is {name!r}, expected one of {choices}, or a TFDS name"
        ) from None
    # asked first: an unprepared set would look for itself on the network, for minutes if offline
    if not builder.is_prepared():
        raise FileNotFoundError(_how_to_prepare(name, builder.data_dir, data_dir))
    return builder


def _open_bundled(name: str, data_dir: str) -> Any:
    builder = BUNDLED[name](data_dir=data_dir or None, file_format="array_record")
    if not builder.data_path.exists():
        try:
            write(builder)
        except OSError:
            # another process may have been faster
            builder = BUNDLED[name](data_dir=data_dir or None, file_format="array_record")
            if not builder.is_prepared():
                raise
    return builder


def footnote(builder: Any) -> str | None:
    """What a report on this data has to say about it: that the source file is unverified.

    Returns:
        "prepared from FILE (sha256 HEX, unverified)", or None where there is nothing to say.
    """
    # from disk: a builder's own info has the description in the code
    info = json.loads((builder.data_path / "dataset_info.json").read_text())
    pattern = r"^Prepared from (.+), sha256 ([0-9a-f]{64}), unverified\.$"
    match = re.search(pattern, info.get("description", ""), re.MULTILINE)
    return match and f"prepared from {match[1]} (sha256 {match[2]}, unverified)"


def source_note(file: str, sha256: str, verified: bool) -> str:
    """The line in a prepared set's description that `footnote` looks for."""
    return f"Prepared from {file}, sha256 {sha256}, {'verified' if verified else 'unverified'}."


def _how_to_prepare(name: str, folder: str, data_dir: str) -> str:
    where = f" --data_dir={data_dir}" if data_dir else ""
    ways = []
    if name in LOCAL:
        url = LOCAL[name].KNOWN.url
        ways.append(
            f"Download {url}\nand prepare it once, without TensorFlow, by\n"
            f"    python -m train.prepare {name} --from FILE{where}"
        )
    if name not in LOCAL or name in ("cifar10", "cifar100"):
        ways.append(
            "Prepare it once, with a network connection, by\n"
            "    pip install -e '.[prepare]'\n"
            f"    tfds build {name} --file_format=array_record{where}"
        )
    return (
        f"dataset {name} is not prepared in {folder}. "
        + "\nOr: ".join(ways)
        + "\nor name the folder that has it with --config.data_dir=DIR"
    )


def open_split(name: str, split: str, data_dir: str = "") -> tuple[Any, Any]:
    """(examples, builder) of a split: a sequence of dicts, and the TFDS builder it is from.

    Args:
        name, data_dir: as `open_builder`.
        split: a TFDS split, slices such as "train[:90%]" included.

    Raises:
        FileNotFoundError: as `open_builder`.
        ValueError: an unknown name or split.
    """
    builder = open_builder(name, data_dir)
    try:
        return builder.as_data_source(split), builder
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}"
        ) from error
