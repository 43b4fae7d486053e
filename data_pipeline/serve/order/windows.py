"""Windows: groups of shards. Version 3 of the order shuffles within a window, so that reads stay close together.

A pass puts the shards of a corpus in the order of a keyed permutation, and cuts that order into windows of about
`WINDOW_TOKENS` tokens. The documents of a window are permuted; laid end to end, they are the stream of the window. The
stream of a pass is that of its windows, one after the other, without gaps. Sequences are shuffled within the window in
which they begin. So a run reads from one window at a time, or from two where they meet, and needs the documents of no
other.

All of this follows from the shard sizes in the manifest and from the key. No index is read for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_pipeline.format.extents import ShardSizes
from data_pipeline.serve.order.permutation import Permutation
from data_pipeline.serve.order.phases import Cuts
from data_pipeline.serve.order.plan import Positions, Shuffled
from data_pipeline.serve.order.sizes import BatchSizes

WINDOW_TOKENS = 1 << 30
"""Approximate tokens of a window. A document counts as at least `_DOCUMENT` tokens, since even a short one costs
memory."""
_DOCUMENT = 1 << 11  # limits a window to about half a million documents: 8 MB of order and ends on each rank


class Windows:
    """The windows of one pass.

    Args:
        sizes: of the shards.
        key: seed, corpus and pass.
    """

    def __init__(self, sizes: ShardSizes, key: tuple[int, ...]) -> None:
        shards = Permutation(len(sizes.documents), "shards", *key).all()
        shards = shards[sizes.documents[shards] > 0]
        weight = np.maximum(sizes.tokens, sizes.documents * _DOCUMENT)[shards]
        total = int(weight.sum())
        count = max(1, round(total / WINDOW_TOKENS))
        window = (np.cumsum(weight) - weight) // -(-total // count)
        shards = shards[np.lexsort((shards, window))]  # sorted in a window: the permutation of documents shuffles them
        starts = np.flatnonzero(np.diff(window, prepend=-1))
        self._shards = shards
        self._bounds = np.append(starts, len(shards))
        self._key = key
        ends = np.cumsum(sizes.extents[shards])
        self.begins = np.append(0, ends[self._bounds[1:] - 1])
        """(windows + 1,) int64: the stream position where each window begins, then the end of the last one."""

    def __len__(self) -> int:
        return len(self.begins) - 1

    def shards(self, window: int) -> np.ndarray:
        """Return the shards of a window, in increasing order."""
        return self._shards[self._bounds[window] : self._bounds[window + 1]]

    def extent(self, window: int) -> int:
        """Return the number of stream positions of a window."""
        return int(self.begins[window + 1] - self.begins[window])

    def room(self, window: int, length: int) -> int:
        """Return the room that is left for a window in the sequence of `length` in which it begins."""
        return length - int(self.begins[window]) % length

    def key(self, window: int) -> tuple[int, ...]:
        """Return the key of a window's permutations.

        A pass of one window has the same key as in version 2, so the same order.
        """
        return self._key if len(self) == 1 else (*self._key, window)

    def sequences(self, length: int, base: int, numbers: tuple[int, int]) -> np.ndarray:
        """Return (windows + 1,): the first sequence that begins in each window, then the end of the last sequence.

        Sequences have `length` tokens, and sequence 0 begins at `base`. Only the numbers ``numbers[0]`` up to
        ``numbers[1]`` count. A window shorter than a sequence may have none.
        """
        return np.clip(-(-(self.begins - base) // length), *numbers)


class WindowShuffled(Shuffled):
    """Reads every sequence of a pass once, window after window, permuted within each window.

    Args:
        mixture, sizes, seed: as for `Shuffled`.
        passes: returns the windows of a corpus in a pass.
        cuts: how the corpora are cut into sequences.
        before: (corpora,) sequences of each corpus, of any length, read before this phase.
        read: (corpora,) sequences of each corpus that this phase will read; None: without end.
    """

    streams = False

    def __init__(
        self,
        mixture: Positions,
        sizes: BatchSizes,
        seed: int,
        passes: Callable[[int, int], Windows],
        cuts: Cuts,
        before: np.ndarray,
        read: np.ndarray | None = None,
    ) -> None:
        super().__init__(cuts.sequences.tolist(), mixture, sizes, seed)
        self._passes, self._cuts, self._before = passes, cuts, before
        self._skipped = cuts.skipped.tolist()
        self._stops = None if read is None else [cuts.number(*each) for each in enumerate(read.tolist())]
        self._shift = cuts.offsets - before

    def begun(self, step: int) -> list[list[int] | None]:
        """Return the end of each corpus's partly read window as [pass, position]; None for a corpus without one."""
        counts = self.consumed(step) - self._before
        return [self._begun(corpus, int(count)) for corpus, count in enumerate(counts)]

    def _begun(self, corpus: int, count: int) -> list[int] | None:
        epoch, place = self._cuts.number(corpus, count)
        low, stop = self._range(corpus, epoch)
        if not low < place < stop:
            return None
        firsts = self._firsts(corpus, epoch, self._passes(corpus, epoch))
        window = int(np.searchsorted(firsts, place, side="right"))
        if firsts[window - 1] == place:
            return None
        return [epoch, int(firsts[window]) * self._cuts.length + self._cuts.base(corpus, epoch)]

    def _range(self, corpus: int, epoch: int) -> tuple[int, int]:
        low, stop = super()._range(corpus, epoch)
        if epoch == self._cuts.begins[corpus].epoch:
            low = self._skipped[corpus]
        if self._stops and epoch == self._stops[corpus][0]:
            stop = self._stops[corpus][1]
        return low, stop

    def _firsts(self, corpus: int, epoch: int, windows: Windows) -> np.ndarray:
        """Return (windows + 1,): the first sequence of each window that is read, then the end of the last sequence."""
        return windows.sequences(self._cuts.length, self._cuts.base(corpus, epoch), self._range(corpus, epoch))

    def _permuted(self, corpus: int, epoch: int, places: np.ndarray) -> np.ndarray:
        windows = self._passes(corpus, epoch)
        firsts = self._firsts(corpus, epoch, windows)
        sequences = np.empty_like(places)
        found = np.searchsorted(firsts, places, side="right") - 1
        for window in np.unique(found).tolist():
            own, first = found == window, firsts[window]
            permutation = Permutation(int(firsts[window + 1] - first), "sequences", *windows.key(window))
            sequences[own] = first + permutation(places[own] - first).astype(np.int64)
        return sequences
