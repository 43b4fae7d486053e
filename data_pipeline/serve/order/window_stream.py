"""The token stream of a pass in windows (`windows`). A window's documents are looked up when it is first read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from bst_base.errors import UserError
from data_pipeline.format.shards import ShardError
from data_pipeline.serve.order.fitting import cut
from data_pipeline.serve.order.stream import Pieces, TokenStream
from data_pipeline.serve.order.windows import Windows
from data_pipeline.serve.reader import Corpus
from data_pipeline.store.heap import trim_heap

_INDEX_ENTRY = 28  # bytes per document in an index file


class OpenWindow:
    """One window: the order and the ends of its documents, in its own stream.

    Args:
        corpus: the corpus that the document lengths are read from.
        shards: (k,) of the window.
        block: W for isolated documents; None otherwise.
        key: purpose and numbers that key the permutation of documents.
        fit: as for `TokenStream`.
    """

    def __init__(
        self,
        corpus: Corpus,
        shards: np.ndarray,
        block: int | None,
        key: tuple[str | int, ...],
        fit: tuple[int, int] | None = None,
    ) -> None:
        self.shards = shards
        lengths = corpus.shard_lengths(shards)
        counts = corpus.first_documents[shards + 1] - corpus.first_documents[shards]
        self.documents = len(lengths)
        self._begins = np.cumsum(counts) - counts  # the number of each shard's first document within the window
        self._shift = corpus.first_documents[shards] - self._begins  # from a number in the window to one in the corpus
        self._stream = TokenStream(lengths, block, key, fit)
        self.total = self._stream.total

    def cut(self, length: int, room: int) -> tuple[int, int]:
        """Return how many documents would fit into a sequence of this length, and how many of them are cut.

        `room`: as for `fitting.best_fit`.
        """
        sizes = self._stream.sizes
        return int((sizes <= length).sum()), int(cut(sizes, length, room).sum())

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """Like `TokenStream.pieces`. Positions count from the start of the window, and may be negative."""
        found = self._stream.pieces(starts, count)
        shard = np.searchsorted(self._begins, found.document, side="right") - 1
        return found._replace(document=found.document + self._shift[shard])


class WindowStream:
    """The stream of one pass over a corpus; see `stream.TokenStream`.

    The next window is opened in the background, so that reading does not stop where two windows meet.

    Args:
        windows: of the pass.
        cache: the open windows of the corpus.
        epoch: the number of the pass.
    """

    def __init__(self, windows: Windows, cache: WindowCache, epoch: int) -> None:
        self._windows, self._cache, self._epoch = windows, cache, epoch
        self._last = -1  # the furthest window that was read so far
        self.total = int(windows.begins[-1])

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """Like `TokenStream.pieces`."""
        starts = np.asarray(starts, np.int64)
        begins = self._windows.begins
        first = np.searchsorted(begins, starts, side="right") - 1
        last = np.searchsorted(begins, np.minimum(starts + count, self.total) - 1, side="right") - 1
        touched = range(int(first.min()), min(int(last.max()) + 1, len(self._windows)))
        wanted = [window for window in touched if ((first <= window) & (window <= last)).any()]
        parts = []
        for window in wanted:
            rows = np.flatnonzero((first <= window) & (window <= last))
            opened = self._cache.get(self._epoch, self._windows, window, len(wanted))
            found = opened.pieces(starts[rows] - begins[window], count)
            parts.append(found._replace(row=rows[found.row]))
        if wanted:
            self._look_ahead(wanted)
        return _in_order_of_rows(parts)

    def _look_ahead(self, wanted: list[int]) -> None:
        """When a window is read for the first time, announce it to the storage and open the next window."""
        last, following = wanted[-1], wanted[-1] + 1
        if last <= self._last:
            return
        self._last = last
        soon = [following] if following < len(self._windows) else []
        self._cache.fetch_ahead(*([self._windows.shards(each) for each in numbers] for numbers in (wanted, soon)))
        for number in soon:
            threading.Thread(target=self._try_to_open, args=(number, len(wanted)), daemon=True).start()

    def _try_to_open(self, window: int, together: int) -> None:
        with suppress(UserError):  # the error is raised again when the window is read
            self._cache.get(self._epoch, self._windows, window, together)


def _in_order_of_rows(parts: list[Pieces]) -> Pieces:
    """Join the runs of several windows. The runs of a row stay in the order of the windows."""
    if not parts:  # all rows lie past the end of the pass
        return Pieces(*(np.empty(0, np.int64) for _ in Pieces._fields))
    if len(parts) == 1:
        return parts[0]
    joined = Pieces(*map(np.concatenate, zip(*parts, strict=True)))
    return joined.select(np.argsort(joined.row, kind="stable"))


class WindowCache:
    """The open windows of one corpus, by pass and number: those in use and the next one. Each is opened once.

    Several threads may call it. `fit` returns the `fit` argument of `TokenStream` for the pass and the position where a
    window begins; None: documents are not fitted.
    """

    def __init__(
        self, corpus: Corpus, block: int | None, fit: Callable[[int, int], tuple[int, int]] | None = None
    ) -> None:
        self._corpus, self._block, self._fit = corpus, block, fit
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], Future[OpenWindow]] = {}  # in order of use, the most recent last

    def get(self, epoch: int, windows: Windows, number: int, together: int) -> OpenWindow:
        """Return a window of a pass. `together`: how many windows are in use at the same time."""
        with self._lock:
            opened = self._open.pop((epoch, number), None)
            if new := opened is None:
                opened = Future()
            self._open[epoch, number] = opened
            self._close_all_but(together + 1)
        if new:
            try:
                opened.set_result(self._opened(epoch, windows, number))
            except BaseException as error:
                with self._lock:
                    self._open.pop((epoch, number), None)
                opened.set_exception(error)
        return opened.result()

    def fetch_ahead(self, now: list[np.ndarray], soon: list[np.ndarray]) -> None:
        """Tell the corpus which shards are read from now on, and which come after them; one array per window."""
        self._corpus.fetch_ahead(*([shard for each in shards for shard in each.tolist()] for shards in (now, soon)))

    def _opened(self, epoch: int, windows: Windows, number: int) -> OpenWindow:
        shards = windows.shards(number)
        key = ("documents", *windows.key(number))
        fit = None if self._fit is None else self._fit(epoch, int(windows.begins[number]))
        window = OpenWindow(self._corpus, shards, self._block, key, fit)
        expected = windows.extent(number)
        if window.total != expected:
            raise ShardError(
                f"{self._corpus.where}: by their indexes, {len(shards)} shards take up {window.total} tokens, by the "
                f"manifest {expected}; prepare the corpus again"
            )
        trim_heap(window.documents * _INDEX_ENTRY)
        return window

    def _close_all_but(self, count: int) -> None:
        """Drop all windows but the `count` used last, and release the shards that none of these needs."""
        oldest = [key for key in list(self._open)[:-count] if self._open[key].done()]
        closed = [self._open.pop(key) for key in oldest]
        shards = {shard for each in closed if not each.exception() for shard in each.result().shards.tolist()}
        if shards:
            for each in self._open.values():
                if each.done() and not each.exception():
                    shards -= set(each.result().shards.tolist())
            self._corpus.release(shards)
