"""Atomic writes of files and directories: written next to the final name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bst_base.errors import StorageError

_refusing: set[int] = set()
"""File systems for which the warning that they do not sync directories was already logged."""
_log = logging.getLogger(__name__)

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}

_OWN_PARTIAL = re.compile(r"\.[0-9a-f]{8}\.partial$")


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file next to `path` for writing bytes. It is renamed to `path` only when the block succeeds.

    Raises StorageError when the disk is full. The unfinished file is removed on any error.
    """
    with full_disk_explained(path):
        with unsynced_file(path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)


@contextmanager
def unsynced_file(path: Path) -> Iterator[IO[bytes]]:
    """Like `atomic_file`, but not synced: complete when the process is killed, not when the machine fails.

    Raises OSError when the disk is full.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it, under its final name at once; its directory is not synced.

    Raises OSError, with the path in it.
    """
    with path_in_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file with `atomic_file`; missing parent directories are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON with `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Like `atomic_file`, for a directory of files: yield a new empty directory, which is renamed to `path` at the end.

    If another writer finished first, its directory stays and this one is removed.
    """
    partial = _partial(path)
    with full_disk_explained(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                if file.is_file():
                    sync_file(file)
            sync_directory(partial)
            try:
                partial.replace(path)
            except OSError:
                if not path.is_dir():
                    raise
                shutil.rmtree(partial)
            sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_partials(directory: Path) -> None:
    """Remove the unfinished files and directories that killed writers of this module left below a directory.

    No other process may be writing there. Other files are not touched.
    """
    found = (path for path in directory.rglob("*.partial") if _OWN_PARTIAL.search(path.name))
    for partial in sorted(found, reverse=True):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Make what was written to the file durable, by whichever process or thread."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with path_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable. Without it, a crash may lose a file's name although its bytes are safe.

    Some mounts (FUSE, SMB, object stores) refuse to sync a directory. This is logged once and is not an error: names
    are then only as durable as the mount makes them.
    """
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
        if (device := path.stat().st_dev) not in _refusing:
            _refusing.add(device)
            _log.warning("%s: this mount does not sync directories: a name written there may be lost in a crash", path)


def _partial(path: Path) -> Path:
    """Return a name that only this writer uses.

    Another writer of the same file, believed dead, may still be writing.
    """
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def path_in_errors(path: Path | str) -> Iterator[None]:
    """Add the path to an OSError without one: the system gives none for writes to an open file and for its sync."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn an OSError about a full disk, a used-up quota or a too big file into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = f"{path}: {FULL[error.errno]}; nothing half-written was kept: make room, then start again to continue"
        raise StorageError(message) from error
