"""Counts the bytes that this rank sends for sequence parallelism."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


class Traffic:
    """A counter of bytes by kind of message.

    It counts what a rank gives to the network: one copy of a tensor for a message to a neighbour, and one for each
    other rank in an all-gather (a ring passes every rank's part on that often). DeepSpeed's own logger does not see
    these messages, because it counts calls of `deepspeed.comm` only.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def count(self, kind: str, message: Tensor, copies: int = 1) -> None:
        """Add `copies` of `message`. It reads only shapes, so it never waits for a device."""
        self.sent[kind] += copies * message.numel() * message.element_size()

    def take(self) -> dict[str, int]:
        """Return the bytes by kind since the last call."""
        taken = dict(self.sent)
        self.sent = Counter()
        return taken
