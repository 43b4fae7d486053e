"""Finding the local copies that a run can resume from: what all nodes have, whether it is whole, and who lacks what."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bst_dist.checkpoint.directory import CheckpointError
from bst_dist.checkpoint.layout import Layout
from bst_dist.checkpoint.local_copy import Key, LocalCopy
from bst_dist.checkpoint.neighbours import hand_over
from bst_dist.parallel.ranks import Ranks


@dataclass
class Found:
    """The copies of one state of the run."""

    key: Key
    layout: Layout
    """Under which they were taken."""
    holders: dict[int, list[int]] = field(default_factory=dict)
    """By rank whose copy it is: the first ranks of the nodes that have it."""

    def missing(self, own: Layout) -> str | None:
        """Why a run of the layout `own` cannot resume from them; None when each rank's copy is somewhere."""
        if self.layout != own:
            return f"they are of {self.layout}, and this is {own}"
        lost = [rank for rank in range(own.ranks) if rank not in self.holders]
        more = f", nor of {len(lost) - 1} more" if lost[1:] else ""
        return f"no node has the copy of rank {lost[0]}{more}" if lost else None


def gathered(ranks: Ranks, root: Path, heads: Sequence[int]) -> dict[Key, Found]:
    """What all nodes have under `root`; all ranks call it. `heads`: by rank, the first rank of its node."""
    found: dict[Key, Found] = {}
    for head, listed in enumerate(ranks.gather(_listed(root) if ranks.rank == heads[ranks.rank] else [])):
        for key, rank, layout in listed:
            found.setdefault(key, Found(key, Layout(**layout))).holders.setdefault(rank, []).append(head)
    return found


def _listed(root: Path) -> list[tuple[Key, int, dict[str, int]]]:
    """The copies on this node: which, whose, and under which layout."""
    listed = []
    for folder in root.iterdir():
        key = Key.of(folder.name)
        for path in folder.glob("rank-*[0-9]") if key else ():
            with suppress(CheckpointError):
                listed.append((key, int(path.name.removeprefix("rank-")), LocalCopy(path).manifest["layout"]))
    return listed


def brought(ranks: Ranks, root: Path, heads: Sequence[int], found: Found) -> tuple[list[int], str | None]:
    """Let every rank have its copy on its own node; returns the ranks that got theirs from another, and what is wrong
    with the copies, or None."""
    own, why = ranks.rank, None
    givers = {taker: holders[0] for taker, holders in sorted(found.holders.items()) if heads[taker] not in holders}
    for taker, giver in givers.items():
        if own in (giver, taker):
            try:
                found.key.path(root, taker).parent.mkdir(exist_ok=True)
                hand_over(ranks, found.key.path(root, taker), giver, taker)
            except OSError as error:
                why = f"{socket.gethostname()} has no room: {error.strerror}"
    try:
        if why is None and not LocalCopy(found.key.path(root, own)).intact():
            why = f"damaged on {socket.gethostname()}"
    except CheckpointError as error:
        why = str(error)
    said = ranks.gather(why)
    return list(givers), next((f"rank {rank}'s: {why}" for rank, why in enumerate(said) if why), None)
