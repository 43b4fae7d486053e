"""Bytes that this rank sends for sequence parallelism, counted where they are sent."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


class Traffic:
    """A counter of bytes by kind of message.

    Counted is what a rank hands to the network: one copy of a tensor for a message to a neighbour, one for each
    other rank in an all-gather (a ring passes every rank's part on that often). DeepSpeed's own logger cannot see
    these: it counts calls of `deepspeed.comm` only.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def count(self, kind: str, message: Tensor, copies: int = 1) -> None:
        """Add `copies` of `message`; reads shapes only, so it never waits for a device."""
        self.sent[kind] += copies * message.numel() * message.element_size()

    def take(self) -> dict[str, int]:
        """Bytes by kind since the last call."""
        taken, self.sent = dict(self.sent), Counter()
        return taken
