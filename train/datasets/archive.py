"""Named files out of whatever was downloaded: plain, compressed, an archive or a folder."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

_DECOMPRESS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
    b"BZh": bz2.decompress,
}
# RuntimeError is zipfile's for a password or an unknown compression
_DAMAGED = (
    EOFError,
    lzma.LZMAError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    RuntimeError,
)

# (path inside, function that reads it)
_Members = list[tuple[str, Callable[[], bytes]]]


def read_files(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of the named files, in the order of names.

    Args:
        path: a folder, a tar or zip archive, or, if there is one name only, the file itself
            under any name; each plain or compressed by gzip, xz or bzip2.
        names: file names, looked for in all folders inside. A single name that is not there
            stands for the only file with its suffix, as a lone file is often renamed.

    Raises:
        FileNotFoundError: there is nothing at path.
        ValueError: damaged or truncated, or a named file is missing or there twice.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        members = [(file.relative_to(path).as_posix(), file.read_bytes) for file in inside]
        return {name: _find(path, members, names, name)() for name in names}
    try:
        data = _decompressed(path.read_bytes())
        members = _members(data)
        if members is not None:
            return {name: _find(path, members, names, name)() for name in names}
    except _DAMAGED as error:
        raise ValueError(f"{path} is truncated or damaged, download it again ({error})") from error
    if not data:
        raise ValueError(f"{path} is empty, download it again")
    if len(names) > 1:
        raise ValueError(
            f"{path} is neither a tar or zip archive nor a folder; expected one that holds "
            + ", ".join(names)
        )
    return {names[0]: data}


def _decompressed(data: bytes) -> bytes:
    for magic, decompress in _DECOMPRESS.items():
        if data.startswith(magic):
            try:
                return decompress(data)
            except (OSError, ValueError) as error:  # gzip's and bz2's names for damage
                raise EOFError(str(error)) from error
    return data


def _members(data: bytes) -> _Members | None:
    """The files of an archive; None if data is none."""
    if data.startswith(b"PK\x03\x04"):
        zipped = zipfile.ZipFile(io.BytesIO(data))
        files = [name for name in zipped.namelist() if not name.endswith("/")]
        return [(name, lambda name=name: zipped.read(name)) for name in files]
    if tarfile.is_tarfile(io.BytesIO(data)):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            inside = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
            return [(name, lambda data=file.read(): data) for name, file in inside if file]
    return None


def _find(path: Path, members: _Members, names: Sequence[str], name: str) -> Callable[[], bytes]:
    matches = [read for file, read in members if PurePosixPath(file).name == name]
    if not matches and len(names) == 1:
        suffix = PurePosixPath(name).suffix
        matches = [read for file, read in members if PurePosixPath(file).suffix == suffix]
    if len(matches) != 1:
        inside = ", ".join(sorted(file for file, _ in members)[:12]) or "nothing"
        raise ValueError(
            f"{path} has {len(matches) or 'no'} files for {name}, expected one; it holds {inside}"
        )
    return matches[0]
