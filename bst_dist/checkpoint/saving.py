"""Writes checkpoints from all ranks together, while training continues.

Training waits only until the weights and optimizer states are copied to host memory. A thread of each rank writes,
syncs and digests that rank's files, in a directory whose name ends in `.partial`. Between two steps the ranks exchange
whether their threads are done. When all are, rank 0's thread writes the manifest and renames the directory, which
commits the checkpoint. Then it removes checkpoints that are no longer kept. A process killed at any moment leaves the
previous checkpoint unchanged. Only the training thread communicates with other ranks.
"""

from __future__ import annotations

import io
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
from bst_base.files import sync_directory, write_synced
from bst_base.sizes import shortage
from bst_dist.checkpoint.attempt import attempt
from bst_dist.checkpoint.directory import (
    CHECKPOINTS,
    INDEX,
    MANIFEST,
    OPTIMIZER,
    PARTIAL,
    PINNED,
    TENSORS,
    WEIGHTS,
    directory,
    manifest_content,
    rank_file,
    shard_file,
    stored_name,
)
from bst_dist.checkpoint.durable import FileRecord, Files
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.host_copy import Copied, HostCopy, in_order
from bst_dist.checkpoint.index import Index, build_index
from bst_dist.checkpoint.retention import files_held, remove_leftovers, replace, settle_replaced
from bst_dist.checkpoint.shards import write
from bst_dist.faults import ledger
from bst_dist.faults.lease import NO_LEASE, SharedLease
from bst_dist.parallel.ranks import Ranks

SPARE_BYTES = 1 << 20
"""Disk space for small data: the manifest, headers, states of random generators."""
SLICE_S = 5.0
"""Seconds between two exchanges of ranks that wait for their threads."""


class State(Protocol):
    """The state to write: `fragments.EngineState`, or another object sharded over ranks in the same way."""

    def owned(self) -> list[Fragment]:
        """Return the fragments that this rank writes."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters, over all ranks; the same, in the same order, on every rank."""

    def moments(self) -> dict[str, int]:
        """Return the number of MOMENTS for each parameter that does not have all of them; the same on every rank."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    path: Path
    full: bool
    bytes: int
    seconds: float
    """Time from the start of the copy until the commit was noticed."""


@dataclass(frozen=True)
class Failed:
    """A checkpoint that could not be written; the previous one is unchanged."""

    step: int
    why: str

    def __str__(self) -> str:
        return f"no checkpoint of step {self.step}: {self.why}"


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    partial: Path
    manifest: dict[str, Any]
    started: float
    files: Files
    """This rank's files, also while they are being written."""
    written: Future[dict[str, FileRecord]]
    """The records of this rank's files."""
    contents: dict[str, FileRecord] | None = None
    """The records of all ranks' files, once every rank has tried to write its own; None before."""
    settled: Future[str | None] | None = None
    """Rank 0's commit: None when it succeeded, else the error message."""

    def through(self) -> bool:
        """Whether this rank's current work (its files, then the commit) is done."""
        return (self.settled or self.written).done()


