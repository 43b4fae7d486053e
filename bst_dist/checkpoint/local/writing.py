"""Takes a rank's local copies: copies its state to host memory; a thread writes it and sends it to another node."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError, UserError
from bst_dist.checkpoint.attempt import attempt
from bst_dist.checkpoint.config import LOCAL_COPIES_KEPT
from bst_dist.checkpoint.host_copy import Copied, HostCopy
from bst_dist.checkpoint.local.exchange import Exchange, Node, keepers
from bst_dist.checkpoint.local.file import Key, write_copy
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.faults import ledger
from bst_dist.parallel.ranks import Ranks


class NoNewCopiesError(UserError):
    """The reason why no local copies can be taken; raised on all ranks. The run continues without."""


def open_writer(run_dir: Path, snapshots: Snapshots, ranks: Ranks, root: Path, nodes: Sequence[Node]) -> CopyWriter:
    """Create the group of ranks that send copies to each other, and return the writer of this rank's copies.

    All ranks call it. `root`: the directory of the copies on each node. `nodes`: the node of each rank. Raises
    NoNewCopiesError if a rank cannot connect to the others, or if a node has not enough space: a full /dev/shm would
    also break other programs and NCCL.
    """
    places, needed = [node.directory for node in nodes], _needed(snapshots, ranks, nodes)
    _refuse(
        [
            f"{node.host} has {node.free / 1e6:,.1f} MB free in {root.parent}, local copies may take "
            f"{needed[node.directory] / 1e6:,.1f} MB: make room, or set checkpoint.local_directory or "
            "checkpoint.local_every"
            for node in nodes
            if node.free < needed[node.directory]
        ]
    )
    exchange, error = attempt(lambda: Exchange(ranks.rank, places))
    _refuse([why for why in ranks.all_gather_object(message(error)) if why])
    return CopyWriter(run_dir, snapshots, ranks, root, exchange, needed, places)


def _needed(snapshots: Snapshots, ranks: Ranks, nodes: Sequence[Node]) -> dict[str, int]:
    """Return the number of bytes that the copies may take on each node, by its directory."""
    held = snapshots.state.held()
    own = LOCAL_COPIES_KEPT * 4 * sum(fragment.elements(snapshots.kinds) for fragment in held)
    places = [node.directory for node in nodes]
    kept_by, needed = keepers(places), dict.fromkeys(places, 0)
    for rank, size in enumerate(ranks.all_gather_object(own)):
        for holder in {rank, kept_by[rank]} - {None}:
            needed[places[holder]] += size
    return needed


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise NoNewCopiesError(reasons[0])


class CopyWriter:
    """Takes the local copies of one rank, one at a time; every rank makes every call."""

    def __init__(
        self,
        run_dir: Path,
        snapshots: Snapshots,
        ranks: Ranks,
        root: Path,
        exchange: Exchange,
        needed: dict[str, int],
        places: Sequence[str],
    ) -> None:
        """`needed`: bytes that the copies may take on each node. `places`: the node of each rank."""
        self.run_dir, self.snapshots, self.ranks, self.root = run_dir, snapshots, ranks, root
        self.needed = max(needed.values())
        """Bytes that the copies may take on the node with the most."""
        self._exchange, self._places = exchange, places
        self._copy, self._thread = HostCopy(ranks.device), ThreadPoolExecutor(1, "local-copy")
        self._writing: tuple[Key, Future[str | None]] | None = None

    def describe(self) -> str:
        """Return the text about local copies for the header of a start."""
        config = self.snapshots.config
        elsewhere = sum(keeper is not None for keeper in keepers(self._places))
        where = f"those of {elsewhere} of {self.ranks.world} ranks also on another node" if elsewhere else "one node"
        every = config.local_every
        often = "every step" if every == 1 else f"every {every} steps"
        return f"{often} in {config.local_directory}, {where}; up to {self.needed / 1e6:,.1f} MB of a node's memory"

    def take(self, key: Key, position: Position, validation_loss: float | None, prune: Callable[[], None]) -> None:
        """Copy the state to host memory, and let the thread write and send it, after it has called `prune`."""
        copied = self._copy.of(self.snapshots.state.held(), self.snapshots.kinds)
        own = self.snapshots.rank_state(position)
        manifest = {**self.snapshots.described(position, validation_loss), "kinds": self.snapshots.kinds}
        self._writing = key, self._thread.submit(self._write, key, prune, copied, own, manifest)

    def _write(
        self,
        key: Key,
        prune: Callable[[], None],
        copied: Sequence[Copied],
        own: dict[str, Any],
        manifest: dict[str, Any],
    ) -> str | None:
        """Write and send this rank's copy and receive the one it keeps; return None or an error message.

        Runs in the thread.
        """
        with suppress(OSError):
            prune()
        if self.ranks.first:  # the metrics and the ledger must survive this host's failure as the copies do
            with suppress(OSError):  # the writers of these files report such errors
                ledger.sync(self.run_dir)
        path, kept_for = key.path(self.root, self.ranks.rank), self._exchange.kept
        unwritten = attempt(lambda: write_copy(path, copied, own, manifest)).error
        unsent = attempt(lambda: self._exchange.swap(path, key.path(self.root, kept_for or 0))).error
        return message(unwritten or unsent)

    def settle(self) -> Key | None:
        """Wait until all ranks have written and sent the last copy, and return its key; None if none was taken.

        Raises NoNewCopiesError on all ranks when one of them failed.
        """
        if self._writing is None:
            return None
        (key, work), self._writing = self._writing, None
        why = work.result()
        (failed,) = self.ranks.all_reduce_numbers([why is not None])
        if failed:
            _refuse([said for said in self.ranks.all_gather_object(why) if said])
        return key


def message(error: Exception | None) -> str | None:
    """Return the message of an error, of any kind: the run can continue without copies. None when there is none."""
    if isinstance(error, OSError):
        return str(StorageError.of(error, doing="write"))
    return error and f"{socket.gethostname()}: {error!r}"  # for example torch's errors in an exchange
