"""How much of the stream each shard takes up where documents are padded to a block: one small file a split.

The order needs these sums before the first token is read, and without them the index of every shard would have to be
read for it. The file holds, for each block in `BLOCKS`, one little-endian u64 a shard: its documents' tokens, each
document rounded up to the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCKS = tuple(1 << power for power in range(3, 16))
"""8 to 32,768 tokens; for another block the indexes are read."""


def file_of(split: str) -> str:
    """The file's name in the corpus directory."""
    return f"{split}.extents"


def extents(lengths: np.ndarray, block: int | None) -> np.ndarray:
    """What each document takes up of the stream: its tokens, rounded up to `block` where documents are isolated."""
    if block is None:
        return lengths
    return -(-lengths.astype(np.int64) // block) * block


def shard_extents(lengths: np.ndarray) -> list[int]:
    """What the documents of a shard take up together, for each of `BLOCKS`."""
    return [int(extents(lengths, block).sum()) for block in BLOCKS]


def to_bytes(shards: Sequence[Sequence[int]]) -> bytes:
    """The file of a split, of what `shard_extents` gives for each shard."""
    return np.array(shards, "<u8").reshape(-1, len(BLOCKS)).T.tobytes()


def from_bytes(data: bytes, shards: int, block: int) -> np.ndarray | None:
    """(shards,) int64 for one block; None where the file does not hold that block."""
    if block not in BLOCKS:
        return None
    return np.frombuffer(data, "<u8").reshape(len(BLOCKS), shards)[BLOCKS.index(block)].astype(np.int64)
