"""Data sets by name: which there are, whether they are prepared, and if not, by which command."""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from train.datasets.cifar import Cifar10, Cifar100
from train.datasets.digits import Digits
from train.datasets.e2e import E2e
from train.datasets.kaggle_enfr import KaggleEnfr
from train.datasets.local_file import LocalFileBuilder
from train.datasets.numbers_enfr import NumbersEnfr
from train.datasets.openwebtext_sample import OpenwebtextSample
from train.datasets.pydoc import Pydoc
from train.datasets.restaurants import Restaurants
from train.datasets.tinyshakespeare import Tinyshakespeare

# They prepare themselves, without a download.
BUNDLED: dict[str, Any] = {
    "digits": Digits,
    "pydoc": Pydoc,
    "numbers_enfr": NumbersEnfr,
    "restaurants": Restaurants,
}

# `python -m train.prepare` prepares them from a file. The CIFARs are read as stock TFDS sets.
LOCAL: dict[str, type[LocalFileBuilder]] = {
    "kaggle_enfr": KaggleEnfr,
    "openwebtext_sample": OpenwebtextSample,
    "tinyshakespeare": Tinyshakespeare,
    "e2e": E2e,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
}
_STOCK = ("cifar10", "cifar100")


def open_builder(name: str, data_dir: str = "") -> Any:
    """The TFDS builder of a data set, prepared: `.as_data_source(split)` reads it.

    Args:
        name: one of BUNDLED or LOCAL, or any TFDS name.
        data_dir: where TFDS keeps its data; "" for its default.

    Raises:
        FileNotFoundError: the set is not prepared, or not as array_record; the message has the
            command that does it.
        ValueError: an unknown name; the message lists the choices.
    """
    if re.match(r"\w+:[^\d\W]", name):
        raise ValueError(
            f"dataset is {name!r}: a set of huggingface or of another community is read from the "
            "network whenever it is opened, which is not done here; save its texts as a .jsonl "
            "file, or write a builder, as docs/your_data.md says"
        )
    # no file_format: with one, a set prepared in another is an error that names no remedy
    options: dict[str, Any] = {"data_dir": data_dir or None}
    ours = BUNDLED.get(name) or LOCAL.get(name)
    try:
        builder = ours(**options) if ours and name not in _STOCK else tfds.builder(name, **options)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        if ours:
            raise _damaged(name, data_dir, error) from error
        choices = ", ".join([*BUNDLED, *LOCAL])
        raise ValueError(
            f"dataset is {name!r}, expected one of {choices}, or a TFDS name"
        ) from None
    except RecursionError as error:
        raise ValueError(f"data_dir is a path of {len(data_dir)} letters; take another") from error
    except OSError:
        raise  # names the file
    except Exception as error:  # of whatever reads JSON and protocol buffers
        raise _damaged(name, data_dir, error) from error
    if name in BUNDLED and not builder.data_path.exists():
        return _prepare_bundled(name, options)
    # asked first: an unprepared set would look for itself on the network, for minutes if offline
    if not builder.is_prepared():
        problem = f"dataset {name} is not prepared in {builder.data_dir}. "
        raise FileNotFoundError(problem + _how_to_prepare(name, data_dir))
    formats = [file_format.value for file_format in builder.info.available_file_formats()]
    if "array_record" not in formats:
        raise FileNotFoundError(
            f"dataset {name} in {builder.data_dir} is in the format {', '.join(formats)}, expected "
            "array_record, which needs no TensorFlow. " + _how_to_prepare(name, "ANOTHER_DIR")
        )
    return builder


def _prepare_bundled(name: str, options: dict[str, Any]) -> Any:
    builder = BUNDLED[name](**options, file_format="array_record")
    try:
        write(builder)
    except RecursionError as error:
        raise ValueError(f"data_dir of {name} is too deep to be made; take another") from error
    except OSError:
        # another process may have been faster
        builder = BUNDLED[name](**options)
        if not builder.is_prepared():
            raise
    return builder


