"""A stand-in for the ranks of a run of one process."""

from __future__ import annotations

from typing import Any

import torch


class Alone:
    """`Ranks` of one process, which keeps what it is told to say."""

    rank, world, first, device = 0, 1, True, torch.device("cpu")

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def sum(self, values: list[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_first(self, value: Any) -> Any:
        return value