class Saver:
    """Writes the checkpoints of one run, one at a time; all ranks make every call."""

    def __init__(
        self,
        run_dir: Path,
        state: State,
        ranks: Ranks,
        background: bool,
        tidy: Callable[[], None],
        lease: SharedLease = NO_LEASE,
        kinds: Sequence[str] = (WEIGHTS, OPTIMIZER),
    ) -> None:
        """`background`: copy first and write in a thread; else `start` returns when this rank's files are written.
        `tidy`: called in rank 0's thread after each commit. `lease`: must be held for a commit. `kinds`: of files that
        a full checkpoint has."""
        self.lease, self.kinds = lease, kinds
        self.run_dir, self.state, self.ranks, self.background, self.tidy = run_dir, state, ranks, background, tidy
        self._copy = HostCopy(ranks.device)
        self._index: Index | None = None
        """Which rank writes which piece. All ranks agree on it once, at the first checkpoint."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._tidying: Future[None] | None = None

    def start(self, manifest: dict[str, Any], own: dict[str, Any], kinds: Sequence[str]) -> Failed | None:
        """Begin the checkpoint of step manifest["step"]; return None, or Failed when it cannot be begun.

        No other checkpoint may be pending. `own`: the state that only this rank has. `kinds`: the kinds of files to
        write. Training may continue when this returns.
        """
        started = time.perf_counter()
        final = directory(self.run_dir, manifest["step"])
        partial = final.with_name(f"{final.name}.{self.lease.epoch}{PARTIAL}")
        fragments, index = self._owned()
        needed = _needed(index, kinds)
        self._wait_for_removals()  # the directory being removed may free the space that is needed
        why = self.ranks.broadcast_object(self._prepare(partial, needed) if self.ranks.first else None)
        if why:
            return Failed(manifest["step"], why)
        if self.background:
            copied = self._copy.of(fragments, kinds)
        else:
            copied = [Copied(piece, name, [values]) for piece, name, values in in_order(fragments, kinds)]
        files = Files(partial)
        written = self._thread.submit(self._write, files, copied, own, kinds)
        self._pending = _Pending(partial, {**manifest, INDEX: index.described()}, started, files, written)
        if not self.background:
            self._wait_for_files(self._pending)
        return None

    @property
    def step(self) -> int | None:
        """The step of the pending checkpoint; None when none is pending."""
        return self._pending and self._pending.manifest["step"]

    def rehearse(self) -> None:
        """Reserve the memory for the copy, and test that every rank can write a file and read it back.

        Called before the first step. Raises StorageError on all ranks when a rank cannot, or when there is no space for
        a checkpoint.
        """
        fragments, index = self._owned()
        needed = _needed(index, self.kinds)
        partial = self.run_dir / CHECKPOINTS / f"step-rehearsal.{self.lease.epoch}{PARTIAL}"
        why = self.ranks.broadcast_object(self._prepare(partial, needed) if self.ranks.first else None)
        if why:
            raise StorageError(f"no checkpoint could be written: {why}")
        if self.background:
            self._copy.reserve(sum(fragment.elements(self.kinds) for fragment in fragments))
        said = self.ranks.all_gather_object(
            _message(attempt(lambda: _write_and_read(partial / str(self.ranks.rank))).error)
        )
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        for rank, why in enumerate(said):
            if why:
                raise StorageError(f"no checkpoint could be written: rank {rank}: {why}")

    def poll(self) -> Saved | Failed | None:
        """Advance the pending checkpoint without waiting; return its outcome once rank 0 has committed, else None."""
        if self._pending is None:
            return None
        (through,) = self.ranks.all_reduce_numbers([self._pending.through()])
        if through < self.ranks.world:
            return None
        if self._pending.settled:
            return self._conclude(self._pending)
        self._settle(self._pending)
        return None

    def finish(self) -> Saved | Failed | None:
        """Wait for the pending checkpoint and for removals; return the outcome, None when none was pending."""
        outcome = None
        if pending := self._pending:
            if not pending.settled:
                self._wait_for_files(pending)
                self._settle(pending)
            outcome = self._conclude(pending)
        self._wait_for_removals()
        return outcome

    def _owned(self) -> tuple[list[Fragment], Index]:
        """Return this rank's fragments in the order of the index, and the index; the first call asks all ranks."""
        fragments = self.state.owned()
        if self._index is None:
            pieces = (fragment.piece for fragment in fragments)
            self._index = build_index(self.ranks, self.state.shapes(), pieces, self.state.moments())
        order = {name: place for place, name in enumerate(self._index.divisions)}
        return sorted(fragments, key=lambda fragment: order[fragment.piece.name]), self._index

    def _prepare(self, partial: Path, needed: int) -> str | None:
        """Create an empty directory to write to; return None, or the reason why this failed."""
        try:
            self.lease.require()  # with the lease, all other partial directories belong to starts that have ended
            settle_replaced(self.run_dir)
            remove_leftovers(self.run_dir, (PARTIAL,))
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

    def _wait_for_files(self, pending: _Pending) -> None:
        """Wait until all ranks have written their files."""
        self._wait_for_all(pending.written, lambda: pending.files.bytes)

    def _wait_for_removals(self) -> None:
        """Wait until rank 0's thread has removed old checkpoints."""
        if self._tidying:
            self._wait_for_all(self._tidying, lambda: files_held(self.run_dir) if self.ranks.first else 0)
            self._tidying = None

    def _wait_for_all(self, work: Future[Any], progress: Callable[[], int]) -> None:
        """Wait until every rank's `work` is done, however long this takes.

        A rank takes part in the next exchange only when its work is done, or `progress` has changed since the last one.
        So the watchdog sees all ranks move while the storage works, however slowly, and names a rank whose storage
        stands still: it is behind the others. No exchange lasts as long as the work, so torch's limit is not reached.
        """
        unfinished = 1.0
        while unfinished:
            seen = progress()
            while wait([work], SLICE_S).not_done and progress() == seen:
                pass
            (unfinished,) = self.ranks.all_reduce_numbers([not work.done()])

    def _write(
        self, files: Files, copied: list[Copied], own: dict[str, Any], kinds: Sequence[str]
    ) -> dict[str, FileRecord]:
        rank = self.ranks.rank
        for kind in kinds:
            ours = [one for one in copied if one.tensor in TENSORS[kind]]
            with files.open(shard_file(kind, rank)) as file:
                start = write(file, [one.stored(stored_name) for one in ours], [one.runs for one in ours])
            files.records[shard_file(kind, rank)]["start"] = start
        if OPTIMIZER in kinds:
            memory = io.BytesIO()  # not the file itself: torch hides a full disk behind its own errors
            torch.save(own, memory)
            with files.open(rank_file(rank)) as file:
                file.write(memory.getbuffer())
        return files.records

    def _settle(self, pending: _Pending) -> None:
        """Let rank 0's thread commit the checkpoint, or remove it when a rank could not write its files."""
        everyone = self.ranks.all_gather_object(_outcome(pending.written))
        why = next((f"rank {rank}: {said}" for rank, (_, said) in enumerate(everyone) if said), None)
        pending.contents = {
            name: {**record, "rank": rank} for rank, (own, _) in enumerate(everyone) for name, record in own.items()
        }

        def settle() -> str | None:
            failed = why or _message(attempt(lambda: self._commit_if_held(pending)).error)
            if failed:
                shutil.rmtree(pending.partial, ignore_errors=True)
            return failed

        pending.settled = self._thread.submit(settle if self.ranks.first else lambda: None)

    def _commit_if_held(self, pending: _Pending) -> None:
        self.lease.require()
        ledger.sync(self.run_dir)
        _commit(pending, directory(self.run_dir, pending.manifest["step"]))

    def _conclude(self, pending: _Pending) -> Saved | Failed:
        """Wait for the commit, and return its outcome on all ranks; rank 0's thread then removes old checkpoints."""
        self._pending = None
        why = self.ranks.broadcast_object(pending.settled.result())
        if why is not None:
            return Failed(pending.manifest["step"], why)
        self._tidying = self._thread.submit(self.tidy if self.ranks.first else lambda: None)
        written = sum(record["bytes"] for record in pending.contents.values())
        full = any(name.startswith(OPTIMIZER) for name in pending.contents)
        final = directory(self.run_dir, pending.manifest["step"])
        return Saved(final, full, written, time.perf_counter() - pending.started)