def write(builder: Any) -> None:
    """Prepares a builder that needs no download. If that fails, no folder is left behind."""
    made = [folder for folder in builder.data_path.parents if not folder.exists()]
    tfds.disable_progress_bar()
    try:
        # TFDS announces a download, and wants a folder for it
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=unused)
    except BaseException:
        # TFDS removes its half-written folder, not the ones above
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


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


def _how_to_prepare(name: str, data_dir: str) -> str:
    if name in BUNDLED:
        return "It prepares itself in any other folder: name one with --config.data_dir=DIR"
    where = f" --data_dir={data_dir}" if data_dir else ""
    ways = []
    if name in LOCAL:
        url = LOCAL[name].KNOWN.url
        ways.append(
            f"Download {url}\nand prepare it once, without TensorFlow, by\n"
            f"    python -m train.prepare {name} --from FILE{where}"
        )
    if name not in LOCAL or name in _STOCK:
        ways.append(
            "Prepare it once, with a network connection, by\n"
            "    pip install -e '.[prepare]'\n"
            f"    tfds build {name} --file_format=array_record{where}"
        )
    return "\nOr: ".join(ways) + "\nor name the folder that has it with --config.data_dir=DIR"


def open_split(name: str, split: str, data_dir: str = "", *features: str) -> tuple[Any, Any]:
    """(examples, builder) of a split: a sequence of dicts, and the TFDS builder it is from.

    Args:
        name, data_dir: as `open_builder`.
        split: a TFDS split, slices such as "train[:90%]" included.
        features: those that the examples must have, such as "image", "label".

    Raises:
        FileNotFoundError: as `open_builder`.
        ValueError: an unknown name or split, an empty split, a missing feature.
    """
    builder = open_builder(name, data_dir)
    missing = [feature for feature in features if feature not in builder.info.features]
    if missing:
        raise ValueError(
            f"{name} has no feature {', '.join(missing)}; it has "
            f"{', '.join(builder.info.features)}: it is not a set of {' and '.join(features)}"
        )
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)} ({error})"
        ) from error
    if count < 1:
        raise ValueError(f"split {split!r} of {name} is empty; take a larger slice")
    try:
        _check_files(builder, split)
        return builder.as_data_source(split), builder
    except Exception as error:  # the readers raise RuntimeError, or what their parts raise
        raise _damaged(name, str(builder.data_dir), error) from error


def _check_files(builder: Any, split: str) -> None:
    """Whether the files of a split have as many records as they were written with."""
    splits = builder.info.splits
    written = {
        str(path): count
        for info in splits.values()
        for path, count in zip(info.filepaths, info.shard_lengths, strict=True)
    }
    for file in sorted({str(part.filename) for part in splits[split].file_instructions}):
        if not Path(file).exists():
            raise ValueError(f"{file} is missing")
        found = array_record_module.ArrayRecordReader(file).num_records()
        if found != written[file]:
            raise ValueError(f"{file} has {found} records, {written[file]} were written")


def _damaged(name: str, where: str, error: Exception, what: str = "") -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    folder = f" in {where}" if where else ""
    return ValueError(
        f"dataset {name}{folder} is damaged{what} ({reason}). Make it again elsewhere: "
        + _how_to_prepare(name, "ANOTHER_DIR")
    )


def in_chunks(examples: Any, size: int = 4096, rows: Sequence[int] | None = None) -> Iterator[Any]:
    """Examples of a data source in order, read many at a time: some 20 times faster.

    Args:
        examples: of `open_split`.
        size: how many at a time.
        rows: which of them; all by default. Others are not read.

    Raises:
        ValueError: one cannot be read; the message names it.
    """
    rows = range(len(examples)) if rows is None else rows
    for start in range(0, len(rows), size):
        part = list(map(int, rows[start : start + size]))
        try:
            read = examples.__getitems__(part)
        except MemoryError:
            raise
        except Exception as error:  # a checksum, or an image that is none
            info = examples.dataset_info
            what = f": record {_first_unreadable(examples, part)} of split {examples.split!s}"
            raise _damaged(info.name, str(info.data_dir), error, what) from error
        yield from read


def _first_unreadable(examples: Any, rows: Sequence[int]) -> int:
    for row in rows:
        try:
            examples.__getitems__([row])
        except Exception:
            return row
    return rows[0]
