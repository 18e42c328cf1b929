"""Prepares a data set from a file you have downloaded, without TensorFlow and without a network.

    python -m train.prepare NAME --from FILE [--data_dir DIR] [--unverified]

FILE may be plain, compressed, an archive or its folder. Its hash is checked first, then format and
number of examples. A file that fails leaves nothing behind.
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.cli import parse_args, told
from train.datasets.archive import read_files
from train.datasets.local_file import LocalFileBuilder, Source
from train.datasets.registry import BUNDLED, LOCAL, source_note, write
from train.run.experiment import load_experiment

_CONFIGS = Path(__file__).parent.parent / "configs"


def prepare(name: str, file: Path, data_dir: str = "", unverified: bool = False) -> Any:
    """Prepares the set and returns its builder.

    Args:
        name: a key of registry.LOCAL.
        file: what the user downloaded; see archive.read_files for the forms it may have.
        data_dir: where TFDS keeps its data; "" for its default.
        unverified: take a file whose hash is not that of the known one. The
            prepared set's description then says "unverified"; see registry.footnote.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the file, or that the set is already
            prepared from another one.
        OSError: it cannot be written.
    """
    cls = _builder_class(name)
    source, sha256 = read_source(name, file, unverified)
    # no file_format: a folder that TFDS has prepared in another one is to be found, too
    existing = cls(data_dir=data_dir or None)
    if existing.data_path.exists():
        info = existing.data_path / "dataset_info.json"
        if not info.exists() or sha256 not in info.read_text():
            raise ValueError(
                f"{existing.data_dir} exists already, prepared from another file or by TFDS; "
                "remove it first, or take another --data_dir"
            )
    builder = cls(source=source, data_dir=data_dir or None, file_format="array_record")
    if not existing.data_path.exists():
        write(builder)
    return builder


def read_source(name: str, file: Path, unverified: bool = False) -> tuple[Source, str]:
    """(what the set is made of, sha256 of its files); nothing is written. Arguments as `prepare`.

    A file that is not the known one is not looked into, unless it is to be taken `unverified`.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the file.
    """
    cls = _builder_class(name)
    try:
        files = read_files(file, list(cls.KNOWN.files))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; download {name} from {cls.KNOWN.url}") from None
    differences = _differences(cls, files)
    if differences and not unverified:
        raise ValueError(
            f"{file} is not the known file of {name}:\n  "
            + "\n  ".join(differences)
            + f"\nDownload it from {cls.KNOWN.url}, or take this one with --unverified, which the "
            "prepared set remembers"
        )
    try:
        splits, label_names = cls.parse(files), cls.label_names(files)
    except ValueError as error:
        raise ValueError(f"{file} is not what {name} is made from: {error}") from error
    except MemoryError as error:
        raise ValueError(f"{file} takes more memory to read than there is") from error
    empty = [split for split, examples in splits.items() if not examples]
    if empty:
        raise ValueError(f"{file} has no examples for {', '.join(empty)}; it is too small")
    found = {split: len(examples) for split, examples in splits.items()}
    if not differences and found != cls.KNOWN.counts:
        raise ValueError(
            f"{file} is read wrongly, as {_listed(found)} examples, expected "
            f"{_listed(cls.KNOWN.counts)}: {cls.__name__} has another version of parse"
        )
    sha256 = _content_sha256(files)
    note = source_note(file.name, sha256, verified=not differences)
    return Source(splits, label_names, note), sha256


def _builder_class(name: str) -> type[LocalFileBuilder]:
    if name in BUNDLED:
        raise ValueError(f"{name} needs no file: it prepares itself when it is first used")
    if name not in LOCAL:
        raise ValueError(f"NAME is {name!r}, expected one of {', '.join(LOCAL)}")
    return LOCAL[name]


def _differences(cls: type[LocalFileBuilder], files: dict[str, bytes]) -> list[str]:
    wrong = []
    for name, expected in cls.KNOWN.files.items():
        kind = "md5" if len(expected) == 32 else "sha256"
        digest = hashlib.new(kind, files[name]).hexdigest()
        if digest != expected:
            wrong.append(f"the {kind} of {name} (uncompressed) is {digest}, expected {expected}")
    return wrong


def _content_sha256(files: dict[str, bytes]) -> str:
    """sha256 of the files, uncompressed, one after the other."""
    digest = hashlib.sha256()
    for content in files.values():
        digest.update(content)
    return digest.hexdigest()


def _summary(builder: Any, name: str, data_dir: str, seconds: float) -> str:
    lines = [f"{name}: prepared in {builder.data_dir} ({seconds:.0f} s)"]
    lines += [
        f"  {split:<12}{info.num_examples:>9,}" for split, info in builder.info.splits.items()
    ]
    lines.append(f"  {builder.info.description.splitlines()[-1]}")
    where = f" --config.data_dir={data_dir}" if data_dir else ""
    experiments = sorted(_CONFIGS.glob("*_*.py"))
    experiments = [file for file in experiments if not file.stem.startswith("_")]
    users = [
        file for file in experiments if load_experiment(str(file)).get_config().dataset == name
    ]
    for config in users:
        lines.append(
            f"Train on it by\n    python -m train --config=configs/{config.name} "
            f"--workdir=runs/{config.stem}{where}"
        )
    if not users:
        lines.append(f"Train on it with any config of its kind and --config.dataset={name}{where}")
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in counts.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.prepare", description="Prepare a data set from a downloaded file."
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(LOCAL))
    parser.add_argument("--from", dest="file", metavar="FILE", type=Path, required=True)
    parser.add_argument("--data_dir", default="", help="where TFDS keeps its data")
    parser.add_argument(
        "--unverified", action="store_true", help="take a file of other content than the known one"
    )
    args = parse_args(parser, argv)
    start = time.monotonic()
    with told():
        builder = prepare(args.name, args.file, args.data_dir, args.unverified)
    print(_summary(builder, args.name, args.data_dir, time.monotonic() - start))


if __name__ == "__main__":
    main()
