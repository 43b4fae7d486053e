"""Compressed files and archives, read as streams. Nothing is ever unpacked to a path that an archive names."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from backports import zstd
from backports.zstd import DecompressionParameter

from bst_base.errors import UserError
from data_pipeline.format.tar_header import CheckedHeader
from data_pipeline.sources.base import Skipped

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst")

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".xz": lzma.open,
    ".zst": partial(zstd.open, options={DecompressionParameter.window_log_max: 31}),  # `zstd --long=31`
}
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zstd.ZstdError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    gzip.BadGzipFile,
)


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    data: bytes


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if its name ends in .gz, .tgz, .xz or .zst.

    Raises UserError for damaged data.
    """
    opener = _OPENERS.get(path.suffix, Path.open)
    with damage_explained(str(path)), opener(path, "rb") as file:
        yield cast(BinaryIO, file)


def tar_members(file: BinaryIO, where: str) -> Iterator[Member | Skipped]:
    """Yield every regular file of a tar stream, in its order. Links and names that lead out of the archive are skipped.

    Raises UserError for an archive that is damaged, cut short, or without the blocks of zeros that end one.
    """
    with damage_explained(where), tarfile.open(fileobj=file, mode="r|", tarinfo=CheckedHeader) as tar:
        for member in tar:
            name = f"{where}/{member.name}"
            if member.isdir():
                continue
            if not _stays_inside(member.name):
                yield Skipped(name, "unsafe member name")
            elif not member.isfile():
                yield Skipped(name, f"link or special file in an archive (to {member.linkname!r})")
            else:
                data = tar.extractfile(member)
                yield Member(member.name, data.read() if data else b"")
        _require_no_more(tar)


def _require_no_more(tar: tarfile.TarFile) -> None:
    """Raise ReadError when members follow the end of the archive: a header that became zeros looks like the end.

    What follows the end in its own record is undefined: tar programs may leave old data there.
    """
    stream, end = cast(BinaryIO, tar.fileobj), tar.offset
    stream.seek(-(-stream.tell() // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
    while len(block := stream.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
        with suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            raise tarfile.ReadError(f"an end of the archive at byte {end}, and members after it")


def zip_members(path: Path) -> Iterator[Member | Skipped]:
    """Yield every regular file of a zip, sorted by name. Links and names that lead out of the archive are skipped."""
    with damage_explained(str(path)), zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            if info.is_dir():
                continue
            if not _stays_inside(info.filename):
                yield Skipped(f"{path.name}/{info.filename}", "unsafe member name")
            elif (info.external_attr >> 28) == 0xA:
                yield Skipped(f"{path.name}/{info.filename}", "link or special file in an archive")
            else:
                yield Member(info.filename, archive.read(info))


@contextmanager
def damage_explained(where: str) -> Iterator[None]:
    """Turn a decompressor's error about damaged bytes into a UserError that names the file."""
    try:
        yield
    except _DAMAGED as error:
        raise UserError(f"{where}: damaged or cut short ({error}); get the file again") from None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts
