"""A sequence-parallel group without any other rank: what a model would send, and what would be refused, beforehand.

With fake tensors nothing is computed either, so the bytes of a step are known before anything is launched, from the
same code that will send them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.traffic import Traffic


class Rehearsal(SequenceGroup):
    """Rank `rank` of `size`: counts what it would send, and receives anything of the right shape."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.traffic = rank, size, Traffic()

    def _all_gather(self, message: Tensor) -> Callable[[], list[Tensor]]:
        return lambda: [message] * self.size

    def _send_receive(self, message: Tensor | None, received: Tensor | None, step: int) -> Callable[[], None]:
        return lambda: None

    def _all_to_all(self, message: Tensor) -> Tensor:
        return torch.empty_like(message)
