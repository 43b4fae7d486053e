"""Every version of the order that a run may have been promised."""

from __future__ import annotations

from collections.abc import Sequence

from bst_base.errors import UserError
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.first_order import LaneStreaming, QuotaMixture
from data_pipeline.serve.plan import ORDER_VERSION, Plan, Shuffled, Streaming, shuffled
from data_pipeline.serve.sizes import STREAMED, BatchSizes

ORDER_VERSIONS = (1, ORDER_VERSION)


def make_plan(version: int, config: DataConfig, sequences: Sequence[int], sizes: BatchSizes, seed: int) -> Plan:
    """The plan of a version: `sequences` are those of a pass over each corpus, `sizes` those of each step.

    Raises UserError where rows are streamed and their number has changed.
    """
    segments, rows = config.segments(), sizes.rows
    if config.mode == "streaming" and sizes.since:
        raise UserError(f"{rows} rows a step from step {sizes.since} on: {STREAMED}")
    if version == 1:
        if config.mode == "streaming":
            return LaneStreaming(sequences, segments, rows)
        mixture = QuotaMixture([(sizes.first(step), weights) for step, weights in segments], seed)
        return Shuffled(sequences, mixture, sizes, seed)
    if config.mode == "streaming":
        return Streaming(sequences, segments, rows, seed)
    return shuffled(sequences, segments, sizes, seed)
