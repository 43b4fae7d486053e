"""A local copy: everything that one rank needs to resume, in one file in a node's own directory.

    a shard (`shards`)      the weights, moments and averages that the rank holds
    the rank's own state    random generators and the carried past, written by torch.save
    the manifest            like a checkpoint's, without files
    the end                 the lengths of the two parts before it, and the SHA-256 of everything before the end

The file is written under a temporary name and renamed, so a killed process leaves no incomplete file under its final
name. The file is not synced: written data survives when the process is killed, and when the machine fails its memory is
lost anyway. If the directory is on a disk, a failing machine may leave an incomplete file, which the digest shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bst_base.files import path_in_errors, unsynced_file
from bst_dist.checkpoint.directory import CheckpointError
from bst_dist.checkpoint.durable import Hashing
from bst_dist.checkpoint.host_copy import Copied
from bst_dist.checkpoint.shards import Headers, Shards, write

END = struct.Struct("<QQ32s")
CHUNK = 1 << 24
"""Bytes that are read or sent at a time."""


@dataclass(frozen=True, order=True)
class Key:
    """Identifies a copy of a run. Keys are ordered by the run's progress: skipped data, then step (`faults.ledger`)."""

    skipped: int
    step: int
    epoch: int
    """The lease epoch of the start that took the copy."""

    def path(self, root: Path, rank: int) -> Path:
        """Return the path of a rank's copy, on each node that has it."""
        return root / str(self) / f"rank-{rank:05d}"

    def __str__(self) -> str:
        return f"step-{self.step:08d}.skipped-{self.skipped}.epoch-{self.epoch}"

    @classmethod
    def of(cls, name: str) -> Key | None:
        """Return the key in a directory's name; None for any other directory."""
        found = re.fullmatch(r"step-(\d+)\.skipped-(\d+)\.epoch-(\d+)", name)
        return found and cls(int(found[2]), int(found[1]), int(found[3]))


def copied_name(parameter: str, tensor: str) -> str:
    """Return the name of a parameter's weight, moment or average in a copy, where all are in one file."""
    return f"{tensor}/{parameter}"


def write_copy(path: Path, copied: Sequence[Copied], own: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Write a rank's copy; raises OSError when there is no space."""
    memory = io.BytesIO()
    torch.save(own, memory)
    text = json.dumps(manifest).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path_in_errors(path), unsynced_file(path) as file:
        hashing = Hashing(file)
        write(hashing, [one.stored(copied_name) for one in copied], [one.runs for one in copied])
        hashing.write(memory.getbuffer())
        hashing.write(text)
        file.write(END.pack(memory.tell(), len(text), bytes.fromhex(hashing.record()["sha256"])))


class LocalCopy:
    """Reads a rank's copy; raises CheckpointError for a file that is not a copy or is truncated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._end = file.seek(-END.size, io.SEEK_END)
                self._own, length, self._sha256 = END.unpack(file.read(END.size))
                file.seek(self._end - length)
                self.manifest: dict[str, Any] = json.loads(file.read(length))
                self._begin = self._end - length - self._own
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no local copy: {error}") from None

    def intact(self, arrived: Callable[[], None] = lambda: None) -> bool:
        """Whether the content matches its digest; `arrived`: called after each part that is read."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                left = self._end
                while left and (part := file.read(min(CHUNK, left))):
                    digest.update(part)
                    left -= len(part)
                    arrived()
        except OSError:
            return False
        return digest.digest() == self._sha256

    def rank_state(self) -> dict[str, Any]:
        """Return the rank's own state: random generators and the carried past."""
        with self.path.open("rb") as file:
            file.seek(self._begin)
            return torch.load(io.BytesIO(file.read(self._own)), map_location="cpu", weights_only=True)

    def shards(self) -> Shards:
        """Return the weights, moments and averages in the copy."""
        return Shards(Headers([self.path], self.path))
