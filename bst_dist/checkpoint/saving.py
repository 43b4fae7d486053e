"""Writing checkpoints from all ranks together, while training continues.

Training waits for a copy of the weights and the optimizer's states in the host's memory, and no longer. A thread of
each rank writes, syncs and digests that rank's files, in a directory whose name says it is not done. When all threads
are through, which the ranks ask each other between two steps, rank 0's thread writes the manifest and renames the
directory; then it removes what is no longer kept. A process killed at any moment leaves the previous checkpoint as it
was. Only the thread that trains talks to other ranks.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bst_base.errors import StorageError, UserError
from bst_base.files import sync_directory
from bst_base.sizes import shortage
from bst_dist.checkpoint.copying import Copied, HostCopy
from bst_dist.checkpoint.directory import (
    CHECKPOINTS,
    DELETED,
    INDEX,
    MANIFEST,
    OPTIMIZER,
    PARTIAL,
    TENSORS,
    WEIGHTS,
    directory,
    rank_file,
    shard_file,
    stored_name,
)
from bst_dist.checkpoint.durable import FileRecord, Files
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.index import Index, agreed
from bst_dist.checkpoint.retention import remove_leavings
from bst_dist.checkpoint.shards import write
from bst_dist.faults.lease import NO_LEASE, SharedLease
from bst_dist.parallel.ranks import Ranks

SPARE_BYTES = 1 << 20
"""Room for what is small: the manifest, headers, generators."""


class State(Protocol):
    """What is written: `fragments.EngineState`, or anything else that lies over ranks in the same way."""

    def owned(self) -> list[Fragment]:
        """What this rank is to write."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, over all ranks; the same, in the same order, on every rank."""

    def moments(self) -> dict[str, int]:
        """How many of MOMENTS there are of the parameters that have not all of them; the same on every rank."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    path: Path
    full: bool
    bytes: int
    seconds: float
    """From the copy to the commit."""


@dataclass(frozen=True)
class Failed:
    """A checkpoint that could not be written; the one before it is as it was."""

    step: int
    why: str


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    partial: Path
    manifest: dict[str, Any]
    started: float
    written: Future[dict[str, FileRecord]]
    """This rank's files."""
    contents: dict[str, FileRecord] | None = None
    """The files of all ranks, once all have tried to write theirs."""
    settled: Future[str | None] | None = None
    """Then: rank 0's commit, and why there is none."""

    def through(self) -> bool:
        """Whether this rank has done what it was last given."""
        return (self.settled or self.written).done()


