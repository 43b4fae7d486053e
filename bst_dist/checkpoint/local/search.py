"""Finds local copies to resume from: lists those on all nodes, checks them, and sends each rank its own copy."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bst_dist.checkpoint.agreement import read_together
from bst_dist.checkpoint.directory import CheckpointError
from bst_dist.checkpoint.layout import Layout
from bst_dist.checkpoint.local.exchange import hand_over
from bst_dist.checkpoint.local.file import Key, LocalCopy
from bst_dist.parallel.ranks import Ranks


@dataclass
class Found:
    """The copies of one state of the run, on all nodes."""

    key: Key
    layout: Layout
    """The layout under which they were taken."""
    holders: dict[int, list[int]] = field(default_factory=dict)
    """Rank -> the nodes that have its copy, each given by its first rank."""

    def missing(self, own: Layout) -> str | None:
        """Return why a run with the layout `own` cannot resume from them; None when every rank's copy was found."""
        if self.layout != own:
            return f"they are of {self.layout}, and this is {own}"
        lost = [rank for rank in range(own.ranks) if rank not in self.holders]
        more = f", nor of {len(lost) - 1} more" if lost[1:] else ""
        return f"no node has the copy of rank {lost[0]}{more}" if lost else None


def list_copies(ranks: Ranks, root: Path, heads: Sequence[int]) -> dict[Key, Found]:
    """Return all copies under `root` on all nodes; all ranks call it. `heads`: for each rank the first of its node."""
    found: dict[Key, Found] = {}
    for head, listed in enumerate(ranks.all_gather_object(_listed(root) if ranks.rank == heads[ranks.rank] else [])):
        for key, rank, layout in listed:
            found.setdefault(key, Found(key, Layout(**layout))).holders.setdefault(rank, []).append(head)
    return found


def folders(root: Path) -> list[Path]:
    """Return what is in the directory of copies on this node; nothing if the node has none."""
    return list(root.iterdir()) if root.is_dir() else []


def _listed(root: Path) -> list[tuple[Key, int, dict[str, int]]]:
    """Return (key, rank, layout) of each copy on this node."""
    listed = []
    for folder in folders(root):
        key = Key.of(folder.name)
        for path in folder.glob("rank-*[0-9]") if key else ():
            with suppress(CheckpointError):
                listed.append((key, int(path.name.removeprefix("rank-")), LocalCopy(path).manifest["layout"]))
    return listed


def fetch_copies(ranks: Ranks, root: Path, heads: Sequence[int], found: Found) -> tuple[list[int], str | None]:
    """Send every rank its copy if its own node lacks it, and check all copies.

    Returns the ranks whose copy came from another node, and an error message or None. All ranks call it.
    """
    own, why = ranks.rank, None
    givers = {taker: holders[0] for taker, holders in sorted(found.holders.items()) if heads[taker] not in holders}
    for taker, giver in givers.items():
        with ranks.phases.exchanging("local copy"):  # on all ranks: the watchdog compares how many each has begun
            if own in (giver, taker):
                try:
                    hand_over(ranks, found.key.path(root, taker), giver, taker)
                except OSError as error:
                    why = f"{socket.gethostname()} cannot write the copy: {error.strerror}"
    said = read_together(ranks, lambda arrived: why or _damage(found.key.path(root, own), arrived))
    return list(givers), next((f"rank {rank}'s: {why}" for rank, why in enumerate(said) if why), None)


def _damage(path: Path, arrived: Callable[[], None]) -> str | None:
    try:
        return None if LocalCopy(path).intact(arrived) else f"damaged on {socket.gethostname()}"
    except CheckpointError as error:
        return str(error)
