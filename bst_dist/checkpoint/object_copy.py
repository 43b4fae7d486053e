"""Copies of a run in an object store, uploaded file by file and downloaded as a whole.

    URL/recipe.yaml, metrics.jsonl, …             the files directly in the run directory
    URL/checkpoints/step-00000240/manifest.json   uploaded last: a checkpoint without it is not complete
                                 /weights-00000.safetensors …

An object store has no atomic rename. So a reader only accepts a checkpoint with a manifest, and compares every file
with the digest in it. When a checkpoint is removed or replaced, its manifest is removed first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bst_base.errors import StorageError
from bst_base.files import atomic_file, sync_directory, sync_file
from bst_base.object_store import ObjectStore
from bst_dist.checkpoint.directory import (
    CHECKPOINTS,
    MANIFEST,
    PARTIAL,
    CheckpointError,
    ManifestError,
    damage,
    directory,
    parse_manifest,
    read_manifest,
    require_intact,
    step_of,
)

_TRANSFERS = 8  # files transferred at the same time

T = TypeVar("T")


class DamagedCopyError(CheckpointError):
    """The manifest of a checkpoint in the store is damaged, or cut off, as a write to a file system can be."""


class RunCopy:
    """The copy of a run at the address of an `ObjectStore`, such as ``s3://bucket/run``.

    Methods raise StorageError, naming the file, when the store reports an error.
    """

    def __init__(self, url: str) -> None:
        self._store = ObjectStore(url)
        self.url = self._store.where
        """The address as it is shown, without a password."""

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints in the store, newest first."""
        found = self._store.names(f"{CHECKPOINTS}/*/{MANIFEST}")
        return sorted((step_of(Path(name).parent) for name in found), reverse=True)

    def manifest(self, step: int) -> dict[str, Any]:
        """Read the manifest of a complete checkpoint in the store.

        Raises DamagedCopyError, and OtherFormatError for a checkpoint of another version of this program.
        """
        name = f"{_place(step)}/{MANIFEST}"
        try:
            return parse_manifest(self._read(name), f"{self.url}/{_place(step)}")
        except ManifestError as error:
            raise DamagedCopyError(
                f"{self.url}/{name}: {error.what}: push this checkpoint again, or remove it"
            ) from None

    def unfinished(self) -> list[int]:
        """Return the steps of the checkpoints of which the store has files, but no manifest, newest first."""
        found = {step_of(Path(name).parent) for name in self._store.names(f"{CHECKPOINTS}/step-*/*")}
        return sorted(found - set(self.steps()), reverse=True)

    def has(self, step: int, manifest: dict[str, Any]) -> bool:
        """Whether the store has the checkpoint of `step` with this manifest, and not another one of the same step."""
        try:
            return step in self.steps() and contains(self.manifest(step), manifest)
        except CheckpointError:
            return False

    def put_checkpoint(self, checkpoint: Path) -> int:
        """Upload a checkpoint, in place of another one of its step; return the number of bytes sent.

        Raises CheckpointError when the files do not match their manifest, so that no damage is copied, and when the run
        replaces the checkpoint during the upload.
        """
        manifest = read_manifest(checkpoint)
        require_intact(checkpoint)
        step = step_of(checkpoint)
        if step in self.steps():
            self.remove(step)
        place, (first, *others) = _place(step), list(manifest["files"])
        # One file before the others: clients of file systems (sftp) cannot create the same directory in many threads.
        sent = self._put(checkpoint / first, f"{place}/{first}")
        sent += sum(_together(others, lambda name: self._put(checkpoint / name, f"{place}/{name}")))
        if read_manifest(checkpoint) != manifest:
            raise CheckpointError(f"{checkpoint}: changed while it was copied; copy it again")
        return sent + self._put(checkpoint / MANIFEST, f"{place}/{MANIFEST}")

    def put_files(self, run_dir: Path) -> int:
        """Upload the files directly in the run directory; return the number of bytes sent."""
        files = [path for path in sorted(run_dir.iterdir()) if path.is_file() and not path.name.endswith(PARTIAL)]
        return sum(self._put(path, path.name) for path in files)

    def remove(self, step: int) -> None:
        """Remove a complete checkpoint from the store."""
        self._store.remove(f"{_place(step)}/{MANIFEST}")
        self.remove_unfinished(step)

    def remove_unfinished(self, step: int) -> None:
        """Remove what the store has of a checkpoint without a manifest."""
        self._store.remove_below(_place(step))

    def get_files(self, run_dir: Path, last: str) -> None:
        """Download the files directly in the run directory; when the file `last` is there, all others are."""
        for name in sorted(self._store.names("*"), key=lambda name: name == last):
            with atomic_file(run_dir / name) as file:
                file.write(self._read(name))

    def file(self, name: str) -> bytes | None:
        """Return the content of one file of the run; None when the store does not have it."""
        return self._store.read(name)

    def get_checkpoint(self, run_dir: Path, step: int) -> Path:
        """Download a checkpoint into a run directory, completely or not at all; return its path.

        Raises CheckpointError when the downloaded files do not match the manifest.
        """
        final = directory(run_dir, step)
        partial = final.with_name(f"{final.name}.pull{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        names = list(self.manifest(step)["files"])
        _together([*names, MANIFEST], lambda name: self._get(f"{_place(step)}/{name}", partial / name))
        if found := damage(partial):
            shutil.rmtree(partial)
            raise CheckpointError(f"{self.url}/{_place(step)}: {found[0]}; copy it there again, or take another --step")
        sync_directory(partial)
        partial.rename(final)
        sync_directory(final.parent)
        return final

    def _put(self, path: Path, name: str) -> int:
        self._store.upload(path, name)
        return path.stat().st_size

    def _get(self, name: str, path: Path) -> None:
        self._store.download(name, path)
        sync_file(path)

    def _read(self, name: str) -> bytes:
        """Return the content of a file that was listed."""
        if (content := self._store.read(name)) is None:
            raise StorageError(f"{self.url}/{name}: is there no longer; does another process push to this address?")
        return content


def contains(manifest: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a checkpoint has all files of another one with the same content, and skipped as much data.

    One whose optimizer files retention has removed is contained in the full one that it was.
    """
    files = manifest["files"]
    return manifest["skipped"] == other["skipped"] and all(
        name in files and files[name]["sha256"] == record["sha256"] for name, record in other["files"].items()
    )


def _place(step: int) -> str:
    return f"{CHECKPOINTS}/{directory(Path(), step).name}"


def _together(names: Iterable[str], work: Callable[[str], T]) -> list[T]:
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        return list(pool.map(work, names))
