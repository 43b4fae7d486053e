"""Assembling sharded matrices (`owners`) on their owners, and sending them back: two exchanges for all matrices.

All elements of a sharded matrix except the owner's own are sent, once to the owner and once back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bst_dist.parallel.matrices.owners import Matrix, owners


class MatrixExchange:
    """Assembles sharded matrices on their owners, and sends the results back. Every rank must make every call.

    A rank passes in, and gets back, its own runs: flat tensors, one for each matrix of which it holds a part.
    """

    def __init__(self, matrices: Sequence[Matrix], rank: int, all_to_all: Callable[..., Any] | None = None) -> None:
        """`all_to_all`: `all_to_all_single` of a communication backend; needed if any matrix is sharded."""
        self.matrices, self.rank, self._all_to_all = matrices, rank, all_to_all
        self.owners = owners(matrices)
        cut = [place for place, matrix in enumerate(matrices) if len(matrix.runs) > 1]
        self.any = bool(cut)
        """Whether any rank sends anything."""
        self.put_together = [place for place in cut if self.owners[place] == rank]
        """Sharded matrices that this rank owns."""
        given = [place for place in cut if rank in matrices[place].runs and self.owners[place] != rank]
        self._out = sorted(given, key=lambda place: (self.owners[place], place))
        """Matrices whose runs this rank sends to their owners, in the order of sending."""
        self._into = sorted(
            (other, place) for place in self.put_together for other in matrices[place].runs if other != rank
        )
        """(Sending rank, matrix) of the runs that this rank receives, in the order of receiving."""

    def is_cut(self, place: int) -> bool:
        """Whether a matrix is sharded over several ranks."""
        return len(self.matrices[place].runs) > 1

    def gather(self, runs: dict[int, Tensor], like: Tensor) -> Callable[[], dict[int, Tensor]]:
        """Begin to send this rank's runs to their owners. Return a function that waits for the exchange and returns the
        matrices that this rank owns, flat.

        `runs`: by matrix, at least those that are sharded. `like`: a tensor with the dtype and device of the exchange.
        """
        sent = _joined([runs[place] for place in self._out], like)
        came = like.new_empty(sum(self.matrices[place].runs[other][1] for other, place in self._into))
        wait = self._send(came, sent, self._by_sender(), self._by_owner())

        def finish() -> dict[int, Tensor]:
            wait()
            whole = {}
            for place in self.put_together:
                begin, count = self.matrices[place].runs[self.rank]
                whole[place] = like.new_empty(sum(count for _, count in self.matrices[place].runs.values()))
                whole[place][begin : begin + count] = runs[place]
            parts = came.split([self.matrices[place].runs[other][1] for other, place in self._into])
            for (other, place), part in zip(self._into, parts, strict=True):
                begin, count = self.matrices[place].runs[other]
                whole[place][begin : begin + count] = part
            return whole

        return finish

    def scatter(self, whole: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """Return this rank's run of every sharded matrix, as computed by its owner. `whole`: those this rank owns."""
        sent = _joined([self._run(whole[place], place, other) for other, place in self._into], like)
        came = like.new_empty(sum(self.matrices[place].runs[self.rank][1] for place in self._out))
        self._send(came, sent, self._by_owner(), self._by_sender())()
        parts = came.split([self.matrices[place].runs[self.rank][1] for place in self._out])
        own = {place: self._run(whole[place], place, self.rank) for place in self.put_together}
        return own | dict(zip(self._out, parts, strict=True))

    def _run(self, whole: Tensor, place: int, rank: int) -> Tensor:
        begin, count = self.matrices[place].runs[rank]
        return whole[begin : begin + count]

    def _by_owner(self) -> list[int]:
        """Return how many elements this rank sends to each owner."""
        counts = [0] * torch.distributed.get_world_size()
        for place in self._out:
            counts[self.owners[place]] += self.matrices[place].runs[self.rank][1]
        return counts

    def _by_sender(self) -> list[int]:
        """Return how many elements each rank sends to this one."""
        counts = [0] * torch.distributed.get_world_size()
        for other, place in self._into:
            counts[other] += self.matrices[place].runs[other][1]
        return counts

    def _send(self, came: Tensor, sent: Tensor, into: list[int], out: list[int]) -> Callable[[], object]:
        return self._all_to_all(came, sent, output_split_sizes=into, input_split_sizes=out, async_op=True).wait


def _joined(runs: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([run.to(like.dtype) for run in runs]) if runs else like.new_empty(0)
