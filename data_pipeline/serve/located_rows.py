"""Where the tokens of some rows lie."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline.serve.order.stream import Pieces


class LocatedRows(NamedTuple):
    """Consecutive rows of some steps: what they read, and where it lies."""

    corpora: np.ndarray  # (rows,) int64
    epochs: np.ndarray  # (rows,) int64
    continues: np.ndarray  # (rows,) bool
    located: Pieces  # the runs of these rows and of all rows that were located together with them
    bounds: list[int]  # (rows + 1,): each row's first run in `located`
    first: int = 0  # the row number in `located` of the first of these rows

    @property
    def pieces(self) -> Pieces:
        """The runs of tokens of these rows."""
        row, *others = (column[self.bounds[0] : self.bounds[-1]] for column in self.located)
        return Pieces(row - self.first, *others)

    def part(self, start: int, stop: int) -> LocatedRows:
        """Return the rows ``start..stop`` of these."""
        corpora, epochs, continues, located, bounds, first = self
        own = slice(start, stop)
        return LocatedRows(corpora[own], epochs[own], continues[own], located, bounds[start : stop + 1], first + start)

    def masked(self, count: int) -> LocatedRows:
        """Return these rows, followed by `count` rows that read nothing."""
        nothing = np.zeros(count, np.int64)
        continues = np.ones(count, bool)
        columns = zip(self[:3], (nothing, nothing, continues), strict=True)
        return LocatedRows(
            *map(np.concatenate, columns), self.located, self.bounds + self.bounds[-1:] * count, self.first
        )

    @staticmethod
    def none(count: int = 0) -> LocatedRows:
        """Return `count` rows that read nothing."""
        nothing, none = np.zeros(0, np.int64), np.zeros(0, bool)
        return LocatedRows(nothing, nothing, none, Pieces(*[nothing] * 5), [0]).masked(count)
