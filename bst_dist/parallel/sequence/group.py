"""The ranks that share a sequence, in the order of its slices, and their exchanges.

A gather and a shift are started and finished separately, so that a layer can compute while they run. Every rank of the
group must make the same calls in the same order. Messages have the tensor's own dtype. Complex numbers are sent as
pairs of real numbers, which every backend supports.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from bst_dist.parallel.sequence.traffic import Traffic


class SequenceGroup:
    """The sequence-parallel group of this rank: rank r of `size` holds slice r."""

    def __init__(self, process_group: dist.ProcessGroup):
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.traffic = Traffic()

    def gather(self, x: Tensor, kind: str) -> Callable[[], list[Tensor]]:
        """Start an all-gather. Return a function that waits for it and returns every rank's `x`, in rank order."""
        message = _on_the_wire(x)
        self.traffic.count(kind, message, copies=self.size - 1)
        arrive = self._all_gather(message)
        return lambda: [torch.view_as_complex(part) if x.is_complex() else part for part in arrive()]

    def shift(self, x: Tensor, kind: str, to_left: bool = False, around: bool = False) -> Callable[[], Tensor | None]:
        """Start sending `x` to the right neighbour (or the left). Return a function that waits and returns what came.

        The ranks form a line: the last one sends nothing, the first one gets None. With `around` the line is closed to
        a ring. `x` must be real and have the same shape on all ranks.
        """
        step, first, last = (-1, self.size - 1, 0) if to_left else (1, 0, self.size - 1)
        message = _on_the_wire(x) if around or self.rank != last else None
        received = torch.empty_like(x, memory_format=torch.contiguous_format) if around or self.rank != first else None
        if message is not None:
            self.traffic.count(kind, message)
        wait = self._send_receive(message, received, step)

        def finish() -> Tensor | None:
            wait()
            return received

        return finish

    def exchange(self, parts: Tensor, kind: str) -> Tensor:
        """Exchange (size, ...) real by an all-to-all: part r goes to rank r. Return what each rank sent to this one."""
        message = _on_the_wire(parts)
        self.traffic.count(kind, message[0], copies=self.size - 1)
        return self._all_to_all(message)

    def _all_gather(self, message: Tensor) -> Callable[[], list[Tensor]]:
        parts = [torch.empty_like(message) for _ in range(self.size)]
        work = dist.all_gather(parts, message, group=self.process_group, async_op=True)

        def finish() -> list[Tensor]:
            work.wait()
            return parts

        return finish

    def _send_receive(self, message: Tensor | None, received: Tensor | None, step: int) -> Callable[[], None]:
        """Start sending to rank + `step` and receiving from rank - `step`; a tensor that is None is left out."""
        pairs = ((dist.isend, message, step), (dist.irecv, received, -step))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(call, tensor, group=self.process_group, group_peer=(self.rank + distance) % self.size)
                for call, tensor, distance in pairs
                if tensor is not None
            ]
        )

        def finish() -> None:
            for work in works:
                work.wait()

        return finish

    def _all_to_all(self, message: Tensor) -> Tensor:
        received = torch.empty_like(message)
        dist.all_to_all_single(received, message, group=self.process_group)
        return received


def _on_the_wire(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous()
