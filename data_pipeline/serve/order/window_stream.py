"""The stream of a pass in windows (`windows`): the documents of a window are looked up when it is first read from."""

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
from data_pipeline.store.heap import give_back

_INDEX_ENTRY = 28  # bytes that the file of an index has for a document


class OpenWindow:
    """One window: its documents' order and ends, in their own stream.

    Args:
        corpus: where the lengths of the documents are read.
        shards: (k,) of the window.
        block: W where documents are isolated; None where they are joined.
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
        self._begins = np.cumsum(counts) - counts  # each shard's first document, counted in the window
        self._shift = corpus.first_documents[shards] - self._begins  # from there to the number in the corpus
        self._stream = TokenStream(lengths, block, key, fit)
        self.total = self._stream.total

    def cut(self, length: int, room: int) -> tuple[int, int]:
        """How many documents sequences of this length could hold, and how many of those they cut; `room`: as for
        `fitting.best_fit`."""
        sizes = self._stream.sizes
        return int((sizes <= length).sum()), int(cut(sizes, length, room).sum())

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """As `TokenStream.pieces`, with positions counted from the window's begin; they may be before it."""
        found = self._stream.pieces(starts, count)
        shard = np.searchsorted(self._begins, found.document, side="right") - 1
        return found._replace(document=found.document + self._shift[shard])


class WindowStream:
    """The stream of one pass over a corpus; see `stream.TokenStream`.

    The window after those that are read is opened in the background, so that reading does not stop where they meet.

    Args:
        windows: of the pass.
        cache: the open windows of the corpus.
        epoch: which pass.
    """

    def __init__(self, windows: Windows, cache: WindowCache, epoch: int) -> None:
        self._windows, self._cache, self._epoch = windows, cache, epoch
        self._last = -1  # the furthest window that was read
        self.total = int(windows.begins[-1])

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """As `TokenStream.pieces`."""
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
        """When a window is read for the first time, tell the store of it, and open the one after it."""
        last, following = wanted[-1], wanted[-1] + 1
        if last <= self._last:
            return
        self._last = last
        soon = [following] if following < len(self._windows) else []
        self._cache.fetch_ahead(*([self._windows.shards(each) for each in numbers] for numbers in (wanted, soon)))
        for number in soon:
            threading.Thread(target=self._try_to_open, args=(number, len(wanted)), daemon=True).start()

    def _try_to_open(self, window: int, together: int) -> None:
        with suppress(UserError):  # it comes again when the window is read
            self._cache.get(self._epoch, self._windows, window, together)


def _in_order_of_rows(parts: list[Pieces]) -> Pieces:
    """The runs of several windows together; a row's runs stay in the order of the windows."""
    if not parts:  # all rows lie past the end of the pass
        return Pieces(*(np.empty(0, np.int64) for _ in Pieces._fields))
    if len(parts) == 1:
        return parts[0]
    joined = Pieces(*map(np.concatenate, zip(*parts, strict=True)))
    return joined.select(np.argsort(joined.row, kind="stable"))


class WindowCache:
    """The open windows of one corpus: those in use and the next one, by pass and number; opened once each.

    Calls may be made from several threads. `fit`: gives, for the pass and the position where a window begins, what its
    documents are fitted into (as for `TokenStream`); None: they are not.
    """

    def __init__(
        self, corpus: Corpus, block: int | None, fit: Callable[[int, int], tuple[int, int]] | None = None
    ) -> None:
        self._corpus, self._block, self._fit = corpus, block, fit
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], Future[OpenWindow]] = {}  # the one used last is the last

    def get(self, epoch: int, windows: Windows, number: int, together: int) -> OpenWindow:
        """A window of a pass, of which `together` are in use at a time."""
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
        """Told of the shards of the windows that are read from now on, and of those after them."""
        self._corpus.fetch_ahead(*([shard for each in shards for shard in each.tolist()] for shards in (now, soon)))

    def _opened(self, epoch: int, windows: Windows, number: int) -> OpenWindow:
        shards, key = windows.shards(number), ("documents", *windows.key(number))
        fit = self._fit and self._fit(epoch, int(windows.begins[number]))
        window, expected = OpenWindow(self._corpus, shards, self._block, key, fit), windows.extent(number)
        if window.total != expected:
            raise ShardError(
                f"{self._corpus.where}: by their indexes, {len(shards)} shards take up {window.total} tokens, by the "
                f"manifest {expected}; prepare the corpus again"
            )
        give_back(window.documents * _INDEX_ENTRY)
        return window

    def _close_all_but(self, count: int) -> None:
        """Forget the windows that were used before the last `count`, and the shards that none of those needs."""
        oldest = [key for key in list(self._open)[:-count] if self._open[key].done()]
        closed = [self._open.pop(key) for key in oldest]
        shards = {shard for each in closed if not each.exception() for shard in each.result().shards.tolist()}
        if shards:
            for each in self._open.values():
                if each.done() and not each.exception():
                    shards -= set(each.result().shards.tolist())
            self._corpus.release(shards)
