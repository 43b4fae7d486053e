"""A corpus in memory, and a loader of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.format.extents import ShardSizes
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader
from data_pipeline.serve.share import Share


class Memory:
    """A corpus in memory: documents of given lengths, all tokens different; `shards`: documents per shard."""

    where, split, sha256, remote = "memory", "train", "0" * 64, False

    def __init__(self, lengths: list[int], shards: list[int] | None = None) -> None:
        self.lengths = np.array(lengths, np.uint32)
        self.first_documents = np.cumsum([0, *(shards or [len(lengths)])])
        assert self.first_documents[-1] == len(lengths)
        self.begins = np.cumsum(lengths) - lengths + 1  # token 0 is padding
        self.manifest = _Manifest()
        self.tokens_read = 0

    def shard_sizes(self, block: int | None) -> ShardSizes:
        per_shard = np.split(self.lengths.astype(int), self.first_documents[1:-1])
        padded = [sum(-(-n // (block or 1)) * (block or 1) for n in each.tolist()) for each in per_shard]
        return ShardSizes(np.diff(self.first_documents), np.array([each.sum() for each in per_shard]), np.array(padded))

    def shard_lengths(self, shards: np.ndarray) -> np.ndarray:
        first = self.first_documents
        return np.concatenate([self.lengths[first[shard] : first[shard + 1]] for shard in shards.tolist()])

    def find(self, documents: np.ndarray) -> list[Any]:
        """Return an empty list: no document is in a file."""
        return []

    def unmap(self) -> None:
        """Do nothing: no file is mapped."""

    def fetch_ahead(self, now: list[int], soon: list[int]) -> None:
        """Do nothing: everything is in memory."""

    def release(self, shards: set[int]) -> None:
        """Do nothing: no shard is cached."""

    def interrupt(self, stop: bool) -> None:
        """Do nothing: no read ever waits."""

    def read_into(self, number: int, start: int, buffer: memoryview) -> None:
        out = np.frombuffer(buffer, "<u4")
        self.tokens_read += len(out)
        assert 0 <= start < start + len(out) <= self.lengths[number]
        out[:] = self.begins[number] + start + np.arange(len(out))


class _Manifest:
    token_dtype = np.dtype("<u4")

    class tokenizer:
        pad_id = 0


def loader(corpora: Any, mode: str = "shuffled", documents: str = "joined", **sizes_of: Any) -> Loader:
    sizes = {"sequence_length": 32, "block": 8, "rows": 4, "micro_rows": 1, "seed": 3} | sizes_of
    weights = sizes.pop("weights", None)
    changes = sizes.pop("weight_changes", ())
    urls: Any = "memory" if weights is None else [{"corpus": "memory", "weight": weight} for weight in weights]
    packing = sizes.pop("packing", "stream")
    config = DataConfig(
        corpus=urls, mode=mode, documents=documents, packing=packing, weight_changes=changes, prefetch=0
    )
    others = {name: sizes.pop(name) for name in ("block", "seed", "start_step", "changes", "lengths") if name in sizes}
    share = Share(length=sizes.pop("sequence_length"), **sizes)
    return Loader(config, corpora if isinstance(corpora, list) else [corpora], share, **others)
