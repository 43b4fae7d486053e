"""Decides on all ranks together whether a checkpoint is damaged.

When a file does not match the manifest on one host, either the file is damaged or the host reads wrong data: a missing
mount, a stale cache, a faulty controller. So a file counts as damaged only when a second rank, on another host if there
is one, finds the same. When the two disagree, or a host cannot read, the start ends and nothing is changed.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bst_base.errors import StorageError
from bst_base.stopping import Stopped
from bst_dist.checkpoint.attempt import Outcome, attempt
from bst_dist.checkpoint.directory import Finding, committed, compare, listed_files, read_manifest, step_of
from bst_dist.parallel.ranks import Ranks

T = TypeVar("T")

SLICE_S = 5.0
"""Seconds after which a rank that reads takes part in an exchange."""
UNCHANGED = "nothing was changed; start again when all hosts see the same files"


def common_checkpoints(ranks: Ranks, run_dir: Path) -> list[Path]:
    """Return the committed checkpoints of a run, newest first.

    Raises StorageError on all ranks unless all see the same checkpoints.
    """
    seen = gather_or_raise(ranks, lambda: committed(run_dir))
    hosts = ranks.all_gather_object(socket.gethostname())
    most = max(seen, key=len)
    for rank, paths in enumerate(seen):
        if paths != most:
            other = seen.index(most)
            raise StorageError(
                f"{run_dir}: rank {rank} on {hosts[rank]} sees {_listed(paths)}, where rank {other} on {hosts[other]} "
                f"sees {_listed(most)}: is the file system mounted on {hosts[rank]}? {UNCHANGED}"
            )
    return most


def confirmed_damage(ranks: Ranks, checkpoint: Path, kind: str = "") -> list[Finding]:
    """Return the problems of a checkpoint's files, each confirmed by a second rank; the ranks share the reading.

    `kind`: check only files of this kind, for example WEIGHTS. Raises StorageError on all ranks when a rank cannot read
    a file, or when two ranks disagree about one.
    """
    manifest, _ = ranks.broadcast_object(attempt(lambda: read_manifest(checkpoint)) if ranks.first else None)
    # Without a manifest from rank 0, every rank tries to read it and reports the problem.
    first = read_together(ranks, lambda arrived: _examine_share(ranks, checkpoint, manifest, kind, arrived))
    if not any(first):
        return []
    hosts = ranks.all_gather_object(socket.gethostname())
    again = _again(first, hosts)
    own = [name for name, by in again if by == ranks.rank]
    second = read_together(ranks, lambda arrived: _examine_again(checkpoint, own, arrived) if own else [])
    confirmed = {finding.file for found in second for finding in found}
    for rank, found in enumerate(first):
        for finding in found:
            if finding.file not in confirmed:
                by = next(by for name, by in again if name == finding.file)
                raise StorageError(
                    f"checkpoint {step_of(checkpoint)}: rank {rank} on {hosts[rank]} finds: {finding}; rank {by} on "
                    f"{hosts[by]} finds {checkpoint / finding.file} intact: {hosts[rank]} does not see the same "
                    f"file; {UNCHANGED}"
                )
    return list(dict.fromkeys(finding for found in first for finding in found))


def _examine_share(
    ranks: Ranks, checkpoint: Path, manifest: dict[str, Any] | None, kind: str, arrived: Callable[[], None]
) -> list[Finding]:
    """Compare this rank's share of the files: every n-th of those of the kind, for n ranks."""
    files, found = listed_files(checkpoint, manifest)
    names = [name for name in files if name.startswith(kind)][ranks.rank :: ranks.world]
    return found or compare(checkpoint, {name: files[name] for name in names}, arrived=arrived)


def _examine_again(checkpoint: Path, names: Sequence[str], arrived: Callable[[], None]) -> list[Finding]:
    """Read the manifest, which is among `names` if it was damaged, and compare the files with these names."""
    files, found = listed_files(checkpoint)
    return found or compare(checkpoint, {name: files[name] for name in files if name in names}, arrived=arrived)


def manifest_of(ranks: Ranks, checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint on every rank; only rank 0 reads it."""
    return of_first(ranks, lambda: read_manifest(checkpoint))


def of_first(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 and return its result on every rank; its exception is raised on all ranks."""
    value, error = ranks.broadcast_object(attempt(work) if ranks.first else None)
    if error is not None:
        raise error
    return value


def gather_or_raise(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """Run `work` on every rank and return all results; an exception on one rank is raised on all ranks."""
    return _values(ranks.all_gather_object(attempt(work)))


def each_or_raise(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on every rank and return this rank's result; an exception on one rank is raised on all ranks."""
    value, error = attempt(work)
    _values(ranks.all_gather_object(Outcome(None, error)))
    return value


def read_together(ranks: Ranks, work: Callable[[Callable[[], None]], Any]) -> list[Any]:
    """Do `gather_or_raise` for work that reads from the storage, however long this takes.

    `work` calls its argument whenever a part of the data has arrived. The rank then takes part in an exchange if the
    last one was some seconds ago, and ranks that have finished exchange until all have. So the watchdog sees all ranks
    move while data arrives, however slowly, and names a rank for which none does: it is behind the others. No exchange
    lasts as long as the reading, so torch's limit is not reached.
    """
    since = time.monotonic()

    def arrived() -> None:
        nonlocal since
        if time.monotonic() - since > SLICE_S:
            ranks.all_gather_object(None)
            since = time.monotonic()

    own = attempt(lambda: work(arrived))
    while None in (everyone := ranks.all_gather_object(own)):
        pass
    return _values(everyone)


def _values(everyone: Sequence[Outcome[Any]]) -> list[Any]:
    """Return all values. Raises the first exception; Stopped only if there is no other, since it is no fault."""
    errors = [raised for _, raised in everyone if raised is not None]
    if errors:
        raise next((raised for raised in errors if not isinstance(raised, Stopped)), errors[0])
    return [value for value, _ in everyone]


def _again(first: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[tuple[str, int]]:
    """Return (file, rank) pairs: which rank reads each file again. It is the next one, on another host if possible."""
    order = []
    for rank, found in enumerate(first):
        others = [(rank + step) % len(hosts) for step in range(1, len(hosts) + 1)]
        by = next((other for other in others if hosts[other] != hosts[rank]), others[0])
        order += [(finding.file, by) for finding in found]
    return list(dict(order).items())


def _listed(paths: Sequence[Path]) -> str:
    if not paths:
        return "no checkpoint"
    return f"{len(paths)} checkpoint{'s' * (len(paths) > 1)}, the newest of step {step_of(paths[0])}"
