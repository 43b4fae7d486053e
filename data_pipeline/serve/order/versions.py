"""Every version of the order that a run may have been promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.order.first_order import LaneStreaming, QuotaMixture
from data_pipeline.serve.order.plan import ORDER_VERSION, Plan, Shuffled, Streaming, dealt, shuffled
from data_pipeline.serve.order.sizes import STREAMED, BatchSizes
from data_pipeline.serve.order.stream import Pieces, TokenStream
from data_pipeline.serve.order.window_stream import WindowCache, WindowStream
from data_pipeline.serve.order.windows import Windows, WindowShuffled
from data_pipeline.serve.reader import Corpus

ORDER_VERSIONS = (1, 2, ORDER_VERSION)


class Stream(Protocol):
    """The tokens of a pass in a row; see `stream.TokenStream`."""

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """The runs that make up rows of `count` stream positions, row i from position ``starts[i]``."""


class Order(NamedTuple):
    """What a run reads."""

    plan: Plan
    """Which sequence each row of each step reads."""
    stream: Callable[[int, int], Stream]
    """Which tokens the sequences hold, by corpus and pass."""


def make_order(
    version: int,
    config: DataConfig,
    corpora: Sequence[Corpus],
    *,
    sequences: Sequence[int],
    sizes: BatchSizes,
    seed: int,
    block: int | None,
    length: int,
) -> Order:
    """The order of a version.

    Args:
        sequences: those of a pass over each corpus.
        sizes: rows of each step.
        block: W where documents are isolated; None where they are joined.
        length: L, tokens of a sequence.

    Raises UserError where rows are streamed and their number has changed.
    """
    segments, rows = config.segments(), sizes.rows
    if config.mode == "streaming" and sizes.since:
        raise UserError(f"{rows} rows per step from step {sizes.since} on: {STREAMED}")
    if version == ORDER_VERSION:
        return _in_windows(config, corpora, sequences, sizes, seed, block, length)
    if version == 1 and config.mode == "streaming":
        plan: Plan = LaneStreaming(sequences, segments, rows)
    elif version == 1:
        mixture = QuotaMixture([(sizes.first(step), weights) for step, weights in segments], seed)
        plan = Shuffled(sequences, mixture, sizes, seed)
    elif config.mode == "streaming":
        plan = Streaming(sequences, segments, rows, seed)
    else:
        plan = shuffled(sequences, segments, sizes, seed)

    def stream(corpus: int, epoch: int) -> TokenStream:
        return TokenStream(corpora[corpus].lengths, block, ("documents", seed, corpus, epoch))

    return Order(plan, stream)


def _in_windows(
    config: DataConfig,
    corpora: Sequence[Corpus],
    sequences: Sequence[int],
    sizes: BatchSizes,
    seed: int,
    block: int | None,
    length: int,
) -> Order:
    """Version 3."""
    shards = [corpus.shard_sizes(block) for corpus in corpora]
    opened = [WindowCache(corpus, block, length if config.packing == "best_fit" else None) for corpus in corpora]

    @lru_cache(maxsize=2 * len(corpora))
    def passes(corpus: int, epoch: int) -> Windows:
        return Windows(shards[corpus], (seed, corpus, epoch))

    def stream(corpus: int, epoch: int) -> WindowStream:
        return WindowStream(passes(corpus, epoch), opened[corpus], epoch)

    segments = config.segments()
    if config.mode == "streaming":
        return Order(Streaming(sequences, segments, sizes.rows, seed), stream)
    mixture = dealt(segments, sizes, seed)
    return Order(WindowShuffled(sequences, mixture, sizes, seed, passes, length), stream)
