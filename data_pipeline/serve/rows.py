"""The rows of one rank: where the tokens of its slices lie, and their bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

import numpy as np

from data_pipeline.format.shards import CRC_BLOCK, ShardError
from data_pipeline.serve.located_rows import LocatedRows
from data_pipeline.serve.order.stream import Pieces
from data_pipeline.serve.order.versions import Order
from data_pipeline.serve.reader import Corpus
from data_pipeline.serve.runs import MappedRuns
from data_pipeline.serve.share import Share
from data_pipeline.store.base import REQUESTS
from data_pipeline.store.heap import limit_arenas
from data_pipeline.store.mapped import Collector

_log = logging.getLogger(__name__)
_FEW = 64  # rows located together when their runs are read one by one, or when a pass has fewer rows than this
_TOGETHER = 512  # maximum rows located and read together: many cost little more than one
_TOGETHER_BYTES = 9 << 19  # maximum bytes of these rows in one slice, but at least one step is read
_KEPT_BYTES = 32 << 20  # maximum bytes of these rows over all slices that the rows are cut into


class RowReader:
    """Locates and reads the slices of one rank's rows in every step. Several threads may use it.

    Args:
        corpora, order: what is read.
        share: the rank's rows, and its part of each slice of them.
        block: W for isolated documents; None otherwise.
        since, until: the steps that may be asked for; until None: without end.
        start: the step that is probably asked for first. The steps after it come next.
        on_bad_shard: as in `config.DataConfig`.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        order: Order,
        share: Share,
        *,
        block: int | None,
        on_bad_shard: Literal["stop", "skip"],
        since: int = 0,
        until: int | None = None,
        start: int = 0,
    ) -> None:
        self.bad: list[str] = []
        """Messages about the data that was left out because it is damaged or missing, one for each place."""
        self._corpora, self._plan, self._block = corpora, order.phases, block
        self._share, self._length, self._skip = share, share.tokens, on_bad_shard == "skip"
        self._dtype = corpora[0].manifest.token_dtype
        self._pad_id = corpora[0].manifest.tokenizer.pad_id
        # Over a network the reads of several steps are sent together: latency takes much longer than the transfer.
        self._pool = ThreadPoolExecutor(REQUESTS) if any(corpus.remote for corpus in corpora) else None
        if self._pool:
            limit_arenas()
        self._since, self._until = since, until
        self._start = max(since, start)
        row_bytes = (self._length + 1) * self._dtype.itemsize
        parts = len(share.begins)
        most = min(_TOGETHER_BYTES // row_bytes, _KEPT_BYTES // (row_bytes * parts))
        of_a_pass = int(order.phases.at(since).cuts.sequences.sum())
        self._rows_together = max(1, min(_FEW if self._pool else max(_FEW, min(_TOGETHER, of_a_pass)), most))
        self._group_steps = max(1, self._rows_together // max(1, len(share.row_numbers)))
        self._collector = Collector()
        self._group = lru_cache(maxsize=2 * parts)(self._locate)
        self._tokens = lru_cache(maxsize=parts)(self._read_group)
        self._stream = order.stream

    def read(
        self, step: int, start: int, stop: int, part: int = 0
    ) -> tuple[LocatedRows, np.ndarray, np.ndarray | None]:
        """Read one part of the rank's rows ``start..stop`` in a step, counted from the rank's first row.

        Returns the located rows, their tokens (b, l + 1) in the corpus's dtype, and which of them are text: (b, l + 1)
        bool, None when all are. The caller must not change the tokens.
        """
        if step < self._since:
            raise ValueError(f"step {step}: steps before {self._since} had other rows")
        group = self._steps_with(step)
        before = (step - group.start) * len(self._share.row_numbers)
        begin, end = before + start, before + stop
        rows = self._group(group, part).part(begin, end)
        found = None if self._pool else self._tokens(group, part)
        if found is None:
            return rows, *self._read_by_runs(rows)
        tokens, whole = found
        real = None if whole else _covered(rows, (end - begin, self._length + 1))
        return rows, tokens[begin:end], None if real is None or real.all() else real

    def unread(self, step: int, start: int, stop: int) -> LocatedRows:
        """Return the same rows without their runs of tokens. No index is read for it."""
        rows = self._share.row_numbers[start:stop]
        corpora, epochs, _, continues = self._plan.assign(range(step, step + 1), rows)
        return LocatedRows.none(len(rows))._replace(corpora=corpora, epochs=epochs, continues=continues)

    def none(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of rows that read nothing, and a mask which says that none of them is text."""
        shape = (count, self._length + 1)
        return np.full(shape, self._pad_id, self._dtype), np.zeros(shape, bool)

    def _steps_with(self, step: int) -> range:
        """Return the steps that are located and read together with a step.

        The first groups have 1, 2, 4, … steps, so that the first step is ready soon. Later groups have the best size.
        """
        most, number = self._group_steps, step - self._start
        growing = (1 << most.bit_length() - 1) - 1  # number of steps in the smaller groups
        if 0 <= number < growing:
            size = 1 << (number + 1).bit_length() - 1
            begin = self._start + size - 1
        else:
            size, full = most, self._start + (growing if number >= 0 else 0)
            begin = full + (step - full) // most * most
        end = begin + size
        return range(max(begin, self._since), end if self._until is None else min(end, self._until))

    def _read_group(self, group: range, part: int) -> tuple[np.ndarray, bool] | None:
        """Read a group of steps out of mapped shards: its tokens (rows, l + 1), and whether runs cover all of them.

        Returns None when data is damaged or cannot be mapped.
        """
        rows = self._group(group, part)
        pieces = rows.pieces
        shape = (len(rows.corpora), self._length + 1)
        runs = MappedRuns(self._corpora, rows.corpora, pieces, self._dtype)
        tokens = runs.read(shape, self._pad_id, self._collector)
        if tokens is None:
            for corpus in self._corpora:
                corpus.unmap()
            runs.examine()
            return None
        return tokens, bool(pieces.length.sum() == tokens.size)

    def _empty(self, rows: LocatedRows) -> tuple[np.ndarray, bool]:
        """Return an array for the tokens (b, l + 1) of rows, and whether runs fill all of it.

        If not, it is filled with padding.
        """
        tokens = np.empty((len(rows.corpora), self._length + 1), self._dtype)
        whole = bool(rows.pieces.length.sum() == tokens.size)
        if not whole:
            tokens.fill(self._pad_id)
        return tokens, whole

    def _read_by_runs(self, rows: LocatedRows) -> tuple[np.ndarray, np.ndarray | None]:
        """Read each run on its own; return tokens (b, l + 1), and which of them are text.

        It is used over a network, with many reads in parallel, and for damaged data, which it names or leaves out.
        """
        tokens, whole = self._empty(rows)
        data = memoryview(tokens).cast("B")
        runs = self._runs(rows)

        def read(corpus: Corpus, document: int, offset: int, begin: int, stop: int) -> None:
            corpus.read_into(document, offset, data[begin:stop])

        try:
            if self._pool is None:
                for run in runs:
                    read(*run)
            else:
                list(self._pool.map(lambda run: read(*run), runs))
        except ShardError:
            if not self._skip:
                raise
            return tokens, self._read_what_is_good(rows, tokens)
        return tokens, None if whole else _covered(rows, tokens.shape)

    def _runs(self, rows: LocatedRows) -> Iterator[tuple[Corpus, int, int, int, int]]:
        """Yield (corpus, document, offset in the document, first byte, end byte in the rows' tokens) of each run."""
        row, slot, length, document, offset = rows.pieces
        corpora = [self._corpora[corpus] for corpus in rows.corpora[row].tolist()]
        begin = (row * (self._length + 1) + slot) * self._dtype.itemsize
        stop = begin + length * self._dtype.itemsize
        return zip(corpora, document.tolist(), offset.tolist(), begin.tolist(), stop.tolist(), strict=True)

    def _locate(self, steps: range, part: int) -> LocatedRows:
        """Locate one part of all of the rank's rows in a group of steps."""
        corpora, epochs, sequences, continues = self._plan.assign(steps, self._share.row_numbers)
        starts = sequences * self._share.length + self._share.begins[part]
        cuts = self._plan.at(steps.start).cuts
        parts = []
        for corpus, epoch in sorted(set(zip(corpora.tolist(), epochs.tolist(), strict=True))):
            rows = np.flatnonzero((corpora == corpus) & (epochs == epoch))
            base = cuts.base(corpus, epoch)
            parts.append((rows, self._stream(corpus, epoch).pieces(base + starts[rows], self._length + 1)))
        pieces = Pieces.join(parts)
        if self._block is not None:
            # A run that begins at the label of the last input is another document, so it is no label and is not read.
            pieces = pieces.select((pieces.slot < self._length) | (pieces.offset > 0))
        bounds = np.searchsorted(pieces.row, np.arange(len(starts) + 1)).tolist()
        return LocatedRows(corpora, epochs, continues, pieces, bounds)

    def _read_what_is_good(self, rows: LocatedRows, tokens: np.ndarray) -> np.ndarray:
        """Fill `tokens` with the readable tokens, and with padding elsewhere; return which are text, (b, l + 1) bool.

        It reads block by block, so the tokens that are left out do not depend on how the rows were cut.
        """
        real = _covered(rows, tokens.shape)
        flat, good = tokens.reshape(-1), real.reshape(-1)
        for corpus, document, offset, begin, stop in self._runs(rows):
            begin, stop = begin // tokens.itemsize, stop // tokens.itemsize
            while begin < stop:
                end = min(stop, begin + CRC_BLOCK - offset % CRC_BLOCK)
                try:
                    corpus.read_into(document, offset, memoryview(flat[begin:end]).cast("B"))
                except ShardError as error:
                    flat[begin:end], good[begin:end] = self._pad_id, False
                    self._record(str(error))
                begin, offset = end, offset + end - begin
        return real

    def _record(self, message: str) -> None:
        if message not in self.bad:
            self.bad.append(message)
            _log.warning("left out of the loss: %s", message)


def _covered(rows: LocatedRows, shape: tuple[int, int]) -> np.ndarray:
    """Return (b, l + 1) bool: which tokens are covered by a run."""
    row, slot, length, _, _ = rows.pieces
    change = np.zeros(shape[0] * shape[1] + 1, np.int8)
    begin = row * shape[1] + slot
    change[begin] += 1
    change[begin + length] -= 1  # indexing is enough here: no two runs begin, or end, at the same place
    return np.cumsum(change[:-1], dtype=np.int8).astype(bool).reshape(shape)