class Saver:
    """Writes the checkpoints of one run, one at a time; all ranks make every call."""

    def __init__(self, run_dir: Path, state: State, ranks: Ranks, background: bool, tidy: Callable[[], None],
                 lease: SharedLease = NO_LEASE, kinds: Sequence[str] = (WEIGHTS, OPTIMIZER)) -> None:  # fmt: skip
        """`background`: copy first and write in a thread; else `start` returns when all is written. `tidy`: what rank
        0's thread does after each commit; `lease`: what must be held for one; `kinds`: what there is to write."""
        self.lease, self.kinds = lease, kinds
        self.run_dir, self.state, self.ranks, self.background, self.tidy = run_dir, state, ranks, background, tidy
        self._copy = HostCopy(ranks.device)
        self._index: Index | None = None
        """What lies where, as the ranks have once agreed; it stays the same while they run."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._tidying: Future[None] | None = None

    def start(self, manifest: dict[str, Any], own: dict[str, Any], kinds: Sequence[str]) -> Failed | None:
        """Begin the checkpoint of step manifest["step"]; None when it is under way. None may be pending.

        `own`: what this rank alone knows; `kinds`: which of those there are. Training may continue at once.
        """
        started = time.perf_counter()
        final = directory(self.run_dir, manifest["step"])
        partial = final.with_name(f"{final.name}.{self.lease.epoch}{PARTIAL}")
        fragments, index = self._owned()
        needed = _needed(index, kinds)
        why = self.ranks.from_first(self._prepare(partial, needed) if self.ranks.first else None)
        if why:
            return Failed(manifest["step"], why)
        if self.background:
            copied = self._copy.of(fragments, kinds)
        else:
            copied = [Copied(f.piece, name, [f.values[name]]) for kind in kinds for name in TENSORS[kind]
                      for f in fragments if name in f.values]  # fmt: skip
        written = self._thread.submit(self._write, partial, copied, own, kinds)
        if not self.background:
            wait([written])
        self._pending = _Pending(partial, {**manifest, INDEX: index.described()}, started, written)
        return None

    @property
    def step(self) -> int | None:
        """Of the checkpoint that is pending; None when none is."""
        return self._pending and self._pending.manifest["step"]

    def rehearse(self) -> None:
        """Before the first step: have the memory for the copy, and see that every rank can write and read back.

        Raises StorageError on all ranks when one cannot, or when there is no room for a checkpoint.
        """
        fragments, index = self._owned()
        needed = _needed(index, self.kinds)
        partial = self.run_dir / CHECKPOINTS / f"step-rehearsal.{self.lease.epoch}{PARTIAL}"
        why = self.ranks.from_first(self._prepare(partial, needed) if self.ranks.first else None)
        if why:
            raise StorageError(f"no checkpoint could be written: {why}")
        if self.background:
            self._copy.reserve(sum(fragment.elements(self.kinds) for fragment in fragments))
        said = self.ranks.gather(_tried(lambda: _write_and_read(partial / str(self.ranks.rank))))
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        for rank, why in enumerate(said):
            if why:
                raise StorageError(f"no checkpoint could be written: rank {rank}: {why}")

    def poll(self) -> Saved | Failed | None:
        """What became of the pending checkpoint, once rank 0 has committed what all have written; None until then."""
        if self._pending is None:
            return None
        (through,) = self.ranks.sum([self._pending.through()])
        if through < self.ranks.world:
            return None
        if self._pending.settled:
            return self._conclude(self._pending)
        self._settle(self._pending)
        return None

    def finish(self) -> Saved | Failed | None:
        """What became of it, waiting for all that threads have yet to do."""
        outcome = None
        if pending := self._pending:
            if not pending.settled:
                self._settle(pending)
            outcome = self._conclude(pending)
        if self._tidying:
            wait([self._tidying])
        return outcome

    def _owned(self) -> tuple[list[Fragment], Index]:
        """What this rank is to write, in the order of the index; the first call asks all ranks."""
        fragments = self.state.owned()
        if self._index is None:
            pieces = (fragment.piece for fragment in fragments)
            self._index = agreed(self.ranks, self.state.shapes(), pieces, self.state.moments())
        order = {name: place for place, name in enumerate(self._index.divisions)}
        return sorted(fragments, key=lambda fragment: order[fragment.piece.name]), self._index

    def _prepare(self, partial: Path, needed: int) -> str | None:
        """Make an empty directory to write to; returns why that cannot be done."""
        if self._tidying:
            wait([self._tidying])  # what is being removed may be the room that is needed
        try:
            self.lease.require()  # then all that is partial is of starts that are over
            remove_leavings(self.run_dir, (PARTIAL,))
            partial.mkdir(parents=True)
            free = shutil.disk_usage(partial).free
        except OSError as error:
            return str(StorageError.of(error, doing="write"))
        except UserError as error:
            return str(error)
        if free < needed:
            partial.rmdir()
            return (
                f"{shortage(needed, free, partial.parent)}: free more space, or keep fewer checkpoints "
                "(bst ckpt gc, checkpoint.keep_last)"
            )
        return None

    def _write(
        self, partial: Path, copied: list[Copied], own: dict[str, Any], kinds: Sequence[str]
    ) -> dict[str, FileRecord]:
        files, rank = Files(partial), self.ranks.rank
        for kind in kinds:
            ours = [one for one in copied if one.tensor in TENSORS[kind]]
            with files.open(shard_file(kind, rank)) as file:
                start = write(file, [one.stored(stored_name) for one in ours], [one.runs for one in ours])
            files.records[shard_file(kind, rank)]["start"] = start
        if OPTIMIZER in kinds:
            memory = io.BytesIO()  # torch hides a full disk behind errors of its own
            torch.save(own, memory)
            with files.open(rank_file(rank)) as file:
                file.write(memory.getbuffer())
        return files.records

    def _settle(self, pending: _Pending) -> None:
        """Let rank 0's thread commit the checkpoint, or give it up when any rank could not write its files."""
        everyone = self.ranks.gather(_outcome(pending.written))
        why = next((f"rank {rank}: {said}" for rank, (_, said) in enumerate(everyone) if said), None)
        pending.contents = {
            name: {**record, "rank": rank} for rank, (own, _) in enumerate(everyone) for name, record in own.items()
        }

        def settle() -> str | None:
            failed = why or _tried(lambda: self._commit_if_held(pending))
            if failed:
                shutil.rmtree(pending.partial, ignore_errors=True)
            return failed

        pending.settled = self._thread.submit(settle if self.ranks.first else lambda: None)

    def _commit_if_held(self, pending: _Pending) -> None:
        self.lease.require()
        _commit(pending, directory(self.run_dir, pending.manifest["step"]))

    def _conclude(self, pending: _Pending) -> Saved | Failed:
        """Tell all ranks what became of it."""
        self._pending = None
        why = self.ranks.from_first(pending.settled.result())
        if why is not None:
            return Failed(pending.manifest["step"], why)
        if self.ranks.first:
            self._tidying = self._thread.submit(self.tidy)
        written = sum(record["bytes"] for record in pending.contents.values())
        full = any(name.startswith(OPTIMIZER) for name in pending.contents)
        final = directory(self.run_dir, pending.manifest["step"])
        return Saved(final, full, written, time.perf_counter() - pending.started)


def _needed(index: Index, kinds: Sequence[str]) -> int:
    """Bytes that all ranks are going to write."""
    elements = sum(
        division.numel * min(division.moments, len(TENSORS[kind]))
        for kind in kinds for division in index.divisions.values()
    )  # fmt: skip
    return elements * torch.float32.itemsize + SPARE_BYTES


def _write_and_read(path: Path) -> None:
    """Raise OSError or StorageError unless a file that is written can be read back."""
    content = os.urandom(4096)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != content:
        raise StorageError(f"{socket.gethostname()} reads other bytes from {path} than it has just written")


def _outcome(written: Future[dict[str, FileRecord]]) -> tuple[dict[str, FileRecord], str | None]:
    """What a thread has written, and why it could not write all."""
    records: dict[str, FileRecord] = {}
    why = _tried(lambda: records.update(written.result()))
    return records, why


def _tried(work: Callable[[], object]) -> str | None:
    """Why `work` did not succeed: the system's word, or the whole traceback of what nobody reckoned with."""
    try:
        work()
    except OSError as error:
        return str(StorageError.of(error, doing="write"))
    except UserError as error:
        return str(error)
    except Exception:
        return traceback.format_exc()
    return None


def _commit(pending: _Pending, final: Path) -> None:
    with (pending.partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**pending.manifest, "files": dict(sorted(pending.contents.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(pending.partial)
    if final.exists():  # of the weights alone, or from before a roll-back
        final.rename(final.with_name(final.name + DELETED))
    pending.partial.rename(final)
    sync_directory(final.parent)
