"""A copy of weights and moments in the host's memory, which a thread writes while training continues."""

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
    """A tensor's piece that is to be written."""

    piece: Piece
    tensor: str
    """WEIGHT, one of MOMENTS, or AVERAGE."""
    runs: list[Tensor]
    """Its values, one after the other."""

    def stored(self, named: Callable[[str, str], str]) -> Piece:
        """The piece, called in a file what `named` makes of the parameter's name and the tensor's."""
        return replace(self.piece, name=named(self.piece.name, self.tensor))


class HostCopy:
    """A copy of fragments in the host's memory, in the same place each time: fresh pages cost more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Have room for `count` elements."""
        missing = count - sum(memory.numel() for memory in self._memory)
        pinned = self._device.type != "cpu"
        self._memory += [torch.empty(size, pin_memory=pinned) for size in block_sizes(missing)]

    def of(self, fragments: list[Fragment], kinds: Sequence[str]) -> list[Copied]:
        """What is to be written of the fragments, as it is now, until the next call."""
        named = [(f.piece, name, f.values[name]) for kind in kinds for name in TENSORS[kind] for f in fragments
                 if name in f.values]  # fmt: skip
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
"""Elements of the largest block of host memory: 1 GiB."""
SMALLEST = 1 << 18


def block_sizes(count: int) -> list[int]:
    """Powers of two, none above BLOCK, that hold `count` elements and few more.

    torch rounds a block of pinned memory up to a power of two: one of 84 GB would take 137.
    """
    sizes = []
    while count > 0:
        size = min(BLOCK, max(SMALLEST, 1 << (count.bit_length() - 1)))
        sizes.append(size)
        count -= size
    return sizes
