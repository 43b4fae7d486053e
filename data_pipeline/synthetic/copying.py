"""Copying tasks: repeat the token a fixed distance back, or repeat items without the blanks between them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import EpisodicConfig, Row, TaskConfig


class Copy(TaskConfig):
    """A random word of `lag` tokens, repeated to the end of the row: each token equals the one `lag` tokens before it.

    The first word cannot be predicted and does not count. The answer is a multiple of the lag back, never nearer, so a
    model that sees fewer tokens back can only guess.
    """

    task: Literal["copy"]
    """Repeat the token that came `lag` tokens before."""
    lag: int = Field(ge=1, le=2**40)
    """Length of the word in tokens."""
    symbols: int = Field(16, ge=2, le=2**16)
    """Number of different tokens."""

    @property
    def vocabulary(self) -> int:
        return self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    def problem(self, length: int) -> str | None:
        return f"lag {self.lag} leaves nothing to copy in rows of {length} inputs" if self.lag > length else None

    def row(self, draws: Draws, length: int) -> Row:
        place = np.arange(length + 1)
        word = draws.below(self.symbols, self.lag)
        return Row(word[place % self.lag], np.where(place < self.lag, 0, self.lag))


class SelectiveCopy(EpisodicConfig):
    """Items at random places among blanks, then a marker, then the items in the same order. Only this last part counts.

    This is selective copying of Mamba (arXiv 2312.00752, section 3.1). Token 0 is the blank, 1 the marker, the others
    are items.
    """

    task: Literal["selective-copy"]
    """Repeat the items of an episode without the blanks between them."""
    items: int = Field(16, ge=1, le=2**40)
    """Items per episode."""
    symbols: int = Field(16, ge=2, le=2**16)
    """Number of different items."""

    @property
    def vocabulary(self) -> int:
        return 2 + self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    @property
    def shortest(self) -> int:
        return 2 * self.items + 1

    def episode(self, draws: Draws, tokens: np.ndarray, distance: np.ndarray) -> None:
        begin = len(tokens) - self.items  # where the answers begin
        places = np.sort(draws.chosen(begin - 1, self.items))
        items = 2 + draws.below(self.symbols, self.items)
        tokens[places], tokens[begin - 1], tokens[begin:] = items, 1, items
        distance[begin:] = np.arange(begin, len(tokens)) - places
