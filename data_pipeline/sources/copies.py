"""Sources in an object store or on a server: their files are copied to this machine before they are read.

Each address has its own folder of copies for each selection of its files (a kind of source, a pattern), so that two
preparations do not remove each other's copies. Its `fetched.jsonl` records the size and the store's version of each
file when it was copied. So a second preparation copies only new and changed files, and an interrupted one continues.
Copies of files that the store has removed are deleted. Unwanted files are not copied, but counted by the ending of
their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from bst_base.addresses import redacted
from bst_base.errors import UserError
from bst_base.files import atomic_file, full_disk_explained
from bst_base.locks import flock
from data_pipeline.sources.base import Endings
from data_pipeline.sources.packaged.registries import cache_directory
from data_pipeline.store.base import StorageConfig
from data_pipeline.store.remote import FoundFile, RemoteStorage

_FILES, _FETCHED, _FOUND, _LOCK = "files", "fetched.jsonl", "found.json", ".lock"
_AT_ONCE = 8  # files copied in parallel


def folder_of(address: str, selection: str) -> Path:
    """Return the folder for the copies of a selection of an address's files, in the cache directory of packages."""
    key = hashlib.sha256(f"{address}\0{selection}".encode()).hexdigest()[:16]
    return cache_directory().expanduser() / "addresses" / key


@contextmanager
def locked(folder: Path, address: str) -> Iterator[None]:
    """Keep other preparations away from a folder of copies. Raises UserError when one is using it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        if not flock(file, folder / _LOCK):
            raise UserError(
                f"{redacted(address)}: another preparation is copying or reading the same files in {folder}; wait for "
                "it to end, or set another BST_DATA_CACHE"
            )
        yield


def copied(folder: Path) -> Path:
    """Return the directory of the copies, or the copy itself if the address is that of one file.

    It may not exist yet.
    """
    return folder / _FILES / _found(folder)["file"]


def copy(address: str, folder: Path, options: dict[str, Any], wanted: Callable[[str], bool]) -> None:
    """Copy the files at an address that are `wanted`, given by their path below it. The caller holds the lock.

    Raises UserError when there are none.
    """
    storage = RemoteStorage(address, StorageConfig(options=options))
    found = storage.files()
    if not found:
        raise UserError(f"{storage.where}: nothing is there; source.path must be a file or a directory of files")
    (folder / _FILES).mkdir(parents=True, exist_ok=True)
    endings, chosen = Endings(), []
    for file in found:
        if PurePosixPath(file.name).is_absolute() or ".." in PurePosixPath(file.name).parts:
            raise UserError(f"{storage.where}: {file.name!r} would lie outside the folder of copies; rename it there")
        if storage.file or wanted(file.name):
            chosen.append(file)
        else:
            endings.leave_out(file.name)
    there = _fetched(folder)
    _remove_others(folder / _FILES, {file.name for file in chosen})
    missing = [
        file
        for file in chosen
        if not file.version
        or there.get(file.name) != [file.size, file.version]
        or not (folder / _FILES / file.name).is_file()
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool, (folder / _FETCHED).open("a") as log:
        for file in pool.map(lambda file: _copy_one(storage, file, folder / _FILES / file.name), missing):
            log.write(json.dumps([file.name, file.size, file.version]) + "\n")
            log.flush()
    with atomic_file(folder / _FOUND) as log:
        log.write(json.dumps({"file": storage.file, "left_out": endings}).encode())


def left_out(folder: Path) -> Endings:
    """Return the counts of the files that were not copied, by ending."""
    return Endings(_found(folder)["left_out"])


def _found(folder: Path) -> dict[str, Any]:
    """Return the results of the last `copy`: `file` and `left_out`.

    `file` is the file's name if the address is that of one file, else "". `left_out` counts the files that were not
    copied, by ending.
    """
    path = folder / _FOUND
    return json.loads(path.read_bytes()) if path.exists() else {"file": "", "left_out": {}}


def _copy_one(storage: RemoteStorage, found: FoundFile, path: Path) -> FoundFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path), atomic_file(path) as file:
        size = sum(file.write(data) for data in storage.chunks(found.name, found.size))
        if found.size is not None and size != found.size:
            raise UserError(f"{storage.where}/{found.name}: {size:,} bytes received of {found.size:,}; start again")
    return found


def _fetched(folder: Path) -> dict[str, list[Any]]:
    """Return [size, version] of each file when it was copied. A line that was cut short by a kill is ignored."""
    found: dict[str, list[Any]] = {}
    if (folder / _FETCHED).exists():
        for line in (folder / _FETCHED).read_text().splitlines():
            try:
                name, *stamp = json.loads(line)
            except ValueError:
                continue
            found[name] = stamp
    return found


def _remove_others(files: Path, names: set[str]) -> None:
    for path in sorted(files.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(files).as_posix() not in names:
            path.unlink()
