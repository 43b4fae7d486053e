"""Every version of the order that a run may have been promised."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.first_order import LaneStreaming, QuotaMixture
from data_pipeline.serve.plan import ORDER_VERSION, Plan, Shuffled, Streaming, shuffled

ORDER_VERSIONS = (1, ORDER_VERSION)


def make_plan(version: int, config: DataConfig, sequences: Sequence[int], rows: int, seed: int) -> Plan:
    """The plan of a version: `sequences` are those of a pass over each corpus, `rows` those of a step."""
    segments = config.segments()
    if version == 1:
        if config.mode == "streaming":
            return LaneStreaming(sequences, segments, rows)
        mixture = QuotaMixture([(step * rows, weights) for step, weights in segments], seed)
        return Shuffled(sequences, mixture, rows, seed)
    if config.mode == "streaming":
        return Streaming(sequences, segments, rows, seed)
    return shuffled(sequences, segments, rows, seed)
