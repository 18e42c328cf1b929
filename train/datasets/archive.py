"""Named files out of whatever was downloaded: plain, compressed, an archive or a folder."""

import bz2
import gzip
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b\x08": gzip.open,
    b"\xfd7z": lzma.open,
    b"BZh": bz2.open,
}
# RuntimeError is zipfile's for a password or an unknown compression; an OSError without a number
# is none of the system's, but gzip's or bz2's
_DAMAGED = (EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile)
_DAMAGED += (RuntimeError, OSError)


def read_files(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of the named files, in the order of names.

    Args:
        path: a folder, a zip archive, a tar archive, plain or compressed by gzip, xz or bzip2, or,
            if there is one name only, the file itself under any name, also so compressed.
        names: file names, looked for in all folders inside. A single name that is not there
            stands for the only file with its suffix, as a lone file is often renamed.

    Raises:
        FileNotFoundError: there is nothing at path.
        ValueError: damaged or truncated, or a named file is missing or there twice.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return _found(path, path, names)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty, download it again")
    with tempfile.TemporaryDirectory() as folder:
        alone = names[0] if len(names) == 1 else path.name
        try:
            _unpack(path, Path(folder), alone)
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{path} is truncated or damaged, download it again ({error})"
            ) from error
        return _found(path, Path(folder), names)


def _unpack(path: Path, folder: Path, alone: str) -> None:
    """Its files into the folder; what is no archive is one, of the name `alone`."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        shutil.unpack_archive(path, folder, "zip")
    elif tarfile.is_tarfile(path):
        shutil.unpack_archive(path, folder, "tar", filter="data")
    else:
        opened = _COMPRESSED.get(start[:3], open)(path, "rb")
        with opened, (folder / alone).open("wb") as out:
            shutil.copyfileobj(opened, out)


def _found(path: Path, folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    found = {}
    for name in names:
        matches = [file for file in files if file.name == name]
        if not matches and len(names) == 1:
            matches = [file for file in files if file.suffix == Path(name).suffix]
        if len(matches) != 1:
            inside = [file.relative_to(folder).as_posix() for file in files[:12]]
            raise ValueError(
                f"{path} has {len(matches) or 'no'} files for {name}, expected one; it holds "
                + (", ".join(inside) or "nothing")
            )
        found[name] = matches[0].read_bytes()
    return found
