"""Decides which other rank keeps each rank's local copy, and sends files between ranks.

A node fails as a whole, so each rank's copy is also stored on another node. With equal nodes, the same local rank of
the next node keeps it. The thread that writes copies also sends them, in a gloo group of the ranks that send to each
other. Only that thread uses the group, and the group has separate connections, so it does not interfere with the
communication of training.
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

from bst_base.files import path_in_errors, unsynced_file
from bst_dist.checkpoint.local.file import CHUNK
from bst_dist.parallel.ranks import Ranks


@dataclass(frozen=True)
class Node:
    """The node of a rank."""

    host: str
    directory: str
    """Identifies the node's directory for copies among those of all nodes."""
    free: int
    """Bytes available for copies."""

    @classmethod
    def here(cls, root: Path) -> Node:
        """Create the directory for copies and return its Node; raises OSError when that fails.

        Ranks that share a directory get the same `directory`, even if their host names differ.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # other users of the node must not read the weights
        status, boot = root.stat(), Path("/proc/sys/kernel/random/boot_id")
        machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
        used = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        free = shutil.disk_usage(root).free + used
        return cls(socket.gethostname(), f"{machine}/{status.st_dev}/{status.st_ino}", free)


def keepers(nodes: Sequence[str]) -> list[int | None]:
    """Return for each rank the rank that keeps its copy; None where that would be on the same node.

    `nodes`: the node of each rank. With the ranks ordered by node, the keeper comes n places later, where n is the
    number of ranks on the largest node.
    """
    order, shift = _order(nodes)
    found: list[int | None] = [None] * len(nodes)
    for place, rank in enumerate(order):
        keeper = order[(place + shift) % len(order)]
        found[rank] = None if nodes[keeper] == nodes[rank] else keeper
    return found


def _order(nodes: Sequence[str]) -> tuple[list[int], int]:
    """Return the ranks ordered by node, and the number of ranks on the largest node."""
    order = sorted(range(len(nodes)), key=lambda rank: (nodes.index(nodes[rank]), rank))
    return order, max(Counter(nodes).values())


class Exchange:
    """Sends this rank's copy to its keeper, and receives the copy that this rank keeps."""

    def __init__(self, rank: int, nodes: Sequence[str]) -> None:
        """Create a process group; every rank must do so."""
        found = keepers(nodes)
        self.keeper = found[rank]
        self.kept = found.index(rank) if rank in found else None
        order, shift = _order(nodes)
        circles = math.gcd(shift, len(order))
        members = order[order.index(rank) % circles :: circles]
        self._group = None
        if len(members) > 1:
            self._group = distributed.new_group(members, backend="gloo", use_local_synchronization=True)

    def swap(self, own: Path, kept: Path) -> None:
        """Send the file `own` to the keeper, and write the received file to `kept`.

        All ranks of the group call it, including ranks without a file. Raises OSError when there is no space for the
        received file, but only after everything is sent and received, so that no other rank waits for this one.
        """
        sent = _mapped(own) if self.keeper is not None else torch.empty(0, dtype=torch.uint8)
        size = torch.zeros(1, dtype=torch.int64)
        self._swap_part(torch.tensor([sent.numel()]), size)
        with _room(kept, int(size)) as received:
            for out, into in zip_longest(_parts(sent), _parts(received)):
                self._swap_part(out, into)

    def _swap_part(self, out: Tensor | None, into: Tensor | None) -> None:
        work = None
        if self.keeper is not None and out is not None:
            work = distributed.isend(out, self.keeper, group=self._group)
        if self.kept is not None and into is not None:
            distributed.recv(into, self.kept, group=self._group)
        if work is not None:
            work.wait()


def hand_over(ranks: Ranks, path: Path, giver: int, taker: int) -> None:
    """Send a file from one rank to another, which writes it to the same path on its node; only these two call it.

    Raises OSError on the receiving rank when there is no space for the file, after everything is received.
    """
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
    """Split values into parts to send one by one; no parts for an empty tensor."""
    return values.split(CHUNK) if values.numel() else ()


def _mapped(path: Path) -> Tensor:
    """Map the bytes of a file to memory; an empty tensor if it does not exist, which the receiver's check detects."""
    size = path.stat().st_size if path.exists() else 0
    return torch.from_file(str(path), size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _room(path: Path, size: int) -> Iterator[Tensor]:
    """Create a file of `size` bytes and yield it as a tensor to fill.

    Without space on the disk, yields ordinary memory, discards it and raises OSError at the end: the sender can finish.
    """
    error = None
    with ExitStack() as stack:
        received = torch.empty(size, dtype=torch.uint8)
        if size:
            try:
                path.parent.mkdir(exist_ok=True)
                stack.enter_context(path_in_errors(path))
                file = stack.enter_context(unsynced_file(path))
                os.posix_fallocate(file.fileno(), 0, size)  # else writing a page without space kills the process
                received = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
            except OSError as raised:
                error = raised
        yield received
        if error is not None:
            raise error
