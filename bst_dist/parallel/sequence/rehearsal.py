"""A sequence-parallel group without other ranks, to find out beforehand what a model would send or refuse.

With fake tensors nothing is computed either. So the bytes of a step are known before a launch, from the same code that
will send them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.traffic import Traffic


class Rehearsal(SequenceGroup):
    """Rank `rank` of `size`. It counts what it would send, and receives arbitrary values of the right shape."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.traffic = Traffic()

    def _all_gather(self, message: Tensor) -> Callable[[], list[Tensor]]:
        return lambda: [message] * self.size

    def _send_receive(self, message: Tensor | None, received: Tensor | None, step: int) -> Callable[[], None]:
        return lambda: None

    def _all_to_all(self, message: Tensor) -> Tensor:
        return torch.empty_like(message)
