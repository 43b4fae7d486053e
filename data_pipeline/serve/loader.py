"""The loader: the batch of any step, as a pure function of the corpora, the settings and the step.

A rank's batch is computed from (corpora, settings, seed, step, rank), without any history. So a run resumes at any step
without reading earlier data, and the global batch is the same for every dp x sp.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_base.stopping import STOP_REQUESTED
from data_pipeline.serve.batch import Batch, block_starts, label_mask, token_starts
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.located_rows import LocatedRows
from data_pipeline.serve.order.mixture import whole_weights
from data_pipeline.serve.order.plan import ORDER_VERSION
from data_pipeline.serve.order.sizes import BatchSizes
from data_pipeline.serve.order.step_values import StepValues
from data_pipeline.serve.order.stream import inputs
from data_pipeline.serve.order.versions import ORDER_VERSIONS, Order, make_order
from data_pipeline.serve.prefetch import Prefetcher
from data_pipeline.serve.reader import Corpus
from data_pipeline.serve.rows import RowReader
from data_pipeline.serve.share import Share
from data_pipeline.serve.slices import Blank, MicroBatch
from data_pipeline.serve.spread import MASKED

_STEPS_AT_ONCE = 4  # steps read in parallel over a network: other requests run while a step waits for its last one


EVERY_SHARD = slice(None)


def open_corpora(config: DataConfig, split: str = "train", checked: slice = EVERY_SHARD) -> list[Corpus]:
    """Open every corpus of the settings.

    `checked`: the shards of each corpus whose sizes are checked here (`Corpus.check_shards`). Raises UserError when a
    corpus is unusable, or when the corpora have different tokenizers.
    """
    corpora = [Corpus.open(url, split, config.storage) for url in config.urls()]
    for other in corpora[1:]:
        if other.manifest.tokenizer.sha256 != corpora[0].manifest.tokenizer.sha256:
            raise UserError(
                f"{other.where} has another tokenizer than {corpora[0].where}: a mixture needs one; "
                "prepare the second with tokenizer.reuse set to the first"
            )
    if config.on_bad_shard == "stop":
        for corpus in corpora:
            corpus.check_shards(checked)
    return corpora


class Loader:
    """Serves the slices of one rank, step after step.

    Args:
        config: the data settings.
        corpora: the result of `open_corpora`.
        share: the part of each step that this rank reads.
        block: W. A rank's part of a slice is a multiple of it, and isolated documents begin at multiples of it.
        seed: keys the order.
        start_step: the step at which iteration begins. A resumed run takes it from its checkpoint.
        changes: (first step, rows from that step on) pairs, for runs in which the rows of a step change.
        lengths: (first step, tokens of a row from that step on) pairs, for runs in which the sequence length changes.

    Raises UserError when the sizes do not fit each other or the corpora.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: Sequence[Corpus],
        share: Share,
        *,
        block: int,
        seed: int,
        start_step: int = 0,
        changes: Sequence[tuple[int, int]] = (),
        lengths: Sequence[tuple[int, int]] = (),
    ) -> None:
        # Without changes to the same length: a resumed run does not have them either (`load_state_dict`).
        plan = StepValues(((0, share.length), *lengths))
        self._lengths = self._planned_lengths = StepValues.of(share.length).planned(0, plan)
        for _, length in self._lengths.changes:
            _check_sizes(replace(share, length=length), block)
        self.config = config
        self._corpora = list(corpora)
        self._share = share
        self._seed, self._start_step = seed, start_step
        self._block = block if config.documents == "isolated" else None
        self.sequences = self._sequences_of_a_pass()
        """Sequences of the first length in one pass over each corpus. The last sequence of a pass may be padded."""
        self._prefetcher: Prefetcher | None = None
        self._planned = BatchSizes(((0, share.rows), *changes))
        self._use_order(ORDER_VERSION, self._planned)

    def __iter__(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield (step, the micro-batches of this rank in order), from `start_step` on, without end.

        Once the process is asked to stop, the iterator waits for nothing: it yields `Blank` for the next step that is
        not ready, and ends.
        """
        self.close()
        far = any(corpus.remote for corpus in self._corpora)
        ahead = self.config.prefetch
        if ahead is None:
            ahead = 8 if far else 2
        threads = _STEPS_AT_ONCE if far else 1
        self._prefetcher = Prefetcher(self.batches, self._start_step, ahead, threads, leave=STOP_REQUESTED)
        return self._served(self._prefetcher)

    def batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step. Calls are independent of each other."""
        return [self._share.laid_out(stored, self._batch) for stored in self._read_all(step)]

    def blank(self, step: int) -> Blank:
        """Return the placeholder for the micro-batches of a step. Nothing is read."""
        return Blank(self._share.laid_out(stored, self._batch) for stored in self._read_all(step, blank=True))

    def tokens(self, step: int) -> list[np.ndarray]:
        """Return the micro-batches of `batches` as they are stored, slice after slice.

        Each slice is (b, l + 1) in the corpus's dtype, including the label of the last input.
        """
        return [part.tokens for stored in self._read_all(step) for part in stored]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint stores after `step` training steps.

        It is under 300 bytes of JSON, plus 12 for each change of the number of rows or of the length. A change of the
        length also adds a few bytes for each corpus.
        """
        lengths = {}
        if self._lengths.since:
            changes = list(map(list, self._lengths.until(step).changes))
            lengths = {"lengths": changes, "begun": self._phases.at(step).plan.begun(step)}
        return self._order_at(step) | self._sizes.until(step).state() | lengths

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the order of `state`, which `state_dict` returned; `start_step` does not change.

        The version of the order, and the rows and lengths up to its step, become those of `state`. Raises UserError,
        naming the differences, when its corpora or settings are not those of this loader. The following may differ: the
        weights from its step on, corpora that had no weight before that step, the length, and in shuffled mode the
        number of rows.
        """
        version = state["order"] if state.get("order") in ORDER_VERSIONS else self._order
        sizes = BatchSizes.from_state(state)
        step = state.get("step", 0)
        begun = state.get("begun")
        kept = StepValues(tuple(map(tuple, state.get("lengths", [(0, self._planned_lengths.at(0))]))))
        self._lengths = kept.planned(step, self._planned_lengths)
        self._use_order(version, sizes.planned(step, self._planned))
        others = {name: value for name, value in state.items() if name not in ("lengths", "begun")}
        require_same_order(self._order_at(step) | sizes.state(), others)
        if self._lengths.since or begun is not None:
            before = self._make_order(version, self._sizes, kept)
            self._phases.require_same_layout(before.phases, begun, step)

    def consumed(self, step: int) -> np.ndarray:
        """Return (corpora,) int64: the sequences of each corpus that all ranks together have read before a step."""
        return self._phases.consumed(step)

    def passes(self, step: int) -> list[float]:
        """Return the number of passes over each corpus before a step."""
        return self._phases.passes(step)

    def padding(self) -> list[float]:
        """Return the fraction of each corpus's stream that is padding between documents; 0 for joined documents."""
        sizes = [corpus.shard_sizes(self._block) for corpus in self._corpora]
        return [1 - int(each.tokens.sum()) / int(each.extents.sum()) for each in sizes]

    @property
    def bad(self) -> list[str]:
        """Messages about the data that `on_bad_shard: skip` has left out so far, one for each place."""
        return list(dict.fromkeys(message for part in self._parts for message in part.reader.bad))

    def close(self) -> None:
        """Stop the prefetch threads, which may be waiting for a network. A second call does nothing."""
        if self._prefetcher is None:
            return
        for corpus in self._corpora:
            corpus.interrupt(True)
        self._prefetcher.close()
        for corpus in self._corpora:
            corpus.interrupt(False)

    def _served(self, prefetcher: Prefetcher[list[MicroBatch]]) -> Iterator[tuple[int, list[MicroBatch]]]:
        for step, batches in prefetcher:
            yield step, self.blank(step) if batches is None else batches

    def _sequences_of_a_pass(self) -> list[int]:
        sequences = []
        for corpus in self._corpora:
            total = int(corpus.shard_sizes(self._block).extents.sum())
            if inputs(total, self._block) < (longest := max(length for _, length in self._lengths.changes)):
                raise UserError(
                    f"{corpus.where}: {total} tokens are fewer than one sequence of {longest}; prepare more text, or "
                    "shorten the sequence"
                )
            sequences.append(-(-inputs(total, self._block) // self._share.length))
        return sequences

    def _make_order(self, version: int, sizes: BatchSizes, lengths: StepValues) -> Order:
        return make_order(
            version,
            self.config,
            self._corpora,
            sizes=sizes,
            lengths=lengths,
            seed=self._seed,
            block=self._block,
        )

    def _use_order(self, version: int, sizes: BatchSizes) -> None:
        self.close()
        self._order, self._sizes, lengths = version, sizes, self._lengths
        order = self._make_order(version, sizes, lengths)
        self._phases = order.phases
        # One stream per corpus, and one more where two passes meet. Changes of rows or length keep them.
        order = order._replace(stream=lru_cache(maxsize=len(self._corpora) + 1)(order.stream))
        starts = sorted({start for changes in (sizes.changes, lengths.changes) for start, _ in changes})
        self._parts = [
            self._part(order, start, end, replace(self._share, rows=sizes.at(start), length=lengths.at(start)))
            for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]

    def _part(self, order: Order, start: int, end: int | None, share: Share) -> _Part:
        """Return the reader and the share for the steps ``start..end``."""
        reader = RowReader(
            self._corpora,
            order,
            share,
            block=self._block,
            on_bad_shard=self.config.on_bad_shard,
            since=start,
            until=end,
            start=self._start_step,
        )
        return _Part(start, share, reader)

    def _order_at(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint stores about the order up to a step, except the number of rows."""
        corpora, weights = self._mixed_until(step)
        return {
            "order": self._order,
            "corpus": hashlib.sha256(corpora.encode()).hexdigest(),
            "split": self._corpora[0].split,
            "weights": hashlib.sha256(weights.encode()).hexdigest()[:16],
            "mode": self.config.mode,
            "block": self._block or 0,
            **({} if self.config.packing == "stream" else {"packing": self.config.packing}),
            "length": self._lengths.at(0),
            "seed": self._seed,
            "step": step,
        }

    def _mixed_until(self, step: int) -> tuple[str, str]:
        """Return strings that identify the corpora read before a step, and their weights."""
        segments = self.config.segments()
        if self._order == 1:  # version 1 compares all corpora and all weights, those of later steps too
            return "".join(corpus.sha256 for corpus in self._corpora), json.dumps(segments)
        used = [(start, whole_weights(weights)) for start, weights in segments if start < max(step, 1)]
        read = [number for number in range(len(self._corpora)) if any(weights[number] for _, weights in used)]
        shares = [(start, [weights[number] for number in read]) for start, weights in used]
        return "".join(f"{number}:{self._corpora[number].sha256}" for number in read), json.dumps(shares)

    def _read_all(self, step: int, blank: bool = False) -> Iterator[list[Stored]]:
        """Yield all slices of each micro-batch; with `blank`, padding in place of their tokens."""
        serving = [each for each in self._parts if each.start <= step][-1]
        for numbers in serving.share.micro_batches:
            yield [self._read(serving, step, numbers, part, blank) for part in range(len(serving.share.begins))]

    def _read(self, serving: _Part, step: int, numbers: np.ndarray, part: int, blank: bool) -> Stored:
        """Read one slice of a micro-batch.

        The last rows may be masked; they hold padding, like rows beyond the end of a pass.
        """
        reader, masked = serving.reader, 0
        if numbers[-1] == MASKED:  # masked rows are always the last ones
            masked = int((numbers == MASKED).sum())
        own = range(len(numbers) - masked)
        if not own:
            located, (tokens, real) = LocatedRows.none(), reader.none(0)
        else:
            place = (
                int(numbers[0]) - serving.share.row_numbers.start
            )  # the reader counts rows from the rank's first row
            if blank:
                located = reader.unread(step, place, place + len(own))
                tokens, real = reader.none(len(own))
            else:
                located, tokens, real = reader.read(step, place, place + len(own), part)
        if masked:
            nothing, unreal = reader.none(masked)
            real = np.concatenate([np.ones(tokens.shape, bool) if real is None else real, unreal])
            tokens = np.concatenate([tokens, nothing])
            located = located.masked(masked)
        if part:  # it follows the slice before it in its row
            located = located._replace(continues=np.ones_like(located.continues))
        return Stored(numbers, serving.share.begins[part], located, tokens, real)

    def _batch(self, stored: Stored) -> Batch:
        """Build the trainer's batch from a stored slice."""
        numbers, begin, rows, tokens, real = stored
        # Two arrays, not two views of one: a GPU copies contiguous memory alone without waiting (`to_device`).
        ids, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        shape = ids.shape
        mask = label_mask(real, shape, rows, self.config.separates_documents)
        if real is not None or self.config.separates_documents:
            labels = np.where(mask, labels, self._corpora[0].manifest.tokenizer.pad_id)
        return Batch(
            input_ids=ids,
            labels=labels,
            loss_mask=mask,
            starts=self._starts(shape, rows),
            continues=rows.continues,
            rows=numbers,
            corpora=rows.corpora,
            epochs=rows.epochs,
            located=rows,
            begin=begin,
        )

    def _starts(self, shape: tuple[int, int], rows: LocatedRows) -> np.ndarray | None:
        if self.config.documents == "masked":
            return token_starts(shape, rows.pieces)
        return None if self._block is None else block_starts(shape, rows.pieces, self._block)


class _Part(NamedTuple):
    """The share and the reader for the steps between two changes of the number of rows, or of their length."""

    start: int
    share: Share
    reader: RowReader


class Stored(NamedTuple):
    """One slice of a micro-batch, with its tokens as they are stored in the corpus."""

    numbers: np.ndarray
    """(b,) int64: the rows' global numbers; `MASKED` for rows that only fill the micro-batch."""
    begin: int
    """The position of the slice's first token in its row."""
    rows: LocatedRows
    tokens: np.ndarray
    """(b, l + 1) in the corpus's dtype, including the label of the last input."""
    real: np.ndarray | None
    """(b, l + 1) bool: which tokens are text; None when all are."""


def require_same_order(own: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise UserError, naming the differences, unless the loader's state in a checkpoint equals this loader's own."""
    differing = [name for name in own | state if own.get(name) != state.get(name)]
    if differing:
        listed = "; ".join(f"{name}: {state.get(name)} then, {own.get(name)} now" for name in differing)
        raise UserError(
            f"the checkpoint's data position belongs to another order ({listed}): "
            "resume with the settings and the corpus it was made with, or start a new run"
        )


def _check_sizes(share: Share, block: int) -> None:
    length, sp, slice_tokens = share.length, share.sp, share.slice_tokens
    if length % (block * sp):
        raise UserError(
            f"sequence length {length} is not a multiple of block x sp = {block} x {sp} = {block * sp}: "
            "a rank's slice must be whole blocks"
        )
    if slice_tokens is not None and (slice_tokens % (block * sp) or length % slice_tokens):
        raise UserError(
            f"slices of {slice_tokens} tokens: they must divide the sequence length {length} and be a multiple of "
            f"block x sp = {block} x {sp} = {block * sp}"
        )
