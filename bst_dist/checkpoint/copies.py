"""Copies of a run in an object store: put there file by file, the manifest of a checkpoint last; brought back whole.

    URL/recipe.yaml, metrics.jsonl, …             the files that lie directly in the run directory
    URL/checkpoints/step-00000240/manifest.json   put last: a checkpoint without it is not complete
                                 /weights-00000.safetensors …

An object store has no rename. So a reader takes for a checkpoint only what has a manifest, and compares every file
with the digest in it. What is no longer kept loses its manifest first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from bst_base.errors import StorageError, UserError
from bst_base.files import atomic_file, sync_directory
from bst_dist.checkpoint.directory import (
    CHECKPOINTS,
    MANIFEST,
    PARTIAL,
    CheckpointError,
    damage,
    directory,
    read_manifest,
    step_of,
)

_TRANSFERS = 8  # files under way at a time

T = TypeVar("T")


class RunCopy:
    """The copy of a run at an address that fsspec knows: ``s3://bucket/run``, ``gs://…``, ``file:///…``.

    Credentials and endpoints come from where the store's client looks for them (for S3 the AWS_… variables), or from
    fsspec's own FSSPEC_… variables. Raises StorageError for what the store refuses, with the file.
    """

    def __init__(self, url: str) -> None:
        if "://" not in url:
            raise UserError(f"{url}: not an address of an object store: s3://bucket/run, gs://…, or file:///path")
        self.url = url.rstrip("/")
        try:
            options = {"auto_mkdir": True} if self.url.startswith("file:") else {}
            self._fs, self._root = fsspec.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error}") from None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete there, newest first."""
        found = self._names(f"{CHECKPOINTS}/*/{MANIFEST}")
        return sorted((step_of(Path(name).parent) for name in found), reverse=True)

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint that is complete there."""
        name = f"{_place(step)}/{MANIFEST}"
        return json.loads(self._told(name, "read", lambda: self._fs.cat_file(self._at(name))))

    def put_checkpoint(self, checkpoint: Path) -> int:
        """Put a checkpoint there, unless it is; returns the bytes that were sent.

        Raises CheckpointError when the files are not what their manifest says: damage is not spread.
        """
        if step_of(checkpoint) in self.steps():
            return 0
        if found := damage(checkpoint):
            raise CheckpointError(f"{checkpoint}: {found[0]}; it was not copied")
        place = _place(step_of(checkpoint))
        names = list(read_manifest(checkpoint)["files"])
        sent = sum(_together(names, lambda name: self._put(checkpoint / name, f"{place}/{name}")))
        return sent + self._put(checkpoint / MANIFEST, f"{place}/{MANIFEST}")

    def put_files(self, run_dir: Path) -> int:
        """Put the files there that lie directly in the run directory; returns the bytes that were sent."""
        files = [path for path in sorted(run_dir.iterdir()) if path.is_file() and not path.name.endswith(PARTIAL)]
        return sum(self._put(path, path.name) for path in files)

    def remove(self, step: int) -> None:
        """Remove a checkpoint there."""
        place = _place(step)
        self._told(place, "remove", lambda: self._fs.rm_file(self._at(f"{place}/{MANIFEST}")))
        self._told(place, "remove", lambda: self._fs.rm(self._at(place), recursive=True))

    def get_files(self, run_dir: Path) -> None:
        """Write the run's own files from there into a run directory."""
        for name in self._names("*"):
            with atomic_file(run_dir / name) as file:
                file.write(self._told(name, "read", lambda name=name: self._fs.cat_file(self._at(name))))

    def file(self, name: str) -> bytes | None:
        """One of the run's own files; None when it is not there."""
        try:
            return self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._error(name, "read", error) from error

    def get_checkpoint(self, run_dir: Path, step: int) -> Path:
        """Write a checkpoint from there into a run directory, whole or not at all; returns where it is.

        Raises CheckpointError when what arrived is not what its manifest says.
        """
        final = directory(run_dir, step)
        partial = final.with_name(f"{final.name}.pull{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        names = list(self.manifest(step)["files"])
        _together([*names, MANIFEST], lambda name: self._get(f"{_place(step)}/{name}", partial / name))
        if found := damage(partial):
            shutil.rmtree(partial)
            raise CheckpointError(f"{self._at(_place(step))}: {found[0]}; copy it there again, or take another --step")
        sync_directory(partial)
        partial.rename(final)
        sync_directory(final.parent)
        return final

    def _put(self, path: Path, name: str) -> int:
        self._told(name, "write", lambda: self._fs.put_file(str(path), self._at(name)))
        return path.stat().st_size

    def _get(self, name: str, path: Path) -> None:
        self._told(name, "read", lambda: self._fs.get_file(self._at(name), str(path)))
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def _names(self, pattern: str) -> list[str]:
        """Names below the address that match, without it."""
        self._fs.invalidate_cache()
        found = self._told(pattern, "list", lambda: self._fs.glob(self._at(pattern), detail=True))
        return [name.removeprefix(f"{self._root}/") for name, info in found.items() if info["type"] == "file"]

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _told(self, name: str, doing: str, work: Callable[[], T]) -> T:
        """What `work` returns; what the store's client raises becomes a StorageError."""
        try:
            return work()
        except Exception as error:  # every client has its own
            raise self._error(name, doing, error) from error

    def _error(self, name: str, doing: str, error: Exception) -> StorageError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return StorageError(f"{self.url}/{name}: cannot {doing}: {reason}")


def _place(step: int) -> str:
    return f"{CHECKPOINTS}/{directory(Path(), step).name}"


def _together(names: Iterable[str], work: Callable[[str], T]) -> list[T]:
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        return list(pool.map(work, names))
