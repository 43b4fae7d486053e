"""The interface of every synthetic task: rows of tokens, and which of them can be predicted from earlier ones."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from pydantic import Field

from bst_base.settings import Config
from data_pipeline.synthetic.draws import Draws

TASK_VERSION = 1
"""Version of the tasks' random rows. Any change of a row needs a new version; checkpoints of another version are
refused."""


class Row(NamedTuple):
    """One sequence of L inputs and their labels."""

    tokens: np.ndarray
    """(L + 1,) int64: the inputs are all but the last token, the labels all but the first."""
    distance: np.ndarray
    """(L + 1,) int64: for a token that counts as a label, the distance in tokens back to its answer; 0 for all
    others."""


class TaskConfig(Config):
    """Base of the settings of a task. The class also draws the rows."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of different tokens."""

    @property
    @abstractmethod
    def choices(self) -> int:
        """Number of possible answers. The loss of a uniform guess is its logarithm."""

    @abstractmethod
    def row(self, draws: Draws, length: int) -> Row:
        """Return a row of `length` inputs."""

    def problem(self, length: int) -> str | None:
        """Return why no row of `length` inputs can be drawn; None when one can."""
        return None

    def best_loss(self, first: int, last: int) -> float:
        """Return the lowest mean loss, in nats, that any model can reach on labels of distances `first` to `last`.

        It is 0 if the sequence contains the answer.
        """
        return 0.0

    @property
    def chance_loss(self) -> float:
        """The loss of a uniform guess among the possible answers, in nats."""
        return math.log(self.choices)


class EpisodicConfig(TaskConfig):
    """A task whose row is a series of independent episodes of equal length."""

    span: int | None = Field(None, ge=1)
    """Tokens per episode; null: one episode fills the row. What is left over at the end of a row does not count."""

    @property
    @abstractmethod
    def shortest(self) -> int:
        """Minimum number of tokens of an episode."""

    @abstractmethod
    def episode(self, draws: Draws, tokens: np.ndarray, distance: np.ndarray) -> None:
        """Fill one episode: (span,) tokens and (span,) distances, all 0 before."""

    def row(self, draws: Draws, length: int) -> Row:
        row = Row(np.zeros(length + 1, np.int64), np.zeros(length + 1, np.int64))
        for part in self._episodes(length):
            self.episode(draws, row.tokens[part], row.distance[part])
        return row

    def problem(self, length: int) -> str | None:
        span = self.span or length + 1
        if span < self.shortest:
            return f"an episode needs {self.shortest} tokens and has {span} (span, or the sequence length and one)"
        if span > length + 1:
            return f"span {span} does not fit into a row of {length} inputs and the last label"
        return None

    def _episodes(self, length: int) -> Iterator[slice]:
        span = self.span or length + 1
        for begin in range(0, length + 2 - span, span):
            yield slice(begin, begin + span)
