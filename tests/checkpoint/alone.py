"""Stub of `Ranks` for a run of one process."""

from __future__ import annotations

from typing import Any

import torch


class Alone:
    """Stub of `Ranks` with one process; records printed messages in `said`."""

    rank, world, first, device = 0, 1, True, torch.device("cpu")

    def __init__(self) -> None:
        self.said: list[str] = []

    def print_first(self, text: str) -> None:
        self.said.append(text)

    def all_reduce_numbers(self, values: list[float]) -> list[float]:
        return [float(value) for value in values]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        return value
