"""Named files out of whatever was downloaded: plain, compressed, an archive or a folder.

Nothing is unpacked to the disk, and no more than MAX_BYTES into the memory.
"""

import bz2
import errno
import gzip
import io
import itertools
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

MAX_BYTES = 2**28  # of a file, and of all that comes out of it, unpacked
MAX_FILES = 10_000  # in an archive
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b\x08": gzip.open,
    b"\xfd7z": lzma.open,
    b"BZh": bz2.open,
}
_BLOCK = 512  # of a tar archive
_PIECE = 2**16


class _TooMuch(Exception):
    """What of it is more than it may be."""


class _Limited(io.RawIOBase):
    """A file of which no more than MAX_BYTES can be read, however small it is on the disk."""

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, MAX_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), _PIECE))
        self._left -= len(data)
        if self._left < 0:
            raise _TooMuch(f"more than {MAX_BYTES >> 20} MiB")
        buffer[: len(data)] = data
        return len(data)


def read_files(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of the named files, in the order of names.

    Args:
        path: a folder, a zip archive, a tar archive, plain or compressed by gzip, xz or bzip2, or,
            if there is one name only, the file itself under any name, also so compressed. Links
            in an archive are not followed.
        names: file names, looked for in all folders inside. A single name that is not there
            stands for the only file with its suffix, as a lone file is often renamed.

    Raises:
        FileNotFoundError: there is nothing at path.
        ValueError: damaged or truncated, more than MAX_BYTES or MAX_FILES, or a named file is
            missing or there twice.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty, download it again")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder; name what was downloaded")
    suffixes = {PurePosixPath(name).suffix for name in names} if len(names) == 1 else set()
    inside: list[PurePosixPath] = []
    contents: dict[int, bytes] = {}
    left = MAX_BYTES
    try:
        for number, (name, read) in enumerate(_members(path, names)):
            if number == MAX_FILES:
                raise _TooMuch(f"more than {MAX_FILES:,} files")
            inside.append(PurePosixPath(name))
            if inside[-1].name in names or inside[-1].suffix in suffixes:
                contents[number] = read(left + 1)
                left -= len(contents[number])
            if left < 0:
                raise _TooMuch(f"more than {MAX_BYTES >> 20} MiB")
    except _TooMuch as error:
        raise ValueError(
            f"{path} holds {error}, the most that is read; take the files that are needed, "
            f"{', '.join(names)}, or a part of them"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{path} takes more memory to read than there is") from error
    except Exception as error:  # a damaged archive may raise anything
        # an OSError without a number is none of the system's; EINVAL is for a place before the file
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(
            f"{path} is truncated or damaged, download it again ({str(error)[:200]!r})"
        ) from error
    return _chosen(path, names, inside, contents)


_Member = tuple[str, Callable[[int], bytes]]  # its name, and how so many bytes of it are read


def _members(path: Path, names: Sequence[str]) -> Iterator[_Member]:
    """What is no archive is one file, of the only name that is wanted."""
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file())
        for file in sorted(itertools.islice(files, MAX_FILES + 1)):
            yield file.relative_to(path).as_posix(), lambda size, file=file: _read(file, size)
        return
    with path.open("rb") as file:
        start = file.read(4)
        if start == b"PK\x03\x04":
            yield from _of_zip(path, file)
            return
        file.seek(0)
        unpacked = _COMPRESSED[start[:3]](file) if start[:3] in _COMPRESSED else file
        stream = io.BufferedReader(_Limited(unpacked), _PIECE)
        if _is_tar(stream.peek(_BLOCK)[:_BLOCK]):
            yield from _of_tar(stream)
        else:
            yield names[0] if len(names) == 1 else path.name, stream.read


def _read(file: Path, size: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(size)


def _of_zip(path: Path, file: IO[bytes]) -> Iterator[_Member]:
    if path.stat().st_size > MAX_BYTES:
        raise _TooMuch(f"more than {MAX_BYTES >> 20} MiB")
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, lambda size, info=info: _of_member(archive, info, size)


def _of_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    # zipfile unpacks the others without a limit
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"compressed by method {info.compress_type}, expected deflate")
    with archive.open(info) as member:
        return member.read(size)


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _of_tar(stream: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:  # |: from front to back
        for member in archive:
            if member.isreg() and not member.issparse():
                content: Any = archive.extractfile(member)
                yield member.name, content.read
            vars(archive)["members"].clear()  # it would keep them all


def _chosen(
    path: Path, names: Sequence[str], inside: list[PurePosixPath], contents: dict[int, bytes]
) -> dict[str, bytes]:
    found = {}
    for name in names:
        matches = [number for number, file in enumerate(inside) if file.name == name]
        if not matches and len(names) == 1:
            matches = [*contents]
        if len(matches) != 1:
            held = ", ".join(map(str, sorted(inside)[:12]))[:500]
            raise ValueError(
                f"{path} has {len(matches) or 'no'} files for {name}, expected one; it holds "
                + (held or "nothing")
            )
        found[name] = contents[matches[0]]
    return found
