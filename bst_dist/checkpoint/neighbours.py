"""Whose local copy each rank keeps beside its own, and how files go from one rank to another.

A node is lost as a whole, so each rank's copy also lies on another node: with equal nodes, the same local rank of the
next one keeps it. Copies are sent by the thread that writes them, in a gloo group of the ranks that send to each other.
That thread alone uses the group, which has connections of its own, so it cannot get into what the ranks send each other
while they train.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, distributed

from bst_dist.checkpoint.local_copy import CHUNK, appearing
from bst_dist.parallel.ranks import Ranks


@dataclass(frozen=True)
class Node:
    """Where a rank is."""

    host: str
    directory: str
    """What tells the node's own directory from that of any other node."""
    free: int
    """Bytes that there are for copies."""

    @classmethod
    def here(cls, root: Path) -> Node:
        """Make the directory for copies, and look at it; raises OSError when that cannot be done.

        Ranks that share a directory see the same numbers, whatever their hosts are called.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # weights are not for everybody on the node
        status, boot = root.stat(), Path("/proc/sys/kernel/random/boot_id")
        machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
        used = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        free = shutil.disk_usage(root).free + used
        return cls(socket.gethostname(), f"{machine}/{status.st_dev}/{status.st_ino}", free)


def keepers(nodes: Sequence[str]) -> list[int | None]:
    """By rank, who keeps its copy; None where that would be on the same node. `nodes`: where each rank is.

    It is the rank that comes as many places later, in the order of the nodes, as the largest node has ranks.
    """
    order, shift = _order(nodes)
    found: list[int | None] = [None] * len(nodes)
    for place, rank in enumerate(order):
        keeper = order[(place + shift) % len(order)]
        found[rank] = None if nodes[keeper] == nodes[rank] else keeper
    return found


def _order(nodes: Sequence[str]) -> tuple[list[int], int]:
    """The ranks, node by node, and the size of the largest node."""
    order = sorted(range(len(nodes)), key=lambda rank: (nodes.index(nodes[rank]), rank))
    return order, max(Counter(nodes).values())


class Neighbours:
    """The rank that keeps this rank's copy, and the one whose copy this rank keeps."""

    def __init__(self, rank: int, nodes: Sequence[str]) -> None:
        """Makes a process group; all ranks do."""
        found = keepers(nodes)
        self.keeper = found[rank]
        self.kept = found.index(rank) if rank in found else None
        order, shift = _order(nodes)
        circles = math.gcd(shift, len(order))
        members = order[order.index(rank) % circles :: circles]
        self._group = None
        if len(members) > 1:
            self._group = distributed.new_group(members, backend="gloo", use_local_synchronization=True)

    def exchange(self, own: Path, kept: Path) -> None:
        """Send the file `own` to the keeper, and write what comes to `kept`.

        The whole circle calls it, also a rank that has no file. Raises OSError when there is no room for what comes,
        but only when all is sent and received: nobody waits for this rank.
        """
        sent = _mapped(own) if self.keeper is not None else torch.empty(0, dtype=torch.uint8)
        size = torch.zeros(1, dtype=torch.int64)
        self._swap(torch.tensor([sent.numel()]), size)
        with _room(kept, int(size)) as received:
            for out, into in zip_longest(_parts(sent), _parts(received)):
                self._swap(out, into)

    def _swap(self, out: Tensor | None, into: Tensor | None) -> None:
        work = None
        if self.keeper is not None and out is not None:
            work = distributed.isend(out, self.keeper, group=self._group)
        if self.kept is not None and into is not None:
            distributed.recv(into, self.kept, group=self._group)
        if work is not None:
            work.wait()


def hand_over(ranks: Ranks, path: Path, giver: int, taker: int) -> None:
    """Send a file from one rank to another, who writes it under the same name in its own directory; these two call.

    Raises OSError on the taker when there is no room for it, when all is received.
    """
    with ranks.phases.exchanging("local copy"):
        if ranks.rank == giver:
            sent = _mapped(path)
            distributed.send(torch.tensor([sent.numel()], device=ranks.device), taker)
            for part in _parts(sent):
                distributed.send(part.to(ranks.device), taker)
            return
        size = torch.zeros(1, dtype=torch.int64, device=ranks.device)
        distributed.recv(size, giver)
        with _room(path, int(size)) as received:
            for into in _parts(received):
                part = torch.empty_like(into, device=ranks.device)
                distributed.recv(part, giver)
                into.copy_(part)


def _parts(values: Tensor) -> Sequence[Tensor]:
    """What is sent at once; nothing of nothing."""
    return values.split(CHUNK) if values.numel() else ()


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, without a copy of them; none where there is no such file: its digest tells."""
    size = path.stat().st_size if path.exists() else 0
    return torch.from_file(str(path), size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _room(path: Path, size: int) -> Iterator[Tensor]:
    """A new file to be filled as a tensor of so many bytes; what does not fit on the disk is received all the same, and
    dropped. Raises OSError at the end then."""
    error = None
    with ExitStack() as stack:
        received = torch.empty(size, dtype=torch.uint8)
        if size:
            try:
                file = stack.enter_context(appearing(path))
                os.posix_fallocate(file.fileno(), 0, size)  # without room the kernel would kill whoever fills the pages
                received = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
            except OSError as raised:
                error = raised
        yield received
        if error is not None:
            raise error
