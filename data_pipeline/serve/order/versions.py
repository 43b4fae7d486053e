"""All versions of the order. A run keeps the version that it began with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.order.order_v1 import LaneStreaming, QuotaMixture
from data_pipeline.serve.order.phases import Cuts, LengthPhase, LengthPhases, PhasePlan, Place
from data_pipeline.serve.order.plan import ORDER_VERSION, Part, Plan, Shuffled, Streaming, make_mixture, make_shuffled
from data_pipeline.serve.order.sizes import STREAMED, BatchSizes
from data_pipeline.serve.order.step_values import StepValues
from data_pipeline.serve.order.stream import Pieces, TokenStream, inputs
from data_pipeline.serve.order.window_stream import WindowCache, WindowStream
from data_pipeline.serve.order.windows import Windows, WindowShuffled
from data_pipeline.serve.reader import Corpus

ORDER_VERSIONS = (1, 2, ORDER_VERSION)


class Stream(Protocol):
    """The token stream of one pass; see `stream.TokenStream`."""

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """Return the runs that make up rows of `count` stream positions; row i begins at position ``starts[i]``."""


class Order(NamedTuple):
    """The order of a run: which sequences its rows read, and which tokens these hold."""

    phases: LengthPhases
    """Which sequence each row of each step reads, and how the corpora are cut into sequences."""
    stream: Callable[[int, int], Stream]
    """Returns the token stream of a corpus in a pass."""


def make_order(
    version: int,
    config: DataConfig,
    corpora: Sequence[Corpus],
    *,
    sizes: BatchSizes,
    lengths: StepValues,
    seed: int,
    block: int | None,
) -> Order:
    """Return the order of a version.

    Args:
        sizes: rows of each step.
        lengths: L, tokens of a sequence, in each step.
        block: W for isolated documents; None otherwise.

    Raises UserError in streaming mode when the number of rows changes, and in an older version of the order when the
    length changes.
    """
    rows = sizes.last
    if config.mode == "streaming" and sizes.since:
        raise UserError(f"{rows} rows per step from step {sizes.since} on: {STREAMED}")
    if version == ORDER_VERSION:
        return _in_windows(config, corpora, sizes, lengths, seed, block)
    if lengths.since:
        raise UserError(
            f"train.length_changes: this run was started with an older version of the data order ({version}), which "
            "cannot change the sequence length; start a new run from the weights (initial_weights.run)"
        )

    def stream(corpus: int, epoch: int) -> TokenStream:
        return TokenStream(corpora[corpus].lengths, block, ("documents", seed, corpus, epoch))

    cuts = _first_cuts(corpora, lengths.last, block)
    plan = _older(version, config, cuts.sequences.tolist(), sizes, seed)
    return Order(LengthPhases([LengthPhase(0, cuts, np.zeros(len(corpora), np.int64), plan)]), stream)


def _older(version: int, config: DataConfig, sequences: Sequence[int], sizes: BatchSizes, seed: int) -> Plan:
    """Return the plan of version 1 or 2."""
    segments = config.segments()
    streams = config.mode == "streaming"
    if version == 1 and streams:
        return LaneStreaming(sequences, segments, sizes.last)
    if version == 1:
        mixture = QuotaMixture([(sizes.first(step), weights) for step, weights in segments], seed)
        return Shuffled(sequences, mixture, sizes, seed)
    if streams:
        return Streaming(sequences, segments, sizes.last, seed)
    return make_shuffled(sequences, segments, sizes, seed)


def _in_windows(
    config: DataConfig,
    corpora: Sequence[Corpus],
    sizes: BatchSizes,
    lengths: StepValues,
    seed: int,
    block: int | None,
) -> Order:
    """Return the order of version 3."""
    shards = [corpus.shard_sizes(block) for corpus in corpora]

    @lru_cache(maxsize=2 * len(corpora))
    def passes(corpus: int, epoch: int) -> Windows:
        return Windows(shards[corpus], (seed, corpus, epoch))

    phases = _phases(config, _first_cuts(corpora, lengths.at(0), block), sizes, lengths, seed, passes)
    fits = [partial(phases.fit, corpus) if config.packing == "best_fit" else None for corpus in range(len(corpora))]
    opened = [WindowCache(corpus, block, fit) for corpus, fit in zip(corpora, fits, strict=True)]

    def stream(corpus: int, epoch: int) -> WindowStream:
        return WindowStream(passes(corpus, epoch), opened[corpus], epoch)

    return Order(phases, stream)


def _first_cuts(corpora: Sequence[Corpus], length: int, block: int | None) -> Cuts:
    totals = [int(corpus.shard_sizes(block).extents.sum()) for corpus in corpora]
    return Cuts(length, np.array([inputs(total, block) for total in totals]), (Place(0, 0),) * len(corpora))


def _phases(
    config: DataConfig,
    cuts: Cuts,
    sizes: BatchSizes,
    lengths: StepValues,
    seed: int,
    passes: Callable[[int, int], Windows],
) -> LengthPhases:
    """Build one phase after the other: where each begins follows from those before it."""
    segments = config.segments()
    before = np.zeros(len(cuts.inputs), np.int64)
    found = []
    mixture = None if config.mode == "streaming" else make_mixture(segments, sizes, seed)
    ends = [start for start, _ in lengths.changes[1:]] + [None]
    for number, ((start, length), until) in enumerate(zip(lengths.changes, ends, strict=True)):
        if number:
            cuts = Cuts(length, cuts.inputs, tuple(found[-1].places(start)))
            before = found[-1].plan.consumed(start)
        if mixture is None:
            part = Part(number, start, until, before, cuts.offsets - before)
            plan: PhasePlan = Streaming(cuts.sequences.tolist(), segments, sizes.last, seed, part)
        else:
            read = None if until is None else mixture.counts(sizes.first(until)) - before
            plan = WindowShuffled(mixture, sizes, seed, passes, cuts, before, read)
        found.append(LengthPhase(start, cuts, before, plan))
    return LengthPhases(found)