def _needed(index: Index, kinds: Sequence[str]) -> int:
    """Return the number of bytes that all ranks together will write."""
    elements = sum(
        division.numel * min(division.moments, len(TENSORS[kind]))
        for kind in kinds
        for division in index.divisions.values()
    )
    return elements * torch.float32.itemsize + SPARE_BYTES


def _write_and_read(path: Path) -> None:
    """Write a small file and read it back; raises OSError or StorageError when that fails.

    Rank 0 has created the directory. But another host that looked for it before, over NFS, may still remember that it
    does not exist; creating it makes that host look again.
    """
    content = os.urandom(4096)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, content)
    if path.read_bytes() != content:
        raise StorageError(f"{socket.gethostname()} reads other bytes from {path} than it has just written")


def _outcome(written: Future[dict[str, FileRecord]]) -> tuple[dict[str, FileRecord], str | None]:
    """Wait for a thread; return the records of the files it wrote, and the error message (None if it succeeded)."""
    records, error = attempt(written.result)
    return records or {}, _message(error)


def _message(error: Exception | None) -> str | None:
    """Return the message of an error, or the full traceback of an unexpected one; None when there is none."""
    if isinstance(error, OSError):
        return str(StorageError.of(error, doing="write"))
    if error is None or isinstance(error, UserError):
        return error and str(error)
    return "".join(traceback.format_exception(error))


def _commit(pending: _Pending, final: Path) -> None:
    content = manifest_content({**pending.manifest, "files": dict(sorted(pending.contents.items()))})
    write_synced(pending.partial / MANIFEST, content)
    if (final / PINNED).exists():
        (pending.partial / PINNED).touch()
    sync_directory(pending.partial)
    replace(final, pending.partial)  # there may be a weights-only checkpoint of this step, or one of an earlier start
