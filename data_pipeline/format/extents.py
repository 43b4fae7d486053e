"""The extents of shards: how many stream positions each takes up when documents are padded to a block.

There is one file per split. The order needs these sums before the first token is read. Without the file, the index of
every shard would have to be read for them. For each block in `BLOCKS`, the file holds one little-endian u64 per shard:
the tokens of its documents, each document rounded up to the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCKS = tuple(1 << power for power in range(3, 16))
"""8 to 32,768 tokens. For any other block, the indexes are read."""


class ShardSizes(NamedTuple):
    """The sizes of the S shards of a split, as the order needs them."""

    documents: np.ndarray  # (S,) int64
    tokens: np.ndarray  # (S,) int64
    extents: np.ndarray  # (S,) int64: stream positions they take up; more than the tokens if documents are padded


def file_of(split: str) -> str:
    """Return the file's name in the corpus directory."""
    return f"{split}.extents"


def extents(lengths: np.ndarray, block: int | None) -> np.ndarray:
    """Return the stream positions of each document: its tokens, rounded up to `block` if documents are isolated."""
    if block is None:
        return lengths
    return -(-lengths.astype(np.int64) // block) * block


def shard_extents(lengths: np.ndarray) -> list[int]:
    """Return the stream positions that the documents of a shard take up together, for each of `BLOCKS`."""
    return [int(extents(lengths, block).sum()) for block in BLOCKS]


def to_bytes(shards: Sequence[Sequence[int]]) -> bytes:
    """Return the content of a split's file, from `shard_extents` of each shard."""
    return np.array(shards, "<u8").reshape(-1, len(BLOCKS)).T.tobytes()


def from_bytes(data: bytes, shards: int, block: int) -> np.ndarray | None:
    """Return (shards,) int64 for one block; None if the file does not contain that block."""
    if block not in BLOCKS:
        return None
    return np.frombuffer(data, "<u8").reshape(len(BLOCKS), shards)[BLOCKS.index(block)].astype(np.int64)
