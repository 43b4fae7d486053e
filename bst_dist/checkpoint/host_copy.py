"""A copy of weights and moments in host memory, which a thread writes to disk while training continues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bst_dist.checkpoint.directory import TENSORS
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.shards import Piece


@dataclass(frozen=True)
class Copied:
    """A piece of a tensor to be written to disk."""

    piece: Piece
    tensor: str
    """WEIGHT, one of MOMENTS, or AVERAGE."""
    runs: list[Tensor]
    """Its values, split into consecutive tensors."""

    def stored(self, named: Callable[[str, str], str]) -> Piece:
        """Return the piece under its name in a file; `named`: makes it from the names of parameter and tensor."""
        return replace(self.piece, name=named(self.piece.name, self.tensor))


def in_order(fragments: Sequence[Fragment], kinds: Sequence[str]) -> list[tuple[Piece, str, Tensor]]:
    """Return (piece, tensor's name, values) of the fragments' tensors of these kinds, in the order of the files."""
    return [
        (fragment.piece, name, fragment.values[name])
        for kind in kinds
        for name in TENSORS[kind]
        for fragment in fragments
        if name in fragment.values
    ]


class HostCopy:
    """Copies fragments to host memory, always to the same buffers: new pages would cost more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Allocate buffers for `count` elements in total."""
        missing = count - sum(memory.numel() for memory in self._memory)
        pinned = self._device.type != "cpu"
        self._memory += [torch.empty(size, pin_memory=pinned) for size in block_sizes(missing)]

    def of(self, fragments: list[Fragment], kinds: Sequence[str]) -> list[Copied]:
        """Copy the tensors of these kinds from the fragments; the copies are valid until the next call."""
        named = in_order(fragments, kinds)
        self.reserve(sum(values.numel() for *_, values in named))
        room, copies = deque(self._memory), []
        for piece, name, values in named:
            runs, begin = [], 0
            while begin < values.numel():
                block = room.popleft()
                count = min(block.numel(), values.numel() - begin)
                runs.append(block[:count].copy_(values[begin : begin + count], non_blocking=True))
                begin += count
                if count < block.numel():
                    room.appendleft(block[count:])
            copies.append(Copied(piece, name, runs))
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return copies


BLOCK = 1 << 28
"""Elements of the largest block of host memory (1 GiB)."""
SMALLEST = 1 << 18


def block_sizes(count: int) -> list[int]:
    """Return powers of two, at most BLOCK each, whose sum is `count` or slightly more.

    torch rounds a block of pinned memory up to a power of two: one block of 84 GB would take 137 GB.
    """
    sizes = []
    while count > 0:
        size = min(BLOCK, max(SMALLEST, 1 << (count.bit_length() - 1)))
        sizes.append(size)
        count -= size
    return sizes
